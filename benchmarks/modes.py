"""What each way to spread or to shrink a training step costs, beside the plain step of the same run.

    python -m benchmarks.modes [--quick] [--only NAME ...] [--device cpu|cuda] [--compile] [--out FILE.json]

A cell is a mode: some keys of a config on top of those of the plain step (MODES; a new mode is a line). Its ranks are forked, and each
builds two models of the same weights, the plain one by itself and the mode's with the others. They take whole steps (forward, backward,
clipping, optimizer) over the same rows in turns, A B A B, and each round gives a ratio; the median is reported, and the quartiles
beside it. While the plain step is timed, every rank takes it, so that the cores and caches are as busy for one side as for the
other. Before that, the losses and gradient norms of both sides must be equal, in every round; otherwise the cell fails.

    time        CPU seconds of all ranks (on CUDA: seconds times ranks) for the rows of a step, in units of the plain step,
                which does them on one rank. 1 is the ideal on any number of ranks; what is above is the price of the mode.
    wall        the same of wall seconds
    memory      bytes of a rank at the fullest moment of a step, in the same units. CPU: by the ledger of runtime/memory.py, which
                leaves out what a GPU would have in host memory or on disk, and cannot look into compiled blocks; CUDA: by the
                allocator
    received    bytes that a rank receives in a step, for each token of the step

On CUDA each rank has a GPU of its own, and NCCL connects them. The learning rate is 0: steps do all their work and the weights stay, so
that rounds can be compared. `--compile` adds the modes that compile, which takes a minute each on a CPU; on CUDA they are always there.
`--quick` makes everything tiny: it shows that the benchmark works, its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.cpu import log_normal, machine, versions
from data.batch import IGNORE, Batch
from model.arch import Arch
from model.safetensors_io import materialize
from model.transforms.lora import is_adapter
from model.weights import generator, local, region
from objective import lm
from optim.adamw import build
from optim.clip import clip
from parallel import offload, transfer
from parallel.apply import check
from parallel.context import RECEIVED, split
from parallel.fsdp import last_backward
from parallel.local import RankFailed, apart, run
from parallel.mesh import AXES, Mesh
from runtime.config import load
from runtime.memory import Ledger
from train import RunConfig, assemble

WARM_UP = 3  # steps of each side before one is timed
ROWS = 4  # of a step that several ranks share; a step of one rank has one row, twice as long
# relative errors of the loss and of the gradients' norm. bf16, in which CUDA computes, rounds sums that are cut elsewhere
BOUNDS = {"cpu": (1e-5, 1e-4), "cuda": (2e-3, 2e-2)}


@dataclass(frozen=True)
class Mode:
    """words: what it sets, as on a command line ({tile}: a quarter of a row); base: what the plain step has, too; ranks: how many
    share the work."""

    words: str
    base: str = ""
    ranks: int = 1
    compiles: bool = False


LORA = "--lora.rank=16 --lora.alpha=32"
COMPILE = "--compile.backend=inductor"
MODES = {
    "nothing": Mode(""),
    "recompute_full": Mode("--recompute.kind=full"),
    "recompute_every_n": Mode("--recompute.kind=every_n"),
    "recompute_selective": Mode("--recompute.kind=selective"),
    "recompute_selective_matmul": Mode('--recompute.kind=selective --recompute.save=["attention","matmul"]'),
    "recompute_budget": Mode("--recompute.kind=budget", COMPILE, compiles=True),
    "offload_activations_cpu": Mode("--offload.activations=cpu"),
    "offload_activations_disk": Mode("--offload.activations=disk"),
    "offload_hidden_states": Mode("--offload.activations=hidden_states", "--recompute.kind=full"),
    "offload_optimizer": Mode("--offload.optimizer=true"),
    "offload_parameters": Mode("--offload.parameters=true"),
    "offload_frozen": Mode("--offload.frozen=true", LORA),
    "tiling_mlp": Mode("--tiling.mlp={tile}"),
    "compile": Mode(COMPILE, compiles=True),
    "shard_2": Mode("--parallel.shard=2", ranks=2),
    "shard_4": Mode("--parallel.shard=4", ranks=4),
    "replicate_2": Mode("--parallel.replicate=2", ranks=2),
    "replicate_4": Mode("--parallel.replicate=4", ranks=4),
    "replicate_2_shard_2": Mode("--parallel.replicate=2 --parallel.shard=2", ranks=4),
    "reshard_backward_2": Mode("--parallel.shard=2 --parallel.reshard=backward", ranks=2),
    "reshard_backward_4": Mode("--parallel.shard=4 --parallel.reshard=backward", ranks=4),
    "reshard_step_2": Mode("--parallel.shard=2 --parallel.reshard=step", ranks=2),
    "reshard_2_of_4": Mode("--parallel.shard=4 --parallel.reshard=2", ranks=4),
    "context_allgather_2": Mode("--parallel.context=2 --parallel.context_method=allgather", ranks=2),
    "context_allgather_4": Mode("--parallel.context=4 --parallel.context_method=allgather", ranks=4),
    "context_ulysses_2": Mode("--parallel.context=2 --parallel.context_method=ulysses", ranks=2),
    "context_ulysses_4": Mode("--parallel.context=4 --parallel.context_method=ulysses", ranks=4),
    "context_ring_2": Mode("--parallel.context=2 --parallel.context_method=ring", ranks=2),
    "context_ring_4": Mode("--parallel.context=4 --parallel.context_method=ring", ranks=4),
    "tensor_2": Mode("--parallel.tensor=2", ranks=2),
    "tensor_4": Mode("--parallel.tensor=4", ranks=4),
}


@dataclass(frozen=True)
class Size:
    """Of the model, of a row (tokens), and of the measurement (rounds)."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tokens: int
    rounds: int


SIZES = {"cpu": Size(128, 8, 8, 4, 2048, 1024, 11), "cuda": Size(2048, 16, 16, 8, 32768, 4096, 11)}
QUICK = Size(64, 2, 4, 4, 320, 64, 2)


# -- what is trained -------------------------------------------------------------------------------------------------------


def arch_of(size: Size, folder: Path) -> Arch:
    """A llama, from the config.json that this writes."""
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "intermediate_size": size.hidden * 11 // 4,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": 4 * size.tokens,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "initializer_range": 0.05,
    }
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    return Arch.from_folder(folder)


def config(folder: Path, tokens: int, device: str, words: str) -> RunConfig:
    """A run's config with these words on its command line."""
    file = folder / "config.toml"
    file.write_text(
        f'[model]\npath = "{folder}"\ninit = "random"\n[output]\npath = "{folder}/run"\n[run]\ndevice = "{device}"\n'
        f'[data]\ntokens = {tokens}\nmax_length = {tokens // 2}\n[[data.sources]]\npath = "{folder}/none.jsonl"\nformat = "tokenized"\n'
        "[optim]\nlr = 0.0\n",
        encoding="utf-8",
    )
    return load(RunConfig, file, words.format(tile=tokens // 4).split())


def rows(count: int, tokens: int, vocab: int) -> list[Batch]:
    """Full rows of documents of log-normal length, all learned."""
    made, draws = [], torch.Generator().manual_seed(0)
    for number in range(count):
        drawn = torch.tensor(log_normal(64, tokens / 6, 0.6, tokens // 2, seed=number)).cumsum(0)
        borders = torch.cat([torch.zeros(1, dtype=torch.int64), drawn.clamp(max=tokens)])
        assert borders[-1] == tokens and borders.diff().max() <= tokens // 2
        starts = borders[:-1][borders.diff() > 0]
        ids = torch.randint(3, vocab, (tokens,), generator=draws)
        labels = torch.cat([ids[1:], torch.tensor([IGNORE])])
        labels[starts[1:] - 1] = IGNORE
        positions = torch.arange(tokens) - starts[torch.searchsorted(starts, torch.arange(tokens), right=True) - 1]
        made.append(Batch(ids, labels, positions.int(), borders.int(), tokens // 2, number, tokens))
    return made


# -- one of the two sides --------------------------------------------------------------------------------------------------


class Alone(Mesh):
    """A mesh of size 1, of which every rank has one. Sums are its own."""

    @classmethod
    def build(cls, cfg, device: torch.device) -> Alone:
        world = (dist.get_world_size(), 1, 1, 1)
        weights = init_device_mesh(device.type, world, mesh_dim_names=("ranks", "replicate", "fsdp", "tensor"))
        tokens = init_device_mesh(device.type, world, mesh_dim_names=("ranks", "data", "context", "tensor"))
        return cls(weights["replicate", "fsdp", "tensor"], tokens["data", "context", "tensor"], dict.fromkeys(AXES, 1), device)

    def sum_over_data(self, values: Tensor, votes: int = 0) -> Tensor:
        return values


class Side:
    """A model with its optimizer and this rank's rows, warmed up."""

    def __init__(self, cfg: RunConfig, arch: Arch, mesh: Mesh, whole: list[Batch]):
        self.cfg, self.mesh, self.device = cfg, mesh, mesh.device
        check(cfg, mesh.axes, arch, cfg.lora)
        self.units = sum(map(lm.count, whole))
        self.micro = [split(row, mesh) for row in whole[mesh.data_rank :: mesh.data_size]]
        self.buffers: list[Tensor] = []  # in host memory, where activations wait
        if self.device.type == "cpu":  # on CUDA the allocator tells host from device, and may take memory as it does in a run
            transfer.observers[:] = [self.buffers.append]
        self.before = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
        self.net, _ = assemble(cfg, arch, mesh)
        materialize(self.net, self.device, 0, None)
        self.trained = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, p in self.trained.items():  # B starts at zero, and products with zeros are cheap
                if is_adapter(name):
                    local(p).copy_((torch.randn(p.shape, generator=generator(1, name)) * 0.02)[region(p)])
        self.opt = offload.optimizer(partial(build, self.trained.items(), cfg.optim), cfg.offload, self.device)
        self.net.train()
        for _ in range(WARM_UP):
            self.step()

    def step(self, ledger: Ledger | None = None, before_update: Callable[[], None] = lambda: None) -> tuple[float, float]:
        """A step as train.py takes it: (loss, norm of the gradients)."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, batch in enumerate(self.micro):
            last_backward(self.net, i == len(self.micro) - 1, self.cfg.parallel)
            loss = lm.loss(self.net, batch.to(self.device), self.units)
            loss.backward()
            total += loss.detach()
        if ledger is not None and self.cfg.offload.parameters:
            ledger.tag("host", [p.grad for p in self.trained.values()])
        norm = clip(self.trained.values(), self.cfg.optim.max_norm, self.opt)
        before_update()
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        return self.mesh.sum_over_data(total).item(), norm.item()

    def timed(self) -> tuple[float, float, float, float]:
        """(wall seconds, CPU seconds, loss, norm) of a step that all ranks begin together."""
        self._settle()
        dist.all_reduce(torch.zeros(1))
        wall, cpu = time.perf_counter(), time.process_time()
        found = self.step()
        self._settle()
        return (time.perf_counter() - wall, time.process_time() - cpu, *found)

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def held(self) -> tuple[int | None, int | None]:
        """(bytes of this rank at the fullest moment of a step, bytes that it receives in one); None: not known."""
        peak = received = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step()
            peak = torch.cuda.max_memory_allocated() - self.before
        if self.cfg.compile is None:
            with Ledger(RECEIVED) as ledger, ledger.saving():
                ledger.tag("parameters", self.net.parameters())
                ledger.tag("optimizer", [t for tensors in self.opt.state.values() for t in tensors.values()])
                self.step(ledger)
                ledger.mark("step")
            ledger.tag("host", self.at_home())
            received = sum(ledger.traffic.values())
            if peak is None:
                peak = sum(size for kind, size in ledger.peak("step").items() if kind != "host")
        return peak, received

    def at_home(self) -> Iterator[Tensor]:
        """What a GPU's host would hold between two steps."""
        yield from (p for name, p in self.net.named_parameters() if name in self.net.on_host)
        if self.cfg.offload.optimizer or self.cfg.offload.parameters:
            yield from (t for tensors in self.opt.state.values() for t in tensors.values())
        yield from self.buffers


def gate(want: tuple[float, float], found: tuple[float, float], bounds: tuple[float, float]) -> None:
    """A mode that computes something else is not timed."""
    for what, a, b, bound in zip(("loss", "gradient norm"), want, found, bounds):
        assert a > 0.1 and abs(b / a - 1) <= bound, f"the {what} is {b}, the plain step has {a}"


def measure(
    rank: int, world: int, device_type: str, arch: Arch, plain: RunConfig, mode: RunConfig, whole: list[Batch], rounds: int
) -> dict:
    """What this rank saw of both sides: (wall, CPU) seconds of each round, and what they held."""
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)  # cuBLAS's own memory belongs to neither side
    a = Side(plain, arch, Alone.build(plain.parallel, device), whole)
    held = {"plain": a.held()}
    b = Side(mode, arch, Mesh.build(mode.parallel, device), whole)
    held["mode"] = b.held()
    took = {"plain": [], "mode": []}
    for _ in range(rounds):
        one, other = a.timed(), b.timed()
        gate(one[2:], other[2:], BOUNDS[device.type])
        took["plain"].append(one[:2])
        took["mode"].append(other[:2])
    return {"took": took, "held": held, "losses": (one[2], other[2])}


# -- cells -----------------------------------------------------------------------------------------------------------------


def ratios(took: list[dict[str, list[tuple[float, float]]]]) -> tuple[list[float], list[float]]:
    """What the mode's step takes of all ranks, in units of what the plain one takes of one, round by round: by wall time, by CPU time.

    took: of each rank, for either side (wall, CPU) seconds of each round. The ranks are as fast as the slowest of them.
    """
    walls, cpus = [], []
    for plain, mode in zip(*(zip(*(rank[side] for rank in took)) for side in ("plain", "mode"))):
        walls.append(len(took) * max(wall for wall, _ in mode) / max(wall for wall, _ in plain))
        cpus.append(sum(cpu for _, cpu in mode) / statistics.mean(cpu for _, cpu in plain))
    return walls, cpus


def cell(mode: Mode, size: Size, device: str, folder: Path) -> dict:
    """The numbers of a mode, from what its ranks saw."""
    count, tokens = (1, 2 * size.tokens) if mode.ranks == 1 else (ROWS, size.tokens)
    arch = arch_of(size, folder)
    plain, changed = (config(folder, tokens, device, words) for words in (mode.base, f"{mode.base} {mode.words}"))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    work = (device, arch, plain, changed, rows(count, tokens, size.vocab), size.rounds)
    seen = run(measure, mode.ranks, *work, timeout=900.0, backend=backend)
    walls, cpus = ratios([rank["took"] for rank in seen])
    held = {side: [rank["held"][side] for rank in seen] for side in ("plain", "mode")}
    peaks = [None if None in (found := [peak for peak, _ in each]) else max(found) for each in held.values()]
    received = [n for _, n in held["mode"]]
    low, middle, high = statistics.quantiles(cpus if device == "cpu" else walls, n=4)
    return {
        "ranks": mode.ranks,
        "sets": mode.words.format(tile=tokens // 4),
        "both": mode.base,
        "time_ratio": middle,
        "time_quartiles": [low, high],
        "wall_ratio": statistics.median(walls),
        "memory_ratio": None if None in peaks else peaks[1] / peaks[0],
        "received_bytes_per_token": None if None in received else max(received) / (count * tokens),
        "rows": count,
        "row_tokens": tokens,
        "rounds": size.rounds,
        "losses": seen[0]["losses"],
        "plain_seconds": statistics.median(wall for wall, _ in seen[0]["took"]["plain"]),
        "plain_cpu_seconds": statistics.median(cpu for _, cpu in seen[0]["took"]["plain"]),
        "plain_peak_mib": None if peaks[0] is None else peaks[0] / 2**20,
    }


def table(found: dict[str, dict]) -> str:
    def number(x: float | None, form: str) -> str:
        return "-" if x is None else format(x, form)

    lines = [f"{'mode':<28}{'ranks':>5}  {'time':>5} {'(quartiles)':<13}{'wall':>6}{'memory':>8}{'received':>10}"]
    for name, numbers in found.items():
        if "time_ratio" not in numbers:
            lines.append(f"{name:<28}{numbers['ranks']:>5}  {numbers.get('skipped') or 'FAILED: ' + numbers['failed']}")
            continue
        low, high = numbers["time_quartiles"]
        shown = [number(numbers["memory_ratio"], ".2f"), number(numbers["received_bytes_per_token"], ".0f")]
        lines.append(
            f"{name:<28}{numbers['ranks']:>5}  {numbers['time_ratio']:>5.2f} {f'({low:.2f}-{high:.2f})':<13}{numbers['wall_ratio']:>6.2f}"
            f"{shown[0]:>8}{shown[1]:>10}"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    options = argparse.ArgumentParser(prog="python -m benchmarks.modes", description=__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="tiny sizes: shows that the benchmark works")
    options.add_argument("--only", nargs="+", choices=MODES, default=list(MODES), metavar="NAME", help=", ".join(MODES))
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--compile", action="store_true", help="on a CPU, too, modes that compile")
    options.add_argument("--out", type=Path, help="also write machine, versions and results to this file")
    args = options.parse_args(argv)
    size, facts = QUICK if args.quick else SIZES[args.device], machine()
    if args.device == "cuda":  # asked in forks: ranks that are forked later may not have a parent that uses CUDA
        if not (gpus := apart(torch.cuda.device_count)):
            options.error("--device cuda: there is no CUDA device here")
        facts["gpu"] = apart(torch.cuda.get_device_name)
    head = {"command": " ".join(["python -m benchmarks.modes", *argv]), "date": date.today().isoformat(), "machine": facts}
    head |= {"versions": versions(("torch", "numpy")), "size": vars(size)}
    found = {}
    for name in args.only:
        mode = MODES[name]
        if mode.compiles and args.device == "cpu" and not args.compile:
            continue
        try:
            with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
                if args.device == "cuda" and mode.ranks > gpus:
                    found[name] = {"ranks": mode.ranks, "skipped": f"needs {mode.ranks} GPUs, and here are {gpus}"}
                else:
                    found[name] = cell(mode, size, args.device, Path(folder))
        except RankFailed as error:
            found[name] = {"ranks": mode.ranks, "failed": str(error).strip().splitlines()[-1]}
            print(error, file=sys.stderr)
        print(json.dumps({"cell": name, **found[name]}), flush=True)
        if args.out:  # after each, so that a run that is ended leaves what it has
            head["load_at_the_end"] = machine()["load"]
            args.out.write_text(json.dumps({**head, "cells": found}, indent=1) + "\n", encoding="utf-8")
    print("\n" + table(found))
    return int(any("failed" in numbers for numbers in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
