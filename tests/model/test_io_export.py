"""Exports: what transformers loads is what was trained, to the bit, from any layout, and a folder is complete or absent."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from model.config import LoraConfig
from model.hub import fetch
from model.safetensors_io import export_adapter, export_full, materialize, pass_through, verify_adapter, verify_full
from model.tensor_folder import CHECKSUMS, Spec, TensorFolder, agree, publish, recover
from parallel.local import run
from runtime.errors import ModelError
from tests.model.folders import LAYOUTS, digests, prepared, same_bytes, shard, sizes_for, tensors, theirs, train_a_little, write_model
from tests.model.golden import GOLDEN, distance, write_config

TOKENS = torch.arange(16)[None]
LORA = LoraConfig(rank=4, alpha=6, train_modules=("embed_tokens", "model.norm"))


def loaded(folder, lora=None, compute=torch.float32):
    net = prepared(folder, lora, compute)
    materialize(net, "cpu", 0, folder)
    return net


def fail(text):
    raise RuntimeError(text)


@pytest.fixture
def folder(tmp_path):
    return write_model(tmp_path / "base")


# ------------------------------------------------------------------------------------------------ against transformers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GOLDEN)
def test_transformers_loads_the_export_and_every_byte_came_back(tmp_path, name, dtype):
    transformers = pytest.importorskip("transformers")
    original = theirs(tmp_path / "base", name, dtype)
    net = loaded(tmp_path / "base")
    export_full(net, tmp_path / "out", tmp_path / "base", shard_bytes=30_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert same_bytes(tensors(tmp_path / "out"), tensors(tmp_path / "base"))
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()
    kind = getattr(transformers, original.config.architectures[0])
    again, report = kind.from_pretrained(tmp_path / "out", output_loading_info=True, attn_implementation="eager")
    assert again.dtype == dtype and not any(report.values()), report
    with torch.no_grad():
        assert torch.equal(again.eval()(TOKENS).logits, original(TOKENS).logits)
        if dtype == torch.float32:
            assert distance(net.logits(TOKENS), original(TOKENS).logits) < 1e-5


# -------------------------------------------------------------------------------------------------------------- layouts


def _export_sharded(rank, world, folder, axes, out):
    net = prepared(folder, LORA, torch.bfloat16)
    shard(net, axes, torch.bfloat16)
    materialize(net, "cpu", 0, folder)
    train_a_little(net)
    with torch.no_grad():
        net.logits(TOKENS)  # leaves the root gathered, in bf16, as an evaluation does
    export_full(net, out / "full", folder, shard_bytes=20_000)
    export_adapter(net, out / "adapter", LORA, "base")
    verify_full(out / "full", net, folder)
    verify_adapter(out / "adapter", net)


@pytest.mark.parametrize("axes", [{"shard": 1}, *LAYOUTS], ids=str)
def test_any_layout_writes_the_same_bytes(tmp_path, axes):
    folder = write_model(tmp_path / "base", "qwen2", torch.bfloat16, **sizes_for(axes))
    net = loaded(folder, LORA, torch.bfloat16)
    train_a_little(net)
    export_full(net, tmp_path / "one" / "full", folder, shard_bytes=20_000)
    export_adapter(net, tmp_path / "one" / "adapter", LORA, "base")
    run(_export_sharded, math.prod(axes.values()), folder, axes, tmp_path / "many")
    for kind in ("full", "adapter"):
        one = digests(tmp_path / "one" / kind)
        assert len(one) >= 3 and digests(tmp_path / "many" / kind) == one
    base, full = tensors(folder), tensors(tmp_path / "one" / "full")
    changed = {n for n in base if not torch.equal(base[n], full[n])}
    assert {"model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"} <= changed
    assert not any("layernorm" in n or "bias" in n for n in changed)


def _one_outcome(rank, world, out):
    try:
        agree(ModelError("occupied") if rank == 0 else None)
    except ModelError as e:
        messages = [str(e)]
    try:
        publish(out, {"x": Spec(torch.float32, (2,))}, lambda name: torch.full((2,), math.inf), {})
    except ModelError as e:
        messages.append(str(e))
    try:
        agree(ValueError("broken") if rank == 0 else None)
    except (ValueError, RuntimeError) as e:
        messages.append(f"{type(e).__name__} {e}")
    agree(None)
    return messages


def test_an_error_of_the_writing_rank_is_everyones(tmp_path):
    first, second = run(_one_outcome, 2, tmp_path / "out")
    assert first == ["occupied", "x is not finite in float32: it diverged, or needs a wider dtype", "ValueError broken"]
    assert second == [*first[:2], "RuntimeError rank 0: broken"]
    assert not list(tmp_path.iterdir())


def _half_trained(rank, world, folder, out):
    net = prepared(folder, LoraConfig(rank=2))
    shard(net, {"shard": world})
    materialize(net, "cpu", 0, folder)
    if rank == 0:
        train_a_little(net)
    try:
        export_adapter(net, out, LoraConfig(rank=2), "base")
    except ModelError as e:
        return str(e)


def test_an_adapter_of_which_one_shard_trained_is_refused(folder, tmp_path):
    for message in run(_half_trained, 2, folder, tmp_path / "out"):
        assert "lora_B.weight: the rows of one rank are all zero" in message
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------- the folder


def test_files_beside_the_weights_come_along(folder, tmp_path):
    beside = {
        "generation_config.json": "{}",
        "tokenizer.json": "a",
        "chat_template.jinja": "é",
        "LICENSE": "free",
        "evil.py": "1",
        "README.md": "x",
    }
    for name, text in beside.items():
        (folder / name).write_text(text, encoding="utf-8")
    export_full(loaded(folder), tmp_path / "out", folder)
    written = {"model.safetensors", CHECKSUMS, "config.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == written | beside.keys() - {"evil.py", "README.md"}
    assert (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8") == "é"
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / "tokenizer.json").write_text("b")
    export_full(loaded(folder), tmp_path / "out", folder, tokenizer=other)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "b"
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


@pytest.mark.parametrize("name", ["LICENSE", "vocab.txt", "preprocessor_config.json", "generation_config.json", "chat_template.jinja"])
def test_links_out_of_the_folder_are_not_copied(folder, tmp_path, name):
    """Not where the model is opened, not by the export of a folder that was changed since, not as a tokenizer's file."""
    net = loaded(folder)
    (tmp_path / "secret").write_text("SECRET")
    for target in (tmp_path / "secret", "/proc/self/environ"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
        for attempt in (
            lambda: fetch(str(folder)),
            lambda: pass_through(folder, (name,)),
            lambda: export_full(net, tmp_path / "out", folder),
        ):
            with pytest.raises(ModelError, match=f"{name}: is a link to .*, outside its folder"):
                attempt()
        assert not (tmp_path / "out").exists()
    (folder / name).unlink()
    files = {name: folder / name}  # exchanged after it was looked at
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=f"{name}: is a link to .*/secret, outside its folder"):
        publish(tmp_path / "out", {}, lambda _: None, files)
    assert not (tmp_path / "out").exists()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ModelError, match=f"{name}: is no regular file"):
        fetch(str(folder))


def test_no_such_folder_is_one_line(tmp_path):
    for path in ("x" * 5000, f"{tmp_path}/{'x' * 300}", "~nobody-of-this-name/x/y", "a\0b", str(tmp_path / "none")):
        with pytest.raises(ModelError, match="no such folder, and not a hub id") as error:
            fetch(path)
        assert len(str(error.value)) < 2100


def test_the_checksums_are_the_files(folder, tmp_path):
    import zlib

    export_full(loaded(folder), tmp_path / "out", folder, shard_bytes=9000)
    record = json.loads((tmp_path / "out" / CHECKSUMS).read_text())["files"]
    assert set(record) == {p.name for p in (tmp_path / "out").iterdir()} - {CHECKSUMS}
    for name, entry in record.items():
        data = (tmp_path / "out" / name).read_bytes()
        assert entry == {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}


def test_only_an_earlier_export_is_replaced(folder, tmp_path):
    net, out = loaded(folder), tmp_path / "out"
    out.mkdir()
    export_full(net, out, folder)  # an empty folder is nobody's
    net.model.norm.weight.data += 1
    export_full(net, out, folder)
    assert torch.equal(tensors(out)["model.norm.weight"], net.model.norm.weight)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="out: exists and is not an earlier export of ours; choose another folder, or ask to overwrite"):
        export_full(net, out, folder)
    with pytest.raises(ModelError, match="not an earlier export"):
        export_full(net, folder, folder)
    export_full(net, out, folder, overwrite=True)
    assert not (out / "notes.txt").exists()
    (aside,) = tmp_path.glob("out.replaced-*")
    assert (aside / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="is a file; an export is a folder"):
        export_full(net, tmp_path / "file", folder, overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "out", aside.name, "file"}


def test_a_killed_export_leaves_what_was_there(folder, tmp_path):
    net, out = loaded(folder), tmp_path / "out"
    export_full(net, out, folder)
    before = digests(out)
    net.model.norm.weight.data += 1
    for last in (1, 7, 20):  # of 12 tensors written and 12 compared
        calls = iter(range(last))
        if not (pid := os.fork()):

            def value(name, calls=calls):
                return torch.zeros(3) if next(calls, None) is not None else os.kill(os.getpid(), signal.SIGKILL)

            publish(out, {str(i): Spec(torch.float32, (3,)) for i in range(12)}, value, {})
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        assert digests(out) == before and len(list(tmp_path.glob(".out.draft-*"))) == 1
    export_full(net, out, folder)
    assert not list(tmp_path.glob(".out.draft-*")) and digests(out) != before


def killed_at(call, number, work):
    """Runs `work` in a fork that is killed where it makes the `number`-th call of `call`, a method of Path; True if it got there."""
    if not (pid := os.fork()):
        made, original = iter(range(number)), getattr(Path, call)

        def counted(self, *args, **kwargs):
            if next(made, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *args, **kwargs)

        setattr(Path, call, counted)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("name", ["out", "odd [name]*"])
def test_an_export_killed_while_it_takes_its_place_loses_none_and_leaves_none(folder, tmp_path, name):
    """`out` moved aside, the new one renamed, the old one renamed to be removed: killed before each."""
    net, out = loaded(folder), tmp_path / name
    export_full(net, out, folder)
    before = digests(out)
    net.model.norm.weight.data += 1
    export_full(net, tmp_path / "reference", folder)
    after = digests(tmp_path / "reference")
    lay_there = []
    for number in range(3):
        assert killed_at("rename", number, lambda: export_full(net, out, folder))
        lay_there.append(out.exists() and digests(out))
        recover(out)
        assert digests(out) == (lay_there[-1] or before)
        assert {p.name for p in tmp_path.iterdir()} == {"base", "reference", name}
    assert lay_there == [before, False, after]
    assert not killed_at("rename", 3, lambda: export_full(net, out, folder))
    assert digests(out) == after


def test_what_a_killed_export_left_is_found_by_the_next(folder, tmp_path):
    net, out = loaded(folder), tmp_path / "out"
    export_full(net, out, folder)
    before = digests(out)
    assert killed_at("rename", 1, lambda: export_full(net, out, folder))
    assert not out.exists() and len(list(tmp_path.glob("out.replaced-*"))) == len(list(tmp_path.glob(".out.draft-*"))) == 1
    with pytest.raises(RuntimeError, match="a value that fails"):  # the export fails, what was there is there again
        publish(out, {"x": Spec(torch.float32, (3,))}, lambda name: fail("a value that fails"), {})
    assert digests(out) == before
    assert killed_at("rename", 1, lambda: export_full(net, out, folder))
    export_full(net, out, folder)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "out"} and digests(out) == before


def test_what_is_removed_by_half_is_removed_by_the_next(folder, tmp_path):
    net, out = loaded(folder), tmp_path / "out"
    export_full(net, out, folder)
    if not (pid := os.fork()):
        unlink = os.unlink
        os.unlink = lambda *args, **kwargs: (unlink(*args, **kwargs), os.kill(os.getpid(), signal.SIGKILL))
        export_full(net, out, folder)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert len(list(tmp_path.glob(".out.*"))) == 1
    export_full(net, out, folder)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "out"}


def test_what_is_not_ours_is_not_recovered(folder, tmp_path):
    net, out = loaded(folder), tmp_path / "out"
    export_full(net, out, folder)
    (out / "notes.txt").write_text("mine")
    assert killed_at("rename", 1, lambda: export_full(net, out, folder, overwrite=True))
    (aside,) = tmp_path.glob("out.replaced-*")
    export_full(net, out, folder)
    shutil.copytree(out, mine := tmp_path / "out.replaced-mine")
    shutil.copytree(out, other := tmp_path / "out.replaced-0123abcd")
    (out / "more.txt").write_text("mine as well")
    with pytest.raises(ModelError, match="not an earlier export of ours"):
        export_full(net, out, folder)
    assert (aside / "notes.txt").read_text() == "mine" and other.exists(), "nothing of ours has its place"
    (out / "more.txt").unlink()
    export_full(net, out, folder)
    assert (aside / "notes.txt").exists() and mine.exists() and not other.exists()


def test_a_draft_that_cannot_take_its_place_gives_it_back(folder, tmp_path, monkeypatch):
    net, out, rename = loaded(folder), tmp_path / "out", Path.rename
    export_full(net, out, folder)
    before = digests(out)

    def refused(self, target):
        if ".draft-" in self.name:
            raise OSError(errno.EACCES, "Permission denied", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    net.model.norm.weight.data += 1
    with pytest.raises(ModelError, match="out: cannot be written: Permission denied"):
        export_full(net, out, folder)
    assert digests(out) == before and {p.name for p in tmp_path.iterdir()} == {"base", "out"}


def test_a_full_disk_says_so_and_leaves_nothing(folder, tmp_path, monkeypatch):
    net = loaded(folder)
    limits, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(ModelError, match=r"out: cannot be written: File too large"):
            export_full(net, tmp_path / "out", folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, action)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ModelError, match=r"out: the export needs [\d.]+ KiB and the disk has 1000 B free"):
        export_full(net, tmp_path / "out", folder)
    assert {p.name for p in tmp_path.iterdir()} == {"base"}


def test_a_read_only_parent_is_one_line(folder, tmp_path, monkeypatch):
    net = loaded(folder)

    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system", str(tmp_path / "out"))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(ModelError, match="out: cannot be written: Read-only file system"):
        export_full(net, tmp_path / "out", folder)


def test_what_reads_back_differently_is_not_published(folder, tmp_path, monkeypatch):
    net, read = loaded(folder), TensorFolder.read

    def flipped(self, name, where=None):
        tensor = read(self, name, where).clone()
        if name == "model.layers.1.mlp.up_proj.weight":
            tensor.view(torch.uint8)[3, 5] ^= 4
        return tensor

    monkeypatch.setattr(TensorFolder, "read", flipped)
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.up_proj.weight reads back differently"):
        export_full(net, tmp_path / "out", folder)
    assert {p.name for p in tmp_path.iterdir()} == {"base"}


def test_verify_sees_every_difference(folder, tmp_path):
    net = loaded(folder)
    export_full(net, tmp_path / "out", folder)
    verify_full(tmp_path / "out", net, folder)
    path = tmp_path / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match="reads back differently from what was exported"):
        verify_full(tmp_path / "out", net, folder)
    with pytest.raises(ModelError, match="not the tensors that were exported"):
        verify_full(tmp_path / "out", net, folder, dtype=torch.bfloat16)


# --------------------------------------------------------------------------------------------------------------- dtypes


def test_a_requested_dtype_is_written_and_noted(folder, tmp_path):
    config = folder / "config.json"
    for key in ("torch_dtype", "dtype"):
        config.write_text(json.dumps({**GOLDEN["llama"], "name": "é", key: "float32"}), encoding="utf-8")
        net = loaded(folder)
        export_full(net, tmp_path / "out", folder, dtype=torch.bfloat16)
        written = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
        assert written == {**GOLDEN["llama"], "name": "é", key: "bfloat16"}
        assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.bfloat16}


def test_each_tensor_keeps_the_dtype_its_folder_has_it_in(tmp_path):
    from safetensors.torch import save_file

    folder = write_model(tmp_path / "base", dtype=torch.bfloat16)
    mixed = tensors(folder)
    mixed["model.norm.weight"] = torch.linspace(0, 1, 48) / 3
    save_file(mixed, folder / "model.safetensors")
    export_full(loaded(folder), tmp_path / "out", folder)
    assert same_bytes(tensors(tmp_path / "out"), mixed)


@pytest.mark.parametrize("said, written", [("bfloat16", torch.bfloat16), (None, torch.float32)])
def test_without_weights_in_the_source_its_config_decides(tmp_path, said, written):
    folder = write_config(tmp_path / "base", "llama", **({"dtype": said} if said else {}))
    net = prepared(folder)
    materialize(net, "cpu", 0, None)
    export_full(net, tmp_path / "out", folder)
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {written}
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"base: has no config.json to copy"):
        export_full(net, tmp_path / "out", folder)


def test_what_a_dtype_cannot_hold_is_refused(folder, tmp_path):
    net = loaded(folder)
    net.model.norm.weight.data[3] = 1e6
    export_full(net, tmp_path / "wide", folder)
    with pytest.raises(ModelError, match=r"model.norm.weight is not finite in float16: it diverged, or needs a wider dtype"):
        export_full(net, tmp_path / "out", folder, dtype=torch.float16)
    assert not (tmp_path / "out").exists()
