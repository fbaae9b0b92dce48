"""Tensors to and from torch.distributed.checkpoint (DCP) files: a writer that counts, a reader that runs no code.

Written is DCP's own format (`.metadata`, `__<rank>_0.distcp`), so torch's tools can open a checkpoint as well. A tensor is
stored in chunks by fully qualified name, each with its place in the whole tensor; that makes it free of any layout.

Who writes what: a DTensor that is replicated along a mesh axis is written by one coordinate of that axis, chosen from its
name so that replicas share the work and each copies to the host only what it writes. Plain tensors are the same on every
rank that has them; DCP picks one.

Reading trusts nothing. DCP unpickles `.metadata` freely (torch 2.13), which runs whatever a stranger put in there. Here it is
unpickled into inert records by an unpickler that knows nine names (`ALLOWED`), then checked and rebuilt field by field: entries
that are not tensors, files outside the folder and chunks that do not fill their tensor are refused. Tensor data goes
through `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import errno
import io
import math
import pickle
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.tensor import DTensor
from torch.futures import Future

from runtime.checkpoint import store
from runtime.errors import ModelError

METADATA = ".metadata"


# --------------------------------------------------------------------------------------------------------------- writing


class Snapshot:
    """What this rank writes: DCP's write items, and by name the local tensors behind them.

    Args:
        tensors: by fully qualified name; any devices. Not copied: they must not change before the write ends, or `stage` them.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        owned = {name: t for name, t in tensors.items() if _writes(name, t)}
        self.items: list[WriteItem] = create_default_local_save_plan(owned, is_coordinator=False).items
        self.local = {name: t.to_local().detach() if isinstance(t, DTensor) else t.detach() for name, t in owned.items()}
        plain = {name for name, t in owned.items() if not isinstance(t, DTensor)}
        lead = dist.get_rank() == 0
        self.nbytes = sum(t.nbytes for name, t in self.local.items() if lead or name not in plain)

    def stage(self, buffers: dict[str, Tensor]) -> None:
        """Copies the tensors to the host, so that training may go on. `buffers` are kept from save to save: allocating and
        first touching that much memory costs more than the copy."""
        cuda = [t.device for t in self.local.values() if t.is_cuda]
        for name, t in self.local.items():
            if name not in buffers or buffers[name].shape != t.shape or buffers[name].dtype != t.dtype:
                buffers[name] = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
            buffers[name].copy_(t, non_blocking=True)
        for device in set(cuda):
            torch.cuda.current_stream(device).synchronize()
        self.local = {name: buffers[name] for name in self.local}


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
# stand-ins for what is called with plain values: torch.Size((2, 3)), _get_layout("torch.strided"), _MEM_FORMAT_ENCODING(0)
_CALLS = {"torch.Size": tuple, "torch.serialization._get_layout": str, _DCP + "_MEM_FORMAT_ENCODING": int}
ALLOWED = _RECORDS | set(_CALLS)


class Refused(Exception):
    """Checkpoint metadata that is not what DCP writes for tensors."""


class _Record:
    """Stands for one of DCP's dataclasses while unpickling: keeps its fields, does nothing."""

    fields: Any = None

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


def _fields(value: Any, kind: str) -> Any:
    if not isinstance(value, _Record) or type(value).__name__ != kind or not isinstance(value.fields, (dict, tuple)):
        raise Refused(f"{type(value).__name__} where {kind} belongs")
    return value.fields


def _size(value: Any) -> torch.Size:
    if not isinstance(value, tuple) or not all(type(n) is int and n >= 0 for n in value):
        raise Refused(f"{value!r} is not a size")
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
        return _rebuild(_fields(_Unpickler(data).load(), "Metadata"), files)
    except Refused:
        raise
    except Exception as e:
        raise Refused(f"{type(e).__name__}: {e}") from e


def _rebuild(raw: dict, files: Mapping[str, dict]) -> Metadata:
    where = {}
    for key, value in raw["storage_data"].items():
        key, value = _fields(key, "MetadataIndex"), _fields(value, "_StorageInfo")
        name, start, length = value["relative_path"], value["offset"], value["length"]
        if name not in files:
            raise Refused(f"it names a file that is not of this checkpoint: {name!r}")
        if not (type(start) is type(length) is int and start >= 0 and length >= 0 and start + length <= files[name]["size"]):
            raise Refused(f"{key['fqn']} lies outside {name}")
        if value.get("transform_descriptors"):
            raise Refused(f"{key['fqn']} is stored through a transform")
        where[MetadataIndex(key["fqn"], _size(key["offset"]))] = _StorageInfo(name, start, length)
    tensors = {}
    for name, value in raw["state_dict_metadata"].items():
        value = _fields(value, "TensorStorageMetadata")
        size, dtype = _size(value["size"]), _fields(value["properties"], "TensorProperties")[0]
        if not isinstance(name, str) or not isinstance(dtype, torch.dtype):
            raise Refused(f"{name!r} has no dtype")
        chunks = []
        for chunk in value["chunks"]:
            chunk = _fields(chunk, "ChunkStorageMetadata")
            chunks.append(ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])))
            inside = len(chunks[-1].offsets) == len(chunks[-1].sizes) == len(size)
            if not inside or any(o + n > m for o, n, m in zip(chunks[-1].offsets, chunks[-1].sizes, size)):
                raise Refused(f"a chunk of {name} lies outside its size {tuple(size)}")
            if MetadataIndex(name, chunks[-1].offsets) not in where:
                raise Refused(f"a chunk of {name} is in no file")
        if sum(math.prod(c.sizes) for c in chunks) != math.prod(size):
            raise Refused(f"the chunks of {name} do not make up its size {tuple(size)}")
        tensors[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)
    return Metadata(tensors, storage_data=where)


def read(folder: Path, files: Mapping[str, dict], tensors: Mapping[str, Tensor]) -> None:
    """Loads a checkpoint into `tensors`, in place, each rank its own part; no communication.

    Args:
        files: the manifest's files.
        tensors: exactly the tensors of the checkpoint, by name; plain or DTensor under any layout, materialized.

    Raises:
        ModelError: another set of names, another shape or dtype, or a file that cannot be trusted.
    """
    try:
        metadata = parse_metadata((folder / METADATA).read_bytes(), files)
    except (OSError, Refused) as e:
        raise ModelError(f"checkpoint metadata refused: {e}", folder / METADATA) from None
    _check_match(folder, metadata.state_dict_metadata, tensors)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), metadata, is_coordinator=True)
    reader = FileSystemReader(folder)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
    try:
        reader.read_data(plan, planner).wait()
    except (OSError, RuntimeError, AssertionError, pickle.UnpicklingError) as e:
        raise ModelError(f"checkpoint data cannot be read: {e}", folder) from e


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
