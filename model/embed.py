"""Token embeddings: rows of the weight, in the compute dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Module):
    """weight: [vocab, hidden]. Every row trains, the padding token's too (transformers freezes that one).

    `scale` multiplies the rows and is rounded to their dtype first: gemma's sqrt(3072) = 55.43 is 55.5 in bf16, in
    training as in every later use.
    """

    def __init__(self, vocab: int, hidden: int, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(vocab, hidden))

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """tokens: [T] int64 -> [T, hidden] in `dtype`."""
        h = F.embedding(tokens, self.weight).to(dtype)
        return h if self.scale == 1.0 else h * torch.tensor(self.scale, dtype=dtype).item()

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}, scale={self.scale}"
