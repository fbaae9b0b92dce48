"""Tiny configs, at least one for every line of model/families FAMILIES, and what tests build from them.

A new family adds its config here; every test over GOLDEN then runs for it, and a test fails until it is here. Sizes are odd
where they may be, windows shorter than the documents, and every switch of a family is on in one of its cases.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from model import build
from model.arch import Arch
from model.decoder import Decoder, Row

SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
LENGTHS = (11, 1, 23)  # of the documents tests pack


def _config(model_type: str, architecture: str, **keys: object) -> dict:
    return {"model_type": model_type, "architectures": [architecture], **SIZES, "num_key_value_heads": 2, "pad_token_id": None, **keys}


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "num_hidden_layers": 4,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}

GOLDEN = {
    "llama": _config("llama", "LlamaForCausalLM", rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=_LLAMA3),
    "llama-biases-v5": _config(
        "llama", "LlamaForCausalLM", attention_bias=True, mlp_bias=True, rope_parameters=_LLAMA3 | {"rope_theta": 500000.0}
    ),
    "llama-tied-linear": _config("llama", "LlamaForCausalLM", tie_word_embeddings=True, rope_scaling={"type": "linear", "factor": 2.5}),
    "llama-yarn": _config("llama", "LlamaForCausalLM", rope_scaling=_YARN, hidden_act="gelu"),
    "mistral": _config("mistral", "MistralForCausalLM", sliding_window=5, head_dim=16),
    "mistral-full": _config("mistral", "MistralForCausalLM", sliding_window=None),
    "qwen2": _config("qwen2", "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=6, max_window_layers=1, tie_word_embeddings=True),
    "qwen2-yarn": _config(
        "qwen2", "Qwen2ForCausalLM", rope_scaling=_YARN | {"beta_fast": 4, "beta_slow": 2, "mscale": 1.2, "mscale_all_dim": 0.7}
    ),
    "qwen3": _config("qwen3", "Qwen3ForCausalLM", head_dim=20, attention_bias=True, rope_theta=1e6),
    "qwen3-yarn": _config("qwen3", "Qwen3ForCausalLM", head_dim=16, rope_parameters=_YARN | {"truncate": False, "attention_factor": 1.3}),
    "gemma3_text": _config("gemma3_text", "Gemma3ForCausalLM", **_GEMMA, rope_scaling={"rope_type": "linear", "factor": 8.0}),
    "gemma3_text-cap-v5": _config(
        "gemma3_text",
        "Gemma3ForCausalLM",
        **_GEMMA,
        final_logit_softcapping=3.0,
        tie_word_embeddings=False,
        attention_bias=True,
        rope_parameters={"full_attention": _YARN | {"rope_theta": 1e6}, "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}},
    ),
    "gemma3": {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "image_token_index": 96,
        "text_config": {k: v for k, v in _config("gemma3_text", "", **_GEMMA).items() if k != "architectures"},
        "vision_config": _VISION,
    },
}


def write_config(folder: Path, name: str, **changes: object) -> Path:
    """A folder with the config.json of a golden case."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(GOLDEN[name] | changes), encoding="utf-8")
    return folder


def fresh(arch: Arch, seed: int = 0, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder whose every parameter counts: weights of order 1/sqrt(in), norms and biases away from their identities."""
    net = build(arch)
    net.to_empty(device="cpu")
    net.reset_buffers("cpu")
    net.to(dtype)
    net.reset_buffers("cpu")
    net.compute_dtype = dtype
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        for p in module.parameters(recurse=False):
            spread = p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3
            p.data.copy_(torch.randn(p.shape, generator=generator) * spread + getattr(module, "initial", 0.0))
    return net


def rows(arch: Arch, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Row:
    """Documents of these lengths packed into one row, borders padded as the packer pads them; two thirds of the slots learned."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    tokens = torch.randint(0, arch.vocab_size - 1, (total,), generator=generator)
    labels = torch.randint(0, arch.vocab_size - 1, (total,), generator=generator)
    labels[torch.rand(total, generator=generator) < 1 / 3] = -100
    positions = torch.cat([torch.arange(n) for n in lengths]).int()
    ends = torch.tensor(lengths).cumsum(0)
    borders = torch.cat([torch.zeros(1), ends, ends[-1:].expand(2)]).int()
    return Row(tokens, positions, borders, max(lengths), labels)


def documents(row: Row) -> list[Row]:
    """Each document as a row of its own."""
    out = []
    for a, b in zip(row.cu_seqlens[:-1].tolist(), row.cu_seqlens[1:].tolist()):
        if b > a:
            borders = torch.tensor([0, b - a], dtype=torch.int32)
            out.append(Row(row.tokens[a:b], row.positions[a:b], borders, b - a, row.labels[a:b]))
    return out


def distance(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference||; the reference must not be trivial."""
    value, reference = value.detach().double(), reference.detach().double()
    norm = reference.norm().item()
    assert norm / reference.numel() ** 0.5 > 1e-7, f"trivial reference: norm {norm:.1e} over {reference.numel()} values"
    return ((value - reference).norm() / norm).item()
