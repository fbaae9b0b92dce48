"""tools.export: from a checkpoint of a run, what the run itself exported, to the byte."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests import launch
from tests.model.folders import digests, tensors
from tests.tiny import write_chats, write_config, write_model
from tools.export import main

DOCS = (Path(__file__).parents[2] / "docs" / "lora.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A full and a LoRA run of 4 steps on 2 ranks, with checkpoints of steps 2 and 4; random bf16 weights as the base."""
    tmp = tmp_path_factory.mktemp("runs")
    model, data = write_model(tmp / "model", torch_dtype="bfloat16"), write_chats(tmp / "chats.jsonl", 24)
    write_config(tmp / "full.toml", model, data, tmp / "full", "[optim]\nlr = 1e-2\n")
    lora = re.search(r"```toml\n(.*?)```", DOCS, re.S)[1]  # the config that the page shows, on our model and data
    places = {"Qwen/Qwen3-0.6B": model, "data/chats.jsonl": data, "out/qwen3-lora": tmp / "lora", "epochs = 2": "steps = 4"}
    for theirs, ours in places.items():
        assert lora.count(theirs) == 1
        lora = lora.replace(theirs, str(ours))
    (tmp / "lora.toml").write_text(lora, encoding="utf-8")
    small = ["--data.tokens=128", "--data.max_length=128", f"--data.cache={tmp / 'cache'}", "--train.steps=4", "--checkpoint.every=2"]
    for name, more in (("full", []), ("lora", ["--model.init=random", "--lora.train_modules=['norm']"])):
        ranks = launch.run(["--config", str(tmp / f"{name}.toml"), *small, *more], 2, tmp / "logs")
        assert set(ranks.codes.values()) == {0}, ranks.output()
    return tmp


def export(*args, **options):
    return main([f"--{k}={v}" for k, v in options.items()] + list(args))


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_newest_checkpoint_is_what_the_run_exported(runs, tmp_path, name, capsys):
    assert export(run=runs / name, out=tmp_path / "out") == 0
    assert f"exported {runs / name}/checkpoints/step_4 to {tmp_path}/out" in capsys.readouterr().out
    assert digests(tmp_path / "out") == digests(runs / name / "export")
    assert ("adapter_config.json" in digests(tmp_path / "out")) == (name == "lora")


def test_an_earlier_step_and_merged_weights(runs, tmp_path):
    assert export(run=runs / "lora", step=2, out=tmp_path / "two") == 0
    assert digests(tmp_path / "two").keys() == digests(runs / "lora" / "export").keys()
    assert digests(tmp_path / "two") != digests(runs / "lora" / "export")
    assert export("--merge", run=runs / "lora", out=tmp_path / "merged", dtype="fp32") == 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= digests(tmp_path / "merged").keys()
    assert {str(t.dtype) for t in tensors(tmp_path / "merged").values()} == {"torch.float32"}
    assert export(run=runs / "full", step=2) == 0
    assert (runs / "full" / "export_step_2" / "model.safetensors").is_file()


def test_a_damaged_checkpoint_is_passed_over(runs, tmp_path, capsys):
    (newest,) = runs.glob("full/checkpoints/step_4")
    path = next(newest.glob("*.distcp"))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    try:
        assert export(run=runs / "full", step=4, out=tmp_path / "out") == 2
        assert "the checkpoint of step 4 is damaged" in capsys.readouterr().err
        assert export(run=runs / "full", out=tmp_path / "out") == 0
        said = capsys.readouterr()
        assert "skipped" in said.err and "step_2" in said.out
    finally:
        path.write_bytes(data)


def test_errors_are_one_line_and_exit_code_2(runs, tmp_path, capsys):
    def error(*args, **options):
        assert export(*args, **{"out": tmp_path / "out", **options}) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1 and text.startswith("error: ")
        return text

    assert "checkpoints: has no checkpoints" in error(run=tmp_path)
    assert "has no checkpoint of step 3" in error(run=runs / "full", step=3)
    assert "has nothing to merge: this run trained the full weights" in error("--merge", run=runs / "full")
    assert "is for full weights" in error(run=runs / "lora", dtype="bf16")
    config = runs / "model" / "config.json"
    text = config.read_text()
    config.write_text(json.dumps(json.loads(text) | {"rms_norm_eps": 1e-3}))
    try:
        assert "is no longer the model that" in error(run=runs / "full")
    finally:
        config.write_text(text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", ["abc", "-1", "2.5", "", "9" * 5000])
def test_a_step_that_is_none(tmp_path, capsys, step):
    assert main(["--run", str(tmp_path), f"--step={step}"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: --step='") and text.endswith(" must be the number of a step, or best\n") and text.count("\n") == 1
