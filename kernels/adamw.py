"""AdamW (arXiv 1711.05101) over any number of tensors of any sizes in one launch.

    g = scale * grad,  p <- p (1 - lr decay),  m <- m + (1 - beta1) (g - m),  v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

torch.optim.AdamW's update, with a factor of the gradients that lies on the device (that of clipping): they need no pass of their own
to be scaled in. fp32 arithmetic, in which each operation rounds once, here and in the twin: square root and quotient are the exact
ones, and multiplications are not contracted with additions. What is stored is rounded to the tensors' dtype.

A program updates a chunk of BLOCK elements of one tensor. Which one, it reads from a table on the device that has the addresses:
parameters and state stay where they are, gradients come back elsewhere when they are made anew. So the table is made from the
addresses of each step, and copied, from pinned memory and without waiting, only if it is not one of the last ones.

Not an operator, other than most launchers here: nothing traces an optimizer's step, and a thousand tensors would go through the
dispatcher and back. So it tells autograd itself that tensors have changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.launch import grid, jit, tl

BLOCK = 1024  # elements of a program: 8 a thread, so four loads of 32 bytes are on their way at once
VECTOR = 16  # bytes that a thread can load at once, where addresses and sizes are multiples of them


class Update(NamedTuple):
    """What tensors of a launch have in common. step: the number t of the update, from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    step: int

    def factors(self) -> tuple[float, float, float, float, float, float, float]:
        """lr, 1 - beta1, beta2, 1 - beta2, eps, and the two that correct the moments' bias; from fp64."""
        rate, root = self.lr / (1 - self.beta1**self.step), math.sqrt(1 - self.beta2**self.step)
        return float(self.lr), 1 - self.beta1, self.beta2, 1 - self.beta2, float(self.eps), rate, 1 / root


def adamw(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    decays: Sequence[float], scale: Tensor | None, update: Update,
) -> None:  # fmt: skip
    """Updates parameters and moments in place, by Triton.

    params, grads, exp_avgs, exp_avg_sqs: of each tensor four contiguous ones of one size; all on one device, in one dtype.
    decays: the weight decay of each; scale: [] fp32 on the device, or None for 1.
    """
    device, dtype = params[0].device, params[0].dtype
    pointers, sizes, rows, first = [], [], [], 0
    for four in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        size = four[0].numel()
        for t in four:
            assert t.is_contiguous() and t.numel() == size and t.dtype == dtype and t.device == device, (t.shape, t.dtype, t.device)
        where = [t.data_ptr() for t in four]
        rows += [*where, size, first]
        pointers += where
        sizes.append(size)
        first += -(-size // BLOCK)
    if not first:
        return
    aligned = math.gcd(VECTOR, *pointers, *(size * dtype.itemsize for size in sizes)) == VECTOR
    _adamw_kernel[grid(first)](
        _on_device(tuple(rows), torch.int64, device), _owners(tuple(sizes), device), _on_device(tuple(decays), torch.float32, device),
        scale, *update.factors(),
        DTYPE=getattr(tl, str(dtype).removeprefix("torch.")), BYTES=dtype.itemsize, ALIGNED=aligned, SCALED=scale is not None,
        BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs])


def adamw_ref(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    decays: Sequence[float], scale: Tensor | None, update: Update,
) -> None:  # fmt: skip
    """The obvious twin, one tensor after the other: equal to the bit in fp32."""
    lr, rest1, beta2, rest2, eps, rate, inverse_root = update.factors()
    for p, grad, exp_avg, exp_avg_sq, decay in zip(params, grads, exp_avgs, exp_avg_sqs, decays, strict=True):
        g = grad.float() if scale is None else grad.float() * scale
        m, v = exp_avg.float(), exp_avg_sq.float()
        m = m + (g - m) * rest1
        v = v * beta2 + g * g * rest2
        kept = p.float() * (1 - torch.tensor(decay, device=p.device) * lr)
        root = torch.sqrt(v.double()).float()  # torch's own fp32 root is off by a bit here and there on the CPU
        p.copy_(kept - m / (root * inverse_root + eps) * rate)
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)


@lru_cache(maxsize=64)
def _on_device(numbers: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers as a tensor. Pinned memory that is given up is not used again before the copy is done: torch sees to that."""
    host = torch.tensor(numbers, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@lru_cache(maxsize=64)
def _owners(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """[chunks] int32: the tensor that each chunk is of."""
    chunks = torch.tensor([-(-size // BLOCK) for size in sizes])
    host = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), chunks)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@jit
def _adamw_kernel(
    table, owners, decays, scale, lr, rest1, beta2, rest2, eps, rate, inverse_root,
    DTYPE: tl.constexpr, BYTES: tl.constexpr, ALIGNED: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    number = tl.load(owners + chunk)
    row = table + number.to(tl.int64) * 6
    p_at = tl.load(row).to(tl.pointer_type(DTYPE))
    g_at = tl.load(row + 1).to(tl.pointer_type(DTYPE))
    m_at = tl.load(row + 2).to(tl.pointer_type(DTYPE))
    v_at = tl.load(row + 3).to(tl.pointer_type(DTYPE))
    size = tl.load(row + 4)
    if ALIGNED:  # otherwise the compiler knows nothing of addresses that it reads, and loads one element at a time
        p_at = tl.multiple_of(p_at, 16)
        g_at = tl.multiple_of(g_at, 16)
        m_at = tl.multiple_of(m_at, 16)
        v_at = tl.multiple_of(v_at, 16)
        size = tl.multiple_of(size, 16 // BYTES)
    at = (chunk - tl.load(row + 5)) * BLOCK + tl.arange(0, BLOCK)  # int64
    inside = at < size
    p = tl.load(p_at + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_at + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_at + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_at + at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        g = g * tl.load(scale)
    m = m + (g - m) * rest1
    v = v * beta2 + g * g * rest2
    p = p * (1.0 - tl.load(decays + number) * lr)
    p = p - tl.div_rn(m, tl.sqrt_rn(v) * inverse_root + eps) * rate
    tl.store(p_at + at, p.to(DTYPE), mask=inside)
    tl.store(m_at + at, m.to(DTYPE), mask=inside)
    tl.store(v_at + at, v.to(DTYPE), mask=inside)
