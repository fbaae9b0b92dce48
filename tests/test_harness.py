"""The harness itself: results in rank order, errors and deaths reported, nobody left behind. What campaigns visit and count."""

from __future__ import annotations

import json
import math
import os
import time

import pytest
import torch
import torch.distributed as dist

from parallel.local import RankFailed, run
from tests import campaign
from tests.campaign import FACTORS, LAYOUTS, combination, layouts


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


def test_a_campaign_may_keep_to_some_layouts():
    four = layouts("4 ranks")
    assert len(four) == 8 and {LAYOUTS[name][0] for name in four} == {4} and layouts("") == tuple(LAYOUTS)
    assert layouts("ring,replicate 2 x shard") == ("context 2, ring", "context 4, ring", "replicate 2 x shard 2")
    with pytest.raises(SystemExit, match="'pipeline' is in none of: shard 2; "):
        layouts("tensor,pipeline")
    number = math.prod(map(len, FACTORS.values())) // len(LAYOUTS) * len(four)
    assert [combination(v, four) for v in range(8)] == [c for c in map(combination, range(16)) if c["layout"] in four]
    assert len({tuple(combination(v, four).values()) for v in range(number)}) == number


def test_counts_say_which_commits_they_are_of(tmp_path, monkeypatch):
    file = tmp_path / "counts.json"
    for at, among in (("a", ""), ("b+changes", "4 ranks"), ("b+changes", ""), ("a", "")):
        monkeypatch.setattr(campaign, "commit", lambda: at)  # noqa: B023 (called at once)
        counts = campaign.Counts(file, seed=3, section="some")
        counts.add("runs")
        counts.save("command", among)
    found = json.loads(file.read_text())["some"]
    assert found["commits"] == ["b+changes", "a"] and found["runs"] == 4 and found["command"] == "command"


def test_the_commit_is_that_of_the_checkout():
    found = campaign.commit().removesuffix("+changes")
    assert found == "no checkout" or (len(found) == 40 and int(found, 16))
