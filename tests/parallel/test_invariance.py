"""Any layout, any way to save memory, any packing gives the loss and the gradients of one rank that uses none of it.

Ragged documents are packed into rows, some of which cross the borders of context ranks, and prompts are masked, so that ranks have
unequal numbers of targets. One rank with the reference attention computes the loss and every gradient of every family, full and
LoRA; then choices of the factors below are combined and compared with it, 1e-5 relative in fp32.

By default the cases cover every pair of choices that may be combined (`covering`). The full cross of `CROSS` is

    python -m pytest tests/parallel/test_invariance.py -m slow -s

which prints, in JSON, how many cases each choice had and how far they were off; `benchmarks/results/invariance.json` is what it found.
"""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from itertools import combinations, product
from pathlib import Path

import pytest
import torch

from data.config import DataConfig, SourceConfig
from model.arch import Arch
from model.config import LoraConfig, ModelConfig
from parallel.apply import check
from parallel.config import OffloadConfig, ParallelConfig, PrecisionConfig, RecomputeConfig, TilingConfig
from parallel.local import run
from parallel.mesh import AXES, sizes
from runtime.errors import ConfigError
from tests.model.golden import write_config
from tools import selfcheck
from train import OutputConfig, RunConfig

BOUND = 1e-5
FAMILIES = ("llama-biases-v5", "llama-tied-linear", "mistral", "qwen2", "qwen3", "gemma3_text", "gemma3_text-cap-v5")
LAYOUTS = [  # replicate, shard, context, tensor: every axis, every pair, and the three that share work together
    (1, 2, 1, 1),
    (1, 4, 1, 1),
    (2, 1, 1, 1),
    (1, 1, 2, 1),
    (1, 1, 4, 1),
    (1, 1, 1, 2),
    (2, 2, 1, 1),
    (2, 1, 2, 1),
    (2, 1, 1, 2),
    (1, 2, 2, 1),
    (1, 2, 1, 2),
    (1, 1, 2, 2),
    (1, 2, 2, 2),
]
FACTORS = {
    "family": FAMILIES,
    "layout": LAYOUTS,
    "lora": (False, True),
    "accumulate": (1, 2),
    "method": ("allgather", "ulysses", "ring"),
    "reshard": ("forward", "backward", "step", 2),
    "prefetch": (1, 2),
    "recompute": ("none", "full", "every_n", "selective"),
    "offload": ("none", "hidden_states", "cpu", "parameters"),
    "tile": (0, 24),
}
CROSS = ("family", "layout", "lora", "method", "recompute")  # the others at their first choice


def config(case: dict) -> RunConfig:
    layout = dict(zip(AXES, case["layout"]))
    offload = {"parameters": True} if case["offload"] == "parameters" else {"activations": case["offload"]}
    return RunConfig(
        model=ModelConfig(path="none"),
        data=DataConfig(sources=(SourceConfig(path="none", format="chat"),), tokens=selfcheck.ROW, max_length=selfcheck.LONGEST),
        output=OutputConfig(path="none"),
        lora=LoraConfig(rank=4) if case["lora"] else None,
        parallel=ParallelConfig(**layout, context_method=case["method"], reshard=case["reshard"], prefetch=case["prefetch"]),
        precision=PrecisionConfig(compute="fp32"),
        recompute=RecomputeConfig(kind=case["recompute"]),
        offload=OffloadConfig(**offload),
        tiling=TilingConfig(mlp=case["tile"]),
    )


def legal(case: dict, archs: dict[str, Arch]) -> bool:
    if case["layout"][2] == 1 and case["method"] != FACTORS["method"][0]:
        return False  # nothing to choose
    try:
        cfg = config(case)
        check(cfg, sizes(cfg.parallel, math.prod(case["layout"])), archs[case["family"]], cfg.lora)
    except ConfigError:
        return False
    return True


def pairs(case: dict) -> set[tuple]:
    return set(combinations(case.items(), 2))


def covering(archs: dict[str, Arch], tries: int = 60) -> list[dict]:
    """Few legal cases in which every pair of choices occurs that occurs in any legal case: greedily, the same on every run."""
    rng, names = random.Random(0), list(FACTORS)
    missing = {pair for a, b in combinations(names, 2) for pair in product(product([a], FACTORS[a]), product([b], FACTORS[b]))}
    cases = []
    while missing:
        wanted = min(missing, key=repr)
        found = []
        for _ in range(tries):
            case = {name: rng.choice(FACTORS[name]) for name in names} | dict(wanted)
            if legal(case, archs):
                found.append(case)
        if not found:  # perhaps only together with the plain choices
            case = {name: FACTORS[name][0] for name in names} | dict(wanted)
            found = [case] if legal(case, archs) else []
        if found:
            cases.append(max(found, key=lambda case: len(pairs(case) & missing)))
            missing -= pairs(cases[-1])
        missing.discard(wanted)
    return cases


@pytest.fixture(scope="module")
def archs(tmp_path_factory) -> dict[str, Arch]:
    folder = tmp_path_factory.mktemp("golden")
    changes = {"initializer_range": 0.2, "vocab_size": 100}
    return {name: Arch.from_folder(write_config(folder / name, name, **changes)) for name in FAMILIES}


@pytest.fixture(scope="module")
def references(tmp_path_factory, archs) -> dict[tuple, tuple[float, Path]]:
    """For each family, full and LoRA, and number of rows: the loss of one rank and a file of its gradients."""
    folder, found = tmp_path_factory.mktemp("references"), {}
    plain = {name: choices[0] for name, choices in FACTORS.items()} | {"layout": (1, 1, 1, 1)}
    wanted = [(family, lora, rows) for family in FAMILIES for lora in (False, True) for rows in (1, 2, 4, 8)]
    jobs = []
    for family, lora, rows in wanted:
        file = folder / f"{family}-{lora}-{rows}.safetensors"
        cfg = selfcheck.plain(config(plain | {"family": family, "lora": lora}))
        jobs.append((cfg, archs[family], rows, file))
    for key, job, loss in zip(wanted, jobs, run(one_rank, 1, jobs, timeout=300.0)[0]):
        found[key] = (loss, job[-1])
    return found


def one_rank(rank: int, world: int, jobs: list[tuple]) -> list[float]:
    return [selfcheck.reference(rank, world, *job) for job in jobs]


def many_ranks(rank: int, world: int, jobs: list[tuple]) -> list[tuple[float, float]]:
    found = []
    for job in jobs:
        loss, grads = selfcheck.errors(rank, world, *job)
        found.append((loss, max(grads.values())))
    return found


def compare(cases: list[dict], archs: dict, references: dict, timeout: float) -> list[float]:
    """Worst errors by case; all of one world."""
    jobs, wants = [], []
    for case in cases:
        rows = case["layout"][0] * case["layout"][1] * case["accumulate"]
        want, file = references[case["family"], case["lora"], rows]
        jobs.append((config(case), archs[case["family"]], rows, file))
        wants.append(want)
    found = run(many_ranks, math.prod(cases[0]["layout"]), jobs, timeout=timeout)
    assert all(1.0 < want < 50.0 for want in wants)
    return [max(abs(one[i][0] - want) / want + one[i][1] for one in found) for i, want in enumerate(wants)]


def by_world(cases: list[dict], size: int) -> list[list[dict]]:
    groups = defaultdict(list)
    for case in cases:
        groups[math.prod(case["layout"])].append(case)
    return [group[i : i + size] for _, group in sorted(groups.items()) for i in range(0, len(group), size)]


def test_every_pair_of_choices(archs, references):
    cases = covering(archs)
    assert len(cases) >= len(FAMILIES) * len(LAYOUTS)
    for group in by_world(cases, 12):
        for case, worst in zip(group, compare(group, archs, references, 240.0)):
            assert worst < BOUND, (case, worst)  # false for NaN, too


def test_the_covering_covers(archs):
    """All that no case has is not legal, whatever goes with it."""
    seen = set().union(*map(pairs, covering(archs)))
    rng = random.Random(1)
    for _ in range(300):
        case = {name: rng.choice(choices) for name, choices in FACTORS.items()}
        assert not legal(case, archs) or pairs(case) <= seen


def test_a_wrong_layout_is_found(archs, references, monkeypatch):
    from parallel import context

    right = context.in_row_order
    monkeypatch.setattr(context, "in_row_order", lambda x, size: right(x, size).roll(1, 0))
    case = {name: choices[0] for name, choices in FACTORS.items()} | {"layout": (1, 1, 2, 1)}
    assert compare([case], archs, references, 60.0)[0] > 100 * BOUND


@pytest.mark.slow
def test_the_full_cross(archs, references):
    plain = {name: choices[0] for name, choices in FACTORS.items()}
    cases = [plain | dict(zip(CROSS, choice)) for choice in product(*(FACTORS[name] for name in CROSS))]
    cases = [case for case in cases if legal(case, archs)]
    errors = []
    for group in by_world(cases, 24):
        errors += zip(group, compare(group, archs, references, 600.0))
    wrong = [(case, error) for case, error in errors if not error < BOUND]
    print("\n" + json.dumps({"torch": torch.__version__, "bound": BOUND, **counts(errors), "by": choices_of(errors)}, indent=1))
    assert not wrong, wrong[:3]


def counts(errors: list[tuple[dict, float]]) -> dict:
    return {
        "cases": len(errors),
        "wrong": sum(not error < BOUND for _, error in errors),
        "worst": float(f"{max(error for _, error in errors):.1e}"),
    }


def choices_of(errors: list[tuple[dict, float]]) -> dict:
    """`counts` for each choice of each factor."""
    found = {}
    for name in CROSS:
        having = defaultdict(list)
        for case, error in errors:
            having[str(case[name])].append((case, error))
        found[name] = {choice: counts(some) for choice, some in having.items()}
    return found
