"""Reading files: every good form, and every bad one with its file, line and reason."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from data import sources
from data.config import SourceConfig
from data.sources import find_files, read_records
from runtime.errors import ConfigError, DataError


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def values(path: Path) -> list:
    return [record.value for record in read_records(path)]


def lines(path: Path) -> list[int]:
    return [record.line for record in read_records(path)]


# ------------------------------------------------------------------------------------------------------------------- good


def test_jsonl(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": "x\\u2028\xe2\x80\xa8y"}\r\n\r\n  [1]\n\n"t"')
    assert values(path) == [{"a": "x\u2028\u2028y"}, [1], "t"] and lines(path) == [1, 3, 5]
    assert sum(record.size for record in read_records(path)) <= path.stat().st_size


def test_json_array_and_lines(tmp_path):
    path = write(tmp_path / "a.json", '\ufeff [\n  {"a": 1},\n  {\n    "a":\n 2},  {"a": "[,]"}\n\n]\n')
    assert values(path) == [{"a": 1}, {"a": 2}, {"a": "[,]"}] and lines(path) == [2, 3, 5]
    assert values(write(tmp_path / "b.json", '{"a": 1}\n{"a": 2}\n')) == [{"a": 1}, {"a": 2}]
    assert values(write(tmp_path / "c.json", " [ ] ")) == [] and values(write(tmp_path / "d.json", "")) == []
    many = [{"n": i, "t": "x\n" * (i % 3)} for i in range(500)]
    path = write(tmp_path / "e.json", json.dumps(many, indent=1))
    text = path.read_text().splitlines()
    assert values(path) == many and all(text[n - 1].strip() == "{" for n in lines(path))


def test_csv(tmp_path):
    path = write(tmp_path / "a.csv", '\ufeffinstruction,output\r\n"two\r\nlines, ""quoted""",x\r\n\r\né,\r\n')
    assert values(path) == [{"instruction": 'two\r\nlines, "quoted"', "output": "x"}, {"instruction": "é", "output": ""}]
    assert lines(path) == [2, 5]


def test_text_is_one_document(tmp_path):
    assert values(write(tmp_path / "a.txt", "\ufeffone\n\ntwo\r\n")) == [{"text": "one\n\ntwo\r\n"}]


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is the optional extra `data`")
    import pyarrow.parquet as pq

    rows = [{"messages": [{"role": "user", "content": "é", "weight": None}]}, {"messages": [{"role": "user", "content": "b", "weight": 1}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == [{"messages": [{"role": "user", "content": "é"}]}, rows[1]] and lines(
        tmp_path / "a.parquet"
    ) == [1, 2]
    with pytest.raises(DataError, match=r"b.parquet: is not valid parquet: "):
        values(write(tmp_path / "b.parquet", "no"))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"a.parquet: needs pyarrow to be read; install it: pip install 'pyarrow>=17'"):
        values(write(tmp_path / "a.parquet", "PAR1"))


# -------------------------------------------------------------------------------------------------------------------- bad

OK = b'{"a": 1}\n'
BAD = [
    ("a.jsonl", OK + b'{"a": 1\n' + OK, 2, "is not valid JSON: expecting ',' delimiter"),
    ("a.jsonl", OK * 500 + b'{"a": "', 501, "is not valid JSON: unterminated string"),
    ("a.jsonl", OK + b"nope\n", 2, r"is not valid JSON: expecting value \(column 1\)"),
    ("a.jsonl", OK + b'{"a": 1} {"a": 2}\n', 2, r"is not valid JSON: extra data \(column 10\)"),
    ("a.jsonl", OK + b'{"a": NaN}\n', 2, "is not valid JSON: NaN is not JSON"),
    ("a.jsonl", OK + b'{"a": -Infinity}\n', 2, "is not valid JSON: -Infinity is not JSON"),
    ("a.jsonl", OK + b'{"a": 1, "b": 2, "a": 3}\n', 2, "is not valid JSON: key 'a' appears twice in an object"),
    ("a.jsonl", OK + b'{"a": "\x00"}\n', 2, "is not valid JSON: invalid control character"),
    ("a.jsonl", OK + b"\x00" * 50 + b"\n", 2, "is not valid JSON: expecting value"),
    ("a.jsonl", OK + b'{"a": "\xff"}\n', 2, "byte 0xff at column 8 is not UTF-8; convert the file"),
    ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), 1, "byte 0xff at column 1 is not UTF-8"),
    ("a.jsonl", OK + b"[" * 100000 + b"\n", 2, "is nested too deeply; 64 levels are the most"),
    ("a.jsonl", OK + b"[" * 65 + b"]" * 65 + b"\n", 2, "is nested too deeply; 64 levels are the most"),
    ("a.json", b"[1,\n" + b'{"a":' * 65 + b"1" + b"}" * 65 + b"]", 2, "is nested too deeply; 64 levels are the most"),
    ("a.jsonl", OK + b'{"a": ' + b"1" * 5000 + b"}\n", 2, "is not valid JSON: "),
    ("a.json", b'[\n{"a": 1},\n{"a": }\n]', 3, r"is not valid JSON: expecting value \(column 7\)"),
    ("a.json", b'[\n{"a": 1},\n]', 3, "is not valid JSON: expecting value"),
    ("a.json", b'[\n{"a": 1}\n\n{"a": 2}\n]', 4, "is not valid JSON: expected a comma or the closing bracket"),
    ("a.json", b'[\n{"a": 1}\n', 3, "is not valid JSON: expected a comma or the closing bracket"),
    ("a.json", b'[\n{"a": 1}\n]\n[]', 3, "is not valid JSON: there is text after the array"),
    ("a.json", b'[\n{"a": 1, "a": 1}]', 2, "key 'a' appears twice"),
    ("a.json", b'[\n{"a": "\xc3("}]', 2, "byte 0xc3 is not UTF-8"),
    ("a.csv", b"a,b\n1,2\n3\n", 3, "has 1 fields, but the header has 2"),
    ("a.csv", b"a,a\n1,2\n", 1, "the header names a column twice"),
    ("a.csv", b'a,b\n1,2\n"3,4\n', 3, "is not valid CSV: "),
    ("a.csv", b"a,b\n1,\xff\n", 2, "byte 0xff at column 3 is not UTF-8"),
    ("a.txt", b"ok\n\xe9\n", 2, "byte 0xe9 is not UTF-8"),
]


@pytest.mark.parametrize("name, data, line, reason", BAD)
def test_bad_files_are_named_by_line(tmp_path, name, data, line, reason):
    path = write(tmp_path / name, data)
    with pytest.raises(DataError, match=reason) as caught:
        values(path)
    assert str(caught.value).startswith(f"{path}:{line}: ") and "\n" not in str(caught.value)


def test_records_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 1 << 20)
    with pytest.raises(DataError, match=r"a.jsonl:2: the line has more than 1 MiB"):
        values(write(tmp_path / "a.jsonl", OK + b'"' + b"x" * (1 << 20) + b'"\n'))
    with pytest.raises(DataError, match=r"a.txt: is one document of more than 1 MiB"):
        values(write(tmp_path / "a.txt", "x" * (2 << 20)))


# ------------------------------------------------------------------------------------------------------------------ files


def found(path, root: Path, **keys) -> list[str]:
    return [file.relative_to(root).as_posix() for file in find_files(SourceConfig(str(path), "completion", **keys))]


def test_files_folders_and_globs(tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.txt", "sub/c.json", "sub/deep/d.csv", ".hidden/e.txt", "sub/.f.txt", "README.md"):
        write(tmp_path / name, "x")
    assert found(tmp_path / "b.jsonl", tmp_path) == ["b.jsonl"]
    assert found(tmp_path, tmp_path) == ["a.txt", "b.jsonl", "sub/c.json", "sub/deep/d.csv"]
    assert found(tmp_path / "*.jsonl", tmp_path) == ["b.jsonl"]
    assert found(tmp_path / "**/*.[jc]s*", tmp_path) == ["b.jsonl", "sub/c.json", "sub/deep/d.csv"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found("~/a.txt", tmp_path) == ["a.txt"]


def test_links_stay_in_their_folder(tmp_path, monkeypatch):
    outside = write(tmp_path / "outside" / "x.txt", "secret")
    folder = write(tmp_path / "data" / "sub" / "a.txt", "x").parent.parent
    (folder / "b.txt").symlink_to("sub/a.txt")
    (tmp_path / "link").symlink_to(folder)  # the folder itself may be one
    for path in (folder, tmp_path / "link", folder / "**/*.txt"):
        assert len(find_files(SourceConfig(str(path), "completion"))) == 2
    (folder / "c.txt").symlink_to(outside)
    (folder / "away").symlink_to(outside.parent)
    monkeypatch.chdir(tmp_path)
    for path in ("data", "link", str(folder), "data/*.txt", f"{folder}/**/*.txt", "data/a*/x.txt"):
        with pytest.raises(DataError, match=r"(c|x).txt: is a link to .*outside/x.txt, outside its folder"):
            find_files(SourceConfig(path, "completion"))
    assert found(folder / "c.txt", folder) == ["c.txt"]  # the user's own word


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    for suffix in (".txt", ".jsonl", ".json", ".csv"):
        path = tmp_path / suffix[1:] / f"a{suffix}"
        path.parent.mkdir()
        os.mkfifo(path)
        for name in (path.parent, f"{path.parent}/*"):
            with pytest.raises(DataError, match=rf"a{suffix}: is no regular file"):
                find_files(SourceConfig(str(name), "completion"))
        assert found(path, tmp_path) == [f"{suffix[1:]}/a{suffix}"]
        with pytest.raises(DataError, match=rf"a{suffix}: cannot be read: it is no regular file"):
            values(path)


@pytest.mark.parametrize(
    "path, reason",
    [
        ("none.jsonl", "there is no such file or folder"),
        ("sub/none.jsonl", "there is no such file or folder"),
        ("*.nothing", "no file matches"),
        ("sub", "the folder has no .jsonl, .json, .csv, .txt, .parquet file"),
        ("a.md", "cannot be read: its name must end in .jsonl, .json, .csv, .txt, .parquet"),
    ],
)
def test_nothing_to_read(tmp_path, monkeypatch, path, reason):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "sub/README.md", "x")
    write(tmp_path / "a.md", "x")
    with pytest.raises(DataError) as caught:
        found(path, tmp_path)
    assert str(caught.value) == f"{path}: {reason}"


def test_split_is_for_the_hub(tmp_path):
    write(tmp_path / "a.txt", "x")
    with pytest.raises(ConfigError, match=r"split='train' is only for datasets on the hub, and .*a.txt is not one"):
        found(tmp_path / "a.txt", tmp_path, split="train")


# -------------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub cache with one dataset, as a download leaves it, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "datasets--org--talk"
    write(repo / "refs/main", "a" * 40)
    write(repo / "refs/v2", "b" * 40)
    for name in ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl", "README.md"):
        write(repo / "snapshots" / ("a" * 40) / name, OK)
    write(repo / "snapshots" / ("b" * 40) / "everything.jsonl", OK)
    return repo / "snapshots"


def test_hub_datasets(hub, monkeypatch):
    monkeypatch.chdir(hub)
    a, b = hub / ("a" * 40), hub / ("b" * 40)
    assert found("org/talk", a) == ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]
    assert found("org/talk", a, split="test") == ["data/test-00000-of-00001.jsonl"]
    assert found("org/talk", b, revision="v2") == ["everything.jsonl"]
    with pytest.raises(DataError, match=r"^org/talk: no file of split 'validation' among data/test-0.*jsonl, data/train-0"):
        found("org/talk", a, split="validation")
    with pytest.raises(DataError, match=r"^org/talk: no file of split 'test' among everything.jsonl$"):
        found("org/talk", b, revision="v2", split="test")


def test_hub_out_of_reach(hub, monkeypatch):
    monkeypatch.chdir(hub)
    with pytest.raises(DataError, match=r"^org/none: is no local file, and cannot be had from the hub: ") as caught:
        found("org/none", hub)
    assert "\n" not in str(caught.value)
