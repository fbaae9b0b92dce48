"""A run as users script against it: files, resumes, signals, evaluation, early stopping, repeating, other entry points."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from objective import evaluate
from parallel import compile
from runtime import files
from runtime.checkpoint.store import Store
from runtime.config import load, to_toml
from runtime.errors import ModelError
from runtime.metrics import read
from tests import launch
from tests.tiny import write_chats, write_config, write_model
from tools.export import main as export_tool
from train import RunConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def make(tmp_path):
    """make(toml, name) -> (arguments, output folder) of a run over sixty conversations."""
    model, data = write_model(tmp_path / "model"), write_chats(tmp_path / "data.jsonl", 60)

    def config(extra: str, name: str = "run") -> tuple[list[str], Path]:
        out = tmp_path / name
        return ["--config", str(write_config(tmp_path / f"{name}.toml", model, data, out, extra))], out

    return config


def ok(argv: list[str], world: int, out: Path) -> str:
    ranks = launch.run(argv, world, out / "out")
    assert ranks.wait() == [0] * world, ranks.output()
    return ranks.output()


def weights(out: Path) -> bytes:
    return next((out / "export").glob("*.safetensors")).read_bytes()


def test_the_output_folder_is_what_the_interface_says(make):
    argv, out = make("[train]\nsteps = 4\n[log]\nevery = 2\n[eval]\nevery = 2\nsplit = 0.2\n[checkpoint]\nevery = 2\n")
    said = ok(argv, 2, out)
    records = read(out / "metrics.jsonl")
    assert [r["step"] for r in records] == [2, 2, 4, 4]
    train, evals = [r for r in records if "loss" in r], [r for r in records if "eval_loss" in r]
    assert {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "memory_gib", "epoch"} <= train[0].keys()
    assert 2 * 2 * 64 < train[0]["tokens"] <= 2 * 2 * 128
    assert train[0]["tokens"] * 1.5 < train[1]["tokens"] <= 4 * 2 * 128
    assert evals[0]["eval_sources"].keys() == {"data"}
    assert (out / "checkpoints" / "latest").read_text().strip() == "step_4"
    assert sorted(p.name for p in (out / "checkpoints").glob("step_*")) == ["step_2", "step_4"]
    assert (out / "logs" / "rank_0.log").exists()
    assert (out / "logs" / "rank_1.log").exists()
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {p.name for p in (out / "export").iterdir()}
    assert "<|im_start|>user" in said
    assert "⟦" in said, "the first batch is shown with trained tokens marked"
    assert load(RunConfig, out / "resolved.toml") == load(RunConfig, argv[1])
    assert (out / "checkpoints" / "step_4" / "resolved.toml").read_text() == to_toml(load(RunConfig, argv[1]))
    # again: nothing to do; with more steps: goes on
    before = weights(out)
    assert "result" in ok(argv, 2, out)
    assert weights(out) == before
    ok([*argv, "--train.steps=5"], 2, out)
    assert [r["step"] for r in read(out / "metrics.jsonl")] == [2, 2, 4, 4, 5, 5]
    assert weights(out) != before


def test_a_second_run_in_a_folder_writes_nothing_there(make, monkeypatch):
    argv, out = make("[train]\nsteps = 100000\n[log]\nevery = 1\n")
    live = launch.start(argv, 2, out / "out")
    deadline = time.monotonic() + 60
    while not ((out / "metrics.jsonl").exists() and read(out / "metrics.jsonl")):
        assert time.monotonic() < deadline and not live.poll(), live.output()
        time.sleep(0.05)
    live.signal(signal.SIGSTOP)

    def files() -> dict[str, bytes]:
        return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}

    before = files()
    assert {"logs/rank_0.log", "logs/rank_1.log", "metrics.jsonl", "resolved.toml", "checkpoints/.lock"} <= before.keys()
    monkeypatch.setattr(Store.claim, "__defaults__", (0.2,))
    second = launch.run(argv, 2, out.parent / "second")
    assert second.wait() == [2, 2], second.output()
    assert files() == before
    says = f"error: {out}/checkpoints: another run is writing here; stop it or choose another output.path"
    assert second.output().splitlines() == [says]
    live.signal(signal.SIGCONT)
    live.signal(signal.SIGTERM)
    assert live.wait() == [0, 0], live.output()
    assert "stopped by request after step" in live.output()


def test_resolved_config_repeats_the_run_to_the_bit(make, tmp_path):
    argv, out = make("[train]\nsteps = 3\n[lora]\nrank = 2\ndropout = 0.1\n")
    ok(argv, 1, out)
    ok(["--config", str(out / "resolved.toml"), f"--output.path={tmp_path / 'again'}"], 1, tmp_path / "again")
    assert weights(out) == weights(tmp_path / "again")


@pytest.mark.parametrize("number, layout", [(signal.SIGTERM, ""), (signal.SIGUSR1, ""), (signal.SIGINT, "[parallel]\ntensor = 2\n")])
def test_a_signal_to_one_rank_saves_and_the_same_command_resumes(make, number, layout):
    extra = "[train]\nsteps = 40\n[log]\nevery = 1\n[checkpoint]\nevery = 0\nasync = true\n" + layout
    argv, calm = make(extra, "calm")
    ok(argv, 2, calm)
    argv, out = make(extra, "signalled")
    ranks = launch.start(argv, 2, out / "out")
    while not (out / "metrics.jsonl").exists() or len(read(out / "metrics.jsonl")) < 3:
        assert not ranks.poll(), ranks.output()
        time.sleep(0.002)
    ranks.signal(number, rank=1)
    assert ranks.wait() == [0, 0], ranks.output()
    done = max(r["step"] for r in read(out / "metrics.jsonl"))
    assert 3 <= done < 40
    assert (out / "checkpoints" / "latest").read_text().strip() == f"step_{done}"
    assert not (out / "export").exists()
    ok(argv, 2, out)
    assert weights(out) == weights(calm)
    assert [r["loss"] for r in read(out / "metrics.jsonl")] == [r["loss"] for r in read(calm / "metrics.jsonl")]


@pytest.mark.parametrize(("steps", "when"), [(9, 4), (4, 4)], ids=["on the way", "at the end"])
def test_a_stop_in_an_evaluation_leaves_it_to_the_next_start(make, monkeypatch, steps, when):
    """A short one would end within the step's time; one of hours must not be waited for, nor be lost."""
    extra = f"[train]\nsteps = {steps}\n[log]\nevery = 1\n[eval]\nevery = 4\nsplit = 0.5\npatience = 9\n[checkpoint]\nevery = 0\n"
    argv, calm = make(extra, "calm")
    ok(argv, 2, calm)
    argv, out = make(extra, "signalled")
    real, took = evaluate.evaluate, out.parent / "batches"

    def signalled(net, batches, *args):
        def some():
            for i, batch in enumerate(batches):
                with took.open("a") as file:
                    file.write(f"{i}")
                if i == 1 and os.environ["RANK"] == "1":
                    os.kill(os.getpid(), signal.SIGUSR1)
                yield batch

        return real(net, some(), *args)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate", signalled)
        assert f"stopped by request after step {when}" in ok(argv, 2, out)
        assert sorted(took.read_text()) == list("0011"), "no batch is evaluated once a rank was asked"
        assert [r["step"] for r in read(out / "metrics.jsonl")] == list(range(1, when + 1))
        # asked again in the same evaluation: nothing is lost
        assert f"stopped by request after step {when}" in ok(argv, 2, out)
        assert json.loads((out / "checkpoints" / f"step_{when}" / "state.json").read_text())["evaluate"]
    ok(argv, 2, out)
    assert weights(out) == weights(calm)
    want, found = ([(r["step"], r.get("loss"), r.get("eval_loss")) for r in read(o / "metrics.jsonl")] for o in (calm, out))
    assert found == want and sum(r[2] is not None for r in want) == {9: 3, 4: 1}[steps]
    assert "ended at step" in ok(argv, 2, out)


def test_an_export_of_an_earlier_run_is_no_result(make, monkeypatch):
    argv, out = make("[train]\nsteps = 2\n")
    ok(argv, 1, out)
    earlier = weights(out)
    argv.append("--train.seed=1")
    with monkeypatch.context() as patch:  # ends between the last checkpoint and the export
        patch.setattr(train, "export", lambda *_: 1 / 0)
        assert launch.run([*argv, "--checkpoint.resume=never"], 1, out / "out").wait() == [1]
    ok(argv, 1, out)
    result = weights(out)
    assert result != earlier
    shutil.rmtree(out / "export")
    ok(argv, 1, out)
    assert weights(out) == result


@pytest.mark.parametrize("name", ["resolved.toml", "result.json"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_lies_where_a_run_writes_its_records(make, tmp_path, name, kind):
    """Nothing outside is written to, nothing is waited for; what cannot be replaced is said in one line."""
    argv, out = make("[train]\nsteps = 1\n")
    theirs, there = tmp_path / "theirs", out / name
    theirs.write_text("theirs")
    out.mkdir()
    {"link": lambda: there.symlink_to(theirs), "pipe": lambda: os.mkfifo(there), "folder": there.mkdir}[kind]()
    ranks = launch.run(argv, 2, tmp_path / "logs")
    codes, text = ranks.wait(60), ranks.output()
    assert theirs.read_text() == "theirs" and "Traceback" not in text and "(traceback in" not in text
    if kind != "folder":
        assert codes == [0, 0] and there.is_file() and not there.is_symlink()
    elif name == "resolved.toml":
        assert codes == [0, 0] and f"{there} cannot be written (Is a directory); checkpoints have a copy" in text
    else:
        assert codes == [2, 2] and f"error: {there}: cannot be removed (Is a directory)" in text
    assert not list(out.glob(".*"))


def test_a_result_that_the_disk_does_not_take(make, monkeypatch):
    def refuse(path, text):
        if path.name == "result.json":
            raise OSError(28, "No space left on device", str(path))
        real(path, text)

    real = files.replace_text
    monkeypatch.setattr(files, "replace_text", refuse)
    argv, out = make("[train]\nsteps = 1\n")
    ranks = launch.run(argv, 2, out / "out")
    assert ranks.wait() == [1, 1]
    says = f"error: the result is exported, but {out}/result.json cannot be written (No space left on device)"
    assert ranks.output().count(says) == 1 and "Traceback" not in ranks.output()
    monkeypatch.undo()
    assert f"resuming from {out}/checkpoints/step_1" in ok(argv, 2, out)
    assert (out / "result.json").is_file()


@pytest.mark.parametrize("kind", ["pipe", "zero", "nested"])
def test_a_result_of_another_kind_is_none(make, kind):
    argv, out = make("[train]\nsteps = 1\n")
    ok(argv, 1, out)
    (out / "result.json").unlink()
    make_it = {
        "pipe": lambda path: os.mkfifo(path),
        "zero": lambda path: path.symlink_to("/dev/zero"),
        "nested": lambda path: path.write_text("[" * 50_000),
    }
    make_it[kind](out / "result.json")
    assert f"exported to {out}/export" in ok(argv, 1, out)


def test_early_stopping_ends_the_run_and_exports(make):
    argv, out = make("[train]\nsteps = 50\n[optim]\nlr = 0.0\n[eval]\nevery = 2\nsplit = 6\npatience = 3\n")
    ok(argv, 1, out)
    evals = [r for r in read(out / "metrics.jsonl") if "eval_loss" in r]
    assert [r["step"] for r in evals] == [2, 4, 6, 8]  # the first is the best, three more are not better
    assert len({r["eval_loss"] for r in evals}) == 1
    assert json.loads((out / "result.json").read_text())["step"] == 8
    assert "ended at step 8" in ok(argv, 1, out)


def test_the_checkpoint_with_the_lowest_evaluation_loss_stays_and_can_be_exported(make, tmp_path, capsys):
    argv, out = make("[train]\nsteps = 8\n[optim]\nlr = 0.3\n[eval]\nevery = 1\nsplit = 6\n[checkpoint]\nevery = 1\n")
    ok([*argv, "--train.steps=5"], 2, out)
    ok([*argv, "--optim.lr=9.0", "--checkpoint.allow_change=true"], 2, out)  # what a later start finds counts as what it saved itself
    losses = {r["step"]: r["eval_loss"] for r in read(out / "metrics.jsonl") if "eval_loss" in r}
    best = min(losses, key=losses.get)
    assert best < 6, f"the newest two stay anyway: {losses}"
    assert [path.name for path in Store(out).steps()] == ["step_8", "step_7", f"step_{best}"]
    for step in ("best", str(best)):
        assert export_tool(["--run", str(out), "--step", step, "--out", str(tmp_path / step)]) == 0
    same, last = load_file(tmp_path / str(best) / "model.safetensors"), load_file(out / "export" / "model.safetensors")
    exported = load_file(tmp_path / "best" / "model.safetensors")
    assert all(exported[name].equal(same[name]) for name in same) and not all(exported[name].equal(last[name]) for name in last)
    shutil.rmtree(out / "checkpoints" / f"step_{best}")
    (out / "checkpoints" / "step_7" / "state.json").unlink()
    (out / "checkpoints" / "step_8" / "state.json").unlink()
    capsys.readouterr()
    assert export_tool(["--run", str(out), "--step", "best", "--out", str(tmp_path / "none")]) == 2
    assert "has no healthy checkpoint that was evaluated" in capsys.readouterr().err


def test_evaluation_does_not_depend_on_ranks_and_counts_every_source(make, tmp_path):
    write_chats(tmp_path / "short.jsonl", 7, seed=1, longest=3)
    write_chats(tmp_path / "long.jsonl", 9, seed=2, shortest=15)
    sources = "".join(f'[[eval.sources]]\npath = "{tmp_path / name}.jsonl"\nformat = "chat"\n' for name in ("short", "long"))
    found = []
    for world in (1, 3):
        argv, out = make(f"[train]\nsteps = 1\naccumulate = {3 // world}\n[eval]\n{sources}", f"w{world}")
        ok(argv, world, out)
        found.append(next(r for r in read(out / "metrics.jsonl") if "eval_loss" in r))
    one, three = found
    assert one["eval_sources"].keys() == {"short", "long"}
    assert one["eval_tokens"] == three["eval_tokens"]
    assert one["eval_loss"] == pytest.approx(three["eval_loss"], rel=1e-6)
    assert one["eval_sources"] == pytest.approx(three["eval_sources"], rel=1e-6)
    assert one["eval_sources"]["short"] != pytest.approx(one["eval_sources"]["long"], rel=1e-4)


def test_another_model_or_other_data_in_the_same_folder_is_refused(make, tmp_path):
    argv, out = make("[train]\nsteps = 2\n")
    ok(argv, 1, out)
    more = [*argv, "--train.steps=3"]
    for change, says in (
        ("--optim.lr=0.5", "optim.lr"),
        ("--data.tokens=192", "data.tokens"),
        ("--lora.rank=4", "lora"),
        ("--train.seed=1", "train.seed"),
    ):
        ranks = launch.run([*more, change], 1, out / "out")
        assert ranks.wait() == [2], change
        assert says in ranks.output(), ranks.output()
    write_chats(tmp_path / "data.jsonl", 61)
    ranks = launch.run(more, 1, out / "out")
    assert ranks.wait() == [2]
    assert "data" in ranks.output()
    ok([*more, "--checkpoint.allow_change=true"], 1, out)


def test_bf16_compute_keeps_fp32_masters(make):
    from safetensors import safe_open

    argv, out = make("[train]\nsteps = 2\n[precision]\ncompute = 'bf16'\n[recompute]\nkind = 'full'\n")
    ok(argv, 2, out)
    with safe_open(out / "export" / "model.safetensors", "pt") as f:
        assert {f.get_slice(k).get_dtype() for k in f.keys()} == {"F32"}  # noqa: SIM118
        tensor = f.get_tensor("model.layers.0.mlp.up_proj.weight")
    assert (tensor != tensor.bfloat16().float()).any(), "the masters were rounded"


@pytest.mark.parametrize("how", ["python", "torchrun"])
def test_the_command_lines_of_the_interface(make, how):
    argv, out = make("[train]\nsteps = 1\n")
    command = (
        [sys.executable, "train.py"]
        if how == "python"
        else [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "train.py"]
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *argv], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (out / "export" / "model.safetensors").exists()
    wrong = subprocess.run([*command, *argv, "--train.stesp=2"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert wrong.returncode == (2 if how == "python" else 1)
    assert wrong.stderr.count("did you mean --train.steps?") == 1
    assert "Traceback" not in wrong.stderr.split("ChildFailedError")[0].split("torch/distributed")[0]


def test_a_record_after_a_resume_covers_the_steps_before_it(make):
    extra = "[train]\nsteps = 60\n[log]\nevery = 50\n[checkpoint]\nevery = 3\n"
    argv, calm = make(extra, "calm")
    ok(argv, 2, calm)
    argv, out = make(extra, "killed")
    ranks = launch.start(argv, 2, out / "out")
    while not (out / "checkpoints" / "step_3").exists():
        assert not ranks.poll(), ranks.output()
        time.sleep(0.002)
    ranks.signal(signal.SIGKILL)
    ranks.end_after_one()
    assert not (out / "metrics.jsonl").read_text(), "the kill came too late to tell anything"
    ok(argv, 2, out)
    want, found = ([(r["step"], r["tokens"], r["loss"]) for r in read(o / "metrics.jsonl")] for o in (calm, out))
    assert [r[:2] for r in found] == [r[:2] for r in want]
    assert [r[2] for r in found] == pytest.approx([r[2] for r in want], rel=1e-12)


def test_the_optimizer_of_one_launch_resumes(make):
    """To the bit; and torch's takes over from it, without being asked whether it may."""
    pytest.importorskip("triton")
    toml = (
        "[train]\nsteps = 4\n[lora]\nrank = 2\n[optim]\nimpl = 'triton'\nweight_decay = 0.1\nmax_norm = 0.1\n"
        "[schedule]\nkind = 'constant'\n[log]\nevery = 1\n"
    )
    (argv, whole), (again, parts) = make(toml, "whole"), make(toml, "parts")
    assert "optimizer: AdamW, triton" in ok(argv, 2, whole)
    ok([*again, "--train.steps=2"], 2, parts)
    ok(again, 2, parts)
    want, found = ([(r["loss"], r["grad_norm"]) for r in read(out / "metrics.jsonl")] for out in (whole, parts))
    assert len(want) == 4 and found == want and weights(parts) == weights(whole)
    assert min(norm for _, norm in want) > 0.1, "it does not clip"
    assert "optimizer: AdamW, torch" in ok([*again, "--train.steps=5", "--optim.impl=torch"], 2, parts)
    assert weights(parts) != weights(whole) and len(read(parts / "metrics.jsonl")) == 5


def test_an_early_stopped_run_goes_on_with_more_patience_and_a_finished_one_merges_on_request(make):
    argv, out = make("[train]\nsteps = 12\n[lora]\nrank = 2\n[eval]\nevery = 2\nsplit = 6\npatience = 2\nmin_delta = 100.0\n")
    ok(argv, 1, out)
    assert max(r["step"] for r in read(out / "metrics.jsonl")) == 6
    ok([*argv, "--eval.patience=0"], 1, out)
    assert max(r["step"] for r in read(out / "metrics.jsonl")) == 12
    assert (out / "export" / "adapter_model.safetensors").exists()
    ok([*argv, "--eval.patience=0", "--output.merge=true"], 1, out)
    assert (out / "export" / "model.safetensors").exists()


def test_other_accumulation_on_resume_is_refused(make):
    argv, out = make("[train]\nsteps = 2\n")
    ok(argv, 1, out)
    ranks = launch.run([*argv, "--train.steps=4", "--train.accumulate=4"], 1, out / "out")
    assert ranks.wait() == [2]
    assert "train.accumulate" in ranks.output()


def test_a_checkpoint_that_no_disk_took_is_said_before_and_at_the_end(make, monkeypatch):
    argv, out = make("[train]\nsteps = 3\n[checkpoint]\nevery = 1\n")
    monkeypatch.setattr(Store, "free_bytes", lambda self: 1000)
    ranks = launch.run(argv, 2, out / "out")
    assert ranks.wait() == [1, 1], ranks.output()
    said = ranks.output()
    assert "1000 B are free in" in said and ": none can be saved until there are" in said
    errors = [line for line in said.splitlines() if "error:" in line]
    assert len(errors) == 1 and "error: the result is exported after step 3, whose checkpoint was not saved, the disk" in errors[0]
    assert weights(out) and "Traceback" not in said
    monkeypatch.undo()
    assert "none can be saved" not in ok(argv, 2, out)  # from the beginning, as nothing was saved
    assert (out / "checkpoints" / "step_3").is_dir()


@pytest.mark.parametrize("wanted", [True, False])
def test_a_deterministic_run_takes_no_operation_that_is_not(make, monkeypatch, wanted):
    """In a process of its own: torch's flag is of the process."""

    def stands_for_such_an_operation(*args):
        torch.zeros(2, 2).put_(torch.tensor([0, 0]), torch.ones(2))  # without `accumulate`, which of the two stays is open
        return export(*args)

    export = train.export
    monkeypatch.setattr(train, "export", stands_for_such_an_operation)
    argv, out = make(f"[train]\nsteps = 1\n[run]\ndeterministic = {str(wanted).lower()}\n")
    ranks = launch.run(argv, 1, out / "out")
    assert ranks.wait() == [int(wanted)]
    assert ("put_ does not have a deterministic implementation" in ranks.output()) == wanted


def test_random_states_come_back_with_a_checkpoint(make, monkeypatch):
    argv, out = make("[train]\nsteps = 2\n")
    ok(argv, 1, out)
    saved = load_file(out / "checkpoints" / "step_2" / "rng_0.safetensors")["cpu"]
    shutil.rmtree(out / "export")
    monkeypatch.setattr(train, "restore_random", lambda states, path: (out / "seen").write_bytes(states["cpu"].numpy().tobytes()))
    ok(argv, 1, out)
    assert (out / "seen").read_bytes() == saved.numpy().tobytes() and len(saved) > 1000
    monkeypatch.undo()
    with pytest.raises(ModelError, match="holds a random state that is not one of ours"):
        train.restore_random({"cpu": saved[:10]}, out)


def test_a_damaged_result_is_not_reported_as_one(make):
    argv, out = make("[train]\nsteps = 2\n")
    ok(argv, 2, out)
    file, whole = next((out / "export").glob("*.safetensors")), weights(out)
    for content in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), None):
        file.unlink() if content is None else file.write_bytes(content)
        ranks = launch.run(argv, 2, out / "out")
        assert ranks.wait() == [2, 2], ranks.output()
        errors = [line for line in ranks.output().splitlines() if "error:" in line]
        assert len(errors) == 1 and "is not what this run wrote" in errors[0] and "model.safetensors" in errors[0]
    shutil.move(out / "export", out / "broken")
    ok(argv, 2, out)
    assert weights(out) == whole


def test_a_signal_while_blocks_are_compiled_stops_after_that_step(make, monkeypatch):
    argv, out = make('[train]\nsteps = 9\n[compile]\nbackend = "aot_eager"\n')
    call, began = compile._call, []

    def compiling(*args):
        if not began:
            began.append(threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
            began[0].start()
            found = call(*args)
            (out / ("inside" if began[0].finished.is_set() else "too late")).touch()
            return found
        return call(*args)

    monkeypatch.setattr(compile, "_call", compiling)
    said = ok(argv, 1, out)
    assert (out / "inside").exists(), "it was compiled before the signal came"
    assert "stopped by request after step 1; the same command resumes" in said
    assert (out / "checkpoints" / "step_1").is_dir() and not (out / "export").exists()
    monkeypatch.undo()
    ok(argv, 1, out)
    assert [r["step"] for r in read(out / "metrics.jsonl")][-1] == 9
