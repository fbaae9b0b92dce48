"""TOML as text: parsing with bounds and line numbers, and writing.

The standard parser (tomllib, or tomli before Python 3.11) gives values without positions. Since a text that parsed is
known to be well formed, a small second scan finds the line of every key, so that an error can say `file:line`.

A config is small and made by hand, so bounds are tight: `MAX_BYTES`, `MAX_NESTING`, integers in 64 bits, finite floats.
They are checked here, before any value is looked at, so that no later code meets a bomb.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import ConfigError, redact
from runtime.files import open_regular

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_BYTES = 1 << 20
MAX_NESTING = 64

Place = tuple[str | int, ...]  # a key as its parts, e.g. ("data", "sources", 0, "path")

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_POSITION = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")
# An unterminated string runs to the end of the text (or line): every character is looked at once, whatever the input.
_TOKEN = re.compile(
    r'''(?P<string>"""(?:\\.|[^\\])*?(?:"{3,5}|\Z)|\'\'\'.*?(?:\'{3,5}|\Z)|"(?:\\.|[^"\\\n])*"?|'[^'\n]*'?)'''
    r"""|(?P<word>[A-Za-z0-9_+:-]+)|(?P<mark>[][{}=,.\n])|(?P<comment>\#[^\n]*)""",
    re.DOTALL,
)


def read(path: Path) -> tuple[dict, dict[Place, int]]:
    """The values of a TOML file and the line of each key.

    Raises:
        ConfigError: the file is missing, too large, not UTF-8, not TOML, or out of bounds.
    """
    where = display(path)
    data = _bytes(path, where)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8", where=f"{where}:{line}") from None
    return parse(text, where)


def _bytes(path: Path, where: str) -> bytes:
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError("there is no such file", where=where) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ConfigError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=where) from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"is larger than {MAX_BYTES} bytes, which no config needs", where=where)
    return data


def parse(text: str, where: str) -> tuple[dict, dict[Place, int]]:
    """The values of a TOML text and the line of each key; `where` names the text in errors."""
    _check_nesting(text, where)
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(str(error), text, where) from None
    except ValueError:  # more digits than Python is willing to convert
        raise ConfigError("holds an integer outside 64 bits", where=where) from None
    lines = _Scanner(text).lines
    check_bounds(tree, lambda place: f"{where}:{lines[place]}" if place in lines else where)
    return tree, lines


def parse_value(text: str) -> object:
    """One TOML value, as on the right of `=`. Raises ValueError where `text` is not exactly that."""
    try:
        _check_nesting(text, "")
        tree = tomllib.loads(f"value = {text}")
    except ConfigError as error:
        raise ValueError(str(error)) from None
    if len(tree) != 1:
        raise ValueError("more than one value")
    return tree["value"]


def check_bounds(tree: object, where_is, root: Place = ()) -> None:
    """Refuses what no config needs and later code would choke on. `where_is(place)` names a key's origin.

    Walks with a list instead of recursion: the tree is not known to be shallow yet.
    """
    todo: list[tuple[Place, object]] = [(root, tree)]
    while todo:
        place, value = todo.pop()
        if len(place) > MAX_NESTING:
            raise ConfigError(f"is nested deeper than {MAX_NESTING} levels", dotted(place[:3]) + ". ...", where=where_is(place))
        if not isinstance(value, (dict, list)):
            if problem := _problem(value):
                raise ConfigError(problem, dotted(place), where=where_is(place))
            continue
        for part, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(item, (dict, list)) or _problem(item):
                todo.append(((*place, part), item))


def _problem(value: object) -> str | None:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "is an integer outside 64 bits"
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}; only finite numbers are accepted"
    if isinstance(value, str) and "\0" in value:
        return "contains a NUL character"
    return None


def literal(value: object) -> str:
    """`value` (bool, int, finite float, str, list or tuple or dict of these) as TOML, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's; beyond them, what cannot be seen is escaped as well
        return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(value, ensure_ascii=False))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key_text(k)} = {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(literal(item) for item in value) + "]"
    return repr(value)


def key_text(key: str | int) -> str:
    """One part of a key as TOML: bare if that is allowed, else quoted."""
    return str(key) if isinstance(key, int) or _BARE.fullmatch(key) else literal(key)


def dotted(place: Place) -> str:
    """A key for messages: `data.sources.0.path`; cut where someone's key is absurdly long."""
    text = ".".join(key_text(part) for part in place)
    return text if len(text) <= 120 else redact(text)[:117] + "..."


def display(path: Path) -> str:
    """The file's name for messages, which are one line of printable text."""
    return str(path) if str(path).isprintable() else ascii(str(path))


def dumps(tree: dict) -> str:
    """A TOML document: dicts become tables, non-empty lists of dicts arrays of tables, everything else `key = value`."""
    return "\n".join(_tables(tree, (), None)).lstrip("\n") + "\n"


def _tables(tree: dict, place: Place, header: str | None) -> Iterator[str]:
    if header is not None:
        yield f"\n{header}"
    nested = {key: value for key, value in tree.items() if isinstance(value, dict) or _is_tables(value)}
    for key, value in tree.items():
        if key not in nested:
            yield f"{key_text(key)} = {literal(value)}"
    for key, value in nested.items():
        below = (*place, key)
        name = ".".join(key_text(part) for part in below)
        if isinstance(value, dict):
            yield from _tables(value, below, f"[{name}]")
        else:
            for item in value:
                yield from _tables(item, below, f"[[{name}]]")


def _is_tables(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _syntax_error(message: str, text: str, where: str) -> ConfigError:
    """The parser's message with the position in front, where editors and people look for it."""
    found = _POSITION.search(message)
    if found:
        message = message[: found.start()]
        line = found[1] or str(text.rstrip("\n").count("\n") + 1)
        where += f":{line}:{found[2]}" if found[2] else f":{line}"
    hint = "; text needs quotes" if message == "Invalid value" else ""
    return ConfigError(f"is not valid TOML: {message[:1].lower()}{' '.join(message[1:].split())}{hint}", where=where)


def _check_nesting(text: str, where: str) -> None:
    """Bounds brackets and dotted keys before parsing: parsers recurse on the former and take quadratic time on the latter."""
    depth = dots = 0
    line = 1
    for token in _TOKEN.finditer(text):
        word = token[0]
        if token.lastgroup == "mark":
            depth += (word in "[{") - (word in "]}")
            dots += word == "."
            line += word == "\n"
            if word in "=,\n":
                dots = 0
            if depth > MAX_NESTING or dots > MAX_NESTING:
                raise ConfigError(f"is nested deeper than {MAX_NESTING} levels", where=f"{where}:{line}")
        else:
            line += word.count("\n")


class _Scanner:
    """The line of each key of a well-formed TOML text: `lines[("data", "sources", 0, "path")] == 12`."""

    def __init__(self, text: str):
        self.lines: dict[Place, int] = {}
        self._last: dict[Place, int] = {}  # index of the newest table of each array of tables
        self._words: list[str] = []
        self._marks: list[str] = []  # the word where it is punctuation, else ""; a quoted "[" is not a bracket
        self._at: list[int] = []
        line = 1
        for token in _TOKEN.finditer(text):
            word, kind = token[0], token.lastgroup
            if kind != "comment":
                self._words.append(word)
                self._marks.append(word if kind == "mark" else "")
                self._at.append(line)
            line += word.count("\n")
        # one empty word more, so that looking ahead never leaves the lists
        self._words.append("")
        self._marks.append("end")
        self._at.append(line)
        self._i = 0
        self._document()

    def _skip(self, marks: tuple[str, ...]) -> None:
        while self._marks[self._i] in marks:
            self._i += 1

    def _document(self) -> None:
        base: Place = ()
        while self._marks[self._i] != "end":
            if self._marks[self._i] == "\n":
                self._i += 1
            elif self._marks[self._i] == "[":
                base = self._header()
            else:
                self._pair(base)

    def _header(self) -> Place:
        """`[a.b]` or `[[a.b]]`; names inside an array of tables mean its newest element."""
        line = self._at[self._i]
        many = self._marks[self._i + 1] == "["
        self._skip(("[",))
        parts = self._key()
        self._skip(("]",))
        place: Place = ()
        for i, part in enumerate(parts):
            place = (*place, part)
            self.lines.setdefault(place, line)
            if many and i == len(parts) - 1:
                self._last[place] = self._last.get(place, -1) + 1
            if place in self._last:
                place = (*place, self._last[place])
                self.lines.setdefault(place, line)
        return place

    def _key(self) -> list[str]:
        parts = []
        while self._marks[self._i] in ("", "."):
            word = self._words[self._i]
            if word[0] in "\"'":
                parts.append(next(iter(tomllib.loads(f"{word} = 0"))))
            elif word != ".":
                parts.append(word)
            self._i += 1
        return parts

    def _pair(self, base: Place) -> None:
        line = self._at[self._i]
        place = base
        for part in self._key():
            place = (*place, part)
            self.lines.setdefault(place, line)
        self._i += 1  # the "="
        self._value(place)

    def _value(self, place: Place) -> None:
        opened = self._marks[self._i]
        if opened == "[":
            self._i += 1
            self._skip((",", "\n"))
            index = 0
            while self._marks[self._i] not in ("]", "end"):
                self.lines[(*place, index)] = self._at[self._i]
                self._value((*place, index))
                self._skip((",", "\n"))
                index += 1
            self._i += 1
        elif opened == "{":
            self._i += 1
            self._skip((",", "\n"))
            while self._marks[self._i] not in ("}", "end"):
                self._pair(place)
                self._skip((",", "\n"))
            self._i += 1
        else:  # one string, or the words and dots of a number or date
            while self._marks[self._i] not in (",", "]", "}", "\n", "end"):
                self._i += 1
