"""Slices of the campaigns whose counts are benchmarks/results/faults.json: signals, full disks, damaged files, torchrun's restarts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import chaos, faults

ROOT = Path(__file__).resolve().parents[2]

WORDS = {"signals": "signals", "disks": "disks", "damage": "damaged files", "restarts": "kills", "chaos": "kills"}
SLICES = {"signals": 6, "disks": 2, "damage": 30, "restarts": 1}


@pytest.mark.parametrize("kind", SLICES)
def test_nothing_is_lost(tmp_path, kind):
    number = SLICES[kind]
    counts = faults.count(kind, number, tmp_path / "counts.json", seed=1, each=number, folder=tmp_path)
    assert {key: counts[key] for key in counts.BAD} == dict.fromkeys(counts.BAD, 0)
    assert counts["visits"] == 1 and counts["runs"] >= 1 and counts["records"] >= 14 * counts["runs"]
    if kind == "signals":
        assert counts["signals"] == number == sum(counts["in"].values())
        assert counts["saved"] >= 1 and counts["second_signals"] >= 1 and counts["starts"] == number + counts["runs"] - counts["at_the_end"]
    elif kind == "disks":
        assert counts["disks"] == number and counts["starts"] == 2 * number
        assert counts["failed_saves"] >= 2 and counts["failed"]["read-only"] >= 1 and counts["saves"] + counts["failed_saves"] == 5 * number
    elif kind == "damage":
        assert counts["damages"] == number > counts["fall_backs"] >= number // 2 and counts["resumed_runs"] == 2
    else:
        assert counts["kills"] == number == counts["restarts"] + counts["of_torchrun"]
    again = faults.count(kind, number, tmp_path / "counts.json", seed=1, folder=tmp_path)
    assert again.data == counts.data, "what is counted is not done again"


def test_the_counts_in_the_docs_are_those_of_the_files():
    text = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "benchmarks" / "results" / "faults.json").read_text(encoding="utf-8"))
    kinds = {kind: (counts, found[kind]) for kind, (counts, _, _) in faults.KINDS.items()}
    kinds["chaos"] = (chaos.Counts, json.loads((ROOT / "benchmarks" / "results" / "chaos.json").read_text(encoding="utf-8")))
    assert kinds.keys() - {"chaos"} == found.keys()
    kills = kinds["chaos"][1]["kills"]
    assert f"killed {kills:,} times by its tests" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"tests.chaos --kills {kills} " in text
    for kind, (counts, numbers) in kinds.items():
        assert not any(numbers[key] for key in counts.BAD)
        file = "chaos" if kind == "chaos" else "faults"
        assert f"| {numbers[counts.GOOD[0]]:,} {WORDS[kind]} ([{file}.json](../benchmarks/results/{file}.json)) |" in text, kind
