"""Generation: the cache changes nothing, nor does the batch; sampling draws from the distribution it says."""

from __future__ import annotations

import pytest
import torch

from model.arch import Arch
from model.cache import Cache
from tests.model.golden import GOLDEN, distance, fresh, write_config
from tools.generate import Sampled, generate

PROMPTS = [[5], [3, 9, 27, 4, 44, 21, 8, 8, 90, 2, 17], [61, 62], [7, 7, 7, 7, 7, 7]]


def net_of(tmp_path, name: str):
    return fresh(Arch.from_folder(write_config(tmp_path, name)))


def without_cache(net, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(net.logits(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", GOLDEN)
def test_greedy_is_argmax_without_cache_and_without_batch(tmp_path, name):
    net = net_of(tmp_path, name)
    expected = [without_cache(net, p, 12) for p in PROMPTS]
    assert len({tuple(e) for e in expected}) == len(PROMPTS)
    assert generate(net, PROMPTS, 12) == expected
    assert [generate(net, [p], 12)[0] for p in PROMPTS] == expected
    assert generate(net, PROMPTS, 12, batch=3) == expected


@pytest.mark.parametrize("name", ["qwen2", "gemma3_text"])
def test_cached_logits_equal_the_whole_row(tmp_path, name):
    net = net_of(tmp_path, name)
    tokens = torch.randint(0, 90, (3, 14), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = net.logits(tokens)
    cache = Cache(net, 3, 14)
    with cache.installed():
        assert distance(cache.prefill([r[:n].tolist() for r, n in zip(tokens, (4, 4, 4))]), whole[:, 3]) < 1e-5
        for i in range(4, 14):
            assert distance(cache.step(tokens[:, i]), whole[:, i]) < 1e-5
    assert net.model.layers[0].self_attn.backend.name == "sdpa"


def test_stops_at_eos_and_goes_on_with_the_rest(tmp_path):
    net = net_of(tmp_path, "llama")
    free = generate(net, PROMPTS, 12)
    eos = {free[0][2], free[2][7]}
    stopped = generate(net, PROMPTS, 12, eos_ids=eos)
    for whole, cut in zip(free, stopped):
        first = next((i for i, t in enumerate(whole) if t in eos), len(whole))
        assert cut == whole[:first]
    assert len({len(s) for s in stopped}) > 1


def test_training_mode_is_left_as_found(tmp_path):
    net = net_of(tmp_path, "llama").train()
    generate(net, PROMPTS, 2)
    assert net.training


def test_sampling_does_not_depend_on_the_batch(tmp_path):
    net = net_of(tmp_path, "llama")
    a = generate(net, PROMPTS, 8, temperature=1.0, seed=3)
    assert a == generate(net, PROMPTS, 8, temperature=1.0, seed=3, batch=1)
    assert a != generate(net, PROMPTS, 8, temperature=1.0, seed=4)
    assert generate(net, PROMPTS, 8, temperature=1e-4) == generate(net, PROMPTS, 8)


def test_sampling_draws_from_the_distribution_it_says():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0, -30.0]])
    p = (logits / 0.7).softmax(-1)[0].double()
    draws = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000

    def shares(**cuts) -> torch.Tensor:
        return torch.bincount(Sampled(0.7, **cuts)(logits.expand(20000, -1), draws), minlength=5) / 20000

    assert torch.allclose(shares().double(), p, atol=1e-3)
    two = torch.where(torch.tensor([False, True, True, False, False]), p, 0.0)
    assert torch.allclose(shares(top_k=2).double(), two / two.sum(), atol=1e-3)
    assert p[1] < 0.8 < p[1] + p[2]  # so top_p = 0.8 keeps these two
    assert torch.allclose(shares(top_p=0.8).double(), two / two.sum(), atol=1e-3)
    assert shares(top_p=1e-9)[1] == 1
