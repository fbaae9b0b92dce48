"""Causal attention over packed documents without a [T, T] mask.

    out[t] = sum_s softmax_s(scale q[t].k[s]) v[s]    over s <= t in t's document, at most the last `window` of them

Queries may be fewer than keys (context parallelism gives a rank some of the queries): each document then has two lengths, and
its queries are the *last* of its keys, flash attention's convention ("aligned at the bottom right"). A document may have no
queries at all.

CUDA: torch.nn.attention.varlen, flash attention by document borders. CPU: one call of torch's flash kernel per document; the
rest of this text is about that.

Tensors are [T, heads, H]. A document's slice is handed to the kernel as it lies, with the key heads as its batch and the
queries of one key head as its heads, so grouped queries need no copy of keys and values:

    q [S, K*G, H] -> [K, G, S, H],   k, v [S, K, H] -> [K, 1 -> G (stride 0), S, H]

A document with as many queries as keys is one plain causal call up to the window. What lies beyond the window, or has keys
before its first query, comes TILE queries at a time through one banded mask that all tiles share, each taking its lower right
corner. Memory is O(T + TILE * the most keys a tile sees), time that of the scores it needs.

The kernels are `aten::_scaled_dot_product_flash_attention_for_cpu` and its backward (fp64, fp32, bf16, fp16; log-sum-exp in
at least fp32).
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 256  # queries per tile beyond the window: a tile's fixed cost against the keys it looks at in vain

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Tile(NamedTuple):
    """Queries [q0, q1) against keys [k0, k1); causal from a common start, or banded up to a common end."""

    q0: int
    q1: int
    k0: int
    k1: int
    banded: bool


def varlen_cpu(
    q: Tensor, k: Tensor, v: Tensor, borders: list[int], window: int, scale: float, key_borders: list[int] | None = None
) -> Tensor:
    """Attention of packed documents.

    Args:
        q: [T, N, H]; k, v: [S, K, H], N a multiple of K, on the CPU, one dtype.
        borders: document borders among the queries, from 0 to T, ascending; repeated values are empty documents.
        window: keys a query sees, itself included; 0: all before it.
        scale: multiplies q.k.
        key_borders: the same documents' borders among the keys, from 0 to S, none shorter there; None: S = T, the same.

    Returns:
        [T, N, H].
    """
    return _VarlenCpu.apply(q, k, v, borders, key_borders or borders, window, scale)


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
    """The same on CUDA. cu_seqlens, cu_keys: [N+1] int32 on the device; max_seqlen, max_keys: no document is longer, or its end
    would stay unset. Every key must lie in a document: flash attention leaves the gradient of others unset."""
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
    """The obvious twin: every score of the row, masked."""
    ends, key_ends = torch.tensor(borders[1:]), torch.tensor((key_borders or borders)[1:])
    slots, key_slots = torch.arange(q.shape[0]), torch.arange(k.shape[0])
    document, key_document = torch.searchsorted(ends, slots, right=True), torch.searchsorted(key_ends, key_slots, right=True)
    place = key_ends[document] - (ends[document] - slots)  # of a query among the keys
    distance = place[:, None] - key_slots[None, :]
    seen = (document[:, None] == key_document[None, :]) & (distance >= 0) & (distance < (window or k.shape[0]))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("tnh,snh->nts", q, k) * scale
    return torch.einsum("nts,snh->tnh", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def _tiles(borders: list[int], key_borders: list[int], window: int) -> Iterator[_Tile]:
    for (a, b), (first, end) in zip(itertools.pairwise(borders), itertools.pairwise(key_borders)):
        head = a
        if b - a == end - first:
            head = min(b, a + window) if window else b
            if head > a:
                yield _Tile(a, head, first, first + head - a, False)
        for q0 in range(head, b, TILE):
            q1 = min(q0 + TILE, b)
            k1 = end - (b - q1)
            yield _Tile(q0, q1, max(first, k1 - (q1 - q0) - window + 1) if window else first, k1, True)


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

    def __init__(self, q: Tensor, k: Tensor, borders: list[int], key_borders: list[int], window: int):
        self.kv_heads, self.group = k.shape[1], q.shape[1] // k.shape[1]
        self.tiles = list(_tiles(borders, key_borders, window))
        most = max([0, *(t.k1 - t.k0 for t in self.tiles if t.banded)])
        self.band = _band(most, window, q) if most else None

    def queries(self, x: Tensor, t: _Tile) -> Tensor:
        return _grouped(x[t.q0 : t.q1], self.kv_heads, self.group)

    def keys(self, x: Tensor, t: _Tile) -> Tensor:
        return _grouped(x[t.k0 : t.k1], self.kv_heads, self.group)

    def mask(self, t: _Tile) -> Tensor | None:
        return self.band[t.q0 - t.q1 :, t.k0 - t.k1 :] if t.banded else None


class _VarlenCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, borders: list[int], key_borders: list[int], window: int, scale: float) -> Tensor:
        calls = _Calls(q, k, borders, key_borders, window)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(*q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))  # [T, N]
        for t in calls.tiles:
            o, m = _forward(
                calls.queries(q, t), calls.keys(k, t), calls.keys(v, t), 0.0, not t.banded, attn_mask=calls.mask(t), scale=scale
            )
            calls.queries(out, t).copy_(o)
            calls.queries(lse[..., None], t)[..., 0].copy_(m)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.borders, ctx.key_borders, ctx.window, ctx.scale = borders, key_borders, window, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        calls = _Calls(q, k, ctx.borders, ctx.key_borders, ctx.window)
        grad = grad.contiguous()
        dq, dk, dv = torch.empty_like(out), torch.zeros_like(k), torch.zeros_like(v)
        for t in calls.tiles:
            gq, gk, gv = _backward(
                calls.queries(grad, t),
                calls.queries(q, t),
                calls.keys(k, t),
                calls.keys(v, t),
                calls.queries(out, t),
                calls.queries(lse[..., None], t)[..., 0],
                0.0,
                not t.banded,
                attn_mask=calls.mask(t),
                scale=ctx.scale,
            )
            calls.queries(dq, t).copy_(gq)
            dk[t.k0 : t.k1] += gk.sum(1).transpose(0, 1)  # windows of tiles overlap, and a key head serves G query heads
            dv[t.k0 : t.k1] += gv.sum(1).transpose(0, 1)
        return dq, dk, dv, None, None, None, None
