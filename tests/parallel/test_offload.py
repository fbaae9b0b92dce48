"""What waits elsewhere comes back unchanged: every kind of offloading against the same training without, bit for bit."""

from __future__ import annotations

import gc
import json
import math
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.batch import Batch
from model import build
from model.arch import Arch
from model.config import KernelsConfig, LoraConfig
from model.ffn import separate
from model.safetensors_io import allocate, materialize
from model.transforms.lora import apply_lora
from model.transforms.ops import install
from model.transforms.trainable import apply_trainable
from model.weights import full, local, parameters_at_rest
from objective import lm
from optim.adamw import build as build_optimizer
from optim.adamw import set_lr, state_tensors
from optim.clip import clip
from optim.config import AdamWConfig
from parallel import activations, offload
from parallel.activations import InMemory, Keeper
from parallel.apply import parallelize
from parallel.config import CompileConfig, OffloadConfig, ParallelConfig, RecomputeConfig
from parallel.context import split
from parallel.local import run
from parallel.mesh import Mesh
from parallel.offload import Feeder, Visiting
from parallel.transfer import ALIGN, Lane, Pool
from runtime.errors import ConfigError
from runtime.metrics import read
from tests import launch
from tests.parallel.test_layouts import VOCAB, backward, rows
from tests.tiny import LLAMA, Sections, write_chats, write_config, write_model

CPU = torch.device("cpu")
LANE = Lane(CPU)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": VOCAB, "initializer_range": 0.2, "num_hidden_layers": 4}))
    return path


@dataclass(frozen=True)
class Case:
    """A short training. everywhere: also tensors below the size that is worth moving; axes: of `[parallel]`."""

    offload: OffloadConfig
    axes: tuple[tuple[str, int | str], ...] = ()
    lora: bool = False
    recompute: RecomputeConfig = RecomputeConfig()
    steps: int = 3
    accumulate: int = 2
    compute: torch.dtype = torch.float32
    everywhere: bool = True
    blocks: str = "auto"
    impl: str = "torch"


def keeper_of(net: nn.Module) -> Keeper:
    """What the blocks' forwards share."""
    for block in net.model.layers:
        names = getattr(getattr(block.forward, "__code__", None), "co_freevars", ())
        if "self" in names:
            return block.forward.__closure__[names.index("self")].cell_contents
    raise AssertionError("nothing keeps what the blocks save")


def make(folder: Path, mesh: Mesh, case: Case) -> tuple[nn.Module, list[str]]:
    """As train.py does; and the report."""
    net = build(Arch.from_folder(folder))
    cfg = LoraConfig(rank=4) if case.lora else None
    if cfg:
        apply_lora(net, cfg)
    net.compute_dtype = case.compute
    apply_trainable(net, cfg, case.compute)
    install(net, KernelsConfig(blocks=case.blocks), "cpu", case.compute)
    report = parallelize(
        net, mesh, Sections(ParallelConfig(**dict(case.axes)), recompute=case.recompute, offload=case.offload), case.compute
    )
    materialize(net, CPU, 0, None)
    return net.train(), report


def rows_of(mesh: Mesh, accumulate: int) -> list[Batch]:
    """This rank's part of the documents, as micro-batches."""
    count = mesh.data_size * accumulate
    return [split(row, mesh) for row in rows({1: 320, 2: 192, 4: 96, 8: 64}[count], count)[mesh.data_rank :: mesh.data_size]]


def train(folder: Path, case: Case) -> tuple[list[float], dict[str, Tensor], nn.Module]:
    """(losses and norms, weights, model) after some steps; with an evaluation after each."""
    mesh = Mesh.build(ParallelConfig(**dict(case.axes)), CPU)
    net, _ = make(folder, mesh, case)
    if case.everywhere and case.offload.activations != "none":
        keeper_of(net).smallest = 1
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    adamw = AdamWConfig(lr=1e-2, weight_decay=0.1, impl=case.impl)
    opt = offload.optimizer(partial(build_optimizer, trained.items(), adamw), case.offload, CPU)
    if isinstance(opt, Visiting):
        opt.buckets = [b for group in opt.param_groups for b in offload._buckets(group, 5000)]
        assert len(opt.buckets) > 3
    micro, numbers = rows_of(mesh, case.accumulate), []
    for step in range(case.steps):
        numbers.append(backward(net, micro, 100, step, ParallelConfig(**dict(case.axes))))
        numbers.append(clip(trained.values(), 1.0, opt).item())
        set_lr(opt, 1e-2 / (step + 1))
        opt.step()
        opt.zero_grad(set_to_none=True)
        if step < 2:  # an evaluation in between
            with torch.no_grad():
                numbers.append(lm.loss(net, micro[0], 100).item())
    weights = {name: full(p).clone() for name, p in parameters_at_rest(net) if name in trained}
    return numbers, weights, net


def compare(rank, world, folder, case):
    """This rank's numbers and weights with and without offloading are equal; weights moved at all."""
    plain = replace(case, offload=OffloadConfig(), blocks="separate" if case.offload.frozen else "auto")
    want, weights, _ = train(folder, plain)
    found, moved, net = train(folder, case)
    first = train(folder, replace(plain, steps=0))[1]
    assert found == want, (found, want)
    assert all(torch.equal(moved[name], weights[name]) for name in weights)
    assert all((weights[name] - first[name]).norm() > 1e-3 for name in weights), "it does not train"
    if case.offload.activations != "none":
        assert keeper_of(net).home.pool.total > 0
    return len(weights)


def same(folder, case: Case) -> None:
    world = math.prod(n for _, n in case.axes if isinstance(n, int))
    assert min(run(compare, world, folder, case)) > 3


# ------------------------------------------------------------------------------------------------------------- activations

MOVING = {
    "cpu": Case(OffloadConfig(activations="cpu"), steps=50, accumulate=1),
    "cpu-lora": Case(OffloadConfig(activations="cpu"), lora=True, steps=50, accumulate=1),
    "cpu-bf16": Case(OffloadConfig(activations="cpu"), compute=torch.bfloat16),
    "cpu-recompute": Case(OffloadConfig(activations="cpu"), lora=True, recompute=RecomputeConfig(kind="full")),
    "disk": Case(OffloadConfig(activations="disk"), steps=5),
    "hidden": Case(OffloadConfig(activations="hidden_states"), recompute=RecomputeConfig(kind="full")),
    "cpu-shard": Case(OffloadConfig(activations="cpu"), (("shard", 2),)),
    "cpu-shard-lora": Case(OffloadConfig(activations="cpu"), (("shard", 2),), lora=True, recompute=RecomputeConfig(kind="full")),
    "disk-replicate": Case(OffloadConfig(activations="disk"), (("replicate", 2),)),
    "cpu-tensor": Case(OffloadConfig(activations="cpu"), (("tensor", 2),)),
    "cpu-tensor-lora": Case(OffloadConfig(activations="cpu"), (("tensor", 2),), lora=True),
    "cpu-context": Case(OffloadConfig(activations="cpu"), (("context", 2),)),
}


@pytest.mark.parametrize("name", MOVING)
def test_activations_come_back_unchanged(folder, name):
    same(folder, MOVING[name])


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Mesh.build(ParallelConfig(), CPU)
    torch.set_num_threads(threads)
    torch.distributed.destroy_process_group()


def forward(net: nn.Module, micro: list[Batch]) -> Tensor:
    return lm.loss(net, micro[0], 100)


def gradients(net: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad(set_to_none=True)
    return found


def buffers(pool: Pool) -> int:
    """Bytes that nobody uses."""
    return sum(b.memory.numel() for free in pool.free.values() for b in free)


def watch(monkeypatch) -> list[activations.Chest]:
    """The chests that are opened from now on."""
    chests, opened = [], activations.Chest.__init__

    def init(self, *args):
        opened(self, *args)
        chests.append(self)

    monkeypatch.setattr(activations.Chest, "__init__", init)
    return chests


CPU_ONLY = Case(OffloadConfig(activations="cpu"))


def test_the_device_keeps_two_blocks_and_brings_one_ahead(folder, mesh, monkeypatch):
    net, report = make(folder, mesh, CPU_ONLY)
    assert report == ["offload: activations of 4 blocks to host memory"]
    micro, chests, events = rows_of(mesh, 1), watch(monkeypatch), []
    loss = forward(net, micro)
    assert len(chests) == 4
    here = [sum(piece.data is not None for piece in chest.alive()) for chest in chests]
    assert here == [0, 0, len(chests[2].pieces), len(chests[3].pieces)]
    assert min(len(chest.pieces) for chest in chests) > 5
    stacks = [list(chest.alive()) for chest in chests]
    arrive, back = activations.Chest.arrive, activations.InMemoryCopy.back
    block_of = {id(piece.copy): i for i, stack in enumerate(stacks) for piece in stack}
    del stacks
    monkeypatch.setattr(activations.Chest, "arrive", lambda self: (events.append(f"need {chests.index(self)}"), arrive(self)))
    monkeypatch.setattr(
        activations.InMemoryCopy, "back", lambda self, to: (events.append(f"bring {block_of[id(self)]}"), back(self, to))[1]
    )
    loss.backward()
    assert list(dict.fromkeys(events)) == ["need 3", "need 2", "bring 1", "need 1", "bring 0", "need 0"]
    assert not any(list(chest.alive()) for chest in chests)
    with torch.no_grad():
        forward(net, micro)
    assert len(chests) == 4


def test_a_storage_moves_once_and_views_keep_their_strides(monkeypatch):
    keeper, net = Keeper(LANE, InMemory(LANE), smallest=1), nn.Module()
    weight = net.weight = nn.Parameter(torch.randn(8, 8))
    table, seen = torch.randn(16, 8), []

    def block(h: Tensor, shared: dict) -> Tensor:
        whole = h * 2
        left, right = whole.chunk(2)
        out = (left.t() @ right).exp() + (left * right).sum() + (h @ weight.t()).sum() + (h * shared["tables"][0]).sum()
        seen.append((whole.untyped_storage().nbytes(), left, right))
        return out

    net.forward = block
    h = torch.randn(16, 8, requires_grad=True)
    block(h, {"tables": [table]}).sum().backward()
    want, h.grad = h.grad, None
    keeper.around(net)
    chests = watch(monkeypatch)
    out = net.forward(h, {"tables": [table]})
    bytes_of = sorted(piece.bytes for piece in chests[0].alive())
    assert bytes_of == sorted([16 * 8 * 4, 16 * 8 * 4, 8 * 8 * 4]), "h, the one storage of both halves, and the result of exp"
    out.sum().backward()
    assert torch.equal(h.grad, want)


def test_the_pool_does_not_grow_and_gets_everything_back(folder, mesh):
    net, _ = make(folder, mesh, CPU_ONLY)
    keeper, micro = keeper_of(net), rows_of(mesh, 1)
    keeper.home.pool.piece = ALIGN  # so that nothing is left over
    for _ in range(3):
        forward(net, micro).backward()
        pool = keeper.home.pool
        assert pool.total == buffers(pool) > 4 * 320 * 32 * 4
        total = pool.total
    forward(net, micro).backward()
    assert pool.total == total


def test_an_exception_halfway_leaves_a_usable_pool(folder, mesh):
    net, _ = make(folder, mesh, CPU_ONLY)
    keeper, micro = keeper_of(net), rows_of(mesh, 1)
    keeper.home.pool.piece = ALIGN
    forward(net, micro).backward()
    want, total = gradients(net), keeper.home.pool.total
    net.model.layers[2].mlp.impl, down = separate, net.model.layers[2].mlp.down_proj
    down.gemm, gemm = lambda x, w: 1 / 0, down.gemm  # in the forward
    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError):
            forward(net, micro)
        assert buffers(keeper.home.pool) == keeper.home.pool.total == total
    finally:
        gc.enable()

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ZeroDivisionError

    down.gemm = lambda x, w: Fails.apply(gemm(x, w))
    loss = forward(net, micro)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    del loss
    gradients(net)
    down.gemm = gemm
    forward(net, micro).backward()
    assert all(torch.equal(g, want[name]) for name, g in gradients(net).items())
    assert keeper.home.pool.total <= 2 * total


def test_two_graphs_at_once_and_a_second_backward(folder, mesh):
    nets = [make(folder, mesh, case)[0] for case in (CPU_ONLY, replace(CPU_ONLY, offload=OffloadConfig()))]
    found = []
    for net in nets:
        micro = rows_of(mesh, 2)
        a, b = (-net(batch).sum() / 100 for batch in micro)  # not lm.loss, whose gradient can be taken once
        a.backward(retain_graph=True)
        c = -net(micro[0]).sum() / 50
        c.backward()
        b.backward()
        a.backward()
        found.append(gradients(net))
    assert all(torch.equal(g, found[1][name]) for name, g in found[0].items())


@pytest.mark.parametrize(("kind", "blocks", "pieces"), [("full", 4, 4), ("every_n", 2, 2), ("selective", 4, 4)])
def test_hidden_states_are_the_inputs_of_recomputed_blocks(folder, mesh, monkeypatch, kind, blocks, pieces):
    moved = []
    monkeypatch.setattr(Keeper, "around", lambda self, block, around=Keeper.around: (moved.append(block), around(self, block))[1])
    case = Case(OffloadConfig(activations="hidden_states"), recompute=RecomputeConfig(kind=kind), everywhere=False)
    net, report = make(folder, mesh, case)
    assert report[-1] == f"offload: inputs of {blocks} blocks to host memory"
    assert moved == list(net.model.layers)[:: 4 // blocks]
    sizes = []
    keep = InMemory.keep
    monkeypatch.setattr(InMemory, "keep", lambda self, data: (sizes.append(data.numel()), keep(self, data))[1])
    loss = forward(net, rows_of(mesh, 1))
    assert sizes == [320 * 32 * 4] * pieces
    loss.backward()
    assert sizes == [320 * 32 * 4] * pieces, "recomputing moves nothing"


def recompute_some(blocks: list[nn.Module]) -> list[str]:
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return []


def compiled_gradients(rank, world, folder):
    """Whether the gradients of a model with compiled blocks are the same: plain, moved, and recomputed and moved."""
    net, _ = make(folder, Mesh.build(ParallelConfig(), CPU), Case(OffloadConfig()))
    micro, blocks, found = rows_of(Mesh.build(ParallelConfig(), CPU), 1), list(net.model.layers)[:1], []
    for block in blocks:
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    compiled = [block.forward for block in blocks]
    for recompute, moves in ((False, False), (False, True), (True, True)):
        for block, forward_ in zip(blocks, compiled):
            block.forward = forward_
        recompute_some(blocks if recompute else [])
        if moves:
            offload._activations(blocks, CPU, OffloadConfig(activations="cpu"))
            keeper_of(net).smallest = 1
        forward(net, micro).backward()
        found.append(gradients(net))
        assert not moves or keeper_of(net).home.pool.total > 0
    assert all(g.norm() > 1e-4 for g in found[0].values())
    return [max(float((g - other[name]).norm() / g.norm()) for name, g in found[0].items()) for other in found]


def test_compiled_blocks(folder):
    """Compiled is inside, as is recomputation of what is compiled."""
    assert run(compiled_gradients, 1, folder) == [[0, 0, 0]]


def test_files_of_activations(folder, mesh, tmp_path, monkeypatch):
    (tmp_path / "fast").mkdir()
    net, report = make(folder, mesh, Case(OffloadConfig(activations="disk", folder=str(tmp_path / "fast"))))
    assert report == [f"offload: activations of 4 blocks to disk, in {tmp_path / 'fast'}"]
    keeper, micro = keeper_of(net), rows_of(mesh, 1)
    monkeypatch.setattr(activations, "QUEUED", 0)  # every write waits for the one before: slow, and right
    home, chests = keeper.home, watch(monkeypatch)
    home.pool.piece = ALIGN
    for _ in range(3):
        forward(net, micro).backward()
    for write, _ in home.writes:
        write.result()
    assert home.pool.total == buffers(home.pool) > 0
    loss = forward(net, micro)
    chests[-1].arrive()
    chests[-2].arrive()
    assert [piece.copy.read is not None for piece in chests[-4].alive()] == [True] * len(chests[-4].pieces), "a block ahead of the device"
    assert len(chests[-4].pieces) > 5
    del loss
    del chests[:]
    assert os.listdir(tmp_path / "fast") == [], "the file has no name: it is gone with the process, however that ends"
    assert os.fstat(home.file.fileno()).st_size == home.size == sum(n * len(free) for n, free in home.places.items())
    assert home.size > 4 * 320 * 32 * 4


def test_a_full_disk_and_a_failed_write_are_errors(folder, mesh, tmp_path, monkeypatch):
    net, _ = make(folder, mesh, Case(OffloadConfig(activations="disk", folder=str(tmp_path))))
    micro = rows_of(mesh, 1)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match=f"No space left on device: activations take 0.00 GiB so far; see offload.folder: '{tmp_path}'"):
            forward(net, micro)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            forward(net, micro).backward()
    forward(net, micro).backward()


# -------------------------------------------------------------------------------------------------------------- parameters

PARAMETERS = OffloadConfig(parameters=True)
HOST = {
    "one": Case(PARAMETERS),
    "one-lora": Case(PARAMETERS, lora=True),
    "one-gathered-once": Case(PARAMETERS, (("reshard", "step"),)),
    "shard": Case(PARAMETERS, (("shard", 2),)),
    "shard-lora": Case(PARAMETERS, (("shard", 2),), lora=True, recompute=RecomputeConfig(kind="full")),
    "both": Case(OffloadConfig(parameters=True, activations="cpu"), (("replicate", 2), ("tensor", 2)), accumulate=1),
    "copies": Case(PARAMETERS, (("replicate", 2), ("shard", 2)), lora=True, accumulate=1),
}


@pytest.mark.parametrize("name", HOST)
def test_parameters_in_host_memory_train_alike(folder, name):
    same(folder, HOST[name])


def lies_on_the_host(rank, world, folder):
    """What a device other than the CPU would show: `meta` stands for it."""
    case = Case(PARAMETERS)
    mesh = Mesh.build(ParallelConfig(), CPU)
    net, report = make(folder, mesh, case)
    assert report == ["offload: weights, gradients and optimizer state in host memory"]
    assert net.on_host == {name for name, _ in net.named_parameters()}
    allocate(net, "meta")
    net.reset_buffers("meta")
    assert {local(p).device.type for p in net.parameters()} == {"cpu"}
    assert {b.device.type for b in net.buffers()} == {"meta"}
    return len(net.on_host)


def test_parameters_are_materialized_on_the_host(folder):
    assert min(run(lies_on_the_host, 2, folder)) > 30


# --------------------------------------------------------------------------------------------------------------- optimizer

OPTIMIZER = OffloadConfig(optimizer=True)


@pytest.mark.parametrize(
    "case",
    [Case(OPTIMIZER, (("shard", 2),)), Case(OPTIMIZER, lora=True), Case(OPTIMIZER, (("shard", 2),), lora=True, impl="triton")],
    ids=["shard", "lora", "triton"],
)
def test_optimizer_state_visits_and_updates_alike(folder, case):
    same(folder, case)


def parameters(seed: int) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(n, m, generator=g)) for n, m in ((7, 5), (3, 3), (40, 8), (1, 2), (6, 6))]


OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW([{"params": ps[:2], "weight_decay": 0.3}, {"params": ps[2:]}], lr=0.1, foreach=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bucket", [1, 150, 10**9])
def test_any_optimizer_visits(name, bucket, monkeypatch):
    """Also those that make their state in the first step, and parameters without a gradient; whoever reads it then finds it at home."""
    if bucket == 150:
        monkeypatch.setattr(offload, "Lane", LateLane)
    plain, ours = parameters(0), parameters(0)
    want, made = OPTIMIZERS[name](plain), OPTIMIZERS[name](ours)
    opt = Visiting(lambda home: made, CPU, bucket)
    homes: dict[tuple[int, str], Tensor] = {}
    for step in range(4):
        for i, (a, b, g) in enumerate(zip(plain, ours, parameters(step + 1))):
            a.grad, b.grad = (None, None) if i == step else (g.detach().clone(), g.detach().clone())
        set_lr(want, 0.1 / (step + 1))
        set_lr(opt, 0.1 / (step + 1))
        want.step()
        opt.step()
        opt.zero_grad()
        assert all(p.grad is None for p in ours)
        for i, (a, b) in enumerate(zip(plain, ours)):
            assert torch.equal(a, b)
            assert want.state[a].keys() == opt.state[b].keys()
            for key, t in want.state[a].items():
                assert torch.equal(torch.as_tensor(opt.state[b][key]), torch.as_tensor(t))
                assert homes.setdefault((i, key), opt.state[b][key]) is opt.state[b][key], "it may be registered in a checkpoint"
    assert [group["params"] for group in made.param_groups] == [ours[:2], ours[2:]] if name == "adamw" else [ours]
    assert any(not torch.equal(a, b) for a, b in zip(ours, parameters(0)))


def test_the_inner_optimizer_sees_a_bucket_and_copies_of_its_state():
    ours = parameters(0)
    seen: list[list[int]] = []
    here: list[set[int]] = []

    class Spy(torch.optim.SGD):
        def step(self):
            seen.append([p.numel() for group in self.param_groups for p in group["params"]])
            here.append({id(t) for p in ours for t in self.state[p].values() if t is not None})
            super().step()

    opt = Visiting(lambda home: Spy(ours, lr=0.1, momentum=0.9), CPU, 160)
    for _ in range(2):
        for p in ours:
            p.grad = torch.ones_like(p)
        opt.step()
    assert seen == [[35], [9], [320], [2, 36]] * 2, "at most 160 bytes, or one parameter"
    at_home = {id(t) for state in opt.state.values() for t in state.values()}
    assert [len(at_home - ids) for ids in here[4:]] == [1, 1, 1, 2], "those of the bucket are elsewhere"


def test_state_begins_at_home():
    made = []
    p = nn.Parameter(torch.ones(3, 3))
    opt = build_optimizer([("w", p)], AdamWConfig(), home=lambda t: made.append(t) or t)
    assert {id(t) for t in made} == {id(t) for t in state_tensors(opt, [("w", p)]).values()}
    assert len(made) == 3


# ------------------------------------------------------------------------------------------------------------------ frozen

FROZEN = OffloadConfig(frozen=True)


@pytest.mark.parametrize(
    "case",
    [
        Case(FROZEN, lora=True),
        Case(FROZEN, lora=True, compute=torch.bfloat16, recompute=RecomputeConfig(kind="full")),
        Case(OffloadConfig(frozen=True, activations="cpu", optimizer=True), lora=True),
    ],
    ids=["plain", "bf16-recompute", "all"],
)
def test_frozen_weights_visit(folder, case):
    same(folder, case)


def feeder_of(net: nn.Module) -> Feeder:
    return net.model.layers[0].mlp.down_proj.gemm.feeder


@pytest.mark.parametrize("kind", ["none", "full"])
def test_frozen_weights_are_on_the_host_and_the_next_one_is_under_way(folder, mesh, monkeypatch, kind):
    net, report = make(folder, mesh, Case(FROZEN, lora=True, recompute=RecomputeConfig(kind=kind)))
    assert "offload: frozen weights of 28 linears in host memory; blocks: separate" in report
    feeder, micro = feeder_of(net), rows_of(mesh, 1)
    uses, late = [], []
    get = Feeder.get

    def watched(self, number, use, weight):
        uses.append((number, use))
        late.append(not any(slot.holds == number for slot in self.slots))
        device = get(self, number, use, weight)
        assert device.data_ptr() != weight.data_ptr()
        assert torch.equal(device, weight)
        return device

    monkeypatch.setattr(Feeder, "get", watched)
    for i in range(3):
        forward(net, micro).backward()
        if i == 0:
            first = len(uses)
            assert sum(late) > 28
    assert uses[:first] * 3 == uses
    assert uses[:2] == [(0, "forward"), (1, "forward")]
    assert uses[first - 1][1] == "backward"
    assert ((27, "again") in uses) == (kind == "full")
    assert sum(late[first:]) == 1, "the step's first weight is not known to follow its last until it did once"
    assert len(feeder.slots) == 2
    assert feeder.slots[0].memory.numel() == max(p.nbytes for name, p in net.named_parameters() if name in net.on_host)
    assert feeder.copies <= 3 * first
    with torch.no_grad():
        forward(net, micro)
    assert sum(late[first:]) <= 2


def test_only_frozen_weights_of_linears_stay_on_the_host(folder, mesh):
    net, _ = make(folder, mesh, Case(FROZEN, lora=True))
    allocate(net, "meta")
    host = {name for name, p in net.named_parameters() if p.device.type == "cpu"}
    assert host == net.on_host
    assert len(host) == 28
    assert all(name.startswith("model.layers.") and name.endswith("_proj.weight") for name in host)


# ------------------------------------------------------------------------------------------------- copies that take their time


class LateMark:
    """The mark of a copy that has not been made yet."""

    def __init__(self, lane: LateLane):
        self.lane = lane

    def synchronize(self) -> None:
        self.lane.wait(self)


class LateLane(Lane):
    """A lane as slow as it may be: it copies when somebody waits for it, in order. Whoever does not wait sees what was there before."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.queue: list[tuple[LateMark, Tensor, Tensor]] = []

    def copy(self, to: Tensor, source: Tensor) -> LateMark:
        self.queue.append((LateMark(self), to, source))
        return self.queue[-1][0]

    def wait(self, mark: LateMark | None) -> None:
        while any(queued is mark for queued, _, _ in self.queue):
            _, to, source = self.queue.pop(0)
            to.copy_(source)

    def drain(self) -> None:
        if self.queue:
            self.wait(self.queue[-1][0])


LATE = {
    "cpu": Case(OffloadConfig(activations="cpu")),
    "disk": Case(OffloadConfig(activations="disk"), lora=True, recompute=RecomputeConfig(kind="full")),
    "optimizer": Case(OPTIMIZER),
    "frozen": Case(FROZEN, lora=True),
}


@pytest.mark.parametrize("name", LATE)
def test_nobody_relies_on_copies_being_fast(folder, name, monkeypatch):
    monkeypatch.setattr(offload, "Lane", LateLane)
    same(folder, LATE[name])


def test_memory_is_given_up_after_its_copy(folder, mesh, monkeypatch):
    monkeypatch.setattr(offload, "Lane", LateLane)
    net, _ = make(folder, mesh, CPU_ONLY)
    chests = watch(monkeypatch)
    loss = forward(net, rows_of(mesh, 1))
    here = {piece.data.data_ptr() for chest in chests for piece in chest.alive() if piece.data is not None}
    assert {source.data_ptr() for _, _, source in keeper_of(net).lane.queue} == here
    assert len(here) > 10
    loss.backward()
    assert keeper_of(net).lane.queue == []


# ---------------------------------------------------------------------------------------------------------- checks and runs

AXES = {"replicate": 1, "shard": 1, "context": 1, "tensor": 1}
REFUSED = {
    "hidden": (Sections(offload=OffloadConfig(activations="hidden_states")), AXES, None, "recompute.kind='full'"),
    "hidden-budget": (
        Sections(offload=OffloadConfig(activations="hidden_states"), recompute=RecomputeConfig(kind="budget"), compile=CompileConfig()),
        AXES,
        None,
        "offload.activations='cpu'",
    ),
    "cpu-selective": (
        Sections(offload=OffloadConfig(activations="cpu"), recompute=RecomputeConfig(kind="selective")),
        AXES,
        None,
        "offload.activations='hidden_states'",
    ),
    "folder": (Sections(offload=OffloadConfig(activations="disk", folder="/proc/nowhere")), AXES, None, "offload.folder='/proc/nowhere'"),
    "frozen-full": (Sections(offload=FROZEN), AXES, None, "offload.parameters=true"),
    "frozen-ranks": (Sections(offload=FROZEN), AXES | {"shard": 2}, LoraConfig(), "2; use offload.parameters=true"),
    "frozen-compiled": (Sections(offload=FROZEN, compile=CompileConfig()), AXES, LoraConfig(), "[compile]"),
}
LEGAL = {
    "hidden-selective": (Sections(offload=OffloadConfig(activations="hidden_states"), recompute=RecomputeConfig(kind="selective")), None),
    "hidden-every_n": (Sections(offload=OffloadConfig(activations="hidden_states"), recompute=RecomputeConfig(kind="every_n")), None),
    "all-frozen": (Sections(offload=OffloadConfig(frozen=True, activations="disk", optimizer=True)), LoraConfig()),
    "parameters": (Sections(offload=OffloadConfig(parameters=True, activations="cpu"), compile=CompileConfig()), None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    cfg, axes, lora, words = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        offload.check(cfg, axes, lora)
    assert words in str(error.value)
    assert str(error.value).startswith("offload.")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", LEGAL)
def test_legal(name):
    cfg, lora = LEGAL[name]
    offload.check(cfg, AXES, lora)


def runs(tmp_path: Path, name: str, world: int, extra: str, *argv: str) -> Path:
    model_, data = write_model(tmp_path / "model"), write_chats(tmp_path / "data.jsonl", 40)
    config = write_config(tmp_path / f"{name}.toml", model_, data, tmp_path / name, extra)
    ranks = launch.run(["--config", str(config), *argv], world, tmp_path / f"{name}-logs")
    assert ranks.wait() == [0] * world, ranks.output()
    return tmp_path / name


def result(out: Path) -> tuple[dict[int, tuple[float, float]], bytes]:
    numbers = {r["step"]: (r["loss"], r["grad_norm"]) for r in read(out / "metrics.jsonl") if "loss" in r}
    return numbers, next((out / "export").glob("*.safetensors")).read_bytes()


SHORT = "[train]\nsteps = 4\naccumulate = 2\n[log]\nevery = 1\n[checkpoint]\nevery = 2\n[schedule]\nkind = 'constant'\n"


@pytest.mark.parametrize(
    ("world", "section", "layout"),
    [
        (2, "activations = 'cpu'\noptimizer = true\n", "[parallel]\ncontext = 2\n"),
        (2, "parameters = true\n", ""),
        (1, "parameters = true\n", "[lora]\nrank = 2\n"),
    ],
    ids=["context", "parameters", "parameters-lora"],
)
def test_stopped_and_resumed_runs_go_on_as_if_nothing_had_been_offloaded(tmp_path, world, section, layout):
    """Two steps, another process, two more: the losses, norms and exported bytes of four steps without offloading."""
    want = result(runs(tmp_path, "plain", world, SHORT + layout))
    out = runs(tmp_path, "moved", world, f"{SHORT}{layout}[offload]\n{section}", "--train.steps=2")
    found = result(runs(tmp_path, "moved", world, f"{SHORT}{layout}[offload]\n{section}"))
    assert found == want
    assert len(want[0]) == 4
    assert want[0][4] != want[0][1]
    assert "offload: " in (out / "logs" / "rank_0.log").read_text()
