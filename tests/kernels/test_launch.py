"""Rows of many tokens: grids that a device takes, and indices beyond 2^31."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from kernels import adamw, flash, glu, launch, linear_logprob, lora, rms_norm, rope
from tests.kernels.close import device, error

pytestmark = pytest.mark.skipif(launch.triton is None, reason="triton is not installed")

TOKENS = 10_000_000
INT32 = 2**31


# -- grids -----------------------------------------------------------------------------------------------------------------


class Recorder:
    """In a kernel's place: keeps the grid and launches nothing."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        self.grids.append(grid)
        return lambda *args, **options: None


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches(tokens: int) -> dict[str, Callable[[], object]]:
    """By kernel, a launch of it for a row of so many tokens, of a wide model."""
    x, w, r = meta(tokens, 16384), meta(16384), meta(tokens, 1, dtype=torch.float32)
    gate, label = meta(tokens, 65536), meta(tokens, dtype=torch.int64)
    q, k, table, head = meta(tokens, 128, 64), meta(tokens, 8, 64), meta(tokens, 1, 64), meta(64)
    z, lse = meta(tokens, 262144, dtype=torch.float32), meta(tokens, 128, dtype=torch.float32)
    seen = [meta(tokens, dtype=torch.int32)] * 4

    def plain(op) -> Callable:
        return op._init_fn

    def attention_backward():
        return plain(flash._backward)(q, q, k, k, None, q, lse, *seen, 0.1, 0.0, True, True)

    return {
        "rms_norm._forward_kernel": lambda: plain(rms_norm._forward_triton)(x, x, w, 1e-5, False),
        "rms_norm._backward_kernel": lambda: plain(rms_norm._backward_triton)(x, x, x, r, w, False, False),
        "rms_norm._weight_kernel": lambda: plain(rms_norm._backward_triton)(x, x, x, r, w, False, True),
        "rope._forward_kernel": lambda: plain(rope._forward_triton)(q, k, table, table, head, head, 1e-6, False),
        "rope._backward_kernel": lambda: plain(rope._backward_triton)(q, k, None, None, table, table, None, None, 0.0, False, False),
        "glu._forward_kernel": lambda: plain(glu._forward_triton)(gate, gate, "silu"),
        "glu._backward_kernel": lambda: plain(glu._backward_triton)(gate, gate, gate, "silu", True),
        "lora._dropout_kernel": lambda: plain(lora._dropout_triton)(gate, label[0], 0.1, 0),
        "linear_logprob._read_kernel": lambda: plain(linear_logprob._sums_triton)(z, label, None),
        "linear_logprob._slope_kernel": lambda: plain(linear_logprob._slope_triton)(
            z, label, r[:, 0], None, None, 0.0, 0.0, 262144, torch.bfloat16
        ),
        "flash._forward_kernel": lambda: plain(flash._forward)(q, k, k, None, *seen[:2], 0.1, 0.0),
        "flash._delta_kernel": attention_backward,
        "flash._dq_kernel": attention_backward,
        "flash._dkv_kernel": attention_backward,
        "adamw._adamw_kernel": lambda: adamw.adamw(*[[meta(tokens)]] * 4, [0.0], None, adamw.Update(0.1, 0.9, 0.9, 1e-8, 1)),
    }


MODULES = {m.__name__.split(".")[1]: m for m in (adamw, flash, glu, linear_logprob, lora, rms_norm, rope)}
KERNELS = [f"{name}.{key}" for name, module in MODULES.items() for key in vars(module) if key.endswith("_kernel")]


@pytest.mark.parametrize("name", KERNELS)
def test_a_grid_for_ten_million_tokens(monkeypatch, name):
    """On tensors without data, by the launchers themselves."""
    recorder = {key: Recorder() for key in KERNELS}
    for key, one in recorder.items():
        monkeypatch.setattr(MODULES[key.split(".")[0]], key.split(".")[1], one)
    monkeypatch.setattr(adamw, "_on_device", lambda *args: None)
    monkeypatch.setattr(adamw, "_owners", lambda *args: None)
    monkeypatch.setattr(rms_norm, "PARTS", TOKENS)  # which is what bounds the grid of `_weight_kernel`
    grids = {}
    for tokens in (1000, TOKENS):
        launches(tokens)[name]()
        (grids[tokens], *_) = recorder[name].grids
        recorder[name].grids.clear()
    few, many = grids[1000], grids[TOKENS]
    assert 100 * few[0] < many[0] < INT32 and few[1:] == many[1:] and many[1] <= 65535


def test_a_grid_that_no_device_takes_is_named():
    assert launch.grid(INT32 - 1, 65535) == (INT32 - 1, 65535)
    for x, y in ((INT32, 1), (1, 65536)):
        with pytest.raises(AssertionError, match=f"{x} x {y} programs, where a device takes 2147483647 x 65535"):
            launch.grid(x, y)


# -- indices ---------------------------------------------------------------------------------------------------------------
# Memory is only reserved: of tensors of 4 GiB the first and the last rows are written and read. Interpreted, the first and the last
# programs of a launch run, and any sum or product in int32 that overflows is an error.


@pytest.fixture
def ends(monkeypatch):
    if not launch.INTERPRETED:
        return
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    builder, call, check = (
        interpreter.interpreter_builder,
        interpreter.GridExecutor.__call__,
        TritonSemantic.binary_op_sanitize_overflow_impl,
    )
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx

    def some(self, *args, **options):
        x, y = (*self.grid, 1)[:2]
        programs = [(i, j, 0) for i in sorted({0, x - 1}) for j in sorted({0, y - 1})]
        self.grid = (len(programs),)
        monkeypatch.setattr(builder, "set_grid_dim", lambda *_: set_dim(x, y, 1))
        monkeypatch.setattr(builder, "set_grid_idx", lambda i, *_: set_idx(*programs[i]))
        return call(self, *args, **options)

    def signed(self, left, right, operation):
        if left.type.scalar.is_int_signed():  # a hash is meant to overflow
            check(self, left, right, operation)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", some)
    monkeypatch.setattr(builder, "options", interpreter.InterpreterOptions(debug=True))
    monkeypatch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", signed)


def large(rows: int, *shape: int) -> torch.Tensor:
    """More than 2^31 elements, of which the first and the last rows have values."""
    x = torch.empty(rows, *shape, dtype=torch.float16, device=device())
    assert x.numel() > INT32
    for some in (x[:END], x[-END:]):
        some.copy_(torch.randn(some.shape))
    return x


def strided(rows: int, columns: int, step: int) -> torch.Tensor:
    """[rows, columns] whose rows lie so many elements apart."""
    x = torch.empty((rows - 1) * step + columns, dtype=torch.float16, device=device()).as_strided((rows, columns), (step, 1))
    x.copy_(torch.randn(x.shape))
    return x


def agree(*pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    for found, want in pairs:
        assert want.norm() > 0 and error(found, want) < 3e-3, error(found, want)


ROWS, COLUMNS, END = 2**20 + 128, 2048, 128
BOTH = (slice(0, 1), slice(-1, None))  # the rows that are compared


def test_rms_norm(ends):
    x, w = large(ROWS, COLUMNS), torch.randn(COLUMNS).half().to(device())
    total, y, r = rms_norm.forward(x, x, w, 1e-5, True, "triton")
    dx, _ = rms_norm.backward(x, x, x, r, w, True, False, "triton")
    for at in BOTH:
        want = rms_norm.forward(x[at], x[at], w, 1e-5, True, "torch")
        agree((total[at], want[0]), (y[at], want[1]), (r[at], want[2]))
        agree((dx[at], rms_norm.backward(x[at], x[at], x[at], r[at], w, True, False, "torch")[0]))


@pytest.mark.parametrize("together", [64, 0])
def test_rms_norm_of_rows_far_apart(ends, monkeypatch, together):
    """Programs that walk through rows, for the weight's gradient, in one launch and in one of its own."""
    monkeypatch.setattr(rms_norm, "TOGETHER", together)
    x, g = strided(3, 64, 2**30), strided(3, 64, 2**30)
    g[1] = 0.0  # the middle program may not run
    w = torch.randn(64).half().to(device())
    _, y, r = rms_norm.forward(x, None, w, 1e-5, False, "triton")
    r[1] = 1.0
    dx, dw = rms_norm.backward(g, None, x, r, w, False, True, "triton")
    want_dx, want_dw = rms_norm.backward(g, None, x, r, w, False, True, "torch")
    agree((y[2], rms_norm.forward(x[2:], None, w, 1e-5, False, "torch")[1][0]), (dx[2], want_dx[2]), (dw, want_dw))


def test_glu(ends):
    x = large(ROWS, COLUMNS)
    y, back = glu.forward(x, x, "silu", "triton"), glu.backward(x, x, x, "silu", True, "triton")
    for at in BOTH:
        want = glu.backward(x[at], x[at], x[at], "silu", True, "torch")
        agree((y[at], glu.forward(x[at], x[at], "silu", "torch")), *((f[at], w) for f, w in zip(back, want)))


def test_dropout(ends):
    x, seed = large(ROWS, COLUMNS), torch.tensor(123456789012345, device=device())
    y = lora.dropout(x, seed, 0.4, 7, "triton")
    for row in (0, ROWS - 1):
        columns = torch.arange(7, 7 + COLUMNS, device=device())
        h = lora._mix(lora._mix(torch.full_like(columns, row), seed & 0xFFFFFFFF) ^ columns, seed >> 32)
        agree((y[row], torch.where(h >= 0.4 * 2**32, x[row] / 0.6, 0.0)))


def test_sums_and_slopes_of_logits(ends):
    z, label = large(ROWS, COLUMNS), torch.full((ROWS,), 5, device=device())
    sums = linear_logprob._sums_triton(z, label, None)
    u = linear_logprob._slope_triton(z, label, sums[0], None, None, 0.0, 0.0, COLUMNS, torch.float16)
    for at in BOTH:
        wide = z[at].float()
        want = torch.nn.functional.one_hot(label[at], COLUMNS) - wide.softmax(-1)
        agree((sums[0, at], wide.logsumexp(-1)), (sums[1, at], wide[:, 5]), (u[at], want))


def tokens_or_heads_first(turned: bool, slots: int, heads: int, size: int) -> torch.Tensor:
    """[slots, heads, size], large, by tokens or by heads in memory."""
    if not turned:
        return large(slots, heads, size)
    x = torch.empty(heads, slots, size, dtype=torch.float16, device=device()).transpose(0, 1)
    assert x.numel() > INT32
    for some in (x[:END], x[-END:]):
        some.copy_(torch.randn(some.shape))
    return x


@pytest.mark.parametrize("turned", [False, True], ids=["tokens first", "heads first"])
def test_rope(ends, turned):
    slots, w = 2**19 + 128, torch.randn(128).half().to(device())
    q = tokens_or_heads_first(turned, slots, 40, 128)
    table = torch.empty(slots, 1, 128, dtype=torch.float16, device=device())
    for some in (table[:1], table[-1:]):
        some.copy_(torch.randn(some.shape))
    found = rope.forward(q, q, table, table, w, w, 1e-6, False, "triton")
    back = rope.backward(q, q, q, q, table, table, w, w, 1e-6, False, False, "triton")
    for at in BOTH:
        given = (q[at], q[at], table[at], table[at], w, w, 1e-6, False)
        want, want_back = rope.forward(*given, "torch"), rope.backward(q[at], q[at], *given, False, "torch")
        # the first program has the first heads of q, the last one the last heads of k
        agree((found[0][at, :8], want[0][:, :8]), (found[1][at, -8:], want[1][:, -8:]))
        agree((back[0][at, :8], want_back[0][:, :8]), (back[1][at, -8:], want_back[1][:, -8:]))


@pytest.mark.parametrize("turned", [False, True], ids=["tokens first", "heads first"])
def test_attention(ends, monkeypatch, turned):
    """Of the first and the last document, which fill a tile."""
    slots, heads = 2**17 + 2**11, 128
    borders = torch.tensor([0, END, slots - END, slots], dtype=torch.int32, device=device())
    seen = flash.spans(slots, slots, borders, borders)
    q, k, v, grad = (tokens_or_heads_first(turned, slots, heads, 128) for _ in range(4))
    both, want = (slice(0, END), slice(-END, None)), []
    out = q.new_empty(q.shape)
    lse, delta = (torch.empty(heads, slots, device=device()) for _ in range(2))
    for at in both:
        leaves = [x[at].float().requires_grad_() for x in (q, k, v)]
        exact, rows = flash.flash_ref(*leaves, flash.spans(END, END, borders[:2], borders[:2]), 0.1)
        want.append([exact.detach(), *torch.autograd.grad(exact, leaves, grad[at].float())])
        out[at], lse[:, at] = exact.detach(), rows.detach().T
        delta[:, at] = (out[at].float() * grad[at].float()).sum(-1).T

    found, found_lse = flash._forward(q, k, v, None, seen.lo, seen.hi, 0.1, 0.0)
    ours = torch.zeros_like(delta)
    size = flash._sizes("delta", q, 0.0)
    flash._delta_kernel[launch.grid(slots // size["QUERIES"], heads)](
        grad, out, ours, slots, 128, *grad.stride()[:2], *out.stride()[:2], EVEN=True, **size
    )
    agree((ours[0, :32], delta[0, :32]), (ours[-1, -32:], delta[-1, -32:]))

    class Ready:
        """In the kernel's place, since most of its programs do not run."""

        def __getitem__(self, grid):
            return lambda grad, out, into, *args, **options: into.copy_(delta)

    if launch.INTERPRETED:
        monkeypatch.setattr(flash, "_delta_kernel", Ready())
    dq, dk, dv, _ = flash._backward(grad, q, k, v, None, out, lse.T, *seen, 0.1, 0.0, True, True)
    for head, (at, exact) in itertools.product((0, -1), zip(both, want)):
        agree((found[at, head], exact[0][:, head]), (found_lse[at, head], lse[head, at]))
        agree(*((x[at, head], w[:, head]) for x, w in zip((dq, dk, dv), exact[1:])))
