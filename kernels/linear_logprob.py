"""Log-probability of given labels under a linear head, without ever holding all logits.

    z = h W^T                      [T, V]; with a soft-cap c: z = c tanh(h W^T / c)
    lse_t  = log sum_v exp(z[t, v])
    logp_t = z[t, label_t] - lse_t

What a loss may want beside it (`Extras`), with smoothing s (arXiv 1512.00567, as in torch's cross_entropy) and z-loss k (PaLM, arXiv
2204.02311, section 5), and in nats the entropy of the row's distribution p:

    value_t   = (1 - s) logp_t + s mean_v(z[t, v] - lse_t) - k lse_t^2
    entropy_t = lse_t - sum_v p[t, v] z[t, v]

Everything runs over chunks of rows whose logits fit a budget. The derivative of one row's value,

    u[t, v] = (1 - s) 1[v = label_t] + s / V - (1 + 2 k lse_t) exp(z[t, v] - lse_t),  times 1 - (z / c)^2 under a soft-cap
    dvalue_t / dh_t = u_t W   [D]

needs no upstream gradient, so the forward computes it while it has the logits, and the backward for any upstream gradient g
(a plain sum, per-token weights, preference losses) is dh_t = g_t (u_t W). For a trained head dW = (g u)^T h mixes rows after g
is known: the backward computes the logits again, unless one chunk held them all and kept its u. Where the caller says that g will be
one number for all rows, as under a sum (`summed`), the forward adds up u^T h, and dW is g times that. In products of 2 T V D
operations: 2 for a frozen head, 3 for a trained one under a sum or in one chunk, else 4. (That sums need no recomputation is used by
Liger, arXiv 2410.10989; the chunking itself is that of apple/ml-cross-entropy, arXiv 2411.09009.)

Logits and all sums over them are fp32 (fp64 for fp64 inputs), dW accumulates in it. Rows whose label is negative give 0 and get no
gradient; they are left out of the products where the host knows how many rows are left: on the CPU always, elsewhere if the caller
says so (`learned`). Otherwise they are computed and zeroed, since to count them the host would have to wait for the device.

Split over the vocabulary (each rank holds some rows of W), a rank computes the sums over its part, and per chunk one maximum [C] and
one sum [4, C] combine them, in the forward only. dh is then this rank's part of a sum.

The Triton kernels read a chunk once for all of the sums, and once more to write u in the dtype of the second product. A program walks
along its row, a block of columns at a time, so any V fits its registers. It is not split: a chunk of the usual budget has a thousand rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from kernels.launch import block, grid, jit, operator, tl, warps, wide_dtype

WIDEST = 4096  # columns of a block: 16 a thread


class Vocabulary(Protocol):
    """How the rows of W are split over ranks."""

    rows: int  # of the full matrix
    first: int  # the row of the full matrix that this rank's first row is
    most: int  # rows of the rank that holds most; chunks are cut by it, so that all ranks have the same

    def sum(self, x: Tensor) -> Tensor: ...

    def max(self, x: Tensor) -> Tensor: ...

    def join(self, logits: Tensor) -> Tensor: ...


class Extras(NamedTuple):
    """What is wanted beside plain log-probabilities (the module's docstring has the formulas)."""

    smoothing: float = 0.0  # s: share of the label's weight that is spread over the vocabulary, from 0 to below 1
    z_loss: float = 0.0  # k
    entropy: bool = False


PLAIN = Extras()


class Scores(NamedTuple):
    """Each [T] fp32 (fp64 for fp64 inputs), 0 where the label is negative. Only `value` has a gradient."""

    value: Tensor
    logp: Tensor
    entropy: Tensor | None  # None: not asked for


class Impl(NamedTuple):
    """The work on a chunk's products z [C, V], in two halves that hand over a state of their own, into which z may be made.

    label: [C] int64, columns of z, -1 where this part of the vocabulary has none.

    read: (z, label, softcap, extras) -> ([4, C]: lse, the label's logit or 0, sum of logits, mean of logits under p; the state).
        The third is there under smoothing, the fourth for entropy.
    again: (z, lse [C], softcap) -> the state, where lse is known.
    slope: (state, label, lse [C], softcap, extras, V of the whole vocabulary, scale [C, 1] or None, dtype) -> u times scale, [C, V].
    """

    read: Callable
    again: Callable
    slope: Callable


# Bytes of one fp32 [rows, V] buffer of logits. One or two live at once: a second for a soft-cap, and half of one in bf16.
# A chunk reads all of W, so few rows are slow: of a 128k vocabulary 64 MiB hold 128 rows.
BUDGET = {"cuda": 1 << 30, "cpu": 1 << 26}


def linear_logprob_ref(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """The obvious twin of `linear_logprob`, through all logits: [T, D], [V, D], [T] -> [T]."""
    return linear_scores_ref(hidden, weight, labels, softcap).logp


def linear_scores_ref(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None, extras: Extras = PLAIN) -> Scores:
    """The obvious twin of `linear_scores`. Autograd sees through all of it; compare gradients of `value`."""
    logits = F.linear(hidden, weight.to(hidden.dtype)).to(wide_dtype(hidden.dtype))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    every = torch.log_softmax(logits, -1)
    logp = every.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    value = (1 - extras.smoothing) * logp + extras.smoothing * every.mean(-1) - extras.z_loss * logits.logsumexp(-1).square()
    entropy = -(every.exp() * every).sum(-1)
    return Scores(*(torch.where(labels >= 0, x, 0.0) for x in (value, logp, entropy)))


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    softcap: float | None = None,
    budget: int | None = None,
    split: Vocabulary | None = None,
    learned: int | None = None,
    impl: str = "torch",
    summed: bool = False,
) -> Tensor:
    """log p(label) per row.

    Args:
        hidden: [T, D] in the compute dtype.
        weight: [V, D] in any float dtype; used in the dtype of `hidden`.
        labels: [T] int64; negative: the row counts for nothing.
        softcap: cap of the logits, or None.
        budget: bytes of one buffer of logits; default by device.
        split: `weight` holds only some rows of the vocabulary; None: all.
        learned: how many labels are not negative, exactly, where the host knows; another number is a device-side assertion.
        impl: a key of `IMPLS`.
        summed: every row will get the same gradient, as under a sum; another one is a device-side assertion. It can be taken once.

    Returns:
        [T] fp32 (fp64 for fp64 `hidden`).
    """
    return linear_scores(hidden, weight, labels, softcap, budget, split, learned, impl, PLAIN, summed).value


def linear_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    softcap: float | None = None,
    budget: int | None = None,
    split: Vocabulary | None = None,
    learned: int | None = None,
    impl: str = "torch",
    extras: Extras = PLAIN,
    summed: bool = False,
) -> Scores:
    """`linear_logprob` with what a loss may want beside it, at the price of the same products."""
    budget = budget or BUDGET["cuda" if _gpu(hidden) else "cpu"]
    rows = max(16, budget // (4 * (weight.shape[0] if split is None else split.most)))
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    return Scores(*_LinearScores.apply(hidden, weight, labels, _How(softcap, rows, split, learned, impl, extras, summed), *needs))


class _How(NamedTuple):
    softcap: float | None
    rows: int  # of a chunk
    split: Vocabulary | None
    learned: int | None
    impl: str
    extras: Extras
    summed: bool


def _gpu(x: Tensor) -> bool:
    """Is the work cut up as for a GPU? A fake tensor stands for one: dry runs (tools/plan.py) count what a GPU would hold."""
    return x.is_cuda or isinstance(x, FakeTensor)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a b in at least fp32. On CUDA half-precision products accumulate in fp32 anyway; there it is not rounded away."""
    if _gpu(a) and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).to(wide_dtype(a.dtype))


class _LinearScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, how: _How, needs_dh: bool, needs_dw: bool):
        impl, extras, kept = IMPLS[how.impl], how.extras, _kept(labels, how.learned)
        w, label = weight.to(hidden.dtype), _columns(_take(labels, kept), weight, how.split)
        count, vocabulary = label.shape[0], _vocabulary(weight, how.split)
        chunks = _chunks(count, how.rows)
        sums = torch.empty(4, count, dtype=wide_dtype(hidden.dtype), device=hidden.device)
        slopes = hidden.new_empty(count, hidden.shape[1]) if needs_dh else None  # u W, the row's gradient but for g
        only = None  # u of the only chunk
        ctx.dw = torch.zeros(weight.shape, dtype=wide_dtype(weight.dtype), device=weight.device) if needs_dw and how.summed else None
        has_label = (labels >= 0).to(sums.dtype)[:, None] if ctx.dw is not None and kept is None else None
        later = needs_dw and not how.summed
        for c in chunks:
            h = _rows(hidden, kept, c)
            found, state = impl.read(_mm(h, w.T), label[c], how.softcap, extras)
            sums[:, c] = found if how.split is None else _joined(found, how.split)
            if needs_dh or (needs_dw and (how.summed or len(chunks) == 1)):
                scale = None if has_label is None else has_label[c]
                u = impl.slope(state, label[c], sums[0, c], how.softcap, extras, vocabulary, scale, hidden.dtype)
                if needs_dh:
                    torch.mm(u, w, out=slopes[c])
                if ctx.dw is not None:
                    _accumulate(ctx.dw, u, h)
                elif len(chunks) == 1:
                    only = u
            u = state = None  # neither lives beside the next chunk's logits
        lse, chosen, total, mean = sums
        ctx.save_for_backward(*((hidden, weight, lse.clone(), only) if later else (None,) * 4), labels, kept, slopes)
        ctx.how, ctx.dtype = how, weight.dtype
        logp = chosen - lse
        value = (1 - extras.smoothing) * logp - extras.z_loss * lse.square()
        if extras.smoothing:
            value += extras.smoothing * (total / vocabulary - lse)
        out = [value, logp, lse - mean if extras.entropy else None]
        out = [None if x is None else _spread(x, labels, kept) for x in out]
        ctx.mark_non_differentiable(*(x for x in out[1:] if x is not None))
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_):
        hidden, weight, lse, only, labels, kept, slopes = ctx.saved_tensors
        how, label = ctx.how, _take(labels, kept)
        impl, extras = IMPLS[how.impl], how.extras
        g = torch.where(label >= 0, _take(grad, kept), 0.0)[:, None]
        dh = dw = None
        if slopes is not None:
            dh = (g * slopes).to(slopes.dtype)
            if kept is not None:
                dh = dh.new_zeros(labels.shape[0], dh.shape[1]).index_copy_(0, kept, dh)
        if how.summed:
            if ctx.needs_input_grad[1] and ctx.dw is None:
                raise RuntimeError("`summed` gradients can be taken once")
            one = grad[:1]  # of no rows: none
            torch._assert_async(((grad == one) | grad.isnan()).all(), "`summed`, but rows have different gradients")
            dw, ctx.dw = ctx.dw, None
            dw = None if dw is None else dw.mul_(one.sum()).to(ctx.dtype)
        elif weight is not None:
            w, label = weight.to(hidden.dtype), _columns(label, weight, how.split)
            dw = torch.zeros(weight.shape, dtype=wide_dtype(weight.dtype), device=weight.device)
            for c in _chunks(label.shape[0], how.rows):
                h = _rows(hidden, kept, c)
                if only is None:
                    state = impl.again(_mm(h, w.T), lse[c], how.softcap)
                    dz = impl.slope(state, label[c], lse[c], how.softcap, extras, _vocabulary(weight, how.split), g[c], h.dtype)
                    del state
                else:
                    dz = (g * only).to(h.dtype)
                _accumulate(dw, dz, h)
                del dz  # before the next chunk's logits
            dw = dw.to(weight.dtype)
        return dh, dw, *(None,) * 4


def _vocabulary(weight: Tensor, split: Vocabulary | None) -> int:
    return weight.shape[0] if split is None else split.rows


def _columns(labels: Tensor, weight: Tensor, split: Vocabulary | None) -> Tensor:
    """Labels as rows of `weight`, -1 where there is none here. [C] int64."""
    row = labels if split is None else labels - split.first
    return torch.where((labels >= 0) & (row >= 0) & (row < weight.shape[0]), row, -1)


def _joined(sums: Tensor, split: Vocabulary) -> Tensor:
    """[4, C] over this rank's part of the vocabulary -> over all of it."""
    lse, chosen, total, mean = sums
    highest = split.max(lse)
    share = (lse - highest).exp_()
    chosen, total, share, mean = split.sum(torch.stack([chosen, total, share, share * mean]))
    return torch.stack([share.log() + highest, chosen, total, mean / share])


def _accumulate(dw: Tensor, dz: Tensor, h: Tensor) -> None:
    """dw [V, D] += dz^T h, summed in the dtype of dw. dz: [C, V], h: [C, D]."""
    if _gpu(dz) and dz.dtype != dw.dtype:
        dw.add_(_mm(dz.T, h))
    else:
        dw.addmm_(dz.T.to(dw.dtype), h.to(dw.dtype))


def _kept(labels: Tensor, learned: int | None) -> Tensor | None:
    """Numbers of the rows with a label, [T'] int64; None: all rows are computed."""
    if learned == labels.shape[0] or (learned is None and _gpu(labels)):
        return None
    if learned is None:
        return (labels >= 0).nonzero()[:, 0]
    torch._assert_async((labels >= 0).sum() == learned, "`learned` is not the number of labels")  # else rows would be lost unnoticed
    return torch.nonzero_static(labels >= 0, size=learned)[:, 0]


def _take(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None or rows.numel() == x.shape[0] else x.index_select(0, rows)


def _rows(hidden: Tensor, kept: Tensor | None, chunk: slice) -> Tensor:
    """A chunk of the rows that are computed, [C, D]."""
    return hidden[chunk] if kept is None else hidden.index_select(0, kept[chunk])


def _spread(x: Tensor, labels: Tensor, kept: Tensor | None) -> Tensor:
    """[T'] of the rows that were computed -> [T], 0 where the label is negative."""
    return torch.where(labels >= 0, x, 0.0) if kept is None else x.new_zeros(labels.shape).index_copy_(0, kept, x)


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]


# -- torch: in place wherever it can be. The state is (exp(z - at) [C, V], at [C], derivative of the soft-cap [C, V] or None) --------------


def _read(z: Tensor, label: Tensor, softcap: float | None, extras: Extras):
    z, bend = _capped(z, softcap)
    sums = z.new_zeros(4, z.shape[0])
    sums[1] = z.gather(1, label.clamp(min=0)[:, None])[:, 0].masked_fill_(label < 0, 0.0)
    if extras.smoothing:
        sums[2] = z.sum(1)
    top = z.amax(1)
    z.sub_(top[:, None])
    p = z.exp() if extras.entropy else z.exp_()
    total = p.sum(1)
    if extras.entropy:
        sums[3] = z.mul_(p).sum(1) / total + top
    sums[0] = total.log_() + top
    return sums, (p, top, bend)


def _again(z: Tensor, lse: Tensor, softcap: float | None):
    z, bend = _capped(z, softcap)
    return z.sub_(lse[:, None]).exp_(), lse, bend


def _capped(z: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """z under the soft-cap, in place, and the derivative 1 - (z / c)^2."""
    if softcap is None:
        return z, None
    z.div_(softcap).tanh_()
    return z.mul_(softcap), (z / softcap).square_().neg_().add_(1)


def _slope(state, label: Tensor, lse: Tensor, softcap: float | None, extras: Extras, vocabulary: int, scale: Tensor | None, dtype):
    p, at, bend = state
    u = p.mul_(((at - lse).exp_() * -(1 + 2 * extras.z_loss * lse))[:, None])
    u.scatter_add_(1, label.clamp(min=0)[:, None], (label >= 0).to(u.dtype)[:, None] * (1 - extras.smoothing))
    if extras.smoothing:
        u.add_(extras.smoothing / vocabulary)
    if bend is not None:
        u.mul_(bend)
    return (u if scale is None else u.mul_(scale)).to(dtype)


# -- Triton: the state is z ----------------------------------------------------------------------------------------------------------------


@jit
def _soft_cap(x, cap):
    return cap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * x / cap)))  # cap tanh(x / cap)


@jit
def _read_kernel(z, label, sums, z_row, rows, columns, cap, CAP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    z += row * z_row
    top = tl.full((), float("-inf"), tl.float32)
    powers, weighted, total = (tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32))
    for first in range(0, columns, BLOCK):
        inside = first + at < columns
        x = tl.load(z + first + at, mask=inside, other=0.0).to(tl.float32)
        if CAP:
            x = _soft_cap(x, cap)
        higher = tl.maximum(top, tl.max(tl.where(inside, x, float("-inf")), 0))
        shrink = tl.exp(top - higher)
        power = tl.where(inside, tl.exp(x - higher), 0.0)
        powers = powers * shrink + power
        weighted = weighted * shrink + power * x
        total += x
        top = higher
    mine = tl.load(label + row)
    chosen = tl.load(z + mine, mask=mine >= 0, other=0.0).to(tl.float32)
    if CAP:
        chosen = _soft_cap(chosen, cap)
    power = tl.sum(powers, 0)
    tl.store(sums + row, top + tl.log(power))
    tl.store(sums + rows + row, chosen)
    tl.store(sums + 2 * rows + row, tl.sum(total, 0))
    tl.store(sums + 3 * rows + row, tl.sum(weighted, 0) / power)


@jit
def _slope_kernel(
    z, label, lse, scale, u, z_row, columns, cap, chosen, spread, z_loss, CAP: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    x = tl.load(z + row * z_row + at, mask=inside, other=0.0).to(tl.float32)
    if CAP:
        x = _soft_cap(x, cap)
    norm = tl.load(lse + row)
    out = spread - (1.0 + 2.0 * z_loss * norm) * tl.exp(x - norm) + tl.where(at == tl.load(label + row), chosen, 0.0)
    if CAP:
        out *= 1.0 - (x / cap) * (x / cap)
    if SCALED:
        out *= tl.load(scale + row)
    tl.store(u + row * columns + at, out.to(u.dtype.element_ty), mask=inside)


def _sums_fake(z, label, softcap):
    return z.new_empty((4, z.shape[0]), dtype=torch.float32)


@operator("logprob_sums", _sums_fake)
def _sums_triton(z: Tensor, label: Tensor, softcap: float | None) -> Tensor:
    """z: [C, V], label: [C] int64 -> [4, C] fp32, all of them (`Impl.read`)."""
    sums, (rows, columns), size = _sums_fake(z, label, softcap), z.shape, min(WIDEST, block(z.shape[1]))
    if rows:
        _read_kernel[grid(rows)](
            z, label, sums, z.stride(0), rows, columns, softcap or 0.0, CAP=softcap is not None, BLOCK=size, num_warps=warps(size)
        )
    return sums


def _slope_fake(z, label, lse, scale, softcap, smoothing, z_loss, vocabulary, dtype):
    return z.new_empty(z.shape, dtype=dtype)


@operator("logprob_slope", _slope_fake)
def _slope_triton(
    z: Tensor,
    label: Tensor,
    lse: Tensor,
    scale: Tensor | None,
    softcap: float | None,
    smoothing: float,
    z_loss: float,
    vocabulary: int,
    dtype: torch.dtype,
) -> Tensor:
    """z: [C, V], label: [C] int64, lse: [C] fp32, scale: [C] fp32 or None -> u [C, V] in `dtype` (`Impl.slope`)."""
    (rows, columns), size = z.shape, min(WIDEST, block(z.shape[1]))
    u = z.new_empty(z.shape, dtype=dtype)
    if rows:
        _slope_kernel[grid(rows, -(-columns // size))](
            z, label, lse, scale, u, z.stride(0), columns, softcap or 0.0, 1.0 - smoothing, smoothing / vocabulary, z_loss,
            CAP=softcap is not None, SCALED=scale is not None, BLOCK=size, num_warps=warps(size),
        )  # fmt: skip
    return u


def _read_by_triton(z: Tensor, label: Tensor, softcap: float | None, extras: Extras):
    return _sums_triton(z, label, softcap), z


def _slope_by_triton(z, label: Tensor, lse: Tensor, softcap: float | None, extras: Extras, vocabulary: int, scale: Tensor | None, dtype):
    flat = None if scale is None else scale.flatten()
    return _slope_triton(z, label, lse.contiguous(), flat, softcap, extras.smoothing, extras.z_loss, vocabulary, dtype)


IMPLS = {"torch": Impl(_read, _again, _slope), "triton": Impl(_read_by_triton, lambda z, lse, softcap: z, _slope_by_triton)}
