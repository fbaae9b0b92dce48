"""Gemma 3, the text model and the text part of the multimodal checkpoints.

Five layers with a sliding window for each one with full attention, and a rope of its own for either kind; a norm before and
after both halves of a block; weights of norms stored minus one; embeddings scaled by sqrt(hidden_size).
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from model.arch import Arch, Fields, Rope, layer_types, num_layers, read_common, rope_from, windowed
from model.attention import Attention, AttnContext
from model.ffn import FeedForward
from model.norm import NORMS
from model.weights import Aside, Rename

ARCHITECTURES = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
FULL, SLIDING = "full_attention", "sliding_attention"
# What transformers' Gemma3TextConfig assumes; the multimodal checkpoints leave most of it out.
DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}


def read(c: Fields) -> Arch:
    if c.text("model_type") == "gemma3_text":
        return read_text(c)
    text = c.section("text_config") or Fields({}, c.path, "text_config.")
    text.choice("model_type", ("gemma3_text",), "gemma3_text")
    whole = read_common(c, **DEFAULTS)  # what the wrapper itself sets, and its refusals
    return dataclasses.replace(
        read_text(text), wrapped=True, tie_word_embeddings=whole["tie_word_embeddings"], dtype=whole["dtype"] or text.text("dtype", None)
    )


def read_text(c: Fields) -> Arch:
    common = read_common(c, **DEFAULTS)
    common["attention_scale"] = c.number("query_pre_attn_scalar", 256) ** -0.5
    count = num_layers(c, 26)
    period = c.integer("sliding_window_pattern", 6)
    types = layer_types(c, count) or tuple(SLIDING if (i + 1) % period else FULL for i in range(count))
    bias = c.flag("attention_bias", False)
    return Arch(
        family="gemma3",
        layers=windowed(c, types, c.integer("sliding_window", 4096, null=True, high=2**31 - 1), {FULL: 0, SLIDING: 1}),
        ropes=read_ropes(c),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        norm="rms_offset",
        embed_scale=common["hidden_size"] ** 0.5,
        logit_softcap=c.number("final_logit_softcapping", None),
        **common,
    )


def read_ropes(c: Fields) -> tuple[Rope, Rope]:
    """(full, sliding). v5 nests both under `rope_parameters`; in v4 `rope_scaling` is about the full one only."""
    theta, local = c.number("rope_theta", 1e6, above=1.0), c.number("rope_local_base_freq", 1e4, above=1.0)
    nested = c.section("rope_parameters") or Fields({}, c.path, "rope_parameters.")
    if stray := set(nested.values) - {FULL, SLIDING}:
        raise nested.error(min(stray), f"is not supported: rope_parameters holds {FULL} and {SLIDING}")
    scaling = c.section("rope_scaling")
    full, sliding = nested.section(FULL), nested.section(SLIDING)
    if full is not None and scaling is not None:
        raise c.error("rope_scaling", "is given beside rope_parameters; keep one of them")
    full = full or scaling
    return rope_from(full, theta, c) if full else Rope(theta), rope_from(sliding, local, c) if sliding else Rope(local)


class Block(nn.Module):
    """h + norm(attention(norm(h))), then h + norm(ffn(norm(h)))."""

    TP = {
        "input_layernorm": "gather",
        "post_attention_layernorm": "whole",
        "pre_feedforward_layernorm": "gather",
        "post_feedforward_layernorm": "whole",
    }

    def __init__(self, arch: Arch, index: int):
        super().__init__()
        norm = NORMS[arch.norm]
        self.input_layernorm = norm(arch.hidden_size, arch.rms_norm_eps)
        self.self_attn = Attention(arch, index)
        self.post_attention_layernorm = norm(arch.hidden_size, arch.rms_norm_eps)
        self.pre_feedforward_layernorm = norm(arch.hidden_size, arch.rms_norm_eps)
        self.mlp = FeedForward(arch)
        self.post_feedforward_layernorm = norm(arch.hidden_size, arch.rms_norm_eps)

    def forward(self, h: Tensor, ctx: AttnContext) -> Tensor:
        attended = self.post_attention_layernorm(self.self_attn(h, ctx, self.input_layernorm))
        h, out = self.mlp(h, attended, self.pre_feedforward_layernorm)
        return h + self.post_feedforward_layernorm(out)


def rules(arch: Arch) -> tuple:
    """In a multimodal checkpoint the text model lies under one of two prefixes, beside what sees images."""
    if not arch.wrapped:
        return ()
    return (
        Rename("model.", ("model.language_model.", "language_model.model.")),
        Rename("lm_head.", ("lm_head.", "language_model.lm_head.")),
        Aside(r"(model\.)?(vision_tower|multi_modal_projector)\."),
    )
