"""Starting the ranks: what this process is, agreeing on user errors, and the process group.

A run has two phases. Before the process group exists, ranks share only a key-value store (torchrun's, or a local one for
a world of one): reading configs, tokenizing and checking happen here, because no collective may wait for work on the
host. `Launch.together` runs such a phase and makes an error on one rank an error on all. Then `Launch.connect` creates
the process group (gloo for host tensors, NCCL beside it on CUDA).

Nothing limits how long a phase may take, so a rank that waits for others looks whether they still are there: one whose process has
ended on the same machine is named, and the wait is over. Of other machines the launcher knows. The store's end is noticed by all: it
breaks their connections. Either way a rank that is left ends with one line (`Gone`).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from runtime.errors import ConfigError, UserError, clean

T = TypeVar("T")
LOOK_S = 1.0  # between looks at the processes of ranks that are waited for
MEET_S = 600.0  # for all ranks to have connected to the store
MEND = "start several ranks with torchrun, or unset it"
STORE_S = 1800.0  # the longest wait for one value of the store (torch's default): NCCL's ranks exchange addresses through it


class Agreed(UserError):
    """A user error some rank met, now known to all. Only the rank in `reporter` prints it."""

    def __init__(self, message: str, reporter: int):
        super().__init__(message)
        self.reporter = reporter


class Gone(Agreed):
    """Another rank, or what holds the store, has ended. No mistake of the user's; each rank that is left prints its own line."""

    exit_code = 1


def this_machine() -> str:
    """Equal for processes that see each other's process ids; "" where that cannot be told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def process_state(pid: int) -> str:
    """Of a process on this machine: "ended", "stopped", "runs"; "" where that cannot be told."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "ended"
    except OSError:
        return ""
    return {"Z": "ended", "X": "ended", "T": "stopped", "t": "stopped"}.get(letter, "runs")


def _number(name: str, default: int) -> int:
    """What a launcher says in the environment."""
    text = os.environ.get(name, "").strip()
    if text and not (text.isdecimal() and len(text) <= 9):
        raise ConfigError(f"in the environment is not a number of at most 9 digits; {MEND}", name, text)
    return int(text) if text else default


class Launch:
    """This process among the ranks. Attributes: rank, world, local_rank, local_world, store.

    The store lives in torchrun's agent (`agent_holds_store`), or in rank 0.
    """

    def __init__(self):
        env, self._lost = os.environ, False
        self.world = _number("WORLD_SIZE", 1)
        self.rank = _number("RANK", 0)
        self.local_rank = _number("LOCAL_RANK", 0)
        self.local_world = _number("LOCAL_WORLD_SIZE", self.world)
        self._check()
        self.agent_holds_store = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.holds_store = self.rank == 0 and not self.agent_holds_store
        if env.get("MASTER_ADDR") and env.get("WORLD_SIZE"):
            self.store = self._meet()
        elif self.world == 1:
            self.store = dist.HashStore()
        else:
            raise ConfigError(f"is set but MASTER_ADDR is not; {MEND}", "WORLD_SIZE", self.world)
        with self.meeting("start"):
            self.attempt = self._attempt()
            self.store.set(self._process(self.rank), f"{os.getpid()} {this_machine()}")

    def _attempt(self) -> str:
        """A name for this start of the ranks that no other has. torchrun's store outlives a restart, and its nodes count restarts
        differently.

        Each rank says hello with a number of its own. Rank 0 answers with the name and all numbers it has heard: an answer is of this start
        if one's own is among them. Who has it says so, and rank 0 waits for all.

        Raises:
            Gone: a rank does not come.
        """
        mine, until = secrets.token_hex(8), time.monotonic() + MEET_S
        self.store.set(f"salamander/hello{self.rank}", f"{mine} {os.getpid()} {this_machine()}")
        if self.rank:
            name = None

            def answered() -> bool:
                nonlocal name
                answer = json.loads(self.store.get("salamander/answer")) if self.store.check(["salamander/answer"]) else {"heard": {}}
                name = answer["name"] if answer["heard"].get(str(self.rank)) == mine else None
                return name is not None or time.monotonic() > until

            self._wait(answered)
            if name is None:
                raise Gone(f"rank 0 did not answer within {MEET_S:.0f} s: it has ended or was never started", self.rank)
            self.store.set(f"salamander/heard{self.rank}", name)
            return name
        name, hellos, left = mine, {}, set(range(1, self.world))

        def all_heard() -> bool:
            said = {r: f"salamander/hello{r}" for r in left}
            known = {r: self.store.get(key).decode().partition(" ")[0] for r, key in said.items() if self.store.check([key])}
            if any(hellos.get(r) != number for r, number in known.items()):
                hellos.update(known)
                self.store.set("salamander/answer", json.dumps({"name": name, "heard": hellos}))
            keys = {r: f"salamander/heard{r}" for r in left}
            left.difference_update(r for r, key in keys.items() if self.store.check([key]) and self.store.get(key).decode() == name)
            return not left or time.monotonic() > until

        self._wait(all_heard)
        if left:
            missing = ", ".join(map(str, sorted(left)[:8])) + ", ..." * (len(left) > 8)
            text = f"of {self.world} ranks, {missing} did not come within {MEET_S:.0f} s: they have ended or were never started"
            raise Gone(text, self.rank)
        return name

    def _check(self) -> None:
        """A variable that was left behind would have this rank wait for others that do not exist.

        Raises:
            ConfigError: what the launcher says does not fit together.
        """
        met = os.environ.get("MASTER_ADDR") and os.environ.get("WORLD_SIZE")
        local, port = self.local_rank, _number("MASTER_PORT", -1) if met else -1  # of a service called "master", Kubernetes sets one too
        for name, value, fits, what in (
            ("WORLD_SIZE", self.world, self.world >= 1, "at least 1"),
            ("RANK", self.rank, self.rank < self.world, f"below WORLD_SIZE={self.world}"),
            ("LOCAL_WORLD_SIZE", self.local_world, 1 <= self.local_world <= self.world, f"from 1 to WORLD_SIZE={self.world}"),
            ("LOCAL_RANK", local, local < self.local_world, f"below LOCAL_WORLD_SIZE={self.local_world}"),
            ("LOCAL_RANK", local, local <= self.rank, f"at most RANK={self.rank}"),
            ("MASTER_PORT", port, port <= 65535, "at most 65535"),
        ):
            if not fits:
                raise ConfigError(f"in the environment must be {what}; {MEND}", name, value)
        for name, needed in (("MASTER_PORT", met and port < 0), ("RANK", met and self.world > 1 and not os.environ.get("RANK"))):
            if needed:
                raise ConfigError(
                    "is not in the environment, but MASTER_ADDR and WORLD_SIZE are; start ranks with torchrun, or unset them", name
                )

    def _meet(self) -> dist.Store:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        try:
            store, _, _ = next(dist.rendezvous("env://", self.rank, self.world, timeout=datetime.timedelta(seconds=MEET_S)))
        except dist.DistError as e:
            if "EADDRINUSE" in str(e) or "failed to listen" in str(e):
                text = f"cannot listen at {place}: another program, or another torchrun, does"
            elif self.holds_store:
                text = f"the {self.world} ranks did not all meet at {place} within {MEET_S:.0f} s: some have ended or were never started"
            else:
                text = f"nobody answers at {place}: {self._holder()} has ended or was never started"
            raise Gone(f"{text} ({clean(e, 120)})", self.rank) from e
        store.set_timeout(datetime.timedelta(seconds=STORE_S))
        return store

    def _holder(self) -> str:
        return "the first torchrun's process" if self.agent_holds_store else "rank 0"

    @contextlib.contextmanager
    def meeting(self, name: str) -> Iterator[None]:
        """Talk with the store in phase `name`: that it is lost becomes one line."""
        try:
            yield
        except dist.DistError as e:
            self._lost = True
            text = f"the ranks' meeting point is gone, in phase '{name}': {self._holder()}, which holds it, has ended"
            raise Gone(f"{text}, or its machine or the network failed", self.rank) from e

    @property
    def leads_node(self) -> bool:
        return self.local_rank == 0

    def together(self, name: str, work: Callable[[], T], leader_first: bool = False) -> T:
        """Runs `work` on every rank and returns its result; a UserError on any rank is raised on all of them.

        With `leader_first` the first rank of each node goes alone and the others wait for it, without a time limit and
        without a collective: it fills the cache which they then read.
        """
        prefix = f"salamander/{self.attempt}/{name}"
        gate = f"{prefix}/leader of {socket.gethostname()}"
        error: BaseException | None = None
        result = None
        with self.meeting(name):
            if leader_first and not self.leads_node:
                self._wait(lambda: self.store.check([gate]) or self._failed(prefix), lambda: self._look(prefix))
            failed = self._failed(prefix)
        try:
            if not failed:
                result = work()
        except BaseException as e:
            error = e
        with self.meeting(name):
            if error is not None:
                self.store.add(f"{prefix}/failed", 1)
                # the first to fail writes the message that everyone will carry
                kind = "user" if isinstance(error, UserError) else "crash" if isinstance(error, Exception) else "stop"
                self.store.compare_set(f"{prefix}/error", "", f"{self.rank}\n{kind}\n{str(error) or type(error).__name__}")
            if leader_first and self.leads_node:
                self.store.set(gate, "done")
            self.store.add(f"{prefix}/done", 1)
        if error is not None and not isinstance(error, UserError):
            raise error
        with self.meeting(name):
            self._wait(lambda: self.store.add(f"{prefix}/done", 0) >= self.world, lambda: self._look(prefix))
            if not self._failed(prefix):
                return result
            rank, kind, message = self.store.get(f"{prefix}/error").decode().split("\n", 2)
        if kind == "stop":
            raise Gone(f"rank {rank} was stopped in phase '{name}' ({message})", self.rank)
        if kind == "crash":
            raise Gone(f"rank {rank} failed in phase '{name}': {message}", self.rank)
        raise Agreed(message, int(rank))

    def first(self, name: str, work: Callable[[], str]) -> str:
        """What `work` returns on rank 0, on every rank; errors as in `together`."""
        key = f"salamander/{self.attempt}/{name}/value"
        self.together(name, lambda: self.store.set(key, work()) if self.rank == 0 else None)
        with self.meeting(name):
            return self.store.get(key).decode()

    def _failed(self, prefix: str) -> bool:
        return self.store.add(f"{prefix}/failed", 0) > 0

    def _process(self, rank: int) -> str:
        return f"salamander/{self.attempt}/process{rank}"

    def _look(self, prefix: str) -> None:
        """Raises where a rank that is waited for in this phase is gone. One that failed has said so, and may be."""
        for rank in range(self.world):
            if self.store.check([self._process(rank)]):
                pid, _, machine = self.store.get(self._process(rank)).decode().partition(" ")
                gone = machine and machine == this_machine() and process_state(int(pid)) == "ended"
                if gone and not self._failed(prefix) and self.store.add(f"{prefix}/done", 0) < self.world:
                    phase = prefix.rpartition("/")[2]
                    raise Gone(f"rank {rank} is gone (its process {pid} ended in phase '{phase}')", self.rank)

    @staticmethod
    def _wait(ready: Callable[[], bool], look: Callable[[], None] = lambda: None) -> None:
        pause, looked = 0.002, time.monotonic()
        while not ready():
            time.sleep(pause)
            pause = min(0.5, pause * 1.5)
            if time.monotonic() > looked + LOOK_S:
                look()
                looked = time.monotonic()

    def device(self, wanted: str, deterministic: bool = False) -> torch.device:
        """`auto`: this rank's CUDA device if there is one, else the CPU. deterministic: of torch's kernels, only those whose sums have one
        order (https://docs.pytorch.org/docs/stable/notes/randomness.html)."""
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # for finding reads of it; a pass over every new tensor
        if wanted == "cuda" and not torch.cuda.is_available():
            raise ConfigError("but this machine has no usable CUDA device; use run.device=cpu", "run.device", wanted)
        if wanted == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"on a node with {torch.cuda.device_count()} GPUs; start at most one rank for each", "--nproc-per-node", self.local_world
            )
        return torch.device("cuda", self.local_rank)

    def connect(self, device: torch.device, timeout_s: float = 600.0) -> None:
        """Creates the process group: gloo for host tensors, and NCCL for CUDA ones. A collective waits `timeout_s` at most."""
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"group/{self.attempt}", self.store),
            rank=self.rank,
            world_size=self.world,
            timeout=datetime.timedelta(seconds=timeout_s),
        )

    def report(self, error: UserError) -> int:
        """Prints the error once among all ranks and returns the exit code. The rank that holds the store leaves last.

        Nobody leaves before the line is out, because a launcher ends all ranks as soon as one exits.
        """
        reporter = getattr(error, "reporter", 0)
        if self.rank == reporter:
            print(f"error: {error}", file=sys.stderr, flush=True)
        if self._lost:  # nobody to say it to, and trying would have torch print a stack of C++
            return error.exit_code
        deadline = time.monotonic() + 5
        with contextlib.suppress(dist.DistError):  # the store is gone: so is the rank that held it
            if self.rank == reporter:
                self.store.set(f"salamander/{self.attempt}/printed", "1")
            self._wait(lambda: self.store.check([f"salamander/{self.attempt}/printed"]) or time.monotonic() > deadline)
            self.store.add(f"salamander/{self.attempt}/left", 1)
            expected = self.world - isinstance(error, Gone)
            if self.rank == 0:
                self._wait(lambda: self.store.add(f"salamander/{self.attempt}/left", 0) >= expected or time.monotonic() > deadline)
        return error.exit_code
