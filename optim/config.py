"""The `[optim]` and `[schedule]` sections. No torch here: `--help` must stay instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from runtime.errors import ConfigError


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW with decoupled weight decay (Loshchilov & Hutter, https://arxiv.org/abs/1711.05101)."""

    kind: Annotated[Literal["adamw"], "Which optimizer."] = "adamw"
    lr: Annotated[float, "Peak learning rate.", "learning_rate"] = 2e-4
    beta1: Annotated[float, "Decay of the gradient's running mean."] = 0.9
    beta2: Annotated[float, "Decay of the squared gradient's running mean."] = 0.999
    eps: Annotated[float, "Added to the denominator."] = 1e-8
    weight_decay: Annotated[float, "Decay of weight matrices; norms and biases are never decayed."] = 0.0
    max_norm: Annotated[
        float, "Gradients are scaled down to this global L2 norm; 0 turns clipping off.", "max_grad_norm", "gradient_clipping"
    ] = 1.0
    impl: Annotated[
        Literal["auto", "torch", "triton"],
        "torch: its fused AdamW; triton: one launch for all that trains, which clips on the way (CUDA); auto: triton where it can be and "
        "fewer than 2^28 parameters train, else torch.",
    ] = "auto"

    def __post_init__(self):
        for key in ("lr", "eps", "weight_decay", "max_norm"):
            if getattr(self, key) < 0:
                raise ConfigError("must not be negative", key, getattr(self, key))
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError("must be at least 0 and below 1", key, getattr(self, key))


def _check(cfg) -> None:
    if cfg.warmup < 0:
        raise ConfigError("must not be negative", "warmup", cfg.warmup)
    if cfg.warmup >= 1 and cfg.warmup != int(cfg.warmup):
        raise ConfigError("must be a fraction of the run below 1, or a whole number of steps", "warmup", cfg.warmup)
    if not 0 <= getattr(cfg, "min", 0) <= 1:
        raise ConfigError("must lie between 0 and 1: a fraction of the peak learning rate", "min", cfg.min)


@dataclass(frozen=True)
class ConstantConfig:
    """The peak learning rate after the warm-up."""

    kind: Annotated[Literal["constant"], "Which schedule."] = "constant"
    warmup: Annotated[float, "Linear warm-up: a fraction of the run (below 1) or a number of steps.", "warmup_steps", "warmup_ratio"] = 0.0
    __post_init__ = _check


@dataclass(frozen=True)
class LinearConfig:
    """A straight line from the peak after the warm-up to `min` behind the last step."""

    kind: Annotated[Literal["linear"], "Which schedule."] = "linear"
    warmup: Annotated[float, "Linear warm-up: a fraction of the run (below 1) or a number of steps.", "warmup_steps", "warmup_ratio"] = 0.0
    min: Annotated[float, "Where the decay ends, as a fraction of the peak."] = 0.0
    __post_init__ = _check


@dataclass(frozen=True)
class CosineConfig:
    """Half a cosine from the peak after the warm-up to `min` behind the last step (https://arxiv.org/abs/1608.03983)."""

    kind: Annotated[Literal["cosine"], "Which schedule."] = "cosine"
    warmup: Annotated[float, "Linear warm-up: a fraction of the run (below 1) or a number of steps.", "warmup_steps", "warmup_ratio"] = 0.03
    min: Annotated[float, "Where the decay ends, as a fraction of the peak."] = 0.0
    __post_init__ = _check


OptimConfig = AdamWConfig
ScheduleConfig = ConstantConfig | LinearConfig | CosineConfig
