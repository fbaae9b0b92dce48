"""The one linear layer, with four openings that features fill.

    y = leave( gemm(enter(x), W) + adapter(enter(x)) ) + bias          W = storage(weight), x: [..., in], y: [..., out]

| slot      | says                            | default | call                                                              |
|-----------|---------------------------------|---------|-------------------------------------------------------------------|
| `storage` | how the weight is kept          | dense   | `storage(linear, dtype) -> [out, in]` in `dtype`                  |
| `gemm`    | how the product is computed     | plain   | `gemm(x, w) -> [..., out]`                                        |
| `adapter` | what trains beside the weight   | none    | `adapter(linear, x) -> [..., out]`, already scaled, without bias  |
| `shard`   | which part this rank holds      | none    | `shard.enter(x)`, `shard.leave(y)`: the collectives around it     |

A filling is a plain object, not a module: parameters it brings are registered on the linear itself by its owner (LoRA adds
`lora_A` and `lora_B` children), so that `weight`, `bias` and their shapes `(out, in)`, `(out,)` never change and names in
the state dict stay Hugging Face's. Each slot is filled once, by one named owner, in any order.

Two rules keep every combination right. LoRA scales *before* B, so that base product and adapter are partial sums of one
kind and share the one reduction of a row-parallel shard. The bias is added after that reduction, or it would be counted
once per rank.

The weight is cast to the dtype of `x` where it is used: the identity when FSDP2 gathered it in compute dtype or when it
is frozen and kept in it, and the cast of an fp32 master otherwise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial


class Slots(nn.Module):
    """A module with named openings. `fill` is the only way in; it remembers who came."""

    slots: tuple[str, ...] = ()

    def __init__(self):
        super().__init__()
        self.owners: dict[str, str] = {}  # slot -> who filled it

    def fill(self, slot: str, part: object, owner: str) -> None:
        """Puts `part` into `slot`, once.

        Raises:
            ValueError: no such slot, or another owner was here first (both are named).
        """
        if slot not in self.slots:
            raise ValueError(f"{type(self).__name__} has no slot {slot!r}; it has {', '.join(self.slots)}")
        if slot in self.owners:
            raise ValueError(f"{owner} cannot fill slot {slot!r} of this {type(self).__name__}: {self.owners[slot]} already has")
        self.owners[slot] = owner
        setattr(self, slot, part)


def here(p: Tensor) -> Tensor:
    """What this rank computes with of a parameter: a plain tensor.

    Under tensor parallelism parameters are DTensors. The gradient of a split one is this rank's own part; that of a
    replicated one is a partial sum, because every rank used it on other rows or other heads.
    """
    if not isinstance(p, DTensor):
        return p
    return p.to_local(grad_placements=[Partial() if at.is_replicate() else at for at in p.placements])


def dense(linear: Linear, dtype: torch.dtype) -> Tensor:
    """Default storage: the parameter itself, [out, in]."""
    return here(linear.weight).to(dtype)


class Linear(Slots):
    """See the module docstring. weight: [out_features, in_features], bias: [out_features] or None."""

    slots = ("storage", "gemm", "adapter", "shard")

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)
        self.storage, self.gemm, self.adapter, self.shard = dense, F.linear, None, None

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out], in the dtype of x."""
        if self.shard is not None:
            x = self.shard.enter(x)
        y = self.gemm(x, self.storage(self, x.dtype))
        if self.adapter is not None:
            y = y + self.adapter(self, x)
        if self.shard is not None:
            y = self.shard.leave(y)
        if self.bias is not None:
            y = y + here(self.bias).to(y.dtype)
        return y

    def extra_repr(self) -> str:
        filled = "".join(f", {slot}: {owner}" for slot, owner in sorted(self.owners.items()))
        return f"in={self.in_features}, out={self.out_features}, bias={self.bias is not None}{filled}"
