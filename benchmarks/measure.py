"""What the GPU benchmarks measure with: time, memory, what a step is made of, and the state of the device.

On CUDA time is that between two events on the stream. On the CPU, where `--tiny` shows that the code runs, it is the wall clock's.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from importlib import metadata
from itertools import pairwise
from typing import NamedTuple

import torch

L2_BYTES = 60 << 20  # of an H100 or H200 (50 MB), with room
CYCLES = 2e9  # of `torch.cuda._sleep` in a second, at the highest clock of an H100 or H200; at a lower one it sleeps for longer
SLEEP = 0.25e-3, 20e-3  # seconds: the shortest sleep, and the longest, for work that waits for the device itself


class Pace(NamedTuple):
    """How often something is done: first `warm_up` times unmeasured, then `least` times and on until `seconds` have passed."""

    warm_up: int
    least: int
    seconds: float


STEPS, KERNELS, TINY = Pace(3, 6, 5.0), Pace(3, 20, 0.2), Pace(1, 2, 0.0)


# -- time ------------------------------------------------------------------------------------------------------------------


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mark(device: torch.device) -> torch.cuda.Event | float:
    """This moment: of the stream on CUDA, of the clock elsewhere."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(a: torch.cuda.Event | float, b: torch.cuda.Event | float) -> float:
    """Seconds from one mark to another; both must have passed."""
    return b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3


def step_seconds(step: Callable[[], object], device: torch.device, pace: Pace) -> list[float]:
    """Seconds of each step, from the end of the one before it. Nothing waits between steps but what a step itself waits for."""
    for _ in range(pace.warm_up):
        step()
    settle(device)
    marks, begun = [mark(device)], time.perf_counter()
    while len(marks) <= pace.least or time.perf_counter() - begun < pace.seconds:
        step()
        marks.append(mark(device))
    settle(device)
    return [between(a, b) for a, b in pairwise(marks)]


def kernel_seconds(prepare: Callable[[int], object], work: Callable[[object], object], device: torch.device, pace: Pace) -> dict:
    """`work(prepare(i))`, of which only work is timed. `prepare` should hand out inputs in turns that are larger than L2 together.

    Before each the device sleeps while the host queues the work: the time is the kernels' own, without launches. It sleeps for at least
    twice as long as the host took in the last of the warm-up. `late` counts those that the host took longer for than the device slept,
    so that launches may be in the time: all of them, where the work itself waits for the device.
    """
    host = 0.0
    for i in range(pace.warm_up):
        given = prepare(i)
        settle(device)
        begun = time.perf_counter()
        work(given)
        host = time.perf_counter() - begun
    settle(device)
    sleep = min(max(SLEEP[0], 2 * host), SLEEP[1])
    pairs, late, begun = [], 0, time.perf_counter()
    while len(pairs) < pace.least or time.perf_counter() - begun < pace.seconds:
        given = prepare(len(pairs))
        if device.type == "cuda":
            torch.cuda._sleep(int(CYCLES * sleep))
        asleep = time.perf_counter()
        begin = mark(device)
        work(given)
        pairs.append((begin, mark(device)))
        late += device.type == "cuda" and time.perf_counter() - asleep > sleep
        if len(pairs) % 16 == 0:
            settle(device)  # or the host would queue far more than fits the time
    settle(device)
    return spread([between(a, b) for a, b in pairs]) | {"late": late}


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "count": len(values)}


def turns(make: Callable[[int], object], size: int, device: torch.device) -> list:
    """Input sets `make(i)` of `size` bytes each: three, and on CUDA as many more as are together twice what L2 holds."""
    return [make(i) for i in range(max(3, -(-2 * L2_BYTES // size) if device.type == "cuda" else 0))]


def rotating(sets: list) -> Callable[[int], object]:
    """One set after the other, for `kernel_seconds`."""
    return lambda i: sets[i % len(sets)]


# -- memory ----------------------------------------------------------------------------------------------------------------


def free(device: torch.device) -> None:
    """Gives back what no one holds any more: each measurement begins with an empty allocator. The CPU has none to empty."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak(step: Callable[[], object], device: torch.device) -> dict | None:
    """The most bytes allocated and reserved during a step. None on the CPU, whose allocator does not tell."""
    if device.type != "cuda":
        step()
        return None
    settle(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    settle(device)
    return {"allocated": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.max_memory_reserved(device)}


# -- what a step is made of ------------------------------------------------------------------------------------------------

# a kernel belongs to the first class whose pattern its name has
CLASSES = {
    "attention": r"flash|fmha|attention|attn|varlen",
    "copy": r"memcpy|memset|copy|fill|cat_|catarray",
    "optimizer": r"adam|multi_tensor|foreach|lpnorm|l2norm",
    "loss": r"logprob|cross_entropy|softmax|nll|log_sum|logsumexp|scatter|gather",
    "norm": r"rms_?norm|layer_?norm|norm",
    "rope": r"rope|rotary|rotate",
    "activation": r"glu|silu|gelu",
    "lora": r"lora",
    "gemm": r"gemm|cutlass|nvjet|cublas|splitk|xmma|wgmma|\bmm\b|addmm|matmul|linear",
    "embedding": r"embedding|index",
    "elementwise": r"elementwise|triton|reduce|mul|add|sum|pow|mean",
}


def kind(kernel: str) -> str:
    """The class of a kernel, by its name."""
    return next((name for name, pattern in CLASSES.items() if re.search(pattern, kernel.lower())), "other")


def breakdown(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds by class of one step under torch.profiler, and those in which the device had nothing to do. On the CPU, operators."""
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        step()
        settle(device)
    events = profile.events()
    if cuda:
        kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        spans = [(e.name, e.time_range.start, e.time_range.end) for e in kernels]
        return {name: us / 1e6 for name, us in by_class(spans).items()}
    found: dict[str, float] = defaultdict(float)
    for e in events:
        found[kind(e.name)] += e.self_cpu_time_total / 1e6
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def by_class(spans: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Time by class, largest first, of kernels (name, start, end), and `idle`: when none ran between the first and the last."""
    found: dict[str, float] = defaultdict(float)
    idle, until = 0.0, None
    for name, start, end in sorted(spans, key=lambda span: span[1]):
        found[kind(name)] += end - start
        idle += max(0.0, start - until) if until is not None else 0.0
        until = end if until is None else max(until, end)
    return dict(sorted(found.items(), key=lambda item: -item[1])) | {"idle": idle}


# -- where -----------------------------------------------------------------------------------------------------------------

FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")


def smi(running: Callable[[], object] | None = None) -> dict[str, str] | None:
    """What nvidia-smi says of the first device, if there is one; with `running` while that is under way, untimed."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(FIELDS)}",
        "--format=csv,noheader",
        f"--id={os.environ.get('CUDA_VISIBLE_DEVICES', '0')}",
    ]
    asked = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    begun = time.monotonic()
    while running is not None and asked.poll() is None and time.monotonic() - begun < 10:
        running()
    try:
        line = asked.communicate(timeout=10)[0].splitlines()[:1]
    except subprocess.TimeoutExpired:
        asked.kill()
        return None
    return dict(zip(FIELDS, (value.strip() for value in line[0].split(",")))) if asked.returncode == 0 and line else None


def installed(names: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are there."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
