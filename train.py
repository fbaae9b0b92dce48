"""A whole training run, top to bottom: `[torchrun ...] train.py --config FILE.toml [--section.key=value ...]`.

Two phases. Before the process group exists, every rank reads the config, the model folder and the data (one rank of a
node tokenizes, the others wait for its cache), nodes compare what they read, and whatever is wrong ends the run in one line.
Then the model is built without memory, transformed, parallelized, and only then materialized; each rank reads its own slices.

A step: take k micro-batches, sum the units of loss over all ranks, run forward and backward of sum / units for each,
clip, check that the update is finite, update. There are no branches on features here: what is off filled nothing.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from data.config import DataConfig, SourceConfig
from model.config import KernelsConfig, LoraConfig, ModelConfig
from objective.config import LmConfig, ObjectiveConfig
from optim.config import AdamWConfig, CosineConfig, OptimConfig, ScheduleConfig
from parallel.config import CompileConfig, OffloadConfig, ParallelConfig, PrecisionConfig, RecomputeConfig, TilingConfig
from runtime.config import flatten, parse_args, to_toml
from runtime.errors import ConfigError, ModelError, UserError, clean
from runtime.files import expanded
from runtime.sections import CheckpointConfig, LogConfig

if TYPE_CHECKING:
    import torch

    from data.batch import Batch
    from data.prepare import Documents
    from data.tokenizer import Tokenizer
    from model.arch import Arch
    from model.decoder import Decoder
    from parallel.mesh import Mesh
    from parallel.start import Launch
    from runtime.checkpoint import Outcome
    from runtime.log import Log


@dataclass(frozen=True)
class RunSection:
    """Where it runs."""

    device: Annotated[Literal["auto", "cpu", "cuda"], "auto: CUDA if there is one, else CPU."] = "auto"
    deterministic: Annotated[bool, "The same bits each time on a GPU too, somewhat slower; an operation that cannot is an error."] = False


@dataclass(frozen=True)
class TrainConfig:
    """How long, and how much a step sees."""

    steps: Annotated[int | None, "Optimizer steps; or give epochs.", "max_steps"] = None
    epochs: Annotated[int | None, "Passes over the data; one if neither steps nor epochs is given.", "num_epochs", "num_train_epochs"] = (
        None
    )
    accumulate: Annotated[
        int, "Micro-batches of a rank in one step; a step sees data.tokens x accumulate x data ranks slots.", "gradient_accumulation_steps"
    ] = 1
    seed: Annotated[int, "Everything random derives from it: initialization, order of the data, dropout."] = 0
    on_nonfinite: Annotated[
        Literal["halt", "skip"],
        "A step whose loss or gradient is not finite, or whose gradient is exactly zero: end the run, or leave the step out.",
    ] = "halt"
    max_skips_in_a_row: Annotated[int, "skip: one more bad step in a row ends the run."] = 3
    max_skips: Annotated[int, "skip: one more bad step in all ends the run."] = 100

    def __post_init__(self):
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("and train.steps are both set; keep one of them", "epochs", self.epochs)
        for key in ("steps", "epochs", "accumulate", "max_skips_in_a_row", "max_skips"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ConfigError("must be at least 1", key, value)
        for key, most in (("accumulate", 10**6), ("epochs", 10**5)):
            if (getattr(self, key) or 0) > most:
                raise ConfigError(f"must be at most {most:,}", key, getattr(self, key))
        if not 0 <= self.seed < 2**31:
            raise ConfigError("must lie between 0 and 2^31 - 1", "seed", self.seed)


@dataclass(frozen=True)
class EvalConfig:
    """Loss on held-out documents; absent: no evaluation."""

    every: Annotated[int, "Evaluate every so many steps, and after the last one; 0: only after the last one."] = 0
    split: Annotated[float, "Held out of data.sources: a fraction below 1, or a number of documents. 0 with sources of its own."] = 0.0
    sources: Annotated[tuple[SourceConfig, ...], "Sources of its own, instead of a split."] = ()
    patience: Annotated[int, "Stop after so many evaluations in a row without improvement; 0: never."] = 0
    min_delta: Annotated[float, "What counts as improvement of the loss."] = 0.0

    def __post_init__(self):
        if bool(self.sources) == bool(self.split):
            raise ConfigError("set exactly one of eval.split and eval.sources", "split", self.split)
        if self.split < 0 or (self.split > 1 and self.split != int(self.split)):
            raise ConfigError("must be a fraction below 1 or a whole number of documents", "split", self.split)
        for key in ("every", "patience", "min_delta"):
            if getattr(self, key) < 0:
                raise ConfigError("must not be negative", key, getattr(self, key))
        if self.patience and not self.every:
            raise ConfigError("needs eval.every, or there is only one evaluation", "patience", self.patience)


@dataclass(frozen=True)
class OutputConfig:
    """Where the run writes."""

    path: Annotated[str, "The run's folder: resolved.toml, metrics.jsonl, logs, checkpoints and export."]
    merge: Annotated[bool, "Of a LoRA run, export full weights with the adapter merged in, instead of the adapter."] = False
    dtype: Annotated[Literal["auto", "fp32", "bf16", "fp16"], "Of exported full weights; auto: the base model's."] = "auto"

    def __post_init__(self):
        if not self.path:
            raise ConfigError("must name a folder, or the run would write among the files of the working directory", "path", self.path)

    @property
    def folder(self) -> Path:
        return expanded(self.path, "output.path")


@dataclass(frozen=True)
class RunConfig:
    """Every key of a run."""

    model: ModelConfig
    data: DataConfig
    output: OutputConfig
    train: TrainConfig = TrainConfig()
    lora: LoraConfig | None = None
    objective: ObjectiveConfig = LmConfig()
    optim: OptimConfig = AdamWConfig()
    schedule: ScheduleConfig = CosineConfig()
    eval: EvalConfig | None = None
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    offload: OffloadConfig = OffloadConfig()
    tiling: TilingConfig = TilingConfig()
    compile: CompileConfig | None = None
    kernels: KernelsConfig = KernelsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    run: RunSection = RunSection()


# What may differ between a checkpoint and the run that resumes it (runtime/checkpoint/drift.py); the first match decides.
DRIFT = (
    ("model.path", "free"),  # its contents count, and they have a fingerprint
    ("model.*", "forbidden"),
    ("lora.dropout", "allow"),
    ("lora.*", "forbidden"),
    ("data.cache", "free"),
    ("data.*", "allow"),
    ("identity.data", "allow"),
    ("objective.*", "allow"),
    ("optim.kind", "forbidden"),
    ("optim.impl", "free"),
    ("optim.*", "allow"),
    ("schedule.*", "allow"),
    ("precision.masters", "forbidden"),
    ("precision.*", "allow"),
    ("train.seed", "allow"),
    ("train.accumulate", "forbidden"),  # a step keeps its packs; at other world sizes it is re-derived, whatever the key says
)

# What ranks may be told differently: where a node keeps its copy of what all have alike (parallel/nodes.py).
LOCAL = ("model.path", "data.cache", "data.sources.*.path", "eval.sources.*.path", "lora.adapter", "offload.folder", "output.path")


@dataclass(frozen=True)
class Inputs:
    """What a run reads before there is a process group."""

    folder: Path
    arch: Arch
    tokenizer: Tokenizer
    documents: Documents
    held_out: Documents | None


def read_inputs(cfg: RunConfig) -> Inputs:
    """Finds the model folder, reads its facts, tokenizes the data into the cache. Whatever is wrong here is the user's to fix."""
    from data.prepare import prepare
    from data.tokenizer import Tokenizer
    from model.arch import Arch
    from model.hub import fetch

    folder = fetch(cfg.model.path, cfg.model.revision)
    arch, tokenizer = Arch.from_folder(folder), Tokenizer.load(folder)

    def read(sources: tuple[SourceConfig, ...]) -> Documents:
        found = prepare(cfg.data, sources, tokenizer, expanded(cfg.data.cache, "data.cache"), cfg.train.seed)
        found.check_vocabulary(arch.vocab_size)
        return found

    documents, held_out = read(cfg.data.sources), None
    if cfg.eval is not None and cfg.eval.sources:
        held_out = read(cfg.eval.sources)
    elif cfg.eval is not None:
        documents, held_out = documents.split(cfg.eval.split, cfg.train.seed)
    return Inputs(folder, arch, tokenizer, documents, held_out)


def identity(cfg: RunConfig, inputs: Inputs) -> dict[str, str]:
    """What must be the same when a checkpoint is resumed, by content: a moved folder is the same model."""
    from model.tensor_folder import fingerprint

    return {
        "model": fingerprint(inputs.folder, weights=cfg.model.init == "pretrained"),
        "tokenizer": inputs.tokenizer.fingerprint,
        "data": inputs.documents.fingerprint,
    }


def settings(cfg: RunConfig) -> dict[str, object]:
    """The keys that all ranks must have alike."""
    return {key: value for key, value in flatten(cfg).items() if not any(fnmatchcase(key, pattern) for pattern in LOCAL)}


def contents(cfg: RunConfig, inputs: Inputs, found: dict[str, str]) -> dict[str, str]:
    """Fingerprints of all that ranks read, each from its own node: `identity`, and what only begins a run or measures it."""
    from model.peft_format import CONFIG, STEM
    from model.tensor_folder import fingerprint

    held_out = inputs.held_out.fingerprint if inputs.held_out else ""
    adapter = cfg.lora and cfg.lora.folder
    there = adapter is not None and os.path.isfile(adapter / CONFIG)  # if not, loading it says so
    found = found | {"held-out data": held_out, "adapter": fingerprint(adapter, True, STEM, CONFIG) if there else ""}
    return {f"fingerprint of {name}": value for name, value in found.items()}


def dtypes(cfg: PrecisionConfig, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """(compute, masters)"""
    import torch

    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": torch.bfloat16 if device.type == "cuda" else torch.float32}
    return names[cfg.compute], names[cfg.masters]


def assemble(cfg: RunConfig, arch: Arch, mesh: Mesh) -> tuple[Decoder, list[str]]:
    """The model as it trains: built on meta, transformed, parallelized. Still without memory. Also what filled its slots."""
    from model import build
    from model.transforms.lora import apply_lora
    from model.transforms.ops import install
    from model.transforms.trainable import apply_trainable
    from parallel.apply import parallelize

    compute, masters = dtypes(cfg.precision, mesh.device)
    net = build(arch)
    net.compute_dtype = compute
    report = [] if cfg.lora is None else [apply_lora(net, cfg.lora)]
    report += install(net, cfg.kernels, mesh.device, compute)
    report.append(apply_trainable(net, cfg.lora, compute, masters))
    report += parallelize(net, mesh, cfg, compute, cfg.data.tokens)
    return net, report


def accumulation(packs_per_step: int, mesh: Mesh) -> int:
    """Micro-batches a rank takes so that each step keeps the packs it had at another world size.

    Raises:
        ConfigError: the packs of a step do not divide.
    """
    if packs_per_step % mesh.data_size:
        each = mesh.size // mesh.data_size  # ranks that share a pack
        works = ", ".join(str(n * each) for n in range(1, packs_per_step + 1) if packs_per_step % n == 0)
        raise ConfigError(
            f"the checkpoint's steps have {packs_per_step} packs, which {mesh.data_size} data ranks cannot share; start {works} ranks"
        )
    return packs_per_step // mesh.data_size


class Meters:
    """Sums since the last log record. The loss stays on the device until it is read; a checkpoint keeps them (`state`)."""

    def __init__(self, mesh: Mesh, loss: float = 0.0, units: int = 0, tokens: int = 0, seconds: float = 0.0):
        import torch

        # the sum of all ranks lies on one of them; what follows is added where it arises
        self.mesh, self.loss = mesh, torch.full((), loss if mesh.leads else 0.0, dtype=torch.float64, device=mesh.device)
        self.units, self.tokens, self.seconds = units, tokens, seconds

    def learned(self, loss: torch.Tensor, units: int) -> None:
        """An update was made. loss: this rank's part of the sum over the `units` of all ranks, fp64."""
        self.loss += loss
        self.units += units

    def add(self, tokens: int, seconds: float) -> None:
        """A step is done, whether anything was learned or not."""
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds

    def state(self) -> dict[str, float]:
        """The sums of all ranks. A collective."""
        loss = self.mesh.sum_over_data(self.loss.clone()).item()
        return {"loss": loss, "units": self.units, "tokens": self.tokens, "seconds": self.seconds}

    def read(self) -> dict[str, float]:
        """Mean loss per unit (NaN if there were none) and tokens per second, over all ranks; then starts anew. A collective."""
        found = self.state()
        self.__init__(self.mesh)
        return {"loss": found["loss"] / found["units"] if found["units"] else math.nan, "tokens_per_s": found["tokens"] / found["seconds"]}


def memory_gib(device: torch.device) -> float:
    """The most memory this process has held so far: allocated on its GPU, or resident on the host."""
    import resource

    import torch

    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak / 2**30


def utilization(net: Decoder, documents: Documents, mesh: Mesh) -> float | None:
    """MFU for each token per second of the whole run; None on devices whose peak is not known."""
    import torch

    from model import flops

    peak = flops.peak(torch.cuda.get_device_name(mesh.device)) if mesh.device.type == "cuda" else None
    lengths = documents.lengths.astype(float)
    return flops.per_token(net, (lengths**2).sum() / lengths.sum()) / (peak * mesh.size) if peak else None


class Reporter:
    """Where numbers go: metrics.jsonl and trackers (rank 0), and the progress line. Resuming drops records of undone steps."""

    def __init__(self, cfg: RunConfig, log: Log, rank: int, state: dict, total: int):
        from runtime.log import Progress
        from runtime.metrics import Metrics

        step = state["step"]
        self.progress, self.metrics = Progress(log, total, step), None
        if rank == 0:
            self.metrics = Metrics(cfg.output.folder, cfg.log.trackers, flatten(cfg), cfg.log.project, cfg.log.name, log)
            self.metrics.rewind(step if step else -1, evaluated=not state["evaluate"])

    def record(self, numbers: dict[str, object]) -> None:
        if self.metrics is not None:
            self.metrics.write(numbers)
        self.progress.report(numbers)

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()


def run(cfg: RunConfig, launch: Launch) -> None:
    """Trains on the ranks of `launch`, from wherever the output folder says the run stands, and exports the result."""
    import torch

    from data.stream import Stream
    from model.safetensors_io import materialize
    from objective import lm
    from objective.evaluate import EarlyStop, each_document, evaluate
    from optim.adamw import build as build_optimizer
    from optim.adamw import choose, set_lr, state_tensors
    from optim.clip import clip
    from optim.schedule import factor
    from parallel import memory, offload
    from parallel.apply import check
    from parallel.context import split
    from parallel.fsdp import last_backward
    from parallel.graph import check_device, micro_step
    from parallel.mesh import Mesh, sizes
    from parallel.nodes import alike, shared
    from parallel.peers import Peers
    from runtime.checkpoint import Checkpointer
    from runtime.checkpoint.store import Store
    from runtime.guard import Guard, upstream
    from runtime.log import Log
    from runtime.metrics import check_trackers
    from runtime.stop import Stop

    # before the process group: what the user can fix, and work on the host
    out = launch.together("output", lambda: cfg.output.folder)
    with ExitStack() as stack:
        axes, _ = launch.together("layout", lambda: (sizes(cfg.parallel, launch.world), check_trackers(cfg.log.trackers)))
        device = launch.together("device", lambda: launch.device(cfg.run.device, cfg.run.deterministic))
        alike(launch, "settings", lambda: settings(cfg), "start all ranks with the same config")
        launch.together("claim", lambda: Store(out).claim() if launch.rank == 0 else None)  # a log that another run writes is not ours
        log = stack.enter_context(launch.together("log", lambda: Log(out, launch.rank)))
        shared(launch, out, "output.path")
        inputs = launch.together("inputs", lambda: read_inputs(cfg), leader_first=True)
        who = launch.together("identity", lambda: identity(cfg, inputs))
        alike(launch, "contents", lambda: contents(cfg, inputs, who), "give every node the same model folder, adapter and data")
        launch.together("shares", lambda: (check(cfg, axes, inputs.arch, cfg.lora), check_device(cfg, device)))
        peers = stack.enter_context(Peers(launch, cfg.parallel.timeout_s, log.last, lambda: remains(out)))
        stack.enter_context(memory.explained(cfg, launch, device, axes, inputs.arch, lambda: bool(Store(out).steps())))
        launch.connect(device, cfg.parallel.timeout_s)
        mesh, stop = Mesh.build(cfg.parallel, device), Stop().install()

        # where the run stands: a step keeps its packs at any world size, so a checkpoint decides the accumulation
        resolved = to_toml(cfg)
        ckpt = Checkpointer(out, cfg.checkpoint, who, resolved, flatten(cfg), rules=DRIFT, layout=mesh.axes, say=log)
        found = ckpt.find()
        state = {"step": 0, "tokens": 0, "packs_per_step": mesh.data_size * cfg.train.accumulate}
        state |= {"evaluate": False}  # did a stop cut an evaluation short at this step?
        state |= {"early": {"best": None, "bad": 0}, "guard": {"in_a_row": 0, "total": 0}}
        state |= {"meters": {"loss": 0.0, "units": 0, "tokens": 0, "seconds": 0.0}}
        state = launch.together("state", lambda: found.state_like(state)) if found else state
        place = {"tokens": cfg.data.tokens, "max_length": cfg.data.longest, "seed": cfg.train.seed}
        place |= {"rank": mesh.data_rank, "size": mesh.data_size}
        stream = Stream(inputs.documents, shuffle=True, accumulate=accumulation(state["packs_per_step"], mesh), **place)
        held_out = Stream(inputs.held_out, shuffle=False, accumulate=1, **place) if inputs.held_out else None
        total = cfg.train.steps or stream.steps(cfg.train.epochs or 1)
        early = EarlyStop(cfg.eval.patience if cfg.eval else 0, cfg.eval.min_delta if cfg.eval else 0.0, **state["early"])
        state["evaluate"] &= held_out is not None
        ended, saved = early.ends or state["step"] >= total, None
        if ended and launch.first("ended", lambda: str(exported(out) == result(cfg, state["step"]))) == "True":
            launch.together("export", lambda: whole(out / "export") if launch.rank == 0 else None)  # it is read once, not by each rank
            return log(f"this run has ended at step {state['step']}; its result is in {out / 'export'}")

        # the model, its optimizer, and what of them is saved
        net, report = launch.together("model", lambda: assemble(cfg, inputs.arch, mesh))
        sources = {"folder": inputs.folder if cfg.model.init == "pretrained" else None, "adapter": cfg.lora and cfg.lora.folder}
        launch.together("weights", lambda: materialize(net, device, cfg.train.seed, **sources))
        trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
        _, chosen = launch.together("optimizer", lambda: choose(trained.values(), cfg.optim))
        opt = offload.optimizer(partial(build_optimizer, trained.items(), cfg.optim), cfg.offload, device)
        kept = {f"model.{name}": p for name, p in trained.items()}
        kept |= {f"optim.{name}": t for name, t in state_tensors(opt, trained.items()).items()}
        if found:
            ckpt.load(found, kept)
            states = ckpt.rng(found)
            launch.together("random state", lambda: restore_random(states, found.path))

        launch.together("records", lambda: begin_records(out, resolved, log) if launch.rank == 0 else None)
        kept_back = ["held out: " + inputs.held_out.report()] if inputs.held_out else []
        data = (inputs.documents.report(), *kept_back, stream.report(), stream.preview(inputs.tokenizer), ckpt.forecast(kept))
        for line in (mesh.describe(), *report, chosen, *data):
            log(line)
        reporter = launch.together("metrics", lambda: Reporter(cfg, log, launch.rank, state, total))
        meters = Meters(mesh, **state["meters"])
        stack.callback(reporter.close)
        guard = Guard(cfg.train, out, ckpt.team, log, lambda: way_back(out), **state["guard"])
        mfu_per_token_s = utilization(net, inputs.documents, mesh)
        eval_loss: dict[int, float] = {}  # by step

        def save() -> Outcome | None:
            now = state | {"early": early.state(), "meters": meters.state(), "guard": guard.state()}
            rng, data = {"cpu": torch.get_rng_state()}, inputs.held_out.fingerprint if inputs.held_out else ""
            return ckpt.save(state["step"], kept, now, rng, guard.healthy, eval_loss.get(state["step"]), data)

        def learn(batch: Batch, units: int) -> torch.Tensor:
            loss = lm.loss(net, batch, units, cfg.objective)
            loss.backward(upstream(loss))
            return loss.detach()

        learn = micro_step(learn, trained.values(), cfg.kernels.cuda_graph)

        def look() -> list[dict]:
            losses = zip(stream.documents(step), each_document(net, micro, mesh.sum_over_context, device, cfg.train.seed))
            packs = [(batch.pack, zip(*found)) for batch, found in zip(micro, losses)]
            return [{"pack": n, "loss": loss, **inputs.documents.about(i, inputs.tokenizer)} for n, pack in packs for i, loss in pack]

        def voted() -> bool:
            return bool(mesh.sum_over_data(torch.tensor([int(stop.requested is not None)]), votes=1))

        def evaluated(step: int) -> bool:
            """False if a rank was asked to stop meanwhile: then the run that goes on from here evaluates."""
            numbers = takewhile(lambda _: not voted(), range(1, held_out.steps_per_epoch + 1))
            batches = (split(held_out.take(s)[0], mesh) for s in numbers)
            found = evaluate(net, batches, inputs.held_out.sources, mesh.sum_over_data, device)
            if voted():
                return False
            reporter.record({"step": step, **found})
            eval_loss[step] = found["eval_loss"]
            early.update(eval_loss[step])
            return True

        net.train()
        if state["evaluate"]:
            state["evaluate"] = not evaluated(state["step"])
            ended = (ended or early.ends) and not state["evaluate"]
        for step in range(state["step"] + 1, total + 1) if not (ended or state["evaluate"]) else ():
            peers.at(step)
            begun, micro = time.monotonic(), [split(batch, mesh) for batch in stream.take(step)]
            counts = torch.tensor([sum(map(lm.count, micro)), sum(batch.filled for batch in micro), stop.requested is not None])
            units, tokens, stopping = mesh.sum_over_data(counts, votes=1).tolist()
            if stopping:
                break
            sums = torch.zeros((), dtype=torch.float64, device=device)
            for i, batch in enumerate(micro):
                lm.seed_dropout(cfg.train.seed, batch.pack)
                last_backward(net, i == len(micro) - 1, cfg.parallel)
                sums += learn(batch.to(device), max(units, 1)) * units
            set_lr(opt, lr := cfg.optim.lr * factor(cfg.schedule, step, total))
            norm = clip(trained.values(), cfg.optim.max_norm, opt).item()  # the step's one wait for the device
            if guard.passes(step, norm, units, look):
                ckpt.before_update()
                opt.step()
                meters.learned(sums, units)
            opt.zero_grad(set_to_none=True)

            state |= {"step": step, "tokens": state["tokens"] + tokens}
            last = step == total
            meters.add(tokens, time.monotonic() - begun)
            reporter.progress.step(step)
            if step % cfg.log.every == 0 or last:
                numbers = meters.read() | {"grad_norm": norm, "lr": lr, "tokens": state["tokens"], "epoch": step / stream.steps_per_epoch}
                numbers |= guard.numbers()
                if mfu_per_token_s:
                    numbers["mfu"] = numbers["tokens_per_s"] * mfu_per_token_s
                reporter.record({"step": step, **numbers, "memory_gib": memory_gib(device)})
            if held_out and (last or (cfg.eval.every and step % cfg.eval.every == 0)):
                state["evaluate"] = not evaluated(step)
            ended = (last or early.ends) and not state["evaluate"]
            ckpt.poll()
            if ckpt.due(step) or ended:
                saved = save()
            if ended or state["evaluate"]:
                break

        # a stop between checkpoints is saved too; only a run that ended has a result
        saved = save() if state["step"] and not ended else saved
        while (landed := ckpt.wait()) is not None:
            saved = landed
        unsaved = f"step {state['step']}, whose checkpoint was {saved.problem}" if saved and saved.path is None else ""
        if not ended:
            if unsaved:
                raise NotSaved(f"stopped by request after {unsaved}")
            return log(f"stopped by request after step {state['step']}; the same command resumes")
        export(cfg, inputs, net, mesh, stream.take(1)[0], log)
        told = json.dumps(result(cfg, state["step"])) + "\n"
        untold = launch.first("result", lambda: unwritten(out / "result.json", told))
        if unsaved or untold:
            raise NotSaved(f"the result is exported after {unsaved}" if unsaved else f"the result is exported, but {untold}")


def restore_random(states: dict[str, torch.Tensor] | None, path: Path) -> None:
    """This rank's random state as it was saved; None: the checkpoint has none for this layout. Masks do not depend on it."""
    import torch

    try:
        if states is not None:
            torch.set_rng_state(states["cpu"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"holds a random state that is not one of ours: {clean(error)}", path) from None


def unwritten(path: Path, text: str) -> str:
    """Writes a file of the run's folder; why it could not, or nothing."""
    from runtime.files import replace_text

    try:
        replace_text(path, text)
    except OSError as error:
        return f"{path} cannot be written ({error.strerror})"
    return ""


def begin_records(out: Path, resolved: str, log: Log) -> None:
    """resolved.toml, without which a run goes on; and no result.json, as an export that lies there is of an earlier run."""
    if problem := unwritten(out / "resolved.toml", resolved):
        log(f"{problem}; checkpoints have a copy")
    try:
        if os.path.lexists(out / "result.json"):
            (out / "result.json").unlink()
    except OSError as error:
        raise ModelError(
            f"cannot be removed ({error.strerror}): it tells of an earlier export; move it away", out / "result.json"
        ) from None


class NotSaved(UserError):
    """The disk did not take the last checkpoint of a run that went on without it, or what says that it has ended."""

    exit_code = 1


def remains(out: Path) -> str:
    """What is there when a run ends before its time."""
    from runtime.checkpoint.store import Store

    newest = next(iter(Store(out).complete()), None)
    return f"the newest complete checkpoint is {newest}; the same command resumes" if newest else "there is no checkpoint yet"


def way_back(out: Path) -> str:
    """Where a run whose weights may be broken can go back to."""
    from runtime.checkpoint.store import Store

    newest = next(iter(Store(out).healthy()), None)
    return f"the newest healthy checkpoint is {newest}" if newest else "there is no healthy checkpoint yet"


def result(cfg: RunConfig, step: int) -> dict[str, object]:
    """What an export is of; result.json says so."""
    return {"export": "export", "step": step, "merge": cfg.output.merge, "dtype": cfg.output.dtype}


def exported(out: Path) -> dict[str, object] | None:
    """What the export folder holds (see `result`), None if it holds nothing."""
    from runtime.checkpoint.store import read_small

    if not (out / "export").is_dir():
        return None
    try:
        return json.loads(read_small(out / "result.json", 1 << 16))
    except (OSError, ValueError, RecursionError):
        return None


def whole(folder: Path) -> None:
    """Raises:
    ModelError: an export is not what was written there.
    """
    from model.tensor_folder import damage

    if problem := damage(folder):
        raise ModelError(f"is not what this run wrote: {problem}; move it away, and the same command writes it again", folder)


def export(cfg: RunConfig, inputs: Inputs, net: Decoder, mesh: Mesh, like: Batch, log: Log) -> None:
    """Writes the result. Before it appears under its name it is read back and compared with the live model, byte by byte and by
    what both say to a few documents in a row of the shape of `like` (model/probe.py)."""
    import torch

    from model import probe
    from model.safetensors_io import export_adapter, export_full
    from objective.evaluate import logprobs, room, with_row
    from parallel.context import split

    out, row = cfg.output.folder / "export", probe.row(inputs.arch.vocab_size, *room(like))
    live = logprobs(net, split(with_row(like, row), mesh), mesh.sum_over_context, mesh.device)[: row.tokens.numel()]
    pretrained = cfg.model.init == "pretrained"
    if cfg.lora is not None and not cfg.output.merge:
        check = probe.same(net, row, live, base=inputs.folder) if pretrained else probe.same_adapter_headers(net)
        export_adapter(net, out, cfg.lora, cfg.model.path, tokenizer=inputs.folder, overwrite=True, check=check)
        use = f"--model {cfg.model.path} --adapter {out}" if pretrained else ""
    else:
        dtype = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.output.dtype]
        export_full(net, out, inputs.folder, dtype=dtype, overwrite=True, check=probe.same(net, row, live))
        use = f"--model {out}"
    log(f"exported to {out}, loaded again and compared" + (f"\ntry it: python -m tools.generate {use} --chat 'Hello'" if use else ""))


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0 finished or stopped on request, 2 a user's error, 1 steps that cannot be taken
    or a last checkpoint that no disk took."""
    argv = sys.argv[1:] if argv is None else argv
    if {"--help", "-h"} & set(argv):
        parse_args(RunConfig, argv, prog="train.py")  # prints and ends, without importing torch
    launch = dist = None
    try:
        import torch.distributed as dist

        from parallel.start import Launch

        launch = Launch()
        cfg = launch.together("config", lambda: parse_args(RunConfig, argv, prog="train.py"))
        run(cfg, launch)
        return 0
    except UserError as error:
        if launch is None:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        return launch.report(error)
    except KeyboardInterrupt:  # before there is anything to save; later a signal only asks (runtime/stop.py)
        return 130
    finally:
        if dist is not None and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
