"""The batches of a run, as a function of the step number.

An epoch's packs are one deterministic plan: of the documents, the number of token slots, the seed and the epoch, and of
nothing else. A step takes the next `size * accumulate` packs, so that number alone decides which documents a step sees: at
another world size with as many packs a step, every step is the same, and resuming is going on at a number. Packs are
numbered through the run; step s and micro-batch i of rank r take number

    ((s - 1) * accumulate + i) * size + r

An epoch's last step is filled up with empty packs (all padding, nothing learned), so that epochs end at a step for all ranks.

In memory: a plan has 4 bytes per document taken (and about a hundred for the moment in which it is made).
"""

from __future__ import annotations

import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from data import packing
from data.batch import Batch
from data.documents import Documents
from data.sample import IGNORE
from data.tokenizer import Tokenizer
from runtime.errors import ConfigError, printable


@dataclass(frozen=True)
class Plan:
    """The packs of one epoch: pack p holds documents[bounds[p] : bounds[p + 1]]."""

    documents: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def members(self, pack: int) -> np.ndarray:
        """Documents of a pack; of one behind the last, which fills up a step, none."""
        return self.documents[self.bounds[pack] : self.bounds[pack + 1]] if pack < len(self) else self.documents[:0]


class Stream:
    """Batches by step.

    Args:
        docs: what to read.
        tokens: T, slots of a micro-batch.
        max_length: no document is longer; every batch's `max_seqlen`.
        seed: with the epoch, decides the order.
        shuffle: False leaves documents of equal length, and the packs, in order.
        rank, size: this data rank of so many; accumulate: micro-batches of a rank in a step.
    """

    def __init__(
        self,
        docs: Documents,
        tokens: int,
        max_length: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        size: int = 1,
        accumulate: int = 1,
    ):
        if docs.longest > min(tokens, max_length):
            raise ConfigError(f"is less than the {docs.longest} tokens a document may have", "tokens", min(tokens, max_length))
        self.docs, self.tokens, self.max_length, self.seed, self.shuffle = docs, tokens, max_length, seed, shuffle
        self.rank, self.size, self.accumulate = rank, size, accumulate
        self.packs_per_step = size * accumulate
        self._lock = threading.RLock()  # around plans: the next step is prepared by another thread
        self._pool: ThreadPoolExecutor | None = None
        self._next: tuple[int, Future] | None = None
        self._most: int | None = None  # documents of a pack: fixed by the first epoch
        self._plan = (0, self._make(0))
        self._starts = [1, 1 + self._steps_of(self._plan[1])]  # the first step of every epoch known so far
        plan = self._plan[1]
        self.fill = float(docs.lengths[plan.documents].sum(dtype=np.int64) / (len(plan) * tokens))
        # Documents of a batch: those of a pack, and the padding behind them, in pieces that are no longer than a document.
        self.max_docs = self._most + -(-tokens // max_length)

    # ------------------------------------------------------------------------------------------------------------ plan

    def _make(self, epoch: int) -> Plan:
        """The plan of an epoch. Its packing is a function of the sorted lengths; the seed decides who takes which place."""
        taken = self.docs.take(epoch)
        lengths = self.docs.lengths[taken]
        packs = packing.pack(np.sort(lengths)[::-1], self.tokens)
        self._most = self._most or packing.max_documents(packs)
        order, bounds = packing.arrange(lengths, packing.limit(packs, self._most), self.seed, epoch, self.shuffle)
        return Plan(taken[order].astype(np.uint32), bounds)

    def _plan_of(self, epoch: int) -> Plan:
        with self._lock:
            if self._plan[0] != epoch:
                self._plan = epoch, self._make(epoch)
            return self._plan[1]

    def _steps_of(self, plan: Plan) -> int:
        return -(-len(plan) // self.packs_per_step)

    def _first_step(self, epoch: int) -> int:
        """Epochs differ in length only where a fractional weight takes other documents each time: then they are counted."""
        if all(origin.weight % 1 == 0 for origin in self.docs.origins):
            return 1 + epoch * (self._starts[1] - 1)
        with self._lock:
            while len(self._starts) <= epoch:
                self._starts.append(self._starts[-1] + self._steps_of(self._plan_of(len(self._starts) - 1)))
            return self._starts[epoch]

    def _epoch_of(self, step: int) -> int:
        epoch = (step - 1) // self.steps_per_epoch
        while self._first_step(epoch) > step:
            epoch -= 1
        while self._first_step(epoch + 1) <= step:
            epoch += 1
        return epoch

    @property
    def steps_per_epoch(self) -> int:
        """Of the first epoch; see `steps`."""
        return self._first_step(1) - 1

    def steps(self, epochs: int) -> int:
        """Steps of so many whole epochs."""
        return self._first_step(epochs) - 1

    # --------------------------------------------------------------------------------------------------------- batches

    def take(self, step: int) -> list[Batch]:
        """The micro-batches of this rank in `step`, which counts from 1. Meanwhile the next step's are prepared."""
        assert step >= 1, step
        if self._pool is None:  # here and not sooner: threads do not survive a fork
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="data")
        if self._next is None or self._next[0] != step:
            self._next = step, self._pool.submit(self._batches, step)
        batches = self._next[1].result()
        self._next = step + 1, self._pool.submit(self._batches, step + 1)
        return batches

    def _batches(self, step: int) -> list[Batch]:
        plan, packs = self._packs(step)
        return [self._batch(plan, pack, (step - 1) * self.packs_per_step + number) for number, pack in packs]

    def documents(self, step: int) -> list[list[int]]:
        """Which of `docs` are in each micro-batch of this rank in `step`, in their order there."""
        plan, packs = self._packs(step)
        return [plan.members(pack).tolist() for _, pack in packs]

    def _packs(self, step: int) -> tuple[Plan, list[tuple[int, int]]]:
        """The plan of the epoch of `step`, and this rank's packs of the step: number in the step, number in the plan."""
        epoch = self._epoch_of(step)
        first = (step - self._first_step(epoch)) * self.packs_per_step
        numbers = [i * self.size + self.rank for i in range(self.accumulate)]
        return self._plan_of(epoch), [(number, first + number) for number in numbers]

    def _batch(self, plan: Plan, pack: int, number: int) -> Batch:
        """Pack `pack` of an epoch, number `number` of the run; empty if the epoch has no such pack."""
        tokens = np.full(self.tokens, self.docs.pad_id, np.int64)
        labels = np.full(self.tokens, IGNORE, np.int64)
        positions = np.empty(self.tokens, np.int32)
        borders = np.full(self.max_docs + 1, self.tokens, np.int32)
        sources = np.full(self.max_docs, -1, np.int64)
        at = n = 0
        for i in plan.members(pack):
            ids, targets, sources[n] = self.docs.read(i)
            end = at + len(ids)
            tokens[at:end], labels[at:end], positions[at:end] = ids, targets, np.arange(len(ids))
            borders[n] = at
            at, n = end, n + 1
        filled = at
        while at < self.tokens:
            end = min(at + self.max_length, self.tokens)
            positions[at:end] = np.arange(end - at)
            borders[n] = at
            at, n = end, n + 1
        return Batch(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            positions=torch.from_numpy(positions),
            cu_seqlens=torch.from_numpy(borders),
            max_seqlen=self.max_length,
            pack=number,
            filled=filled,
            group={"source": torch.from_numpy(sources)},
        )

    # ---------------------------------------------------------------------------------------------------------- report

    def report(self) -> str:
        """How the documents are packed, for people."""
        packs = len(self._plan[1])
        empty = self.steps_per_epoch * self.packs_per_step - packs
        padded = f", of which {empty} empty" if empty else ""
        return (
            f"{packs + empty:,} packs of {self.tokens} tokens{padded}, {100 * self.fill:.1f} % full, at most {self._most} documents in one;"
            f" {self.steps_per_epoch:,} steps an epoch of {self.packs_per_step} packs"
        )

    def preview(self, tokenizer: Tokenizer, documents: int = 4, characters: int = 2000) -> str:
        """The first documents of the run as they are trained: packs decoded, what is trained marked, long ones shortened."""
        plan, names = self._plan_of(0), self.docs.sources
        begin, end = _marks()
        lines = [f"how the run begins; trained text is {begin}marked{end}"]
        for pack in range(len(plan)):
            batch = self._batch(plan, pack, pack)
            count = int(plan.bounds[pack + 1] - plan.bounds[pack])
            lines.append(f"--- pack {pack + 1}: {count} documents, {batch.learned():,} of {self.tokens:,} slots have a target")
            for n, (first, last) in enumerate(pairwise(batch.cu_seqlens[: min(count, documents) + 1].tolist())):
                lines.append(f"--- {last - first} tokens from {names[int(batch.group['source'][n])]}")
                lines.append(marked(tokenizer, batch.tokens[first:last].numpy(), batch.labels[first:last].numpy(), characters))
            documents -= count
            if documents <= 0:
                break
        return "\n".join(lines)


_PLAIN, _COLOUR = ("⟦", "⟧"), ("\033[1;32m", "\033[0m")


def _marks() -> tuple[str, str]:
    return _COLOUR if sys.stdout.isatty() else _PLAIN


def marked(tokenizer: Tokenizer, ids: np.ndarray, labels: np.ndarray, characters: int) -> str:
    """A document's text with the tokens that are targets between marks: colour on a terminal, else ⟦ ⟧.

    The label at t is the token at t + 1, so token t is trained where the label before it is set; a split document's first
    target belongs to the piece before, its last one to the piece after.
    """
    trained = np.concatenate(([False], labels[:-1] != IGNORE))
    edges = np.flatnonzero(np.diff(trained)) + 1
    begin, end = _marks()
    parts, length = [], 0
    for run in np.split(np.arange(len(ids)), edges):
        text = _visible(tokenizer.decode(ids[run].tolist()))
        if length + len(text) > characters:
            text = text[: characters - length] + " ..."
        length += len(text)
        parts.append(f"{begin}{text}{end}" if trained[run[0]] else text)
        if length >= characters:
            break
    return "".join(parts)


def _visible(text: str) -> str:
    """Data must not control the terminal: anything but text and line ends is shown escaped."""
    return printable(text, kept="\n\t")
