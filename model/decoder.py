"""The decoder: embed -> blocks -> norm -> head. What differs between families is in the parts, not here.

Names of modules and parameters are Hugging Face's (`model.layers.3.self_attn.q_proj.weight`), so for dense models a folder's
tensors are ours. Everything that touches a parameter runs inside `Decoder.forward` (or `logits`): FSDP2 gathers weights in
hooks of the modules it was applied to, here the blocks and the root.

A tied head is the embedding: one Parameter under the embedding's name, and no `lm_head` in the state dict.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.linear_logprob import Extras, Scores
from model import families
from model.arch import Arch
from model.attention import AttnContext, Borders
from model.embed import Embedding
from model.head import Head, logits, token_logprobs
from model.linear import here
from model.norm import NORMS
from model.rope import Rotary


class Row(NamedTuple):
    """What the decoder reads of a micro-batch (data/batch.py has the one of training, with more fields)."""

    tokens: Tensor  # [T] int64, documents end to end
    positions: Tensor  # [T] int32, restarting at 0 in each document
    cu_seqlens: Tensor  # [N+1] int32, borders from 0 to T
    max_seqlen: int  # no document is longer
    labels: Tensor | None = None  # [T] int64, shifted already; negative: nothing is learned
    targets: int | None = None  # how many labels are not negative, where the host knows


class Trunk(nn.Module):
    """Everything but the head."""

    TP = {"embed_tokens": "vocab", "norm": "gather"}

    def __init__(self, arch: Arch):
        super().__init__()
        block = families.get(arch).Block
        self.embed_tokens = Embedding(arch.vocab_size, arch.hidden_size, arch.embed_scale)
        self.layers = nn.ModuleList(block(arch, i) for i in range(arch.num_hidden_layers))
        self.norm = NORMS[arch.norm](arch.hidden_size, arch.rms_norm_eps)
        self.rotary = Rotary(arch.ropes, arch.head_dim)

    def forward(self, row: Row, dtype: torch.dtype) -> Tensor:
        """Hidden states after the final norm: [T, D] in `dtype`."""
        borders = Borders(row.tokens.numel(), row.cu_seqlens, row.max_seqlen)
        ctx = AttnContext(borders, self.rotary(row.positions, dtype))
        for block in self.layers:
            block.self_attn.backend.prepare(ctx, block.self_attn.kind)
        h = self.embed_tokens(row.tokens, dtype)
        for block in self.layers:
            h = block(h, ctx)
        return self.norm(h)


class Decoder(nn.Module):
    """compute_dtype: dtype of activations; weights are cast to it where they are used.

    on_host: names of parameters that lie in host memory whatever the device (parallel/offload.py).
    logits_bytes: size of a buffer of logits, of which one or two exist at a time; None: as suits the device.
    head_impl: which implementation computes log-probabilities, a key of kernels/linear_logprob.py `IMPLS`.
    """

    TP = {"lm_head": "vocab"}

    def __init__(self, arch: Arch):
        super().__init__()
        self.arch = arch
        self.compute_dtype = torch.float32
        self.on_host: frozenset[str] = frozenset()
        self.logits_bytes: int | None = None
        self.head_impl = "torch"
        self.model = Trunk(arch)
        self.lm_head = None if arch.tie_word_embeddings else Head(arch.vocab_size, arch.hidden_size)

    def reset_buffers(self, device: torch.device | str) -> None:
        """Computes what is neither loaded nor trained; call it after `to_empty`."""
        self.model.rotary.reset_buffers(device)

    def forward(self, row: Row, logits_at: Tensor | None = None, extras: Extras | None = None, summed: bool = False) -> Tensor | Scores:
        """log p(labels[t] | all that slot t sees): [T] fp32, 0 where the label is negative.

        With `logits_at` ([M] int64, slots) the logits of those slots instead: [M, V] fp32.
        With `extras` the scores that they name, of which a loss takes `value` (kernels/linear_logprob.py).
        summed: the result will be summed without weights, so that each slot gets the same gradient; a trained head is cheaper then.
        """
        h = self.model(row, self.compute_dtype)
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        weight = here(head.weight)
        if logits_at is not None:
            return logits(h[logits_at], weight, self.arch.logit_softcap, head.shard)
        how = {"budget": self.logits_bytes, "learned": row.targets, "impl": self.head_impl, "extras": extras, "summed": summed}
        return token_logprobs(h, weight, row.labels, self.arch.logit_softcap, head.shard, **how)

    def logits(self, input_ids: Tensor) -> Tensor:
        """[B, S] int64 -> [B, S, V] fp32; every row is a document of its own. For inspection and tests."""
        count, length = input_ids.shape
        slots = torch.arange(count * length, device=input_ids.device)
        borders = torch.arange(count + 1, device=input_ids.device, dtype=torch.int32) * length
        row = Row(input_ids.flatten(), (slots % length).int(), borders, length)
        return self(row, logits_at=slots).unflatten(0, (count, length))
