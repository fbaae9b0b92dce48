"""RMSNorm (arXiv 1910.07467): y = x / sqrt(mean(x^2) + eps) * w over the last dimension; the statistics are fp32.

Families differ in where they round and in what they store, and both show in bf16:

    rms         y = w * round(x_hat)            llama, mistral, qwen; w starts at 1
    rms_offset  y = round(x_hat * (1 + w))      gemma; w starts at 0, so weight decay pulls the scale towards 1

Slot `shard`: `leave(y)` after the norm. Under tensor parallelism norms work on this rank's rows, and one that feeds
column-split linears hands them the rows of all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.rms_norm import rms_norm
from model.linear import Slots, here


class RMSNorm(Slots):
    """x: [..., size] -> same shape and dtype; weight: [size].

    Slot `impl`: which implementation computes it, a key of kernels/rms_norm.py IMPLS."""

    slots = ("shard", "impl")
    offset = False  # is the weight stored minus one
    initial = 1.0  # what a fresh weight holds

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))
        self.shard, self.impl = None, "torch"

    def forward(self, x: Tensor) -> Tensor:
        y = rms_norm(x, here(self.weight), self.eps, self.offset, self.impl)
        return y if self.shard is None else self.shard.leave(y)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class OffsetRMSNorm(RMSNorm):
    """RMSNorm whose weight is stored minus one."""

    offset = True
    initial = 0.0


NORMS = {"rms": RMSNorm, "rms_offset": OffsetRMSNorm}
