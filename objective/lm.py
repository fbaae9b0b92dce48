"""Supervised language modelling: minus the log-probability of every learned token, summed.

An objective is two functions. `count` says, before any forward pass, how many units of loss a micro-batch holds; the
trainer adds that up over micro-batches and ranks. `loss` returns this micro-batch's *sum* divided by that global number.
So loss and gradients do not depend on how the documents were cut into micro-batches and ranks.

Label smoothing and z-loss (objective/config.py) change what is minimized, not what is reported: evaluations and the number that
`loss` gives are the plain cross-entropy, so that runs with and without can be compared.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from data.batch import Batch
from kernels.linear_logprob import Extras
from objective.config import LmConfig

PLAIN = LmConfig()


def count(batch: Batch) -> int:
    """Learned tokens of this micro-batch."""
    return batch.learned()


def loss(net: nn.Module, batch: Batch, units: float, cfg: LmConfig = PLAIN) -> Tensor:
    """- sum_t log p(label_t) / units, a scalar fp32; `net(batch)` is 0 where nothing is learned.

    Its gradient is that of what `cfg` says to minimize: - sum_t value_t / units (kernels/linear_logprob.py).
    """
    if cfg == PLAIN:
        return -net(batch, summed=True).sum() / units
    scores = net(batch, extras=Extras(cfg.label_smoothing, cfg.z_loss), summed=True)
    minimized, plain = (-x.sum() / units for x in (scores.value, scores.logp))
    return minimized + (plain - minimized).detach()


@torch.no_grad()
def by_source(net: nn.Module, batch: Batch, sources: int) -> Tensor:
    """[sources, 2] fp64: for each data source the summed loss and the number of learned tokens."""
    logp = net(batch)
    learned = batch.labels >= 0
    source = batch.group["source"][batch.document().clamp(max=batch.group["source"].numel() - 1)].clamp(min=0)
    sums = torch.zeros(sources, 2, dtype=torch.float64, device=logp.device)
    sums[:, 0].index_add_(0, source[learned], -logp[learned].double())
    sums[:, 1].index_add_(0, source[learned], torch.ones_like(logp[learned], dtype=torch.float64))
    return sums


def seed_dropout(seed: int, pack: int) -> None:
    """Dropout masks derive from the run's seed and the pack's number alone: not from ranks, their order or a restart."""
    digest = hashlib.blake2b(f"{seed}/dropout/{pack}".encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest, "big"))
