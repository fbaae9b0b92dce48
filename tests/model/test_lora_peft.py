"""Against PEFT: its adapters load here and ours load there, with the same logits; merged is the same as beside.

And what PEFT would only warn about, or compute differently, is refused by name.
"""

from __future__ import annotations

import json
import os
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import build, load_pretrained
from model.arch import Arch
from model.config import LoraConfig
from model.peft_format import CONFIG, STEM
from model.safetensors_io import adapter_config, export_adapter, export_full, load_adapter, materialize
from model.tensor_folder import fingerprint
from model.transforms.lora import apply_lora
from parallel.local import run
from runtime.errors import ModelError
from tests.model.folders import prepared, shard, theirs, train_a_little, write_model
from tests.model.golden import distance

TOKENS = torch.arange(16)[None]
FAMILIES = ["llama-biases-v5", "mistral", "qwen2", "qwen3", "gemma3_text", "gemma3"]  # qwen2 and the gemmas are tied here
PREFIX = "base_model.model."


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(TOKENS).logits


def trained(folder, lora: LoraConfig, compute=torch.float32):
    net = prepared(folder, lora, compute)
    materialize(net, "cpu", 0, folder)
    train_a_little(net)
    return net


# ------------------------------------------------------------------------------------------------------------ both ways


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_peft_loads_here(tmp_path, name, rslora):
    peft = pytest.importorskip("peft")
    model = theirs(tmp_path / "base", name, torch.float32)
    base = logits(model)
    leaves = ["q_proj", "o_proj", "down_proj"]
    # in the wrapped model the vision tower has linears of the same names, which PEFT would adapt too
    targets = rf".*language_model.*\.({'|'.join(leaves)})" if name == "gemma3" else leaves
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=10, target_modules=targets, use_rslora=rslora, lora_dropout=0.1))
    torch.manual_seed(1)
    for n, p in adapted.named_parameters():
        if "lora_B" in n:
            p.data.normal_(0, 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    ours = load_pretrained(tmp_path / "base", adapter=tmp_path / "adapter").logits(TOKENS)
    assert distance(logits(adapted), base) > 0.01
    assert distance(ours, logits(adapted)) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_our_adapter_loads_in_peft_and_merges_to_the_same(tmp_path, name):
    peft = pytest.importorskip("peft")
    model = theirs(tmp_path / "base", name, torch.float32)
    kind, base = type(model), logits(model)
    net = trained(tmp_path / "base", LoraConfig(rank=4, alpha=6, targets=("all-linear",)))
    ours = net.logits(TOKENS)
    assert distance(ours, base) > 0.05
    export_adapter(net, tmp_path / "adapter", LoraConfig(rank=4, alpha=6), str(tmp_path / "base"))
    with warnings.catch_warnings():  # PEFT only warns of names it misses
        warnings.filterwarnings("error", message=".*adapter keys.*")
        adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert distance(logits(adapted), ours) < 1e-5
    again = load_pretrained(tmp_path / "base", adapter=tmp_path / "adapter")
    assert distance(again.logits(TOKENS), ours) < 1e-5

    export_full(net, tmp_path / "merged", tmp_path / "base")
    assert distance(logits(kind.from_pretrained(tmp_path / "merged", attn_implementation="eager")), ours) < 1e-5
    theirs_merged = dict(adapted.merge_and_unload().named_parameters())
    ours_merged = dict(kind.from_pretrained(tmp_path / "merged").named_parameters())
    assert theirs_merged.keys() == ours_merged.keys()
    assert all(distance(ours_merged[n], theirs_merged[n]) < 1e-6 for n in ours_merged if ours_merged[n].any())


@pytest.mark.parametrize("name, modules", [("llama", ("embed_tokens", "lm_head", "norm")), ("llama-tied-linear", ("embed_tokens",))])
def test_modules_trained_in_full_travel_with_the_adapter(tmp_path, name, modules):
    peft = pytest.importorskip("peft")
    model = theirs(tmp_path / "base", name, torch.float32)
    lora = LoraConfig(rank=4, targets=("layers.1.mlp.*", "q_proj"), train_modules=modules)
    net = trained(tmp_path / "base", lora)
    ours = net.logits(TOKENS)
    assert distance(ours, logits(model)) > 0.05
    export_adapter(net, tmp_path / "adapter", lora, str(tmp_path / "base"))
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert distance(logits(adapted), ours) < 1e-5
    assert distance(load_pretrained(tmp_path / "base", adapter=tmp_path / "adapter").logits(TOKENS), ours) < 1e-5
    adapted.save_pretrained(tmp_path / "again")  # and back, as PEFT writes the same thing
    assert distance(load_pretrained(tmp_path / "base", adapter=tmp_path / "again").logits(TOKENS), ours) < 1e-5


def _load_sharded(rank, world, folder, adapter):
    net = build(Arch.from_folder(folder))
    apply_lora(net, adapter_config(net, adapter))
    shard(net, {"shard": world})
    materialize(net, "cpu", 0, folder, adapter)
    return net.logits(TOKENS).double().flatten().tolist()


def test_an_adapter_loads_into_shards(tmp_path):
    folder = write_model(tmp_path / "base")
    lora = LoraConfig(rank=3, train_modules=("norm",))
    net = trained(folder, lora)
    export_adapter(net, tmp_path / "adapter", lora, "base")
    for values in run(_load_sharded, 2, folder, tmp_path / "adapter"):
        assert distance(torch.tensor(values), net.logits(TOKENS).flatten()) < 1e-6


# ------------------------------------------------------------------------------------------------------------ the files


@pytest.fixture
def folder(tmp_path):
    return write_model(tmp_path / "base")


@pytest.fixture
def adapter(folder, tmp_path):
    export_adapter(trained(folder, LoraConfig(rank=4, alpha=8)), tmp_path / "adapter", LoraConfig(rank=4, alpha=8), "org/base")
    return tmp_path / "adapter"


def test_what_is_written(folder, adapter, tmp_path):
    config = json.loads((adapter / "adapter_config.json").read_text())
    leaves = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none"}
    expected |= {"target_modules": leaves, "modules_to_save": None, "base_model_name_or_path": "org/base", "use_dora": False}
    assert expected.items() <= config.items() and type(config["lora_alpha"]) is int
    names = load_file(adapter / "adapter_model.safetensors").keys()
    assert len(names) == 28 and f"{PREFIX}model.layers.1.mlp.up_proj.lora_B.weight" in names
    assert {p.name for p in adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "checksums.json"}

    some = LoraConfig(targets=("layers.1.mlp.up_proj", "v_proj"), alpha=2.5, dropout=0.25, train_modules=("norm",))
    (folder / "tokenizer.json").write_text("{}")
    export_adapter(trained(folder, some), adapter, some, "b", tokenizer=folder)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.up_proj"]
    assert (config["lora_alpha"], config["lora_dropout"], config["modules_to_save"]) == (2.5, 0.25, ["model.norm"])
    assert (adapter / "tokenizer.json").exists()


def test_the_section_that_an_adapter_asks_for(folder, adapter):
    net = build(Arch.from_folder(folder))
    cfg = adapter_config(net, adapter)
    assert (cfg.rank, cfg.alpha, cfg.dropout, cfg.train_modules, len(cfg.targets)) == (4, 8.0, 0.0, (), 14)
    edit_config(adapter, use_rslora=True)
    assert adapter_config(net, adapter).alpha == 16.0


def test_stored_adapters_of_other_dtypes(folder, adapter, tmp_path):
    path = adapter / "adapter_model.safetensors"
    save_file({n: t.bfloat16() for n, t in load_file(path).items()}, path)
    net = load_pretrained(folder, adapter=adapter)
    a = net.model.layers[0].mlp.up_proj.lora_A.weight
    assert a.dtype == torch.float32 and torch.equal(a, a.bfloat16().float()) and a.any()


# --------------------------------------------------------------------------------------------------------------- errors


def edit_config(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(adapter, change):
    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


UP = f"{PREFIX}model.layers.0.mlp.up_proj."
CONFIGS = {
    "peft_type": ("ADALORA", r'adapter_config.json: peft_type="ADALORA" is not supported; only LORA is$'),
    "use_dora": (True, r"use_dora=true is not supported: it changes what the adapter computes$"),
    "rank_pattern": ({"q_proj": 2}, r'rank_pattern={"q_proj": 2} is not supported'),
    "alpha_pattern": ({"q_proj": 2}, r"alpha_pattern=.* is not supported"),
    "fan_in_fan_out": (True, r"fan_in_fan_out=true is not supported"),
    "lora_bias": (True, r"lora_bias=true is not supported"),
    "trainable_token_indices": ([1], r"trainable_token_indices=\[1\] is not supported"),
    "layer_replication": ([[0, 1]], r"layer_replication=.* is not supported"),
    "some_new_idea": ({"on": True}, r"some_new_idea=.* is not supported"),
    "bias": ("all", r'bias="all" is not supported: trained biases change the base model$'),
    "init_lora_weights": ("pissa_niter_4", r'init_lora_weights="pissa_niter_4" is not supported: it changes the base weights; convert'),
    "r": (0, r"r=0 must be an integer from 1 to"),
    "lora_alpha": ("x", r'lora_alpha="x" must be a positive number'),
    "lora_dropout": (1, r"lora_dropout=1 must be at least 0 and below 1"),
    "target_modules": (["q_proj", 3], r"target_modules=.* must be a list of names"),
    "target_modules, a number": (3, r"target_modules=3 must be a list of names or a pattern"),
    "target_modules, an object": ({}, r"target_modules={} must be a list of names or a pattern"),
    "modules_to_save": (5, r"modules_to_save=5 must be a list of names$"),
    "modules_to_save, a text": ("lm_head", r'modules_to_save="lm_head" must be a list of names$'),
    "use_rslora": ("no", r'use_rslora="no" must be true or false'),
    "lora_alpha, huge": (10**400, r"lora_alpha=10*\.\.\. must be a positive number of a usable size"),
    "lora_alpha, no number": (float("nan"), r"lora_alpha=NaN must be a positive number"),
    "r, huge": (10**400, r"r=10*\.\.\. must be an integer from 1 to"),
}


@pytest.mark.parametrize("key", CONFIGS)
def test_settings_that_are_refused(folder, adapter, key):
    value, message = CONFIGS[key]
    edit_config(adapter, **{key.partition(",")[0]: value})
    with pytest.raises(ModelError, match=message) as error:
        load_pretrained(folder, adapter=adapter)
    assert "\n" not in str(error.value)


TENSORS = {
    "prefix": (
        lambda t: {n.removeprefix(PREFIX): v for n, v in t.items()},
        r"names must begin with 'base_model.model.', which .* and 25 more",
    ),
    "adapter name": (lambda t: {n.replace(".weight", ".default.weight"): v for n, v in t.items()}, r"holds no lora_A and lora_B matrices$"),
    "half": (lambda t: {n: v for n, v in t.items() if n != UP + "lora_B.weight"}, r"lacks model.layers.0.mlp.up_proj.lora_B.weight$"),
    "a linear": (
        lambda t: {n: v for n, v in t.items() if UP not in n},
        r"no matrices for model.layers.0.mlp.up_proj, which its target",
    ),
    "dora": (
        lambda t: t | {UP + "lora_magnitude_vector": torch.ones(56)},
        r"holds model.layers.0.*lora_magnitude_vector: neither LoRA",
    ),
    "extra": (
        lambda t: t | {PREFIX + "model.norm.weight": torch.ones(48)},
        r"holds model.norm.weight: neither LoRA .* nor a module of",
    ),
    "rank": (
        lambda t: t | {UP + "lora_A.weight": torch.ones(5, 48)},
        r"lora_A.weight has shape \[5, 48\], which does not fit r = 4$",
    ),
    "input": (lambda t: t | {UP + "lora_A.weight": torch.ones(4, 47)}, r"lora_A.weight has shape \[4, 47\], but the model's is \[4, 48\]$"),
    "vector": (lambda t: t | {UP + "lora_A.weight": torch.ones(4)}, r"lora_A.weight has shape \[4\], which does not fit"),
    "integer": (lambda t: t | {UP + "lora_A.weight": torch.ones(4, 48, dtype=torch.int8)}, r"lora_A.weight has dtype int8, which is not"),
    "layer": (
        lambda t: t | {n.replace("layers.0", "layers.9"): v.clone() for n, v in t.items() if UP in n},
        r"adapts model.layers.9.mlp.up_proj, which is no linear layer of this model's decoder$",
    ),
    "head": (
        lambda t: t | {f"{PREFIX}lm_head.lora_A.weight": torch.ones(4, 48), f"{PREFIX}lm_head.lora_B.weight": torch.ones(97, 4)},
        r"adapts lm_head, which is no linear layer of this model's decoder$",
    ),
    "vocabulary": (lambda t: t | {PREFIX + "lm_head.weight": torch.ones(98, 48)}, r"lm_head.weight has shape \[98, 48\], but the model's"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_refused(folder, adapter, case):
    change, message = TENSORS[case]
    edit_tensors(adapter, change)
    with pytest.raises(ModelError, match=message) as error:
        load_pretrained(folder, adapter=adapter)
    assert "\n" not in str(error.value)


def test_files_that_are_not_the_folders(folder, adapter, tmp_path):
    config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    (tmp_path / "elsewhere").mkdir()
    for path in (config, weights):
        moved = path.rename(tmp_path / "elsewhere" / path.name)
        path.symlink_to(moved)
        for attempt in (lambda: load_pretrained(folder, adapter=adapter), lambda: fingerprint(adapter, True, STEM, CONFIG)):
            with pytest.raises(ModelError, match=f"{path.name}: is a link to .*, outside its folder"):
                attempt()
        path.unlink()
        os.mkfifo(path)
        for attempt in (lambda: load_pretrained(folder, adapter=adapter), lambda: fingerprint(adapter, True, STEM, CONFIG)):
            with pytest.raises(ModelError, match=f"{path.name}: is no regular file"):
                attempt()
        path.unlink()
        moved.rename(path)
    load_pretrained(folder, adapter=adapter)


def test_files_that_are_missing(folder, adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"no adapter_model.safetensors .*, only adapter_model.bin: pickled weights"):
        load_pretrained(folder, adapter=adapter)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"adapter_config.json: no such file: an adapter is a folder in PEFT layout"):
        load_pretrained(folder, adapter=adapter)


def test_a_tied_model_needs_both_names_with_one_value(tmp_path):
    folder = write_model(tmp_path / "base", "llama-tied-linear")
    lora = LoraConfig(rank=4, train_modules=("embed_tokens",))
    export_adapter(trained(folder, lora), tmp_path / "adapter", lora, "base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.embed_tokens", "lm_head"]
    head = f"{PREFIX}lm_head.weight"
    edit_tensors(tmp_path / "adapter", lambda t: t | {head: t[head] + 1})
    with pytest.raises(ModelError, match=r"embed_tokens.weight and .*lm_head.weight differ, but config.json ties them"):
        load_pretrained(folder, adapter=tmp_path / "adapter")
    edit_tensors(tmp_path / "adapter", lambda t: {n: v for n, v in t.items() if n != head})
    with pytest.raises(ModelError, match=r"has model.embed_tokens.weight but not .*lm_head.weight; this model's head and embedding"):
        load_pretrained(folder, adapter=tmp_path / "adapter")


def test_the_slots_must_be_the_adapters(folder, adapter):
    def load(lora):
        net = prepared(folder, lora)
        materialize(net, "cpu", 0, folder)
        load_adapter(net, adapter)

    load(LoraConfig(rank=4, alpha=8))
    with pytest.raises(ModelError, match=r"has rank 4, scale 2, but lora.rank and lora.alpha give rank 8, scale 1 \(model.layers.0"):
        load(LoraConfig(rank=8, alpha=8))
    with pytest.raises(ModelError, match=r"has rank 4, scale 2, but .* rank 4, scale 4"):
        load(LoraConfig(rank=4, alpha=16))
    with pytest.raises(ModelError, match=r"mlp.gate_proj, .* and 7 more: not the linears that lora.targets selects"):
        load(LoraConfig(rank=4, alpha=8, targets=("up_proj", "down_proj")))
