"""The chunked log-prob head against its twin that holds all logits."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.linear_logprob import linear_logprob, linear_logprob_ref
from tests.model.golden import distance

V, D = 123, 5


def inputs(rows: int, dtype: torch.dtype, scale: float = 1.0):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, D, generator=g, dtype=torch.float64) * scale
    weight = torch.randn(V, D, generator=g, dtype=torch.float64) * scale
    labels = torch.randint(0, V, (rows,), generator=g)
    labels[torch.rand(rows, generator=g) < 0.4] = -100
    upstream = torch.randn(rows, generator=g, dtype=torch.float64)  # any gradient, of either sign
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, upstream


def run(head, hidden, weight, labels, upstream, **kw):
    logp = head(hidden, weight, labels, **kw)
    return [logp.detach(), *torch.autograd.grad(logp, (hidden, weight), upstream.to(logp.dtype))]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("rows,budget", [(37, None), (37, 1), (200, 4 * V * 50)])  # one chunk; 16 rows each; 50 each
def test_forward_and_backward_equal_the_twin(softcap, rows, budget):
    exact = inputs(rows, torch.float64)
    expected = run(linear_logprob_ref, *exact, softcap=softcap)
    assert expected[0].dtype == torch.float64
    for a, b in zip(run(linear_logprob, *exact, softcap=softcap, budget=budget), expected):
        assert distance(a, b) < 1e-14
    for a, b in zip(run(linear_logprob, *inputs(rows, torch.float32), softcap=softcap, budget=budget), expected):
        assert a.dtype == torch.float32
        assert distance(a, b) < 1e-6


def test_bf16_is_no_worse_than_its_twin_and_gives_fp32():
    exact = run(linear_logprob_ref, *inputs(64, torch.float64))
    twin = run(linear_logprob_ref, *inputs(64, torch.bfloat16))
    ours = run(linear_logprob, *inputs(64, torch.bfloat16), budget=1)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == torch.bfloat16
    for a, b, e in zip(ours, twin, exact):
        assert distance(a, e) <= 1.1 * distance(b, e) + 1e-3


def test_an_fp32_master_gets_its_gradient_in_fp32():
    hidden, weight, labels, upstream = inputs(4096, torch.float32)
    half = hidden.detach().bfloat16().requires_grad_()
    exact = run(linear_logprob_ref, half.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), labels, upstream)
    _, dh, dw = run(linear_logprob, half, weight, labels, upstream, budget=1)  # 256 chunks: a bf16 sum would lose them
    assert dw.dtype == torch.float32 and dh.dtype == torch.bfloat16
    assert distance(dw, exact[2]) < 5e-3


def test_gradcheck():
    hidden, weight, labels, _ = inputs(9, torch.float64, 0.5)
    for softcap in (None, 1.5):
        assert torch.autograd.gradcheck(lambda h, w, c=softcap: linear_logprob(h, w, labels, c, 1), (hidden, weight))


def test_every_subset_of_gradients():
    full = run(linear_logprob, *inputs(37, torch.float64))
    for needs in itertools.product((False, True), repeat=2):
        hidden, weight, labels, upstream = inputs(37, torch.float64)
        hidden.requires_grad_(needs[0])
        weight.requires_grad_(needs[1])
        logp = linear_logprob(hidden, weight, labels, budget=1)
        assert logp.requires_grad == any(needs)
        if any(needs):
            logp.backward(upstream)
        for p, wanted, expected in zip((hidden, weight), needs, full[1:]):
            assert (p.grad is not None) == wanted
            assert p.grad is None or distance(p.grad, expected) < 1e-14


def test_ignored_rows_give_zero_and_get_nothing():
    hidden, weight, labels, upstream = inputs(37, torch.float64)
    logp, dh, _ = run(linear_logprob, hidden, weight, labels, upstream)
    assert torch.equal(logp == 0, labels < 0)
    assert torch.equal(dh.abs().sum(1) == 0, labels < 0)
    assert not any(x.any() for x in run(linear_logprob, hidden, weight, torch.full_like(labels, -100), upstream))
    poisoned = hidden.detach().clone()
    poisoned[labels < 0] = float("nan")  # on the CPU these rows are never read
    assert torch.equal(linear_logprob(poisoned, weight, labels), logp)


def test_no_rows():
    hidden, weight, labels, upstream = inputs(0, torch.float32)
    logp, dh, dw = run(linear_logprob, hidden, weight, labels, upstream)
    assert logp.shape == (0,) and dh.shape == (0, D) and not dw.any()


def test_large_logits_do_not_overflow():
    hidden, weight, labels, _ = inputs(20, torch.float32, 60.0)
    assert linear_logprob_ref(hidden, weight, labels).min() < -1000
    assert distance(linear_logprob(hidden, weight, labels), linear_logprob_ref(hidden, weight, labels)) < 1e-6


def test_never_holds_all_logits():
    """The largest tensor that any operation of forward and backward makes stays within a chunk (weight and hidden aside)."""
    rows, vocabulary = 2048, 1024
    hidden, weight = torch.randn(rows, D, requires_grad=True), torch.randn(vocabulary, D, requires_grad=True)
    labels = torch.randint(0, vocabulary, (rows,))
    sizes = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.update(t.numel() for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, torch.Tensor))
            return out

    with Watch():
        run(linear_logprob, hidden, weight, labels, torch.ones(rows), budget=4 * vocabulary * 32)
    assert max(sizes) == max(32 * vocabulary, rows * D)  # [T, V] would be 64 times 32 * V
