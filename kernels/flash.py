"""Attention over packed documents in Triton: FlashAttention-2 (arXiv 2307.08691), windows, soft-capped logits, sinks.

    s[t, j] = c(scale q[t].k[j]),   c(x) = x, or cap tanh(x / cap)                      for lo[t] <= j < hi[t]
    out[t] = sum_j p[t, j] v[j],    p = e^(s - lse[t]),   lse[t] = log(sum_j e^s[t, j] + e^sink)

    D[t] = out[t].grad[t],          ds = p (grad[t].v[j] - D[t]) c',   D being what the softmax's normalization adds
    dq[t] = scale sum_j ds k[j],    dk[j] = scale sum_t ds q[t],   dv[j] = sum_t p grad[t],   dsink = -sum_t e^(sink - lse[t]) D[t]

A sink is one learned logit for each head that takes part in the sum and brings no value. Grouped queries: N / K heads read a
key head, and dk, dv are sums over them.

A row of T query slots holds documents end to end. What a query may see is one interval of keys, [lo, hi), and both ends ascend
along the row; causal attention of documents, windows, queries that are the last of their document's keys (context parallelism),
documents without queries or keys: all of it is in those two vectors (`spans`). So the queries that see a key are an interval as
well, [first, end). A tile of queries, cut without regard to documents, needs the keys from the lo of its first query to the hi of
its last; a tile of keys likewise. The forward takes those keys that all of its queries see without a mask. Grids depend on shapes
alone; the host reads nothing. A query that sees no key has out 0, lse -inf (the sink, if there is one).

Four kernels: forward, one program for a tile of queries and a head; D; dq, like the forward; dk and dv, one program for a tile of
keys and a key head. Every sum has one owner and one order: no atomics, the same bits each time. Kept for the backward: q, k, v,
out, lse [T, N].

fp32 inputs are multiplied in fp32, not in TF32, and so without tensor cores. Tiles are sized for the registers and the shared
memory of an H100 or H200.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import launch
from kernels.launch import INTERPRET, block, grid, jit, operator, tl, together, triton, wide_dtype

WIDEST = 256  # columns of a head
SHARED = 192 * 1024  # bytes that the largest program needs
BOTH = 128  # columns up to which a program's registers hold both dk and dv; beyond, each has programs of its own
LOG2E = 1.4426950408889634


class Spans(NamedTuple):
    """Who sees whom, all int32 and ascending.

    lo, hi: [T] query t sees keys [lo, hi).  first, end: [S] key j is seen by queries [first, end).
    """

    lo: Tensor
    hi: Tensor
    first: Tensor
    end: Tensor


class Tiles(NamedTuple):
    queries: int
    keys: int
    warps: int
    stages: int


def spans(queries: int, keys: int, cu_queries: Tensor, cu_keys: Tensor, window: int = 0, causal: bool = True) -> Spans:
    """For documents whose queries are the last of their keys.

    Args:
        queries, keys: T and S.
        cu_queries, cu_keys: [N+1] int32, borders of the same documents, ascending from 0 to T and to S.
        window: keys a query sees, itself included; 0: all before it.
        causal: else a query sees all keys of its document.
    """
    slots = torch.arange(queries, device=cu_queries.device, dtype=torch.int32)
    document = torch.searchsorted(cu_queries[1:], slots, right=True)
    lo, hi = cu_keys[:-1][document], cu_keys[1:][document]
    if causal:
        hi = torch.maximum(hi - (cu_queries[1:][document] - slots) + 1, lo)
    if window:
        lo = torch.maximum(lo, hi - window)
    at = torch.arange(keys, device=cu_keys.device, dtype=torch.int32)
    first, end = (torch.searchsorted(x, at, right=True, out_int32=True) for x in (hi, lo))
    return Spans(lo, hi, first, end)


def flash(q: Tensor, k: Tensor, v: Tensor, seen: Spans, scale: float, softcap: float = 0.0, sinks: Tensor | None = None) -> Tensor:
    """q: [T, N, H]; k, v: [S, K, H] of one dtype, N a multiple of K; softcap: 0 for none; sinks: [N] -> [T, N, H]."""
    return _Flash.apply(q, k, v, sinks, *seen, scale, softcap)


def flash_ref(
    q: Tensor, k: Tensor, v: Tensor, seen: Spans, scale: float, softcap: float = 0.0, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The obvious twin, differentiated by autograd: (out, lse [T, N]) from all scores of the row, masked."""
    wide = wide_dtype(q.dtype)
    k, v = (x.to(wide).repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("tnh,snh->tns", q.to(wide), k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(k.shape[0], device=k.device)
    mask = (at >= seen.lo[:, None]) & (at < seen.hi[:, None])
    scores = scores.masked_fill(~mask[:, None], float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(wide).expand(q.shape[0], -1)[..., None]], -1)
    lse = scores.logsumexp(-1)
    p = torch.exp(scores[..., : k.shape[0]] - lse.masked_fill(lse.isinf(), 0.0)[..., None])
    return torch.einsum("tns,snh->tnh", p, v).to(q.dtype), lse


def partial(
    q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor, max_queries: int, max_keys: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to some of a document's keys: the contract of kernels/attention.py."""
    seen = spans(q.shape[0], k.shape[0], cu_queries, cu_keys, 0, causal)
    return _forward(q, k, v, None, seen.lo, seen.hi, scale, 0.0)


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
    """What these keys add to the gradients of q, k, v; grad, out and lse are of attention to all keys."""
    seen = spans(q.shape[0], k.shape[0], cu_queries, cu_keys, 0, causal)
    return _backward(grad, q, k, v, None, out, lse, *seen, scale, 0.0, True, True)[:3]


def unsupported(head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why these kernels cannot compute this, or None."""
    reason = launch.unsupported(device, dtype)
    if reason is None and head_dim > WIDEST:
        reason = f"its tiles hold heads of up to {WIDEST} columns, not {head_dim}"
    if reason is None and device.type == "cuda":
        there = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        if there < SHARED:
            reason = f"its tiles need {SHARED >> 10} KiB of shared memory and this device has {there >> 10}"
    return reason


def tiles(kernel: str, columns: int, dtype: torch.dtype, capped: bool) -> Tiles:
    """The tiles of "forward", "dq" or "dkv" for heads of so many columns (a power of two).

    Larger ones spilled registers. These spill none in the cases of tests/kernels/compiled.py. Heads whose size is no multiple of 16 are not
    among them, and can spill, since their loads are not aligned."""
    if dtype == torch.float32:
        return WIDE_FP32.get(kernel, FP32[kernel]) if columns > 128 else FP32[kernel]
    columns = max(64, columns)
    return CAPPED.get((kernel, columns), HALF[kernel][columns]) if capped else HALF[kernel][columns]


FP32 = {"forward": Tiles(32, 16, 8, 1), "dq": Tiles(32, 16, 8, 1), "dkv": Tiles(16, 32, 8, 1)}
WIDE_FP32 = {"forward": Tiles(32, 16, 16, 1), "dkv": Tiles(16, 32, 16, 1)}  # beyond 128 columns, where 8 warps spill
HALF = {
    "forward": {64: Tiles(128, 64, 4, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(64, 32, 8, 3)},
    "dq": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 2), 256: Tiles(128, 32, 8, 2)},
    "dkv": {64: Tiles(64, 128, 8, 2), 128: Tiles(32, 128, 8, 2), 256: Tiles(16, 128, 8, 2)},
}
CAPPED = {("dkv", 64): Tiles(32, 128, 8, 2), ("dkv", 128): Tiles(16, 128, 8, 2)}  # where a soft-cap takes registers


@jit
def _product(a, b, acc):
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def _tile(x, start, stop, stride, width, BLOCK: tl.constexpr, WIDE: tl.constexpr, INSIDE: tl.constexpr, EVEN: tl.constexpr):
    """Rows [start, start + BLOCK) of x, 0 from `stop` on and beyond its width. INSIDE: none are; EVEN: it is as wide as the block.

    Within a tile int32 is enough while a slot's strides are below 2^24 elements; in int64 they would take registers."""
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDE)[None, :]
    at = x + start.to(tl.int64) * stride + rows * stride + columns
    if INSIDE and EVEN:
        value = tl.load(at)
    elif INSIDE:
        value = tl.load(at, mask=columns < width, other=0.0)
    else:
        value = tl.load(at, mask=(start + rows < stop) & (columns < width), other=0.0)
    return value


@jit
def _put(value, x, start, stop, stride, width, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDE)[None, :]
    at = x + start.to(tl.int64) * stride + rows * stride + columns
    tl.store(at, value.to(x.dtype.element_ty), mask=(start + rows < stop) & (columns < width))


@jit
def _interval(begin, end, start, size, SIZE: tl.constexpr):
    """The two ends of each row of a tile; (0, 0) past the last row. Then the tile's: where any row begins, all have, the first
    ends, and the last."""
    rows = start + tl.arange(0, SIZE)
    last = tl.minimum(start + SIZE, size) - 1
    begins, ends = tl.load(begin + rows, mask=rows < size, other=0), tl.load(end + rows, mask=rows < size, other=0)
    return begins, ends, tl.load(begin + start), tl.load(begin + last), tl.load(end + start), tl.load(end + last)


@jit
def _steps(begin, common, until, end, SIZE: tl.constexpr):
    """[begin, end) in steps of SIZE, of which those within [common, until) need no mask: (steps before those, how many they are,
    steps after)."""
    before = tl.minimum((tl.maximum(common - begin, 0) + SIZE - 1) // SIZE, (end - begin + SIZE - 1) // SIZE)
    free = tl.maximum(until - begin - before * SIZE, 0) // SIZE
    after = (tl.maximum(end - begin - (before + free) * SIZE, 0) + SIZE - 1) // SIZE
    return before, free, after


@jit
def _logits(product, inner, CAPPED: tl.constexpr):
    """What times `factor` is the score in base 2."""
    if CAPPED:
        product = 1.0 - 2.0 / (1.0 + tl.exp2(product * inner))  # tanh
    return product


@jit
def _attend(
    tile_q, k, v, begins, ends, top, total, acc, start, keys, k_row, v_row, width, factor, inner,
    FREE: tl.constexpr, CAPPED: tl.constexpr, EVEN: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax. top: the largest score so far; total: the sum, relative to that. FREE: no mask."""
    tile_k = _tile(k, start, keys, k_row, width, KEYS, WIDE, FREE, EVEN)
    tile_v = _tile(v, start, keys, v_row, width, KEYS, WIDE, FREE, EVEN)
    logits = _logits(_product(tile_q, tl.trans(tile_k), None), inner, CAPPED)
    if not FREE:
        at = (start + tl.arange(0, KEYS))[None, :]
        logits = tl.where((at >= begins[:, None]) & (at < ends[:, None]), logits, float("-inf"))
    new = tl.maximum(top, tl.max(logits, 1) * factor)
    shift = new if FREE else tl.where(new > float("-inf"), new, 0.0)  # a query may not have seen a key yet
    p = tl.exp2(logits * factor - shift[:, None])
    keep = tl.exp2(top - shift)
    acc = _product(p.to(tile_v.dtype), tile_v, acc * keep[:, None])
    return new, total * keep + tl.sum(p, 1), acc


@jit
def _forward_kernel(
    q, k, v, sinks, lo, hi, out, lse, queries, keys, group, width,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, factor, inner,
    CAPPED: tl.constexpr, SINKS: tl.constexpr, EVEN: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    t = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES  # in a long document the last have the most to do
    begins, ends, begin, common, until, end = _interval(lo, hi, t, queries, QUERIES)
    before, free, after = _steps(begin, common, until, end, KEYS)
    k += head // group * k_head
    v += head // group * v_head
    tile_q = _tile(q + head * q_head, t, queries, q_row, width, QUERIES, WIDE, False, EVEN)
    top, total = tl.full((QUERIES,), float("-inf"), tl.float32), tl.zeros((QUERIES,), tl.float32)
    if SINKS:
        top = tl.zeros_like(total) + tl.load(sinks + head).to(tl.float32) * 1.4426950408889634  # log2(e)
        total += 1.0
    acc = tl.zeros((QUERIES, WIDE), tl.float32)
    for i in range(0, before + after):
        start = begin + (i + tl.where(i < before, 0, free)) * KEYS
        top, total, acc = _attend(
            tile_q, k, v, begins, ends, top, total, acc, start, keys, k_row, v_row, width, factor, inner,
            False, CAPPED, EVEN, KEYS, WIDE,
        )  # fmt: skip
    for i in range(0, free):
        start = begin + (before + i) * KEYS
        top, total, acc = _attend(
            tile_q, k, v, begins, ends, top, total, acc, start, keys, k_row, v_row, width, factor, inner,
            True, CAPPED, EVEN, KEYS, WIDE,
        )  # fmt: skip
    total = tl.where(total > 0.0, total, 1.0)  # of no key: 0 / 1, and -inf + log(1)
    _put(acc / total[:, None], out + head * out_head, t, queries, out_row, width, QUERIES, WIDE)
    rows = t + tl.arange(0, QUERIES)
    tl.store(lse + head * queries + rows, (top + tl.log2(total)) * 0.6931471805599453, mask=rows < queries)


@jit
def _delta_kernel(
    grad, out, delta, queries, width, grad_row, grad_head, out_row, out_head,
    EVEN: tl.constexpr, QUERIES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * QUERIES
    g = _tile(grad + head * grad_head, t, queries, grad_row, width, QUERIES, WIDE, False, EVEN)
    o = _tile(out + head * out_head, t, queries, out_row, width, QUERIES, WIDE, False, EVEN)
    rows = t + tl.arange(0, QUERIES)
    tl.store(delta + head * queries + rows, tl.sum(g.to(tl.float32) * o.to(tl.float32), 1), mask=rows < queries)


@jit
def _weights(logits, lse, seen, factor):
    """p, from the log-sum-exp of all keys."""
    return tl.where(seen, tl.exp2(logits * factor - lse * 1.4426950408889634), 0.0)


@jit
def _slope(p, dp, delta, logits, CAPPED: tl.constexpr):
    """ds by the product of queries and keys, but for the scale."""
    ds = p * (dp - delta)
    if CAPPED:
        ds *= 1.0 - logits * logits
    return ds


@jit
def _numbers(lse, delta, t, queries, QUERIES: tl.constexpr):
    """lse and D of a tile of queries."""
    rows = t + tl.arange(0, QUERIES)
    return tl.load(lse + rows, mask=rows < queries, other=0.0), tl.load(delta + rows, mask=rows < queries, other=0.0)


@jit
def _dq_kernel(
    grad, q, k, v, lo, hi, lse, delta, dq, queries, keys, group, width,
    grad_row, grad_head, q_row, q_head, k_row, k_head, v_row, v_head, dq_row, dq_head, scale, factor, inner,
    CAPPED: tl.constexpr, EVEN: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    t = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    begins, ends, begin, _, _, end = _interval(lo, hi, t, queries, QUERIES)
    k += head // group * k_head
    v += head // group * v_head
    tile_q = _tile(q + head * q_head, t, queries, q_row, width, QUERIES, WIDE, False, EVEN)
    tile_g = _tile(grad + head * grad_head, t, queries, grad_row, width, QUERIES, WIDE, False, EVEN)
    row_lse, row_delta = _numbers(lse + head * queries, delta + head * queries, t, queries, QUERIES)
    acc = tl.zeros((QUERIES, WIDE), tl.float32)
    for i in range(0, (end - begin + KEYS - 1) // KEYS):
        start = begin + i * KEYS
        tile_k = _tile(k, start, keys, k_row, width, KEYS, WIDE, False, EVEN)
        tile_v = _tile(v, start, keys, v_row, width, KEYS, WIDE, False, EVEN)
        at = (start + tl.arange(0, KEYS))[None, :]
        seen = (at >= begins[:, None]) & (at < ends[:, None])
        logits = _logits(_product(tile_q, tl.trans(tile_k), None), inner, CAPPED)
        p = _weights(logits, row_lse[:, None], seen, factor)
        ds = _slope(p, _product(tile_g, tl.trans(tile_v), None), row_delta[:, None], logits, CAPPED)
        acc = _product(ds.to(tile_k.dtype), tile_k, acc)
    _put(acc * scale, dq + head * dq_head, t, queries, dq_row, width, QUERIES, WIDE)


@jit
def _dkv_kernel(
    grad, q, k, v, first, end, lse, delta, dk, dv, queries, keys, group, width,
    grad_row, grad_head, q_row, q_head, k_row, k_head, v_row, v_head, dk_row, dk_head, scale, factor, inner,
    K: tl.constexpr, V: tl.constexpr, CAPPED: tl.constexpr, EVEN: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1).to(tl.int64)
    s = tl.program_id(0) * KEYS
    firsts, ends, begin, _, _, stop = _interval(first, end, s, keys, KEYS)
    tile_k = _tile(k + kv_head * k_head, s, keys, k_row, width, KEYS, WIDE, False, EVEN)
    tile_v = _tile(v + kv_head * v_head, s, keys, v_row, width, KEYS, WIDE, False, EVEN)
    acc_k, acc_v = tl.zeros((KEYS, WIDE), tl.float32), tl.zeros((KEYS, WIDE), tl.float32)
    for g in range(0, group):
        head = kv_head * group + g
        for i in range(0, (stop - begin + QUERIES - 1) // QUERIES):
            t = begin + i * QUERIES
            tile_q = _tile(q + head * q_head, t, queries, q_row, width, QUERIES, WIDE, False, EVEN)
            tile_g = _tile(grad + head * grad_head, t, queries, grad_row, width, QUERIES, WIDE, False, EVEN)
            row_lse, row_delta = _numbers(lse + head * queries, delta + head * queries, t, queries, QUERIES)
            at = (t + tl.arange(0, QUERIES))[None, :]
            seen = (at >= firsts[:, None]) & (at < ends[:, None])
            logits = _logits(_product(tile_k, tl.trans(tile_q), None), inner, CAPPED)
            p = _weights(logits, row_lse[None, :], seen, factor)
            if V:
                acc_v = _product(p.to(tile_g.dtype), tile_g, acc_v)
            if K:
                ds = _slope(p, _product(tile_v, tl.trans(tile_g), None), row_delta[None, :], logits, CAPPED)
                acc_k = _product(ds.to(tile_q.dtype), tile_q, acc_k)
    if K:
        _put(acc_k * scale, dk + kv_head * dk_head, s, keys, dk_row, width, KEYS, WIDE)
    if V:
        _put(acc_v, dv + kv_head * dk_head, s, keys, dk_row, width, KEYS, WIDE)


def _forward_fake(q, k, v, sinks, lo, hi, scale, softcap):
    queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((heads, queries), dtype=torch.float32).T  # a head's numbers lie together


@operator("flash", _forward_fake)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, lo: Tensor, hi: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    out, lse = _forward_fake(q, k, v, sinks, lo, hi, scale, softcap)
    queries, heads, width = q.shape
    q, k, v = (together(x) for x in (q, k, v))
    size, way = _sizes("forward", q, softcap), _ways(q, scale, softcap)
    if queries:
        _forward_kernel[grid(triton.cdiv(queries, size["QUERIES"]), heads)](
            q, k, v, sinks, lo, hi, out, lse, queries, k.shape[0], heads // k.shape[1], width,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2], SINKS=sinks is not None, **way, **size,
        )  # fmt: skip
    return out, lse


def _backward_fake(grad, q, k, v, sinks, out, lse, lo, hi, first, end, scale, softcap, needs_q, needs_kv):
    dq, dk, dv = (x.new_empty(x.shape if needs else 0) for x, needs in ((q, needs_q), (k, needs_kv), (v, needs_kv)))
    return dq, dk, dv, q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)


@operator("flash_backward", _backward_fake)
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lo: Tensor,
    hi: Tensor,
    first: Tensor,
    end: Tensor,
    scale: float,
    softcap: float,
    needs_q: bool,
    needs_kv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dsinks). lse in any layout; those that are not needed are empty."""
    dq, dk, dv, dsinks = _backward_fake(grad, q, k, v, sinks, out, lse, lo, hi, first, end, scale, softcap, needs_q, needs_kv)
    (queries, heads, width), (keys, kv_heads, _) = q.shape, k.shape
    grad, q, k, v, out = (together(x) for x in (grad, q, k, v, out))
    lse = lse.T.contiguous()
    way, delta = _ways(q, scale, softcap), torch.empty_like(lse)
    if queries:
        size = _sizes("delta", q, softcap)
        _delta_kernel[grid(triton.cdiv(queries, size["QUERIES"]), heads)](
            grad, out, delta, queries, width, *grad.stride()[:2], *out.stride()[:2], EVEN=way["EVEN"], **size
        )
    given = (*grad.stride()[:2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    if needs_q and queries:
        size = _sizes("dq", q, softcap)
        _dq_kernel[grid(triton.cdiv(queries, size["QUERIES"]), heads)](
            grad, q, k, v, lo, hi, lse, delta, dq, queries, keys, heads // kv_heads, width,
            *given, *dq.stride()[:2], scale, **way, **size,
        )  # fmt: skip
    if needs_kv and keys:
        size = _sizes("dkv", q, softcap)
        for which in ({"K": True, "V": True},) if size["WIDE"] <= BOTH else ({"K": True, "V": False}, {"K": False, "V": True}):
            _dkv_kernel[grid(triton.cdiv(keys, size["KEYS"]), kv_heads)](
                grad, q, k, v, first, end, lse, delta, dk, dv, queries, keys, heads // kv_heads, width,
                *given, *dk.stride()[:2], scale, **which, **way, **size,
            )  # fmt: skip
    if sinks is not None:
        dsinks = -(torch.exp(sinks[:, None] - lse) * delta).sum(1).to(sinks.dtype)
    return dq, dk, dv, dsinks


def _wide(x: Tensor) -> int:
    """Columns of a tile; tensor cores want 16."""
    return max(16, block(x.shape[-1]))


def _sizes(kernel: str, q: Tensor, softcap: float) -> dict[str, int]:
    """Blocks and launch options."""
    wide = _wide(q)
    if kernel == "delta":
        return {"QUERIES": 32, "WIDE": wide, "num_warps": 4}
    chosen = tiles(kernel, wide, q.dtype, bool(softcap))
    return {"QUERIES": chosen.queries, "KEYS": chosen.keys, "WIDE": wide, "num_warps": chosen.warps, "num_stages": chosen.stages}


def _ways(q: Tensor, scale: float, softcap: float) -> dict[str, float | bool | str]:
    """How q.k becomes a score in base 2: factor q.k, or factor tanh(q.k scale / cap), tanh(x) from 2^(inner q.k) = e^2x."""
    assert scale > 0, "the largest score is taken from the largest product"
    return {
        "factor": (softcap or scale) * LOG2E,
        "inner": 2 * LOG2E * scale / softcap if softcap else 0.0,
        "CAPPED": bool(softcap),
        "EVEN": q.shape[-1] == _wide(q),
    }


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        lo: Tensor,
        hi: Tensor,
        first: Tensor,
        end: Tensor,
        scale: float,
        softcap: float,
    ) -> Tensor:
        out, lse = _forward(q, k, v, sinks, lo, hi, scale, softcap)
        ctx.save_for_backward(q, k, v, sinks, out, lse, lo, hi, first, end)
        ctx.scale, ctx.softcap = scale, softcap
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        needs_q, needs_k, needs_v, needs_sinks = ctx.needs_input_grad[:4]
        dq, dk, dv, dsinks = _backward(grad, *ctx.saved_tensors, ctx.scale, ctx.softcap, needs_q, needs_k or needs_v)
        found = ((dq, needs_q), (dk, needs_k), (dv, needs_v), (dsinks, needs_sinks))
        return *(x if needs else None for x, needs in found), *[None] * 6
