"""The head's scores: Triton and torch against the obvious twin; every subset of gradients, all that a loss may want, split vocabularies."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import linear_logprob as op
from kernels.linear_logprob import Extras
from tests.kernels.close import BOUND, close, device, gradients, spread
from tests.parallel.watch import Watch

T, D = 11, 6
ROUNDED = 8e-3  # of gradients of bf16 inputs: u and they themselves are rounded, by up to 2^-9 each, by 2^-8 where the interpreter cuts off
ROUNDED_LOGITS = 6e-3  # of scores where the logits of bf16 inputs are rounded
ALL = Extras(smoothing=0.2, z_loss=0.05, entropy=True)
EXTRAS = [Extras(), Extras(smoothing=0.3), Extras(z_loss=0.1), ALL]
SUBSETS = [(True, True), (True, False), (False, True)]


@pytest.fixture(params=[False, True], ids=["as here", "as on a GPU"])
def unrounded(request, monkeypatch) -> bool:
    """Are logits of bf16 inputs fp32, as products are on a GPU? On a CPU they come out in bf16, or in fp32 "as on a GPU"."""
    if request.param:
        monkeypatch.setattr(op, "_gpu", lambda x: True)
        monkeypatch.setattr(op, "_mm", lambda a, b: torch.mm(a.to(op.wide_dtype(a.dtype)), b.to(op.wide_dtype(b.dtype))))
    return request.param or device() == "cuda"


def made(vocabulary: int, dtype: torch.dtype = torch.float32, times: int = 1) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """hidden, weight, labels, and gradients of the three scores. T rows, of which 7 are learned, so many times."""
    torch.manual_seed(vocabulary)
    labels = torch.randint(0, vocabulary, (times, T), device=device())
    labels[:, [0, 4, 5, 10]] = -100
    grad = spread(times * T).to(torch.promote_types(dtype, torch.float32))
    return spread(times * T, D).to(dtype), spread(vocabulary, D).to(dtype), labels.flatten(), [grad] * 3


def both(tensors, labels, grads, needs=(True, True), softcap=None, extras=ALL, **how) -> tuple[list[Tensor], list[Tensor]]:
    """(found, wanted) scores and gradients of `value`."""

    def scores(function: Callable, **kw) -> Callable:
        def run(h, w):
            value, logp, entropy = function(h, w, labels, softcap, extras=extras, **kw)
            return (value, logp.detach(), entropy.detach()) if extras.entropy else (value, logp.detach())

        return run

    grads = grads[: 3 if extras.entropy else 2]
    return tuple(gradients(scores(f, **kw), tensors, needs, grads) for f, kw in ((op.linear_scores, how), (op.linear_scores_ref, {})))


@pytest.mark.parametrize("impl", op.IMPLS)
@pytest.mark.parametrize(("vocabulary", "widest"), [(1003, 256), (128, 64), (13, 4096)])  # blocks: some and a rest, whole ones, part of one
def test_like_the_twin(impl, vocabulary, widest, monkeypatch):
    monkeypatch.setattr(op, "WIDEST", widest)
    hidden, weight, labels, grads = made(vocabulary)
    for extras, softcap in zip(EXTRAS, (None, None, None, 2.0)):
        close(*both((hidden, weight), labels, grads, softcap=softcap, extras=extras, impl=impl))


@pytest.mark.parametrize("impl", op.IMPLS)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_every_subset_of_gradients(impl, softcap):
    hidden, weight, labels, grads = made(40, times=3)
    for needs, budget in itertools.product(SUBSETS, (None, 1)):  # one chunk, which keeps its slopes; chunks of 16 rows
        close(*both((hidden, weight), labels, grads, needs, softcap, impl=impl, budget=budget))
    plain = op.linear_scores(hidden, weight, labels, softcap, impl=impl)
    assert not plain.value.requires_grad and plain.entropy is None


@pytest.mark.parametrize("impl", op.IMPLS)
@pytest.mark.parametrize("gpu", [False, True], ids=["rows taken out", "rows zeroed"])
def test_under_a_sum_a_trained_head_costs_no_second_logits(impl, gpu, monkeypatch):
    """Every subset of gradients, in several chunks and in one; rows of logits counted."""
    logits, mm = [], op._mm
    monkeypatch.setattr(op, "_mm", lambda a, b: logits.append(a.shape[0]) or mm(a, b))
    monkeypatch.setattr(op, "_gpu", lambda x: gpu or x.is_cuda)
    hidden, weight, labels, grads = made(40, times=5)
    rows = len(labels) if op._kept(labels, None) is None else (labels >= 0).sum().item()
    same = [torch.full_like(g, -0.37) for g in grads]
    for needs, budget, softcap in itertools.product(SUBSETS, (None, 1), (None, 1.5)):
        close(*both((hidden, weight), labels, same, needs, softcap, impl=impl, budget=budget, summed=True))
        h, w = hidden.clone().requires_grad_(needs[0]), weight.clone().requires_grad_(needs[1])
        made_before = len(logits)
        op.linear_logprob(h, w, labels, softcap, budget, impl=impl, summed=True).sum().backward()
        assert sum(logits[made_before:]) == rows
    wide = [x.double() for x in (hidden, weight)]
    close(*both(wide, labels, [g.double() for g in same], budget=1, summed=True), bound=1e-13)


def test_what_is_no_sum_is_not_taken_for_one():
    """On the CPU, also where there is a GPU: a failed assertion there ends the process."""
    hidden, weight, labels, grads = made(40)
    hidden, weight, labels, grads = hidden.cpu(), weight.cpu().requires_grad_(), labels.cpu(), [g.cpu() for g in grads]
    logp = op.linear_logprob(hidden, weight, labels, summed=True)
    with pytest.raises(RuntimeError, match="`summed`, but rows have different gradients"):
        logp.backward(grads[0])
    nan = op.linear_logprob(hidden, weight, labels, summed=True).sum()
    nan.backward(torch.tensor(float("nan")))  # the loss was not finite, and is said to be by the gradients
    assert weight.grad.isnan().all()


def test_exact_in_fp64():
    """The formulas, without rounding in the way."""
    for softcap, extras, budget in itertools.product((None, 1.5), EXTRAS, (None, 1)):
        hidden, weight, labels, grads = made(123, torch.float64, times=3)
        close(*both((hidden, weight), labels, grads, softcap=softcap, extras=extras, budget=budget), bound=1e-13)


def test_smoothing_and_z_loss_are_those_of_torch_and_palm():
    hidden, weight, labels, _ = made(57, torch.float64)
    logits = hidden @ weight.T
    want = -torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.3, reduction="none")
    want = torch.where(labels >= 0, want - 0.1 * logits.exp().sum(1).log().square(), 0.0)
    close([op.linear_scores(hidden, weight, labels, extras=Extras(0.3, 0.1)).value], [want], 1e-13)


@pytest.mark.parametrize("impl", op.IMPLS)
def test_half_precision(impl, unrounded):
    """Against the twin in fp32, in one chunk and in several: scores are as exact as the logits, gradients are rounded."""
    hidden, weight, labels, grads = made(300, torch.bfloat16, times=5)
    wide, same = (hidden.float(), weight.float()), [torch.full_like(g, -0.37) for g in grads]
    for summed, budget, softcap in itertools.product((False, True), (None, 1), (None, 5.0)):
        from_above = same if summed else grads
        found, _ = both((hidden, weight), labels, from_above, softcap=softcap, impl=impl, summed=summed, budget=budget)
        _, want = both(wide, labels, from_above, softcap=softcap)
        assert [x.dtype for x in found] == [torch.float32] * 3 + [torch.bfloat16] * 2
        close(found[:3], want[:3], BOUND if unrounded else ROUNDED_LOGITS)
        close([x.float() for x in found[3:]], want[3:], ROUNDED)


@pytest.mark.parametrize("impl", op.IMPLS)
@pytest.mark.parametrize("summed", [False, True], ids=["each row's gradient", "summed"])
def test_logits_of_one_chunk_live_at_once(impl, summed):
    """Four chunks of bf16 inputs on tensors without data, as on a GPU: fp32 logits and u of one chunk, in both passes."""
    rows, vocabulary, peaks = 16, 100_000, []
    logits = 4 * rows * vocabulary
    with FakeTensorMode():
        h, w = (torch.empty(n, 1, dtype=torch.bfloat16, requires_grad=True) for n in (4 * rows, vocabulary))
        labels = torch.empty(4 * rows, dtype=torch.int64)
        with Watch() as watch:
            logp = op.linear_logprob(h, w, labels, budget=logits, impl=impl, summed=summed).sum()
            peaks.append(watch.peak)
            watch.peak = 0
            logp.backward()
            peaks.append(watch.peak)
    assert 1.5 * logits < peaks[0] < 1.75 * logits
    assert peaks[1] < 0.5 * logits if summed else 1.5 * logits < peaks[1] < 1.75 * logits


def test_a_summed_gradient_is_taken_once():
    hidden, weight, labels, _ = made(40)
    weight.requires_grad_()
    logp = op.linear_logprob(hidden, weight, labels, summed=True).sum()
    logp.backward(retain_graph=True)
    once = weight.grad.clone()
    with pytest.raises(RuntimeError, match="`summed` gradients can be taken once"):
        logp.backward()
    assert torch.equal(weight.grad, once) and once.any()


def test_logits_with_gaps_between_rows():
    wide, label = spread(5, 100), torch.tensor([3, -1, 59, 0, 7], device=device())
    z = wide[:, 20:80]
    assert not z.is_contiguous()
    want, state = op._read(z.clone(), label, None, ALL)
    found = op._sums_triton(z, label, None)
    close(found[[0, 1, 3]], want[[0, 1, 3]])
    slope = op._slope_triton(z, label, found[0], None, None, 0.0, 0.0, 60, z.dtype)
    close([slope], [op._slope(state, label, want[0], None, Extras(), 60, None, z.dtype)])


def test_large_logits():
    hidden, weight, labels, _ = made(70)
    hidden, weight = hidden * 60, weight * 60
    want = op.linear_scores_ref(hidden, weight, labels)
    assert want.logp.min() < -1000
    found = op.linear_scores(hidden, weight, labels, impl="triton", extras=Extras(entropy=True))
    close(found[:2], want[:2], 1e-6)
    assert (found.entropy - want.entropy).abs().max() < 1e-2  # the difference of two numbers in the thousands


@pytest.mark.parametrize("impl", op.IMPLS)
def test_a_known_number_of_labels_changes_nothing(impl):
    hidden, weight, labels, grads = made(90, times=3)
    known = int((labels >= 0).sum())
    assert known == 21
    for needs, budget in itertools.product(SUBSETS, (None, 1)):
        close(*both((hidden, weight), labels, grads, needs, impl=impl, learned=known, budget=budget))
    poisoned = torch.where(labels[:, None] >= 0, hidden, float("nan"))  # rows that are never read
    close(op.linear_scores(poisoned, weight, labels, learned=known, extras=ALL), op.linear_scores(hidden, weight, labels, extras=ALL), 1e-6)
    for row, known in ((labels.abs() % 90, 3 * T), (torch.full_like(labels, -1), 0)):
        h = hidden.clone().requires_grad_()
        logp = op.linear_logprob(h, weight, row, learned=known, impl=impl)
        logp.sum().backward()
        assert logp.count_nonzero() == h.grad.any(1).sum() == known


def test_where_the_number_is_not_known_a_gpu_computes_all_rows(monkeypatch):
    hidden, weight, labels, grads = made(90)
    monkeypatch.setattr(op, "_gpu", lambda x: True)
    assert op._kept(labels, None) is None
    assert torch.equal(op._kept(labels, 7), (labels >= 0).nonzero()[:, 0])
    for known in (None, 7):
        close(*both((hidden, weight), labels, grads, learned=known))


def test_a_wrong_number_of_labels_is_noticed():
    """On the CPU, as above."""
    hidden, weight, labels = (x.cpu() for x in made(90)[:3])
    for wrong in (6, 8):
        with pytest.raises(RuntimeError, match="number of labels"):
            op.linear_logprob(hidden, weight, labels, learned=wrong)


class Ranks:
    """Threads that share a vocabulary; one works at a time (Triton's interpreter is not for several), and waits where all must meet."""

    def __init__(self, size: int):
        self.turn, self.size, self.there, self.meetings, self.result = threading.Condition(), size, [], 0, None

    def meet(self, x: Tensor, join: Callable[[Tensor], Tensor]) -> Tensor:
        meeting = self.meetings
        self.there.append(x.clone())
        if len(self.there) == self.size:
            self.result, self.there, self.meetings = join(torch.stack(self.there)), [], meeting + 1
            self.turn.notify_all()
        assert self.turn.wait_for(lambda: self.meetings > meeting, 20)
        return self.result.clone()

    def run(self, function: Callable[[int], object]) -> list:
        found, errors = [None] * self.size, []

        def one(rank: int) -> None:
            with self.turn:
                try:
                    found[rank] = function(rank)
                except Exception as e:
                    errors.append(e)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        if errors:
            raise errors[0]
        return found


class Part:
    """A rank's rows of a vocabulary."""

    def __init__(self, ranks: Ranks, rows: int, rank: int):
        self.ranks, self.rows, self.most = ranks, rows, -(-rows // ranks.size)
        self.first = rank * self.most

    def sum(self, x: Tensor) -> Tensor:
        return self.ranks.meet(x, lambda all: all.sum(0))

    def max(self, x: Tensor) -> Tensor:
        return self.ranks.meet(x, lambda all: all.amax(0))


@pytest.mark.parametrize("impl", op.IMPLS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_split_vocabulary(impl, softcap):
    """Scores of every rank are those of the whole; dh are parts of a sum, dw rows of the whole one."""
    rows, ranks = 101, Ranks(3)
    hidden, weight, labels, grads = made(rows, times=3)
    learned = int((labels >= 0).sum())

    def rank(number: int) -> list[Tensor]:
        part = Part(ranks, rows, number)
        mine = weight[part.first : part.first + part.most]

        def run(h, w):
            value, logp, entropy = op.linear_scores(h, w, labels, softcap, 1, part, learned, impl, ALL)
            return value, logp.detach(), entropy.detach()

        return gradients(run, (hidden, mine), (True, True), grads)

    found = ranks.run(rank)
    want = both((hidden, weight), labels, grads, softcap=softcap)[1]
    for scores in found:
        close(scores[:3], want[:3])
    close([sum(one[3] for one in found), torch.cat([one[4] for one in found])], want[3:])


@pytest.mark.parametrize("summed", [False, True])
def test_no_rows(summed):
    weight = spread(9, D).requires_grad_()
    hidden, labels = spread(0, D).requires_grad_(), torch.zeros(0, dtype=torch.int64, device=device())
    op.linear_logprob(hidden, weight, labels, impl="triton", summed=summed).sum().backward()
    assert hidden.grad.shape == (0, D) and torch.equal(weight.grad, torch.zeros_like(weight))


def test_operators_are_well_formed():
    z, label, scale = spread(4, 21), torch.tensor([3, -1, 20, 0], device=device()), spread(4)
    lse = op._sums_triton(z, label, None)[0].clone()
    for softcap in (None, 2.0):
        torch.library.opcheck(op._sums_triton, (z, label, softcap))
        torch.library.opcheck(op._slope_triton, (z, label, lse, scale, softcap, 0.1, 0.2, 21, torch.bfloat16))
    torch.library.opcheck(op._slope_triton, (z, label, lse, None, None, 0.0, 0.0, 21, torch.float32))


@pytest.mark.parametrize("impl", op.IMPLS)
@pytest.mark.parametrize("budget", [None, 1])
def test_a_gradient_that_is_not_finite_gets_through(impl, budget):
    """A run gives a loss that is not finite a NaN gradient, to see it in the gradient's norm (runtime/guard.py)."""
    hidden, weight, labels, _ = made(40, times=3)
    hidden.requires_grad_()
    weight.requires_grad_()
    scores = op.linear_logprob(hidden, weight, labels, impl=impl, budget=budget)
    scores.sum().backward(torch.tensor(float("nan"), device=device()))
    assert hidden.grad[labels >= 0].isnan().all()
    assert weight.grad.isnan().all()
