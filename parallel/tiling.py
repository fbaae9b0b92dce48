"""Work through a long row a piece at a time where slots need nothing of each other (ALST, https://arxiv.org/abs/2506.13996).

`logits_mib` sizes the buffer that kernels/linear_logprob.py computes logits in. The rest of this text is about `mlp`.

The feed-forward network is computed for `mlp` slots at a time. Each tile is recomputed in the backward pass, one after the other,
so what lives of the network at a time, [tile, intermediate] several times over, is that of one tile, and all that is kept for the
backward is its input. The price is a second forward of the network.

Weights are used once per tile, and their gradients add up over tiles in at least fp32 and are rounded once, as those of one large
product are. Autograd would add them in the weight's dtype; so each tile gets the weights through a link of a chain, and the sum
travels along the chain in the backward:

    first  : w -> total_0                              [out, in] fp32 without memory; backward: round the sum
    link i : total_i, w -> total_i+1, w for tile i     backward: d total_i = d total_i+1 + dw_i, in fp32

Under tensor parallelism the rows of all n ranks come in, [n, T/n, D], and the row-split product at the end sums over ranks and
leaves this rank's part of the rows. A tile is therefore the same piece of every rank's rows. Tiles are cut by the number of slots
alone, so all ranks have the same ones.

Dropout inside (LoRA's) draws a mask per tile: it is the same in the recomputation, but another one than without tiling.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.ffn import FeedForward, gated
from model.linear import here
from model.norm import RMSNorm
from parallel.config import TilingConfig


def apply(net: nn.Module, cfg: TilingConfig, ranks: int) -> list[str]:
    """Tiles every feed-forward network of `net`, whose rows come from `ranks` tensor-parallel ranks, and passes on the size of the
    buffer of logits. Returns lines for the start-up report."""
    net.logits_bytes = cfg.logits_mib << 20 or None
    if not cfg.mlp:
        return []
    networks = [m for m in net.modules() if isinstance(m, FeedForward)]
    for ffn in networks:
        ffn.impl = Tiled(max(1, cfg.mlp // ranks), ranks)
    return [f"tiling: {cfg.mlp} slots at a time in {len(networks)} feed-forward networks, not fused"]


class Tiled:
    """Takes the place of what filled `FeedForward.impl`: a tile keeps nothing, so there is no saving in fusing it. `rows` of each of
    `ranks` ranks make a tile."""

    def __init__(self, rows: int, ranks: int):
        self.rows, self.ranks = rows, ranks

    def __call__(self, ffn: FeedForward, h: Tensor, add: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        h = h + add
        return h, self.tiles(ffn, norm(h))

    def tiles(self, ffn: FeedForward, x: Tensor) -> Tensor:
        """x: [T, D] -> [T, D], or under tensor parallelism this rank's [T/n, D]."""
        tiles = [tile.flatten(0, 1) for tile in x.unflatten(0, (self.ranks, -1)).split(self.rows, 1)]
        if len(tiles) == 1 or not torch.is_grad_enabled():
            return torch.cat([gated(ffn, tile) for tile in tiles])
        names = [name for name, p in ffn.named_parameters() if p.requires_grad]
        weights = [here(ffn.get_parameter(name)) for name in names]
        totals, out = [_First.apply(w) for w in weights], []
        for tile in tiles:
            links = [_Link.apply(total, w) for total, w in zip(totals, weights)]
            totals = [total for total, _ in links]
            with _instead(ffn, dict(zip(names, (w for _, w in links)))):
                out.append(checkpoint(gated, ffn, tile, use_reentrant=False))
        return torch.cat(out)


class _First(torch.autograd.Function):
    """A weight's sum of gradients before any tile."""

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return weight.new_zeros((), dtype=torch.promote_types(weight.dtype, torch.float32)).expand(weight.shape)

    @staticmethod
    def backward(ctx, total: Tensor) -> Tensor:
        return total.to(ctx.dtype)


class _Link(torch.autograd.Function):
    """The weight for one tile, and the sum with that tile's gradient. The weight has its gradient from `_First` alone."""

    @staticmethod
    def forward(ctx, total: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return total.view_as(total), weight.view_as(weight)

    @staticmethod
    def backward(ctx, total: Tensor, grad: Tensor) -> tuple[Tensor, None]:
        return total + grad, None


@contextmanager
def _instead(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the module computes with these in place of its parameters. (A recomputation after that finds the parameters, which
    hold the same numbers; where gradients go was decided in the forward.)"""
    places = [(module.get_submodule(name.rpartition(".")[0])._parameters, name.rpartition(".")[2]) for name in tensors]
    own = [parameters[leaf] for parameters, leaf in places]
    for (parameters, leaf), tensor in zip(places, tensors.values()):
        parameters[leaf] = tensor
    try:
        yield
    finally:
        for (parameters, leaf), tensor in zip(places, own):
            parameters[leaf] = tensor
