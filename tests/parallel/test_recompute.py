"""Recomputation: gradients are those without it, bit for bit, in every layout; less is kept; what is kept does not run again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.batch import Batch
from kernels.attention import attention_ops
from model.arch import Arch
from model.config import LoraConfig
from model.decoder import Decoder
from model.ffn import separate
from objective import lm
from parallel import fit, recompute
from parallel.apply import check
from parallel.config import CompileConfig, ParallelConfig, RecomputeConfig, TilingConfig
from parallel.context import RING, split
from parallel.local import run
from parallel.mesh import AXES, Mesh, sizes
from parallel.transfer import told
from runtime.errors import ConfigError
from tests.model.golden import write_config
from tests.parallel.test_layouts import VOCAB, backward, grads, model, rows
from tests.parallel.watch import Watch
from tests.tiny import LLAMA, Sections

MODES = {
    "full": RecomputeConfig("full"),
    "every_n": RecomputeConfig("every_n"),
    "attention": RecomputeConfig("selective"),
    "mlp": RecomputeConfig("mlp"),
    "fit": RecomputeConfig("fit", gib=192 * 1600 / 2**30),  # everything is 3528 bytes a slot in three blocks of a rank by itself
    "operators": RecomputeConfig("selective", save=("matmul", "collectives", "aten.mul.Tensor", "salamander.varlen")),
}
LAYOUTS = [((1, 1, 1, 1), "auto"), ((1, 2, 1, 1), "auto"), ((1, 1, 1, 2), "auto")]
LAYOUTS += [((1, 1, 2, 1), "allgather"), ((1, 1, 2, 1), "ulysses"), ((1, 1, 2, 1), "ring")]
VARLEN, MM = torch.ops.salamander.varlen.default, torch.ops.aten.mm.default
LAYERS, TOKENS = 3, 320

ALONE = SimpleNamespace(axes={"replicate": 1, "shard": 1, "context": 1, "tensor": 1}, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    changes = {"vocab_size": VOCAB, "initializer_range": 0.2, "num_hidden_layers": LAYERS}
    (path / "config.json").write_text(json.dumps(LLAMA | changes))
    return path


def differences(rank: int, world: int, folder: Path, axes: dict, method: str, turn: int) -> dict[str, float]:
    """For each mode, full or LoRA in turns: the largest difference to the gradients without recomputation."""
    mesh, found = Mesh.build(ParallelConfig(**axes), torch.device("cpu")), {}
    micro = [split(row, mesh) for row in rows(192, 2)]
    dropout = 0.3 if axes["context"] == 1 else 0.0
    for lora in (False, True):
        setting = {"context_method": method, "parallel": ParallelConfig(**axes), "dropout": dropout}
        want = grads_of(model(folder, mesh, lora, "none", **setting), micro)
        assert all(g.norm() > 1e-4 for g in want.values())
        for name, mode in list(MODES.items())[(lora + turn) % 2 :: 2]:
            got = grads_of(model(folder, mesh, lora, mode, **setting), micro)
            assert got.keys() == want.keys()
            found[f"{name}, {'LoRA' if lora else 'full'}"] = max((got[n] - g).abs().max().item() for n, g in want.items())
    return found


def grads_of(net: Decoder, micro: list[Batch]) -> dict[str, torch.Tensor]:
    backward(net, micro, 100, seed=7)
    return grads(net)


@pytest.mark.parametrize(("axes", "method"), LAYOUTS, ids=str)
def test_gradients_are_those_without_recomputation(folder, axes, method):
    turn = LAYOUTS.index((axes, method)) // 2 + LAYOUTS.index((axes, method))
    for found in run(differences, math.prod(axes), folder, dict(zip(AXES, axes)), method, turn):
        assert found == dict.fromkeys(found, 0.0)
        assert len(found) == len(MODES)


# -- what is kept and what runs again --------------------------------------------------------------------------------------


def watched(folder: Path, cfg: RecomputeConfig) -> tuple[int, int, Watch]:
    """Bytes that autograd keeps, bytes that live after the forward pass, and what ran in both passes."""
    net, row, kept = model(folder, None, False, "none"), rows(TOKENS, 1)[0], {}
    recompute.apply(net, ALONE, cfg, torch.float32, TOKENS)

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage()._cdata] = (t.untyped_storage().nbytes(), t)
        return t

    with Watch() as watch:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = lm.loss(net, row, 100)
        live, saved = watch.live(), sum(size for size, _ in kept.values())
        loss.backward()
    return saved, live, watch


@pytest.fixture(scope="module")
def seen(folder) -> dict[str, tuple[int, int, Watch]]:
    return {name: watched(folder, cfg) for name, cfg in (MODES | {"none": RecomputeConfig()}).items()}


def test_less_is_kept_the_more_is_recomputed(seen):
    saved, live, row = {n: x[0] for n, x in seen.items()}, {n: x[1] for n, x in seen.items()}, TOKENS * LLAMA["hidden_size"] * 4
    assert saved["none"] > saved["every_n"] > saved["full"]
    assert (saved["none"] - saved["every_n"]) / (saved["none"] - saved["full"]) == pytest.approx(2 / 3, abs=0.02)  # blocks 0 and 2
    assert saved["none"] - saved["full"] > LAYERS * 8 * row
    # autograd does not count what selective recomputation keeps
    assert live["none"] > live["attention"] > live["full"]
    lse = TOKENS * LLAMA["num_attention_heads"] * 4
    assert live["attention"] - live["full"] == LAYERS * (row + lse)


def test_what_is_kept_does_not_run_again(seen):
    ran = {name: watch.ran for name, (_, _, watch) in seen.items()}
    assert [ran[name][VARLEN] for name in ("none", "full", "every_n", "attention", "operators")] == [3, 6, 5, 3, 3]
    products = 7 * LAYERS  # the last of a block is not needed again
    assert ran["full"][MM] - ran["none"][MM] == ran["attention"][MM] - ran["none"][MM] == products - LAYERS
    assert ran["operators"][MM] == ran["none"][MM]


# -- what fits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-tied-linear", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_what_blocks_keep_is_known_to_the_byte(tmp_path, name, lora):
    path = write_config(tmp_path, name)
    found = {}
    for way, kind in (("all", "none"), ("mlp_8bit", "mlp_8bit"), ("mlp", "mlp"), ("full", "full")):
        found[way] = []
        for layers in (2, 3) if name == "gemma3_text" else (1, 2):  # both tables of angles are there then
            net, row, kept = model(path, None, lora, "none"), rows(TOKENS, 1)[0], {}
            del net.model.layers[layers:]
            recompute.apply(net, ALONE, RecomputeConfig(kind), torch.float32, TOKENS)

            def pack(t: torch.Tensor, kept=kept) -> torch.Tensor:
                kept[t.untyped_storage()._cdata] = t
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                loss = lm.loss(net, row, 100)
            own = {p.untyped_storage()._cdata for p in net.parameters()}
            found[way].append(sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own))
            assert loss > 0
    low = 7 * 4 if lora else 0
    for way, (one, two) in found.items():
        assert two - one == TOKENS * fit.kept(net.arch, way, torch.float32, 1, low if way != "full" else 0), way


def test_memory_is_taken_from_the_cheapest_place_first():
    bytes_of = {"all": 10, "mlp": 4, "full": 1}
    for memory, want in (
        (40, "all " * 4),
        (39, "mlp all all all"),
        (22, "mlp mlp mlp all"),
        (16, "mlp " * 4),
        (15, "full mlp mlp mlp"),
        (4, "full " * 4),
    ):
        assert fit.choose(1, 4, bytes_of, memory) == want.split()
    with pytest.raises(ConfigError, match=r"^recompute.kind='fit' does not fit: as 'full' 4 blocks take 3.73e-09 GiB and 2.79e-09 GiB are"):
        fit.choose(1, 4, bytes_of, 3)
    # three of those that wait in host memory are on their way there or back; between them lie some that stay
    bytes_of = {"all": 10, "mlp_8bit": 7, "offload": 7}
    for memory, away in ((70, 0), (69, 4), (63, 4), (62, 5), (21, 10)):
        ways = fit.choose(1, 10, bytes_of, memory)
        assert ways.count("offload") == away and set(ways) <= {"mlp_8bit", "offload"}
        assert fit.held(1, ways, bytes_of) <= memory
    assert [i for i, way in enumerate(fit.choose(1, 10, bytes_of, 63)) if way == "offload"] == [0, 2, 5, 7]
    with pytest.raises(ConfigError, match=r"as 'offload' 10 blocks take"):
        fit.choose(1, 10, bytes_of, 20)
    with pytest.raises(ConfigError, match=r"or 'offload' among recompute.ways$"):
        fit.choose(1, 4, {"all": 10, "mlp": 4}, 3)


def test_room_is_what_is_free_without_what_lives_beside(folder, monkeypatch):
    free, gib = 100 << 30, 1 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    full, lora = (model(folder, None, adapted, "none") for adapted in (False, True))
    numbers, head = sum(p.numel() for p in full.parameters()), full.lm_head.weight.numel()
    assert fit.room(full, ALONE, 1000.0, torch.float32) == int(0.9 * free - 16 * numbers - 4 * head - 2000 - 2 * gib)
    adapters = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert fit.room(lora, ALONE, 1000.0, torch.float32) == int(0.9 * free - 4 * numbers - 16 * adapters - 2000 - 2 * gib)


def test_ways_are_taken_from_the_most_kept_to_the_least(folder):
    arch = Arch.from_folder(folder)
    found = fit.table(arch, ("offload", "full", "mlp_8bit"), torch.bfloat16, 2, 8)
    assert list(found) == ["all", "mlp_8bit", "full", "offload"]
    assert found["all"] > found["mlp_8bit"] > found["full"] == found["offload"] > 0


@pytest.mark.parametrize("ways", [("mlp", "offload"), ("full", "offload"), ("offload",), ("mlp_8bit", "offload")], ids="+".join)
def test_blocks_that_wait_in_host_memory_give_the_gradients_of_those_that_do_not(tmp_path, ways):
    """And as many bytes lie there as the chosen ones keep, but for small tensors, which stay."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": VOCAB, "initializer_range": 0.2, "num_hidden_layers": 6}))
    micro, sizes = rows(320, 1), []
    want, net = model(tmp_path, None, True, "none", 0.3), model(tmp_path, None, True, "none", 0.3)
    recompute.apply(want, ALONE, RecomputeConfig(ways[0] if len(ways) > 1 else "none"), torch.float32, 320)
    each = fit.table(net.arch, ways, torch.float32, 1, 7 * 4)["offload"]
    (line,) = recompute.apply(net, ALONE, RecomputeConfig("fit", gib=320 * each * 4.5 / 2**30, ways=ways), torch.float32, 320)
    assert line.split(": ")[1].endswith("5 keep theirs in host memory"), line
    with told(lambda memory: sizes.append(memory.nbytes)):
        found = grads_of(net, micro)
    for name, g in grads_of(want, micro).items():
        assert g.norm() > 1e-4 and torch.equal(found[name], g), name
    assert 0.85 * 5 * 320 * each < sum(sizes) < 1.1 * 5 * 320 * each


def test_eight_bits_change_gradients_by_some_percent_and_no_loss(folder):
    micro, nets = rows(192, 2), [model(folder, None, True, kind) for kind in ("none", "none")]
    recompute.apply(nets[1], ALONE, RecomputeConfig("mlp_8bit"), torch.float32, 192)
    losses = [backward(net, micro, 100, seed=7) for net in nets]
    assert losses[0] == losses[1]
    want = grads(nets[0])
    off = max(((g - want[n]).norm() / want[n].norm()).item() for n, g in grads(nets[1]).items())
    assert 1e-3 < off < 0.06


@pytest.mark.parametrize("kind", ["mlp", "mlp_8bit", "fit"])
def test_kinds_that_need_fused_blocks_say_so(folder, kind):
    net = model(folder, None, False, "none")
    net.model.layers[1].mlp.impl = separate
    with pytest.raises(
        ConfigError, match=rf"recompute.kind='{kind}' needs fused blocks; use kernels.blocks='auto', or recompute.kind='full'"
    ):
        recompute.apply(net, ALONE, RecomputeConfig(kind, gib=float(kind == "fit")), torch.float32, TOKENS)
    net = model(folder, None, False, "none")
    with pytest.raises(ConfigError, match=r"recompute.gib=0.0 is needed by recompute.kind=.fit. on a CPU"):
        recompute.apply(net, ALONE, RecomputeConfig("fit"), torch.float32, TOKENS)


# -- names -----------------------------------------------------------------------------------------------------------------


def test_groups_and_names():
    aten = torch.ops.aten
    assert recompute.operators(("attention",)) == {*attention_ops(), RING} >= {VARLEN, aten._scaled_dot_product_flash_attention.default}
    assert {MM, aten.addmm.default, aten.bmm.default, aten._scaled_mm.default} <= recompute.operators(("matmul",))
    functional = torch.ops._c10d_functional
    assert {functional.wait_tensor.default, functional.all_gather_into_tensor.default} <= recompute.operators(("collectives",))
    assert recompute.operators(("aten.mm.default", "salamander.varlen")) == {MM, VARLEN}
    assert recompute.operators(("aten.mul",)) > recompute.operators(("aten.mul.Tensor",)) == {aten.mul.Tensor}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"recompute": RecomputeConfig("selective", save=("atention",))},
            "recompute.save='atention' is neither a group nor an operator of this torch; did you mean 'attention'? "
            "Groups are attention, matmul, collectives",
        ),
        ({"recompute": RecomputeConfig("selective", save=("aten.mmm",))}, "did you mean 'aten.mm'?"),
        ({"recompute": RecomputeConfig("selective", save=("salamander.varlan",))}, "did you mean 'salamander.varlen'?"),
        ({"recompute": RecomputeConfig("selective", save=("aten.mm.defolt",))}, "did you mean 'aten."),
        ({"recompute": RecomputeConfig("selective", save=("aten.name", "?"))}, "recompute.save='aten.name' is neither"),
        (
            {"recompute": RecomputeConfig("selective", save=("matmul",)), "tiling": TilingConfig(mlp=64)},
            "recompute.save=['matmul'] keeps what tiling.mlp is not to keep; leave matmul out, or use tiling.mlp=0",
        ),
        (
            {"recompute": RecomputeConfig("budget")},
            "recompute.kind='budget' is the compiler's choice and needs [compile]; without it use recompute.kind='selective'",
        ),
        (
            {"recompute": RecomputeConfig("budget"), "compile": CompileConfig("eager")},
            "recompute.kind='budget' is the compiler's choice and needs [compile], not compile.backend='eager'; without it",
        ),
    ],
)
def test_what_cannot_work_is_refused(folder, changes, message):
    with pytest.raises(ConfigError) as raised:
        check(Sections(**changes), sizes(ParallelConfig(), 1), Arch.from_folder(folder), None)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_works_is_not_refused(folder):
    arch, axes = Arch.from_folder(folder), sizes(ParallelConfig(), 1)
    for mode in MODES.values():
        check(Sections(recompute=mode), axes, arch, LoraConfig(dropout=0.1))
    check(Sections(recompute=RecomputeConfig("budget"), compile=CompileConfig()), axes, arch, LoraConfig(dropout=0.1))


def test_the_report_says_what_is_recomputed(folder):
    net = model(folder, None, False, "none")
    rest = (torch.float32, TOKENS)
    assert recompute.apply(net, ALONE, RecomputeConfig(), *rest) == []
    assert recompute.apply(net, ALONE, MODES["mlp"], *rest) == ["recompute: mlp, in 3 blocks"]
    (line,) = recompute.apply(net, ALONE, RecomputeConfig("fit", gib=TOKENS * 1600 / 2**30), *rest)
    assert line == "recompute: fit, of 3 blocks 2 keep all but gate and up, 1 keep their input: 0.000434 of 0.000477 GiB"
    assert recompute.apply(net, ALONE, MODES["every_n"], *rest) == ["recompute: every_n, in 2 of 3 blocks"]
    (line,) = recompute.apply(net, ALONE, MODES["attention"], *rest)
    assert line.startswith("recompute: selective, keeps attention (")
    assert line.endswith(" operators), in 3 of 3 blocks")
    assert net.state_dict().keys() == model(folder, None, False, "none").state_dict().keys()
