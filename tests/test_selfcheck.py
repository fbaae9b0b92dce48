"""`tools.selfcheck`: says equal of what is equal, and finds what is not."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from model.arch import Arch
from parallel.apply import check
from parallel.config import ParallelConfig
from parallel.local import apart
from parallel.mesh import sizes
from parallel.tensor import Gather
from runtime.config import load
from tests.tiny import Sections
from tools import selfcheck
from train import RunConfig

ROOT = Path(__file__).resolve().parent.parent
ARCHES = sorted((ROOT / "train_configs/arch").iterdir())


def command(words: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(ROOT):
        code = selfcheck.main(words)
    return code, out.getvalue(), err.getvalue()


def recipe(name: str, arch: str, *more: str) -> list[str]:
    return ["--config", f"train_configs/{name}.toml", "--arch", f"train_configs/arch/{arch}", *more]


@pytest.mark.parametrize(
    ("words", "layout"),
    [
        (recipe("llama3.1-405b-full", "llama3-405b", "--world", "512"), "replicate 1 x shard 2 x context 2 x tensor 2"),
        (recipe("gemma3-4b-lora", "gemma3-4b", "--world", "16", "--parallel.tensor=4"), "replicate 1 x shard 2 x context 1 x tensor 2"),
        (
            recipe("llama3.1-8b-long", "llama3-8b", "--world", "8", "--parallel.context_method=ring"),
            "replicate 1 x shard 1 x context 4 x tensor 1",
        ),
        (["--config", "train_configs/debug/lora.toml"], "replicate 1 x shard 2 x context 1 x tensor 1"),  # shard = -1: two of them
    ],
    ids=str,
)
def test_what_is_equal_is_said_to_be(words, layout):
    code, said, error = apart(command, words)
    assert code == 0 and said.endswith("equal, to 1e-05\n"), said + error
    assert layout in said
    worst = [float(e) for e in re.findall(r"relative error ([\d.e-]+)", said)]
    assert len(worst) == 2


def test_what_is_not_is_found(monkeypatch):
    right = Gather.leave
    monkeypatch.setattr(Gather, "leave", lambda self, y: right(self, y) * 1.0001)
    code, said, _ = apart(command, ["--config", "train_configs/debug/tensor.toml"])
    assert code == 1 and said.endswith("NOT equal: the bound is 1e-05\n")


def test_what_could_not_run_is_refused():
    code, said, error = apart(command, recipe("llama3.1-8b-full", "llama3-8b", "--world", "16", "--parallel.tensor=16"))
    assert (code, said) == (2, "") and error.startswith("error: parallel.tensor=16 does not divide num_key_value_heads=8")


@pytest.mark.parametrize("folder", ARCHES, ids=lambda p: p.name)
@pytest.mark.parametrize(
    "axes", [{"shard": 8}, {"tensor": 8, "shard": 4}, {"context": 16}, {"replicate": 2, "context": 4, "tensor": 2}], ids=str
)
def test_small_models_can_be_shared_and_are_of_the_same_kind(folder, axes):
    arch, cfg = Arch.from_folder(folder), ParallelConfig(**axes)
    if arch.num_key_value_heads % cfg.tensor:
        return  # refused as it is
    layout = selfcheck.smaller_layout(cfg, sizes(cfg, 32 if axes.get("tensor") == 8 else 16 if "shard" not in axes else 8))
    small_axes = sizes(layout, layout.shard * layout.replicate * layout.context * layout.tensor)
    small = selfcheck.smaller_model(arch, small_axes)
    check(Sections(layout), small_axes, small, None)
    assert {a for a, n in small_axes.items() if n > 1} == {a for a in axes if axes[a] > 1} and max(small_axes.values()) <= 4
    assert len(small.kinds) == len(arch.kinds) and small.tie_word_embeddings == arch.tie_word_embeddings
    assert (small.num_attention_heads > small.num_key_value_heads) == (arch.num_attention_heads > arch.num_key_value_heads)


def test_the_reference_uses_nothing_of_the_layout():
    words = ["--recompute.kind=full", "--offload.activations=cpu", "--tiling.mlp=16", "--compile.backend=eager"]
    cfg = selfcheck.plain(load(RunConfig, ROOT / "train_configs/debug/context.toml", words))
    assert all(getattr(cfg, name) == value for name, value in vars(Sections(kernels=cfg.kernels)).items())
    assert set(vars(cfg.kernels).values()) == {"sdpa", "separate", "torch", False}
