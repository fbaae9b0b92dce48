"""Backends against each other, packed rows against separate documents, and the kernels against their obvious twins."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels import attention as kernel
from model.arch import Arch, Kind
from model.attention import AttnContext, Borders
from model.backends import BACKENDS, SDPA, VARLEN, choose
from model.config import KernelsConfig
from runtime.errors import ConfigError
from tests.model.golden import GOLDEN, distance, documents, fresh, rows, write_config

BORDERS = [0, 1, 1, 9, 48, 61, 61]


def inputs(heads: int, kv_heads: int, dtype: torch.dtype, borders: list[int] = BORDERS, size: int = 8):
    g = torch.Generator().manual_seed(0)
    shapes = [(borders[-1], n, size) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, grad = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


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
        for a, b in zip(run(kernel.varlen_cpu, q, k, v, grad, BORDERS, window, 0.3), expected):
            assert distance(a, b) < 1e-13


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_varlen_cpu_rounds_as_its_dtype(dtype, bound):
    borders = [0, 700, 1003]
    q, k, v, grad = inputs(4, 2, dtype, borders)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    for window in (0, 130):
        expected = run(kernel.varlen_ref, *exact, grad.double(), borders, window, 0.3)
        for a, b in zip(run(kernel.varlen_cpu, q, k, v, grad, borders, window, 0.3), expected):
            assert a.dtype == dtype
            assert distance(a, b) < bound


def test_varlen_cpu_takes_any_layout_and_an_expanded_gradient():
    q, k, v, _ = inputs(4, 2, torch.float64)
    fused = torch.cat([q, k, v], 1).detach().requires_grad_()
    split = kernel.varlen_cpu(*fused.split([4, 2, 2], 1), BORDERS, 3, 0.3)  # slices of one tensor, as a fused projection has
    whole = kernel.varlen_cpu(q, k, v, BORDERS, 3, 0.3)
    assert torch.equal(split, whole)
    (a,) = torch.autograd.grad((split * split.detach()).sum(), fused)
    b = torch.autograd.grad((whole * whole.detach()).sum(), (q, k, v))
    assert distance(a, torch.cat(b, 1)) < 1e-14
    assert torch.autograd.grad(kernel.varlen_cpu(q, k, v, BORDERS, 0, 0.3).sum(), v)[0].abs().sum() > 0


def test_gradcheck():
    q, k, v, _ = inputs(2, 1, torch.float64, [0, 3, 9], size=3)
    for window in (0, 2):
        assert torch.autograd.gradcheck(lambda q, k, v, w=window: kernel.varlen_cpu(q, k, v, [0, 3, 9], w, 0.5), (q, k, v))


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
        run(kernel.varlen_cpu, q, k, v, grad, [0, total], 64, 0.3)
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
    VARLEN.prepare(ctx, full)
    assert ctx.queries.host == ctx.keys.host == BORDERS


@pytest.mark.parametrize("name", GOLDEN)
def test_packed_equals_separate_on_every_backend(tmp_path, name):
    """64-bit, so that what is left is the computation and not rounding; loss and every gradient."""
    arch = Arch.from_folder(write_config(tmp_path, name))
    row = rows(arch)
    results = {}
    for backend, cut in itertools.product(BACKENDS, ("packed", "separate")):
        net = fresh(arch, dtype=torch.float64)
        assert net.use_kernels(KernelsConfig(backend), "cpu", torch.float64) == f"attention: {backend}"
        loss = sum(net(r).square().sum() for r in ([row] if cut == "packed" else documents(row)))
        loss.backward()
        results[backend, cut] = [loss, *(p.grad for p in net.parameters())]
    expected = results.pop(("sdpa", "separate"))
    for key, values in results.items():
        for a, b in zip(values, expected):
            assert distance(a, b) < 1e-12, key


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputation_changes_nothing(tmp_path, backend):
    arch = Arch.from_folder(write_config(tmp_path, "gemma3_text"))
    row, grads = rows(arch), []
    for recompute in (False, True):
        net = fresh(arch)
        net.use_kernels(KernelsConfig(backend), "cpu", torch.float32)
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


def test_choice_is_refused_by_name_or_explained(tmp_path):
    arch = Arch.from_folder(write_config(tmp_path / "tiny", "llama"))
    cuda, meta = torch.device("cuda"), torch.device("meta")
    assert choose("auto", arch, torch.device("cpu"), torch.float32) == (VARLEN, "")
    assert choose("auto", arch, cuda, torch.float32) == (
        SDPA,
        " (not varlen: flash attention computes in bf16 and fp16, not float32)",
    )
    with pytest.raises(ConfigError, match=r"kernels.attention='varlen' cannot compute tiny: .*multiple of 8.*not 12; use auto"):
        choose("varlen", arch, cuda, torch.bfloat16)
    with pytest.raises(ConfigError, match="no kernel for device meta"):
        choose("varlen", arch, meta, torch.bfloat16)


def test_blocks_compile_without_graph_breaks(tmp_path):
    arch = Arch.from_folder(write_config(tmp_path, "gemma3_text"))
    row, out = rows(arch), []
    for compiled in (False, True):
        net = fresh(arch)
        if compiled:
            for block in net.model.layers:
                block.compile(fullgraph=True, backend="eager")
        out.append(net(row))
    assert torch.equal(*out)


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
