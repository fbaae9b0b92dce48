"""Weight rules and fresh values."""

from __future__ import annotations

import math

import pytest
import torch

from model import build
from model.arch import Arch
from model.config import LoraConfig
from model.transforms.lora import apply_lora, is_adapter
from model.weights import Aside, NameMap, Rename, initialize
from parallel.local import run
from tests.model.folders import LAYOUTS, prepared, shard, sizes_for
from tests.model.golden import GOLDEN, write_config


@pytest.mark.parametrize("name", GOLDEN)
def test_names_survive_the_round_trip(tmp_path, name):
    """In the spelling of every kind of folder the family knows."""
    net = build(Arch.from_folder(write_config(tmp_path, name)))
    ours = sorted({n for n, _ in net.named_parameters()} | {"lm_head.weight"})
    rules = NameMap.of(net).rules
    spellings = max([len(r.hf) for r in rules if isinstance(r, Rename)], default=1)
    for i in range(spellings):
        theirs = [r.hf[i] + "x" for r in rules if isinstance(r, Rename)]
        names = NameMap.of(net, theirs)
        hf = [names.to_hf(n) for n in ours]
        assert len(set(hf)) == len(ours)
        assert [names.from_hf(n) for n in hf] == ours
        assert {r.hf[i] for r in rules if isinstance(r, Rename)} <= {h[: len(r.hf[i])] for h in hf for r in rules if isinstance(r, Rename)}


def test_renames_and_asides():
    rules = (Rename("model.", ("model.language_model.", "language_model.model.")), Aside(r"vision_tower\."))
    old = NameMap(rules, ["language_model.model.norm.weight", "vision_tower.x"])
    assert old.to_hf("model.norm.weight") == "language_model.model.norm.weight"
    assert old.from_hf("language_model.model.norm.weight") == "model.norm.weight"
    assert old.from_hf("vision_tower.x") is None and old.aside("vision_tower.x").keep
    assert NameMap(rules).to_hf("model.norm.weight") == "model.language_model.norm.weight"
    assert not NameMap(()).aside("model.layers.0.self_attn.rotary_emb.inv_freq").keep


def test_fresh_values_are_those_of_transformers_and_peft(tmp_path):
    wide = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "initializer_range": 0.03}
    net = build(Arch.from_folder(write_config(tmp_path, "llama-biases-v5", **wide)))
    apply_lora(net, LoraConfig(rank=64))
    net.to_empty(device="cpu")
    for p in net.parameters():
        p.data.fill_(torch.nan)
    assert initialize(net, 0) == {n for n, _ in net.named_parameters()}
    for name, p in net.named_parameters():
        if name.endswith("norm.weight"):
            assert (p == 1).all()
        elif name.endswith((".bias", "lora_B.weight")):
            assert (p == 0).all()
        elif name.endswith("lora_A.weight"):
            bound = p.shape[1] ** -0.5
            assert p.abs().max() <= bound and abs(p.std().item() * 3**0.5 / bound - 1) < 0.05
        else:
            assert abs(p.std().item() / 0.03 - 1) < 0.05 and abs(p.mean().item()) < 0.001, name


def test_gemma_norms_start_at_zero(tmp_path):
    net = build(Arch.from_folder(write_config(tmp_path, "gemma3_text")))
    net.to_empty(device="cpu")
    initialize(net, 0)
    norms = {n: p for n, p in net.named_parameters() if p.ndim == 1}
    assert len(norms) > 8 and all((p == 0).all() for p in norms.values())


def test_values_depend_on_seed_and_name_only(tmp_path):
    def values(seed, **changes):
        net = build(Arch.from_folder(write_config(tmp_path, "llama", **changes)))
        net.to_empty(device="cpu")
        initialize(net, seed)
        return dict(net.named_parameters())

    deep, shallow, other = values(0), values(0, num_hidden_layers=1), values(1)
    matrices = [n for n, p in shallow.items() if p.ndim == 2]
    assert matrices and all(torch.equal(deep[n], shallow[n]) for n in matrices)
    assert not any(torch.equal(deep[n], other[n]) for n in matrices)
    same_shape = "model.layers.{}.mlp.up_proj.weight"
    assert not torch.equal(deep[same_shape.format(0)], deep[same_shape.format(1)])


def _fresh_sharded(rank, world, folder, axes):
    net = prepared(folder, LoraConfig(rank=3), torch.bfloat16)
    shard(net, axes)
    net.to_empty(device="cpu")
    assert initialize(net, 5, only=is_adapter) == {n for n, _ in net.named_parameters() if is_adapter(n)}
    initialize(net, 5)
    return {n: (str(p.dtype), p.full_tensor().double().flatten().tolist()) for n, p in net.named_parameters()}


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_values_are_the_same_at_any_sharding(tmp_path, axes):
    folder = write_config(tmp_path, "qwen2", **sizes_for(axes))
    net = prepared(folder, LoraConfig(rank=3), torch.bfloat16)
    net.to_empty(device="cpu")
    initialize(net, 5)
    expected = {n: (str(p.dtype), p.double().flatten().tolist()) for n, p in net.named_parameters()}
    assert {dtype for dtype, _ in expected.values()} == {"torch.float32", "torch.bfloat16"}
    for values in run(_fresh_sharded, math.prod(axes.values()), folder, axes):
        assert values == expected
