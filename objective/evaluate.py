"""Loss on held-out documents, in all and per source, and the decision to stop early; the loss of each document of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from data.batch import Batch
from objective import lm


@torch.no_grad()
def evaluate(
    net: nn.Module,
    batches: Iterable[Batch],
    sources: tuple[str, ...],
    sum_over_data: Callable[[Tensor], Tensor],
    device: torch.device,
) -> dict[str, object]:
    """Mean loss per learned token over all batches of all ranks: `eval_loss`, and by name under `eval_sources`.

    Every rank must bring the same number of batches (an empty pack counts as one), as the forward may hold collectives.
    """
    training = net.training
    net.eval()
    sums = torch.zeros(len(sources), 2, dtype=torch.float64, device=device)
    for batch in batches:
        sums += lm.by_source(net, batch.to(device), len(sources))
    net.train(training)
    sums = sum_over_data(sums).cpu()
    loss, tokens = sums.sum(dim=0).tolist()
    each = {name: total / n for name, (total, n) in zip(sources, sums.tolist()) if n}
    return {"eval_loss": loss / tokens if tokens else math.nan, "eval_tokens": int(tokens), "eval_sources": each}


@torch.no_grad()
def each_document(
    net: nn.Module, batches: Iterable[Batch], sum_over_context: Callable[[Tensor], Tensor], device: torch.device, seed: int
) -> list[list[float]]:
    """For each batch, the mean loss of its documents as a training step computes it, dropout included; 0 where nothing is learned.

    For looking at a step after it went wrong. A document that is not finite makes no other one so, unless attention does.
    """
    found = []
    for batch in batches:
        lm.seed_dropout(seed, batch.pack)
        each = replace(batch, group={"source": torch.arange(batch.cu_seqlens.numel() - 1)})
        sums = sum_over_context(lm.by_source(net, each.to(device), batch.cu_seqlens.numel() - 1)).tolist()
        found.append([total / targets if targets else 0.0 for total, targets in sums])
    return found


@dataclass
class EarlyStop:
    """Ends a run after `patience` evaluations in a row whose loss did not fall by more than `min_delta`; 0 never does.

    best, bad: the lowest loss so far and the evaluations since; kept in checkpoints (`state`).
    """

    patience: int
    min_delta: float
    best: float | None = None
    bad: int = 0

    @property
    def ends(self) -> bool:
        """Should the run end now? As the present patience has it, also for a run that an earlier one ended."""
        return 0 < self.patience <= self.bad

    def update(self, loss: float) -> None:
        """Takes the newest loss."""
        if self.best is None or loss < self.best - self.min_delta:
            self.best, self.bad = loss, 0
        else:
            self.bad += 1

    def state(self) -> dict[str, float | int | None]:
        return {"best": self.best, "bad": self.bad}
