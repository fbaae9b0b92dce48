"""Log-probability of given labels under a linear head, without ever holding all logits.

    z = h W^T                      [T, V]; with a soft-cap c: z = c tanh(h W^T / c)
    logp_t = z[t, label_t] - log sum_v exp(z[t, v])

The forward runs over chunks of rows and keeps one log-sum-exp per row; the backward computes the chunk's logits again:

    dz[t, v] = g_t (1[v = label_t] - exp(z[t, v] - lse_t)),  times 1 - (z / c)^2 under a soft-cap
    dh = dz W,  dW = dz^T h

so it serves any upstream gradient g (a plain sum, per-token weights, preference losses) at 4 matrix products of
2 T V D operations for a frozen head, 5 for a trained one (Liger's trick of computing gradients in the forward saves one,
but only for sums). The idea of chunking is that of apple/ml-cross-entropy (arXiv 2411.09009).

Logits and log-probs are fp32 (fp64 for fp64 inputs), dW accumulates in it. Rows whose label is negative give 0 and get no
gradient; on the CPU they are left out of the products. On CUDA they are computed and zeroed, since to leave them out the
host would have to wait for their number.

Split over the vocabulary (each rank holds some rows of W), a rank computes the log-sum-exp and the chosen logit of its part;
two sums and a maximum over [T] combine them, in the forward only. dh is then this rank's part of a sum.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Vocabulary(Protocol):
    """How the rows of W are split over ranks."""

    first: int  # the row of the full matrix that this rank's first row is

    def sum(self, x: Tensor) -> Tensor: ...

    def max(self, x: Tensor) -> Tensor: ...

    def join(self, logits: Tensor) -> Tensor: ...


# Bytes of one [rows, V] buffer of logits; up to three live at once (the product's output, its copy, a derivative).
BUDGET = {"cuda": 1 << 30, "cpu": 1 << 24}


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
    budget = budget or BUDGET.get(hidden.device.type, BUDGET["cpu"])
    rows = max(16, budget // (4 * weight.shape[0]))
    return _LinearLogprob.apply(hidden, weight, labels, softcap, rows, split)


def _logits(h: Tensor, w: Tensor, softcap: float | None) -> Tensor:
    """[C, D], [V, D] of one dtype -> [C, V] in at least fp32."""
    z = _mm(h, w.T)
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a b in at least fp32. On CUDA half-precision products accumulate in fp32 anyway; there it is not rounded away."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).to(_wide(a.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, rows: int, split: Vocabulary | None) -> Tensor:
        kept = _kept(labels)
        h = _take(hidden, kept)
        label, held = _held(_take(labels, kept), weight, split)
        w = weight.to(hidden.dtype)
        lse = torch.empty(h.shape[0], dtype=_wide(h.dtype), device=h.device)
        chosen = torch.empty_like(lse)
        for c in _chunks(h.shape[0], rows):
            z = _logits(h[c], w, softcap)
            top = z.amax(1, keepdim=True)
            chosen[c] = z.gather(1, label[c, None])[:, 0]
            lse[c] = z.sub_(top).exp_().sum(1).log_() + top[:, 0]  # z.sub_ in place: one buffer, not three
        if split is not None:
            chosen = split.sum(chosen.masked_fill_(~held, 0.0))
            top = split.max(lse)
            lse = split.sum((lse - top).exp_()).log_() + top
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.softcap, ctx.rows, ctx.split = softcap, rows, split
        logp = chosen - lse
        if kept is None:
            return torch.where(labels >= 0, logp, 0.0)
        return torch.zeros(labels.shape[0], dtype=lse.dtype, device=lse.device).index_copy_(0, kept, logp)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        hidden, weight, labels, lse = ctx.saved_tensors
        kept = _kept(labels)
        h, label = _take(hidden, kept), _take(labels, kept)
        g = torch.where(label >= 0, _take(grad, kept), 0.0)[:, None]
        label, held = _held(label, weight, ctx.split)
        label, chosen = label[:, None], g * held[:, None]
        w = weight.to(hidden.dtype)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dw = torch.zeros(weight.shape, dtype=_wide(weight.dtype), device=weight.device) if ctx.needs_input_grad[1] else None
        for c in _chunks(h.shape[0], ctx.rows):
            z = _logits(h[c], w, ctx.softcap)
            slope = None if ctx.softcap is None else (z / ctx.softcap).square_().neg_().add_(1)
            dz = z.sub_(lse[c, None]).exp_().mul_(-g[c])
            dz.scatter_add_(1, label[c], chosen[c])
            if slope is not None:
                dz.mul_(slope)
            dz = dz.to(h.dtype)
            if dh is not None:
                torch.mm(dz, w, out=dh[c])
            if dw is not None:
                _accumulate(dw, dz, h[c])
        if dh is not None and kept is not None:
            dh = torch.zeros_like(hidden).index_copy_(0, kept, dh)
        return dh, None if dw is None else dw.to(weight.dtype), None, None, None, None


def _held(label: Tensor, weight: Tensor, split: Vocabulary | None) -> tuple[Tensor, Tensor]:
    """Labels as rows of `weight`, 0 where there is none here, and whether there is one. [C] int64, [C] bool."""
    row = label if split is None else label - split.first
    held = (label >= 0) & (row >= 0) & (row < weight.shape[0])
    return torch.where(held, row, 0), held


def _accumulate(dw: Tensor, dz: Tensor, h: Tensor) -> None:
    """dw [V, D] += dz^T h, summed in the dtype of dw. dz: [C, V], h: [C, D]."""
    if dz.is_cuda and dz.dtype != dw.dtype:
        dw.add_(_mm(dz.T, h))
    else:
        dw.addmm_(dz.T.to(dw.dtype), h.to(dw.dtype))


def _kept(labels: Tensor) -> Tensor | None:
    """On the CPU the numbers of the rows with a label, [T'] int64; elsewhere None, for all rows."""
    return None if labels.is_cuda else (labels >= 0).nonzero()[:, 0]


def _take(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None or rows.numel() == x.shape[0] else x.index_select(0, rows)


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]
