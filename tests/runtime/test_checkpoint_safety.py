"""Checkpoints that were damaged, and checkpoints from strangers: the first are noticed and passed over, the second run nothing."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex

from parallel.local import run
from runtime.checkpoint import shards, store
from runtime.checkpoint.checkpointer import Found
from runtime.checkpoint.store import Damaged, Store
from runtime.errors import ConfigError, ModelError
from tests.runtime.saving import checkpointer, empty, hurt, resumed, run_folder, save


@pytest.fixture(scope="module")
def honest():
    """A run with steps 1, 2 and 3, to be copied."""

    def work(rank, world):
        ckpt = checkpointer(folder, keep=3)
        for step in (1, 2, 3):
            save(ckpt, step, "fsdp2")

    with run_folder() as folder:
        run(work, 2)
        yield folder


@pytest.fixture
def copy(honest):
    with run_folder() as folder:
        shutil.copytree(honest, folder, dirs_exist_ok=True)
        yield folder


# --------------------------------------------------------------------------------------------------------------- damage


def test_all_damage_is_noticed_and_named(honest):
    dice = random.Random(1)
    for _ in range(100):
        with run_folder() as folder:
            path = folder / "step_3"
            shutil.copytree(honest / "checkpoints/step_3", path)
            store.verify(path)
            name, _ = hurt(path, dice)
            with pytest.raises(Damaged, match=name.lstrip(".")):
                store.verify(path)


def test_a_damaged_checkpoint_is_passed_over(honest):
    """Ranks read different files; all come to the same decision, and say why. What was passed over is moved away."""
    dice = random.Random(2)

    def work(rank, world, folder):
        said = []
        return resumed(checkpointer(folder, said, keep=3), "fsdp2"), said

    for number in range(6):
        with run_folder() as folder:
            shutil.copytree(honest, folder, dirs_exist_ok=True)
            names = [hurt(folder / f"checkpoints/step_{3 - i}", dice)[0] for i in range(1 + number % 2)]
            if len(names) == 1:
                hurt(folder / "checkpoints/step_1", dice)  # older than what is found: nobody looks
            (step, said), (other, silent) = run(work, 2, folder)
            assert step == other == 3 - len(names) and not silent
            assert len(said) == len(names) + 2
            for i, name in enumerate(names):
                assert f"step_{3 - i}: " in said[i] and name in said[i]
            assert {p.name for p in (folder / "checkpoints/superseded_1").iterdir()} == {f"step_{3 - i}" for i in range(len(names))}
            assert (folder / "checkpoints/latest").read_text() == f"step_{step}\n"


def test_nothing_intact_is_an_error_and_not_a_fresh_start(copy):
    for path in Store(copy).steps():
        (path / "state.json").write_text("{}")

    def work(rank, world):
        with pytest.raises(ModelError, match=r"no checkpoint is intact \(step_3: state\.json: .*start anew"):
            checkpointer(copy).find()
        with pytest.raises(ConfigError, match=r"checkpoint\.resume=.*step_2' is damaged: state\.json"):
            checkpointer(copy).find(str(copy / "checkpoints/step_2"))

    run(work, 2)
    assert len(Store(copy).steps()) == 3


def test_a_mixture_of_two_steps_cannot_be(copy):
    """What DCP loads without an error when a save over an old step was cut short: files of one step beside files of another."""
    old, new = copy / "checkpoints/step_2", copy / "checkpoints/step_3"
    shutil.copy(old / "__1_0.distcp", new)
    with pytest.raises(Damaged, match=r"__1_0\.distcp: contents were changed"):
        store.verify(new)
    shutil.rmtree(new)
    old.rename(new)
    assert Store(copy).problem(new) == "holds step 2"


# ------------------------------------------------------------------------------------------------------------- strangers


def reseal(path: Path) -> None:
    """Makes a forged checkpoint pass verification, as a stranger would."""
    manifest = json.loads((path / store.MANIFEST).read_bytes())
    del manifest["crc32"]
    (path / store.MANIFEST).unlink()
    for name in list(manifest["files"]):
        data = (path / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "crc32": f"{store.zlib.crc32(data):08x}"}
    store.write_manifest(path, manifest)
    store.verify(path)


class Run:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def forge(path: Path, change) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    (path / ".metadata").write_bytes(pickle.dumps(change(metadata) or metadata))
    reseal(path)


def payloads(marker: Path) -> dict:
    """Changes to honest metadata that would touch `marker`, or lead the reader astray."""
    touch = f"open({str(marker)!r}, 'w')"
    first = "layers.0.weight"

    def stored(**fields):
        def change(md):
            key = next(k for k in md.storage_data if k.fqn == first)
            md.storage_data[key] = _StorageInfo(**vars(md.storage_data[key]) | fields)

        return change

    def chunks(make):
        def change(md):
            md.state_dict_metadata[first].chunks = make(md.state_dict_metadata[first].chunks)

        return change

    return {
        "in place of it all": lambda md: Run(os.system, f"touch {marker}"),
        "eval": lambda md: Run(eval, touch),
        "exec in planner_data": lambda md: setattr(md, "planner_data", Run(exec, touch)),
        "as a name": lambda md: md.state_dict_metadata.update({Run(eval, touch): md.state_dict_metadata[first]}),
        "in storage_data": lambda md: md.storage_data.update({Run(eval, touch): 1}),
        "in a size": lambda md: setattr(md.state_dict_metadata[first], "size", Run(eval, touch)),
        "in a dtype": lambda md: setattr(md.state_dict_metadata[first].properties, "dtype", Run(eval, touch)),
        "through getattr": lambda md: Run(getattr, Run(__import__, "os"), "system"),
        "torch.load of a file": lambda md: Run(torch.load, str(marker)),
        "in storage_meta": lambda md: setattr(md, "storage_meta", Run(builtins.open, str(marker), "w")),
        "byte entry": lambda md: md.state_dict_metadata.update({first: BytesStorageMetadata()}),
        "parent folder": stored(relative_path="../step_1/__0_0.distcp"),
        "absolute path": stored(relative_path="/etc/passwd"),
        "file that is not listed": stored(relative_path="other.distcp"),
        "no string": stored(relative_path=Path("__0_0.distcp")),
        "beyond the end": stored(length=1 << 40),
        "before the beginning": stored(offset=-10),
        "no number": stored(offset=1.5),
        "transforms": stored(transform_descriptors=["zstd"]),
        "chunk outside": chunks(lambda c: [ChunkStorageMetadata(torch.Size([100, 0]), c[0].sizes), c[1]]),
        "chunk missing": chunks(lambda c: c[:1]),
        "chunk of other rank": chunks(lambda c: [ChunkStorageMetadata(torch.Size([7]), torch.Size([6])), c[1]]),
        "chunk in no file": lambda md: md.storage_data.pop(next(k for k in md.storage_data if k.fqn == first)),
        "no metadata": lambda md: {"state": 1},
        "storage of nothing": lambda md: setattr(md, "storage_data", None),
        "other class": lambda md: md.state_dict_metadata.update({first: MetadataIndex("x")}),
    }


def test_forged_metadata_runs_nothing_and_is_refused(copy):
    marker = copy / "ran"
    path = copy / "checkpoints/step_3"
    good = {name: (path / name).read_bytes() for name in (".metadata", store.MANIFEST)}

    def work(rank, world):
        ckpt, refused, tensors = checkpointer(copy), {}, empty("one")
        cases = payloads(marker)
        raw = {"truncated": good[".metadata"][:-5], "empty": b"", "old protocol": f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()}
        # a class of ours may not be changed either: BUILD on the class itself, for all later uses
        raw["class"] = b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n}X\x01\x00\x00\x00xK\x01sb."
        for name in [*cases, *raw]:
            for file, data in good.items():
                (path / file).write_bytes(data)
            if name in raw:
                (path / ".metadata").write_bytes(raw[name])
                reseal(path)
            else:
                forge(path, cases[name])
            found = ckpt.find()
            assert found.step == 3  # it passes verification
            try:
                ckpt.load(found, tensors)
            except ModelError as e:
                refused[name] = str(e)
            assert not marker.exists(), name
        assert not (cases.keys() | raw.keys()) - refused.keys()
        assert all("metadata refused: " in text and str(path / ".metadata") in text for text in refused.values())
        assert all(torch.equal(a, b) for a, b in zip(tensors.values(), empty("one").values()))  # nothing was loaded either
        return len(refused)

    assert run(work, 1) == [30]
    # the payloads are real: this one runs in DCP's own reader
    for file, data in good.items():
        (path / file).write_bytes(data)
    forge(path, payloads(marker)["in place of it all"])
    pickle.loads((path / ".metadata").read_bytes())
    assert marker.exists()


def test_forged_tensor_data_runs_nothing(copy):
    marker = copy / "ran"
    path = copy / "checkpoints/step_3"

    def work(rank, world):
        torch.save(Run(os.system, f"touch {marker}"), path / "forged")
        forged = (path / "forged").read_bytes()
        metadata = shards.parse_metadata((path / ".metadata").read_bytes(), store.read_manifest(path)["files"])
        place = next(v for k, v in metadata.storage_data.items() if k.fqn == "packed")
        file = path / place.relative_path
        data = file.read_bytes()
        (path / "forged").unlink()
        file.write_bytes(data[: place.offset] + forged.ljust(len(data) - place.offset, b"\0"))
        forge(path, lambda md: [setattr(v, "length", len(forged)) for k, v in md.storage_data.items() if v.offset == place.offset] and None)
        ckpt = checkpointer(copy)
        with pytest.raises(ModelError, match="checkpoint data cannot be read"):
            ckpt.load(ckpt.find(), empty("one"))

    run(work, 1)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../step_1/state.json", "/etc/passwd", "..", "a\\b", "a/b"])
def test_a_manifest_names_no_file_outside_its_folder(copy, name):
    path = copy / "checkpoints/step_3"
    manifest = json.loads((path / store.MANIFEST).read_bytes())
    del manifest["crc32"]
    manifest["files"][name] = {"size": 1, "crc32": "00000000"}
    (path / store.MANIFEST).unlink()
    store.write_manifest(path, manifest)
    with pytest.raises(Damaged, match="names a file outside its folder"):
        store.verify(path)


def test_a_link_is_not_a_file(copy):
    path = copy / "checkpoints/step_3"
    (path / "state.json").rename(copy / "state.json")
    (path / "state.json").symlink_to(copy / "state.json")
    with pytest.raises(Damaged, match=r"state\.json: not a regular file"):
        store.verify(path)


def test_a_manifest_of_another_kind(copy):
    path = copy / "checkpoints/step_3"
    bodies = [
        "",
        "]",
        '"x"',
        '"format": 2}',
        '"format": 1, "files": [1]}',
        '"format": 1, "files": {"a": 1}}',
        '"format": 1, "files": {}}',
        "[" * 10**5,
    ]
    for body in map(str.encode, bodies):
        (path / store.MANIFEST).write_bytes(f'{{"crc32": "{store.zlib.crc32(body):08x}",\n'.encode() + body)
        with pytest.raises(Damaged, match=r"MANIFEST\.json is not one of ours|has format 2"):
            store.verify(path)


def test_the_reader_knows_what_honest_metadata_needs_and_no_more(honest):
    """A torch that pickles another name into its metadata, or no longer needs one, is noticed here."""
    asked = set()

    class Listening(pickle.Unpickler):
        def find_class(self, module, name):
            asked.add(f"{module}.{name}")
            return super().find_class(module, name)

    with open(honest / "checkpoints/step_3/.metadata", "rb") as file:
        Listening(file).load()
    dtypes = {name for name in asked if isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype)}
    assert dtypes == {"torch.float32", "torch.bfloat16", "torch.uint8"}
    never_written = {"torch.distributed.checkpoint.metadata.BytesStorageMetadata"}  # known, to be refused by name
    assert asked - dtypes == shards.ALLOWED - never_written


FRESH = {"step": 0, "evaluate": False, "early": {"best": None, "bad": 0}, "meters": {"loss": 0.0, "units": 0}}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"step": "7"}, 'step="7"'),
        ({"step": True}, "step=true"),
        ({"step": -1}, "step=-1"),
        ({"step": 7.5}, "step=7.5"),
        ({"evaluate": 1}, "evaluate=1"),
        ({"early": []}, "early=[]"),
        ({"early": {"best": "low"}}, 'early.best="low"'),
        ({"early": {"worst": 1.0}}, "early.worst=1.0"),
        ({"meters": {"loss": None}}, "meters.loss=null"),
        ({"stop": 0}, "stop=0"),
    ],
    ids=str,
)
def test_a_state_of_another_kind_is_refused_by_its_key(tmp_path, given, said):
    found = Found(tmp_path, 7, {})
    (tmp_path / "state.json").write_text(json.dumps(given), encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        found.state_like(FRESH)
    assert str(caught.value).endswith(f"state.json: is not one of ours: {said}")


def test_a_state_is_taken_over_what_is_new(tmp_path):
    given = {"step": 7, "early": {"best": 1, "bad": 2}, "meters": {"loss": float("nan")}}
    (tmp_path / "state.json").write_text(json.dumps(given), encoding="utf-8")
    found = Found(tmp_path, 7, {}).state_like(FRESH)
    assert found["step"] == 7 and found["evaluate"] is False and found["early"] == {"best": 1, "bad": 2}
    assert found["meters"]["units"] == 0 and found["meters"]["loss"] != found["meters"]["loss"]
