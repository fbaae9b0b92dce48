"""The `checkpoints` folder of a run: names, files that count themselves, manifests, publishing, retention. No torch.

step_<n>/            complete checkpoints, only ever made by a rename
    MANIFEST.json    every file's size and crc32, and what the checkpoint is; guarded by a crc32 of its own
step_<n>.pin         an empty marker: never prune step <n>
latest               a text file with the name of the newest checkpoint, for people and scripts; resuming ignores it
superseded_<k>/      checkpoints that a resumed run has gone back behind, and the records of that time; kept, but no longer looked at
.tmp-* .trash-*      half written, half deleted; removed when a run starts
.lock                held by the run that writes here
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import secrets
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.files import once, size_text

FORMAT = 1
MANIFEST = "MANIFEST.json"
NEVER_PRUNED = 2
_STEP = re.compile(r"step_(0|[1-9][0-9]*)")
_SEAL = re.compile(rb'\{"crc32": "([0-9a-f]{8})",\n')
_MANIFEST_KEYS = {"step": int, "written": str, "origin": (dict, type(None)), "layout": dict, "identity": dict, "config": dict}
# what every checkpoint has and its reader takes into memory whole, with the most bytes of it that are: 300 a chunk, 100 a file, 1000
LIMITS = {".metadata": 256 << 20, "state.json": 1 << 20}
MANIFEST_LIMIT = 64 << 20
RECORDS = "metrics.jsonl"  # of a run (runtime/metrics.py), beside its checkpoints folder
_CRC = re.compile(r"[0-9a-f]{8}")
_CHUNK = 1 << 22


def at(point: str) -> None:
    """Called before each thing that can fail. Tests put a function here that raises or kills the process at `point`."""


class Damaged(Exception):
    """A checkpoint folder is not what its manifest says; the message is the reason."""


# ---------------------------------------------------------------------------------------------------------------- files


class CountedFile:
    """A new file that counts its bytes and their crc32 while they pass, and is on disk once closed.

    An error while writing is kept and raised again at the end: torch.save replaces it with a message about its own zip.
    """

    def __init__(self, path: Path):
        at("open")
        self.path, self.size, self.crc = path, 0, 0
        self._error: Exception | None = None
        self._file = open(path, "xb", buffering=1 << 20)  # noqa: SIM115

    def write(self, data) -> int:
        with self._remembered():
            at("write")
            self._file.write(data)
        self.crc = zlib.crc32(data, self.crc)
        count = memoryview(data).nbytes
        self.size += count
        return count

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """DCP flushes after every tensor; once at the end is enough."""

    def close(self) -> None:
        if not self._file.closed:
            with self._remembered():
                self._file.flush()
                at("fsync")
                os.fsync(self._file.fileno())
                self._file.close()

    @property
    def record(self) -> dict[str, Any]:
        return {"size": self.size, "crc32": f"{self.crc:08x}"}

    @contextlib.contextmanager
    def _remembered(self):
        try:
            yield
        except Exception as e:
            named = OSError(e.errno, e.strerror, str(self.path)) if isinstance(e, OSError) else e
            self._error = self._error or named
            raise self._error from None

    def __enter__(self) -> CountedFile:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if error is None:
                self.close()
        finally:
            with contextlib.suppress(OSError):  # closing flushes once more: what failed above fails again
                self._file.close()
        if error is not None and self._error is not None and error is not self._error:
            raise self._error


def write_file(path: Path, data: bytes) -> dict[str, Any]:
    """Writes a new file durably; returns its manifest record."""
    with CountedFile(path) as file:
        file.write(data)
    return file.record


def read_small(path: Path, limit: int) -> bytes:
    """Contents of a regular file. No link is followed, and nothing that would wait for a writer is waited for.

    Raises:
        OSError: it is something else, or has more than `limit` bytes.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as e:
        raise OSError(e.errno, "not a regular file", str(path)) if e.errno in (errno.ELOOP, errno.ENXIO) else e from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if found.st_size > limit:
            raise OSError(errno.EFBIG, f"has {size_text(found.st_size)}, and at most {size_text(limit)} are read", str(path))
        with open(fd, "rb", closefd=False) as file:
            return file.read(limit)
    finally:
        os.close(fd)


def fsync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    at("fsync_folder")
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ------------------------------------------------------------------------------------------------------------- manifests


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """The manifest begins with the crc32 of all its bytes after the first line, so that no bit of it can turn unnoticed."""
    body = json.dumps(manifest, indent=1)[1:].lstrip().encode()
    sizes = {name: record["size"] for name, record in manifest["files"].items()}
    assert all(sizes.get(name, 0) <= limit for name, limit in LIMITS.items()) and len(body) < MANIFEST_LIMIT, "it would not be read again"
    write_file(folder / MANIFEST, f'{{"crc32": "{zlib.crc32(body):08x}",\n'.encode() + body)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, with `id` added: the crc32 that stands for all of its content.

    Raises:
        Damaged: it is missing, was changed, or is not of this folder.
    """
    try:
        data = read_small(folder / MANIFEST, MANIFEST_LIMIT)
    except FileNotFoundError:
        raise Damaged(f"has no {MANIFEST}") from None
    except OSError as e:
        raise Damaged(f"{MANIFEST} cannot be read: {e.strerror}") from None
    seal = _SEAL.match(data)
    if not seal or f"{zlib.crc32(data[seal.end() :]):08x}".encode() != seal[1]:
        raise Damaged(f"{MANIFEST} was changed (its crc32 does not match)")
    try:
        manifest = json.loads(data, object_pairs_hook=once)
        if manifest["format"] != FORMAT:
            raise Damaged(f"has format {json.dumps(manifest['format'])[:20]}, but this version reads format {FORMAT}")
        for name, record in manifest["files"].items():
            if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or not name.isprintable():
                raise Damaged(f"{MANIFEST} names a file outside its folder: {name!r}")
            if not _is_count(record["size"]) or not _CRC.fullmatch(record["crc32"]):
                raise Damaged(f"{MANIFEST} has no size and crc32 for {name!r}")
        for key, kind in _MANIFEST_KEYS.items():
            if not isinstance(manifest[key], kind):
                raise Damaged(f"{MANIFEST} has no {key}")
        origin, layout = manifest["origin"], manifest["layout"]
        fits = {
            "step": _is_count(manifest["step"]),
            "written": manifest["written"].isprintable() and len(manifest["written"]) < 80,
            "origin": origin is None or (type(origin["path"]) is type(origin["id"]) is str and _is_count(origin["step"])),
            "eval_loss": _is_measured(manifest.get("eval_loss")),
            "eval_data": isinstance(manifest.get("eval_data", ""), str),
            "layout": layout["world"] and all(_is_count(size) and axis.isprintable() for axis, size in layout.items()),
            "identity": not _is_deep(manifest["identity"]),
            "config": not _is_deep(manifest["config"]),
        }
        if wrong := [key for key, fit in fits.items() if not fit]:
            raise Damaged(f"{MANIFEST} has another kind of {wrong[0]} than ours")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise Damaged(f"{MANIFEST} is not one of ours ({type(e).__name__}: {e})") from None
    for name, limit in LIMITS.items():
        if name not in manifest["files"]:
            raise Damaged(f"{MANIFEST} lists no {name}")
        if manifest["files"][name]["size"] > limit:
            raise Damaged(f"{name} has more than {size_text(limit)}")
    return manifest | {"id": manifest["crc32"]}


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_measured(value: object) -> bool:
    return value is None or (type(value) is float and math.isfinite(value))


def _is_deep(value: object, levels: int = 24) -> bool:
    """Whether JSON values lie deeper in each other than code that walks through them by recursion should go."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_is_deep(item, levels - 1) for item in inside)


def check_sizes(folder: Path, files: dict[str, dict]) -> list[str]:
    """What is missing or has another size, without reading contents."""
    problems = []
    for name, record in files.items():
        try:
            found = os.lstat(folder / name)
        except OSError as e:
            problems.append(f"{name}: {e.strerror}")
            continue
        if not stat.S_ISREG(found.st_mode):
            problems.append(f"{name}: not a regular file")
        elif found.st_size != record["size"]:
            problems.append(f"{name}: {found.st_size} bytes instead of {record['size']}")
    return problems


def check_contents(folder: Path, files: dict[str, dict]) -> list[str]:
    """Reads the files, several at a time (crc32 and reading leave Python's lock), and compares sizes and crc32."""
    problems = check_sizes(folder, files)
    if problems:
        return problems

    def check(name: str) -> str | None:
        crc, buffer = 0, bytearray(_CHUNK)
        try:
            with open(folder / name, "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    crc = zlib.crc32(memoryview(buffer)[:count], crc)
        except OSError as e:
            return f"{name}: {e.strerror}"
        return None if f"{crc:08x}" == files[name]["crc32"] else f"{name}: contents were changed (crc32 {crc:08x})"

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return [problem for problem in pool.map(check, files) if problem]


def verify(folder: Path) -> dict[str, Any]:
    """Reads everything; returns the manifest.

    Raises:
        Damaged: anything differs.
    """
    manifest = read_manifest(folder)
    if problems := check_contents(folder, manifest["files"]):
        raise Damaged("; ".join(problems))
    return manifest


def is_healthy(manifest: dict[str, Any]) -> bool:
    """Was the run well when this was saved? One that does not say was saved by a version that never skipped."""
    return manifest.get("healthy", True) is True


def step_of(path: Path) -> int | None:
    """The step in a checkpoint's folder name; None for any other name."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


# ------------------------------------------------------------------------------------------------------------ the folder


class Store:
    """The checkpoints folder of one run. Everything that changes it is called on rank 0 only."""

    def __init__(self, run: Path):
        self.run, self.folder = run, run / "checkpoints"
        self._lock: int | None = None
        self._known: dict[
            str, tuple[list | None, bool]
        ] = {}  # by name: how the files looked (`_look`) when they were read, and were intact

    def steps(self) -> list[Path]:
        """Published checkpoints, newest first, whether damaged or not."""
        if not self.folder.is_dir():
            return []
        found = [p for p in self.folder.iterdir() if step_of(p) is not None and p.is_dir() and not p.is_symlink()]
        return sorted(found, key=step_of, reverse=True)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def manifests(self) -> dict[Path, dict[str, Any]]:
        """Of checkpoints with an intact manifest and all files at their sizes, newest first. Each is read once: a run that is under way
        may delete it between two looks."""
        found = {}
        for path in self.steps():
            with contextlib.suppress(Damaged):
                found[path] = self.manifest(path)
        return found

    def manifest(self, path: Path) -> dict[str, Any]:
        """Raises:
        Damaged: the checkpoint is not complete; says why, without reading its tensors.
        """
        manifest = read_manifest(path)
        if manifest["step"] != step_of(path):
            raise Damaged(f"holds step {manifest['step']}")
        if problems := check_sizes(path, manifest["files"]):
            raise Damaged("; ".join(problems))
        return manifest

    def complete(self) -> list[Path]:
        return list(self.manifests())

    def healthy(self) -> list[Path]:
        """Those of `complete` that were not saved between bad steps (runtime/guard.py), newest first."""
        return [path for path, manifest in self.manifests().items() if is_healthy(manifest)]

    def ranked(self) -> list[Path]:
        """Those of `healthy` that were evaluated, the lowest loss first, of equals the newest. Losses on other held-out data than the
        newest's say nothing beside it."""
        evaluated = [(path, m) for path, m in self.manifests().items() if is_healthy(m) and m.get("eval_loss") is not None]
        alike = [(path, m["eval_loss"]) for path, m in evaluated if m.get("eval_data") == evaluated[0][1].get("eval_data")]
        return [path for path, _ in sorted(alike, key=lambda item: item[1])]

    def best(self) -> Path | None:
        """The first of `ranked` that every byte of is intact."""
        return next(filter(self.is_intact, self.ranked()), None)

    def is_intact(self, path: Path) -> bool:
        """Is every byte as the manifest says? Read once: after that, and of what was written here, while the files look the same."""
        look = _look(path)
        known = self._known.get(path.name)
        if look is None or known is None or known[0] != look:
            try:
                self._known[path.name] = look, verify(path)["step"] == step_of(path)
            except Damaged:
                self._known[path.name] = look, False
        return self._known[path.name][1]

    def trust(self, path: Path) -> None:
        """Every byte of this checkpoint was just compared with its manifest, or counted while it was written."""
        self._known[path.name] = _look(path), True

    def problem(self, path: Path) -> str | None:
        """Why a checkpoint is not complete, without reading its tensors; None if it is."""
        try:
            self.manifest(path)
        except Damaged as e:
            return str(e)
        return None

    # ---- writing

    def claim(self, patience_s: float = 10.0) -> None:
        """Makes this process the only writer here, until it ends; a process that was killed holds nothing.

        POSIX record locks: they work over NFS and, unlike flock, are not inherited by children that outlive us. Where the file
        system has no locks, or cannot be written, there is nothing to claim.

        Raises:
            UserError: another run is writing here; or something is in the way of checkpoints, which would come out at the first save.
        """
        if self._lock is not None:
            return
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise UserError(f"{self.folder}: is no folder, and checkpoints go there; move it away")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                if step_of(path) is not None and (path.is_symlink() or not path.is_dir()):
                    raise UserError(f"{path}: is no folder of this run, and a checkpoint goes there; move it away")
            fd = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as e:
            if e.errno == errno.ELOOP:  # it would be made, or locked, wherever that leads
                raise UserError(f"{self.folder / '.lock'}: is a link, and not one of ours; remove it") from None
            return
        deadline = time.monotonic() + patience_s  # the run before this one may still be dying
        while True:
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() > deadline:
                    os.close(fd)
                    raise UserError(f"{self.folder}: another run is writing here; stop it or choose another output.path") from None
                time.sleep(0.1)
            except OSError:
                break
        self._lock = fd

    def release(self) -> None:
        """Gives the claim back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def sweep(self) -> None:
        """Removes what dead runs left half written or half deleted. Only for the holder of the claim."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.startswith((".tmp-", ".trash-")):
                    discard(path)

    def begin(self, step: int) -> Path:
        """A fresh folder to write step `step` into."""
        at("mkdir")
        if os.path.lexists(self.path(step)):
            raise FileExistsError(
                errno.EEXIST, "exists, and was not written by this run; is another run using this folder?", str(self.path(step))
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f".tmp-{step}-{secrets.token_hex(4)}"
        path.mkdir()
        return path

    def publish(self, folder: Path, step: int) -> Path:
        """Gives a folder that is complete its name. From the rename on the checkpoint exists."""
        fsync_folder(folder)
        at("rename")
        folder.rename(self.path(step))  # fails on an existing checkpoint: it is not an empty folder
        self.trust(self.path(step))
        return self.path(step)

    def settle(self, keep: int) -> None:
        """After publishing: makes the rename durable, points `latest` at the newest checkpoint, prunes."""
        fsync_folder(self.folder)
        self.point()
        self.prune(keep)

    def point(self) -> None:
        """Rewrites `latest`, by a rename."""
        newest = next(iter(self.complete()), None)
        if newest is None:
            (self.folder / "latest").unlink(missing_ok=True)
            return
        aside = self.folder / f".tmp-latest-{secrets.token_hex(4)}"
        write_file(aside, f"{newest.name}\n".encode())
        at("latest")
        try:
            aside.rename(self.folder / "latest")
        except OSError as e:
            discard(aside)
            raise OSError(e.errno, e.strerror, str(self.folder / "latest")) from None

    # ---- retention

    def prune(self, keep: int) -> list[Path]:
        """Deletes complete checkpoints older than the newest `keep` that are intact and healthy, but for the pinned ones and the best;
        0 keeps all.

        Nothing is deleted for the sake of a checkpoint whose bytes are not known to be good (`is_intact`), and nothing is read
        unless something could be deleted.
        """
        needed, complete = max(keep, NEVER_PRUNED), self.complete()
        if keep == 0 or len(complete) <= needed:
            return []
        kept = list(islice(filter(self.is_intact, self.healthy()), needed))
        if len(kept) < needed:
            return []
        old = [p for p in complete if step_of(p) < step_of(kept[-1]) and not self.pinned(p)]
        best = self.best() if old else None
        old = [p for p in old if p != best]
        for path in old:
            self.remove(path)
        return old

    def remove(self, path: Path) -> None:
        """Deletes a checkpoint: first it stops being one, by a rename, then its files go."""
        trash = self.folder / f".trash-{path.name}-{secrets.token_hex(4)}"
        at("trash")
        path.rename(trash)
        self._pin(path).unlink(missing_ok=True)
        at("delete")
        shutil.rmtree(trash)

    def supersede(self, paths: Iterable[Path], afresh: bool = False) -> Path | None:
        """Moves checkpoints out of the run's history, newest first so that what is left is always a history.

        The run's records of that time go with them as a copy, before anything is moved: what continues drops those of its undone
        steps. `afresh`: it drops all of them, so they are copied even if there is no checkpoint to move.
        """
        paths, records = sorted(paths, key=step_of, reverse=True), self.run / RECORDS
        recorded = records.is_file() and records.stat().st_size > 0
        if not paths and not (afresh and recorded):
            return None
        number = 1
        while os.path.lexists(target := self.folder / f"superseded_{number}"):
            number += 1
        at("supersede")
        target.mkdir(parents=True)
        if recorded:
            try:
                shutil.copyfile(records, target / RECORDS)
            except OSError as e:
                discard(target)
                raise OSError(e.errno, e.strerror, str(target / RECORDS)) from None
        for path in paths:
            path.rename(target / path.name)
            if self.pinned(path):
                self._pin(path).rename(target / self._pin(path).name)
        self.point()
        return target

    def _pin(self, path: Path) -> Path:
        return path.with_name(path.name + ".pin")

    def pinned(self, path: Path) -> bool:
        return self._pin(path).exists()

    def pin(self, path: Path, on: bool = True) -> None:
        self._pin(path).touch() if on else self._pin(path).unlink(missing_ok=True)

    def free_bytes(self) -> int:
        """Space that this user may still fill where checkpoints go."""
        folder = self.folder
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free


def _look(folder: Path) -> list | None:
    """What tells that files were written to: of each its name, size, time and inode. None where that cannot be seen."""
    try:
        seen = sorted((entry.name, entry.stat(follow_symlinks=False)) for entry in os.scandir(folder))
    except OSError:
        return None
    return [(name, found.st_size, found.st_mtime_ns, found.st_ino) for name, found in seen]


def discard(path: Path) -> None:
    """Removes a file or a folder if it can; what it cannot remove now, `sweep` tries again when the next run starts."""
    try:
        path.unlink()
    except OSError:  # a folder; of a pipe, rmtree would wait for whoever writes to it
        shutil.rmtree(path, ignore_errors=True)


Say = Callable[[str], None]
