"""The documents of a run: which tokens of which store, after the policy for long ones.

A document is a range of tokens in the stores laid end to end: 8 bytes for where it begins and 4 for its length, and nothing
else is held in memory. A document that is too long may be split into pieces, which are documents from then on. A piece's
last token has a target, too, the first token of the next piece: so splitting loses no target, and repeats no token. The top
bit of a length says that there is such a target; the bit below, that a piece is not the first one, for where the pieces of a
document have to stay together (held out or not, taken this time or not).

What is left out is counted and reported: documents without a target (they would only cost time), and what `overflow` drops.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from data.keys import permutation
from data.sample import IGNORE, TRAINED
from data.store import Store
from data.tokenizer import Tokenizer
from runtime.errors import DataError

_CONTINUES, _FURTHER = np.uint32(1 << 31), np.uint32(1 << 30)  # bits of a length
_LENGTH = np.uint32(_FURTHER - 1)
_ID = np.uint32(TRAINED - 1)
_PART = 1 << 24  # tokens that are looked through at a time


@dataclass(frozen=True)
class Origin:
    """One source: its store, and where that came from."""

    name: str
    weight: float
    path: str
    files: tuple[Path, ...]
    store: Store


@dataclass(frozen=True)
class Counts:
    """What became of a source's documents."""

    documents: int
    untrained: int  # have no target (left)
    long: int  # have more than the longest allowed length
    lost: int  # tokens of documents that were dropped, or cut off others


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents of all sources, in order, each with its tokens and targets. Reading one reads it from disk.

    fingerprint: a key of everything that decides tokens, targets and borders; the same wherever the files lie.
    longest: no document has more tokens.
    pad_id: the tokenizer's, or 0 where no document has so large an id: a padding token added later has no embedding.
    """

    origins: tuple[Origin, ...]
    begin: np.ndarray  # uint64 [n]
    length: np.ndarray  # uint32 [n], and two bits
    longest: int
    overflow: str
    pad_id: int
    seed: int  # of the choice that weights leave open
    counts: tuple[Counts, ...]  # empty for what was held out
    fingerprint: str

    @staticmethod
    def of(origins: Sequence[Origin], longest: int, overflow: str, pad_id: int, seed: int) -> Documents:
        """Applies the policy for documents of more than `longest` tokens.

        Raises:
            DataError: a source has nothing left, or `overflow` is "error" and a document is too long.
        """
        begins, lengths, counts, base = [], [], [], 0
        for origin in origins:
            begin, length, count = _cut(origin, longest, overflow)
            if not len(begin):
                raise DataError(_nothing_left(count, longest), origin.path)
            begins.append(begin + np.uint64(base))
            lengths.append(length)
            counts.append(count)
            base += origin.store.meta["tokens"]
        facts = [[(origin.store.contents, origin.weight) for origin in origins], longest, overflow]
        fingerprint = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
        begin, length = np.concatenate(begins), np.concatenate(lengths)
        pad_id = pad_id if any(pad_id <= origin.store.max_id for origin in origins) else 0
        return Documents(tuple(origins), begin, length, longest, overflow, pad_id, seed, tuple(counts), fingerprint)

    def __len__(self) -> int:
        return len(self.begin)

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(origin.name for origin in self.origins)

    @property
    def lengths(self) -> np.ndarray:
        """[n] uint32: tokens of each document."""
        return self.length & _LENGTH

    @cached_property
    def _bases(self) -> np.ndarray:
        """[sources + 1] uint64: where each store begins."""
        return np.cumsum([0] + [origin.store.meta["tokens"] for origin in self.origins]).astype(np.uint64)

    @cached_property
    def _borders(self) -> np.ndarray:
        """[sources + 1]: the first document of each source."""
        return np.searchsorted(self.begin, self._bases)

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Tokens [n] int64, labels [n] int64 (shifted: the target at each place, or IGNORE), number of the source."""
        source = int(np.searchsorted(self._bases, self.begin[i], "right")) - 1
        begin = int(self.begin[i] - self._bases[source])
        length, more = int(self.length[i] & _LENGTH), int(self.length[i] >= _CONTINUES)
        raw = np.asarray(self.origins[source].store.tokens[begin : begin + length + more])
        ids = (raw & _ID).astype(np.int64)
        labels = np.full(length, IGNORE, np.int64)
        labels[: len(raw) - 1] = np.where(raw[1:] >= TRAINED, ids[1:], IGNORE)
        return ids[:length], labels, source

    def about(self, i: int, tokenizer: Tokenizer, characters: int = 400) -> dict[str, object]:
        """Where a document came from and how it begins, for people and as JSON values."""
        source = int(np.searchsorted(self._bases, self.begin[i], "right")) - 1
        origin, begin = self.origins[source], int(self.begin[i] - self._bases[source])
        file, line = origin.store.place_of(int(np.searchsorted(origin.store.index["end"], begin, "right")))
        ids = origin.store.tokens[begin : begin + min(int(self.lengths[i]), characters)] & _ID
        text = tokenizer.decode(ids.tolist())[:characters]
        return {"where": f"{origin.files[file]}:{line}", "source": origin.name, "tokens": int(self.lengths[i]), "text": text}

    def take(self, epoch: int) -> np.ndarray:
        """The documents of an epoch, as often as their source's weight says, in order; int64.

        A whole weight takes every document so often. What is left over, a fraction, is that share of the documents, chosen
        anew each epoch by (seed, epoch). Pieces of one document are taken together.

        Raises:
            DataError: a weight is so small that it takes no document of its source.
        """
        taken = []
        for s, origin in enumerate(self.origins):
            first, last = self._borders[s], self._borders[s + 1]
            own = np.arange(first, last)
            times, part = divmod(origin.weight, 1)
            taken += [own] * int(times)
            if part:
                taken.append(own[self._chosen(s, lambda n, part=part: round(part * n), "take", self.seed, epoch)])
            if len(own) and not times and not len(taken[-1]):
                documents = int(self._heads(s).sum())
                raise DataError(f"weight {origin.weight:g} takes none of its {documents:,} documents in an epoch; raise it", origin.path)
        return np.concatenate(taken)

    def split(self, size: float, seed: int) -> tuple[Documents, Documents]:
        """Training documents and held-out ones, disjoint and the same for ever for (seed, data).

        Args:
            size: a fraction below 1 of each source (of at least one document, if it has two), or a number of documents,
                the same for each source as far as it has twice as many: a small source is not left out for being small.

        Raises:
            DataError: there are too few documents.
        """
        heads = [self._heads(s) for s in range(len(self.origins))]
        available = [int(head.sum()) for head in heads]
        if size < 1:
            counts = [0 if n < 2 else max(1, round(size * n)) for n in available]
        else:
            counts = _share(int(size), [n // 2 for n in available])
        if sum(counts) == 0 or (size >= 1 and sum(counts) < size):
            raise DataError(f"cannot hold {size:g} out of {sum(available)} documents; hold out less, or set eval.sources")
        held = np.zeros(len(self), bool)
        for s, count in enumerate(counts):
            held[self._borders[s] : self._borders[s + 1]] = self._chosen(s, lambda n, count=count: count, "split", seed)
        return self._part(~held, f"train {size} {seed}", self.origins, self.counts), self._part(
            held, f"held out {size} {seed}", tuple(replace(origin, weight=1.0) for origin in self.origins), ()
        )

    def _part(self, mask: np.ndarray, name: str, origins: tuple[Origin, ...], counts: tuple[Counts, ...]) -> Documents:
        fingerprint = hashlib.blake2b(f"{self.fingerprint} {name}".encode(), digest_size=16).hexdigest()
        return replace(self, begin=self.begin[mask], length=self.length[mask], origins=origins, counts=counts, fingerprint=fingerprint)

    def _heads(self, s: int) -> np.ndarray:
        """[n of source s] bool: whether a document, and not a further piece of one, begins there."""
        return self.length[self._borders[s] : self._borders[s + 1]] & _FURTHER == 0

    def _chosen(self, s: int, count, *purpose: int | str) -> np.ndarray:
        """[n of source s] bool: the pieces of count(number of documents) documents, at random by `purpose`."""
        document = np.cumsum(self._heads(s)) - 1
        n = int(document[-1]) + 1 if len(document) else 0
        wanted = np.zeros(n, bool)
        wanted[permutation(n, *purpose, s)[: count(n)]] = True
        return wanted[document]

    def check_vocabulary(self, size: int) -> None:
        """Refuses documents with ids that a model with `size` embeddings does not have."""
        for origin in self.origins:
            if origin.store.max_id >= size:
                file, line, found = _beyond(origin.store, size)
                problem = f"token id {found}, but the model's embeddings have {size} rows"
                raise DataError(f"{problem}: use the model's own tokenizer, or a model made for this data", origin.files[file], line)

    def report(self) -> str:
        """What there is and what was left out, for people."""
        width = max(len(name) for name in self.sources)
        lines = []
        tokens = targets = 0
        for s, origin in enumerate(self.origins):
            ids = np.arange(self._borders[s], self._borders[s + 1])
            if not len(ids):
                lines.append(f"  {origin.name:<{width}}  no documents")
                continue
            lengths, learned = self.lengths[ids], self._targets(s, ids)
            total = int(lengths.sum(dtype=np.int64))
            tokens, targets = tokens + total, targets + learned
            sizes = f"mean {total / len(ids):.0f}, median {np.median(lengths):.0f}, max {lengths.max()}"
            weight = f", weight {origin.weight:g}" if origin.weight != 1 else ""
            share = f"{100 * learned / total:.1f} % trained"
            lines.append(f"  {origin.name:<{width}}  {len(ids):,} documents, {total:,} tokens, {share}, length {sizes}{weight}")
            if self.counts:
                lines += [f"  {'':<{width}}  {note}" for note in self._notes(origin, self.counts[s])]
        head = f"{len(self):,} documents, {tokens:,} tokens, {100 * targets / max(1, tokens):.1f} % trained"
        return "\n".join([head, *lines])

    def _notes(self, origin: Origin, count: Counts) -> list[str]:
        notes = []
        if bad := origin.store.bad["count"]:
            notes.append(f"{bad:,} of {bad + origin.store.meta['documents']:,} records are wrong: left out (data.on_bad)")
            notes += [f"  {n:,} x {reason}" for reason, n in origin.store.bad["reasons"].items()]
            notes.append("  first: " + ", ".join(f"{origin.files[file]}:{line}" for file, line, _ in origin.store.bad["first"]))
        if count.untrained:
            notes.append(f"{count.untrained:,} of {count.documents:,} documents have nothing to learn: left out")
        if count.long:
            did = {
                "drop": f"left out, {count.lost:,} tokens",
                "truncate": f"truncated, {count.lost:,} tokens cut off",
                "split": "split into pieces",
            }[self.overflow]
            notes.append(f"{count.long:,} of {count.documents:,} documents have more than {self.longest} tokens: {did}")
        if open_ended := origin.store.meta["open_ended"]:
            notes.append(f"{open_ended:,} documents end without a trained special token: the model does not learn to stop there")
        return notes

    def _targets(self, s: int, ids: np.ndarray) -> int:
        """Number of targets of some documents of source `s`: from the index where they are whole, else counted."""
        store = self.origins[s].store
        begin = (self.begin[ids] - self._bases[s]).astype(np.int64)
        end = begin + self.lengths[ids]
        index_end = store.index["end"]
        document = np.searchsorted(index_end, begin, "right")
        whole = (end == index_end[document]) & (begin == np.where(document > 0, index_end[document - 1], 0))
        total = int(store.index["targets"][document[whole]].sum(dtype=np.int64))
        for i in ids[~whole]:
            total += int(np.count_nonzero(self.read(int(i))[1] != IGNORE))
        return total


def _cut(origin: Origin, longest: int, overflow: str) -> tuple[np.ndarray, np.ndarray, Counts]:
    """(begin uint64, length uint32 with its bits, counts) of one store's documents."""
    store = origin.store
    end = np.array(store.index["end"])
    begin = np.concatenate((np.zeros(1, np.uint64), end[:-1]))
    length = end - begin
    targets = store.index["targets"] > 0
    long = targets & (length > longest)
    if overflow == "error" and long.any():
        i = int(np.argmax(long))
        file, line = store.place_of(i)
        advice = 'raise data.max_length, or set data.overflow to "drop", "truncate" or "split"'
        raise DataError(f"the document has {length[i]} tokens, more than {longest}; {advice}", origin.files[file], line)
    whole = targets & ~long
    untrained, lost = int(np.count_nonzero(~targets)), 0
    pieces: list[tuple[int, int]] = []
    for i in np.flatnonzero(long):
        at, n = int(begin[i]), int(length[i])
        if overflow == "drop":
            lost += n
            continue
        if overflow == "truncate":
            n, lost = longest, lost + n - longest
        learns = np.asarray(store.tokens[at : at + n]) >= TRAINED
        kept = 0
        for first in range(0, n, longest):
            last = min(first + longest, n)
            more = last < n
            if learns[first + 1 : last + more].any():
                pieces.append((at + first, last - first + more * int(_CONTINUES) + (kept > 0) * int(_FURTHER)))
                kept += 1
        untrained += kept == 0
    begin, length = begin[whole], length[whole].astype(np.uint32)
    if pieces:
        added = np.array(pieces, np.uint64)
        begin, length = np.concatenate((begin, added[:, 0])), np.concatenate((length, added[:, 1].astype(np.uint32)))
        order = np.argsort(begin, kind="stable")
        begin, length = begin[order], length[order]
    return begin, length, Counts(len(end), untrained, int(np.count_nonzero(long)), lost)


def _beyond(store: Store, size: int) -> tuple[int, int, int]:
    """Number of the file, line and token id of the first id of at least `size`; there is one."""
    begin, found = -_PART, np.empty(0, np.int64)
    while not found.size:
        begin += _PART
        found = np.flatnonzero((store.tokens[begin : begin + _PART] & _ID) >= size)
    at = begin + int(found[0])
    return *store.place_of(int(np.searchsorted(store.index["end"], at, "right"))), int(store.tokens[at] & _ID)


def _nothing_left(count: Counts, longest: int) -> str:
    if count.long == 0:
        return f"nothing to train on: none of its {count.documents} documents has a trained token; see train_on and the template"
    return (
        f"nothing to train on: of its {count.documents} documents, {count.untrained} have no trained token"
        f" and {count.long} have more than {longest} tokens"
    )


def _share(total: int, limits: list[int]) -> list[int]:
    """`total` cut into equal shares below `limits`; what small ones cannot take goes to the others."""
    shares = [0] * len(limits)
    while total and (room := [i for i, limit in enumerate(limits) if shares[i] < limit]):
        each = max(1, total // len(room))
        for i in room:
            given = min(each, limits[i] - shares[i], total)
            shares[i] += given
            total -= given
    return shares
