"""act(gate) * up, the middle of a gated feed-forward network (arXiv 2002.05202), keeping only gate and up for the backward.

    y = a(gate) up,   dup = g a(gate),   dgate = g up a'(gate)

    silu               a = x s(x)              a' = s(x) (1 + x (1 - s(x)))          s the logistic function
    gelu               a = x P(x)              a' = P(x) + x p(x)                    P, p the normal distribution's
    gelu_pytorch_tanh  a = x (1 + t) / 2       a' = (1 + t + x (1 - t^2) t') / 2     t = tanh(c (x + 0.044715 x^3)), c = sqrt(2 / pi)

Autograd on the two operations would keep a(gate) as well. a(gate) is rounded before it is multiplied, as in transformers.
Activations by their names in Hugging Face configs.

`forward` and `backward` are the halves without autograd (kernels/regions.py); the backward can make y again on its way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import grid, jit, operator, rows_of, tl

_aten = torch.ops.aten
ACT = {  # name: (a(x), g a'(x))
    "silu": (F.silu, _aten.silu_backward),
    "gelu": (F.gelu, _aten.gelu_backward),
    "gelu_pytorch_tanh": (lambda x: F.gelu(x, approximate="tanh"), lambda g, x: _aten.gelu_backward(g, x, approximate="tanh")),
}
KIND = {name: i for i, name in enumerate(ACT)}  # for the kernels
BLOCK = 1024


class Impl(NamedTuple):
    forward: Callable[[Tensor, Tensor, str], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, str, bool], tuple[Tensor, Tensor, Tensor]]


def glu(gate: Tensor, up: Tensor, act: str, impl: str = "torch") -> Tensor:
    """gate, up: one shape and dtype -> the same. act: a key of ACT."""
    return _Glu.apply(gate, up, act, impl)


def glu_ref(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """The obvious twin."""
    return ACT[act][0](gate) * up


def forward(gate: Tensor, up: Tensor, act: str, impl: str) -> Tensor:
    return IMPLS[impl].forward(gate, up, act)


def backward(grad: Tensor, gate: Tensor, up: Tensor, act: str, again: bool, impl: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dgate, dup, y where `again` asks for it)."""
    dgate, dup, y = IMPLS[impl].backward(grad, gate, up, act, again)
    return dgate, dup, y if again else None


def _backward(grad: Tensor, gate: Tensor, up: Tensor, act: str, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    a, derivative = ACT[act]
    value = a(gate)
    return derivative(grad * up, gate), grad * value, value * up if again else grad.new_empty(0)


@jit
def _value(x, KIND: tl.constexpr):
    if KIND == 0:
        return x * tl.sigmoid(x)
    if KIND == 1:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh(u)) / 2 is the logistic function of 2 u


@jit
def _slope(x, KIND: tl.constexpr):
    if KIND == 0:
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    if KIND == 1:
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)


@jit
def _forward_kernel(gate, up, y, gate_row, up_row, columns, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    x = tl.load(gate + row * gate_row + at, mask=inside)
    u = tl.load(up + row * up_row + at, mask=inside).to(tl.float32)
    value = _value(x.to(tl.float32), KIND).to(x.dtype).to(tl.float32)
    tl.store(y + row * columns + at, (value * u).to(x.dtype), mask=inside)


@jit
def _backward_kernel(
    grad, gate, up, dgate, dup, y, grad_row, gate_row, up_row, columns, KIND: tl.constexpr, AGAIN: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    g = tl.load(grad + row * grad_row + at, mask=inside).to(tl.float32)
    x = tl.load(gate + row * gate_row + at, mask=inside)
    u = tl.load(up + row * up_row + at, mask=inside).to(tl.float32)
    wide = x.to(tl.float32)
    value = _value(wide, KIND).to(x.dtype).to(tl.float32)
    out = row * columns + at
    tl.store(dgate + out, (g * u * _slope(wide, KIND)).to(x.dtype), mask=inside)
    tl.store(dup + out, (g * value).to(x.dtype), mask=inside)
    if AGAIN:
        tl.store(y + out, (value * u).to(x.dtype), mask=inside)


def _forward_fake(gate, up, act):
    return gate.new_empty(gate.shape)


@operator("glu", _forward_fake)
def _forward_triton(gate: Tensor, up: Tensor, act: str) -> Tensor:
    x, u, y = rows_of(gate), rows_of(up), _forward_fake(gate, up, act)
    rows, columns = x.shape
    if y.numel():
        _forward_kernel[grid(rows, -(-columns // BLOCK))](
            x, u, y, x.stride(0), u.stride(0), columns, KIND=KIND[act], BLOCK=BLOCK, num_warps=4
        )
    return y


def _backward_fake(grad, gate, up, act, again):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape), gate.new_empty(gate.shape if again else 0)


@operator("glu_backward", _backward_fake)
def _backward_triton(grad: Tensor, gate: Tensor, up: Tensor, act: str, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    g, x, u = rows_of(grad), rows_of(gate), rows_of(up)
    dgate, dup, y = _backward_fake(grad, gate, up, act, again)
    rows, columns = x.shape
    if dgate.numel():
        _backward_kernel[grid(rows, -(-columns // BLOCK))](
            g, x, u, dgate, dup, y, g.stride(0), x.stride(0), u.stride(0), columns, KIND=KIND[act], AGAIN=again, BLOCK=BLOCK, num_warps=4
        )
    return dgate, dup, y


IMPLS = {"torch": Impl(glu_ref, _backward), "triton": Impl(_forward_triton, _backward_triton)}


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, act: str, impl: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act, ctx.impl = act, impl
        return forward(gate, up, act, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        gate, up = ctx.saved_tensors
        dgate, dup, _ = backward(g, gate, up, ctx.act, False, ctx.impl)
        return dgate, dup, None, None
