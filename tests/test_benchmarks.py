"""`benchmarks.modes`, `.gpu` and `.micro`, at sizes whose numbers mean nothing: that they run, what they say, and that what computes
something else fails."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import durability, gpu, measure, micro, modes, report, runner, sides
from benchmarks.runner import Cell, Job
from benchmarks.sides import SHAPES, Ours, Theirs, Work
from kernels import lora
from parallel import graph
from parallel.tensor import Gather
from tests.kernels.close import close


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


# -- one GPU: the runner ---------------------------------------------------------------------------------------------------


def here(suite: str, name: str, cell: Cell, device: str, tiny: bool, most: float) -> dict:
    """`runner.spawn` in this process."""
    return runner.perform(cell, Job(device, tiny, cell.seconds, time.time()))


def cells_of(suite, capsys, monkeypatch, path) -> tuple[int, dict]:
    monkeypatch.setattr(runner, "spawn", here)
    code = suite.main(["--tiny", "--device", "cpu", "--out", str(path)])
    results = json.loads(path.read_text())
    said = capsys.readouterr().out
    assert results["cells"].keys() == suite.CELLS.keys() and said.endswith(report.markdown(results) + "\n")
    assert not results["skipped"] and {"commit", "date", "versions", "machine", "command", "device"} <= results.keys()
    return code, results


def test_cells_run_in_processes_of_their_own():
    found = runner.spawn("gpu", "cold_start", gpu.CELLS["cold_start"], "cpu", True, 120)
    assert found["seconds"] > found["until"]["imports"] > 0 and list(found["until"]) == ["imports", "device", "model", "first_step"]
    assert "said nothing" in runner.spawn("gpu", "no_such_cell", gpu.CELLS["cold_start"], "cpu", True, 120)["failed"]
    begun = time.monotonic()
    found = runner.spawn("gpu", "ours_2048", Cell(7, gpu.CELLS["ours_2048"].run), "cpu", False, 0)
    assert found["failed"] == "ended after 0 s; its estimate is 7 s" and time.monotonic() - begun < 3


def test_the_deadline_leaves_out_what_would_pass_it_but_for_the_last(capsys, monkeypatch):
    cells = {name: Cell(seconds, None, last=name == "z") for name, seconds in (("z", 20), ("a", 50), ("b", 30), ("c", 30), ("d", 10))}
    code, run, _, out, err = by_a_clock(cells, 120, lambda name, seconds: seconds, capsys, monkeypatch)
    assert code == 1 and run == ["a", "b", "d", "z"] and "skipped c" in err and "`c` skipped" in out and "`b` failed" in out


def test_cells_that_take_longer_than_their_estimate_do_not_pass_the_deadline(capsys, monkeypatch):
    cells = {name: Cell(seconds, None, last=name == "z") for name, seconds in (("z", 20), ("a", 50), ("b", 40), ("c", 10))}
    _, run, took, _, _ = by_a_clock(cells, 180, lambda name, seconds: 1000, capsys, monkeypatch)
    assert run == ["a", "b", "z"] and took == 180  # a has twice its estimate, b what is left, z what was set aside
    assert by_a_clock(cells, 180, lambda name, seconds: 1.2 * seconds, capsys, monkeypatch)[1:3] == (["a", "b", "c", "z"], 144)


def by_a_clock(cells: dict[str, Cell], deadline: int, needs, capsys, monkeypatch) -> tuple[int, list[str], float, str, str]:
    """A run in which cells need `needs(name, estimate)` seconds: exit code, what ran, seconds, output. Cell b fails, as do those ended."""
    now = [1000.0]

    def spawn(suite: str, name: str, cell: Cell, device: str, tiny: bool, most: float) -> dict:
        ended = needs(name, cell.seconds) > most
        now[0] += most + (0 if cell.last else runner.ENDING) if ended else needs(name, cell.seconds)
        return {"failed": "as it should"} if ended or name == "b" else {}

    monkeypatch.setattr(runner, "spawn", spawn)
    monkeypatch.setattr(runner, "apart", lambda ask: True if ask is torch.cuda.is_available else "a GPU")
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    code = runner.main("gpu", "", cells, ["--deadline", str(deadline)])
    out, err = capsys.readouterr()
    return code, [json.loads(line)["cell"] for line in out.splitlines() if line.startswith("{")], now[0] - 1000, out, err


def test_without_a_gpu_there_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(runner, "apart", lambda ask: False)
    for suite in (gpu, micro):
        assert suite.main([]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


# -- one GPU: steps --------------------------------------------------------------------------------------------------------


def test_every_cell_of_gpu(capsys, monkeypatch, tmp_path):
    code, results = cells_of(gpu, capsys, monkeypatch, tmp_path / "gpu.json")
    cells = results["cells"]
    absent = {name for name, found in cells.items() if "unavailable" in found}
    assert code == 0 and absent <= {"hf_2048_bf16_liger", "hf_2048_liger", "unsloth_2048", "axolotl_2048", "ours_135m_graph"}
    steps = {name: found for name, found in cells.items() if "tokens_per_s" in found}
    assert {"ours_2048", "hf_2048", "hf_2048_bf16", "ours_3b_full", "ours_2048_again"} <= steps.keys()
    for found in steps.values():
        assert 0 <= found["gate"]["gradients"] < 1e-4 < found["gate"]["gradients_of_plain_bf16"]
        assert found["breakdown"]["gemm"] > 0 and found["tokens_per_s"]["min"] <= found["tokens_per_s"]["median"]
    # both sides have trained the same thing: the loss after the same steps
    assert cells["ours_2048"]["loss"] == pytest.approx(cells["hf_2048"]["loss"], rel=1e-5)
    assert cells["ours_2048"]["loss"] != pytest.approx(cells["ours_8192"]["loss"], rel=1e-5)
    assert cells["ours_8192_documents"]["documents"] > 2
    assert {"ours_16", "peft_fp32_16", "ours_against_peft_bf16_32"} <= cells["post_8b"].keys()
    gates = cells["post_8b"]["gate"]
    assert gates.keys() == {"ours", "peft_fp32", "peft_bf16"} and all(0 <= errors["gradients"] < 1e-4 for errors in gates.values())
    table = gpu.main(["--table", str(tmp_path / "gpu.json")]) == 0 and capsys.readouterr().out
    assert all(f"| {name} |" in table for name in steps) and "| post_8b, published |" in table and "Toy sizes" in table
    bars = ElementTree.parse(tmp_path / "gpu.svg").getroot().findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 1 + len(steps)


TINY = Work(SHAPES["tiny"], 24, 2)


@pytest.mark.parametrize("factor", [1.0, 1.001, float("nan")])
@pytest.mark.parametrize("where", ["loss", "adapters"])
def test_the_gate_stops_what_computes_something_else(monkeypatch, where, factor):
    owner, name = (sides.lm, "loss") if where == "loss" else (lora, "inside")
    right = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: right(*args) * factor)
    with sides.one_rank("cpu") as device:
        if factor == 1.0:
            assert sides.gate(lambda work: Ours(work, device, 2), replace(TINY, mean=8))["gradients"] < 1e-5
        else:
            with pytest.raises(AssertionError, match="not timed"):
                sides.gate(lambda work: Ours(work, device, 2), replace(TINY, mean=8))


def test_the_reference_hears_adapters_positions_and_borders():
    with sides.one_rank("cpu") as device:
        side = Ours(replace(TINY, mean=8), device, 2)
        values = {name: p.detach().clone() for name, p in side.net.named_parameters()}
        rows = side.work.documents()
        ids = [one for row in rows for one in row]
        want = sides.reference(values, TINY.shape, ids)
        changed = values | {"model.layers.1.mlp.down_proj.lora_B.weight": 0 * values["model.layers.1.mlp.down_proj.lora_B.weight"]}
        assert abs(sides.reference(changed, TINY.shape, ids) / want - 1) > 1e-5
        joined = sides.reference(values, TINY.shape, [torch.cat(row) for row in rows])
        assert len(ids) > 4 and abs(joined / want - 1) > 1e-3
        assert side.step() == pytest.approx((want / side.units).item(), rel=1e-5)


def test_kernels_of_others_are_put_in_and_gated():
    def mlp(module, x):
        return module.down_proj(torch.nn.functional.silu(module.gate_proj(x)) * module.up_proj(x))

    plain = {"apply_lora_qkv": lambda a, x: (a.q_proj(x), a.k_proj(x), a.v_proj(x)), "apply_lora_o": lambda a, x: a.o_proj(x)}
    with sides.one_rank("cpu") as device:
        for feed, bound in ((mlp, 1e-5), (lambda module, x: mlp(module, x) * 1.01, None)):

            def make(work: Work, feed=feed) -> Theirs:
                side = Theirs(work, device, 1)
                sides.put_in(side.net, SimpleNamespace(**plain, apply_lora_mlp_swiglu=feed))
                return side

            if bound:
                assert sides.gate(make, TINY)["gradients"] < bound
            else:
                with pytest.raises(AssertionError, match="not timed"):
                    sides.gate(make, TINY)


def test_a_micro_batch_that_does_not_fit_is_halved_and_recomputed(monkeypatch):
    def step(side: Ours) -> float:
        if len(side.batches[0].tokens) > 2 * 32 and side.cfg.recompute.kind == "none":
            raise torch.OutOfMemoryError("as on a small device")
        return right(side)

    right = Ours.step
    monkeypatch.setattr(Ours, "step", step)
    found = gpu.CELLS["ours_2048"].run(Job("cpu", True, 1000, time.time()))
    assert [(one["micro_rows"], one["recompute"], one["fits"]) for one in found["tried"]] == [
        (8, False, False), (4, False, False), (2, False, True), (8, True, True),
    ]  # fmt: skip
    rates = {one["micro_rows"]: one["tokens_per_s"] for one in found["tried"][2:]}
    assert found["tokens_per_s"]["median"] == max(rates.values()) == rates[found["micro_rows"]]


def test_what_only_later_steps_need_is_found_before_a_micro_batch_is_said_to_fit(monkeypatch):
    """As where a graph that is recorded at a step after the first one takes memory. With a graph nothing is recomputed."""

    def step(side: Ours) -> float:
        side.taken = getattr(side, "taken", 0) + 1
        if len(side.batches[0].tokens) > 32 and side.taken == sides.RECORDED:
            raise torch.OutOfMemoryError("as on a small device")
        return right(side)

    def plain(device: torch.device) -> gpu.Make:
        return lambda work, rows, again: pytest.fail("a graph with recomputation") if again else Ours(work, device, rows)

    right = Ours.step
    monkeypatch.setattr(Ours, "step", step)
    monkeypatch.setattr(gpu, "graphed", plain)
    monkeypatch.setattr(gpu, "measured", lambda *args: {"tokens_per_s": {"median": 1.0}})
    found = gpu.CELLS["ours_135m_graph"].run(Job("cpu", True, 1000, time.time()))
    assert [(one["micro_rows"], one["recompute"], one["fits"]) for one in found["tried"]] == [
        (4, False, False), (2, False, False), (1, False, True),
    ]  # fmt: skip


def test_the_micro_batch_at_which_a_graph_is_recorded(monkeypatch):
    calls = []
    with sides.one_rank("cpu") as device:
        side = Ours(TINY, device, 2)

        def record(run):
            calls.append("recorded")
            return lambda: calls.append("replayed"), run()

        side._learn = graph.Graphed(side._forward_backward, side.trained().values(), lambda run: calls.append("warm") or run(), record)
        for _ in range(sides.RECORDED):
            assert "recorded" not in calls
            side.step()
    assert calls == ["warm"] * (sides.RECORDED - 1) + ["recorded", "replayed"]


@pytest.mark.parametrize("wrong", ["ours", "peft"])
def test_a_side_of_post_that_computes_something_else_is_not_timed(monkeypatch, wrong):
    owner = Ours if wrong == "ours" else Theirs
    right, timed = owner.back, []
    monkeypatch.setattr(owner, "back", lambda self, loss: right(self, 1.001 * loss))
    monkeypatch.setattr(gpu, "halves", lambda *args: timed.append(args) or {})
    found = runner.perform(gpu.CELLS["post_135m"], Job("cpu", True, 1000, time.time()))
    assert "not timed" in found["failed"] and not timed


def test_ours_goes_back_as_train_does(monkeypatch):
    """A loss that is not finite makes its gradient NaN, although its derivative is finite."""
    right = sides.lm.loss
    monkeypatch.setattr(sides.lm, "loss", lambda *args: right(*args) + float("inf"))
    with sides.one_rank("cpu") as device:
        side = Ours(TINY, device, 2)
        assert not side.learn().isfinite() and all(p.grad.isnan().all() for p in side.trained().values())


def test_time_by_class_counts_overlaps_once_as_idle():
    spans = [
        ("nvjet_tst_128x256_64x4", 0, 10),
        ("flash_fwd_kernel", 5, 12),
        ("_rms_norm_forward_kernel", 15, 20),
        ("Memcpy HtoD", 16, 18),
        ("nvjet_x", 21, 25),
    ]
    assert measure.by_class(spans) == {"gemm": 14, "attention": 7, "norm": 5, "copy": 2, "idle": 4}
    assert [measure.kind(n) for n in ("multi_tensor_apply_kernel", "_glu_kernel", "ncclDevKernel")] == ["optimizer", "activation", "other"]


def test_targets_are_judged():
    cells = {"ours_2048": {"tokens_per_s": {"median": 14500.0}, "mb_per_token": 3.6}, "cold_start": {"seconds": 20.0}}
    rate, memory, start = (t for t in report.TARGETS if report.look_up({"cells": cells}, t.cell, t.key) is not None)
    assert rate.met(14500.0, rate.gate) and not rate.met(14500.0, rate.goal)
    assert not memory.met(3.6, memory.gate) and start.met(20.0, start.goal)


def test_targets_of_operations_are_judged_in_the_table_of_micro():
    def row(half: str, ms: float, of_floor: float, way: str = "ours triton", tokens: int = report.AT) -> dict:
        seconds = {"median": ms / 1e3, "min": 0.0, "max": 1.0, "count": 20, "late": 0}
        return {"way": way, "half": half, "tokens": tokens, "seconds": seconds, "of_floor": of_floor}

    gone = {"way": "ours triton", "half": "both", "tokens": 1, "unavailable": "-"}
    rows = {
        "linear_logprob": [row("both", 50.0, 1.1), row("both", 10.0, 1.1, way="liger"), row("both", 10.0, 1.1, tokens=2048)],
        "glu": [row("forward", 1.0, 1.24), row("backward", 1.0, 1.26), gone],
    }
    cells = {name: {"rows": found, "missing": []} for name, found in rows.items()}
    results = {"suite": "micro", "cells": cells, "tiny": False, "before": None, "skipped": [], "versions": {}}
    table = report.markdown(results | dict.fromkeys(("device", "date", "commit", "command"), ""))
    judged = [line.strip("| ").split(" | ") for line in table.splitlines() if "met |" in line or "missed |" in line]
    assert judged == [
        ["linear_logprob ours triton.both.16384.ms", "50", "<= 52", "met", "<= 48", "missed"],
        ["glu ours triton.forward.16384.share", "0.806", ">= 0.8", "met", "-", "-"],
        ["glu ours triton.backward.16384.share", "0.794", ">= 0.8", "missed", "-", "-"],
    ]
    assert {t.cell for t in report.MICRO_TARGETS} <= micro.OPS.keys() and report.AT in micro.SIZES


# -- one GPU: operations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host, slept", [(0.0, measure.SLEEP[0]), (4e-3, 8e-3), (0.03, measure.SLEEP[1])])
def test_the_device_sleeps_for_twice_as_long_as_the_host_needs(monkeypatch, host, slept):
    now, cycles, took = [0.0], [], iter([1.0, *[host] * 22])  # the first time something is compiled

    def work(given: int) -> None:
        now[0] += next(took)

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measure, "settle", lambda device: None)
    monkeypatch.setattr(measure, "mark", lambda device: now[0])
    monkeypatch.setattr(torch.cuda, "_sleep", cycles.append)
    found = measure.kernel_seconds(lambda i: i, work, SimpleNamespace(type="cuda"), measure.Pace(3, 20, 0.0))
    assert len(cycles) == 20 and cycles[0] == pytest.approx(slept * measure.CYCLES, rel=1e-3)
    assert found["late"] == (20 if host > slept else 0) and found["count"] == 20


def test_each_table_of_implementations_has_an_operation():
    assert micro.tabled() and micro.tabled() <= {op.module for op in micro.OPS.values()}


def test_every_cell_of_micro(capsys, monkeypatch, tmp_path):
    code, results = cells_of(micro, capsys, monkeypatch, tmp_path / "micro.json")
    assert code == 0
    for name, found in results["cells"].items():
        assert found["rows"] and all(row["seconds"]["median"] > 0 for row in found["rows"]), name
        assert any("ours" in row["way"] or name.startswith("lora") for row in found["rows"])
    assert {row["way"] for row in results["cells"]["glu"]["rows"]} >= {"ours torch", "plain torch", "torch.compile"}
    assert {row["way"] for row in results["cells"]["lora_qkv"]["rows"]} == set(micro.CANDIDATES)
    assert {"ours torch", "ours torch, summed"} <= {row["way"] for row in results["cells"]["linear_logprob_trained"]["rows"]}
    assert {row["way"] for row in results["cells"]["optimizer"]["rows"]} == {"ours triton", "torch fused", "torch foreach"}
    assert not any("no entry" in reason for found in results["cells"].values() for reason in found["missing"])
    assert "| augmented pack |" in report.markdown(results)
    assert len(report.bars(results)[1]) > 40 and ElementTree.fromstring(report.svg(*report.bars(results))) is not None


@pytest.mark.parametrize("name", micro.OPS)
def test_all_ways_of_an_operation_compute_the_same(name):
    op, cpu, draws = micro.OPS[name], torch.device("cpu"), torch.Generator().manual_seed(0)
    inputs = op.make(SHAPES["tiny"], 32, lambda *size: torch.randn(size, generator=draws))
    found, _ = micro.ways(op, SHAPES["tiny"], 32, cpu, torch.float32)
    found.pop("torch's", None)  # dropout with another mask
    outs = {way: micro.together(call(*(x.clone() for x in inputs))) for way, call in found.items()}
    first = outs.pop(next(iter(outs)))
    assert len(outs) >= 1
    for way, out in outs.items():
        close(out, first), way


@pytest.mark.parametrize("way", [way for way in micro.CANDIDATES if way != "plain gemm"])
@pytest.mark.parametrize("outs", [(24,), (40, 8, 8)])
def test_candidates_for_linears_with_adapters_are_exact(way, outs):
    torch.manual_seed(0)
    group = micro.group_of(24, outs, 3, torch.device("cpu"), torch.float64)
    w, a, b = group.w, group.a.clone().requires_grad_(), tuple(one.clone().requires_grad_() for one in group.b)
    x, dy = torch.randn(5, 24, dtype=torch.float64, requires_grad=True), torch.randn(5, sum(outs), dtype=torch.float64)
    low = [group.s * (x @ one_a.T) @ one_b.T for one_a, one_b in zip(a, b)]
    y = x @ w.T + torch.cat(low, 1)
    dx, da, *db = torch.autograd.grad(y, (x, a, *b), dy)
    made = micro.CANDIDATES[way](group, x.detach(), dy)
    out = made.forward()
    close([torch.cat(out, 1) if isinstance(out, list) else out], [y], 1e-14)
    found = made.backward()
    close([found[0], *found[1], *found[2]], [dx, *da, *db], 1e-14)
    assert torch.cat(low, 1).norm() > 0.01 * y.norm()  # adapters count


def test_optimizers_make_the_same_step():
    found = {}
    for way in ("ours triton", "torch fused", "torch foreach"):
        draws = torch.Generator().manual_seed(0)
        tensors = [torch.randn(16, n, generator=draws).requires_grad_() for n in (64, 5)]
        before = [p.detach().clone() for p in tensors]
        opt = micro.optimizers(tensors)[0][way]()
        for factor in (1.0, 0.25):
            for p in tensors:
                p.grad = torch.randn(p.shape, generator=draws)
            micro.scaled(opt, [p.grad for p in tensors], torch.tensor(factor))
        found[way] = [p.detach() - was for p, was in zip(tensors, before)]
    for other in ("torch fused", "torch foreach"):
        close(found["ours triton"], found[other], 1e-3)  # differences of numbers that a step changes by a ten thousandth
    assert found["ours triton"][0].abs().mean() > 5e-5


# -- what it costs not to lose a run ---------------------------------------------------------------------------------------


def test_durability(tmp_path):
    assert durability.main(["--quick", "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["found"]
    ratios = ("async_step", "async_stall", "sync_stall", "verify_to_load", "verify_to_load_cpu", "crc_to_write", "crc_to_write_cpu")
    for name in ratios:
        low, high = found[f"{name}_quartiles"]
        assert 0 < low <= found[name] <= high
    assert found["saved_mib"] > 1 and min(found[name] for name in found if name.endswith("_s")) > 0


def test_rounds_are_compared_with_themselves():
    assert durability.ratio("x", [1.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == {"x": 2.0, "x_quartiles": [1.5, 2.5]}
