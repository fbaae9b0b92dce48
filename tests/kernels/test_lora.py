"""Linears with adapters: sums of products, gradients written out, dropout by a hash."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels import lora as op
from kernels.lora import Kind, Needs, Part
from tests.kernels.close import close, device, spread


def part(out: int, size: int, rank: int | None, bias: bool = False) -> Part:
    a, b = (None, None) if rank is None else (spread(rank, size), spread(out, rank))
    return Part(spread(out, size), spread(out) if bias else None, a, b)


def ref(x, parts, kinds, seed):
    """Each linear by itself, as autograd sees it."""
    out = []
    for i, (p, kind) in enumerate(zip(parts, kinds)):
        y = F.linear(x, p.weight)
        if p.a is not None:
            dropped = x if seed is None else x * mask(x, seed[i], kind)
            y = y + F.linear(F.linear(dropped, p.a) * kind.scale, p.b)
        out.append(y)
    return out


def mask(x, seed, kind):
    return op.dropout(torch.ones_like(x), seed, kind.dropout, kind.first)


RANKS = [(None, None), (3, None), (None, 5), (4, 2)]


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("chance", [0.0, 0.4])
def test_like_each_linear_by_itself(ranks, chance):
    x, parts = spread(7, 12), [part(6, 12, ranks[0]), part(10, 12, ranks[1])]
    kinds = [Kind(2.0, chance), Kind(0.5, chance)]
    seed = torch.tensor([12, 1 << 40], device=device()) if chance else None
    grads = [spread(7, 6), spread(7, 10)]
    leaves = [[t if t is None else t.clone().requires_grad_() for t in p] for p in parts]
    source = x.clone().requires_grad_()
    want = ref(source, [Part(*leaf) for leaf in leaves], kinds, seed)
    flat = [t for leaf in leaves for t in leaf if t is not None]
    want_grads = torch.autograd.grad(want, [source, *flat], grads)

    found, low = op.linears(x, parts, kinds, seed, "torch")
    close(found, [w.detach() for w in want])
    needs = [Needs(True, False, p.a is not None, p.b is not None) for p in parts]
    dx, slopes = op.inputs_gradient(grads, parts, kinds, needs, seed, True, "torch")
    found_parts = op.weights_gradients(grads, x, low, slopes, parts, kinds, needs, seed, "torch")
    close([dx, *(t for p in found_parts for t in p if t is not None)], want_grads)


def test_what_is_not_wanted_is_not_made():
    x, parts, kinds = spread(4, 6), [part(3, 6, 2)], [Kind()]
    g = [spread(4, 3)]
    for needs in itertools.product((False, True), repeat=3):
        need = Needs(needs[0], False, *needs[1:])
        dx, slopes = op.inputs_gradient(g, parts, kinds, [need], None, False, "torch")
        assert dx is None and (slopes[0] is not None) == need.a
        (found,) = op.weights_gradients(g, x, op.inside(x, parts, kinds, None, "torch"), slopes, parts, kinds, [need], None, "torch")
        assert [t is not None for t in found] == list(need)
        assert op.reads_input([need]) == (need.weight or need.a)


@pytest.mark.parametrize("impl", op.IMPLS)
def test_dropout(impl):
    x, seed = spread(30, 2200) + 10.0, torch.tensor(1234567890123, device=device())
    y = op.dropout(x, seed, 0.3, 0, impl)
    kept = y != 0
    assert torch.equal(y, op.dropout(x, seed, 0.3, 0, "torch"))
    torch.testing.assert_close(y[kept], (x / 0.7)[kept])
    assert abs(kept.float().mean().item() - 0.7) < 0.006  # 3 standard deviations of 66,000 draws
    for rows in (kept.float(), kept.float().T):  # as random along rows as along columns, and neighbours know nothing of each other
        centred = rows - 0.7
        assert abs((centred[1:] * centred[:-1]).mean().item()) < 0.21 * 4 / 66_000**0.5
    assert (op.dropout(x, seed + 1, 0.3, 0, impl) != 0).ne(kept).float().mean() > 0.35


def test_a_part_of_the_channels_has_the_mask_of_the_whole():
    x, seed = spread(5, 64), torch.tensor(77, device=device())
    whole = op.dropout(x, seed, 0.5)
    for impl in op.IMPLS:
        assert torch.equal(op.dropout(x[:, 16:48], seed, 0.5, 16, impl), whole[:, 16:48])


def test_products_count_as_operations():
    lefts, rights = [spread(5, 3), spread(5, 2)], [spread(3, 4), spread(2, 4)]
    with FlopCounterMode(display=False) as count:
        total = op.products(lefts, rights)
    close([total], [lefts[0] @ rights[0] + lefts[1] @ rights[1]])
    assert count.get_total_flops() == 2 * 5 * 4 * (3 + 2)


def test_operators_are_well_formed():
    torch.library.opcheck(op.products, ([spread(5, 3), spread(5, 2)], [spread(3, 4), spread(2, 4)]))
    torch.library.opcheck(op._dropout_triton, (spread(4, 6), torch.tensor(3, device=device()), 0.5, 2))
