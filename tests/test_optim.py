"""Schedules, the optimizer's groups and state, and clipping."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from optim.adamw import build, set_lr, state_tensors
from optim.clip import clip
from optim.config import AdamWConfig, ConstantConfig, CosineConfig, LinearConfig
from optim.schedule import factor, warmup_steps
from runtime.errors import ConfigError


def test_warmup_is_linear_and_moves_from_the_first_step():
    for cfg in (ConstantConfig(warmup=4), LinearConfig(warmup=4), CosineConfig(warmup=4)):
        assert [factor(cfg, s, 20) for s in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert warmup_steps(CosineConfig(warmup=0.03), 100) == 3
    assert warmup_steps(CosineConfig(warmup=0.03), 10) == 1
    assert warmup_steps(CosineConfig(warmup=0.0), 10) == 0


def test_decays():
    linear = [factor(LinearConfig(min=0.1), s, 9) for s in range(1, 10)]
    assert linear == pytest.approx([1 - 0.9 * s / 10 for s in range(1, 10)])
    cosine = [factor(CosineConfig(warmup=0), s, 9) for s in range(1, 10)]
    assert cosine == pytest.approx([0.5 + 0.5 * math.cos(math.pi * s / 10) for s in range(1, 10)])
    assert min(cosine) == cosine[-1] > 0
    assert factor(ConstantConfig(), 7, 9) == 1.0
    assert factor(CosineConfig(warmup=0, min=0.2), 50, 9) == pytest.approx(0.2)  # a run extended past its plan


@pytest.mark.parametrize("wrong", [{"warmup": -1}, {"warmup": 2.5}, {"min": 1.5}])
def test_schedules_refuse(wrong):
    with pytest.raises(ConfigError):
        CosineConfig(**wrong)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))


def test_adamw_decays_matrices_only_and_equals_torchs():
    ours, theirs = model(), model()
    cfg = AdamWConfig(lr=0.1, weight_decay=0.5, beta2=0.95)
    opt = build(ours.named_parameters(), cfg)
    decayed = [p for p in theirs.parameters() if p.ndim == 2]
    rest = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0}]
    ref = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), fused=False, foreach=False)
    for step in range(4):
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        for net, o in ((ours, opt), (theirs, ref)):
            set_lr(o, 0.1 / (step + 1))
            net(x).square().sum().backward()
            o.step()
            o.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_state_exists_from_the_start_and_restores_to_the_bit():
    nets = [model(), model()]
    opts = [build(n.named_parameters(), AdamWConfig(lr=0.1)) for n in nets]
    names = state_tensors(opts[0], nets[0].named_parameters()).keys()
    assert {"0.weight.exp_avg", "0.weight.exp_avg_sq", "0.weight.step"} <= names

    def step(i):
        nets[i](torch.ones(2, 5)).square().sum().backward()
        opts[i].step()
        opts[i].zero_grad()

    step(0)
    nets[1].load_state_dict(nets[0].state_dict())
    for name, t in state_tensors(opts[1], nets[1].named_parameters()).items():
        t.copy_(state_tensors(opts[0], nets[0].named_parameters())[name])
    step(0), step(1)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))


def test_frozen_parameters_are_left_out():
    net = model()
    net[0].weight.requires_grad_(False)
    opt = build(net.named_parameters(), AdamWConfig())
    assert sum(len(g["params"]) for g in opt.param_groups) == 5
    assert not any(name.startswith("0.weight") for name in state_tensors(opt, net.named_parameters()))


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
def test_clip_equals_torchs(max_norm):
    nets = [model(), model()]
    for net in nets:
        (net(torch.ones(2, 5)).square().sum() * 10).backward()
    norm = clip(nets[0].parameters(), max_norm)
    want = torch.nn.utils.clip_grad_norm_(nets[1].parameters(), max_norm or math.inf)
    assert norm > 1
    torch.testing.assert_close(norm, want)
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        torch.testing.assert_close(a.grad, b.grad)
