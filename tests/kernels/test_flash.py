"""Packed attention in Triton against the obvious twin and against the other backends' twins, in tiles smaller than the row."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from kernels import attention, launch
from kernels import flash as op
from model.arch import Arch, Kind
from model.attention import AttnContext, Borders
from model.backends import TRITON
from model.config import KernelsConfig
from model.decoder import Row
from model.transforms.ops import install
from parallel import context
from parallel.local import run
from tests.kernels.close import HALF_BOUND, close, device, error, gradients, spread
from tests.model.golden import fresh, rows, write_config

BORDERS = [0, 1, 1, 9, 48, 53, 53]  # longer and shorter than a tile, empty ones, the end repeated
CASES = {  # borders among queries, among keys (None: the same), window
    "documents": (BORDERS, None, 0),
    "one document": ([0, 70], None, 0),
    "window": (BORDERS, None, 5),
    "window of one": ([0, 20, 40], None, 1),
    "window in a long document": ([0, 80], None, 40),
    "cut": ([0, 0, 0, 3, 30, 30], [0, 1, 6, 17, 53, 60], 0),  # documents with keys and no queries, queries late in documents
    "cut, window": ([0, 0, 0, 3, 30, 30], [0, 1, 6, 17, 53, 60], 7),
}
KINDS = (Kind(), Kind("window", 5))
FULL = {"softcap": 2.0, "sinks": True}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of a few slots, and not square, so that every row has many."""
    small = {"forward": op.Tiles(16, 32, 4, 1), "dq": op.Tiles(32, 16, 4, 1), "dkv": op.Tiles(16, 32, 4, 1)}
    monkeypatch.setattr(op, "tiles", lambda kernel, *_: small[kernel])


def seen_in(name: str) -> op.Spans:
    borders, keys, window = CASES[name]
    cu, cu_keys = (torch.tensor(x, dtype=torch.int32, device=device()) for x in (borders, keys or borders))
    return op.spans(borders[-1], (keys or borders)[-1], cu, cu_keys, window)


def inputs(seen: op.Spans, heads: int, kv_heads: int, columns: int) -> list[torch.Tensor]:
    """q, k, v, sinks, and a gradient."""
    slots, keys = len(seen.lo), len(seen.first)
    sizes = ((slots, heads), (keys, kv_heads), (keys, kv_heads))
    return [*(spread(*size, columns) for size in sizes), spread(heads), spread(slots, heads, columns)]


def compare(seen: op.Spans, heads: int, kv_heads: int, columns: int, softcap: float = 0.0, sinks: bool = False, needs=(True,) * 4) -> None:
    *tensors, grad = inputs(seen, heads, kv_heads, columns)
    needs = (*needs[:3], needs[3] and sinks)
    scale = columns**-0.5

    def attend(function):
        return lambda q, k, v, s: function(q, k, v, seen, scale, softcap, s if sinks else None)

    found = gradients(attend(op.flash), tensors, needs, (grad,))
    close(found, gradients(attend(lambda *args: op.flash_ref(*args)[0]), tensors, needs, (grad,)))


@pytest.mark.parametrize("more", [{}, FULL], ids=["plain", "capped, sinks"])
@pytest.mark.parametrize("name", CASES)
def test_like_the_twin(name, more):
    if name == "window of one" and not more:
        more = {"sinks": True}  # a softmax over one key has no gradient
    compare(seen_in(name), 4, 2, 16, **more)


@pytest.mark.parametrize("heads,kv_heads,columns", [(3, 1, 24), (2, 2, 80), (1, 1, 5)])
def test_any_size_and_group(heads, kv_heads, columns):
    compare(seen_in("documents"), heads, kv_heads, columns)


def test_programs_of_their_own_for_dk_and_dv(monkeypatch):
    monkeypatch.setattr(op, "BOTH", 0)
    compare(seen_in("window"), 2, 1, 16, softcap=2.0)


def test_every_subset_of_gradients():
    cu = torch.tensor([0, 3, 20], dtype=torch.int32, device=device())
    seen = op.spans(20, 20, cu, cu, 9)
    for needs in itertools.product((True, False), repeat=4):
        if any(needs):
            compare(seen, 2, 1, 16, sinks=True, needs=needs)
    for softcap, sinks in ((2.0, False), (0.0, True)):
        compare(seen, 2, 1, 16, softcap, sinks)


@pytest.mark.parametrize("name", CASES)
def test_spans_say_what_the_other_backends_see(name):
    """Output, and gradients, against kernels/attention.py, which makes its mask from the borders."""
    borders, keys, window = CASES[name]
    q, k, v, _, grad = inputs(seen_in(name), 4, 2, 8)
    found = gradients(lambda *x: op.flash_ref(*x, seen_in(name), 0.3)[0], (q, k, v), (True,) * 3, (grad,))
    want = gradients(lambda *x: attention.varlen_ref(*x, borders, window, 0.3, keys), (q, k, v), (True,) * 3, (grad,))
    for f, w in zip(found, want):  # a window of one key has no gradient of its score
        assert (f - w).norm() < 1e-5 * max(1.0, w.norm())
    assert min(want[0].norm(), want[3].norm()) > 1


@pytest.mark.parametrize("name", CASES)
def test_spans_of_keys_are_those_of_queries_turned_around(name):
    seen = seen_in(name)
    at, t = (torch.arange(len(x), device=x.device) for x in (seen.first, seen.lo))
    by_query = (at >= seen.lo[:, None]) & (at < seen.hi[:, None])
    by_key = (t[:, None] >= seen.first) & (t[:, None] < seen.end)
    assert torch.equal(by_query, by_key) and by_query.any(1).all() and not by_query.all()
    assert all(x.dtype == torch.int32 and (x.diff() >= 0).all() for x in seen)


@pytest.mark.parametrize("causal", [True, False])
def test_partial_attention(causal):
    """Some keys of each document, or none; log-sum-exp, and the gradients' share for given results of all keys."""
    borders, keys = (BORDERS, BORDERS) if causal else ([0, 5, 5, 29, 40], [0, 0, 4, 31, 50])
    cu, cu_keys = (torch.tensor(x, dtype=torch.int32, device=device()) for x in (borders, keys))
    q, k, v, grad = (spread(n, heads, 16) for n, heads in ((borders[-1], 4), (keys[-1], 2), (keys[-1], 2), (borders[-1], 4)))
    args = (cu, cu_keys, 60, 60, causal, 0.3)
    out, lse = op.partial(q, k, v, *args)
    want, want_lse = attention.partial_ref(q, k, v, *args)
    reached = want_lse.isfinite()
    assert reached.all() == causal and torch.equal(reached, lse.isfinite())
    close((out, lse[reached]), (want, want_lse[reached]))
    assert not out[~reached].any() and (lse[~reached] == float("-inf")).all()
    whole = torch.logaddexp(want_lse, torch.ones_like(want_lse))  # as if there were other keys too
    found = op.partial_backward(grad, q, k, v, want, whole, *args)
    close(found, attention.partial_backward_ref(grad, q, k, v, want, whole, *args))


def test_slices_of_one_tensor_and_an_expanded_gradient():
    seen = seen_in("window")
    fused, _, _, _, grad = inputs(seen, 8, 1, 16)
    grad = grad[:, :1, :1].expand(-1, 4, 16)
    found = gradients(lambda x: op.flash(*x.split([4, 2, 2], 1), seen, 0.3), (fused,), (True,), (grad,))
    close(found, gradients(lambda x: op.flash_ref(*x.split([4, 2, 2], 1), seen, 0.3)[0], (fused,), (True,), (grad,)))
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in fused.split([4, 2, 2], 1)]
    close([op.flash(*turned, seen, 0.3)], found[:1])


def test_half_precision():
    seen = seen_in("documents")
    *tensors, _, grad = (x.bfloat16() for x in inputs(seen, 4, 2, 16))
    exact = [x.float() for x in (*tensors, grad)]
    found = gradients(lambda *x: op.flash(*x, seen, 0.3), tensors, (True,) * 3, (grad,))
    want = gradients(lambda *x: op.flash_ref(*x, seen, 0.3)[0], exact[:3], (True,) * 3, exact[3:])
    assert all(x.dtype == torch.bfloat16 for x in found)
    close([x.float() for x in found], want, max(HALF_BOUND, 1e-2))  # p and ds are rounded before they are multiplied


def test_a_query_without_keys_and_a_row_without_slots():
    cu, cu_keys = (torch.tensor(x, dtype=torch.int32, device=device()) for x in ([0, 3, 20], [0, 0, 20]))
    seen = op.spans(20, 20, cu, cu_keys)
    q, k, v, sinks, grad = inputs(seen, 2, 1, 16)
    out, lse = op._forward(q, k, v, sinks, seen.lo, seen.hi, 0.3, 0.0)
    close([lse[:3]], [sinks.expand(3, -1)])
    assert not out[:3].any() and out[3:].any(-1).all()
    for softcap, s in ((0.0, None), (2.0, sinks)):
        found = op._backward(grad, q, k, v, s, *op._forward(q, k, v, s, seen.lo, seen.hi, 0.3, softcap), *seen, 0.3, softcap, True, True)
        assert all(x.isfinite().all() for x in found) and not found[0][:3].any()
    empty = [x[:0].requires_grad_() for x in (q, k, v)]
    none = op.spans(0, 0, cu * 0, cu * 0)
    op.flash(*empty, none, 0.3).sum().backward()
    assert all(x.grad.shape == x.shape for x in empty)
    _, dk, dv, _ = op._backward(q[:0], q[:0], k, v, None, q[:0], lse[:0], *op.spans(0, 20, cu * 0, cu), 0.3, 0.0, True, True)
    assert not dk.any() and not dv.any()


def test_backward_keeps_inputs_output_log_sum_exp_and_spans():
    seen, kept = seen_in("documents"), []
    q, k, v, *_ = inputs(seen, 4, 2, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = op.flash(q.requires_grad_(), k, v, seen, 0.3)
    assert {t.data_ptr() for t in kept} >= {t.data_ptr() for t in (q, k, v, out, *seen)}
    assert sum(t.nbytes for t in kept) == sum(t.nbytes for t in (q, k, v, out, *seen)) + 53 * 4 * 4


def test_operators_are_well_formed():
    cu, cu_keys = (torch.tensor(x, dtype=torch.int32, device=device()) for x in ([0, 0, 11], [0, 6, 20]))
    seen = op.spans(11, 20, cu, cu_keys)
    q, k, v, sinks, grad = inputs(seen, 2, 1, 16)
    for softcap, s, needs in ((0.0, None, (True, False)), (2.0, sinks, (False, True))):
        torch.library.opcheck(op._forward, (q, k, v, s, seen.lo, seen.hi, 0.3, softcap))
        out, lse = op._forward(q, k, v, s, seen.lo, seen.hi, 0.3, softcap)
        torch.library.opcheck(op._backward, (grad, q, k, v, s, out, lse, *seen, 0.3, softcap, *needs))


def test_one_graph_serves_all_packings():
    """And the same bits each time."""
    q, k, v, grad = (spread(24, heads, 16) for heads in (2, 1, 1, 2))

    def attend(q, k, v, ctx):
        return TRITON(q * 2, k, v, ctx, KINDS[1], 0.3)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for borders in ([0, 24, 24, 24], [0, 7, 9, 24], [0, 0, 20, 24]):
            ctx = AttnContext(Borders(24, torch.tensor(borders, dtype=torch.int32, device=device()), 24), [])
            TRITON.prepare(ctx, KINDS[1])
            pair = (gradients(lambda *x, f=f, c=ctx: f(*x, c), (q, k, v), (True,) * 3, (grad,)) for f in (compiled, attend))
            assert all(torch.equal(a, b) and a.norm() > 1 for a, b in zip(*pair))


def test_too_wide_a_head_is_refused():
    assert op.unsupported(256, torch.float32, torch.device(device())) is None
    assert op.unsupported(257, torch.float32, torch.device(device())) == "its tiles hold heads of up to 256 columns, not 257"


def test_a_model_computes_what_it_does_with_sdpa(tmp_path):
    """Windows, and a head size that flash attention does not take."""
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    changes = {"head_dim": 12, "initializer_range": 0.2, **layers}
    arch, found = Arch.from_folder(write_config(tmp_path, "gemma3_text", **changes)), []
    assert {kind.name for kind in arch.kinds} == {"full", "window"}
    row = Row(*(x.to(device()) if isinstance(x, torch.Tensor) else x for x in rows(arch)))
    for backend in ("triton", "sdpa"):
        net = fresh(arch).to(device())
        assert install(net, KernelsConfig(backend), device(), torch.float32)[0] == f"attention: {backend}"
        out = net(row)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in net.parameters())])
    close(*found)


ROW = [0, 1, 9, 29, 40, 40]


def row_inputs() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(40, n, 6, generator=g) for n in (2, 1, 1, 2)]


def shared_row(rank: int, world: int, want: list[list[torch.Tensor]]) -> list[float]:
    """The worst error of this rank's output and gradients, by each way to share a row; one has a window."""
    slots, errors = torch.cat([torch.arange(a, b) for a, b in context.chunks_of(40, world, rank)]), []
    cu, (*tensors, grad) = torch.tensor(ROW, dtype=torch.int32), (x[slots] for x in row_inputs())
    for method, i in ((context.AllGather, 1), (context.Ring, 0), (context.Ulysses, 0)):
        backend, ctx = method(TRITON, dist.group.WORLD), AttnContext(Borders(40 // world, cu, 20), [])
        backend.prepare(ctx, KINDS[i])
        found = gradients(lambda *x, b=backend, c=ctx, k=KINDS[i]: b(*x, c, k, 0.3), tensors, (True,) * 3, (grad,))
        errors.append(max(error(f, w[slots]) for f, w in zip(found, want[i])))
    return errors


def test_ranks_that_share_a_row_compute_what_one_does():
    if not launch.INTERPRETED:  # ranks share the CPU, so where there is a GPU, in a process that does not see it
        one = [sys.executable, "-m", "pytest", f"{__file__}::test_ranks_that_share_a_row_compute_what_one_does"]
        done = subprocess.run(one, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
        return
    *tensors, grad = row_inputs()
    want = [gradients(lambda *x, k=k: attention.varlen_ref(*x, ROW, k.size, 0.3), tensors, (True,) * 3, (grad,)) for k in KINDS]
    for errors in run(shared_row, 2, want):
        assert len(errors) == 3 and max(errors) < 1e-5, errors
