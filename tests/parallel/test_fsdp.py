"""When FSDP2 gives gathered weights up, how far ahead it gathers, in what it reduces: seen in what a step gathers and holds.

That results do not change is in test_invariance.py; here dry runs (tools/plan.py) count.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.arch import Arch
from parallel.apply import check
from parallel.config import ParallelConfig
from parallel.local import apart
from parallel.mesh import Mesh, sizes
from runtime.config import load
from runtime.errors import ConfigError
from tests.tiny import Sections, write_model
from tools import plan
from train import RunConfig

ROOT = Path(__file__).resolve().parent.parent.parent
LAYERS = 6


@pytest.fixture(scope="module")
def arch(tmp_path_factory) -> Arch:
    return Arch.from_folder(write_model(tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS))


def profile(world: int, arch: Arch, words: list[str]) -> plan.Profile:
    cfg = load(RunConfig, ROOT / "train_configs/debug/full.toml", ["--precision.compute=bf16", *words])
    with plan.fake_ranks(world):
        return plan.dry_step(cfg, arch, Mesh.build(cfg.parallel, torch.device("cpu")))


def numbers(arch: Arch) -> tuple[int, int]:
    """(of a block, of the rest)"""
    from model import build

    net = build(arch)
    block = sum(p.numel() for p in net.model.layers[0].parameters())
    return block, sum(p.numel() for p in net.parameters()) - LAYERS * block


@pytest.mark.parametrize(
    ("reshard", "gatherings"),
    [("forward", 2 * 3), ("backward", 3), ("step", 1)],
)
def test_weights_are_gathered_as_often_as_said(arch, reshard, gatherings):
    """In a step of 3 micro-batches on 4 ranks; gradients are reduced in each."""
    found = apart(profile, 4, arch, [f"--parallel.reshard={reshard}", "--train.accumulate=3"])
    block, rest = numbers(arch)
    gathered = LAYERS * block * gatherings + rest * (1 if reshard == "step" else 3)
    reduced = 3 * (LAYERS * block + rest)
    assert found.traffic["fsdp"] == pytest.approx((2 * gathered + 4 * reduced) * 3 / 4, rel=0.02)


def test_weights_that_are_kept_are_in_memory(arch):
    """Between forward and backward."""
    forward, two, backward = (
        apart(profile, 4, arch, [f"--parallel.reshard={n}"]).moments["head, forward"] for n in ("forward", "2", "backward")
    )
    block, rest = numbers(arch)
    assert forward["gathered"] == pytest.approx(2 * rest, rel=0.1)
    assert backward["gathered"] == pytest.approx(2 * (rest + LAYERS * block), rel=0.1)
    total = [sum(moment.values()) for moment in (forward, two, backward)]
    assert total[1] - total[0] == pytest.approx(2 * LAYERS * block / 2, rel=0.15)  # half of each block's weights
    assert total[0] < total[1] < total[2]


def test_a_smaller_group_gathers_for_the_backward(arch):
    """Down to 2 of 8 ranks after the forward: the backward receives half of what it needs, not seven eighths."""
    whole, part = (apart(profile, 8, arch, [f"--parallel.reshard={n}"]).traffic["fsdp"] for n in ("forward", "2"))
    block, _ = numbers(arch)
    assert whole - part == pytest.approx(2 * LAYERS * block * (7 / 8 - 1 / 2), rel=0.1)


def test_prefetching_gathers_ahead(arch):
    one, three = (apart(profile, 4, arch, [f"--parallel.prefetch={n}"]).moments for n in (1, 3))
    block, _ = numbers(arch)
    for moment in ("block 1, forward", "last block, backward"):
        ahead = sum(three[moment].values()) - sum(one[moment].values())
        assert 2 * 2 * block * 0.9 <= ahead < 3 * 2 * block * 1.1, moment


def test_reducing_in_bf16_halves_the_traffic_of_gradients(arch):
    wide, narrow = (apart(profile, 4, arch, [f"--precision.reduce={kind}"]).traffic["fsdp"] for kind in ("fp32", "bf16"))
    block, rest = numbers(arch)
    assert wide - narrow == pytest.approx(2 * (LAYERS * block + rest) * 3 / 4, rel=0.02)


@pytest.mark.parametrize(
    ("layout", "world", "message"),
    [
        (
            {"reshard": 3},
            4,
            r"parallel.reshard=3 does not divide the 4 ranks that share the weights \(shard x context\); use parallel.reshard=2",
        ),
        ({"reshard": 4}, 3, r"parallel.reshard=4 does not divide the 3 ranks .*; use parallel.reshard=3"),
        ({"reshard": 2}, 1, r"parallel.reshard=2 does not divide the 1 ranks .*; use parallel.reshard='backward'"),
        (
            {"reshard": 2, "tensor": 2},
            4,
            "parallel.reshard=2 as a number does not work with parallel.tensor=2; use parallel.reshard='forward' or",
        ),
    ],
)
def test_refusals(arch, layout, world, message):
    cfg = ParallelConfig(**layout)
    with pytest.raises(ConfigError, match=message):
        check(Sections(cfg), sizes(cfg, world), arch, None)


@pytest.mark.parametrize(("key", "value"), [("reshard", 1), ("reshard", 0), ("prefetch", 0)])
def test_values_that_mean_nothing(key, value):
    with pytest.raises(ConfigError, match="must be at least"):
        ParallelConfig(**{key: value})
