"""A device that runs out of memory: one line that says what it held, and which changes of the config take less."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from model.arch import Arch
from parallel.apply import check
from parallel.config import Sections
from parallel.start import Agreed, Launch
from runtime.errors import ConfigError

SUGGESTED = 3
# how those say it that raise a RuntimeError like any other: the host's memory, pinned memory, cuBLAS
OTHERS = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class OutOfMemory(Agreed):
    """No mistake of the config that could be seen before; the rank that it happened to prints the line, peers say who it was."""

    exit_code = 1


@contextmanager
def explained(
    cfg: Sections, launch: Launch, device: torch.device, axes: dict[str, int], arch: Arch, saved: Callable[[], bool]
) -> Iterator[None]:
    """What runs out of memory inside ends with `OutOfMemory`. Nothing is tried again: other ranks wait in a collective by then.
    saved: is there a checkpoint? Who goes on from one keeps the packs of a step."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)|you tried to allocate (\d+) bytes", str(error))
        what = f", it asked for {asked[1] or f'{int(asked[2]) / 2**30:.2f} GiB'}" if asked else ""
        less = " or ".join(smaller(cfg, axes, arch, saved())) or "a smaller model, or more ranks"
        text = f"rank {launch.rank} is out of memory on {device}{what}{held(device)}; less is taken with {less}"
        raise OutOfMemory(f"{text} (python -m tools.plan says how much)", launch.rank) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of this rank: what it was told of another one begins with that one's number."""
    told = re.match(r"rank \d+\b", str(error)) is not None
    return not told and (isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in OTHERS))


def held(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    tensors, cached = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    gib = [f"{n / 2**30:.2f}" for n in (tensors, cached - tensors, total - free - cached, total)]
    return f" ({gib[0]} GiB are tensors, {gib[1]} cached, {gib[2]} of others, of {gib[3]})"


def smaller(cfg: Sections, axes: dict[str, int], arch: Arch, saved: bool) -> list[str]:
    """At most `SUGGESTED` changes that take less memory, those first that cost the least time; only what works with the rest."""
    found = []
    half, twice = cfg.data.tokens // 2, 2 * cfg.train.accumulate
    ways = [
        ("recompute.kind=mlp", {"recompute": {"kind": "mlp"}}, cfg.recompute.kind == "none"),
        (
            f"data.tokens={half} and train.accumulate={twice}",
            {"data": {"tokens": half}, "train": {"accumulate": twice}},
            not saved and half >= cfg.data.longest,
        ),
        ("recompute.kind=full", {"recompute": {"kind": "full"}}, cfg.recompute.kind in ("none", "mlp", "mlp_8bit", "selective")),
        ("offload.optimizer=true", {"offload": {"optimizer": True}}, cfg.lora is None and not cfg.offload.parameters),
        ("offload.activations=cpu", {"offload": {"activations": "cpu"}}, cfg.offload.activations == "none"),
        ("offload.parameters=true", {"offload": {"parameters": True}}, cfg.lora is None),
        ("offload.frozen=true", {"offload": {"frozen": True}}, cfg.lora is not None),
    ]
    for text, change, possible in ways:
        if not possible or len(found) == SUGGESTED:
            continue
        try:
            other = replace(cfg, **{section: replace(getattr(cfg, section), **keys) for section, keys in change.items()})
            check(other, axes, arch, cfg.lora)
        except ConfigError:
            continue
        found.append(text)
    return found
