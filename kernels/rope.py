"""Rotary position embedding (arXiv 2104.09864) of queries and keys at once, with RMSNorm of each head before it where the model has that.

Half-split like Hugging Face, over the first R of a head's H channels (R = H but for partial rotary); i pairs with i +- R/2 = p(i):

    y_i = x_i cos_i + x_p(i) sin_i        i < R;   y_i = x_i otherwise         the first half of `sin` is negated
    dx_i = g_i cos_i + g_p(i) sin_p(i)

cos and sin are tables of a row's slots, [T, 1, R], made once per micro-batch: positions restart in each document, and every layer
uses the same ones. Without a norm nothing is kept for the backward but the tables. With one, x is (kernels/rms_norm.py has the maths
and the rounding); the rest is computed again.

The Triton kernels give a program a few slots' worth of work: one slot, some heads of the queries or of the keys; heads that do not
fill a block are masked. They rotate in fp32 and round once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import rms_norm
from kernels.launch import block, grid, jit, operator, tl, together

CHANNELS = 1024  # of the heads of a program together
PARTS = 512  # partial sums of the gradients of the norms' weights


class Impl(NamedTuple):
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    offset: bool = False,
    impl: str = "torch",
) -> tuple[Tensor, Tensor]:
    """q: [T, N, H], k: [T, K, H]; cos, sin: [T, 1, R] in their dtype -> both rotated. With weights [H] heads are normalized first."""
    return _Rope.apply(q, k, cos, sin, q_weight, k_weight, eps, offset, impl)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [T, heads, H] -> x rotated, by operations that autograd knows. The halves of x, swapped as they are, need no sign of their own,
    so whole rows are computed instead of halves."""
    size = cos.shape[-1]
    turned, rest = (x, None) if size == x.shape[-1] else (x[..., :size], x[..., size:])
    y = turned * cos + turned.roll(size // 2, -1) * sin
    return y if rest is None else torch.cat((y, rest), -1)


def rope_ref(q, k, cos, sin, q_weight=None, k_weight=None, eps=0.0, offset=False) -> tuple[Tensor, Tensor]:
    """The obvious twin, differentiated by autograd."""
    if q_weight is not None:
        q, k = rms_norm.rms_norm_ref(q, q_weight, eps, offset), rms_norm.rms_norm_ref(k, k_weight, eps, offset)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def forward(q, k, cos, sin, q_weight, k_weight, eps: float, offset: bool, impl: str) -> tuple[Tensor, Tensor]:
    """Like `rope`, without autograd."""
    return IMPLS[impl].forward(q, k, cos, sin, q_weight, k_weight, eps, offset)


def backward(gq, gk, q, k, cos, sin, q_weight, k_weight, eps: float, offset: bool, needs_dw: bool, impl: str):
    """(dq, dk, dq_weight, dk_weight). q, k: what was given to the forward; read only with weights, else None."""
    dq, dk, dq_weight, dk_weight = IMPLS[impl].backward(gq, gk, q, k, cos, sin, q_weight, k_weight, eps, offset, needs_dw)
    return dq, dk, dq_weight if needs_dw else None, dk_weight if needs_dw else None


def _forward(q, k, cos, sin, q_weight, k_weight, eps: float, offset: bool) -> tuple[Tensor, Tensor]:
    if q_weight is not None:
        q, k = (rms_norm.forward(x, None, w, eps, offset, "torch")[1] for x, w in ((q, q_weight), (k, k_weight)))
    return rotate(q, cos, sin), rotate(k, cos, sin)


def _back(g: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose of `rotate`."""
    size = cos.shape[-1]
    turned, rest = (g, None) if size == g.shape[-1] else (g[..., :size], g[..., size:])
    d = turned * cos + (turned * sin).roll(size // 2, -1)
    return d if rest is None else torch.cat((d, rest), -1)


def _backward(gq, gk, q, k, cos, sin, q_weight, k_weight, eps: float, offset: bool, needs_dw: bool):
    dq, dk = _back(gq, cos, sin), _back(gk, cos, sin)
    if q_weight is None:
        return dq, dk, gq.new_empty(0), gq.new_empty(0)
    out, dws = [], []
    for d, x, w in ((dq, q, q_weight), (dk, k, k_weight)):
        _, _, r = rms_norm.forward(x, None, w, eps, offset, "torch")
        dx, dw = rms_norm.IMPLS["torch"].backward(d, None, x, r, w, offset, needs_dw)
        out.append(dx)
        dws.append(dw)
    return *out, *dws


@jit
def _places(first, heads, HEADS: tl.constexpr, H: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """Heads [HEADS, 1], channels [1, BLOCK], the channels they pair with, and what of it is there."""
    head = (first + tl.arange(0, HEADS))[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    pair = tl.where(at < R // 2, at + R // 2, at - R // 2)
    return head, at, tl.where(at < R, pair, at), (head < heads) & (at < H)


@jit
def _forward_heads(
    x, y, weight, cos, sin, row, first, heads, x_row, x_head, eps,
    HEADS: tl.constexpr, H: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    head, at, pair, inside = _places(first, heads, HEADS, H, R, BLOCK)
    source = x + row * x_row + head.to(tl.int64) * x_head  # heads may lie a whole row of tokens apart
    own, other = tl.load(source + at, mask=inside, other=0.0), tl.load(source + pair, mask=inside, other=0.0)
    kind = own.dtype
    own, other = own.to(tl.float32), other.to(tl.float32)
    if NORM:
        r = 1.0 / tl.sqrt(tl.sum(own * own, 1)[:, None] / H + eps)
        w = tl.load(weight + at, mask=at < H, other=0.0).to(tl.float32)
        v = tl.load(weight + pair, mask=at < H, other=0.0).to(tl.float32)
        if OFFSET:
            own, other = (own * r * (1.0 + w)).to(kind), (other * r * (1.0 + v)).to(kind)
        else:
            own = ((own * r).to(kind).to(tl.float32) * w.to(kind).to(tl.float32)).to(kind)
            other = ((other * r).to(kind).to(tl.float32) * v.to(kind).to(tl.float32)).to(kind)
        own, other = own.to(tl.float32), other.to(tl.float32)
    c = tl.load(cos + row * R + at, mask=at < R, other=1.0).to(tl.float32)
    s = tl.load(sin + row * R + at, mask=at < R, other=0.0).to(tl.float32)
    tl.store(y + (row * heads + head) * H + at, (own * c + other * s).to(kind), mask=inside)


@jit
def _forward_kernel(
    q, k, q_out, k_out, q_weight, k_weight, cos, sin, q_heads, k_heads, q_row, q_head, k_row, k_head, eps,
    HEADS: tl.constexpr, H: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * HEADS
    of_q = tl.cdiv(q_heads, HEADS) * HEADS
    if first < of_q:
        _forward_heads(q, q_out, q_weight, cos, sin, row, first, q_heads, q_row, q_head, eps, HEADS, H, R, BLOCK, NORM, OFFSET)
    else:
        _forward_heads(k, k_out, k_weight, cos, sin, row, first - of_q, k_heads, k_row, k_head, eps, HEADS, H, R, BLOCK, NORM, OFFSET)


@jit
def _backward_heads(
    g, x, dx, weight, dw, cos, sin, rows, step, first, heads, g_row, g_head, x_row, x_head, eps,
    HEADS: tl.constexpr, H: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr, OFFSET: tl.constexpr, TRAINED: tl.constexpr,
):  # fmt: skip
    head, at, pair, inside = _places(first, heads, HEADS, H, R, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    part = tl.zeros((HEADS, BLOCK), tl.float32)
    while row < rows:
        source = g + row * g_row + head.to(tl.int64) * g_head
        c = tl.load(cos + row * R + at, mask=at < R, other=1.0).to(tl.float32)
        s = tl.load(sin + row * R + pair, mask=at < R, other=0.0).to(tl.float32)
        own, other = tl.load(source + at, mask=inside, other=0.0), tl.load(source + pair, mask=inside, other=0.0)
        d = own.to(tl.float32) * c + other.to(tl.float32) * s
        if NORM:
            value = tl.load(x + row * x_row + head.to(tl.int64) * x_head + at, mask=inside, other=0.0).to(tl.float32)
            r = 1.0 / tl.sqrt(tl.sum(value * value, 1)[:, None] / H + eps)
            normalized = value * r
            if TRAINED:
                part += d * normalized
            w = tl.load(weight + at, mask=at < H, other=0.0).to(tl.float32)
            d = d * (1.0 + w if OFFSET else w)
            d = r * (d - normalized * (tl.sum(d * normalized, 1)[:, None] / H))
        tl.store(dx + (row * heads + head) * H + at, d.to(dx.dtype.element_ty), mask=inside)
        row += step
    if TRAINED:
        tl.store(dw + (tl.program_id(0) * heads + head).to(tl.int64) * H + at, part, mask=inside)


@jit
def _backward_kernel(
    gq, gk, q, k, dq, dk, q_weight, k_weight, dq_weight, dk_weight, cos, sin, rows, q_heads, k_heads,
    gq_row, gq_head, gk_row, gk_head, q_row, q_head, k_row, k_head, eps,
    HEADS: tl.constexpr, H: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr, OFFSET: tl.constexpr, TRAINED: tl.constexpr,
):  # fmt: skip
    first, step = tl.program_id(1) * HEADS, tl.num_programs(0)
    of_q = tl.cdiv(q_heads, HEADS) * HEADS
    if first < of_q:
        _backward_heads(
            gq, q, dq, q_weight, dq_weight, cos, sin, rows, step, first, q_heads, gq_row, gq_head, q_row, q_head, eps,
            HEADS, H, R, BLOCK, NORM, OFFSET, TRAINED,
        )  # fmt: skip
    else:
        _backward_heads(
            gk, k, dk, k_weight, dk_weight, cos, sin, rows, step, first - of_q, k_heads, gk_row, gk_head, k_row, k_head, eps,
            HEADS, H, R, BLOCK, NORM, OFFSET, TRAINED,
        )  # fmt: skip


def _forward_fake(q, k, cos, sin, q_weight, k_weight, eps, offset):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@operator("rope", _forward_fake)
def _forward_triton(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, offset: bool
) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = together(q), together(k), cos.contiguous(), sin.contiguous()
    q_out, k_out = _forward_fake(q, k, cos, sin, q_weight, k_weight, eps, offset)
    rows, q_heads, size = q.shape
    if rows:
        padded, some = _blocks(size)
        _forward_kernel[grid(rows, -(-q_heads // some) + -(-k.shape[1] // some))](
            q, k, q_out, k_out, q_weight, k_weight, cos, sin, q_heads, k.shape[1], *q.stride()[:2], *k.stride()[:2], eps,
            HEADS=some, H=size, R=cos.shape[-1], BLOCK=padded, NORM=q_weight is not None, OFFSET=offset, num_warps=4,
        )  # fmt: skip
    return q_out, k_out


def _backward_fake(gq, gk, q, k, cos, sin, q_weight, k_weight, eps, offset, needs_dw):
    dws = [gq.new_empty(w.shape, dtype=w.dtype) if needs_dw and w is not None else gq.new_empty(0) for w in (q_weight, k_weight)]
    return gq.new_empty(gq.shape), gk.new_empty(gk.shape), *dws


@operator("rope_backward", _backward_fake)
def _backward_triton(
    gq: Tensor, gk: Tensor, q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float, offset: bool, needs_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gq, gk, cos, sin = together(gq), together(gk), cos.contiguous(), sin.contiguous()
    norm = q_weight is not None
    q, k = (together(q), together(k)) if norm else (gq, gk)
    dq, dk, dq_weight, dk_weight = _backward_fake(gq, gk, q, k, cos, sin, q_weight, k_weight, eps, offset, needs_dw)
    rows, q_heads, size = gq.shape
    trained = norm and needs_dw
    programs = min(rows, PARTS) if trained else rows
    parts = [gq.new_zeros((programs, heads, size) if trained else 0, dtype=torch.float32) for heads in (q_heads, gk.shape[1])]
    if rows:
        padded, some = _blocks(size)
        _backward_kernel[grid(programs, -(-q_heads // some) + -(-gk.shape[1] // some))](
            gq, gk, q, k, dq, dk, q_weight, k_weight, *parts, cos, sin, rows, q_heads, gk.shape[1],
            *gq.stride()[:2], *gk.stride()[:2], *q.stride()[:2], *k.stride()[:2], eps,
            HEADS=some, H=size, R=cos.shape[-1], BLOCK=padded, NORM=norm, OFFSET=offset, TRAINED=trained, num_warps=4, num_stages=1,
        )  # fmt: skip
    if trained:
        dq_weight, dk_weight = parts[0].sum((0, 1)).to(q_weight.dtype), parts[1].sum((0, 1)).to(k_weight.dtype)
    return dq, dk, dq_weight, dk_weight


def _blocks(size: int) -> tuple[int, int]:
    """Of a program: channels of a head, a power of two, and heads."""
    channels = block(size)
    return channels, max(1, min(8, CHANNELS // channels))


IMPLS = {"torch": Impl(_forward, _backward), "triton": Impl(_forward_triton, _backward_triton)}


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, q_weight, k_weight, eps: float, offset: bool, impl: str):
        ctx.save_for_backward(*((q, k) if q_weight is not None else (None, None)), cos, sin, q_weight, k_weight)
        ctx.rest, ctx.impl = (eps, offset), impl
        return forward(q, k, cos, sin, q_weight, k_weight, eps, offset, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx, gq: Tensor, gk: Tensor):
        needs_dw = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
        dq, dk, dq_weight, dk_weight = backward(gq, gk, *ctx.saved_tensors, *ctx.rest, needs_dw, ctx.impl)
        return dq, dk, None, None, dq_weight, dk_weight, None, None, None
