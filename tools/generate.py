"""Text from a model folder: greedy or sampled, batched, with a KV cache.

python -m tools.generate --model out/run/export --prompt "Once upon"
"""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from model.decoder import Decoder


def generate(
    net: Decoder,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    batch: int = 128,
) -> list[list[int]]:
    """Continues every prompt until a token of `eos_ids`, which is left out, or `max_new_tokens`.

    `temperature` 0 takes the likeliest token. Otherwise a token is drawn from softmax(logits / temperature), cut to the `top_k`
    likeliest (0: all) and of those to the fewest that hold `top_p` of the probability. Every prompt has random numbers of its
    own, so an answer does not depend on what else is in the batch.

    Args:
        prompts: token ids, none empty.
        batch: sequences computed at a time; memory grows with it.
    """
    import torch

    def numbers(prompt: int) -> list[float]:
        source = random.Random(f"{seed}:{prompt}")  # torch's CPU generator would keep 32 bits of a combined seed
        return [source.random() for _ in range(max_new_tokens)]

    pick = Greedy() if temperature == 0 else Sampled(temperature, top_p, top_k)
    training = net.training
    net.eval()
    try:
        answers = []
        for start in range(0, len(prompts), batch):
            group = prompts[start : start + batch]
            draws = torch.tensor([numbers(start + i) for i in range(len(group))], dtype=torch.float64)
            answers += _continue(net, group, max_new_tokens, frozenset(eos_ids), pick, draws)
        return answers
    finally:
        net.train(training)


def _continue(net: Decoder, prompts: list[list[int]], limit: int, eos_ids: frozenset[int], pick, draws: Tensor) -> list[list[int]]:
    """One batch. draws: [B, limit] uniform in [0, 1)."""
    from model.cache import Cache

    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the cache continues
    running = set(rows)
    cache = Cache(net, len(prompts), max(map(len, prompts)) + limit)
    with cache.installed():
        logits = cache.prefill(prompts)
        for step in range(limit):
            tokens = pick(logits, draws[rows, step])
            for prompt, token in zip(rows, tokens.tolist()):
                if token in eos_ids:
                    running.discard(prompt)
                elif prompt in running:
                    answers[prompt].append(token)
            if not running or step + 1 == limit:
                return answers
            if 2 * len(running) <= len(rows):  # halve the batch rather than copy the cache for every sequence that ends
                kept = [row for row, prompt in enumerate(rows) if prompt in running]
                cache.keep(kept)
                rows, tokens = [rows[row] for row in kept], tokens[kept]
            logits = cache.step(tokens)
    return answers


class Greedy:
    def __call__(self, logits: Tensor, draws: Tensor) -> Tensor:
        """logits: [B, V] -> the likeliest token, [B] int64."""
        return logits.argmax(-1)


class Sampled:
    def __init__(self, temperature: float, top_p: float = 1.0, top_k: int = 0):
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k

    def __call__(self, logits: Tensor, draws: Tensor) -> Tensor:
        """logits: [B, V], draws: [B] uniform in [0, 1) -> [B] int64, by inverting the distribution function."""
        p, order = (logits / self.temperature).softmax(-1).double().sort(-1, descending=True)
        before = p.cumsum(-1) - p  # probability of all likelier tokens
        p[before >= self.top_p] = 0.0  # the likeliest always stays
        if self.top_k:
            p[:, self.top_k :] = 0.0
        total = p.cumsum(-1)
        chosen = (total <= draws.to(p.device)[:, None] * total[:, -1:]).sum(-1, keepdim=True)
        return order.gather(-1, chosen.clamp(max=p.shape[-1] - 1))[:, 0]
