"""Mistral: llama's block; every layer sees the last `sliding_window` tokens where the config sets one (v0.1), all where it is null."""

from __future__ import annotations

from model.arch import Arch, Fields, layer_types, num_layers, read_common, read_rope, windowed
from model.families.llama import Block as Block
from model.families.llama import rules as rules

ARCHITECTURES = ("MistralForCausalLM",)


def read(c: Fields) -> Arch:
    count = num_layers(c)
    window = c.integer("sliding_window", 4096, null=True, high=2**31 - 1)
    types = ("full_attention" if window is None else "sliding_attention",) * count
    if layer_types(c, count) not in (None, types):
        raise c.error("layer_types", "mixes attention types, which MistralForCausalLM does not compute")
    common = read_common(c, num_key_value_heads=8, max_position_embeddings=131072)
    return Arch(family="mistral", layers=windowed(c, types, window), ropes=(read_rope(c),), **common)
