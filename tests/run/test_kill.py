"""Kill any rank at any moment and start again: the run ends with the same bits as one that was never disturbed."""

from __future__ import annotations

import math
import signal
import time
from itertools import combinations
from pathlib import Path

import pytest

from model.arch import Arch
from parallel.apply import check
from parallel.mesh import sizes
from runtime.config import load
from runtime.metrics import read
from tests import chaos, launch
from tests.campaign import FACTORS, Case, combination
from tests.tiny import write_chats, write_config, write_model
from train import RunConfig

KILLS = 20
EXTRA = """
[train]
steps = 24
[optim]
lr = 1e-2
[checkpoint]
every = 3
[log]
every = 1
[lora]
rank = 4
dropout = 0.2
[recompute]
kind = "full"
"""


def losses(out: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read(out / "metrics.jsonl") if "loss" in r}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("kill")
    model, data = write_model(root / "model"), write_chats(root / "data.jsonl", 60)
    return root, model, data


def test_killed_runs_end_with_the_same_bits(tmp_path):
    """A slice of the campaign whose counts are benchmarks/results/chaos.json."""
    counts = chaos.kill(KILLS, tmp_path / "counts.json", seed=1, each=14, folder=tmp_path)
    assert list(counts["by"]["layout"]) == ["shard 2", "replicate 2 x shard 2"]
    assert counts["kills"] == KILLS and counts["visits"] == 2 and counts["starts"] == KILLS + counts["runs"]
    assert counts["records"] >= 10 * counts["runs"] and counts["in_saves"] == sum(counts["at"].values())
    assert {key: counts[key] for key in counts.BAD} == dict.fromkeys(counts.BAD, 0)
    again = chaos.kill(KILLS, tmp_path / "counts.json", seed=1, folder=tmp_path)
    assert again.data == counts.data, "what is counted is not done again"


def test_combinations_come_in_turn_and_all_are_legal(tmp_path):
    """Few visits have every pair of choices; no combination is one that the product refuses."""
    number = math.prod(map(len, FACTORS.values()))
    assert len({tuple(combination(v).values()) for v in range(number)}) == number == 8415
    assert len({pair for v in range(187) for pair in combinations(combination(v).items(), 2)}) == sum(
        len(a) * len(b) for a, b in combinations(FACTORS.values(), 2)
    )
    for visit in range(0, number, 61):
        case = Case.write(tmp_path / str(visit), combination(visit), visit)
        cfg = load(RunConfig, case.folder / "case.toml")
        check(cfg, sizes(cfg.parallel, case.world), Arch.from_folder(case.folder / "model"), cfg.lora)


def test_stop_and_resume_at_other_world_sizes_keeps_every_step(base):
    root, model, data = base
    extra = EXTRA.replace("steps = 24", "steps = 6\naccumulate = {}").replace("dropout = 0.2", "dropout = 0.1")
    seen = {}
    for name, worlds in (("w4", [4]), ("w1", [1]), ("mixed", [2, 1, 4])):
        out = root / name
        for i, world in enumerate(worlds):
            steps = 6 * (i + 1) // len(worlds)
            text = extra.format(4 // (worlds[0]))
            argv = ["--config", str(write_config(root / f"{name}.toml", model, data, out, text))]
            # the schedule looks at the whole run, so all parts say 6 steps; a part stops early by SIGTERM
            if steps < 6:
                ranks = launch.start(argv, world, out / "out")
                while not (out / "metrics.jsonl").exists() or len(losses(out)) < steps:
                    time.sleep(0.005)
                    assert not ranks.poll(), ranks.output()
                ranks.signal(signal.SIGTERM, rank=world - 1)
                assert ranks.wait() == [0] * world, ranks.output()
            else:
                assert launch.run(argv, world, out / "out").wait() == [0] * world
        seen[name] = losses(out)
        assert sorted(seen[name]) == [1, 2, 3, 4, 5, 6]
    for name in ("w1", "mixed"):
        for step, loss in seen["w4"].items():
            assert abs(seen[name][step] - loss) < 2e-6 * loss, (name, step)
    assert launch.run([*argv, "--train.steps=9"], 3, root / "bad").wait() == [2, 2, 2]
