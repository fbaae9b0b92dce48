"""Ranks that know of each other: one that dies, hangs or fails is named by all others, and they end.

    with Peers(launch, cfg.parallel.timeout_s, log.last, hint) as peers:
        for step in ...:
            peers.at(step)

A thread of each rank writes a beat to the ranks' key-value store twice a second: a counter, the step, how many collectives
the rank has issued on each process group, and where its main thread is. Beats are only read when something is wrong:

    a rank raises                   its last words go to the store, and the others see them with their next beat
    a process ends without a word   the ranks on the same machine see that there is no such process
    a collective fails              it raises in the main thread (gloo). Two looks at all beats, `SILENT_S` apart: ranks whose
                                    counter stands still are gone or stopped; else those whose count of collectives is behind
                                    another's, and which wait for nobody themselves, hang
    nothing moves                   NCCL does not raise; its watchdog ends the process at the limit. So a second thread takes the
                                    same two looks before that. With gloo it does after the limit, and only for ranks that do
                                    not answer: a save has a longer limit, as a rank may have to wait for a slow disk

Whoever finds out first writes the sentence; all ranks end with that one. The main thread does so if it raises by itself
within `GRACE_S`, else the thread does. The sentence is the last line on stderr and in the rank's log; the exit code is 1.

The store may be what is lost: it lives in torchrun's agent or, without one, in rank 0, where a rank that gets nowhere without it
ends. A client blocks for as long as its store hangs, so only one thread talks to the store, on a connection of its own, and nobody
waits for that thread without a limit.

There is no limit on work between collectives, so a rank may load, tokenize or write alone for as long as the others wait
outside of a collective. Collectives of groups described as `BACKGROUND` do not count: they are issued by other threads, and
their order says nothing about main threads. A main thread that hangs holding Python's lock looks like a stopped process.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from parallel.start import STORE_S, Launch, process_state, this_machine

BEAT_S = 0.5
SILENT_S = 3.0  # between two looks; a rank whose beats stand still for so long does not run
GRACE_S = 2.0  # for the main thread to end by itself, once there is a sentence
MEET_AGAIN_S = 10.0  # to connect once more to a store that has just answered
LEAD_S = 10.0  # before NCCL's watchdog
BACKGROUND = "background"
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Beat:
    """What a rank says of itself. `issued`: collectives by "backend:group"; `left`: its main thread has ended, well or not."""

    n: int = 0
    step: int = 0
    issued: dict[str, int] = field(default_factory=dict)
    at: str = ""
    left: bool = False
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    machine: str = field(default_factory=this_machine)

    def place(self) -> str:
        return f"{f'in step {self.step}' if self.step else 'before the first step'} on host {self.host}, pid {self.pid}"


def issued() -> dict[str, int]:
    """Collectives this rank has issued so far, by backend and process group."""
    found = {}
    for group in list(distributed_c10d._world.pg_map):
        if group.group_desc != BACKGROUND:
            for device in group._device_types:
                with contextlib.suppress(RuntimeError):  # the group is just being made
                    backend = group._get_backend(device)
                    found[f"{backend.name()}:{group.group_name}"] = backend._get_sequence_number_for_group()
    return found


def behind(beats: Mapping[int, Beat]) -> list[int]:
    """Ranks that others wait for and that themselves wait for nobody: A in a chain where C waits for B and B for A."""
    most, least = {}, {}
    for beat in beats.values():
        for group, n in beat.issued.items():
            most[group], least[group] = max(n, most.get(group, n)), min(n, least.get(group, n))
    awaited = [r for r, beat in beats.items() if any(n < most[g] for g, n in beat.issued.items())]
    return [r for r in awaited if not any(n > least[g] for g, n in beats[r].issued.items())]


def process(beat: Beat, machine: str) -> str:
    """The rank's process as `machine` sees it: "ended", "stopped", "runs", or "" if it is on another one."""
    return process_state(beat.pid) if machine and beat.machine == machine else ""


def silent(before: Mapping[int, Beat], after: Mapping[int, Beat]) -> list[int]:
    """Ranks whose beats have stood still between two looks."""
    return [r for r, beat in after.items() if not beat.left and beat.n == before[r].n]


def blame(beats: Mapping[int, Beat], gone: Collection[int], machine: str) -> str:
    """The sentence that names who is missing: ranks that do not answer, else those behind; "" if nobody is."""
    if gone:
        return "; ".join(absent(r, beats[r], machine) for r in gone)
    return "; ".join(
        f"rank {r} {'has ended' if (beat := beats[r]).left else 'hangs'}: it has not joined a collective that others wait in "
        f"({f'at {beat.at}, ' if beat.at else ''}{beat.place()})"
        for r in behind(beats)
    )


def absent(rank: int, beat: Beat, machine: str) -> str:
    state = process(beat, machine)
    what = "is gone (its process ended; " if state == "ended" else f"does not answer ({'its process is stopped; ' * (state == 'stopped')}"
    return f"rank {rank} {what}last seen {beat.place()})"


def overdue(beats: Mapping[int, Beat], gone: Collection[int], rank: int) -> bool:
    """Whether `rank`, which has got nowhere up to the limit, may end the run: a rank is gone, or NCCL waits for one.

    gloo raises in the main thread, after the limit of each group: a save may wait for a slow disk longer than a step for a rank.
    """
    mine = beats[rank].issued
    waits_in = [group for beat in beats.values() for group, n in beat.issued.items() if mine.get(group, n) > n]
    return bool(gone) or any(group.startswith("nccl:") for group in waits_in)


def about_peers(error: BaseException | None) -> bool:
    """Is this what a collective raises when another rank is missing, or something that followed from it?"""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _main_thread() -> Any:
    return sys._current_frames().get(threading.main_thread().ident)


def _main_thread_at() -> str:
    """The innermost line of this project that the main thread is in."""
    frame = _main_thread()
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(f"{ROOT}/") and "site-packages" not in path:
            return f"{path[len(str(ROOT)) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


class Peers:
    """The other ranks of `launch`. Entered by all ranks, before the process group exists; leaving it ends the watch.

    Args:
        timeout_s: the limit of collectives.
        last: says the last line of this process, and in its log what led there (`runtime.log.Log.last`).
        hint: what follows the sentence: what can be done now.
    """

    def __init__(self, launch: Launch, timeout_s: float, last: Callable[[str, str], None], hint: Callable[[], str]):
        self.launch, self.timeout_s, self._last, self._hint = launch, timeout_s, last, hint
        self._mine = Beat()
        self._first: dict[int, Beat] = {}  # everybody's first beat: processes and machines
        self._sentence: dict[str, Any] | None = None  # as all ranks know it: "gone", ranks that cannot leave, and "text"
        self._asked: deque[tuple[Callable[[dist.Store], Any], Future]] = deque()  # work for the talking thread
        self._lost = False  # the store: its connection broke
        self._heard = time.monotonic()  # when it last answered
        self._wake, self._leaving, self._closing, self._left = (threading.Event() for _ in range(4))
        self._one_end = threading.Lock()

    def __enter__(self) -> Peers:
        store = dist.PrefixStore(f"peers/{self.launch.attempt}", self.launch.store)
        self.launch.together("peers", lambda: self._beat(store))  # from here on nobody's beat is missing
        with self.launch.meeting("peers"):
            store.set_timeout(timedelta(seconds=MEET_AGAIN_S))  # of the connection that it is cloned with
            self._store = store.clone()
            store.set_timeout(timedelta(seconds=STORE_S))
            self._first = self._read(self._store)
        for work in (self._talk, self._watch):
            threading.Thread(target=work, name=f"peers{work.__name__}", daemon=True).start()
        return self

    def at(self, step: int) -> None:
        """This rank begins step `step`."""
        self._mine.step = step

    def __exit__(self, kind, error, trace) -> None:
        self._leaving.set()
        if about_peers(error):
            self._end(self._find_out(), "".join(traceback.format_exception(error)))
        elif error is not None:
            self._agree([], f"rank {self.launch.rank} failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        self._leave()

    # the thread that talks to the store

    def _talk(self) -> None:
        """Beats, hears the sentence, does what was asked for. Ends with the first error: a lost store does not come back."""
        try:
            while not self._closing.is_set():
                self._exchange()
                self._wake.wait(BEAT_S)
                self._wake.clear()
            self._mine.left = True
            self._exchange()
            self._store.add("left", 1)
            deadline = time.monotonic() + (2 * GRACE_S if self.launch.holds_store else 0)  # who holds the store leaves last
            expected = self.launch.world - len(self._sentence["gone"] if self._sentence else ())
            while time.monotonic() < deadline and self._store.add("left", 0) < expected:
                time.sleep(0.02)
        except RuntimeError:
            self._lost = True
        finally:
            self._left.set()
            while self._asked:
                self._asked.popleft()[1].set_result(None)

    def _exchange(self) -> None:
        self._beat(self._store)
        if self._sentence is None and self._store.check(["sentence"]):
            self._sentence = json.loads(self._store.get("sentence"))
        while self._asked:
            work, answer = self._asked.popleft()
            try:
                answer.set_result(work(self._store))
            except RuntimeError:
                answer.set_result(None)
                raise
        self._heard = time.monotonic()

    def _beat(self, store: dist.Store) -> None:
        self._mine.n += 1
        self._mine.issued, self._mine.at = issued(), _main_thread_at()
        store.set(str(self.launch.rank), json.dumps(asdict(self._mine)))

    def _read(self, store: dist.Store) -> dict[int, Beat]:
        texts = store.multi_get([str(r) for r in range(self.launch.world)])
        return {r: Beat(**json.loads(text)) for r, text in enumerate(texts)}

    # what other threads want of it: a store that is lost or hangs answers None

    @property
    def _store_hangs(self) -> bool:
        return not self._left.is_set() and time.monotonic() - self._heard > SILENT_S

    def _ask(self, work: Callable[[dist.Store], Any]) -> Any:
        if self._store_hangs or self._left.is_set():
            return None
        answer: Future = Future()
        self._asked.append((work, answer))
        self._wake.set()
        wait([answer], SILENT_S)
        return answer.result() if answer.done() else None

    def _agree(self, gone: Collection[int], text: str) -> str:
        """The sentence of all ranks: this one, unless another rank was first."""
        mine = json.dumps({"gone": list(gone), "text": text})
        self._sentence = json.loads(self._ask(lambda store: store.compare_set("sentence", "", mine)) or mine)
        return self._sentence["text"]

    def _leave(self) -> None:
        self._closing.set()
        self._wake.set()
        self._left.wait(0 if self._store_hangs else 3 * GRACE_S)

    # the thread that watches, and the main thread once it has raised

    def _watch(self) -> None:
        progress, since, before = None, time.monotonic(), None
        while not self._closing.wait(BEAT_S):
            if progress != (progress := (issued(), self._mine.step)):
                since, before = time.monotonic(), None
            nccl = any(group.startswith("nccl:") for group in progress[0])
            limit_s = self.timeout_s - min(LEAD_S, self.timeout_s / 2) if nccl else self.timeout_s + SILENT_S
            if before is None and time.monotonic() - since > limit_s / 4:
                before = self._ask(self._read)
            if self._sentence is None:
                self._look_at_processes()
            if self._sentence is None and time.monotonic() - since > SILENT_S:
                self._look_at_the_store()
            if self._sentence is None and time.monotonic() - since > limit_s:
                self._look_at_the_clock(before)
            if self._sentence is not None:
                if not self._leaving.wait(GRACE_S):
                    self._end(self._sentence["text"], "the main thread is at\n" + "".join(traceback.format_stack(_main_thread())))
                return

    def _look_at_processes(self) -> None:
        """A process of this machine that has ended without a word is gone for sure."""
        ended = [r for r, beat in self._first.items() if not beat.left and process(beat, self._mine.machine) == "ended"]
        beats = self._ask(self._read) if ended else None  # read now, its last beat says whether it has left by itself
        if beats and (gone := [r for r in ended if not beats[r].left]):
            self._agree(gone, blame(beats, gone, self._mine.machine))
        self._first |= {r: beats[r] for r in ended} if beats else {}

    def _look_at_the_store(self) -> None:
        """This rank has got nowhere for a while. If the store went with rank 0, which leaves last, no rank can tell another what it
        knows, and a collective of this one need not fail: the rank that would have to join it may have noticed, and be in another."""
        if self._lost and not self.launch.agent_holds_store:
            self._agree([], self._no_store())

    def _look_at_the_clock(self, before: Mapping[int, Beat] | None) -> None:
        """This rank has got nowhere for as long as a collective may take."""
        beats = self._ask(self._read)
        if before and beats:
            gone = silent(before, beats)
            if overdue(beats, gone, self.launch.rank) and (text := blame(beats, gone, self._mine.machine)):
                self._agree(gone, text)
        elif not self._lost and time.monotonic() - self._heard > self.timeout_s / 2:  # it hangs, and with it the rank that holds it
            self._agree([], self._no_store())

    def _find_out(self) -> str:
        """Who made a collective of this rank fail."""
        before, deadline = self._ask(self._read), time.monotonic() + SILENT_S
        while before and self._sentence is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if self._sentence is not None:
            return self._sentence["text"]
        beats = self._ask(self._read) if before else None
        if not beats:
            return self._no_store()
        gone = silent(before, beats)
        return self._agree(
            gone,
            blame(beats, gone, self._mine.machine)
            or "a collective failed, but every rank is there and none is behind: look at the network between them and at their devices",
        )

    def _no_store(self) -> str:
        verb, point = "is gone" if self._lost else "does not answer", "the ranks' meeting point"
        if self.launch.agent_holds_store:
            return f"{point} {verb}: the first torchrun's process, its machine or the network"
        state = {"ended": "its process ended; ", "stopped": "its process is stopped; "}.get(process(self._first[0], self._mine.machine), "")
        return f"rank 0, which holds {point}, {verb} ({state}host {self._first[0].host}, pid {self._first[0].pid})"

    def _end(self, text: str, trace: str) -> None:
        """Ends this process. Not by way of the process group, whose destruction may wait for the missing."""
        self._one_end.acquire()  # never given back: one thread does this
        self._leave()
        with contextlib.suppress(Exception):
            text = f"{text}; {self._hint()}"
        self._last(f"error: {text}", trace)
        os._exit(1)
