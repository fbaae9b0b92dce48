"""Rotary position embedding (arXiv 2104.09864), half-split like Hugging Face: dimension i pairs with i + H/2.

    angle(t, i) = t * f_i,   f_i = theta^(-2i/H)
    (a, b) -> (a cos - b sin, b cos + a sin)   for each pair (a, b) = (x_i, x_{i+H/2})

Longer contexts than those of pre-training stretch the frequencies:

    linear  f_i / factor                                                        (position interpolation, arXiv 2306.15595)
    llama3  wavelengths above original / low_freq_factor are stretched by `factor`, those below original / high_freq_factor
            are kept, a linear blend between                                    (Llama 3.1's reference code)
    yarn    the blend runs over dimensions, between those that turn beta_slow and beta_fast times in the original length;
            cos and sin are multiplied by attention_factor                      (arXiv 2309.00071)

Frequencies are fp32, computed step by step as transformers does: a rounding here is multiplied by the position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model.arch import Rope


def frequencies(rope: Rope, head_dim: int) -> Tensor:
    """f: [head_dim / 2] fp32, on the CPU."""
    base = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    f = 1.0 / base
    if rope.kind == "linear":
        f = f / rope.factor
    elif rope.kind == "llama3":
        f = _llama3(rope, f)
    elif rope.kind == "yarn":
        f = _yarn(rope, base)
    return f


def _llama3(rope: Rope, f: Tensor) -> Tensor:
    wavelength = 2 * math.pi / f
    longest, shortest = rope.original_max_positions / rope.low_freq_factor, rope.original_max_positions / rope.high_freq_factor
    smooth = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * f / rope.factor + smooth * f
    return torch.where(wavelength > longest, f / rope.factor, torch.where(wavelength < shortest, f, blended))


def _yarn(rope: Rope, base: Tensor) -> Tensor:
    size = 2 * base.numel()

    def dimension(turns: float) -> float:
        """The dimension that turns so often within the original length."""
        return size * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high += 0.001 if low == high else 0.0
    ramp = ((torch.arange(base.numel(), dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * base) * (1 - kept) + 1.0 / base * kept


class Rotary(nn.Module):
    """cos and sin of every rope of a model. The frequencies are buffers outside the state dict."""

    def __init__(self, ropes: tuple[Rope, ...], head_dim: int):
        super().__init__()
        self.ropes, self.head_dim = ropes, head_dim
        for i in range(len(ropes)):
            self.register_buffer(f"frequencies_{i}", torch.empty(head_dim // 2, dtype=torch.float32), persistent=False)

    def reset_buffers(self, device: torch.device | str) -> None:
        """Computes the frequencies on `device`; needed after a build on meta, whose buffers hold nothing."""
        for i, rope in enumerate(self.ropes):
            self.register_buffer(f"frequencies_{i}", frequencies(rope, self.head_dim).to(device), persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """positions: [T] int -> for each rope (cos, sin), [T, 1, head_dim] each in `dtype`, as kernels/rope.py takes them."""
        out = []
        for i, rope in enumerate(self.ropes):
            angle = positions.float()[:, None, None] * getattr(self, f"frequencies_{i}")
            cos, sin = angle.cos() * rope.attention_factor, angle.sin() * rope.attention_factor
            out.append((torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)))
        return out
