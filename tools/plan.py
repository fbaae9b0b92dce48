"""What a config needs of each GPU, at any number of ranks, without GPUs, weights or data.

    python -m tools.plan --config FILE.toml --world N [--gpu h200] [--arch FOLDER] [--suggest] [--section.key=value ...]

A fake process group of that size lets rank 0 of the run build and shard the model (`train.assemble`) and take a whole step on fake
tensors, which have shapes and no memory: forward, backward, clipping, optimizer, with the collectives, recomputation, tiling and
offloading of the run. A ledger (runtime/memory.py) enters what lives when. Layers are alike, so models of 3 and of 4 layers are run
(of more, where recomputation or prefetching has a longer period), and each quantity follows on the line through both. The peak is
found by moment: forward and backward of the first two blocks and of the last one, of the embedding and of the head, clipping, the
optimizer. From the second block to the last memory changes evenly, so the largest of these is the largest of all.

The numbers are of eager blocks in `precision.compute` (`auto`: bf16), with the attention kernel's fake version, which saves what the
real one saves. What [compile] saves is not counted. The CUDA context, NCCL's buffers and fragmentation are not in them: 10 % of the
GPU are left for those.

--suggest ranks layouts by an estimate of GPU time per token, from data sheets: products at half of the peak, weights gathered
beside them, the exchanges of tensor and context ranks and of copies on top, at the speed of the link that the axis spans. It is for
the order of candidates, not a prediction; each layout named has been planned and fits.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from parallel.config import RecomputeConfig
from runtime.config import parse_args
from runtime.errors import ConfigError
from tools import command
from train import RunConfig, assemble, dtypes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from model.arch import Arch
    from model.decoder import Decoder
    from parallel.mesh import Mesh
    from runtime.memory import Ledger

NODE = 8  # GPUs that share the fast links


class Gpu(NamedTuple):
    """From the vendors' data sheets. memory: GB (10^9 bytes); flops: dense bf16 per second; link, network: bytes per second that a GPU
    receives within its node, and from others."""

    memory: int
    flops: float
    link: float
    network: float


GPUS = {
    "a100-40": Gpu(40, 312e12, 300e9, 25e9),
    "a100": Gpu(80, 312e12, 300e9, 25e9),
    "h100": Gpu(80, 989e12, 450e9, 50e9),
    "h200": Gpu(141, 989e12, 450e9, 50e9),
    "b200": Gpu(180, 2250e12, 900e9, 50e9),
    "rtx4090": Gpu(24, 165e12, 25e9, 25e9),
}
ABOUT = "What a config needs of each GPU at any number of ranks (--world N, --gpu NAME, --arch FOLDER), without GPUs, weights or data."
BETWEEN = "blocks between"
KINDS = ("parameters", "gradients", "optimizer", "activations", "gathered", "temporary")


@dataclass(frozen=True)
class Profile:
    """Of rank 0 in one step. moments: bytes by kind at the fullest moment of each part; traffic: bytes received, by axis; flops: of a
    token, recomputation left out."""

    moments: dict[str, dict[str, float]]
    traffic: dict[str, float]
    flops: float

    def line(self, other: Profile, x: float) -> Profile:
        """The line through this (0) and another (1) at x, number by number."""

        def at(a: dict, b: dict) -> dict:
            return {key: a.get(key, 0) + (b.get(key, 0) - a.get(key, 0)) * x for key in a | b}

        moments = {name: at(found, other.moments[name]) for name, found in self.moments.items() if not name.startswith(BETWEEN)}
        return Profile(moments, at(self.traffic, other.traffic), self.flops + (other.flops - self.flops) * x)


@dataclass(frozen=True)
class Plan:
    """Bytes of a rank at the fullest moment of a step. `host`: in host memory, then."""

    moment: str
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int
    temporary: int
    host: int
    traffic: dict[str, int]
    flops: float
    said: str = ""  # what was chosen for the run

    @property
    def peak(self) -> int:
        return sum(getattr(self, kind) for kind in KINDS)

    @classmethod
    def of(cls, profile: Profile) -> Plan:
        moment, kinds = max(profile.moments.items(), key=lambda item: sum(item[1].get(kind, 0) for kind in KINDS))
        numbers = {kind: round(kinds.get(kind, 0)) for kind in (*KINDS, "host")}
        return cls(moment, **numbers, traffic={axis: round(n) for axis, n in profile.traffic.items()}, flops=profile.flops)


# -- one step on fake tensors ----------------------------------------------------------------------------------------------


def dry_step(cfg: RunConfig, arch: Arch, mesh: Mesh) -> Profile:
    """A step of rank 0 with all layers of `arch`, on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    net, _ = assemble(cfg, arch, mesh)
    with FakeTensorMode(allow_non_fake_inputs=True):
        net.to_empty(device="cpu")
        net.reset_buffers("cpu")
        return measured_step(cfg, net, mesh)


def measured_step(cfg: RunConfig, net: Decoder, mesh: Mesh) -> Profile:
    """What a step of this rank holds and receives; `net` has memory, fake or real."""

    from model import flops
    from objective import lm
    from optim.adamw import build, set_lr
    from optim.clip import clip
    from parallel import offload, transfer
    from parallel.context import RECEIVED
    from parallel.fsdp import last_backward
    from runtime.memory import Ledger

    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    opt = offload.optimizer(functools.partial(build, trained.items(), cfg.optim), cfg.offload, mesh.device)
    row, there = a_row(cfg, mesh), cfg.offload.parameters
    net.train()
    with Ledger(RECEIVED) as ledger, ledger.saving(), watched(net, ledger, cfg.parallel.prefetch), transfer.told(ledger.host):
        for name, p in net.named_parameters():
            ledger.tag("host" if there or name in net.on_host else "parameters", [p])
        state = [t for tensors in opt.state.values() for t in tensors.values()]
        ledger.tag("host" if there or cfg.offload.optimizer else "optimizer", state)
        traffic, last = [], min(cfg.train.accumulate, 3)  # the first micro-batch, one between, and the last
        for i in range(last):
            last_backward(net, i == last - 1, cfg.parallel)
            loss = lm.loss(net, row, 1.0, cfg.objective)
            ledger.mark("head, forward")
            loss.backward()
            ledger.mark("embedding, backward")
            ledger.tag("host" if there else "gradients", [p.grad for p in trained.values() if p.grad is not None])
            traffic.append(dict(ledger.traffic))
            del loss
        clip(trained.values(), cfg.optim.max_norm, opt)
        ledger.mark("clipping")
        set_lr(opt, cfg.optim.lr)
        opt.step()
        ledger.mark("optimizer")
        opt.zero_grad(set_to_none=True)
    received, more = dict(ledger.traffic), cfg.train.accumulate - last
    if more:
        received = {name: n + more * (traffic[1].get(name, 0) - traffic[0].get(name, 0)) for name, n in received.items()}
    return Profile(ledger.peaks(), by_axis(received, mesh), flops.per_token(net, min(cfg.data.longest, cfg.data.tokens)))


def a_row(cfg: RunConfig, mesh: Mesh):
    """A row of one micro-batch as this rank gets it. Its documents are as long as they may be."""
    import torch

    from data.batch import Batch
    from parallel.context import split

    slots, longest = cfg.data.tokens, cfg.data.longest
    tokens = torch.zeros(slots, dtype=torch.int64)
    borders = (torch.arange(max(64, slots // 64), dtype=torch.int32) * longest).clamp(max=slots)
    return split(Batch(tokens, tokens.clone(), tokens.int(), borders, longest), mesh)


@contextlib.contextmanager
def watched(net: Decoder, ledger: Ledger, ahead: int) -> Iterator[None]:
    """Marks where a forward and a backward pass goes from block to block. Those are told apart whose neighbours differ: the last, and
    the first ones, for which `ahead` blocks cannot be gathered ahead in the backward pass."""
    blocks, hooks = net.model.layers, []
    names = {i: f"block {i + 1}" for i in range(1 + ahead)} | {len(blocks) - 1: "last block"}

    def entered(i: int, h) -> None:
        name, before = names.get(i, BETWEEN), names.get(i - 1, BETWEEN)
        ledger.mark(f"{before}, forward" if i else "embedding, forward")
        if h.requires_grad:
            h.register_hook(lambda grad: ledger.mark(f"{name}, backward"))

    def left(h) -> None:
        ledger.mark("last block, forward")
        if h.requires_grad:
            h.register_hook(lambda grad: ledger.mark("head, backward"))

    for i, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(lambda _, args, i=i: entered(i, args[0])))
    hooks.append(blocks[-1].register_forward_hook(lambda _, args, out: left(out)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def by_axis(traffic: dict[tuple[str, str], int], mesh: Mesh) -> dict[str, int]:
    """Bytes by axis instead of by namespace and group. Groups that FSDP2 made itself count for the axis it shards over."""
    names = {view: {view[axis].get_group().group_name: axis for axis in view.mesh_dim_names} for view in (mesh.weights, mesh.tokens)}
    found: dict[str, int] = defaultdict(int)
    for (namespace, group), size in traffic.items():
        mine, other = (names[mesh.weights], names[mesh.tokens]) if namespace == "c10d" else (names[mesh.tokens], names[mesh.weights])
        found[mine.get(group) or other.get(group, "fsdp")] += size
    found["fsdp"] += found.pop("data", 0)  # the same ranks, or those of them that share no row: norms of gradients
    return {axis: size for axis, size in found.items() if size}


# -- from few layers to all ------------------------------------------------------------------------------------------------


def shortened(arch: Arch, layers: int) -> Arch:
    return replace(arch, layers=(arch.layers * -(-layers // len(arch.layers)))[:layers])


def period(cfg: RunConfig, arch: Arch, mesh: Mesh) -> int:
    """After how many layers memory and traffic repeat."""
    every = cfg.recompute.every if cfg.recompute.kind == "every_n" else 1
    kinds = next((n for n in range(1, 13) if all(a == b for a, b in zip(arch.layers, arch.layers[n:]))), 1)
    return math.lcm(every, kinds if mesh.axes["context"] > 1 else 1)  # windows change what context ranks exchange, nothing else


def recomputed(cfg: RunConfig, kind: str) -> RecomputeConfig:
    """The config's section, or another kind at its defaults."""
    return cfg.recompute if kind == cfg.recompute.kind else RecomputeConfig(kind=kind)


def as_planned(cfg: RunConfig) -> RunConfig:
    """Without what fake tensors cannot go through: compiled blocks and torch's optimizer run, and what would go to disk goes to host
    memory, which for the device is the same."""
    kind = "none" if cfg.recompute.kind == "budget" else cfg.recompute.kind
    activations = "cpu" if cfg.offload.activations == "disk" else cfg.offload.activations
    offload = replace(cfg.offload, activations=activations, folder="")
    optim = replace(cfg.optim, impl="torch")
    return replace(cfg, compile=None, recompute=recomputed(cfg, kind), offload=offload, optim=optim)


def plan(cfg: RunConfig, arch: Arch, mesh: Mesh, layers: int | None = None, room: int | None = None) -> Plan:
    """The plan for `layers` layers (default: all), from two models of few. room: bytes of a rank, for recompute.kind='fit' without `gib`.

    Raises:
        ConfigError: the layout does not fit the model.
    """
    from parallel.apply import check

    check(cfg, mesh.axes, arch, cfg.lora)
    layers = layers or arch.num_hidden_layers
    if cfg.recompute.kind == "fit":
        return fitted(cfg, arch, mesh, layers, room)
    return Plan.of(profile(as_planned(cfg), arch, mesh, layers))


def profile(cfg: RunConfig, arch: Arch, mesh: Mesh, layers: int) -> Profile:
    step = period(cfg, arch, mesh)
    few = step * -(-(2 + cfg.parallel.prefetch) // step)
    if layers <= few + step:
        few, step = layers, 1
    less = dry_step(cfg, shortened(arch, few), mesh)
    if layers == few:
        return less
    return less.line(dry_step(cfg, shortened(arch, few + step), mesh), (layers - few) / step)


def fitted(cfg: RunConfig, arch: Arch, mesh: Mesh, layers: int, room: int | None) -> Plan:
    """With recompute.kind='fit': planned with every block recomputed, and what that leaves of `room` is what blocks may keep. A run asks
    its GPU what is free instead (parallel/fit.py).

    Raises:
        ConfigError: it does not fit, or neither `room` nor recompute.gib is there to fit into.
    """
    from parallel import fit

    if not (cfg.recompute.gib or room):
        raise ConfigError("is needed to plan recompute.kind='fit' without a GPU's size", "recompute.gib", cfg.recompute.gib)
    cfg = as_planned(cfg)
    full = profile(replace(cfg, recompute=recomputed(cfg, "full")), arch, mesh, layers)
    compute, slots = dtypes(cfg.precision, mesh.device)[0], -(-cfg.data.tokens // mesh.axes["context"])
    net, _ = assemble(replace(cfg, recompute=recomputed(cfg, "none")), shortened(arch, period(cfg, arch, mesh)), mesh)
    bytes_of = fit.table(arch, cfg.recompute.ways, compute, mesh.axes["tensor"], fit.ranks(net.model.layers))
    inputs = layers * slots * fit.kept(arch, "full", compute, mesh.axes["tensor"])
    memory = int(cfg.recompute.gib * fit.GIB) if cfg.recompute.gib else int(room - Plan.of(full).peak + inputs)
    ways = fit.choose(slots, layers, bytes_of, memory)
    more = fit.held(slots, ways, bytes_of) - inputs
    passes = [name for name in full.moments if name not in ("clipping", "optimizer")]  # all of it is kept at the fullest of those
    moments = full.moments | {
        name: full.moments[name] | {"activations": full.moments[name].get("activations", 0) + more} for name in passes
    }
    found, away = Plan.of(replace(full, moments=moments)), round(ways.count("offload") * slots * bytes_of.get("offload", 0))
    return replace(found, host=found.host + away, said=fit.describe(slots, ways, bytes_of, memory))


# -- layouts to choose from ------------------------------------------------------------------------------------------------


def cost(cfg: RunConfig, arch: Arch, world: int, gpu: Gpu) -> float:
    """GPU seconds per token, by the estimate that the module docstring states; before anything is planned."""
    from parallel.mesh import sizes

    axes = sizes(cfg.parallel, world)
    shared, fsdp = axes["tensor"] * axes["context"], axes["shard"] * axes["context"]
    hidden, kv = arch.hidden_size, arch.num_key_value_heads * arch.head_dim
    block = 2 * hidden * (arch.num_attention_heads * arch.head_dim + kv) + 3 * hidden * arch.intermediate_size
    weights = arch.num_hidden_layers * block + 2 * arch.vocab_size * hidden
    passes = (3 if cfg.lora is None else 2) + {"none": 0, "mlp": 0.5, "full": 1, "selective": 0.9}[cfg.recompute.kind]
    length = min(cfg.data.longest, cfg.data.tokens)
    attention = arch.num_hidden_layers * arch.num_attention_heads * arch.head_dim * length
    products = passes * 2 * (weights + attention) / (0.5 * gpu.flops)  # per token
    rows = cfg.data.tokens * cfg.train.accumulate  # of one group of ranks that share rows, per step

    def wire(ranks: int, span: int) -> float:
        return (ranks - 1) / ranks / (gpu.link if span <= NODE else gpu.network)

    trained = 0 if cfg.lora is not None else 4 * weights
    gathering = cfg.train.accumulate * (4 * weights + trained) / axes["tensor"] * wire(fsdp, fsdp * axes["tensor"])
    copies = 2 * trained / axes["tensor"] / fsdp * wire(axes["replicate"], world)
    exchanges = 4 + 2 * (passes > 3 or (cfg.lora is not None and passes > 2))
    tensor = arch.num_hidden_layers * exchanges * rows / axes["context"] * hidden * 2 * wire(axes["tensor"], axes["tensor"])
    context = arch.num_hidden_layers * 3 * rows * 2 * kv / axes["tensor"] * 2 * wire(axes["context"], shared)
    return (max(products * rows / shared, gathering) + copies + tensor + context) * shared / rows


def candidates(cfg: RunConfig, arch: Arch, world: int, gpu: Gpu) -> list[tuple[float, list[str], RunConfig]]:
    """Legal layouts and recomputations, the cheapest first, with the words that set them.

    Raises:
        ConfigError: there is none, for instance as something else in the config needs one rank.
    """
    from parallel.apply import check
    from parallel.mesh import sizes

    found, refusal = [], None
    powers = [n for n in (1, 2, 4, 8, 16) if world % n == 0]
    for tensor in (n for n in powers if n <= NODE):
        for context in powers:
            for replicate in sorted({1, world // NODE} if world % NODE == 0 else {1}):
                if world % (tensor * context * replicate):
                    continue
                shard = world // (tensor * context * replicate)
                layout = replace(cfg.parallel, tensor=tensor, context=context, replicate=replicate, shard=shard, context_method="auto")
                for kind in ("none", "mlp", "selective", "full"):
                    one = replace(cfg, parallel=layout, recompute=recomputed(cfg, kind))
                    try:
                        check(one, sizes(layout, world), arch, cfg.lora)
                    except ConfigError as error:  # not legal for this model: no candidate
                        refusal = error
                        continue
                    axes = {"replicate": replicate, "shard": shard, "context": context, "tensor": tensor}
                    words = [f"--parallel.{axis}={n}" for axis, n in axes.items()] + [f"--recompute.kind={kind}"]
                    found.append((cost(one, arch, world, gpu), words, one))
    if not found:
        raise refusal or ConfigError("has no layout that could be tried", "--world", world)
    return sorted(found, key=lambda each: each[0])


def suggestions(cfg: RunConfig, arch: Arch, world: int, gpu: Gpu, room: int, many: int = 3) -> list[tuple[float, list[str], Plan]]:
    """The cheapest layouts whose plans need at most `room` bytes of each rank."""
    import torch

    from parallel.mesh import Mesh

    found, failed = [], set()
    for price, words, one in candidates(cfg, arch, world, gpu):
        layout, kind = tuple(words[:-1]), one.recompute.kind
        if (layout, "full") in failed or (layout, kind) in failed:
            continue
        planned = plan(one, arch, Mesh.build(one.parallel, torch.device("cpu")))
        if planned.peak <= room:
            found.append((price, words, planned))
        else:
            failed.add((layout, kind))
            if planned.parameters + planned.gradients + planned.optimizer > room:
                failed.add((layout, "full"))
        if len(found) == many:
            break
    return found


def advice(cfg: RunConfig, arch: Arch, world: int) -> str:
    """What to change where a plan does not fit, the cheapest first: what such a run may be set to, one at a time."""
    now, ways = cfg.recompute.kind, []

    def way(text: str, **sections: object) -> None:
        from parallel.apply import check
        from parallel.mesh import sizes

        changed = replace(cfg, **sections)
        with contextlib.suppress(ConfigError):
            check(changed, sizes(changed.parallel, world), arch, changed.lora)
            ways.append(text)

    for kind in {"none": ("mlp", "selective", "full"), "mlp": ("selective", "full"), "full": ()}.get(now, ("full",)):
        way(f'recompute.kind = "{kind}"', recompute=recomputed(cfg, kind))
    if cfg.data.tokens >= 16384 and not cfg.tiling.mlp:
        way("tiling.mlp = 2048", tiling=replace(cfg.tiling, mlp=2048))
    if cfg.offload.activations == "none":
        way('offload.activations = "hidden_states"', offload=replace(cfg.offload, activations="hidden_states"))
    if cfg.parallel.replicate > 1:
        way("parallel.replicate = 1 with parallel.shard = -1", parallel=replace(cfg.parallel, replicate=1, shard=-1))
    if cfg.data.tokens // 2 >= cfg.data.longest:
        ways.append(f"data.tokens = {cfg.data.tokens // 2} with train.accumulate = {2 * cfg.train.accumulate}")
    elif world > 1:
        wider = replace(cfg.parallel, context=2 * cfg.parallel.context, shard=-1)
        way(f"parallel.context = {wider.context} with parallel.shard = -1", parallel=wider)
    if not cfg.offload.parameters:
        offload = replace(cfg.offload, parameters=False, optimizer=False, frozen=False)
        alone = " alone" if cfg.offload.optimizer or cfg.offload.frozen else ""
        way(f"offload.parameters = true{alone}", offload=replace(offload, parameters=True))
    return "; ".join([*ways, "more ranks (--suggest tries layouts)"])


# -- the command -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fake_ranks(world: int) -> Iterator[None]:
    """A process group of `world` ranks of which this is rank 0 and the others are not there."""
    import torch.distributed as dist

    try:
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as e:  # a private module of torch
        raise ConfigError(f"this version of torch has no fake process group, which planning needs ({e})") from None
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def on_a_gpu(cfg: RunConfig) -> RunConfig:
    """`precision.compute = "auto"` as a GPU has it."""
    return replace(cfg, precision=replace(cfg.precision, compute="bf16")) if cfg.precision.compute == "auto" else cfg


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def run(cfg: RunConfig, world: int, name: str, folder: str | None, suggest: bool) -> None:
    import torch

    from model.arch import Arch
    from model.hub import fetch
    from parallel.mesh import Mesh, sizes

    if not suggest:
        sizes(cfg.parallel, world)
    gpu = GPUS[name]
    room = int(0.9 * gpu.memory * 10**9)
    arch, cfg = Arch.from_folder(folder or fetch(cfg.model.path, cfg.model.revision)), on_a_gpu(cfg)
    with fake_ranks(world):
        if suggest:
            ways = suggestions(cfg, arch, world, gpu, room)
            print(f"layouts of {world} ranks that fit {name}, the cheapest first:" if ways else f"no layout of {world} ranks fits {name}")
            for price, words, one in ways:
                print(f"  {' '.join(words)}   peak {gib(one.peak)} GiB, cost {price / ways[0][0]:.2f}")
            return
        mesh = Mesh.build(cfg.parallel, torch.device("cpu"))
        found = plan(cfg, arch, mesh, room=room)
    print(f"{arch.name or arch.family} on {world} ranks; {mesh.describe()}; GiB per rank at the peak ({found.moment}):")
    for kind in (*KINDS, "peak"):
        print(f"  {kind:12} {gib(getattr(found, kind)):>9}")
    if found.said:
        print(f"{found.said}, as planned; a run asks its GPU")
    if found.host:
        print(f"  {'disk' if cfg.offload.activations == 'disk' else 'host memory':12} {gib(found.host):>9}")
    if cfg.compile is not None:
        budget = " and recompute.kind='none' instead of 'budget'" if cfg.recompute.kind == "budget" else ""
        print(f"planned without [compile]{budget}; what the compiler saves is not counted")
    print("received per step, GiB: " + (", ".join(f"{axis} {gib(size)}" for axis, size in found.traffic.items()) or "nothing"))
    fits = found.peak <= room
    print(
        f"{'fits' if fits else 'does not fit'} {name} ({gpu.memory} GB, of which 90 % are used)"
        + ("" if fits else f"; try {advice(cfg, arch, world)}")
    )


@command
def main(argv: list[str]) -> None:
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--world", default="")
    options.add_argument("--gpu", default="h200")
    options.add_argument("--arch")
    options.add_argument("--suggest", action="store_true")
    args, rest = options.parse_known_args(argv)
    cfg = parse_args(RunConfig, rest, prog="python -m tools.plan --world N [--gpu NAME] [--arch FOLDER] [--suggest]", about=ABOUT)
    if not args.world.isdecimal() or int(args.world) < 1:
        raise ConfigError("must be a number of ranks", "--world", args.world)
    if args.gpu not in GPUS:
        raise ConfigError(f"is not known; known: {', '.join(GPUS)}", "--gpu", args.gpu)
    run(cfg, int(args.world), args.gpu, args.arch, args.suggest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
