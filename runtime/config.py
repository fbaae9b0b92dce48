"""Configs: TOML files and `--a.b=v` in, frozen dataclasses out; and back to text.

    cfg = load(RunConfig, "train_configs/x.toml", ["--optim.lr=1e-4"])

The order is: the file that `extends` names, the file, the overrides; then everything is checked against the dataclasses
(see runtime/schema.py for what they may hold) and built. Nothing is dropped or guessed: a key that does not exist, a value
of another type or a missing key is a ConfigError of one line with the place it comes from and what to write instead.
A value that holds a secret of the environment is refused as well, as configs are kept in every run and checkpoint.
`extends` is relative to its file; every other path in a config is left as written, so relative to the working directory.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from runtime import toml
from runtime.errors import ConfigError, redact
from runtime.reference import help_text, json_schema, markdown
from runtime.schema import REQUIRED, Choice, Dict, Key, Mismatch, Section, Type, any_of, section
from runtime.suggest import suggest
from runtime.toml import Place, dotted, literal

__all__ = ["diff", "flatten", "help_text", "json_schema", "load", "markdown", "parse_args", "to_toml", "to_tree"]

T = TypeVar("T")
COMMAND_LINE = "command line"


def parse_args(cls: type[T], argv: list[str], prog: str = "train.py", about: str = "") -> T:
    """The config that a command line asks for. `--help` prints every key and ends the process with 0.

    Raises:
        ConfigError: see `load`; also where `--config` is not there exactly once.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, prog, about), end="")
        raise SystemExit(0)
    files, overrides = [], []
    words = iter(argv)
    for word in words:
        if word == "--config":
            files.append(next(words, ""))
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        else:
            overrides.append(word)
    if len(files) != 1 or not files[0]:
        problem = "is given more than once" if len(files) > 1 else "is missing"
        raise ConfigError(f"--config {problem}; run {prog} --config FILE.toml [--section.key=value ...], or --help for all keys")
    for word, following in pairwise([*overrides, ""]):
        if not (word.startswith("--") and "=" in word):
            raise _wrong_form(section(cls), word, following)
    return load(cls, files[0], overrides)


def load(cls: type[T], path: str | Path, overrides: Iterable[str] = ()) -> T:
    """The config of a file, changed by overrides of the form `--a.b=v`.

    Raises:
        ConfigError: whatever the user can fix, in one line; see the module.
    """
    loader = _Loader(section(cls), Path(path))
    for override in overrides:
        loader.override(override)
    cfg = loader.build(loader.root, loader.tree, ())
    for place, value in _leaves(to_tree(cfg), ()):
        if redact(shown := repr(value)) != shown:
            problem = "holds a secret (a value of the environment, a password in a URL, or a hub token); keep it in the environment only"
            raise ConfigError(problem, dotted(place), where=loader.where(place))
    return cfg


def to_tree(cfg: object) -> dict:
    """A config as nested dicts, lists and scalars: what its TOML says. Keys that are None are absent."""
    tree = {key.name: _plain(getattr(cfg, key.field)) for key in section(type(cfg)).keys.values()}
    return {name: value for name, value in tree.items() if value is not None}


def _plain(value: object) -> object:
    if is_dataclass(value):
        return to_tree(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def to_toml(cfg: object) -> str:
    """The whole config as TOML, defaults included. `load` of it gives an equal config."""
    return toml.dumps(to_tree(cfg))


def flatten(cfg: object) -> dict[str, object]:
    """A config (or its tree, see `to_tree`) as {"data.sources.0.path": value}: JSON types only."""
    tree = cfg if isinstance(cfg, dict) else to_tree(cfg)
    return {".".join(toml.key_text(part) for part in place): value for place, value in _leaves(tree, ())}


def _leaves(tree: dict | list, place: Place) -> Iterator[tuple[Place, object]]:
    for part, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
            yield from _leaves(value, (*place, part))
        else:
            yield (*place, part), value


def diff(old: dict[str, object], new: dict[str, object]) -> list[tuple[str, object, object]]:
    """(key, old value, new value) where two flat configs differ; None where a side has no such key."""
    keys = dict.fromkeys([*new, *old])
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


class _Loader:
    """The tree of values of a config, and where each comes from."""

    def __init__(self, root: Section, path: Path):
        self.root, self.path = root, path
        self.tree, self.origin = _read(path)
        if "extends" in self.tree:
            self._extend(self.tree.pop("extends"))

    def where(self, place: Place) -> str:
        """`file:line` of a key, or of the innermost table around it that is written down."""
        for length in range(len(place), 0, -1):
            if place[:length] in self.origin:
                return self.origin[place[:length]]
        return toml.display(self.path)

    def _extend(self, name: object) -> None:
        where = self.where(("extends",))
        if not isinstance(name, str):
            raise ConfigError('must be the path of a config, e.g. extends = "base.toml"', "extends", name, where)
        try:
            parent, origin = _read(self.path.parent / name)
        except ConfigError as error:
            raise ConfigError(f"cannot be used: {error}", "extends", name, where) from None
        if "extends" in parent:
            raise ConfigError(f"itself extends a config ({origin['extends',]}); only one parent is allowed", "extends", name, where)
        self._merge(parent, origin, self.tree, (), (self.root,))
        self.tree, self.origin = parent, origin | self.origin

    def _merge(self, parent: dict, origin: dict[Place, str], child: dict, place: Place, sections: tuple[Section, ...]) -> None:
        """Puts `child` over `parent`, in place: tables merge unless they are of different kinds; everything else replaces."""
        for name, value in child.items():
            old, here = parent.get(name), (*place, name)
            keys = [s.keys[name] for s in sections if name in s.keys]
            mergeable = isinstance(value, dict) and isinstance(old, dict)
            if mergeable and any(len(key.sections) > 1 for key in keys) and "kind" in value and "kind" in old:
                mergeable = value["kind"] == old["kind"]
            if mergeable:
                self._merge(old, origin, value, here, tuple(s for key in keys for s in key.sections))
            else:
                parent[name] = value
                _forget(origin, here)

    def override(self, text: str) -> None:
        """Applies one `--a.b=v`. Tables on the way are made where they are missing."""
        name, equals, raw = text.partition("=")
        if not (name.startswith("--") and equals):
            raise _wrong_form(self.root, text, "")
        place, types, optional = _resolve(self.root, name[2:])
        if raw == "none" and optional:
            return self._remove(place)
        value = _value(place, raw, types)
        node: dict | list = self.tree
        for length in range(1, len(place)):
            node = self._child(node, place[:length], [] if isinstance(place[length], int) else {})
        self._child(node, place, value)
        node[place[-1]] = value
        _forget(self.origin, place)
        self.origin[place] = COMMAND_LINE

    def _child(self, node: dict | list, place: Place, new: object) -> object:
        """What `node` holds at the last part of `place`; if nothing, `new` is put there."""
        shape = list if isinstance(place[-1], int) else dict
        if not isinstance(node, shape):
            problem = f"must be {'an array of tables' if shape is list else 'a table'}"
            raise ConfigError(problem, dotted(place[:-1]), node, self.where(place[:-1]))
        if shape is list and place[-1] > len(node):
            raise ConfigError(f"no such element; the next free index is {len(node)}", f"--{dotted(place)}", where=COMMAND_LINE)
        if place[-1] == len(node) if shape is list else place[-1] not in node:
            self.origin[place] = COMMAND_LINE
            node.append(new) if shape is list else node.update({place[-1]: new})
        return node[place[-1]]

    def _remove(self, place: Place) -> None:
        node: object = self.tree
        for part in place[:-1]:
            try:
                node = node[part]
            except (LookupError, TypeError):  # absent already, or no table: `build` says so
                return
        if isinstance(node, dict):
            node.pop(place[-1], None)
            _forget(self.origin, place)

    def build(self, table: Section, tree: dict, place: Place, union: Key | None = None) -> object:
        """The dataclass of one table, from values that are checked here."""
        for name in tree:
            if name not in table.keys:
                raise self._unknown((*place, name), table, union, tree)
        values = {}
        for key in table.keys.values():
            here = (*place, key.name)
            if key.name in tree:
                values[key.field] = self._read(key, tree[key.name], here)
            elif key.sections and not key.many and not key.optional:
                values[key.field] = self._section(key, {}, here)
            elif key.default is REQUIRED:
                raise self._missing(key, here)
        try:
            return table.cls(**values)
        except ConfigError as error:
            inner = tuple(int(part) if part.isdecimal() else part for part in (error.key or "").split(".") if part)
            raise (error.under(dotted(place)) if place else error).at(self.where(place + inner)) from None

    def _read(self, key: Key, value: object, place: Place) -> object:
        if key.type:
            try:
                return key.type.read(value)
            except Mismatch as error:
                raise self._mismatch(error, place, key.default) from None
        if not key.many:
            return self._section(key, value, place)
        if not isinstance(value, list):
            raise ConfigError(f"is an array of tables: write [[{dotted(place)}]]", dotted(place), where=self.where(place))
        return tuple(self._section(key, item, (*place, i)) for i, item in enumerate(value))

    def _section(self, key: Key, value: object, place: Place) -> object:
        if not isinstance(value, dict):
            header = f"[[{dotted(place[:-1])}]]" if key.many else f"[{dotted(place)}]"
            raise ConfigError(f"is a table: write {header} and its keys below", dotted(place), where=self.where(place))
        if len(key.sections) == 1:
            return self.build(key.sections[0], value, place)
        kind = value.get("kind", key.default_kind)
        if not (isinstance(kind, str) and kind in key.tags):
            raise self._mismatch(Mismatch(Choice(tuple(key.tags)), kind), (*place, "kind"), REQUIRED)
        return self.build(key.tags[kind], value, place, key)

    def _mismatch(self, error: Mismatch, place: Place, default: object) -> ConfigError:
        """A value of the wrong type: what is expected, and a line to write instead, close to what was meant."""
        place, value, expected = place + error.place, error.value, error.expected
        where = self.where(place)
        usual = expected.example if error.place or default is REQUIRED or default is None else default
        meant = _repaired(value, expected)
        hint = f"write {_form(place, meant, where)}" if meant is not None else f"e.g. {_form(place, usual, where)}"
        if isinstance(expected, Choice) and isinstance(value, str):
            close = difflib.get_close_matches(value, [v for v in expected.values if isinstance(v, str)], 1)
            hint = f"did you mean {literal(close[0])}?" if close else ""
        message = f"must be {expected.expected}" + (f"; {hint}" if hint else "")
        return ConfigError(message, dotted(place), value, where)

    def _missing(self, key: Key, place: Place) -> ConfigError:
        where = self.where(place)
        if key.many:
            return ConfigError(f"missing; add at least one [[{dotted(place)}]]", dotted(place), where=where)
        example = _form(place, key.type.example, where)
        if len(place) > 1 and where != COMMAND_LINE:
            example += f" under [[{dotted(place[:-2])}]]" if isinstance(place[-2], int) else f" under [{dotted(place[:-1])}]"
        return ConfigError(f"missing ({key.doc.rstrip('.')}); write {example}", dotted(place), where=where)

    def _unknown(self, place: Place, table: Section, union: Key | None, tree: dict) -> ConfigError:
        kinds = [literal(tag) for tag, other in union.tags.items() if place[-1] in other.keys] if union else []
        if not kinds:
            return _unknown(self.root, place, table.keys, self.where(place))
        kind = tree.get("kind", union.default_kind)
        problem = f"is not a key of kind = {literal(kind)}, but of {any_of(kinds)}"
        return ConfigError(problem, dotted(place), where=self.where(place))


def _read(path: Path) -> tuple[dict, dict[Place, str]]:
    """The values of a file and the `file:line` of each."""
    tree, lines = toml.read(path)
    return tree, {place: f"{toml.display(path)}:{line}" for place, line in lines.items()}


def _forget(origin: dict[Place, str], place: Place) -> None:
    """Drops the origins of a value that is replaced."""
    for key in [key for key in origin if key[: len(place)] == place]:
        del origin[key]


def _resolve(root: Section, name: str) -> tuple[Place, list[Type], bool]:
    """The place that the command line's `a.b.0.c` means, the types a value there may have, and whether it may be absent.

    A table has no types. Where sections are told apart by `kind`, the keys of every kind are accepted: another override
    may still change the kind.
    """
    parts = [int(part) if re.fullmatch("[0-9]{1,6}", part) else part for part in name.split(".")]
    sections: tuple[Section, ...] = (root,)
    i = 0
    while True:
        keys = [s.keys[parts[i]] for s in sections if parts[i] in s.keys]
        i += 1
        here = tuple(parts[:i])
        if not keys:
            raise _unknown(root, tuple(parts), [key for s in sections for key in s.keys], COMMAND_LINE, i)
        types = [key.type for key in keys if key.type]
        sections = tuple(s for key in keys for s in key.sections)
        if i == len(parts):
            return here, types, keys[0].optional
        if keys[0].many:
            if not isinstance(parts[i], int):
                problem = f"elements have an index: --{dotted((*here, 0, *parts[i:]))}"
                raise ConfigError(problem, f"--{name}", where=COMMAND_LINE)
            i += 1
            if i == len(parts):
                return tuple(parts), [], False
        elif isinstance(keys[0].type, Dict) and i == len(parts) - 1:
            return (*here, str(parts[i])), [keys[0].type.item], False
        elif not sections:
            raise ConfigError(
                f"{dotted(here)} has no keys of its own; give its whole value", f"--{dotted(tuple(parts))}", where=COMMAND_LINE
            )


def _value(place: Place, raw: str, types: list[Type]) -> object:
    """The value of an override: TOML, or the bare text where the key takes a string and TOML would not fit."""
    try:
        raw.encode()
        value = toml.parse_value(raw)
    except UnicodeEncodeError:
        raise ConfigError("is not UTF-8", f"--{dotted(place)}", where=COMMAND_LINE) from None
    except ValueError:
        name = dotted(place)
        if not types and raw[:1] not in ("[", "{", '"', "'"):
            problem = f"is not its value: {name} is a section, set keys in it: --{name}.key=value"
            raise ConfigError(problem, f"--{name}", raw, COMMAND_LINE) from None
        if raw[:1] in ("[", "{", '"', "'"):
            hint = "shells take quotes and brackets for themselves: put the whole override in single quotes"
            raise ConfigError(f"is not valid TOML; {hint}", f"--{dotted(place)}", raw, COMMAND_LINE) from None
        value = raw
    # a path like 2024 or a branch like true is text; an array with a wrong item is a mistake
    if not isinstance(value, (list, dict)) and not _fits_any(types, value) and _fits_any(types, raw):
        value = raw
    toml.check_bounds(value, lambda _: COMMAND_LINE, place)
    return value


def _fits(kind: Type, value: object) -> bool:
    try:
        kind.read(value)
    except Mismatch:
        return False
    return True


def _fits_any(types: list[Type], value: object) -> bool:
    return any(_fits(kind, value) for kind in types)


def _repaired(value: object, expected: Type) -> object:
    """What someone who wrote `value` most likely meant, as a value of the expected type; None where that is anyone's guess."""
    guesses: list[object] = [[value]]
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            guesses.append(toml.parse_value(value.lower() if value.lower() in ("true", "false") else value))  # "16" for 16
    elif isinstance(value, float) and value.is_integer():
        guesses.append(int(value))  # 1e3 for 1000
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        guesses.append(str(value))
    return next((guess for guess in guesses if _fits(expected, guess)), None)


def _form(place: Place, value: object, where: str) -> str:
    """How to write `value` at `place`, in the file or on the command line."""
    if isinstance(place[-1], int):
        return literal(value)
    if where != COMMAND_LINE:
        return f"{toml.key_text(place[-1])} = {literal(value)}"
    return shlex.quote(f"--{dotted(place)}={value if isinstance(value, str) else literal(value)}")


def _wrong_form(root: Section, word: str, following: str) -> ConfigError:
    """An argument that is not `--a.b=v`."""
    name, equals, value = word.lstrip("-").partition("=")
    if not word.startswith("-") and not equals:
        return ConfigError(f"{word!r} is not an option; overrides look like --section.key=value", where=COMMAND_LINE)
    _resolve(root, name)
    value = value if equals else "VALUE" if following.startswith("--") or not following else following
    return ConfigError(f"write {shlex.quote(f'--{name}={value}')}, with two dashes and '='", word, where=COMMAND_LINE)


def _unknown(root: Section, place: Place, legal: Iterable[str], where: str, length: int | None = None) -> ConfigError:
    """A key that does not exist: `place`, or its first `length` parts. Says what was meant, else what there is."""
    flag = "--" if where == COMMAND_LINE else ""
    close = [flag + dotted(guess) for guess in suggest(root, place)[:3]]
    table = dotted(place[: (length or len(place)) - 1])
    names = ", ".join(legal)
    there = f"{f'[{table}]' if table else 'the top level'} has {names if len(names) <= 160 else names[:157] + '...'}"
    return ConfigError(f"no such key; {f'did you mean {any_of(close)}?' if close else there}", flag + dotted(place), where=where)
