"""Files that come from strangers: regular ones, inside the folder that was named, and no larger than is read.

Standard library only: every package of the project may import this file.

A folder of a model, an adapter or data may hold links. What is read may be quoted in an output, trained on or copied into an
export, so a link must not lead to a file that its folder does not hold: only to another file inside the folder, or into the
blobs of the hub cache the folder is in. A pipe would block whoever opens it and a device may never end, so neither is read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from pathlib import Path
from typing import BinaryIO

from runtime.errors import ConfigError, ModelError, UserError

MAX_JSON = 64 << 20  # bytes of an index or config
MAX_FILE = 256 << 20  # bytes of any other file that is held in memory; the largest tokenizers have 35 MB
MAX_TEMPLATE = 1 << 20  # bytes of a chat template


def expanded(path: str, key: str) -> Path:
    """A path of the config, with the home folder that `~` or `~name` stands for.

    Raises:
        ConfigError: there is no such home folder: no user of that name, or none of this process and no HOME either, as in a container.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"begins with a home folder that is not known here; set {key} to a path without ~, or HOME", key, path) from None


def open_regular(path: str | Path, follow: bool = True) -> BinaryIO:
    """Opens a regular file for reading bytes, and never waits for another process as opening a pipe does.

    Raises:
        OSError: as `open`, and for whatever is no regular file; `strerror` says what is wrong.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    return _if_regular(fd, path, "rb")


def open_to_append(path: str | Path) -> BinaryIO:
    """Opens a regular file to append bytes to at once, made where there is none; not where a link leads, and without waiting for a reader.

    Raises:
        OSError: as `open`, and for whatever is no regular file; `strerror` says what is wrong.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as e:
        what = {errno.ELOOP: "it is a link", errno.ENXIO: "it is no regular file"}.get(e.errno, e.strerror)  # ENXIO: a pipe
        raise OSError(e.errno, what, str(path)) from None
    return _if_regular(fd, path, "ab", buffering=0)


def _if_regular(fd: int, path: str | Path, mode: str, buffering: int = -1) -> BinaryIO:
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return os.fdopen(fd, mode, buffering)
    except BaseException:
        os.close(fd)
        raise


def replace_text(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all, and not where a link leads that lies there. One process at a time.

    Raises:
        OSError: the disk refuses it; what was there is as before.
    """
    aside = path.with_name(f".{path.name}.tmp")
    try:
        aside.unlink(missing_ok=True)  # of a process that was killed
        with open(aside, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as e:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise OSError(e.errno, e.strerror, str(path)) from None


def inside(path: Path, folder: Path | None = None, error: type[UserError] = ModelError) -> Path:
    """Where a file of `folder` (None: the folder it is named in) really lies.

    Raises:
        error: that is outside of the folder, or nowhere, or it is no regular file.
    """
    home, real = Path(os.path.realpath(folder or path.parent)), Path(os.path.realpath(path))
    in_hub_cache = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
    if not real.is_relative_to(home) and not in_hub_cache:
        raise error(f"is a link to {real}, outside its folder; use the folder that holds the file, or copy it", path)
    try:
        mode = os.stat(real).st_mode
    except OSError as e:
        what = "is a link to a file that does not exist" if os.path.islink(path) else f"cannot be read: {e.strerror}"
        raise error(what, path) from None
    if not stat.S_ISREG(mode):
        raise error("is no regular file", path)
    return real


def has(folder: Path, name: str) -> bool:
    """Is there a file of this name in the folder?

    Raises:
        ModelError: there is something, but not a regular file inside the folder.
    """
    if not os.path.lexists(folder / name):
        return False
    inside(folder / name)
    return True


def read(path: Path, limit: int = MAX_FILE, folder: Path | None = None) -> bytes:
    """The bytes of a file of `folder` (None: the folder it is named in).

    Raises:
        ModelError: it is missing, larger than `limit`, no regular file, or lies outside of its folder.
    """
    real = inside(path, folder)
    try:
        with open_regular(real, follow=False) as file:
            data = file.read(limit + 1)
    except OSError as e:
        raise ModelError(f"cannot be read: {e.strerror}", path) from None
    if len(data) > limit:
        raise ModelError(f"is larger than {limit >> 20} MiB; this is no such file", path)
    return data


def read_json(path: Path) -> dict:
    """A JSON object of bounded size without repeated keys, in a file of its folder (see `read`).

    Raises:
        ModelError: it is not one.
    """
    try:
        values = json.loads(read(path, MAX_JSON).decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as e:
        raise ModelError(f"not readable as JSON: {e}", path) from None
    if not isinstance(values, dict):
        raise ModelError("must hold a JSON object", path)
    return values


def once(pairs: list[tuple[str, object]]) -> dict:
    """For `json.loads(..., object_pairs_hook=once)`: which of two values a repeated key has is for nobody to guess."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key is repeated")
    return found


def is_text(value: object) -> bool:
    """Is it a string that can be written? JSON can also spell half of a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def size_text(count: int) -> str:
    """`1.5 GiB`."""
    if count < 1024:
        return f"{count} B"
    power = min((count.bit_length() - 1) // 10, 4)
    return f"{count / 1024**power:.1f} {'KMGT'[power - 1]}iB"
