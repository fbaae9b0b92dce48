"""Attention backends: who computes softmax(q k^T) v over packed documents (the protocol is in model/attention.py).

    sdpa     torch's scaled_dot_product_attention with the [T, T] mask spelled out: any device and dtype, memory O(T^2).
             The reference.
    varlen   no mask: documents by their borders, memory O(T). CUDA: torch.nn.attention.varlen (flash attention, fp16 and
             bf16). CPU: kernels/attention.py.

Both keep documents apart and honour windows. A backend that cannot compute a model says why and is refused; `auto` takes
varlen where it can, else sdpa, and the report says which.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from model.arch import Arch, Kind

if TYPE_CHECKING:
    from model.attention import AttnContext


class Sdpa:
    name = "sdpa"

    def unsupported(self, arch: Arch, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ctx: AttnContext, kind: Kind, scale: float) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, T, H]
        out = F.scaled_dot_product_attention(q, k, v, ctx.mask(kind), scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1)


SDPA = Sdpa()
