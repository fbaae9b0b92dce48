"""Runs train.py's main on several ranks by fork, as torchrun would start them, without paying for imports again.

The parent has imported torch; a child gets torchrun's environment variables, its stderr and stdout in files, and ends with
main's exit code. Used where a test wants real runs: resumes, kills, signals, errors on every rank.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@dataclass
class Ranks:
    """Running ranks. `wait()` gives their exit codes (negative: killed by that signal)."""

    pids: list[int]
    logs: list[Path]
    codes: dict[int, int] = field(default_factory=dict)

    def poll(self) -> bool:
        """Reaps what has ended; True once all have."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def wait(self, timeout_s: float = 120.0) -> list[int]:
        """Exit codes by rank. A rank that outlives the limit is killed, and that is an assertion error: a hang."""
        deadline = time.monotonic() + timeout_s
        while not self.poll():
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise AssertionError(f"ranks hang; ended so far: {self.codes}\n{self.output()}")
            time.sleep(0.01)
        return [self.codes[r] for r in range(len(self.pids))]

    def end_after_one(self, grace_s: float = 0.5) -> list[int]:
        """What a launcher does: once a rank has failed, the others are ended. Those that notice by themselves get the time to."""
        while not self.codes:
            self.poll()
            time.sleep(0.005)
        deadline = time.monotonic() + grace_s
        while not self.poll():
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
            time.sleep(0.01)
        return [self.codes[r] for r in range(len(self.pids))]

    def signal(self, number: int, rank: int | None = None) -> None:
        for r, pid in enumerate(self.pids):
            if r not in self.codes and rank in (None, r):
                os.kill(pid, number)

    def output(self, rank: int | None = None) -> str:
        return "".join(p.read_text(errors="replace") for r, p in enumerate(self.logs) if rank in (None, r))


def start(argv: Sequence[str], world: int, logs: Path, nodes: Sequence[tuple[int, Path]] = ()) -> Ranks:
    """Forks `world` ranks that run `train.main(argv)`.

    With `nodes`, (ranks, working directory) of each, ranks believe to be on several machines, node0, node1, ...: relative paths lead
    each node to files of its own.
    """
    import torch
    import torch._dynamo  # FSDP2 imports it; better once here than in every rank

    import train

    logs.mkdir(parents=True, exist_ok=True)
    port, pids, files = free_port(), [], []
    nodes = nodes or [(world, Path.cwd())]
    places = [(node, local) for node, (ranks, _) in enumerate(nodes) for local in range(ranks)]
    assert len(places) == world, f"{nodes} are not {world} ranks"
    sys.stdout.flush()
    sys.stderr.flush()
    for rank in range(world):
        files.append(logs / f"{time.monotonic_ns()}_{rank}.txt")
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                fd = os.open(files[-1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(fd, 1)
                os.dup2(fd, 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
                torch.set_num_threads(1)
                signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in its background
                node, local = places[rank]
                env = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": nodes[node][0], "MASTER_PORT": port}
                os.environ.update({k: str(v) for k, v in (env | {"GROUP_RANK": node}).items()}, MASTER_ADDR="127.0.0.1")
                if len(nodes) > 1:
                    socket.gethostname = f"node{node}".format
                os.chdir(nodes[node][1])
                code = train.main(list(argv))
            except SystemExit as e:
                code = e.code if isinstance(e.code, int) else 1
            except BaseException:
                sys.excepthook(*sys.exc_info())  # which the run's log may have replaced
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return Ranks(pids, files)


def run(argv: Sequence[str], world: int, logs: Path, timeout_s: float = 120.0, nodes: Sequence[tuple[int, Path]] = ()) -> Ranks:
    """Starts the ranks and waits for them."""
    ranks = start(argv, world, logs, nodes)
    ranks.wait(timeout_s)
    return ranks
