"""Every single-edit typo of every key of a run's config, through the loader: each is refused, and what the message suggests is counted.

    python -m tests.typos [--out benchmarks/results/typos.json]

Those that get more than the key they were made from are one edit from two keys (`beta`, `loa`, `kin`, `eshard`): both are named.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import sys
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

from runtime import toml
from runtime.config import load
from runtime.errors import ConfigError
from runtime.schema import section
from runtime.suggest import _everywhere
from train import RunConfig

ALPHABET = string.ascii_lowercase + string.digits + "_"


def typos(word: str, alphabet: str = ALPHABET) -> set[str]:
    """All single edits: insertions, deletions, substitutions, swaps of neighbours."""
    cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    edits = {a + c + b for a, b in cuts for c in alphabet} | {a + b[1:] for a, b in cuts if b}
    edits |= {a + c + b[1:] for a, b in cuts if b for c in alphabet} | {a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1}
    return edits - {word, ""}


def with_key(place: tuple) -> dict:
    """A config that is right but for one key, put where `place` says."""
    source = {"path": "x", "format": "chat"}
    tree = {"model": {"path": "m"}, "output": {"path": "o"}, "data": {"sources": [dict(source)]}, "eval": {"sources": [dict(source)]}}
    node = tree
    for part, following in pairwise(place):
        node = node[part] if isinstance(part, int) else node.setdefault(part, [{}] if following == 0 else {})
    node[place[-1]] = 1
    return tree


def campaign(each: int | None = None) -> dict[str, object]:
    """Counts over `each` typos of a key, or all. `accepted`: loaded, or refused for something else than the key that is not one."""
    keys, dice = _everywhere(section(RunConfig)), random.Random(0)
    tried, accepted, others = 0, [], []
    for place in keys:
        siblings = {other[-1] for other in keys if other[:-1] == place[:-1]}
        edits = sorted(typos(place[-1]) - siblings)
        for typo in edits if each is None else dice.sample(edits, each):
            tried, wrong = tried + 1, (*place[:-1], typo)
            text = toml.dumps(with_key(wrong)).encode()
            try:
                with patch.object(toml, "_bytes", lambda path, where, text=text: text):  # thousands of files, none on the disk
                    load(RunConfig, Path("x.toml"))
                said = ""
            except ConfigError as error:
                said = str(error)
            if f"{toml.dotted(wrong)}: no such key" not in said:
                accepted.append(toml.dotted(wrong))
            elif f"did you mean {toml.dotted(place)}?" not in said:
                others.append(f"{toml.dotted(place)}: {said.partition(': ')[2]}")
    right = tried - len(accepted) - len(others)
    counts = {"keys": len(keys), "typos": tried, "accepted": len(accepted), "right": right, "share": round(right / tried, 6)}
    return counts | {"examples_of_others": others[:: max(1, len(others) // 8)][:8], "examples_accepted": accepted[:8]}


def main() -> int:
    from tests.fuzz import made

    parser = argparse.ArgumentParser(prog="python -m tests.typos", description="Every typo of every key; see the module.")
    parser.add_argument("--out", type=Path, help="a JSON file for the counts")
    args = parser.parse_args()
    about, counts = {"command": "python -m tests.typos", **made()}, campaign()
    print(json.dumps(counts, indent=1))
    if args.out:
        args.out.write_text(json.dumps(about | counts, indent=1) + "\n")
    return 1 if counts["accepted"] else 0


if __name__ == "__main__":
    sys.exit(main())
