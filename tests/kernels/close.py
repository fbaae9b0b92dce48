"""How kernels are compared with their twins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

BOUND = 1e-5  # fp32, relative to the size of the whole tensor
# Of bf16 where kernel and twin round the same numbers. On a GPU an element in thousands falls to the other side of a border, 2^-8 of itself
# away; the interpreter cuts off what it should round.
HALF_BOUND = 1e-3 if torch.cuda.is_available() else 1.5e-2


def device() -> str:
    """Where kernels run: on the GPU, or interpreted."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def spread(*shape: int) -> Tensor:
    """Normal values of many sizes, new ones each time."""
    return torch.randn(*shape, device=device()) * torch.rand(shape[-1:], device=device()).add(0.5)


def error(found: Tensor, want: Tensor) -> float:
    """||found - want|| / ||want||, in fp64."""
    return ((found.double() - want.double()).norm() / want.double().norm()).item()


def close(found: Iterable[Tensor], want: Iterable[Tensor], bound: float = BOUND) -> None:
    """Each tensor is within the bound of the one it should be, and that one is not trivial."""
    for f, w in zip(found, want, strict=True):
        assert f.shape == w.shape and f.dtype == w.dtype
        assert w.norm() > 0, "a reference of zeros proves nothing"
        assert error(f, w) < bound


def gradients(function: Callable, tensors: Sequence[Tensor], needs: Sequence[bool], grads: Sequence[Tensor]) -> list[Tensor]:
    """Results of function(*tensors), and gradients of those tensors that need them, for these gradients of the results."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_(need) for t, need in zip(tensors, needs)]
    out = function(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    reached = [(o, g) for o, g in zip(outs, grads, strict=True) if o.requires_grad]
    inputs = [t for t in leaves if t.requires_grad]
    return [*(o.detach() for o in outs), *torch.autograd.grad([o for o, _ in reached], inputs, [g for _, g in reached])]
