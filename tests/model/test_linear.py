"""Slots: each filled once by one owner, in any order, with the same result."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from model.arch import Arch
from model.ffn import separate
from model.linear import Linear, dense
from tests.model.golden import fresh, rows, write_config


class Shard:
    """Row-parallel with one other rank whose part of the product is `other`."""

    def __init__(self, other: torch.Tensor):
        self.other = other

    def enter(self, x):
        return x[..., :3]

    def leave(self, y):
        return y + self.other


def layer() -> Linear:
    linear = Linear(3, 4, bias=True)
    g = torch.Generator().manual_seed(0)
    for p in linear.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g))
    return linear


def test_alone_it_is_torch_linear():
    linear, x = layer(), torch.randn(2, 5, 3)
    assert torch.allclose(linear(x), F.linear(x, linear.weight, linear.bias), atol=1e-6)
    assert list(linear.state_dict()) == ["weight", "bias"]
    assert Linear(3, 4).bias is None


def test_weight_is_cast_to_the_input():
    linear = layer()
    y = linear(torch.randn(5, 3, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert linear.weight.grad.dtype == torch.float32


def test_any_order_gives_the_same_and_the_bias_comes_once_after_the_reduction():
    torch.manual_seed(0)
    x, other = torch.randn(5, 7), torch.randn(5, 4)
    parts = {
        "storage": lambda linear, dtype: 2 * dense(linear, dtype),
        "gemm": lambda x, w: F.linear(x, w) + 1,
        "adapter": lambda linear, x: F.linear(x, linear.weight.detach() * 3),
        "shard": Shard(other),
    }
    results = []
    for order in itertools.permutations(parts):
        linear = layer()
        for slot in order:
            linear.fill(slot, parts[slot], f"owner of {slot}")
        results.append(linear(x))
        assert list(linear.state_dict()) == ["weight", "bias"]
    linear = layer()
    expected = F.linear(x[:, :3], 5 * linear.weight) + 1 + other + linear.bias
    assert torch.allclose(results[0], expected, atol=1e-5)
    assert all(torch.equal(r, results[0]) for r in results)


def test_filling_twice_names_both_owners():
    linear = layer()
    linear.fill("adapter", lambda linear, x: 0, "lora")
    with pytest.raises(ValueError, match=r"dora cannot fill slot 'adapter' of this Linear: lora already has"):
        linear.fill("adapter", lambda linear, x: 0, "dora")
    with pytest.raises(ValueError, match=r"no slot 'weight'; it has storage, gemm, adapter, shard"):
        linear.fill("weight", None, "x")
    assert "adapter: lora" in repr(linear)


def test_the_fused_slot_of_the_ffn_sees_its_linears(tmp_path):
    arch = Arch.from_folder(write_config(tmp_path, "llama"))
    net, row, seen = fresh(arch), rows(arch), []
    before = net(row)
    for block in net.model.layers:
        block.mlp.fill("impl", lambda ffn, *rest: seen.append(ffn) or separate(ffn, *rest), "kernels.ffn")
    assert torch.equal(net(row), before)
    assert seen == [block.mlp for block in net.model.layers]
