"""The mesh of ranks: named axes, their sizes, and the sums over them.

Axes, outermost first: `replicate` (copies of the weights) x `shard` (ranks that hold one copy together). Both carry
data: each rank of the product reads its own packs, and a loss or a gradient is a sum over all of them. A single device
is a mesh of size 1; nothing asks how many ranks there are except to index the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.config import ParallelConfig
from runtime.errors import ConfigError

AXES = ("replicate", "shard")


def sizes(cfg: ParallelConfig, world: int) -> dict[str, int]:
    """The size of each axis at this number of ranks, in the order of AXES.

    Raises:
        ConfigError: the sizes do not multiply to `world`.
    """
    shard = cfg.shard
    if shard == -1:
        if world % cfg.replicate:
            raise ConfigError(
                f"does not divide the {world} ranks of this run; use {_nearest(world, cfg.replicate)}", "parallel.replicate", cfg.replicate
            )
        shard = world // cfg.replicate
    if cfg.replicate * shard != world:
        raise ConfigError(
            f"x parallel.replicate={cfg.replicate} makes {cfg.replicate * shard} ranks, but this run has {world}; "
            f"set parallel.shard=-1 or start {cfg.replicate * shard} ranks",
            "parallel.shard",
            shard,
        )
    return {"replicate": cfg.replicate, "shard": shard}


def _nearest(world: int, wanted: int) -> int:
    """The divisor of `world` closest to `wanted`."""
    return min((d for d in range(1, world + 1) if world % d == 0), key=lambda d: abs(d - wanted))


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run as a grid. `grid` is torch's mesh over AXES."""

    grid: DeviceMesh
    device: torch.device

    @classmethod
    def build(cls, cfg: ParallelConfig, device: torch.device) -> Mesh:
        axes = sizes(cfg, dist.get_world_size())
        return cls(init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes)), device)

    def size(self, axis: str) -> int:
        return self.grid[axis].size()

    @property
    def data_size(self) -> int:
        """Ranks that read different data."""
        return math.prod(self.grid.shape)

    @property
    def data_rank(self) -> int:
        """This rank's place among them, 0 .. data_size - 1."""
        return dist.get_rank()

    def sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values` over all ranks that read different data; forward only. In place, and returned.

        On the host or on the device, wherever `values` lies.
        """
        dist.all_reduce(values)
        return values

    def describe(self) -> str:
        return " x ".join(f"{axis} {size}" for axis, size in zip(self.grid.mesh_dim_names, self.grid.shape))
