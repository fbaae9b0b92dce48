"""Causal attention over packed documents without a [T, T] mask.

    out[t] = sum_s softmax_s(scale q[t].k[s]) v[s]    over s <= t in t's document, at most the last `window` of them

CUDA: torch.nn.attention.varlen, flash attention by document borders. CPU: one call of torch's flash kernel per document; the
rest of this text is about that.

Tensors are [T, heads, H]. A document's slice is handed to the kernel as it lies, with the key heads as its batch and the
queries of one key head as its heads, so grouped queries need no copy of keys and values:

    q [S, K*G, H] -> [K, G, S, H],   k, v [S, K, H] -> [K, 1 -> G (stride 0), S, H]

A document longer than the window is cut into tiles of queries: the first `window` queries are plain causal, later ones come
TILE at a time, each seeing window + TILE - 1 keys through one banded mask that all tiles share. Memory is O(T + TILE * window),
time O(S * window).

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
    """Queries [q0, q1) against keys [k0, k1); causal from a common start, or banded."""

    q0: int
    q1: int
    k0: int
    k1: int
    banded: bool


def varlen_cpu(q: Tensor, k: Tensor, v: Tensor, borders: list[int], window: int, scale: float) -> Tensor:
    """Attention of packed documents.

    Args:
        q: [T, N, H]; k, v: [T, K, H], N a multiple of K, on the CPU, one dtype.
        borders: document borders from 0 to T, ascending; repeated values are empty documents.
        window: keys a query sees, itself included; 0: all before it.
        scale: multiplies q.k.

    Returns:
        [T, N, H].
    """
    return _VarlenCpu.apply(q, k, v, borders, window, scale)


def varlen_cuda(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int, scale: float) -> Tensor:
    """The same on CUDA. cu_seqlens: [N+1] int32 on the device; max_seqlen: no document is longer, or its end would stay unset."""
    attend, takes_gqa = _varlen_attn()
    flags = {"enable_gqa": True} if takes_gqa else {}
    reach = (window - 1 if window else -1, 0)  # keys before and after a query's own
    return attend(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=reach, **flags)


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


def varlen_ref(q: Tensor, k: Tensor, v: Tensor, borders: list[int], window: int, scale: float) -> Tensor:
    """The obvious twin: every score of the row, masked."""
    slots, ends = torch.arange(q.shape[0]), torch.tensor(borders[1:])
    document = torch.searchsorted(ends, slots, right=True)
    distance = slots[:, None] - slots[None, :]
    seen = (document[:, None] == document[None, :]) & (distance >= 0) & (distance < (window or q.shape[0]))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("tnh,snh->nts", q, k) * scale
    return torch.einsum("nts,snh->tnh", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def _tiles(borders: list[int], window: int) -> Iterator[_Tile]:
    for a, b in itertools.pairwise(borders):
        head = min(b, a + window) if window else b
        if head > a:
            yield _Tile(a, head, a, head, False)
        for q0 in range(head, b, TILE):
            q1 = min(q0 + TILE, b)
            yield _Tile(q0, q1, q0 - window + 1, q1, True)


def _band(window: int, like: Tensor) -> Tensor:
    """[TILE, TILE + window - 1] additive: query row i sees key columns i to i + window - 1."""
    offset = torch.arange(TILE + window - 1) - torch.arange(TILE)[:, None]
    return torch.zeros(offset.shape, dtype=like.dtype).masked_fill_((offset < 0) | (offset >= window), float("-inf"))


def _grouped(x: Tensor, kv_heads: int, group: int) -> Tensor:
    """A slice [S, heads, H] as [K, G, S, H], without a copy; heads is K * G, or K and is spread over G."""
    if x.shape[1] == kv_heads:
        return x.transpose(0, 1)[:, None].expand(-1, group, -1, -1)
    return x.unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3)


class _Calls:
    """The kernel calls of one row: for each tile its slices and its mask."""

    def __init__(self, q: Tensor, k: Tensor, borders: list[int], window: int):
        self.kv_heads, self.group = k.shape[1], q.shape[1] // k.shape[1]
        self.tiles = list(_tiles(borders, window))
        self.band = _band(window, q) if any(t.banded for t in self.tiles) else None

    def queries(self, x: Tensor, t: _Tile) -> Tensor:
        return _grouped(x[t.q0 : t.q1], self.kv_heads, self.group)

    def keys(self, x: Tensor, t: _Tile) -> Tensor:
        return _grouped(x[t.k0 : t.k1], self.kv_heads, self.group)

    def mask(self, t: _Tile) -> Tensor | None:
        return self.band[: t.q1 - t.q0, : t.k1 - t.k0] if t.banded else None


class _VarlenCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, borders: list[int], window: int, scale: float) -> Tensor:
        calls = _Calls(q, k, borders, window)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(*q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))  # [T, N]
        for t in calls.tiles:
            o, m = _forward(
                calls.queries(q, t), calls.keys(k, t), calls.keys(v, t), 0.0, not t.banded, attn_mask=calls.mask(t), scale=scale
            )
            calls.queries(out, t).copy_(o)
            calls.queries(lse[..., None], t)[..., 0].copy_(m)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.borders, ctx.window, ctx.scale = borders, window, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        calls = _Calls(q, k, ctx.borders, ctx.window)
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
        return dq, dk, dv, None, None, None
