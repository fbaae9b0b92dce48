"""Which blocks keep what for the backward pass, so that it fits and as little as possible is computed twice.

A block of a fused model (kernels/regions.py) has five ways, by what it keeps on the device and what that costs:

    all        everything                            nothing
    mlp_8bit   gate and up in 8 bits                 precision of gradients
    mlp        everything but gate and up            those two products of the feed-forward network, about half of a block's forward
    full       its input                             the block's forward
    offload    nothing: what it keeps by the way     copies to host memory and back, beside what is computed
               before is in host memory

Context ranks keep keys and values of others besides, which is not counted here: parallel/recompute.py refuses them.

`choose` takes memory from the cheapest place first: blocks go from `all` to the first of the ways that are allowed (`recompute.ways`) one
after another until the row fits, then on to the next way. Bytes are exact for what blocks keep (a test counts them); what else lives
beside that is an estimate of `room`, on the safe side.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn

from model.arch import Arch
from model.linear import Linear
from parallel.activations import IN_FLIGHT
from parallel.config import WAYS
from parallel.mesh import Mesh
from runtime.errors import ConfigError

GIB = 1 << 30
SAID = {
    "all": "everything",
    "mlp_8bit": "gate and up in 8 bits",
    "mlp": "all but gate and up",
    "full": "their input",
    "offload": "theirs in host memory",
}


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
    packed = 0.0
    if way == "all":
        numbers += 2 * arch.intermediate_size
    elif way == "mlp_8bit":
        packed = 2 * (arch.intermediate_size / tensor + 4)  # and a scale for each row
    norms = 4 if arch.norm == "rms_offset" else 2
    return (size * numbers + 4 * (norms + arch.num_attention_heads)) / tensor + size * low + packed


def ranks(blocks: Iterable[nn.Module]) -> int:
    """The most that the ranks of a block's adapters add up to."""
    linears = [[m for m in block.modules() if isinstance(m, Linear) and m.adapter is not None] for block in blocks]
    return max(sum(m.lora_A.weight.shape[0] for m in mine) for mine in linears)


def table(arch: Arch, ways: Iterable[str], compute: torch.dtype, tensor: int, low: int) -> dict[str, float]:
    """`kept` for everything and for the allowed `ways`, from the most to the least. Of `offload`: what is in host memory."""
    chain = ["all", *sorted(set(ways) - {"offload"}, key=WAYS.index)]
    found = {way: kept(arch, way, compute, tensor, low) for way in chain}
    return found | ({"offload": found[chain[-1]]} if "offload" in ways else {})


def held(slots: int, ways: list[str], bytes_of: dict[str, float]) -> float:
    """Bytes of the device. Of blocks that wait in host memory a few are there, on their way."""
    away = ways.count("offload")
    return slots * (sum(bytes_of[way] for way in ways if way != "offload") + min(away, IN_FLIGHT + 1) * bytes_of.get("offload", 0.0))


def choose(slots: int, layers: int, bytes_of: dict[str, float], memory: int) -> list[str]:
    """A way for each block. bytes_of: `table`, whose ways are taken in their order; memory: bytes that all blocks may keep together.

    Raises:
        ConfigError: not even the last way fits.
    """
    ways = [next(iter(bytes_of))] * layers
    for before, after in pairwise(bytes_of):
        for many in range(layers):
            if held(slots, ways, bytes_of) <= memory:
                return ways
            # copies need the time of blocks that have none: those are spread, the others are the first ones
            chosen = {j * layers // (many + 1) for j in range(many + 1)} if after == "offload" else range(many + 1)
            ways = [after if i in chosen else before for i in range(layers)]
    if (need := held(slots, ways, bytes_of)) > memory:
        more = "" if "offload" in bytes_of else ", or 'offload' among recompute.ways"
        raise ConfigError(
            f"does not fit: as {ways[0]!r} {layers} blocks take {need / GIB:.3g} GiB and {memory / GIB:.3g} GiB are there; use fewer "
            f"data.tokens, a larger parallel.context or parallel.tensor{more}",
            "recompute.kind",
            "fit",
        )
    return ways


def describe(slots: int, ways: list[str], bytes_of: dict[str, float], memory: int) -> str:
    """The line of the start-up report."""
    counts = ", ".join(f"{ways.count(way)} keep {what}" for way, what in SAID.items() if way in ways)
    return f"recompute: fit, of {len(ways)} blocks {counts}: {held(slots, ways, bytes_of) / GIB:.3g} of {memory / GIB:.3g} GiB"


def room(net: nn.Module, mesh: Mesh, one_block: float, compute: torch.dtype) -> int:
    """Bytes of a device that are left for what blocks keep, the fewest of any rank: nine tenths of what is free now, less weights,
    gradients, moments, all weights once more in the compute dtype where ranks share them (not every policy gives them up between
    passes), one block's passing tensors and two buffers of logits. The model is still on meta. A collective."""
    tensor, shared = mesh.axes["tensor"], mesh.axes["shard"] * mesh.axes["context"]
    numbers = sum(p.numel() for p in net.parameters()) / tensor
    resident = sum(p.numel() * (p.element_size() + (4 + 8 if p.requires_grad else 0)) for p in net.parameters()) / tensor / shared
    gathered = numbers * compute.itemsize if shared > 1 else 0
    head = (net.lm_head or net.model.embed_tokens).weight
    gathered += head.numel() * 4 / tensor if head.requires_grad else 0  # its gradient of one micro-batch, whole
    free, _ = torch.cuda.mem_get_info(mesh.device)
    left = 0.9 * free - resident - gathered - 2 * one_block - 2 * (net.logits_bytes or GIB)
    left = torch.tensor(left, dtype=torch.float64, device=mesh.device)
    if dist.is_initialized():  # ranks that chose differently would exchange different things
        dist.all_reduce(left, dist.ReduceOp.MIN)
    return int(left)
