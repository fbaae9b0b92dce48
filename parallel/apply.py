"""Turns a model on meta into its distributed form. The order is written here, once, straight down."""

from __future__ import annotations

import torch
from torch import nn

from parallel import fsdp, recompute
from parallel.config import RecomputeConfig
from parallel.mesh import Mesh


def parallelize(net: nn.Module, mesh: Mesh, recompute_cfg: RecomputeConfig, compute: torch.dtype) -> None:
    """Recompute first, then shard: FSDP2's hooks must surround the block as a whole, recomputation included."""
    blocks = list(net.model.layers)
    recompute.apply(blocks, recompute_cfg)
    fsdp.shard(net, blocks, mesh, compute)
