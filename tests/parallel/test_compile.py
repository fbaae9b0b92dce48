"""Compiled blocks: one graph for all packings, the gradients of eager, and an error where that cannot be."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.utils import counters
from torch._functorch import config as functorch
from torch.utils.checkpoint import checkpoint

from data.batch import Batch
from model.arch import Arch
from model.config import LoraConfig
from model.decoder import Decoder
from model.transforms import ops
from parallel import compile
from parallel.apply import check, parallelize
from parallel.config import CompileConfig, OffloadConfig, ParallelConfig, RecomputeConfig, TilingConfig
from parallel.context import split
from parallel.local import apart, run
from parallel.mesh import AXES, Mesh, sizes
from runtime.errors import ConfigError
from tests.model.golden import distance, write_config
from tests.parallel.test_layouts import VOCAB, backward, documents, grads, model, pack, rows
from tests.tiny import LLAMA, Sections

SLOTS = 192
FULL, ATTENTION = RecomputeConfig("full"), RecomputeConfig("selective")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    names = ("llama-biases-v5", "gemma3_text")
    return {name: write_config(tmp_path_factory.mktemp("golden"), name, initializer_range=0.2) for name in names}


def packings(count: int) -> list[Batch]:
    """Rows of as many slots, with other documents in each: one to a dozen, of any lengths, in any order; the last holds none."""
    rng, docs, found = random.Random(0), documents(), []
    for number in range(count - 1):
        chosen, room = [], SLOTS
        for tokens, labels in rng.sample(docs, rng.randint(1, len(docs))):
            n = rng.randint(1, len(tokens))
            if n <= room:
                chosen.append((tokens[:n], labels[:n]))
                room -= n
        found.append(pack(chosen, SLOTS, number))
    return [*found, pack([], SLOTS, count)]


def forget() -> None:
    """A fork has what its parent compiled."""
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def same(found: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    assert found.keys() == want.keys()
    assert all(g.norm() > 1e-4 for g in want.values())
    return all(torch.equal(found[n], g) for n, g in want.items())


# -- one rank: graphs ------------------------------------------------------------------------------------------------------


def over_packings(rank: int, world: int, folder: Path, lora: bool, backend: str) -> list[int]:
    """Graphs after a row in training and in evaluation, then after a hundred of either; the first ten are compared with eager."""
    forget()
    mesh, seen = Mesh.build(ParallelConfig(), torch.device("cpu")), []
    eager, net = (model(folder, mesh, lora, "none", compile=c) for c in (None, CompileConfig(backend)))
    first, *others = packings(101)
    assert len({tuple(row.cu_seqlens.tolist()) for row in (first, *others)}) == 101

    def both(row: Batch, compared: bool) -> None:
        backward(net, [row], 100)
        net.eval()
        with torch.no_grad():
            logp = net(row)
        net.train()
        if compared:
            backward(eager, [row], 100)
            assert torch.equal(logp, eager(row))
            assert all(torch.equal(a.grad, b.grad) for a, b in zip(eager.parameters(), net.parameters()) if a.requires_grad)

    both(first, True)
    seen.append(graphs())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i, row in enumerate(others):
            both(row, i < 10)
    return [*seen, graphs()]


@pytest.mark.parametrize(
    ("family", "lora", "expected"),
    [
        ("llama-biases-v5", False, 2),  # training, evaluation
        ("llama-biases-v5", True, 3),  # the first block's input needs no gradient
        ("gemma3_text", False, 4),  # two kinds of attention
        ("gemma3_text", True, 5),
    ],
)
def test_one_graph_for_a_hundred_packings(folders, family, lora, expected):
    backend = "aot_eager" if family == "llama-biases-v5" else "eager"
    assert run(over_packings, 1, folders[family], lora, backend, timeout=120) == [[expected, expected]]


# -- gradients -------------------------------------------------------------------------------------------------------------


def against_eager(rank: int, world: int, folder: Path, axes: dict, method: str, jobs: list[tuple]) -> list[tuple[bool, int]]:
    """For each job: are all gradients those of eager to the bit, and how many graphs did training and evaluation take?"""
    cfg = ParallelConfig(**axes, context_method=method)
    mesh, found = Mesh.build(cfg, torch.device("cpu")), []
    micro = [split(row, mesh) for row in packings(6)]
    for backend, lora, again, tile, dropout in jobs:
        forget()
        plain = RecomputeConfig() if again.kind == "budget" else again
        setting = {"parallel": cfg, "dropout": dropout, "tiling": TilingConfig(mlp=tile)}
        eager = model(folder, mesh, lora, plain, **setting)
        net = model(folder, mesh, lora, again, **setting, compile=CompileConfig(backend))
        assert net.state_dict().keys() == eager.state_dict().keys()
        for each in (eager, net):
            backward(each, micro, 100, seed=7)
        equal = same(grads(net), grads(eager))
        net.eval()
        with torch.no_grad():
            net(micro[0])
        found.append((equal, graphs()))
    return found


NONE, AOT, EAGER = RecomputeConfig(), "aot_eager", "eager"
JOBS = {  # (layout, how context ranks attend): (backend, LoRA, recompute, tile, dropout)
    ((1, 1, 1, 1), "auto"): [
        (AOT, False, FULL, 0, 0.0),
        (AOT, True, RecomputeConfig("every_n"), 100, 0.3),
        (AOT, False, RecomputeConfig("budget", budget=0.3), 0, 0.0),
        (AOT, False, RecomputeConfig("selective", save=("matmul", "collectives")), 0, 0.0),
    ],
    ((1, 2, 1, 1), "auto"): [(AOT, False, NONE, 0, 0.0), (AOT, True, FULL, 100, 0.3)],
    ((1, 1, 1, 2), "auto"): [(AOT, False, NONE, 0, 0.0), (AOT, False, ATTENTION, 100, 0.0), (EAGER, True, FULL, 0, 0.0)],
    ((1, 1, 2, 1), "ring"): [(AOT, False, ATTENTION, 0, 0.0), (EAGER, True, NONE, 100, 0.0)],
    ((1, 1, 2, 1), "ulysses"): [(EAGER, False, FULL, 0, 0.0)],
    ((1, 1, 2, 1), "allgather"): [(EAGER, False, RecomputeConfig("selective", save=("attention", "collectives")), 0, 0.0)],
}


@pytest.mark.parametrize(("axes", "method"), JOBS, ids=str)
def test_gradients_are_those_of_eager(folders, axes, method):
    """All of them, the embedding's too: its gradient comes through the input of a compiled block."""
    jobs = JOBS[axes, method]
    for found in run(against_eager, math.prod(axes), folders["llama-biases-v5"], dict(zip(AXES, axes)), method, jobs, timeout=120):
        assert [equal for equal, _ in found] == [True] * len(jobs)
        extra = [lora + (again.kind == "every_n") for _, lora, again, _, _ in jobs]
        assert [count for _, count in found] == [2 + more for more in extra]


def offloaded(rank: int, world: int, folder: Path) -> list[bool]:
    """Are gradients those without, where what compiled blocks save waits in host memory?"""
    mesh, micro, found = Mesh.build(ParallelConfig(), torch.device("cpu")), packings(4), []
    for again, kind in ((NONE, "cpu"), (FULL, "hidden_states")):
        forget()
        eager = model(folder, mesh, False, "none")
        net = model(folder, mesh, False, again, compile=CompileConfig(AOT), offload=OffloadConfig(kind))
        for each in (eager, net):
            backward(each, micro, 100)
        found.append(same(grads(net), grads(eager)))
        assert graphs() == 1
    return found


def test_activations_of_compiled_blocks_can_wait_in_host_memory(folders):
    assert run(offloaded, 1, folders["llama-biases-v5"], timeout=120) == [[True, True]]


def with_inductor(rank: int, world: int, folder: Path) -> float:
    forget()
    mesh, row, found = Mesh.build(ParallelConfig(), torch.device("cpu")), rows(320, 1)[0], []
    for cfg in (None, CompileConfig()):
        net = model(folder, mesh, False, FULL, compile=cfg)
        backward(net, [row], 100)
        found.append(grads(net))
    assert graphs() == 1
    return max(distance(found[1][n], g) for n, g in found[0].items())


def test_inductor(tmp_path, monkeypatch):
    """Its kernels add up in another order."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": VOCAB, "initializer_range": 0.2, "num_hidden_layers": 1}))
    (error,) = run(with_inductor, 1, tmp_path, timeout=240)
    assert 0 < error < 1e-5
    assert list((tmp_path / "cache").iterdir())


# -- what cannot be --------------------------------------------------------------------------------------------------------


# These compile in a fork of their own: torch 2.11 starts threads for it, and a process that has them forks no ranks.


def alone(folder: Path, **sections: object) -> Decoder:
    """A model on one rank without a process group."""
    forget()
    net = model(folder, None, False, "none")
    compile.apply(list(net.model.layers), Sections(compile=CompileConfig("eager"), **sections))
    return net


class Breaks:
    """A backend that cannot be traced."""

    name = "breaks"

    def prepare(self, ctx, kind):
        pass

    def __call__(self, q, k, v, ctx, kind, scale):
        return q * torch.tensor(q.sum().tolist())


def refused(folder: Path) -> str:
    net = alone(folder)
    net.model.layers[1].self_attn.backend = Breaks()
    with pytest.raises(compile.CompileError) as raised:
        net(rows(SLOTS, 2)[0])
    return str(raised.value)


def test_a_block_that_does_not_compile_is_named(folders):
    said = apart(refused, folders["llama-biases-v5"])
    assert said.startswith("model.layers.1 does not compile with compile.backend='eager'; leave out [compile] to train without: ")


def too_many(folder: Path) -> str:
    net = alone(folder)
    with torch._dynamo.config.patch(recompile_limit=2):
        net(rows(320, 1)[0])
        net(rows(192, 2)[0])
        with pytest.raises(compile.CompileError) as raised:
            net(rows(128, 3)[0])
    return str(raised.value)


def test_too_many_graphs_are_an_error(folders):
    assert apart(too_many, folders["llama-biases-v5"]).startswith("model.layers.0 does not compile")


def settings(folder: Path) -> list[tuple]:
    """torch's before, while a block is called, and after."""
    now = lambda: (functorch.activation_memory_budget, torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint)  # noqa: E731
    net, seen = alone(folder, recompute=RecomputeConfig("budget", budget=0.25), tiling=TilingConfig(mlp=50)), [now()]
    with net.model.layers[0].forward.args[1]():
        seen.append(now())
    net(rows(SLOTS, 2)[0])
    return [*seen, now()]


def test_settings_of_torch_stay_what_they_were(folders):
    assert apart(settings, folders["llama-biases-v5"]) == [(1.0, False), (0.25, True), (1.0, False)]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"compile": CompileConfig("eager"), "recompute": FULL},
            "compile.backend='eager' does not keep dropout masks with recompute.kind='full'; use 'inductor', or lora.dropout=0",
        ),
        (
            {"compile": CompileConfig("eager"), "tiling": TilingConfig(mlp=64)},
            "compile.backend='eager' does not keep dropout masks with tiling.mlp=64; use 'inductor', or lora.dropout=0",
        ),
        (
            {"compile": CompileConfig("aot_eager"), "recompute": RecomputeConfig("budget")},
            "compile.backend='aot_eager' does not keep dropout masks with recompute.kind='budget'; use 'inductor', or lora.dropout=0",
        ),
    ],
)
def test_what_computes_wrongly_is_refused(folders, sections, message):
    arch, axes = Arch.from_folder(folders["gemma3_text"]), sizes(ParallelConfig(), 1)
    with pytest.raises(ConfigError) as raised:
        check(Sections(**sections), axes, arch, LoraConfig(dropout=0.1))
    assert str(raised.value) == message
    check(Sections(**sections), axes, arch, LoraConfig())
    check(Sections(**sections | {"compile": CompileConfig()}), axes, arch, LoraConfig(dropout=0.1))


def wrong(rank: int, world: int, folder: Path, jobs: list[tuple]) -> list[bool]:
    """For each job: are gradients those of eager?"""
    return [equal for equal, _ in against_eager(rank, world, folder, {}, "auto", jobs)]


def test_what_is_refused_does_compute_wrongly(folders, monkeypatch):
    """If this fails, torch has learnt it, and the refusal can go. (Fused blocks have masks of their own.)"""
    monkeypatch.setattr(ops, "_fused", lambda net, asked: (False, ""))
    jobs = [(EAGER, True, RecomputeConfig(), 100, 0.3), (AOT, True, RecomputeConfig("budget", budget=0.3), 0, 0.3)]
    (found,) = run(wrong, 1, folders["llama-biases-v5"], jobs, timeout=120)
    assert found[1] is False
    assert found[0] is (torch.__version__ < "2.13")


# -- order -----------------------------------------------------------------------------------------------------------------


def order(rank: int, world: int, folder: Path, cfg: Sections) -> tuple[list[str], bool]:
    """The report, and is a block's forward compiled around recomputed?"""
    net = model(folder, None, False, "none")
    torch.compile = lambda forward, **_: forward  # in a fork
    report = parallelize(net, Mesh.build(ParallelConfig(), torch.device("cpu")), cfg, torch.float32)
    forward = net.model.layers[0].forward
    return report, forward.func is compile._call and getattr(forward.args[0], "func", None) is checkpoint


def test_the_order_is_tiling_recompute_compile(folders):
    """Each takes the forward that the one before left; the report says what there is."""
    cfg = Sections(compile=CompileConfig(), recompute=ATTENTION, tiling=TilingConfig(mlp=64))
    ((said, nested),) = run(order, 1, folders["gemma3_text"], cfg)
    assert nested
    assert said[0] == "tiling: 64 slots at a time in 4 feed-forward networks, not fused"
    assert said[1].startswith("recompute: selective, keeps attention")
    assert said[2] == "compile: 4 blocks, inductor"
    ((said, nested),) = run(order, 1, folders["gemma3_text"], replace(cfg, recompute=RecomputeConfig("budget")))
    assert not nested
    assert said[-1] == "compile: 4 blocks, inductor, keeps 0.5 of a block's activations"
