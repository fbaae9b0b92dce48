"""What every Triton kernel here shares: an import that may fail, when kernels can run, how they become operators.

A file of `kernels/` holds the public function, its obvious twin in torch, Triton kernels with their launchers, and `IMPLS`, the
table of implementations by name. Launchers are operators with fake versions (`operator`), so that compiled blocks, selective
recomputation and dry runs see each of them as one thing.

Rules for kernels. Arithmetic in fp32. Sizes that can exceed 2^31 elements are indexed in int64: rows by `program_id(0).to(tl.int64)`,
and whatever else is multiplied by a stride. What grows with the number of tokens is the grid's first dimension: the second takes only
65,535 programs (`grid`). Strides are arguments. Nothing is read back to the host. Settings (blocks, warps) are functions of the shape,
not tuned at run time: packing never brings a new shape, and a first step should not wait for tuning.

`TRITON_INTERPRET=1`, set before this is imported, runs kernels in Triton's interpreter on CPU tensors, slowly: the tests' way.
There `tl.dot` multiplies the raw bits of bf16 operands (Triton 3.6 to 3.9), so kernels widen them first where INTERPRET says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

try:
    import triton
    import triton.language as tl
    from triton import jit
except ImportError:  # no wheel for this platform: the torch implementations are what is left
    triton = tl = None

    def jit(kernel):
        return kernel


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRET = tl.constexpr(INTERPRETED) if tl else INTERPRETED  # the same, for use inside kernels
MOST = (2**31 - 1, 65535)  # programs along the first and the second dimension of a CUDA grid
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton kernels cannot run there, or None."""
    if triton is None:
        return "triton is not installed"
    if device.type != "cuda" and not INTERPRETED:
        return f"it needs a CUDA device, not {device.type}"
    if dtype not in DTYPES:
        return f"it has no kernel for {str(dtype).removeprefix('torch.')}"
    return None


def operator(name: str, fake: Callable, mutates: tuple[str, ...] = ()) -> Callable:
    """Registers the decorated launcher as `salamander::name`; `fake` gives the shapes and dtypes of its results.

    Not differentiable: autograd functions call it in their forward and backward."""

    def register(launcher: Callable) -> Callable:
        op = torch.library.custom_op(f"salamander::{name}", launcher, mutates_args=mutates)
        op.register_fake(fake)
        return op

    return register


def block(size: int) -> int:
    """The power of two that holds `size`: a block must be one."""
    return 1 << max(size - 1, 0).bit_length()


def warps(elements: int) -> int:
    """Warps for a program whose block has so many elements: 8 or more for each thread, 4 to 16 warps."""
    return min(16, max(4, elements // 512))


def grid(x: int, y: int = 1) -> tuple[int, int]:
    """So many programs, if a device takes them: y must not depend on the number of tokens."""
    assert x <= MOST[0] and y <= MOST[1], f"{x} x {y} programs, where a device takes {MOST[0]} x {MOST[1]}"
    return x, y


def together(x: torch.Tensor) -> torch.Tensor:
    """x, its last dimension side by side in memory; a copy only where it does not lie so."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """[..., D] -> [rows, D] whose columns lie side by side."""
    return together(x.flatten(0, -2))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is summed in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)
