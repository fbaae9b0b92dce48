"""One file per format: how a record becomes a document. `build` makes the function for a source.

A format is a function of a record that returns a `Sample` (text and what is trained of it) or, where the data has ids
already, `Tokens`, and raises `BadRecord` for whatever is not exactly as documented. `key` is everything besides the
tokenizer that decides what it returns: it becomes part of the cache's key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from data.sample import BadRecord, Sample, Tokens
from runtime.errors import shown

if TYPE_CHECKING:
    from data.config import DataConfig, SourceConfig
    from data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Format:
    convert: Callable[[dict], Sample | Tokens]
    key: object  # JSON


def build(cfg: DataConfig, source: SourceConfig, tokenizer: Tokenizer) -> Format:
    """The format of `source`; the module has its name and a function `build`."""
    return import_module(f"data.formats.{source.format}").build(cfg, source, tokenizer)


def as_object(record: object) -> dict:
    if not isinstance(record, dict):
        raise BadRecord(f"expected an object, got {kind_of(record)}")
    return record


def get(record: dict, field: str, kind: type, required: bool = True, default=None):
    """`record[field]`, which has to be a `kind`. Absent or null: an error, or `default` if it is not required."""
    value = record.get(field)
    if value is None:
        if required:
            there = f"it has {', '.join(map(shown, list(record)[:8]))}" if record else "it has none"
            problem = f"field {field!r} is null" if field in record else f"has no field {field!r} ({there}); names can be set with fields"
            raise BadRecord(problem)
        return default
    if type(value) is not kind:
        raise BadRecord(f"field {field!r} must be {kind_of(kind())}, got {kind_of(value)}")
    return value


def kind_of(value: object) -> str:
    """What JSON calls it."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
