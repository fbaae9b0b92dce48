"""What someone meant who typed a key that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from functools import lru_cache

from runtime.schema import Key, Section
from runtime.toml import Place

CLOSE = 0.6  # difflib's ratio from which a key counts as similar
ELSEWHERE = 0.15  # what a key of another table has to be more similar


def suggest(root: Section, place: Place) -> list[Place]:
    """Legal keys that `place` may have been meant as, best first; empty where it is legal or nothing is close.

    In order: a key of the same table under one of its other names (`Key.aka`) or one edit away (one character more, less,
    other, or two swapped); the very same key in another table; the most similar key anywhere. What was typed behind the
    wrong part is kept, corrected as well, as far as it makes sense there.
    """
    wrong, keys = _first_wrong(root, place)
    if wrong is None:
        return []
    word = str(place[wrong]).lower().replace("-", "_")
    here = {(*place[:wrong], name): key for name, key in keys.items()}
    guesses = _same(word, here) or _one_edit_away(word, here) or _same(word, _everywhere(root)) or _similar(word, here, _everywhere(root))
    return list(dict.fromkeys(_completed(root, guess, place[wrong + 1 :]) for guess in guesses))


def _first_wrong(root: Section, place: Place) -> tuple[int | None, dict[str, Key]]:
    """Index of the first part of `place` that does not exist, and the keys there are in its stead."""
    sections: tuple[Section, ...] = (root,)
    for i, part in enumerate(place):
        keys = {name: key for s in sections for name, key in s.keys.items()}
        if isinstance(part, int):  # elements have their array's keys
            continue
        if part not in keys:
            return i, keys
        sections = tuple(s for t in sections if part in t.keys for s in t.keys[part].sections)
    return None, {}


def _completed(root: Section, guess: Place, rest: Place) -> Place:
    if _first_wrong(root, guess + rest)[0] is None:
        return guess + rest
    return next(iter(suggest(root, guess + rest)), guess)


def _same(word: str, keys: dict[Place, Key]) -> list[Place]:
    return [place for place, key in keys.items() if word == key.name or word in key.aka]


def _one_edit_away(word: str, keys: dict[Place, Key]) -> list[Place]:
    near = {place: max((_ratio(word, n) for n in (key.name, *key.aka) if one_edit(word, n)), default=0.0) for place, key in keys.items()}
    return sorted((place for place in near if near[place]), key=lambda place: -near[place])


def _similar(word: str, here: dict[Place, Key], everywhere: dict[Place, Key]) -> list[Place]:
    score = {place: _ratio(word, place[-1]) - ELSEWHERE for place in everywhere}
    score |= {place: _ratio(word, place[-1]) for place in here}
    best = max(score.values())
    return [place for place, value in score.items() if value == best >= CLOSE]


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()


def one_edit(a: str, b: str) -> bool:
    """Whether at most one character more, less or other, or one swap of neighbours, turns `a` into `b`."""
    i = 0
    while i < min(len(a), len(b)) and a[i] == b[i]:
        i += 1
    a, b = a[i:], b[i:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return max(len(a), len(b)) <= 1 or (len(a) == 2 and a == b[::-1])


@lru_cache(maxsize=8)
def _everywhere(root: Section) -> dict[Place, Key]:
    """Every key of the schema; the first element stands for an array's."""

    def walk(table: Section, place: Place) -> Iterator[tuple[Place, Key]]:
        for key in table.keys.values():
            here = (*place, key.name)
            yield here, key
            for inner in key.sections:
                yield from walk(inner, (*here, 0) if key.many else here)

    return dict(walk(root, ()))
