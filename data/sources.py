"""Files of a source, and the records in them, one at a time.

A record is any JSON value with the line it begins on (the row, in parquet); whether it has the fields its format needs is
checked where it is used. Reading is strict: what is not exactly right is a DataError with file, line and reason. Nothing is
guessed, and nothing is skipped unless the caller says so, because a data set that is silently half read trains a model that is
silently half right. What can be skipped is a line of .jsonl and a row of .csv with another number of fields; behind a fault in
the structure of a file there is no telling where the next record begins.

    .jsonl     one JSON value per line; blank lines are allowed. Streamed.
    .json      an array of records, which is held in memory as text, or lines as in .jsonl, which are streamed.
    .csv       a header, then rows; every field is text. Streamed.
    .txt       one document: the whole file, as {"text": ...}.
    .parquet   rows; needs pyarrow. Streamed by row group.

Text is UTF-8; a byte order mark at the beginning of a file is dropped. A record may have `MAX_RECORD_BYTES`, and lists and objects
in it `MAX_DEPTH` levels.
"""

from __future__ import annotations

import csv
import glob
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from data.config import SourceConfig
from runtime.errors import ConfigError, DataError, shown
from runtime.files import inside, open_regular
from runtime.hub import NotHad, snapshot

MAX_RECORD_BYTES = 64 << 20
MAX_DEPTH = 64
_BOM = b"\xef\xbb\xbf"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SPLITS = ("train", "validation", "valid", "val", "dev", "test")


class Record(NamedTuple):
    line: int  # where it begins, from 1
    value: object
    size: int  # bytes of the file it took, for progress


# ---------------------------------------------------------------------------------------------------------------- files


def find_files(source: SourceConfig) -> list[Path]:
    """The files of a source, sorted by name, so that the order of documents is the same on every machine.

    Raises:
        DataError: nothing is there, or nothing that can be read.
        ConfigError: `split` or `revision` for something that is not on the hub.
    """
    path = os.path.expanduser(source.path)
    is_local = os.path.exists(path)
    if not is_local and not glob.has_magic(path) and _HUB_ID.fullmatch(path) and Path(path).suffix not in READERS:
        return _hub_files(source)
    for key in ("split", "revision"):
        if getattr(source, key) is not None:
            raise ConfigError(f"is only for datasets on the hub, and {source.path} is not one", key, getattr(source, key))
    if is_local:
        found = _in_folder(Path(path)) if os.path.isdir(path) else [Path(path)]
    else:
        found = [Path(name) for name in glob.glob(path, recursive=True) if not os.path.isdir(name)]
        fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(path).parts))
        if glob.has_magic(path):
            found = [file for file in found if file.suffix not in READERS or inside(file, fixed, DataError)]
        if not found:
            problem = "no file matches" if glob.has_magic(path) else "there is no such file or folder"
            raise DataError(problem, source.path)
    for file in found:
        if file.suffix not in READERS:
            raise DataError(f"cannot be read: its name must end in {', '.join(READERS)}", file)
    return sorted(found, key=lambda file: file.as_posix())


def _in_folder(folder: Path) -> list[Path]:
    """Every readable file below `folder`, hidden ones left out.

    Raises:
        DataError: there is none, or one that is no regular file or a link out of the folder: what it leads to is not this data.
    """
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in names if not name.startswith(".") and Path(name).suffix in READERS]
    for file in found:
        inside(file, folder, DataError)
    if not found:
        raise DataError(f"the folder has no {', '.join(READERS)} file", folder)
    return found


def _hub_files(source: SourceConfig) -> list[Path]:
    """Downloads the data files of a hub dataset (or finds them in the hub's cache) and picks those of the split."""
    try:
        patterns = [f"*{suffix}" for suffix in READERS]
        folder = snapshot(source.path, repo_type="dataset", revision=source.revision, allow_patterns=patterns)
    except NotHad as error:
        raise DataError(f"is no local file, and cannot be had from the hub: {error}", source.path) from None
    found = _in_folder(folder)
    names = {file: file.relative_to(folder).as_posix() for file in found}
    split = source.split or "train"
    chosen = [file for file in found if split in _words(names[file])]
    if not chosen and not any(_words(name) & set(_SPLITS) for name in names.values()) and split == "train":
        chosen = found  # files that name no split at all
    if not chosen:
        listed = ", ".join(sorted(names.values())[:8]) + (", ..." if len(names) > 8 else "")
        raise DataError(f"no file of split {split!r} among {listed}", source.path)
    return sorted(chosen, key=lambda file: names[file])


def _words(name: str) -> set[str]:
    return set(re.split(r"[^A-Za-z0-9]+", name))


# -------------------------------------------------------------------------------------------------------------- records


Bad = Callable[[DataError], None]


def refuse(error: DataError) -> None:
    raise error from None


def read_records(path: Path, bad: Bad = refuse) -> Iterator[Record]:
    """The records of one file, in order. `bad` is told of each that is wrong, and may return to leave it out."""
    try:
        yield from READERS[path.suffix](path, bad)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", path) from None


def _read_lines(path: Path, bad: Bad) -> Iterator[Record]:
    for number, line in _lines(path):
        if line.strip():
            try:
                value = _parse(_decode(line, path, number), path, number)
            except DataError as error:
                bad(error)
                continue
            yield Record(number, value, len(line))


def _read_json(path: Path, bad: Bad) -> Iterator[Record]:
    with open_regular(path) as file:
        head = file.read(4096).removeprefix(_BOM).lstrip()
    if not head.startswith(b"["):
        yield from _read_lines(path, bad)
        return
    text = _decode_file(path.read_bytes(), path)
    at = _skip_space(text, text.index("[") + 1)
    line, seen = 1, 0
    follows = "]" if text[at : at + 1] == "]" else ","  # what follows the record before this one
    while follows == ",":
        line, seen = line + text.count("\n", seen, at), at
        value, end = _parse_at(text, at, path, line)
        yield Record(line, value, end - at)
        at = _skip_space(text, end)
        follows = text[at : at + 1]
        if follows == ",":
            at = _skip_space(text, at + 1)
    line += text.count("\n", seen, at)
    if follows != "]":
        raise DataError("is not valid JSON: expected a comma or the closing bracket of the array", path, line)
    if text[at + 1 :].strip():
        raise DataError("is not valid JSON: there is text after the array", path, line)


def _read_csv(path: Path, bad: Bad) -> Iterator[Record]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    rows = csv.reader((_decode(line, path, number) for number, line in _lines(path)), strict=True)
    header: list[str] | None = None
    begin = 1
    try:
        for row in rows:
            if header is None:
                header = row
                if len(set(row)) < len(row) or "" in row:
                    raise DataError("the header names a column twice or not at all", path, 1)
            elif row and len(row) != len(header):
                bad(DataError(f"has {len(row)} fields, but the header has {len(header)}", path, begin))
            elif row:
                yield Record(begin, dict(zip(header, row)), sum(map(len, row)))
            begin = rows.line_num + 1
    except csv.Error as error:
        raise DataError(f"is not valid CSV: {error}", path, begin) from None


def _read_text(path: Path, bad: Bad) -> Iterator[Record]:
    with open_regular(path) as file:
        data = file.read(MAX_RECORD_BYTES + 1)
    if len(data) > MAX_RECORD_BYTES:
        raise DataError(f"is one document of more than {MAX_RECORD_BYTES >> 20} MiB; put documents into the lines of a .jsonl file", path)
    yield Record(1, {"text": _decode_file(data, path)}, len(data))


def _read_parquet(path: Path, bad: Bad) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError("needs pyarrow to be read; install it: pip install 'pyarrow>=17'", path) from None
    try:
        with parquet.ParquetFile(path) as file:
            each = path.stat().st_size // max(1, file.metadata.num_rows)
            row = 0
            for batch in file.iter_batches(batch_size=512):
                for value in batch.to_pylist():
                    row += 1
                    yield Record(row, _without_nulls(value), each)
    except ArrowException as error:
        raise DataError(f"is not valid parquet: {' '.join(str(error).split())}", path) from None


def _without_nulls(value: object) -> object:
    """Drops the null members of structs: a column gives every row every member, so null is how a row says "absent"."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


READERS = {".jsonl": _read_lines, ".json": _read_json, ".csv": _read_csv, ".txt": _read_text, ".parquet": _read_parquet}


# ---------------------------------------------------------------------------------------------------- text and JSON, strict


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with open_regular(path) as file:
        number = 0
        while line := file.readline(MAX_RECORD_BYTES + 1):
            number += 1
            if len(line) > MAX_RECORD_BYTES:
                raise DataError(f"the line has more than {MAX_RECORD_BYTES >> 20} MiB", path, number)
            yield number, line.removeprefix(_BOM) if number == 1 else line


def _decode(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"byte 0x{line[error.start]:02x} at column {error.start + 1} is not UTF-8; convert the file", path, number
        ) from None


def _decode_file(data: bytes, path: Path) -> str:
    data = data.removeprefix(_BOM)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"byte 0x{data[error.start]:02x} is not UTF-8; convert the file", path, line) from None


def _once(pairs: list[tuple[str, object]]) -> dict:
    """An object whose keys are all different: JSON leaves open which of two equal ones counts."""
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {shown(twice)} appears twice in an object")
    return value


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


_JSON = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)
_SPACE = re.compile(r"[ \t\n\r]*")


def _skip_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()


def not_too_deep(value: object, brackets: int = MAX_DEPTH + 1) -> object:
    """`value`, parsed from text with so many opening brackets. Raises RecursionError: what works on it is recursive, and so is what
    templates do."""
    level, depth = [value] if brackets > MAX_DEPTH else [], 0
    while level := [item for item in level if isinstance(item, (list, dict))]:
        depth += 1
        if depth > MAX_DEPTH:
            raise RecursionError
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return value


def _parse(line: str, path: Path, number: int) -> object:
    try:
        return not_too_deep(_JSON.decode(line), line.count("[") + line.count("{"))
    except (ValueError, RecursionError) as error:
        raise _json_error(error, path, number) from None


def _parse_at(text: str, at: int, path: Path, number: int) -> tuple[object, int]:
    try:
        value, end = _JSON.raw_decode(text, at)
        return not_too_deep(value, text.count("[", at, end) + text.count("{", at, end)), end
    except json.JSONDecodeError as error:
        raise _json_error(error, path, error.lineno) from None
    except (ValueError, RecursionError, StopIteration) as error:
        raise _json_error(error, path, number) from None


def _json_error(error: Exception, path: Path, number: int) -> DataError:
    if isinstance(error, RecursionError):
        return DataError(f"is nested too deeply; {MAX_DEPTH} levels are the most", path, number)
    elif isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg[:1].lower()}{error.msg[1:]} (column {error.colno})"
    else:
        reason = str(error)
    return DataError(f"is not valid JSON: {reason}", path, number)
