"""A rank that runs out of memory: one line with what would take less, on it and on those that wait for it."""

from __future__ import annotations

import pytest
import torch

from model import safetensors_io
from objective import lm
from parallel import memory
from tests import launch
from tests.tiny import write_chats, write_config, write_model

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.20 GiB is free."


@pytest.fixture
def argv(tmp_path):
    model, data = write_model(tmp_path / "model"), write_chats(tmp_path / "data.jsonl", 60)
    return [
        "--config",
        str(write_config(tmp_path / "c.toml", model, data, tmp_path / "out", "[train]\nsteps = 4\n[checkpoint]\nevery = 1\n")),
    ]


@pytest.mark.parametrize("kind", ["cuda", "host", "other"])
def test_one_line_names_the_rank_and_what_takes_less(argv, tmp_path, monkeypatch, kind):
    calls, real = [], lm.loss

    def loss(*args):
        calls.append(1)
        if len(calls) == 2 and launch.os.environ["RANK"] == "1":
            if kind == "cuda":
                raise torch.OutOfMemoryError(CUDA)
            if kind == "host":
                torch.empty(1 << 60, dtype=torch.uint8)
            raise RuntimeError("something else")
        return real(*args)

    monkeypatch.setattr(lm, "loss", loss)
    ranks = launch.run(argv, 2, tmp_path / "logs")
    assert ranks.wait() == [1, 1]
    less = "recompute.kind=mlp or recompute.kind=full or offload.optimizer=true"
    says = "rank 1 is out of memory on cpu, it asked for {}; less is taken with " + less
    wanted = {"cuda": says.format("2.00 GiB"), "host": says.format("1073741824.00 GiB"), "other": "something else"}[kind]
    assert wanted in ranks.output(0) and wanted in ranks.output(1)
    assert ("(traceback in" in ranks.output()) == (kind == "other")
    assert f"{tmp_path}/out/checkpoints/step_1; the same command resumes" in ranks.output(0)


def test_only_what_works_with_the_rest_is_suggested(tmp_path):
    import train
    from model.arch import Arch
    from runtime.config import parse_args

    model, data = write_model(tmp_path / "model"), write_chats(tmp_path / "data.jsonl", 9)
    path = write_config(tmp_path / "c.toml", model, data, tmp_path / "out", "")
    arch = Arch.from_folder(model)
    axes = {"replicate": 1, "shard": 1, "context": 1, "tensor": 1}

    def suggested(*words: str, saved: bool = False) -> list[str]:
        return memory.smaller(parse_args(train.RunConfig, ["--config", str(path), *words], prog="train.py"), axes, arch, saved)

    short = ["--data.tokens=256", "--data.max_length=128"]
    assert suggested(*short)[:2] == ["recompute.kind=mlp", "data.tokens=128 and train.accumulate=2"]
    assert "data.tokens" not in " ".join(suggested("--data.tokens=256", "--data.max_length=256"))
    assert "data.tokens" not in " ".join(suggested(*short, saved=True))
    graph = ["--kernels.cuda_graph=true"]
    assert suggested(*graph) == ["recompute.kind=mlp", "offload.optimizer=true"]  # nothing that a graph cannot hold
    all_ = ["--recompute.kind=full", "--offload.optimizer=true", "--offload.activations=cpu", "--lora.rank=4"]
    assert suggested(*all_) == ["offload.frozen=true"]


def test_a_rank_is_not_blamed_for_what_it_is_told_of_another(argv, tmp_path, monkeypatch):
    def full(*args, **more):
        if launch.os.environ["RANK"] == "1":
            torch.empty(1 << 60, dtype=torch.uint8)
        return real(*args, **more)

    real = safetensors_io.materialize
    monkeypatch.setattr(safetensors_io, "materialize", full)
    ranks = launch.run(argv, 2, tmp_path / "logs")
    assert ranks.wait() == [1, 1]
    assert "error: rank 1 is out of memory on cpu" in ranks.output(1)
    assert "rank 0 is out of memory" not in ranks.output() and "Traceback" not in ranks.output()
    assert "error: rank 1 failed in phase 'weights': " in ranks.output(0)
    for told in ("rank 1: RuntimeError: ", "rank 1 failed in phase 'x': "):
        assert not memory.is_out_of_memory(RuntimeError(told + memory.OTHERS[0]))
    assert memory.is_out_of_memory(RuntimeError(memory.OTHERS[0])) and not memory.is_out_of_memory(RuntimeError("something else"))
