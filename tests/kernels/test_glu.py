"""act(gate) * up: Triton and torch against the obvious twin; every activation, every subset of gradients, rows with gaps."""

from __future__ import annotations

import pytest
import torch

from kernels import glu as op
from tests.kernels.close import HALF_BOUND, close, gradients, spread


@pytest.mark.parametrize("impl", op.IMPLS)
@pytest.mark.parametrize("act", op.ACT)
@pytest.mark.parametrize("shape", [(3, 64), (2, 2, 33), (2, 1300)])
def test_like_the_twin(impl, act, shape):
    for needs in [(True, True), (True, False), (False, True)]:
        tensors, g = (3 * spread(*shape), spread(*shape)), (spread(*shape),)
        found = gradients(lambda a, b: op.glu(a, b, act, impl), tensors, needs, g)
        close(found, gradients(lambda a, b: op.glu_ref(a, b, act), tensors, needs, g))


@pytest.mark.parametrize("impl", op.IMPLS)
def test_the_backward_makes_the_result_again(impl):
    gate, up, g = spread(4, 40), spread(4, 40), spread(4, 40)
    dgate, dup, y = op.backward(g, gate, up, "silu", True, impl)
    close([y], [op.glu_ref(gate, up, "silu")])
    assert op.backward(g, gate, up, "silu", False, impl)[2] is None
    close([dgate, dup], gradients(lambda a, b: op.glu_ref(a, b, "silu"), (gate, up), (True, True), (g,))[1:])


def test_halves_of_one_buffer():
    both, g = spread(5, 96), spread(5, 96)[:, ::2]
    gate, up = both.chunk(2, -1)
    found = gradients(lambda a, b: op.glu(a, b, "gelu", "triton"), (gate, up), (True, True), (g,))
    close(found, gradients(lambda a, b: op.glu_ref(a, b, "gelu"), (gate, up), (True, True), (g,)))


def test_half_precision():
    gate, up = spread(5, 64).bfloat16(), spread(5, 64).bfloat16()
    close([op.glu(gate, up, "silu", "triton")], [op.glu_ref(gate, up, "silu")], HALF_BOUND)


def test_operators_are_well_formed():
    x = spread(4, 16)
    torch.library.opcheck(op._forward_triton, (x, x, "silu"))
    for again in (False, True):
        torch.library.opcheck(op._backward_triton, (x, x, x, "silu", again))
