"""What trains, and in which number format the rest is kept.

Full fine-tuning trains everything. With adapters only they train, and the modules named in `lora.train_modules` in full.
What trains is an fp32 master (or `masters`); what is frozen is kept in the compute dtype, in which it is used anyway: no
second copy, and half the memory in bf16. Runs on meta, after adapters are in place and before the model is sharded.
"""

from __future__ import annotations

import torch
from torch import nn

from model.config import LoraConfig
from model.transforms.lora import adapted, did_you_mean, is_adapter, leaf_names, matches, weighted
from runtime.errors import ConfigError


def apply_trainable(net: nn.Module, lora: LoraConfig | None, compute: torch.dtype, masters: torch.dtype = torch.float32) -> str:
    """Sets `requires_grad` and dtypes of all parameters. Returns one line for the start-up report.

    Raises:
        ConfigError: `lora.train_modules` names what does not exist, is tied, or has an adapter.
    """
    whole = None if lora is None else modules_in_full(net, lora.train_modules)
    trained = total = 0
    for module_name, module in net.named_modules():
        for leaf, p in module._parameters.items():
            if p is None:
                continue
            trains = whole is None or module_name in whole or is_adapter(f"{module_name}.{leaf}")
            dtype = masters if trains else compute
            module._parameters[leaf] = nn.Parameter(p.detach().to(dtype), requires_grad=trains)
            total += p.numel()
            trained += p.numel() * trains
    extra = f", with {', '.join(whole)} in full" if whole else ""
    return f"trains {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %){extra}"


def modules_in_full(net: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Names of the modules that `lora.train_modules` selects, in the model's order; patterns as for targets."""
    modules = weighted(net)
    chosen = set()
    for pattern in patterns:
        found = {name for name in modules if matches(pattern, name)}
        if not found and matches(pattern, "lm_head"):
            raise ConfigError("is the embedding in this model (tied); name embed_tokens, which trains both", "lora.train_modules", pattern)
        if not found:
            raise ConfigError(f"matches no module{did_you_mean(pattern, leaf_names(modules))}", "lora.train_modules", pattern)
        if both := [name for name in adapted(net) if name in found]:
            raise ConfigError(f"also gets an adapter ({both[0]}); leave it out here or in lora.targets", "lora.train_modules", pattern)
        chosen |= found
    return [name for name in modules if name in chosen]
