"""Does this config's layout compute what one rank computes?

    python -m tools.selfcheck --config FILE.toml [--world N] [--arch FOLDER] [--section.key=value ...]

Takes the config's layout, recomputation, offloading, tiling, compilation and adapters, and the model's family with all that is
particular to it (grouped heads, windows, biases, tied embeddings, norms), made small: CPU ranks by fork run a few packed rows of
ragged documents in fp32, some of which cross the borders of ranks, and the loss and every gradient are compared with those of one
rank that uses none of these, with the reference attention. The bound is 1e-5 relative.

Axes are kept apart, not their sizes: those above 2 are checked with 2 ranks (4, if the layout has no other axis). Dropout is off:
masks are a function of the pack and cannot be compared with a reference that draws none. The exit code is 0 if all is equal, 1 if
not.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from model.config import KernelsConfig
from parallel.config import OffloadConfig, ParallelConfig, PrecisionConfig, RecomputeConfig, TilingConfig
from runtime.config import parse_args
from runtime.errors import ConfigError
from tools import command
from train import RunConfig, assemble

if TYPE_CHECKING:
    from data.batch import Batch
    from model.arch import Arch

BOUND = 1e-5
LENGTHS = (5, 31, 2, 17, 44, 1, 23, 9, 60, 12, 3, 28, 7, 38, 15, 20, 33, 41, 11, 26)
ROW, LONGEST = 131, 64  # slots of a row, which no axis divides; documents longer than the chunks of context ranks
ABOUT = "Compares the loss and every gradient of this config's layout, on a small model of the same kind, with those of one rank."


# -- smaller, of the same kind ---------------------------------------------------------------------------------------------


def smaller_layout(cfg: ParallelConfig, axes: dict[str, int]) -> ParallelConfig:
    """The same axes with 2 ranks each, or one of them with up to 4."""
    many = [axis for axis, n in axes.items() if n > 1]
    small = {axis: min(n, 4 if many == [axis] else 2) for axis, n in axes.items()}
    reshard = cfg.reshard if isinstance(cfg.reshard, str) else 2 if small["shard"] * small["context"] % 2 == 0 else "forward"
    return replace(cfg, **small, reshard=reshard)


def smaller_model(arch: Arch, axes: dict[str, int]) -> Arch:
    """A model of the same kind that these axes can share: key heads in the same proportion, windows shorter than the documents."""
    ranks = axes["tensor"] * axes["context"]
    group = arch.num_attention_heads // arch.num_key_value_heads
    kv_heads = axes["tensor"] * (2 if arch.num_key_value_heads > axes["tensor"] else 1)
    heads = math.lcm(kv_heads * min(group, 4), ranks if arch.num_attention_heads % ranks == 0 else 1)
    kinds = {kind: kind._replace(size=7) if kind.name == "window" else kind for kind in arch.kinds}
    period = next((n for n in range(1, 9) if all(a == b for a, b in zip(arch.layers, arch.layers[n:]))), 1)
    layers = (arch.layers * 3)[: max(3, period + 1)]
    return replace(
        arch,
        vocab_size=100,  # tensor ranks hold 50 or 25 rows, which others again divide unevenly
        hidden_size=48,
        intermediate_size=24 * axes["tensor"] * 2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=16,
        attention_scale=0.25,
        layers=tuple(layer._replace(kind=kinds[layer.kind]) for layer in layers),
        embed_scale=48**0.5 if arch.embed_scale != 1 else 1.0,
        initializer_range=0.2,
    )


def plain(cfg: RunConfig) -> RunConfig:
    """The reference: the same model and adapters, and nothing else."""
    return replace(
        cfg,
        parallel=ParallelConfig(),
        recompute=RecomputeConfig(),
        offload=OffloadConfig(),
        tiling=TilingConfig(),
        compile=None,
        kernels=KernelsConfig("sdpa", "separate", norm="torch", rope="torch", glu="torch", head="torch", dropout="torch"),
    )


# -- what is compared ------------------------------------------------------------------------------------------------------


def rows(count: int) -> list[Batch]:
    """The documents over `count` packed rows, first fit; rows may stay empty."""
    import torch

    from data.batch import IGNORE

    generator, bins = torch.Generator().manual_seed(0), [[] for _ in range(count)]
    for i, n in enumerate(LENGTHS):
        tokens = torch.randint(100, (n,), generator=generator)
        labels = torch.cat([tokens[1:], torch.tensor([IGNORE])])
        labels[: (i % 4) * n // 5] = IGNORE  # prompts, so that documents weigh unequally
        place = next((b for b in bins if sum(len(t) for t, _ in b) + n <= ROW), None)
        if place is not None:
            place.append((tokens, labels))
    return [packed(docs, number) for number, docs in enumerate(bins)]


def packed(docs: list, number: int) -> Batch:
    import torch

    from data.batch import IGNORE, Batch

    lengths = [len(tokens) for tokens, _ in docs]
    room = ROW - sum(lengths)
    while room > 0:  # padding, in documents that are not too long
        lengths.append(min(room, LONGEST))
        room -= lengths[-1]
    fill = ROW - sum(len(tokens) for tokens, _ in docs)
    borders = torch.tensor([0, *lengths]).cumsum(0)
    return Batch(
        tokens=torch.cat([tokens for tokens, _ in docs] + [torch.zeros(fill, dtype=torch.int64)]),
        labels=torch.cat([labels for _, labels in docs] + [torch.full((fill,), IGNORE)]),
        positions=torch.cat([torch.arange(n) for n in lengths]).int(),
        cu_seqlens=torch.cat([borders, torch.full((len(LENGTHS) + 4 - len(borders),), ROW)]).int(),
        max_seqlen=LONGEST,
        pack=number,
    )


def step(cfg: RunConfig, arch: Arch, packs: int):
    """(loss, whole gradients by name) of a step over `packs` rows. A collective."""
    import torch

    from model.safetensors_io import materialize
    from model.transforms.lora import is_adapter
    from model.weights import generator, local, region
    from objective import lm
    from parallel.context import split
    from parallel.fsdp import last_backward
    from parallel.mesh import Mesh

    mesh = Mesh.build(cfg.parallel, torch.device("cpu"))
    net, _ = assemble(cfg, arch, mesh)
    materialize(net, "cpu", 0, None)
    with torch.no_grad():
        for name, p in net.named_parameters():  # B starts at zero, which hides all errors in A; norms at 1, biases at 0
            if is_adapter(name) or p.ndim == 1:
                noise = torch.randn(p.shape, generator=generator(1, name)) * 0.1
                local(p).add_(noise[region(p)].to(p.dtype))
    net.train()
    micro = [split(row, mesh) for row in rows(packs)[mesh.data_rank :: mesh.data_size]]
    units, total = int(mesh.sum_over_data(torch.tensor(sum(map(lm.count, micro))))), torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(micro):
        last_backward(net, i == len(micro) - 1, cfg.parallel)
        loss = lm.loss(net, row, units, cfg.objective)
        loss.backward()
        total += loss.detach()
    grads = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    return float(mesh.sum_over_data(total)), {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}


def reference(rank: int, world: int, cfg: RunConfig, arch: Arch, packs: int, file: Path) -> float:
    from safetensors.torch import save_file

    loss, grads = step(cfg, arch, packs)
    save_file({name: g.contiguous() for name, g in grads.items()}, file)
    return loss


def errors(rank: int, world: int, cfg: RunConfig, arch: Arch, packs: int, file: Path) -> tuple[float, dict[str, float]]:
    """The loss, and the relative error of each gradient."""
    from safetensors.torch import load_file

    loss, grads = step(cfg, arch, packs)
    want = load_file(file)
    assert grads.keys() == want.keys()
    trivial = [name for name, g in want.items() if not g.norm() > 1e-6]
    assert not trivial, f"a reference that is zero proves nothing: {trivial[:3]}"  # a fault of this file, not of the user
    found = {name: ((grads[name] - g).norm() / g.norm()).item() for name, g in want.items()}
    return loss, {name: error if math.isfinite(error) else math.inf for name, error in found.items()}  # max() passes over NaN


# -- the command -----------------------------------------------------------------------------------------------------------


def run(cfg: RunConfig, world: int | None, folder: str | None) -> int:
    from model.arch import Arch
    from model.hub import fetch
    from parallel.apply import check
    from parallel.local import run as ranks
    from parallel.mesh import sizes

    arch = Arch.from_folder(folder or fetch(cfg.model.path, cfg.model.revision))
    if world is None:
        shard = cfg.parallel.shard if cfg.parallel.shard > 0 else 2  # -1: all ranks of the run; two show what sharding does
        world = shard * cfg.parallel.replicate * cfg.parallel.context * cfg.parallel.tensor
    axes = sizes(cfg.parallel, world)
    check(cfg, axes, arch, cfg.lora)
    layout = smaller_layout(cfg.parallel, axes)
    axes = sizes(layout, layout.replicate * layout.shard * layout.context * layout.tensor)
    arch, world = smaller_model(arch, axes), math.prod(axes.values())
    lora = cfg.lora and replace(cfg.lora, dropout=0.0, adapter=None, rank=min(cfg.lora.rank, 4))
    tiling = replace(cfg.tiling, mlp=24 if cfg.tiling.mlp else 0)
    precision = PrecisionConfig(compute="fp32")
    cfg = replace(cfg, parallel=layout, lora=lora, tiling=tiling, precision=precision)
    data = axes["replicate"] * axes["shard"]
    packs = data * max(1, min(cfg.train.accumulate, -(-4 // data)))
    small = f"{arch.num_hidden_layers} layers, {arch.num_attention_heads} heads, {arch.num_key_value_heads} key heads"
    grid = " x ".join(f"{axis} {n}" for axis, n in axes.items())
    print(f"{arch.name or arch.family} made small ({small}) on {world} ranks: {grid}; {packs} rows a step")
    with tempfile.TemporaryDirectory(prefix="selfcheck-") as folder:
        file = Path(folder) / "reference.safetensors"
        (want,) = ranks(reference, 1, plain(cfg), arch, packs, file, timeout=600.0)
        found = ranks(errors, world, cfg, arch, packs, file, timeout=600.0)
    loss, grads = found[0][0], {name: max(each[1][name] for each in found) for name in found[0][1]}
    off, worst = abs(loss - want) / abs(want), max(grads, key=grads.__getitem__)
    print(f"  loss       {want:.7f} on one rank, {loss:.7f} here: relative error {off:.1e}")
    print(f"  gradients  of {len(grads)} parameters: worst relative error {grads[worst]:.1e} ({worst})")
    good = max(off, grads[worst]) <= BOUND and math.isfinite(off)
    print(f"equal, to {BOUND:g}" if good else f"NOT equal: the bound is {BOUND:g}")
    return 0 if good else 1


@command
def main(argv: list[str]) -> int:
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--world")
    options.add_argument("--arch")
    args, rest = options.parse_known_args(argv)
    cfg = parse_args(RunConfig, rest, prog="python -m tools.selfcheck [--world N] [--arch FOLDER]", about=ABOUT)
    if args.world is not None and (not args.world.isdecimal() or int(args.world) < 1):
        raise ConfigError("must be a number of ranks", "--world", args.world)
    return run(cfg, args.world and int(args.world), args.arch)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
