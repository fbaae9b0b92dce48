"""Rotary embedding of queries and keys, with and without norms: Triton and torch against the obvious twin."""

from __future__ import annotations

import itertools

import pytest
import torch

from kernels import rope as op
from tests.kernels.close import HALF_BOUND, close, device, gradients, spread


def tables(slots: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a packed row: positions start again in its middle."""
    positions = torch.cat((torch.arange(slots // 2), torch.arange(slots - slots // 2)))
    angle = positions[:, None, None] * torch.logspace(0, -2, size // 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1).to(device()), torch.cat((-sin, sin), -1).to(device())


@pytest.mark.parametrize("impl", op.IMPLS)
@pytest.mark.parametrize(("heads", "kv_heads", "size", "turned"), [(4, 2, 16, 16), (9, 3, 24, 24), (2, 1, 32, 8)])
def test_like_the_twin(impl, heads, kv_heads, size, turned):
    q, k, g = spread(5, heads, size), spread(5, kv_heads, size), (spread(5, heads, size), spread(5, kv_heads, size))
    cos, sin = tables(5, turned)
    found = gradients(lambda q, k: op.rope(q, k, cos, sin, impl=impl), (q, k), (True, True), g)
    close(found, gradients(lambda q, k: op.rope_ref(q, k, cos, sin), (q, k), (True, True), g))


@pytest.mark.parametrize("impl", op.IMPLS)
@pytest.mark.parametrize("offset", [False, True])
def test_with_norms(impl, offset):
    cos, sin = tables(6, 24)
    tensors = (spread(6, 9, 24), spread(6, 3, 24), spread(24), spread(24))
    g = (spread(6, 9, 24), spread(6, 3, 24))
    for needs in itertools.product((True, False), repeat=4):
        if not (needs[0] or needs[2]) or not (needs[1] or needs[3]):
            continue  # a result that needs nothing
        found = gradients(lambda q, k, v, w: op.rope(q, k, cos, sin, v, w, 1e-6, offset, impl), tensors, needs, g)
        close(found, gradients(lambda q, k, v, w: op.rope_ref(q, k, cos, sin, v, w, 1e-6, offset), tensors, needs, g))


def test_many_slots_share_a_program(monkeypatch):
    monkeypatch.setattr(op, "PARTS", 3)
    test_with_norms("triton", False)


def test_heads_with_gaps_between():
    wide = spread(5, 3, 40)
    q, k = wide[:, :2, 8:24], wide[:, 2:, 8:24]
    cos, sin = tables(5, 16)
    close(op.rope(q, k, cos, sin, impl="triton"), op.rope_ref(q, k, cos, sin))


def test_half_precision():
    cos, sin = (x.bfloat16() for x in tables(6, 16))
    tensors = [spread(6, 4, 16).bfloat16(), spread(6, 2, 16).bfloat16(), cos, sin, spread(16), spread(16), 1e-6]
    close(op.rope(*tensors, impl="triton"), op.rope_ref(*tensors), max(HALF_BOUND, 5e-3))  # the twin rounds three times


def test_operators_are_well_formed():
    q, k, w = spread(4, 3, 16), spread(4, 1, 16), spread(16)
    cos, sin = tables(4, 16)
    torch.library.opcheck(op._forward_triton, (q, k, cos, sin, w, w, 1e-6, True))
    torch.library.opcheck(op._forward_triton, (q, k, cos, sin, None, None, 0.0, False))
    torch.library.opcheck(op._backward_triton, (q, k, q, k, cos, sin, w, w, 1e-6, False, True))
    torch.library.opcheck(op._backward_triton, (q, k, None, None, cos, sin, None, None, 0.0, False, False))
