"""What a layout's refusals advise is legal: every advice is taken, over many models, numbers of ranks and layouts, and all of the
messages are short lines with the numbers in them."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace

import pytest

from model.arch import Arch, Kind, Layer, Rope
from model.config import LoraConfig
from parallel import mesh
from parallel.apply import check
from parallel.config import ParallelConfig
from parallel.mesh import AXES, nearest, sizes
from runtime.errors import ConfigError
from tests import launch
from tests.tiny import Sections, write_chats, write_config, write_model

LLAMA = Arch(
    family="llama",
    vocab_size=320,
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    layers=(Layer(Kind(), 0),) * 2,
    ropes=(Rope(1e4),),
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    tie_word_embeddings=False,
    name="tiny",
)

KINDS = (  # words of each refusal
    "a multiple of",
    "needs",
    "num_key_value_heads",
    "intermediate_size",
    "leaves ranks without rows",
    "unevenly",
    "of ulysses",
    "ranks that share the weights",
    "as a number",
    "lora.dropout",
)


def refusal(layout: dict, world: int, arch: Arch, dropout: float = 0.0) -> str | None:
    """What a run with these `parallel` keys says before it connects; None if it starts."""
    cfg = ParallelConfig(**layout)
    try:
        check(Sections(cfg), sizes(cfg, world), arch, LoraConfig(dropout=dropout))
    except ConfigError as error:
        return str(error)
    return None


def advice(said: str) -> dict:
    """The keys that a message says to set."""
    found = re.findall(r"(parallel\.\w+|lora\.dropout)=('?\w+'?)", said.rpartition("; use ")[2].partition(", or start ")[0])
    assert found, said
    return {key.rpartition(".")[2]: value.strip("'") if value.startswith("'") else int(value) for key, value in found}


def ranks_to_start(said: str) -> list[int]:
    """The numbers of ranks that a message offers as the other way out."""
    if not (found := re.search(r", or start (a multiple of )?(\d+) ranks?( with torchrun)?$", said)):
        return []
    return [int(found[2]) * n for n in (1, 2, 5)] if found[1] else [int(found[2])]


def draw(dice: random.Random) -> tuple[Arch, int, dict]:
    kv, group = dice.choice([1, 2, 3, 4, 8]), dice.choice([1, 2, 3, 4])
    arch = replace(
        LLAMA,
        num_key_value_heads=kv,
        num_attention_heads=kv * group,
        intermediate_size=dice.choice([64, 66, 96, 100, 27]),
        vocab_size=dice.choice([320, 321, 97, 9, 50257]),
    )
    layout = {axis: dice.choice([1, 1, 1, 2, 2, 3, 4, 6, 8]) for axis in AXES}
    layout["shard"] = dice.choice([-1, -1, layout["shard"]])
    layout["context_method"] = dice.choice(["auto", "ulysses", "ring"])
    layout["reshard"] = dice.choice(["forward", "forward", 2, 3, 4])
    world = math.prod(n for axis, n in layout.items() if axis in AXES and n > 0)
    world = dice.choice([1, 2, 3, 4, 6, 8, 12, 16, 64, world, world, 2 * world])
    return arch, world, layout


def test_every_advice_can_be_taken():
    dice, met = random.Random(0), {}
    for _ in range(1500):
        arch, world, layout = draw(dice)
        dropout, first = dice.choice([0.0, 0.1]), None
        for _ in range(5):  # a layout can be wrong in as many ways: shape, heads, reshard, dropout
            said = refusal(layout, world, arch, dropout)
            if said is None:
                break
            assert len(said) < 300 and "\n" not in said and str(world if said.startswith("parallel:") else "") in said, said
            kind = next(words for words in KINDS if words in said)
            met[kind] = met.get(kind, 0) + 1
            for ranks in ranks_to_start(said):
                assert not (refusal(layout, ranks, arch, dropout) or "").startswith("parallel:"), said
            if "parallel.context_method=allgather" in said:
                other = refusal(layout | {"context_method": "allgather"}, world, arch, dropout)
                assert "ulysses" not in (other or ""), said
            taken = advice(said)
            assert (layout | {"dropout": dropout}) != (layout | {"dropout": dropout} | taken), f"changes nothing: {said}"
            dropout = taken.pop("dropout", dropout)
            layout = layout | taken
            now = refusal(layout, world, arch, dropout)
            assert now is None or now.split("=")[0] != said.split("=")[0] or said.startswith("parallel:"), f"{said}\nled to\n{now}"
            assert now is None or not now.startswith("parallel:"), f"{said}\nled to\n{now}"
            first = first or said
        else:
            raise AssertionError(f"advice leads nowhere; it began with {first}")
    assert met.keys() == set(KINDS) and min(met.values()) > 5, met


def test_no_layout_is_nearer_than_the_advised_one():
    """Against a search over all layouts by hand, for one axis at a time."""
    for kv in (1, 2, 3, 4, 6, 8):
        arch = replace(LLAMA, num_key_value_heads=kv, num_attention_heads=kv, intermediate_size=48)
        for world in (4, 6, 8, 12, 24):
            for tensor in (n for n in range(2, world + 1) if world % n == 0 and refusal({"tensor": n}, world, arch)):
                legal = [n for n in range(1, world + 1) if world % n == 0 and refusal({"tensor": n}, world, arch) is None]
                found = advice(refusal({"tensor": tensor}, world, arch))["tensor"]
                assert abs(math.log(found / tensor)) == pytest.approx(min(abs(math.log(n / tensor)) for n in legal))


@pytest.mark.parametrize(
    ("layout", "world", "facts", "message"),
    [
        ({"shard": 8}, 1, {}, "parallel: shard=8 needs 8 ranks, but this run has 1; use parallel.shard=1, or start 8 ranks with torchrun"),
        ({"tensor": 2}, 1, {}, "tensor=2 needs a multiple of 2 ranks, but this run has 1; use parallel.tensor=1, or start a multiple of 2"),
        ({"tensor": 2}, 3, {}, "parallel: tensor=2 needs a multiple of 2 ranks, but this run has 3; use parallel.tensor="),
        ({"shard": 1}, 2, {}, "parallel: shard=1 needs 1 rank, but this run has 2; use parallel.shard=2, or start 1 rank"),
        ({"replicate": 3, "shard": 2}, 4, {}, "replicate=3 x shard=2 needs 6 ranks, but this run has 4; use parallel.replicate=2, or"),
        ({"context": 4, "tensor": 2}, 6, {}, "tensor=2 needs a multiple of 8 ranks, but this run has 6; use parallel.context=3,"),
        ({"tensor": 6}, 6, {}, "parallel.tensor=6 does not divide num_key_value_heads=2 (tiny); use parallel.tensor=2"),
        ({"tensor": 4, "shard": 1}, 4, {}, "num_key_value_heads=2 (tiny); use parallel.shard=2 and parallel.tensor=2"),
        ({"tensor": 3}, 6, {"num_key_value_heads": 3, "num_attention_heads": 6}, "intermediate_size=64 (tiny); use parallel.tensor="),
        ({"tensor": 2}, 8, {"vocab_size": 97}, "shard x context=4 both divide the 97 rows of the vocabulary unevenly"),
        ({"reshard": 2, "tensor": 2}, 6, {}, "does not work with parallel.tensor=2; use parallel.reshard='forward' or 'backward'"),
    ],
    ids=str,
)
def test_what_users_read(layout, world, facts, message):
    assert message in refusal(layout, world, replace(LLAMA, **facts))


def test_nearest_takes_what_fits():
    assert nearest(ParallelConfig(tensor=8), 64, lambda axes: axes["tensor"] <= 2) == "parallel.tensor=2"
    assert nearest(ParallelConfig(tensor=8, shard=8), 64, lambda axes: axes["tensor"] == 4) == "parallel.shard=16 and parallel.tensor=4"
    seen = mesh._layouts(24)
    assert len(seen) == len({tuple(axes.values()) for axes in seen}) == 80  # 2^3 over four axes: 20 ways; 3: 4 ways
    assert all(math.prod(axes.values()) == 24 and tuple(axes) == AXES for axes in seen)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_from_the_command_line(tmp_path, world):
    """One line, once, exit code 2 on every rank; its advice starts a run."""
    model, data = write_model(tmp_path / "model"), write_chats(tmp_path / "data.jsonl", 20)
    argv = ["--config", str(write_config(tmp_path / "c.toml", model, data, tmp_path / "out", "[train]\nsteps = 1\n"))]
    layout = ["--parallel.tensor=6"] if world == 6 else ["--parallel.replicate=2", "--parallel.shard=2"]
    ranks = launch.run([*argv, *layout], world, tmp_path / "logs")
    assert ranks.wait() == [2] * world, ranks.output()
    (line,) = (line for line in ranks.output().splitlines() if "error:" in line)
    assert "Traceback" not in ranks.output() and str(world) in line
    taken = [f"--parallel.{key}={value}" for key, value in advice(line).items()]
    if world < 6:
        assert launch.run([*argv, *layout, *taken], world, tmp_path / "logs").wait() == [0] * world
