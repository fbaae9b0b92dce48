"""Tensor parallelism with sequence parallelism (Megatron, arXiv 1909.08053 and 2205.05198), by filling `shard` slots.

Between blocks a rank holds T / n rows of the hidden states. What feeds attention or the feed-forward network hands it all
rows (`gather`); column-split linears compute this rank's heads or channels of all rows; row-split linears give partial sums,
which `scatter_sum` adds up and cuts into rows again. The vocabulary is split over embedding and head, so that no rank ever
holds all logits.

Which style a module has is written beside it, as `TP = {"child": style}` of its parent:

    col      weight [out/n, in], bias split               nothing to exchange: the input has all rows already
    row      weight [out, in/n], bias whole               leave: scatter_sum
    vocab    weight [V/n, D]                              embedding: zero for other ranks' tokens, leave: scatter_sum
    gather   a norm; weight whole                         leave: gather
    whole    a norm; weight whole                         works on what it gets

Parameters become DTensors on the tensor axis and stay plain tensors in the computation (model/linear.py `here`). Adapters
follow their linear (`Lora.TP`).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from model.arch import Arch
from model.linear import Linear
from parallel.collectives import all_reduce, gather, scatter_sum
from runtime.errors import ConfigError

OWNER = "tensor parallelism"


class Row:
    """Slot filling of a row-split linear."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def enter(self, x: Tensor) -> Tensor:
        """x: [T, in/n], this rank's channels already."""
        return x

    def first(self, channels: int) -> int:
        """The number in the whole input of the first of this rank's `channels`."""
        return channels * self.group.rank()

    def leave(self, y: Tensor) -> Tensor:
        """[T, out] partial sums -> [T/n, out]."""
        return scatter_sum(y, self.group)

    def back(self, grad: Tensor) -> Tensor:
        """The transpose of `leave`, for those who write their own backward."""
        return gather(grad, self.group)


class Gather:
    """Slot filling of a norm that feeds column-split linears."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def leave(self, y: Tensor) -> Tensor:
        """[T/n, D] -> [T, D]."""
        return gather(y, self.group)

    def back(self, grad: Tensor) -> Tensor:
        """The transpose of `leave`."""
        return scatter_sum(grad, self.group)


class Vocab:
    """Slot filling of embedding and head: this rank holds the vocabulary's rows from `first` on."""

    def __init__(self, group: dist.ProcessGroup, rows: int):
        self.group, self.rows = group, rows
        self.most = -(-rows // group.size())
        self.first = self.most * group.rank()

    def leave(self, h: Tensor) -> Tensor:
        """[T, D] with zeros for other ranks' tokens -> [T/n, D]."""
        return scatter_sum(h, self.group)

    def sum(self, x: Tensor) -> Tensor:
        return all_reduce(x, self.group)

    def max(self, x: Tensor) -> Tensor:
        return all_reduce(x, self.group, "max")

    def join(self, logits: Tensor) -> Tensor:
        """[M, V/n] -> [M, V] on every rank."""
        padded = torch.nn.functional.pad(logits, (0, self.most - logits.shape[1]))
        return gather(padded.T.contiguous(), self.group)[: self.rows].T


def check(arch: Arch, size: int, fsdp: int) -> None:
    """Can `size` ranks share this model, when `fsdp` ranks (shard x context) share what each of them holds?

    Raises:
        ConfigError: a dimension does not divide. `parallel.apply.check` says what to use instead.
    """
    for name in ("num_key_value_heads", "num_attention_heads", "intermediate_size"):
        if (n := getattr(arch, name)) % size:
            raise ConfigError(f"does not divide {name}={n} ({arch.name or arch.family})", "parallel.tensor", size)
    if arch.vocab_size <= -(-arch.vocab_size // size) * (size - 1):
        raise ConfigError(f"leaves ranks without rows of the vocabulary, which has {arch.vocab_size}", "parallel.tensor", size)
    if not _sizes_agree(arch.vocab_size, size, fsdp):
        raise ConfigError(
            f"and shard x context={fsdp} both divide the {arch.vocab_size} rows of the vocabulary unevenly, and torch then loses track of "
            "where a rank's rows lie",
            "parallel.tensor",
            size,
        )


def _sizes_agree(rows: int, tensor: int, fsdp: int) -> bool:
    """Are the rows that ranks really hold, cut first over `tensor` and then over `fsdp`, those that torch (2.11 to 2.13) computes for
    checkpoints? It joins what the tensor ranks of one fsdp rank hold and cuts that evenly."""

    def cut(n: int, parts: int) -> list[int]:
        each = -(-n // parts)
        return [max(0, min(each, n - each * i)) for i in range(parts)]

    held = [cut(n, fsdp) for n in cut(rows, tensor)]
    return all(list(part) == cut(sum(part), tensor) for part in zip(*held))


def split(net: nn.Module, mesh: DeviceMesh) -> None:
    """Splits a model on meta over the 1-D `mesh`, in place. On a mesh of size 1 nothing happens."""
    if mesh.size() == 1:
        return
    group = mesh.get_group()
    styles = {
        child: style
        for module in net.modules()
        for name, style in getattr(module, "TP", {}).items()
        if (child := getattr(module, name, None))
    }
    for module in net.modules():
        if module not in styles:
            continue
        style = styles[module]
        if style == "vocab":
            module.fill("shard", Vocab(group, module.weight.shape[0]), OWNER)
        elif style == "gather":
            module.fill("shard", Gather(group), OWNER)
        elif style == "row":
            module.fill("shard", Row(group), OWNER)
        _place(module, {"col": {"weight": 0, "bias": 0}, "row": {"weight": 1}, "vocab": {"weight": 0}}.get(style, {}), mesh)
        if isinstance(module, Linear) and module.adapter is not None:
            for name, dim in module.adapter.TP[style].items():
                _place(getattr(module, name), {"weight": dim}, mesh)
    plain = [name for name, p in net.named_parameters() if not isinstance(p, DTensor)]
    assert not plain, f"no tensor-parallel style for {plain[:3]}"


def _place(module: nn.Module, dims: dict[str, int | None], mesh: DeviceMesh) -> None:
    """Makes the module's own parameters DTensors on `mesh`: split along the given dimension, whole without one."""
    for name, p in module._parameters.items():
        if p is None:
            continue
        dim = dims.get(name)
        local = p.detach()
        if dim is not None:
            each = -(-p.shape[dim] // mesh.size())
            begin = min(each * mesh.get_local_rank(), p.shape[dim])
            local = local.narrow(dim, begin, min(each, p.shape[dim] - begin)).contiguous()
        placement = Replicate() if dim is None else Shard(dim)
        whole = DTensor.from_local(local, mesh, [placement], run_check=False, shape=p.shape, stride=p.stride())
        module._parameters[name] = nn.Parameter(whole, requires_grad=p.requires_grad)
