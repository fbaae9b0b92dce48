"""From random weights to answers, then one more skill with LoRA: the real job in minutes, without a download and without a GPU.

    python -m tools.quickstart

makes a data set (tools/skills.py), trains a tiny model on it in full, exports it and lets it answer held-out questions; then
trains an adapter for a skill it does not have, merges it, and asks again. Every step is a command of its own, printed before it
runs, to be repeated and changed by hand; this file only calls them and counts exact matches.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tools import command as tool
from tools.skills import LATER

CONFIGS = Path("train_configs/quickstart")
OUT = Path("out/quickstart")  # where the configs point
QUICK = ("--train.epochs=none", "--train.steps=4", "--eval.split=8", "--eval.every=2", "--log.every=2")


class Failed(Exception):
    """A command ended with this exit code."""


def command(*words: object, into: Path | None = None) -> None:
    """Runs `python ...`; its output is shown, or written to a file."""
    shown = shlex.join(["python", *map(str, words)]) + (f" > {into}" if into else "")
    print(f"\n$ {shown}", flush=True)
    with into.open("w", encoding="utf-8") if into else open(sys.stdout.fileno(), "w", closefd=False) as stdout:
        code = subprocess.run([sys.executable, *map(str, words)], stdout=stdout).returncode
    if code:
        raise Failed(code)


def train(config: str, out: Path, quick: bool, changes: dict[str, object]) -> None:
    """train.py with a config; `changes` are given on the command line where `out` is not the folder that the config names."""
    overrides = [f"--{key}={value}" for key, value in changes.items()] if out != OUT else []
    command("train.py", "--config", CONFIGS / config, *overrides, *(QUICK if quick else ()))


def ask(model: Path, out: Path, name: str) -> dict[str, float]:
    """The share of held-out questions of each skill that the model answers exactly, in percent."""
    answers = out / f"answers_{name}.jsonl"
    questions = out / "data/held_out.jsonl"
    command("-m", "tools.generate", "--model", model, "--file", questions, "--max-new-tokens", 24, into=answers)
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    marks: dict[str, list[bool]] = {}
    for row in rows:
        marks.setdefault(row["skill"], []).append(row["completion"] == row["answer"])
    for row in rows[:: len(rows) // 9]:
        print(f"  {row['messages'][0]['content']:<60} {row['completion']}")
    return {skill: 100 * sum(right) / len(right) for skill, right in marks.items()}


def table(before: dict[str, float], after: dict[str, float]) -> str:
    """Exact match per skill, of the model trained in full and of the one with the merged adapter."""
    later = [skill.__name__ for skill in LATER]
    old = [skill for skill in before if skill not in later]
    lines = [f"  {skill:<10}{before[skill]:>15.0f} %{after[skill]:>15.0f} %" for skill in (*old, *later)]
    mean = [sum(found[skill] for skill in old) / len(old) for found in (before, after)]
    head = "exact match on held-out questions\n            trained in full   + LoRA, merged"
    return "\n".join([head, *lines, f"  mean of the {len(old)} first skills: {mean[0]:.0f} %, then {mean[1]:.0f} %"])


@tool
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.quickstart", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder for everything that is made (default {OUT})")
    parser.add_argument("--quick", action="store_true", help="a few steps on a few records: every stage, and nothing is learned")
    args = parser.parse_args(argv)
    out, begun = args.out, time.monotonic()
    few = ("--records", 60, "--held-out", 6) if args.quick else ()
    data, cache = out / "data", {"data.cache": out / "cache"}
    try:
        command("-m", "tools.skills", "--out", data, *few)
        train("skills.toml", out, args.quick, {"data.sources.0.path": data / "skills.jsonl", "output.path": out / "skills", **cache})
        before = ask(out / "skills/export", out, "skills")
        sources = {"data.sources.0.path": data / "spell.jsonl", "data.sources.1.path": data / "skills.jsonl"}
        train("lora.toml", out, args.quick, {"model.path": out / "skills/export", "output.path": out / "lora", **sources, **cache})
        command("-m", "tools.merge", "--adapter", out / "lora/export", "--out", out / "merged", "--overwrite")
        after = ask(out / "merged", out, "merged")
    except Failed as failed:
        print(f"the command above failed with exit code {failed}", file=sys.stderr)
        return failed.args[0]
    print(f"\n{table(before, after)}")
    print(f"\nall of it took {time.monotonic() - begun:.0f} s")
    print(f"go on: python -m tools.generate --model {out / 'merged'} --chat 'What is 27 + 48?'")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
