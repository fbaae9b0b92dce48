"""What is computed: a decoder built of parts, from the facts in a config.json. Knows no ranks, steps or run folders.

    from model import load_pretrained
    net = load_pretrained("path/to/folder")
    logits = net.logits(input_ids)          # [B, S] int64 -> [B, S, V] fp32

Torch is imported by the functions, so that `model.config` stays instant.
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
