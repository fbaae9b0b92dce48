"""Schedules, the optimizer's groups and state, and clipping."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from kernels import launch
from optim.adamw import LARGEST, OneLaunch, build, choose, set_lr, state_tensors
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


needs_triton = pytest.mark.skipif(launch.triton is None, reason="triton is not installed")
IMPLS = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])


@IMPLS
def test_adamw_decays_matrices_only_and_equals_torchs(impl):
    ours, theirs = model(), model()
    cfg = AdamWConfig(lr=0.1, weight_decay=0.5, beta2=0.95, impl=impl)
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


@IMPLS
def test_the_state_exists_from_the_start_and_restores_to_the_bit(impl):
    nets = [model(), model()]
    opts = [build(n.named_parameters(), AdamWConfig(lr=0.1, impl=impl)) for n in nets]
    names = state_tensors(opts[0], nets[0].named_parameters()).keys()
    assert names == {f"{name}.{key}" for name, _ in nets[0].named_parameters() for key in ("step", "exp_avg", "exp_avg_sq")}

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


def update(net: nn.Module, opt: torch.optim.Optimizer, seed: int, max_norm: float = 0.0, without: int | None = None) -> torch.Tensor:
    """A step as train.py takes it; `without` a gradient of this parameter. Returns the norm."""
    net(torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    for i, p in enumerate(net.parameters()):
        p.grad = None if i == without else p.grad
    norm = clip(net.parameters(), max_norm, opt)
    opt.step()
    opt.zero_grad(set_to_none=True)
    return norm


@needs_triton
def test_a_run_goes_on_with_the_other_implementation():
    nets = [model() for _ in range(3)]
    opts = [build(n.named_parameters(), AdamWConfig(lr=0.1, impl=impl)) for n, impl in zip(nets, ("torch", "triton", "torch"))]
    for step in range(3):
        update(nets[0], opts[0], step), update(nets[2], opts[2], step)
    nets[1].load_state_dict(nets[0].state_dict())
    saved = state_tensors(opts[0], nets[0].named_parameters())
    restored = state_tensors(opts[1], nets[1].named_parameters())
    assert {k: (t.shape, t.dtype) for k, t in saved.items()} == {k: (t.shape, t.dtype) for k, t in restored.items()}
    for name, t in restored.items():
        t.copy_(saved[name])
    update(nets[1], opts[1], 3), update(nets[2], opts[2], 3)
    assert all(t == 4 for name, t in restored.items() if name.endswith("step"))
    for a, b, before in zip(nets[1].parameters(), nets[2].parameters(), nets[0].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert not torch.equal(a, before)


@needs_triton
def test_one_launch_leaves_alone_what_has_no_gradient():
    """Also of its decay and of its step count, so that later steps correct its moments' bias differently."""
    nets = [model(), model()]
    opts = [build(n.named_parameters(), AdamWConfig(lr=0.1, weight_decay=0.5, impl=impl)) for n, impl in zip(nets, ("torch", "triton"))]
    for step, without in enumerate((None, 0, 3, None)):
        for net, opt in zip(nets, opts):
            update(net, opt, step, without=without)
    assert isinstance(opts[1], OneLaunch)
    counts = [[int(opt.state[p]["step"]) for p in net.parameters()] for net, opt in zip(nets, opts)]
    assert counts[0] == counts[1] == [3, 4, 4, 3, 4, 4]
    for a, b in zip(*(n.parameters() for n in nets)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    opts[1].step()  # no gradient at all


@needs_triton
def test_one_launch_for_all_parameters(monkeypatch):
    seen = []
    monkeypatch.setattr("optim.adamw.adamw", lambda *args: seen.append(args))
    net = model()
    update(net, build(net.named_parameters(), AdamWConfig(weight_decay=0.5, impl="triton")), 0, max_norm=1.0)
    (params, _, _, _, decays, scale, how), *more = seen
    assert not more and {id(p) for p in params} == {id(p) for p in net.parameters()}
    assert [p.ndim for p in params if decays[list(map(id, params)).index(id(p))]] == [2, 2] and how.step == 1 and 0 < scale < 1


@needs_triton
def test_masters_in_bf16():
    nets = [model().bfloat16().float(), model().bfloat16()]
    opts = [build(n.named_parameters(), AdamWConfig(lr=0.1, impl=impl)) for n, impl in zip(nets, ("torch", "triton"))]
    before = [p.detach().clone() for p in nets[0].parameters()]
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        b.grad = torch.randn(a.shape).bfloat16()
        a.grad = b.grad.float()
    for opt in opts:
        opt.step()
    for a, b, was in zip(nets[0].parameters(), nets[1].parameters(), before):
        assert b.dtype == opts[1].state[b]["exp_avg"].dtype == torch.bfloat16
        assert (a - was).abs().min() > 0.09
        torch.testing.assert_close(a, b.float(), rtol=2e-2, atol=1e-2)


def test_which_implementation(monkeypatch):
    trained = list(model().parameters())
    assert choose(trained, AdamWConfig())[0] == "torch"
    assert choose(trained, AdamWConfig(impl="torch")) == ("torch", "optimizer: AdamW, torch")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert choose(trained, AdamWConfig())[1].endswith(f"torch (not triton: {launch.unsupported(trained[0].device, torch.float32)})")
    monkeypatch.setattr(launch, "unsupported", lambda device, dtype: None)  # as on CUDA
    assert choose(trained, AdamWConfig()) == ("triton", "optimizer: AdamW, triton")
    few, many = (nn.Parameter(torch.empty(rows, 2**14, device="meta")) for rows in (2**14 - 1, 2**14))
    assert choose([few], AdamWConfig())[0] == "triton" and many.numel() == LARGEST
    impl, line = choose([many], AdamWConfig())
    assert impl == "torch" and line.endswith("(not triton: 268,435,456 parameters train, and it is for fewer than 268,435,456)")
    assert choose([many], AdamWConfig(impl="triton")) == ("triton", "optimizer: AdamW, triton")


@needs_triton
@pytest.mark.parametrize(
    ("trained", "reason"),
    [
        ([torch.zeros(2), torch.zeros(2, device="meta")], "parameters lie on several devices (cpu, meta)"),
        ([torch.zeros(2).double()], "it has no kernel for float64"),
        ([torch.zeros(2, 3).t()], "the memory of a parameter has gaps or another order"),
    ],
    ids=["devices", "dtype", "memory"],
)
def test_one_launch_refuses(trained, reason):
    trained = [nn.Parameter(t) for t in trained]
    assert choose(trained, AdamWConfig())[0] == "torch"
    with pytest.raises(ConfigError) as error:
        build([(str(i), p) for i, p in enumerate(trained)], AdamWConfig(impl="triton"))
    assert str(error.value) == f"optim.impl='triton' cannot be used: {reason}; use auto"


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


@needs_triton
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
def test_clipping_on_the_way_equals_clipping_before(max_norm):
    nets = [model(), model()]
    opts = [build(n.named_parameters(), AdamWConfig(lr=0.1, impl="triton")) for n in nets]
    for net in nets:
        (net(torch.ones(2, 5)).square().sum() * 10).backward()
    grads = [p.grad.clone() for p in nets[0].parameters()]
    norms = clip(nets[0].parameters(), max_norm, opts[0]), clip(nets[1].parameters(), max_norm)
    assert norms[0] == norms[1] > 1
    assert all(torch.equal(p.grad, g) for p, g in zip(nets[0].parameters(), grads)), "nothing has gone over them"
    for opt in opts:
        opt.step()
    for a, b in zip(*(n.parameters() for n in nets)):
        assert torch.equal(a, b) and torch.equal(opts[0].state[a]["exp_avg_sq"], opts[1].state[b]["exp_avg_sq"])
    assert all(opts[0].state[p]["exp_avg_sq"].abs().sum() > 0 for p in nets[0].parameters())
    opts[0].zero_grad()
    assert [g["grad_scale"] for g in opts[0].param_groups] == [None, None], "a factor is of the gradients it was found from"


def test_torchs_adamw_gets_scaled_gradients():
    net = model()
    opt = build(net.named_parameters(), AdamWConfig(impl="torch"))
    (net(torch.ones(2, 5)).square().sum() * 10).backward()
    assert clip(net.parameters(), 0.5, opt) > 1
    torch.testing.assert_close(clip(net.parameters(), 0.0), torch.tensor(0.5))
