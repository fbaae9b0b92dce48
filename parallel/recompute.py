"""Activation checkpointing in place: no wrapper modules, so names in the state dict stay what they are.

A recomputed block keeps its input, and its forward runs again in the backward pass, with the same dropout masks
(https://arxiv.org/abs/1604.06174). It is torch's non-reentrant checkpoint, which runs again only up to the last value that the
backward needs.

    full       every block
    every_n    blocks 0, n, 2n, ...; the others keep everything
    selective  every block, but results of the operators in `save` are kept, so these do not run twice
    mlp        no block as a whole, but in each the products before the gate (kernels/regions.py)
    mlp_8bit   nothing, but the results of those are kept in 8 bits: the one kind that changes gradients
    fit        as few blocks as possible in one of the `ways` (parallel/fit.py)
    budget     not here: the compiler's partitioner decides what to keep (parallel/compile.py)

`save` names operators (`aten.mm`, `salamander.varlen`; with an overload, `aten.mm.default`, that one alone) or a group:

    attention    the forward of attention, whichever kernel computes it: O(T^2) work for O(T) bytes
    matmul       matrix products: most of the rest of the work, and most of the bytes
    collectives  exchanges between ranks: a second one costs time on the network

Gradients are those without recomputation, bit for bit, but for mlp_8bit, as a kind or a way.
"""

from __future__ import annotations

import difflib
from functools import partial

import torch
from torch import nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kernels.attention import attention_ops
from model.transforms.ops import feed_forward
from parallel import fit
from parallel.activations import InMemory, Keeper
from parallel.config import RecomputeConfig, Sections
from parallel.context import RING
from parallel.mesh import Mesh
from parallel.transfer import Lane
from runtime.errors import ConfigError

# by name, since some exist only in some versions of torch
MATMUL = (
    "salamander.products",
    "aten.mm",
    "aten.addmm",
    "aten.bmm",
    "aten.baddbmm",
    "aten._scaled_mm",
    "aten._grouped_mm",
    "aten._scaled_grouped_mm",
)
COLLECTIVES = (
    "_c10d_functional.all_gather_into_tensor",
    "_c10d_functional.reduce_scatter_tensor",
    "_c10d_functional.all_to_all_single",
    "_c10d_functional.all_reduce",
    "_c10d_functional.wait_tensor",
)
GROUPS = {  # the ring is attention and its exchange in one
    "attention": lambda: {*attention_ops(), RING},
    "matmul": lambda: _existing(MATMUL),
    "collectives": lambda: _existing(COLLECTIVES) | {RING},
}


def check(cfg: Sections) -> None:
    """Are the operators to keep known, and can the rest of the config work with this kind of recomputation?

    Raises:
        ConfigError: no; with what to use.
    """
    kind, save = cfg.recompute.kind, cfg.recompute.save
    if kind == "selective":
        operators(save)
        if cfg.tiling.mlp and "matmul" in save:
            raise ConfigError("keeps what tiling.mlp is not to keep; leave matmul out, or use tiling.mlp=0", "recompute.save", list(save))
    if kind in ("mlp", "mlp_8bit", "fit"):
        _check_fused(cfg)
    if kind == "budget" and (cfg.compile is None or cfg.compile.backend == "eager"):
        # aot_eager and inductor cut the graph of a block in a forward and a backward part; eager does not
        here = "" if cfg.compile is None else ", not compile.backend='eager'"
        raise ConfigError(
            f"is the compiler's choice and needs [compile]{here}; without it use recompute.kind='selective'", "recompute.kind", kind
        )


def _check_fused(cfg: Sections) -> None:
    """Of the kinds that fused blocks bring about themselves."""
    kind = cfg.recompute.kind
    if cfg.tiling.mlp:
        raise ConfigError("chooses what the feed-forward network keeps, as tiling.mlp does; use one of them", "recompute.kind", kind)
    if cfg.offload.frozen:
        raise ConfigError("needs fused blocks, which offload.frozen turns off; use recompute.kind='full'", "recompute.kind", kind)
    if cfg.compile is not None:
        # measured: the compiler finds the same product in forward and backward, and keeps the first
        raise ConfigError("is undone by [compile], which keeps what is computed twice; use recompute.kind='budget'", "recompute.kind", kind)
    if kind == "fit" and cfg.offload.activations != "none":
        raise ConfigError(
            f"counts what stays on the device, and offload.activations={cfg.offload.activations!r} moves it; leave that out, and add "
            "'offload' to recompute.ways",
            "recompute.kind",
            kind,
        )
    if kind == "fit" and cfg.parallel.context > 1:
        raise ConfigError(
            "does not know what parallel.context keeps of other ranks' keys and values; use recompute.kind='mlp' or 'full'",
            "recompute.kind",
            kind,
        )


def apply(net: nn.Module, mesh: Mesh, cfg: RecomputeConfig, compute: torch.dtype, tokens: int) -> list[str]:
    """Puts recomputation around the forward of the blocks that `cfg` chooses. Returns lines for the start-up report.

    Raises:
        ConfigError: blocks are not fused, as some kinds need; or nothing makes a row of so many `tokens` fit.
    """
    blocks = list(net.model.layers)
    if cfg.kind in ("none", "budget"):
        return []
    if cfg.kind in ("mlp", "mlp_8bit", "fit") and any(block.mlp.impl is not feed_forward for block in blocks):
        raise ConfigError("needs fused blocks; use kernels.blocks='auto', or recompute.kind='full'", "recompute.kind", cfg.kind)
    if cfg.kind == "fit":
        return [_fit(net, mesh, cfg, compute, tokens)]
    if cfg.kind in ("mlp", "mlp_8bit"):
        for block in blocks:
            _go(block, cfg.kind)
        return [f"recompute: {cfg.kind}, in {len(blocks)} blocks"]
    again = partial(checkpoint, use_reentrant=False)
    what = cfg.kind
    if cfg.kind == "selective":
        kept = operators(cfg.save)
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, partial(_policy, kept)))
        what = f"selective, keeps {', '.join(cfg.save)} ({len(kept)} operators)"
    chosen = blocks[:: cfg.every if cfg.kind == "every_n" else 1]
    for block in chosen:
        block.forward = partial(again, block.forward)
    return [f"recompute: {what}, in {len(chosen)} of {len(blocks)} blocks"]


def _fit(net: nn.Module, mesh: Mesh, cfg: RecomputeConfig, compute: torch.dtype, tokens: int) -> str:
    blocks, slots = list(net.model.layers), -(-tokens // mesh.axes["context"])
    bytes_of = fit.table(net.arch, cfg.ways, compute, mesh.axes["tensor"], fit.ranks(blocks))
    if cfg.gib == 0 and mesh.device.type != "cuda":
        raise ConfigError("is needed by recompute.kind='fit' on a CPU: GiB for what blocks keep", "recompute.gib", cfg.gib)
    memory = int(cfg.gib * fit.GIB) if cfg.gib else fit.room(net, mesh, slots * bytes_of["all"], compute)
    ways = fit.choose(slots, len(blocks), bytes_of, memory)
    lane = Lane(mesh.device)
    keeper, before = Keeper(lane, InMemory(lane)), [way for way in bytes_of if way != "offload"][-1]
    for block, way in zip(blocks, ways):
        _go(block, before if way == "offload" else way)
        if way == "offload":
            keeper.around(block)
    return fit.describe(slots, ways, bytes_of, memory)


def _go(block: nn.Module, way: str) -> None:
    block.mlp.keep = {"all": "all", "mlp_8bit": "8bit", "mlp": "none", "full": "all"}[way]
    if way == "full":
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def operators(save: tuple[str, ...]) -> frozenset[OpOverload]:
    """The operators that the names in `save` stand for.

    Raises:
        ConfigError: a name stands for none.
    """
    found: set[OpOverload] = set()
    for name in save:
        some = GROUPS[name]() if name in GROUPS else _named(name)
        if not some:
            known = [*GROUPS, *sorted({n.split(".")[0].replace("::", ".") for n in torch._C._dispatch_get_all_op_names()})]
            close = difflib.get_close_matches(name, known, 1)
            meant = f"did you mean {close[0]!r}? Groups are" if close else "groups are"
            raise ConfigError(f"is neither a group nor an operator of this torch; {meant} {', '.join(GROUPS)}", "recompute.save", name)
        found |= some
    return frozenset(found)


def _existing(names: tuple[str, ...]) -> set[OpOverload]:
    return set().union(*map(_named, names))


def _named(name: str) -> set[OpOverload]:
    """The overloads that `namespace.operator` or `namespace.operator.overload` stands for; none if there is no such operator."""
    space, _, rest = name.partition(".")
    operator, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, space), operator, None) if space and operator else None
    if not isinstance(packet, OpOverloadPacket):
        return set()
    return {getattr(packet, each) for each in packet.overloads() if overload in ("", each)}


def _policy(kept: frozenset[OpOverload], ctx, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE
