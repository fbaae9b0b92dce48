"""Strings that remember where their characters came from, whatever a chat template does with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from jinja2.sandbox import SecurityError

MAX_OUTPUT = 16 << 20  # characters that a template may write
MAX_RUNS = 1 << 18  # pieces from messages in one text


class Text(str):
    """A string and where its characters came from: `runs` of (begin, end, source), in order of creation.

    What cannot be followed becomes a plain string, which has no source: then less is known, never something wrong.
    """

    __slots__ = ("runs",)
    runs: tuple[tuple[int, int, int], ...]

    def __new__(cls, text: str, runs: tuple[tuple[int, int, int], ...]):
        self = str.__new__(cls, text)
        self.runs = runs
        return self

    def __str__(self):
        return self

    def __add__(self, other):
        if not isinstance(other, str):
            return NotImplemented
        if type(other) is not Text:
            return Text(str.__add__(self, other), self.runs)
        if len(self.runs) + len(other.runs) > MAX_RUNS:
            raise SecurityError(f"a text has more than {MAX_RUNS} pieces")
        return Text(str.__add__(self, other), self.runs + _moved(other, len(self)))

    def __radd__(self, other):
        return Text(str.__add__(other, self), _moved(self, len(other))) if isinstance(other, str) else NotImplemented

    def __getitem__(self, key):
        if isinstance(key, slice) and key.step in (None, 1):
            begin, end, _ = key.indices(len(self))
            return self._cut(begin, max(begin, end))
        return self._whole(str.__getitem__(self, key))

    def lstrip(self, chars=None):
        return self._cut(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars=None):
        return self._cut(0, len(str.rstrip(self, chars)))

    def strip(self, chars=None):
        return self.rstrip(chars).lstrip(chars)

    def _cut(self, begin: int, end: int) -> Text:
        clipped = ((max(b, begin) - begin, min(e, end) - begin, s) for b, e, s in self.runs)
        # A run may become empty where it is all there is: an empty message still has a place.
        runs = tuple(run for run in clipped if run[0] < run[1] or (run[0] == run[1] and len(self.runs) == 1))
        return Text(str.__getitem__(self, slice(begin, end)), runs)

    def _whole(self, value):
        """`value`, made of this text: of its source too, if it has exactly one."""
        one = len(self.runs) == 1 and self.runs[0][:2] == (0, len(self))
        return mark(value, self.runs[0][2]) if one else value


def _moved(text: str, by: int) -> tuple[tuple[int, int, int], ...]:
    """The runs of a text, if it has any, for a place that is `by` characters further on."""
    return tuple([(begin + by, end + by, source) for begin, end, source in text.runs]) if type(text) is Text else ()


def _follow(name: str):
    method = getattr(str, name)

    def call(self, *args, **kwargs):
        return self._whole(method(self, *args, **kwargs))

    call.__name__ = name  # by which the sandbox knows it
    return call


_SPLITTING = ("split", "rsplit", "splitlines", "partition", "rpartition")
_CHANGING = ("replace", "removeprefix", "removesuffix", "lower", "upper", "capitalize", "title", "casefold", "swapcase")
for _name in _SPLITTING + _CHANGING:
    setattr(Text, _name, _follow(_name))


def mark(value, source: int):
    """`value` with every string in it (but keys of objects) as Text from `source`."""
    if isinstance(value, str):
        return Text(value, ((0, len(value), source),))
    if isinstance(value, dict):
        return {key: mark(item, source) for key, item in value.items()}
    return type(value)(mark(item, source) for item in value) if isinstance(value, (list, tuple)) else value


def join(pieces: Iterable[str]) -> str:
    """`"".join` that keeps the sources, and the bound on what a template may write."""
    pieces = list(pieces)
    runs: list[tuple[int, int, int]] = []
    at = 0
    for piece in pieces:
        if type(piece) is Text:
            for begin, end, source in piece.runs:
                runs.append((begin + at, end + at, source))
        at += len(piece)
    if len(runs) > MAX_RUNS:
        raise SecurityError(f"a text has more than {MAX_RUNS} pieces")
    if at > MAX_OUTPUT:
        raise SecurityError(f"more than {MAX_OUTPUT} characters were written")
    text = "".join(pieces)
    return Text(text, tuple(runs)) if runs else text


def sources_of(value) -> Iterator[int]:
    """Where the texts within `value` come from."""
    if isinstance(value, Text):
        yield from (source for _, _, source in value.runs)
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from sources_of(item)
