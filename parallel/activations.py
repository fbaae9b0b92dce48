"""Activations that wait for the backward pass elsewhere: in host memory, or on disk.

What a block's forward saves for its backward goes through autograd's saved-tensor hooks (torch.autograd.graph): `pack` sends the bytes
away, `unpack` hands out a tensor over the same bytes again. So the backward computes with the same numbers, bit for bit.

    forward     block i packs; block i - 2's memory on the device is given up, for its copies have had the time of two blocks
    backward    block i unpacks its first tensor: all of block i is there (it was brought while i + 1 ran); bring i - 1, and have
                the disk read i - 2

So at any time two blocks or three are on the device, and copies have a block's time to hide in. The last two blocks of the forward are
the first of the backward and come back from nowhere. Nothing waits on the host, but for a disk that is too slow.

A storage moves once, whatever number of views of it is saved; they come back as views. Not moved: weights (they stay anyway), what all
blocks share (rope tables, masks, borders), tensors below `SMALLEST` and subclasses of Tensor. Recomputation is inside: a block that
is recomputed saves its input only, and that is what moves (torch's checkpoint keeps it as a saved tensor).

The order of blocks is that in which they ran; memory belongs to the saved tensors themselves and comes back when autograd drops them, so
neither an evaluation nor an exception halfway leaves anything behind.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from parallel.transfer import Buffer, Lane, Mark, Pool, finish, padded

SMALLEST = 4096  # bytes; what is less is not worth a copy
PLAIN = (Tensor, FakeTensor)  # no parameters, no DTensors; fake ones are those of dry runs
IN_FLIGHT = 2  # blocks whose copies may be under way while the next ones run
QUEUED = 2 * 2**30  # bytes that may wait to be written to disk


class InMemory:
    """Host memory as the place where bytes wait."""

    def __init__(self, lane: Lane):
        self.lane, self.pool = lane, Pool(lane.pinned)

    def keep(self, data: Tensor) -> InMemoryCopy:
        """data: [n] uint8 on the device."""
        return InMemoryCopy(self, data)


class InMemoryCopy:
    """Bytes in a buffer; sent: the mark of the copy into it."""

    def __init__(self, home: InMemory, data: Tensor):
        self.home, self.buffer = home, home.pool.take(data.numel())
        self.sent = home.lane.copy(self.buffer.memory[: data.numel()], data)

    def ahead(self) -> None:
        """They will be wanted soon: nothing to prepare."""

    def back(self, to: Tensor) -> Mark:
        """Copies them to the device."""
        return self.home.lane.copy(to, self.buffer.memory[: to.numel()])

    def __del__(self):
        self.home.pool.give(self.buffer)


class OnDisk:
    """A file as the place where bytes wait: preallocated, reused place by place, and without a name, so that it is gone with the process.

    One thread writes and reads, in order; host memory is only passed through.
    """

    def __init__(self, lane: Lane, folder: str):
        self.lane, self.pool = lane, Pool(lane.pinned)
        self.folder = folder or tempfile.gettempdir()
        self.file = tempfile.TemporaryFile(dir=self.folder, prefix="activations-", buffering=0)  # noqa: SIM115 lives as long as this
        self.thread = ThreadPoolExecutor(1, "activations")
        self.places: dict[int, list[int]] = defaultdict(list)  # free offsets in the file by size
        self.size = 0
        self.writes: deque[tuple[Future, int]] = deque()  # with their bytes

    def keep(self, data: Tensor) -> OnDiskCopy:
        """data: [n] uint8 on the device. Waits while too much is still to be written."""
        while self.writes and (self.writes[0][0].done() or sum(n for _, n in self.writes) > QUEUED):
            self.writes.popleft()[0].result()
        return OnDiskCopy(self, data)

    def place(self, size: int) -> int:
        """An offset in the file with `size` bytes behind it that are really there."""
        if self.places[size]:
            return self.places[size].pop()
        try:
            os.posix_fallocate(self.file.fileno(), self.size, size)
        except OSError as e:
            raise OSError(
                e.errno,
                f"{os.strerror(e.errno)}: activations take {(self.size + size) / 2**30:.2f} GiB so far; see offload.folder",
                self.folder,
            ) from e
        self.size += size
        return self.size - size


class OnDiskCopy:
    """Bytes in the file, at `offset`; sent: the mark of the copy into the buffer that they are written from."""

    def __init__(self, home: OnDisk, data: Tensor):
        self.home, self.bytes, self.size, self.read = home, data.numel(), padded(data.numel()), None
        self.offset = home.place(self.size)
        buffer = home.pool.take(self.size)
        self.sent = home.lane.copy(buffer.memory[: self.bytes], data)
        self.written = home.thread.submit(self._write, home, buffer, self.offset, self.sent)
        home.writes.append((self.written, self.size))

    def ahead(self) -> None:
        """They will be wanted soon: read them."""
        if self.read is None:
            self.buffer = self.home.pool.take(self.size)
            self.read = self.home.thread.submit(self._read, self.home, self.buffer, self.offset)

    def back(self, to: Tensor) -> Mark:
        """Copies them to the device. The host waits until they are read."""
        self.ahead()
        self.written.result()
        self.read.result()
        mark = self.buffer.mark = self.home.lane.copy(to, self.buffer.memory[: self.bytes])
        self.home.pool.give(self.buffer)
        self.read = None
        return mark

    def __del__(self):
        if not hasattr(self, "offset"):  # no place was found for it
            return
        self.home.places[self.size].append(self.offset)
        if self.read is not None:
            home, buffer = self.home, self.buffer
            self.read.add_done_callback(lambda _: home.pool.give(buffer))

    @staticmethod
    def _write(home: OnDisk, buffer: Buffer, offset: int, sent: Mark) -> None:
        finish(sent)
        data = memoryview(buffer.memory.numpy())
        while data:
            n = os.pwrite(home.file.fileno(), data, offset)
            data, offset = data[n:], offset + n
        home.pool.give(buffer)

    @staticmethod
    def _read(home: OnDisk, buffer: Buffer, offset: int) -> None:
        finish(buffer.mark)
        data = memoryview(buffer.memory.numpy())
        while data:
            n = os.preadv(home.file.fileno(), [data], offset)
            assert n, f"the file of activations ends at {offset}"
            data, offset = data[n:], offset + n


class Piece:
    """One storage that a block saved. data: its bytes on the device, [n] uint8, or None while they are only elsewhere."""

    def __init__(self, chest: Chest, data: Tensor):
        self.chest, self.data, self.bytes = chest, data, data.numel()
        self.copy = chest.keeper.home.keep(data)
        self.mark = self.copy.sent  # the last copy to touch `data`

    def bring(self) -> None:
        if self.data is None:
            self.data = torch.empty(self.bytes, dtype=torch.uint8, device=self.chest.keeper.lane.device)
            self.mark = self.copy.back(self.data)

    def leave(self) -> None:
        self.settle()
        self.data = None

    def settle(self) -> None:
        """Computation goes on when no copy touches `data` any more."""
        self.chest.keeper.lane.wait(self.mark)
        self.mark = None

    def __del__(self):
        if hasattr(self, "mark"):  # else there was no place to keep it
            self.settle()  # before the allocator has the memory


class Packed(NamedTuple):
    """What autograd holds instead of a tensor: which bytes, and how to look at them."""

    piece: Piece
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class Chest:
    """What one call of one block saved. It lives as long as one of its pieces does.

    stay: storages that are not to be moved.
    before: the chest of the call before this one, whose turn in the backward is next.
    """

    def __init__(self, keeper: Keeper, stay: set[int], before: weakref.ref | None):
        self.keeper, self.stay, self.before = keeper, stay, before
        self.here: dict[tuple[int, int], Piece] = {}  # during the call, so that nothing of it is given up
        self.pieces: list[weakref.ref] = []
        self.wanted = False  # the backward has begun with it

    def pack(self, t: Tensor) -> Tensor | Packed:
        keeper = self.keeper
        # a detached tensor: a saved output that held its own node would never be freed
        if type(t) not in PLAIN or t.device != keeper.lane.device:
            return t.detach()
        storage = t.untyped_storage()
        if storage.nbytes() < keeper.smallest or storage._cdata in self.stay:
            return t.detach()
        key = (storage._cdata, t._version)
        if key not in self.here:
            self.here[key] = Piece(self, _bytes(t))
            self.pieces.append(weakref.ref(self.here[key]))
        return Packed(self.here[key], t.dtype, t.shape, t.stride(), t.storage_offset())

    def unpack(self, saved: Tensor | Packed) -> Tensor:
        if not isinstance(saved, Packed):
            return saved
        if not self.wanted:
            self.arrive()
        data = saved.piece.data
        whole = data[: data.numel() // saved.dtype.itemsize * saved.dtype.itemsize]
        return whole.view(saved.dtype).as_strided(saved.shape, saved.stride, saved.offset)

    def alive(self) -> Iterator[Piece]:
        """The last saved first: that is the order in which the backward asks."""
        return (piece for ref in reversed(self.pieces) if (piece := ref()) is not None)

    def arrive(self) -> None:
        """All of it on the device, and what comes after it in the backward on its way."""
        self.wanted = True
        self.bring()
        for piece in self.alive():
            piece.settle()
        if (following := self.before and self.before()) is not None:
            following.bring()
            if (second := following.before and following.before()) is not None:
                for piece in second.alive():
                    if piece.data is None:
                        piece.copy.ahead()

    def bring(self) -> None:
        for piece in self.alive():
            piece.bring()

    def leave(self) -> None:
        if not self.wanted:
            for piece in self.alive():
                piece.leave()


class Keeper:
    """Keeps what blocks save. home: where it waits."""

    def __init__(self, lane: Lane, home: InMemory | OnDisk, smallest: int = SMALLEST):
        self.lane, self.home, self.smallest = lane, home, smallest
        self.leaving: deque[Chest] = deque()
        self.last: weakref.ref | None = None

    def around(self, block: nn.Module) -> None:
        """Takes over what the block's forward saves, in place. Its first argument is its own, further ones are all blocks'."""
        forward = block.forward

        def call(h: Tensor, *shared: object) -> Tensor:
            if not torch.is_grad_enabled():
                return forward(h, *shared)
            chest = Chest(self, {_storage(t) for t in (*block.parameters(), *_tensors(shared))}, self.last)
            self.last = weakref.ref(chest)
            try:
                with torch.autograd.graph.saved_tensors_hooks(chest.pack, chest.unpack):
                    out = forward(h, *shared)
            finally:
                chest.here.clear()
            self.leaving.append(chest)
            if len(self.leaving) > IN_FLIGHT:
                self.leaving.popleft().leave()
            return out

        block.forward = call


def _bytes(t: Tensor) -> Tensor:
    """The whole storage of `t`, [n] uint8. By views: of a storage that `set_` was given, fake tensors never let go."""
    size = t.untyped_storage().nbytes() // t.dtype.itemsize
    return t.detach().as_strided((size,), (1,), 0).view(torch.uint8)


def _storage(t: Tensor) -> int:
    return (t._local_tensor if isinstance(t, DTensor) else t).untyped_storage()._cdata


def _tensors(x: object, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor in an argument, whatever it lies in."""
    seen = set() if seen is None else seen
    if id(x) in seen:
        return
    seen.add(id(x))
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict):
        for item in x.values():
            yield from _tensors(item, seen)
    elif isinstance(x, (list, tuple)):
        for item in x:
            yield from _tensors(item, seen)
    elif hasattr(x, "__dict__") and not isinstance(x, (type, Callable)):
        yield from _tensors(vars(x), seen)
