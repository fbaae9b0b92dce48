"""LoRA (arXiv 2106.09685): what trains is a low-rank update beside a frozen weight.

    y = W x + (alpha / r) B A x        A: [r, in] uniform in +-1/sqrt(in), B: [out, r] zero, so training starts at the base model

`apply_lora` fills the `adapter` slot of the chosen linears of a model on meta, before it is sharded. The factors become
children of the linear, so that their names are PEFT's but for its prefix: `<linear>.lora_A.weight`, `<linear>.lora_B.weight`.

A name pattern selects a module if it matches its full dotted name or any dotted end of it, with the shell's wildcards
(`*` also crosses dots). So these select the same: `q_proj`, `self_attn.q_proj`, `model.layers.*.q_proj`. The head and the
embeddings are never targets: `train_modules` trains them in full (PEFT's `modules_to_save`).

Dropout (kernels/lora.py) draws a seed for each linear from torch's default generator; whoever drives training seeds that per micro-batch.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.lora import drop
from model.config import LoraConfig
from model.linear import Linear, here
from runtime.errors import ConfigError

OWNER = "lora"


class Factor(nn.Module):
    """One of the two matrices; `initial` is what model/weights.py asks for fresh values."""

    def __init__(self, rows: int, columns: int, device: torch.device, initial):
        super().__init__()
        self.initial = initial
        self.weight = nn.Parameter(torch.empty(rows, columns, device=device, dtype=torch.float32))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


def uniform_by_columns(weight: Tensor, generator: torch.Generator) -> None:
    """Kaiming-uniform with a = sqrt(5), PEFT's choice: uniform in +-1/sqrt(columns)."""
    bound = weight.shape[1] ** -0.5
    weight.uniform_(-bound, bound, generator=generator)


class Lora:
    """What fills the slot. The scale comes before B, so that under row parallelism base and update are partial sums alike."""

    # How the factors are split where the linear is: the dimension, or None for whole on every rank.
    TP = {"col": {"lora_A": None, "lora_B": 0}, "row": {"lora_A": 1, "lora_B": None}}

    def __init__(self, scale: float, dropout: float):
        self.scale, self.dropout, self.impl = scale, dropout, "torch"  # impl: of dropout

    def __call__(self, linear: Linear, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out], in the dtype of x."""
        a, b = here(linear.lora_A.weight).to(x.dtype), here(linear.lora_B.weight).to(x.dtype)
        if linear.training:
            x = drop(x, self.dropout, 0 if linear.shard is None else linear.shard.first(x.shape[-1]), self.impl)
        return F.linear(self.scale * F.linear(x, a), b)


def apply_lora(net: nn.Module, cfg: LoraConfig) -> str:
    """Puts adapters beside the linears that `cfg.targets` names. Returns one line for the start-up report.

    Raises:
        ConfigError: a target matches no linear, or only the head or the embeddings.
    """
    matched = select_linears(net, cfg.targets)
    for linear in matched.values():
        device = linear.weight.device
        linear.fill("adapter", Lora(cfg.alpha / cfg.rank, cfg.dropout), OWNER)
        linear.lora_A = Factor(cfg.rank, linear.in_features, device, uniform_by_columns)
        linear.lora_B = Factor(linear.out_features, cfg.rank, device, 0.0)
    leaves = Counter(name.rsplit(".", 1)[-1] for name in matched)
    counts = ", ".join(f"{leaf} {count}" for leaf, count in leaves.items())
    return f"LoRA: rank {cfg.rank}, alpha {cfg.alpha:g}, dropout {cfg.dropout:g} beside {len(matched)} linears ({counts})"


def adapted(net: nn.Module) -> dict[str, Linear]:
    """Linears with an adapter, by name; also while it is switched off."""
    return {name: m for name, m in net.named_modules() if isinstance(m, Linear) and m.owners.get("adapter") == OWNER}


def is_adapter(name: str) -> bool:
    """Is this the name of an adapter's parameter?"""
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


@contextmanager
def adapters_off(net: nn.Module) -> Iterator[None]:
    """Inside, the model computes what it would without adapters: the base, where nothing else trains."""
    parts = {linear: linear.adapter for linear in adapted(net).values()}
    for linear in parts:
        linear.adapter = None
    try:
        yield
    finally:
        for linear, part in parts.items():
            linear.adapter = part


def matches(pattern: str, name: str) -> bool:
    """See the module docstring."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def select_linears(net: nn.Module, patterns: str | tuple[str, ...]) -> dict[str, Linear]:
    """The linears of the decoder that a pattern selects, in the model's order."""
    linears = {name: m for name, m in net.named_modules() if isinstance(m, Linear) and name.startswith("model.layers.")}
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    if "all-linear" in patterns:
        return linears
    chosen = set()
    for pattern in patterns:
        found = {name for name in linears if matches(pattern, name)}
        if not found:
            raise _no_target(net, pattern, linears)
        chosen |= found
    return {name: linear for name, linear in linears.items() if name in chosen}


def _no_target(net: nn.Module, pattern: str, linears: dict[str, Linear]) -> ConfigError:
    others = [name for name in weighted(net) if name not in linears and matches(pattern, name)]
    if matches(pattern, "lm_head") and not others:  # asked for by name, and tied
        others = ["embed_tokens"]
    if others:
        leaf = others[0].rsplit(".", 1)[-1]
        return ConfigError(f"is no linear layer of the decoder; train it in full: lora.train_modules = ['{leaf}']", "lora.targets", pattern)
    leaves = leaf_names(linears)
    return ConfigError(f"matches no linear layer{did_you_mean(pattern, leaves)}", "lora.targets", pattern)


def weighted(net: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold parameters of their own, by name, without the factors of adapters."""
    return {name: m for name, m in net.named_modules() if m._parameters and not isinstance(m, Factor)}


def leaf_names(names: Iterable[str]) -> list[str]:
    """Last parts of dotted names, each once, in order."""
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


def did_you_mean(pattern: str, leaves: list[str]) -> str:
    """The end of a message about a pattern that matches nothing."""
    close = difflib.get_close_matches(pattern.rsplit(".", 1)[-1], leaves, 1)
    return (f"; did you mean {close[0]!r}?" if close else ".") + f" This model has {', '.join(leaves)}"
