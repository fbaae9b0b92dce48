"""Context parallelism: the ranks of one group hold one row of tokens together.

A row of T slots is cut into 2c equal chunks, and rank r of c holds chunks r and 2c - 1 - r: one from the head, where causal
queries see few keys, and its mirror from the tail, where they see many, so that all ranks have the same work on a document as
long as the row. Chunks ignore where documents end. Labels were shifted before, so no target is lost at a cut.

    c = 2:  | 0 | 1 | 2 | 3 |  ->  rank 0: 0 3,  rank 1: 1 2

All but attention works on slots by themselves and does not notice. Attention's backend is wrapped by one that brings together
what queries need; the wrapped one computes, and never knows:

    allgather  keys and values of the whole row on every rank; each chunk of queries against the keys up to its end. Any number
               of heads; every rank holds T keys and values of the layer it computes.
    ulysses    slots are exchanged for heads (arXiv 2309.14509): a rank computes the whole row for N/c of the heads, equal work
               for any lengths of documents. Needs N divisible by c; fewer key heads than that are copied.
    auto       ulysses where it copies no key heads, else allgather.

What moves per rank and layer, forward, in units of T/c slots x H: allgather 2K(c - 1), ulysses (2N + 2K)(c - 1)/c.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.batch import Batch
from model.arch import Arch, Kind
from model.attention import AttnContext, Backend
from parallel.collectives import exchange, gather
from parallel.mesh import Mesh
from runtime.errors import ConfigError


def check(arch: Arch, size: int, tensor: int, tokens: int, method: str) -> None:
    """Can `size` ranks, each again `tensor` ranks, share rows of `tokens` slots of this model?

    Raises:
        ConfigError: chunks or heads do not divide.
    """
    if size == 1:
        return
    step = math.lcm(2 * size, size * tensor)
    if tokens % (2 * size):
        best = max(step, round(tokens / step) * step)
        raise ConfigError(f"does not divide into 2 x parallel.context={size} chunks; use data.tokens={best}", "data.tokens", tokens)
    heads = arch.num_attention_heads // tensor
    if method == "ulysses" and heads % size:
        here = f"{heads} attention heads" + (f" of each of {tensor} tensor ranks" if tensor > 1 else "")
        best = math.gcd(heads, size)
        raise ConfigError(
            f"of ulysses does not divide the {here} ({arch.name or arch.family}); "
            f"use parallel.context={best} or parallel.context_method=allgather",
            "parallel.context",
            size,
        )


def split(batch: Batch, mesh: Mesh) -> Batch:
    """This rank's slots of a row, [T/c]. Borders, and what else there is per document, stay the row's."""
    size, rank = mesh.axes["context"], mesh.tokens["context"].get_local_rank()
    if size == 1:
        return batch
    chunks = chunks_of(batch.tokens.numel(), size, rank)
    slots = torch.cat([torch.arange(a, b, device=batch.tokens.device) for a, b in chunks])
    mine = {name: getattr(batch, name)[slots] for name in ("tokens", "labels", "positions")}
    filled = sum(max(0, min(b, batch.filled) - a) for a, b in chunks)
    return replace(batch, **mine, filled=filled, slots=slots.int())


def wrap(net: nn.Module, mesh: Mesh, method: str) -> list[str]:
    """Puts the exchange of context ranks around the backend of every attention; says so in a line for the start-up report.
    On a group of size 1 nothing happens."""
    size = mesh.axes["context"]
    if size == 1:
        return []
    if method == "auto":
        method = "allgather" if net.arch.num_key_value_heads // mesh.axes["tensor"] % size else "ulysses"
    around = {"allgather": AllGather, "ulysses": Ulysses}[method]
    for block in net.model.layers:
        block.self_attn.backend = around(block.self_attn.backend, mesh.tokens["context"].get_group())
    return [f"context: {size} ranks share a row, {method}"]


def chunks_of(tokens: int, size: int, rank: int) -> list[tuple[int, int]]:
    """The two chunks [begin, end) of a row that this rank holds, ascending."""
    n = tokens // (2 * size)
    return [(i * n, (i + 1) * n) for i in (rank, 2 * size - 1 - rank)]


def in_row_order(x: Tensor, size: int) -> Tensor:
    """[T, ...] as the ranks hold it, one after the other -> as the row has it."""
    x = x.unflatten(0, (size, 2, -1))
    return torch.cat([x[:, 0], x[:, 1].flip(0)]).flatten(0, 1)


def in_rank_order(x: Tensor, size: int) -> Tensor:
    """The way back."""
    x = x.unflatten(0, (2 * size, -1))
    return torch.stack([x[:size], x[size:].flip(0)], 1).flatten(0, 2)


class Around:
    """A backend that wraps a backend."""

    def __init__(self, inner: Backend, group: dist.ProcessGroup):
        self.inner, self.group, self.size, self.rank = inner, group, group.size(), group.rank()
        self.name = f"{type(self).__name__.lower()} around {inner.name}"

    def unsupported(self, arch: Arch, device: torch.device, dtype: torch.dtype) -> str | None:
        return self.inner.unsupported(arch, device, dtype)

    def pieces(self, ctx: AttnContext) -> list[AttnContext]:
        """What the wrapped backend computes here. `ctx` holds this rank's slots and the row's borders."""
        raise NotImplementedError

    def prepare(self, ctx: AttnContext, kind: Kind) -> None:
        for piece in self.pieces(ctx):
            self.inner.prepare(piece, kind)


class AllGather(Around):
    def pieces(self, ctx: AttnContext) -> list[AttnContext]:
        return [ctx.cut(a, b) for a, b in chunks_of(ctx.queries.slots * self.size, self.size, self.rank)]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ctx: AttnContext, kind: Kind, scale: float) -> Tensor:
        """q: [T/c, N, H]; k, v: [T/c, K, H] -> [T/c, N, H]."""
        k, v = in_row_order(gather(torch.cat([k, v], -1), self.group), self.size).chunk(2, -1)
        out = []
        for part, piece in zip(q.chunk(2), self.pieces(ctx)):
            seen = slice(piece.keys.slots)  # keys after the chunk belong to no document of the piece
            out.append(self.inner(part, k[seen], v[seen], piece, kind, scale))
        return torch.cat(out)


class Ulysses(Around):
    def pieces(self, ctx: AttnContext) -> list[AttnContext]:
        return [ctx.cut(0, ctx.queries.slots * self.size)]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ctx: AttnContext, kind: Kind, scale: float) -> Tensor:
        """q: [T/c, N, H]; k, v: [T/c, K, H] -> [T/c, N, H]."""
        copies = self.size // math.gcd(self.size, k.shape[1])  # rank r's query heads use the key heads it gets
        if copies > 1:
            k, v = (x.repeat_interleave(copies, 1) for x in (k, v))
        each = [x.shape[1] // self.size for x in (q, k, v)]
        x = torch.cat([x.unflatten(1, (self.size, -1)) for x in (q, k, v)], 2)  # [T/c, c, (N + 2K)/c, H]
        x = exchange(x.transpose(0, 1).flatten(0, 1), self.group)
        q, k, v = in_row_order(x, self.size).split(each, 1)
        (piece,) = self.pieces(ctx)
        out = exchange(in_rank_order(self.inner(q, k, v, piece, kind, scale), self.size), self.group)
        return out.unflatten(0, (self.size, -1)).transpose(0, 1).flatten(1, 2)
