"""Gradient clipping by the global L2 norm, over plain tensors and DTensors of several meshes at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def clip(parameters: Iterable[Tensor], max_norm: float, optimizer: torch.optim.Optimizer | None = None) -> Tensor:
    """Scales all gradients by min(1, max_norm / norm); max_norm = 0 only measures.

    An optimizer whose groups have a `grad_scale` is handed the factor there and uses it as it reads the gradients, which then stay as
    they are until its step.

    A gradient that is still a partial sum (of a parameter that tensor-parallel ranks replicate) is summed first, in place
    of the partial one: a collective.

    Gradients are grouped by mesh and placements because torch's norm takes one kind at a time; a group's norm is reduced
    over its mesh by `full_tensor()`. Nothing is read back to the host.

    Returns:
        The norm before clipping, a scalar fp32 tensor on the gradients' device, the same on every rank.
    """
    groups: dict[object, list[Tensor]] = defaultdict(list)
    for p in parameters:
        if (g := p.grad) is not None:
            if isinstance(g, DTensor) and g.placements != p.placements:
                g = p.grad = g.redistribute(placements=p.placements)
            groups[(g.device_mesh, g.placements) if isinstance(g, DTensor) else None].append(g)
    norms = []
    for grads in groups.values():
        norm = torch.nn.utils.get_total_norm(grads)
        norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).float())
    total = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm > 0:
        scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        if optimizer is not None and all("grad_scale" in group for group in optimizer.param_groups):
            for group in optimizer.param_groups:
                group["grad_scale"] = scale
            return total
        local = [g.to_local() if isinstance(g, DTensor) else g for grads in groups.values() for g in grads]
        torch._foreach_mul_(local, scale)
    return total
