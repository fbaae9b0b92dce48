"""A config schema with every kind of field, small enough to write out in a test."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from runtime.errors import ConfigError


@dataclass(frozen=True)
class Model:
    """The model to start from."""

    path: Annotated[str, "A model folder."]
    init: Annotated[Literal["pretrained", "random"], "Where weights come from."] = "pretrained"
    revision: Annotated[str | None, "Branch or tag."] = None


@dataclass(frozen=True)
class Columns:
    """How columns are called."""

    text: Annotated[str, "Column of the text."] = "text"
    rename: Annotated[dict[str, str | int | float | bool], "New names."] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """One source."""

    path: Annotated[str, "A file."]
    weight: Annotated[float, "Share."] = 1.0
    columns: Columns = Columns()

    def __post_init__(self):
        if self.weight <= 0:
            raise ConfigError("must be positive", "weight", self.weight)


@dataclass(frozen=True)
class Data:
    """Rows to packs."""

    sources: tuple[Source, ...]
    tokens: Annotated[int, "Tokens of a micro-batch.", "batch_size"] = 1024
    extra: tuple[Source, ...] | None = None


@dataclass(frozen=True)
class Lora:
    """Low-rank updates."""

    rank: Annotated[int, "Rank."] = 16
    alpha: Annotated[float, "Scale."] = 32.0
    targets: Annotated[str | tuple[str, ...], "Which linears."] = "all-linear"
    stages: Annotated[tuple[tuple[int, ...], ...], "Ranks, layer by layer and stage by stage."] = ()

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError("must be at least 1", "rank", self.rank)


@dataclass(frozen=True)
class Constant:
    """Flat."""

    kind: Annotated[Literal["constant"], "Which schedule."] = "constant"
    warmup: Annotated[float, "Warm-up."] = 0.0


@dataclass(frozen=True)
class Cosine:
    """Half a cosine."""

    kind: Annotated[Literal["cosine"], "Which schedule."] = "cosine"
    warmup: Annotated[float, "Warm-up."] = 0.03
    min: Annotated[float, "Where it ends."] = 0.0


@dataclass(frozen=True)
class Save:
    """Snapshots."""

    every: Annotated[int, "Steps between two."] = 500
    async_: Annotated[bool, "In the background."] = False


@dataclass(frozen=True)
class Optim:
    """The optimizer."""

    lr: Annotated[float, "Learning rate.", "learning_rate"] = 2e-4
    max_norm: Annotated[float | None, "Clipping."] = None


@dataclass(frozen=True)
class Sample:
    """Every kind of field."""

    model: Model
    data: Data
    title: Annotated[str, "What it is."] = ""
    lora: Lora | None = None
    optim: Optim = Optim()
    schedule: Constant | Cosine = Cosine()
    checkpoint: Save = Save()

    def __post_init__(self):
        if self.lora is not None and self.optim.lr > 1:
            raise ConfigError("is too high for LoRA", "optim.lr", self.optim.lr)


MINIMAL = """\
[model]
path = "m"

[[data.sources]]
path = "a.jsonl"
"""
