"""Causal attention over packed documents without a [T, T] mask.

    out[t] = sum_s softmax_s(scale q[t].k[s]) v[s]    over s <= t in t's document, at most the last `window` of them

Queries may be fewer than keys (context parallelism gives a rank some of the queries): each document then has two lengths, and
its queries are the *last* of its keys, flash attention's convention ("aligned at the bottom right"). A document may have no
queries at all.

CUDA: torch.nn.attention.varlen, flash attention by document borders. CPU: one call of torch's flash kernel per document; the
next paragraphs are about that.

Tensors are [T, heads, H]. A document's slice is handed to the kernel as it lies, with the key heads as its batch and the
queries of one key head as its heads, so grouped queries need no copy of keys and values:

    q [S, K*G, H] -> [K, G, S, H],   k, v [S, K, H] -> [K, 1 -> G (stride 0), S, H]

A document with as many queries as keys is one plain causal call up to the window. What lies beyond the window, or has keys
before its first query, comes TILE queries at a time through one banded mask that all tiles share, each taking its lower right
corner. Memory is O(T + TILE * the most keys a tile sees), time that of the scores it needs.

The kernels are `aten::_scaled_dot_product_flash_attention_for_cpu` and its backward (fp64, fp32, bf16, fp16; log-sum-exp in
at least fp32). They are called inside two operators of our own, `salamander::varlen` and `salamander::varlen_backward`, which
read the borders from their tensor: a compiled block sees one opaque operator, and the same one whatever the packing.

Partial attention (`partial`, `partial_backward`) is for those who bring keys together piece by piece (parallel/context.py):
queries of a document against some of its keys, with the log-sum-exp by which parts are merged; backward from the merged output
and log-sum-exp, which gives each part's exact share of the gradients. Not causal means: all the keys of its document that are
there. A query without keys has out 0, lse -inf. Neither is differentiable.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.launch import wide_dtype

TILE = 256  # queries per tile beyond the window: a tile's fixed cost against the keys it looks at in vain

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention_ops() -> tuple[torch._ops.OpOverload, ...]:
    """Every operator that is the forward pass of attention, ours and torch's, as far as this torch has them: what selective
    recomputation keeps when it keeps attention."""
    import torch.nn.attention.varlen

    import kernels.flash  # noqa: F401  both register operators

    aten = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu", "fused_attention_overrideable")
    ours = [("salamander", name) for name in ("varlen", "flash")]
    names = [*ours, ("torch_attn", "_varlen_attn"), *(("aten", f"_scaled_dot_product_{name}") for name in aten)]
    packets = (getattr(getattr(torch.ops, space), name, None) for space, name in names)
    return tuple(packet.default for packet in packets if packet is not None)


class _Tile(NamedTuple):
    """Queries [q0, q1) against keys [k0, k1): all of them, causal from a common start, or banded up to a common end."""

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool = False
    banded: bool = False


def varlen_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: int,
    scale: float,
    cu_keys: Tensor | None = None,
    max_keys: int | None = None,
) -> Tensor:
    """Attention of packed documents.

    Args:
        q: [T, N, H]; k, v: [S, K, H], N a multiple of K, on the CPU, one dtype.
        cu_seqlens: [N+1] int32, document borders among the queries, from 0 to T, ascending; repeated values are empty documents.
        max_seqlen, max_keys: no document has more queries, keys.
        window: keys a query sees, itself included; 0: all before it.
        scale: multiplies q.k.
        cu_keys: the same documents' borders among the keys, from 0 to S, none shorter there; None: S = T, the same.

    Returns:
        [T, N, H].
    """
    if cu_keys is None:
        cu_keys, max_keys = cu_seqlens, max_seqlen
    return _varlen(q, k, v, cu_seqlens, cu_keys, max_seqlen, max_keys, window, scale)[0]


def varlen_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: int,
    scale: float,
    cu_keys: Tensor | None = None,
    max_keys: int | None = None,
) -> Tensor:
    """The same on CUDA. A document that is longer than max_seqlen would stay unset at its end, and nothing looks. Every key must
    lie in a document: flash attention leaves the gradient of others unset."""
    attend, takes_gqa = _varlen_attn()
    flags = {"enable_gqa": True} if takes_gqa else {}
    reach = (window - 1 if window else -1, 0)  # keys before and after a query's own
    if cu_keys is None:
        cu_keys, max_keys = cu_seqlens, max_seqlen
    return attend(q, k, v, cu_seqlens, cu_keys, max_seqlen, max_keys, scale=scale, window_size=reach, **flags)


def varlen_cuda_unsupported(head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why varlen_cuda cannot compute this, or None."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention computes in bf16 and fp16, not {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > 256:
        return f"flash attention needs a head size that is a multiple of 8 up to 256, not {head_dim}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "flash attention needs compute capability 8.0 (Ampere) or newer"
    return None


@functools.cache
def _varlen_attn() -> tuple[Callable, bool]:
    """torch's function, and whether it wants to be told of grouped queries (2.13) or finds out itself (2.11)."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def varlen_ref(
    q: Tensor, k: Tensor, v: Tensor, borders: list[int], window: int, scale: float, key_borders: list[int] | None = None
) -> Tensor:
    """The obvious twin: every score of the row, masked. Borders as lists."""
    cu, cu_keys = torch.tensor(borders), torch.tensor(key_borders or borders)
    return _dense(q, k, v, _seen(q, k, cu, cu_keys, window, causal=True), scale)[0]


# -- partial attention -----------------------------------------------------------------------------------------------------


def partial(
    q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor, max_queries: int, max_keys: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to some of a document's keys.

    Args:
        q: [T, N, H]; k, v: [S, K, H], N a multiple of K.
        cu_queries, cu_keys: [N+1] int32, borders of the same documents, from 0 to T and from 0 to S.
        max_queries, max_keys: no document has more.
        causal: the queries are the last of the keys; else each sees all keys of its document.

    Returns:
        out [T, N, H], and lse [T, N] in at least fp32: the logarithm of the sum of e^score; 0 and -inf without a key.
    """
    if not q.is_cuda:
        return _cpu_forward(q, k, v, cu_queries, cu_keys, max_queries, max_keys, 0, causal, scale)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_queries, cu_keys, max_queries, max_keys, 0.0, causal, False, scale=scale
    )
    alone = ~_has_any(q.shape[0], cu_queries, cu_keys)[:, None]
    return out.masked_fill_(alone[..., None], 0.0), lse.T.masked_fill(alone, float("-inf"))


def partial_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What these keys add to the gradients of q, k, v. grad, out [T, N, H] and lse [T, N]: of attention to *all* keys."""
    if not q.is_cuda:
        return _cpu_backward(grad, q, k, v, out, lse, cu_queries, cu_keys, 0, causal, scale)
    rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse.T.contiguous(), cu_queries, cu_keys, max_queries, max_keys, 0.0, causal, rng_state,
        rng_state.new_empty(0), scale=scale,
    )  # fmt: skip
    # queries without keys, and keys without queries, are rows that the kernel may leave unset
    dq.masked_fill_(~_has_any(q.shape[0], cu_queries, cu_keys)[:, None, None], 0.0)
    unseen = ~_has_any(k.shape[0], cu_keys, cu_queries)[:, None, None]
    return dq, dk.masked_fill_(unseen, 0.0), dv.masked_fill_(unseen, 0.0)


def partial_ref(
    q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor, max_queries: int, max_keys: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The obvious twin of `partial`, on any device, in any dtype. Memory T x S."""
    return _dense(q, k, v, _seen(q, k, cu_queries, cu_keys, 0, causal), scale)


def partial_backward_ref(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The obvious twin of `partial_backward`: the softmax's formula, with p = e^(score - lse) of the whole."""
    seen = _seen(q, k, cu_queries, cu_keys, 0, causal)
    wide = lse.dtype
    grad, q, out, wide_k, wide_v = (x.to(wide) for x in (grad, q, out, *_spread(q, k, v)))
    p = _scores(q, wide_k, seen, scale).sub_(lse.T[..., None]).exp_()
    dp = torch.einsum("tnh,snh->nts", grad, wide_v)
    ds = p * (dp - (grad * out).sum(-1).T[..., None]) * scale
    dq = torch.einsum("nts,snh->tnh", ds, wide_k)
    dk, dv = torch.einsum("nts,tnh->snh", ds, q), torch.einsum("nts,tnh->snh", p, grad)
    dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))
    return dq.to(k.dtype), dk.to(k.dtype), dv.to(k.dtype)


def _document(slots: int, cu: Tensor) -> Tensor:
    """[slots] int64: the number of the document each slot lies in."""
    return torch.searchsorted(cu[1:], torch.arange(slots, device=cu.device, dtype=cu.dtype), right=True)


def _has_any(slots: int, cu: Tensor, cu_others: Tensor) -> Tensor:
    """[slots] bool: has the document of this slot slots among the others?"""
    return (cu_others.diff() > 0)[_document(slots, cu)]


def _seen(q: Tensor, k: Tensor, cu_queries: Tensor, cu_keys: Tensor, window: int, causal: bool) -> Tensor:
    """[T, S] bool: may a query see a key."""
    document, key_document = _document(q.shape[0], cu_queries), _document(k.shape[0], cu_keys)
    seen = document[:, None] == key_document[None, :]
    if not causal:
        return seen
    slots, key_slots = (torch.arange(x.shape[0], device=cu_queries.device) for x in (q, k))
    place = cu_keys[1:][document] - (cu_queries[1:][document] - slots)  # of a query among the keys
    distance = place[:, None] - key_slots[None, :]
    return seen & (distance >= 0) & (distance < (window or k.shape[0]))


def _spread(q: Tensor, *keys: Tensor) -> list[Tensor]:
    """A copy of every key head for each query head that uses it."""
    return [x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in keys]


def _scores(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    """[N, T, S], -inf where not seen."""
    return (torch.einsum("tnh,snh->nts", q, k) * scale).masked_fill(~seen, float("-inf"))


def _dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention with a mask spelled out."""
    wide = wide_dtype(q.dtype)
    k, v = _spread(q, k, v)
    scores = _scores(q.to(wide), k.to(wide), seen, scale)
    p = scores.softmax(-1).masked_fill(~seen.any(1)[:, None], 0.0)  # a softmax over nothing is nan
    return torch.einsum("nts,snh->tnh", p, v.to(wide)).to(q.dtype), scores.logsumexp(-1).T


# -- the kernels on the CPU ------------------------------------------------------------------------------------------------


def _tiles(borders: list[int], key_borders: list[int], window: int, causal: bool) -> Iterator[_Tile]:
    for (a, b), (first, end) in zip(itertools.pairwise(borders), itertools.pairwise(key_borders)):
        head = a
        if not causal:
            if b > a and end > first:
                yield _Tile(a, b, first, end)
            continue
        if b - a == end - first:
            head = min(b, a + window) if window else b
            if head > a:
                yield _Tile(a, head, first, first + head - a, causal=True)
        for q0 in range(head, b, TILE):
            q1 = min(q0 + TILE, b)
            k1 = end - (b - q1)
            yield _Tile(q0, q1, max(first, k1 - (q1 - q0) - window + 1) if window else first, k1, banded=True)


def _band(keys: int, window: int, like: Tensor) -> Tensor:
    """[TILE, keys] additive: the last query sees the last key, and each the `window` keys (0: all) up to its own."""
    distance = torch.arange(TILE)[:, None] - torch.arange(keys) + keys - TILE
    return torch.zeros(distance.shape, dtype=like.dtype).masked_fill_((distance < 0) | (distance >= (window or keys)), float("-inf"))


def _grouped(x: Tensor, kv_heads: int, group: int) -> Tensor:
    """A slice [S, heads, H] as [K, G, S, H], without a copy; heads is K * G, or K and is spread over G."""
    if x.shape[1] == kv_heads:
        return x.transpose(0, 1)[:, None].expand(-1, group, -1, -1)
    return x.unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3)


class _Calls:
    """The kernel calls of one row: for each tile its slices and its mask."""

    def __init__(self, q: Tensor, k: Tensor, borders: list[int], key_borders: list[int], window: int, causal: bool):
        self.kv_heads, self.group = k.shape[1], q.shape[1] // k.shape[1]
        self.tiles = list(_tiles(borders, key_borders, window, causal))
        most = max([0, *(t.k1 - t.k0 for t in self.tiles if t.banded)])
        self.band = _band(most, window, q) if most else None

    def queries(self, x: Tensor, t: _Tile) -> Tensor:
        return _grouped(x[t.q0 : t.q1], self.kv_heads, self.group)

    def keys(self, x: Tensor, t: _Tile) -> Tensor:
        return _grouped(x[t.k0 : t.k1], self.kv_heads, self.group)

    def mask(self, t: _Tile) -> Tensor | None:
        return self.band[t.q0 - t.q1 :, t.k0 - t.k1 :] if t.banded else None


def _read(cu: Tensor, most: int) -> list[int]:
    """Borders as a list, if no document is longer than `most`: on CUDA it would be cut there, so it must not happen here."""
    borders = cu.tolist()
    longest = max(b - a for a, b in itertools.pairwise(borders))
    assert longest <= most, f"a document of {longest} tokens where none may be longer than {most}"
    return borders


def _cpu_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    max_keys: int,
    window: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [T, N, H], lse [T, N]) on the CPU; arguments are those of `varlen_cpu` and `partial`."""
    calls = _Calls(q, k, _read(cu_queries, max_queries), _read(cu_keys, max_keys), window, causal)
    out, lse = empty_outputs(q)
    out.zero_()  # of queries that see no key
    lse.fill_(float("-inf"))
    for t in calls.tiles:
        o, m = _forward(calls.queries(q, t), calls.keys(k, t), calls.keys(v, t), 0.0, t.causal, attn_mask=calls.mask(t), scale=scale)
        calls.queries(out, t).copy_(o)
        calls.queries(lse[..., None], t)[..., 0].copy_(m)
    return out, lse


def empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the results of attention: out like q, and lse [T, N]."""
    lse = q.new_empty(q.shape[:2], dtype=wide_dtype(q.dtype))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _cpu_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    window: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    calls = _Calls(q, k, cu_queries.tolist(), cu_keys.tolist(), window, causal)
    grad = grad.contiguous()
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for t in calls.tiles:
        gq, gk, gv = _backward(
            calls.queries(grad, t),
            calls.queries(q, t),
            calls.keys(k, t),
            calls.keys(v, t),
            calls.queries(out, t),
            calls.queries(lse[..., None], t)[..., 0],
            0.0,
            t.causal,
            attn_mask=calls.mask(t),
            scale=scale,
        )
        calls.queries(dq, t).copy_(gq)
        dk[t.k0 : t.k1] += gk.sum(1).transpose(0, 1)  # windows of tiles overlap, and a key head serves G query heads
        dv[t.k0 : t.k1] += gv.sum(1).transpose(0, 1)
    return dq, dk, dv


# -- the operators ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("salamander::varlen", mutates_args=(), device_types="cpu")
def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    max_keys: int,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _cpu_forward(q, k, v, cu_queries, cu_keys, max_queries, max_keys, window, True, scale)


@_varlen.register_fake
def _(q, k, v, cu_queries, cu_keys, max_queries, max_keys, window, scale):
    return empty_outputs(q)


@torch.library.custom_op("salamander::varlen_backward", mutates_args=(), device_types="cpu")
def _varlen_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _cpu_backward(grad, q, k, v, out, lse, cu_queries, cu_keys, window, True, scale)


@_varlen_backward.register_fake
def _(grad, q, k, v, out, lse, cu_queries, cu_keys, window, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _keep(ctx, inputs, output) -> None:
    q, k, v, cu_queries, cu_keys, _, _, ctx.window, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_queries, cu_keys)


def _gradients(ctx, grad, _):
    return *_varlen_backward(grad, *ctx.saved_tensors, ctx.window, ctx.scale), *[None] * 6


_varlen.register_autograd(_gradients, setup_context=_keep)
