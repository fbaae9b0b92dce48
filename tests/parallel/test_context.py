"""Context parallelism: every slot on one rank, attention equal to the whole row's, models of every family equal to one rank's."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data.batch import IGNORE, Batch
from kernels import attention as kernel
from model import build
from model.arch import Arch, Kind
from model.attention import AttnContext, Borders
from model.backends import BACKENDS, SDPA, VARLEN
from model.config import LoraConfig
from objective import lm
from objective.evaluate import evaluate
from parallel import context
from parallel.apply import check
from parallel.config import ParallelConfig
from parallel.local import run
from parallel.mesh import Mesh, sizes
from runtime.errors import ConfigError
from runtime.metrics import read
from tests import launch
from tests.model.golden import distance
from tests.model.golden import write_config as write_golden
from tests.parallel.test_layouts import VOCAB, documents, model, pack, rank_errors, reference, rows
from tests.tiny import LLAMA, Sections, write_chats, write_config, write_model

BORDERS = [0, 1, 1, 9, 45, 61, 64, 64, 64]  # 64 slots; chunks of 8 and of 16 cut through documents
ROW = rows(320, 1)[0]


def worst(errors) -> float:
    """The largest; nan is larger than any, which Python's max passes over."""
    return torch.tensor([*errors]).max().item()


# -- the split -------------------------------------------------------------------------------------------------------------


def shares(rank: int, world: int) -> list:
    mesh = Mesh.build(ParallelConfig(context=world), torch.device("cpu"))
    mine = context.split(ROW, mesh)
    names = ("slots", "tokens", "labels", "positions", "document")
    return [*(getattr(mine, n).tolist() for n in names[:-1]), mine.document().tolist(), mine.filled, lm.count(mine), len(mine.cu_seqlens)]


@pytest.mark.parametrize("world", [2, 4])
def test_every_slot_is_on_one_rank_from_head_and_tail(world):
    found = run(shares, world)
    slots = torch.tensor([f[0] for f in found])
    assert slots.flatten().sort()[0].tolist() == list(range(320))
    assert torch.equal(slots.double().mean(1), torch.full((world,), 159.5, dtype=torch.float64))  # head and tail alike
    for i, whole in enumerate((ROW.tokens, ROW.labels, ROW.positions, ROW.document()), 1):
        assert [f[i] for f in found] == whole[slots.long()].tolist()
    assert sum(f[-2] for f in found) == lm.count(ROW) > 100
    assert all(f[-1] == len(ROW.cu_seqlens) for f in found)


def filled(rank: int, world: int) -> list[int]:
    mesh = Mesh.build(ParallelConfig(context=world), torch.device("cpu"))
    return [context.split(replace(ROW, filled=n), mesh).filled for n in (0, 1, 100, 159, 320)]


def test_padding_is_counted_where_it_lies():
    assert [sum(counts) for counts in zip(*run(filled, 2))] == [0, 1, 100, 159, 320]


def ragged(rank: int, world: int, tokens: int, axes: dict) -> list:
    """This rank's share of a row that does not divide: slots, tokens, labels, positions, documents; borders and the rest."""
    mesh = Mesh.build(ParallelConfig(**axes), torch.device("cpu"))
    row = replace(rows(tokens, 1)[0], group={"source": torch.arange(24) % 3, "pair": torch.ones(24, 2)})
    mine = context.split(row, mesh)
    slots = torch.arange(mine.tokens.numel()) if mine.slots is None else mine.slots
    each = torch.stack([slots, mine.tokens, mine.labels, mine.positions, mine.document()]).tolist()
    return [each, mine.cu_seqlens.tolist(), mine.max_seqlen, mine.group["source"].tolist(), list(mine.group["pair"].shape)]


@pytest.mark.parametrize(
    "tokens,axes,slots", [(317, {"context": 2}, 320), (321, {"context": 2, "tensor": 2}, 324), (319, {"tensor": 2}, 320)]
)
def test_a_row_that_does_not_divide_gets_a_document_of_padding(tokens, axes, slots):
    found = run(ragged, math.prod(axes.values()), tokens, axes)[:: axes.get("tensor", 1)]
    columns = torch.cat([torch.tensor(each) for each, *_ in found], 1)
    columns = columns[:, columns[0].argsort()]
    row, more = rows(tokens, 1)[0], slots - tokens
    assert columns[0].tolist() == list(range(slots))
    for found_whole, whole in zip(columns[1:], (row.tokens, row.labels, row.positions, row.document())):
        assert torch.equal(found_whole[:tokens], whole.long())
    assert columns[1:, tokens:].tolist() == [[0] * more, [IGNORE] * more, list(range(more)), [24] * more]
    for _, borders, longest, source, pair in found:
        assert borders == [*row.cu_seqlens.tolist(), slots]
        assert longest == row.max_seqlen
        assert source == [*(i % 3 for i in range(24)), -1]
        assert pair == [25, 2]


def test_padding_is_as_short_as_ranks_allow():
    for tokens, size, tensor, slots in (
        (321, 1, 1, 321),
        (321, 1, 2, 322),
        (321, 2, 1, 324),
        (321, 3, 1, 324),
        (321, 2, 3, 324),
        (1, 4, 8, 32),
    ):
        assert context.padded(tokens, size, tensor) == slots
        assert context.padded(slots, size, tensor) == slots


def test_row_and_rank_order_are_each_others_inverse():
    for size in (2, 3, 4):
        x = torch.arange(size * 10)
        held = [torch.cat([x[a:b] for a, b in context.chunks_of(size * 10, size, rank)]) for rank in range(size)]
        assert torch.equal(context.in_row_order(torch.cat(held), size), x)
        assert torch.equal(context.in_rank_order(x, size), torch.cat(held))


# -- attention -------------------------------------------------------------------------------------------------------------


def qkv(heads: int, kv_heads: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(64, n, 6, generator=g, dtype=torch.float64) for n in (heads, kv_heads, kv_heads, heads)]


def whole_row(heads: int, kv_heads: int, window: int) -> list[torch.Tensor]:
    """[out, dq, dk, dv] of the obvious twin."""
    *leaves, grad = qkv(heads, kv_heads)
    leaves = [x.requires_grad_() for x in leaves]
    out = kernel.varlen_ref(*leaves, BORDERS, window, 0.3)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("window", [0, 1, 3, 7, 1000])
@pytest.mark.parametrize("backend", ["sdpa", "varlen"])  # in 64-bit; triton: tests/kernels/test_flash.py
@pytest.mark.parametrize("tile", [256, 5])
def test_a_piece_computes_its_rows_of_the_whole(monkeypatch, backend, window, tile):
    """Queries [begin, end) against the keys before `end`: equal rows of the output, and gradients of only those rows."""
    monkeypatch.setattr(kernel, "TILE", tile)
    kind = Kind("window", window) if window else Kind()
    row = AttnContext(Borders(64, torch.tensor(BORDERS, dtype=torch.int32), 40), [])
    for begin, end in ((0, 16), (8, 16), (0, 64), (40, 48), (48, 64), (61, 62)):
        q, k, v, grad = qkv(4, 2)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = kernel.varlen_ref(*leaves, BORDERS, window, 0.3)[begin:end]
        expected = [out.detach(), *torch.autograd.grad(out, leaves, grad[begin:end])]
        piece = row.cut(begin, end)
        assert row.cut(begin, end) is piece
        BACKENDS[backend].prepare(piece, kind)
        out = BACKENDS[backend](q[begin:end], k[:end], v[:end], piece, kind, 0.3)
        found = [out.detach(), *torch.autograd.grad(out, leaves, grad[begin:end])]
        twin = kernel.varlen_ref(q[begin:end], k[:end], v[:end], piece.queries.cu.tolist(), window, 0.3, piece.keys.cu.tolist())
        assert distance(twin, expected[0]) < 1e-13
        assert min(x.norm() for x in (expected[0], expected[3])) > 0.5
        for a, b in zip(found, expected):  # dq and dk vanish where a query sees one key
            assert (a - b).norm() < 1e-13 * max(1.0, b.norm())


def around(rank: int, world: int, cases: list[tuple]) -> list[float]:
    """The wrapped backends on this rank's slots: the worst error of output and gradients over all cases."""
    errors = []
    slots = torch.cat([torch.arange(a, b) for a, b in context.chunks_of(64, world, rank)])
    for method, inner, heads, kv_heads, window, expected in cases:
        backend = method(inner, dist.group.WORLD)
        kind = Kind("window", window) if window else Kind()
        ctx = AttnContext(Borders(64 // world, torch.tensor(BORDERS, dtype=torch.int32), 40), [])
        backend.prepare(ctx, kind)
        *leaves, grad = (x[slots] for x in qkv(heads, kv_heads))
        leaves = [x.requires_grad_() for x in leaves]
        out = backend(*leaves, ctx, kind, 0.3)
        found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
        errors.append(worst(distance(a, b[slots]) for a, b in zip(found, expected)))
    return errors


@pytest.mark.parametrize("world", [2, 4])
def test_every_method_around_every_backend(world):
    cases = [
        (method, inner, heads, kv_heads, window, whole_row(heads, kv_heads, window))
        for method in (context.AllGather, context.Ring, context.Ulysses)
        for inner in (SDPA, VARLEN)
        for heads, kv_heads in ((4, 1), (4, 2), (4, 4), (12, 6), (6, 3))  # copied for ulysses: 1, 2 and 6 over 4 ranks
        for window in (0, 5)
        if method is not context.Ulysses or heads % world == 0
    ]
    assert len(cases) >= 56
    for errors in run(around, world, cases):
        assert worst(errors) < 1e-12, dict(zip([c[:5] for c in cases], errors))


def rounded(rank: int, world: int, exact: list[torch.Tensor]) -> list[float]:
    """Errors in bf16: of the ring's output and gradients, and of the whole row's on one rank."""
    slots = torch.cat([torch.arange(a, b) for a, b in context.chunks_of(64, world, rank)])
    cu, errors = torch.tensor(BORDERS, dtype=torch.int32), []
    for backend, here in ((context.Ring(VARLEN, dist.group.WORLD), slots), (VARLEN, torch.arange(64))):
        *leaves, grad = (x[here].bfloat16() for x in qkv(4, 2))
        leaves = [x.requires_grad_() for x in leaves]
        out = backend(*leaves, AttnContext(Borders(len(here), cu, 40), []), Kind(), 0.3)
        found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
        assert all(x.dtype == torch.bfloat16 for x in found)
        errors.append([distance(a, b[here]) for a, b in zip(found, exact)])
    return errors


def test_a_ring_rounds_no_more_than_one_rank():
    exact = whole_row(4, 2, 0)
    for ring, one in run(rounded, 4, exact):
        assert min(one) > 1e-4
        assert worst(a / b for a, b in zip(ring, one)) < 1.6


def ring_operators(rank: int, world: int) -> list:
    """opcheck of both operators; bytes that are kept for the backward pass, by the ring and by allgather."""
    q, k, v, grad = (x[: 64 // world].clone() for x in qkv(4, 2))
    cu, kept = torch.tensor(BORDERS, dtype=torch.int32), []
    where = (cu, 40, 0.3, "varlen", dist.group.WORLD.group_name)
    torch.library.opcheck(context.RING, (*(x.detach().requires_grad_() for x in (q, k, v)), *where))
    out, lse = context.RING(q, k, v, *where)
    torch.library.opcheck(torch.ops.salamander.ring_backward.default, (grad, q, k, v, out, lse, *where))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    for method in (context.Ring, context.AllGather):
        backend, ctx = method(VARLEN, dist.group.WORLD), AttnContext(Borders(64 // world, cu, 40), [])
        backend.prepare(ctx, Kind())
        storages = {}

        def keep(t: torch.Tensor, storages: dict = storages) -> torch.Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            backend(*leaves, ctx, Kind(), 0.3)
        kept.append(sum(storages.values()))
    return [*kept, sum(x.nbytes for x in (q, k, v, out, lse, cu))]


def test_ring_operators_keep_their_word_and_nothing_of_other_ranks():
    for ring, allgather, own in run(ring_operators, 2):
        assert ring == own
        assert allgather >= ring + 2 * 32 * 2 * 6 * 8  # at least keys and values of the other rank's 32 slots


# -- models ----------------------------------------------------------------------------------------------------------------


def families(rank: int, world: int, axes: dict, jobs: list[tuple]) -> list[tuple]:
    return [rank_errors(rank, world, folder, axes, *rest) for folder, *rest in jobs]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> tuple:
    """A folder, and what one rank computes. All families are in test_invariance.py."""
    folder = write_golden(tmp_path_factory.mktemp("golden"), "gemma3_text", initializer_range=0.2)
    return folder, reference(folder, False)


@pytest.mark.parametrize("axes", [{"tensor": 2}, {"context": 2}, {"context": 2, "tensor": 2}], ids=str)
def test_any_token_budget(gemma, axes):
    folder, want = gemma
    methods = ("allgather", "ulysses", "ring") if "context" in axes else ("auto",)
    jobs = [(folder, 1, 315 + i, False, "none", want, method) for i, method in enumerate(methods)]
    for errors in run(families, math.prod(axes.values()), axes, jobs):
        for (_, _, budget, *_, method), found in zip(jobs, errors):
            assert worst(found) < 1e-5, (budget, method, found)


def long_rows() -> list[Batch]:
    """One document over nearly the whole row; then rows without a target on some rank, and without any."""
    tokens = torch.randint(VOCAB, (250,), generator=torch.Generator().manual_seed(3))
    labels = torch.cat([tokens[1:], torch.tensor([IGNORE])])
    return [pack([(tokens, labels)], 256, 0), pack(documents()[:2], 256, 1), pack([], 256, 2)]


def long_grads(rank: int, world: int, folder: Path, want: list, method: str) -> float:
    mesh = Mesh.build(ParallelConfig(context=world), torch.device("cpu"))
    net = model(folder, mesh, False, "none", context_method=method)
    for row in long_rows():
        lm.loss(net, context.split(row, mesh), 100.0).backward()
    return worst(distance(p.grad.full_tensor(), w) for p, w in zip(net.parameters(), want))


@pytest.mark.parametrize("method", ["allgather", "ulysses", "ring"])
def test_a_long_document_and_rows_that_are_padding(tmp_path, method):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": VOCAB, "initializer_range": 0.2}))
    net = model(tmp_path, None, False, "none")
    for row in long_rows():
        lm.loss(net, row, 100.0).backward()
    assert worst(run(long_grads, 4, tmp_path, [p.grad for p in net.parameters()], method)) < 1e-5


def compiled(rank: int, world: int, folder: Path, method: str, inner: str) -> tuple[bool, int]:
    """Are gradients over some packings bit for bit those without compilation, and how many graphs did that take?"""
    torch._dynamo.reset()  # a fork has what its parent compiled
    torch._dynamo.utils.counters.clear()
    mesh, found = Mesh.build(ParallelConfig(context=world), torch.device("cpu")), []
    for graphs in (False, True):
        net = model(folder, mesh, False, "none", context_method=method)
        for block in net.model.layers:
            block.self_attn.backend.inner = BACKENDS[inner]
            if graphs:
                block.compile(fullgraph=True, backend="eager")
        for row in rows(96, 4):
            lm.loss(net, context.split(row, mesh), 100.0).backward()
        found.append([p.grad.full_tensor() for p in net.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*found)), torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("method,inner", [("allgather", "varlen"), ("ulysses", "sdpa"), ("ring", "varlen")])
def test_blocks_compile_as_one_graph_for_all_packings(tmp_path, method, inner):
    folder = write_golden(tmp_path, "gemma3_text", initializer_range=0.2)
    assert run(compiled, 2, folder, method, inner) == [(True, 2)] * 2  # one for each kind of attention


def lines(rank: int, world: int, folder: Path) -> list[str]:
    mesh = Mesh.build(ParallelConfig(context=world), torch.device("cpu"))
    found = []
    for method in ("auto", "ring"):
        net = build(Arch.from_folder(folder))
        found += context.wrap(net, mesh, method)
        found += [block.self_attn.backend.name for block in net.model.layers[:1]]
    return found


def test_the_report_says_who_attends_how(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": VOCAB}))
    plain = ["context: 2 ranks share a row, ulysses", "ulysses around sdpa", "context: 2 ranks share a row, ring", "ring around sdpa"]
    assert run(lines, 2, tmp_path) == [plain] * 2
    windows = run(lines, 2, write_golden(tmp_path / "windows", "gemma3_text"))
    assert [found[2] for found in windows] == ["context: 2 ranks share a row, ring (allgather in layers with a window)"] * 2


def losses(rank: int, world: int, folder: Path, axes: dict) -> dict:
    mesh = Mesh.build(ParallelConfig(**axes), torch.device("cpu"))
    net = model(folder, mesh, False, "none")
    batches = [replace(row, group={"source": torch.arange(24) % 3}) for row in rows(193, 2)]
    mine = [context.split(row, mesh) for row in batches[mesh.data_rank :: mesh.data_size]]
    return evaluate(net, mine, ("a", "b", "c"), mesh.sum_over_data, mesh.device)


def test_evaluation_is_the_same_by_source(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": VOCAB, "initializer_range": 0.2}))
    (want,) = run(losses, 1, tmp_path, {})
    assert len({round(x, 3) for x in want["eval_sources"].values()}) == 3
    for axes in ({"context": 4}, {"context": 2, "tensor": 2}, {"context": 2, "shard": 2}):
        for found in run(losses, 4, tmp_path, axes):
            assert found["eval_tokens"] == want["eval_tokens"]
            assert found["eval_loss"] == pytest.approx(want["eval_loss"], rel=1e-6)
            assert found["eval_sources"] == pytest.approx(want["eval_sources"], rel=1e-6)


def test_a_run_sees_the_same_packs_and_counts(tmp_path):
    """train.py on one rank, and on four that share each row: the records are the same."""
    folder, data = write_model(tmp_path / "model"), write_chats(tmp_path / "data.jsonl", 60)
    records = []
    for world, layout in ((1, ""), (4, '[parallel]\ncontext = 2\ntensor = 2\ncontext_method = "ring"\n')):
        out = tmp_path / f"out{world}"
        extra = f"[train]\nsteps = 4\naccumulate = 2\n[eval]\nsplit = 8\n[optim]\nlr = 3e-3\n[log]\nevery = 1\n{layout}"
        config = write_config(tmp_path / f"{world}.toml", folder, data, out, extra)
        ranks = launch.run(["--config", str(config), "--data.tokens=131"], world, tmp_path / f"logs{world}")
        assert ranks.wait() == [0] * world, ranks.output()
        records.append([r for r in read(out / "metrics.jsonl") if "loss" in r or "eval_loss" in r])
    assert len(records[0]) == len(records[1]) == 5
    for one, four in zip(*records):
        for key in {"step", "tokens", "epoch", "lr", "eval_tokens"} & one.keys():
            assert one[key] == four[key]
        for key in {"loss", "grad_norm", "eval_loss"} & one.keys():
            assert four[key] == pytest.approx(one[key], rel=1e-4)


# -- what is refused -------------------------------------------------------------------------------------------------------


def arch(folder: Path, **changes: object) -> Arch:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": VOCAB} | changes))
    return Arch.from_folder(folder)


@pytest.mark.parametrize(
    "layout,message",
    [
        (
            {"context": 8, "context_method": "ulysses"},
            r"parallel.context=8 of ulysses does not divide the 4 attention heads \(tiny\), "
            "as parallel.context_method=allgather need not; use parallel.context=4",
        ),
        (
            {"context": 4, "tensor": 2, "context_method": "ulysses"},
            "parallel.context=4 of ulysses does not divide the 2 attention heads of each of 2 tensor ranks .*; use parallel.context=2",
        ),
        ({"tensor": 4}, "parallel.tensor=4 does not divide num_key_value_heads=2"),
    ],
)
def test_layouts_that_cannot_share_are_refused(tmp_path, layout, message):
    cfg = ParallelConfig(**layout)
    axes = sizes(cfg, cfg.context * cfg.tensor)
    with pytest.raises(ConfigError, match=message):
        check(Sections(cfg), axes, arch(tmp_path / "tiny", vocab_size=96), None)


def test_what_works_is_not_refused(tmp_path):
    tiny = arch(tmp_path / "tiny")
    ring, ulysses = {"context_method": "ring"}, {"context_method": "ulysses"}
    for layout in ({}, {"context": 8}, {"context": 8} | ring, {"context": 4} | ulysses, {"context": 2, "tensor": 2}, {"tensor": 2}):
        cfg = ParallelConfig(**layout)
        check(Sections(cfg), sizes(cfg, cfg.context * cfg.tensor), tiny, LoraConfig())
    check(Sections(), sizes(ParallelConfig(), 4), tiny, LoraConfig(dropout=0.1))


def test_dropout_is_refused_where_ranks_share_a_row(tmp_path):
    cfg = ParallelConfig(context=2, tensor=2)
    with pytest.raises(ConfigError, match=r"lora.dropout=0.1 does not work with parallel.context=2; use lora.dropout=0"):
        check(Sections(cfg), sizes(cfg, 4), arch(tmp_path / "tiny"), LoraConfig(dropout=0.1))
