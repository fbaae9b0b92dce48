"""Checkpoints that were damaged, and checkpoints from strangers: the first are noticed and passed over, the second run nothing."""

from __future__ import annotations

import builtins
import io
import itertools
import json
import math
import os
import pickle
import random
import resource
import shutil
import struct
import time
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex

from parallel.local import run
from runtime.checkpoint import shards, store
from runtime.checkpoint.checkpointer import Found
from runtime.checkpoint.store import Damaged, Store
from runtime.errors import ConfigError, ModelError, UserError
from tests.resealed import Call, Index, reseal, seal
from tests.runtime.saving import checkpointer, empty, hurt, resumed, run_folder, save
from tools.checkpoint import main as tool


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

    def moved(md):
        """The second chunk lies over the first one's last rows: the sizes add up, the tensor's last rows are in none."""
        old = next(k for k in md.storage_data if k.fqn == first and k.offset[0])
        end = torch.Size([1, 0])
        md.storage_data[MetadataIndex(first, end)] = md.storage_data.pop(old)
        a, b = md.state_dict_metadata[first].chunks
        assert a.sizes[0] > 1
        md.state_dict_metadata[first].chunks = [a, ChunkStorageMetadata(end, b.sizes)]

    def twice(md):
        """One chunk under two keys, which are the same once they are rebuilt."""
        old = next(k for k in md.storage_data if k.fqn == first)
        md.storage_data = dict(md.storage_data) | {Index(first, old.offset): md.storage_data[old]}

    return {
        "in place of it all": lambda md: Call(os.system, f"touch {marker}"),
        "eval": lambda md: Call(eval, touch),
        "exec in planner_data": lambda md: setattr(md, "planner_data", Call(exec, touch)),
        "as a name": lambda md: md.state_dict_metadata.update({Call(eval, touch): md.state_dict_metadata[first]}),
        "in storage_data": lambda md: md.storage_data.update({Call(eval, touch): 1}),
        "in a size": lambda md: setattr(md.state_dict_metadata[first], "size", Call(eval, touch)),
        "in a dtype": lambda md: setattr(md.state_dict_metadata[first].properties, "dtype", Call(eval, touch)),
        "through getattr": lambda md: Call(getattr, Call(__import__, "os"), "system"),
        "torch.load of a file": lambda md: Call(torch.load, str(marker)),
        "in storage_meta": lambda md: setattr(md, "storage_meta", Call(builtins.open, str(marker), "w")),
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
        "chunks that overlap": moved,
        "chunk in two places": twice,
        "a chunk over and over": chunks(lambda c: [c[0]] * 1000),
        "a chunk of nothing beside": chunks(lambda c: [c[0], c[0]]),
        "a huge size": lambda md: setattr(md.state_dict_metadata[first], "size", torch.Size([1 << 62, 1 << 62])),
        "a long size": lambda md: setattr(md.state_dict_metadata[first], "size", torch.Size([1] * 100)),
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
        raw["a table for the memo"] = b"\x80\x04Nr" + struct.pack("<I", 1 << 27) + b"."
        raw["a string beyond the end"] = b"\x80\x04\x8e" + struct.pack("<Q", 3 << 30) + b"x."
        raw["a key of doubled tuples"] = b"\x80\x04}N\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(60)) + b"Ns."
        raw["a key of doubled tuples, put"] = b"\x80\x04}Nq\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60)) + b"Ns."
        for name in [*cases, *raw]:
            begun = time.monotonic()
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
            assert time.monotonic() - begun < 20, name
            assert not marker.exists(), name
        assert not (cases.keys() | raw.keys()) - refused.keys()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1.5 * 2**20  # KiB: the table alone would be 2 GiB
        assert all("metadata refused: " in text and str(path / ".metadata") in text for text in refused.values())
        assert all(torch.equal(a, b) for a, b in zip(tensors.values(), empty("one").values()))  # nothing was loaded either
        return len(refused)

    assert run(work, 1) == [40]
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
        torch.save(Call(os.system, f"touch {marker}"), path / "forged")
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


def test_a_payload_is_what_the_metadata_says(copy):
    """Other types, dtypes and shapes are named with their file, and nothing of them is converted."""
    path, first = copy / "checkpoints/step_3", "layers.0.weight"
    honest = {p: p.read_bytes() for p in path.iterdir()}
    shape = (4, 6)

    def work(rank, world):
        kinds = {
            "dict": {"a": 1},
            "number": 3,
            "None": None,
            "float64": torch.full(shape, 7.0, dtype=torch.float64),
            "shape": torch.zeros(3),
            "rank": torch.zeros(1, *shape),
            "sparse": torch.zeros(shape).to_sparse(),
            "meta": torch.empty(shape, device="meta"),
            "nothing": torch.zeros(0),
            "old": torch.full(shape, 7.0),  # in the format of torch before 1.6
            "folder": torch.full(shape, 7.0),  # torch reads no bytes of it, and takes what the memory holds
            "pressed": torch.full(shape, 7.0),
        }
        said = {}
        for kind, stored in [*kinds.items(), ("fits", torch.full(shape, 0.25))]:
            for file, data in honest.items():
                file.write_bytes(data)

            def put(md, stored=stored, kind=kind):
                key = next(k for k in md.storage_data if k.fqn == first and not k.offset[0])
                file = path / md.storage_data[key].relative_path
                before = file.stat().st_size
                blob = io.BytesIO()
                torch.save(stored, blob, _use_new_zipfile_serialization=kind != "old")
                with open(file, "ab") as out:
                    out.write(repacked(blob, kind) if kind in ("folder", "pressed") else blob.getvalue())
                md.storage_data[key] = _StorageInfo(file.name, before, file.stat().st_size - before)

            forge(path, put)
            ckpt, tensors = checkpointer(copy), empty("one")
            try:
                ckpt.load(ckpt.find(), tensors)
            except ModelError as e:
                said[kind] = str(e)
                assert bool((tensors[first].to_local() == 77).all()), kind
        assert said.keys() == kinds.keys()
        assert tensors[first].to_local()[:4].eq(0.25).all()
        assert all("/step_3/__0_0.distcp: checkpoint data cannot be read: layers.0.weight: " in text for text in said.values())
        plain = [kind for kind, text in said.items() if "something else than a plain tensor is stored" not in text]
        assert plain == ["float64", "shape", "rank", "nothing", "old", "folder", "pressed"]
        assert all(said[kind].endswith("it is not packed as torch.save does it") for kind in ("folder", "pressed"))
        assert said["old"].endswith("it does not begin as torch.save writes it")
        assert "torch.float64 [4, 6] is stored, but torch.float32 [4, 6] was written down" in said["float64"]

    run(work, 1)


def repacked(blob: io.BytesIO, kind: str) -> bytes:
    """The same members, one of them marked as a folder, or all compressed."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(blob) as source,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if kind == "pressed" else zipfile.ZIP_STORED) as target,
    ):
        for name in source.namelist():
            member = zipfile.ZipInfo(name)
            member.compress_type = target.compression
            member.external_attr = 0x10 * (kind == "folder" and name.endswith("data/0"))
            target.writestr(member, source.read(name))
    return out.getvalue()


def test_a_load_that_leaves_something_unassigned_fails(honest, monkeypatch):
    """Whatever a planner forgets: what is copied is counted."""

    def work(rank, world):
        plan = shards.DefaultLoadPlanner.create_local_plan

        def forgetful(self):
            made = plan(self)
            return type(made)([item for item in made.items if item.dest_index.fqn != "packed" or item.dest_offsets[0]])

        shards.DefaultLoadPlanner.create_local_plan = forgetful
        path = honest / "checkpoints/step_3"
        with pytest.raises(ModelError, match=r"step_3: checkpoint data cannot be read: 8 of 20 elements of packed are there"):
            shards.read(path, store.verify(path)["files"], empty("one"))

    run(work, 1)


def test_chunks_tile_or_are_refused():
    """Cut as DTensors are, along one dimension after the other: any number of ways; and any of these with one chunk changed is none."""
    dice = random.Random(3)

    def cut(length: int) -> list[tuple[int, int]]:
        ends = sorted({0, length, *(dice.randint(0, length) for _ in range(dice.randint(0, 3)))})
        return [(a, b - a) for a, b in itertools.pairwise(ends)]

    def chunk(place) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(a for a, _ in place), torch.Size(n for _, n in place))

    wrong = 0
    for _ in range(300):
        size = torch.Size(dice.randint(1, 9) for _ in range(dice.randint(0, 3)))
        places = list(itertools.product(*map(cut, size)))
        dice.shuffle(places)
        assert shards._tile([chunk(place) for place in places], size)
        for changed in (places[1:], [*places, places[0]], [*places[1:], dice.choice(places)], shifted(places, size, dice)):
            covered = Counter(point for place in changed for point in itertools.product(*(range(a, a + n) for a, n in place)))
            whole = len(covered) == math.prod(size) and set(covered.values()) == {1}
            assert shards._tile([chunk(place) for place in changed], size) == whole
            wrong += not whole
    assert wrong > 700
    nothing = torch.Size((0, 4))
    assert shards._tile([chunk([(0, 0), (0, 4)])] * 2, nothing) and shards._tile([], nothing)
    assert shards._tile([chunk([(0, 2)]), chunk([(1, 0)])], torch.Size((2,)))  # one of nothing assigns nothing


def shifted(places: list, size: torch.Size, dice: random.Random) -> list:
    """One of the chunks moved along one dimension, within the tensor."""
    which = dice.randrange(len(places))
    moved = [(dice.randint(0, whole - n), n) for (_, n), whole in zip(places[which], size)]
    return [*places[:which], moved, *places[which + 1 :]]


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


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(origin={}), "is not one of ours (KeyError"),
        (lambda m: m.update(origin={"path": 1, "step": 1, "id": ""}), "another kind of origin"),
        (lambda m: m.update(layout={}), "is not one of ours (KeyError"),
        (lambda m: m.update(layout={"world": "\x1b[31m"}), "another kind of layout"),
        (lambda m: m.update(layout={"world": 0}), "another kind of layout"),
        (lambda m: m.update(layout={"world": 1, "shard": None}), "another kind of layout"),
        (lambda m: m.update(written="\x1b[31m\nall is well"), "another kind of written"),
        (lambda m: m.update(written="long ago" * 10), "another kind of written"),
        (lambda m: m.update(eval_loss="low"), "another kind of eval_loss"),
        (lambda m: m.update(eval_loss=float("nan")), "another kind of eval_loss"),
        (lambda m: m.update(eval_data=1), "another kind of eval_data"),
        (lambda m: m.update(step=True), "another kind of step"),
        (lambda m: m.update(step=1 << 63), "another kind of step"),
        (lambda m: m.update(step=-1), "another kind of step"),
        (lambda m: m.update(config=deep(25)), "another kind of config"),
        (lambda m: m.update(identity=deep(25)), "another kind of identity"),
        (lambda m: m.update(format={"a": "\x1b"}), 'has format {"a": "\\u001b"}'),
        (lambda m: m["files"].update(x={"size": -5, "crc32": "00000000"}), "has no size and crc32 for 'x'"),
        (lambda m: m["files"].update(x={"size": 0, "crc32": "0"}), "has no size and crc32 for 'x'"),
        (lambda m: m["files"].update({"\x1b[31m": {"size": 0, "crc32": "00000000"}}), "names a file outside its folder: '\\x1b[31m'"),
        (lambda m: m["files"].pop("state.json"), "lists no state.json"),
        (lambda m: m["files"].pop(".metadata"), "lists no .metadata"),
        (lambda m: m["files"][".metadata"].update(size=1 << 40), ".metadata has more than 256.0 MiB"),
    ],
)
def test_a_manifest_that_others_sealed(copy, capsys, change, reason):
    """Its values are of our kinds, or the checkpoint is damaged: for whoever resumes, and for the tool, in one line."""
    path = copy / "checkpoints/step_3"
    manifest = json.loads((path / store.MANIFEST).read_bytes())
    seal(path, manifest)
    store.verify(path)
    change(manifest)
    seal(path, manifest)
    with pytest.raises(Damaged) as caught:
        store.verify(path)
    assert reason in str(caught.value)
    assert tool(["ls", str(copy)]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 3 and "\x1b" not in said and f"step_3           damaged: {caught.value}\n" in said
    assert Store(copy).complete()[0].name == "step_2"


@pytest.mark.parametrize("again", ['"step": 3', '"crc32": ["x"]', '"files": {}'])
def test_a_manifest_with_a_key_twice(copy, again):
    """Readers of JSON differ in which of the two counts; the second crc32 would be the checkpoint's id."""
    path = copy / "checkpoints/step_3"
    body = (path / store.MANIFEST).read_bytes().partition(b"\n")[2].rstrip()[:-1] + f", {again}}}".encode()
    (path / store.MANIFEST).write_bytes(f'{{"crc32": "{store.zlib.crc32(body):08x}",\n'.encode() + body)
    with pytest.raises(Damaged, match=r"MANIFEST\.json is not one of ours \(ValueError: a key is repeated\)"):
        store.verify(path)


def deep(levels: int):
    return {"a": deep(levels - 1)} if levels else 1


@pytest.mark.parametrize("name", [store.MANIFEST, "state.json", ".metadata"])
@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "sparse"])
def test_only_regular_files_of_a_usual_size_are_opened(copy, name, kind):
    path = copy / "checkpoints/step_3"
    victim = path / name
    victim.rename(copy / "kept")
    if kind == "pipe":
        os.mkfifo(victim)  # opening it would wait for a writer
    elif kind == "link":
        victim.symlink_to(copy / "kept")
    elif kind == "folder":
        victim.mkdir()
    else:
        with open(victim, "wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(Damaged, match=rf"{name}.*(not a regular file|has 1\.0 TiB|1099511627776 bytes instead)"):
        store.verify(path)
    files = store.read_manifest(copy / "checkpoints/step_2")["files"]
    found = Found(path, 3, {"files": files})
    if name == ".metadata":
        with pytest.raises(ModelError, match=r"\.metadata: checkpoint metadata refused: (not a regular file|has 1\.0 TiB)"):
            shards.read(path, files, {})
    elif name == "state.json":
        with pytest.raises(ModelError, match=r"state\.json: is not one of ours: (not a regular file|has 1\.0 TiB)"):
            _ = found.state


def test_what_lies_beside_checkpoints_leads_nowhere(copy):
    """A pipe, links and a folder where a dead run leaves half of one: removed without waiting, and not what a link leads to."""
    folder, outside = copy / "checkpoints", copy / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    os.mkfifo(folder / ".tmp-4-pipe")
    (folder / ".tmp-4-link").symlink_to(outside)
    (folder / ".trash-step_1-nowhere").symlink_to("nowhere")
    (folder / ".trash-step_1-folder").mkdir()
    os.mkfifo(folder / ".trash-step_1-folder/pipe")
    begun = time.monotonic()
    Store(copy).sweep()
    assert time.monotonic() - begun < 5 and [p.name for p in folder.iterdir() if p.name.startswith((".tmp", ".trash"))] == []
    assert (outside / "kept").exists()


@pytest.mark.parametrize("where", ["made", "there"])
def test_a_lock_that_is_a_link_is_refused(copy, where):
    lock = copy / "checkpoints/.lock"
    lock.unlink(missing_ok=True)
    lock.symlink_to(copy / where)
    if where == "there":
        (copy / where).touch()
    with pytest.raises(UserError, match=r"checkpoints/\.lock: is a link, and not one of ours; remove it"):
        Store(copy).claim()
    assert not (copy / "made").exists()


@pytest.mark.parametrize("damage", ["absent", "garbage", "pipe"])
def test_a_random_state_of_another_kind(copy, damage):
    path = copy / "checkpoints/step_3"
    name = path / "rng_1.safetensors"

    def work(rank, world):
        ckpt = checkpointer(copy)
        found = ckpt.find()
        assert ckpt.rng(found)["cpu"].tolist() == [30 + rank] * 4
        ckpt.team.total(0)
        if rank == 0:
            name.unlink()
            if damage == "garbage":
                name.write_bytes(b"x" * 50)
            elif damage == "pipe":
                os.mkfifo(name)
        ckpt.team.total(0)
        with pytest.raises(ModelError, match=r"step_3/rng_1\.safetensors: cannot be read: "):
            ckpt.rng(found)
        found.manifest["files"].pop(name.name)
        with pytest.raises(ModelError, match=r"step_3: holds no rng_1\.safetensors"):
            ckpt.rng(found)

    run(work, 2)


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


@pytest.mark.parametrize("text", ['{"step": 7, "step": 7}', '{"step": 7, "early": {"bad": 1, "bad": 2}}'])
def test_a_state_with_a_key_twice(tmp_path, text):
    (tmp_path / "state.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=r"state\.json: is not one of ours: a key is repeated"):
        Found(tmp_path, 7, {}).state_like(FRESH)


FRESH = {"step": 0, "evaluate": False, "packs_per_step": 4, "early": {"best": None, "bad": 0}}
FRESH |= {"meters": {"loss": 0.0, "units": 0, "seconds": 0.0}}


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
        ({"packs_per_step": 0}, "packs_per_step=0"),
        ({"packs_per_step": 10**12}, "packs_per_step=1000000000000"),
        ({"step": 1 << 63}, f"step={1 << 63}"),
        ({"early": {"bad": 10**40}}, f"early.bad={str(10**40)[:37]}..."),
        ({"early": {"best": 10**400}}, f"early.best={str(10**400)[:37]}..."),
        ({"meters": {"loss": 10**400}}, f"meters.loss={str(10**400)[:37]}..."),
        ({"meters": {"units": (1 << 53) + 1}}, f"meters.units={(1 << 53) + 1}"),
        ({"meters": {"seconds": float("inf")}}, "meters.seconds=Infinity"),
        ({"meters": {"seconds": -1.0}}, "meters.seconds=-1.0"),
        ({"step": 6}, "step=6, but the checkpoint is of step 7"),
        ({}, "step=0, but the checkpoint is of step 7"),
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
