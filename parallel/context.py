"""Context parallelism: the ranks of one group hold one row of tokens together.

A row of T slots is cut into 2c equal chunks, and rank r of c holds chunks r and 2c - 1 - r: one from the head, where causal
queries see few keys, and its mirror from the tail, where they see many, so that all ranks have the same work on a document as
long as the row. Chunks ignore where documents end. Labels were shifted before, so no target is lost at a cut. A row that does
not divide gets one more document of padding at its end, here and not by the packer, so that packs do not depend on ranks.

    c = 2:  | 0 | 1 | 2 | 3 |  ->  rank 0: 0 3,  rank 1: 1 2

All but attention works on slots by themselves and does not notice. Attention's backend is wrapped by one that brings together
what queries need; the wrapped one computes, and never knows:

    allgather  keys and values of the whole row on every rank; each chunk of queries against the keys up to its end. Any number
               of heads; every rank holds T keys and values of the layer it computes.
    ring       keys and values travel around the ranks (arXiv 2310.01889), those of one rank at a time; what each chunk of
               queries finds in them is merged by log-sum-exp. Any number of heads; no rank ever holds the row's keys. In layers
               with a window, which reaches few keys, it is allgather.
    ulysses    slots are exchanged for heads (arXiv 2309.14509): a rank computes the whole row for N/c of the heads, equal work
               for any lengths of documents. Needs N divisible by c; fewer key heads than that are copied.
    auto       ulysses where it copies no key heads, else allgather. Never ring: it moves as much as allgather and launches c
               times the kernels, and whether its memory is needed is not seen here.

What moves per rank and layer, forward, in units of T/c slots x H: allgather and ring 2K(c - 1), ulysses (2N + 2K)(c - 1)/c.
Backward, allgather and ulysses the same again; ring 2K(c - 1), and 2Kc in at least fp32.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group

from data.batch import IGNORE, Batch
from kernels.attention import empty_outputs
from model.arch import Arch, Kind
from model.attention import AttnContext, Backend
from model.backends import BACKENDS
from parallel.collectives import exchange, gather, pass_on
from parallel.mesh import Mesh
from runtime.errors import ConfigError


def check(arch: Arch, size: int, tensor: int, method: str) -> None:
    """Can `size` ranks, each again `tensor` ranks, share rows of this model?

    Raises:
        ConfigError: heads do not divide. `parallel.apply.check` says what to use instead.
    """
    heads = arch.num_attention_heads // tensor
    if method == "ulysses" and heads % size:
        here = f"{heads} attention heads" + (f" of each of {tensor} tensor ranks" if tensor > 1 else "")
        raise ConfigError(
            f"of ulysses does not divide the {here} ({arch.name or arch.family}), as parallel.context_method=allgather need not",
            "parallel.context",
            size,
        )


def padded(tokens: int, size: int, tensor: int) -> int:
    """Slots of a row of `tokens` as `size` context ranks x `tensor` tensor ranks share it: chunks are equal, and tensor ranks
    hold equal parts of a context rank's slots between blocks."""
    step = math.lcm(2 * size if size > 1 else 1, size * tensor)
    return -(-tokens // step) * step


def split(batch: Batch, mesh: Mesh) -> Batch:
    """This rank's slots of a row, [T/c]. Borders, and what else there is per document, stay the row's."""
    size, rank = mesh.axes["context"], mesh.tokens["context"].get_local_rank()
    batch = _pad(batch, padded(batch.tokens.numel(), size, mesh.axes["tensor"]))
    if size == 1:
        return batch
    chunks = chunks_of(batch.tokens.numel(), size, rank)
    slots = torch.cat([torch.arange(a, b, device=batch.tokens.device) for a, b in chunks])
    mine = {name: getattr(batch, name)[slots] for name in ("tokens", "labels", "positions")}
    filled = sum(max(0, min(b, batch.filled) - a) for a, b in chunks)
    return replace(batch, **mine, filled=filled, slots=slots.int(), targets=None)


def _pad(batch: Batch, slots: int) -> Batch:
    """The row with one more document, of padding, up to `slots`."""
    more = slots - batch.tokens.numel()
    if not more:
        return batch
    return replace(
        batch,
        tokens=F.pad(batch.tokens, (0, more)),
        labels=F.pad(batch.labels, (0, more), value=IGNORE),
        positions=torch.cat([batch.positions, torch.arange(more, dtype=batch.positions.dtype, device=batch.positions.device)]),
        cu_seqlens=F.pad(batch.cu_seqlens, (0, 1), value=slots),
        max_seqlen=max(batch.max_seqlen, more),
        group={name: torch.cat([x, x.new_full((1, *x.shape[1:]), -1)]) for name, x in batch.group.items()},
    )


def wrap(net: nn.Module, mesh: Mesh, method: str) -> list[str]:
    """Puts the exchange of context ranks around the backend of every attention; says so in a line for the start-up report.
    On a group of size 1 nothing happens."""
    size = mesh.axes["context"]
    if size == 1:
        return []
    if method == "auto":
        method = "allgather" if net.arch.num_key_value_heads // mesh.axes["tensor"] % size else "ulysses"
    around = {"allgather": AllGather, "ring": Ring, "ulysses": Ulysses}[method]
    for block in net.model.layers:
        block.self_attn.backend = around(block.self_attn.backend, mesh.tokens["context"].get_group())
    windows = " (allgather in layers with a window)" if method == "ring" and any(k.name == "window" for k in net.arch.kinds) else ""
    return [f"context: {size} ranks share a row, {method}{windows}"]


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


class Around(ABC):
    """A backend that wraps a backend."""

    def __init__(self, inner: Backend, group: dist.ProcessGroup):
        self.inner, self.group, self.size, self.rank = inner, group, group.size(), group.rank()
        self.name = f"{type(self).__name__.lower()} around {inner.name}"

    def unsupported(self, arch: Arch, device: torch.device, dtype: torch.dtype) -> str | None:
        return self.inner.unsupported(arch, device, dtype)

    @abstractmethod
    def pieces(self, ctx: AttnContext) -> list[AttnContext]:
        """What the wrapped backend computes here. `ctx` holds this rank's slots and the row's borders."""

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


class Ring(AllGather):
    """A query sees all keys of its document before it, so each of this rank's chunks meets each that arrives in one of three
    ways: a later chunk holds nothing for it; in its own chunk attention is causal; in an earlier one it sees all keys of its
    document, without a mask. Documents that do not reach across have no keys there or no queries here."""

    def prepare(self, ctx: AttnContext, kind: Kind) -> None:
        if kind.name == "window":
            super().prepare(ctx, kind)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ctx: AttnContext, kind: Kind, scale: float) -> Tensor:
        """q: [T/c, N, H]; k, v: [T/c, K, H] -> [T/c, N, H]."""
        if kind.name == "window":
            return super().__call__(q, k, v, ctx, kind, scale)
        return _ring(q, k, v, ctx.queries.cu, ctx.queries.longest, scale, self.inner.name, self.group.group_name)[0]


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


# -- the ring, as operators: point-to-point exchange cannot be traced, and these can be named ------------------------------


def _around(x: Tensor, group: dist.ProcessGroup) -> Iterator[tuple[int, Tensor]]:
    """(rank, its x) for every rank of the group, one's own first; the next is on its way meanwhile."""
    for step in range(group.size()):
        last = step + 1 == group.size()
        arriving, works = (x, []) if last else pass_on(x, group)
        yield (group.rank() - step) % group.size(), x
        for work in works:
            work.wait()
        x = arriving


def _parts(cu: Tensor, n: int, group: dist.ProcessGroup, source: int) -> Iterator[tuple[slice, slice, Tensor, Tensor, bool]]:
    """What chunks of n of this rank have to do with those of rank `source`: (queries here, keys there, borders of documents among
    either, causal?). The same chunk comes before earlier ones."""
    last = 2 * group.size() - 1
    for i, mine in enumerate((group.rank(), last - group.rank())):
        for j, theirs in ((1, last - source), (0, source)):
            if theirs <= mine:
                here, there = ((cu - chunk * n).clamp(0, n) for chunk in (mine, theirs))
                yield slice(i * n, (i + 1) * n), slice(j * n, (j + 1) * n), here, there, mine == theirs


@torch.library.custom_op("salamander::ring", mutates_args=())
def _ring(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, backend: str, group_name: str) -> tuple[Tensor, Tensor]:
    """Causal attention of a row whose ranks hold chunks as `chunks_of` says.

    Args:
        q: [T/c, N, H]; k, v: [T/c, K, H], of this rank.
        cu: [N+1] int32, borders of the whole row's documents; longest: none has more slots.
        backend: name of the one whose `partial` computes.
        group_name: of the ranks.

    Returns:
        out [T/c, N, H], and lse [T/c, N] in at least fp32.
    """
    group, attend, n = _resolve_process_group(group_name), BACKENDS[backend].partial, q.shape[0] // 2
    most, wide = min(longest, n), torch.promote_types(q.dtype, torch.float32)
    out, lse = q.new_zeros(q.shape, dtype=wide), q.new_full(q.shape[:2], float("-inf"), dtype=wide)
    for source, (keys, values) in _around(torch.stack([k, v]), group):
        for mine, theirs, here, there, causal in _parts(cu, n, group, source):
            o, m = attend(q[mine], keys[theirs], values[theirs], here, there, most, most, causal, scale)
            both = torch.logaddexp(lse[mine], m)  # finite: a query's own chunk, which holds its own key, came first
            out[mine] *= (lse[mine] - both).exp_()[..., None]
            out[mine] += o * (m - both).exp_()[..., None]
            lse[mine] = both
    return out.to(q.dtype), lse


@torch.library.custom_op("salamander::ring_backward", mutates_args=())
def _ring_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu: Tensor,
    longest: int,
    scale: float,
    backend: str,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values go around again, and behind them their gradients, to which every rank adds its queries' share; one step
    more than there are ranks brings them home."""
    group, attend, n = _resolve_process_group(group_name), BACKENDS[backend].partial_backward, q.shape[0] // 2
    most, wide, grad = min(longest, n), lse.dtype, grad.contiguous()
    dq, arriving, works = q.new_zeros(q.shape, dtype=wide), None, []
    for source, (keys, values) in _around(torch.stack([k, v]), group):
        found = k.new_zeros(2, *k.shape, dtype=wide)
        for mine, theirs, here, there, causal in _parts(cu, n, group, source):
            whole = (grad[mine], q[mine], keys[theirs], values[theirs], out[mine], lse[mine])
            gq, gk, gv = attend(*whole, here, there, most, most, causal, scale)
            dq[mine] += gq
            found[0, theirs] += gk
            found[1, theirs] += gv
        for work in works:
            work.wait()
        sent = found if arriving is None else found.add_(arriving)  # a name of its own: held until it has left
        arriving, works = pass_on(sent, group)
    for work in works:
        work.wait()
    dk, dv = (x.to(k.dtype, copy=True) for x in arriving)  # not two views of one tensor
    return dq.to(q.dtype), dk, dv


@_ring.register_fake
def _(q, k, v, cu, longest, scale, backend, group_name):
    return empty_outputs(q)


@_ring_backward.register_fake
def _(grad, q, k, v, out, lse, cu, longest, scale, backend, group_name):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _keep(ctx, inputs, output) -> None:
    q, k, v, cu, *ctx.rest = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu)


def _gradients(ctx, grad, _):
    return *_ring_backward(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 5


_ring.register_autograd(_gradients, setup_context=_keep)
RING = torch.ops.salamander.ring.default  # what selective recomputation keeps when it keeps attention


def _received(args: tuple, ranks: int) -> int:
    return (ranks - 1) * (args[1].nbytes + args[2].nbytes)


def _received_backward(args: tuple, ranks: int) -> int:
    keys, wide = args[2], args[5].dtype
    return (ranks - 1) * 2 * keys.nbytes + ranks * 2 * keys.numel() * wide.itemsize


# Bytes that a rank receives, by operator, from its arguments and the number of ranks: nobody else sees what goes around.
RECEIVED = {"salamander::ring": _received, "salamander::ring_backward": _received_backward}
