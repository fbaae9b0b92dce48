"""Which blocks keep what for the backward pass, so that it fits and as little as possible is computed twice.

A block of a fused model (kernels/regions.py) has three ways, by what it keeps and what that costs:

    all    everything                            nothing
    mlp    everything but gate and up            those two products of the feed-forward network, about half of a block's forward
    full   its input                             the block's forward

Context ranks keep keys and values of others besides, which is not counted here: parallel/recompute.py refuses them.

`choose` takes memory from the cheapest place first: blocks go from `all` to `mlp` one after another until the row fits, then from `mlp`
to `full`. Bytes are exact for what blocks keep (a test counts them); what else lives beside that is an estimate of `room`, on the safe
side.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from model.arch import Arch
from parallel.mesh import Mesh
from runtime.errors import ConfigError

WAYS = ("all", "mlp", "full")
GIB = 1 << 30


def kept(arch: Arch, way: str, compute: torch.dtype, tensor: int, low: int = 0) -> float:
    """Bytes that a block keeps for a slot of this rank's rows. tensor: ranks that share it; low: sum of the ranks of its adapters."""
    size, hidden = compute.itemsize, arch.hidden_size
    if way == "full":
        return size * hidden / tensor
    queries, keys = arch.num_attention_heads * arch.head_dim, arch.num_key_value_heads * arch.head_dim
    numbers = 2 * hidden + 2 * queries + 2 * keys  # two norms' inputs; q, k, v and what attention made of them
    if arch.qk_norm:
        numbers += queries + keys
    if arch.norm == "rms_offset":
        numbers += 2 * hidden  # the inputs of the norms behind both halves
    if way == "all":
        numbers += 2 * arch.intermediate_size
    norms = 4 if arch.norm == "rms_offset" else 2
    return (size * numbers + 4 * (norms + arch.num_attention_heads)) / tensor + size * low


def choose(slots: int, layers: int, bytes_of: dict[str, float], memory: int) -> list[str]:
    """A way for each block. bytes_of: of a slot, by way; memory: bytes that all blocks may keep together.

    Raises:
        ConfigError: not even `full` fits.
    """
    ways = ["all"] * layers
    for before, after in (("all", "mlp"), ("mlp", "full")):
        for i in range(layers):
            if slots * sum(bytes_of[way] for way in ways) <= memory:
                return ways
            assert ways[i] == before
            ways[i] = after
    need = slots * layers * bytes_of["full"]
    if need > memory:
        raise ConfigError(
            f"does not fit: the inputs of {layers} blocks alone take {need / GIB:.3g} GiB and {memory / GIB:.3g} GiB are there; use fewer "
            "data.tokens, a larger parallel.context or parallel.tensor, or offload.activations='hidden_states' with recompute.kind='full'",
            "recompute.kind",
            "fit",
        )
    return ways


def room(net: nn.Module, mesh: Mesh, one_block: float, compute: torch.dtype) -> int:
    """Bytes of a device that are left for what blocks keep, the fewest of any rank: nine tenths of what is free now, less weights,
    gradients, moments, all weights once more in the compute dtype where ranks share them (not every policy gives them up between
    passes), one block's passing tensors and two buffers of logits. The model is still on meta. A collective."""
    tensor, shared = mesh.axes["tensor"], mesh.axes["shard"] * mesh.axes["context"]
    numbers = sum(p.numel() for p in net.parameters()) / tensor
    resident = sum(p.numel() * (p.element_size() + (4 + 8 if p.requires_grad else 0)) for p in net.parameters()) / tensor / shared
    gathered = numbers * compute.itemsize if shared > 1 else 0
    free, _ = torch.cuda.mem_get_info(mesh.device)
    left = torch.tensor(0.9 * free - resident - gathered - 2 * one_block - 2 * (net.logits_bytes or GIB), device=mesh.device)
    if dist.is_initialized():  # ranks that chose differently would exchange different things
        dist.all_reduce(left, dist.ReduceOp.MIN)
    return int(left)
