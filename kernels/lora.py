"""Linears with low-rank adapters (LoRA, arXiv 2106.09685) as sums of matrix products, and their gradients written out.

    s = c D(x) A^T        [T, r], kept for the backward        c = alpha / r; D: dropout
    y = x W^T + s B^T     one accumulator: the second product is added where the first one lies

    ds = c dy B           dA = ds^T D(x),   dB = dy^T s,   dW = dy^T x where it trains
    dx = dy W + D'(ds A)

For several linears of one input (queries, keys and values; gate and up), s of all of them is one thin product with their A stacked,
and dx one sum of all their products. Autograd on the same lines keeps more, and makes each term of these sums apart to add it up
afterwards: three passes over an output instead of one (arXiv 2510.00206 has the traffic of such implementations).

Everything here is a half without autograd; kernels/regions.py puts them together. Tensors are plain; weights are used in the dtype of
x; gradients of weights are made in at least fp32 where the device can, and rounded once.

Dropout is a hash of (seed, slot, channel), so its mask is never stored, is the same on any device and in any implementation, and a
part of a row or of its channels has the mask it would have in the whole (`first`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from kernels.launch import grid, jit, operator, rows_of, tl


class Part(NamedTuple):
    """A linear: all of its tensors. weight: [out, in], bias: [out]; a: [r, in], b: [out, r], or None both."""

    weight: Tensor
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None


class Kind(NamedTuple):
    """What a linear's tensors do not say. scale: c; dropout: the chance that a channel is left out; first: number of its first input
    channel in the whole linear."""

    scale: float = 1.0
    dropout: float = 0.0
    first: int = 0


def _products_fake(lefts: list[Tensor], rights: list[Tensor]) -> Tensor:
    return lefts[0].new_empty(lefts[0].shape[0], rights[0].shape[1])


@operator("products", _products_fake)
def products(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Tensor:
    """sum_i left_i right_i, [T, k_i] [k_i, N] -> [T, N]. One operator: what happens in place inside nobody sees."""
    total = torch.mm(lefts[0], rights[0])
    for left, right in zip(lefts[1:], rights[1:], strict=True):
        total.addmm_(left, right)
    return total


@register_flop_formula(torch.ops.salamander.products)
def _products_flops(lefts, rights, *args, out_shape=None, **kwargs) -> int:
    """Shapes in, operations out: 2 T k N each."""
    return sum(2 * left[0] * left[1] * right[1] for left, right in zip(lefts, rights))


def linears(x: Tensor, parts: Sequence[Part], kinds: Sequence[Kind], seed: Tensor | None, impl: str) -> tuple[list[Tensor], Tensor | None]:
    """x: [T, in] -> (y of each, without bias, [T, out]; s of all that have adapters side by side, [T, R], or None).

    seed: [n] int64, one for each part, or None: no dropout.
    """
    low = inside(x, parts, kinds, seed, impl)
    out = []
    for part, s in zip(parts, _columns(low, parts)):
        w = part.weight.to(x.dtype)
        out.append(torch.mm(x, w.T) if s is None else products([x, s], [w.T, part.b.to(x.dtype).T]))
    return out, low


def inside(x: Tensor, parts: Sequence[Part], kinds: Sequence[Kind], seed: Tensor | None, impl: str) -> Tensor | None:
    """s of all that have adapters, side by side: [T, R]; None where none has."""
    having = [i for i, part in enumerate(parts) if part.a is not None]
    if not having:
        return None
    if seed is None:
        s = x @ torch.cat([parts[i].a for i in having]).to(x.dtype).T
    else:
        s = torch.cat([dropout(x, seed[i], kinds[i].dropout, kinds[i].first, impl) @ parts[i].a.to(x.dtype).T for i in having], 1)
    scales = {kinds[i].scale for i in having}
    if len(scales) == 1:
        return s * scales.pop()
    return torch.cat([kinds[i].scale * each for i, each in zip(having, s.split([parts[i].a.shape[0] for i in having], 1))], 1)


def _columns(low: Tensor | None, parts: Sequence[Part]) -> list[Tensor | None]:
    """Each part's columns of `low`, None where it has no adapter."""
    out, at = [], 0
    for part in parts:
        width = 0 if part.a is None else part.a.shape[0]
        out.append(low[:, at : at + width] if width else None)
        at += width
    return out


class Needs(NamedTuple):
    """Which gradients of a part are wanted: in the order of `Part`."""

    weight: bool
    bias: bool
    a: bool
    b: bool


def inputs_gradient(
    grads: Sequence[Tensor],
    parts: Sequence[Part],
    kinds: Sequence[Kind],
    needs: Sequence[Needs],
    seed: Tensor | None,
    needs_dx: bool,
    impl: str,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(dx [T, in], or None where it is not wanted; ds [T, r] of each part whose adapter needs it for dx or for its A).

    grads: of each y, [T, out].
    """
    dtype, slopes = grads[0].dtype, []
    for g, part, kind, need in zip(grads, parts, kinds, needs):
        read = part.a is not None and (needs_dx or need.a)
        slopes.append((g @ part.b.to(dtype)) * kind.scale if read else None)
    if not needs_dx:
        return None, slopes
    lefts, rights = list(grads), [part.weight.to(dtype) for part in parts]
    having = [i for i, ds in enumerate(slopes) if ds is not None]
    if seed is None:
        if having:
            lefts.append(torch.cat([slopes[i] for i in having], 1))
            rights.append(torch.cat([parts[i].a for i in having]).to(dtype))
        return products(lefts, rights), slopes
    dx = products(lefts, rights)
    for i in having:
        dx = dx + dropout(slopes[i] @ parts[i].a.to(dtype), seed[i], kinds[i].dropout, kinds[i].first, impl)
    return dx, slopes


def weights_gradients(
    grads: Sequence[Tensor],
    x: Tensor | None,
    low: Tensor | None,
    slopes: Sequence[Tensor | None],
    parts: Sequence[Part],
    kinds: Sequence[Kind],
    needs: Sequence[Needs],
    seed: Tensor | None,
    impl: str,
) -> list[Part]:
    """Gradients in the shape of the parts, None where they are not wanted; the biases' always None.

    x: [T, in], what went in, where a weight or an A trains (`reads_input`); low: s of all parts; slopes: from `inputs_gradient`.
    """
    found = []
    for i, (g, s, ds, part, kind, need) in enumerate(zip(grads, _columns(low, parts), slopes, parts, kinds, needs)):
        dw = _outer(g, x, part.weight.dtype) if need.weight else None
        db = _outer(g, s, part.b.dtype) if need.b else None
        da = None
        if need.a:
            da = _outer(ds, x if seed is None else dropout(x, seed[i], kind.dropout, kind.first, impl), part.a.dtype)
        found.append(Part(dw, None, da, db))
    return found


def reads_input(needs: Sequence[Needs]) -> bool:
    return any(need.weight or need.a for need in needs)


def _outer(g: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """g^T x, [T, n], [T, m] -> [n, m] in `dtype`, the dtype of a weight."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32:
        return torch.mm(g.T, x, out_dtype=torch.float32)
    return torch.mm(g.T, x).to(dtype)


# Dropout. A 32-bit finalizer of the murmur family over a counter: two rounds of multiply and xor-shift, keyed by the seed before each.
_M1, _M2 = 0x85EBCA6B, 0xC2B2AE35
_LOW = 0xFFFFFFFF


def dropout(x: Tensor, seed: Tensor, chance: float, first: int = 0, impl: str = "torch") -> Tensor:
    """x: [T, in], seed: [] int64 on its device -> x / (1 - chance) where it stays, else 0. Its own transpose, but not under autograd."""
    return IMPLS[impl](x, seed, chance, first)


def _mix(h: Tensor, key: Tensor) -> Tensor:
    """One round on 32-bit numbers held in int64."""
    h = ((h ^ key) * _M1) & _LOW
    h = ((h ^ (h >> 15)) * _M2) & _LOW
    return h ^ (h >> 13)


def _dropout_torch(x: Tensor, seed: Tensor, chance: float, first: int) -> Tensor:
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    columns = torch.arange(first, first + x.shape[1], device=x.device)[None]
    h = _mix(_mix(rows, seed & _LOW) ^ columns, (seed >> 32) & _LOW)
    # no cast, even to the same dtype: of a result that is an alias torch 2.11 compiles without the gradient
    return torch.where(h >= _threshold(chance), x * (1 / (1 - chance)), 0.0)


def _threshold(chance: float) -> int:
    return math.ceil(chance * 2**32)


@jit
def _round(h, key):
    h = (h ^ key) * 0x85EBCA6B
    h = (h ^ (h >> 15)) * 0xC2B2AE35
    return h ^ (h >> 13)


@jit
def _dropout_kernel(x, y, seed, x_row, columns, first, threshold, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    key = tl.load(seed)
    h = _round(row.to(tl.uint32), (key & 0xFFFFFFFF).to(tl.uint32)) ^ (first + at).to(tl.uint32)
    h = _round(h, ((key >> 32) & 0xFFFFFFFF).to(tl.uint32))
    value = tl.load(x + row.to(tl.int64) * x_row + at, mask=inside, other=0.0)
    kept = tl.where(h.to(tl.int64) >= threshold, value.to(tl.float32) * scale, 0.0)
    tl.store(y + row.to(tl.int64) * columns + at, kept.to(value.dtype), mask=inside)


def _dropout_fake(x, seed, chance, first):
    return x.new_empty(x.shape)


@operator("dropout", _dropout_fake)
def _dropout_triton(x: Tensor, seed: Tensor, chance: float, first: int) -> Tensor:
    x, y = rows_of(x), _dropout_fake(x, seed, chance, first)
    rows, columns = x.shape
    if y.numel():
        _dropout_kernel[grid(rows, -(-columns // 1024))](
            x, y, seed, x.stride(0), columns, first, _threshold(chance), 1 / (1 - chance), BLOCK=1024, num_warps=4
        )
    return y


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, seed: Tensor, chance: float, first: int, impl: str) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.rest = chance, first, impl
        return dropout(x, seed, *ctx.rest)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return dropout(grad, *ctx.saved_tensors, *ctx.rest), None, None, None, None


def seeds(count: int, device: torch.device) -> Tensor:
    """[count] int64 from torch's default generator of the device."""
    return torch.randint(2**62, (count,), device=device)


def drop(x: Tensor, chance: float, first: int = 0, impl: str = "torch") -> Tensor:
    """`dropout` with a new seed, under autograd."""
    return _Dropout.apply(x, seeds(1, x.device)[0], chance, first, impl) if chance else x


IMPLS: dict[str, Callable[[Tensor, Tensor, float, int], Tensor]] = {"torch": _dropout_torch, "triton": _dropout_triton}
