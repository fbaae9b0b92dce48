"""Collectives that autograd sees, each with its transpose. Tensors are plain; the first dimension is what moves.

| forward                          | backward                         | where                                               |
|----------------------------------|----------------------------------|-----------------------------------------------------|
| `gather(x)`: all-gather          | reduce-scatter (sum)             | sequence-sharded -> whole, before column linears    |
| `scatter_sum(x)`: reduce-scatter | all-gather                       | partial sums -> sequence-sharded, after row linears |
| `exchange(x)`: all-to-all        | all-to-all                       | Ulysses: sequence-sharded <-> head-sharded          |

They are torch's functional collectives (operators with fake kernels, traceable with `fullgraph=True`) and wait at once: an
asynchronous tensor that enters a compiled block loses its gradient in torch 2.13.

`pass_on` is point to point and neither: it is for the inside of an operator.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_ops = torch.ops._c10d_functional


def _wait(x: Tensor) -> Tensor:
    """As a view: waiting returns its argument itself, and of an autograd function that returns an alias torch 2.11 compiles the
    forward and loses the gradient, without a word."""
    return _ops.wait_tensor(x).view(x.shape)


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _wait(_ops.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name))


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _wait(_ops.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name))


def _all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    each = [x.shape[0] // group.size()] * group.size()
    return _wait(_ops.all_to_all_single(x.contiguous(), each, each, group.group_name))


def all_reduce(x: Tensor, group: dist.ProcessGroup, op: str = "sum") -> Tensor:
    """Sum or max over the group; not differentiable here."""
    return _wait(_ops.all_reduce(x.contiguous(), op, group.group_name))


def pass_on(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, list[dist.Work]]:
    """Sends x to the next rank of the group, round and round, and takes what the one before sends, of the same shape.

    Returns at once: the second value is to be waited for, before what arrives is read and before x is written to or let go.
    """
    arriving, rank, size = torch.empty_like(x), group.rank(), group.size()
    send = dist.P2POp(dist.isend, x, group=group, group_peer=(rank + 1) % size)
    receive = dist.P2POp(dist.irecv, arriving, group=group, group_peer=(rank - 1) % size)
    return arriving, dist.batch_isend_irecv([send, receive])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _reduce_scatter(grad, ctx.group), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _all_gather(grad, ctx.group), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _all_to_all(grad, ctx.group), None


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T/n, ...] -> [T, ...] in rank order. Backward: each rank's part of the sum of all gradients."""
    return _Gather.apply(x, group)


def scatter_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T, ...] -> this rank's [T/n, ...] of the sum over the group. Backward: all-gather."""
    return _ScatterSum.apply(x, group)


def exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n * k, ...]: block j of k goes to rank j, and the result holds what rank j sent here. It is its own transpose."""
    return _Exchange.apply(x, group)
