"""What a config needs of each GPU, at any number of ranks, without GPUs, weights or data.

    python -m tools.plan --config FILE.toml --world N [--gpu h200] [--arch FOLDER] [--suggest] [--section.key=value ...]

A fake process group of that size lets `train.assemble` build and shard the model on meta as rank 0 of the run does. Layers are
alike, so 2 and 3 of them are built and the rest follows on the line through both. Bytes of parameters are those of the local
parts; activations are what autograd saves in the real forward of a block on fake tensors, counted once per storage and without
the weights. Attention's kernel is replaced by one that saves what the real one saves: q, k, v, output and log-sum-exp.

The peak adds, over what stays: gathered units (the root's, and two blocks, as one is prefetched), whole gradients of a block
before they are reduced (compute dtype and fp32), and the head (hidden states and their slopes, the fp32 gradient of the
vocabulary, two chunks of logits). The CUDA context, NCCL and fragmentation are not in it: 10 % of the GPU are left for them.
Those are estimates and have not been compared with a GPU's allocator.

Bytes that a rank receives in a step of k micro-batches, for an axis of n ranks, each collective moving (n - 1)/n of the whole:

    fsdp        k (2 gathers in compute dtype + 1 reduction in fp32) of all weights (frozen ones are not reduced)
    replicate   2 of the trained part of a rank, fp32: an all-reduce, once a step
    tensor      k x 4 exchanges a block of [T, D], forward, again backward, and again if blocks are recomputed
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from runtime.config import parse_args
from runtime.errors import ConfigError
from tools import command
from train import RunConfig, assemble, dtypes

if TYPE_CHECKING:
    from model.arch import Arch
    from parallel.mesh import Mesh

GPU_GB = {"a100-40": 40, "a100": 80, "h100": 80, "h200": 141, "b200": 180, "rtx4090": 24}  # vendors' data sheets, 10^9 bytes
ABOUT = "What a config needs of each GPU at any number of ranks (--world N, --gpu NAME, --arch FOLDER), without GPUs, weights or data."


@dataclass(frozen=True)
class Plan:
    """Bytes of rank 0; `communication`: bytes it receives in a step, by axis."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int
    head: int
    communication: dict[str, int]

    @property
    def peak(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.gathered + self.head


@dataclass(frozen=True)
class Weights:
    """Bytes and numbers of what a model of some layers has; all of them linear in the layers."""

    held: int  # bytes of this rank's parts
    trained: int  # bytes of those that train
    tensors: int  # how many train
    gathered: int  # numbers of a tensor rank's part, whole over fsdp
    gathered_trained: int

    @classmethod
    def of(cls, cfg: RunConfig, arch: Arch, mesh: Mesh) -> Weights:
        from model.weights import local

        net, _ = assemble(cfg, arch, mesh)
        parts = [(local(p).nbytes, p.numel() // mesh.axes["tensor"], p.requires_grad) for p in net.parameters()]
        trained = [part for part in parts if part[2]]
        sums = [sum(part[i] for part in which) for which in (parts, trained) for i in (0, 1)]
        return cls(sums[0], sums[2], len(trained), sums[1], sums[3])

    def at(self, three: Weights, layers: int) -> Weights:
        """This is the model of two layers; the line through it and that of three, at `layers`."""
        return Weights(*(a + (b - a) * (layers - 2) for a, b in zip(vars(self).values(), vars(three).values())))


def shortened(arch: Arch, layers: int) -> Arch:
    return replace(arch, layers=(arch.layers * layers)[:layers])


def weights(cfg: RunConfig, arch: Arch, mesh: Mesh) -> tuple[Weights, Weights]:
    """Of the whole model, and of one block."""
    two, three = (Weights.of(cfg, shortened(arch, n), mesh) for n in (2, 3))
    return two.at(three, arch.num_hidden_layers), Weights(*(b - a for a, b in zip(vars(two).values(), vars(three).values())))


def saved_by_block(cfg: RunConfig, arch: Arch, mesh: Mesh, tokens: int) -> int:
    """Bytes autograd keeps of the forward of one block without recomputation, for `tokens` slots of a row."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from model import build
    from model.attention import AttnContext, Borders
    from model.transforms.lora import apply_lora
    from model.transforms.trainable import apply_trainable
    from parallel import tensor

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:2], dtype=torch.float32)
            ctx.save_for_backward(q, k, v, out, lse)
            return out

    compute, masters = dtypes(cfg.precision, mesh.device)
    net = build(shortened(arch, 1))
    if cfg.lora is not None:
        apply_lora(net, cfg.lora)
    # FSDP hands blocks their weights in compute dtype; without it the cast of a master is one more tensor that is kept
    apply_trainable(net, cfg.lora, compute, compute if mesh.weights["fsdp"].size() * mesh.axes["replicate"] > 1 else masters)
    tensor.split(net, mesh.weights["tensor"])
    block, kept = net.model.layers[0], {}
    block.self_attn.fill("backend", lambda q, k, v, ctx, kind, scale: Attend.apply(q, k, v), "tools.plan")
    with FakeTensorMode(allow_non_fake_inputs=True):
        net.to_empty(device="cpu")
        net.reset_buffers("cpu")
        row = torch.zeros(tokens, dtype=torch.int32)
        ctx = AttnContext(Borders(tokens, torch.zeros(2, dtype=torch.int32), tokens), net.model.rotary(row, compute))
        h = torch.empty(tokens // mesh.axes["tensor"], arch.hidden_size, dtype=compute, requires_grad=True)
        shared = [p.to_local() if hasattr(p, "to_local") else p for p in net.parameters()] + [*_tensors(vars(ctx))]
        known = {t.untyped_storage()._cdata for t in shared}

        def pack(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            if storage._cdata not in known:
                kept[storage._cdata] = (storage.nbytes(), t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = block(h, ctx)
        assert out.shape == h.shape
    return sum(size for size, _ in kept.values())


def _tensors(x: object) -> list:
    import torch

    items = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
    return [x] if isinstance(x, torch.Tensor) else [t for item in items for t in _tensors(item)]


def plan(cfg: RunConfig, arch: Arch, mesh: Mesh) -> Plan:
    """Raises: ConfigError, if the layout does not fit the model."""
    from kernels.linear_logprob import BUDGET
    from parallel.apply import check

    check(cfg, mesh.axes, arch, cfg.data.tokens, cfg.lora)
    if mesh.axes["context"] > 1:
        raise ConfigError("is not planned yet; plan with parallel.context=1", "parallel.context", mesh.axes["context"])
    total, block = weights(cfg, arch, mesh)
    tensor, copies, fsdp = mesh.axes["tensor"], mesh.axes["replicate"], mesh.weights["fsdp"].size()
    wide, layers = dtypes(cfg.precision, mesh.device)[0].itemsize, arch.num_hidden_layers
    hidden = cfg.data.tokens * arch.hidden_size * wide
    saved, full = saved_by_block(cfg, arch, mesh, cfg.data.tokens), cfg.recompute.kind == "full"
    vocabulary = -(-arch.vocab_size // tensor) * arch.hidden_size * 4 if cfg.lora is None else 0
    root = total.gathered - layers * block.gathered
    gathered = (root + 2 * block.gathered) * wide + block.gathered_trained * (wide + 4) if fsdp * copies > 1 else 0
    k = cfg.train.accumulate
    return Plan(
        parameters=total.held,
        gradients=total.trained,
        optimizer=2 * total.trained + 4 * total.tensors,
        activations=layers * hidden // tensor + saved if full else layers * saved,
        gathered=gathered,
        head=2 * hidden + vocabulary + 2 * BUDGET["cuda"],
        communication={
            "fsdp": k * (2 * total.gathered * wide + 4 * total.gathered_trained) * (fsdp - 1) // fsdp,
            "replicate": 2 * 4 * (total.gathered_trained // fsdp) * (copies - 1) // copies,
            "tensor": k * 4 * layers * (3 if full else 2) * hidden * (tensor - 1) // tensor,
        },
    )


def advice(cfg: RunConfig, mesh: Mesh) -> str:
    """What to change where a plan does not fit, the cheapest first."""
    ways = ['recompute.kind = "full"'] if cfg.recompute.kind == "none" else []
    ways += ["parallel.replicate = 1"] if mesh.axes["replicate"] > 1 else []
    ways += [
        f"data.tokens = {cfg.data.tokens // 2} with train.accumulate = {2 * cfg.train.accumulate}",
        "more ranks, or a larger parallel.tensor",
    ]
    return "; ".join(ways)


def suggestions(cfg: RunConfig, arch: Arch, world: int, room: int) -> list[tuple[int, str, Plan]]:
    """(bytes received for as many rows as ranks, what to set, its plan) of the layouts that need at most `room`, the least traffic first.

    Tried: tensor within a node of 8, one copy of the weights or one a node, blocks recomputed or not.
    """
    import torch

    from parallel.mesh import Mesh

    found = []
    for tensor in (n for n in (1, 2, 4, 8) if world % n == 0):
        for copies in {1, world // 8} if world % 8 == 0 else {1}:
            if world % (tensor * copies):
                continue
            layout = replace(cfg.parallel, tensor=tensor, replicate=copies, shard=world // (tensor * copies), context=1)
            mesh = Mesh.build(layout, torch.device("cpu"))
            for kind in ("none", "full"):
                one = replace(cfg, parallel=layout, recompute=replace(cfg.recompute, kind=kind))
                try:
                    planned = plan(one, arch, mesh)
                except ConfigError:  # the layout is not legal for this model
                    continue
                keys = f"--parallel.replicate={copies} --parallel.shard={layout.shard} --parallel.tensor={tensor} --recompute.kind={kind}"
                found.append((tensor * sum(planned.communication.values()), keys, planned))  # tensor ranks share a row
    return sorted((one for one in found if one[2].peak <= room), key=lambda one: (one[0], one[2].peak))


def run(cfg: RunConfig, world: int, gpu: str, folder: str | None, suggest: bool) -> None:
    import torch
    import torch.distributed as dist

    from model.arch import Arch
    from model.hub import fetch
    from parallel.mesh import Mesh, sizes

    try:
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as e:  # a private module of torch
        raise ConfigError(f"this version of torch has no fake process group, which planning needs ({e})") from None
    if not suggest:
        sizes(cfg.parallel, world)
    room = int(0.9 * GPU_GB[gpu] * 10**9)
    arch = Arch.from_folder(folder or fetch(cfg.model.path, cfg.model.revision))
    if cfg.precision.compute == "auto":
        cfg = replace(cfg, precision=replace(cfg.precision, compute="bf16"))
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        if suggest:
            ways = suggestions(cfg, arch, world, room)
            print(
                f"layouts of {world} ranks that fit {gpu}, the least traffic first:" if ways else f"no layout of {world} ranks fits {gpu}"
            )
            for traffic, keys, one in ways[:3]:
                print(f"  {keys}   peak {one.peak / 2**30:.2f} GiB, receives {traffic / 2**30:.2f} GiB for a row per rank")
            return
        mesh = Mesh.build(cfg.parallel, torch.device("cpu"))
        found = plan(cfg, arch, mesh)
        print(f"{arch.name or arch.family} on {world} ranks; {mesh.describe()}; GiB per rank:")
        for name in ("parameters", "gradients", "optimizer", "activations", "gathered", "head", "peak"):
            print(f"  {name:12} {getattr(found, name) / 2**30:9.2f}")
        print("received per step, GiB: " + ", ".join(f"{axis} {size / 2**30:.2f}" for axis, size in found.communication.items()))
        fits = found.peak <= room
        print(
            f"{'fits' if fits else 'does not fit'} {gpu} ({GPU_GB[gpu]} GB, of which 90 % are used)"
            + ("" if fits else f"; try {advice(cfg, mesh)}")
        )
    finally:
        dist.destroy_process_group()


@command
def main(argv: list[str]) -> None:
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--world", default="")
    options.add_argument("--gpu", default="h200")
    options.add_argument("--arch")
    options.add_argument("--suggest", action="store_true")
    args, rest = options.parse_known_args(argv)
    cfg = parse_args(RunConfig, rest, prog="python -m tools.plan --world N [--gpu NAME] [--arch FOLDER]", about=ABOUT)
    if not args.world.isdecimal() or int(args.world) < 1:
        raise ConfigError("must be a number of ranks", "--world", args.world)
    if args.gpu not in GPU_GB:
        raise ConfigError(f"is not known; known: {', '.join(GPU_GB)}", "--gpu", args.gpu)
    run(cfg, int(args.world), args.gpu, args.arch, args.suggest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
