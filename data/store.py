"""Tokenized documents on disk: written once, memory-mapped, found again by the key of what made them.

A store is a folder, named by its key:

    tokens.bin   uint32 per token, documents end to end; the top bit says that the token is a target
    index.bin    per document: end in tokens.bin (uint64), targets (uint32), line in its file (uint32)
    meta.json    the number of documents and tokens, the largest id, the first document of each file, CRC-32 of the others, and
                 what of the files was wrong and left out

It is written in a folder beside, synced, and renamed, so that a store that exists is whole unless the disk failed; that is
what sizes and checksums are for: a store that does not match them is made again. Ranks and nodes that need the same store
take turns by a lock on a file beside it; the second one finds the work done. On a file system without locks the work may be
done twice, and one of the two results is used.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np

from data.sample import TRAINED, Tokens
from runtime.errors import DataError

try:
    import fcntl
except ImportError:  # not a POSIX system: work may be done twice
    fcntl = None

FORMAT = 1
INDEX = np.dtype([("end", "<u8"), ("targets", "<u4"), ("line", "<u4")])
_FLUSH_TOKENS = 1 << 20


class Store:
    """The documents of one source. Arrays are memory maps: reading a document reads its pages."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))

    @cached_property
    def tokens(self) -> np.ndarray:
        return np.memmap(self.folder / "tokens.bin", "<u4", "r", shape=(self.meta["tokens"],))

    @cached_property
    def index(self) -> np.ndarray:
        return np.memmap(self.folder / "index.bin", INDEX, "r", shape=(self.meta["documents"],))

    @property
    def max_id(self) -> int:
        return self.meta["max_id"]

    @property
    def bad(self) -> dict:
        """Records that were left out: `count`, `reasons` (how often each), `first` ([file number, line, reason] of some)."""
        return self.meta.get("bad") or {"count": 0, "reasons": {}, "first": []}

    @property
    def contents(self) -> list:
        """What tells contents apart: tokens, targets and borders."""
        return [self.meta["documents"], self.meta["tokens"], self.meta["crc32"]]

    def place_of(self, document: int) -> tuple[int, int]:
        """Number of the file, and line in it, that a document came from."""
        return bisect_right(self.meta["files"], document) - 1, int(self.index[document]["line"])

    def is_whole(self) -> bool:
        """Whether the files are what was written."""
        sizes = {"tokens.bin": self.meta["tokens"] * 4, "index.bin": self.meta["documents"] * INDEX.itemsize}
        for name, size in sizes.items():
            path = self.folder / name
            if path.stat().st_size != size or _crc32(path) != self.meta["crc32"][name]:
                return False
        return self.meta["format"] == FORMAT and self.meta["documents"] > 0


class Writer:
    """Makes a store in `folder`, document by document, in constant memory but for 16 bytes a document.

    `ends`: ids that end a text. Documents whose last target is none of them are counted: they do not teach to stop.
    `bad`: set by who writes, if records were left out (`Store.bad`).
    """

    def __init__(self, folder: Path, ends: frozenset[int]):
        self.folder, self._ends_text, self.open_ended, self.bad = folder, ends, 0, None
        self.tokens = self.max_id = self._crc = self._buffered = 0
        self._buffer: list[np.ndarray] = []
        self._ends, self._targets, self._lines = array("Q"), array("I"), array("I")
        self._files: list[int] = []

    def __enter__(self) -> Writer:
        self._file = open(self.folder / "tokens.bin", "wb")
        return self

    def __exit__(self, kind, error, traceback) -> None:
        with self._file:
            if kind is None:
                self._flush()
                _sync(self._file)
        if kind is None:
            self._finish()

    def begin_file(self) -> None:
        self._files.append(len(self._ends))

    def add(self, document: Tokens, line: int) -> None:
        document[0] &= ~TRAINED  # nothing comes before it that could predict it
        self._buffer.append(document)
        self._buffered += len(document)
        self.tokens += len(document)
        self._ends.append(self.tokens)
        targets = np.flatnonzero(document >= TRAINED)
        self._targets.append(len(targets))
        self.open_ended += bool(len(targets)) and int(document[targets[-1]] & ~TRAINED) not in self._ends_text
        self._lines.append(line)
        if self._buffered > _FLUSH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if self._buffer:
            block = np.concatenate(self._buffer).astype("<u4", copy=False)
            self.max_id = max(self.max_id, int((block & ~TRAINED).max()))
            self._crc = zlib.crc32(block, self._crc)
            self._file.write(block)
            self._buffer, self._buffered = [], 0

    def _finish(self) -> None:
        index = np.empty(len(self._ends), INDEX)
        index["end"], index["targets"], index["line"] = self._ends, self._targets, self._lines
        with open(self.folder / "index.bin", "wb") as file:
            file.write(index)
            _sync(file)
        meta = {
            "format": FORMAT,
            "documents": len(self._ends),
            "tokens": self.tokens,
            "max_id": self.max_id,
            "open_ended": self.open_ended,
            "files": self._files,
            "bad": self.bad,
            "crc32": {"tokens.bin": self._crc, "index.bin": zlib.crc32(index)},
        }
        with open(self.folder / "meta.json", "w", encoding="utf-8") as file:
            json.dump(meta, file)
            _sync(file)


def find_or_make(cache: Path, key: str, ends: frozenset[int], make: Callable[[Writer], None]) -> Store:
    """The store of `key`, made by `make` if it is not there or not whole."""
    folder = cache / key
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(cache / f"{key}.lock") as alone:
            if (store := _open(folder)) is not None:
                return store
            if alone:  # then whatever lies beside is what a process that died has left
                for stale in cache.glob(f"{key}.*.tmp"):
                    shutil.rmtree(stale, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(prefix=f"{key}.", suffix=".tmp", dir=cache))
            try:
                with Writer(temporary, ends) as writer:
                    make(writer)
                _publish(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise DataError(f"the cache cannot be written: {error.strerror or error}; set data.cache to another folder", cache) from None
    store = _open(folder)
    assert store is not None, f"{folder} was just written and is not whole"
    return store


def _open(folder: Path) -> Store | None:
    """The store, or None if it is absent or damaged."""
    if not folder.exists():
        return None
    try:
        store = Store(folder)
        if store.is_whole():
            return store
    except (OSError, ValueError, KeyError, TypeError):
        pass
    print(f"{folder}: damaged; tokenizing again", file=sys.stderr)
    return None


def _publish(temporary: Path, folder: Path) -> None:
    """Puts a finished store in its place, removing a damaged one. Loses gracefully to another process that was faster."""
    if folder.exists():
        os.rename(folder, temporary / "damaged")
    try:
        os.rename(temporary, folder)
    except OSError:
        if _open(folder) is None:
            raise
    shutil.rmtree(folder / "damaged", ignore_errors=True)
    descriptor = os.open(folder.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Holds the lock on `path`; gives False where the file system has none."""
    with open(path, "w") as file:
        locked = False
        if fcntl is not None:
            try:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    print("waiting for another process that is tokenizing the same data", file=sys.stderr)
                    fcntl.flock(file, fcntl.LOCK_EX)
                locked = True
            except OSError:
                pass
        yield locked


def _crc32(path: Path) -> int:
    """Reads through a buffer, not the memory map: a data set's pages need not stay in memory for it."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())
