"""The mesh of ranks: named axes, their sizes, and the sums over them.

Axes, outermost first:

    replicate   copies of the weights
    shard       ranks that hold one copy together (FSDP2)
    context     ranks that hold one row of tokens together
    tensor      ranks that hold one matrix together; neighbours, so that they share a node

Two names are reserved: `pipeline`, outside of replicate, and `expert`, which will divide shard x context for the experts' weights and leave
the other axes as they are.

Ranks along replicate and shard read packs of their own; those along context and tensor share one. Weights are sharded over
shard x context (context ranks hold different tokens, so their gradients add up like any data rank's). A single device is a
mesh of size 1: nothing else asks how many ranks there are.
"""

from __future__ import annotations

import datetime
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from parallel.config import ParallelConfig
from runtime.errors import ConfigError

AXES = ("replicate", "shard", "context", "tensor")


def sizes(cfg: ParallelConfig, world: int) -> dict[str, int]:
    """The size of each axis at this number of ranks, in the order of AXES.

    Raises:
        ConfigError: the sizes do not multiply to `world`; with the nearest that do.
    """
    found = {axis: getattr(cfg, axis) for axis in AXES}
    some = "a multiple of " if found["shard"] == -1 else ""
    made = math.prod(n for n in found.values() if n != -1)
    if world % made or (world != made and not some):
        set_ = " x ".join(f"{axis}={n}" for axis, n in found.items() if n not in (1, -1)) or "shard=1"
        start = f"{some}{made} rank{'s' * (made > 1)}"
        raise ConfigError(
            f"{set_} needs {start}, but this run has {world}; use {nearest(cfg, world)}, or start {start}{' with torchrun' * (world == 1)}",
            "parallel",
        )
    if some:
        found["shard"] = world // made
    return found


def nearest(cfg: ParallelConfig, world: int, fits: Callable[[dict[str, int]], bool] = lambda axes: True) -> str:
    """What to set in `cfg` for the layout of `world` ranks that `fits` and is the nearest to the one asked for.

    Near is where few axes change, and by small factors; sizes of `shard`, which decide where weights lie and not who computes
    what, change more easily.
    """
    asked = {axis: n for axis in AXES if (n := getattr(cfg, axis)) != -1}

    def far(axes: dict[str, int]) -> float:
        return sum(abs(math.log(axes[axis] / n)) * (0.5 if axis == "shard" else 1.0) for axis, n in asked.items())

    axes = next(axes for axes in sorted(_layouts(world), key=far) if fits(axes))
    return " and ".join(f"parallel.{axis}={axes[axis]}" for axis, n in asked.items() if axes[axis] != n)


def _layouts(world: int) -> list[dict[str, int]]:
    """All sizes of the axes that multiply to `world`."""
    divisors, found = [n for n in range(1, world + 1) if world % n == 0], [()]
    for _ in AXES[1:]:
        found = [(*few, n) for few in found for n in divisors if world % (math.prod(few) * n) == 0]
    return [dict(zip(AXES, (world // math.prod(few), *few))) for few in found]


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run as a grid, in two views.

    weights: replicate x fsdp x tensor, fsdp being shard x context: where parameters live.
    tokens: data x context x tensor, data being replicate x shard: who computes which tokens.
    """

    weights: DeviceMesh
    tokens: DeviceMesh
    axes: dict[str, int]
    device: torch.device

    @classmethod
    def build(cls, cfg: ParallelConfig, device: torch.device) -> Mesh:
        # torch warns of every reduction over two mesh axes that could be one; it is a scalar norm a step here
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        axes = sizes(cfg, dist.get_world_size())
        r, s, c, t = axes.values()
        weights = init_device_mesh(device.type, (r, s * c, t), mesh_dim_names=("replicate", "fsdp", "tensor"))
        tokens = init_device_mesh(device.type, (r * s, c, t), mesh_dim_names=("data", "context", "tensor"))
        if dist.get_backend() != "fake":  # groups that a mesh makes do not have the limit of the first one
            for group in (*weights.get_all_groups(), *tokens.get_all_groups()):
                _set_pg_timeout(datetime.timedelta(seconds=cfg.timeout_s), group)
        return cls(weights, tokens, axes, device)

    @property
    def data_size(self) -> int:
        """Ranks along the axes that read different packs."""
        return self.tokens["data"].size()

    @property
    def data_rank(self) -> int:
        return self.tokens["data"].get_local_rank()

    @property
    def leads(self) -> bool:
        """Is this the first of all ranks?"""
        return dist.get_rank() == 0

    @property
    def size(self) -> int:
        """All ranks."""
        return self.tokens.size()

    def sum_over_data(self, values: torch.Tensor, votes: int = 0) -> torch.Tensor:
        """Sum of `values` over all ranks that hold different tokens, known to every rank; forward only. In place, and returned.

        Tensor-parallel ranks hold the same tokens: one of them counts. But the last `votes` values are of ranks, not of
        tokens, and count from each.
        """
        if self.tokens["tensor"].get_local_rank() > 0:
            (values[:-votes] if votes else values).zero_()
        dist.all_reduce(values)
        return values

    def sum_over_context(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values` over the ranks that share this one's rows of tokens; forward only. In place, and returned."""
        dist.all_reduce(values, group=self.tokens.get_group("context"))
        return values

    def describe(self) -> str:
        return "mesh: " + " x ".join(f"{axis} {size}" for axis, size in self.axes.items())
