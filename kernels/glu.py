"""act(gate) * up, the middle of a gated feed-forward network (arXiv 2002.05202), keeping only gate and up for the backward.

    y = a(gate) up,   dup = g a(gate),   dgate = g up a'(gate)

Autograd on the two operations would keep a(gate) as well. Activations by their names in Hugging Face configs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_aten = torch.ops.aten
ACT = {  # name: (a(x), g a'(x))
    "silu": (F.silu, _aten.silu_backward),
    "gelu": (F.gelu, _aten.gelu_backward),
    "gelu_pytorch_tanh": (lambda x: F.gelu(x, approximate="tanh"), lambda g, x: _aten.gelu_backward(g, x, approximate="tanh")),
}


def glu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """gate, up: one shape and dtype -> the same. act: a key of ACT."""
    return _Glu.apply(gate, up, act)


def glu_ref(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """The obvious twin."""
    return ACT[act][0](gate) * up


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, act: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return glu_ref(gate, up, act)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        gate, up = ctx.saved_tensors
        a, derivative = ACT[ctx.act]
        dgate = derivative(g * up, gate) if ctx.needs_input_grad[0] else None
        dup = g * a(gate) if ctx.needs_input_grad[1] else None
        return dgate, dup, None
