"""Lines of keys, and bounds."""

from __future__ import annotations

import random

import pytest

from runtime import toml
from runtime.errors import ConfigError


def test_lines():
    text = '''# a comment with [brackets] = "x"
title = "a # no comment"     # one
[model] # two
path = """
[not.a.table]
x = 1 \\""" """
size.a.b = 1.5
"quoted \\"key\\"" = 'y = 2'
[[data.sources]]
path = "a"
list = [ # nested
  [1, 2],
  { a = 1, b.c = "}" },
  """x
y""",
]
[data.sources.columns]
text = 1979-05-27 07:32:00
[[data.sources]]
weight = +1e-3
[[data.sources.parts]]
n = 1
[[data.sources.parts]]
n = 2
[last]
'''
    tree, lines = toml.parse(text, "x")
    assert tree["data"]["sources"][1]["parts"][1]["n"] == 2
    s = ("data", "sources")
    expected = {
        2: [("title",)],
        3: [("model",)],
        4: [("model", "path")],
        7: [("model", "size"), ("model", "size", "a", "b")],
        8: [("model", 'quoted "key"')],
        9: [("data",), s, (*s, 0)],
        10: [(*s, 0, "path")],
        11: [(*s, 0, "list")],
        12: [(*s, 0, "list", 0), (*s, 0, "list", 0, 1)],
        13: [(*s, 0, "list", 1, "a"), (*s, 0, "list", 1, "b", "c")],
        14: [(*s, 0, "list", 2)],
        17: [(*s, 0, "columns")],
        18: [(*s, 0, "columns", "text")],
        19: [(*s, 1)],
        20: [(*s, 1, "weight")],
        21: [(*s, 1, "parts", 0)],
        22: [(*s, 1, "parts", 0, "n")],
        24: [(*s, 1, "parts", 1, "n")],
        25: [("last",)],
    }
    assert {line: [place for place in there if lines[place] == line] for line, there in expected.items()} == expected


def places(tree, place=()):
    """Every key and element of a parsed text."""
    for part, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*place, part)
        if isinstance(value, (dict, list)):
            yield from places(value, (*place, part))


def test_every_key_has_its_line():
    """Random texts: all keys are found, none is invented, and the line of each holds its name."""
    rng = random.Random(0)
    strings = ['"a=b"', "'[x]'", '"""m\n[n]\nx = 1"""', "'''{\n'''", '"#"', '"\\""', '""""q""""', "''''q''''"]
    words = ["1", "-2.5e3", "0xff", "true", "1979-05-27T07:32:00.5Z", "1979-05-27 07:32:00", "inf"]

    def value(depth: int) -> str:
        kind = rng.random()
        if depth < 3 and kind < 0.2:
            items = [value(depth + 1) for _ in range(rng.randrange(4))]
            return (
                "[" + rng.choice((" ", "\n # c ]\n ")) + rng.choice((", ", " ,\n")).join(items) + rng.choice((" ]", ",]" if items else "]"))
            )
        if depth < 3 and kind < 0.35:
            return "{ " + ", ".join(f"{key(i)} = {value(depth + 1)}" for i in range(rng.randrange(4))) + " }"
        return rng.choice(strings if kind < 0.7 else words)

    def key(i: int) -> str:
        return rng.choice((f"k{i}", f'"k {i}"', f"'k.{i}'", f"k{i}.a", f"k{i} . 'b'", f"7{i}-"))

    checked = 0
    for _ in range(400):
        out = []
        for t in range(rng.randrange(4)):
            out += [f"{key(i)} = {value(0)}{rng.choice(('', ' # [c]'))}" for i in range(rng.randrange(4))]
            out += [rng.choice((f"[t{t}]", f"[t{t}.u]", f"[[a{t % 2}]]", f"[ 'x y' . z{t} ]", "", "# [z]"))]
        text = "\n".join(out)
        try:
            tree, lines = toml.parse(text, "x")
        except ConfigError:  # e.g. a table twice, or an infinite number
            continue
        rows = text.split("\n")
        assert set(places(tree)) == set(lines), text
        for place, line in lines.items():
            if isinstance(place[-1], str):
                assert place[-1] in rows[line - 1], (place, line, text)
                checked += 1
    assert checked > 1000


@pytest.mark.parametrize("text", ["1\nb = 2", "", "[", "{a = 1", "1 2", "nope", "[" * 100 + "]" * 100])
def test_parse_value_takes_one_value(text):
    with pytest.raises(ValueError):
        toml.parse_value(text)
    assert toml.parse_value(' {a = [1, "x"]} # comment') == {"a": [1, "x"]}
