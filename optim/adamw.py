"""AdamW over two parameter groups, by torch's fused kernel or by ours, and its state as named tensors.

The state is read and written as plain tensors by parameter name, so that a checkpoint is layout-free: a DTensor
parameter has DTensor moments with the same placements, and `torch.distributed.checkpoint` reshards all of them. It is the same for
both implementations, apart from where the step counts lie: a run may go on with the other one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kernels import launch
from kernels.adamw import Update, adamw
from optim.config import OptimConfig
from runtime.errors import ConfigError

LARGEST = 2**28  # parameters; torch launches once for some dozens of tensors, which matters the less the larger they are


def build(
    named: Iterable[tuple[str, nn.Parameter]], cfg: OptimConfig, home: Callable[[Tensor], Tensor] = lambda t: t
) -> torch.optim.Optimizer:
    """An optimizer over the parameters that train. Matrices are decayed, norms and biases are not.

    Its state exists from the start (as zeros, which is what AdamW's first step begins from), so that restoring a
    checkpoint needs no dummy step. `home` says where each tensor of it lies: it takes one and returns the one to keep.

    Raises:
        ConfigError: `optim.impl` names what cannot update these parameters.
    """
    trained = [p for _, p in named if p.requires_grad]
    impl, _ = choose(trained, cfg)
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups, settings = [g for g in groups if g["params"]], {"lr": cfg.lr, "betas": (cfg.beta1, cfg.beta2), "eps": cfg.eps}
    optimizer = OneLaunch(groups, **settings) if impl == "triton" else torch.optim.AdamW(groups, **settings, fused=True)
    for p in trained:
        optimizer.state[p] = {
            "step": home(torch.zeros((), dtype=torch.float32, device="cpu" if impl == "triton" else p.device)),
            "exp_avg": home(torch.zeros_like(p, memory_format=torch.preserve_format)),
            "exp_avg_sq": home(torch.zeros_like(p, memory_format=torch.preserve_format)),
        }
    return optimizer


def choose(trained: Iterable[nn.Parameter], cfg: OptimConfig) -> tuple[str, str]:
    """(implementation, line for the start-up report)

    Raises:
        ConfigError: the config names one that cannot update these parameters.
    """
    trained = list(trained)
    reason = unsupported(trained)
    if cfg.impl == "triton" and reason is not None:
        raise ConfigError(f"cannot be used: {reason}; use auto", "optim.impl", cfg.impl)
    if cfg.impl != "auto":
        return cfg.impl, f"optimizer: AdamW, {cfg.impl}"
    if reason is None and (count := sum(p.numel() for p in trained)) >= LARGEST:
        reason = f"{count:,} parameters train, and it is for fewer than {LARGEST:,}"
    if reason is None and not launch.INTERPRETED:
        return "triton", "optimizer: AdamW, triton"
    return "torch", f"optimizer: AdamW, torch (not triton: {reason or 'it would be interpreted'})"


def unsupported(trained: list[nn.Parameter]) -> str | None:
    """Why one launch cannot update these parameters, or None."""
    if len(devices := {p.device for p in trained}) > 1:
        return f"parameters lie on several devices ({', '.join(sorted(map(str, devices)))})"
    if any(not _local(p).is_contiguous() for p in trained):
        return "the memory of a parameter has gaps or another order"
    return next((why for kind in {(p.device, p.dtype) for p in trained} if (why := launch.unsupported(*kind))), None)


class OneLaunch(torch.optim.Optimizer):
    """torch.optim.AdamW whose step is one launch, or one for each set of settings, dtypes and step counts that differ.

    A group's `grad_scale` is a factor of all gradients, [] fp32 on their device, or None; it is the same in all groups, and goes with
    the gradients (`zero_grad`). Step counts lie on the host, where the corrections of the moments' bias are computed from them: nothing
    is waited for. Parameters without a gradient are left alone, as torch does.
    """

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "grad_scale": None})

    @torch.no_grad()
    def step(self) -> None:
        launches, steps = defaultdict(list), []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                steps.append(state["step"])
                update = Update(group["lr"], *group["betas"], group["eps"], int(state["step"].item()) + 1)
                moments = _local(state["exp_avg"]), _local(state["exp_avg_sq"])
                launches[update, p.dtype].append((_local(p), _gradient(p), *moments, group["weight_decay"]))
        for (update, _), tensors in launches.items():
            adamw(*zip(*tensors, strict=True), self.param_groups[0]["grad_scale"], update)
        if steps:
            torch._foreach_add_(steps, 1)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            group["grad_scale"] = None


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def _gradient(p: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter's gradient, in the parameter's order."""
    if isinstance(p, DTensor) and p.grad.placements != p.placements:
        raise RuntimeError(f"a gradient is {p.grad.placements}, its parameter {p.placements}; clip() brings them together")
    return _local(p.grad).contiguous()


def state_tensors(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Every tensor of the optimizer's state, keyed `<parameter name>.<state name>`; writing into them restores it."""
    return {f"{name}.{key}": value for name, p in named if p in optimizer.state for key, value in optimizer.state[p].items()}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
