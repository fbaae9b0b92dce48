"""RoPE frequencies and norms against transformers' own, at real sizes; relative positions; buffers after a build on meta."""

from __future__ import annotations

import pytest
import torch

from kernels.rope import rotate
from model import build
from model.arch import Arch, Rope
from model.norm import NORMS
from model.rope import Rotary, frequencies
from tests.model.golden import GOLDEN, distance, rows, write_config

ROPES = {
    "default": {},
    "linear": {"factor": 8.0},
    "llama3": {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-untruncated": {"factor": 40.0, "original_max_position_embeddings": 4096, "truncate": False, "beta_fast": 16, "beta_slow": 2},
    "yarn-mscale": {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn-implied": {"factor": None, "original_max_position_embeddings": 8192},
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("size,theta", [(64, 1e4), (128, 5e5), (256, 1e6)])
def test_frequencies_are_bit_equal_to_theirs(tmp_path, name, size, theta):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind, keys = name.split("-")[0], ROPES[name]
    changes = {"head_dim": size, "rope_theta": theta, "max_position_embeddings": 131072, "rope_scaling": {"rope_type": kind, **keys}}
    folder = write_config(tmp_path, "llama", **changes)
    (rope,) = Arch.from_folder(folder).ropes
    config = transformers.AutoConfig.from_pretrained(folder)
    if kind == "default":
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        theirs, scale = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        theirs, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    assert torch.equal(frequencies(rope, size), theirs)
    assert rope.attention_factor == pytest.approx(scale, rel=1e-12)


def test_scores_depend_on_distance_only():
    rotary = Rotary((Rope(1e4), Rope(100.0)), 16)
    rotary.reset_buffers("cpu")
    q, k = torch.randn(1, 2, 16), torch.randn(1, 2, 16)

    def score(a: int, b: int, rope: int) -> torch.Tensor:
        cos, sin = rotary(torch.tensor([a, b]), torch.float32)[rope]
        return (rotate(q, cos[:1], sin[:1]) * rotate(k, cos[1:], sin[1:])).sum()

    for rope in (0, 1):
        assert torch.allclose(score(7, 3, rope), score(104, 100, rope), atol=1e-4)
        assert not torch.allclose(score(7, 3, rope), score(7, 4, rope), atol=1e-2)


@pytest.mark.parametrize("name", GOLDEN)
def test_buffers_come_back_after_meta(tmp_path, name):
    arch = Arch.from_folder(write_config(tmp_path, name))
    net = build(arch)
    assert all(t.is_meta for t in (*net.parameters(), *net.buffers()))
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert not [key for key in net.state_dict() if "rotary" in key]
    assert ("lm_head.weight" in net.state_dict()) != arch.tie_word_embeddings
    net.to_empty(device="cpu")
    for b in net.buffers():
        b.fill_(float("nan"))
    net.reset_buffers("cpu")
    for i, rope in enumerate(arch.ropes):
        assert torch.equal(getattr(net.model.rotary, f"frequencies_{i}"), frequencies(rope, arch.head_dim))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    assert net(rows(arch)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_round_where_theirs_do(dtype):
    pytest.importorskip("transformers")
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(7, 33, generator=g).to(dtype) * 5, torch.randn(33, generator=g).to(dtype)
    for kind, theirs in (("rms", LlamaRMSNorm), ("rms_offset", Gemma3RMSNorm)):
        ours, reference = NORMS[kind](33, 1e-5), theirs(33, eps=1e-5).to(dtype)
        ours.weight.data, reference.weight.data = w.clone(), w.clone()
        y = ours(x)
        assert y.dtype == dtype
        if dtype == torch.float64:  # theirs computes in fp32 even here
            assert distance(y, reference(x)) < 1e-6
        else:
            assert torch.equal(y, reference(x))
