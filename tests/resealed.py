"""Hostile checkpoints that pass verification: how one is changed and sealed again, and what it says by a reader of its own.

`seal` and `reseal` are what another program would do that knows the format: a right size and crc32 of every file, a right crc32 of the
manifest. `said` takes nothing from runtime/checkpoint/: the metadata goes through an unpickler that knows names only, tensors through
a reader of zip files and numpy, and what is not one plain value for each element of each tensor raises.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import os
import pickle
import pickletools
import random
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)

MANIFEST, METADATA = "MANIFEST.json", ".metadata"

# --------------------------------------------------------------------------------------------------------------- sealing


def seal(path: Path, body: bytes | dict) -> None:
    """Puts this manifest, whatever it holds, in the place of a checkpoint's."""
    if isinstance(body, dict):
        body = json.dumps({key: value for key, value in body.items() if key != "crc32"}, indent=1).encode()
    body = body[1:].lstrip()
    (path / MANIFEST).write_bytes(f'{{"crc32": "{zlib.crc32(body):08x}",\n'.encode() + body)


def record(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"size": len(data), "crc32": f"{zlib.crc32(data):08x}"}


def reseal(path: Path) -> None:
    """Sizes and crc32 of the files as they are now. What is no file keeps its record."""
    manifest = json.loads((path / MANIFEST).read_bytes())
    for name in manifest["files"]:
        if (path / name).is_file() and not (path / name).is_symlink():
            manifest["files"][name] = record(path / name)
    seal(path, manifest)


# -------------------------------------------------------------------------------------------------------------- changing


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable, *args: object):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Index(MetadataIndex):
    """A key that equals no other, pickled as one of DCP's."""

    __hash__, __eq__ = object.__hash__, object.__eq__

    def __reduce__(self):
        return MetadataIndex, (self.fqn, self.offset), {"fqn": self.fqn, "offset": self.offset, "index": None}


class Size(tuple):
    """Pickles as a torch.Size of whatever it holds."""

    def __reduce__(self):
        return torch.Size, (tuple(self),)


def index(name: object, offset: tuple, n: object = None) -> MetadataIndex:
    """A key of any values."""
    key = MetadataIndex("x")
    for field, value in (("fqn", name), ("offset", offset), ("index", n)):
        object.__setattr__(key, field, value)
    return key


NUMBERS = [0, 1, -1, 2, 3, 4, 7, 1577, 1 << 31, 1 << 40, 1 << 62, (1 << 63) - 1, 1 << 63, 1 << 64, 10**30, True, None, 1.0, "1", ()]
PLACES = [
    "__0_0.distcp", "__1_0.distcp", "../step_1/__0_0.distcp", "/etc/passwd", "", ".", "..", "__0_0.distcp\0", "./__0_0.distcp", "a/b",
    "state.json", MANIFEST, METADATA, "link.distcp", "a\nb", "\x1b[31m", "/dev/zero", "/dev/stdin", "\ud800", "x" * 5000, 3, None, b"x", [],
    Path("__0_0.distcp"),
]  # fmt: skip
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.qint8]


def junk(rng: random.Random, marker: Path) -> object:
    """What belongs in no field; some of it makes the marker if it is called."""
    deep: object = 1
    for _ in range(rng.choice((10, 400))):
        deep = rng.choice(((deep,), [deep]))
    doubled: list = [1]
    for _ in range(40):
        doubled = [doubled, doubled]
    touch = f"open({str(marker)!r}, 'w')"
    calls = [Call(os.system, f"touch {marker}"), Call(eval, touch), Call(exec, touch), Call(open, str(marker), "w")]
    calls += [Call(Path(marker).touch), Call(torch.load, str(marker)), Call(bytes, 1 << 40), Call(getattr, "x", "join")]
    plain = [None, 0, -1, 1 << 70, 1.5, "x", "\x1b\n", b"x" * 9, [], {}, (), {"a": 1}, set(), torch.float32, BytesStorageMetadata()]
    return rng.choice((rng.choice(calls), rng.choice(plain), rng.choice(plain), deep, doubled))


def saved(value: object, **how: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **how)
    return out.getvalue()


class Forger:
    """One checkpoint's metadata and where its tensors lie, to be changed; `files` of the folder are written to as well."""

    def __init__(self, rng: random.Random, path: Path, marker: Path):
        self.rng, self.path, self.marker = rng, path, marker
        self.md: Metadata = pickle.loads((path / METADATA).read_bytes())
        self.entries: dict = self.md.state_dict_metadata
        self.places: dict = self.md.storage_data
        self.name = rng.choice(list(self.entries))
        self.key = rng.choice([key for key in self.places if key.fqn == self.name])

    def put(self, data: bytes, key: MetadataIndex) -> None:
        """Stores a chunk at the end of a file."""
        file = self.path / "__0_0.distcp"
        start = file.stat().st_size
        with open(file, "ab") as out:
            out.write(data)
        self.places[key] = _StorageInfo(file.name, start, len(data))

    def stored(self) -> bytes:
        place = self.places[self.key]
        return (self.path / place.relative_path).read_bytes()[place.offset : place.offset + place.length]

    def written(self) -> bytes:
        return pickle.dumps(self.md, protocol=self.rng.choice((*[4] * 16, 5, 5, 2, 3)))

    # ---- of the metadata

    def names(self) -> None:
        other = self.rng.choice([*self.entries, "", "x", "a\nb", "\x1b[31m", "../x", "y" * 3000, "\ud800"])
        kind = self.rng.randrange(4)
        if kind == 0:  # two tensors change places
            if other in self.entries:
                self.entries[self.name], self.entries[other] = self.entries[other], self.entries[self.name]
        elif kind == 1:
            self.entries[other] = self.entries.pop(self.name)
        elif kind == 2:
            self.md.storage_data = {
                MetadataIndex({self.name: other, other: self.name}.get(key.fqn, key.fqn), key.offset, key.index): place
                for key, place in self.places.items()
            }
        else:
            self.entries[other] = self.entries[self.name]

    def place(self) -> None:
        place = self.places[self.key]
        kind = self.rng.randrange(5)
        if kind == 0:
            other = self.rng.choice(list(self.places))
            self.places[self.key], self.places[other] = self.places[other], place
        elif kind == 1:
            self.places[self.key] = self.rng.choice(list(self.places.values()))
        else:
            field = ("relative_path", "offset", "length")[kind - 2]
            near = () if kind == 2 else (getattr(place, field) + self.rng.choice((-1, 1, -64, 64)),)
            self.places[self.key] = _StorageInfo(**vars(place) | {field: self.rng.choice((*near, *(PLACES if kind == 2 else NUMBERS)))})
            if kind == 2:
                with_link = self.path / "link.distcp"
                with_link.symlink_to("__0_0.distcp")

    def chunks(self) -> None:
        entry = self.entries[self.name]
        i, kind = self.rng.randrange(len(entry.chunks)), self.rng.randrange(6)
        chunk = entry.chunks[i]
        if kind == 0:
            del entry.chunks[i]
        elif kind == 1:
            entry.chunks.insert(self.rng.randrange(len(entry.chunks) + 1), chunk)
        elif kind == 2:
            entry.chunks *= self.rng.choice((2, 1000, 100_000))
        elif kind == 3:
            entry.chunks.reverse()
        else:
            offsets, sizes = list(chunk.offsets), list(chunk.sizes)
            numbers = offsets if kind == 4 else sizes
            if numbers and self.rng.random() < 0.8:
                at = self.rng.randrange(len(numbers))
                numbers[at] = self.rng.choice([*NUMBERS, numbers[at] + 1, numbers[at] - 1])
            else:
                numbers.append(self.rng.choice(NUMBERS))
            entry.chunks[i] = ChunkStorageMetadata(Size(offsets), Size(sizes))
            if kind == 4 and self.rng.random() < 0.5:
                for key in [key for key in self.places if key.fqn == self.name and key.offset == chunk.offsets]:
                    self.places[index(self.name, Size(offsets), key.index)] = self.places.pop(key)

    def size(self) -> None:
        entry = self.entries[self.name]
        size = list(entry.size)
        at = self.rng.randrange(len(size) + 1)
        size[at : at + self.rng.randrange(2)] = self.rng.choice(([], [self.rng.choice(NUMBERS)], [1] * 100, [1 << 62] * 2, size[::-1]))
        entry.size = Size(size)

    def dtype(self) -> None:
        properties = self.entries[self.name].properties
        dtype = self.rng.choice([*DTYPES, None, "float32"])
        self.entries[self.name].properties = TensorProperties(dtype, requires_grad=not properties.requires_grad)

    def index(self) -> None:
        place = self.places.pop(self.key)
        kind = self.rng.randrange(4)
        if kind == 0:  # gone
            return
        if kind == 1:  # twice; the same once it is rebuilt
            self.md.storage_data = {self.key: place, Index(self.key.fqn, self.key.offset): self.rng.choice([place, *self.places.values()])}
            self.md.storage_data |= self.places
            return
        offset = [*(self.key.offset or ()), *([self.rng.choice(NUMBERS)] if kind == 2 else [])]
        self.places[index(self.key.fqn, Size(offset), self.rng.choice(NUMBERS))] = place

    def other(self) -> None:
        """Something else somewhere."""
        value, entry, place = junk(self.rng, self.marker), self.entries[self.name], self.places[self.key]
        holder = self.rng.choice((self.md, self.md, entry, entry.properties, entry.chunks[0], place, self.key, self.entries, self.places))
        try:
            if isinstance(holder, dict):
                holder[self.rng.choice((self.name, "x", self.key, 3)) if self.rng.random() < 0.7 else value] = value
            else:
                fields = [name for name in vars(holder) if name != "memory_format"]  # torch writes that one as a number
                field = self.rng.choice([*fields, "x"])
                object.__setattr__(holder, field, value)
        except TypeError:  # no key
            self.md = value

    def retile(self) -> None:
        """The same tensor in other chunks, which fit or nearly do."""
        whole, entry = said(self.path)[self.name], self.entries[self.name]
        if not whole.size:
            return
        for key in [key for key in self.places if key.fqn == self.name]:
            del self.places[key]
        boxes = [([0] * whole.ndim, list(whole.shape))]
        for dim in range(whole.ndim):  # one dimension after the other, each piece cut where it likes
            boxes = [cut for box in boxes for cut in self._cut(box, dim)]
        if self.rng.random() < 0.5 and whole.ndim:
            self._spoil(boxes, whole.shape)
        self.rng.shuffle(boxes)
        entry.chunks = []
        for offsets, sizes in boxes:
            data = whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes))]
            chunk = torch.from_numpy(np.ascontiguousarray(data)).view(entry.properties.dtype).reshape(data.shape)
            entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            self.put(saved(chunk), MetadataIndex(self.name, torch.Size(offsets), len(entry.chunks) - 1))

    def _cut(self, box: tuple, dim: int) -> list[tuple]:
        (offsets, sizes), out = box, []
        ends = sorted(self.rng.sample(range(1, sizes[dim]), min(self.rng.randrange(3), sizes[dim] - 1))) if sizes[dim] > 1 else []
        for begin, end in zip([0, *ends], [*ends, sizes[dim]]):
            o, n = list(offsets), list(sizes)
            o[dim], n[dim] = o[dim] + begin, end - begin
            out.append((o, n))
        return out

    def _spoil(self, boxes: list[tuple], shape: tuple) -> None:
        offsets, sizes = boxes[self.rng.randrange(len(boxes))]
        dim, kind = self.rng.randrange(len(shape)), self.rng.randrange(3)
        if kind == 0 and sizes[dim] > 1:
            sizes[dim] -= 1
        elif kind == 1 and offsets[dim]:
            offsets[dim] -= 1
        elif len(boxes) > 1:
            boxes.pop() if self.rng.random() < 0.5 else boxes.append(copy.deepcopy(boxes[0]))

    # ---- of the tensors

    def payload(self) -> None:
        """Another file of torch.save in the place of a chunk."""
        blob = self.stored()
        chunk = torch.load(io.BytesIO(blob), weights_only=True)
        more = torch.arange(64.0).to(chunk.dtype)
        view = more[: chunk.numel()].reshape(chunk.shape) if chunk.numel() <= 64 else chunk
        kind = self.rng.randrange(6)
        if kind == 0:  # a plain tensor, though not a contiguous one
            value = self.rng.choice((view, view.flip(0) if view.ndim else view, view.T.contiguous().T if view.ndim == 2 else view))
            value = more[0].expand(chunk.shape) if self.rng.random() < 0.3 else value
            self.put(saved(value), self.key)
        elif kind == 1:
            others = [chunk.to(self.rng.choice(DTYPES[:-1])), chunk[None], chunk.flatten()[:-1], chunk.to_sparse(), torch.empty(0)]
            others += [torch.nn.Parameter(chunk.float()), chunk.float().clone().requires_grad_(), [chunk], {"a": chunk}, None, 3, "x"]
            others += [torch.empty(chunk.shape, device="meta", dtype=chunk.dtype), torch.zeros(chunk.shape, dtype=torch.complex64).conj()]
            value = self.rng.choice([*others, torch.Size([1]), torch.float32, chunk.flatten()[0].item()])
            self.put(saved(value, _use_new_zipfile_serialization=self.rng.random() < 0.8), self.key)
        elif kind == 2:
            self.put(saved(Call(os.system, f"touch {self.marker}") if self.rng.random() < 0.5 else [junk(self.rng, self.marker)]), self.key)
        elif kind == 3:
            self.put(pickle.dumps(junk(self.rng, self.marker)), self.key)
        elif kind == 4:
            self.put(saved(chunk, _use_new_zipfile_serialization=False), self.key)
        else:
            self.put(self.rezipped(blob), self.key)

    def rezipped(self, blob: bytes) -> bytes:
        """The same members but for one."""
        source, out = zipfile.ZipFile(io.BytesIO(blob)), io.BytesIO()
        names = source.namelist()
        changed, kind = self.rng.choice([names[0], names[0], *names]), self.rng.randrange(7)
        pressed = zipfile.ZIP_DEFLATED if self.rng.random() < 0.1 else zipfile.ZIP_STORED
        with zipfile.ZipFile(out, "w", pressed) as target:
            for name in names:
                data = source.read(name)
                if name == changed:
                    if kind == 0:
                        continue
                    if name.endswith("data.pkl"):
                        data = changed_pickle(self.rng, data)
                    elif kind == 1:
                        data = data[: self.rng.randrange(len(data) + 1)]
                    elif kind == 2:
                        data += bytes(self.rng.choice((1, 8, 1000)))
                    elif name.endswith("byteorder"):
                        data = self.rng.choice((b"big", b"big", b"middle", b"little\n", b""))
                    else:
                        data = changed_bytes(self.rng, data)
                target.writestr(name, data)
        return out.getvalue()

    def content(self) -> None:
        """Bytes of a file of tensors: inside what is a tensor's, or anywhere."""
        file = self.path / self.places[self.key].relative_path
        data, kind = bytearray(file.read_bytes()), self.rng.randrange(4)
        if kind == 0:
            data = data[: self.rng.randrange(len(data))] if self.rng.random() < 0.7 else data + bytes(self.rng.randrange(1, 99))
        elif kind == 1:
            at = self.rng.randrange(len(data))
            data = data[:at] + data[at + 1 :] + b"\0"
        else:
            data = bytearray(changed_bytes(self.rng, bytes(data)))
        file.write_bytes(data)


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 4) if out else 0):
        at = rng.randrange(len(out))
        out[at] = rng.choice((out[at] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255))
    return bytes(out)


OPCODES = [bytes([n]) for n in b"021(tRb\x81\x93N}]eus.Q\x94"] + [b"P\n", b"cos\nsystem\n", b"h\x00", b"h\xff", b"\x8a\x09" + b"\xff" * 9]
OPCODES += [b"r\xff\xff\xff\x7f"]  # a place in the memo that makes a table of its length
TEXTS = [b"os", b"system", b"x", b"", b"float32", b"uint8", b"float64", b"torch", b"BytesStorageMetadata", b"__1_0.distcp"]


def changed_pickle(rng: random.Random, data: bytes) -> bytes:
    """Its opcodes cut, doubled, moved or replaced; a number or a name of another length; or plain bytes."""
    kind = rng.randrange(8)
    if kind < 2:
        return changed_bytes(rng, data)
    places = [at for _, _, at in pickletools.genops(data)] + [len(data)]
    parts = [data[a:b] for a, b in itertools.pairwise(places)]
    for _ in range(rng.choice((1, 1, 2))):
        i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
        if kind == 2:
            parts[i] = b""
        elif kind == 3:
            parts.insert(i, parts[i])
        elif kind == 4:
            parts[i], parts[j] = parts[j], parts[i]
        elif kind == 5:
            parts.insert(i, rng.choice(OPCODES))
        elif kind == 6:
            numbers = [n for n, part in enumerate(parts) if part[:1] in b"KMJ\x8a"]
            number = rng.choice((0, 1, 2, 5, 6, 7, 255, 1 << 16, 1 << 31, -1, 1 << 62, 1 << 64))
            parts[rng.choice(numbers or [i])] = pickle.dumps(number, 2)[2:-1]
        else:
            names = [n for n, part in enumerate(parts) if part[:1] in b"\x8cXc"]
            n = rng.choice(names or [i])
            text = rng.choice(TEXTS)
            parts[n] = rng.choice((b"\x8c" + bytes([len(text)]) + text, parts[rng.choice(names or [j])]))
    return b"".join(parts)


def damage_metadata(rng: random.Random, path: Path, marker: Path) -> None:
    if rng.random() < 0.3:
        (path / METADATA).write_bytes(changed_pickle(rng, (path / METADATA).read_bytes()))
        return
    forger = Forger(rng, path, marker)
    change = rng.choice(("names", "place", "place", "chunks", "chunks", "size", "dtype", "index", "other", "other", "retile", "retile"))
    getattr(forger, change)()
    try:
        (path / METADATA).write_bytes(forger.written())
    except Exception:  # nothing that pickle can write, or too deep for it
        (path / METADATA).write_bytes(b"\x80\x04" + b"]" * 3000 + b"a" * 2999 + b".")


def damage_tensors(rng: random.Random, path: Path, marker: Path) -> None:
    forger = Forger(rng, path, marker)
    if rng.random() < 0.4:
        return forger.content()
    forger.payload()
    (path / METADATA).write_bytes(pickle.dumps(forger.md, protocol=4))


# --------------------------------------------------------------------------------------------------------------- reading


class _Fields:
    """Any of DCP's records."""

    def __init__(self, *_: object):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, key: Any) -> Any:
        return self.state[key]


_WIDTHS = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "bool": 1}
_STORAGES = {"Double": "float64", "Long": "int64", "Float": "float32", "Int": "int32", "Half": "float16", "BFloat16": "bfloat16"}
_STORAGES |= {"Byte": "uint8", "Bool": "bool"}


class _Names(pickle.Unpickler):
    """DCP's records as `_Fields`, a dtype as its name, everything else refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name == "Size":
            return tuple
        if module == "torch" and name in {*_WIDTHS, "complex64", "qint8"}:
            return name
        if (module, name) == ("torch.serialization", "_get_layout") or module.startswith("torch.distributed.checkpoint."):
            return type(name, (_Fields,), {})
        raise AssertionError(f"{module}.{name}")


class _Tensors(pickle._Unpickler):
    """One tensor of torch.save: (storage, offset, size, stride), the storage as its members' name, its dtype and its length.

    Python's own unpickler, as torch's is: a place in the memo far out makes no table."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        assert module == "torch" and name.endswith("Storage"), f"{module}.{name}"
        return _STORAGES[name.removesuffix("Storage")]

    @staticmethod
    def rebuild(storage: tuple, offset: int, size: tuple, stride: tuple, _grad: bool, _hooks: dict, more: Any = None) -> tuple:
        assert not more, "conjugated or negative"
        return storage, offset, size, stride

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _device, length = pid
        assert kind == "storage"
        return key, dtype, length


def members(blob: bytes) -> dict[str, bytes]:
    """What a zip file holds, by its central directory. `zipfile` looks at more (crc32, sizes, disks) and so would miss what torch reads."""

    def number(at: int, width: int) -> int:
        return int.from_bytes(blob[at : at + width], "little")

    end, found = blob.rindex(b"PK\5\6"), {}
    count, at, wide = number(end + 10, 2), number(end + 16, 4), number(end - 12, 8)
    if blob[end - 20 : end - 16] == b"PK\6\7" and blob[wide : wide + 4] == b"PK\6\6":
        count, at = number(wide + 32, 8), number(wide + 48, 8)
    for _ in range(count):
        assert blob[at : at + 4] == b"PK\1\2"
        method, size, begin = number(at + 10, 2), number(at + 20, 4), number(at + 42, 4)
        after = at + 46 + number(at + 28, 2)
        name = blob[at + 46 : after].decode("latin-1").partition("/")[2]
        begin += 30 + number(begin + 26, 2) + number(begin + 28, 2)
        data = blob[begin : begin + size]
        assert method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and len(data) == size and name not in found
        found[name] = zlib.decompress(data, -15) if method == zipfile.ZIP_DEFLATED else data
        at = after + number(at + 30, 2) + number(at + 32, 2)
    return found


def tensor(blob: bytes) -> tuple[str, np.ndarray]:
    """dtype and elements (as unsigned integers of its width) of what torch.save wrote of one tensor."""
    there = members(blob)
    (key, dtype, length), offset, size, stride = _Tensors(io.BytesIO(b"\x80\2" + there["data.pkl"][2:])).load()
    order = there.get("byteorder", b"little").decode()
    width = _WIDTHS[dtype]
    storage = np.frombuffer(there[f"data/{key}"], f"{'>' if order == 'big' else '<'}u{width}").astype(f"<u{width}")
    assert len(storage) == length and len(size) == len(stride) and offset >= 0 and all(n >= 0 for n in (*size, *stride))
    assert not math.prod(size) or offset + sum((n - 1) * step for n, step in zip(size, stride)) < len(storage)
    if not math.prod(size):
        return dtype, np.zeros(size, f"<u{width}")
    return dtype, np.lib.stride_tricks.as_strided(storage[offset:], size, [step * width for step in stride]).copy()


def said(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, its elements as unsigned integers of their width. Raises if it is not exactly one value each."""
    files = json.loads((path / MANIFEST).read_bytes())["files"]
    metadata = _Names(io.BytesIO((path / METADATA).read_bytes())).load()
    places = [(key["fqn"], tuple(key["offset"]), place) for key, place in metadata["storage_data"].items()]
    found = {}
    for name, entry in metadata["state_dict_metadata"].items():
        size, dtype = entry["size"], entry["properties"][0]
        assert all(0 <= n < 1000 for n in size), f"{name} has the size {size}"
        values, times = np.zeros(size, f"<u{_WIDTHS[dtype]}"), np.zeros(size, int)
        for chunk in entry["chunks"]:
            if not math.prod(chunk["sizes"]):
                continue
            (place,) = [place for fqn, offset, place in places if fqn == name and offset == chunk["offsets"]]
            assert place["relative_path"] in files and stat.S_ISREG(os.lstat(path / place["relative_path"]).st_mode)
            blob = (path / place["relative_path"]).read_bytes()
            assert 0 <= place["offset"] <= place["offset"] + place["length"] <= len(blob)
            is_, part = tensor(blob[place["offset"] : place["offset"] + place["length"]])
            where = tuple(slice(o, o + n) for o, n in zip(chunk["offsets"], chunk["sizes"], strict=True))
            assert is_ == dtype and part.shape == chunk["sizes"] == values[where].shape, f"{is_} {part.shape} in a chunk of {name}"
            values[where] = part
            times[where] += 1
        assert (times == 1).all(), f"elements of {name} are in no chunk or in several"
        found[name] = values
    return found
