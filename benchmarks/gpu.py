"""Training steps on one GPU, ours and others', in one command of under nine minutes.

    python -m benchmarks.gpu [--only NAME ...] [--deadline 525] [--out FILE.json]
    python -m benchmarks.gpu --tiny --device cpu            # every cell at toy sizes: shows that the code runs
    python -m benchmarks.gpu --table FILE.json              # the table of a run again, and a plot beside the file

docs/performance.md says what each cell is, what is held equal, and how the numbers are made. benchmarks/runner.py runs the cells,
benchmarks/sides.py has what trains, benchmarks/measure.py what is measured with.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import measure, runner, sides
from benchmarks.measure import between, free, kernel_seconds, mark, peak, rotating, settle, spread, turns
from benchmarks.runner import Cell, Job, Unavailable
from benchmarks.sides import SHAPES, Ours, Side, Theirs, Work, one_rank
from model import flops
from model.arch import Kind
from model.attention import AttnContext, Borders
from model.backends import VARLEN

PEAK = 989e12  # FLOP/s, dense bf16, of an H100 or H200 (data sheet): the denominator of MFU where the device is not in model/flops.py
RECOMPUTE = "--recompute.kind=full"
POST_TRIALS = 30


# -- ceilings --------------------------------------------------------------------------------------------------------------


def ceilings(job: Job) -> dict:
    """What the device gives: copies, products at an 8B layer's shapes and with 64 more columns, attention, the link to the host."""
    device = sides_device(job)
    size, tokens = (1 << 20, 256) if job.tiny else (1 << 30, 16384)
    dtype = torch.float32 if job.tiny else torch.bfloat16
    found = {"copy": copy_rate(device, size, job), "gemm": {}, "attention": {}}
    for name, (k, n) in layer_shapes(job.tiny).items():
        for more in (0, 64):
            found["gemm"][name + (f"_k+{more}" if more else "")] = gemm_rate(tokens, k + more, n, dtype, device, job)
    edge = 64 if job.tiny else 8192
    found["gemm"]["square"] = gemm_rate(edge, edge, edge, dtype, device, job)
    # what a model of these layers can reach: all operations over all time
    layers = [found["gemm"][name] for name in layer_shapes(job.tiny)]
    found["gemm_ceiling"] = sum(one["flops"] for one in layers) / sum(one["seconds"]["median"] for one in layers)
    for name in ("flash", "cudnn", "varlen"):
        found["attention"][name] = attention_rate(name, job, device, dtype)
    if device.type == "cuda":
        found["link"] = link_rates(device, job)
    return found


def sides_device(job: Job) -> torch.device:
    """The device, without a process group."""
    if job.device == "cuda":
        torch.cuda.set_device(0)
    return torch.device(job.device, 0) if job.device == "cuda" else torch.device("cpu")


def layer_shapes(tiny: bool) -> dict[str, tuple[int, int]]:
    """(in, out) of an 8B layer's four groups of products."""
    s = SHAPES["tiny" if tiny else "8b"]
    size = s.hidden // s.heads
    return {
        "qkv": (s.hidden, (s.heads + 2 * s.kv_heads) * size),
        "o": (s.hidden, s.hidden),
        "gate_up": (s.hidden, 2 * s.intermediate),
        "down": (s.intermediate, s.hidden),
    }


def copy_rate(device: torch.device, size: int, job: Job) -> dict:
    """Bytes per second, read and written, of copies of `size` bytes."""
    sets = turns(lambda _: (torch.randn(size // 4, device=device), torch.empty(size // 4, device=device)), 2 * size, device)
    took = kernel_seconds(rotating(sets), lambda pair: pair[1].copy_(pair[0]), device, job.kernels)
    return {"bytes_per_s": 2 * size / took["median"], "seconds": took}


def gemm_rate(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device, job: Job) -> dict:
    """[m, k] x [n, k]^T of random values."""

    def make(_: int) -> tuple[Tensor, Tensor]:
        return torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)

    sets = turns(make, (m + n) * k * dtype.itemsize, device)
    took = kernel_seconds(rotating(sets), lambda pair: pair[0] @ pair[1].T, device, job.kernels)
    return {"m": m, "k": k, "n": n, "flops": 2 * m * k * n, "flops_per_s": 2 * m * k * n / took["median"], "seconds": took}


def attention_rate(name: str, job: Job, device: torch.device, dtype: torch.dtype) -> dict:
    """Causal attention over four documents of 4096 tokens, 8B heads: FLOP/s forward and backward, or why there are none."""
    s = SHAPES["tiny" if job.tiny else "8b"]
    documents, length, size = (2, 32, s.hidden // s.heads) if job.tiny else (4, 4096, s.hidden // s.heads)
    slots = documents * length
    one = 2 * s.heads * size * length * slots  # half the square, scores and values
    ctx = AttnContext(Borders(slots, torch.arange(documents + 1, device=device, dtype=torch.int32) * length, length), [])

    def make(_: int) -> tuple[Tensor, ...]:
        shapes = [(slots, n, size) for n in (s.heads, s.kv_heads, s.kv_heads)]
        return tuple(torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if name == "varlen":
            return VARLEN(q, k, v, ctx, Kind(), size**-0.5)
        q, k, v = (x.unflatten(0, (documents, length)).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel({"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[name]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)

    sets = turns(make, 3 * slots * s.hidden * dtype.itemsize, device)
    upstream = torch.randn(slots, s.heads, size, device=device, dtype=dtype)
    try:
        forward = kernel_seconds(rotating(sets), lambda qkv: attend(*qkv), device, job.kernels)
        backward = kernel_seconds(
            lambda i: (attend(*sets[i % len(sets)]), sets[i % len(sets)]),
            lambda given: torch.autograd.grad(given[0], given[1], upstream),
            device,
            job.kernels,
        )
    except RuntimeError as error:  # this backend does not take these shapes, or is not in this build
        return {"unavailable": str(error).splitlines()[0]}
    rates = {"forward_flops_per_s": one / forward["median"], "backward_flops_per_s": 2 * one / backward["median"]}
    return rates | {"forward_seconds": forward, "backward_seconds": backward}


def link_rates(device: torch.device, job: Job) -> dict:
    """Bytes per second between pinned host memory and the device."""
    size = 1 << 29
    host, here = torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.empty(size, dtype=torch.uint8, device=device)
    found = {}
    for name, to, source in (("to_device", here, host), ("to_host", host, here)):
        took = kernel_seconds(
            lambda i, pair=(to, source): pair, lambda pair: pair[0].copy_(pair[1], non_blocking=True), device, job.kernels
        )
        found[name] = size / took["median"]
    return found


# -- training steps --------------------------------------------------------------------------------------------------------

Make = Callable[[Work, int, bool], Side]  # (what on, rows of a micro-batch, recompute every block in the backward?)


def gated(job: Job, work: Work, build: Make, device: torch.device) -> dict[str, float]:
    """`sides.gate` of what `build` makes, on short rows of the same shape and kind of documents.

    Raises:
        AssertionError: it computes something else, and is not to be timed.
    """
    small = Work(work.shape, 24 if job.tiny else 384, 2, work.mean and (8 if job.tiny else 96), work.lora)
    errors = sides.gate(lambda two_layers: build(two_layers, two_layers.rows, False), small)
    free(device)
    return errors


def training(job: Job, work: Work, make: Callable[[torch.device], Make], recomputes: bool = True) -> dict:
    """The gate, then steps. All rows of a step go in one micro-batch if that fits without recomputing; else both are measured that
    the memory allows, all rows with recomputation and as many rows as fit without, and the faster one counts. recomputes: can it?"""
    if job.tiny:
        work = sides.Work(SHAPES["tiny"], 32, work.rows, min(work.mean, 8), work.lora)
    with one_rank(job.device) as device:
        build = make(device)
        errors = gated(job, work, build, device)
        tried, best = [], None
        for recompute in (False, True) if recomputes else (False,):
            if recompute and (best is not None and (best["micro_rows"] == work.rows or job.late())):
                break
            found = attempt(job, work, lambda rows, again=recompute: build(work, rows, again), recompute, device, tried)
            free(device)
            if found is not None and (best is None or found["tokens_per_s"]["median"] > best["tokens_per_s"]["median"]):
                best = found
    assert best is not None, f"no micro-batch fits: {tried}"
    return best | {"gate": errors, "tried": tried}


def attempt(job: Job, work: Work, build: Callable[[int], Side], recompute: bool, device: torch.device, tried: list[dict]) -> dict | None:
    """Steps with the largest micro-batch that fits; None if not even one row does. What was tried is added to `tried`.

    It fits if so many steps do that a graph has been recorded, even of one micro-batch a step.
    """
    side, micro = None, work.rows
    while side is None:
        try:
            side = build(micro)
            for _ in range(sides.RECORDED):
                side.step()
        except torch.OutOfMemoryError:
            side = None
        if side is None:  # after the except clause, whose traceback holds the tensors
            free(device)
            tried.append({"micro_rows": micro, "recompute": recompute, "fits": False})
            if micro == 1 or recompute:
                return None
            micro //= 2
    found = measured(job, work, side, micro, device)
    tried.append({"micro_rows": micro, "recompute": recompute, "fits": True, "tokens_per_s": found["tokens_per_s"]["median"]})
    return found | {"micro_rows": micro, "recompute": recompute}


def measured(job: Job, work: Work, side: Side, micro: int, device: torch.device) -> dict:
    """Everything about one side's steps, the timed ones first."""
    took = measure.step_seconds(side.step, device, job.steps)
    seconds = spread(took)
    rate = {"median": work.tokens / seconds["median"], "min": work.tokens / seconds["max"], "max": work.tokens / seconds["min"]}
    per_token = sides.flops_per_token(work)
    found = {
        "tokens": work.tokens,
        "row": work.row,
        "documents": sum(map(len, work.lengths())),
        "mean_length": work.length,
        "step_seconds": seconds,
        "tokens_per_s": rate,
        "flops_per_token": per_token,
        "model_flops_per_s": rate["median"] * per_token,
        "loss": side.step(),
        "memory": peak(side.step, device),
        "under_load": measure.smi(side.step) if device.type == "cuda" else None,
        "report": side.words,
    }
    if device.type == "cuda":
        found["mfu"] = found["model_flops_per_s"] / (flops.peak(torch.cuda.get_device_name(device)) or PEAK)
    try:
        found["breakdown"] = measure.breakdown(side.step, device)
    except RuntimeError as error:  # the profiler needs rights that not every machine gives
        found["breakdown"] = {}
        found["breakdown_unavailable"] = str(error).splitlines()[0]
    found["mb_per_token"] = slope(side, work, micro, device)  # at the end: with other micro-batches a recorded graph is gone
    return found


def slope(side: Side, work: Work, micro: int, device: torch.device) -> float | None:
    """10^6 bytes that one more token of a micro-batch takes, from two sizes. None where there is but one, or no count (CPU)."""
    if micro == 1:
        return None
    held = {}
    for rows in (micro // 2, micro):
        side.cut(rows)
        side.batches = side.batches[:1]
        held[rows] = peak(side.step, device)
    side.cut(micro)
    if held[micro] is None:
        return None
    return (held[micro]["allocated"] - held[micro // 2]["allocated"]) / ((micro - micro // 2) * work.row) / 1e6


def ours(words: str = "") -> Callable[[torch.device], Make]:
    return lambda device: lambda work, rows, again: Ours(work, device, rows, f"{words} {RECOMPUTE if again else ''}")


def graphed(device: torch.device) -> Make:
    if device.type != "cuda":
        raise Unavailable("CUDA graphs need a CUDA device")
    return ours("--kernels.cuda_graph=true")(device)


def theirs(adapters: str = "fp32", liger: bool = False, kernels: str = "") -> Callable[[torch.device], Make]:
    for module in (["liger_kernel.transformers"] if liger else []) + ([kernels] if kernels else []):
        sides.probe(module)
    return lambda device: lambda work, rows, again: Theirs(work, device, rows, adapters, liger, kernels, again)


# -- the table of the LoRA-kernels post ---------------------------------------------------------------------------------------------


def post(job: Job, shape: str) -> dict:
    """Forward and backward apart, and memory above what was there before them, of one row: ours beside peft in either adapter dtype.
    The gate comes first, for all of them."""
    with one_rank(job.device) as device:
        makers = {name: make(device) for name, make in (("ours", ours()), ("peft_fp32", theirs()), ("peft_bf16", theirs("bf16")))}
        works = [Work(SHAPES["tiny" if job.tiny else shape], row, 1) for row in ((16, 32) if job.tiny else (2048, 8192))]
        found = {"gate": {name: gated(job, works[0], build, device) for name, build in makers.items()}}
        for work in works:
            row = work.row
            for name, build in makers.items():
                try:
                    found[f"{name}_{row}"] = halves(build(work, 1, False), device, 3 if job.tiny else POST_TRIALS)
                except torch.OutOfMemoryError:
                    found[f"{name}_{row}"] = {"unavailable": "out of memory"}
                free(device)
            for name in list(makers)[1:]:
                a, b = found[f"ours_{row}"], found[f"{name}_{row}"]
                if "unavailable" not in a | b:
                    found[f"ours_against_{name}_{row}"] = against(a, b)
    return found


def against(ours: dict, theirs: dict) -> dict:
    """How many times as fast, and what share less memory."""
    ratio = {half: theirs[half]["median"] / ours[half]["median"] for half in ("forward", "backward")}
    less = ours["memory"] and {f"{half}_memory": ours["memory"][half] / theirs["memory"][half] - 1 for half in ours["memory"]}
    return ratio | (less or {})


def halves(side: Side, device: torch.device, trials: int) -> dict:
    """Seconds of each half of a step, and the most bytes above what was held before it began."""
    marks, memory = [], {"forward": 0, "backward": 0}
    for i in range(3 + trials):
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        begin = mark(device)
        loss = side.loss(0)
        middle = mark(device)
        side.back(loss)
        marks.append((begin, middle, mark(device)))
        side.clear()
        if i < 3 and device.type == "cuda":  # once more, and looked at in between; warm-up
            for half, work in (("forward", lambda: side.loss(0)), ("backward", lambda: side.back(side.loss(0)))):
                settle(device)
                torch.cuda.reset_peak_memory_stats(device)
                work()
                memory[half] = torch.cuda.max_memory_allocated(device) - before
            side.clear()
    settle(device)
    timed = marks[3:]
    found = {"forward": spread([between(a, b) for a, b, _ in timed]), "backward": spread([between(b, c) for _, b, c in timed])}
    return found | {"memory": memory if device.type == "cuda" else None}


# -- cold start --------------------------------------------------------------------------------------------------------------


def cold_start(job: Job) -> dict:
    """Seconds from the start of the process to the end of its first step, with no compiled kernels from before. Weights are filled on
    the device: what reading them from a disk takes is that disk's."""
    work = Work(SHAPES["tiny" if job.tiny else "8b"], 32 if job.tiny else 2048, 4)
    marks = {"imports": time.time()}
    with one_rank(job.device) as device:
        settle(device)
        marks["device"] = time.time()
        side = Ours(work, device, work.rows, RECOMPUTE)
        settle(device)
        marks["model"] = time.time()
        side.step()
        settle(device)
        marks["first_step"] = time.time()
        side.step()
        settle(device)
        second = time.time() - marks["first_step"]
    return {
        "seconds": marks["first_step"] - job.begun,
        "until": {name: at - job.begun for name, at in marks.items()},
        "second_step": second,
    }


# -- cells -------------------------------------------------------------------------------------------------------------------


def lora(
    row: int, rows: int, make: Callable[[], Callable], mean: int = 0, shape: str = "8b", recomputes: bool = True
) -> Callable[[Job], dict]:
    return lambda job: training(job, Work(SHAPES[shape], row, rows, mean), make(), recomputes)


CELLS = {  # in order of priority
    "ceilings": Cell(25, ceilings),
    "ours_2048": Cell(25, lora(2048, 8, ours)),
    "hf_2048": Cell(45, lora(2048, 8, theirs)),
    "hf_2048_bf16": Cell(45, lora(2048, 8, partial(theirs, "bf16"))),
    "hf_2048_bf16_liger": Cell(40, lora(2048, 8, partial(theirs, "bf16", liger=True))),
    "ours_4096": Cell(25, lora(4096, 4, ours)),
    "ours_8192": Cell(25, lora(8192, 2, ours)),
    "unsloth_2048": Cell(45, lora(2048, 8, partial(theirs, "bf16", kernels="unsloth.kernels"))),
    "axolotl_2048": Cell(45, lora(2048, 8, partial(theirs, "bf16", kernels="axolotl.kernels.lora"))),
    "cold_start": Cell(30, cold_start, fresh=True),
    "ours_8192_documents": Cell(25, lora(8192, 2, ours, mean=600)),
    "post_8b": Cell(60, lambda job: post(job, "8b")),
    "ours_3b_full": Cell(30, lambda job: training(job, Work(SHAPES["3b"], 4096, 2, lora=False), ours())),
    "post_1.7b": Cell(40, lambda job: post(job, "1.7b")),
    "post_135m": Cell(30, lambda job: post(job, "135m")),
    "hf_2048_liger": Cell(40, lora(2048, 8, partial(theirs, liger=True))),
    "hf_4096_bf16": Cell(45, lora(4096, 4, partial(theirs, "bf16"))),
    "ours_135m": Cell(20, lora(2048, 4, ours, shape="135m")),
    "ours_135m_graph": Cell(20, lora(2048, 4, lambda: graphed, shape="135m", recomputes=False)),
    "ours_2048_again": Cell(25, lora(2048, 8, ours), last=True),
}


def main(argv: list[str]) -> int:
    return runner.main("gpu", __doc__.splitlines()[0], CELLS, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
