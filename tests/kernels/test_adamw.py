"""AdamW in one launch: to the bit like the twin in fp32, like torch.optim.AdamW within rounding; addresses, chunks, dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import adamw as op
from tests.kernels.close import HALF_BOUND, close, device

UPDATE = op.Update(lr=3e-2, beta1=0.9, beta2=0.99, eps=1e-6, step=4)
SIZES = [(3, 5), (1,), (0,), (op.BLOCK,), (2, op.BLOCK - 3), (0, 4), (op.BLOCK + 1,), (7,)]


def made(shapes=SIZES, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """Parameters, gradients, and moments as they are in the midst of a training."""
    some = [[torch.randn(shape, device=device()) for shape in shapes] for _ in range(4)]
    some[3] = [t.square() for t in some[3]]
    return [[t.to(dtype) for t in each] for each in some]


def copies(tensors: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[t.clone() for t in each] for each in tensors]


def decays(tensors: list[list[Tensor]]) -> list[float]:
    return [0.3 * (i % 2) for i in range(len(tensors[0]))]


def flat(tensors: list[list[Tensor]]) -> list[Tensor]:
    """Parameters, first and second moments, each as one vector."""
    return [torch.cat([t.flatten() for t in tensors[i]]) for i in (0, 2, 3)]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("shapes", [SIZES, [(16,), (4, 8), (op.BLOCK * 2,)]], ids=["odd", "aligned"])
def test_like_the_twin_to_the_bit(shapes, scale):
    found, factor = made(shapes), None if scale is None else torch.tensor(scale, device=device())
    want, before = copies(found), copies(found)
    op.adamw(*found, decays(found), factor, UPDATE)
    op.adamw_ref(*want, decays(want), factor, UPDATE)
    for f, w, b in zip(flat(found), flat(want), flat(before)):
        assert torch.equal(f, w) and ((f - b).abs() > 0).float().mean() > 0.9
    assert all(torch.equal(g, b) for g, b in zip(found[1], before[1])), "gradients are only read"


def test_like_torchs_over_fifty_steps():
    """With weight decay of some, a learning rate that changes, and clipping's factor."""
    shapes = [(3, 5), (op.BLOCK + 7,), (1,), (8,)]
    params = made(shapes)[0]
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(theirs, decays([theirs]))]
    torchs = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-6, fused=False, foreach=False)
    m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
    begun = torch.cat([p.flatten() for p in params])
    for step in range(1, 51):
        grads, scale = made(shapes)[1], torch.rand((), device=device())
        lr = 3e-3 / step**0.5
        op.adamw(params, grads, m, v, decays([params]), scale, op.Update(lr, 0.9, 0.99, 1e-6, step))
        for group, p, g in zip(torchs.param_groups, theirs, grads):
            group["lr"], p.grad = lr, g * scale
        torchs.step()
    found, want = flat([params, [], m, v]), flat([theirs, [], *([torchs.state[p][k] for p in theirs] for k in ("exp_avg", "exp_avg_sq"))])
    assert (found[0] - begun).norm() / begun.norm() > 0.01
    close(found, want, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_fp32(dtype):
    found = made([(33,), (op.BLOCK + 8,)], dtype)
    want, scale = copies(found), torch.tensor(0.5, device=device())
    op.adamw(*found, decays(found), scale, UPDATE)
    op.adamw_ref(*want, decays(want), scale, UPDATE)
    close(flat(found), flat(want), HALF_BOUND)


def test_tensors_anywhere():
    """Parts of larger tensors, which begin at odd addresses; nothing beside them is touched."""
    wide, sizes = made([(4 * op.BLOCK,)] * 2), (op.BLOCK + 5, 2)
    before = copies(wide)
    inside = [[t[3 + i : 3 + i + n] for i, (t, n) in enumerate(zip(each, sizes))] for each in wide]
    want = copies(inside)
    op.adamw(*inside, [0.0, 0.5], None, UPDATE)
    op.adamw_ref(*want, [0.0, 0.5], None, UPDATE)
    for now, then, part, right in zip(wide, before, inside, want):
        for i, n in enumerate(sizes):
            assert torch.equal(part[i], right[i])
            assert torch.equal(now[i][: 3 + i], then[i][: 3 + i]) and torch.equal(now[i][3 + i + n :], then[i][3 + i + n :])


def test_gradients_that_come_back_elsewhere():
    found = made([(op.BLOCK + 2,), (5,)])
    want = copies(found)
    for step in (1, 2, 3):
        grads = made([(op.BLOCK + 2,), (5,)])[1]  # the old ones are still there, as `found[1]`
        update = UPDATE._replace(step=step)
        op.adamw(found[0], grads, found[2], found[3], [0.1, 0.0], None, update)
        op.adamw_ref(want[0], grads, want[2], want[3], [0.1, 0.0], None, update)
    assert all(torch.equal(f, w) for f, w in zip(flat(found), flat(want)))


def test_the_table_is_made_again_only_for_other_addresses():
    found, other = made([(5,), (9,)]), made([(5,), (9,)])
    op._on_device.cache_clear()
    for _ in range(3):
        op.adamw(*found, [0.0, 0.0], None, UPDATE)
    assert op._on_device.cache_info().misses == 2, "the table and the weight decays"
    op.adamw(found[0], other[1], found[2], found[3], [0.0, 0.0], None, UPDATE)
    assert op._on_device.cache_info().misses == 3


def test_autograd_knows_of_the_change():
    found = made([(5,)])
    p = found[0][0].requires_grad_()
    y = (p * p).sum()
    with torch.no_grad():
        op.adamw(*found, [0.0], None, UPDATE)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_nothing_to_update():
    op.adamw(*made([(0,), (0, 3)]), [0.1, 0.1], None, UPDATE)


def test_what_has_no_plain_layout_is_an_error():
    found = made([(4, 6)])
    found[1][0] = found[1][0].t().contiguous().t()
    with pytest.raises(AssertionError):
        op.adamw(*found, [0.0], None, UPDATE)
