"""What a step minimizes: label smoothing and z-loss in the gradient, the plain cross-entropy in the number, on any layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.batch import IGNORE, Batch
from objective import lm
from objective.config import LmConfig
from parallel import context
from parallel.config import ParallelConfig
from parallel.local import run
from parallel.mesh import Mesh
from runtime.errors import ConfigError
from tests.model.golden import distance
from tests.parallel.test_layouts import VOCAB, grads, model, rows
from tests.tiny import LLAMA

MORE = LmConfig(label_smoothing=0.2, z_loss=0.03)
ROW = rows(320, 1)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("objective")
    (path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": VOCAB, "initializer_range": 0.2}))
    return path


def step(net, row: Batch, cfg: LmConfig) -> tuple[float, dict[str, torch.Tensor]]:
    net.zero_grad()
    loss = lm.loss(net, row.to("cpu"), 100.0, cfg)
    loss.backward()
    return loss.item(), grads(net)


def test_gradients_are_of_the_objective_and_the_number_is_cross_entropy(folder):
    net = model(folder, None, False, "none")
    plain, other = step(net, ROW, LmConfig())
    number, found = step(net, ROW, MORE)
    assert number == pytest.approx(plain, rel=1e-6) and plain > 1
    net.zero_grad()
    learned = ROW.labels != IGNORE
    logits, labels = net(ROW, logits_at=learned.nonzero()[:, 0]), ROW.labels[learned]
    smoothed = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=MORE.label_smoothing)
    ((smoothed + MORE.z_loss * logits.logsumexp(-1).square().sum()) / 100).backward()
    for name, want in grads(net).items():
        assert distance(found[name], want) < 1e-5 and distance(other[name], want) > 1e-2, name


def shared(rank: int, world: int, folder: Path, want: dict[str, torch.Tensor]) -> tuple[float, float]:
    """The loss of all ranks, and the worst error of a gradient."""
    mesh = Mesh.build(ParallelConfig(tensor=2, context=2), torch.device("cpu"))
    loss, found = step(model(folder, mesh, False, "none"), context.split(ROW, mesh), MORE)
    worst = torch.tensor([distance(found[name], g) for name, g in want.items()]).max().item()
    return mesh.sum_over_data(torch.tensor(loss, dtype=torch.float64)).item(), worst


def test_ranks_that_share_rows_and_the_vocabulary_minimize_the_same(folder):
    loss, want = step(model(folder, None, False, "none"), ROW, MORE)
    assert min(g.norm() for g in want.values()) > 1e-4
    for each, worst in run(shared, 4, folder, want):
        assert each == pytest.approx(loss, rel=1e-5) and worst < 1e-5


def shares(rank: int, world: int) -> list[int | None]:
    mesh, there = Mesh.build(ParallelConfig(context=world), torch.device("cpu")), ROW.to("cpu")
    return [context.split(there, mesh).targets, context.split(there, mesh).to("cpu").targets, there.targets]


def test_targets_are_counted_on_the_way_to_the_device():
    assert ROW.targets is None
    assert ROW.to("meta").targets == ROW.to("meta").to("meta").targets == lm.count(ROW) > 100
    assert replace(ROW, labels=torch.full_like(ROW.labels, IGNORE)).to("cpu").targets == 0
    found = run(shares, 2)
    assert [each[0] for each in found] == [None, None], "a part of a row has another number"
    assert found[0][1] + found[1][1] == lm.count(ROW) and 0 < found[0][1] < lm.count(ROW)


@pytest.mark.parametrize(
    ("key", "value"),
    [("label_smoothing", 1.0), ("label_smoothing", -0.1), ("z_loss", -1e-4), ("z_loss", float("inf")), ("z_loss", float("nan"))],
)
def test_refused(key, value):
    with pytest.raises(ConfigError, match=f"{key}="):
        LmConfig(**{key: value})
