"""Token embeddings: rows of the weight, in the compute dtype."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.linear import Slots, here


class _Lookup(torch.autograd.Function):
    """Rows of the weight in `dtype`. The gradient of a row is summed over its tokens in at least fp32 and rounded once: a
    frequent token has thousands of them, and a sum in bf16 would depend on how many a rank has."""

    @staticmethod
    def forward(ctx, weight: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows, ctx.dtype = weight.shape[0], weight.dtype
        return F.embedding(tokens, weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        return torch.ops.aten.embedding_dense_backward(wide, ctx.saved_tensors[0], ctx.rows, -1, False).to(ctx.dtype), None, None


@cache
def rounded(x: float, dtype: torch.dtype) -> float:
    """x as `dtype` has it."""
    return torch.tensor(x, dtype=dtype).item()


class Embedding(Slots):
    """weight: [vocab, hidden]. Every row trains, the padding token's too (transformers freezes that one).

    Slot `shard`: this rank holds the rows from number `shard.first` on; other tokens give zero, and `shard.leave` adds the ranks up.

    `scale` multiplies the rows and is rounded to their dtype first: gemma's sqrt(3072) = 55.43 is 55.5 in bf16, in
    training as in every later use.
    """

    slots = ("shard",)

    def __init__(self, vocab: int, hidden: int, scale: float = 1.0):
        super().__init__()
        self.shard = None
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(vocab, hidden))

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """tokens: [T] int64 -> [T, hidden] in `dtype`."""
        weight = here(self.weight)
        if self.shard is None:
            h = _Lookup.apply(weight, tokens, dtype)
        else:
            row = tokens - self.shard.first
            elsewhere = (row < 0) | (row >= weight.shape[0])
            h = _Lookup.apply(weight, row.masked_fill(elsewhere, 0), dtype).masked_fill(elsewhere[:, None], 0)
            h = self.shard.leave(h)
        return h if self.scale == 1.0 else h * rounded(self.scale, dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}, scale={self.scale}"
