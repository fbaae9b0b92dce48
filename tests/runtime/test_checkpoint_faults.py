"""Every point of a save, failing on every rank: the others are told or end, and what was saved before stands.

A point is a call of `store.at`. A save passes about 45 of them on two ranks (of the many writes of a file the first and the last
are taken, and one between). Each is made to raise a disk's error, to raise an error that cannot even be pickled, and to kill its process,
in the foreground and in the background.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import tempfile
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel.local import run
from runtime.checkpoint import store
from runtime.checkpoint.team import RankFailed
from tests.runtime.saving import checkpointer, resumed, run_folder, save, spread, whole


class Unpicklable(Exception):
    """As some libraries raise them: with something inside that pickle refuses."""

    def __init__(self, text: str):
        super().__init__(text)
        self.lock = threading.Lock()


@pytest.fixture(scope="module")
def before():
    """A run with steps 1 and 2 saved, to be copied; saving step 3 then publishes, prunes and points."""

    def work(rank, world):
        ckpt = checkpointer(folder)
        for step in (1, 2):
            save(ckpt, step, "fsdp2")

    with run_folder() as folder:
        run(work, 2)
        yield folder


@pytest.fixture(scope="module")
def points(before):
    """By rank, the (index, name) of each point of a save."""

    def work(rank, world):
        seen: list[str] = []
        ckpt = checkpointer(folder)
        store.at = seen.append
        save(ckpt, 3, "fsdp2")
        inside = [i for i in range(1, len(seen) - 1) if seen[i - 1] == seen[i] == seen[i + 1] == "write"]
        del inside[len(inside) // 2]  # one in the middle of a tensor stays: there torch.save hides the cause
        return [(i, name) for i, name in enumerate(seen) if i not in inside]

    with run_folder() as folder:
        shutil.copytree(before, folder, dirs_exist_ok=True)
        found = run(work, 2)
    names = {"mkdir", "plan", "open", "write", "fsync", "fsync_folder", "rename", "latest", "trash", "delete"}
    assert {name for _, name in found[0]} == names
    assert len(found[0]) > 25 and len(found[1]) >= 8
    return found


def fail_at(index: int, act) -> None:
    """Makes point number `index` of this process call `act`, once."""
    count = iter(range(1 << 30))
    store.at = lambda point: act() if next(count) == index else None


def throw(error: BaseException):
    def act():
        raise error

    return act


@pytest.mark.parametrize("async_", [False, True], ids=["sync", "async"])
def test_an_error_anywhere_is_an_outcome_everywhere(before, points, async_):
    renamed = [name for _, name in points[0]].index("rename")

    def work(rank, world):
        ckpt = checkpointer(folder, async_=async_)
        newest, step = 2, 2
        for victim in (0, 1):
            for place, (index, name) in enumerate(points[victim]):
                for error in (OSError(28, "No space left on device"), Unpicklable("a bug")):
                    step += 1
                    if rank == victim:
                        fail_at(index, throw(error))
                    try:
                        outcome = save(ckpt, step, "fsdp2")
                        published, text = outcome.path is not None, outcome.problem
                        assert isinstance(error, OSError)
                    except RankFailed as e:
                        published, text = None, str(e)
                        assert isinstance(error, Unpicklable)
                    store.at = lambda point: None
                    case = (victim, name, place, published, text)
                    assert ckpt.team.gather(case) == [list(case)] * world
                    assert f"rank {victim}" in text and ("No space left" if published is not None else "a bug") in text, case
                    after = victim == 0 and place > renamed
                    assert published in (None, after), case
                    newest = step if after else newest
                    if rank == 0:
                        assert store.step_of(ckpt.store.complete()[0]) == newest, case
                        store.verify(ckpt.store.path(newest))
                        assert not list(ckpt.store.folder.glob(".tmp-[0-9]*")), case
                    dist.barrier()
        assert save(ckpt, step + 1, "fsdp2").problem == ""
        assert resumed(checkpointer(folder), "fsdp2") == step + 1
        return step

    with run_folder() as folder:
        shutil.copytree(before, folder, dirs_exist_ok=True)
        assert run(work, 2)[0] == 2 + 2 * (len(points[0]) + len(points[1]))


def fork(work, world: int, limit_s: float = 30.0) -> list[int]:
    """Runs ranks that may die; their exit codes (negative: killed). A rank that outlives the limit hangs."""
    with tempfile.TemporaryDirectory() as meeting:
        pids = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    torch.set_num_threads(1)
                    dist.init_process_group("gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=world)
                    work(rank, world)
                    code = 0
                except BaseException as e:
                    if not isinstance(e, RuntimeError):  # that a peer is gone is what survivors raise
                        traceback.print_exc()
                        code = 3
                os._exit(code)
            pids.append(pid)
        codes: dict[int, int] = {}
        deadline = time.monotonic() + limit_s
        while len(codes) < world:
            for pid in set(pids) - codes.keys():
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                for pid in set(pids) - codes.keys():
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError("a rank hangs after the other was killed")
            time.sleep(0.005)
        return [codes[pid] for pid in pids]


@pytest.mark.parametrize("async_", [False, True], ids=["sync", "async"])
def test_a_kill_anywhere_costs_nothing_that_was_saved(before, points, async_):
    renamed = [name for _, name in points[0]].index("rename")
    expected: dict[Path, int] = {}
    with run_folder() as base:
        for victim in (0, 1):
            for place, (index, name) in enumerate(points[victim]):
                if async_ and place % 2:  # the thread passes the same points
                    continue
                folder = base / f"{victim}-{index}"
                shutil.copytree(before, folder)

                def work(rank, world, victim=victim, index=index, folder=folder):
                    ckpt = checkpointer(folder, async_=async_)
                    if rank == victim:
                        fail_at(index, lambda: os.kill(os.getpid(), signal.SIGKILL))
                    save(ckpt, 3, "fsdp2")
                    ckpt.team.total(0)  # who survives notices here at the latest

                codes = fork(work, 2)
                assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1, (codes, victim, name)
                expected[folder] = 3 if victim == 0 and place > renamed else 2

        def resume(rank, world):
            return [resumed(checkpointer(folder), "one") for folder in expected]

        assert run(resume, 1) == [list(expected.values())]
        assert not [p for folder in expected for p in (folder / "checkpoints").iterdir() if p.name.startswith((".tmp", ".trash"))]
    assert 0 < list(expected.values()).count(3) < len(expected)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_a_full_disk(before, share):
    """A file-size limit stands for a disk that fills up on one rank: nothing is lost, the message says what to do, training goes on."""

    def work(rank, world):
        ckpt = checkpointer(folder, async_=share == 0.5)
        if rank == 1:
            size = (ckpt.store.path(2) / "__1_0.distcp").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(size * share), resource.RLIM_INFINITY))
        failed = save(ckpt, 3, "fsdp2")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert failed.path is None
        assert resumed(checkpointer(folder), "fsdp2") == 2
        assert save(ckpt, 4, "fsdp2").path is not None
        return failed.problem

    with run_folder() as folder:
        shutil.copytree(before, folder, dirs_exist_ok=True)
        first, second = run(work, 2)
        assert first == second
        assert first.startswith("not saved, the disk failed on rank 1: /") and "__1_0.distcp: File too large" in first
        assert "it needs 16." in first and f"are free in {folder}/checkpoints)" in first


def test_a_disk_without_room_is_not_even_begun(before):
    def work(rank, world):
        ckpt = checkpointer(folder)
        ckpt.store.free_bytes = lambda: 1 << 20
        big = spread({"w": torch.zeros(1 << 10, 1 << 10)}, "fsdp2")
        outcome = ckpt.save(3, big, {}, {})
        return outcome.path, outcome.problem, outcome.nbytes

    with run_folder() as folder:
        shutil.copytree(before, folder, dirs_exist_ok=True)
        (path, problem, nbytes), _ = run(work, 2)
        assert path is None and nbytes == 4 << 20
        assert "No space left on device (it needs 20.0 MiB, 1.0 MiB are free in" in problem


def test_a_folder_that_other_ranks_do_not_see(before):
    """Two nodes without a common file system: said at once, not found out when resuming."""

    def work(rank, world):
        ckpt = checkpointer(folder)
        share = ckpt.team.share
        ckpt.team.share = lambda value: share(value) if rank == 0 else share(value) and str(folder / "elsewhere")
        return ckpt.save(3, spread(whole(3), "fsdp2"), {}, {}).problem

    with run_folder() as folder:
        shutil.copytree(before, folder, dirs_exist_ok=True)
        assert "is not visible on this rank; checkpoints need a file system that all ranks share" in run(work, 2)[0]
        assert not (folder / "elsewhere").exists()
