"""Backends against each other, packed rows against separate documents, and the kernels against their obvious twins."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels import attention as kernel
from kernels.launch import INTERPRETED
from model.arch import Arch, Kind
from model.attention import AttnContext, Borders
from model.backends import SDPA, TRITON, VARLEN, choose
from model.config import KernelsConfig
from model.transforms.ops import install
from runtime.errors import ConfigError
from tests.model.golden import GOLDEN, distance, documents, fresh, rows, write_config

BORDERS = [0, 1, 1, 9, 48, 61, 61]


def inputs(heads: int, kv_heads: int, dtype: torch.dtype, borders: list[int] = BORDERS, size: int = 8):
    g = torch.Generator().manual_seed(0)
    shapes = [(borders[-1], n, size) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, grad = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def tensor(borders: list[int]) -> torch.Tensor:
    return torch.tensor(borders, dtype=torch.int32)


def varlen(q, k, v, borders: list[int], window: int, scale: float):
    return kernel.varlen_cpu(q, k, v, tensor(borders), borders[-1], window, scale)


def run(attend, q, k, v, grad, *args):
    out = attend(q, k, v, *args)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


@pytest.mark.parametrize("window", [0, 2, 3, 7, 40, 1000])
@pytest.mark.parametrize("heads,kv_heads", [(6, 2), (3, 3), (4, 1)])
def test_varlen_cpu_equals_its_twin(monkeypatch, window, heads, kv_heads):
    q, k, v, grad = inputs(heads, kv_heads, torch.float64)
    expected = run(kernel.varlen_ref, q, k, v, grad, BORDERS, window, 0.3)
    for tile in (kernel.TILE, 5):  # 5 queries a tile: many tiles, the last one ragged
        monkeypatch.setattr(kernel, "TILE", tile)
        for a, b in zip(run(varlen, q, k, v, grad, BORDERS, window, 0.3), expected):
            assert distance(a, b) < 1e-13


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_varlen_cpu_rounds_as_its_dtype(dtype, bound):
    borders = [0, 700, 1003]
    q, k, v, grad = inputs(4, 2, dtype, borders)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    for window in (0, 130):
        expected = run(kernel.varlen_ref, *exact, grad.double(), borders, window, 0.3)
        for a, b in zip(run(varlen, q, k, v, grad, borders, window, 0.3), expected):
            assert a.dtype == dtype
            assert distance(a, b) < bound


def test_varlen_cpu_takes_any_layout_and_an_expanded_gradient():
    q, k, v, _ = inputs(4, 2, torch.float64)
    fused = torch.cat([q, k, v], 1).detach().requires_grad_()
    split = varlen(*fused.split([4, 2, 2], 1), BORDERS, 3, 0.3)  # slices of one tensor, as a fused projection has
    whole = varlen(q, k, v, BORDERS, 3, 0.3)
    assert torch.equal(split, whole)
    (a,) = torch.autograd.grad((split * split.detach()).sum(), fused)
    b = torch.autograd.grad((whole * whole.detach()).sum(), (q, k, v))
    assert distance(a, torch.cat(b, 1)) < 1e-14
    assert torch.autograd.grad(varlen(q, k, v, BORDERS, 0, 0.3).sum(), v)[0].abs().sum() > 0


def test_gradcheck():
    q, k, v, _ = inputs(2, 1, torch.float64, [0, 3, 9], size=3)
    for window in (0, 2):
        assert torch.autograd.gradcheck(lambda q, k, v, w=window: varlen(q, k, v, [0, 3, 9], w, 0.5), (q, k, v))


def test_varlen_never_holds_a_square():
    total = 4096
    q, k, v, grad = inputs(1, 1, torch.float32, [0, total])
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                largest = max(largest, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    with Watch():
        run(varlen, q, k, v, grad, [0, total], 64, 0.3)
    assert total * 8 <= largest < total * total / 50


def test_masks_are_made_once_and_follow_borders():
    positions = torch.cat([torch.arange(n) for n in (1, 8, 39, 13)]).int()
    ctx = AttnContext(Borders(61, torch.tensor(BORDERS, dtype=torch.int32), 39), [])
    full, window = Kind(), Kind("window", 4)
    SDPA.prepare(ctx, full)
    made = ctx.masks[full]
    SDPA.prepare(ctx, full)
    SDPA.prepare(ctx, window)
    assert ctx.masks[full] is made
    assert made.sum(1).tolist() == (positions + 1).tolist()  # as many keys as its document has so far
    assert ctx.masks[window].sum(1).tolist() == (positions + 1).clamp(max=4).tolist()
    assert not (ctx.masks[window] & ~made).any()


OPS = torch.ops.salamander


@pytest.mark.parametrize("window", [0, 3])
def test_operators_keep_their_word(window):
    """Schema, fake kernels and the registered gradient, also of slices of one tensor and of a piece of a row."""
    q, k, v, grad = inputs(4, 2, torch.float32)
    sliced = torch.cat([q, k, v], 1).detach().requires_grad_().split([4, 2, 2], 1)
    turned = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (q, k, v)]
    cu = tensor(BORDERS)
    for leaves, borders in (((q, k, v), cu), (sliced, cu), (turned, cu), ((q[48:], k, v), (cu - 48).clamp(0))):
        args = (borders, cu, 40, 40, window, 0.3)
        torch.library.opcheck(OPS.varlen.default, (*(x.detach().requires_grad_() for x in leaves), *args))
        leaves = [x.detach() for x in leaves]
        out, lse = OPS.varlen(*leaves, *args)
        given = (grad[: len(out)], *leaves, out, lse, borders, cu, window, 0.3)
        torch.library.opcheck(OPS.varlen_backward.default, given)


def test_backward_keeps_inputs_output_log_sum_exp_and_borders():
    q, k, v, _ = inputs(4, 2, torch.bfloat16)
    cu, kept = tensor(BORDERS), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = kernel.varlen_cpu(q, k, v, cu, 61, 0, 0.3)
    assert {t.data_ptr() for t in kept} >= {t.data_ptr() for t in (q, k, v, out, cu)}
    assert [(t.dtype, tuple(t.shape)) for t in kept if t.dtype == torch.float32] == [(torch.float32, (61, 4))]
    assert sum(t.nbytes for t in kept) == sum(t.nbytes for t in (q, k, v, out, cu, cu)) + 61 * 4 * 4


def test_a_document_longer_than_said_is_noticed():
    q, k, v, _ = inputs(2, 1, torch.float32)
    with pytest.raises(AssertionError, match="39 tokens where none may be longer than 38"):
        kernel.varlen_cpu(q, k, v, tensor(BORDERS), 38, 0, 0.3)


def test_attention_ops_are_those_that_run():
    """What selective recomputation will look for is what the dispatcher sees."""
    from torch.utils._python_dispatch import TorchDispatchMode

    ops = kernel.attention_ops()
    assert {op.name() for op in ops} >= {"salamander::varlen", "aten::_scaled_dot_product_flash_attention", "torch_attn::_varlen_attn"}
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    q, k, v, _ = inputs(4, 2, torch.float32)
    for backend in (SDPA, VARLEN, TRITON) if INTERPRETED else (SDPA, VARLEN):
        ctx = AttnContext(Borders(61, tensor(BORDERS), 39), [])
        backend.prepare(ctx, Kind())
        seen.clear()
        with Watch():
            backend(q, k, v, ctx, Kind(), 0.3)
        assert len([f for f in seen if f in ops]) == 1, (backend.name, seen)


PACKINGS = [sorted([0, 96, *torch.randint(97, (6,), generator=torch.Generator().manual_seed(i)).tolist()]) for i in range(20)]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_one_graph_serves_all_packings(compiler):
    """A compiled function of packed attention, full and windowed: one graph, no break, no second compilation, equal gradients."""
    q, k, v, grad = inputs(4, 2, torch.float64, [0, 96])

    def attend(q, k, v, ctx):
        return sum(VARLEN(q * 2, k, v, ctx, kind, 0.3) for kind in (Kind(), Kind("window", 5)))

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(attend, backend=compiler, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for borders in PACKINGS:
            ctx = AttnContext(Borders(96, tensor(borders), 96), [])
            expected = run(lambda q, k, v, b=borders: sum(kernel.varlen_ref(q * 2, k, v, b, w, 0.3) for w in (0, 5)), q, k, v, grad)
            for a, b in zip(run(compiled, q, k, v, grad, ctx), expected):
                assert distance(a, b) < 1e-13
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


PARTS = {  # borders of the same documents among queries and among keys
    "same": (BORDERS, BORDERS),
    "none there": ([0, 5, 5, 9], [0, 0, 4, 11]),
    "one across": ([0, 20, 20, 20], [0, 13, 13, 13]),
    "before": ([0, 0, 6, 10], [0, 8, 12, 12]),
    "nothing": ([0, 7, 7], [0, 0, 5]),
}


def part(name: str, dtype: torch.dtype) -> tuple:
    """Inputs of a partial attention, and its arguments."""
    borders, keys = PARTS[name]
    g = torch.Generator().manual_seed(1)
    q, k, grad, v = (torch.randn(n, h, 8, generator=g, dtype=torch.float64).to(dtype) for n, h in ((borders[-1], 4), (keys[-1], 2)) * 2)
    return q, k, grad, v, (tensor(borders), tensor(keys), 40, 40)


@pytest.mark.parametrize("name,causal", [("same", True), *((name, False) for name in PARTS)])
def test_partial_attention_equals_its_twin(name, causal):
    q, k, grad, v, borders = part(name, torch.float64)
    args = (*borders, causal, 0.3)
    out, lse = kernel.partial(q, k, v, *args)
    want, want_lse = kernel.partial_ref(q, k, v, *args)
    assert (out - want).abs().max() < 1e-13
    reached = want_lse.isfinite()
    assert torch.equal(lse.isfinite(), reached)
    assert (lse - want_lse)[reached].abs().sum() < 1e-12
    assert torch.equal(out[~reached], torch.zeros_like(out[~reached]))
    whole = torch.logaddexp(want_lse, torch.ones_like(want_lse))  # as if there were other keys too
    found = kernel.partial_backward(grad, q, k, v, out, whole, *args)
    expected = kernel.partial_backward_ref(grad, q, k, v, out, whole, *args)
    assert name == "nothing" or min(x.norm() for x in (want, *expected)) > 0.1
    for a, b in zip(found, expected):
        assert (a - b).norm() < 1e-12 * max(1.0, b.norm())


@pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_parts_make_the_whole(dtype, bound):
    """The second half of a row: its own keys, causal, and those before, merged; gradients from the merged result."""
    q, k, v, grad = (x.detach() for x in inputs(4, 2, dtype))
    n, cu = 30, tensor(BORDERS)
    here, before = (cu - n).clamp(0), cu.clamp(max=n)
    parts = [(slice(n, 61), (here, here, 31, 31, True, 0.3)), (slice(n), (here, before, 31, n, False, 0.3))]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    want = kernel.varlen_ref(*exact, BORDERS, 0, 0.3)[n:]
    want_grads = torch.autograd.grad(want, exact, grad[n:].double())
    for forward, backward in ((kernel.partial, kernel.partial_backward), (kernel.partial_ref, kernel.partial_backward_ref)):
        (o1, m1), (o2, m2) = (forward(q[n:], k[keys], v[keys], *args) for keys, args in parts)
        assert m1.isfinite().all()
        assert not m2.isfinite().all()
        lse = torch.logaddexp(m1, m2)
        out = (o1 * (m1 - lse).exp()[..., None] + o2 * (m2 - lse).exp()[..., None]).to(dtype)
        assert distance(out, want) < bound
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for keys, args in parts:
            gq, dk[keys], dv[keys] = backward(grad[n:], q[n:], k[keys], v[keys], out, lse, *args)
            dq[n:] += gq
        for a, b in zip((dq, dk, dv), want_grads):
            assert distance(a, b) < bound


@pytest.mark.parametrize("name", GOLDEN)
def test_packed_equals_separate_on_every_backend(tmp_path, name):
    """64-bit, so that what is left is the computation and not rounding; loss and every gradient."""
    arch = Arch.from_folder(write_config(tmp_path, name))
    row = rows(arch)
    results = {}
    for backend, cut in itertools.product(("sdpa", "varlen"), ("packed", "separate")):  # triton: tests/kernels/test_flash.py
        net = fresh(arch, dtype=torch.float64)
        assert install(net, KernelsConfig(backend), "cpu", torch.float64)[0] == f"attention: {backend}"
        loss = sum(net(r).square().sum() for r in ([row] if cut == "packed" else documents(row)))
        loss.backward()
        results[backend, cut] = [loss, *(p.grad for p in net.parameters())]
    expected = results.pop(("sdpa", "separate"))
    for key, values in results.items():
        for a, b in zip(values, expected):
            assert distance(a, b) < 1e-12, key


@pytest.mark.parametrize("backend", ["sdpa", "varlen"])
def test_recomputation_changes_nothing(tmp_path, backend):
    arch = Arch.from_folder(write_config(tmp_path, "gemma3_text"))
    row, grads = rows(arch), []
    for recompute in (False, True):
        net = fresh(arch)
        install(net, KernelsConfig(backend), "cpu", torch.float32)
        if recompute:
            for block in net.model.layers:
                block.forward = lambda h, ctx, f=block.forward: checkpoint(f, h, ctx, use_reentrant=False)
        net(row).sum().backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_padding_at_the_tail_changes_nothing(tmp_path):
    arch = Arch.from_folder(write_config(tmp_path, "mistral"))
    net = fresh(arch)
    row, padded = rows(arch, (11, 23)), rows(arch, (11, 23, 9))
    padded.tokens[:34], padded.labels[:34], padded.labels[34:] = row.tokens, row.labels, -100
    grads = []
    for r in (row, padded):
        net.zero_grad()
        net(r).sum().backward()
        grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads):
        assert distance(a, b) < 1e-6


def test_choice_is_refused_by_name_or_explained(tmp_path, monkeypatch):
    arch = Arch.from_folder(write_config(tmp_path / "tiny", "llama"))
    cuda, meta = torch.device("cuda"), torch.device("meta")
    assert choose("auto", arch, torch.device("cpu"), torch.float32) == (VARLEN, "")
    why = "not varlen: flash attention computes in bf16 and fp16, not float"
    for shared, dtype, found in (
        (227, torch.float32, (TRITON, f" ({why}32)")),
        (227, torch.float64, (SDPA, f" ({why}64; not triton: it has no kernel for float64)")),
        (99, torch.float32, (SDPA, f" ({why}32; not triton: its tiles need 192 KiB of shared memory and this device has 99)")),
    ):
        there = SimpleNamespace(shared_memory_per_block_optin=shared << 10)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, there=there: there)
        assert choose("auto", arch, cuda, dtype) == found
    with pytest.raises(ConfigError, match=r"kernels.attention='triton' cannot compute tiny: it has no kernel for float64; use auto"):
        choose("triton", arch, cuda, torch.float64)
    with pytest.raises(ConfigError, match=r"kernels.attention='varlen' cannot compute tiny: .*multiple of 8.*not 12; use auto"):
        choose("varlen", arch, cuda, torch.bfloat16)
    with pytest.raises(ConfigError, match="no kernel for device meta"):
        choose("varlen", arch, meta, torch.bfloat16)


def test_blocks_compile_without_graph_breaks(tmp_path):
    """The same output and gradients, bit for bit."""
    arch = Arch.from_folder(write_config(tmp_path, "gemma3_text"))
    row, found = rows(arch), []
    for compiled in (False, True):
        net = fresh(arch)
        if compiled:
            for block in net.model.layers:
                block.compile(fullgraph=True, backend="eager")
        out = net(row)
        out.sum().backward()
        found.append([out.detach(), *(p.grad for p in net.parameters())])
    assert min(x.norm() for x in found[0]) > 1e-4
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [0, 5])
def test_varlen_cuda_equals_the_reference(window):
    borders = [0, 1, 9, 48, 61]
    q, k, v, grad = (x.detach() for x in inputs(4, 2, torch.bfloat16, borders, size=16))
    expected = run(kernel.varlen_ref, *(x.double().requires_grad_() for x in (q, k, v)), grad.double(), borders, window, 0.3)
    cu = torch.tensor([*borders, 61, 61], dtype=torch.int32, device="cuda")
    leaves = [x.cuda().requires_grad_() for x in (q, k, v)]
    for a, b in zip(run(kernel.varlen_cuda, *leaves, grad.cuda(), cu, 39, window, 0.3), expected):
        assert distance(a.cpu(), b) < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [0, 5])
def test_varlen_cuda_of_a_piece_equals_the_reference(window):
    """Fewer queries than keys; documents before the piece have keys and no queries."""
    borders, (begin, end) = [0, 1, 9, 48, 61, 61], (24, 52)
    row = AttnContext(Borders(61, torch.tensor(borders, dtype=torch.int32), 39), [])
    piece = row.cut(begin, end)
    q, k, v, grad = (x.detach() for x in inputs(4, 2, torch.bfloat16, borders, size=16))
    q, k, v, grad = q[begin:end], k[:end], v[:end], grad[begin:end]
    host = (piece.queries.cu.tolist(), window, 0.3, piece.keys.cu.tolist())
    expected = run(kernel.varlen_ref, *(x.double().requires_grad_() for x in (q, k, v)), grad.double(), *host)
    leaves = [x.cuda().requires_grad_() for x in (q, k, v)]
    device = (piece.queries.cu.cuda(), piece.queries.longest, window, 0.3, piece.keys.cu.cuda(), piece.keys.longest)
    for a, b in zip(run(kernel.varlen_cuda, *leaves, grad.cuda(), *device), expected):
        assert distance(a.cpu(), b) < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", PARTS)
def test_partial_attention_on_cuda_equals_its_twin(name):
    q, k, grad, v, borders = part(name, torch.bfloat16)
    args = (*borders, name == "same", 0.3)
    device = (*(x.cuda() for x in borders[:2]), *args[2:])
    out, lse = kernel.partial(q.cuda(), k.cuda(), v.cuda(), *device)
    want, want_lse = kernel.partial_ref(q, k, v, *args)
    assert torch.equal(lse.isfinite().cpu(), want_lse.isfinite())
    assert (out.cpu() - want).norm() < 1e-2 * max(1.0, want.norm())
    whole = torch.logaddexp(want_lse, torch.ones_like(want_lse))
    found = kernel.partial_backward(grad.cuda(), q.cuda(), k.cuda(), v.cuda(), out, whole.cuda(), *device)
    for a, b in zip(found, kernel.partial_backward_ref(grad, q, k, v, want, whole, *args)):
        assert (a.cpu() - b).norm() < 1e-2 * max(1.0, b.norm())
