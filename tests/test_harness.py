"""The harness itself: results in rank order, errors and deaths reported, nobody left behind."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from parallel.local import RankFailed, run


def _sum(rank, world, x):
    t = torch.tensor([float(rank + x)])
    dist.all_reduce(t)
    return rank, t.item()


def _fail(rank, world, how):
    dist.barrier()  # connected: rank 0 must not notice on its own
    if rank == 1:
        if how == "raise":
            raise ValueError("the reason")
        if how == "die":
            os._exit(7)
    time.sleep(60)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_results_come_in_rank_order(world):
    assert run(_sum, world, 1) == [(r, world * (world + 1) / 2) for r in range(world)]


@pytest.mark.parametrize("how, message", [("raise", "the reason"), ("die", "died.*7"), ("hang", "did not finish in time")])
def test_a_failure_ends_all_ranks_at_once(how, message):
    start = time.monotonic()
    with pytest.raises(RankFailed, match=f"(?s){message}"):
        run(_fail, 2, how, timeout=1.5)
    assert time.monotonic() - start < 10
