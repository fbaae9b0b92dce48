"""What is computed: a decoder built of parts, from the facts in a config.json. Knows no ranks, steps or run folders.

    from model import load_pretrained
    net = load_pretrained("path/to/folder")
    logits = net.logits(input_ids)          # [B, S] int64 -> [B, S, V] fp32

Torch is imported inside the functions, so that `model.config` stays instant.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from model.arch import Arch
    from model.decoder import Decoder


def build(arch: Arch) -> Decoder:
    """The decoder of `arch` on the meta device: fp32 parameters without memory.

    What follows is the caller's order: fill slots, shard, `to_empty`, `reset_buffers`, load or initialize.
    """
    import torch

    from model.decoder import Decoder

    with torch.device("meta"):
        return Decoder(arch)


def load_pretrained(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", adapter: str | Path | None = None
) -> Decoder:
    """A model from a folder in Hugging Face layout or a hub id, on one device, in evaluation mode.

    Args:
        dtype: of weights and activations; None is fp32.
        adapter: folder or hub id of a PEFT adapter to put beside the weights.

    Raises:
        ModelError: the folder, or the adapter, is not one this code computes; one line that says why.
    """
    import torch

    from model.arch import Arch
    from model.config import KernelsConfig
    from model.hub import fetch
    from model.safetensors_io import adapter_config, materialize
    from model.transforms.lora import apply_lora
    from model.transforms.ops import install

    folder, dtype = fetch(str(path)), dtype or torch.float32
    net = build(Arch.from_folder(folder))
    if adapter is not None:
        adapter = fetch(str(adapter))
        apply_lora(net, adapter_config(net, adapter))
    install(net, KernelsConfig(), device, dtype)
    net.to(dtype)
    net.compute_dtype = dtype
    materialize(net, device, 0, folder, adapter)
    return net.eval()
