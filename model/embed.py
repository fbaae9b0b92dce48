"""Token embeddings: rows of the weight, in the compute dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.linear import Slots, here


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
            h = F.embedding(tokens, weight).to(dtype)
        else:
            row = tokens - self.shard.first
            elsewhere = (row < 0) | (row >= weight.shape[0])
            h = F.embedding(row.masked_fill(elsewhere, 0), weight).to(dtype).masked_fill(elsewhere[:, None], 0)
            h = self.shard.leave(h)
        return h if self.scale == 1.0 else h * torch.tensor(self.scale, dtype=dtype).item()

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}, scale={self.scale}"
