"""Grouped-query attention over packed rows, and the struct that says where documents begin and end.

A row of T slots holds documents end to end; a query sees keys of its own document only, up to itself (kind `full`) or
the last `size` of those (kind `window`). How that is computed is the backend's business (model/backends.py).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from model.arch import Arch, Kind
from model.backends import SDPA
from model.linear import Linear, Slots
from model.norm import NORMS
from model.rope import rotate


class AttnContext:
    """What every block needs to know about one micro-batch; built once, handed down as one argument.

    positions: [T] int32, restarting at 0 in each document.
    cu_seqlens: [N+1] int32, document borders from 0 to T, the end repeated up to a fixed N.
    max_seqlen: no document is longer.
    rope: for each rope of the model (cos, sin), each [T, 1, head_dim].

    What else a backend needs it makes from these in `prepare`, before the blocks run: masks, once per kind, or the borders on
    the host.
    """

    def __init__(self, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int, rope: list[tuple[Tensor, Tensor]]):
        self.positions, self.cu_seqlens, self.max_seqlen, self.rope = positions, cu_seqlens, max_seqlen, rope
        self.masks: dict[Kind, Tensor] = {}  # [T, T] bool: may query row see key column
        self.borders: list[int] = []  # cu_seqlens on the host

    def make_mask(self, kind: Kind) -> None:
        if kind not in self.masks:
            slots = torch.arange(self.positions.numel(), device=self.positions.device, dtype=self.cu_seqlens.dtype)
            document = torch.searchsorted(self.cu_seqlens[1:], slots, right=True)
            distance = self.positions[:, None] - self.positions[None, :]
            seen = (document[:, None] == document[None, :]) & (distance >= 0)
            self.masks[kind] = seen & (distance < kind.size) if kind.name == "window" else seen

    def make_borders(self) -> None:
        """On the CPU only: a GPU's borders would stop the host until all work before them is done."""
        if not self.borders:
            self.borders = self.cu_seqlens.tolist()
            longest = max(b - a for a, b in pairwise(self.borders))
            assert longest <= self.max_seqlen, f"a document of {longest} tokens under max_seqlen={self.max_seqlen}"  # CUDA relies on it


class Backend(Protocol):
    """softmax(scale * q k^T over the keys that `kind` lets a query see) v."""

    name: str

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ctx: AttnContext, kind: Kind, scale: float) -> Tensor:
        """q: [T, N, H]; k, v: [T, K, H] with N a multiple of K, head n using group n // (N / K) -> [T, N, H]."""

    def prepare(self, ctx: AttnContext, kind: Kind) -> None:
        """Makes in `ctx` what a call of this kind reads there. Outside the blocks, so that these compile as one graph."""

    def unsupported(self, arch: Arch, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend cannot compute this model there, or None. It must keep documents apart or refuse."""


class Attention(Slots):
    """Slot `backend`: see Backend."""

    slots = ("backend",)
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
        self.backend = SDPA

    def forward(self, x: Tensor, ctx: AttnContext) -> Tensor:
        """x: [T, D] -> [T, D]."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = ctx.rope[self.rope]
        out = self.backend(rotate(q, cos, sin), rotate(k, cos, sin), v, ctx, self.kind, self.scale)
        return self.o_proj(out.flatten(-2))
