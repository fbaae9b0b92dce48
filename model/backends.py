"""Attention backends: who computes softmax(q k^T) v over packed documents. The protocol is `Backend` in model/attention.py.

    sdpa     torch's scaled_dot_product_attention with the mask spelled out: any device and dtype, memory O(T^2).
             The reference.
    varlen   no mask: documents by their borders, memory O(T). CUDA: flash attention through torch.nn.attention.varlen.
             CPU: kernels/attention.py.
    triton   no mask either: kernels/flash.py, an interval of keys for each query. CUDA, fp32 and any head size to 256 included.

All keep documents apart and honour windows. A backend that cannot compute a model says why and is refused; `auto` takes
the first of varlen, triton and sdpa that can, and the report says which and why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import flash
from kernels.attention import (
    partial,
    partial_backward,
    partial_backward_ref,
    partial_ref,
    varlen_cpu,
    varlen_cuda,
    varlen_cuda_unsupported,
)
from model.arch import Arch, Kind
from runtime.errors import ConfigError

if TYPE_CHECKING:
    from model.attention import AttnContext, Backend

KINDS = ("full", "window")


class Sdpa:
    name = "sdpa"
    partial, partial_backward = staticmethod(partial_ref), staticmethod(partial_backward_ref)

    def unsupported(self, arch: Arch, device: torch.device, dtype: torch.dtype) -> str | None:
        return _unknown_kind(arch)

    def prepare(self, ctx: AttnContext, kind: Kind) -> None:
        ctx.make_mask(kind)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ctx: AttnContext, kind: Kind, scale: float) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, T, H]
        out = F.scaled_dot_product_attention(q, k, v, ctx.masks[kind], scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1)


class Varlen:
    name = "varlen"
    partial, partial_backward = staticmethod(partial), staticmethod(partial_backward)

    def unsupported(self, arch: Arch, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type == "cpu":
            return _unknown_kind(arch)
        if device.type == "cuda":
            return _unknown_kind(arch) or varlen_cuda_unsupported(arch.head_dim, dtype, device)
        return f"it has no kernel for device {device.type}"

    def prepare(self, ctx: AttnContext, kind: Kind) -> None:
        """Borders are all it reads."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ctx: AttnContext, kind: Kind, scale: float) -> Tensor:
        attend, queries, keys = varlen_cuda if q.is_cuda else varlen_cpu, ctx.queries, ctx.keys
        return attend(q, k, v, queries.cu, queries.longest, kind.size, scale, keys.cu, keys.longest)


class Triton:
    name = "triton"
    partial, partial_backward = staticmethod(flash.partial), staticmethod(flash.partial_backward)

    def unsupported(self, arch: Arch, device: torch.device, dtype: torch.dtype) -> str | None:
        return _unknown_kind(arch) or flash.unsupported(arch.head_dim, dtype, device)

    def prepare(self, ctx: AttnContext, kind: Kind) -> None:
        ctx.make_spans(kind)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ctx: AttnContext, kind: Kind, scale: float) -> Tensor:
        return flash.flash(q, k, v, ctx.spans[kind], scale)


SDPA, VARLEN, TRITON = Sdpa(), Varlen(), Triton()
BACKENDS = {b.name: b for b in (SDPA, VARLEN, TRITON)}


def _unknown_kind(arch: Arch) -> str | None:
    return next((f"it does not compute attention of kind {kind.name}" for kind in arch.kinds if kind.name not in KINDS), None)


def choose(name: str, arch: Arch, device: torch.device, dtype: torch.dtype) -> tuple[Backend, str]:
    """The backend for `kernels.attention = name` (`auto` or one of BACKENDS), and words for the report on why it is that one.

    Raises:
        ConfigError: the one asked for cannot compute this model on this device in this dtype.
    """
    if name == "auto":
        reasons = []
        for backend in (VARLEN, TRITON):
            reason = backend.unsupported(arch, device, dtype)
            if reason is None:
                return backend, f" ({'; '.join(reasons)})" if reasons else ""
            reasons.append(f"not {backend.name}: {reason}")
        return SDPA, f" ({'; '.join(reasons)})"
    reason = BACKENDS[name].unsupported(arch, device, dtype)
    if reason is not None:
        raise ConfigError(f"cannot compute {arch.name or arch.family}: {reason}; use auto", "kernels.attention", name)
    return BACKENDS[name], ""
