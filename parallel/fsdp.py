"""Sharded data parallelism with FSDP2: one unit a block, one for the rest.

Forward: a unit's weights are all-gathered in the compute dtype. Backward: its gradients are reduce-scattered as sums, in fp32
unless `precision.reduce` says otherwise. The divide factor is 1 because the loss is already divided by the global number of units
(objective/). Embedding, final norm and head are one unit, the root's: a tied weight may not lie in two.

When gathered weights are given up (`parallel.reshard`; ZeRO is arXiv 1910.02054):

    forward     after a block's forward, gathered again for its backward                       ZeRO-3
    backward    after its backward                                                              ZeRO-2
    step        after the last backward of the step: micro-batches share one gathering          ZeRO-2, fewer gatherings
    n           after the forward, down to a part of 1/n; the backward gathers among n ranks    ZeRO++'s hpZ (arXiv 2306.10209)

Replicate-only is HSDP whose shard axis has size 1. On a mesh of size 1 nothing is wrapped: FSDP2 would copy every
parameter, and `Linear` and the norms cast their weights at use. The exception is `offload.parameters`, where the copy is what is
wanted: weights lie in host memory, a unit's visit the device, gradients go back, and the optimizer works on the host.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from parallel.config import ParallelConfig, Sections
from parallel.mesh import Mesh
from runtime.errors import ConfigError

REDUCE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check(cfg: ParallelConfig, axes: dict[str, int]) -> None:
    """Can gathered weights be given up as asked?

    Raises:
        ConfigError: no; with the numbers, and a choice that works.
    """
    n, ranks = cfg.reshard, axes["shard"] * axes["context"]
    if isinstance(n, str):
        return
    if axes["tensor"] > 1:  # torch makes the groups of n from this rank's row of the mesh alone, and all ranks must make the same ones
        raise ConfigError(
            f"as a number does not work with parallel.tensor={axes['tensor']}; use parallel.reshard='forward' or 'backward'",
            "parallel.reshard",
            n,
        )
    if ranks % n:
        best = max(d for d in range(1, min(n, ranks) + 1) if ranks % d == 0)
        use = f"parallel.reshard={best}" if best > 1 else "parallel.reshard='backward'"
        raise ConfigError(f"does not divide the {ranks} ranks that share the weights (shard x context); use {use}", "parallel.reshard", n)


def shard(net: nn.Module, blocks: list[nn.Module], mesh: Mesh, cfg: Sections, compute: torch.dtype) -> None:
    """Shards `net` in place over the mesh; parameters become DTensors (still on meta), state-dict names stay."""
    copies, parts = mesh.weights["replicate"].size(), mesh.weights["fsdp"].size()
    if copies * parts == 1 and not cfg.offload.parameters:
        return
    grid = mesh.weights["replicate", "fsdp"] if copies > 1 else mesh.weights["fsdp"]
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=REDUCE[cfg.precision.reduce], cast_forward_inputs=False)
    home = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if cfg.offload.parameters else OffloadPolicy()
    reshard = {"forward": True, "backward": False, "step": False}.get(cfg.parallel.reshard, cfg.parallel.reshard)
    for unit in (*blocks, net):
        # the root's weights are used at the start and at the end of the forward pass: torch keeps them in between
        fully_shard(unit, mesh=grid, mp_policy=policy, offload_policy=home, reshard_after_forward=None if unit is net else reshard)
        unit.set_gradient_divide_factor(1.0)
        if dist.get_backend(grid.get_group(0)) != "nccl":
            # gloo has no PREMUL_SUM, which a divide factor other than the world size would otherwise use
            unit.set_force_sum_reduction_for_comms(True)
    if (ahead := cfg.parallel.prefetch) > 1:  # one is what FSDP2 does by itself
        for i, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + ahead])
            block.set_modules_to_backward_prefetch(blocks[max(0, i - ahead) : i][::-1])


def last_backward(net: nn.Module, last: bool, cfg: ParallelConfig) -> None:
    """Say before a micro-batch whether it is the step's last: copies of the weights exchange gradients only then, and weights that
    are gathered once a step are given up."""
    if isinstance(net, FSDPModule):
        net.set_requires_all_reduce(last)
        if cfg.reshard == "step":
            net.set_reshard_after_backward(last)
