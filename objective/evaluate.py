"""Loss on held-out documents, in all and per source, and the decision to stop early; the loss of each document of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batch import IGNORE, Batch
from model.decoder import Row
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


def room(like: Batch) -> tuple[int, int, int]:
    """What a row of the shape of `like` has room for: slots, tokens of a document, documents beside the padding."""
    slots = like.tokens.numel()
    return slots, like.max_seqlen, like.cu_seqlens.numel() - 1 - -(-slots // like.max_seqlen)


def with_row(like: Batch, row: Row) -> Batch:
    """The documents of `row`, which fit (`room`), with padding behind them in the shape of `like`, which a compiled model has seen."""
    slots, used = like.tokens.numel(), row.tokens.numel()
    edges = [*row.cu_seqlens.tolist(), *range(used + like.max_seqlen, slots, like.max_seqlen), slots]
    borders = torch.tensor(edges + [slots] * (like.cu_seqlens.numel() - len(edges)), dtype=torch.int32)
    tail = torch.cat([torch.arange(b - a) for a, b in pairwise(edges) if a >= used] or [row.positions[:0]]).int()
    fill = lambda x, value: F.pad(x, (0, slots - used), value=value)  # noqa: E731
    positions = torch.cat([row.positions, tail])
    return replace(like, tokens=fill(row.tokens, 0), labels=fill(row.labels, IGNORE), positions=positions, cu_seqlens=borders, filled=used)


@torch.no_grad()
def logprobs(net: nn.Module, batch: Batch, sum_over_context: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
    """log p of every label of the row that this rank has a share of: [T] fp32 on the CPU, 0 where there is none."""
    training = net.training
    net.eval()
    found = net(batch.to(device))
    net.train(training)
    if batch.slots is None:
        return found.cpu()
    whole = torch.zeros(int(batch.cu_seqlens.max()), device=device)
    whole[batch.slots.to(device).long()] = found
    return sum_over_context(whole).cpu()


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
