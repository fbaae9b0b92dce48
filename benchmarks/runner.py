"""Cells one after the other, each in a process of its own, within a deadline.

A cell is not begun if it would end after the deadline, by its estimate. It is ended at twice that, or before, where the deadline comes
before. Cells marked `last` have their time set aside, which no other cell may use, and run whatever else was skipped. Results are
written after each cell; the table comes last.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import report
from benchmarks.cpu import ROOT, commit, machine
from benchmarks.measure import KERNELS, STEPS, TINY, Pace, installed, smi
from parallel.local import apart

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "peft",
    "liger-kernel",
    "unsloth",
    "axolotl",
    "cut-cross-entropy",
    "nvidia-cudnn-cu13",
)

DEADLINE = 525  # seconds: nine minutes, less what starting, ending the last cell and the tables take
TINY_LIMIT = 120  # seconds for a cell at toy sizes
ENDING = 3  # seconds from a cell's limit to the next one's start


class Unavailable(Exception):
    """What a cell compares with is not installed here, or does not import."""


@dataclass(frozen=True)
class Job:
    """What a cell is told. seconds: its estimate; begun: `time.time()` when its process was asked for."""

    device: str
    tiny: bool
    seconds: float
    begun: float

    @property
    def steps(self) -> Pace:
        return TINY if self.tiny else STEPS

    @property
    def kernels(self) -> Pace:
        return TINY if self.tiny else KERNELS

    def late(self) -> bool:
        """Is the estimate used up? Then nothing more is begun that can be left out."""
        return time.time() - self.begun > self.seconds


class Cell(NamedTuple):
    """seconds: about what it takes on the GPU; last: see the module; fresh: with no compiled kernels from earlier processes."""

    seconds: int
    run: Callable[[Job], dict]
    last: bool = False
    fresh: bool = False


def perform(cell: Cell, job: Job) -> dict:
    """What the cell found, or {"unavailable": why}, or {"failed": why}."""
    try:
        return cell.run(job)
    except Unavailable as error:
        return {"unavailable": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"}


def limit(cell: Cell, left: float) -> float:
    """Seconds after which a cell is ended; left: those until the deadline that nobody else is to have."""
    return min(2 * cell.seconds, left)


def spawn(suite: str, name: str, cell: Cell, device: str, tiny: bool, most: float) -> dict:
    """`perform` in a process of its own, which is ended after `most` seconds."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        f"benchmarks.{suite}",
        "--cell",
        name,
        "--device",
        device,
        *(["--tiny"] if tiny else []),
    ]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "BENCHMARK_BEGUN": str(time.time())}
        if cell.fresh:
            env |= {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        child = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
        try:
            lines = child.communicate(timeout=most)[0].splitlines()
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            return {"failed": f"ended after {most:.0f} s; its estimate is {cell.seconds} s"}
        return json.loads(lines[-1]) if lines else {"failed": f"its process ended with code {child.returncode} and said nothing"}


def _child(cell: Cell, device: str, tiny: bool) -> int:
    """One JSON line on the standard output, which nothing else gets."""
    say = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = Job(device, tiny, cell.seconds, float(os.environ.get("BENCHMARK_BEGUN", time.time())))
    print(json.dumps(perform(cell, job)), file=say)
    return 0


def main(suite: str, about: str, cells: dict[str, Cell], argv: list[str]) -> int:
    """Exit code: 0, 1 if a cell failed, 2 if there is no such device."""
    options = argparse.ArgumentParser(prog=f"python -m benchmarks.{suite}", description=about)
    options.add_argument("--only", nargs="+", choices=cells, default=list(cells), metavar="NAME", help=", ".join(cells))
    options.add_argument("--deadline", type=float, default=DEADLINE, help="seconds; what would end later is skipped")
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only with --tiny")
    options.add_argument("--tiny", action="store_true", help="toy sizes: shows that the code runs; its numbers mean nothing")
    options.add_argument("--out", type=Path, help="write device, versions and results to this file, after each cell")
    options.add_argument("--table", type=Path, metavar="FILE", help="only print the table of such a file, and write a plot beside it")
    options.add_argument("--cell", choices=cells, metavar="NAME", help=argparse.SUPPRESS)
    args = options.parse_args(argv)
    if args.table:
        print(report.publish(args.table))
        return 0
    if args.device == "cpu" and not args.tiny:
        options.error("--device cpu shows that the code runs, no more; add --tiny")
    if args.cell:
        return _child(cells[args.cell], args.device, args.tiny)
    if args.device == "cuda" and not apart(torch.cuda.is_available):  # asked in a fork: this process should hold no GPU memory
        print("error: there is no CUDA device here; --device cpu --tiny shows that the code runs", file=sys.stderr)
        return 2

    begun = time.monotonic()
    results = {
        "suite": suite,
        "command": " ".join([f"python -m benchmarks.{suite}", *argv]),
        "commit": commit(),
        "date": date.today().isoformat(),
        "device": apart(torch.cuda.get_device_name) if args.device == "cuda" else "cpu",
        "tiny": args.tiny,
        "machine": machine(),
        "versions": installed(PACKAGES),
        "before": smi(),
        "cells": {},
        "skipped": [],
    }
    chosen = [name for name in cells if name in args.only]
    chosen.sort(key=lambda name: cells[name].last)
    for i, name in enumerate(chosen):
        cell, now = cells[name], time.monotonic() - begun
        aside = 0 if cell.last else sum(cells[other].seconds + ENDING for other in chosen[i + 1 :] if cells[other].last)
        left = args.deadline - now - aside
        if not args.tiny and cell.seconds > left:
            results["skipped"].append(name)
            print(f"skipped {name}: at {now:.0f} s, about {cell.seconds} s more would pass the deadline", file=sys.stderr, flush=True)
        else:
            found = spawn(suite, name, cell, args.device, args.tiny, TINY_LIMIT if args.tiny else limit(cell, left))
            results["cells"][name] = found | {"took_seconds": round(time.monotonic() - begun - now, 1)}
            print(json.dumps({"cell": name, **results["cells"][name]}), flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    results["after"] = smi()
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("\n" + report.markdown(results))
    return int(any("failed" in found for found in results["cells"].values()))
