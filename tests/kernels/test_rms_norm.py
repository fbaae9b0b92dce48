"""RMSNorm and RMSNorm of a sum: Triton and torch against the obvious twin; every subset of gradients, rows with gaps, odd sizes."""

from __future__ import annotations

import itertools

import pytest
import torch

from kernels import rms_norm as op
from tests.kernels.close import HALF_BOUND, close, gradients, spread


@pytest.mark.parametrize("impl", op.IMPLS)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("shape", [(5, 64), (3, 2, 33), (300, 40), (1, 7)])
def test_like_the_twin(impl, offset, shape):
    for dx, dw in [(True, True), (True, False), (False, True)]:
        x, w, g = spread(*shape), spread(shape[-1]), spread(*shape)
        found = gradients(lambda x, w: op.rms_norm(x, w, 1e-5, offset, impl), (x, w), (dx, dw), (g,))
        want = gradients(lambda x, w: op.rms_norm_ref(x, w, 1e-5, offset), (x, w), (dx, dw), (g,))
        close(found, want)


@pytest.mark.parametrize("impl", op.IMPLS)
@pytest.mark.parametrize("offset", [False, True])
def test_of_a_sum(impl, offset):
    def ref(x, add, w):
        total = x + add
        return total, op.rms_norm_ref(total, w, 1e-6, offset)

    for needs in itertools.product((True, False), repeat=3):
        if not any(needs):
            continue
        tensors, g = (spread(7, 48), spread(7, 48), spread(48)), (spread(7, 48), spread(7, 48))
        found = gradients(lambda x, add, w: op.add_rms_norm(x, add, w, 1e-6, offset, impl), tensors, needs, g)
        close(found, gradients(ref, tensors, needs, g))


@pytest.mark.parametrize("columns", [40, 1300])
def test_rows_that_are_read_again_for_the_weight(columns, monkeypatch):
    """More rows than there are partial sums, columns that fill no block."""
    monkeypatch.setattr(op, "TOGETHER", 32)
    monkeypatch.setattr(op, "PARTS", 3)
    tensors, g = (spread(7, columns), spread(7, columns), spread(columns)), (spread(7, columns), spread(7, columns))

    def ref(x, add, w):
        return x + add, op.rms_norm_ref(x + add, w, 1e-5, True)

    found = gradients(lambda x, add, w: op.add_rms_norm(x, add, w, 1e-5, True, "triton"), tensors, (True,) * 3, g)
    close(found, gradients(ref, tensors, (True,) * 3, g))


def test_rows_with_gaps_between():
    wide, g = spread(6, 100), spread(6, 96)[:, 16:80]
    x = wide[:, 20:84]
    assert not x.is_contiguous() and not g.is_contiguous()
    w = spread(64)
    found = gradients(lambda x, w: op.rms_norm(x, w, 1e-5, False, "triton"), (x, w), (True, True), (g,))
    close(found, gradients(lambda x, w: op.rms_norm_ref(x, w, 1e-5), (x, w), (True, True), (g,)))


def test_half_precision_rounds_where_the_twin_does():
    for offset in (False, True):
        x, w = spread(9, 64).bfloat16(), spread(64).bfloat16()
        found, want = op.rms_norm(x, w, 1e-5, offset, "triton"), op.rms_norm_ref(x, w, 1e-5, offset)
        close([found], [want], HALF_BOUND)


def test_no_rows():
    x, w = spread(0, 16).requires_grad_(), spread(16).requires_grad_()
    op.rms_norm(x, w, 1e-5, False, "triton").sum().backward()
    assert x.grad.shape == (0, 16) and torch.equal(w.grad, torch.zeros_like(w))


def test_operators_are_well_formed():
    x, w = spread(4, 16), spread(16)
    _, _, r = op._forward_triton(x, x, w, 1e-5, True)
    torch.library.opcheck(op._forward_triton, (x, x, w, 1e-5, True))
    torch.library.opcheck(op._forward_triton, (x, None, w, 1e-5, False))
    torch.library.opcheck(op._backward_triton, (x, None, x, r, w, True, True))
    torch.library.opcheck(op._backward_triton, (x, x, x, r, w, False, False))
