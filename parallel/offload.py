"""What waits in host memory, or on disk, while the device does not need it: the `[offload]` section.

    activations   what blocks save for the backward pass                      parallel/activations.py
    parameters    weights, gradients and optimizer state, by FSDP2            parallel/fsdp.py; here only where the weights begin
    optimizer     the optimizer's state, which visits the device              `Visiting`
    frozen        the frozen weights of blocks, which visit the device        `Feeder`

Each is one decision about where bytes lie: no number changes by any of them, with the exception that `parameters` has the optimizer
compute on the host. ZeRO-Offload is arXiv 2101.06840.
"""

from __future__ import annotations

import math
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from model import attention, ffn
from model.config import LoraConfig
from model.linear import Linear
from model.weights import local
from parallel.activations import InMemory, Keeper, OnDisk
from parallel.config import OffloadConfig, RecomputeConfig, Sections
from parallel.transfer import Lane, Mark
from runtime.errors import ConfigError

OWNER = "offload.frozen"
BUCKET = 256 * 2**20  # bytes of parameters whose optimizer state visits the device at a time; the state of AdamW is twice that


def check(cfg: Sections, axes: dict[str, int], lora: LoraConfig | None) -> None:
    """Can these things be offloaded? Before there is a process group.

    Raises:
        ConfigError: no; with what to change.
    """
    kind, offload = cfg.recompute.kind, cfg.offload
    if offload.activations == "hidden_states" and kind not in ("full", "every_n", "selective"):
        raise ConfigError(
            f"moves the inputs of recomputed blocks, and recompute.kind={kind!r} recomputes none; use recompute.kind='full', or "
            "offload.activations='cpu'",
            "offload.activations",
            offload.activations,
        )
    if offload.activations in ("cpu", "disk") and kind == "selective":
        raise ConfigError(
            "does not reach what recompute.kind='selective' keeps, which stays on the device; use offload.activations='hidden_states' "
            "or recompute.kind='full'",
            "offload.activations",
            offload.activations,
        )
    if offload.activations == "disk":
        _check_folder(offload.place())
    if offload.frozen:
        _check_frozen(math.prod(axes.values()), lora, cfg.compile is not None)


def _check_folder(folder: str) -> None:
    try:
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder or None) as file:
            file.write(b"activations")
    except OSError as e:
        raise ConfigError(f"cannot be written to ({e.strerror}); name a folder on a fast local disk", "offload.folder", folder) from None


def _check_frozen(ranks: int, lora: LoraConfig | None, compiled: bool) -> None:
    if lora is None:
        raise ConfigError("but nothing is frozen without [lora]; use offload.parameters=true", OWNER, True)
    if ranks > 1:
        raise ConfigError(f"is for one rank, and this run has {ranks}; use offload.parameters=true", OWNER, True)
    if compiled:
        raise ConfigError("fetches weights between operations, which [compile] makes one; leave one of the two out", OWNER, True)


def apply(net: nn.Module, blocks: list[nn.Module], device: torch.device, cfg: Sections) -> list[str]:
    """Fills what `[offload]` asks for into a model on meta; `optimizer` comes later, and FSDP2 moves parameters. After recomputation
    and compilation, which stay inside of what is put around a block. Returns lines for the start-up report."""
    offload, report = cfg.offload, []
    if offload.activations != "none":
        report.append(_activations(_moved(blocks, offload, cfg.recompute), device, offload))
    if offload.frozen:
        report.append(_frozen(net, blocks, device))
    if offload.parameters:
        net.on_host = frozenset(name for name, _ in net.named_parameters())
        report.append("offload: weights, gradients and optimizer state in host memory")
    if offload.optimizer:
        report.append("offload: optimizer state in host memory")
    return report


# ------------------------------------------------------------------------------------------------------------ activations


def _moved(blocks: list[nn.Module], offload: OffloadConfig, recompute: RecomputeConfig) -> list[nn.Module]:
    """The blocks whose saved tensors move."""
    if offload.activations == "hidden_states" and recompute.kind == "every_n":
        return blocks[:: recompute.every]
    return blocks


def _activations(blocks: list[nn.Module], device: torch.device, cfg: OffloadConfig) -> str:
    lane = Lane(device)
    home = OnDisk(lane, cfg.place()) if cfg.activations == "disk" else InMemory(lane)
    keeper = Keeper(lane, home)
    for block in blocks:
        keeper.around(block)
    what = "inputs" if cfg.activations == "hidden_states" else "activations"
    return f"offload: {what} of {len(blocks)} blocks to {f'disk, in {home.folder}' if cfg.activations == 'disk' else 'host memory'}"


# --------------------------------------------------------------------------------------------------------------- optimizer


def optimizer(build: Callable[..., torch.optim.Optimizer], cfg: OffloadConfig, device: torch.device) -> torch.optim.Optimizer | Visiting:
    """What `build()` makes, or the same with its state in host memory.

    build: takes `home`, a function that it calls with each state tensor it makes and whose result it keeps instead.
    """
    return Visiting(build, device) if cfg.optimizer else build()


class Visiting:
    """An optimizer whose state lies in host memory and visits the device for its step, a bucket of parameters at a time.

    While one bucket is computed, the next one's state is copied in on a lane of its own, and the last one's out on another. So three
    buckets are on the device at most. The inner optimizer sees one bucket's parameters and their state on the device, and may be any
    that keeps its state by parameter: an update depends on nothing else, so it is the same bit for bit. What it makes later is
    taken home as well. A state tensor is the same object for the whole run, so it can be saved and restored where it lies.
    """

    def __init__(self, build: Callable[..., torch.optim.Optimizer], device: torch.device, bucket: int = BUCKET):
        self.device, self.into, self.out = device, Lane(device), Lane(device)
        self.homes: dict[int, Tensor] = {}  # by id: state tensors of the device that lie on the host
        self.inner = build(home=self.home)
        self.buckets = [b for group in self.inner.param_groups for b in _buckets(group, bucket)]

    @property
    def param_groups(self) -> list[dict]:
        return self.inner.param_groups

    @property
    def state(self) -> dict:
        return self.inner.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none=set_to_none)

    def home(self, t: Tensor) -> Tensor:
        """A state tensor on the device -> its place in host memory, with its value. Tensors of the host stay what they are."""
        if t.device != self.device:
            return t
        if self.device.type != "cpu":
            there = torch.empty_like(local(t), device="cpu", pin_memory=self.into.pinned)
            t = _like(t, there.copy_(local(t)))
        self.homes[id(t)] = t
        return t

    def step(self) -> None:
        """One update of all parameters. Returns when the state is at home again."""
        leaving: deque[tuple[Mark, list]] = deque()
        ahead = self._fetch(self.buckets[0])
        for i, bucket in enumerate(self.buckets):
            visitors, arrived = ahead
            if i + 1 < len(self.buckets):
                ahead = self._fetch(self.buckets[i + 1])
            self.into.wait(arrived)
            self._update(*bucket, visitors)
            leaving.append(self._return(bucket[1], visitors))
            if len(leaving) > 1:
                self.out.wait(leaving.popleft()[0])
        self.out.drain()  # whoever saves a checkpoint reads the state on the host

    def _fetch(self, bucket: tuple[dict, list[nn.Parameter]]) -> tuple[dict[tuple[nn.Parameter, str], Tensor], Mark]:
        """Copies of the bucket's state on the device, and the mark of the last of them."""
        visitors, mark = {}, None
        for p in bucket[1]:
            for key, t in self.state[p].items() if p in self.state else ():
                if id(t) in self.homes:
                    here = torch.empty_like(local(t), device=self.device)
                    mark = self.into.copy(here, local(t))
                    visitors[p, key] = _like(t, here)
        return visitors, mark

    def _update(self, group: dict, bucket: list[nn.Parameter], visitors: dict[tuple[nn.Parameter, str], Tensor]) -> None:
        """The inner optimizer's step, with nothing but this bucket. The state is that of the device while it runs."""
        groups, params, at_home = self.inner.param_groups, group["params"], {}
        for (p, key), t in visitors.items():
            at_home[p, key], self.state[p][key] = self.state[p][key], t
        self.inner.param_groups, group["params"] = [group], bucket
        try:
            self.inner.step()
        finally:
            self.inner.param_groups, group["params"] = groups, params
            for (p, key), t in at_home.items():
                visitors[p, key], self.state[p][key] = self.state[p][key], t  # the inner one may have put another tensor there

    def _return(self, bucket: list[nn.Parameter], visitors: dict[tuple[nn.Parameter, str], Tensor]) -> tuple[Mark, list]:
        """Copies the state home. The visitors must live until the mark was waited for."""
        mark = None
        for (p, key), t in visitors.items():
            mark = self.out.copy(local(self.state[p][key]), local(t))
        for p in bucket:
            for key, t in self.state[p].items() if p in self.state else ():
                if isinstance(t, Tensor) and id(t) not in self.homes:
                    self.state[p][key] = self.home(t)
        return mark, list(visitors.values())


def _buckets(group: dict, limit: int) -> list[tuple[dict, list[nn.Parameter]]]:
    """The group's parameters in runs of at most `limit` bytes; a larger one is a bucket of its own."""
    found, size = [], 0
    for p in group["params"]:
        n = local(p).nbytes
        if not found or size + n > limit:
            found.append([])
            size = 0
        found[-1].append(p)
        size += n
    return [(group, bucket) for bucket in found]


def _like(t: Tensor, data: Tensor) -> Tensor:
    """`data` as this rank's part of a tensor laid out like `t`. (DTensor.from_local would move it to the mesh's device.)"""
    return DTensor(data, t._spec, requires_grad=False) if isinstance(t, DTensor) else data


# ------------------------------------------------------------------------------------------------------------------ frozen


def _frozen(net: nn.Module, blocks: list[nn.Module], device: torch.device) -> str:
    """Leaves the frozen weights of the blocks' linears on the host and fills `gemm` with a product that fetches them."""
    for block in blocks:  # fused blocks would use several weights at once, and the device has room for the one in use and the next
        block.self_attn.enter, block.self_attn.leave, block.mlp.impl = attention.queries_keys_values, attention.project, ffn.separate
    frozen = [m for block in blocks for m in block.modules() if isinstance(m, Linear) and not m.weight.requires_grad]
    feeder = Feeder(Lane(device), max((m.weight.nbytes for m in frozen), default=0))
    for number, linear in enumerate(frozen):
        linear.fill("gemm", Fetched(feeder, number), OWNER)
    weights = {id(m.weight) for m in frozen}
    net.on_host = frozenset(name for name, p in net.named_parameters() if id(p) in weights)
    return f"offload: frozen weights of {len(frozen)} linears in host memory; blocks: separate"


class Slot:
    """Device memory that one weight after the other is fetched into. holds: the number of the present one."""

    def __init__(self, size: int, device: torch.device):
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.holds, self.mark = -1, None

    def view(self, weight: Tensor) -> Tensor:
        return self.memory[: weight.nbytes].view(weight.dtype).view(weight.shape)


class Feeder:
    """Brings weights to the device, each just before its product: one slot holds the weight in use, the other the next one.

    Which is next is what came after the same product the last time: the order of the forward pass, of recomputation and of the backward
    pass are learned in the first step, and a wrong guess costs a copy that nobody waits for.
    """

    def __init__(self, lane: Lane, size: int):
        self.lane, self.size = lane, size
        self.slots: list[Slot] = []  # the least recently used first
        self.weights: dict[int, Tensor] = {}
        self.after: dict[tuple[int, str], int] = {}  # use -> number of the weight that was used next
        self.last: tuple[int, str] | None = None
        self.copies = 0

    def get(self, number: int, use: str, weight: Tensor) -> Tensor:
        """weight: [out, in] on the host -> the same on the device, until the next call."""
        self.slots = self.slots or [Slot(self.size, self.lane.device) for _ in range(2)]
        self.weights[number] = weight
        if self.last is not None:
            self.after[self.last] = number
        self.last = (number, use)
        slot = self._load(number)
        self.lane.wait(slot.mark)
        if (following := self.after.get(self.last)) in self.weights:
            # asked for before the product that uses this slot: the other one is free as soon as the product before is done
            self._load(following)
            self.slots.sort(key=lambda s: s is slot)
        return slot.view(weight)

    def _load(self, number: int) -> Slot:
        slot = next((s for s in self.slots if s.holds == number), self.slots[0])
        if slot.holds != number:
            slot.holds, slot.mark = number, self.lane.copy(slot.view(self.weights[number]), self.weights[number])
            self.copies += 1
        self.slots.sort(key=lambda s: s is slot)  # it is the most recently used now
        return slot


class Fetched:
    """What fills `gemm`: the product with a weight that lies on the host."""

    def __init__(self, feeder: Feeder, number: int):
        self.feeder, self.number = feeder, number

    def __call__(self, x: Tensor, w: Tensor) -> Tensor:
        """x: [..., in] on the device, w: [out, in] on the host -> [..., out]."""
        return _FetchedProduct.apply(x, w, self.feeder, self.number)


class _FetchedProduct(torch.autograd.Function):
    """y = x W^T; grad x = grad y W. W is frozen: it is fetched for either and kept for neither."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, feeder: Feeder, number: int) -> Tensor:
        ctx.w, ctx.feeder, ctx.number = w, feeder, number
        again = torch._C._current_graph_task_id() != -1  # recomputed, in the backward pass
        return F.linear(x, feeder.get(number, "again" if again else "forward", w))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad @ ctx.feeder.get(ctx.number, "backward", ctx.w), None, None, None
