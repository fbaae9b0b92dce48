"""Generation: the cache changes nothing, nor does the batch; sampling draws from the distribution it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.tokenizer import Tokenizer
from model import load_pretrained
from model.arch import Arch
from model.cache import Cache
from model.config import LoraConfig
from model.safetensors_io import export_adapter, materialize
from tests.model.folders import prepared, train_a_little, write_model
from tests.model.golden import GOLDEN, distance, fresh, write_config
from tests.tiny import write_tokenizer
from tools.generate import Sampled, generate, main, place

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with weights and a tokenizer that has a chat template; generation_config.json names a further eos."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    vocab = write_tokenizer(path)
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}', encoding="utf-8")
    return write_model(path, "llama", vocab_size=vocab)


def test_command_prompts_and_chat(folder, capsys):
    net, tokenizer = load_pretrained(folder), Tokenizer.load(folder)
    assert tokenizer.eos_ids == (2, 7)
    assert net.model.layers[0].self_attn.backend.name == "varlen"

    def answers(texts: list[str]) -> str:
        prompts = [tokenizer.encode(t) for t in texts]
        return "".join(tokenizer.decode(a, skip_special=True) + "\n" for a in generate(net, prompts, 5, tokenizer.eos_ids))

    assert main(["--model", str(folder), "--max-new-tokens=5", "--prompt", "the cat", "--prompt", "on a mat"]) == 0
    out, err = capsys.readouterr()
    assert out == answers(["the cat", "on a mat"]) and err == ""
    assert main(["--model", str(folder), "--max-new-tokens=5", "--chat", "the cat"]) == 0
    assert capsys.readouterr().out == answers(["<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"])


def test_command_file_and_adapter(folder, tmp_path, capsys):
    base, adapter = load_pretrained(folder), tmp_path / "adapter"
    net = prepared(folder, LoraConfig(rank=4))
    materialize(net, "cpu", 0, folder)
    train_a_little(net)
    export_adapter(net, adapter, LoraConfig(rank=4), "base")
    rows = [{"prompt": "the cat", "id": 1}, {"messages": [{"role": "user", "content": "dogs"}]}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    assert main(["--model", str(folder), "--adapter", str(adapter), "--max-new-tokens=6", "--file", str(file)]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [{k: v for k, v in p.items() if k != "completion"} for p in printed] == rows
    tokenizer = Tokenizer.load(folder)
    prompt = tokenizer.encode("the cat")
    (expected,), (unadapted,) = (generate(n, [prompt], 6, tokenizer.eos_ids) for n in (net, base))
    assert printed[0]["completion"] == tokenizer.decode(expected, skip_special=True)
    assert expected != unadapted


WRONG = {
    "no folder": (["--model", "/no/such", "--prompt", "x"], "/no/such: no such folder"),
    "no cuda": (["--prompt", "x", "--device", "cuda"], "--device='cuda' is not available here"),
    "limit": (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens=0 must be at least 1"),
    "temperature": (["--prompt", "x", "--temperature", "-1"], "--temperature=-1.0 must be 0 or positive"),
    "top_p": (["--prompt", "x", "--top-p", "0"], "--top-p=0.0 must be above 0"),
    "empty": (["--prompt", ""], "prompt 1 is empty"),
    "no file": (["--file", "/no/such.jsonl"], "/no/such.jsonl: cannot be read"),
    "no JSON": (["--file", "{tmp}/a.jsonl"], "a.jsonl:2: is not JSON"),
    "no prompt": (["--file", "{tmp}/b.jsonl"], "b.jsonl:1: needs `prompt`"),
    "role": (["--file", "{tmp}/c.jsonl"], "prompt 1: .*unknown role judge"),
    "no messages": (["--file", "{tmp}/d.jsonl"], "prompt 1: "),
}


@pytest.mark.parametrize("case", WRONG)
def test_command_errors_are_one_line_and_exit_code_2(folder, tmp_path, capsys, case):
    args, message = WRONG[case]
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n{\n')
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "c.jsonl").write_text('{"messages": [{"role": "judge", "content": "x"}]}\n')
    (tmp_path / "d.jsonl").write_text('{"messages": ["x"]}\n')
    model = [] if "--model" in args else ["--model", str(folder)]
    assert main([*model, *(a.replace("{tmp}", str(tmp_path)) for a in args)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err)


def test_auto_is_what_the_machine_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert place("auto", "auto") == ("cpu", torch.float32)
    assert place("cpu", "bf16") == ("cpu", torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert place("auto", "auto") == place("cuda", "auto") == ("cuda", torch.bfloat16)
    assert place("cpu", "auto") == ("cpu", torch.float32)


def test_help_needs_no_torch():
    code = "import sys; from tools.generate import _parser; _parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
