"""The `[objective]` section. No torch here: `--help` must stay instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from runtime.errors import ConfigError


@dataclass(frozen=True)
class LmConfig:
    """Cross-entropy of the trained tokens, and what is added to it. `loss` in the metrics is the plain cross-entropy all the same."""

    kind: Annotated[Literal["lm"], "Which objective."] = "lm"
    label_smoothing: Annotated[
        float, "Share of a label's weight that is spread evenly over the vocabulary (arXiv 1512.00567).", "label_smoothing_factor"
    ] = 0.0
    z_loss: Annotated[
        float, "Weight of log(Z)^2, which keeps the softmax's normalizer Z near 1; PaLM has 1e-4 (arXiv 2204.02311).", "z_loss_weight"
    ] = 0.0

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError("must be at least 0 and below 1", "label_smoothing", self.label_smoothing)
        if not 0 <= self.z_loss < float("inf"):
            raise ConfigError("must not be negative, and is finite; 1e-4 is usual", "z_loss", self.z_loss)


ObjectiveConfig = LmConfig
