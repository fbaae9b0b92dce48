"""Keys and values kept between the steps of generation: an attention backend that wraps a backend.

    prefill  all prompts packed into one row: the wrapped backend computes, keys and values are filed by sequence and position
    step     one token of every sequence: its key and value are filed, and its query looks at what is filed

A cache holds B sequences of up to `capacity` tokens, ragged: `lengths` says how many each has. Windows are respected by mask;
nothing is evicted, so a window layer holds as much as a full one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from model.arch import Kind
from model.attention import AttnContext, Backend
from model.decoder import Decoder, Row


class Cache:
    """Keys and values of B sequences in every layer of `net`, [B, K, capacity, H] each.

    Args:
        net: the model; its attentions use the cache inside `with cache.installed():` only.
        count: number of sequences B.
        capacity: longest sequence, prompt and answer.
    """

    def __init__(self, net: Decoder, count: int, capacity: int):
        weight = net.model.embed_tokens.weight
        shape = (count, net.arch.num_key_value_heads, capacity, net.arch.head_dim)
        self.net, self.device = net, weight.device
        self.lengths = torch.zeros(count, dtype=torch.int64, device=self.device)
        self.keys = [torch.zeros(shape, dtype=net.compute_dtype, device=self.device) for _ in net.model.layers]
        self.values = [torch.zeros_like(k) for k in self.keys]
        self.sequence = self.position = self.lengths  # where the tokens of the current call are filed, [T] each
        self.filled = 0  # longest sequence so far, on the host: how much of the capacity a query looks at
        self._masks: dict[Kind, Tensor] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, every attention of the model reads and writes this cache."""
        attentions = [block.self_attn for block in self.net.model.layers]
        inner = [a.backend for a in attentions]
        for layer, a in enumerate(attentions):
            a.backend = CachedBackend(self, layer, a.backend)
        try:
            yield
        finally:
            for a, backend in zip(attentions, inner):
                a.backend = backend

    @torch.no_grad()
    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """The prompts of all sequences, none empty -> logits after each, [B, V] fp32."""
        lengths = [len(p) for p in prompts]
        self.lengths = torch.tensor(lengths, device=self.device)
        self.filled = max(lengths)
        ends = self.lengths.cumsum(0)
        borders = F.pad(ends, (1, 0)).int()
        self.sequence = torch.repeat_interleave(torch.arange(len(lengths), device=self.device), self.lengths)
        self.position = torch.arange(sum(lengths), device=self.device) - borders[self.sequence]
        tokens = torch.tensor([t for p in prompts for t in p], device=self.device)
        return self.net(Row(tokens, self.position.int(), borders, self.filled), logits_at=ends - 1)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """The next token of every sequence, [B] int64 -> logits after it, [B, V] fp32."""
        count = tokens.numel()
        slots = torch.arange(count, device=self.device)
        self.sequence, self.position = slots, self.lengths
        self.lengths = self.lengths + 1
        self.filled += 1
        self._masks.clear()
        borders = torch.arange(count + 1, dtype=torch.int32, device=self.device)
        return self.net(Row(tokens, self.position.int(), borders, 1), logits_at=slots)

    def keep(self, rows: list[int]) -> None:
        """Forgets every sequence but these; they are numbered anew in this order."""
        index = torch.tensor(rows, device=self.device)
        self.lengths = self.lengths[index]
        self.keys, self.values = [k[index] for k in self.keys], [v[index] for v in self.values]

    def mask(self, kind: Kind) -> Tensor:
        """[B, filled] bool: may the current query of a sequence see what is filed at a position."""
        if kind not in self._masks:
            distance = self.position[:, None] - torch.arange(self.filled, device=self.device)
            self._masks[kind] = (distance >= 0) & (distance < kind.size) if kind.name == "window" else distance >= 0
        return self._masks[kind]


class CachedBackend:
    """What fills an attention's slot while a cache is installed."""

    name = "cached"

    def __init__(self, cache: Cache, layer: int, inner: Backend):
        self.cache, self.layer, self.inner = cache, layer, inner

    def unsupported(self, arch, device: torch.device, dtype: torch.dtype) -> str | None:
        return self.inner.unsupported(arch, device, dtype)

    def prepare(self, ctx: AttnContext, kind: Kind) -> None:
        if ctx.queries.longest > 1:
            self.inner.prepare(ctx, kind)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ctx: AttnContext, kind: Kind, scale: float) -> Tensor:
        """q: [T, N, H]; k, v: [T, K, H]. A row whose documents are all of length 1 is a step, any other a prefill."""
        cache = self.cache
        keys, values = cache.keys[self.layer], cache.values[self.layer]
        keys[cache.sequence, :, cache.position] = k
        values[cache.sequence, :, cache.position] = v
        if ctx.queries.longest > 1:
            return self.inner(q, k, v, ctx, kind, scale)
        q, keys, values = q[:, :, None], keys[:, :, : cache.filled], values[:, :, : cache.filled]
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, keys, values, cache.mask(kind)[:, None, None], scale=scale, enable_gqa=grouped)
        return out[:, :, 0]
