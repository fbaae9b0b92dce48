"""Qwen2 and 2.5: llama's block with biases on q, k and v; the upper layers may use a sliding window."""

from __future__ import annotations

from model.arch import Arch, Fields, Layer, layer_types, num_layers, read_common, read_rope, windowed
from model.families.llama import Block as Block
from model.families.llama import rules as rules

ARCHITECTURES = ("Qwen2ForCausalLM",)


def read_layers(c: Fields) -> tuple[Layer, ...]:
    """`layer_types`, or full attention below `max_window_layers` and windows from there up if `use_sliding_window`."""
    count = num_layers(c)
    window = c.integer("sliding_window", 4096, null=True, high=2**31 - 1) if c.flag("use_sliding_window", False) else None
    first = c.integer("max_window_layers", 28, low=0)
    by_depth = tuple("sliding_attention" if window and i >= first else "full_attention" for i in range(count))
    return windowed(c, layer_types(c, count) or by_depth, window)


def read(c: Fields) -> Arch:
    common = read_common(c, num_key_value_heads=None, max_position_embeddings=32768)
    return Arch(family="qwen2", layers=read_layers(c), ropes=(read_rope(c),), qkv_bias=True, **common)
