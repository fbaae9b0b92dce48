"""Does a written folder compute what the model computes that it was written of?

Bytes are compared elsewhere (`tensor_folder.compare`). What they cannot show is in config.json, adapter_config.json and the names of
tensors: a base, a scale or a frequency that is not the trained model's. So before an export gets its name it is loaded the way its
users load it, and a few documents of random tokens, with random targets, go through it and through the live model: the
log-probabilities must agree.

    live        as the run computes: its layout, its kernels, its compute dtype
    reloaded    on the CPU of the first rank, plain operators, fp32, one block in memory at a time, whatever the size of the model

The distance of the two is the root mean square of their differences. Where both compute in fp32 with the same bits, it may be `EXACT`
of the standard deviation of the log-probabilities: what is left is the order of sums. Where activations or exported weights have 16
bits, what rounding does differs from model to model. So it is measured: the reloaded model computes once more in 16 bits, and the live
one may be `NOISE` times as far away. A difference below that cannot be told from rounding; facts and headers are therefore compared
as well, without a tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from model import build
from model.arch import Arch
from model.decoder import Decoder, Row
from model.safetensors_io import FLOATS, Check, adapter_config, fits_adapter, stored
from model.tensor_folder import TensorFolder, agree, attempt, leads
from model.transforms.lora import apply_lora
from runtime.errors import ModelError

EXACT, NOISE = 1e-3, 4.0
LENGTHS = (11, 5, 16)  # of the documents


def row(vocab: int, slots: int = sum(LENGTHS), longest: int = max(LENGTHS), documents: int = len(LENGTHS)) -> Row:
    """So many documents of at most `longest` tokens, as far as `slots` reach. The same on every rank."""
    lengths = [min(n, longest) for n in LENGTHS[:documents]]
    while sum(lengths) > slots:
        lengths = lengths[:-1] or [slots]
    ids = torch.randint(vocab, (2, sum(lengths)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in lengths]).int()
    return Row(ids[0], positions, torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths), ids[1])


@torch.no_grad()
def logprobs(net: Decoder, fetch: Callable[[str], Tensor], row: Row, beat: Callable[[], None] = lambda: None) -> Tensor:
    """log p of the row's labels, [T] fp32, by a model on meta whose parameters `fetch` gives, whole. It is on meta again afterwards.

    A block's parameters are there while it computes; `beat` is called before each.
    """

    def fill(module: nn.Module, name: str) -> None:
        module.to_empty(device="cpu")
        for full_name, p in module.named_parameters(name):
            p.copy_(fetch(full_name))

    def enter(block: nn.Module, args: tuple, name: str) -> None:
        beat()
        fill(block, name)

    net.eval()
    hooks = []
    for i, block in enumerate(net.model.layers):
        name = f"model.layers.{i}"
        hooks.append(block.register_forward_pre_hook(lambda block, args, name=name: enter(block, args, name)))
        hooks.append(block.register_forward_hook(lambda block, args, out: block.to("meta") and None))
    ends = {"model.embed_tokens": net.model.embed_tokens, "model.norm": net.model.norm} | ({"lm_head": net.lm_head} if net.lm_head else {})
    try:
        net.reset_buffers("cpu")
        for name, module in ends.items():
            fill(module, name)
        return net(row)
    finally:
        for hook in hooks:
            hook.remove()
        net.to("meta")


def same(net: Decoder, row: Row, live: Tensor, base: str | Path | None = None) -> Check:
    """The last check of an export of `net`, whose log-probabilities of `row` are `live` ([T] fp32 on the CPU). A collective.

    base: of an adapter, the folder of its base model.
    """
    return lambda folder: _first_rank(2 * len(net.model.layers), lambda beat: _compare(net, folder, row, live, base, beat))


def same_adapter_headers(net: Decoder) -> Check:
    """The check of an adapter whose base was drawn at random: it is in no folder, so nobody can load the two together."""
    return lambda folder: _first_rank(0, lambda beat: fits_adapter(net, folder))


def _compare(net: Decoder, folder: Path, row: Row, live: Tensor, base: str | Path | None, beat: Callable[[], None]) -> None:
    arch = Arch.from_folder(folder if base is None else base)
    here, there = asdict(net.arch), asdict(arch)
    if wrong := [key for key in here if key not in ("name", "dtype") and here[key] != there[key]]:
        text = ", ".join(f"{key} {there[key]} instead of {here[key]}" for key in wrong)
        raise ModelError(f"its config.json is not the trained model's: {text}", folder)
    again = build(arch)
    if base is not None:
        fits_adapter(net, folder)
        apply_lora(again, adapter_config(again, folder))
    fetch = stored(again, folder) if base is None else stored(again, base, folder)
    found = logprobs(again, fetch, row, beat)
    bound, narrow = EXACT * found.std().item() + 1e-5, _narrowest(net, folder, base)
    if narrow.itemsize < 4:
        again.compute_dtype = narrow
        bound = max(bound, NOISE * _distance(logprobs(again, fetch, row, beat), found))
    if not (distance := _distance(live, found)) <= bound:
        raise ModelError(
            f"the export, loaded again, computes something else than the live model: log-probabilities of {len(found)} random tokens "
            f"differ by {distance:.2g} (rms), where {bound:.2g} can be rounding; nothing was exported, the checkpoints are untouched"
        )


def _distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).square().mean().sqrt().item()


def _narrowest(net: Decoder, folder: Path, base: str | Path | None) -> torch.dtype:
    """The dtype with the fewest bits among what the live model computes in and, where weights were converted, what they are stored in."""
    stored_in = {spec.dtype for spec in TensorFolder(folder).specs.values()} if base is None else set()
    return min(stored_in & set(FLOATS) | {net.compute_dtype}, key=lambda dtype: (dtype.itemsize, -torch.finfo(dtype).eps))


def _first_rank(beats: int, work: Callable[[Callable[[], None]], None]) -> None:
    """The first rank works, the others wait for its outcome; each beat is a collective of its own, so that none of them waits longer
    than the work takes between two."""
    if not leads():
        for _ in range(beats + 1):
            agree(None)
        return
    left = beats

    def beat() -> None:
        nonlocal left
        if left:
            left -= 1
            agree(None)

    error = attempt(Path(), work, beat)
    if error is None:
        while left:
            beat()
    agree(error)
