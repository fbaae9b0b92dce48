"""Loading: every rank reads its slices and nothing else, and a folder that is wrong ends in one line that says how."""

from __future__ import annotations

import json
import math
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import safetensors_io
from model.arch import Arch
from model.config import LoraConfig
from model.safetensors_io import allocate, check_weights, export_adapter, load_weights, materialize
from model.tensor_folder import TensorFolder, confined, fingerprint
from model.weights import local, region
from parallel.local import run
from runtime.errors import ModelError
from tests.model.folders import LAYOUTS, prepared, shard, sizes_for, train_a_little, write_model
from tests.model.golden import distance, fresh

TOKENS = torch.arange(12)[None]
NORM, EMBED, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"


def load(folder, compute=torch.float32):
    net = prepared(folder, compute=compute)
    net.to_empty(device="cpu")
    net.reset_buffers("cpu")
    load_weights(net, folder)
    return net


def split(folder, files=3):
    """Turns model.safetensors into several files with an index, as large models come; returns the index's path."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = [{} for _ in range(files)]
    for i, (name, t) in enumerate(sorted(tensors.items())):
        parts[i % files][name] = t
    weight_map = {}
    for i, part in enumerate(parts):
        save_file(part, folder / f"model-{i + 1:05d}-of-{files:05d}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{i + 1:05d}-of-{files:05d}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return index


def edit(folder, changes):
    """Replaces, adds or (None) removes tensors of model.safetensors."""
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


# ------------------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_arrive_in_the_dtype_of_the_parameter(tmp_path, stored):
    folder = write_model(tmp_path, dtype=stored)
    theirs = load_file(folder / "model.safetensors")
    net = load(folder)
    assert len(theirs) == len(list(net.named_parameters()))
    for name, p in net.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, theirs[name].float()), name


@pytest.mark.parametrize("name", ["gemma3", "llama-tied-linear"])
def test_an_index_and_a_wrapper_change_nothing(tmp_path, name):
    reference = fresh(Arch.from_folder(write_model(tmp_path, name)))
    if name == "gemma3":
        edit(tmp_path, {"vision_tower.x": torch.zeros(3)})
    split(tmp_path)
    net = load(tmp_path)
    x = TOKENS
    assert distance(net.logits(x), reference.logits(x)) == 0


def test_old_frequency_tables_are_passed_over(tmp_path):
    edit(write_model(tmp_path), {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)})
    load(tmp_path)


def test_every_parameter_gets_a_value_or_it_is_an_error(tmp_path, monkeypatch):
    folder = write_model(tmp_path)
    net = prepared(folder)
    materialize(net, "cpu", 0, folder)
    monkeypatch.setattr("model.safetensors_io.load_weights", lambda net, folder: {NORM})
    with pytest.raises(AssertionError, match="without values"):
        materialize(prepared(folder), "cpu", 0, folder)


# ------------------------------------------------------------------------------------------------------------------ poison

UP, NAN = "model.layers.1.mlp.up_proj.weight", math.nan
MASTERS = [torch.float32, torch.bfloat16, torch.float16]


def poisoned(folder, name=UP, values=(NAN,), file="model.safetensors"):
    """Puts `values` at the end of a tensor."""
    tensors = load_file(folder / file)
    tensors[name].view(-1)[-len(values) :] = torch.tensor(values)
    save_file(tensors, folder / file)
    return folder


def skipping(monkeypatch, name=UP):
    """A loader that leaves the last row out of a parameter, on the rank that has it."""
    copy = safetensors_io._copy

    def partial(p, tensors, hf):
        where = region(p)
        if hf == name and where[0].stop == p.shape[0] and local(p).numel():
            local(p)[:-1].copy_(tensors.read(hf, where)[:-1])
        else:
            copy(p, tensors, hf)

    monkeypatch.setattr(safetensors_io, "_copy", partial)


@pytest.mark.parametrize("masters", MASTERS, ids=str)
def test_memory_is_nan_until_a_value_is_assigned(tmp_path, masters):
    net = prepared(write_model(tmp_path)).to(masters)
    net.on_host = {NORM}
    allocate(net, "cpu")
    assert {p.dtype for p in net.parameters()} == {masters}
    assert all(p.isnan().all() for p in net.parameters())


@pytest.mark.parametrize("masters", MASTERS, ids=str)
def test_a_slice_that_a_loader_leaves_out_is_noticed(tmp_path, monkeypatch, masters):
    folder = write_model(tmp_path)
    skipping(monkeypatch)
    with pytest.raises(AssertionError, match=f"{UP}: 48 elements were given no value"):
        materialize(prepared(folder).to(masters), "cpu", 0, folder)


def test_an_element_that_initialization_leaves_out_is_noticed(tmp_path, monkeypatch):
    net = prepared(write_model(tmp_path))
    net.model.norm.initial = lambda value, generator: value.fill_(1.0)[3:].fill_(NAN)
    with pytest.raises(AssertionError, match=f"{NORM}: 45 elements were given no value"):
        materialize(net, "cpu", 0, None)


@pytest.mark.parametrize("masters", MASTERS, ids=str)
@pytest.mark.parametrize("stored", MASTERS, ids=str)
def test_a_file_with_one_nan_is_refused(tmp_path, stored, masters):
    folder = poisoned(write_model(tmp_path, dtype=stored))
    line = rf"^{tmp_path}: {UP}: 1 of \d+ elements are NaN; the file is damaged, or was saved by a run that had failed$"
    with pytest.raises(ModelError, match=line):
        materialize(prepared(folder).to(masters), "cpu", 0, folder)


def test_infinities_are_values(tmp_path, monkeypatch):
    """Their sum is NaN, they are not. What they do to training, its first step says."""
    folder = poisoned(write_model(tmp_path), values=(math.inf, -math.inf))
    monkeypatch.setattr(safetensors_io, "COUNTED_AT_ONCE", 7)
    net = prepared(folder)
    materialize(net, "cpu", 0, folder)
    assert dict(net.named_parameters())[UP].isinf().sum() == 2
    with pytest.raises(ModelError, match="3 of"):
        materialize(prepared(folder), "cpu", 0, poisoned(folder, values=(NAN, 1.0, NAN, math.inf, NAN, -math.inf)))


def test_a_nan_in_tied_weights_is_found_under_the_name_in_the_file(tmp_path):
    folder = write_model(tmp_path, "llama-tied-linear")
    edit(folder, {EMBED: None, HEAD: load_file(folder / "model.safetensors")[EMBED].clone()})
    with pytest.raises(ModelError, match=f"{HEAD}: 1 of"):
        materialize(prepared(folder), "cpu", 0, poisoned(folder, HEAD))


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.lora_A.weight", NORM])
def test_a_nan_in_an_adapter_names_the_adapter(tmp_path, name):
    folder, lora = write_model(tmp_path / "base"), LoraConfig(rank=4, train_modules=("norm",))
    net = prepared(folder, lora)
    materialize(net, "cpu", 0, folder)
    train_a_little(net)
    export_adapter(net, tmp_path / "adapter", lora, "base")
    again = prepared(folder, lora)
    materialize(again, "cpu", 0, folder, tmp_path / "adapter")
    poisoned(tmp_path / "adapter", f"base_model.model.{name}", file="adapter_model.safetensors")
    with pytest.raises(ModelError, match=rf"^{tmp_path}/adapter: base_model.model.{name}: 1 of \d+ elements are NaN"):
        materialize(prepared(folder, lora), "cpu", 0, folder, tmp_path / "adapter")


def _materialize_sharded(rank, world, folder, axes, fault):
    """ "" if it loads, else what this rank says."""
    net = prepared(folder)
    shard(net, axes)
    with pytest.MonkeyPatch.context() as patch:
        if fault == "loader":
            skipping(patch)
        try:
            materialize(net, "cpu", 0, folder)
        except (ModelError, AssertionError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("fault", ["", "loader", "file"])
@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_whoever_holds_the_nan_says_so(tmp_path, axes, fault):
    folder = write_model(tmp_path, "qwen3", **sizes_for(axes))
    if fault == "file":
        poisoned(folder)
    said = [text for text in run(_materialize_sharded, math.prod(axes.values()), folder, axes, fault) if text]
    assert len(said) == (axes.get("replicate", 1) if fault else 0), said
    words = {"": "", "loader": "AssertionError: .* elements were given no value", "file": "ModelError: .*: 1 of .* elements are NaN"}
    assert all(re.match(words[fault], text) and UP in text for text in said)


# ---------------------------------------------------------------------------------------------------------- tied embeddings


@pytest.mark.parametrize("present", ["embedding", "head", "both"])
def test_tied_weights_load_under_either_name(tmp_path, present):
    folder = write_model(tmp_path, "llama-tied-linear")
    weight = load_file(folder / "model.safetensors")[EMBED]
    edit(folder, {EMBED: None if present == "head" else weight, HEAD: None if present == "embedding" else weight.clone()})
    assert torch.equal(load(folder).model.embed_tokens.weight, weight)


def test_tied_weights_that_differ_are_refused(tmp_path):
    folder = write_model(tmp_path, "llama-tied-linear")
    head = load_file(folder / "model.safetensors")[EMBED].clone()
    head[-1, -1] += 1
    edit(folder, {HEAD: head})
    with pytest.raises(ModelError, match=r"embed_tokens.weight and lm_head.weight differ, but config.json ties them; set tie_word"):
        load(folder)


def test_an_untied_model_needs_its_head(tmp_path):
    edit(write_model(tmp_path), {HEAD: None})
    with pytest.raises(ModelError, match=r"1 missing .lm_head.weight"):
        load(tmp_path)


# ------------------------------------------------------------------------------------------------------------------- ranks


def _load_sharded(rank, world, folder, axes):
    reads = []
    read = TensorFolder.read

    def counted(self, name, where=None):
        value = read(self, name, where)
        reads.append(value.numel() * value.element_size())
        return value

    TensorFolder.read = counted
    net = prepared(folder)
    shard(net, axes)
    materialize(net, "cpu", 0, folder)
    held = sum(p.to_local().numel() * 4 for p in net.parameters())
    empty = sum(p.to_local().numel() == 0 for p in net.parameters())
    stored = load_file(next(folder.glob("model-00001*")))
    equal = all(torch.equal(dict(net.named_parameters())[n].full_tensor(), t) for n, t in stored.items())
    logits = net.logits(TOKENS).double().flatten().tolist()
    return sum(reads), held, empty, equal, logits


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_each_rank_reads_its_slices_only(tmp_path, axes):
    folder = write_model(tmp_path, "qwen3", **sizes_for(axes))
    whole = sum(t.numel() * 4 for t in load_file(folder / "model.safetensors").values())
    reference = load(folder).logits(TOKENS)
    split(folder)
    ranks = run(_load_sharded, math.prod(axes.values()), folder, axes)
    assert [read for read, *_ in ranks] == [held for _, held, *_ in ranks]
    copies = axes.get("replicate", 1)
    if "tensor" not in axes:  # which keeps some vectors whole on each of its ranks
        assert sum(read for read, *_ in ranks) == whole * copies
    assert max(read for read, *_ in ranks) < whole * copies / len(ranks) * 1.15
    assert (sum(empty for _, _, empty, *_ in ranks) > 0) == (axes == {"shard": 4})
    for *_, equal, logits in ranks:
        assert equal
        assert distance(torch.tensor(logits), reference.flatten()) < 1e-6


# ------------------------------------------------------------------------------------------------------------------ errors


def _missing_shard(folder):
    next(iter(sorted(split(folder).parent.glob("model-0*")))).unlink()


def _truncated(folder):
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def _header_only(folder):
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0notjson!")


def _index_says(weight_map):
    def damage(folder):
        index = split(folder)
        index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"] | weight_map}), encoding="utf-8")

    return damage


def _index_text(text):
    def damage(folder):
        split(folder).write_text(text, encoding="utf-8")

    return damage


def _pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _fifo(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def _device(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/dev/zero")


def _change(name, tensor):
    return lambda folder: edit(folder, {name: tensor})


WRONG = {
    "empty": (lambda f: (f / "model.safetensors").unlink(), r"no model.safetensors and no model.safetensors.index.json$"),
    "pickles": (_pickles, r"only pytorch_model.bin: pickled weights can run code when loaded and are not read; convert them"),
    "truncated": (_truncated, r"model.safetensors: damaged or incomplete .*not fully covered.*; fetch it again"),
    "garbage": (_header_only, r"model.safetensors: damaged or incomplete"),
    "missing file": (_missing_shard, r"model-00001-of-00003.safetensors: no such file, but model.safetensors.index.json names it"),
    "outside": (
        _index_says({NORM: "../model.safetensors"}),
        r"index.json: names '../model.safetensors'; only .safetensors files of its own",
    ),
    "absolute": (_index_says({NORM: "/etc/passwd"}), r"names '/etc/passwd'; only"),
    "wrong file": (_index_says({NORM: "model-00001-of-00003.safetensors"}), r"model-00001.*: does not hold model.norm.weight, which"),
    "not json": (_index_text("{"), r"index.json: not readable as JSON"),
    "not text": (_index_text("\x00"), r"index.json: not readable as JSON"),
    "repeated": (_index_text('{"weight_map": {"a": "x", "a": "y"}}'), r"not readable as JSON: a key is repeated"),
    "no map": (_index_text('{"weight_map": {"a": 1}}'), r"has no weight_map of tensor names to file names"),
    "deep": (_index_text("[" * 100_000), r"not readable as JSON"),
    "list": (_index_text("[]"), r"must hold a JSON object"),
    "fifo": (_fifo, r"model.safetensors: is no regular file"),
    "device": (_device, r"is a link to /dev/zero, outside its folder"),
    "missing": (
        lambda f: edit(f, {NORM: None, "model.norm.weights": torch.ones(48)}),
        r"llama model: 1 missing .model.norm.weight., 1 unexpected .model.norm.weights.$",
    ),
    "extra": (_change("model.layers.2.mlp.up_proj.weight", torch.zeros(2)), r"not the tensors of this llama model: 1 unexpected"),
    "shape": (_change(NORM, torch.zeros(47)), r"model.norm.weight has shape \[47\], but the model's is \[48\]"),
    "rank": (_change(NORM, torch.zeros(48, 1)), r"has shape \[48, 1\]"),
    "integer": (_change(NORM, torch.zeros(48, dtype=torch.int32)), r"model.norm.weight has dtype int32, which is not a weight's"),
    "boolean": (_change(NORM, torch.zeros(48, dtype=torch.bool)), r"has dtype bool"),
    "float8": (_change(NORM, torch.zeros(48).to(torch.float8_e4m3fn)), r"has dtype float8_e4m3fn"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_folder_is_one_line(tmp_path, case):
    """The same from the check on meta, which a run makes before ranks connect, and from loading."""
    folder = write_model(tmp_path / "it")
    damage, message = WRONG[case]
    damage(folder)
    for attempt in (lambda: check_weights(prepared(folder), folder), lambda: load(folder)):
        with pytest.raises(ModelError, match=message) as error:
            attempt()
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


NAMES = [
    "",
    ".",
    "..",
    "../x.safetensors",
    "a/x.safetensors",
    "/x.safetensors",
    "x\\y.safetensors",
    "x\0.safetensors",
    "x.bin",
    "..\\x.safetensors",
]


@pytest.mark.parametrize("name", [*NAMES, "x" * 5000 + ".safetensors", "‥／x.safetensors"])
def test_names_stay_in_their_folder(tmp_path, name):
    with pytest.raises(ModelError):
        confined(tmp_path, name, tmp_path / "index.json")


def test_links_may_lead_into_the_blobs_of_the_hub_cache_only(tmp_path):
    repo = tmp_path / "models--a--b"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    written = write_model(tmp_path / "w")
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(written.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    load(snapshot)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "x.safetensors").symlink_to(blobs / "1")
    with pytest.raises(ModelError, match="outside its folder"):
        confined(tmp_path / "plain", "x.safetensors", tmp_path)
    (tmp_path / "linked").symlink_to(snapshot)  # the folder itself may be a link
    load(tmp_path / "linked")


def test_an_index_is_bounded(tmp_path, monkeypatch):
    split(write_model(tmp_path))
    monkeypatch.setattr("runtime.files.MAX_JSON", 100)
    with pytest.raises(ModelError, match=r"index.json: is larger than"):
        TensorFolder(tmp_path)


def test_a_fingerprint_is_of_the_files_that_are_read(tmp_path):
    """What only lies beside them changes nothing and is not opened."""
    folder = write_model(tmp_path / "it")
    for change in (lambda: None, lambda: split(folder)):
        change()
        before = fingerprint(folder, weights=True)
        os.mkfifo(folder / "model-stray.safetensors")
        (folder / "model-zero.safetensors").symlink_to("/dev/zero")
        assert fingerprint(folder, weights=True) == before
        load(folder)
        for name in ("model-stray.safetensors", "model-zero.safetensors"):
            (folder / name).unlink()
    first = folder / "model-00001-of-00003.safetensors"
    whole = first.read_bytes()
    first.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert fingerprint(folder, weights=True) != before
    first.unlink()
    os.mkfifo(first)
    with pytest.raises(ModelError, match=r"model-00001-of-00003.safetensors: is no regular file"):
        fingerprint(folder, weights=True)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/proc/self/environ")
    with pytest.raises(ModelError, match=r"config.json: is a link to"):
        fingerprint(folder, weights=False)
