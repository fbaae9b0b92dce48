"""`benchmarks.modes`, at sizes whose numbers mean nothing: that it runs, what it says, and that what computes something else fails."""

from __future__ import annotations

import json

import pytest

from benchmarks import modes
from parallel.tensor import Gather


def quick(capsys, *words: str) -> tuple[int, dict[str, dict], str]:
    """(exit code, numbers by cell, the table)"""
    code = modes.main(["--quick", *words])
    lines = capsys.readouterr().out.splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return code, {cell.pop("cell"): cell for cell in found}, "\n".join(lines[len(found) + 1 :])


def test_modes_are_measured_beside_the_plain_step(capsys, tmp_path):
    names = ["recompute_full", "offload_activations_cpu", "offload_optimizer", "shard_2"]
    code, found, table = quick(capsys, "--only", *names, "--out", str(tmp_path / "out.json"))
    assert code == 0 and list(found) == names
    assert all(numbers["time_ratio"] > 0.5 and numbers["losses"][0] > 1 for numbers in found.values())
    assert [numbers["ranks"] for numbers in found.values()] == [1, 1, 1, 2]
    assert found["recompute_full"]["received_bytes_per_token"] == 0
    # what is on a GPU's host does not count: all blocks of this model are under way at once, and the optimizer's state is large
    assert found["offload_activations_cpu"]["memory_ratio"] == pytest.approx(1, abs=0.01)
    assert found["recompute_full"]["memory_ratio"] < 0.95 and found["offload_optimizer"]["memory_ratio"] < 0.8
    arch = modes.arch_of(modes.QUICK, tmp_path)
    block = arch.hidden_size**2 * 4 + 3 * arch.hidden_size * arch.intermediate_size
    weights = 4 * (2 * block + 2 * arch.vocab_size * arch.hidden_size)  # bytes; half is gathered, or reduced, at a time
    tokens = found["shard_2"]["rows"] * found["shard_2"]["row_tokens"]
    # two micro-batches, each: blocks gathered twice, the root once, all gradients reduced; norms are small
    exact = 2 * (2 * weights + 4 * 2 * block) / 2 / tokens
    assert found["shard_2"]["received_bytes_per_token"] == pytest.approx(exact, rel=0.02)
    assert [line.split()[0] for line in table.splitlines()] == ["mode", *found]
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["cells"] == found and {"machine", "versions", "date", "command"} <= written.keys()


def test_a_mode_that_computes_something_else_fails(capsys, monkeypatch):
    right = Gather.leave
    monkeypatch.setattr(Gather, "leave", lambda self, y: right(self, y) * 1.001)
    code, found, table = quick(capsys, "--only", "tensor_2")
    assert code == 1 and "the plain step has" in found["tensor_2"]["failed"] and "time_ratio" not in found["tensor_2"]
    assert "FAILED" in table


def test_ratios_are_of_all_ranks_to_one():
    one = {"plain": [(10.0, 8.0), (20.0, 8.0)], "mode": [(6.0, 5.0), (8.0, 5.0)]}
    two = {"plain": [(12.0, 12.0), (10.0, 12.0)], "mode": [(9.0, 6.0), (2.0, 15.0)]}
    assert modes.ratios([one, two]) == ([2 * 9 / 12, 2 * 8 / 20], [11 / 10, 20 / 10])


def test_the_gate_compares_losses_and_gradients():
    modes.gate((2.0, 3.0), (2.0, 3.0), (1e-5, 1e-4))
    for loss, norm in ((2.0001, 3.0), (2.0, 3.001), (float("nan"), 3.0), (2.0, float("inf"))):
        with pytest.raises(AssertionError):
            modes.gate((2.0, 3.0), (loss, norm), (1e-5, 1e-4))
    with pytest.raises(AssertionError):
        modes.gate((2.0, 0.0), (2.0, 0.0), (1e-5, 1e-4))  # nothing was learned: equal, and no proof


def test_modes_that_compile_are_left_out_unless_asked_for(capsys):
    code, found, _ = quick(capsys, "--only", "compile", "nothing")
    assert code == 0 and list(found) == ["nothing"]
