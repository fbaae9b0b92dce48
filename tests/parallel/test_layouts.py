"""Any layout gives the same loss and the same gradients.

Sixteen ragged documents, cut over (token budget, accumulation, replicate, shard, context, tensor) in every way, against one
row on one rank: the loss and every gradient to 1e-6 relative (fp32; 1e-5 where context or tensor cut sums). Full fine-tuning
and LoRA, with and without recomputation.

The full cross (`-m slow`) runs every combination; the default run covers every pair of choices.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from data.batch import IGNORE, Batch
from model import build
from model.arch import Arch
from model.config import KernelsConfig, LoraConfig
from model.transforms.lora import apply_lora
from model.transforms.ops import install
from model.transforms.trainable import apply_trainable
from model.weights import initialize, local, region
from objective import lm
from objective.evaluate import evaluate
from optim.clip import clip
from parallel import tensor
from parallel.apply import parallelize
from parallel.config import ParallelConfig, RecomputeConfig
from parallel.context import split
from parallel.fsdp import last_backward
from parallel.local import run
from parallel.mesh import AXES, Mesh
from tests.tiny import LLAMA, Sections

LENGTHS = (5, 31, 2, 17, 44, 1, 23, 9, 60, 12, 3, 28, 7, 38, 15, 20)  # 315 slots
VOCAB, DOCS, LONGEST = 97, 24, 64


def documents() -> list[tuple[Tensor, Tensor]]:
    """(tokens, shifted labels) of each document; prompts are masked, so documents weigh unequally."""
    g = torch.Generator().manual_seed(0)
    out = []
    for i, n in enumerate(LENGTHS):
        tokens = torch.randint(VOCAB, (n,), generator=g)
        labels = torch.cat([tokens[1:], torch.tensor([IGNORE])])
        labels[: (i % 4) * n // 5] = IGNORE
        out.append((tokens, labels))
    return out


def pack(docs: list[tuple[Tensor, Tensor]], budget: int, number: int) -> Batch:
    """Documents end to end in a row of `budget` slots; the rest is a pad document."""
    lengths = [len(t) for t, _ in docs]
    pad = budget - sum(lengths)
    assert pad >= 0
    lengths += [pad] if pad else []
    borders = torch.tensor([0, *lengths]).cumsum(0)
    borders = torch.cat([borders, torch.full((DOCS + 1 - len(borders),), budget)])
    return Batch(
        tokens=torch.cat([t for t, _ in docs] + [torch.zeros(pad, dtype=torch.int64)]),
        labels=torch.cat([lab for _, lab in docs] + [torch.full((pad,), IGNORE)]),
        positions=torch.cat([torch.arange(n) for n in lengths]).int() if lengths else torch.arange(0).int(),
        cu_seqlens=borders.int(),
        max_seqlen=max(LONGEST, budget),
        pack=number,
    )


def rows(budget: int, count: int) -> list[Batch]:
    """The documents over `count` rows of at most `budget` slots, first fit; rows may stay empty."""
    bins: list[list] = [[] for _ in range(count)]
    for doc in documents():
        place = next(b for b in bins if sum(len(t) for t, _ in b) + len(doc[0]) <= budget)
        place.append(doc)
    return [pack(b, budget, i) for i, b in enumerate(bins)]


def model(
    tmp: Path,
    mesh: Mesh | None,
    lora: bool,
    recompute: str | RecomputeConfig,
    dropout: float = 0.0,
    context_method: str = "auto",
    compute: torch.dtype = torch.float32,
    **sections: object,
):
    """As train.py makes it; `sections` of the config by name."""
    arch = Arch.from_folder(tmp)
    net = build(arch)
    cfg = LoraConfig(rank=4, dropout=dropout) if lora else None
    if cfg:
        apply_lora(net, cfg)
    net.compute_dtype = compute
    apply_trainable(net, cfg, compute, torch.float32)
    install(net, KernelsConfig(), "cpu", compute)
    if mesh is not None:
        again = RecomputeConfig(kind=recompute) if isinstance(recompute, str) else recompute
        sections = {"parallel": ParallelConfig(context_method=context_method), "recompute": again} | sections
        parallelize(net, mesh, Sections(**sections), compute, 192)
    net.to_empty(device="cpu")
    net.reset_buffers("cpu")
    initialize(net, 0)
    with torch.no_grad():  # LoRA's B starts at zero, which would hide errors in A
        for name, p in net.named_parameters():
            if name.endswith("lora_B.weight"):
                full = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
                part = p.to_local() if hasattr(p, "to_local") else p
                part.copy_(
                    full
                    if part is p
                    else torch.distributed.tensor.distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None).to_local()
                )
    return net


def backward(net, micro: list[Batch], units: int, seed: int | None = None, cfg: ParallelConfig | None = None) -> float:
    """Runs the micro-batches as train.py does; returns this rank's part of the loss."""
    from objective.lm import seed_dropout

    total = 0.0
    for i, batch in enumerate(micro):
        if seed is not None:
            seed_dropout(seed, batch.pack)
        last_backward(net, i == len(micro) - 1, cfg or ParallelConfig())
        loss = lm.loss(net, batch, units)
        loss.backward()
        total += loss.item()
    return total


def grads(net) -> dict[str, Tensor]:
    return {
        n: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
        for n, p in net.named_parameters()
        if p.requires_grad
    }


def error(found: Tensor, reference: Tensor) -> float:
    off = ((found - reference).norm() / reference.norm()).item()
    return off if math.isfinite(off) else math.inf  # max() passes over NaN


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": VOCAB, "initializer_range": 0.2}))
    return path


def reference(folder: Path, lora: bool) -> tuple[float, dict[str, Tensor]]:
    net = model(folder, None, lora, "none")
    batch = rows(320, 1)[0]
    loss = backward(net, [batch], lm.count(batch))
    found = grads(net)
    assert 1.0 < loss < 50.0
    assert all(g.norm() > 1e-4 for g in found.values()), {n: g.norm().item() for n, g in found.items()}
    return loss, found


def rank_errors(rank, world, folder, axes, accumulate, budget, lora, recompute, want, context_method="auto"):
    mesh = Mesh.build(ParallelConfig(**axes), torch.device("cpu"))
    net = model(folder, mesh, lora, recompute, context_method=context_method)
    micro = [split(row, mesh) for row in rows(budget, mesh.data_size * accumulate)[mesh.data_rank :: mesh.data_size]]
    units = int(mesh.sum_over_data(torch.tensor(sum(map(lm.count, micro)))))
    loss = float(mesh.sum_over_data(torch.tensor(backward(net, micro, units), dtype=torch.float64)))
    found = grads(net)
    assert found.keys() == want[1].keys()
    norm = clip([p for p in net.parameters() if p.requires_grad], 0.0)
    total = torch.stack([g.norm() for g in want[1].values()]).norm()
    return abs(loss - want[0]) / want[0], max(error(found[n], want[1][n]) for n in found), error(norm, total)


CASES = [  # (replicate, shard, context, tensor), accumulate, budget, lora, recompute
    ((1, 1, 1, 1), 1, 320, False, "full"),
    ((1, 1, 1, 1), 4, 96, True, "none"),
    ((1, 2, 1, 1), 1, 192, False, "none"),
    ((1, 2, 1, 1), 3, 64, True, "full"),
    ((2, 1, 1, 1), 2, 96, False, "full"),
    ((2, 1, 1, 1), 1, 320, True, "none"),
    ((1, 4, 1, 1), 2, 64, False, "full"),
    ((1, 4, 1, 1), 1, 96, True, "full"),
    ((2, 2, 1, 1), 1, 128, True, "none"),
    ((2, 2, 1, 1), 3, 64, False, "none"),
    ((4, 1, 1, 1), 1, 96, False, "none"),
    ((4, 1, 1, 1), 2, 64, True, "full"),
    ((1, 1, 1, 2), 1, 320, False, "none"),
    ((2, 1, 1, 2), 1, 192, True, "full"),
    ((1, 2, 1, 2), 2, 96, False, "full"),
    ((1, 1, 2, 1), 2, 192, True, "none"),
    ((1, 1, 4, 1), 1, 320, False, "full"),
    ((1, 2, 2, 1), 1, 192, False, "none"),
    ((2, 1, 2, 1), 2, 96, True, "full"),
    ((1, 1, 2, 2), 2, 192, False, "none"),
    ((1, 1, 2, 2), 1, 320, True, "full"),
]
BUDGETS = {1: (320,), 2: (192, 320), 3: (128, 192), 4: (96, 128), 6: (64, 96), 8: (64,), 12: (64,)}
CROSS = [
    ((r, s, c, t), k, budget, lora, recompute)
    for r, s in ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1))
    for c, t in ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2))
    if r * s * c * t <= 4
    for k in (1, 2, 3)
    for budget in BUDGETS[r * s * k]
    for lora in (False, True)
    for recompute in ("none", "full")
]


def check(folder, axes, accumulate, budget, lora, recompute):
    want = reference(folder, lora)
    named = dict(zip(AXES, axes))
    for loss, worst, norm in run(rank_errors, math.prod(axes), folder, named, accumulate, budget, lora, recompute, want):
        bound = 1e-6 if axes[2:] == (1, 1) else 1e-5  # sums over channels and keys are cut in another order there
        assert loss < bound
        assert worst < bound
        assert norm < bound


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_loss_and_gradients(folder, case):
    check(folder, *case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CROSS, ids=str)
def test_same_loss_and_gradients_full_cross(folder, case):
    check(folder, *case)


def dropout_grads(rank, world, folder, recompute, tensor, want):
    mesh = Mesh.build(ParallelConfig(tensor=tensor), torch.device("cpu"))
    net = model(folder, mesh, True, recompute, dropout=0.3)
    micro = [split(row, mesh) for row in rows(96, 4)[mesh.data_rank :: mesh.data_size]]
    backward(net, micro, 100, seed=7)
    found = grads(net)
    return max(error(found[n], want[n]) for n in found)


def test_dropout_depends_on_the_pack_not_on_the_layout(folder):
    net = model(folder, None, True, "none", dropout=0.3)
    backward(net, rows(96, 4), 100, seed=7)
    want = grads(net)
    other = model(folder, None, True, "none", dropout=0.3)
    backward(other, rows(96, 4), 100, seed=8)
    assert max(error(g, want[n]) for n, g in grads(other).items()) > 0.1  # the masks matter
    for world, recompute, split_over in ((2, "full", 1), (4, "none", 1), (2, "full", 2), (4, "none", 2)):
        assert max(run(dropout_grads, world, folder, recompute, split_over, want)) < 2e-6


def embedding_error(rank, world, folder, exact):
    mesh = Mesh.build(ParallelConfig(), torch.device("cpu"))
    net = model(folder, mesh, False, "none", compute=torch.bfloat16)
    backward(net, long_rows()[rank::world], 1000)
    return error(grads(net)["model.embed_tokens.weight"], exact)


def long_rows() -> list[Batch]:
    """Two rows in which few tokens occur thousands of times."""
    g = torch.Generator().manual_seed(0)
    docs = [(t := torch.randint(8, (64,), generator=g), torch.cat([t[1:], torch.tensor([IGNORE])])) for _ in range(2 * 23)]
    return [pack(docs[i::2], 23 * 64, i) for i in range(2)]


def test_bf16_gradients_are_as_exact_on_two_ranks_as_on_one(folder):
    net = model(folder, None, False, "none")
    backward(net, long_rows(), 1000)
    exact = grads(net)["model.embed_tokens.weight"]
    one, two = (max(run(embedding_error, world, folder, exact)) for world in (1, 2))
    assert 1e-4 < one < 2e-2
    assert two < 1.5 * one


def test_evaluation_has_no_dropout_and_leaves_training_on(folder):
    net = model(folder, None, True, "none", dropout=0.5).train()
    batches = [replace(b, group={"source": torch.zeros(DOCS, dtype=torch.int64)}) for b in rows(96, 4)]
    loss = evaluate(net, batches, ("all",), lambda sums: sums, torch.device("cpu"))["eval_loss"]
    assert net.training
    plain = model(folder, None, True, "none", dropout=0.0)
    want = sum(-float(plain(b).detach().sum()) for b in batches) / sum(map(lm.count, batches))
    assert loss == pytest.approx(want, rel=1e-6)
    with_dropout = sum(-float(net(b).detach().sum()) for b in batches) / sum(map(lm.count, batches))
    assert abs(with_dropout - want) > 1e-3


def where(rank: int, world: int, size: int, fsdp: int, rows: int) -> bool:
    """Does torch say of this rank's rows of a matrix, cut over tensor and then over fsdp ranks, what they are?"""
    mesh = Mesh.build(ParallelConfig(shard=fsdp, tensor=size), torch.device("cpu"))
    head = nn.Module()
    head.weight = nn.Parameter(torch.arange(2.0 * rows).view(rows, 2))
    tensor._place(head, {"weight": 0}, mesh.weights["tensor"])
    fully_shard(head, mesh=mesh.weights["fsdp"])
    mine, at = local(head.weight), region(head.weight)
    return mine.shape[0] == at[0].stop - at[0].start and torch.equal(mine[:, 0], 2.0 * torch.arange(at[0].start, at[0].stop))


UNEVEN = [(2, 4, 97, False), (2, 4, 100, True), (2, 2, 97, True), (4, 2, 51, True)]


@pytest.mark.parametrize(("size", "fsdp", "rows", "agree"), UNEVEN, ids=str)
def test_vocabularies_that_two_axes_cut_unevenly(size, fsdp, rows, agree):
    assert all(run(where, size * fsdp, size, fsdp, rows)) == agree == tensor._sizes_agree(rows, size, fsdp)
