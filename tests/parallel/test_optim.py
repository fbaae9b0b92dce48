"""The optimizer of one launch over sharded parameters: ranks end with the parts of what torch's AdamW makes of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from kernels import launch
from optim.adamw import OneLaunch, build
from optim.clip import clip
from optim.config import AdamWConfig
from parallel.local import run

pytestmark = pytest.mark.skipif(launch.triton is None, reason="triton is not installed")
LAYOUTS = {"even": ((8, 6), Shard(0)), "uneven": ((5, 3), Shard(0)), "one row": ((1, 9), Shard(0)), "copies": ((7,), Replicate())}
CFG = {"lr": 0.1, "weight_decay": 0.2}


def rank_of_two(rank: int, world: int) -> int:
    mesh, g = init_device_mesh("cpu", (world,)), torch.Generator().manual_seed(0)
    whole = {name: nn.Parameter(torch.randn(shape, generator=g)) for name, (shape, _) in LAYOUTS.items()}
    before = {name: p.detach().clone() for name, p in whole.items()}
    parts = {name: nn.Parameter(distribute_tensor(whole[name].detach().clone(), mesh, [place])) for name, (_, place) in LAYOUTS.items()}
    ours, theirs = build(parts.items(), AdamWConfig(**CFG, impl="triton")), build(whole.items(), AdamWConfig(**CFG, impl="torch"))
    assert isinstance(ours, OneLaunch)
    for _ in range(3):
        for name, (shape, place) in LAYOUTS.items():
            grad = torch.randn(shape, generator=g)
            whole[name].grad = grad.clone()
            if place.is_shard():
                parts[name].grad = distribute_tensor(grad, mesh, [place])
            else:  # as of a norm under sequence parallelism: each rank has its share of the sum
                parts[name].grad = DTensor.from_local(grad * (0.25 if rank else 0.75), mesh, [Partial()])
        with pytest.raises(RuntimeError, match=r"clip\(\) brings them together"):
            ours.step()
        norms = clip(parts.values(), 1.0, ours), clip(whole.values(), 1.0)
        torch.testing.assert_close(*norms)
        assert norms[0] > 1
        for opt in (ours, theirs):
            opt.step()
            opt.zero_grad()
    for name, p in parts.items():
        torch.testing.assert_close(p.full_tensor(), whole[name].detach(), rtol=1e-5, atol=1e-6)
        assert (whole[name] - before[name]).abs().mean() > 0.05
        for key in ("exp_avg", "exp_avg_sq"):
            assert ours.state[p][key].placements == p.placements
            torch.testing.assert_close(ours.state[p][key].full_tensor(), theirs.state[whole[name]][key], rtol=1e-5, atol=1e-7)
        assert ours.state[p]["step"] == 3
    return p.to_local().numel() + parts["one row"].to_local().numel()


def test_over_two_ranks():
    assert run(rank_of_two, 2) == [16, 7], "the second rank holds nothing of one row"
