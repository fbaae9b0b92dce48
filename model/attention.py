"""Grouped-query attention over packed rows, and the struct that says where documents begin and end.

A row of T slots holds documents end to end; a query sees keys of its own document only, up to itself (kind `full`) or
the last `size` of those (kind `window`). How that is computed is the backend's business (model/backends.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from kernels.flash import Spans, spans
from kernels.regions import Ops
from kernels.rope import rope
from model.arch import Arch, Kind
from model.backends import SDPA
from model.linear import Linear, Slots, here
from model.norm import NORMS, RMSNorm


class Borders:
    """Where the documents lie in a row, on the device.

    slots: T, how many there are.
    cu: [N+1] int32, from 0 to T, the end repeated up to a fixed N.
    longest: no document is longer.
    """

    def __init__(self, slots: int, cu: Tensor, longest: int):
        self.slots, self.cu, self.longest = slots, cu, longest

    def places(self) -> tuple[Tensor, Tensor]:
        """For each slot its document and how many slots of it follow, both [T]."""
        slots = torch.arange(self.slots, device=self.cu.device, dtype=self.cu.dtype)
        document = torch.searchsorted(self.cu[1:], slots, right=True)
        return document, self.cu[1:][document] - slots


class AttnContext:
    """What every block needs to know about one micro-batch; built once, handed down as one argument.

    queries, keys: the borders of documents among either. They are the same, but for a piece of a row (`cut`); there the queries
        of a document are the last of its keys.
    rope: for each rope of the model (cos, sin), each [T, 1, head_dim].

    What else a backend needs it makes from these in `prepare`, before the blocks run: masks, once per kind.
    """

    def __init__(self, queries: Borders, rope: list[tuple[Tensor, Tensor]], keys: Borders | None = None):
        self.queries, self.keys, self.rope = queries, keys or queries, rope
        self.masks: dict[Kind, Tensor] = {}  # [T, S] bool: may query row see key column
        self.spans: dict[Kind, Spans] = {}  # the same as an interval for each query, and for each key
        self.cuts: dict[tuple[int, int], AttnContext] = {}

    def cut(self, begin: int, end: int) -> AttnContext:
        """The context of the row's queries [begin, end), whose keys are the row's [0, end). Made once.

        Documents outside keep their place and have no queries, so that shapes stay what they are.
        """
        if (begin, end) not in self.cuts:
            cu, longest = self.queries.cu, self.queries.longest
            queries = Borders(end - begin, (cu - begin).clamp(0, end - begin), min(longest, end - begin))
            self.cuts[begin, end] = AttnContext(queries, self.rope, Borders(end, cu.clamp(max=end), min(longest, end)))
        return self.cuts[begin, end]

    def make_mask(self, kind: Kind) -> None:
        if kind not in self.masks:
            (document, after), (key_document, key_after) = self.queries.places(), self.keys.places()
            distance = key_after[None, :] - after[:, None]
            seen = (document[:, None] == key_document[None, :]) & (distance >= 0)
            self.masks[kind] = seen & (distance < kind.size) if kind.name == "window" else seen

    def make_spans(self, kind: Kind) -> None:
        if kind not in self.spans:
            self.spans[kind] = spans(self.queries.slots, self.keys.slots, self.queries.cu, self.keys.cu, kind.size)


class Backend(Protocol):
    """softmax(scale * q k^T over the keys that `kind` lets a query see) v.

    name: under which it is found in model/backends.py BACKENDS.
    partial, partial_backward: the same for some of the keys, as kernels/attention.py has it; no autograd.
    """

    name: str
    partial: Callable[..., tuple[Tensor, Tensor]]
    partial_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ctx: AttnContext, kind: Kind, scale: float) -> Tensor:
        """q: [T, N, H]; k, v: [S, K, H] with N a multiple of K, head n using group n // (N / K) -> [T, N, H]."""

    def prepare(self, ctx: AttnContext, kind: Kind) -> None:
        """Makes in `ctx` what a call of this kind reads there. Outside the blocks, so that these compile as one graph."""

    def unsupported(self, arch: Arch, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend cannot compute this model there, or None. It must keep documents apart or refuse."""


def queries_keys_values(attn: Attention, h: Tensor, norm: RMSNorm, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The default `enter`: h [T, D] -> q [T, N, H], k and v [T, K, H], rotated."""
    x = norm(h)
    q, k, v = (proj(x).unflatten(-1, (-1, attn.head_dim)) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
    if attn.q_norm is None:
        q, k = rope(q, k, cos, sin, impl=attn.ops.rope)
    else:
        weights = here(attn.q_norm.weight), here(attn.k_norm.weight)
        q, k = rope(q, k, cos, sin, *weights, attn.q_norm.eps, attn.q_norm.offset, attn.ops.rope)
    return q, k, v


def project(attn: Attention, out: Tensor) -> Tensor:
    """The default `leave`: [T, N H] -> [T, D]."""
    return attn.o_proj(out)


class Attention(Slots):
    """Slot `backend`: see Backend. Slots `enter` and `leave`: functions like `queries_keys_values` and `project` over the parts of its
    Linears, where fused ones may go (model/transforms/ops.py). Slot `ops`: which implementation computes each operation."""

    slots = ("backend", "enter", "leave", "ops")
    TP = {"q_proj": "col", "k_proj": "col", "v_proj": "col", "o_proj": "row", "q_norm": "whole", "k_norm": "whole"}

    def __init__(self, arch: Arch, index: int):
        super().__init__()
        self.kind, self.rope = arch.layers[index]
        self.head_dim, self.scale = arch.head_dim, arch.attention_scale
        heads, kv_heads = arch.num_attention_heads * arch.head_dim, arch.num_key_value_heads * arch.head_dim
        self.q_proj = Linear(arch.hidden_size, heads, arch.qkv_bias)
        self.k_proj = Linear(arch.hidden_size, kv_heads, arch.qkv_bias)
        self.v_proj = Linear(arch.hidden_size, kv_heads, arch.qkv_bias)
        self.o_proj = Linear(heads, arch.hidden_size, arch.o_bias)
        norm = NORMS[arch.norm]
        self.q_norm = norm(arch.head_dim, arch.rms_norm_eps) if arch.qk_norm else None
        self.k_norm = norm(arch.head_dim, arch.rms_norm_eps) if arch.qk_norm else None
        self.backend, self.enter, self.leave, self.ops = SDPA, queries_keys_values, project, Ops()

    def forward(self, h: Tensor, ctx: AttnContext, norm: RMSNorm) -> Tensor:
        """h: [T, D] -> [T, D], attention over the norm of h."""
        q, k, v = self.enter(self, h, norm, *ctx.rope[self.rope])
        return self.leave(self, self.backend(q, k, v, ctx, self.kind, self.scale).flatten(-2))
