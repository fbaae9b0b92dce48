"""A micro-batch as a graph. On a CPU the graph is a tape of operators that is replayed on the tensors it was recorded with, with what a
CUDA graph has: recording computes nothing, numbers stay what they were, tensors are read where they lie, nothing may ask for a value."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.batch import Batch
from kernels import linear_logprob
from model import build
from model.arch import Arch
from model.config import KernelsConfig, LoraConfig
from model.transforms.lora import apply_lora
from model.transforms.ops import install
from model.transforms.trainable import apply_trainable
from model.weights import initialize
from objective import lm
from objective.config import LmConfig
from parallel import graph, recompute
from parallel.config import CompileConfig, OffloadConfig, RecomputeConfig, TilingConfig
from parallel.graph import Graphed, GraphError, check, check_device, micro_step
from runtime.errors import ConfigError
from runtime.guard import upstream
from runtime.metrics import read
from tests import launch
from tests.model import golden
from tests.parallel.test_layouts import VOCAB, grads, rows
from tests.parallel.test_recompute import ALONE
from tests.tiny import Sections, write_chats, write_config, write_model

ON = KernelsConfig(cuda_graph=True)
CASES = {  # folder, LoRA, dropout, recomputation, objective
    "full": ("llama", False, 0.0, "none", LmConfig()),
    "lora": ("llama", True, 0.3, "none", LmConfig()),
    "mlp": ("llama", True, 0.3, "mlp", LmConfig()),
    "8bit": ("llama", False, 0.0, "mlp_8bit", LmConfig(z_loss=1e-3)),
    "gemma": ("gemma", False, 0.0, "none", LmConfig(label_smoothing=0.1)),
}
HOST = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


class Tape(TorchDispatchMode):
    """What ran inside, in order."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []
        self.made: set[int] = set()
        self.before: list[tuple[Tensor, Tensor]] = []  # what lay outside and was written, with its value of before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(tag in func.tags for tag in HOST):
            raise RuntimeError(f"{func} is not permitted when stream is capturing")
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func._schema.is_mutable:
            for t in given:
                if key(t) not in self.made and all(t is not old for old, _ in self.before):
                    self.before.append((t, t.detach().clone()))
        out = func(*args, **kwargs)
        known = {key(t) for t in given}
        fresh = [isinstance(t, Tensor) and key(t) not in known for t in tree_leaves(out)]
        self.made |= {key(t) for t, new in zip(tree_leaves(out), fresh) if new}
        self.calls.append((func, args, kwargs, out, fresh))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out, fresh in self.calls:
            for old, new, own in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), fresh):
                if own:
                    old.copy_(new)


def key(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def record(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    state = torch.get_rng_state()
    with Tape() as tape:
        loss = run()
    torch.set_rng_state(state)
    with torch.no_grad():
        for t, value in tape.before:
            t.copy_(value)
    assert len(tape.calls) > 200
    return tape.replay, loss


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    names = {"llama": "llama-biases-v5", "gemma": "gemma3_text"}
    return {
        short: golden.write_config(tmp_path_factory.mktemp("graph") / short, name, vocab_size=VOCAB, initializer_range=0.2)
        for short, name in names.items()
    }


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The head computes all rows: how many have a target is not known without waiting."""
    monkeypatch.setattr(linear_logprob, "_gpu", lambda x: True)


def fresh(folder: Path, lora: bool, kind: str, dropout: float, device: str = "cpu", compute: torch.dtype = torch.float32) -> nn.Module:
    """As train.py makes it, with adapters that count."""
    net, cfg = build(Arch.from_folder(folder)), LoraConfig(rank=4, dropout=dropout) if lora else None
    if cfg:
        apply_lora(net, cfg)
    net.compute_dtype = compute
    install(net, KernelsConfig(), device, compute)
    apply_trainable(net, cfg, compute, torch.float32)
    recompute.apply(net, ALONE, RecomputeConfig(kind), compute, 192)
    net.to_empty(device=device)
    net.reset_buffers(device)
    initialize(net, 0)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("lora_B.weight"):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    return net.train()


def steps(net: nn.Module, cfg: LmConfig, make: Callable) -> list[tuple[list[float], dict[str, Tensor]]]:
    """Losses of micro-batches and gradients of three steps of two micro-batches, all packed differently, with other units each; the
    optimizer drops the gradients of each step but the second, whose are zeroed in place."""
    trained = [p for p in net.parameters() if p.requires_grad]

    def learn(batch: Batch, units: int | Tensor) -> Tensor:
        loss = lm.loss(net, batch, units, cfg)
        loss.backward(upstream(loss))
        return loss.detach()

    learn, found, batches = make(learn, trained), [], [*rows(192, 2), *rows(320, 1), *rows(160, 3)[:2]]
    batches = [b for b in batches if b.tokens.numel() == 192]
    batches += [turned(batches[0]), turned(batches[1]), batches[1], batches[0]]
    for step, units in enumerate((100, 70, 251)):
        losses = []
        for i, batch in enumerate(batches[2 * step : 2 * step + 2]):
            lm.seed_dropout(step, i)
            losses.append(learn(batch, units))
        found.append(([loss.item() for loss in losses], {name: g.clone() for name, g in grads(net).items()}))
        for p in trained:
            if step == 1:
                p.grad.zero_()
            else:
                p.grad = None
    return found


def turned(batch: Batch) -> Batch:
    """The same slots with their tokens in another order, so other numbers in the same shapes."""
    return Batch(**{**vars(batch), "tokens": batch.tokens.flip(0), "labels": batch.labels.roll(3)})


@pytest.mark.parametrize("case", CASES)
def test_replays_give_the_losses_and_gradients_of_a_run_without(folders, as_on_a_gpu, case):
    name, lora, dropout, kind, cfg = CASES[case]

    want = steps(fresh(folders[name], lora, kind, dropout), cfg, lambda learn, _: learn)
    found = steps(fresh(folders[name], lora, kind, dropout), cfg, lambda learn, trained: Graphed(learn, trained, lambda run: run(), record))
    assert len({loss for losses, _ in want for loss in losses}) == 6 and len(want[0][1]) > 10
    for (losses, gradients), (wanted, wanted_gradients) in zip(found, want):
        assert losses == wanted
        assert gradients.keys() == wanted_gradients.keys()
        for p, g in wanted_gradients.items():
            assert g.norm() > 1e-6 and torch.equal(gradients[p], g), p


def test_what_asks_for_a_value_is_said_to_be_not_recordable(folders):
    """On the CPU the head takes rows without a target out, so it has to know how many there are."""
    said = r"^kernels.cuda_graph=true cannot record forward and backward; leave it out: aten.nonzero"
    with pytest.raises(GraphError, match=said):
        steps(
            fresh(folders["llama"], False, "none", 0.0),
            LmConfig(),
            lambda learn, trained: Graphed(learn, trained, lambda run: run(), record),
        )


def test_memory_that_runs_out_is_not_taken_for_something_else(folders):
    """Nor does a first micro-batch that failed count as one."""
    calls, [row] = [], rows(320, 1)

    def learn(batch: Batch, units: int | Tensor) -> Tensor:
        calls.append(batch)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("first")
        return torch.ones(())

    def full(run: Callable) -> tuple:
        raise torch.OutOfMemoryError("while recording")

    step = Graphed(learn, [], lambda run: run(), full)
    for said in ("first", None, None, "while recording"):
        with pytest.raises(torch.OutOfMemoryError, match=said) if said else contextlib.nullcontext():
            step(row, 10)
    assert len(calls) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_too(folders, case, compute):
    """By the kernels that a run takes there, to rounding: without a graph the head computes fewer rows, so other products."""
    name, lora, dropout, kind, cfg = CASES[case]
    close_to, bound = (1e-5, 1e-4) if compute == torch.float32 else (1e-2, 5e-2)

    def run(wanted: bool) -> list:
        def make(learn, trained):
            learn = micro_step(learn, trained, wanted)
            return lambda batch, units: learn(batch.to("cuda"), units)

        return steps(fresh(folders[name], lora, kind, dropout, "cuda", compute), cfg, make)

    for (losses, gradients), (wanted, wanted_gradients) in zip(run(True), run(False)):
        assert losses == pytest.approx(wanted, rel=close_to)
        for p, g in wanted_gradients.items():
            assert g.norm() > 1e-6 and (gradients[p] - g).norm() < bound * g.norm(), p


def test_a_run_with_a_graph_is_the_run_without(tmp_path, monkeypatch, as_on_a_gpu):
    """train.py's own loop: updates, clipping, evaluations between, and going on from a checkpoint."""
    folder, data = write_model(tmp_path / "model"), write_chats(tmp_path / "data.jsonl", 60)
    monkeypatch.setattr(graph, "warm_up", lambda run: run())
    monkeypatch.setattr(graph, "record", record)
    monkeypatch.setattr(graph, "check_device", lambda *_: None)
    extra = "[lora]\nrank = 4\ndropout = 0.2\n[train]\nsteps = {}\naccumulate = 2\n[log]\nevery = 1\n[eval]\nevery = 2\nsplit = 0.2\n"

    def trained(name: str, words: list[str], steps: tuple[int, ...]) -> tuple[list[dict], bytes]:
        out = tmp_path / name
        for n in steps:
            argv = ["--config", str(write_config(tmp_path / f"{name}.toml", folder, data, out, extra.format(n))), *words]
            ranks = launch.run(argv, 1, tmp_path / f"{name}-logs")
            assert ranks.wait() == [0], ranks.output()
        assert ("cuda graph: forward and backward" in ranks.output()) == bool(words)
        numbers = [{key: r[key] for key in ("step", "loss", "grad_norm", "eval_loss") if key in r} for r in read(out / "metrics.jsonl")]
        return numbers, next((out / "export").glob("*.safetensors")).read_bytes()

    want = trained("without", [], (6,))
    assert len({r["loss"] for r in want[0] if "loss" in r}) == 6 and all(r["grad_norm"] > 0 for r in want[0] if "loss" in r)
    assert trained("with", ["--kernels.cuda_graph=true"], (6,)) == want
    assert trained("again", ["--kernels.cuda_graph=true"], (4, 6))[1] == trained("again-without", [], (4, 6))[1]


# -- refusals --------------------------------------------------------------------------------------------------------------

AXES = {"replicate": 1, "shard": 1, "context": 1, "tensor": 1}
REFUSED = {
    "is for one rank, and this run has 2; leave it out": ({}, AXES | {"shard": 2}),
    "does not work with recompute.kind='full'; use 'none', 'mlp' or 'mlp_8bit'": (
        {"recompute": RecomputeConfig("full")},
        AXES,
    ),
    "does not work with [compile]; use one of the two": ({"compile": CompileConfig()}, AXES),
    "does not work with tiling.mlp=64; use one of the two": ({"tiling": TilingConfig(mlp=64)}, AXES),
    "does not work with offload.activations='cpu'; use one of the two": ({"offload": OffloadConfig(activations="cpu")}, AXES),
    "does not work with offload.parameters=true; use one of the two": ({"offload": OffloadConfig(parameters=True)}, AXES),
    "does not work with offload.frozen=true; use one of the two": ({"offload": OffloadConfig(frozen=True)}, AXES),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_kernels_of_one_stream_is_refused(words):
    sections, axes = REFUSED[words]
    with pytest.raises(ConfigError) as error:
        check(Sections(kernels=ON, **sections), axes)
    assert str(error.value) == f"kernels.cuda_graph=true {words}"
    check(Sections(**sections), axes)
    check(Sections(kernels=ON, recompute=RecomputeConfig("mlp"), offload=OffloadConfig(optimizer=True)), AXES)


def test_a_run_on_a_cpu_refuses_it():
    with pytest.raises(ConfigError, match=r"^kernels.cuda_graph=true needs CUDA, and this run is on cpu; leave it out$"):
        check_device(Sections(kernels=ON), torch.device("cpu"))
    check_device(Sections(kernels=ON), torch.device("cuda"))
    check_device(Sections(), torch.device("cpu"))
