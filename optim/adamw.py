"""Optimizers: torch's fused AdamW over two parameter groups, and its state as named tensors.

The state is read and written as plain tensors by parameter name, so that a checkpoint is layout-free: a DTensor
parameter has DTensor moments with the same placements, and `torch.distributed.checkpoint` reshards all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from optim.config import OptimConfig


def build(
    named: Iterable[tuple[str, nn.Parameter]], cfg: OptimConfig, home: Callable[[Tensor], Tensor] = lambda t: t
) -> torch.optim.Optimizer:
    """An optimizer over the parameters that train. Matrices are decayed, norms and biases are not.

    Its state exists from the start (as zeros, which is what AdamW's first step begins from), so that restoring a
    checkpoint needs no dummy step. `home` says where each tensor of it lies: it takes one and returns the one to keep.
    """
    trained = [p for _, p in named if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)
    for p in trained:
        optimizer.state[p] = {
            "step": home(torch.zeros((), dtype=torch.float32, device=p.device)),
            "exp_avg": home(torch.zeros_like(p, memory_format=torch.preserve_format)),
            "exp_avg_sq": home(torch.zeros_like(p, memory_format=torch.preserve_format)),
        }
    return optimizer


def state_tensors(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Every tensor of the optimizer's state, keyed `<parameter name>.<state name>`; writing into them restores it."""
    return {f"{name}.{key}": value for name, p in named if p in optimizer.state for key, value in optimizer.state[p].items()}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
