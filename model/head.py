"""The head: from hidden states to log-probabilities. The only code that touches the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear_logprob import Extras, Scores, Vocabulary, linear_logprob, linear_scores
from model.linear import Slots


class Head(Slots):
    """weight: [vocab, hidden]. Not a `Linear`: its product never happens as a whole.

    Slot `shard`: this rank holds some rows of the vocabulary (kernels/linear_logprob.py `Vocabulary`).
    """

    slots = ("shard",)

    def __init__(self, vocab: int, hidden: int):
        super().__init__()
        self.shard = None
        self.weight = nn.Parameter(torch.empty(vocab, hidden))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    softcap: float | None = None,
    split: Vocabulary | None = None,
    budget: int | None = None,
    learned: int | None = None,
    impl: str = "torch",
    extras: Extras | None = None,
    summed: bool = False,
) -> Tensor | Scores:
    """hidden: [T, D], weight: [V, D], labels: [T] int64 -> log p(label) [T] fp32, 0 where the label is negative.

    With `split`, `weight` is this rank's rows of the vocabulary. budget: bytes of a buffer of logits; None: as suits the device.
    learned: how many labels are not negative, where the host knows. impl: a key of kernels/linear_logprob.py `IMPLS`.
    With `extras`, the scores that they name. summed: every row will get the same gradient.
    """
    how = (softcap, budget, split, learned, impl)
    if extras is None:
        return linear_logprob(hidden, weight, labels, *how, summed)
    return linear_scores(hidden, weight, labels, *how, extras, summed)


def logits(hidden: Tensor, weight: Tensor, softcap: float | None = None, split: Vocabulary | None = None) -> Tensor:
    """All logits: [M, D], [V, D] -> [M, V] fp32. For generation and inspection; training goes through token_logprobs."""
    z = F.linear(hidden, weight.to(hidden.dtype)).float()
    if split is not None:
        z = split.join(z)
    return z if softcap is None else softcap * torch.tanh(z / softcap)
