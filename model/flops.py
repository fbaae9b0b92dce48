"""Model FLOPs of a training step, for MFU. Multiplications and additions each count; recomputation does not.

Per token a linear of n weights costs 2n forward, 2n for the gradient of its input and, if it trains, 2n for the gradient of
its weight. Causal attention over a document of length L costs 2 * heads * head_dim * L per token forward (half of the full
square, for scores and for values) and twice that backward (PaLM, https://arxiv.org/abs/2204.02311, appendix B).
"""

from __future__ import annotations

from model.arch import Arch

# dense bf16 peak without sparsity, FLOP/s, by a substring of torch's device name (vendor datasheets)
PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}


def per_token(arch: Arch, linear_weights: int, trained_linear_weights: int, length: float) -> float:
    """FLOPs for one token of a document with `length` tokens (the mean over tokens, for a mixture)."""
    attention = 6 * arch.num_attention_heads * arch.head_dim * arch.num_hidden_layers * length
    return 4 * linear_weights + 2 * trained_linear_weights + attention


def peak(device_name: str) -> float | None:
    """The device's dense bf16 peak in FLOP/s, None if it is not in the table."""
    return next((value for name, value in PEAK_BF16.items() if name in device_name), None)
