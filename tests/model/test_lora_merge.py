"""tools.merge: from folders, tensor by tensor, the bytes that a merged export of the live model has."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import load_pretrained
from model.config import LoraConfig
from model.safetensors_io import export_adapter, export_full, materialize
from tests.model.folders import digests, prepared, tensors, train_a_little, write_model
from tests.model.golden import distance
from tools.merge import main

LORA = LoraConfig(rank=4, alpha=10, train_modules=("norm",))
TOKENS = torch.arange(16)[None]


def adapter_of(folder, out, lora=LORA, compute=torch.float32):
    net = prepared(folder, lora, compute)
    materialize(net, "cpu", 0, folder)
    train_a_little(net)
    export_adapter(net, out, lora, str(folder))
    return net


def merge(*args, **options):
    return main([f"--{k}={v}" for k, v in options.items()] + list(args))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_merged_export(tmp_path, name, dtype, capsys):
    folder = write_model(tmp_path / "base", name, dtype)
    if name == "gemma3":
        vision = {"vision_tower.x": torch.arange(5, dtype=torch.float16)}
        save_file(load_file(folder / "model.safetensors") | vision, folder / "model.safetensors")
    net = adapter_of(folder, tmp_path / "adapter", compute=dtype)
    export_full(net, tmp_path / "live", folder)
    assert merge(adapter=tmp_path / "adapter", out=tmp_path / "merged") == 0
    assert digests(tmp_path / "merged") == digests(tmp_path / "live")
    assert str(tmp_path / "merged") in capsys.readouterr().out
    base, merged = tensors(folder), tensors(tmp_path / "merged")
    assert base.keys() == merged.keys()
    same = {n for n in base if torch.equal(base[n], merged[n])}
    assert 0 < len(same) == sum(not n.endswith(("_proj.weight", "model.norm.weight")) for n in base)


def test_the_merged_model_computes_what_the_adapter_does(tmp_path):
    folder = write_model(tmp_path / "base", "gemma3_text")
    adapter_of(folder, tmp_path / "adapter")
    merge(adapter=tmp_path / "adapter", out=tmp_path / "merged")
    base, beside = load_pretrained(folder), load_pretrained(folder, adapter=tmp_path / "adapter")
    merged = load_pretrained(tmp_path / "merged")
    assert distance(beside.logits(TOKENS), base.logits(TOKENS)) > 0.05
    assert distance(merged.logits(TOKENS), beside.logits(TOKENS)) < 1e-5


def test_options(tmp_path):
    folder = write_model(tmp_path / "base")
    (folder / "tokenizer.json").write_text("base")
    adapter_of(folder, tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer.json").write_text("adapter")
    other = write_model(tmp_path / "other")
    assert merge(adapter=tmp_path / "adapter", base=other, out=tmp_path / "out", dtype="bf16") == 0
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "adapter"
    (tmp_path / "out" / "notes.txt").write_text("x")
    assert merge(adapter=tmp_path / "adapter", out=tmp_path / "out") == 2
    assert merge("--overwrite", adapter=tmp_path / "adapter", out=tmp_path / "out") == 0


def test_errors_are_one_line_and_exit_code_2(tmp_path, capsys):
    folder = write_model(tmp_path / "base")
    adapter_of(folder, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    small = write_model(tmp_path / "small", hidden_size=40)

    def error(**options):
        assert merge(out=tmp_path / "out", **{"adapter": tmp_path / "adapter", **options}) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1 and text.startswith("error: ")
        return text

    assert "no such file: an adapter is a folder in PEFT layout" in error(adapter=folder)
    assert "no such folder, and not a hub id" in error(base=str(tmp_path / "none"))
    assert "but the model's is" in error(base=small)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    assert "names no base model; give one with --base" in error()
    assert not (tmp_path / "out").exists()
