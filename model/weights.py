"""Weights: how a folder's tensor names and ours correspond, which part of a tensor this rank holds, and fresh values.

Names of ours are Hugging Face's, so for most models the correspondence is the identity. What is left is data: a family's
`rules(arch)` is a tuple of

    Rename   a prefix of ours and the prefixes that folders have for it (a multimodal checkpoint wraps the text model)
    Aside    tensors of a folder that are no parameters of ours (a vision tower): not loaded, copied through on export

Each rule has its inverse, `to_hf` is derived from it, and a test over all families holds `from_hf(to_hf(x)) == x`. A rule that
cuts or joins tensors (stacked experts, fused projections) belongs here too, beside these; nothing supported needs one yet.

Fresh values depend on (seed, name) only, never on the number of ranks or the order of calls.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from model import families

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # tied models have only the first


@dataclass(frozen=True)
class Rename:
    """Names that begin with `ours` begin with one of `hf` in a folder. The first is what transformers' modules are called."""

    ours: str
    hf: tuple[str, ...]


@dataclass(frozen=True)
class Aside:
    """Names in a folder that match this pattern (`re.match`) belong to no parameter of ours; `keep`: an export carries them on."""

    pattern: str
    keep: bool = True


# Frequency tables that old conversions saved as if they were weights; transformers ignores them as well.
COMMON = (Aside(r".*\.rotary_emb\.inv_freq$", keep=False),)


class NameMap:
    """Names of ours <-> names in one folder.

    Args:
        rules: the family's; see the module docstring.
        theirs: the names in the folder, which decide between spellings. Without any, the first spelling counts.
    """

    def __init__(self, rules: tuple[Rename | Aside, ...], theirs: Collection[str] = ()):
        self.rules = rules
        self.asides = [r for r in (*rules, *COMMON) if isinstance(r, Aside)]
        self.prefixes: list[tuple[str, str]] = []  # (ours, theirs)
        for rule in rules:
            if isinstance(rule, Rename):
                used = (p for p in rule.hf if any(name.startswith(p) for name in theirs))
                self.prefixes.append((rule.ours, next(used, rule.hf[0])))

    @classmethod
    def of(cls, net: nn.Module, theirs: Collection[str] = ()) -> NameMap:
        return cls(families.get(net.arch).rules(net.arch), theirs)

    def to_hf(self, name: str) -> str:
        for ours, hf in self.prefixes:
            if name.startswith(ours):
                return hf + name[len(ours) :]
        return name

    def from_hf(self, name: str) -> str | None:
        """Our name; None for a tensor that is no parameter of ours."""
        if self.aside(name) is not None:
            return None
        for ours, hf in self.prefixes:
            if name.startswith(hf):
                return ours + name[len(hf) :]
        return name

    def aside(self, name: str) -> Aside | None:
        return next((rule for rule in self.asides if re.match(rule.pattern, name)), None)


def parameters_at_rest(net: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter once, with its name, as it is kept between steps.

    FSDP2 leaves some units gathered after a forward without backward (the root after an evaluation); what
    `named_parameters` shows then are the gathered copies, already cast to the compute dtype.
    """
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    yield from net.named_parameters()


def local(p: Tensor) -> Tensor:
    """What this rank holds of a parameter, as a plain tensor that shares its memory."""
    return p.detach().to_local() if isinstance(p, DTensor) else p.detach()


def region(p: Tensor) -> tuple[slice, ...]:
    """Where `local(p)` lies in the full tensor. Any dimension may be empty: 5 rows on 4 ranks are 2, 2, 1, 0."""
    if not isinstance(p, DTensor):
        return tuple(slice(0, n) for n in p.shape)
    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return tuple(slice(at, at + n) for at, n in zip(offset, shape))


def full(p: Tensor) -> Tensor:
    """The whole parameter on every rank. A collective where it is sharded (forward: all-gather; not differentiable here)."""
    return p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator of its own for each (seed, name)."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@torch.no_grad()
def initialize(net: nn.Module, seed: int, only: Callable[[str], bool] = lambda name: True) -> set[str]:
    """Gives parameters fresh values, in place, as transformers and PEFT would draw them. Returns the names it filled.

    | parameter                                | values                                              |
    |------------------------------------------|-----------------------------------------------------|
    | of a module with an attribute `initial`  | that constant, or what that function fills in       |
    |   RMSNorm; gemma's (1 + w) RMSNorm       |   1; 0                                              |
    |   lora_A [r, in]; lora_B [out, r]        |   uniform in +-1/sqrt(in); 0 (PEFT's default)       |
    | bias                                     | 0                                                   |
    | any other matrix                         | normal(0, arch.initializer_range)                   |

    Drawn in fp32 on the CPU for the whole tensor, of which this rank keeps its part: the same values at any sharding,
    without communication. (In-place random operators on DTensors of a CPU mesh give every shard the same values.)
    """
    filled = set()
    at_rest = dict(parameters_at_rest(net))
    for module_name, module in net.named_modules():
        for leaf in module._parameters:
            name = f"{module_name}.{leaf}"
            if (p := at_rest.get(name)) is None or not only(name):
                continue
            value = torch.empty(p.shape, dtype=torch.float32)
            initial = 0.0 if leaf == "bias" else getattr(module, "initial", None)
            if initial is None:
                assert p.ndim == 2, f"{name}: no rule to initialize a tensor of shape {tuple(p.shape)}"
                value.normal_(0.0, net.arch.initializer_range, generator=generator(seed, name))
            elif callable(initial):
                initial(value, generator(seed, name))
            else:
                value.fill_(initial)
            local(p).copy_(value[region(p)])
            filled.add(name)
    return filled
