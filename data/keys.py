"""Random order that is the same everywhere and for ever: sort by a hash of (purpose, index).

numpy's generators may change their streams from version to version; a run resumed after an upgrade would then read other
data. The hash is splitmix64 (Steele et al., "Fast splittable pseudorandom number generators", OOPSLA 2014), whose outputs
are well mixed; of equal keys, which are rare, the lower index comes first.
"""

from __future__ import annotations

import hashlib

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def keys(indices: np.ndarray | int, *purpose: int | str) -> np.ndarray:
    """A key for each index (or each of the first so many), uint64, independent between purposes."""
    name = " ".join(part if isinstance(part, str) else str(int(part)) for part in purpose)
    seed = hashlib.blake2b(name.encode(), digest_size=8).digest()
    indices = np.arange(indices, dtype=np.uint64) if isinstance(indices, int) else indices.astype(np.uint64)
    with np.errstate(over="ignore"):
        z = np.uint64(int.from_bytes(seed, "little")) + (indices + np.uint64(1)) * _GAMMA
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def order_by(values: np.ndarray) -> np.ndarray:
    """`np.argsort(values, kind="stable")` of up to 2^32 numbers below 2^32: sorting (value, place) pairs is several times faster."""
    pairs = values.astype(np.uint64) << np.uint64(32)
    pairs |= np.arange(len(values), dtype=np.uint64)
    pairs.sort()
    return (pairs & np.uint64(0xFFFFFFFF)).astype(np.int64)


def permutation(count: int, *purpose: int | str) -> np.ndarray:
    """The numbers below `count` in random order, int64."""
    return order_by(keys(count, *purpose) >> np.uint64(32))
