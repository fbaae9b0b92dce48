"""The planner against what really happens: bytes of gloo ranks, tensors that autograd saves, all layers instead of two and three."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from model import build
from model.arch import Arch
from model.transforms.lora import apply_lora
from model.transforms.trainable import apply_trainable
from model.weights import initialize, local
from optim.adamw import build as build_optimizer
from parallel.mesh import Mesh
from runtime.config import load
from tests.harness import run
from tests.parallel.test_layouts import rows
from tests.tiny import LLAMA, write_model
from tools import plan
from train import RunConfig, assemble

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
FULL, LORA = ROOT / "train_configs/debug/full.toml", ROOT / "train_configs/debug/lora.toml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("plan") / "model", num_hidden_layers=5, num_key_value_heads=4)


@contextmanager
def fake(world: int):
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def real_bytes(rank, world, cfg, folder):
    """(parameters, of those that train, optimizer state) of this rank with all layers."""
    net, _ = assemble(cfg, Arch.from_folder(folder), Mesh.build(cfg.parallel, CPU))
    net.to_empty(device="cpu")
    trained = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    state = build_optimizer(trained, cfg.optim).state.values()
    return (
        sum(local(p).nbytes for p in net.parameters()),
        sum(local(p).nbytes for _, p in trained),
        sum(local(t).nbytes for tensors in state for t in tensors.values()),
    )


@pytest.mark.parametrize("toml", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("axes", [{"shard": 2}, {"shard": 4}, {"replicate": 2, "shard": 2}, {"shard": 2, "tensor": 2}], ids=str)
def test_bytes_are_those_of_a_real_rank(folder, toml, axes):
    words = [f"--parallel.{axis}={n}" for axis, n in axes.items()]
    cfg = load(RunConfig, toml, words + (["--lora.dropout=0"] if toml == LORA else []))
    world = 2 if axes == {"shard": 2} else 4
    want = run(real_bytes, world, cfg, folder)[0]
    with fake(world):
        found = plan.plan(cfg, Arch.from_folder(folder), Mesh.build(cfg.parallel, CPU))
    assert (found.parameters, found.gradients, found.optimizer) == want
    assert all(n > 1000 for n in want)


def really_saved(cfg, arch: Arch, layers: int, batch) -> int:
    """Bytes that a real forward of so many layers leaves for the backward, weights aside."""
    net = build(plan.shortened(arch, layers))
    if cfg.lora:
        apply_lora(net, cfg.lora)
    apply_trainable(net, cfg.lora, torch.float32)
    net.use_kernels(cfg.kernels, "cpu", torch.float32)
    net.to_empty(device="cpu")
    net.reset_buffers("cpu")
    initialize(net, 0)
    weights, kept = {p.untyped_storage().data_ptr() for p in net.parameters()}, {}

    def pack(t):
        if (at := t.untyped_storage().data_ptr()) not in weights:
            kept[at] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = net(batch).sum()
    loss.backward()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("toml", [FULL, LORA], ids=["full", "lora"])
def test_saved_bytes_are_exact(folder, toml):
    """What the third layer adds, of a step with real tensors, packed documents and the real attention."""
    cfg, arch, batch = load(RunConfig, toml), Arch.from_folder(folder), rows(320, 1)[0]
    want = really_saved(cfg, arch, 4, batch) - really_saved(cfg, arch, 3, batch)
    with fake(1):
        mesh = Mesh.build(cfg.parallel, CPU)
        assert plan.saved_by_block(cfg, arch, mesh, 320) == want
        assert plan.saved_by_block(cfg, arch, mesh, 640) == 2 * want
    assert want > 320 * LLAMA["hidden_size"] * 4 * 5


def test_two_and_three_layers_tell_of_all(folder):
    cfg = load(RunConfig, FULL, ["--parallel.tensor=2"])
    arch = plan.shortened(Arch.from_folder(folder), 11)
    with fake(8):
        mesh = Mesh.build(cfg.parallel, CPU)
        assert plan.weights(cfg, arch, mesh)[0] == plan.Weights.of(cfg, arch, mesh)


@pytest.mark.parametrize(("name", "world", "numbers"), [("8b", 8, 8.03e9), ("70b", 64, 70.55e9), ("405b", 512, 405.85e9)])
def test_large_models_answer_quickly(name, world, numbers):
    cfg = load(RunConfig, ROOT / "train_configs/llama3.1-8b-full.toml", ["--parallel.tensor=8"])
    cfg = replace(cfg, precision=replace(cfg.precision, compute="bf16"))
    begun = time.process_time()
    with fake(world):
        found = plan.plan(cfg, Arch.from_folder(ROOT / f"train_configs/arch/llama3-{name}"), Mesh.build(cfg.parallel, CPU))
    assert time.process_time() - begun < 10
    assert found.parameters * world == pytest.approx(4 * numbers, rel=2e-3)
    assert found.peak > found.parameters + found.gradients + found.optimizer + found.activations


@pytest.mark.parametrize(
    "path",
    ["debug/full", "debug/hsdp", "debug/lora", "debug/shard", "debug/tensor", "llama3.1-8b-full", "llama3.1-8b-hsdp", "llama3.1-8b-lora"],
)
def test_recipes_are_planned_and_fit(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    file = ROOT / "train_configs" / f"{path}.toml"
    world = file.read_text(encoding="utf-8").split()[1]
    arch = [] if path.startswith("debug") else ["--arch", "train_configs/arch/llama3-8b"]
    assert plan.main(["--config", str(file), "--world", world, *arch]) == 0
    assert "\nfits h200" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--world", "none"], "--world='none'"),
        (["--world", "2", "--gpu", "abacus"], "known: a100-40"),
        (["--world", "3", "--parallel.tensor=2"], "parallel"),
        (["--world", "3", "--parallel.tensor=3"], "num_key_value_heads"),
        (["--world", "2", "--parallel.context=2"], "parallel.context"),
    ],
    ids=str,
)
def test_refusals(words, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert plan.main(["--config", str(FULL), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not dist.is_initialized()


def test_what_does_not_fit_is_told_what_to_change(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = ["--config", "train_configs/llama3.1-8b-full.toml", "--arch", "train_configs/arch/llama3-8b", "--world", "1"]
    assert plan.main([*words, "--recompute.kind=none", "--gpu", "rtx4090"]) == 0
    assert "does not fit rtx4090" in (said := capsys.readouterr().out) and "recompute.kind" in said


def test_suggested_layouts_fit_and_can_be_planned(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = ["--config", str(FULL), "--world", "8"]
    assert plan.main([*words, "--suggest"]) == 0
    first, *lines = capsys.readouterr().out.strip().split("\n")
    assert first.startswith("layouts of 8 ranks that fit h200") and len(lines) == 3
    traffic = [float(line.split("receives ")[1].split()[0]) for line in lines]
    assert traffic == sorted(traffic)
    for line in lines:
        assert plan.main([*words, *(word for word in line.split() if word.startswith("--"))]) == 0
        assert "\nfits h200" in capsys.readouterr().out
    big = ["--arch", "train_configs/arch/llama3-405b", "--config", "train_configs/llama3.1-8b-full.toml", "--world", "2"]
    assert plan.main([*big, "--suggest"]) == 0
    assert capsys.readouterr().out == "no layout of 2 ranks fits h200\n"
