"""Compiles every Triton kernel for an H100 or H200 (sm_90a) through its Python launcher, without a GPU, and prints what came out.

    TRITON_INTERPRET=0 python -m tests.kernels.compiled

One JSON line per kernel: registers of a thread, bytes spilled, shared memory of a program. `CASES` calls each launcher with the
shapes that matter; nothing is launched, arguments are only looked at. A process of its own, since the interpreter is chosen when
triton is imported.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ARCH = 90
CASES: dict[str, Callable[[], object]] = {}


class NoDevice:
    """The driver of a GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self) -> int:
        return ARCH

    def set_current_device(self, device: int) -> None: ...

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def map_python_to_cpp_type(self, kind: str) -> str:
        return "int"

    def is_active(self) -> bool:
        return True


@contextlib.contextmanager
def compiling() -> Iterator[list]:
    """Inside, a kernel that is called is compiled, put into the list with its name, and not launched."""
    found, run = [], JITFunction.run
    driver.set_active(NoDevice())

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        found.append((self.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run


def measured(kernel) -> dict[str, int]:
    """Registers of a thread and bytes it spills, from the assembler; shared memory of a program in bytes; warps."""
    told = assembled(kernel.asm["ptx"])
    registers, spilled = re.search(r"Used (\d+) registers", told), re.search(r"(\d+) bytes spill stores", told)
    return {
        "registers": int(registers[1]),
        "spilled": int(spilled[1]),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "tensor_cores": int("wgmma" in kernel.asm["ptx"]),
    }


def assembled(ptx: str) -> str:
    """What the assembler says of it. Triton has two; which one knows this version of PTX depends on the release."""
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        for name in ("ptxas", "ptxas-blackwell"):
            command = [folder / name, "-v", "--gpu-name", f"sm_{ARCH}a", file.name, "-o", "/dev/null"]
            told = subprocess.run(command, capture_output=True, text=True)
            if not told.returncode:
                return told.stderr
    raise RuntimeError(told.stderr)


def case(function: Callable[[], object]) -> Callable[[], object]:
    CASES[function.__name__] = function
    return function


def half(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16)


@case
def rms_norm():
    from kernels import rms_norm as op

    kinds = [(4096, 8, torch.bfloat16), (8192, 8, torch.bfloat16), (16384, 8, torch.bfloat16), (128, 64, torch.bfloat16)]
    kinds += [(8192, 8, torch.float32), (16384, 8, torch.float32), (12289, 8, torch.float32), (12289, 8, torch.bfloat16)]
    for columns, rows, dtype in kinds:
        x, w, r = torch.empty(rows, columns, dtype=dtype), half(columns), torch.empty(rows, 1)
        op._forward_triton(x, None, w, 1e-5, False)
        op._forward_triton(x, x, w, 1e-5, True)
        op._backward_triton(x, None, x, r, w, False, False)
        op._backward_triton(x, x, x, r, w.float(), True, True)


@case
def lora():
    from kernels import lora as op

    op._dropout_triton(half(8, 4096), torch.tensor(1), 0.1, 0)
    op._dropout_triton(half(8, 8192)[:, :4096], torch.tensor(1), 0.1, 4096)


@case
def glu():
    from kernels import glu as op

    for act in op.ACT:
        gate = half(8, 28672)[:, :14336]
        op._forward_triton(gate, gate, act)
        op._backward_triton(gate, gate, gate, act, True)
        op._backward_triton(gate, gate, gate, act, False)


@case
def rope():
    from kernels import rope as op

    for size in (64, 128, 256):
        q, k, table, w = half(8, 32, size), half(8, 8, size), half(8, 1, size), half(size)
        op._forward_triton(q, k, table, table, None, None, 0.0, False)
        op._backward_triton(q, k, None, None, table, table, None, None, 0.0, False, False)
        for offset in (False, True):
            op._forward_triton(q, k, table, table, w, w, 1e-6, offset)
            op._backward_triton(q, k, q, k, table, table, w, w, 1e-6, offset, True)


@case
def linear_logprob():
    from kernels import linear_logprob as op

    for columns, softcap in ((128256, None), (262144, 30.0), (4571, None)):
        z, label, row = torch.empty(64, columns), torch.empty(64, dtype=torch.int64), torch.empty(64)
        op._sums_triton(z, label, softcap)
        op._slope_triton(z, label, row, None, softcap, 0.0, 0.0, columns, torch.bfloat16)
        op._slope_triton(z, label, row, row, softcap, 0.1, 1e-4, columns, torch.bfloat16)


@case
def adamw():
    from kernels import adamw as op

    update, scale = op.Update(1e-4, 0.9, 0.999, 1e-8, 3), torch.ones(())
    for dtype, size, factor in ((torch.float32, 65536, scale), (torch.float32, 65537, None), (torch.bfloat16, 65536, scale)):
        tensors = [[torch.zeros(size, dtype=dtype), torch.zeros(64, dtype=dtype)] for _ in range(4)]
        op.adamw(*tensors, [0.1, 0.0], factor, update)


@case
def flash():
    from kernels import flash as op

    rows = 257  # no multiple of 16, for which Triton needs registers
    q, k, cu = half(rows, 4, 256), half(rows, 2, 256), torch.tensor([0, 100, rows], dtype=torch.int32)
    seen, lse, sinks = op.spans(rows, rows, cu, cu), torch.empty(4, rows).T, half(4)
    wide, narrow, plain, capped = torch.float32, torch.bfloat16, (0.0, None), (50.0, sinks)
    kinds = [(64, narrow, plain), (128, narrow, plain), (192, narrow, plain), (128, wide, plain)]
    kinds += [(64, narrow, capped), (80, narrow, capped), (128, narrow, capped), (256, narrow, capped)]
    kinds += [(256, narrow, plain), (192, wide, plain), (256, wide, plain), (256, wide, capped)]
    for columns, dtype, (cap, sink) in kinds:
        x, y = q[..., :columns].to(dtype).contiguous(), k[..., :columns].to(dtype).contiguous()
        op._forward(x, y, y, sink, seen.lo, seen.hi, 0.1, cap)
        op._backward(x, x, y, y, sink, x, lse, *seen, 0.1, cap, True, True)


def main(names: list[str]) -> int:
    for name in names or CASES:
        with compiling() as found:
            CASES[name]()
        for kernel, compiled in found:
            print(json.dumps({"case": name, "kernel": kernel, **measured(compiled)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
