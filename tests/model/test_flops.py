"""MFU's numerator against torch's own count of matrix products."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import build, flops
from model.arch import Arch
from model.config import LoraConfig
from model.decoder import Row
from model.transforms.lora import apply_lora
from model.transforms.trainable import apply_trainable
from model.weights import initialize
from tests.tiny import LLAMA


@pytest.mark.parametrize("lora", [False, True])
def test_formula_counts_the_products_that_run(tmp_path, lora):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": 97}))
    arch, n = Arch.from_folder(tmp_path), 48
    net = build(arch)
    cfg = LoraConfig(rank=4) if lora else None
    if cfg:
        apply_lora(net, cfg)
    apply_trainable(net, cfg, torch.float32)
    net.to_empty(device="cpu")
    net.reset_buffers("cpu")
    initialize(net, 0)
    tokens = torch.arange(n)
    row = Row(tokens, tokens.int(), torch.tensor([0, n], dtype=torch.int32), n, tokens)
    with FlopCounterMode(display=False) as counter:
        net(row).sum().backward()
    counted = sum(v for op, v in counter.get_flop_counts()["Global"].items() if "attention" not in str(op) and "bmm" not in str(op))
    expected = flops.per_token(net, 0) * n
    # LoRA: the first layer's input needs no gradient. Full: torch's counter does not know addmm_, the head's weight gradient
    uncounted = 2 * n * (3 * 32 * 32 if lora else 97 * 32)
    assert expected - uncounted <= counted <= expected * 1.001
    assert uncounted < 0.06 * expected
    attention = flops.per_token(net, n) - flops.per_token(net, 0)
    assert attention == 3 * 2 * 4 * 8 * 2 * n  # forward and twice that backward: heads x head_dim x layers x length
    assert flops.peak("NVIDIA H200") == 989e12
    assert flops.peak("a CPU") is None
