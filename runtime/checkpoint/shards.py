"""Tensors to and from torch.distributed.checkpoint (DCP) files: a writer that counts, a reader that runs no code.

Written is DCP's own format (`.metadata`, `__<rank>_0.distcp`), so torch's tools can open a checkpoint as well. A tensor is
stored in chunks by fully qualified name, each with its place in the whole tensor; that makes it free of any layout.

Who writes what: a DTensor that is replicated along a mesh axis is written by one coordinate of that axis, chosen from its
name so that replicas share the work and each copies to the host only what it writes. Plain tensors are the same on every
rank that has them; DCP picks one.

Reading trusts nothing. DCP unpickles `.metadata` freely (torch 2.13), which runs whatever a stranger put in there. Here it is
unpickled into inert records by an unpickler that knows nine names (`ALLOWED`), after a look at its opcodes (`_scan`), then
checked and rebuilt field by field: entries that are not tensors, files outside the folder and chunks that do not tile their
tensor are refused. Tensor data goes through `torch.load(weights_only=True)` and must be what the metadata says of it. What is
copied is counted: a load that leaves an element unassigned fails.
"""

from __future__ import annotations

import errno
import io
import math
import pickle
import pickletools
import threading
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.tensor import DTensor
from torch.futures import Future

from runtime.checkpoint import store
from runtime.errors import ModelError, clean, shown

METADATA = ".metadata"
_ZIP = b"PK\x03\x04"
_FOLDER = 0x10  # in a member's attributes, as DOS has them


# --------------------------------------------------------------------------------------------------------------- writing


class Snapshot:
    """What this rank writes: DCP's write items, and by name the local tensors behind them.

    Args:
        tensors: by fully qualified name; any devices. They must not change before the write ends, or before they are copied: call
            `reserve` at once, `stage` on the thread that writes, `wait_until_copied` before the tensors change.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        owned = {name: t for name, t in tensors.items() if _writes(name, t)}
        self.items: list[WriteItem] = create_default_local_save_plan(owned, is_coordinator=False).items
        self.local = {name: t.to_local().detach() if isinstance(t, DTensor) else t.detach() for name, t in owned.items()}
        self._counted = [(name, t) for by_name in (owned, self.local) for name, t in by_name.items()]  # an update may go by either
        plain = {name for name, t in owned.items() if not isinstance(t, DTensor)}
        lead = dist.get_rank() == 0
        self.nbytes = sum(t.nbytes for name, t in self.local.items() if lead or name not in plain)

    def reserve(self, buffers: dict[str, Tensor]) -> None:
        """Takes host memory for a copy, pinned on CUDA. `buffers` are kept from save to save: to allocate and first touch that much costs
        more than to copy."""
        for name, t in self.local.items():
            if name not in buffers or buffers[name].shape != t.shape or buffers[name].dtype != t.dtype:
                buffers[name] = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
        self._buffers, self._versions = {name: buffers[name] for name in self.local}, [t._version for _, t in self._counted]
        devices = {t.device for t in self.local.values() if t.is_cuda}
        self._begins = {device: torch.cuda.current_stream(device).record_event() for device in devices}
        self._ends: dict[torch.device, torch.cuda.Event] = {}
        self._begun = threading.Event()

    def stage(self) -> None:
        """Copies, on streams of its own, and is what is written from then on."""
        try:
            for device in self._begins:  # a thread begins on device 0, and would make a context there
                torch.cuda.set_device(device)
            streams = {device: _stream(device) for device in self._begins}
            for device, stream in streams.items():
                stream.wait_event(self._begins[device])
            for name, t in self.local.items():
                with torch.cuda.stream(streams[t.device]) if t.is_cuda else nullcontext():
                    self._buffers[name].copy_(t, non_blocking=True)
            self._ends = {device: stream.record_event() for device, stream in streams.items()}
        finally:
            changed = [name for (name, t), version in zip(self._counted, self._versions, strict=True) if t._version != version]
            self._begun.set()
        assert not changed, f"{changed[0]} was changed while it was copied"
        for end in self._ends.values():
            end.synchronize()
        self.local = self._buffers

    def wait_until_copied(self) -> None:
        """After this, and in stream order, the tensors may change. The host waits for a copy on the host, a GPU for its own."""
        self._begun.wait()
        for device, end in self._ends.items():
            torch.cuda.current_stream(device).wait_event(end)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all saves: torch hands out thirty-two in turn, and after some saves it would be one that offloading uses."""
    return torch.cuda.Stream(device)


def _writes(name: str, t: Tensor) -> bool:
    """Whether this rank writes its part of a tensor."""
    if not isinstance(t, DTensor):
        return True
    place = t.device_mesh.get_coordinate()
    if place is None or (t.to_local().numel() == 0 and t.numel() > 0):
        return False
    assert not any(p.is_partial() for p in t.placements), f"{name} is a partial sum; reduce it before saving"
    writer = zlib.crc32(name.encode())
    return all(place[i] == writer % t.device_mesh.size(i) for i, p in enumerate(t.placements) if p.is_replicate())


@contextmanager
def _plainly() -> Iterator[None]:
    """DCP sends what a rank raised to the others by pickle: an exception that does not survive that would leave them waiting."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror or str(e), e.filename) from None
    except BaseException as e:
        raise RuntimeError(f"{type(e).__name__}: {e}") from None


class _SavePlanner(DefaultSavePlanner):
    """Plans from a snapshot instead of a state dict."""

    def __init__(self, snapshot: Snapshot):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.snapshot = snapshot

    @_plainly()
    def create_local_plan(self) -> SavePlan:
        store.at("plan")
        self.plan = SavePlan(self.snapshot.items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.snapshot.local[index.fqn]


class _CountedFiles(FileSystem):
    """DCP's file access, through files that count. `records` gets what the manifest says of each."""

    def __init__(self):
        self.records: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: Path, mode: str) -> Iterator[store.CountedFile]:
        with store.CountedFile(path) as file:
            yield file
        self.records[path.name] = file.record

    def rename(self, path: Path, new_path: Path) -> None:
        super().rename(path, new_path)
        self.records[new_path.name] = self.records.pop(path.name)


class _Writer(FileSystemWriter):
    def __init__(self, folder: Path):
        super().__init__(folder, sync_files=False, overwrite=False)  # our files fsync themselves
        self.fs = _CountedFiles()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if not self.path.is_dir():  # DCP would make the folder, on whatever disk this node has
            hint = "made by rank 0, is not visible on this rank; checkpoints need a file system that all ranks share"
            raise FileNotFoundError(errno.ENOENT, hint, str(self.path))
        return plan

    @_plainly()
    def write_data(self, plan: SavePlan, planner: DefaultSavePlanner) -> Future[list]:
        return super().write_data(plan, planner)

    @_plainly()
    def finish(self, metadata: Metadata, results: list[list]) -> None:
        super().finish(metadata, results)

    def storage_meta(self) -> None:
        """DCP would store the folder's path, which is a temporary one."""


def write(folder: Path, snapshot: Snapshot, group: dist.ProcessGroup) -> dict[str, dict[str, Any]]:
    """Writes the tensors of all ranks; a collective. Returns the manifest records of this rank's files.

    Raises:
        CheckpointException: on all ranks, if any fails.
    """
    writer = _Writer(folder)
    dcp.save({}, storage_writer=writer, planner=_SavePlanner(snapshot), process_group=group)
    return writer.fs.records


# --------------------------------------------------------------------------------------------------------------- reading

_DCP = "torch.distributed.checkpoint.metadata."
_RECORDS = {
    _DCP + name
    for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "TensorProperties", "TensorStorageMetadata")
} | {"torch.distributed.checkpoint.filesystem._StorageInfo"}
# called with plain values, which nobody here asks for: _get_layout("torch.strided"), _MEM_FORMAT_ENCODING(0)
_RECORDS |= {"torch.serialization._get_layout", _DCP + "_MEM_FORMAT_ENCODING"}
_CALLS = {"torch.Size": tuple}  # torch.Size((2, 3))
ALLOWED = _RECORDS | set(_CALLS)
# what pickle's protocols 4 and 5 write for dicts, lists, tuples, strings, numbers and objects of these
_OPCODES = {"PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINGET", "LONG_BINGET", "STACK_GLOBAL", "NEWOBJ", "REDUCE", "BUILD"}
_OPCODES |= {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE"}
_OPCODES |= {"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"}


class Refused(Exception):
    """Checkpoint metadata that is not what DCP writes for tensors."""


class _Record:
    """Stands for one of DCP's dataclasses while unpickling: keeps its fields, does nothing."""

    fields: Any = None

    def __init__(self, *values: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.fields = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))
        self._classes = {name: type(name.rpartition(".")[2], (_Record,), {}) for name in _RECORDS}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self._classes:
            return self._classes[full]
        if full in _CALLS:
            return _CALLS[full]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise Refused(f"it asks for {full}")


def _scan(data: bytes) -> None:
    """Looks at a pickle's opcodes before any is carried out: only those that pickle writes for such metadata, each within its data.

    So the memo grows by one an opcode (one that names its place in the memo makes a table as long as it likes), and a tuple is
    in one place only (tuples of tuples, each twice in the next, take forever to hash or print).
    """
    tuples, memoized, before = set(), 0, ""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in _OPCODES:
            raise Refused(f"it has the opcode {opcode.name}")
        if opcode.name == "MEMOIZE":
            tuples |= {memoized} if before.startswith("TUPLE") else set()
            memoized += 1
        elif opcode.name in ("BINGET", "LONG_BINGET") and (argument in tuples or argument >= memoized):
            raise Refused(f"it takes {argument} from its memo")
        before = opcode.name


def _fields(value: Any, kind: str) -> Any:
    if not isinstance(value, _Record) or type(value).__name__ != kind or not isinstance(value.fields, (dict, tuple)):
        raise Refused(f"{type(value).__name__} where {kind} belongs")
    return value.fields


def _size(value: Any) -> torch.Size:
    if not isinstance(value, tuple) or len(value) > 64 or not all(type(n) is int and 0 <= n < 1 << 63 for n in value):
        raise Refused(f"a {type(value).__name__} that is not a size")
    return torch.Size(value)


def parse_metadata(data: bytes, files: Mapping[str, dict]) -> Metadata:
    """DCP's metadata from its bytes, checked and rebuilt without running anything in it.

    Args:
        data: contents of `.metadata`.
        files: the manifest's files: name -> {"size": bytes, ...}; chunks must lie inside these.

    Raises:
        Refused: it is not the metadata of a set of whole tensors in these files.
    """
    try:
        _scan(data)
        return _rebuild(_fields(_Unpickler(data).load(), "Metadata"), files)
    except Refused:
        raise
    except Exception as e:
        raise Refused(f"{type(e).__name__}: {e}") from e


def _rebuild(raw: dict, files: Mapping[str, dict]) -> Metadata:
    where = {}
    for key, value in raw["storage_data"].items():
        key, value = _fields(key, "MetadataIndex"), _fields(value, "_StorageInfo")
        name, start, length, of = value["relative_path"], value["offset"], value["length"], key["fqn"]
        if not isinstance(of, str) or not isinstance(name, str):
            raise Refused(f"a {type(of).__name__} lies in a {type(name).__name__}, where both have names")
        if name not in files:
            raise Refused(f"it names a file that is not of this checkpoint: {shown(name)}")
        if not (type(start) is type(length) is int and start >= 0 and length >= 0 and start + length <= files[name]["size"]):
            raise Refused(f"{of} lies outside {name}")
        if value.get("transform_descriptors"):
            raise Refused(f"{of} is stored through a transform")
        index = MetadataIndex(of, _size(key["offset"]))
        if index in where:
            raise Refused(f"a chunk of {of} is in two places")
        where[index] = _StorageInfo(name, start, length)
    tensors, left = {}, len(where)
    for name, value in raw["state_dict_metadata"].items():
        value = _fields(value, "TensorStorageMetadata")
        size, dtype = _size(value["size"]), _fields(value["properties"], "TensorProperties")[0]
        if not isinstance(name, str) or not isinstance(dtype, torch.dtype):
            raise Refused("a tensor has no name or no dtype")
        chunks = []
        for chunk in value["chunks"]:
            chunk = _fields(chunk, "ChunkStorageMetadata")
            chunks.append(ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])))
            inside = len(chunks[-1].offsets) == len(chunks[-1].sizes) == len(size)
            if not inside or any(o + n > m for o, n, m in zip(chunks[-1].offsets, chunks[-1].sizes, size)):
                raise Refused(f"a chunk of {name} lies outside its size {tuple(size)}")
            if MetadataIndex(name, chunks[-1].offsets) not in where:
                raise Refused(f"a chunk of {name} is in no file")
            if len(chunks) > left:
                raise Refused(f"{name} has more chunks than there are")
        left -= len(chunks)
        if not _tile(chunks, size):
            raise Refused(f"the chunks of {name} do not make up its size {tuple(size)}")
        tensors[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)
    return Metadata(tensors, storage_data=where)


def _tile(chunks: Sequence[ChunkStorageMetadata], size: torch.Size, dim: int = 0) -> bool:
    """Is every element of a tensor in one of the chunks, and in no other?

    Chunks of DTensors are made by cutting one dimension after the other: those that share an interval of the first dimension are
    cut alike in the others, and the intervals follow each other.
    """
    if dim == 0:
        if not math.prod(size):
            return all(not math.prod(chunk.sizes) for chunk in chunks)
        chunks = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    if dim == len(size):
        return len(chunks) == 1
    slabs: dict[tuple[int, int], list[ChunkStorageMetadata]] = {}
    for chunk in chunks:
        slabs.setdefault((chunk.offsets[dim], chunk.sizes[dim]), []).append(chunk)
    end = 0
    for (offset, length), slab in sorted(slabs.items(), key=lambda item: item[0]):
        if offset != end or not _tile(slab, size, dim + 1):
            return False
        end += length
    return end == size[dim]


def read(folder: Path, files: Mapping[str, dict], tensors: Mapping[str, Tensor], some: bool = False) -> None:
    """Loads a checkpoint into `tensors`, in place, each rank its own part; no communication.

    Args:
        files: the manifest's files.
        tensors: exactly the tensors of the checkpoint, by name; plain or DTensor under any layout, materialized.
        some: the checkpoint may hold others besides.

    Raises:
        ModelError: another set of names, another shape or dtype, or a file that cannot be trusted.
    """
    try:
        metadata = parse_metadata(store.read_small(folder / METADATA, store.LIMITS[METADATA]), files)
    except (OSError, Refused) as e:
        raise ModelError(f"checkpoint metadata refused: {clean(getattr(e, 'strerror', None) or e)}", folder / METADATA) from None
    saved = metadata.state_dict_metadata
    _check_match(folder, {name: saved[name] for name in saved.keys() & tensors.keys()} if some else saved, tensors)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), metadata, is_coordinator=True)
    places, assigned = metadata.storage_data, dict.fromkeys(tensors, 0)
    items = [(places[item.storage_index], item) for item in planner.create_local_plan().items]
    for place, item in sorted(items, key=lambda pair: (pair[0].relative_path, pair[0].offset)):
        name, entry = item.storage_index.fqn, metadata.state_dict_metadata[item.storage_index.fqn]
        try:
            chunk = _payload(folder, place, entry.properties.dtype, entry.chunks[item.storage_index.index].sizes)
            planner.resolve_tensor(item).detach().copy_(narrow_tensor_by_index(chunk, item.storage_offsets, item.lengths))
        except Exception as e:  # whatever a stranger's bytes make torch raise
            raise ModelError(f"checkpoint data cannot be read: {name}: {clean(e)}", folder / place.relative_path) from e
        assigned[name] += math.prod(item.lengths)
    for name, t in tensors.items():
        mine = (t.to_local() if isinstance(t, DTensor) else t).numel()
        if assigned[name] != mine:
            raise ModelError(f"checkpoint data cannot be read: {assigned[name]} of {mine} elements of {name} are there", folder)


class _Part(io.RawIOBase):
    """`length` bytes of a file from `offset` on, as a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int):
        self.file, self.offset, self.length, self.at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, to: int, whence: int = io.SEEK_SET) -> int:
        self.at = to + (0, self.at, self.length)[whence]
        return self.at

    def readinto(self, buffer) -> int:
        left = max(0, self.length - self.at)
        self.file.seek(self.offset + self.at)
        count = self.file.readinto(memoryview(buffer)[:left])
        self.at += count
        return count


def _payload(folder: Path, place: _StorageInfo, dtype: torch.dtype, sizes: torch.Size) -> Tensor:
    """One stored chunk, which is what the metadata says that it is."""
    with open(folder / place.relative_path, "rb") as file:
        view = _Part(file, place.offset, place.length)
        if view.read(len(_ZIP)) != _ZIP:  # torch.load knows older formats as well, which no checkpoint was ever written in
            raise Refused("it does not begin as torch.save writes it")
        # what is marked as a folder is not read, and its tensor is whatever the memory holds; what is compressed may grow without end
        if any(member.external_attr & _FOLDER or member.compress_type != zipfile.ZIP_STORED for member in zipfile.ZipFile(view).infolist()):
            raise Refused("it is not packed as torch.save does it")
        view.seek(0)
        found = torch.load(view, map_location="cpu", weights_only=True)
    if type(found) is not Tensor or found.layout != torch.strided or found.device.type != "cpu":
        raise Refused("something else than a plain tensor is stored")
    if found.dtype != dtype or found.shape != sizes:
        raise Refused(f"{found.dtype} {list(found.shape)} is stored, but {dtype} {list(sizes)} was written down")
    return found


def _check_match(folder: Path, saved: Mapping[str, TensorStorageMetadata], tensors: Mapping[str, Tensor]) -> None:
    unfit = [f"{name} is not in the checkpoint" for name in tensors.keys() - saved.keys()]
    unfit += [f"{name} is only in the checkpoint" for name in saved.keys() - tensors.keys()]
    for name in tensors.keys() & saved.keys():
        t, entry = tensors[name], saved[name]
        assert not t.is_meta, f"{name} is on the meta device; nothing can be loaded into it"
        if t.shape != entry.size:
            unfit.append(f"{name} has shape {list(entry.size)} in the checkpoint, {list(t.shape)} here")
        elif t.dtype != entry.properties.dtype:
            unfit.append(f"{name} has dtype {entry.properties.dtype} in the checkpoint, {t.dtype} here")
    if unfit:
        more = f"; and {len(unfit) - 3} more" if len(unfit) > 3 else ""
        raise ModelError("; ".join(sorted(unfit)[:3]) + more, folder)
