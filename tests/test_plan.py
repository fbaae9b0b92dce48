"""The planner against what really happens: a real step of gloo ranks with the same ledger, all layers instead of few, a GPU's allocator."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kernels import linear_logprob
from model.arch import Arch
from model.weights import initialize, local
from optim.adamw import build as build_optimizer
from parallel import fit
from parallel.local import apart, run
from parallel.mesh import Mesh
from runtime.config import load
from runtime.memory import BLOCK, Ledger
from tests.test_docs import CONFIGS, commands, name
from tests.tiny import LLAMA, write_model
from tools import plan
from train import RunConfig, assemble

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
FULL, LORA = ROOT / "train_configs/debug/full.toml", ROOT / "train_configs/debug/lora.toml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("plan") / "model", num_hidden_layers=4, num_key_value_heads=4)


# -- the ledger ------------------------------------------------------------------------------------------------------------


def test_a_ledger_follows_storages():
    with Ledger() as ledger, ledger.saving():
        w = torch.ones(256, requires_grad=True)  # 1 KiB
        ledger.tag("parameters", [w])
        a = w * 2  # keeps nothing
        b = a.exp()  # keeps its result
        view = b[:3]
        ledger.mark("one")
        del a
        c = torch.empty(1)  # a block
        c.untyped_storage().resize_(2048)
        ledger.mark("two")
        c.untyped_storage().resize_(0)
        del b, view
        ledger.mark("three")
    assert ledger.peak("one") == {"parameters": 1024, "temporary": 1024, "activations": 1024}
    assert ledger.peak("two") == {"parameters": 1024, "activations": 1024, "gathered": 2048}
    assert ledger.at(ledger.time) == {"parameters": 1024}


def test_what_is_freed_while_moments_are_counted_comes_too_late():
    """Another thread may let go of a buffer at any time."""
    with Ledger() as ledger:
        held = torch.ones(256)
        ledger.mark("all")
    entry = ledger.entry(held)
    entry.changes.append((ledger.time + 1, 0))
    assert ledger.peak("all") == {"temporary": 1024}


def test_host_memory_does_not_make_a_peak():
    with Ledger() as ledger:
        big = torch.empty(1 << 20)
        ledger.tag("host", [big])
        del big
        small = torch.empty(1000)
        ledger.mark("all")
    assert ledger.peak("all") == {"temporary": 4096} and small is not None


# -- a step ----------------------------------------------------------------------------------------------------------------


def blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def real(rank: int, world: int, cfg: RunConfig, folder: Path) -> tuple[plan.Profile, tuple[int, ...]]:
    """A real step with the logits cut up as a GPU's, and the sizes of what stays."""
    linear_logprob._gpu = lambda x: True  # in this fork only
    mesh = Mesh.build(cfg.parallel, CPU)
    net, _ = assemble(cfg, Arch.from_folder(folder), mesh)
    net.to_empty(device="cpu")
    net.reset_buffers("cpu")
    initialize(net, 0)
    trained = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    state = build_optimizer(trained, cfg.optim).state.values()
    stays = (
        sum(blocks(local(p).nbytes) for p in net.parameters()),
        sum(local(p).nbytes for _, p in trained),
        sum(blocks(local(t).nbytes) for tensors in state for t in tensors.values()),
    )
    runs = [plan.measured_step(cfg, net, mesh).moments for _ in range(7)]
    # gloo's threads let go of buffers a little late if the machine is busy, which only adds: each moment as in its leanest run
    leanest = {moment: min((one[moment] for one in runs[1:]), key=lambda kinds: sum(kinds.values())) for moment in runs[0]}
    return replace(plan.measured_step(cfg, net, mesh), moments=leanest), stays


def fake(world: int, cfg: RunConfig, folder: Path) -> plan.Profile:
    with plan.fake_ranks(world):
        return plan.dry_step(cfg, Arch.from_folder(folder), Mesh.build(cfg.parallel, CPU))


STEPS = [
    (FULL, {}, ()),
    (FULL, {"shard": 2}, ("--train.accumulate=5", "--recompute.kind=full")),
    (LORA, {"replicate": 2, "shard": 2}, ()),
    (FULL, {"shard": 2, "tensor": 2}, ("--parallel.reshard=backward",)),
    (LORA, {"context": 2, "tensor": 2}, ()),
]


@pytest.mark.parametrize(("toml", "axes", "more"), STEPS, ids=str)
def test_fake_ranks_hold_and_receive_what_real_ones_do(folder, toml, axes, more):
    """At every moment, kind by kind, to the byte; but for a few scalars, and buffers that gloo holds a moment longer."""
    words = [f"--parallel.{axis}={n}" for axis, n in axes.items()] + ["--lora.dropout=0"] * (toml == LORA) + ["--precision.compute=fp32"]
    cfg = load(RunConfig, toml, [*words, *more])
    world = torch.tensor(list(axes.values()) or [1]).prod().item()
    want, stays = run(real, world, cfg, folder)[0]
    found = apart(fake, world, cfg, folder)
    for moment, kinds in want.moments.items():
        late = kinds.pop("temporary", 0) - found.moments[moment].pop("temporary", 0)
        assert -BLOCK <= late <= 0.02 * sum(kinds.values()), moment
    assert found.moments == want.moments and len(found.moments) >= 13
    assert found.traffic == want.traffic and (world == 1 or min(found.traffic.values()) > 10_000)
    assert found.flops == want.flops > 1e5
    end = found.moments["optimizer"]
    assert (end["parameters"], end["optimizer"]) == (stays[0], stays[2]) and min(stays) > 1000
    assert stays[1] <= end["gradients"] < stays[1] * 1.2  # FSDP2 puts those of a block into one storage
    assert found.moments["last block, forward"]["activations"] > cfg.data.tokens * LLAMA["hidden_size"] * 4


def saved_by_layer(cfg: RunConfig, folder: Path) -> int:
    arch = plan.shortened(Arch.from_folder(folder), 4)
    with plan.fake_ranks(1):
        mesh = Mesh.build(cfg.parallel, CPU)
        four, three = (plan.dry_step(cfg, plan.shortened(arch, n), mesh).moments["last block, forward"] for n in (4, 3))
    return four["activations"] - three["activations"]


@pytest.mark.parametrize("toml", [FULL, LORA], ids=["full", "lora"])
def test_saved_bytes_per_token_are_those_autograd_keeps(folder, toml):
    """Against saved-tensor accounting that knows nothing of the ledger, in a block with real tensors and two documents."""
    from model import build
    from model.attention import AttnContext, Borders
    from model.transforms.lora import apply_lora
    from model.transforms.ops import install
    from model.transforms.trainable import apply_trainable

    cfg = load(RunConfig, toml, ["--recompute.kind=none", "--precision.compute=fp32", "--lora.dropout=0"][: 2 + (toml == LORA)])
    net = build(Arch.from_folder(folder))
    if cfg.lora:
        apply_lora(net, cfg.lora)
    apply_trainable(net, cfg.lora, torch.float32)
    install(net, cfg.kernels, "cpu", torch.float32)
    net.to_empty(device="cpu")
    net.reset_buffers("cpu")
    initialize(net, 0)
    tokens, kept = cfg.data.tokens, {}
    borders = torch.tensor([0, tokens // 2, tokens], dtype=torch.int32)
    ctx = AttnContext(Borders(tokens, borders, tokens), net.model.rotary(torch.arange(tokens), torch.float32))
    net.model.layers[0].self_attn.backend.prepare(ctx, net.model.layers[0].self_attn.kind)
    known = {p.untyped_storage().data_ptr() for p in net.parameters()} | {t.untyped_storage().data_ptr() for t in (*ctx.rope[0], borders)}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if (at := t.untyped_storage().data_ptr()) not in known:
            kept[at] = t
        return t

    h = torch.randn(tokens, LLAMA["hidden_size"], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        net.model.layers[0](h, ctx)
    assert (
        saved_by_layer(cfg, folder)
        == sum(blocks(t.untyped_storage().nbytes()) for t in kept.values())
        > tokens * LLAMA["hidden_size"] * 4 * 5
    )


def plans(world: int, cfg: RunConfig, arch: Arch, layers: int | None = None, run_all: bool = False) -> tuple[plan.Plan, ...]:
    """The plan, and with `run_all` the one that all layers give."""
    with plan.fake_ranks(world):
        mesh = Mesh.build(cfg.parallel, CPU)
        told = plan.plan(cfg, arch, mesh, layers)
        return (told, plan.Plan.of(plan.dry_step(cfg, plan.shortened(arch, layers), mesh))) if run_all else (told,)


def both(world: int, cfg: RunConfig, arch: Arch) -> tuple[plan.Plan, plan.Plan]:
    """What is planned for `fit`, and what a dry step of all layers holds with the same choice."""
    with plan.fake_ranks(world):
        mesh = Mesh.build(cfg.parallel, CPU)
        return plan.plan(cfg, arch, mesh), plan.Plan.of(plan.dry_step(plan.as_planned(cfg), arch, mesh))


@pytest.mark.parametrize("ways", [("mlp", "full"), ("mlp_8bit", "mlp"), ("mlp", "offload")], ids="+".join)
def test_what_fits_is_planned_on_the_safe_side(folder, ways):
    words = [
        "--recompute.kind=fit",
        f"--recompute.ways={json.dumps(ways)}",
        "--lora.dropout=0",
        "--precision.compute=bf16",
        "--train.accumulate=1",
    ]
    arch = plan.shortened(Arch.from_folder(folder), 8)
    cfg = load(RunConfig, LORA, words)
    with plan.fake_ranks(1):
        net, _ = assemble(replace(cfg, recompute=plan.recomputed(cfg, "none")), arch, Mesh.build(cfg.parallel, CPU))
    bytes_of = fit.table(arch, cfg.recompute.ways, torch.bfloat16, 1, fit.ranks(net.model.layers))
    most, least = (8 * bytes_of["mlp"], 3 * bytes_of["mlp"]) if "offload" in ways else (8 * bytes_of["all"], 8 * bytes_of["mlp"])
    memory = cfg.data.tokens * (least + 0.7 * (most - least))
    planned, found = apart(both, 1, replace(cfg, recompute=replace(cfg.recompute, gib=memory / 2**30)), arch)
    assert planned.said.startswith("recompute: fit, of 8 blocks ") and planned.said.count(" keep ") == 2
    assert found.peak - 8 * BLOCK <= planned.peak <= found.peak + 3 * cfg.data.tokens * bytes_of["all"]
    assert planned.host == pytest.approx(found.host, rel=0.15) and (planned.host > 0) == ("offload" in ways)


def test_fit_is_planned_for_the_gpu_that_is_asked_for():
    code, said, error = apart(command, [*ON_8B, "--world", "1", "--gpu", "h100", "--recompute.kind=fit", "--data.tokens=32768"])
    assert code == 0 and "recompute: fit, of 32 blocks" in said and "fits h100" in said, said + error


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["none", "full"])
def test_the_peak_is_within_a_tenth_of_the_allocators(folder, kind):
    words = [f"--recompute.kind={kind}", "--precision.compute=bf16", "--data.tokens=16384", "--data.max_length=4096"]
    cfg = load(RunConfig, FULL, words)
    arch = replace(
        Arch.from_folder(folder), hidden_size=1024, intermediate_size=4096, num_attention_heads=16, head_dim=64, vocab_size=32000
    )
    planned = apart(plans, 1, cfg, arch, 8)[0]
    (found,) = run_on_cuda(cfg, plan.shortened(arch, 8))
    assert planned.peak == pytest.approx(found, rel=0.1)


def run_on_cuda(cfg: RunConfig, arch: Arch) -> list[int]:
    """The most a real step had allocated, in this process: CUDA does not survive a fork."""
    from objective import lm
    from optim.clip import clip

    device = torch.device("cuda", 0)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = Mesh.build(cfg.parallel, device)
        net, _ = assemble(cfg, arch, mesh)
        net.to_empty(device=device)
        net.reset_buffers(device)
        initialize(net, 0)
        trained = dict(net.named_parameters())
        opt, row = build_optimizer(trained.items(), cfg.optim), plan.a_row(cfg, mesh).to(device)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            lm.loss(net, row, 1.0).backward()
            clip(trained.values(), cfg.optim.max_norm)
            opt.step()
            opt.zero_grad(set_to_none=True)
        return [torch.cuda.max_memory_allocated()]
    finally:
        dist.destroy_process_group()


# -- from few layers to all ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "layers"),
    [
        (["--parallel.tensor=2"], 32),  # 8B as it is
        (["--recompute.kind=every_n", "--recompute.every=3", "--train.accumulate=4"], 12),
        (["--recompute.kind=none", "--lora.rank=8", "--parallel.prefetch=3"], 9),
        (["--parallel.context=4", "--recompute.kind=none"], 7),
    ],
    ids=str,
)
def test_few_layers_tell_of_all(words, layers):
    cfg = plan.on_a_gpu(load(RunConfig, ROOT / "train_configs/llama3.1-8b-full.toml", words))
    arch = Arch.from_folder(ROOT / "train_configs/arch/llama3-8b")
    told, whole = apart(plans, 8, cfg, arch, layers, True)
    assert told == whole and told.peak > 2**30


def timed(world: int, cfg: RunConfig, arch: Arch) -> tuple[plan.Plan, float]:
    begun = time.process_time()
    (found,) = plans(world, cfg, arch)
    return found, time.process_time() - begun


@pytest.mark.parametrize(("size", "world", "numbers"), [("8b", 8, 8.03e9), ("70b", 64, 70.55e9), ("405b", 512, 405.85e9)])
def test_large_models_answer_quickly(size, world, numbers):
    cfg = plan.on_a_gpu(load(RunConfig, ROOT / "train_configs/llama3.1-8b-full.toml", ["--parallel.tensor=8"]))
    found, seconds = apart(timed, world, cfg, Arch.from_folder(ROOT / f"train_configs/arch/llama3-{size}"))
    assert seconds < 10
    assert found.parameters * world == pytest.approx(4 * numbers, rel=2e-3)
    assert found.peak > found.parameters + found.gradients + found.optimizer + found.activations


# -- the command -----------------------------------------------------------------------------------------------------------


def command(words: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    os.chdir(ROOT)  # in a fork
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = plan.main(words)
    assert not dist.is_initialized()
    return code, out.getvalue(), err.getvalue()


def planned(path: Path) -> list[list[str]]:
    """The plan commands in a recipe's first lines."""
    return [words[3:] for words in commands(path.read_text(encoding="utf-8")) if words[:3] == ["python", "-m", "tools.plan"]]


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.parent.name != "quickstart"], ids=name)
def test_every_recipe_is_planned_and_fits(path):
    """With the command it names; the debug recipes need none."""
    world = re.match(r"# (\d+) ", path.read_text(encoding="utf-8"))[1]
    told = planned(path)
    assert told or path.parent.name == "debug", "a recipe names the command that plans it"
    for words in told or [["--config", str(path), "--world", world]]:
        assert words[words.index("--world") + 1] == world and Path(words[words.index("--config") + 1]).name == path.name
        code, said, error = apart(command, words)
        assert code == 0 and "\nfits " in said, said + error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--world", "none"], "--world='none'"),
        (["--world", "2", "--gpu", "abacus"], "known: a100-40"),
        (["--world", "3", "--parallel.tensor=2"], "parallel"),
        (["--world", "3", "--parallel.tensor=3"], "num_key_value_heads"),
        (["--world", "6", "--parallel.reshard=4"], "parallel.reshard=4 does not divide the 6 ranks"),
    ],
    ids=str,
)
def test_refusals(words, message):
    code, said, error = apart(command, ["--config", str(FULL), *words])
    assert (code, said) == (2, "") and error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_rings_traffic_is_counted():
    """Keys and values of 3 ranks forward and again backward, fp32 gradients of theirs from 4; blocks recomputed."""
    words = ["--parallel.context=4", "--parallel.context_method=ring", "--recompute.kind=full"]
    cfg = plan.on_a_gpu(load(RunConfig, ROOT / "train_configs/llama3.1-8b-full.toml", words))
    (found,) = apart(plans, 4, cfg, Arch.from_folder(ROOT / "train_configs/arch/llama3-8b"))
    keys = 2 * cfg.data.tokens // 4 * 8 * 128
    assert found.traffic["context"] == pytest.approx(32 * (3 * 3 * keys * 2 + 4 * keys * 4), rel=1e-5)  # and norms of gradients


ON_8B = ["--config", "train_configs/llama3.1-8b-lora.toml", "--arch", "train_configs/arch/llama3-8b"]
BIG = ["--config", "train_configs/llama3.1-8b-full.toml", "--arch"]


def peak(said: str) -> float:
    return float(re.search(r"peak +([\d.]+)", said)[1])


def test_what_does_not_fit_is_told_what_to_change():
    """And what it is told helps."""
    words = [*BIG, "train_configs/arch/llama3-8b", "--world", "8", "--gpu", "rtx4090"]
    none, selective, full = (apart(command, [*words, f"--recompute.kind={kind}"])[1] for kind in ("none", "selective", "full"))
    assert "does not fit rtx4090" in none and 'recompute.kind = "selective"; recompute.kind = "full"' in none
    assert "does not fit rtx4090" in full and 'kind = "full"' not in full and "offload.activations" in full
    assert peak(none) > peak(selective) > peak(full)


ADVISED = [  # recipe, keys, ranks
    ("llama3.1-8b-hsdp", ["--parallel.reshard=backward"], 16),
    ("llama3.1-8b-lora", ["--data.max_length=8192"], 1),
    ("llama3.1-8b-lora", ["--offload.frozen=true"], 1),
    ("llama3.1-8b-full", ["--recompute.kind=every_n", "--recompute.every=3", "--offload.optimizer=true"], 8),
    ("llama3.1-8b-full", ["--recompute.kind=selective", '--recompute.save=["matmul"]'], 8),
]


@pytest.mark.parametrize(("recipe", "words", "ranks"), ADVISED, ids=str)
def test_what_is_advised_is_legal(recipe, words, ranks):
    """Each way, set as it is written, in a run of as many ranks."""
    from parallel.apply import check
    from parallel.mesh import sizes

    cfg, arch = load(RunConfig, ROOT / f"train_configs/{recipe}.toml", words), Arch.from_folder(ROOT / "train_configs/arch/llama3-8b")
    *ways, last = plan.advice(cfg, arch, ranks).split("; ")
    assert ways and last.startswith("more ranks")
    for way in ways:
        keys = [
            f"--{key.strip()}={value.strip()}" for key, value in (part.split(" = ") for part in way.removesuffix(" alone").split(" with "))
        ]
        if way.endswith(" alone"):
            keys += ["--offload.optimizer=false", "--offload.frozen=false"]
        if "recompute.kind" in way:
            words = [word for word in words if not word.startswith("--recompute")]
        changed = load(RunConfig, ROOT / f"train_configs/{recipe}.toml", [*words, *keys])
        check(changed, sizes(changed.parallel, ranks), arch, changed.lora)


def test_suggest_says_why_nothing_can_be_tried():
    words = ["--config", "train_configs/llama3.1-8b-lora.toml", "--arch", "train_configs/arch/llama3-8b", "--world", "8", "--suggest"]
    code, _, error = apart(command, [*words, "--offload.frozen=true"])
    assert code == 2 and "offload.frozen=true is for one rank" in error


def test_suggested_layouts_fit_and_can_be_planned():
    words = [*BIG, "train_configs/arch/llama3-8b", "--world", "8", "--gpu", "h100"]
    first, *lines = apart(command, [*words, "--suggest"])[1].strip().split("\n")
    assert first.startswith("layouts of 8 ranks that fit h100, the cheapest first") and len(lines) == 3
    costs = [float(line.split("cost ")[1]) for line in lines]
    assert costs == sorted(costs) and costs[0] == 1
    said = apart(command, [*words, *(word for word in lines[0].split() if word.startswith("--"))])[1]
    assert "\nfits h100" in said and peak(said) == peak(lines[0])
    assert apart(command, [*BIG, "train_configs/arch/llama3-405b", "--world", "2", "--suggest"])[1] == "no layout of 2 ranks fits h200\n"
