"""Packing: documents into rows of a fixed number of token slots, with next to nothing left over.

Best-fit decreasing (Johnson 1973): longest first, each into the fullest pack that still has room. Documents of equal length
are interchangeable, and so are packs with equal room left, so the work is done on the histogram of lengths: a step moves as
many equal documents as there are equal packs, as slices of lists of pack numbers, and "the fullest pack with room" is the
lowest set bit of an integer that has a bit for every amount of room some pack has. A million documents take a fraction of a
second and fill 99.9 % of the slots.

Few documents per pack. A batch describes its documents by borders, an array of fixed size N + 1 (shapes never change), and
attention kernels launch work for all N, empty or not. Plain best-fit leaves the shortest documents for the last packs, which
then hold twenty times the usual number, and N with them. So short documents are dealt out first: each is tied to a longer
one, evenly by length, and they are packed as one; a few stay loose to fill gaps. `max_documents` then finds the smallest N
that costs at most 0.2 % more packs; packs with more are cut.

Mixed packs. Longest first also means that like goes with like: packs of many short documents would hold one length each, and
where length tells one kind of data from another, a step would see one kind. (Measured on chat records of 20 to 34 tokens, one
pack of 1536 a step: 46 % of the answers right after six epochs, 86 % with mixed packs.) So documents that are short beside a
pack are first dealt out by rank, into hands that have their share of every length and fill most of a pack; a few stay back for
what is left of it.

A document here is whatever must stay together: for preference data a pair, whose length is the sum.
"""

from __future__ import annotations

from array import array
from collections import defaultdict

import numpy as np

from data.keys import order_by, permutation

_LOOSE = 50  # one in so many short documents stays loose
_EXTRA_PACKS = 0.002  # share of packs that a limit on the number of documents may cost
_UNFILLED = 0.003  # share of slots that may stay empty before packing without ties is tried
_MANY = 16  # documents of average length in a pack from which on mixing counts,
_UNMIXED = 0.01  # and packing without it has to save this share of packs


def pack(lengths: np.ndarray, tokens: int) -> np.ndarray:
    """A pack number for every document, int64 [n], numbered from 0.

    Args:
        lengths: int [n], each from 1 to `tokens`. The result depends on nothing else.
        tokens: slots of a pack.
    """
    lengths = lengths.astype(np.int64)
    packs = _pack_tied(lengths, _deal(lengths, _tie(lengths, tokens), tokens), tokens)
    if packs.max() + 1 > (1 + _UNFILLED) * lengths.sum() / tokens:  # few documents, or long ones: see if it is the ties
        plain = _pack_tied(lengths, np.full(len(lengths), -1), tokens)
        many = lengths.mean() * _MANY <= tokens  # a pack or two less is not worth unmixed ones
        packs = plain if plain.max() + 1 < (1 - many * _UNMIXED) * (packs.max() + 1) else packs
    return packs


def _pack_tied(lengths: np.ndarray, tied: np.ndarray, tokens: int) -> np.ndarray:
    """Packs documents together with those that are tied to them."""
    load, free = _loads(lengths, tied)
    packs = np.empty(len(lengths), np.int64)
    packs[free] = best_fit(load[free], tokens)
    return np.where(tied < 0, packs, packs[tied])


def _loads(lengths: np.ndarray, tied: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each document with those tied to it; and the documents that are not tied, in descending order of that."""
    load = np.bincount(np.where(tied < 0, np.arange(len(lengths)), tied), lengths, len(lengths)).astype(np.int64)
    free = np.flatnonzero(tied < 0)
    return load, free[order_by(load.max() - load[free])]


def _deal(lengths: np.ndarray, tied: np.ndarray, tokens: int) -> np.ndarray:
    """`tied`, with most of the short documents tied to the longest of the hand that they are dealt to."""
    load, free = _loads(lengths, tied)
    parts = max(6, int(tokens / lengths.mean()) // 3)  # the more documents in a pack, the fewer of them are needed to fill it up
    short = free[load[free] * parts <= tokens]
    short = short[np.arange(len(short)) * 2 % parts > 1]  # keeps back 2 in `parts`
    # Hands hold 1 - 2 / parts of a pack on average and differ by the longest document at most, so none is longer than a pack.
    hands = -(-int(load[short].sum()) * parts // (tokens * (parts - 2)))
    if hands:
        head = np.where(tied < 0, np.arange(len(tied)), tied)
        head[short] = short[np.arange(len(short)) % hands]
        tied = head[head]
        tied[tied == np.arange(len(tied))] = -1
    return tied


def _tie(lengths: np.ndarray, tokens: int) -> np.ndarray:
    """The longer document that each short one goes with, or -1. All that go with one fit into a pack with it."""
    tied = np.full(len(lengths), -1)
    short = lengths * 2 < lengths.mean()
    long = np.flatnonzero(~short)
    short = np.flatnonzero(short)
    short = short[permutation(len(short), "tie")][len(short) // _LOOSE :]
    if len(short) == 0 or lengths.mean() * 4 > tokens:  # few documents fit into a pack anyway
        return tied
    # Deal them along the long ones laid end to end, so that a document gets them in proportion to its length.
    along = np.cumsum(lengths[long])
    tied[short] = long[np.searchsorted(along, (np.arange(len(short)) + 0.5) / len(short) * along[-1])]
    load = lengths + np.bincount(tied[short], lengths[short], len(lengths)).astype(np.int64)
    tied[short[load[tied[short]] > tokens]] = -1
    return tied


def best_fit(lengths: np.ndarray, tokens: int) -> np.ndarray:
    """Best-fit decreasing: the pack of each document. `lengths` must not increase."""
    values, counts = np.unique(lengths, return_counts=True)
    packs: defaultdict[int, list[int]] = defaultdict(list)  # by room left; full ones are not kept
    rooms = 0  # bit r: packs[r] is not empty
    out = array("I")
    opened = 0

    def keep(ids, room: int) -> None:
        nonlocal rooms
        if room and ids:
            packs[room] += ids
            rooms |= 1 << room

    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist()):
        while count:
            fitting = rooms >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else tokens
            each = room // length  # the fullest pack stays the fullest while it has room
            wanted = -(-count // each)
            if fitting:
                ids = packs[room][-wanted:]
                del packs[room][-wanted:]
                rooms ^= (not packs[room]) << room
            else:
                ids = range(opened, opened + wanted)
                opened += wanted
            full, rest = divmod(min(count, len(ids) * each), each)
            count -= full * each + rest
            for _ in range(each):
                out.extend(ids[:full])
            keep(ids[:full], room - each * length)
            if rest:
                out.extend([ids[full]] * rest)
                keep(ids[full : full + 1], room - rest * length)
    return np.frombuffer(out, np.uint32)


def best_fit_ref(lengths: np.ndarray, tokens: int) -> list[int]:
    """The same, one document at a time."""
    room: list[int] = []
    out = []
    for length in lengths:
        fitting = [i for i in range(len(room)) if room[i] >= length]
        if not fitting:
            fitting = [len(room)]
            room.append(tokens)
        i = min(fitting, key=lambda i: room[i])
        room[i] -= length
        out.append(i)
    return out


def max_documents(packs: np.ndarray) -> int:
    """The smallest limit on a pack's documents that makes hardly any more packs."""
    sizes = np.bincount(np.bincount(packs))
    number = np.arange(len(sizes))
    allowed = (1 + _EXTRA_PACKS) * sizes.sum()
    low, high = 1, len(sizes) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if (sizes * -(-number // middle)).sum() <= allowed else (middle + 1, high)
    return low


def limit(packs: np.ndarray, most: int) -> np.ndarray:
    """Cuts packs of more than `most` documents into several."""
    sizes = np.bincount(packs)
    order = order_by(packs)
    place = np.arange(len(packs)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within its pack
    parts = -(-sizes // most)
    cut = np.empty(len(packs), np.int64)
    cut[order] = np.repeat(np.cumsum(parts) - parts, sizes) + place // most
    return cut


def arrange(lengths: np.ndarray, packs: np.ndarray, seed: int, epoch: int, shuffle: bool) -> tuple[np.ndarray, np.ndarray]:
    """The packs of an epoch: (documents [n], bounds [packs + 1]); pack p holds documents[bounds[p] : bounds[p + 1]].

    `packs` is a packing of lengths in descending order. Which document takes which place of its length, and the order of the
    packs, are random by (seed, epoch), or as they come.
    """
    count = int(packs.max()) + 1
    start = permutation(len(lengths), "documents", seed, epoch) if shuffle else np.arange(len(lengths))
    documents = start[order_by(lengths.max() - lengths[start])]
    if shuffle:
        rank = np.empty(count, np.int64)
        rank[permutation(count, "packs", seed, epoch)] = np.arange(count)
        packs = rank[packs]
    order = order_by(packs)
    return documents[order], np.concatenate(([0], np.cumsum(np.bincount(packs, minlength=count))))
