"""One micro-batch: a row of T token slots with documents laid end to end, and where they begin and end.

There is no batch dimension and no padding inside the row; what the documents leave free at the tail is one more
document of `PAD` tokens whose labels are all `IGNORE` (or several, so that none is longer than `max_seqlen`). Shapes are
the same for every batch of a run (T, N and `max_seqlen` are constants), so that a compiled model never sees a new one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from data.sample import IGNORE


@dataclass(frozen=True)
class Batch:
    tokens: Tensor  # [T] int64
    labels: Tensor  # [T] int64, already shifted: labels[t] is the target of position t, or IGNORE
    positions: Tensor  # [T] int32, restart at 0 in each document
    cu_seqlens: Tensor  # [N+1] int32 document borders, from 0, padded with T to a fixed N
    max_seqlen: int  # constant for the run: no document is longer
    pack: int = 0  # number of this pack in the run's plan; the same at any world size (dropout derives from it)
    filled: int = 0  # slots that hold documents; those after them are padding
    slots: Tensor | None = None  # [T] int32 numbers in the whole row of the slots that are here; None: all, in order
    group: dict[str, Tensor] = field(default_factory=dict)  # per-document fields, [N] each, e.g. "source" int64
    targets: int | None = None  # `learned()`, where labels are no longer on the host; None: not counted

    def to(self, device: torch.device | str) -> Batch:
        """On another device. Targets are counted first: there, nobody could ask for their number without waiting for the device."""
        names = ("tokens", "labels", "positions", "cu_seqlens", *(["slots"] if self.slots is not None else []))
        move = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        targets = self.learned() if self.labels.device.type == "cpu" else self.targets
        return replace(self, **move, targets=targets, group={k: v.to(device, non_blocking=True) for k, v in self.group.items()})

    def document(self) -> Tensor:
        """[T] int64: the number in its row of the document that each slot belongs to."""
        slots = torch.arange(self.tokens.numel(), device=self.tokens.device, dtype=torch.int32) if self.slots is None else self.slots
        return torch.searchsorted(self.cu_seqlens[1:], slots, right=True)

    def learned(self) -> int:
        """Number of slots with a target: this micro-batch's share of the loss denominator."""
        return int((self.labels != IGNORE).sum())
