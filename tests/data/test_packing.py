"""Packing: every document once, nothing over the budget, nearly everything full, the same everywhere."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest

from data.keys import keys, order_by, permutation
from data.packing import arrange, best_fit, best_fit_ref, limit, max_documents, pack


def log_normal(count: int, mean: float, sigma: float, longest: int, seed: int = 0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(mean, sigma, count).astype(np.int64), 1, longest)


def descending(lengths) -> np.ndarray:
    return np.sort(np.asarray(lengths, np.int64))[::-1]


def contents(lengths: np.ndarray, packs) -> list[tuple[int, ...]]:
    """The packs as sorted tuples of lengths."""
    groups: dict[int, list[int]] = {}
    for length, number in zip(lengths.tolist(), np.asarray(packs).tolist()):
        groups.setdefault(number, []).append(length)
    return sorted(tuple(sorted(group)) for group in groups.values())


CASES = [
    ([1], 1),
    ([5, 5, 5], 5),
    ([3] * 7, 10),
    ([10, 9, 1, 1], 10),
    ([6, 5, 4, 3, 2, 2, 2], 8),
    (np.random.default_rng(0).integers(1, 65, 300), 64),
    (np.random.default_rng(1).integers(1, 200, 400), 1000),
    (np.random.default_rng(2).integers(30, 35, 100), 64),
    (log_normal(500, 4, 1, 512), 512),
    (log_normal(700, 3, 1.5, 256), 256),
]


@pytest.mark.parametrize("lengths, tokens", CASES)
def test_best_fit_is_best_fit(lengths, tokens):
    lengths = descending(lengths)
    fast, slow = best_fit(lengths, tokens), best_fit_ref(lengths, tokens)
    # Of packs with equal room either may be taken, so contents can differ; how full packs are cannot
    assert np.array_equal(np.sort(np.bincount(fast, lengths)), np.sort(np.bincount(slow, lengths)))


@pytest.mark.parametrize("seed", range(30))
def test_invariants(seed):
    rng = np.random.default_rng(seed)
    tokens = int(rng.integers(4, 3000))
    lengths = descending(log_normal(int(rng.integers(1, 2000)), rng.uniform(0, 7), rng.uniform(0.1, 2), tokens, seed))
    packs = pack(lengths, tokens)
    most = max_documents(packs)
    cut = limit(packs, most)
    for numbers in (packs, cut):
        used = np.bincount(numbers, lengths)
        assert used.min() > 0 and used.max() <= tokens  # numbered without gaps, none over the budget
    assert np.bincount(cut).max() == most
    assert cut.max() + 1 <= 1.002 * (packs.max() + 1)
    assert most == 1 or limit(packs, most - 1).max() + 1 > 1.002 * (packs.max() + 1)
    assert np.array_equal(limit(packs, len(packs)), packs)
    # Cutting only ever divides packs
    assert all(len(set(packs[cut == number])) == 1 for number in rng.choice(cut, 20))
    documents, bounds = arrange(lengths, cut, seed, 0, True)
    assert np.array_equal(np.sort(documents), np.arange(len(lengths)))
    assert np.add.reduceat(lengths[documents], bounds[:-1]).max() <= tokens


@pytest.mark.parametrize(
    "mean, sigma, tokens, longest", [(6.0, 1.0, 8192, 8192), (6.2, 0.8, 16384, 4096), (8.0, 1.0, 4096, 4096), (4.0, 1.0, 2048, 2048)]
)
def test_nearly_full_with_few_documents_each(mean, sigma, tokens, longest):
    lengths = descending(log_normal(100_000, mean, sigma, longest))
    packs = pack(lengths, tokens)
    most = max_documents(packs)
    packs = limit(packs, most)
    count = packs.max() + 1
    fill, average = lengths.sum() / (count * tokens), len(lengths) / count
    assert fill >= 0.995
    assert most <= max(5 * average, 12)
    plain = max_documents(np.array(best_fit(lengths, tokens)))  # why short documents are tied to longer ones
    assert average < 4 or plain > 2 * most


@pytest.mark.parametrize("count", [1500, 15_000])
def test_short_documents_are_mixed(count):
    """A pack of many documents has its share of every length: mean lengths vary about as much as those of random packs."""
    lengths = descending(np.random.default_rng(0).normal(25, 4, count).clip(15, 34))
    packs = pack(lengths, 1536)
    used = np.bincount(packs, lengths)
    number = np.bincount(packs)
    by_chance = lengths.std() / number.mean() ** 0.5
    assert (used / number)[used > 1400].std() < 1.5 * by_chance
    alone = best_fit(lengths, 1536)
    assert (np.bincount(alone, lengths) / np.bincount(alone)).std() > 4 * by_chance


def test_a_million_documents():
    """The goal is a second on an idle core; here the processor time of a busy one has some slack."""
    lengths = log_normal(1_000_000, 6.0, 1.0, 8192)
    begin = time.process_time()
    packs = pack(np.sort(lengths)[::-1], 8192)
    packs = limit(packs, max_documents(packs))
    documents, bounds = arrange(lengths, packs, 0, 0, True)
    seconds = time.process_time() - begin
    used = np.add.reduceat(lengths[documents], bounds[:-1])
    assert used.max() <= 8192 and used.mean() >= 0.995 * 8192 and np.array_equal(np.sort(documents), np.arange(len(lengths)))
    assert seconds < 2


def test_epochs_differ_and_repeat():
    lengths = log_normal(3000, 4, 1, 512)
    packs = pack(descending(lengths), 512)

    def of(seed, epoch, shuffle=True):
        documents, bounds = arrange(lengths, packs, seed, epoch, shuffle)
        return [tuple(documents[a:b].tolist()) for a, b in pairwise(bounds)]

    assert of(0, 0) == of(0, 0)
    assert len({tuple(map(tuple, plan)) for plan in (of(0, 0), of(0, 1), of(1, 0), of(0, 0, False))}) == 4
    assert contents(lengths[np.concatenate(of(0, 0))], np.repeat(np.arange(len(of(0, 0))), list(map(len, of(0, 0))))) == contents(
        descending(lengths), packs
    )  # only who takes which place changes
    mates = [{frozenset(p) for p in of(0, e) if len(p) > 1} for e in range(2)]
    assert len(mates[0] & mates[1]) < 0.1 * len(mates[0])
    unshuffled = of(0, 0, False)
    assert unshuffled == of(5, 7, False)


def test_keys_are_what_they_were():
    """The order of a run must not change with a version of anything: these numbers are for ever."""
    assert keys(3, "documents", 0, 0).tolist() == [2274891412557442454, 660561346943510770, 14418735354956481614]
    assert permutation(8, "packs", 1, 2).tolist() == [5, 2, 6, 0, 4, 3, 7, 1]
    assert np.array_equal(keys(np.array([2]), "x", np.int64(1)), keys(3, "x", 1)[2:])


def test_keys_are_random():
    many = keys(100_000, "a", 0)
    assert len(np.unique(many)) == 100_000
    bits = ((many[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).mean(0)
    assert abs(bits - 0.5).max() < 0.01
    assert abs(np.corrcoef(permutation(10_000, "a"), permutation(10_000, "b"))[0, 1]) < 0.05
    values = np.random.default_rng(0).integers(0, 50, 10_000)
    assert np.array_equal(order_by(values), np.argsort(values, kind="stable"))
    assert permutation(0, "a").tolist() == []
