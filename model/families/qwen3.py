"""Qwen3 (dense): llama's block with RMSNorm over each head of q and k, and a head size of its own."""

from __future__ import annotations

from model.arch import Arch, Fields, read_common, read_rope
from model.families.llama import Block as Block
from model.families.llama import rules as rules
from model.families.qwen2 import read_layers

ARCHITECTURES = ("Qwen3ForCausalLM",)


def read(c: Fields) -> Arch:
    bias = c.flag("attention_bias", False)
    common = read_common(c, head_dim=128, max_position_embeddings=32768)
    return Arch(family="qwen3", layers=read_layers(c), ropes=(read_rope(c),), qkv_bias=bias, o_bias=bias, qk_norm=True, **common)
