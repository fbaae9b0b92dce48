"""Folders of safetensors files: reading slices of one, and writing one so that it is complete or absent.

A file is 8 bytes (header length, little endian), a JSON header {name: {dtype, shape, data_offsets}} and the payload
(https://github.com/huggingface/safetensors#format). The header follows from names, dtypes and shapes alone, so a file of any
size is written tensor by tensor with one tensor in memory. Reading goes through the safetensors library: it maps the file and
copies what is asked for, and it refuses a header that does not cover the file exactly.

Folders come from strangers: what is opened are regular files inside the folder, of bounded size where they are read whole
(`runtime/files.py`), and an index names `.safetensors` files directly in it.

Nothing here knows a model. `publish` and `compare` take `value(name)`, which may be a collective: then every rank calls them,
the first rank alone writes or reads, and its outcome is everyone's.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runtime.errors import ModelError, UserError, clean, shown
from runtime.files import MAX_JSON, has, inside, open_regular, read, read_json, size_text

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SHARD_BYTES = 5_000_000_000
CHECKSUMS = "checksums.json"
FORMAT = "salamander export 1"


class Spec(NamedTuple):
    """A tensor without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Layout = dict[str, Spec]
Value = Callable[[str], Tensor | None]  # called for every name in order; only the first rank's answer counts
Check = Callable[
    [Path | None], None
]  # looks at a folder before it gets its name, and raises; every rank calls it, the first has the folder


# ---------------------------------------------------------------------------------------------------------------- reading


def confined(folder: Path, name: str, named_by: Path) -> Path:
    """The file `name` of `folder`.

    Raises:
        ModelError: it lies elsewhere, is missing, or is no regular file.
    """
    if name != os.path.basename(name) or not name.endswith(".safetensors") or "\\" in name or "\0" in name:
        raise ModelError(f"names {shown(name)}; only .safetensors files of its own folder are read", named_by)
    if not os.path.lexists(folder / name):
        raise ModelError(f"no such file, but {named_by.name} names it; the download or copy is incomplete", folder / name)
    inside(folder / name)
    return folder / name


def _files(folder: Path, stem: str) -> tuple[Path, dict[str, set[str] | None]]:
    """What names the files that hold the tensors, and of each the tensors it is to hold (None: all that it does)."""
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    if os.path.lexists(folder / single):  # the order in which transformers looks
        return folder / single, {single: None}
    if not has(folder, index):
        pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth"))
        told = "pickled weights can run code when loaded and are not read; convert them to safetensors"
        raise ModelError(f"no {single} and no {index}" + (f", only {pickles[0]}: {told}" if pickles else ""), folder)
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError("has no weight_map of tensor names to file names", folder / index)
    wanted: dict[str, set[str] | None] = {file: set() for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        wanted[file].add(name)
    return folder / index, wanted


class TensorFolder:
    """The tensors of `<stem>.safetensors`, or of the files that `<stem>.safetensors.index.json` names.

    specs: name -> Spec, from the headers of all files, so whatever is wrong with any of them shows on every rank alike.
    """

    def __init__(self, folder: str | Path, stem: str = "model"):
        self.folder = Path(folder)
        self.specs: Layout = {}
        self._files: dict[str, safe_open] = {}  # tensor name -> open file
        named_by, wanted = _files(self.folder, stem)
        for file, names in wanted.items():
            self._open(file, names, named_by)

    def _open(self, name: str, wanted: set[str] | None, named_by: Path) -> None:
        path = confined(self.folder, name, named_by)
        try:
            file = safe_open(path, "pt").__enter__()
        except (SafetensorError, OSError) as e:
            raise ModelError(f"damaged or incomplete safetensors file ({e}); fetch it again", path) from None
        held = set(file.keys())
        if wanted is not None and (absent := wanted - held):
            raise ModelError(f"does not hold {listed(absent)}, which {named_by.name} says it does", path)
        for key in sorted(held if wanted is None else wanted):
            entry = file.get_slice(key)
            if (code := entry.get_dtype()) not in DTYPES:
                raise ModelError(f"{key} has dtype {code}, which is not supported", path)
            self.specs[key] = Spec(DTYPES[code], tuple(entry.get_shape()))
            self._files[key] = file

    def read(self, name: str, where: tuple[slice, ...] | None = None) -> Tensor:
        """A tensor or a slice of it: a view of the mapped file, so only what is then copied is read from disk."""
        if where is None or not self.specs[name].shape:
            return self._files[name].get_tensor(name)
        return self._files[name].get_slice(name)[where]


def fingerprint(folder: str | Path, weights: bool, stem: str = "model", config: str = "config.json") -> str:
    """Tells models apart by their contents: config.json whole, and of each weight file its size, its header and a sample of
    64 pages spread over it. A full hash would read every byte of a model on every start.

    Raises:
        ModelError: a file is missing, no regular one, or outside of the folder.
    """
    folder, digest = Path(folder), hashlib.blake2b(digest_size=16)
    digest.update(read(folder / config, MAX_JSON))
    named_by, names = _files(folder, stem) if weights else (folder, {})
    for name in names:
        with open_regular(confined(folder, name, named_by)) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{name} {size}".encode())
            for i in range(64):
                file.seek(i * max(0, size - 4096) // 63)
                digest.update(file.read(4096))
    return digest.hexdigest()


def listed(names: Iterable[str], limit: int = 3) -> str:
    """`a, b, c and 7 more`."""
    names = sorted(names)
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


# ---------------------------------------------------------------------------------------------------------------- writing


class _File:
    """One safetensors file, written front to back."""

    def __init__(self, path: Path, layout: Layout):
        header: dict = {"__metadata__": {"format": "pt"}}  # older transformers refuse a file without it
        at = 0
        for name, spec in layout.items():
            header[name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [at, at + spec.nbytes]}
            at += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # payload aligned to 8 bytes, as the format asks
        self.file = open(path, "xb")  # noqa: SIM115 (closed by close)
        self.crc = self.size = 0
        self.write(len(text).to_bytes(8, "little") + text)

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.crc, self.size = zlib.crc32(data, self.crc), self.size + len(data)

    def close(self) -> dict:
        self.file.flush()
        os.fsync(self.file.fileno())
        if hasattr(os, "posix_fadvise"):  # forget the cached pages: reading back shall read the disk
            os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self.file.close()
        return {"bytes": self.size, "crc32": f"{self.crc:08x}"}


class _Draft:
    """A folder under a temporary name beside its final one; `publish` renames it. What is not published is removed."""

    def __init__(self, out: Path, layout: Layout, stem: str, files: dict[str, bytes | Path], shard_bytes: int, overwrite: bool):
        self.out, self.layout, self.stem = out, layout, stem
        recover(out)
        if out.exists() and not out.is_dir():
            raise ModelError("is a file; an export is a folder", out)
        if not overwrite and not _ours(out):
            raise ModelError("exists and is not an earlier export of ours; choose another folder, or ask to overwrite it", out)
        out.parent.mkdir(parents=True, exist_ok=True)
        need, free = sum(spec.nbytes for spec in layout.values()), shutil.disk_usage(out.parent).free
        if need > free:
            raise ModelError(f"the export needs {size_text(need)} and the disk has {size_text(free)} free", out)
        self.sums: dict[str, dict] = {}
        self.shards = _split(layout, shard_bytes)
        self.current, self.left = None, 0
        self.folder = out.parent / f".{out.name}.draft-{secrets.token_hex(4)}"
        self.folder.mkdir()  # not mkdtemp, whose folders are private
        for name, content in files.items():
            self._add(name, read(content) if isinstance(content, Path) else content)

    def _add(self, name: str, content: bytes) -> None:
        with open(self.folder / name, "xb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        self.sums[name] = {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}

    def _file_name(self, index: int) -> str:
        count = len(self.shards)
        return f"{self.stem}.safetensors" if count == 1 else f"{self.stem}-{index + 1:05d}-of-{count:05d}.safetensors"

    def put(self, name: str, tensor: Tensor) -> None:
        """The next tensor of the layout."""
        spec = self.layout[name]
        assert (tensor.dtype, tuple(tensor.shape)) == spec, f"{name}: {tensor.dtype} {tuple(tensor.shape)} for {spec}"
        if tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.isfinite().all():
            raise ModelError(f"{name} is not finite in {str(tensor.dtype).removeprefix('torch.')}: it diverged, or needs a wider dtype")
        if not self.left:
            self.index = len([s for s in self.sums if s.endswith(".safetensors")])
            self.current = _File(self.folder / self._file_name(self.index), self.shards[self.index])
            self.left = len(self.shards[self.index])
        self.current.write(memoryview(octets(tensor).numpy()))
        self.left -= 1
        if not self.left:
            self.sums[self._file_name(self.index)] = self.current.close()

    def finish(self) -> None:
        """The index and the checksums: all that is missing once every tensor was put."""
        assert not self.left and sum(map(len, self.shards)) == len(self.layout)
        if len(self.shards) > 1:
            where = {name: self._file_name(i) for i, shard in enumerate(self.shards) for name in shard}
            total = sum(spec.nbytes for spec in self.layout.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            self._add(f"{self.stem}.safetensors.index.json", json.dumps(index, indent=2).encode() + b"\n")
        self._add(CHECKSUMS, json.dumps({"format": FORMAT, "files": dict(sorted(self.sums.items()))}, indent=2).encode() + b"\n")

    def publish(self) -> None:
        """Two renames where something lies there. Killed between them, `recover` makes the first undone."""
        _sync(self.folder)
        old, ours = None, _ours(self.out)
        if self.out.exists():
            old = self.out.with_name(f"{self.out.name}.replaced-{secrets.token_hex(4)}")
            self.out.rename(old)
        try:
            self.folder.rename(self.out)
        except OSError:
            if old is not None:
                old.rename(self.out)
            raise
        _sync(self.out.parent)
        if old is not None and ours:  # what is not ours stays where it was moved to
            _remove(old, self.out)

    def discard(self) -> None:
        if self.current is not None:
            with suppress(OSError):  # closing flushes, which fails again on a full disk
                self.current.file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def recover(out: Path) -> None:
    """Ends what an export to `out` that was killed has begun: an earlier one that it had moved aside is put back, or removed if
    the new one has its place; so are drafts."""
    name = glob.escape(out.name)
    for draft in out.parent.glob(f".{name}.draft-*"):
        shutil.rmtree(draft, ignore_errors=True)
    aside = out.parent.glob(f"{name}.replaced-{'[0-9a-f]' * 8}")
    for old in sorted(filter(_ours, aside), key=lambda p: p.stat().st_mtime, reverse=True):
        if not os.path.lexists(out):
            old.rename(out)
        elif _ours(out):
            _remove(old, out)


def _remove(old: Path, out: Path) -> None:
    """Under a draft's name first: half removed, it would be nobody's."""
    trash = out.with_name(f".{out.name}.draft-{secrets.token_hex(4)}")
    old.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def _split(layout: Layout, limit: int) -> list[Layout]:
    """Consecutive shards of at most `limit` bytes; a larger tensor has one to itself."""
    shards: list[Layout] = [{}]
    size = 0
    for name, spec in layout.items():
        if size + spec.nbytes > limit and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.nbytes
    return shards


def _ours(out: Path) -> bool:
    """Nothing lies there, or only what an earlier export of ours wrote, so that replacing it destroys nothing else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return True
    try:
        record = json.loads((out / CHECKSUMS).read_text(encoding="utf-8"))
        return record["format"] == FORMAT and {p.name for p in out.iterdir()} <= {CHECKSUMS, *record["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False


def damage(out: Path) -> str:
    """What is not as it was exported, the first of it; "" if all that the checksums name is there and whole."""
    try:
        for name, record in read_json(out / CHECKSUMS)["files"].items():
            size, crc = 0, 0
            with open_regular(inside(out / name, out)) as file:
                while block := file.read(1 << 24):
                    size, crc = size + len(block), zlib.crc32(block, crc)
            if {"bytes": size, "crc32": f"{crc:08x}"} != record:
                return f"{name} has {size} bytes and crc32 {crc:08x}, {CHECKSUMS} says {record}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ModelError) as error:
        return clean(error)
    return ""


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def octets(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in row-major order: [nbytes] uint8 on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


# -------------------------------------------------------------------------------------------------- one outcome for all ranks


def leads() -> bool:
    """Is this the one process that writes?"""
    return not dist.is_initialized() or dist.get_rank() == 0


def agree(error: Exception | None) -> None:
    """Raises the first rank's error on every rank, or returns on every rank. A collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        if error is not None:
            raise error
        return
    text = b"" if error is None else f"{int(isinstance(error, UserError))}{error}".encode()
    size = torch.tensor([len(text)])
    dist.broadcast(size, 0)
    if not size.item():
        return
    message = torch.tensor(list(text), dtype=torch.uint8) if leads() else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(message, 0)
    if error is not None:
        raise error
    text = bytes(message.tolist()).decode()
    raise ModelError(text[1:]) if text[0] == "1" else RuntimeError(f"rank 0: {text[1:]}")


def attempt(path: Path, work: Callable, *args) -> Exception | None:
    """The exception of `work` on `path`, so that a collective can go on to its end before everyone hears of it."""
    try:
        work(*args)
        return None
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
            return ModelError(f"cannot be written: {e.strerror}", e.filename or path)
        return e
    except Exception as e:
        return e


def publish(
    out: str | Path,
    layout: Layout,
    value: Value,
    files: dict[str, bytes | Path],
    *,
    stem: str = "model",
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    check: Check | None = None,
) -> None:
    """Writes the folder `out`: tensors `value(name)` for every name of `layout`, in order, and small `files` (content or source).

    Under a temporary name it is written, flushed, read back and compared byte by byte with `value(name)` once more, and looked
    at by `check`; only then is it renamed. An earlier export of ours in `out` is replaced; with `overwrite` anything else there
    is moved aside, never deleted. A collective if `value` is one.

    Raises:
        ModelError: `out` is occupied, the disk is full, what was read back is not what was written, or what `check` raises.
    """
    draft: _Draft | None = None
    error: Exception | None = None
    out = Path(os.path.realpath(out))

    def start() -> None:
        nonlocal draft
        draft = _Draft(out, layout, stem, files, shard_bytes, overwrite)

    try:
        if leads():
            error = attempt(out, start)
        agree(error)
        for name in layout:
            tensor = value(name)
            if draft and error is None:
                error = attempt(out, draft.put, name, tensor)
        if draft and error is None:
            error = attempt(out, draft.finish)
        agree(error)
        compare(draft.folder if draft else None, layout, value, stem)
        if check is not None:
            check(draft.folder if draft else None)
        agree(attempt(out, draft.publish) if draft else None)
    finally:
        if draft:
            draft.discard()


def compare(folder: Path | None, layout: Layout, value: Value, stem: str = "model") -> None:
    """Reads a written folder and compares every tensor with `value(name)`, byte by byte. A collective if `value` is one.

    Raises:
        ModelError: names, dtypes, shapes or bytes differ.
    """
    error: Exception | None = None
    stored: TensorFolder | None = None

    def start() -> None:
        nonlocal stored
        stored = TensorFolder(folder, stem)
        if stored.specs != layout:
            differing = {n for n in stored.specs.keys() | layout.keys() if stored.specs.get(n) != layout.get(n)}
            raise ModelError(f"{listed(differing)}: not the tensors that were exported", folder)

    def check(name: str, tensor: Tensor) -> None:
        if not torch.equal(octets(stored.read(name)), octets(tensor)):
            raise ModelError(f"{name} reads back differently from what was exported; the disk or file system is at fault", folder)

    if leads():
        error = attempt(folder, start)
    agree(error)
    for name in layout:
        tensor = value(name)
        if leads() and error is None:
            error = attempt(folder, check, name, tensor)
    agree(error)
