"""config.json: both spellings read alike, real models' files, and everything wrong is one line that names the key."""

from __future__ import annotations

import json
import random

import pytest

from model.arch import Arch, Kind
from model.rope import frequencies
from runtime.errors import ModelError
from tests.model.golden import GOLDEN, write_config

# As published, but for keys that say nothing about the computation.
LLAMA_32_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN25_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152},
}


def read(tmp_path, values: object) -> Arch:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return Arch.from_folder(tmp_path)


def changed(config: dict, **changes: object) -> dict:
    return {k: v for k, v in (config | changes).items() if v is not ...}


def test_llama_32(tmp_path):
    arch = read(tmp_path / "Llama-3.2-1B", LLAMA_32_1B)
    assert (arch.family, arch.name, arch.dtype) == ("llama", "Llama-3.2-1B", "bfloat16")
    assert (arch.num_hidden_layers, arch.head_dim, arch.tie_word_embeddings, arch.kinds) == (16, 64, True, (Kind(),))
    assert arch.ropes[0].kind == "llama3" and arch.ropes[0].original_max_positions == 8192


def test_qwen25_ignores_the_window_it_does_not_use(tmp_path):
    arch = read(tmp_path, QWEN25_7B)
    assert arch.kinds == (Kind(),)
    assert (arch.qkv_bias, arch.o_bias, arch.head_dim) == (True, False, 128)
    windowed = read(tmp_path, changed(QWEN25_7B, use_sliding_window=True, max_window_layers=20))
    assert [layer.kind.name for layer in windowed.layers] == ["full"] * 20 + ["window"] * 8
    assert read(tmp_path, changed(QWEN25_7B, use_sliding_window=True, sliding_window=None)).kinds == (Kind(),)


def test_gemma3_4b_takes_what_its_file_leaves_out_from_transformers_defaults(tmp_path):
    arch = read(tmp_path, GEMMA3_4B)
    assert (arch.vocab_size, arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim) == (262208, 8, 4, 256)
    assert arch.wrapped and arch.tie_word_embeddings and arch.dtype == "bfloat16"
    assert [i for i, layer in enumerate(arch.layers) if layer.kind == Kind()] == [5, 11, 17, 23, 29]
    assert {layer.kind for layer in arch.layers} == {Kind(), Kind("window", 1024)}
    full, sliding = arch.ropes
    assert (full.theta, full.kind, full.factor, sliding.theta, sliding.kind) == (1e6, "linear", 8.0, 1e4, "default")
    assert all(layer.rope == (0 if layer.kind == Kind() else 1) for layer in arch.layers)
    assert (arch.attention_scale, arch.embed_scale) == (256**-0.5, 2560**0.5)


@pytest.mark.parametrize("name", GOLDEN)
def test_what_transformers_writes_reads_alike(tmp_path, name):
    """v5 writes `rope_parameters`, `dtype`, `layer_types` and every default; the facts are the same."""
    transformers = pytest.importorskip("transformers")
    before = Arch.from_folder(write_config(tmp_path / name, name))
    transformers.AutoConfig.from_pretrained(tmp_path / name).save_pretrained(tmp_path / "v5" / name)
    saved = json.loads((tmp_path / "v5" / name / "config.json").read_text())
    assert "rope_parameters" in saved.get("text_config", saved)
    after = Arch.from_folder(tmp_path / "v5" / name)
    assert {k: v for k, v in vars(after).items() if k != "dtype"} == {k: v for k, v in vars(before).items() if k != "dtype"}


WRONG = {
    "not JSON": ("{", "config.json: not readable as JSON"),
    "not an object": ("[1]", "must hold a JSON object"),
    "deeply nested": ("[" * 100000, "not readable as JSON"),
    "no model_type": (changed(LLAMA_32_1B, model_type=...), "model_type=absent: is needed, one of llama, mistral, qwen2"),
    "other model_type": (changed(LLAMA_32_1B, model_type="mamba"), 'model_type="mamba": is not supported; supported: llama, mistral, '),
    "other architecture": (
        changed(LLAMA_32_1B, architectures=["LlamaForSequenceClassification"]),
        "LlamaForSequenceClassification is not supported; supported: LlamaForCausalLM",
    ),
    "quantized": (
        changed(LLAMA_32_1B, quantization_config={"quant_method": "awq"}),
        "quantization_config=.*unquantized repository",
    ),
    "dropout": (changed(LLAMA_32_1B, attention_dropout=0.1), "attention_dropout=0.1: is not supported"),
    "partial rotary": (changed(LLAMA_32_1B, partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    "bidirectional": (
        changed(GEMMA3_4B, text_config={"use_bidirectional_attention": True}),
        "use_bidirectional_attention=true",
    ),
    "attention soft-cap": (changed(GEMMA3_4B, text_config={"attn_logit_softcapping": 50.0}), "text_config.attn_logit_softcapping=50.0"),
    "wrapper quantized": (changed(GEMMA3_4B, quantization_config={}), "quantization_config"),
    "other text": (changed(GEMMA3_4B, text_config={"model_type": "llama"}), "text_config.model_type"),
    "negative": (changed(LLAMA_32_1B, hidden_size=-5), "hidden_size=-5: must be from 1 to"),
    "zero": (changed(LLAMA_32_1B, num_hidden_layers=0), "num_hidden_layers=0"),
    "absurd": (changed(LLAMA_32_1B, vocab_size=10**12), "vocab_size=1000000000000: must be from"),
    "fractional": (changed(LLAMA_32_1B, hidden_size=2048.5), "hidden_size=2048.5: must be an integer"),
    "true is no size": (changed(LLAMA_32_1B, hidden_size=True), "hidden_size=true: must be an integer"),
    "missing": (changed(LLAMA_32_1B, intermediate_size=...), "intermediate_size=absent: is needed"),
    "null": (changed(LLAMA_32_1B, intermediate_size=None), "intermediate_size=null: must be"),
    "kv heads": (changed(LLAMA_32_1B, num_key_value_heads=5), "num_key_value_heads=5: must divide num_attention_heads=32"),
    "heads": (changed(LLAMA_32_1B, num_attention_heads=24, head_dim=None), "num_attention_heads=24: must divide hidden_size=2048"),
    "odd head": (changed(LLAMA_32_1B, head_dim=63), "head_dim=63: 63 is odd"),
    "activation": (changed(LLAMA_32_1B, hidden_act="relu"), 'hidden_act="relu": is not supported; supported: silu'),
    "eps": (changed(LLAMA_32_1B, rms_norm_eps=0), "rms_norm_eps=0: must be a number above 0"),
    "NaN": (changed(LLAMA_32_1B, rms_norm_eps=float("nan")), "rms_norm_eps=NaN"),
    "infinite": (changed(LLAMA_32_1B, rope_theta=float("inf")), "rope_theta=Infinity"),
    "text for a flag": (changed(LLAMA_32_1B, tie_word_embeddings="yes"), 'tie_word_embeddings="yes": must be true or false'),
    "dynamic rope": (
        changed(LLAMA_32_1B, rope_scaling={"type": "dynamic", "factor": 2.0}),
        'rope_scaling.type="dynamic": is not supported; supported: default, linear, llama3, yarn',
    ),
    "no factor": (changed(LLAMA_32_1B, rope_scaling={"rope_type": "linear"}), "rope_scaling.factor=absent: is needed"),
    "foreign rope key": (
        changed(LLAMA_32_1B, rope_scaling={"rope_type": "yarn", "factor": 2.0, "llama_4_scaling_beta": 0.1}),
        "llama_4_scaling_beta=0.1: is not supported for rope type yarn",
    ),
    "rope of two minds": (changed(LLAMA_32_1B, rope_parameters={"rope_theta": 1e4}), "rope_scaling=.*differs from rope_parameters"),
    "rope per layer": (
        changed(LLAMA_32_1B, rope_scaling=None, rope_parameters={"full_attention": {"rope_theta": 1e4}}),
        "rope_parameters.full_attention=.*not supported",
    ),
    "rope is a list": (changed(LLAMA_32_1B, rope_scaling=[1]), "rope_scaling=.*must be an object"),
    "layer types": (changed(QWEN25_7B, layer_types=["full_attention"]), "layer_types=.*has 1 entries for num_hidden_layers=28"),
    "foreign layer type": (changed(QWEN25_7B, layer_types=["chunked_attention"] * 28), "chunked_attention is not supported"),
    "window without size": (
        changed(QWEN25_7B, layer_types=["sliding_attention"] * 28),
        "sliding_window=.*needed by the sliding",
    ),
    "llama with windows": (changed(LLAMA_32_1B, layer_types=["sliding_attention"] * 16), "sliding_window=absent: is needed"),
    "mixed mistral": (
        changed(LLAMA_32_1B, model_type="mistral", architectures=["MistralForCausalLM"], layer_types=["full_attention"] * 16),
        "layer_types=.*MistralForCausalLM does not compute",
    ),
    "window of zero": (changed(QWEN25_7B, use_sliding_window=True, sliding_window=0), "sliding_window=0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line(tmp_path, case):
    values, message = WRONG[case]
    with pytest.raises(ModelError, match=message) as caught:
        read(tmp_path, values)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400 and "config.json" in line


def test_no_file(tmp_path):
    with pytest.raises(ModelError, match="no such file: a model is a folder"):
        Arch.from_folder(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ModelError, match="not readable as JSON"):
        Arch.from_folder(tmp_path)


def test_any_damage_is_a_model_error_or_harmless(tmp_path):
    """Random values in random places: never another exception."""
    rng = random.Random(0)
    values = [
        None,
        True,
        -1,
        0,
        1,
        3,
        7,
        0.5,
        -2.0,
        1e308,
        float("nan"),
        "",
        "yarn",
        "x" * 500,
        [],
        [1],
        ["a"],
        {},
        {"factor": "2"},
        10**30,
    ]
    refused = 0
    for _ in range(600):
        config = json.loads(json.dumps(rng.choice([LLAMA_32_1B, QWEN25_7B, GEMMA3_4B, *GOLDEN.values()])))
        for _ in range(rng.randint(1, 3)):
            place = config
            while isinstance(deeper := place[key := rng.choice(list(place))], dict) and deeper and rng.random() < 0.7:
                place = deeper
            place[key] = rng.choice(values)
        try:
            arch = read(tmp_path, config)
            assert all(frequencies(rope, 16).isfinite().all() for rope in arch.ropes)
        except ModelError as e:
            assert "\n" not in str(e)
            refused += 1
    assert 100 < refused < 600
