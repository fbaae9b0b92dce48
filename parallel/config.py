"""The sections that say where and when a step is computed. No torch here: `--help` must stay instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from model.config import KernelsConfig, LoraConfig
from runtime.errors import ConfigError
from runtime.files import expanded


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks share the work. The product of the axes is the number of ranks."""

    shard: Annotated[int, "Ranks that share one copy of the weights (FSDP2); -1 takes all ranks the other axes leave."] = -1
    replicate: Annotated[int, "Copies of the weights, each on `shard` ranks (HSDP); shard = 1 only replicates."] = 1
    context: Annotated[int, "Ranks that share each row of tokens (context parallelism), for long documents."] = 1
    tensor: Annotated[int, "Ranks that share each matrix (tensor and sequence parallelism); keep them within a node."] = 1
    context_method: Annotated[
        Literal["auto", "allgather", "ulysses", "ring"],
        "How context ranks attend to each other's tokens. allgather: keys and values of the row on each, any number of heads; "
        "ring: those of one rank at a time, the least memory; ulysses: exchange tokens for heads, equal work whatever the documents; "
        "auto: ulysses where key heads divide, else allgather.",
    ] = "auto"
    reshard: Annotated[
        Literal["forward", "backward", "step"] | int,
        "When a block's gathered weights are given up: after its forward pass, to be gathered again for the backward (ZeRO-3); after "
        "its backward (ZeRO-2); or at the end of the step, so that accumulation gathers them once. A number: after the forward each "
        "group of so many ranks keeps a whole copy, so that the backward gathers within it.",
        "reshard_after_forward",
        "fsdp_reshard_after_forward",
    ] = "forward"
    prefetch: Annotated[int, "Blocks whose weights are gathered ahead of the one being computed, in either direction."] = 1
    timeout_s: Annotated[float, "Seconds a collective may wait for a missing rank before the run ends."] = 600.0

    def __post_init__(self):
        if self.shard < 1 and self.shard != -1:
            raise ConfigError("must be at least 1, or -1 for all ranks that are left", "shard", self.shard)
        for axis in ("replicate", "context", "tensor"):
            if getattr(self, axis) < 1:
                raise ConfigError("must be at least 1", axis, getattr(self, axis))
        if not isinstance(self.reshard, str) and self.reshard < 2:
            raise ConfigError("must be at least 2; to keep weights whole after the forward pass use 'backward'", "reshard", self.reshard)
        if self.prefetch < 1:
            raise ConfigError("must be at least 1", "prefetch", self.prefetch)
        if not 0 < self.timeout_s <= 1e7:
            raise ConfigError("must be positive and at most 1e7 (116 days)", "timeout_s", self.timeout_s)


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats. Norms, softmax, log-probs and reductions are fp32 in any case."""

    compute: Annotated[
        Literal["auto", "fp32", "bf16"], "Activations, matrix products and frozen weights; auto: bf16 on CUDA, fp32 on CPU."
    ] = "auto"
    masters: Annotated[
        Literal["fp32", "bf16"], "What trains and its optimizer state. bf16 halves their memory and loses small updates."
    ] = "fp32"
    reduce: Annotated[Literal["fp32", "bf16"], "In which FSDP2 sums gradients over ranks. bf16 halves the traffic and rounds the sums."] = (
        "fp32"
    )


WAYS = ("mlp_8bit", "mlp", "full", "offload")  # of recompute.kind = "fit", from the most that is kept to the least


@dataclass(frozen=True)
class RecomputeConfig:
    """Activation checkpointing: trade compute for memory (https://arxiv.org/abs/1604.06174)."""

    kind: Annotated[
        Literal["none", "mlp", "mlp_8bit", "full", "every_n", "selective", "fit", "budget"],
        "full: a block keeps only its input and is computed again in the backward pass; every_n: so is each `every`-th block; "
        "selective: but for the results of the operations in `save`; mlp: the two products of the feed-forward network before its gate are "
        "computed again, which are most of what a block keeps; mlp_8bit: they are kept in 8 bits, rounded; fit: as many blocks as must be "
        "go one of the `ways`, so that what all keep fits `gib`; budget: the compiler keeps `budget` of what it would keep.",
        "gradient_checkpointing",
        "activation_checkpointing",
    ] = "none"
    every: Annotated[int, "every_n: recompute every so many-th block, beginning with the first."] = 2
    save: Annotated[
        tuple[str, ...],
        "selective: what is kept: `attention`, `matmul`, `collectives`, or torch operators such as `aten.mm`, `salamander.varlen`.",
    ] = ("attention",)
    budget: Annotated[
        float, "budget: the part of a block's activations that may be kept, from 0 (all recomputed) to 1. Needs [compile]."
    ] = 0.5
    gib: Annotated[float, "fit: GiB of a rank's memory for what blocks keep; 0: what is left of the GPU."] = 0.0

    ways: Annotated[
        tuple[Literal["mlp_8bit", "mlp", "full", "offload"], ...],
        "fit: what blocks may become, always in this order: mlp_8bit, mlp and full as the kinds of that name; offload: what a block keeps "
        "by the way before waits in host memory.",
    ] = ("mlp", "full")

    def __post_init__(self):
        if not 0 <= self.gib <= 1e6:
            raise ConfigError("must be from 0 to 1e6", "gib", self.gib)
        if self.every < 1:
            raise ConfigError("must be at least 1", "every", self.every)
        if not 0 <= self.budget <= 1:
            raise ConfigError("must be from 0 to 1", "budget", self.budget)
        of_kinds = (("every", "every_n", 2), ("save", "selective", ("attention",)), ("budget", "budget", 0.5), ("gib", "fit", 0.0))
        of_kinds += (("ways", "fit", ("mlp", "full")),)
        for key, kind, default in of_kinds:
            if self.kind != kind and getattr(self, key) != default:
                value = getattr(self, key)
                raise ConfigError(f"is only used by recompute.kind={kind!r}", key, list(value) if isinstance(value, tuple) else value)
        if self.kind == "selective" and not self.save:
            raise ConfigError("names nothing to keep; use recompute.kind='full'", "save", list(self.save))
        if not self.ways:
            raise ConfigError("leaves nothing to choose from; use recompute.kind='none'", "ways", list(self.ways))


@dataclass(frozen=True)
class OffloadConfig:
    """What waits in host memory, or on disk, while the device does not need it."""

    activations: Annotated[
        Literal["none", "hidden_states", "cpu", "disk"],
        "What blocks keep for the backward pass. cpu, disk: all of it; hidden_states: the inputs of recomputed blocks, to host memory.",
        "activation_offloading",
    ] = "none"
    folder: Annotated[str, 'Where `activations = "disk"` writes: a fast local disk. Empty: a temporary folder.'] = ""
    parameters: Annotated[
        bool,
        "Weights, gradients and the optimizer's state lie in host memory, and the optimizer works there (ZeRO-Offload).",
        "offload_params",
    ] = False
    optimizer: Annotated[bool, "The optimizer's state lies in host memory and visits the device a few tensors at a time."] = False
    frozen: Annotated[
        bool,
        "Frozen weights of blocks lie in host memory; the next linear's are fetched while one is computed. One rank.",
        "layer_offloading",
    ] = False

    def __post_init__(self):
        if self.folder and self.activations != "disk":
            raise ConfigError("is only used by offload.activations='disk'", "folder", self.folder)
        if self.parameters and self.optimizer:
            raise ConfigError("is implied by offload.parameters; leave it out", "optimizer", self.optimizer)
        if self.parameters and self.frozen:
            raise ConfigError("is implied by offload.parameters; leave it out", "frozen", self.frozen)

    def place(self) -> str:
        """`folder`, with the home folder for `~`."""
        return str(expanded(self.folder, "offload.folder")) if self.folder else ""


@dataclass(frozen=True)
class TilingConfig:
    """Work through a long row a piece at a time, where pieces need nothing of each other (ALST, https://arxiv.org/abs/2506.13996)."""

    mlp: Annotated[int, "Tokens that the feed-forward network works on at a time; the rest of the row waits. 0: all.", "tiled_mlp"] = 0
    logits_mib: Annotated[int, "Size of the buffer of logits, of which one or two exist at a time. 0: 1024 on CUDA, 64 on the CPU."] = 0

    def __post_init__(self):
        for key in ("mlp", "logits_mib"):
            if getattr(self, key) < 0:
                raise ConfigError("must not be negative", key, getattr(self, key))


@dataclass(frozen=True)
class CompileConfig:
    """torch.compile, block by block, whole graphs only. Absent: not compiled."""

    backend: Annotated[Literal["inductor", "aot_eager", "eager"], "inductor; the others find out where a compilation goes wrong."] = (
        "inductor"
    )
    mode: Annotated[
        Literal["default", "max-autotune-no-cudagraphs"], "max-autotune tries more kernels for products, which takes minutes once."
    ] = "default"

    def __post_init__(self):
        if self.mode != "default" and self.backend != "inductor":
            raise ConfigError("is a mode of compile.backend='inductor'", "mode", self.mode)


class Rows(Protocol):
    tokens: int

    @property
    def longest(self) -> int: ...


class Accumulates(Protocol):
    accumulate: int


class Sections(Protocol):
    """What `parallel/` reads of a run's config, by the names that train.py's RunConfig has."""

    parallel: ParallelConfig
    precision: PrecisionConfig
    kernels: KernelsConfig
    recompute: RecomputeConfig
    offload: OffloadConfig
    tiling: TilingConfig
    compile: CompileConfig | None
    lora: LoraConfig | None
    data: Rows
    train: Accumulates
