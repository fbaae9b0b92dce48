"""Slices of the campaigns over damaged inputs; benchmarks/results/fuzz.json has the counts of the whole ones."""

from __future__ import annotations

import json

import pytest

from tests import fuzz

SLICES = {"configs": 600, "data": 300, "safetensors": 600, "templates": 80, "tokenizers": 200, "adapters": 300, "checkpoints": 200}


@pytest.mark.parametrize("kind", SLICES)
def test_a_slice(kind):
    counts = fuzz.campaign(kind, SLICES[kind], seed=1)
    assert not any(counts[bad] for bad in fuzz.BAD)
    assert counts["loaded"] + counts["refused"] == counts["cases"] == SLICES[kind]
    assert counts["loaded"] > 3 and counts["refused"] > SLICES[kind] / 3  # both happen
    assert counts["peak_mib"] < fuzz.MEMORY >> 20


def test_the_counts_in_the_docs_are_those_of_the_files():
    results = fuzz.ROOT / "benchmarks" / "results"
    found = json.loads((results / "fuzz.json").read_text(encoding="utf-8"))["kinds"]
    rows = [line for line in (fuzz.ROOT / "SECURITY.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert found.keys() <= fuzz.KINDS.keys()
    for kind, counts in found.items():
        assert not any(counts[bad] for bad in fuzz.BAD), kind
        numbers = f" | {counts['cases']:,} | {counts['loaded']:,} | {counts['refused']:,} |"
        assert sum(line.endswith(numbers) for line in rows) == 1, kind
    typos = json.loads((results / "typos.json").read_text(encoding="utf-8"))
    text = (fuzz.ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    assert typos["accepted"] == 0
    assert f"of {typos['typos']:,} such typos of the {typos['keys']} keys none was accepted,\nand {typos['right']:,} got the right" in text


def test_what_goes_wrong_is_counted(monkeypatch, tmp_path):
    """A crash, a hang, a traceback, a load of something else and too long a message, between cases that are fine."""

    def five(folder):
        def case(rng, here):
            n = int((folder / "n").read_text()) if (folder / "n").exists() else 0
            (folder / "n").write_text(str(n + 1))
            if n == 1:
                raise ValueError("a bug")
            if n == 2:
                raise fuzz.Wrong("other values")
            if n == 3:
                fuzz.os._exit(7)
            while n == 4:
                pass
            if n == 5:
                raise MemoryError
            if n == 6:
                raise fuzz.UserError("MemoryError")

        return case

    monkeypatch.setitem(fuzz.KINDS, "five", five)
    monkeypatch.setattr(fuzz, "LIMIT_S", 0.5)
    said: list[str] = []
    counts = fuzz.campaign("five", 8, log=said.append)
    # what a child had counted before it died is kept; what it says stays with it
    assert counts["slowest_s"] >= 0.4 and counts["slowest_case"] == 4
    assert counts | {"seconds": 0, "peak_mib": 0, "slowest_s": 0, "slowest_case": 0} == {
        "cases": 8, "loaded": 2, "refused": 1, "tracebacks": 3, "wrong_loads": 1, "hangs": 1, "crashes": 1, "peak_mib": 0, "seconds": 0,
        "slowest_s": 0, "slowest_case": 0,
    }  # fmt: skip
    assert said == ["five 3: the process ended with 7", "five 4: works for more than 0.5 s"]
