"""What it costs that a run can be lost at any moment: saves, the check of every byte when it resumes, crc32 while it writes.

    python -m benchmarks.durability [--quick] [--out FILE.json]

One process trains a small model with AdamW and saves it as a run does. What is compared alternates in rounds, and each round gives a ratio;
the median is reported, and the quartiles beside it.

    async_step       a step while a background save is in flight, in units of a step without one. On a CPU, the save and the step
                     share its cores and its memory's bandwidth
    async_stall      what the loop waits in one background save (the start, the rest of the copy before the next update, the end),
                     in units of a step
    sync_stall       what the loop waits in a save that it waits for, in the same units
    verify_to_load   reading a checkpoint to compare its crc32, in units of loading its tensors; both from the page cache
    crc_to_write     CountedFile, which computes crc32, in units of plain writes of the same bytes, both with fsync

The last two also by CPU seconds (`_cpu`), which other work on the machine changes little; wall seconds it changes much.

`--quick` makes everything tiny: it shows that the benchmark works, its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch

from benchmarks.cpu import commit, machine, versions
from benchmarks.modes import QUICK, Side, Size, arch_of, config, rows
from optim.adamw import state_tensors
from parallel.local import run
from parallel.mesh import Mesh
from runtime.checkpoint import Checkpointer, shards, store
from runtime.sections import CheckpointConfig

SIZE = Size(256, 8, 8, 4, 8192, 256, 15)
PIECE = 4 << 20  # bytes of one write


def timed(work: Callable[[], object]) -> float:
    return both(work)[0]


def both(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds, of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def ratios(name: str, these: list[tuple[float, float]], units: list[tuple[float, float]]) -> dict:
    """`ratio` of wall seconds, and of CPU seconds."""
    (wall, cpu), (wall_unit, cpu_unit) = zip(*these), zip(*units)
    return ratio(name, wall, wall_unit) | ratio(f"{name}_cpu", cpu, cpu_unit)


def ratio(name: str, these: Sequence[float], units: Sequence[float]) -> dict:
    """The median over the rounds of what was measured in units of what was measured beside it, and the quartiles."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(these, units, strict=True)], n=4, method="inclusive")
    return {name: middle, f"{name}_quartiles": [low, high]}


class Run:
    """A model that trains and saves itself."""

    def __init__(self, size: Size, folder: Path):
        cfg = config(folder, size.tokens, "cpu", "--optim.lr=0.001")
        self.side = Side(cfg, arch_of(size, folder), Mesh.build(cfg.parallel, torch.device("cpu")), rows(1, size.tokens, size.vocab))
        trained = self.side.trained
        self.kept = {f"model.{name}": p for name, p in trained.items()}
        self.kept |= {f"optim.{name}": t for name, t in state_tensors(self.side.opt, trained.items()).items()}
        self.nbytes, self.steps = sum(t.nbytes for t in self.kept.values()), 0

    def checkpointer(self, folder: Path, async_: bool) -> Checkpointer:
        folder.mkdir()
        about = {"model": "a", "tokenizer": "b", "data": "c"}
        return Checkpointer(folder, CheckpointConfig(async_=async_), about, "", {}, say=lambda text: None)

    def save(self, ckpt: Checkpointer) -> float:
        """Seconds that the loop waits."""
        self.steps += 1
        return timed(lambda: ckpt.save(self.steps, self.kept, {"step": self.steps}, {"cpu": torch.get_rng_state()}))

    def step(self, ckpt: Checkpointer) -> tuple[float, float, bool]:
        """Seconds of a step, those that it waits for a save (for the copy, and to ask whether it has ended), and whether one has."""
        waits, told = [], []
        took = timed(lambda: self.side.step(before_update=lambda: waits.append(timed(ckpt.before_update))))
        waits.append(timed(lambda: told.append(ckpt.poll())))
        return took, sum(waits), told[0] is not None


def saves(rank: int, world: int, size: Size, folder: Path) -> dict:
    """Steps with and without a save in flight, and saves of both kinds."""
    torch.set_num_threads(1)  # the writer has a core of its own where there are two
    trained = Run(size, folder)
    ways = {way: trained.checkpointer(folder / way, way == "async") for way in ("async", "sync")}
    plain, flying, waited = [], [], {way: [] for way in ways}
    for number in range(size.rounds + 1):
        alone = [trained.step(ways["sync"])[0] for _ in range(3)]
        stall, during = trained.save(ways["async"]), []
        while True:
            took, asking, landed = trained.step(ways["async"])
            stall += asking
            if landed:
                break
            during.append(took)  # the step in which it ended was only partly beside it
        sync = trained.save(ways["sync"])
        if number:  # the first of each allocates what later ones use again
            plain.append(statistics.median(alone))
            flying.append(statistics.median(during or [took]))
            waited["async"].append(stall)
            waited["sync"].append(sync)
    assert all(store.Store(folder / way).complete() for way in ways), "a save failed"
    return {
        **ratio("async_step", flying, plain),
        **ratio("async_stall", waited["async"], plain),
        **ratio("sync_stall", waited["sync"], plain),
        "step_seconds": statistics.median(plain),
        "saved_mib": trained.nbytes / 2**20,
    }


def resumes(rank: int, world: int, size: Size, folder: Path) -> dict:
    """The check of all bytes, and the load that follows it."""
    torch.set_num_threads(1)
    trained = Run(size, folder)
    trained.save(trained.checkpointer(folder / "run", async_=False))
    path = folder / "run" / "checkpoints" / "step_1"
    files = store.verify(path)["files"]
    verify, load = [], []
    for _ in range(size.rounds):
        verify.append(both(lambda: store.verify(path)))
        load.append(both(lambda: shards.read(path, files, trained.kept)))
    return {
        **ratios("verify_to_load", verify, load),
        "verify_mib_per_s": sum(entry["size"] for entry in files.values()) / 2**20 / statistics.median(wall for wall, _ in verify),
    }


def writes(size: Size, folder: Path, nbytes: int) -> dict:
    """The same bytes through a file that counts, and through one that does not."""
    data = os.urandom(PIECE)
    pieces = [memoryview(data)] * max(1, nbytes // PIECE)

    def plain() -> None:
        with open(folder / "plain", "wb", buffering=1 << 20) as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())

    def counted() -> None:
        with store.CountedFile(folder / "counted") as file:
            for piece in pieces:
                file.write(piece)

    ways = {"plain": plain, "counted": counted}
    took: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(size.rounds + 1):
        for way, work in ways.items():
            seconds = both(work)
            (folder / way).unlink()
            if number:
                took[way].append(seconds)
    return {
        **ratios("crc_to_write", took["counted"], took["plain"]),
        "write_mib_per_s": len(pieces) * PIECE / 2**20 / statistics.median(wall for wall, _ in took["plain"]),
    }


def main(argv: list[str]) -> int:
    options = argparse.ArgumentParser(prog="python -m benchmarks.durability", description=__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="tiny sizes: shows that the benchmark works")
    options.add_argument("--out", type=Path, help="also write machine, versions and results to this file")
    args = options.parse_args(argv)
    size = QUICK if args.quick else SIZE
    found = {}
    for work in (saves, resumes):
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            found |= run(work, 1, size, Path(folder), timeout=900.0)[0]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        found |= writes(size, Path(folder), int(found["saved_mib"] * 2**20))
    for name, value in found.items():
        print(f"{name:<30}" + (f"{value:.3g}" if isinstance(value, float) else " to ".join(f"{v:.3g}" for v in value)))
    if args.out:
        given = " --quick" if args.quick else ""
        head = {"command": f"python -m benchmarks.durability{given}", "commit": commit(), "date": date.today().isoformat()}
        head["machine"] = machine()
        head |= {"versions": versions(("torch",)), "size": vars(size)}
        args.out.write_text(json.dumps({**head, "found": found}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
