"""Files of strangers: what is no regular file of the folder is refused, at once, whatever it leads to."""

from __future__ import annotations

import json
import os
import socket

import pytest

from runtime import files
from runtime.config import load
from runtime.errors import ConfigError, DataError, ModelError
from train import RunConfig


def _fifo(path):
    os.mkfifo(path)


def _socket(path):
    with socket.socket(socket.AF_UNIX) as s:
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket may have 108 characters
        s.bind(path.name)
        os.chdir(here)


ODD = {
    "fifo": (_fifo, "is no regular file"),
    "socket": (_socket, "is no regular file"),
    "folder": (lambda path: path.mkdir(), "is no regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a link to /dev/zero, outside its folder"),
    "environment": (lambda path: path.symlink_to("/proc/self/environ"), "is a link to /proc/.*/environ, outside its folder"),
    "secret": (lambda path: path.symlink_to(path.parent.parent / "secret"), "is a link to .*/secret, outside its folder"),
    "broken": (lambda path: path.symlink_to("nothing"), "is a link to a file that does not exist"),
    "itself": (lambda path: path.symlink_to(path.name), "cannot be read|is a link to"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_file_of_its_folder_is_refused_at_once(tmp_path, kind):
    (tmp_path / "secret").write_text("{}")
    path = tmp_path / "model" / "x.json"
    path.parent.mkdir()
    make, message = ODD[kind]
    make(path)
    for attempt in (files.inside, files.read, files.read_json, lambda p: files.has(p.parent, p.name)):
        with pytest.raises(ModelError, match=message) as error:
            attempt(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(DataError, match=message):
        files.inside(path, error=DataError)


def test_links_inside_the_folder_and_into_its_hub_cache(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/01", tmp_path / "models--a--b/blobs"
    (snapshot / "more").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "ff").write_text('{"a": 1}')
    (snapshot / "x.json").symlink_to("../../blobs/ff")
    (snapshot / "more/y.json").symlink_to("../../../blobs/ff")
    assert files.read_json(snapshot / "x.json") == {"a": 1}
    assert files.read(snapshot / "more/y.json", folder=snapshot) == b'{"a": 1}'
    with pytest.raises(ModelError, match="outside its folder"):
        files.read(snapshot / "more/y.json")  # `more` is no folder of a hub cache
    (snapshot / "real.json").write_text("{}")
    (snapshot / "z.json").symlink_to("real.json")
    (tmp_path / "linked").symlink_to(snapshot)
    assert files.read_json(tmp_path / "linked/z.json") == {} and files.has(tmp_path / "linked", "x.json")
    assert not files.has(snapshot, "absent.json") and not files.has(snapshot, "x" * 5000)
    (tmp_path / "models--a--c/blobs").mkdir(parents=True)
    (tmp_path / "models--a--c/blobs/ee").write_text("{}")
    (snapshot / "w.json").symlink_to(tmp_path / "models--a--c/blobs/ee")  # of another repository
    with pytest.raises(ModelError, match="outside its folder"):
        files.read(snapshot / "w.json")


def test_a_file_is_bounded(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    assert files.read(tmp_path / "x", 5) == b"12345"
    with pytest.raises(ModelError, match="x: is larger than"):
        files.read(tmp_path / "x", 4)


JSON = {
    '{"a": 1, "a": 1}': "a key is repeated",
    '{"b": [{"a": 1, "a": 1}]}': "a key is repeated",
    "[]": "must hold a JSON object",
    "{": "not readable as JSON",
    "[" * 100_000: "not readable as JSON",
    '{"a": ' + "9" * 5000 + "}": "not readable as JSON",
}


@pytest.mark.parametrize("text", JSON, ids=lambda text: text[:16])
def test_json_is_one_object_without_repeated_keys(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ModelError, match=JSON[text]):
        files.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(b"\xff")
    with pytest.raises(ModelError, match="not readable as JSON"):
        files.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text(json.dumps({"a": {"a": "é"}}))
    assert files.read_json(tmp_path / "x.json") == {"a": {"a": "é"}}


def test_a_config_is_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "c.toml")
    with pytest.raises(ConfigError, match=r"c.toml: cannot be read: it is no regular file"):
        load(RunConfig, tmp_path / "c.toml")
    (tmp_path / "d.toml").write_text('extends = "c.toml"')
    with pytest.raises(ConfigError, match=r"extends=.* cannot be used: .*it is no regular file"):
        load(RunConfig, tmp_path / "d.toml")
