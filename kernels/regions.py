"""The three regions of a block between which attention stands, each one autograd function that says itself what it keeps.

    queries_keys_values   h -> norm -> q, k, v with their adapters -> norms of heads -> rotary       keeps h
    linear                attention's result -> output projection with its adapter                  keeps its input, which attention keeps
    feed_forward          h + a -> norm -> gate, up -> act(gate) up -> down, all with adapters        keeps h + a, gate, up

and besides a number a row for each norm and the [T, r] inside each adapter; queries and keys as they were before norms of heads, where
there are such. What is cheap is made again in the backward: norms, act(gate) up, dropout masks. Of a Llama-shaped block in bf16 that is
94.6 KB a token for hidden 4096 and feed-forward 14336, where autograd on the same lines keeps 149.9 KB; no product is computed twice.

Under tensor parallelism `shard` parts exchange rows (parallel/tensor.py): `leave` after the norm gathers all ranks' rows, `leave` of a
row-split linear sums and cuts; `back` is the transpose. What was gathered is gathered again in the backward instead of kept.

The halves that do arithmetic come from kernels/{rms_norm,rope,glu,lora}.py in the implementation `Ops` names, so a region is the same in
torch and in Triton. Any gradient may come from above, and any subset of weights, biases and adapters may train.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import glu, lora, rms_norm, rope
from kernels.launch import wide_dtype
from kernels.lora import Kind, Needs, Part

# What stands in for gate, and for up: two tensors or None. `none` makes them again in the backward. `8bit` rounds them to a float with 3
# bits of mantissa, scaled by row, for the backward only: loss and results do not change, gradients do, by some percent of themselves.
KEEP = {
    "all": lambda x: (x, None),
    "none": lambda x: (None, None),
    "8bit": lambda x: _packed(x),
}
LARGEST = 448.0  # of float8_e4m3fn


class Shard(Protocol):
    """The exchange of rows among tensor-parallel ranks after something, and its transpose."""

    def leave(self, y: Tensor) -> Tensor: ...

    def back(self, grad: Tensor) -> Tensor: ...


class Ops(NamedTuple):
    """Which implementation computes each operation: a key of that file's IMPLS."""

    norm: str = "torch"
    rope: str = "torch"
    glu: str = "torch"
    dropout: str = "torch"


class Norm(NamedTuple):
    weight: Tensor  # [D]
    eps: float
    offset: bool
    shard: Shard | None = None


class Heads(NamedTuple):
    """What happens to queries and keys."""

    cos: Tensor  # [T, 1, R]
    sin: Tensor
    size: int
    q_weight: Tensor | None = None  # [H], norms of heads
    k_weight: Tensor | None = None
    eps: float = 0.0
    offset: bool = False


def queries_keys_values(
    h: Tensor, norm: Norm, parts: Sequence[Part], kinds: Sequence[Kind], heads: Heads, ops: Ops
) -> tuple[Tensor, Tensor, Tensor]:
    """h: [T, D] -> q [T, N, H], k and v [T, K, H]; under tensor parallelism h is this rank's rows and the heads are."""
    fixed = _Fixed(tuple(kinds), ops, norm.eps, norm.offset, norm.shard, None, heads.size, heads.eps, heads.offset)
    tensors = (h, norm.weight, _seeds(h, kinds), heads.cos, heads.sin, heads.q_weight, heads.k_weight)
    return _QueriesKeysValues.apply(fixed, *tensors, *_flat(parts))


def linear(x: Tensor, part: Part, kind: Kind, shard: Shard | None, ops: Ops) -> Tensor:
    """x: [T, in] -> [T, out]; the bias is added after the exchange."""
    return _Linear.apply(_Fixed((kind,), ops, leave=shard), x, _seeds(x, (kind,)), *part)


def feed_forward(
    h: Tensor,
    add: Tensor,
    norm: Norm,
    parts: Sequence[Part],
    kinds: Sequence[Kind],
    act: str,
    shard: Shard | None,
    only_added: bool,
    keep: str,
    ops: Ops,
) -> tuple[Tensor, Tensor]:
    """h, add: [T, D] -> (h + add, the network's result for its norm).

    parts: gate, up, down; shard: of the down projection; only_added: no backward reads the result, so that it need not be computed when
    the block is recomputed: what it holds then is not defined; keep: one of KEEP.
    """
    fixed = _Fixed(tuple(kinds), ops, norm.eps, norm.offset, norm.shard, shard, act=act, only_added=only_added, keep=keep)
    return _FeedForward.apply(fixed, h, add, norm.weight, _seeds(h, kinds), *_flat(parts))


class _Fixed(NamedTuple):
    """What is no tensor."""

    kinds: tuple[Kind, ...]
    ops: Ops
    eps: float = 0.0
    offset: bool = False
    enter: Shard | None = None  # after the norm
    leave: Shard | None = None  # at the end
    size: int = 0  # of a head
    head_eps: float = 0.0
    head_offset: bool = False
    act: str = ""
    only_added: bool = False
    keep: str = "all"

    def norm(self, h: Tensor, add: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(h + add, the norm of all ranks' rows, r)."""
        total, n, r = rms_norm.forward(h, add, weight, self.eps, self.offset, self.ops.norm)
        return total, n if self.enter is None else self.enter.leave(n), r

    def norm_backward(self, grad: Tensor, to_sum: Tensor | None, h: Tensor, r: Tensor, weight: Tensor, needs_dw: bool):
        grad = grad if self.enter is None else self.enter.back(grad)
        return rms_norm.backward(grad, to_sum, h, r, weight, self.offset, needs_dw, self.ops.norm)


def _flat(parts: Sequence[Part]) -> list[Tensor | None]:
    return [tensor for part in parts for tensor in part]


def _parts(flat: Sequence[Tensor | None]) -> list[Part]:
    return [Part(*flat[i : i + 4]) for i in range(0, len(flat), 4)]


def _needs(flat: Sequence[bool]) -> list[Needs]:
    return [Needs(*flat[i : i + 4]) for i in range(0, len(flat), 4)]


def _seeds(x: Tensor, kinds: Sequence[Kind]) -> Tensor | None:
    """A number for each linear None where nothing is dropped."""
    if not any(kind.dropout for kind in kinds):
        return None
    return lora.seeds(len(kinds), x.device)


def _packed(x: Tensor) -> tuple[Tensor, Tensor]:
    """[T, F] -> ([T, F] float8_e4m3fn, [T, 1] fp32 by which it is to be multiplied)."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-30) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn), scale


def _unpacked(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x if scale is None else (x.to(scale.dtype) * scale).to(dtype)


def _recomputed() -> bool:
    """Does a backward pass run, which has activation checkpointing run this forward again? (The compiler leaves out by itself what
    nobody reads.)"""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _with_bias(y: Tensor, part: Part) -> Tensor:
    return y if part.bias is None else y + part.bias.to(y.dtype)


def _bias_grad(grad: Tensor, part: Part, need: Needs) -> Tensor | None:
    return grad.sum(0, dtype=wide_dtype(grad.dtype)).to(part.bias.dtype) if need.bias else None


def _gate_up(
    fixed: _Fixed, kept: Sequence[Tensor | None], x: Tensor | None, inner: Sequence[Part], seed: Tensor | None, dtype: torch.dtype
):
    """gate and up in the backward, from what stands in for them (KEEP), or from the norm x [T, D] where nothing does."""
    if fixed.keep != "none":
        return [_unpacked(*kept[:2], dtype), _unpacked(*kept[2:], dtype)]
    made, _ = lora.linears(x, inner, fixed.kinds[:2], seed, fixed.ops.dropout)
    return [_with_bias(y, part) for y, part in zip(made, inner)]


class _QueriesKeysValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fixed: _Fixed, h, weight, seed, cos, sin, q_weight, k_weight, *flat):
        parts = _parts(flat)
        _, x, r = fixed.norm(h, None, weight)
        found, low = lora.linears(x, parts, fixed.kinds, seed, fixed.ops.dropout)
        q, k, v = (_with_bias(y, part).unflatten(-1, (-1, fixed.size)) for y, part in zip(found, parts))
        before = (q, k) if q_weight is not None else (None, None)
        ctx.save_for_backward(h, r, low, *before, weight, seed, cos, sin, q_weight, k_weight, *flat)
        ctx.fixed = fixed
        q, k = rope.forward(q, k, cos, sin, q_weight, k_weight, fixed.head_eps, fixed.head_offset, fixed.ops.rope)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx, gq, gk, gv):
        h, r, low, q, k, weight, seed, cos, sin, q_weight, k_weight, *flat = ctx.saved_tensors
        fixed, parts, needs = ctx.fixed, _parts(flat), _needs(ctx.needs_input_grad[8:])
        _, needs_h, needs_norm, _, _, _, needs_q, needs_k = ctx.needs_input_grad[:8]
        dq, dk, dq_weight, dk_weight = rope.backward(
            gq, gk, q, k, cos, sin, q_weight, k_weight, fixed.head_eps, fixed.head_offset, needs_q or needs_k, fixed.ops.rope
        )
        grads = [g.flatten(-2) for g in (dq, dk, gv)]
        needs_dx, drop = needs_h or needs_norm, fixed.ops.dropout
        dx, slopes = lora.inputs_gradient(grads, parts, fixed.kinds, needs, seed, needs_dx, drop)
        x = fixed.norm(h, None, weight)[1] if lora.reads_input(needs) else None
        found = lora.weights_gradients(grads, x, low, slopes, parts, fixed.kinds, needs, seed, drop)
        found = [f._replace(bias=_bias_grad(g, part, need)) for f, g, part, need in zip(found, grads, parts, needs)]
        dh = dw = None
        if needs_dx:
            dh, dw = fixed.norm_backward(dx, None, h, r, weight, needs_norm)
        return None, dh, dw, None, None, None, dq_weight, dk_weight, *_flat(found)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fixed: _Fixed, x, seed, *flat):
        part = Part(*flat)
        (y,), low = lora.linears(x, [part], fixed.kinds, seed, fixed.ops.dropout)
        ctx.save_for_backward(x, low, seed, *flat)
        ctx.fixed = fixed
        return _with_bias(y if fixed.leave is None else fixed.leave.leave(y), part)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, low, seed, *flat = ctx.saved_tensors
        fixed, part, need = ctx.fixed, Part(*flat), Needs(*ctx.needs_input_grad[3:])
        bias = _bias_grad(grad, part, need)
        g = grad if fixed.leave is None else fixed.leave.back(grad)
        needs_dx, drop = ctx.needs_input_grad[1], fixed.ops.dropout
        dx, slopes = lora.inputs_gradient([g], [part], fixed.kinds, [need], seed, needs_dx, drop)
        (found,) = lora.weights_gradients([g], x, low, slopes, [part], fixed.kinds, [need], seed, drop)
        return None, dx, None, *found._replace(bias=bias)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fixed: _Fixed, h, add, weight, seed, *flat):
        *inner, down = _parts(flat)
        total, x, r = fixed.norm(h, add, weight)
        found, low = lora.linears(x, inner, fixed.kinds[:2], seed, fixed.ops.dropout)
        gate, up = (_with_bias(y, part) for y, part in zip(found, inner))
        middle = glu.forward(gate, up, fixed.act, fixed.ops.glu)
        last = None if seed is None else seed[2:]
        ctx.fixed = fixed
        gate, up = KEEP[fixed.keep](gate), KEEP[fixed.keep](up)
        if fixed.only_added and _recomputed():
            low_down = lora.inside(middle, [down], fixed.kinds[2:], last, fixed.ops.dropout)
            ctx.save_for_backward(total, r, *gate, *up, low, low_down, weight, seed, *flat)
            return total.view(total.shape), total.detach()  # the latter is anything of that shape
        (y,), low_down = lora.linears(middle, [down], fixed.kinds[2:], last, fixed.ops.dropout)
        ctx.save_for_backward(total, r, *gate, *up, low, low_down, weight, seed, *flat)
        # a view: of a result that is also kept torch 2.11 compiles without the gradient
        return total.view(total.shape), _with_bias(y if fixed.leave is None else fixed.leave.leave(y), down)

    @staticmethod
    @once_differentiable
    def backward(ctx, to_sum, grad):
        total, r, gate, gate_scale, up, up_scale, low, low_down, weight, seed, *flat = ctx.saved_tensors
        fixed, (*inner, down), (*needs, need) = ctx.fixed, _parts(flat), _needs(ctx.needs_input_grad[5:])
        drop, (needs_h, needs_add, needs_norm) = fixed.ops.dropout, ctx.needs_input_grad[1:4]
        needs_dx = needs_h or needs_add or needs_norm
        inside = needs_dx or any(map(any, needs))  # does anything before the product of gate and up want a gradient?
        again = lora.reads_input([need])
        bias = _bias_grad(grad, down, need)
        g = grad if fixed.leave is None else fixed.leave.back(grad)
        x = middle = dgate = dup = dh = dw = None
        if lora.reads_input(needs) or (fixed.keep == "none" and (inside or again)):
            x = fixed.norm(total, None, weight)[1]
        if inside or again:
            gate, up = _gate_up(fixed, (gate, gate_scale, up, up_scale), x, inner, seed, grad.dtype)
        last = None if seed is None else seed[2:]
        dmiddle, slopes = lora.inputs_gradient([g], [down], fixed.kinds[2:], [need], last, inside, drop)
        if inside:
            dgate, dup, middle = glu.backward(dmiddle, gate, up, fixed.act, again, fixed.ops.glu)
        elif again:
            middle = glu.forward(gate, up, fixed.act, fixed.ops.glu)
        (found_down,) = lora.weights_gradients([g], middle, low_down, slopes, [down], fixed.kinds[2:], [need], last, drop)
        del middle, dmiddle, g
        found = [Part(*[None] * 4)] * 2
        if inside:
            grads = [dgate, dup]
            dx, slopes = lora.inputs_gradient(grads, inner, fixed.kinds[:2], needs, seed, needs_dx, drop)
            found = lora.weights_gradients(grads, x, low, slopes, inner, fixed.kinds[:2], needs, seed, drop)
            found = [f._replace(bias=_bias_grad(g, part, n)) for f, g, part, n in zip(found, grads, inner, needs)]
        if needs_dx:
            dh, dw = fixed.norm_backward(dx, to_sum, total, r, weight, needs_norm)
        return None, dh if needs_h else None, dh if needs_add else None, dw, None, *_flat([*found, found_down._replace(bias=bias)])
