"""The `[parallel]`, `[precision]` and `[recompute]` sections. No torch here: `--help` must stay instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from runtime.errors import ConfigError


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks share the work. The product of the axes is the number of ranks."""

    shard: Annotated[int, "Ranks that share one copy of the weights (FSDP2); -1 takes all ranks the other axes leave."] = -1
    replicate: Annotated[int, "Copies of the weights, each on `shard` ranks (HSDP); shard = 1 only replicates."] = 1
    context: Annotated[int, "Ranks that share each row of tokens (context parallelism), for long documents."] = 1
    tensor: Annotated[int, "Ranks that share each matrix (tensor and sequence parallelism); keep them within a node."] = 1
    context_method: Annotated[
        Literal["auto", "allgather", "ulysses"],
        "How context ranks attend to each other's tokens. allgather: keys and values of the row on each, any number of heads; "
        "ulysses: exchange tokens for heads, equal work whatever the documents; auto: ulysses where key heads divide, else allgather.",
    ] = "auto"
    timeout_s: Annotated[float, "Seconds a collective may wait for a missing rank before the run ends."] = 600.0

    def __post_init__(self):
        if self.shard < 1 and self.shard != -1:
            raise ConfigError("must be at least 1, or -1 for all ranks that are left", "shard", self.shard)
        for axis in ("replicate", "context", "tensor"):
            if getattr(self, axis) < 1:
                raise ConfigError("must be at least 1", axis, getattr(self, axis))
        if self.timeout_s <= 0:
            raise ConfigError("must be positive", "timeout_s", self.timeout_s)


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats. Norms, softmax, log-probs and reductions are fp32 in any case."""

    compute: Annotated[
        Literal["auto", "fp32", "bf16"], "Activations, matrix products and frozen weights; auto: bf16 on CUDA, fp32 on CPU."
    ] = "auto"
    masters: Annotated[
        Literal["fp32", "bf16"], "What trains and its optimizer state. bf16 halves their memory and loses small updates."
    ] = "fp32"


@dataclass(frozen=True)
class RecomputeConfig:
    """Activation checkpointing: trade compute for memory."""

    kind: Annotated[
        Literal["none", "full"],
        "full keeps only the input of each block and computes the block again in the backward pass.",
        "gradient_checkpointing",
        "activation_checkpointing",
    ] = "none"
