"""Kernels of norm and feed-forward against their twins, and what a block keeps for the backward."""

from __future__ import annotations

import itertools

import pytest
import torch

from kernels.glu import ACT, glu, glu_ref
from kernels.rms_norm import rms_norm, rms_norm_ref
from model.arch import Arch
from model.config import KernelsConfig
from model.transforms.ops import install
from tests.model.golden import distance, fresh, rows, write_config

SHAPES = [(5, 123), (3, 7, 16), (1, 3), (0, 8)]
BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1.2e-2}


def random(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g, dtype=torch.float64).mul(2).to(dtype).requires_grad_() for s in shapes]


def compare(ours, twin, leaves: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Output and gradients of `ours` against the twin in fp64, for every subset of leaves that want one."""
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = twin(*exact)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(expected, exact, upstream)
    for needs in itertools.product((False, True), repeat=len(leaves)):
        inputs = [x.detach().clone().requires_grad_(n) for x, n in zip(leaves, needs)]
        out = ours(*inputs)
        assert out.dtype == dtype and out.shape == expected.shape and out.requires_grad == any(needs)
        if not out.numel():
            continue
        assert distance(out, expected) < BOUNDS[dtype]
        if any(needs):
            out.backward(upstream.to(dtype))
        for x, n, g in zip(inputs, needs, grads):
            assert (x.grad is not None) == n
            assert not n or (x.grad.dtype == x.dtype and distance(x.grad, g) < BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape,offset", list(itertools.product(SHAPES, (False, True))))
def test_rms_norm(shape, offset, dtype):
    x, w = random(shape, shape[-1:], dtype=dtype)
    compare(lambda x, w: rms_norm(x, w, 1e-3, offset), lambda x, w: rms_norm_ref(x, w, 1e-3, offset), [x, w], dtype)
    half = random(shape, dtype=torch.bfloat16)[0]
    assert torch.equal(rms_norm(half, w, 1e-3, offset), rms_norm_ref(half, w, 1e-3, offset))  # fp32 master, bf16 input


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape,act", list(itertools.product(SHAPES, ACT)))
def test_glu(shape, act, dtype):
    compare(lambda a, b: glu(a, b, act), lambda a, b: glu_ref(a, b, act), random(shape, shape, dtype=dtype), dtype)


def test_gradcheck():
    x, w, gate, up = random((4, 6), (6,), (4, 6), (4, 6))
    for offset in (False, True):
        assert torch.autograd.gradcheck(lambda x, w, o=offset: rms_norm(x, w, 1e-3, o), (x, w))
    for act in ACT:
        assert torch.autograd.gradcheck(lambda a, b, act=act: glu(a, b, act), (gate, up))


def test_views_in_and_expanded_gradients_back():
    (whole,) = random((6, 4, 10))
    (w,) = random((5,))
    view = whole[1:, 2, :5]
    (a,) = torch.autograd.grad(rms_norm(view, w, 1e-3).sum(), whole)
    (b,) = torch.autograd.grad(rms_norm_ref(view, w, 1e-3).sum(), whole)
    assert distance(a, b) < 1e-13
    (a,) = torch.autograd.grad(glu(view, whole[1:, 3, 5:], "silu").sum(), whole)
    (b,) = torch.autograd.grad(glu_ref(view, whole[1:, 3, 5:], "silu").sum(), whole)
    assert distance(a, b) < 1e-13


def test_what_a_block_keeps(tmp_path):
    """Per slot: inputs and outputs of two norms, q, k, v and what attention made of them, gate, up and their product."""
    arch = Arch.from_folder(write_config(tmp_path, "llama"))
    net, row = fresh(arch), rows(arch)
    install(net, KernelsConfig("varlen", blocks="separate"), "cpu", torch.float32)

    def count(blocks: int) -> int:
        """Numbers kept by the model with so many blocks: every storage once, parameters aside."""
        del net.model.layers[blocks:]
        parameters, kept = {p.data_ptr() for p in net.parameters()}, {}

        def keep(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes() // 4
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = net(row)
        assert out.requires_grad
        return sum(kept.values())

    per_block = count(2) - count(1)
    hidden, width = arch.hidden_size, arch.intermediate_size
    kv = arch.num_key_value_heads * arch.head_dim
    per_slot = 4 * hidden + 2 * hidden + 2 * kv + 3 * width
    statistics = 2 + arch.num_attention_heads  # of norms and softmax
    assert per_block == row.tokens.numel() * (per_slot + statistics)
