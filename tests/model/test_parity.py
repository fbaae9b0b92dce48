"""Against transformers: logits and every gradient of tiny random models, for every family and rope. fp32, no download.

Relative error is ||ours - theirs|| / ||theirs|| per tensor, at most 1e-5, or twice the distance of transformers' own fp32
result from its fp64 result where that is more (small gradients that are differences of large numbers).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.arch import Arch
from model.families import FAMILIES
from model.weights import NameMap
from tests.model.golden import GOLDEN, distance, documents, fresh, rows, write_config

transformers = pytest.importorskip("transformers")  # in the `test` extra


def test_our_kernels_package_is_none_of_theirs():
    """transformers looks into any importable package called `kernels`, and asks its version."""
    import kernels

    assert Path(kernels.__file__).read_text(encoding="utf-8") == ""
    assert not transformers.utils.is_kernels_available()


def test_every_family_has_a_golden_config():
    assert {config["model_type"] for config in GOLDEN.values()} == set(FAMILIES)


def theirs(folder, net, dtype: torch.dtype):
    """transformers' model of the folder's config with the weights of `net`; its parameters by our names, tied ones once."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    model = kind._from_config(config, attn_implementation="eager", dtype=dtype).eval()
    names = NameMap.of(net)
    parameters = {names.to_hf(name): p for name, p in net.named_parameters()}
    missing, unexpected = model.load_state_dict({name: p.detach() for name, p in parameters.items()}, strict=False)
    assert not unexpected
    ours = {names.from_hf(name) for name in missing} - {None}
    assert ours <= ({"lm_head.weight"} if net.arch.tie_word_embeddings else set()), missing
    by_name = dict(model.named_parameters())
    return model, {name: by_name[names.to_hf(name)] for name, _ in net.named_parameters()}


def reference(folder, net, row, weight: Tensor, dtype: torch.dtype):
    """Their logits [T, V], and gradients of sum(weight * logp) by our names; documents one by one, as transformers wants them."""
    model, parameters = theirs(folder, net, dtype)
    logits = torch.cat([model(input_ids=d.tokens[None]).logits[0] for d in documents(row)])
    learned = row.labels >= 0
    logp = torch.log_softmax(logits, -1)[learned].gather(1, row.labels[learned, None])[:, 0]
    (logp * weight[learned].to(dtype)).sum().backward()
    return logits.detach(), {name: p.grad for name, p in parameters.items()}


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_and_every_gradient(tmp_path, name):
    folder = write_config(tmp_path / name, name)
    arch = Arch.from_folder(folder)
    net, row = fresh(arch), rows(arch)
    weight = torch.randn(row.tokens.numel(), generator=torch.Generator().manual_seed(1))
    logits64, grads64 = reference(folder, net, row, weight, torch.float64)
    logits32, grads32 = reference(folder, net, row, weight, torch.float32)
    assert logits32.std() > 0.3

    ours = net(row, logits_at=torch.arange(row.tokens.numel()))
    assert ours.dtype == torch.float32
    assert distance(ours, logits32) <= max(1e-5, 2 * distance(logits32, logits64))
    logp = net(row)
    assert torch.equal(logp == 0, row.labels < 0)
    (logp * weight).sum().backward()
    for key, p in net.named_parameters():
        assert distance(p.grad, grads32[key]) <= max(1e-5, 2 * distance(grads32[key], grads64[key])), key

    padded = torch.stack([d.tokens for d in documents(row) if len(d.tokens) == 11])
    assert distance(net.logits(padded)[0], logits32[: len(padded[0])]) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_bf16_rounds_no_worse_than_theirs(tmp_path, name):
    folder = write_config(tmp_path / name, name)
    arch = Arch.from_folder(folder)
    row = rows(arch, (40,))
    every = torch.arange(40)
    net = fresh(arch)
    exact = net(row, logits_at=every)
    model, _ = theirs(folder, net, torch.bfloat16)
    net.compute_dtype = torch.bfloat16  # fp32 masters, cast at use
    ours, hf = net(row, logits_at=every), model(input_ids=row.tokens[None]).logits[0].float()
    assert 1e-3 < distance(ours, exact) <= 1.3 * distance(hf, exact)
    with torch.no_grad():
        embedded = net.model.embed_tokens(row.tokens, torch.bfloat16)
        assert torch.equal(embedded, model.get_input_embeddings()(row.tokens))
