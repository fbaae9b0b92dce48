"""The end of a run: what would be exported is loaded again in the run's own layout, and what is wrong has no folder."""

from __future__ import annotations

import json
import re

import pytest

from model import safetensors_io
from tests import launch
from tests.tiny import write_chats, write_config, write_model

LORA = "[train]\nsteps = 3\n[optim]\nlr = 0.05\n[lora]\nrank = 4\nalpha = 32\n"


@pytest.fixture
def config(tmp_path):
    model, data = write_model(tmp_path / "model"), write_chats(tmp_path / "chats.jsonl", 24)
    return write_config(tmp_path / "c.toml", model, data, tmp_path / "out", LORA)


def run(config, tmp_path, *more):
    ranks = launch.run(["--config", str(config), *more], 2, tmp_path / "logs")
    return ranks.wait(), ranks.output()


@pytest.mark.parametrize("layout", ["shard", "context", "tensor"])
def test_a_wrong_merge_is_an_error_of_every_rank(config, tmp_path, monkeypatch, layout):
    more = ["--output.merge=true", *([f"--parallel.{layout}=2"] if layout != "shard" else [])]
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_io, "merge", lambda weight, a, b, scale: weight.float())
        codes, text = run(config, tmp_path, *more)
    assert codes == [2, 2] and "the export, loaded again, computes something else than the live model" in text
    assert not (tmp_path / "out/export").exists() and not list((tmp_path / "out").glob(".export*"))
    assert not (tmp_path / "out/result.json").exists()
    codes, text = run(config, tmp_path, *more)  # the checkpoint is intact: the same command exports
    assert codes == [0, 0] and "loaded again and compared" in text
    assert json.loads((tmp_path / "out/result.json").read_text())["merge"] is True


def test_a_run_that_learns_nothing_exports_nothing(config, tmp_path):
    codes, text = run(config, tmp_path, "--optim.lr=0")
    assert codes == [2, 2] and re.search(
        r"q_proj\.lora_B\.weight is all zeros: nothing was learned there \(is the learning rate 0\?\)", text
    )
    assert not (tmp_path / "out/export").exists()
    assert (tmp_path / "out/checkpoints/step_3").is_dir()
