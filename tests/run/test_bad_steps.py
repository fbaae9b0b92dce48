"""Steps that must not count: the weights stay as they are to the bit, on every rank; the documents are named; the run ends or goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from model.decoder import Decoder
from runtime.checkpoint.store import Store, read_manifest
from runtime.errors import StepError
from runtime.guard import Guard, upstream
from runtime.metrics import read
from tests import launch
from tests.tiny import write_chats, write_config, write_model

POISON = {"@": "nan", "%": "inf", "$": "gradient"}  # a letter that only one document has -> what becomes of it
ZERO = 3  # the step in which nothing reaches the weights
LAYOUTS = {  # ranks, accumulation, and what else makes four packs a step
    "shard": (2, 2, ""),
    "replicate and context": (4, 2, "[parallel]\nreplicate = 2\nshard = 1\ncontext = 2\n"),
    "all in one rank": (1, 4, ""),
    "one of each rank": (4, 1, ""),
}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(extra) -> (arguments, output folder). A run whose data has one document for each kind of poison, and a step without gradient."""
    model, data = write_model(tmp_path / "model"), write_chats(tmp_path / "data.jsonl", 80)
    rows = data.read_text().splitlines()
    for i, letter in enumerate(POISON):
        talk = [{"role": "user", "content": "a cat " * (1 + 6 * i)}, {"role": "assistant", "content": f"b {letter}"}]
        rows[7 + 20 * i] = json.dumps({"messages": talk})
    data.write_text("\n".join(rows) + "\n")
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    ids = {vocabulary[letter]: kind for letter, kind in POISON.items()}
    forward = Decoder.forward

    def poisoned(self, batch, *args, **more):
        found = forward(self, batch, *args, **more)
        if not self.training:  # what looks at the export
            return found
        document = batch.document()
        for token, kind in ids.items():
            there = torch.zeros(batch.cu_seqlens.numel(), dtype=torch.bool)
            there[document[batch.tokens == token]] = True
            hit = there[document] & (batch.labels >= 0)
            if kind == "gradient" and hit.any() and found.requires_grad:
                found.register_hook(lambda grad, hit=hit: torch.where(hit, grad * float("nan"), grad))
            elif kind == "nan":
                found = found * torch.where(hit, float("nan"), 1.0)
            elif kind == "inf":
                found = found - torch.where(hit, float("inf"), 0.0)  # the derivative is finite
        return found * (batch.pack // 4 != ZERO - 1)

    monkeypatch.setattr(Decoder, "forward", poisoned)

    def config(extra: str, name: str = "run") -> tuple[list[str], Path]:
        out = tmp_path / name
        common = "[train]\nsteps = 8\naccumulate = 2\non_nonfinite = 'skip'\nmax_skips_in_a_row = 9\n[log]\nevery = 1\n"
        return ["--config", str(write_config(tmp_path / f"{name}.toml", model, data, out, common + extra))], out

    return config


def tensors(out: Path, step: int) -> dict[str, str]:
    """crc32 of each file with tensors of a checkpoint."""
    files = read_manifest(out / "checkpoints" / f"step_{step}")["files"]
    return {name: record["crc32"] for name, record in files.items() if name.endswith(".distcp")}


def dumps(out: Path) -> dict[int, dict]:
    return {int(p.stem.split("_")[1]): json.loads(p.read_text()) for p in (out / "bad_steps").glob("*.json")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bad_steps_are_skipped_to_the_bit_and_named(make, layout, tmp_path):
    world, accumulate, parallel = LAYOUTS[layout]
    argv, out = make(f"[checkpoint]\nevery = 1\nkeep = 0\n{parallel}")
    argv.append(f"--train.accumulate={accumulate}")
    ranks = launch.run(argv, world, out / "out")
    assert ranks.wait() == [0] * world, ranks.output()
    bad = dumps(out)
    assert len(bad) in (3, 4), "three poisoned documents and a step without gradient, of which two may share a step"
    assert len(bad) < 7
    for step in range(2, 9):
        assert (tensors(out, step) == tensors(out, step - 1)) == (step in bad), step
        assert read_manifest(out / "checkpoints" / f"step_{step}")["healthy"] == (step not in bad)
    # what was wrong, in which documents
    assert bad[ZERO]["grad_norm"] == 0.0 or len(bad) == 3
    named = {d["where"] for step in bad.values() for d in step["documents"] if d["loss"] in ("nan", "inf")}
    assert named == {f"{tmp_path / 'data.jsonl'}:{line}" for line in (8, 28)}
    alone = [d for d in bad.values() if "by itself" not in d["problem"] and all(isinstance(x["loss"], float) for x in d["documents"])]
    assert any("$" in document["text"] for step in alone for document in step["documents"]), "a gradient of its own: the whole step"
    # metrics: a record of a bad step has no loss, and says so
    records = {r["step"]: r for r in read(out / "metrics.jsonl")}
    assert {step for step, r in records.items() if r["loss"] is None} == bad.keys()
    assert records[8]["skipped_steps"] == len(bad)
    # resumed in the middle of it: the same end
    if layout == "shard":
        again = out.with_name("again")
        shutil.copytree(out, again)
        middle = max(bad) if max(bad) < 8 else min(bad)
        for step in range(middle + 1, 9):
            shutil.rmtree(again / "checkpoints" / f"step_{step}")
        shutil.rmtree(again / "export")
        ranks = launch.run([*argv, f"--output.path={again}"], world, again / "out")
        assert ranks.wait() == [0] * world, ranks.output()
        assert tensors(again, 8) == tensors(out, 8)
        kept = ("step", "loss", "grad_norm", "tokens", "skipped_steps")
        want, found = ([[r.get(key) for key in kept] for r in read(folder / "metrics.jsonl")] for folder in (out, again))
        assert found == want


@pytest.mark.parametrize("how", ["halt", "cap"])
def test_a_run_that_must_end_says_why_in_one_line_on_all_ranks(make, how):
    argv, out = make("[checkpoint]\nevery = 1\n")
    argv += ["--train.on_nonfinite=halt"] if how == "halt" else ["--train.max_skips=1"]
    ranks = launch.run(argv, 2, out / "out")
    assert ranks.wait() == [1, 1], ranks.output()
    lines = [line for line in ranks.output().splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in ranks.output(), ranks.output()
    first = max(dumps(out))
    assert f"step {first}: " in lines[0] and str(out / "bad_steps") in lines[0]
    assert ("on_nonfinite" if how == "halt" else "train.max_skips=1") in lines[0]
    assert max(r["step"] for r in read(out / "metrics.jsonl")) == first - 1
    healthy = Store(out).healthy()[0]
    assert f"the newest healthy checkpoint is {healthy}" in lines[0]
    assert f"the weights are still those of step {healthy.name.split('_')[1]}" in lines[0]
    assert not (out / "export").exists()


class Alone:
    """A team of one."""

    rank = 0

    def gather(self, value):
        return [value]


class Keys:
    on_nonfinite, max_skips_in_a_row, max_skips = "skip", 2, 4


def test_caps_on_skips(tmp_path):
    said = []
    guard = Guard(Keys(), tmp_path, Alone(), said.append, lambda: "no checkpoint", 0, 0)
    look = lambda: [{"where": "a:1", "pack": 0, "loss": float("nan"), "text": "x"}]  # noqa: E731
    passes = [guard.passes(step, norm, 5, look) for step, norm in enumerate([1.0, float("nan"), 0.0, 2.0, float("inf")], 1)]
    assert passes == [True, False, False, True, False]
    assert guard.state() == {"in_a_row": 1, "total": 3} and guard.numbers() == {"skipped_steps": 3} and not guard.healthy
    assert sorted(p.name for p in (tmp_path / "bad_steps").iterdir()) == ["step_2.json", "step_3.json", "step_5.json"]
    assert (tmp_path / "bad_steps" / "step_2.json").stat().st_mode & 0o777 == 0o600
    assert not guard.passes(6, 0.0, 0, look)
    assert "no token has a target" in said[-1]
    with pytest.raises(StepError, match=r"step 7: .* a:1 .*those of step 4; no checkpoint; train.max_skips_in_a_row=2 "):
        guard.passes(7, float("nan"), 5, look)
    with pytest.raises(StepError, match=r"train.max_skips=4 "):
        Guard(Keys(), tmp_path, Alone(), said.append, str, 0, 4).passes(8, float("nan"), 5, look)


def test_a_dump_that_cannot_be_written_costs_nothing_else(tmp_path):
    (tmp_path / "bad_steps").write_text("in the way")
    said = []
    guard = Guard(Keys(), tmp_path, Alone(), said.append, str)
    assert not guard.passes(1, float("nan"), 5, lambda: [{"where": "a:1", "pack": 0, "loss": 2.0}])
    assert "cannot be written" in said[0] and "packs 0" in said[0]


def test_a_loss_that_is_not_finite_has_no_finite_gradient():
    x = torch.tensor([0.0, float("-inf")], requires_grad=True)
    for used, finite in ((x[:1], True), (x, False)):
        x.grad = None
        loss = -used.sum()
        loss.backward(upstream(loss))
        assert x.grad[0].isfinite() == finite
        assert not finite or x.grad[0] == -1


def test_checkpoints_between_bad_steps_do_not_push_healthy_ones_out(tmp_path):
    from runtime.checkpoint import store

    run = Store(tmp_path)
    run.folder.mkdir()
    about = {"format": store.FORMAT, "written": "", "origin": None, "layout": {"world": 1}, "identity": {}, "config": {}}
    for step, healthy in enumerate([True, True, True, False, False, False, True, True], 1):
        aside = run.begin(step)
        files = {name: store.write_file(aside / name, b"{}") for name in store.LIMITS}
        store.write_manifest(aside, about | {"step": step, "healthy": healthy, "files": files})
        run.publish(aside, step)
        run.settle(2)
        left = [int(p.name[5:]) for p in run.steps()]
        assert left == {6: [6, 5, 4, 3, 2], 7: [7, 6, 5, 4, 3], 8: [8, 7]}.get(step, left)
    assert run.healthy() == run.steps()
