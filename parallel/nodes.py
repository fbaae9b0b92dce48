"""What nodes must share and what they must have alike, looked at before the process group exists.

    shared   rank 0 leaves a file of a random name in a folder, and every rank looks for it. A name that nobody has asked for before is
             in no cache of a network file system
    alike    rank 0 gives its settings or fingerprints to the ranks' store, and every rank compares its own

A folder of the same name is not the same folder, and files of the same name may hold something else: without these looks that would
come out at the first checkpoint, or never.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from parallel.start import Launch
from runtime.errors import ConfigError

LOOK_S = 3.0  # how long a file system may take to show what another node wrote


def shared(launch: Launch, folder: Path, key: str) -> None:
    """Is `folder`, which the config names under `key`, the same one for all ranks? It exists. Called by all ranks together.

    Raises:
        ConfigError: no; names the first rank that does not see what rank 0 wrote.
    """
    there = json.loads(launch.first("probe", lambda: _leave(launch, folder, key)))

    def look() -> None:
        deadline = time.monotonic() + LOOK_S
        while not (folder / there["probe"]).exists():
            if time.monotonic() > deadline:
                mine, first = f"{folder.absolute()} of {_name(launch)}", f"{there['folder']} of {there['name']}"
                raise ConfigError(
                    f"is not one folder: {mine} is not {first}; set it to an absolute path on a file system that all nodes share",
                    key,
                    str(folder),
                )
            time.sleep(0.05)

    try:
        launch.together("shared", look)
    finally:
        if launch.rank == 0:
            with contextlib.suppress(OSError):
                (folder / there["probe"]).unlink()


def _name(launch: Launch) -> str:
    return f"rank {launch.rank} (host {socket.gethostname()})"


def _leave(launch: Launch, folder: Path, key: str) -> str:
    name = f".probe-{secrets.token_hex(8)}"
    try:
        (folder / name).touch()
    except OSError as error:
        raise ConfigError(f"cannot be written to ({error.strerror}: {error.filename})", key, str(folder)) from None
    return json.dumps({"probe": name, "name": _name(launch), "folder": str(folder.absolute())})


def alike(launch: Launch, name: str, work: Callable[[], Mapping[str, object]], advice: str) -> None:
    """Does `work` find the same values, which JSON can hold, on all ranks? Called by all ranks together; `name` tells calls apart.

    Raises:
        ConfigError: no; names a value, the first rank that has another one than rank 0, and ends with `advice`.
    """
    mine = launch.together(f"{name} here", lambda: json.loads(json.dumps(work())))
    first = json.loads(launch.first(f"{name} of rank 0", lambda: json.dumps({"name": _name(launch), "values": mine})))

    def compare() -> None:
        for key in sorted(mine.keys() | first["values"].keys()):
            here, there = (values.get(key, "absent") for values in (mine, first["values"]))
            if here != there:
                raise ConfigError(f"on {_name(launch)}, but {there!r} on {first['name']}; {advice}", key, here)

    launch.together(name, compare)
