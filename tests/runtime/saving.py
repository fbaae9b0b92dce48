"""A small run to save: tensors under several layouts, made from a step so that any state can be recognized."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from runtime.checkpoint import Checkpointer
from runtime.sections import CheckpointConfig

LAYOUTS = {  # by name: mesh shape, and placements along its axes
    "one": ((1,), (Shard(0),)),
    "fsdp2": ((2,), (Shard(0),)),
    "replicate2": ((2,), (Replicate(),)),
    "fsdp4": ((4,), (Shard(0),)),
    "hsdp4": ((2, 2), (Replicate(), Shard(0))),
    "fsdp_columns4": ((2, 2), (Shard(0), Shard(1))),
    "twice4": ((2, 2), (Shard(0), Shard(0))),
}
SHAPES = {  # uneven, and fewer rows than ranks: some ranks hold nothing
    "layers.0.weight": ((7, 6), torch.float32),
    "layers.0.weight.exp_avg": ((7, 6), torch.bfloat16),
    "norm.weight": ((3,), torch.float32),
    "packed": ((5, 4), torch.uint8),
}
IDENTITY = {"model": "aa", "data": "bb", "optimizer": "cc"}


def whole(step: int) -> dict[str, torch.Tensor]:
    """The tensors after `step`, undistributed; `count` stays plain, as an optimizer's step count does."""
    random = torch.Generator().manual_seed(step)
    made = {name: (torch.randn(shape, generator=random) * 50).to(dtype) for name, (shape, dtype) in SHAPES.items()}
    return made | {"count": torch.tensor(float(step))}


def spread(tensors: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """The same under a layout. Placements along an axis that a tensor does not have become Shard(0)."""
    shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", shape)
    out = {}
    for name, t in tensors.items():
        fitting = [Shard(0) if p.is_shard() and p.dim >= t.ndim else p for p in placements]
        out[name] = distribute_tensor(t, mesh, fitting) if t.ndim else t
    return out


def gathered(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def empty(layout: str) -> dict[str, torch.Tensor]:
    return spread({name: torch.full_like(t, 77) for name, t in whole(0).items()}, layout)


def checkpointer(folder: Path, said: list[str] | None = None, *, async_: bool = False, keep: int = 2, **other) -> Checkpointer:
    cfg = CheckpointConfig(async_=async_, keep=keep, allow_change=other.pop("allow_change", False))
    told = said if said is not None else []
    return Checkpointer(folder, cfg, other.pop("identity", IDENTITY), "x = 1\n", other.pop("config", {}), say=told.append, **other)


def save(ckpt: Checkpointer, step: int, layout: str):
    """Saves `whole(step)`, to its end."""
    rng = {"cpu": torch.full((4,), 10 * step % 250 + ckpt.team.rank, dtype=torch.uint8)}
    return ckpt.save(step, spread(whole(step), layout), {"position": step}, rng) or ckpt.wait()


def resumed(ckpt: Checkpointer, layout: str, policy: str | None = None) -> int | None:
    """Finds and loads; returns the step after asserting that every value is of that step."""
    found = ckpt.find(policy)
    if found is None:
        return None
    tensors = empty(layout)
    state = ckpt.load(found, tensors)
    assert state == {"position": found.step}
    assert same(gathered(tensors), whole(found.step))
    return found.step


@contextmanager
def run_folder() -> Iterator[Path]:
    """In memory where there is such a file system: these tests are about order, not about how long a disk takes to fsync."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="run-", dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def hurt(path: Path, dice: random.Random) -> tuple[str, str]:
    """Changes one file of a checkpoint as disks and copies do. Returns its name, and how."""
    victim = dice.choice(sorted(p for p in path.iterdir() if p.stat().st_size))
    data = bytearray(victim.read_bytes())
    kind = dice.choice(["flip", "flip", "flip", "truncate", "zero", "remove", "grow"])
    if kind == "remove":
        victim.unlink()
        return victim.name, kind
    place = dice.randrange(len(data))
    if kind == "flip":
        data[place] ^= 1 << dice.randrange(8)
    elif kind == "truncate":
        del data[place:]
    elif kind == "grow":
        data += b"\0"
    else:
        data[place : place + 512] = bytes(len(data[place : place + 512]))
        data[place] ^= 1  # zeros may have been there
    victim.write_bytes(data)
    return victim.name, kind
