"""Log-probability of given labels under a linear head, without ever holding all logits.

    z = h W^T                      [T, V]; with a soft-cap c: z = c tanh(h W^T / c)
    logp_t = z[t, label_t] - log sum_v exp(z[t, v])

Everything runs over chunks of rows whose logits fit a budget. The derivative of one row's logp,

    u[t, v] = 1[v = label_t] - exp(z[t, v] - lse_t),  times 1 - (z / c)^2 under a soft-cap
    dlogp_t / dh_t = u_t W   [D]

needs no upstream gradient, so the forward computes it while it has the logits, and the backward for any upstream gradient g
(a plain sum, per-token weights, preference losses) is dh_t = g_t (u_t W). For a trained head dW = (g u)^T h mixes rows after g
is known: the backward computes the logits again, unless one chunk held them all and kept its u. In products of 2 T V D
operations: 2 for a frozen head, 4 for a trained one, 3 if it fits one chunk. (That chunks need not cost a recomputation is
known for sums, as in Liger; the chunking itself is that of apple/ml-cross-entropy, arXiv 2411.09009.)

Logits and log-probs are fp32 (fp64 for fp64 inputs), dW accumulates in it. Rows whose label is negative give 0 and get no
gradient; on the CPU they are left out of the products. On CUDA they are computed and zeroed, since to leave them out the
host would have to wait for their number.

Split over the vocabulary (each rank holds some rows of W), a rank computes the log-sum-exp and the chosen logit of its part,
and per chunk two sums and a maximum over [C] combine them, in the forward only. dh is then this rank's part of a sum.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable


class Vocabulary(Protocol):
    """How the rows of W are split over ranks."""

    first: int  # the row of the full matrix that this rank's first row is
    most: int  # rows of the rank that holds most; chunks are cut by it, so that all ranks have the same

    def sum(self, x: Tensor) -> Tensor: ...

    def max(self, x: Tensor) -> Tensor: ...

    def join(self, logits: Tensor) -> Tensor: ...


# Bytes of one fp32 [rows, V] buffer of logits. One or two live at once: a second for a soft-cap, and half of one in bf16.
# A chunk reads all of W, so few rows are slow: of a 128k vocabulary 64 MiB hold 128 rows, 16 MiB would cost a third more time.
BUDGET = {"cuda": 1 << 30, "cpu": 1 << 26}


def linear_logprob_ref(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """The obvious twin, through all logits: [T, D], [V, D], [T] -> [T]."""
    logits = F.linear(hidden, weight.to(hidden.dtype)).to(_wide(hidden.dtype))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = torch.log_softmax(logits, -1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels >= 0, logp, 0.0)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    softcap: float | None = None,
    budget: int | None = None,
    split: Vocabulary | None = None,
) -> Tensor:
    """log p(label) per row.

    Args:
        hidden: [T, D] in the compute dtype.
        weight: [V, D] in any float dtype; used in the dtype of `hidden`.
        labels: [T] int64; negative: the row counts for nothing.
        softcap: cap of the logits, or None.
        budget: bytes of one buffer of logits; default by device.
        split: `weight` holds only some rows of the vocabulary; None: all.

    Returns:
        [T] fp32 (fp64 for fp64 `hidden`).
    """
    budget = budget or BUDGET["cuda" if _gpu(hidden) else "cpu"]
    rows = max(16, budget // (4 * (weight.shape[0] if split is None else split.most)))
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    return _LinearLogprob.apply(hidden, weight, labels, softcap, rows, split, *needs)


def _gpu(x: Tensor) -> bool:
    """Is the work cut up as for a GPU? A fake tensor stands for one: dry runs (tools/plan.py) count what a GPU would hold."""
    return x.is_cuda or isinstance(x, FakeTensor)


def _logits(h: Tensor, w: Tensor, softcap: float | None) -> Tensor:
    """[C, D], [V, D] of one dtype -> [C, V] in at least fp32."""
    z = _mm(h, w.T)
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a b in at least fp32. On CUDA half-precision products accumulate in fp32 anyway; there it is not rounded away."""
    if _gpu(a) and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).to(_wide(a.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        softcap: float | None,
        rows: int,
        split: Vocabulary | None,
        needs_dh: bool,
        needs_dw: bool,
    ) -> Tensor:
        kept = _kept(labels)
        h, w = _take(hidden, kept), weight.to(hidden.dtype)
        label, held = _held(_take(labels, kept), weight, split)
        chunks = _chunks(h.shape[0], rows)
        lse = torch.empty(h.shape[0], dtype=_wide(h.dtype), device=h.device)
        logp = torch.empty_like(lse)
        slopes = torch.empty_like(h) if needs_dh else None  # u W, the row's gradient but for g
        only = None  # u of the only chunk
        for c in chunks:
            z = _logits(h[c], w, softcap)
            chosen = z.gather(1, label[c, None])[:, 0]
            bend = _bend(z, softcap) if needs_dh or needs_dw else None
            top = z.amax(1)
            p = z.sub_(top[:, None]).exp_()
            lse[c] = p.sum(1).log_() + top
            if split is not None:
                chosen = split.sum(chosen.masked_fill_(~held[c], 0.0))
                highest = split.max(lse[c])
                lse[c] = split.sum((lse[c] - highest).exp_()).log_() + highest
            logp[c] = chosen - lse[c]
            if needs_dh or (needs_dw and len(chunks) == 1):
                u = _derivative(p.mul_((top - lse[c]).exp_()[:, None]), bend, label[c], held[c]).to(h.dtype)
                if needs_dh:
                    torch.mm(u, w, out=slopes[c])
                if len(chunks) == 1:
                    only = u
        ctx.save_for_backward(*((hidden, weight, lse, only) if needs_dw else (None,) * 4), labels, slopes)
        ctx.softcap, ctx.rows, ctx.split = softcap, rows, split
        if kept is None:
            return torch.where(labels >= 0, logp, 0.0)
        return torch.zeros(labels.shape[0], dtype=lse.dtype, device=lse.device).index_copy_(0, kept, logp)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        hidden, weight, lse, only, labels, slopes = ctx.saved_tensors
        kept = _kept(labels)
        label = _take(labels, kept)
        g = torch.where(label >= 0, _take(grad, kept), 0.0)[:, None]
        dh = dw = None
        if slopes is not None:
            dh = (g * slopes).to(slopes.dtype)
            if kept is not None:
                dh = dh.new_zeros(labels.shape[0], dh.shape[1]).index_copy_(0, kept, dh)
        if weight is not None:
            h, w = _take(hidden, kept), weight.to(hidden.dtype)
            label, held = _held(label, weight, ctx.split)
            dw = torch.zeros(weight.shape, dtype=_wide(weight.dtype), device=weight.device)
            for c in _chunks(h.shape[0], ctx.rows):
                u = only
                if u is None:
                    z = _logits(h[c], w, ctx.softcap)
                    bend = _bend(z, ctx.softcap)
                    u = _derivative(z.sub_(lse[c, None]).exp_(), bend, label[c], held[c])
                _accumulate(dw, (g[c] * u).to(h.dtype), h[c])
            dw = dw.to(weight.dtype)
        return dh, dw, *(None,) * 6


def _bend(z: Tensor, softcap: float | None) -> Tensor | None:
    """Derivative of the soft-cap at the capped logits z: 1 - (z / c)^2, like z."""
    return None if softcap is None else (z / softcap).square_().neg_().add_(1)


def _derivative(p: Tensor, bend: Tensor | None, label: Tensor, held: Tensor) -> Tensor:
    """u from the probabilities p [C, V], in place. label: [C] int64; held: [C] bool, is the label among these rows."""
    u = p.neg_().scatter_add_(1, label[:, None], held.to(p.dtype)[:, None])
    return u if bend is None else u.mul_(bend)


def _held(label: Tensor, weight: Tensor, split: Vocabulary | None) -> tuple[Tensor, Tensor]:
    """Labels as rows of `weight`, 0 where there is none here, and whether there is one. [C] int64, [C] bool."""
    row = label if split is None else label - split.first
    held = (label >= 0) & (row >= 0) & (row < weight.shape[0])
    return torch.where(held, row, 0), held


def _accumulate(dw: Tensor, dz: Tensor, h: Tensor) -> None:
    """dw [V, D] += dz^T h, summed in the dtype of dw. dz: [C, V], h: [C, D]."""
    if _gpu(dz) and dz.dtype != dw.dtype:
        dw.add_(_mm(dz.T, h))
    else:
        dw.addmm_(dz.T.to(dw.dtype), h.to(dw.dtype))


def _kept(labels: Tensor) -> Tensor | None:
    """On the CPU the numbers of the rows with a label, [T'] int64; elsewhere None, for all rows."""
    return None if _gpu(labels) else (labels >= 0).nonzero()[:, 0]


def _take(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None or rows.numel() == x.shape[0] else x.index_select(0, rows)


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]
