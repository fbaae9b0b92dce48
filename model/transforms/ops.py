"""Which implementation computes each operation: fills the slots of blocks and norms as the `[kernels]` section says.

What the user names and cannot work is an error with the reason; `auto` takes the first that can, and the report says which and why.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import launch, regions, rms_norm
from kernels.lora import Kind, Part
from model.attention import Attention
from model.backends import choose
from model.config import KernelsConfig
from model.decoder import Decoder
from model.ffn import FeedForward
from model.linear import Linear, dense, here
from model.norm import RMSNorm
from model.transforms.lora import Lora
from runtime.errors import ConfigError

OWNER = "kernels"


def install(net: Decoder, cfg: KernelsConfig, device: torch.device | str, dtype: torch.dtype) -> list[str]:
    """Fills the slots, in a model on meta or a loaded one, after adapters came. Returns lines for the start-up report.

    Raises:
        ConfigError: what the config asks for cannot compute this model on this device in this dtype.
    """
    device = torch.device(device)
    backend, why = choose(cfg.attention, net.arch, device, dtype)
    anywhere = launch.unsupported(device, dtype)
    norm = _choose("norm", cfg.norm, anywhere or rms_norm.unsupported(net.arch.hidden_size))
    ops = regions.Ops(norm, *(_choose(name, getattr(cfg, name), anywhere) for name in ("rope", "glu", "dropout")))
    net.head_impl = _choose("head", cfg.head, anywhere)
    fused, reason = _fused(net, cfg.blocks)
    for module in net.modules():
        if isinstance(module, Linear) and isinstance(module.adapter, Lora):
            module.adapter.impl = ops.dropout
        elif isinstance(module, RMSNorm):
            module.fill("impl", ops.norm, OWNER)
        elif isinstance(module, Attention):
            module.fill("backend", backend, OWNER)
            module.fill("ops", ops, OWNER)
            if fused:
                module.fill("enter", queries_keys_values, OWNER)
                module.fill("leave", project, OWNER)
        elif isinstance(module, FeedForward):
            module.fill("ops", ops, OWNER)
            if fused:
                module.fill("impl", feed_forward, OWNER)
    chosen = {**ops._asdict(), "head": net.head_impl}
    by = {impl: [name for name, each in chosen.items() if each == impl] for impl in dict.fromkeys(chosen.values())}
    return [
        f"attention: {backend.name}{why}",
        f"blocks: {'fused' if fused else 'separate'}{reason}; " + ", ".join(f"{impl}: {' '.join(names)}" for impl, names in by.items()),
    ]


def _choose(name: str, asked: str, reason: str | None) -> str:
    if asked == "triton" and reason is not None:
        raise ConfigError(f"cannot be used: {reason}; use auto", f"kernels.{name}", asked)
    return asked if asked != "auto" else "triton" if reason is None and not launch.INTERPRETED else "torch"


def _fused(net: Decoder, asked: str) -> tuple[bool, str]:
    reason = next((why for m in net.modules() if isinstance(m, Linear) and (why := unsupported(m))), None)
    if asked == "fused" and reason is not None:
        raise ConfigError(f"cannot be used: {reason}; use auto", "kernels.blocks", asked)
    if asked == "auto":
        return reason is None, "" if reason is None else f" (not fused: {reason})"
    return asked == "fused", ""


def unsupported(linear: Linear) -> str | None:
    """Why a fused region cannot stand for this linear, or None."""
    for slot, plain in (("storage", dense), ("gemm", F.linear)):
        if getattr(linear, slot) is not plain:
            return f"{linear.owners[slot]} fills the {slot} of a linear"
    if linear.adapter is not None and not isinstance(linear.adapter, Lora):
        return f"{linear.owners['adapter']} is not LoRA"
    return None


def parts(*linears: Linear) -> tuple[list[Part], list[Kind]]:
    """What linears hold on this rank at this moment."""
    found, kinds = [], []
    for linear in linears:
        weight, bias = here(linear.weight), None if linear.bias is None else here(linear.bias)
        if linear.adapter is None:
            found.append(Part(weight, bias))
            kinds.append(Kind())
            continue
        a, b = here(linear.lora_A.weight), here(linear.lora_B.weight)
        chance = linear.adapter.dropout if linear.training else 0.0
        first = 0 if linear.shard is None else linear.shard.first(a.shape[1])
        found.append(Part(weight, bias, a, b))
        kinds.append(Kind(linear.adapter.scale, chance, first))
    return found, kinds


def _norm(norm: RMSNorm) -> regions.Norm:
    return regions.Norm(here(norm.weight), norm.eps, norm.offset, norm.shard)


def queries_keys_values(attn: Attention, h: Tensor, norm: RMSNorm, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fills `Attention.enter`."""
    heads = regions.Heads(cos, sin, attn.head_dim)
    if attn.q_norm is not None:
        weights = here(attn.q_norm.weight), here(attn.k_norm.weight)
        heads = regions.Heads(cos, sin, attn.head_dim, *weights, attn.q_norm.eps, attn.q_norm.offset)
    return regions.queries_keys_values(h, _norm(norm), *parts(attn.q_proj, attn.k_proj, attn.v_proj), heads, attn.ops)


def project(attn: Attention, out: Tensor) -> Tensor:
    """Fills `Attention.leave`."""
    (part,), (kind,) = parts(attn.o_proj)
    return regions.linear(out, part, kind, attn.o_proj.shard, attn.ops)


def feed_forward(ffn: FeedForward, h: Tensor, add: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """Fills `FeedForward.impl`."""
    some = parts(ffn.gate_proj, ffn.up_proj, ffn.down_proj)
    return regions.feed_forward(h, add, _norm(norm), *some, ffn.act, ffn.down_proj.shard, ffn.only_added, ffn.keep, ffn.ops)
