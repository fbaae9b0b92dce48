"""The `[model]`, `[lora]` and `[kernels]` sections. No torch here: `--help` must stay instant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from runtime.errors import ConfigError
from runtime.files import expanded

MOST_RANK = 65536  # no linear of a model we read has a smaller side above it: a larger rank adds memory and nothing else


@dataclass(frozen=True)
class ModelConfig:
    """The model to start from."""

    path: Annotated[str, "A folder in Hugging Face layout, or a hub id such as `meta-llama/Llama-3.1-8B`."] = ""
    revision: Annotated[str, "Branch, tag or commit of a hub id."] = "main"
    init: Annotated[Literal["pretrained", "random"], "Weights: the folder's, or fresh ones of the shape in its config.json."] = "pretrained"

    def __post_init__(self):
        if not self.path:
            raise ConfigError("is needed: a model folder or a hub id", "path")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen weights (arXiv 2106.09685). Without this section everything trains."""

    rank: Annotated[int, "Rank of the update.", "lora_r"] = 16
    alpha: Annotated[float, "The update is scaled by alpha / rank.", "lora_alpha"] = 32.0
    dropout: Annotated[float, "Dropout on the adapter's input while training.", "lora_dropout"] = 0.0
    targets: Annotated[
        str | tuple[str, ...],
        "Which linears get an adapter: `all-linear` (all but the head), or leaf names (`q_proj`) and patterns over full names "
        "(`model.layers.[0-3].mlp.*`). One that matches nothing is an error.",
    ] = "all-linear"
    train_modules: Annotated[
        tuple[str, ...], "Modules trained in full beside the adapters, by leaf name or pattern: `embed_tokens`, `lm_head`, `norm`."
    ] = ()

    adapter: Annotated[str | None, "Start from this adapter (a folder in PEFT layout, of the same rank, alpha and targets)."] = None

    def __post_init__(self):
        if not 1 <= self.rank <= MOST_RANK:
            raise ConfigError(f"must be from 1 to {MOST_RANK}", "rank", self.rank)
        if not 0 < self.alpha < float("inf"):
            raise ConfigError("must be positive", "alpha", self.alpha)
        if not 0 <= self.dropout < 1:
            raise ConfigError("must be at least 0 and below 1", "dropout", self.dropout)
        if not self.targets:
            raise ConfigError("names nothing; use `all-linear` or leave out the section", "targets", self.targets)
        if self.adapter == "":
            raise ConfigError("must name a folder; leave it out to start from fresh adapters", "adapter", "")

    @property
    def folder(self) -> Path | None:
        """Where `adapter` lies."""
        return expanded(self.adapter, "lora.adapter") if self.adapter else None


@dataclass(frozen=True)
class KernelsConfig:
    """Which implementation computes an operation."""

    attention: Annotated[
        Literal["auto", "sdpa", "varlen", "triton"],
        "varlen: by document borders, memory grows with the row (CUDA: bf16 or fp16); triton: the same with a kernel of our own, "
        "on CUDA, fp32 too and head sizes that are no multiple of 8; sdpa: any device and dtype, holds a mask of row x row; auto: the "
        "first of varlen, triton and sdpa that can compute the model.",
    ] = "auto"
    blocks: Annotated[
        Literal["auto", "fused", "separate"],
        "fused: queries, keys and values, the output projection and the feed-forward network are one function each, with adapters, that "
        "keeps only what its backward needs; separate: one operation after the other, for comparison; auto: fused where it can be.",
    ] = "auto"
    norm: Annotated[Literal["auto", "torch", "triton"], "RMSNorm. For this and those below, auto: triton on CUDA, else torch."] = "auto"
    rope: Annotated[Literal["auto", "torch", "triton"], "Rotary embedding, with norms of heads where the model has them."] = "auto"
    glu: Annotated[Literal["auto", "torch", "triton"], "The gate of the feed-forward network."] = "auto"
    head: Annotated[Literal["auto", "torch", "triton"], "Log-sum-exp over the vocabulary and its derivative."] = "auto"
    dropout: Annotated[Literal["auto", "torch", "triton"], "Dropout on the input of adapters."] = "auto"
    cuda_graph: Annotated[
        bool, "Record forward and backward of a micro-batch once and replay them: for small models on one GPU, which the host slows down."
    ] = False
