"""Sharded data parallelism with FSDP2: one unit a block, one for the rest.

Forward: a unit's weights are all-gathered in the compute dtype. Backward: its gradients are reduce-scattered as sums in
fp32. The divide factor is 1 because the loss is already divided by the global number of units (objective/). Embedding,
final norm and head are one unit, the root's: a tied weight may not lie in two.

Replicate-only is HSDP whose shard axis has size 1. On a mesh of size 1 nothing is wrapped: FSDP2 would copy every
parameter, and `Linear` and the norms cast their weights at use.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from parallel.mesh import Mesh


def shard(net: nn.Module, blocks: list[nn.Module], mesh: Mesh, compute: torch.dtype) -> None:
    """Shards `net` in place over the mesh; parameters become DTensors (still on meta), state-dict names stay."""
    copies, parts = mesh.weights["replicate"].size(), mesh.weights["fsdp"].size()
    if copies * parts == 1:
        return
    grid = mesh.weights["replicate", "fsdp"] if copies > 1 else mesh.weights["fsdp"]
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in (*blocks, net):
        fully_shard(unit, mesh=grid, mp_policy=policy)
        unit.set_gradient_divide_factor(1.0)
        if dist.get_backend(grid.get_group(0)) != "nccl":
            # gloo has no PREMUL_SUM, which a divide factor other than the world size would otherwise use
            unit.set_force_sum_reduction_for_comms(True)


def last_backward(net: nn.Module, last: bool) -> None:
    """Say before a micro-batch whether it is the step's last: copies of the weights exchange gradients only then."""
    if isinstance(net, FSDPModule):
        net.set_requires_all_reduce(last)
