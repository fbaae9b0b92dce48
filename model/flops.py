"""Model FLOPs of a training step, for MFU. Multiplications and additions each count; recomputation does not.

A linear of n weights costs a token 2n forward, 2n for the gradient of its input and, if it trains, 2n for that of its weight.
Causal attention over a document of length L costs it 2 * heads * head_dim * L forward (half of the full square, for scores and
for values) and twice that backward (PaLM, https://arxiv.org/abs/2204.02311, appendix B). Windows are not discounted.
"""

from __future__ import annotations

from model.decoder import Decoder
from model.transforms.lora import is_adapter

# dense bf16 peak, FLOP/s, by a part of torch's device name (vendor datasheets)
PEAK_BF16 = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12}


def per_token(net: Decoder, length: float) -> float:
    """FLOPs for one token of a document with `length` tokens: for a mixture, the mean over tokens."""
    arch = net.arch
    products = [p for name, p in net.named_parameters() if name.endswith("_proj.weight") or name == "lm_head.weight" or is_adapter(name)]
    products += [net.model.embed_tokens.weight] if net.lm_head is None else []
    forward = 2 * sum(p.numel() for p in products)
    attention = 2 * arch.num_attention_heads * arch.head_dim * arch.num_hidden_layers * length
    return 2 * forward + 2 * sum(p.numel() for p in products if p.requires_grad) + 3 * attention


def peak(device_name: str) -> float | None:
    """The device's dense bf16 peak in FLOP/s, None if it is not in the table."""
    return next((value for name, value in PEAK_BF16.items() if name in device_name), None)
