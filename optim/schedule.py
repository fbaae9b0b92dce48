"""Learning-rate schedules as pure functions of the step: there is no scheduler state to save or to lose.

Steps count from 1. With W warm-up steps, step s <= W runs at s/W of the peak, so the first update already moves. The decay
would reach its minimum one step after the last, so that the last one still learns where the minimum is 0.
"""

from __future__ import annotations

import math

from optim.config import ScheduleConfig


def warmup_steps(cfg: ScheduleConfig, total: int) -> int:
    return int(cfg.warmup) if cfg.warmup >= 1 else math.ceil(cfg.warmup * total)


def factor(cfg: ScheduleConfig, step: int, total: int) -> float:
    """The learning rate at `step` (1..total) as a fraction of the peak."""
    warm = warmup_steps(cfg, total)
    if step <= warm:
        return step / warm
    progress = min(1.0, (step - warm) / (total - warm + 1))
    if cfg.kind == "constant":
        return 1.0
    shape = 1 - progress if cfg.kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.min + (1 - cfg.min) * shape
