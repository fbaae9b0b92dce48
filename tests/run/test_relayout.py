"""A run that changes its layout at every start ends like one that never stopped: the same packs, the same losses.

The command stays the same but for `[parallel]`. Each part is asked to stop (as by a signal) after two steps; the next one resumes under
another layout from what the one before saved. Sizes are uneven on purpose: rows that no axis divides, biases, tied embeddings, an adapter
of rank 3 over two ranks.

Losses and norms are sums over rows and ranks in another order, and the weights they come from differ by as much, through AdamW's
division as well: BOUND is 1e-5 relative. What counts (tokens, epochs, steps) is equal.
"""

from __future__ import annotations

import math
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from parallel.peers import Peers
from runtime.errors import ConfigError
from runtime.metrics import read
from tests import launch
from tests.tiny import write_chats, write_config, write_model
from train import accumulation

BOUND = 1e-5
EXPORT_BOUND = 1e-4  # a bias or a row of B that is near zero is a sum that cancels
PART = 2  # steps
EXTRA = """
[optim]
lr = 1e-2
[log]
every = 1
[checkpoint]
every = {every}
async = {background}
[train]
steps = {steps}
accumulate = {accumulate}
"""
LLAMA = {"attention_bias": True, "mlp_bias": True, "hidden_size": 36, "intermediate_size": 66, "head_dim": 6, "vocab_size": 325}
GEMMA = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "tie_word_embeddings": True,
    "hidden_size": 34,
    "intermediate_size": 58,
    "head_dim": 6,
    "vocab_size": 326,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 6,
    "sliding_window": 24,
    "sliding_window_pattern": 2,
}
ROWS = 4  # of a step: data ranks x accumulation
CASES = {
    "full": (
        LLAMA,
        "",
        False,
        [
            {"shard": 4},
            {"tensor": 2, "shard": 2},
            {"context": 2, "shard": 2},
            {},
            {"replicate": 2, "shard": 2},
            {"tensor": 2},
        ],
    ),
    "lora": (
        GEMMA,
        "[lora]\nrank = 3\ntrain_modules = ['embed_tokens', 'norm']\n",
        True,
        [
            {"tensor": 2, "shard": 2},
            {"context": 2, "tensor": 2},
            {"replicate": 2},
            {"shard": 2},
        ],
    ),
}


def ranks_of(layout: dict[str, int]) -> int:
    return math.prod(layout.values())


def go(argv: list[str], world: int, out: Path) -> str:
    ranks = launch.run(argv, world, out / "out")
    assert ranks.wait() == [0] * world, ranks.output()
    return ranks.output()


def records(out: Path) -> list[dict]:
    return [r for r in read(out / "metrics.jsonl") if "loss" in r]


@pytest.mark.parametrize("case", CASES)
def test_every_part_under_another_layout(tmp_path, monkeypatch, case):
    facts, extra, background, layouts = CASES[case]
    steps = PART * len(layouts)
    model, data = write_model(tmp_path / "model", **facts), write_chats(tmp_path / "data.jsonl", 50)

    def config(name: str, world: int) -> tuple[list[str], Path]:
        text = EXTRA.format(steps=steps, accumulate=ROWS // world, every=int(background), background=str(background).lower()) + extra
        return ["--config", str(write_config(tmp_path / f"{name}.toml", model, data, tmp_path / name, text))], tmp_path / name

    argv, calm = config("calm", 1)
    go(argv, 1, calm)
    want = records(calm)
    assert len({r["loss"] for r in want}) == steps and want[0]["loss"] - want[-1]["loss"] > 1, "nothing was learned"
    assert want[-1]["epoch"] > 1, "the plan of a second epoch is not seen"

    first = layouts[0]
    argv, out = config("changing", first.get("shard", 1) * first.get("replicate", 1))
    real = Peers.at
    for part, layout in enumerate(layouts):
        stop = PART * (part + 1) + 1

        def at(self, step, stop=stop):
            real(self, step)
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Peers, "at", at)
        said = go([*argv, *(f"--parallel.{axis}={n}" for axis, n in layout.items())], ranks_of(layout), out)
        assert ("resuming from" in said) == (part > 0), said
        assert ("stopped by request" in said) == (part + 1 < len(layouts)), said
        assert (out / "checkpoints" / "latest").read_text() == f"step_{PART * (part + 1)}\n"

    found = records(out)
    assert [(r["step"], r["tokens"], r["epoch"]) for r in found] == [(r["step"], r["tokens"], r["epoch"]) for r in want]
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in found] == pytest.approx([r[key] for r in want], rel=BOUND)
    a, b = (load_file(next((o / "export").glob("*.safetensors"))) for o in (calm, out))
    assert a.keys() == b.keys()
    assert max(((a[name] - b[name]).norm() / a[name].norm()).item() for name in a) < EXPORT_BOUND


@pytest.mark.parametrize(("packs", "data", "each"), [(8, 3, 1), (6, 4, 2), (12, 5, 4), (1, 2, 1)])
def test_numbers_of_ranks_that_can_share_a_step(packs, data, each):
    """`each` ranks share a pack, along tensor or context; what is advised works."""
    with pytest.raises(ConfigError, match=f"steps have {packs} packs, which {data} data ranks cannot share") as caught:
        accumulation(packs, SimpleNamespace(data_size=data, size=data * each))
    advised = [int(n) for n in re.search(r"start ([\d, ]+) ranks", str(caught.value))[1].split(", ")]
    assert advised[0] == each and advised[-1] == packs * each
    for ranks in advised:
        assert ranks % each == 0
        assert accumulation(packs, SimpleNamespace(data_size=ranks // each, size=ranks)) * ranks == packs * each
