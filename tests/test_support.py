"""The table of what combines with what is current and true, and every refusal of a layout is met here."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model import build
from model.transforms.ops import install
from objective import lm
from parallel import recompute
from parallel.apply import check
from parallel.graph import check_device
from parallel.local import apart
from parallel.mesh import Mesh, sizes
from runtime.config import load
from runtime.errors import ConfigError
from tools import plan, support
from train import RunConfig, assemble

ROOT = Path(__file__).resolve().parent.parent
PAIRS = [pair for pair in combinations(support.FEATURES, 2) if support.combined(*pair) is not None]


def test_the_page_is_current():
    page = str(ROOT / "docs" / "support.md")
    assert support.main(["--markdown", page, "--check"]) == 0, "run python -m tools.support --markdown docs/support.md"


def steps(pairs: list[tuple]) -> list[str]:
    """Runs a step of each on fake ranks; what went wrong."""
    bad = []
    for pair in pairs:
        keys, facts = support.combined(*pair)
        try:
            cfg, axes = support.settings(keys)
            cfg = plan.as_planned(plan.on_a_gpu(cfg))  # compiled blocks are run in parallel/test_compile.py, disks in test_offload.py
            with plan.fake_ranks(math.prod(axes.values())):
                mesh = Mesh.build(cfg.parallel, torch.device("cpu"))
                net, _ = assemble(cfg, support.arch(facts), mesh)
                with FakeTensorMode(allow_non_fake_inputs=True):
                    net.to_empty(device="cpu")
                    net.reset_buffers("cpu")
                    lm.loss(net, plan.a_row(cfg, mesh), 1.0).backward()
                missing = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
                assert not missing, missing
        except Exception as error:
            bad.append(f"{' + '.join(f.name for f in pair)}: {type(error).__name__}: {error}")
    return bad


def test_a_step_of_every_pair_that_works_runs():
    works = [pair for pair in PAIRS if support.refusal(*pair) is None]
    assert len(works) > 200 and len(works) < len(PAIRS)
    assert apart(steps, works, timeout=400.0) == []


# -- refusals --------------------------------------------------------------------------------------------------------------


def raises() -> set[tuple[str, int]]:
    """Where parallel/ refuses a config: every `raise ConfigError` but those about machines (tests/run/test_nodes.py)."""
    found = set()
    for path in sorted((ROOT / "parallel").glob("*.py")):
        if path.name not in ("start.py", "local.py", "nodes.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Raise) and node.exc is not None and "ConfigError" in ast.unparse(node.exc):
                    found.add((path.name, node.lineno))
    return found


REFUSED = [  # keys; ranks; facts of the model
    (["--parallel.shard=0"], 1, {}),
    (["--parallel.tensor=0"], 1, {}),
    (["--parallel.timeout_s=0"], 1, {}),
    (["--parallel.reshard=1"], 1, {}),
    (["--parallel.prefetch=0"], 1, {}),
    (["--parallel.reshard=3"], 4, {}),
    (["--parallel.reshard=2", "--parallel.tensor=2"], 4, {}),
    (["--parallel.tensor=2"], 3, {}),
    (["--parallel.shard=2"], 3, {}),
    (["--parallel.tensor=8"], 8, {}),
    (["--parallel.tensor=4"], 4, {"vocab_size": 9, "num_key_value_heads": 4}),
    (["--parallel.tensor=2"], 8, {"vocab_size": 97}),
    (["--parallel.context=16", "--parallel.context_method=ulysses"], 16, {}),
    (["--lora.dropout=0.1", "--parallel.context=2"], 2, {}),
    (["--recompute.every=0"], 1, {}),
    (["--recompute.every=3"], 1, {}),
    (["--recompute.budget=1.5"], 1, {}),
    (["--recompute.kind=selective", "--recompute.save=[]"], 1, {}),
    (["--recompute.kind=selective", '--recompute.save=["atention"]'], 1, {}),
    (["--recompute.kind=selective", '--recompute.save=["matmul"]', "--tiling.mlp=64"], 1, {}),
    (["--recompute.kind=budget"], 1, {}),
    (["--recompute.gib=-1"], 1, {}),
    (["--recompute.kind=mlp", "--tiling.mlp=64"], 1, {}),
    (["--recompute.kind=mlp", "--offload.frozen=true", "--lora.rank=8"], 1, {}),
    (["--recompute.kind=mlp", "--compile.backend=inductor"], 1, {}),
    (["--recompute.kind=fit", "--recompute.gib=1", "--parallel.context=2"], 2, {}),
    (["--kernels.blocks=fused", "--tiling.mlp=64"], 1, {}),
    (["--recompute.kind=fit", "--recompute.gib=1", "--offload.activations=cpu"], 1, {}),
    (["--recompute.ways=['mlp']"], 1, {}),
    (["--recompute.kind=fit", "--recompute.ways=[]"], 1, {}),
    (["--recompute.kind=fit"], 1, {}),
    (["--recompute.kind=fit", "--recompute.gib=1e-9"], 1, {}),
    (["--recompute.kind=mlp", "--kernels.blocks=separate"], 1, {}),
    (["--lora.dropout=0.1", "--recompute.kind=full", "--compile.backend=eager"], 1, {}),
    (["--offload.folder=x"], 1, {}),
    (["--offload.parameters=true", "--offload.optimizer=true"], 1, {}),
    (["--offload.parameters=true", "--offload.frozen=true"], 1, {}),
    (["--offload.activations=hidden_states"], 1, {}),
    (["--offload.activations=cpu", "--recompute.kind=selective"], 1, {}),
    (["--offload.activations=disk", "--offload.folder=/proc/nowhere"], 1, {}),
    (["--offload.frozen=true"], 1, {}),
    (["--offload.frozen=true", "--lora.rank=8"], 2, {}),
    (["--offload.frozen=true", "--lora.rank=8", "--compile.backend=eager"], 1, {}),
    (["--kernels.cuda_graph=true"], 2, {}),
    (["--kernels.cuda_graph=true", "--recompute.kind=full"], 1, {}),
    (["--kernels.cuda_graph=true", "--tiling.mlp=64"], 1, {}),
    (["--kernels.cuda_graph=true"], 1, {}),
    (["--tiling.mlp=-1"], 1, {}),
    (["--compile.backend=eager", "--compile.mode=max-autotune-no-cudagraphs"], 1, {}),
]


def refused(words: list[str], ranks: int, facts: dict) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        cfg = load(RunConfig, support.BASE, words)
        axes, arch = sizes(cfg.parallel, ranks), replace(support.arch({}), **facts)
        check(cfg, axes, arch, cfg.lora)
        net = build(arch)  # some are only known once slots are filled
        install(net, cfg.kernels, "cpu", torch.float32)
        recompute.apply(net, SimpleNamespace(axes=axes, device=torch.device("cpu")), cfg.recompute, torch.float32, cfg.data.tokens)
        check_device(cfg, torch.device("cpu"))
    return caught.value


@pytest.mark.parametrize(("words", "ranks", "facts"), REFUSED, ids=str)
def test_refusals_are_one_line_with_the_key(words, ranks, facts):
    said = str(refused(words, ranks, facts))
    assert "\n" not in said and len(said) < 400
    assert any(word.split("=")[0].removeprefix("--").split(".")[-1] in said for word in words), said


def test_every_refusal_is_met():
    met = set()
    for words, ranks, facts in REFUSED:
        error = refused(words, ranks, facts)
        while error is not None:  # the loader puts the place in front and raises again
            at = error.__traceback__
            while at is not None:
                met.add((Path(at.tb_frame.f_code.co_filename).name, at.tb_lineno))
                at = at.tb_next
            error = error.__cause__ or error.__context__
    missing = raises() - met
    assert not missing, f"no case in REFUSED reaches {sorted(missing)}"
    assert len(raises()) > 15
