"""Tiling: the same numbers a piece at a time, with less in memory."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import linear_logprob as head
from model.arch import Arch
from model.decoder import Decoder
from model.ffn import FeedForward, gated
from objective import lm
from parallel import tiling
from parallel.config import ParallelConfig, PrecisionConfig, RecomputeConfig, TilingConfig
from parallel.context import split
from parallel.local import run
from parallel.mesh import AXES, Mesh
from tests.model.golden import GOLDEN, distance, write_config
from tests.parallel.test_layouts import VOCAB, backward, grads, long_rows, model, rows
from tests.parallel.watch import Watch
from tests.tiny import LLAMA

BUDGET = 192


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    names = ("llama-biases-v5", "gemma3_text")
    assert all(GOLDEN[name]["vocab_size"] == VOCAB for name in names)
    return {name: write_config(tmp_path_factory.mktemp("golden"), name, initializer_range=0.2) for name in names}


def errors(found: Decoder, want: Decoder, micro: list) -> tuple[float, float]:
    """Of the loss and, at most, of a gradient."""
    losses = [backward(net, micro, 100, seed=7) for net in (found, want)]
    reference = grads(want)
    return abs(losses[0] - losses[1]) / losses[1], max(distance(g, reference[name]) for name, g in grads(found).items())


# -- one rank --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("family", ["llama-biases-v5", "gemma3_text"])
def test_a_model_has_the_same_loss_and_gradients(folders, family, lora):
    micro, want = rows(BUDGET, 2), model(folders[family], None, lora, "none")
    for tile in (20, 64, 191, 192, 1000):
        net = model(folders[family], None, lora, "none")
        assert tiling.apply(net, TilingConfig(mlp=tile), 1) == [
            f"tiling: {tile} slots at a time in {len(net.model.layers)} feed-forward networks, not fused"
        ]
        assert max(errors(net, want, micro)) < 1e-6
        assert net.state_dict().keys() == want.state_dict().keys()
        want.zero_grad(set_to_none=True)


@pytest.fixture
def network(tmp_path):
    """network(dtype) -> a feed-forward network, 32 wide and 256 within, with the same bf16 numbers in any dtype."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": VOCAB, "intermediate_size": 256}))

    def make(dtype: torch.dtype) -> FeedForward:
        ffn, g = FeedForward(Arch.from_folder(tmp_path)), torch.Generator().manual_seed(0)
        for p in ffn.parameters():
            p.data = (torch.randn(p.shape, generator=g) / p.shape[1] ** 0.5).bfloat16().to(dtype)
        return ffn

    return make


def derivatives(ffn: FeedForward, x: Tensor, grad: Tensor, compute=gated) -> list[Tensor]:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(compute(ffn, x), [x, *ffn.parameters()], grad)


def test_gradients_of_weights_add_up_in_fp32_and_are_rounded_once(network):
    """A thousand tiles in bf16: as exact as one product, where adding up in bf16 is far off."""
    g = torch.Generator().manual_seed(1)
    x, grad = ((torch.randn(2048, 32, generator=g) + 0.5).bfloat16() for _ in range(2))
    exact, errors = derivatives(network(torch.float64), x.double(), grad.double()), {}
    for name, impl in (
        ("whole", gated),
        ("tiled", tiling.Tiled(2, 1).tiles),
        ("as autograd would", lambda net, x: torch.cat([gated(net, tile) for tile in x.split(2)])),
    ):
        errors[name] = [distance(a, b) for a, b in zip(derivatives(network(torch.bfloat16), x, grad, impl), exact)]
    assert max(errors["whole"]) < 1e-2
    assert all(a < 1.1 * b for a, b in zip(errors["tiled"], errors["whole"]))
    assert min(errors["as autograd would"][1:]) > 3 * max(errors["tiled"][1:])


def test_a_row_computes_alike_in_any_tile(network):
    """The input's gradient to the bit, and in tiles of one slot all of them."""
    x, grad = (torch.randn(64, 32, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(2))
    want = derivatives(network(torch.float64), x, grad)
    for tile in (1, 16, 30, 32):
        found = derivatives(network(torch.float64), x, grad, tiling.Tiled(tile, 1).tiles)
        assert tile == 1 or torch.equal(found[0], want[0])
        assert max(map(distance, found, want)) < 1e-14


def test_less_lives_at_a_time(network):
    x, most, kept = torch.randn(512, 32), [], []
    for tile in (512, 32):
        ffn = network(torch.float32)
        with Watch() as watch:
            y = tiling.Tiled(tile, 1).tiles(ffn, x.clone().requires_grad_())
            kept.append(watch.live())
            y.square().sum().backward()
        most.append(watch.peak)
    row, wide = x.nbytes, 512 * 256 * 4
    assert kept[1] < 2 * row + row // 2 < 2 * wide < kept[0]  # the input and the output
    weights = 3 * 32 * 256 * 4
    assert most[1] < 5 * row + 4 * weights + 8 * wide // 16 < most[0] / 2


def test_dropout_is_the_same_in_the_recomputation(folders, monkeypatch):
    found = []
    for recomputed in (True, False):
        if not recomputed:
            monkeypatch.setattr(tiling, "checkpoint", lambda f, *args, use_reentrant: f(*args))
        net = model(folders["llama-biases-v5"], None, True, "none", dropout=0.3)
        tiling.apply(net, TilingConfig(mlp=50), 1)
        backward(net, rows(BUDGET, 2), 100, seed=7)
        found.append(grads(net))
    plain = model(folders["llama-biases-v5"], None, True, "none")
    backward(plain, rows(BUDGET, 2), 100, seed=7)
    assert max(distance(found[0][n], g) for n, g in grads(plain).items()) > 0.1  # the masks matter
    assert all(torch.equal(found[0][n], g) for n, g in found[1].items())


# -- ranks -----------------------------------------------------------------------------------------------------------------


def rank_errors(rank: int, world: int, folder: Path, axes: dict, jobs: list) -> list[tuple[float, float]]:
    mesh, found = Mesh.build(ParallelConfig(**axes), torch.device("cpu")), []
    micro = [split(row, mesh) for row in rows(BUDGET, 2)]
    for tile, lora, again in jobs:
        want = model(folder, mesh, lora, "none")
        net = model(folder, mesh, lora, again, tiling=TilingConfig(mlp=tile))
        found.append(errors(net, want, micro))
    return found


JOBS = [
    (64, False, "none"),
    (50, True, "full"),
    (20, False, RecomputeConfig("selective", save=("attention", "collectives"))),
    (20, True, "none"),
]


@pytest.mark.parametrize(
    ("family", "axes"),
    [
        ("llama-biases-v5", (1, 2, 1, 1)),
        ("llama-biases-v5", (1, 1, 1, 2)),
        ("llama-biases-v5", (1, 2, 1, 2)),
        ("gemma3_text", (1, 1, 2, 1)),
        ("gemma3_text", (1, 1, 1, 2)),
    ],
    ids=str,
)
def test_ranks_have_the_same_loss_and_gradients(folders, family, axes):
    """Under tensor parallelism a tile is the same piece of every rank's rows; another cut would shuffle them."""
    for found in run(rank_errors, math.prod(axes), folders[family], dict(zip(AXES, axes)), JOBS):
        assert max(max(pair) for pair in found) < 1e-6, found


def sharded_in_bf16(rank: int, world: int, folder: Path) -> list[float]:
    """Errors of gradients against fp32, untiled and tiled, under FSDP2 with bf16 weights."""
    mesh, micro, found = Mesh.build(ParallelConfig(), torch.device("cpu")), long_rows()[rank::world], []
    exact = model(folder, mesh, False, "none")
    backward(exact, micro, 1000)
    want = grads(exact)
    for tile in (0, 4):  # hundreds of tiles
        net = model(folder, mesh, False, "none", compute=torch.bfloat16, precision=PrecisionConfig("bf16"), tiling=TilingConfig(mlp=tile))
        backward(net, micro, 1000)
        found.append(max(distance(g, want[n]) for n, g in grads(net).items() if ".mlp." in n))
    return found


def test_bf16_weights_of_fsdp_are_as_exact_in_tiles(folders):
    for whole, tiled in run(sharded_in_bf16, 2, folders["llama-biases-v5"]):
        assert 1e-4 < whole < 5e-2
        assert tiled < 1.1 * whole


# -- logits ----------------------------------------------------------------------------------------------------------------


def test_the_buffer_of_logits_is_as_large_as_asked(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": 4096, "initializer_range": 0.2}))
    chunks, found = [], []
    cut = head._chunks
    monkeypatch.setattr(head, "_chunks", lambda rows, size: chunks.append(len(cut(rows, size))) or cut(rows, size))
    row = rows(320, 1)[0]
    for mib in (0, 1):
        net = model(tmp_path, None, False, "none")
        assert tiling.apply(net, TilingConfig(logits_mib=mib), 1) == []
        loss = lm.loss(net, row, 100)
        loss.backward()
        found.append((loss.item(), grads(net)))
    assert chunks == [1, -(-lm.count(row) // 64)]  # 64 rows of 4096 fp32 logits are 1 MiB
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert max(distance(found[0][1][n], g) for n, g in found[1][1].items()) < 1e-6
