"""Activation checkpointing in place: no wrapper modules, so names in the state dict stay what they are.

A recomputed block keeps its input, and its forward runs again in the backward pass, with the same dropout masks
(https://arxiv.org/abs/1604.06174). It is torch's non-reentrant checkpoint, which runs again only up to the last value that the
backward needs.

    full       every block
    every_n    blocks 0, n, 2n, ...; the others keep everything
    selective  every block, but results of the operators in `save` are kept, so these do not run twice
    budget     not here: the compiler's partitioner decides what to keep (parallel/compile.py)

`save` names operators (`aten.mm`, `salamander.varlen`; with an overload, `aten.mm.default`, that one alone) or a group:

    attention    the forward of attention, whichever kernel computes it: O(T^2) work for O(T) bytes
    matmul       matrix products: most of the rest of the work, and most of the bytes
    collectives  exchanges between ranks: a second one costs time on the network

Gradients are those without recomputation, bit for bit.
"""

from __future__ import annotations

import difflib
from functools import partial

import torch
from torch import nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kernels.attention import attention_ops
from parallel.config import RecomputeConfig, Sections
from parallel.context import RING
from runtime.errors import ConfigError

# by name, since some exist only in some versions of torch
MATMUL = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten._scaled_mm", "aten._grouped_mm", "aten._scaled_grouped_mm")
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
    if kind == "budget" and (cfg.compile is None or cfg.compile.backend == "eager"):
        # aot_eager and inductor cut the graph of a block in a forward and a backward part; eager does not
        here = "" if cfg.compile is None else ", not compile.backend='eager'"
        raise ConfigError(
            f"is the compiler's choice and needs [compile]{here}; without it use recompute.kind='selective'", "recompute.kind", kind
        )


def apply(blocks: list[nn.Module], cfg: RecomputeConfig) -> list[str]:
    """Puts recomputation around the forward of the blocks that `cfg` chooses. Returns lines for the start-up report."""
    if cfg.kind in ("none", "budget"):
        return []
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
