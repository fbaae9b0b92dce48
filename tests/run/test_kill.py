"""Kill any rank at any moment and start again: the run ends with the same bits as one that was never disturbed."""

from __future__ import annotations

import hashlib
import random
import signal
import time
from pathlib import Path

import pytest

from runtime.metrics import read
from tests import launch
from tests.tiny import write_chats, write_config, write_model

KILLS = 10
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


def digest(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    assert files, f"nothing in {folder}"
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def losses(out: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read(out / "metrics.jsonl") if "loss" in r}


def records(out: Path) -> list[tuple]:
    return [(r["step"], r["loss"], r["tokens"], r["grad_norm"]) for r in read(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("kill")
    model, data = write_model(root / "model"), write_chats(root / "data.jsonl", 60)
    return root, model, data


def config(base, name: str) -> tuple[list[str], Path]:
    root, model, data = base
    out = root / name
    return ["--config", str(write_config(root / f"{name}.toml", model, data, out, EXTRA))], out


def test_killed_runs_end_with_the_same_bits(base):
    argv, out = config(base, "calm")
    begun = time.monotonic()
    assert launch.run(argv, 2, out / "out").wait() == [0, 0]
    whole = time.monotonic() - begun
    want, want_losses = digest(out / "export"), losses(out)
    assert len(want_losses) == 24
    assert len(set(want_losses.values())) == 24

    rng, kills, run_number, rounds = random.Random(0), 0, 0, 0
    argv, out = config(base, "killed")
    while kills < KILLS or rounds == 0:
        rounds += 1
        assert rounds < 60, "no progress"
        ranks = launch.start(argv, 2, out / "out")
        time.sleep(rng.uniform(0.15, 0.9) * whole)
        if not ranks.poll():
            ranks.signal(signal.SIGKILL, rng.randrange(2))
            kills += -signal.SIGKILL in ranks.end_after_one()
            continue
        same_as_calm(out, ranks, want, want_losses)  # it got through: the next kills fall on another run of the same kind
        run_number += 1
        argv, out = config(base, f"killed{run_number}")
    same_as_calm(out, launch.run(argv, 2, out / "out"), want, want_losses)


def same_as_calm(out: Path, ranks: launch.Ranks, want: str, want_losses: dict[int, float]) -> None:
    assert ranks.wait() == [0, 0], ranks.output()
    found = losses(out)
    assert {step: (found.get(step), loss) for step, loss in want_losses.items() if found.get(step) != loss} == {}
    assert records(out) == records(out.parent / "calm")
    assert digest(out / "export") == want


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
