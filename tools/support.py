"""What combines with what: docs/support.md, made by asking the checks that a run makes before it starts.

    python -m tools.support --markdown docs/support.md            write the page
    python -m tools.support --markdown docs/support.md --check    1 if the file is not what would be written

Every feature is a few keys (`FEATURES`); two features are set together on as many ranks as they need and handed to
`parallel.apply.check` for a llama of usual proportions. What it refuses is a letter in the table, and its words are below. A pair that
sets one key in two ways is no pair. tests/test_support.py holds the page to the code, and runs a step of every pair that works.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from model.arch import Arch, Kind, Layer, Rope
from parallel.apply import check
from parallel.mesh import sizes
from runtime.config import load
from runtime.errors import ConfigError
from runtime.toml import literal
from tools.schema import settle
from train import RunConfig

BASE = Path(__file__).resolve().parent.parent / "train_configs/debug/full.toml"


@dataclass(frozen=True)
class Feature:
    """name: for the page; keys: what switches it on, with what it cannot be without; model: facts of the model it is about."""

    name: str
    keys: dict[str, object] = field(default_factory=dict)
    model: dict[str, object] = field(default_factory=dict)


WINDOWS = {"layers": (Layer(Kind("window", 64), 0), Layer(Kind(), 0))}
FEATURES = (
    Feature("LoRA", {"lora.rank": 8}),
    Feature("LoRA with dropout", {"lora.dropout": 0.1}),
    Feature("shard (FSDP2)", {"parallel.shard": 2}),
    Feature("replicate (HSDP)", {"parallel.replicate": 2}),
    Feature("tensor", {"parallel.tensor": 2}),
    Feature("context, all-gather", {"parallel.context": 2, "parallel.context_method": "allgather"}),
    Feature("context, Ulysses", {"parallel.context": 2, "parallel.context_method": "ulysses"}),
    Feature("context, ring", {"parallel.context": 2, "parallel.context_method": "ring"}),
    Feature("reshard after backward (ZeRO-2)", {"parallel.reshard": "backward"}),
    Feature("reshard to a number of ranks", {"parallel.shard": 4, "parallel.reshard": 2}),
    Feature("recompute, full", {"recompute.kind": "full"}),
    Feature("recompute, mlp", {"recompute.kind": "mlp"}),
    Feature("recompute, every_n", {"recompute.kind": "every_n"}),
    Feature("recompute, selective", {"recompute.kind": "selective"}),
    Feature("recompute, budget", {"recompute.kind": "budget", "compile.backend": "inductor"}),
    Feature("compile", {"compile.backend": "inductor"}),
    Feature("tiling of the MLP", {"tiling.mlp": 256}),
    Feature("offload activations, cpu", {"offload.activations": "cpu"}),
    Feature("offload activations, disk", {"offload.activations": "disk"}),
    Feature("offload hidden states", {"offload.activations": "hidden_states", "recompute.kind": "full"}),
    Feature("offload parameters", {"offload.parameters": True}),
    Feature("offload optimizer", {"offload.optimizer": True}),
    Feature("offload frozen", {"offload.frozen": True, "lora.rank": 8}),
    Feature("CUDA graph", {"kernels.cuda_graph": True}),
    Feature("sliding windows", {}, WINDOWS),
    Feature("tied embeddings", {}, {"tie_word_embeddings": True}),
)


INTRODUCTION = """# What combines with what

Made from the checks that a run makes before it starts, by `python -m tools.support --markdown docs/support.md`. `+`: works together;
forward and backward of every such pair are run in the tests, on tensors without memory. Numbers are compared with one rank's: for
every pair of layouts, families, adapters, reshard policies, recomputation, tiling and most of offloading in
[tests/parallel/test_invariance.py](../tests/parallel/test_invariance.py), and in tests of their own for compilation, disks, the
optimizer's state and frozen weights. A letter: refused, with the words below. Empty: the two set the same key. All model families
work with all of it.
"""
END = """Sizes have limits of their own: heads and channels that `parallel.tensor` must divide, heads for Ulysses, axes that must multiply
to the number of ranks. Those messages name the numbers and the nearest choice that works.
"""


def combined(*features: Feature) -> tuple[dict[str, object], dict[str, object]] | None:
    """(keys, facts of the model) of features together; None if they set something in two ways."""
    keys: dict[str, object] = {}
    model: dict[str, object] = {}
    for feature in features:
        for mine, theirs in ((keys, feature.keys), (model, feature.model)):
            if any(mine.get(key, value) != value for key, value in theirs.items()):
                return None
            mine |= theirs
    return keys, model


def arch(facts: dict[str, object]) -> Arch:
    """A small llama: 2 layers, 8 heads, 4 key heads."""
    small = Arch(
        family="llama",
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        layers=(Layer(Kind(), 0),) * 2,
        ropes=(Rope(1e4),),
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        hidden_act="silu",
        tie_word_embeddings=False,
        attention_scale=8**-0.5,
    )
    return replace(small, **facts)


def settings(keys: dict[str, object]) -> tuple[RunConfig, dict[str, int]]:
    """The config, and the axes of as many ranks as it needs. Raises ConfigError."""
    axes = {axis: keys.get(f"parallel.{axis}", 1) for axis in ("replicate", "shard", "context", "tensor")}
    words = [f"--{key}={literal(value)}" for key, value in (keys | {f"parallel.{axis}": n for axis, n in axes.items()}).items()]
    cfg = load(RunConfig, BASE, words)
    return cfg, sizes(cfg.parallel, math.prod(axes.values()))


def refusal(*features: Feature) -> str | None:
    """Why these do not work together, in a run's own words; None if they do."""
    keys, facts = combined(*features)
    try:
        cfg, axes = settings(keys)
        check(cfg, axes, arch(facts), cfg.lora)
    except ConfigError as error:
        return str(error)
    return None


def markdown() -> str:
    reasons: dict[str, str] = {}
    rows = []
    for i, one in enumerate(FEATURES):
        cells = []
        for other in FEATURES[:i]:
            if combined(one, other) is None:
                cells.append("")
            elif (reason := refusal(one, other)) is None:
                cells.append("+")
            else:
                cells.append(reasons.setdefault(reason, chr(ord("a") + len(reasons))))
        alone = refusal(one)
        assert alone is None, f"{one.name} by itself: {alone}"
        rows.append(f"| **{i + 1}** {one.name} | " + " | ".join(cells + ["·"] + [""] * (len(FEATURES) - i - 1)) + " |")
    head = "| | " + " | ".join(str(i + 1) for i in range(len(FEATURES))) + " |"
    table = [head, "|" + "---|" * (len(FEATURES) + 1), *rows]
    words = ["| | refused with |", "|---|---|", *(f"| {letter} | `{reason}` |" for reason, letter in reasons.items())]
    return "\n".join([INTRODUCTION, *table, "", *words, "", END])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.support", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--markdown", metavar="FILE", required=True, help="the page; - prints it")
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    args = parser.parse_args(argv)
    if settle(args.markdown, markdown(), args.check):
        return 0
    print(f"{Path(args.markdown).name} is not up to date; run the same command without --check", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
