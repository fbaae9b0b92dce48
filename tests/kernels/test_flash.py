"""Packed attention in Triton against the obvious twin and against the other backends' twins, in tiles smaller than the row."""

from __future__ import annotations

import itertools

import pytest
import torch

from kernels import attention, flash as op
from model.arch import Arch
from model.config import KernelsConfig
from tests.kernels.close import HALF_BOUND, close, device, gradients, spread
from tests.model.golden import fresh, rows, write_config

BORDERS = [0, 1, 1, 9, 48, 53, 53]  # longer and shorter than a tile, empty ones, the end repeated
CASES = {  # borders among queries, among keys (None: the same), window
    "documents": (BORDERS, None, 0),
    "one document": ([0, 70], None, 0),
    "window": (BORDERS, None, 5),
    "window of one": ([0, 20, 40], None, 1),
    "window in a long document": ([0, 80], None, 40),
    "cut": ([0, 0, 0, 3, 30, 30], [0, 1, 6, 17, 53, 60], 0),  # documents with keys and no queries, queries late in documents
    "cut, window": ([0, 0, 0, 3, 30, 30], [0, 1, 6, 17, 53, 60], 7),
}
FULL = {"softcap": 2.0, "sinks": True}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of a few slots, and not square, so that every row has many."""
    small = {"forward": op.Tiles(16, 32, 4, 1), "dq": op.Tiles(32, 16, 4, 1), "dkv": op.Tiles(16, 32, 4, 1)}
    monkeypatch.setattr(op, "tiles", lambda kernel, columns, dtype: small[kernel])


def seen_in(name: str) -> op.Spans:
    borders, keys, window = CASES[name]
    cu, cu_keys = (torch.tensor(x, dtype=torch.int32, device=device()) for x in (borders, keys or borders))
    return op.spans(borders[-1], (keys or borders)[-1], cu, cu_keys, window)


def inputs(seen: op.Spans, heads: int, kv_heads: int, columns: int) -> list[torch.Tensor]:
    """q, k, v, sinks, and a gradient."""
    slots, keys = len(seen.lo), len(seen.first)
    sizes = ((slots, heads), (keys, kv_heads), (keys, kv_heads))
    return [*(spread(*size, columns) for size in sizes), spread(heads), spread(slots, heads, columns)]


def compare(seen: op.Spans, heads: int, kv_heads: int, columns: int, softcap: float = 0.0, sinks: bool = False, needs=(True,) * 4) -> None:
    *tensors, grad = inputs(seen, heads, kv_heads, columns)
    needs = (*needs[:3], needs[3] and sinks)
    scale = columns**-0.5

    def attend(function):
        return lambda q, k, v, s: function(q, k, v, seen, scale, softcap, s if sinks else None)

    found = gradients(attend(op.flash), tensors, needs, (grad,))
    close(found, gradients(attend(lambda *args: op.flash_ref(*args)[0]), tensors, needs, (grad,)))


@pytest.mark.parametrize("more", [{}, FULL], ids=["plain", "capped, sinks"])
@pytest.mark.parametrize("name", CASES)
def test_like_the_twin(name, more):
    if name == "window of one" and not more:
        more = {"sinks": True}  # a softmax over one key has no gradient
    compare(seen_in(name), 4, 2, 16, **more)


@pytest.mark.parametrize("heads,kv_heads,columns", [(3, 1, 24), (2, 2, 80), (1, 1, 5)])
def test_any_size_and_group(heads, kv_heads, columns):
    compare(seen_in("documents"), heads, kv_heads, columns)


def test_every_subset_of_gradients():
    for needs in itertools.product((True, False), repeat=4):
        if any(needs):
            compare(seen_in("window"), 2, 1, 16, sinks=True, needs=needs)
    for softcap, sinks in ((2.0, False), (0.0, True)):
        compare(seen_in("window"), 2, 1, 16, softcap, sinks)
