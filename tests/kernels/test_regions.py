"""Fused regions against the same modules one operation after the other, in a whole model; and what a block keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kernels import launch
from model import build, flops
from model.arch import Arch
from model.config import KernelsConfig, LoraConfig
from model.decoder import Decoder, Row
from model.transforms.lora import apply_lora
from model.transforms.ops import install
from model.transforms.trainable import apply_trainable
from model.weights import initialize
from tests.kernels.close import close, device
from tests.model.golden import GOLDEN, rows, write_config
from tests.parallel.watch import Watch

TRITON = KernelsConfig(blocks="fused", norm="triton", rope="triton", glu="triton", head="triton", dropout="triton")
SEPARATE = KernelsConfig(blocks="separate", norm="torch", rope="torch", glu="torch", dropout="torch")
needs_triton = pytest.mark.skipif(launch.triton is None, reason="triton is not installed")


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


def results(net: Decoder, row: Row) -> dict[str, torch.Tensor]:
    """Log-probs and every gradient, for any gradients from above."""
    torch.manual_seed(5)
    logp = net(Row(*(x.to(device()) if isinstance(x, torch.Tensor) else x for x in row)))
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
    close([evaluated(row).detach()], [without["logp"]])


def test_gradients_with_dropout_are_those_of_one_function(folders):
    """The masks are fixed by the seed, so finite differences see them too."""
    row = rows(Arch.from_folder(folders["llama-tied-linear"]))
    net = make(folders["llama-tied-linear"], KernelsConfig(blocks="fused"), LoraConfig(rank=2, dropout=0.5), torch.float64)

    def value() -> torch.Tensor:
        torch.manual_seed(9)
        return net(row).sum()

    value().backward()
    for name in ("self_attn.v_proj.lora_A", "self_attn.o_proj.lora_B", "mlp.up_proj.lora_A", "mlp.down_proj.lora_A"):
        p = net.model.layers[0].get_parameter(f"{name}.weight")
        direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(2), dtype=p.dtype)
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
    assert separate > 1.4 * fused
    assert of_a_layer(tmp_path, "fused", None)["bytes"] / SLOTS == bf16 + statistics


@needs_triton
def test_operators_of_a_block(tmp_path):
    """Both passes, with all kernels. Each is a launch on a GPU, most of them small: casts of an adapter's matrices and their gradients."""
    found = {blocks: of_a_layer(tmp_path, blocks, LORA_16, "triton")["operators"] for blocks in ("fused", "separate")}
    assert found["fused"] <= OPERATORS < found["separate"]


def test_operations_are_those_of_the_formula(tmp_path):
    """The formula of MFU, attention aside: nothing is computed twice."""
    for lora in (None, LORA_16):
        counted = of_a_layer(tmp_path, "fused", lora)["flops"]
        per_layer = []
        for layers in (1, 2):
            config = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": layers}
            (tmp_path / "config.json").write_text(json.dumps(config))
            net = build(Arch.from_folder(tmp_path))
            if lora:
                apply_lora(net, lora)
            apply_trainable(net, lora, torch.bfloat16, torch.float32)
            per_layer.append(flops.per_token(net, 0.0))
        assert counted == SLOTS * (per_layer[1] - per_layer[0])
