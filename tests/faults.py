"""Signals, full disks, damaged files and a launcher that restarts: what each does to a run, counted.

    python -m tests.faults signals --count 150  [--layouts "4 ranks"] [--seed 0] [--each N] [--out benchmarks/results/faults.json]
    python -m tests.faults disks   --count 30
    python -m tests.faults damage  --count 1000
    python -m tests.faults restarts --count 25

Runs are those of tests/campaign.py, with an evaluation. Every record that a run logs and every byte that it exports in the end must equal
those of the same run that nobody disturbed. The counts live in a section of the file and are written after each visit; the same command
goes on from there, up to `--count` in all. All that is bad has to be 0, or the exit code is 1 and the folders of what went wrong stay.

signals. SIGTERM, SIGINT or SIGUSR1 to one rank at a random moment, aimed at a phase: starting, waiting for data (made slow), in a step, in
an evaluation, in a save. A rank notes where it is in memory shared with this process. Then the same command goes on. All ranks must end
with code 0, the step must be saved (unsaved), at most the step in progress may be lost (lost_steps), and it may take `END_S` and
`BUSY` times a step and a save (late). Before training there is nothing to save: the process ends as it would without us, and so do the
others. One in six is followed by a second signal, in a save that the disk has made slow: the process must end at once (`AT_ONCE_S`)
with 128 + its number, the others notice, and the newest complete checkpoint is where the next start begins (wrong_codes).

disks. Three kinds in turn, and of all sizes from 0.2 to 3 checkpoints those that are small from the beginning, or have so much left when
something else fills them at a random point of a save. The third kind is read-only from such a point on, for the records and logs that are
open as well. In half of the last two kinds that ends two saves later. The run must reach its last step (ended_early), its newest
checkpoint must verify whatever failed after it (lost_checkpoints), each failed save must name a path, the need and what is free, and
nothing may end in a traceback (unclear_messages). Records may be missing if the run said so (lost_records), and only up to the step it goes
on from. Then the disk can be written and has room, and the same command must end like the undisturbed run. The disk is a tmpfs in a mount
namespace of its own; where that is not allowed, a limit on the size of files stands for it, and the counts say so (`by`).

damage. One file of the newest checkpoint or of the two newest is changed as disks and copies do: a bit, a block of zeros, a byte too many,
the end cut off, gone. Verification must find it (undetected) and name the file (unnamed), and all ranks must go back to the newest
checkpoint that is intact (wrong_choices). Twice a visit a whole run starts from there, and must end like the undisturbed one.

restarts. Under `torchrun --max-restarts 3` one rank is killed up to three times, half of the time before it has trained again: torchrun
must get it through by itself (lost_runs). Or torchrun itself is killed: its ranks must end by themselves (hangs), unless they had not met
yet, and the same command must go on.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.cpu import ROOT
from parallel import local
from parallel.start import process_state
from runtime import stop
from runtime.checkpoint import Checkpointer, checkpointer, store
from runtime.checkpoint.store import Damaged, Store
from runtime.sections import CheckpointConfig
from tests import campaign, launch
from tests.campaign import START_S, STEPS, SURVIVE_S, Stage, records
from tests.runtime.saving import hurt, run_folder

EVALUATION = "[eval]\nsplit = 0.5\nevery = 3\n"

# ------------------------------------------------------------------------------------------------------------------ signals

END_S = 2.0
BUSY = 4.0  # how much slower than in the undisturbed run a step or a save may be, on a machine with other work
AT_ONCE_S = 1.0
SLOW_DISK_S = 6.0
READING_S = 0.2
PATIENCE = 8  # signals to one run, after which it may go on undisturbed
AIMS = ("start", "data", "step", "step", "evaluation", "evaluation", "save", "save", "anywhere", "anywhere")
STOPPED = re.compile(r"stopped by request after step (\d+)")


class Signals(campaign.Counts):
    GOOD = ("signals", "saved", "before_training", "at_the_end", "second_signals")
    BAD = (*campaign.Counts.BAD, "unsaved", "lost_steps", "late", "wrong_codes")


def aim(stage: Stage, ranks: launch.Ranks, rank: int, target: str) -> None:
    """Waits for a random moment of that phase of `rank`, or until the run ends."""
    watch, dice, pace = stage.watch, stage.dice, stage.calm.pace
    began = time.monotonic()

    def wait(until: Callable[[], bool]) -> None:
        while not until() and not ranks.poll() and time.monotonic() < began + START_S:
            time.sleep(0.0003)

    def pause(longest_s: float) -> None:
        until = time.monotonic() + dice.uniform(0, longest_s)
        wait(lambda: time.monotonic() > until)

    if target == "start":
        return pause(0.8 * pace.phases["start"])
    wait(lambda: watch.step(rank) > 0)
    if target == "anywhere":
        return pause(pace.whole_s - pace.phases["start"])
    pause(0.5 * (pace.whole_s - pace.phases["start"]))
    wait(lambda: watch.saving(rank) if target == "save" else watch.phase(rank) == target)
    pause({"save": pace.save_s, "data": READING_S, "evaluation": pace.phases["evaluation"] / 4}.get(target, pace.phases["step"] / STEPS))


def signalled(stage: Stage, out: Path, most: int) -> int:
    """One run, signalled up to `most` times on its way to the end. Returns how often."""
    counts, watch, dice, pace = stage.counts, stage.watch, stage.dice, stage.calm.pace
    sent = 0
    while True:
        number, victim = dice.choice(stop.SIGNALS), dice.randrange(stage.world)
        target = dice.choice(AIMS) if sent < min(most, PATIENCE) else ""
        twice = bool(target) and counts["second_signals"] < (counts["signals"] + 3) // 6
        target = dice.choice(("step", "evaluation", "save")) if twice else target
        watch.reading_s = READING_S * (target == "data")
        watch.at_point = lambda point: (
            time.sleep(SLOW_DISK_S) if twice and point == "fsync" and watch.asked(int(os.environ["RANK"])) else None  # noqa: B023
        )
        ranks = stage.start(out)
        delivered = False
        if target:
            aim(stage, ranks, victim, target)
            ranks.poll()
            delivered = victim not in ranks.codes
        listening, where = watch.listens(victim), "save" if watch.saving(victim) else watch.phase(victim)
        if delivered:
            ranks.signal(number, victim)
        begun, doing = time.monotonic(), watch.step(victim)
        second = None
        if delivered:
            sent += 1
            counts.add("signals")
            counts.of("by", signal.Signals(number).name)
            counts.of("in", where if listening else "before training")
            counts.of("layouts", stage.choice["layout"])
        if delivered and twice and listening:
            second = again(ranks, victim, begun, dice)
        try:
            codes = ranks.end_after_one() if delivered and not watch.met(victim) else ranks.wait(SURVIVE_S if delivered else START_S)
        except AssertionError as hang:
            stage.wrong("hangs", out, hang)
            return max(sent, 1)
        took, text = time.monotonic() - begun, ranks.output()
        stage.check_records(out)
        told = f"{signal.Signals(number).name} in {where}, step {doing}: {codes}\n{text}"
        asked, others = STOPPED.search(text), {code for rank, code in enumerate(codes) if rank != victim}
        if second:
            counts.add("second_signals")
            counts.most("slowest_second_s", second[1])
            right = codes[victim] == 128 + second[0] and others <= {1} and second[1] < AT_ONCE_S
            if not right:
                stage.wrong("wrong_codes", out, f"a second signal {second}: {told}")
        elif delivered and codes != [0] * stage.world:
            default = {-number, 130, 1} if number == signal.SIGINT else {-number}
            if listening or codes[victim] not in default or 0 in others:
                stage.wrong("wrong_codes", out, told)
            counts.add("before_training", not listening)
        elif codes != [0] * stage.world or (asked and not delivered):
            stage.wrong("lost_runs", out, told)
            return max(sent, 1)
        elif asked:
            saved(stage, out, int(asked[1]), doing, told)
            allowed = END_S + BUSY * (pace.phases["step"] / STEPS + pace.save_s) + watch.reading_s + SLOW_DISK_S * stage.world * twice
            if not twice:
                counts.most("slowest_end_s", took)
            if took > allowed:
                stage.wrong("late", out, f"{took:.2f} s, allowed {allowed:.2f} s: {told}")
        else:
            counts.add("at_the_end", delivered)
            break
    stage.check_end(out)
    return sent


def again(ranks: launch.Ranks, victim: int, begun: float, dice: random.Random) -> tuple[int, float] | None:
    """A second signal, once it counts as one; which, and how long the process lived. None if it had ended before."""
    while time.monotonic() < begun + stop.GRACE_S + 0.3:
        ranks.poll()
        time.sleep(0.01)
    if victim in ranks.codes:
        return None
    other = dice.choice(stop.SIGNALS)
    ranks.signal(other, victim)
    sent = time.monotonic()
    while victim not in ranks.codes and time.monotonic() < sent + SURVIVE_S:
        ranks.poll()
        time.sleep(0.001)
    return other, time.monotonic() - sent


def saved(stage: Stage, out: Path, step: int, doing: int, told: str) -> None:
    """A run says that it stopped after `step`; it was signalled while `doing` that one or the next."""
    stage.counts.add("saved")
    newest = next(iter(Store(out).steps()), None)
    if (store.step_of(newest) if newest else 0) != step:
        stage.wrong("unsaved", out, f"the newest is {newest}: {told}")
    elif newest:
        store.verify(newest)
    if doing - step > 1:
        stage.wrong("lost_steps", out, told)


# -------------------------------------------------------------------------------------------------------------------- disks

SIZES = [round(0.2 + 2.8 * i / 19, 2) for i in range(20)]  # in checkpoints
OTHERS = 256 << 10  # logs, metrics, an export
PROBLEM = re.compile(r"(/\S+): [A-Z][\w -]+ \(it needs [\d.]+ [KM]?i?B, [\d.]+ [KMGT]?i?B are free in (/\S+)\)")
NEW_NAMESPACE, NEW_USER, PRIVATE, READ_ONLY, REMOUNT, BIND = 0x20000, 0x10000000, 0x44000, 0x1, 0x20, 0x1000


class Disks(campaign.Counts):
    GOOD = ("disks", "saves", "failed_saves", "exports_failed", "lost_records")
    BAD = (*campaign.Counts.BAD, "lost_checkpoints", "ended_early", "unclear_messages")


class Tmpfs:
    """A disk of `nbytes` at `folder`, in a mount namespace that ends with this process."""

    kind = "tmpfs"

    def __init__(self, folder: Path, nbytes: int):
        self.folder, self._libc = folder, ctypes.CDLL(None, use_errno=True)
        folder.mkdir(exist_ok=True)
        user = (os.getuid(), os.getgid())
        self._call("unshare", NEW_NAMESPACE | (NEW_USER if user[0] else 0))
        if user[0]:
            Path("/proc/self/setgroups").write_text("deny")
            for name, value in zip(("uid_map", "gid_map"), user, strict=True):
                Path(f"/proc/self/{name}").write_text(f"0 {value} 1")
        self._call("mount", b"none", b"/", None, PRIVATE, None)
        self._mount(nbytes, 0)

    def _mount(self, nbytes: int, flags: int) -> None:
        self._call("mount", b"tmpfs", os.fsencode(self.folder), b"tmpfs", flags, f"size={nbytes},mode=700".encode())

    def _call(self, name: str, *args) -> None:
        if getattr(self._libc, name)(*args):
            raise PermissionError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")

    def begin(self) -> None:
        """The ranks start."""

    def make_room(self) -> None:
        """It can be written, and has room."""
        self.protect(False)
        (self.folder / "ballast").unlink(missing_ok=True)
        self._mount(256 << 20, REMOUNT)

    def protect(self, on: bool) -> None:
        """Read-only, by a mount over it: the one below has files that are open for writing, and cannot be (see `OpenFiles`)."""
        folder = os.fsencode(self.folder)
        if on:
            self._call("mount", folder, folder, None, BIND, None)
        if on or self.is_read_only():
            self._call("mount", None, folder, None, REMOUNT | BIND | READ_ONLY * on, None)

    def is_read_only(self) -> bool:
        return bool(os.statvfs(self.folder).f_flag & os.ST_RDONLY)

    def fill(self, but: int) -> None:
        found = os.statvfs(self.folder)
        with open(self.folder / "ballast", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, found.f_bavail * found.f_frsize - but))


class OpenFiles:
    """What a rank keeps open for writing: records and its log. A read-only mount over the disk does not reach them, so their descriptors
    are exchanged for such as cannot be written to, and back."""

    def __init__(self, disk: Tmpfs):
        self.disk, self._kept, self._lock = disk, {}, threading.Lock()  # by descriptor: itself, as it was

    def follow(self) -> None:
        """Does to them what has happened to the disk. Called in each rank, at points of its saves."""
        with self._lock:
            if self.disk.is_read_only() and not self._kept:
                for path in (self.disk.folder / "metrics.jsonl", self.disk.folder / "logs" / f"rank_{os.environ['RANK']}.log"):
                    for fd in map(int, os.listdir("/proc/self/fd")):
                        with contextlib.suppress(OSError):  # the listing's own is gone
                            if os.path.samestat(os.fstat(fd), path.stat()):
                                self._kept[fd] = os.dup(fd)
                                with open(path, "rb") as other:
                                    os.dup2(other.fileno(), fd)
            elif self._kept and not self.disk.is_read_only():
                for fd, kept in self._kept.items():
                    os.dup2(kept, fd)
                    os.close(kept)
                self._kept = {}


class Limit:
    """Stands for a disk: no file may be larger than `nbytes`."""

    kind = "file-size limit"

    def __init__(self, folder: Path, nbytes: int):
        self.nbytes = nbytes

    def begin(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.nbytes, resource.RLIM_INFINITY))

    def make_room(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def apart(work: Callable[[], dict]) -> dict:
    """Runs `work` in a process of its own; what it returns is JSON."""
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                file.write(json.dumps(work()).encode())
                file.flush()
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0, "see the traceback above"
        file.seek(0)
        return json.loads(file.read())


def tight(stage: Stage, out: Path, most: int) -> int:
    """One run on one disk."""
    number = stage.counts["disks"]
    stage.counts.data = apart(lambda: on_a_disk(stage, out, number).data)
    return 1


def on_a_disk(stage: Stage, out: Path, number: int) -> campaign.Counts:
    counts, watch, share = stage.counts, stage.watch, SIZES[number % len(SIZES)]
    dice = random.Random(f"{counts['seed']} disk {number}")
    newest = store.read_manifest(Store(stage.case.folder / "calm").steps()[0])
    nbytes = sum(record["size"] for record in newest["files"].values())
    what = ("", ", read-only from a save on", ", filled in a save")[number % 3]
    try:
        disk = Tmpfs(out, 64 << 20 if what else int(OTHERS + checkpointer._SLACK + share * nbytes))
    except OSError as refused:
        print(f"no disk of its own ({refused}): a limit on the size of files stands for it", file=sys.stderr)
        largest = max(record["size"] for record in newest["files"].values())
        disk, what = Limit(out, int(share / SIZES[-1] * 1.2 * largest)), ""
    if what:
        save, point, back, seen, files = dice.randint(2, 4), dice.randrange(24), dice.random() < 0.5, [], OpenFiles(disk)

        def at_point(name: str) -> None:
            begun = watch._get(0, "begun")
            if os.environ["RANK"] == "0" and save <= begun < save + 2:
                seen.append(name)
                if len(seen) == point + 1:
                    disk.protect(True) if "read-only" in what else disk.fill(but=int((32 << 10) + share / 3 * nbytes))
            elif os.environ["RANK"] == "0" and back and begun >= save + 2:
                disk.protect(False)
                (out / "ballast").unlink(missing_ok=True)
            files.follow()

        watch.at_point = at_point
    counts.add("disks")
    counts.of("by", f"{disk.kind}{what}")
    counts.of("layouts", stage.choice["layout"])
    disk.begin()
    ranks = stage.start(out)
    if isinstance(disk, Limit):
        disk.make_room()
    codes, text = ranks.wait(START_S), ranks.output()
    told = f"{disk.kind}{what}, {share} checkpoints: {codes}\n{text}"
    ended = [(int(step), said) for step, said in re.findall(r"checkpoint of step (\d+): (.*)", text)]
    failures = [(step, said) for step, said in ended if said.startswith("not saved")]
    good = [step for step, said in ended if not said.startswith("not saved")]
    counts.add("saves", len(good))
    counts.add("failed_saves", len(failures))
    for step, said in failures:
        found = PROBLEM.search(said)
        cause = "read-only" if "Read-only" in said else "while it was written"
        counts.of("failed", "not begun for want of room" if found and found[1] == found[2] else cause)
        if not (found and Path(found[1]).is_relative_to(out) and Path(found[2]).is_relative_to(out)):
            stage.wrong("unclear_messages", out, f"step {step}: {said}")
    if "Traceback" in text:
        stage.wrong("unclear_messages", out, told)
    if good:
        try:
            store.verify(Store(out).path(max(good)))
        except Damaged as damage:
            stage.wrong("lost_checkpoints", out, f"{damage}: {told}")
    if [watch.step(r) for r in range(stage.world)] != [STEPS] * stage.world or watch.phase(0) != "export" or len(ended) != STEPS // 2:
        stage.wrong("ended_early", out, told)
    counts.add("exports_failed", codes != [0] * stage.world)
    stage.check_records(out)
    disk.make_room()
    watch.at_point = lambda point: None
    ranks = stage.start(out)
    codes, text = ranks.wait(START_S), ranks.output()
    begins = re.search(r"resuming from \S+/step_(\d+)", text)
    if codes != [0] * stage.world or (int(begins[1]) if begins else 0) != max(good, default=0):
        stage.wrong("lost_runs", out, f"{told}\nthen {codes}\n{text}")
        return counts
    stage.check_records(out)
    stage.check_end(out, lost=max(good, default=0) if "records are lost" in told else 0)
    return counts


# ------------------------------------------------------------------------------------------------------------------- damage


class Damages(campaign.Counts):
    GOOD = ("damages", "fall_backs", "resumed_runs")
    BAD = (*campaign.Counts.BAD, "undetected", "unnamed", "wrong_choices")


def damaged(stage: Stage, out: Path, most: int) -> int:
    """A run with three checkpoints, damaged `most` times."""
    counts, dice = stage.counts, stage.dice
    stage = replace(stage, case=replace(stage.case, more=("--checkpoint.keep=3",)))
    ranks = stage.start(out)
    assert ranks.wait(START_S) == [0] * stage.world, ranks.output()
    stage.check_records(out)
    stage.check_end(out)
    with run_folder() as folder:
        seed = dice.randrange(1 << 30)
        shutil.copytree(out / "checkpoints", folder / "whole")
        kinds, rounds, problems = local.run(fall_back, stage.world, folder, most, seed, timeout=600.0)[0]
    for kind in kinds:
        counts.add("damages")
        counts.of("by", kind)
        counts.of("layouts", stage.choice["layout"])
    for key, what in problems:
        stage.wrong(key, out, what)
    counts.add("fall_backs", rounds)
    for _ in range(2):
        again = out.with_name(f"{out.name}_{dice.randrange(1 << 30)}")
        shutil.copytree(out, again)
        shutil.rmtree(again / "export")
        newest, older, oldest = Store(again).steps()
        hit = {path: hurt(path, dice)[0] for path in ([newest, older] if dice.random() < 0.5 else [newest])}
        ranks = stage.start(again)
        codes, text = ranks.wait(START_S), ranks.output()
        stage.check_records(again)
        if unsaid := [path for path, name in hit.items() if not re.search(rf"skipped \S*/{path.name}: .*{re.escape(name)}", text)]:
            stage.wrong("unnamed", again, f"{unsaid}: {text}")
        if codes != [0] * stage.world or f"resuming from {oldest if older in hit else older}\n" not in text:
            stage.wrong("lost_runs", again, f"{codes} {text}")
        stage.check_end(again)
        counts.add("resumed_runs")
    return most


def fall_back(rank: int, world: int, folder: Path, most: int, seed: int) -> tuple[list[str], int, list[tuple[str, str]]]:
    """Damages copies of the checkpoints in `folder / "whole"`, and finds where to begin. Returns kinds of damage, how often it fell back,
    and problems."""
    torch.set_num_threads(1)
    dice, kinds, problems, run = random.Random(seed), [], [], Store(folder)
    shape = store.read_manifest(max((folder / "whole").glob("step_*"), key=store.step_of))
    said: list[str] = []
    rounds = 0
    if rank == 0:
        shutil.copytree(folder / "whole", run.folder)
    ckpt = Checkpointer(folder, CheckpointConfig(keep=3), shape["identity"], "", shape["config"], say=said.append)
    while len(kinds) < most:
        hit, rounds = {}, rounds + 1
        if rank == 0:
            shutil.rmtree(run.folder)
            shutil.copytree(folder / "whole", run.folder)
            for path in run.steps()[: min(dice.choice((1, 2)), most - len(kinds))]:
                name, kind = hurt(path, dice)
                hit[path] = name
                kinds.append(kind)
                try:
                    store.verify(path)
                    problems.append(("undetected", f"{kind} of {path}/{name}"))
                except Damaged as damage:
                    if name not in str(damage):
                        problems.append(("unnamed", f"{kind} of {path}/{name}: {damage}"))
            said.clear()
        kinds = ckpt.team.share(kinds)
        dist.barrier()
        found = ckpt.find()
        step = ckpt.team.gather(found and found.step)
        if rank == 0:
            expected = store.step_of(run.steps()[0])
            if len(run.steps()) + len(hit) != 3 or step != [expected] * world:
                problems.append(("wrong_choices", f"{step} after {hit}"))
            for path, name in hit.items():
                if not any(line.startswith(f"skipped {path.resolve()}: ") and name in line for line in said):
                    problems.append(("unnamed", f"{hit}: {said}"))
        dist.barrier()
    return kinds, rounds, problems


# ----------------------------------------------------------------------------------------------------------------- restarts

RESTARTS = 3
TORCHRUN = ("-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", str(RESTARTS))


class Restarts(campaign.Counts):
    GOOD = ("kills", "of_torchrun", "before_they_met", "restarts")


def restarted(stage: Stage, out: Path, most: int) -> int:
    """One run under torchrun, killed up to `most` times. Returns how often."""
    counts, dice, kills = stage.counts, stage.dice, 0
    out.mkdir()
    while True:
        begun, counted = time.monotonic(), kills
        counts.add("starts")
        with open(out / "torchrun.txt", "a") as said:
            command = [sys.executable, *TORCHRUN, "--nproc-per-node", str(stage.world), "train.py", *stage.case.argv(out)]
            agent = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"})
        whole, workers = dice.random() < 0.25, []
        for _ in range(min(most - kills, 1 if whole else RESTARTS)):
            workers = new_workers(agent, workers, stage.world)
            if not workers:
                break
            moment(out, agent, workers, dice)
            victim = agent.pid if whole else dice.choice(workers)
            if agent.poll() is None and process_state(victim) == "runs":
                os.kill(victim, signal.SIGKILL)
                kills += 1
                counts.add("kills")
                counts.of("layouts", stage.choice["layout"])
        if whole and kills > counted:
            counts.add("of_torchrun")
            agent.wait()
            met = all(f"pid {pid}" in log_of(out) for pid in workers)
            counts.add("before_they_met", not met)
            if not ended(workers, SURVIVE_S if met else 2.0):
                if met:
                    stage.wrong("hangs", out, f"ranks outlive torchrun: {log_of(out)}")
                for pid in workers:
                    if process_state(pid) == "runs":
                        os.kill(pid, signal.SIGKILL)
            stage.check_records(out)
            continue
        try:
            code = agent.wait(START_S + begun - time.monotonic() + 30 * RESTARTS)
        except subprocess.TimeoutExpired:
            agent.terminate()
            code = f"none, it hangs: {agent.wait()}"
        counts.add("restarts", kills - counted)
        stage.check_records(out)
        if code != 0:
            stage.wrong("lost_runs", out, f"torchrun's exit code is {code}\n{(out / 'torchrun.txt').read_text()[-3000:]}")
            return max(kills, 1)
        break
    stage.check_end(out)
    return kills


def log_of(out: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in (out / "logs").glob("rank_*.log")) if (out / "logs").is_dir() else ""


def new_workers(agent: subprocess.Popen, old: list[int], world: int) -> list[int]:
    """torchrun's ranks, once they are others than `old`; none if it ends instead."""
    while agent.poll() is None:
        found = [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]
        found = [pid for pid in found if process_state(pid) == "runs"]
        if len(found) == world and not set(found) & set(old):
            return found
        time.sleep(0.01)
    return []


def moment(out: Path, agent: subprocess.Popen, workers: list[int], dice: random.Random) -> None:
    """Waits: for a while after the ranks started, or for a while after they trained."""
    begun, before = time.monotonic(), records(out).keys()
    if dice.random() < 0.5:
        until = begun + dice.uniform(0, 6)
    else:
        while agent.poll() is None and records(out).keys() == before and time.monotonic() < begun + START_S:
            time.sleep(0.01)
        until = time.monotonic() + dice.uniform(0, 0.5)
    while agent.poll() is None and time.monotonic() < until:
        time.sleep(0.005)


def ended(pids: list[int], within_s: float) -> bool:
    until = time.monotonic() + within_s
    while any(process_state(pid) != "ended" for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


# --------------------------------------------------------------------------------------------------------------------- main

KINDS: dict[str, tuple[type[campaign.Counts], Callable[[Stage, Path, int], int], int]] = {
    "signals": (Signals, signalled, 10),
    "disks": (Disks, tight, 4),
    "damage": (Damages, damaged, 100),
    "restarts": (Restarts, restarted, 5),
}


def count(
    kind: str, number: int, file: Path, seed: int = 0, each: int | None = None, folder: Path | None = None, layouts: str = ""
) -> campaign.Counts:
    """Goes on until `file` counts so many."""
    counts, disturbed, usual = KINDS[kind]
    command = f"python -m tests.faults {kind} --count {number}"
    return campaign.campaign(
        counts(file, seed, kind), counts.GOOD[0], number, each or usual, disturbed, folder, command, EVALUATION, layouts
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Signals, full disks, damaged files; see the module.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--count", type=int, required=True, help="in all, those that the file counts already included")
    parser.add_argument("--layouts", default="", help='only those with one of these in their names: "tensor,context 4", or "4 ranks"')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/faults.json"), help="the file with the counts")
    parser.add_argument("--each", type=int, help="of each combination")
    parser.add_argument("--folder", type=Path, help="where the runs lie; default: the system's temporary folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts = count(args.kind, args.count, args.out, args.seed, args.each, args.folder, args.layouts)
    print(counts.line())
    return 1 if counts.bad() else 0


if __name__ == "__main__":
    sys.exit(main())
