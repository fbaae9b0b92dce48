"""Adapters in the model: where they go, what they compute, what trains."""

from __future__ import annotations

import pytest
import torch

from model import build
from model.arch import Arch
from model.config import LoraConfig
from model.safetensors_io import materialize
from model.transforms.lora import adapted, adapters_off, apply_lora, is_adapter, matches, select_linears
from model.transforms.trainable import apply_trainable
from runtime.errors import ConfigError
from tests.model.folders import prepared, train_a_little, write_model
from tests.model.golden import GOLDEN, distance, rows, write_config

TOKENS = torch.arange(16)[None]


def loaded(folder, lora=None, compute=torch.float32):
    net = prepared(folder, lora, compute)
    materialize(net, "cpu", 0, folder)
    return net


@pytest.fixture
def folder(tmp_path):
    return write_model(tmp_path / "base", "qwen3")


@pytest.fixture
def meta(tmp_path):
    return build(Arch.from_folder(write_config(tmp_path / "meta", "qwen3")))


# -------------------------------------------------------------------------------------------------------- computation


@pytest.mark.parametrize("name", GOLDEN)
def test_at_the_start_and_switched_off_it_is_the_base(tmp_path, name):
    folder = write_model(tmp_path, name)
    base = loaded(folder).logits(TOKENS)
    net = loaded(folder, LoraConfig(rank=4))
    assert torch.equal(net.logits(TOKENS), base)
    train_a_little(net)
    assert distance(net.logits(TOKENS), base) > 0.01
    with adapters_off(net):
        assert torch.equal(net.logits(TOKENS), base)
    assert distance(net.logits(TOKENS), base) > 0.01


def test_the_update_is_scale_b_a(folder):
    net = loaded(folder, LoraConfig(rank=3, alpha=5))
    train_a_little(net)
    linear = net.model.layers[1].mlp.up_proj
    x = torch.randn(7, 48, dtype=torch.float64)
    net.double()
    update = 5 / 3 * linear.lora_B.weight @ linear.lora_A.weight
    assert distance(linear(x), x @ (linear.weight + update).T) < 1e-12
    assert distance(update, linear.weight) > 0.1


def test_gradients_reach_what_trains_and_nothing_else(folder):
    net = loaded(folder, LoraConfig(rank=4, targets=("q_proj", "down_proj"), train_modules=("lm_head",)))
    train_a_little(net)
    net(rows(net.arch)).sum().backward()
    trained = {n for n, p in net.named_parameters() if p.grad is not None and p.grad.norm() > 1e-4}
    assert trained == {n for n, _ in net.named_parameters() if is_adapter(n) or n == "lm_head.weight"}
    assert len(trained) == 2 * 2 * 2 + 1


def test_dropout_only_while_training(folder):
    net = loaded(folder, LoraConfig(rank=4, dropout=0.5))
    train_a_little(net)

    def logits(seed):
        torch.manual_seed(seed)
        return net.logits(TOKENS)

    net.train()
    assert torch.equal(logits(0), logits(0)) and distance(logits(1), logits(0)) > 0.01
    net.eval()
    assert torch.equal(logits(0), logits(1))
    linear = net.model.layers[0].mlp.up_proj
    x = torch.ones(4000, 48)
    net.train()
    with torch.no_grad():  # dropout of the adapter's input, which keeps its mean, and not of the base's
        mean, plain = linear(x).mean(0), linear.eval()(x[0])
    assert distance(mean, plain) < 0.05


# -------------------------------------------------------------------------------------------------------------- targets

LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_all_linear_is_every_linear_of_the_decoder(meta):
    report = apply_lora(meta, LoraConfig(rank=8, alpha=16))
    assert report == f"LoRA: rank 8, alpha 16, dropout 0 beside 14 linears ({', '.join(f'{leaf} 2' for leaf in LEAVES)})"
    assert [n.rsplit(".", 1)[-1] for n in adapted(meta)] == LEAVES * 2
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    names = {n: tuple(p.shape) for n, p in meta.named_parameters() if is_adapter(n)}
    assert len(names) == 28 and names["model.layers.0.mlp.down_proj.lora_A.weight"] == (8, 56)
    assert names["model.layers.0.mlp.down_proj.lora_B.weight"] == (48, 8)


@pytest.mark.parametrize(
    "patterns, expected",
    [
        ("q_proj", ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        (("self_attn.q_proj",), ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        (("model.layers.1.mlp.up_proj",), ["1.mlp.up_proj"]),
        (("layers.0.mlp.*",), ["0.mlp.gate_proj", "0.mlp.up_proj", "0.mlp.down_proj"]),
        (("model.layers.[1-9].*.[qv]_proj",), ["1.self_attn.q_proj", "1.self_attn.v_proj"]),
        (("up_proj", "1.self_attn.o_proj", "*.0.mlp.up_proj"), ["0.mlp.up_proj", "1.self_attn.o_proj", "1.mlp.up_proj"]),
    ],
)
def test_patterns(meta, patterns, expected):
    assert [n.removeprefix("model.layers.") for n in select_linears(meta, patterns)] == expected
    assert len(select_linears(meta, ("q_proj", "all-linear"))) == 14


def test_a_pattern_starts_where_a_name_does():
    assert matches("norm", "model.norm") and not matches("norm", "model.layers.0.self_attn.q_norm")
    assert not matches("_proj", "a.q_proj") and matches("*_proj", "a.q_proj") and not matches("Q_proj", "a.q_proj")


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("q_prj", r"^lora.targets='q_prj' matches no linear layer; did you mean 'q_proj'\? This model has q_proj, k_proj, .*, down_proj$"),
        ("query_key_value", r"^lora.targets='query_key_value' matches no linear layer\. This model has q_proj"),
        ("layers.7.*", r"^lora.targets='layers.7.\*' matches no linear layer"),
        ("lm_head", r"^lora.targets='lm_head' is no linear layer of the decoder; train it in full: lora.train_modules = \['lm_head'\]$"),
        ("embed_tokens", r"train_modules = \['embed_tokens'\]$"),
        ("input_layernorm", r"train_modules = \['input_layernorm'\]$"),
    ],
)
def test_a_target_that_is_none(meta, pattern, message):
    with pytest.raises(ConfigError, match=message):
        apply_lora(meta, LoraConfig(targets=("q_proj", pattern)))
    assert not adapted(meta)


def test_the_head_of_a_tied_model_is_its_embedding(tmp_path):
    net = build(Arch.from_folder(write_config(tmp_path, "llama-tied-linear")))
    with pytest.raises(ConfigError, match=r"targets='lm_head' is no linear layer .*train_modules = \['embed_tokens'\]"):
        apply_lora(net, LoraConfig(targets=("lm_head",)))
    with pytest.raises(ConfigError, match=r"train_modules='lm_head' is the embedding in this model \(tied\); name embed_tokens, which"):
        apply_trainable(net, LoraConfig(train_modules=("lm_head",)), torch.float32)


def test_a_slot_is_filled_once(meta):
    apply_lora(meta, LoraConfig())
    with pytest.raises(ValueError, match="lora cannot fill slot 'adapter' of this Linear: lora already has"):
        apply_lora(meta, LoraConfig())


# ------------------------------------------------------------------------------------------------------------ what trains


def test_full_fine_tuning_trains_everything_in_masters(meta):
    report = apply_trainable(meta, None, torch.bfloat16)
    total = sum(p.numel() for p in meta.parameters())
    assert report == f"trains {total:,} of {total:,} parameters (100.00 %)"
    assert all(p.requires_grad and p.dtype == torch.float32 for p in meta.parameters())
    apply_trainable(meta, None, torch.bfloat16, masters=torch.bfloat16)
    assert {p.dtype for p in meta.parameters()} == {torch.bfloat16}


def test_what_is_frozen_is_kept_in_compute_dtype(meta):
    lora = LoraConfig(rank=2, targets=("q_proj",), train_modules=("norm", "embed_tokens", "layers.1.self_attn.k_norm"))
    apply_lora(meta, lora)
    report = apply_trainable(meta, lora, torch.bfloat16)
    trained = {n for n, p in meta.named_parameters() if p.requires_grad}
    whole = ["model.embed_tokens", "model.layers.1.self_attn.k_norm", "model.norm"]
    assert trained == {f"{n}.weight" for n in whole} | {n for n, _ in meta.named_parameters() if is_adapter(n)}
    assert all(p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) for p in meta.parameters())
    total, some = sum(p.numel() for p in meta.parameters()), sum(p.numel() for p in meta.parameters() if p.requires_grad)
    assert report == f"trains {some:,} of {total:,} parameters ({100 * some / total:.2f} %), with {', '.join(whole)} in full"


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("lm_haed", r"^lora.train_modules='lm_haed' matches no module; did you mean 'lm_head'\? This model has embed_tokens, "),
        ("mlp", r"^lora.train_modules='mlp' matches no module"),
        (
            "up_proj",
            r"^lora.train_modules='up_proj' also gets an adapter \(model.layers.0.mlp.up_proj\); leave it out",
        ),
        ("lora_A", r"matches no module"),
    ],
)
def test_modules_that_cannot_train_in_full(meta, pattern, message):
    lora = LoraConfig(targets=("up_proj",), train_modules=(pattern,))
    apply_lora(meta, lora)
    with pytest.raises(ConfigError, match=message):
        apply_trainable(meta, lora, torch.float32)
