"""Several ranks on this machine: the parent has imported torch, children are forked, gloo connects them (or another backend).

Starting ranks with torchrun costs an import of torch each (seconds); a fork costs a tenth of a second. Facts it rests on:

* fork is safe after the parent ran CPU tensor work with few threads, and impossible once CUDA is initialized;
* a `file://` store needs no free port, so tests can run beside each other;
* results travel through a queue and must be plain Python values: a tensor would share memory with a rank that is gone;
* a rank that fails leaves the others waiting in a collective, so the first error kills them all.

    def work(rank, world, x):
        t = torch.tensor([rank + x]); dist.all_reduce(t); return t.item()

    assert run(work, 2, 1) == [3, 3]
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # fully_shard imports it: seconds once here instead of in every rank
import torch.distributed as dist


class RankFailed(AssertionError):
    """Some rank raised, died or did not finish in time; the message holds its traceback or the exit codes."""


def run(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 60.0, backend: str = "gloo") -> list[Any]:
    """Runs `fn(rank, world, *args)` on `world` forked ranks and returns their results in rank order."""
    ctx = multiprocessing.get_context("fork")
    results = ctx.Queue()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        store = Path(folder) / "store"
        ranks = [ctx.Process(target=_rank, args=(r, world, store, backend, fn, args, results), daemon=True) for r in range(world)]
        for process in ranks:
            process.start()
        try:
            return _collect(ranks, results, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def apart(fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> Any:
    """Runs `fn(*args)` in a fork without a process group. For what leaves traces in the process that has it: a fake process group, say,
    whose groups torch goes on finding in its caches."""
    ctx = multiprocessing.get_context("fork")
    results = ctx.Queue()
    process = ctx.Process(target=_apart, args=(fn, args, results))  # no daemon: it may start ranks
    process.start()
    try:
        return _collect([process], results, time.monotonic() + timeout)[0]
    finally:
        process.kill()
        process.join()


def _collect(ranks: list, results, deadline: float) -> list[Any]:
    done: dict[int, Any] = {}
    while len(done) < len(ranks):
        try:
            rank, ok, value = results.get(timeout=0.2)
        except queue.Empty:
            codes = [p.exitcode for p in ranks]
            dead = [r for r, code in enumerate(codes) if code is not None and r not in done]
            if dead and results.empty():
                raise RankFailed(f"rank {dead[0]} died without a word; exit codes {codes}") from None
            if time.monotonic() > deadline:
                raise RankFailed(f"ranks {sorted(set(range(len(ranks))) - set(done))} did not finish in time") from None
            continue
        if not ok:
            raise RankFailed(f"rank {rank} of {len(ranks)}:\n{value}")
        done[rank] = value
    return [done[rank] for rank in range(len(ranks))]


def _apart(fn: Callable[..., Any], args: tuple, results) -> None:
    try:
        torch.set_num_threads(1)
        results.put((0, True, fn(*args)))
    except BaseException:
        results.put((0, False, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(0)


def _rank(rank: int, world: int, store: Path, backend: str, fn: Callable[..., Any], args: tuple, results) -> None:
    """A child: never returns into pytest's frames."""
    try:
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world)
        value = fn(rank, world, *args)
        dist.barrier()  # nobody leaves while another still talks to it
        results.put((rank, True, value))
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(0)
