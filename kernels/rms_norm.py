"""RMSNorm (arXiv 1910.07467) that keeps its input and one number a row for the backward.

    r = 1 / sqrt(mean(x^2) + eps),  x_hat = x r,  y = x_hat s        with the scale s = w, or 1 + w
    dx = r (g s - x_hat mean(g s x_hat)),  dw = sum over rows of g x_hat

All fp32 (fp64 for fp64 inputs), rounded where transformers rounds: w * round(x_hat) for a plain weight (llama), round(x_hat (1 + w))
for one stored minus one (gemma). Autograd on the same operations would keep x_hat, x in fp32 and more, each as large as x.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: bool = False) -> Tensor:
    """x: [..., D]; weight: [D] in any float dtype; `offset`: it is stored minus one -> like x."""
    return _RmsNorm.apply(x, weight, eps, offset)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, offset: bool = False) -> Tensor:
    """The obvious twin, differentiated by autograd."""
    wide = x.to(_wide(x))
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset:
        return (normalized * (1.0 + weight.to(wide.dtype))).to(x.dtype)
    return weight.to(x.dtype) * normalized.to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
        wide = x.to(_wide(x))
        r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, r)
        ctx.offset = offset
        # nothing in place, and no cast to the same dtype: where the result is an alias, torch 2.11 compiles without the gradient
        if not offset:
            return (wide * r).to(x.dtype) * weight.to(x.dtype)
        y = wide * r * (1.0 + weight.to(wide.dtype))
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, r = ctx.saved_tensors
        normalized, g = x.to(r.dtype) * r, grad.to(r.dtype)
        dx = dw = None
        if ctx.needs_input_grad[1]:
            dw = (g * normalized).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            scaled = g * (weight.to(r.dtype) + (1.0 if ctx.offset else 0.0))
            mean = (scaled * normalized).mean(-1, keepdim=True)
            dx = scaled.sub_(normalized.mul_(mean)).mul_(r).to(x.dtype)
        return dx, dw, None, None
