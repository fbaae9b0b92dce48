"""Turns a model on meta into its distributed form. The order is written here, once, straight down."""

from __future__ import annotations

import math

import torch
from torch import nn

from model.arch import Arch
from model.config import LoraConfig
from parallel import compile, context, fsdp, graph, offload, recompute, tensor, tiling
from parallel.config import Sections
from parallel.mesh import Mesh, nearest
from runtime.errors import ConfigError


def check(cfg: Sections, axes: dict[str, int], arch: Arch, lora: LoraConfig | None) -> None:
    """Can these ranks share this model and the rows it reads? Before there is a process group.

    Raises:
        ConfigError: no; with the numbers, and the nearest choice that works.
    """

    def misfit(axes: dict[str, int]) -> ConfigError | None:
        try:
            tensor.check(arch, axes["tensor"], axes["shard"] * axes["context"])
            context.check(arch, axes["context"], axes["tensor"], cfg.parallel.context_method)
        except ConfigError as error:
            return error

    if error := misfit(axes):
        use = nearest(cfg.parallel, math.prod(axes.values()), lambda other: misfit(other) is None)
        raise ConfigError(f"{error.message}; use {use}", error.key, error.value) from error
    for key, value in (("offload.frozen", cfg.offload.frozen), ("tiling.mlp", cfg.tiling.mlp)):
        if cfg.kernels.blocks == "fused" and value:
            said = "true" if value is True else value
            raise ConfigError(f"does not work with {key}={said}, which computes linears its own way; use auto", "kernels.blocks", "fused")
    fsdp.check(cfg.parallel, axes)
    offload.check(cfg, axes, lora)
    recompute.check(cfg)
    compile.check(cfg, lora.dropout if lora else 0.0)
    graph.check(cfg, axes)
    if lora is not None and lora.dropout and axes["context"] > 1:
        # a rank sees some of a row's slots and would draw another mask than one rank does for the same pack
        raise ConfigError(f"does not work with parallel.context={axes['context']}; use lora.dropout=0", "lora.dropout", lora.dropout)


def parallelize(net: nn.Module, mesh: Mesh, cfg: Sections, compute: torch.dtype, tokens: int = 0) -> list[str]:
    """`tokens`: slots of a row, where recomputation goes by them.

    Split rows and matrices, cut what is computed in tiles, then recompute, compile, offload, shard: each takes the forward of a
    block as the one before left it, and FSDP2's hooks surround all of it. Returns lines for the start-up report."""
    blocks = list(net.model.layers)
    report = context.wrap(net, mesh, cfg.parallel.context_method)
    tensor.split(net, mesh.weights["tensor"])
    report += tiling.apply(net, cfg.tiling, mesh.axes["tensor"])
    report += recompute.apply(net, mesh, cfg.recompute, compute, tokens)
    report += compile.apply(blocks, cfg)
    report += offload.apply(net, blocks, mesh.device, cfg)
    report += graph.apply(cfg)
    fsdp.shard(net, blocks, mesh, cfg, compute)
    return report
