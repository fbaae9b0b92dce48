"""Pages generated from the config dataclasses: `--help`, docs/config.md, and a JSON schema for editors."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from runtime.schema import REQUIRED, Choice, Key, Section, section
from runtime.toml import literal

WIDTH = 120
INDEX = "N"  # stands for the index of an array's element

RULES = """\
A config is a TOML file. Keys are checked before anything else happens: one that is not listed here, has another type, or a value \
outside its limits is an error.

* A section that is absent leaves its keys at their defaults; one marked "off when absent" is a feature that an empty section turns on.
* `extends = "other.toml"` at the top takes another file's keys as defaults. The path is relative to the file that says it; tables \
merge, arrays and tables of another `kind` replace; the other file extends nothing itself.
* `--section.key=value` on the command line changes one key after the files are read. Values are TOML, the quotes of a plain string \
may be left out. Elements of arrays of tables have an index, `--data.sources.0.path=chat.jsonl`; the next free one appends. \
`none` removes an optional key or section: `--lora=none`.
* Relative paths are relative to the directory the command is run in, wherever the config lies."""


@dataclass(frozen=True)
class Row:
    place: tuple[str, ...]
    type: str
    default: str  # "" where the key is required
    doc: str


@dataclass(frozen=True)
class Table:
    title: str  # as in TOML: [lora], [[data.sources]]; "" at the root
    doc: str
    rows: list[Row]


def tables(cls: type) -> Iterator[Table]:
    """Every table a config can have, the root first, each with its keys in the order of their declaration."""
    root = section(cls)
    yield Table("", root.doc, [_row(key, ()) for key in root.keys.values() if key.type])
    yield from _below(root, ())


def _below(parent: Section, place: tuple[str, ...]) -> Iterator[Table]:
    for key in parent.keys.values():
        if not key.sections:
            continue
        name = ".".join(part for part in (*place, key.name) if part != INDEX)
        here = (*place, key.name, INDEX) if key.many else (*place, key.name)
        several = len(key.sections) > 1
        notes = [key.doc or ("" if several else key.sections[0].doc)]
        notes += [f"{tag}: {s.doc}" for tag, s in key.tags.items()] if several else []
        notes += ["Off when absent."] if key.optional else []
        rows = _union_rows(key, here) if several else [_row(k, here) for k in key.sections[0].keys.values() if k.type]
        yield Table(f"[[{name}]]" if key.many else f"[{name}]", " ".join(filter(None, notes)), rows)
        for s in key.sections:
            yield from _below(s, here)


def _union_rows(union: Key, place: tuple[str, ...]) -> list[Row]:
    """The keys of all kinds, those of one name together; a key that is not the same in every kind says where it holds."""
    kinds_of: dict[Row, list[str]] = {}
    for tag, s in union.tags.items():
        for key in s.keys.values():
            if key.type and key.name != "kind":
                kinds_of.setdefault(_row(key, place), []).append(tag)
    order = list(dict.fromkeys(row.place for row in kinds_of))
    rows = [Row((*place, "kind"), Choice(tuple(union.tags)).name, literal(union.default_kind), union.sections[0].keys["kind"].doc)]
    for row, tags in sorted(kinds_of.items(), key=lambda item: order.index(item[0].place)):
        only = "" if len(tags) == len(union.tags) else f"({', '.join(tags)}) "
        rows.append(Row(row.place, row.type, row.default, only + row.doc))
    return rows


def _row(key: Key, place: tuple[str, ...]) -> Row:
    default = "" if key.default is REQUIRED else "none" if key.default is None else literal(key.default)
    return Row((*place, key.name), key.type.name, default, key.doc)


def help_text(cls: type, prog: str = "train.py", about: str = "") -> str:
    """Every key with its type, default and one line, in columns, at most `WIDTH` wide."""
    groups = list(tables(cls))
    rows = [row for table in groups for row in table.rows]
    keys = max(len(_flag(row)) for row in rows) + 2
    types = min(max(len(_signature(row)) for row in rows), 32) + 2
    out = [f"usage: {prog} --config FILE.toml [--section.key=value ...]", ""]
    out += textwrap.wrap(about or section(cls).doc, WIDTH)
    out += ["", "  --config FILE.toml".ljust(keys + 4) + "The config. Every key below can be set there, or here to override it."]
    out += ["  --help".ljust(keys + 4) + "This list."]
    for table in groups:
        if table.title or table.rows:
            out += ["", *textwrap.wrap(f"{table.title}  {table.doc}" if table.title else "At the top of the file:", WIDTH)]
        for row in table.rows:
            left = f"  {_flag(row):<{keys}}{_signature(row):<{types}}"
            lines = textwrap.wrap(row.doc, WIDTH - keys - types - 2)
            if len(_signature(row)) > types - 2:  # a long type has the line for itself
                out += textwrap.wrap(left.strip(), WIDTH, initial_indent="  ", subsequent_indent=" " * (keys + 4), break_on_hyphens=False)
            else:
                out.append(left + lines.pop(0))
            out += [" " * (keys + types + 2) + line for line in lines]
    out += [""]
    for rule in RULES.split("\n* ")[1:]:
        out += textwrap.wrap(f"* {rule}", WIDTH, subsequent_indent="  ")
    return "\n".join(line.rstrip() for line in out) + "\n"


def _flag(row: Row) -> str:
    return "--" + ".".join(row.place)


def _signature(row: Row) -> str:
    text = f"{row.type} = {row.default}" if row.default else f"{row.type}, required"
    return text.replace('"', "") if '"' in row.type else text  # choices read better bare, and the command line takes them so


def markdown(cls: type) -> str:
    """docs/config.md: the rules, then one table of keys per section."""
    out = ["# Config reference", "", "<!-- Generated by `python -m tools.schema --markdown docs/config.md`; edit the dataclasses. -->", ""]
    out += [RULES, ""]
    for table in tables(cls):
        if table.title:
            out += [f"## `{table.title}`", "", table.doc, ""]
        if table.rows:
            out += ["| key | type | default | meaning |", "|---|---|---|---|"]
            out += [
                f"| `{row.place[-1]}` | {_cell(row.type)} | {_cell(row.default) or 'required'} | {_escape(row.doc)} |" for row in table.rows
            ]
            out += [""]
    return "\n".join(out)


def _cell(code: str) -> str:
    return f"`{_escape(code)}`" if code else ""


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def json_schema(cls: type) -> dict:
    """JSON schema (draft 7, which TOML editors read) of a config file."""
    schema = _table_schema(section(cls))
    schema["properties"] = {"extends": {"type": "string", "description": "Another config whose keys are defaults."}, **schema["properties"]}
    # what the other file may provide cannot be required of this one
    plain = {key: value for key, value in schema.items() if key != "required"}
    if "required" in schema:
        plain["anyOf"] = [{"required": ["extends"]}, {"required": schema["required"]}]
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": cls.__name__, **plain}


def _table_schema(table: Section, tag: str | None = None, tag_required: bool = False) -> dict:
    properties = {key.name: {"const": tag} if tag and key.name == "kind" else _key_schema(key) for key in table.keys.values()}
    required = [key.name for key in table.keys.values() if key.default is REQUIRED and (key.type or key.many or _needs(key))]
    required += ["kind"] if tag_required else []
    schema = {"type": "object", "description": table.doc, "properties": properties, "additionalProperties": False}
    return {**schema, "required": required} if required else schema


def _needs(key: Key) -> bool:
    """Whether a section cannot be left out, because it has required keys itself."""
    return not key.optional and any(
        k.default is REQUIRED and (k.type or k.many or _needs(k)) for s in key.sections for k in s.keys.values()
    )


def _key_schema(key: Key) -> dict:
    if key.type:
        schema = {**key.type.json, "description": key.doc}
        default = list(key.default) if isinstance(key.default, tuple) else key.default
        return schema if default is REQUIRED or default is None else {**schema, "default": default}
    if len(key.sections) == 1:
        schema = _table_schema(key.sections[0])
    else:
        schema = {"oneOf": [_table_schema(s, tag, tag != key.default_kind) for tag, s in key.tags.items()]}
    if key.many:
        schema = {"type": "array", "items": schema}
    return {**schema, "description": key.doc} if key.doc else schema
