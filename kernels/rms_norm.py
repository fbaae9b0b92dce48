"""RMSNorm (arXiv 1910.07467), alone or of a sum, that keeps its input and one number a row for the backward.

    r = 1 / sqrt(mean(x^2) + eps),  x_hat = x r,  y = x_hat s        with the scale s = w, or 1 + w
    dx = r (g s - x_hat mean(g s x_hat)),  dw = sum over rows of g x_hat

All fp32 (fp64 for fp64 inputs), rounded where transformers rounds: w * round(x_hat) for a plain weight (llama), round(x_hat (1 + w))
for one stored minus one (gemma). Autograd on the same operations would keep x_hat, x in fp32 and more, each as large as x.

Of a sum: x = round(a + b) is an output too, since residual streams go on with it. Its gradient joins dx in the same pass.

`forward` and `backward` are the two halves without autograd, for those who write a backward of their own (kernels/regions.py).
The Triton kernels give a row to a program; the backward's programs go through many rows each where the weight trains and add up
dw on the way, so that there are PARTS partial sums, always in the same order. Rows wider than TOGETHER leave no registers for that:
there a second launch reads them again for dw, some columns to a program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import block, grid, jit, operator, rows_of, tl, warps, wide_dtype

PARTS = 256  # partial sums of dw; a few for each multiprocessor
WIDEST = 16384  # columns that a program's registers hold
TOGETHER = 8192  # columns that they hold beside as many of dw


class Impl(NamedTuple):
    forward: Callable[[Tensor, Tensor | None, Tensor, float, bool], tuple[Tensor, Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor, bool, bool], tuple[Tensor, Tensor]]


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: bool = False, impl: str = "torch") -> Tensor:
    """x: [..., D]; weight: [D] in any float dtype; `offset`: it is stored minus one -> like x."""
    return _RmsNorm.apply(x, weight, eps, offset, impl)


def add_rms_norm(x: Tensor, add: Tensor, weight: Tensor, eps: float, offset: bool = False, impl: str = "torch") -> tuple[Tensor, Tensor]:
    """x, add: [..., D] of one dtype -> (x + add, the norm of that)."""
    return _AddRmsNorm.apply(x, add, weight, eps, offset, impl)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, offset: bool = False) -> Tensor:
    """The obvious twin, differentiated by autograd."""
    wide = x.to(wide_dtype(x.dtype))
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset:
        return (normalized * (1.0 + weight.to(wide.dtype))).to(x.dtype)
    return weight.to(x.dtype) * normalized.to(x.dtype)


def unsupported(columns: int) -> str | None:
    """Why the Triton kernels cannot take rows of so many columns, or None."""
    return None if columns <= WIDEST else f"rows of {columns} columns are wider than {WIDEST}"


def forward(x: Tensor, add: Tensor | None, weight: Tensor, eps: float, offset: bool, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, add: [..., D] -> (x + add, or x itself; its norm; r [..., 1] fp32)."""
    total, y, r = IMPLS[impl].forward(x, add, weight, eps, offset)
    return (x if add is None else total), y, r


def backward(
    grad: Tensor, to_sum: Tensor | None, x: Tensor, r: Tensor, weight: Tensor, offset: bool, needs_dw: bool, impl: str
) -> tuple[Tensor, Tensor | None]:
    """(dx, dw). grad: of the norm; to_sum: of x itself where it is an output, else None; x: what was normalized."""
    dx, dw = IMPLS[impl].backward(grad, to_sum, x, r, weight, offset, needs_dw)
    return dx, dw if needs_dw else None


def _forward(x: Tensor, add: Tensor | None, weight: Tensor, eps: float, offset: bool) -> tuple[Tensor, Tensor, Tensor]:
    x = x if add is None else x + add
    wide = x.to(wide_dtype(x.dtype))
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    # nothing in place, and no cast to the same dtype: where the result is an alias, torch 2.11 compiles without the gradient
    if not offset:
        return x, (wide * r).to(x.dtype) * weight.to(x.dtype), r
    y = wide * r * (1.0 + weight.to(wide.dtype))
    return x, y if y.dtype == x.dtype else y.to(x.dtype), r


def _backward(
    grad: Tensor, to_sum: Tensor | None, x: Tensor, r: Tensor, weight: Tensor, offset: bool, needs_dw: bool
) -> tuple[Tensor, Tensor]:
    normalized, g = x.to(r.dtype) * r, grad.to(r.dtype)
    dw = (g * normalized).flatten(0, -2).sum(0).to(weight.dtype) if needs_dw else weight.new_empty(0)
    scaled = g * (weight.to(r.dtype) + (1.0 if offset else 0.0))
    mean = (scaled * normalized).mean(-1, keepdim=True)
    dx = scaled.sub_(normalized.mul_(mean)).mul_(r)
    return (dx if to_sum is None else dx.add_(to_sum)).to(x.dtype), dw


@jit
def _forward_kernel(
    x, add, weight, total, y, r, x_row, add_row, eps, COLUMNS: tl.constexpr, OFFSET: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < COLUMNS
    value = tl.load(x + row * x_row + at, mask=inside, other=0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(add + row * add_row + at, mask=inside, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(total + row * COLUMNS + at, value, mask=inside)
    wide = value.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / COLUMNS + eps)
    tl.store(r + row, inverse)
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if OFFSET:
        out = wide * inverse * (1.0 + scale)
    else:
        out = (wide * inverse).to(value.dtype).to(tl.float32) * scale.to(value.dtype).to(tl.float32)
    tl.store(y + row * COLUMNS + at, out.to(value.dtype), mask=inside)


@jit
def _backward_kernel(
    grad, to_sum, x, r, weight, dx, dw, grad_row, sum_row, x_row, rows,
    COLUMNS: tl.constexpr, OFFSET: tl.constexpr, ADD: tl.constexpr, TRAINED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0)
    at = tl.arange(0, BLOCK)
    inside = at < COLUMNS
    part = tl.zeros((BLOCK,), tl.float32)
    row = first
    while row < rows:
        inverse = tl.load(r + row)
        normalized = tl.load(x + row * x_row + at, mask=inside, other=0.0).to(tl.float32) * inverse
        g = tl.load(grad + row * grad_row + at, mask=inside, other=0.0).to(tl.float32)
        if TRAINED:
            part += g * normalized
        scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)  # again each time: registers are scarcer than the cache
        g = g * (1.0 + scale if OFFSET else scale)
        out = inverse * (g - normalized * (tl.sum(g * normalized, 0) / COLUMNS))
        if ADD:
            out += tl.load(to_sum + row * sum_row + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row * COLUMNS + at, out.to(dx.dtype.element_ty), mask=inside)
        row += step
    if TRAINED:
        tl.store(dw + first * COLUMNS + at, part, mask=inside)


@jit
def _weight_kernel(grad, x, r, dw, grad_row, x_row, rows, columns, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    part = tl.zeros((BLOCK,), tl.float32)
    row = first
    while row < rows:
        normalized = tl.load(x + row * x_row + at, mask=inside, other=0.0).to(tl.float32) * tl.load(r + row)
        part += tl.load(grad + row * grad_row + at, mask=inside, other=0.0).to(tl.float32) * normalized
        row += step
    tl.store(dw + first * columns + at, part, mask=inside)


def _forward_fake(x, add, weight, eps, offset):
    like = x.new_empty(x.shape)
    return (x.new_empty(0) if add is None else torch.empty_like(like)), like, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@operator("rms_norm", _forward_fake)
def _forward_triton(x: Tensor, add: Tensor | None, weight: Tensor, eps: float, offset: bool) -> tuple[Tensor, Tensor, Tensor]:
    flat, plus = rows_of(x), None if add is None else rows_of(add)
    total, y, r = _forward_fake(x, add, weight, eps, offset)
    rows, columns = flat.shape
    if rows:
        size = block(columns)
        _forward_kernel[grid(rows)](
            flat, plus, weight, total, y, r, flat.stride(0), 0 if plus is None else plus.stride(0), eps,
            COLUMNS=columns, OFFSET=offset, ADD=add is not None, BLOCK=size, num_warps=warps(size),
        )  # fmt: skip
    return total, y, r


def _backward_fake(grad, to_sum, x, r, weight, offset, needs_dw):
    return x.new_empty(x.shape), weight.new_empty(weight.shape if needs_dw else 0)


@operator("rms_norm_backward", _backward_fake)
def _backward_triton(
    grad: Tensor, to_sum: Tensor | None, x: Tensor, r: Tensor, weight: Tensor, offset: bool, needs_dw: bool
) -> tuple[Tensor, Tensor]:
    g, flat, more = rows_of(grad), rows_of(x), None if to_sum is None else rows_of(to_sum)
    rows, columns = flat.shape
    dx = x.new_empty(x.shape)
    some, trained = min(rows, PARTS), needs_dw and columns <= TOGETHER
    parts = x.new_zeros((some, columns) if needs_dw else (0, 0), dtype=torch.float32)
    if rows:
        size = block(columns)
        _backward_kernel[grid(some if trained else rows)](
            g, more, flat, r, weight, dx, parts, g.stride(0), 0 if more is None else more.stride(0), flat.stride(0), rows,
            COLUMNS=columns, OFFSET=offset, ADD=more is not None, TRAINED=trained, BLOCK=size, num_warps=warps(size), num_stages=1,
        )  # fmt: skip
        if needs_dw and not trained:
            _weight_kernel[grid(some, -(-columns // 1024))](
                g, flat, r, parts, g.stride(0), flat.stride(0), rows, columns, BLOCK=1024, num_warps=4, num_stages=1
            )
    return dx, parts.sum(0).to(weight.dtype) if needs_dw else weight.new_empty(0)


IMPLS = {"torch": Impl(_forward, _backward), "triton": Impl(_forward_triton, _backward_triton)}


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, offset: bool, impl: str) -> Tensor:
        _, y, r = forward(x, None, weight, eps, offset, impl)
        ctx.save_for_backward(x, weight, r)
        ctx.offset, ctx.impl = offset, impl
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, r = ctx.saved_tensors
        dx, dw = backward(grad, None, x, r, weight, ctx.offset, ctx.needs_input_grad[1], ctx.impl)
        return dx, dw, None, None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, add: Tensor, weight: Tensor, eps: float, offset: bool, impl: str) -> tuple[Tensor, Tensor]:
        total, y, r = forward(x, add, weight, eps, offset, impl)
        ctx.save_for_backward(total, weight, r)
        ctx.offset, ctx.impl = offset, impl
        return total.view(total.shape), y  # what is kept is not what is returned: of such a result torch 2.11 compiles without the gradient

    @staticmethod
    @once_differentiable
    def backward(ctx, to_sum: Tensor, grad: Tensor):
        x, weight, r = ctx.saved_tensors
        dx, dw = backward(grad, to_sum, x, r, weight, ctx.offset, ctx.needs_input_grad[2], ctx.impl)
        return dx, dx, dw, None, None, None
