"""Copies between device and host beside the computation, and the host memory they go to.

On CUDA a `Lane` is a stream of its own and host memory is pinned, so that a copy runs while the device computes. Three rules make
that safe without stopping the host:

* a copy begins after all that was asked of the device before it: its source is complete, its target no longer in use;
* who reads the target makes the computing stream wait for the copy's mark, and so does who gives device memory back that a copy
  reads or writes: the allocator hands memory on in the order of the computing stream only;
* copies of one lane run in order, so a host buffer may be used again as soon as it was given back.

On other devices a lane is a plain copy and marks are None: the same code, one thing after the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Told of host memory that is allocated, which then is buffer by buffer: for those who count (tools/plan.py).
observers: list[Callable[[Tensor], None]] = []
PIECE = 256 * 2**20  # bytes that a pool allocates at a time; pinned memory comes in powers of two
ALIGN = 4096  # a page, and the block of a disk

Mark = torch.Event | None


@contextmanager
def told(observer: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside, `observer` is one of the observers."""
    observers.append(observer)
    try:
        yield
    finally:
        observers.remove(observer)


class Lane:
    """Copies one after the other, beside what `device` computes."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def pinned(self) -> bool:
        """Must host memory be pinned?"""
        return self.stream is not None

    def copy(self, to: Tensor, source: Tensor) -> Mark:
        """Copies when the device has done what it was asked so far. Both must live until the mark was waited for."""
        if self.stream is None:
            to.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, mark: Mark) -> None:
        """What the device is asked from now on begins after that copy. The host goes on."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def drain(self) -> None:
        """The host waits for all copies."""
        if self.stream is not None:
            self.stream.synchronize()


def finish(mark: Mark) -> None:
    """The host waits for a copy: before it touches the memory itself."""
    if mark is not None:
        mark.synchronize()


def padded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


class Buffer:
    """Host memory out of a pool. memory: [n] uint8; mark: the last copy from it, for a host that wants to write there."""

    def __init__(self, memory: Tensor):
        self.memory, self.mark = memory, None


class Pool:
    """Host buffers that are used again, by their size: shapes are the same in every step. Never shrinks.

    total: bytes allocated so far.
    """

    def __init__(self, pinned: bool, piece: int = PIECE):
        self.pinned, self.piece, self.total = pinned, piece, 0
        self.free: dict[int, list[Buffer]] = defaultdict(list)
        self.rest = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Buffer:
        """At least `size` bytes; whoever takes them gives them back."""
        size = padded(size)
        if self.free[size]:
            return self.free[size].pop()
        if size >= self.piece or observers:
            return Buffer(self._allocate(size))
        if size > self.rest.numel():
            self.rest = self._allocate(self.piece)
        memory, self.rest = self.rest[:size], self.rest[size:]
        return Buffer(memory)

    def give(self, buffer: Buffer) -> None:
        self.free[buffer.memory.numel()].append(buffer)

    def _allocate(self, size: int) -> Tensor:
        self.total += size
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)
        for observe in observers:
            observe(memory)
        return memory
