"""Fused regions against the same operations one after the other, by themselves and in a whole model; and what a block keeps."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kernels import launch, lora, regions, rms_norm, rope
from kernels.lora import Kind, Part
from kernels.regions import Ops
from model import build, flops
from model.arch import Arch
from model.config import KernelsConfig, LoraConfig
from model.decoder import Decoder, Row
from model.transforms.lora import apply_lora
from model.transforms.ops import install
from model.transforms.trainable import apply_trainable
from model.weights import initialize
from tests.kernels.close import close, device, error, gradients
from tests.model.golden import GOLDEN, rows, write_config
from tests.parallel.watch import Watch

TRITON = KernelsConfig(blocks="fused", norm="triton", rope="triton", glu="triton", head="triton", dropout="triton")
SEPARATE = KernelsConfig(blocks="separate", norm="torch", rope="torch", glu="torch", dropout="torch")
needs_triton = pytest.mark.skipif(launch.triton is None, reason="triton is not installed")


# -- each region by itself -------------------------------------------------------------------------------------------------

TORCH, ALL_TRITON = Ops(), Ops(*["triton"] * 4)
RANK = 3
SIZE = 6  # of a head


class Region(NamedTuple):
    """fused, plain: functions of the tensors, to a tuple of results; flops: of both passes, by which tensors need a gradient."""

    names: list[str]
    tensors: list[torch.Tensor]
    fused: Callable
    plain: Callable
    flops: Callable[[dict[str, bool]], int]


class Setting(NamedTuple):
    tokens: int = 13
    hidden: int = 20
    inner: int = 28
    dropout: float = 0.0
    ops: Ops = TORCH
    keep: str = "all"
    offset: bool = False
    adapters: torch.dtype | None = None  # None: the dtype of the others
    seed: int = 0


class Sizes(NamedTuple):
    """Of a linear; its products, in operations."""

    tokens: int
    entering: int
    leaving: int

    def forward(self) -> int:
        return 2 * self.tokens * (self.entering * self.leaving + RANK * (self.entering + self.leaving))

    def backward(self, needs: list[bool], needs_dx: bool) -> int:
        """needs: of weight, bias, A, B."""
        weight, _, a, b = needs
        whole, thin = self.entering * self.leaving, RANK * self.entering
        slope = RANK * self.leaving
        used = whole * (needs_dx + weight) + thin * (needs_dx + a) + slope * ((needs_dx or a) + b)
        return 2 * self.tokens * used


def named(linear: str) -> list[str]:
    return [f"{linear}.{field}" for field in Part._fields]


def plain_linear(x, part: Part, kind: Kind, seed: torch.Tensor | None) -> torch.Tensor:
    w, bias, a, b = (t.to(x.dtype) for t in part)
    y = F.linear(x, w, bias)
    if seed is not None:
        x = x * lora.dropout(torch.ones_like(x), seed, kind.dropout)
    return y + F.linear(F.linear(x, a) * kind.scale, b)


def plain_seeds(s: Setting, count: int) -> list[torch.Tensor | None]:
    """What a region draws."""
    torch.manual_seed(5)
    return list(lora.seeds(count, torch.device(device()))) if s.dropout else [None] * count


def seeded(function: Callable) -> Callable:
    def run(*tensors):
        torch.manual_seed(5)
        return function(*tensors)

    return run


def kinds_of(s: Setting, count: int) -> list[Kind]:
    return [Kind(0.5 + i, s.dropout) for i in range(count)]


def parts_of(flat) -> list[Part]:
    return [Part(*flat[i : i + 4]) for i in range(0, len(flat), 4)]


def tensors_of(s: Setting, dtype: torch.dtype, inputs: int, weights: list[int], linears: list[Sizes]) -> list[torch.Tensor]:
    """Inputs [T, D], weights of norms, then the parts of each linear."""
    g = torch.Generator().manual_seed(s.seed)

    def normal(*shape: int, kind: torch.dtype = dtype, size: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * size).to(kind).to(device())

    found = [normal(s.tokens, s.hidden) for _ in range(inputs)] + [normal(n) for n in weights]
    for one in linears:
        found += [normal(one.leaving, one.entering, size=one.entering**-0.5), normal(one.leaving)]
        found += [normal(*shape, kind=s.adapters or dtype, size=0.5) for shape in ((RANK, one.entering), (one.leaving, RANK))]
    return found


def attention_region(s: Setting, dtype: torch.dtype) -> Region:
    """3 heads of queries, 1 of keys."""
    linears = [Sizes(s.tokens, s.hidden, heads * SIZE) for heads in (3, 1, 1)]
    angle = torch.arange(s.tokens, dtype=torch.float64)[:, None, None] * torch.tensor([1.0, 0.1, 0.01] * 2)
    sign = torch.tensor([-1.0] * 3 + [1.0] * 3, dtype=torch.float64)
    cos, sin = angle.cos().to(dtype).to(device()), (angle.sin() * sign).to(dtype).to(device())
    kinds = kinds_of(s, 3)

    def fused(h, w, q_w, k_w, *flat):
        heads = regions.Heads(cos, sin, SIZE, q_w, k_w, 1e-4, s.offset)
        return regions.queries_keys_values(h, regions.Norm(w, 1e-5, s.offset), parts_of(flat), kinds, heads, s.ops)

    def plain(h, w, q_w, k_w, *flat):
        x = rms_norm.rms_norm_ref(h, w, 1e-5, s.offset)
        found = zip(parts_of(flat), kinds, plain_seeds(s, 3))
        q, k, v = (plain_linear(x, part, kind, seed).unflatten(-1, (-1, SIZE)) for part, kind, seed in found)
        return *rope.rope_ref(q, k, cos.to(q.dtype), sin.to(q.dtype), q_w, k_w, 1e-4, s.offset), v

    def flops(needs: dict[str, bool]) -> int:
        needs_dx = needs["h"] or needs["norm"]
        back = (one.backward([needs[n] for n in named(name)], needs_dx) for name, one in zip("qkv", linears))
        return sum(one.forward() for one in linears) + sum(back)

    names = ["h", "norm", "q_norm", "k_norm", *named("q"), *named("k"), *named("v")]
    return Region(names, tensors_of(s, dtype, 1, [s.hidden, SIZE, SIZE], linears), seeded(fused), plain, flops)


def linear_region(s: Setting, dtype: torch.dtype) -> Region:
    one, (kind,) = Sizes(s.tokens, s.hidden, s.inner), kinds_of(s, 1)

    def fused(x, *flat):
        return (regions.linear(x, Part(*flat), kind, None, s.ops),)

    def plain(x, *flat):
        return (plain_linear(x, Part(*flat), kind, *plain_seeds(s, 1)),)

    def flops(needs: dict[str, bool]) -> int:
        return one.forward() + one.backward([needs[n] for n in named("o")], needs["x"])

    return Region(["x", *named("o")], tensors_of(s, dtype, 1, [], [one]), seeded(fused), plain, flops)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x in 8 bits, its gradient as if it were x."""
    scale = x.detach().abs().amax(-1, keepdim=True) / 448
    return x + ((x.detach() / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale - x.detach())


def feed_forward_region(s: Setting, dtype: torch.dtype, squeeze: Callable = lambda x: x) -> Region:
    """squeeze: what `plain` does to gate and up."""
    gate, down = Sizes(s.tokens, s.hidden, s.inner), Sizes(s.tokens, s.inner, s.hidden)
    kinds = kinds_of(s, 3)

    def fused(h, add, w, *flat):
        return regions.feed_forward(h, add, regions.Norm(w, 1e-5, s.offset), parts_of(flat), kinds, "silu", None, False, s.keep, s.ops)

    def plain(h, add, w, *flat):
        total, (*inner, last), seeds = h + add, parts_of(flat), plain_seeds(s, 3)
        x = rms_norm.rms_norm_ref(total, w, 1e-5, s.offset)
        gate, up = (squeeze(plain_linear(x, *each)) for each in zip(inner, kinds, seeds))
        return total, plain_linear(F.silu(gate) * up, last, kinds[2], seeds[2])

    def flops(needs: dict[str, bool]) -> int:
        of = {name: [needs[n] for n in named(name)] for name in ("gate", "up", "down")}
        needs_dx = needs["h"] or needs["add"] or needs["norm"]
        inside = needs_dx or any(of["gate"] + of["up"])
        again = s.keep == "none" and (inside or of["down"][0] or of["down"][2])  # gate and up are made again
        back = sum(gate.backward(of[name], needs_dx) for name in ("gate", "up")) + down.backward(of["down"], inside)
        return (2 + 2 * again) * gate.forward() + down.forward() + back

    names = ["h", "add", "norm", *named("gate"), *named("up"), *named("down")]
    return Region(names, tensors_of(s, dtype, 2, [s.hidden], [gate, gate, down]), seeded(fused), plain, flops)


MAKE = {"queries_keys_values": attention_region, "linear": linear_region, "feed_forward": feed_forward_region}


def upstream(region: Region) -> list[torch.Tensor]:
    """Gradients of the results, normal values."""
    g = torch.Generator().manual_seed(2)
    outs = region.plain(*region.tensors)
    return [torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.dtype).to(device()) for o in outs]


def everything(region: Region, function: Callable, grads: list[torch.Tensor]) -> list[torch.Tensor]:
    return gradients(function, region.tensors, [True] * len(region.tensors), grads)


def subsets(count: int) -> list[tuple[bool, ...]]:
    """All, of up to 6; of more, each alone, each pair, all but one, all, and 50 by chance."""
    if count <= 6:
        return [needs for needs in itertools.product((True, False), repeat=count) if any(needs)]
    some = [set(pair) for pair in itertools.combinations_with_replacement(range(count), 2)]
    some += [set(range(count)) - {i} for i in range(count)] + [set(range(count))]
    chance = random.Random(0)
    some += [set(chance.sample(range(count), chance.randint(3, count - 2))) for _ in range(50)]
    return [tuple(i in one for i in range(count)) for one in some]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    "name,keep", [("queries_keys_values", "all"), ("linear", "all"), ("feed_forward", "all"), ("feed_forward", "none")]
)
def test_every_subset_of_gradients(name, keep, dropout):
    """And products for no others: operations are counted."""
    region = MAKE[name](Setting(5, dropout=dropout, keep=keep), torch.float64)
    grads = upstream(region)
    outs, want = len(grads), everything(region, region.plain, grads)
    for needs in subsets(len(region.tensors)):
        with FlopCounterMode(display=False) as count:
            found = gradients(region.fused, region.tensors, needs, grads)
        close(found, want[:outs] + [w for w, need in zip(want[outs:], needs) if need], 1e-12)
        asked = dict(zip(region.names, needs))
        assert count.get_total_flops() == region.flops(asked), [n for n, need in asked.items() if need]


SETTINGS = {
    "one token": Setting(1),
    "three tokens": Setting(3, 7, 11),
    "offset": Setting(offset=True),
    "made again": Setting(3, keep="none"),
    "made again, dropout": Setting(4, dropout=0.3, keep="none"),
}


@pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", MAKE)
def test_like_separate_operations(name, setting, dtype, bound):
    region = MAKE[name](SETTINGS[setting], dtype)
    grads = upstream(region)
    close(everything(region, region.fused, grads), everything(region, region.plain, grads), bound)


@needs_triton
@pytest.mark.parametrize("setting", [*SETTINGS, "more than a block"])
@pytest.mark.parametrize("name", MAKE)
def test_by_triton_like_separate_operations(name, setting):
    """Sizes that fill no block, and more than one."""
    chosen = SETTINGS.get(setting, Setting(1, 7, 1030))
    region = MAKE[name](chosen._replace(ops=ALL_TRITON), torch.float32)
    grads = upstream(region)
    close(everything(region, region.fused, grads), everything(region, region.plain, grads))


@pytest.mark.parametrize("ops", [TORCH, pytest.param(ALL_TRITON, marks=needs_triton)], ids=["torch", "triton"])
@pytest.mark.parametrize("name", MAKE)
def test_inputs_and_gradients_with_gaps(name, ops):
    """Every second channel of a buffer, and its transpose; gradients that are slices, turned, or one number everywhere."""
    region = MAKE[name](Setting(4, ops=ops), torch.float32)
    inputs = sum(t.dim() == 2 and t.shape == (4, 20) for t in region.tensors)
    rest = region.tensors[inputs:]
    wide = [torch.stack((t, t), -1).flatten(1) for t in region.tensors[:inputs]]

    def apart(function, turn):
        def run(*tensors):
            views = [x[:, ::2] for x in tensors[:inputs]]
            return function(*([v.T.contiguous().T for v in views] if turn else views), *tensors[inputs:])

        return run

    forms = (
        lambda g: torch.cat((g, g), -1)[..., : g.shape[-1]],
        lambda g: g.transpose(0, -1).contiguous().transpose(0, -1),
        lambda g: g.flatten()[:1].view(*[1] * g.dim()).expand(g.shape),
    )
    for turn, form in itertools.product((False, True), forms):
        grads = [form(g) for g in upstream(region)]
        assert not any(g.is_contiguous() for g in grads)
        needs = [True] * len(region.tensors)
        found, want = (gradients(apart(f, turn), [*wide, *rest], needs, grads) for f in (region.fused, region.plain))
        close(found, want)


@pytest.mark.parametrize("name", ["queries_keys_values", "feed_forward"])
def test_results_that_nobody_reads(name):
    """Only some of q, k, v, or of the sum and the network's result."""
    region = MAKE[name](Setting(), torch.float64)
    grads = upstream(region)
    for read in itertools.product((True, False), repeat=len(grads)):
        if not any(read):
            continue
        pair = []
        for function in (region.fused, region.plain):
            leaves = [t.clone().requires_grad_() for t in region.tensors]
            outs = function(*leaves)
            some = [(o, g) for o, g, r in zip(outs, grads, read) if r]
            pair.append(torch.autograd.grad([o for o, _ in some], leaves, [g for _, g in some], allow_unused=True))
        reached = [w is not None for w in pair[1]]
        close(*([x for x, r in zip(one, reached) if r] for one in pair), 1e-12)
        assert all(r or f is None or not f.any() for f, r in zip(pair[0], reached))
        assert all(reached) == (all(read) or read == (False, True))


def test_gate_and_up_in_8_bits():
    """Results are exact, gradients those of the rounded ones, but B's of the down projection: what it is made from is kept as it is."""
    setting = Setting(keep="8bit")
    region, exact = feed_forward_region(setting, torch.float64, rounded), feed_forward_region(setting, torch.float64)
    grads = upstream(region)
    found, want, without = (everything(region, f, grads) for f in (region.fused, region.plain, exact.plain))
    for i in (0, 1, 2 + region.names.index("down.b")):
        want[i] = without[i]
    close(found, want, 1e-6)
    off = {name: error(f, w) for name, f, w in zip(region.names, found[2:], without[2:])}
    assert 1e-3 < off["gate.a"] < 0.05 and 1e-3 < off["down.weight"] < 0.05 and off["down.b"] < 1e-12, off


@pytest.mark.parametrize("keep", ["all", "none"])
def test_a_recomputed_network_leaves_out_the_product_that_nobody_reads(keep):
    region = feed_forward_region(Setting(keep=keep), torch.float64)
    grads, last = upstream(region), 2 * 13 * 28 * 20 + 2 * 13 * 20 * RANK

    def checkpointed(only_added: bool):
        def run(h, add, w, *flat):
            args = (regions.Norm(w, 1e-5, False), parts_of(flat), kinds_of(Setting(), 3), "silu", None, only_added, keep, TORCH)
            return checkpoint(lambda h, add: regions.feed_forward(h, add, *args), h, add, use_reentrant=False)

        return run

    counts = []
    for only_added in (False, True):
        with FlopCounterMode(display=False) as count:
            found = everything(region, checkpointed(only_added), grads)
        close(found, everything(region, region.plain, grads), 1e-12)
        counts.append(count.get_total_flops())
    assert counts[0] - counts[1] == last


@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", MAKE)
def test_half_precision_is_as_exact_as_separate_operations(name, dropout, adapters):
    """Against fp64, what is fused may be off by little more than the same operations one after the other; on average, since a single
    small tensor's error is up to twice the other's by chance."""
    errors = []
    for seed in range(6):
        setting = Setting(40, 48, 64, dropout, adapters=adapters, seed=seed)
        region = MAKE[name](setting, torch.bfloat16)
        exact = MAKE[name](setting._replace(adapters=None), torch.float64)
        exact = exact._replace(tensors=[t.double() for t in region.tensors])
        grads = upstream(region)
        want = everything(exact, exact.plain, [g.double() for g in grads])
        pair = [everything(region, function, grads) for function in (region.fused, region.plain)]
        assert all(f.dtype == p.dtype and w.norm() > 0 for f, p, w in zip(*pair, want, strict=True))
        errors.append([[error(x, w) for x, w in zip(one, want)] for one in pair])
    fused, plain = torch.tensor(errors).mean(0)
    assert (fused < 1.25 * plain + 1e-5).all() and (plain > 1e-3).all() and (plain < 0.02).all(), (fused, plain)


# -- a whole model ---------------------------------------------------------------------------------------------------------


def make(folder: Path, kernels: KernelsConfig, lora: LoraConfig | None, dtype: torch.dtype = torch.float32) -> Decoder:
    net = build(Arch.from_folder(folder))
    if lora:
        apply_lora(net, lora)
    apply_trainable(net, lora, dtype, dtype)
    install(net, kernels, device(), dtype)
    net.compute_dtype = dtype
    net.to_empty(device=device()).to(dtype)
    net.reset_buffers(device())
    initialize(net, 0)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():  # B begins at zero, which would hide errors in A
        for name, p in net.named_parameters():
            if name.endswith(("lora_B.weight", "bias")):
                p.copy_(torch.randn(p.shape, generator=g).mul_(0.1))
    return net


def there(row: Row) -> Row:
    return Row(*(x.to(device()) if isinstance(x, torch.Tensor) else x for x in row))


def results(net: Decoder, row: Row) -> dict[str, torch.Tensor]:
    """Log-probs and every gradient, for any gradients from above."""
    torch.manual_seed(5)
    logp = net(there(row))
    weights = torch.randn(logp.shape, generator=torch.Generator().manual_seed(1), dtype=logp.dtype).to(device())
    (logp * weights).sum().backward()
    return {"logp": logp.detach()} | {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def agree(found: dict, want: dict, bound: float = 1e-5) -> None:
    assert found.keys() == want.keys()
    close(found.values(), want.values(), bound)


def short(folder: Path) -> Row:
    """For the interpreter, which takes its time."""
    return rows(Arch.from_folder(folder), (7, 4))


ADAPTERS = {
    "full": None,
    "all": LoraConfig(rank=4, alpha=6.0),
    "some": LoraConfig(rank=3, targets=("q_proj", "v_proj", "down_proj")),
    "others": LoraConfig(rank=2, targets=("k_proj", "o_proj", "up_proj"), train_modules=("norm", "post_attention_layernorm", "k_proj")),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("golden")
    return {name: write_config(folder / name, name, initializer_range=0.2) for name in GOLDEN}


@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("name", ["llama-biases-v5", "llama-tied-linear", "mistral", "qwen2", "qwen3", "gemma3_text-cap-v5"])
def test_a_model_is_the_same_one_fused(folders, name, adapters):
    row = rows(Arch.from_folder(folders[name]))
    lora = ADAPTERS[adapters]
    if lora and lora.train_modules:
        lora = LoraConfig(rank=2, targets=lora.targets, train_modules=("norm", "post_attention_layernorm"))
    want = results(make(folders[name], SEPARATE, lora, torch.float64), row)
    found = results(make(folders[name], KernelsConfig(blocks="fused"), lora, torch.float64), row)
    agree(found, want, 1e-12)


@needs_triton
@pytest.mark.parametrize("adapters", ["full", "all"])
@pytest.mark.parametrize("name", ["llama-biases-v5", "qwen3", "gemma3_text-cap-v5"])
def test_a_model_is_the_same_one_with_all_kernels(folders, name, adapters):
    row = short(folders[name])
    want = results(make(folders[name], SEPARATE, ADAPTERS[adapters]), row)
    agree(results(make(folders[name], TRITON, ADAPTERS[adapters]), row), want)


@needs_triton
def test_separate_blocks_with_kernels(folders):
    row = short(folders["qwen3"])
    kernels = KernelsConfig(blocks="separate", norm="triton", rope="triton", glu="triton")
    want = results(make(folders["qwen3"], SEPARATE, None), row)
    agree(results(make(folders["qwen3"], kernels, None), row), want)


@needs_triton
def test_dropout_has_the_same_masks_in_torch_and_triton(folders):
    row, lora = short(folders["qwen2"]), LoraConfig(rank=4, dropout=0.4)
    want = results(make(folders["qwen2"], KernelsConfig(blocks="fused"), lora), row)
    agree(results(make(folders["qwen2"], TRITON, lora), row), want)
    without = results(make(folders["qwen2"], TRITON, LoraConfig(rank=4)), row)
    assert (without["logp"] - want["logp"]).norm() > 0.01 * want["logp"].norm()  # the masks matter
    evaluated = make(folders["qwen2"], TRITON, lora).eval()
    close([evaluated(there(row)).detach()], [without["logp"]])


def test_gradients_with_dropout_are_those_of_one_function(folders):
    """The masks are fixed by the seed, so finite differences see them too."""
    row = there(rows(Arch.from_folder(folders["llama-tied-linear"])))
    net = make(folders["llama-tied-linear"], KernelsConfig(blocks="fused"), LoraConfig(rank=2, dropout=0.5), torch.float64)

    def value() -> torch.Tensor:
        torch.manual_seed(9)
        return net(row).sum()

    value().backward()
    for name in ("self_attn.v_proj.lora_A", "self_attn.o_proj.lora_B", "mlp.up_proj.lora_A", "mlp.down_proj.lora_A"):
        p = net.model.layers[0].get_parameter(f"{name}.weight")
        direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(2), dtype=p.dtype).to(device())
        with torch.no_grad():
            ends = []
            for step in (1e-6, -2e-6):
                p.add_(direction, alpha=step)
                ends.append(value())
            p.add_(direction, alpha=1e-6)
        slope = (ends[0] - ends[1]) / 2e-6
        assert abs(slope) > 1e-3 and abs(slope - (p.grad * direction).sum()) < 1e-4 * abs(slope), name


# -- what it costs: these need no GPU --------------------------------------------------------------------------------------

SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
LLAMA_8B = SHAPE | {"vocab_size": 512, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
SLOTS = 256
NOTHING = {torch.ops.aten.detach.default, torch.ops.aten.empty.memory_format, torch.ops.prim.device.default}
OPERATORS = 115
LORA_16 = LoraConfig(rank=16)


def cost(tmp_path: Path, blocks: str, layers: int, lora: LoraConfig | None, kernels: str = "torch") -> dict[str, int]:
    """Of a step of so many layers of an 8B Llama on fake tensors: bytes kept for the backward, parameters aside; operators that do
    something, which views and detached copies do not; FLOPs."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers, **LLAMA_8B}
    (tmp_path / "config.json").write_text(json.dumps(config))
    net = build(Arch.from_folder(tmp_path))
    if lora:
        apply_lora(net, lora)
    apply_trainable(net, lora, torch.bfloat16, torch.float32)
    install(net, KernelsConfig("varlen", blocks, kernels, kernels, kernels), "cpu", torch.bfloat16)
    net.compute_dtype = torch.bfloat16
    kept = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage()._cdata] = t
        return t

    with FakeTensorMode(allow_non_fake_inputs=True):
        net.to_empty(device="cpu")
        net.reset_buffers("cpu")
        slots = torch.arange(SLOTS)
        row = Row(slots, slots.int(), torch.tensor([0, SLOTS], dtype=torch.int32), SLOTS, slots)
        with Watch() as watch, FlopCounterMode(display=False) as count:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                loss = net(row).sum()
            own = {p.untyped_storage()._cdata for p in net.parameters()}
            saved = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
            loss.backward()
    return {
        "bytes": saved,
        "operators": sum(n for op, n in watch.ran.items() if not op.is_view and op not in NOTHING),
        "flops": count.get_total_flops(),
    }


def of_a_layer(tmp_path: Path, blocks: str, lora: LoraConfig | None, kernels: str = "torch") -> dict[str, int]:
    one, two, three = (cost(tmp_path, blocks, layers, lora, kernels) for layers in (1, 2, 3))
    assert all(three[key] - two[key] == two[key] - one[key] > 0 for key in ("bytes", "operators"))
    return {key: three[key] - two[key] for key in one}


def test_bytes_a_block_keeps(tmp_path):
    """x, q, k, v, attention's result, h + a, gate and up are 94,208 bytes a slot in bf16; the rest is a number a row and head."""
    fused, separate = (of_a_layer(tmp_path, blocks, LORA_16)["bytes"] / SLOTS for blocks in ("fused", "separate"))
    bf16 = 2 * (3 * 4096 + (4096 + 2 * 1024) + 2 * 14336)
    low = 2 * 7 * 16
    statistics = 4 * (2 + 32)
    assert fused == bf16 + low + statistics <= 95_000
    assert separate == 149_864
    assert of_a_layer(tmp_path, "fused", None)["bytes"] / SLOTS == bf16 + statistics


@needs_triton
def test_operators_of_a_block(tmp_path, monkeypatch):
    """Both passes, with all kernels, none of which is launched here. Each operator is a launch on a GPU, most of them small: casts of an
    adapter's matrices and their gradients."""
    monkeypatch.setattr(launch, "unsupported", lambda *_: None)
    found = {blocks: of_a_layer(tmp_path, blocks, LORA_16, "triton")["operators"] for blocks in ("fused", "separate")}
    assert found["fused"] <= OPERATORS < found["separate"]


def test_operations_are_those_of_the_formula(tmp_path):
    """The formula of MFU, attention aside: nothing is computed twice."""
    for adapters in (None, LORA_16):
        counted = of_a_layer(tmp_path, "fused", adapters)["flops"]
        per_layer = []
        for layers in (1, 2):
            config = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": layers}
            (tmp_path / "config.json").write_text(json.dumps(config))
            net = build(Arch.from_folder(tmp_path))
            if adapters:
                apply_lora(net, adapters)
            apply_trainable(net, adapters, torch.bfloat16, torch.float32)
            per_layer.append(flops.per_token(net, 0.0))
        assert counted == SLOTS * (per_layer[1] - per_layer[0])
