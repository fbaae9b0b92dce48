"""Turns a model on meta into its distributed form. The order is written here, once, straight down."""

from __future__ import annotations

import torch
from torch import nn

from parallel import fsdp, recompute, tensor
from parallel.config import RecomputeConfig
from parallel.mesh import Mesh


def parallelize(net: nn.Module, mesh: Mesh, recompute_cfg: RecomputeConfig, compute: torch.dtype) -> None:
    """Split matrices, then recompute, then shard: FSDP2 shards what tensor parallelism left to a rank, and its hooks must
    surround a block as a whole, recomputation included."""
    blocks = list(net.model.layers)
    tensor.split(net, mesh.weights["tensor"])
    recompute.apply(blocks, recompute_cfg)
    fsdp.shard(net, blocks, mesh, compute)
