"""What trains side by side in benchmarks/gpu.py: ours through the product's own path, and transformers + peft with what makes it fast.

Both sides get the same of everything: shapes, weights and adapters by name and seed (drawn in fp32 on the device; LoRA's B is not
zero, since products with zeros are cheap), tokens, AdamW at 1e-4, clipping at 1, one read of the gradients' norm a step. Models are
built on meta and filled on the device: no files, no hub.

`reference` is the same model in plain torch, document by document, in fp32. Before a side is timed, a model of it with two layers must
agree with that (`gate`).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cpu import log_normal
from benchmarks.runner import Unavailable
from data.batch import IGNORE, Batch
from model import build, flops
from model.arch import Arch
from model.safetensors_io import allocate
from model.transforms.lora import apply_lora
from model.transforms.trainable import apply_trainable
from objective import lm
from optim.adamw import build as build_optimizer
from optim.clip import clip
from parallel import offload
from parallel.apply import check
from parallel.fsdp import last_backward
from parallel.graph import micro_step
from parallel.mesh import Mesh
from parallel.start import Launch
from runtime.config import load
from runtime.guard import upstream
from train import RunConfig, assemble

RANK, ALPHA, LR, MAX_NORM = 16, 32, 1e-4, 1.0
RECORDED = 3  # number of the micro-batch at which a CUDA graph is recorded, and from which on it is replayed (parallel/graph.py)
# Relative errors against the fp32 reference of (loss, gradients), by the device type, which decides the compute dtype. bf16 rounds
# gradients of wide models by more than a hundredth, whoever computes them: there the gate asks what plain torch loses.
BOUNDS = {"cpu": (1e-5, 1e-4), "cuda": (2e-3, 1e-2)}


@dataclass(frozen=True)
class Shape:
    """Of a llama without biases."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False
    theta: float = 500000.0

    def config(self) -> dict:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.theta,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
        }


SHAPES = {
    "8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "3b": Shape(3072, 8192, 28, 24, 8, 128256, tied=True),
    "1.7b": Shape(2048, 8192, 24, 32, 32, 49152, tied=True, theta=130000.0),
    "135m": Shape(576, 1536, 30, 9, 3, 49152, tied=True, theta=100000.0),
    "tiny": Shape(64, 96, 3, 4, 2, 259),
}


@dataclass(frozen=True)
class Work:
    """What a step trains on: `rows` documents' rows of `row` tokens; `mean`: of documents in a row, 0: each row is one."""

    shape: Shape
    row: int
    rows: int
    mean: int = 0
    lora: bool = True

    def lengths(self) -> list[list[int]]:
        """Of the documents of each row. They fill it."""
        if not self.mean:
            return [[self.row]] * self.rows
        found = []
        for number in range(self.rows):
            borders = log_normal(8 * self.row // self.mean, self.mean, 0.6, self.row, seed=number).cumsum()
            inside = [0, *borders[borders < self.row - 1].tolist(), self.row]
            found.append([b - a for a, b in pairwise(inside)])
        return found

    @property
    def tokens(self) -> int:
        return self.row * self.rows

    @property
    def length(self) -> float:
        """The mean over tokens of the length of their document, which the cost of attention is proportional to."""
        squares = sum(n * n for row in self.lengths() for n in row)
        return squares / self.tokens

    def documents(self) -> list[list[Tensor]]:
        """Ids of the documents of each row, int64 on the CPU."""
        draws = torch.Generator().manual_seed(0)
        return [[torch.randint(3, self.shape.vocab, (n,), generator=draws) for n in row] for row in self.lengths()]


def flops_per_token(work: Work) -> float:
    """model/flops.py's count for this shape: the same number for every side."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        arch, cfg = settings(work, "cpu", "", Path(folder))
    net = build(arch)
    if cfg.lora:
        apply_lora(net, cfg.lora)
    apply_trainable(net, cfg.lora, torch.bfloat16)
    return flops.per_token(net, work.length)


# -- the same values on every side -----------------------------------------------------------------------------------------


def canonical(name: str) -> str:
    """Our name of a parameter, from peft's."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".").replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")


@torch.no_grad()
def fill(named: Iterable[tuple[str, Tensor]]) -> None:
    """Values by (canonical) name: norms near 1, A uniform in +-1/sqrt(in), all else, B too, normal(0, 0.02)."""
    for name, p in named:
        name = canonical(name)
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "little")
        draws = torch.Generator(p.device).manual_seed(seed)
        value = torch.empty(p.shape, dtype=torch.float32, device=p.device)
        if name.endswith("norm.weight"):
            value.normal_(1.0, 0.1, generator=draws)
        elif name.endswith("lora_A.weight"):
            value.uniform_(-(p.shape[1] ** -0.5), p.shape[1] ** -0.5, generator=draws)
        else:
            value.normal_(0.0, 0.02, generator=draws)
        p.copy_(value)


def reference(p: dict[str, Tensor], shape: Shape, documents: list[Tensor]) -> Tensor:
    """Sum of -log p(next token) over documents, in plain torch. p: parameters by canonical name; adapters count where there are any."""
    size = shape.hidden // shape.heads
    frequency = shape.theta ** -(torch.arange(0, size, 2, dtype=torch.float32, device=documents[0].device) / size)

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * p[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ p[f"{name}.weight"].T
        a = p.get(f"{name}.lora_A.weight")
        return y if a is None else y + (ALPHA / RANK) * (x @ a.T) @ p[f"{name}.lora_B.weight"].T

    def rotated(x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[0], device=x.device)[:, None, None] * frequency
        a, b = x.chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    def attention(x: Tensor, name: str) -> Tensor:
        q, k, v = (linear(x, f"{name}.{part}_proj").unflatten(-1, (-1, size)) for part in "qkv")
        k, v = (t.repeat_interleave(shape.heads // shape.kv_heads, 1) for t in (rotated(k), v))
        scores = torch.einsum("qnh,knh->nqk", rotated(q), k) * size**-0.5
        seen = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).tril()
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return linear(torch.einsum("nqk,knh->qnh", weights, v).flatten(1), f"{name}.o_proj")

    total = torch.zeros((), device=documents[0].device)
    for ids in documents:
        h = F.embedding(ids, p["model.embed_tokens.weight"])
        for layer in (f"model.layers.{i}" for i in range(shape.layers)):
            h = h + attention(norm(h, f"{layer}.input_layernorm"), f"{layer}.self_attn")
            x = norm(h, f"{layer}.post_attention_layernorm")
            h = h + linear(F.silu(linear(x, f"{layer}.mlp.gate_proj")) * linear(x, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
        logits = norm(h[:-1], "model.norm") @ p["model.embed_tokens.weight" if shape.tied else "lm_head.weight"].T
        total = total + F.cross_entropy(logits, ids[1:], reduction="sum")
    return total


def gate(make: Callable[[Work], Side], work: Work) -> dict[str, float]:
    """Relative errors of a side's loss and gradients (all of them as one vector) against the reference, with two layers; beside them
    those of the reference itself under autocast to bf16, twice which the gradients may have.

    Raises:
        AssertionError: they are above BOUNDS, or the reference is trivial.
    """
    work = replace(work, shape=replace(work.shape, layers=2))
    side = make(work)
    loss, found = side.gradients()
    values = {canonical(name): p.detach().float().requires_grad_(p.requires_grad) for name, p in side.net.named_parameters()}
    ids = [document.to(side.device) for row in work.documents() for document in row]

    def answer(narrow: bool) -> tuple[float, dict[str, Tensor]]:
        with torch.autocast(side.device.type, torch.bfloat16, enabled=narrow):
            total = reference(values, work.shape, ids) / side.units
        trained = {name: value for name, value in values.items() if value.requires_grad}
        return total.item(), dict(zip(trained, torch.autograd.grad(total, list(trained.values()))))

    (want, wanted), (_, rounded) = answer(False), answer(True)
    assert found.keys() == wanted.keys() and len(found) > 2, f"trained on one side only: {sorted(found.keys() ^ wanted.keys())[:4]}"
    size = sum(g.double().square().sum() for g in wanted.values()).sqrt().item()
    assert want > 1 and size > 1e-4, f"the reference is trivial: loss {want}, gradients {size}"

    def error(gradients: dict[str, Tensor]) -> float:
        return sum((gradients[name].double() - g).square().sum() for name, g in wanted.items()).sqrt().item() / size

    errors = {"loss": abs(loss / want - 1), "gradients": error(found), "gradients_of_plain_bf16": error(rounded)}
    bounds = dict(zip(("loss", "gradients"), BOUNDS[side.device.type]))
    if side.device.type == "cuda":
        bounds["gradients"] = max(bounds["gradients"], 2 * errors["gradients_of_plain_bf16"])
    for what, bound in bounds.items():  # written so that NaN fails
        assert errors[what] < bound, f"the {what}: {errors[what]:.1e} from the fp32 reference, more than {bound:.1e}; not timed"
    return errors


# -- ours ------------------------------------------------------------------------------------------------------------------


def settings(work: Work, device: str, words: str, folder: Path) -> tuple[Arch, RunConfig]:
    """The shape's facts and a run's config, from files in `folder` as a run reads them; `words` as on a command line."""
    (folder / "config.json").write_text(json.dumps(work.shape.config()), encoding="utf-8")
    (folder / "config.toml").write_text(
        f'[model]\npath = "{folder}"\ninit = "random"\n[output]\npath = "{folder}/run"\n[run]\ndevice = "{device}"\n'
        f'[data]\ntokens = {work.tokens}\nmax_length = {work.row}\n[[data.sources]]\npath = "{folder}/none.jsonl"\nformat = "tokenized"\n'
        f"[optim]\nlr = {LR}\nmax_norm = {MAX_NORM}\n" + (f"[lora]\nrank = {RANK}\nalpha = {ALPHA}\n" if work.lora else ""),
        encoding="utf-8",
    )
    return Arch.from_folder(folder), load(RunConfig, folder / "config.toml", words.split())


@contextmanager
def one_rank(device: str) -> Iterator[torch.device]:
    """The process group of a run on one device, and that device."""
    launch = Launch()
    found = launch.device(device)
    launch.connect(found)
    try:
        yield found
    finally:
        dist.destroy_process_group()


class Side(ABC):
    """A model with its optimizer and the micro-batches of a step.

    units: learned tokens of a step; words: what it says of itself; batches: the micro-batches.
    """

    net: nn.Module
    opt: torch.optim.Optimizer
    device: torch.device
    units: int
    words: list[str]
    batches: list

    @abstractmethod
    def cut(self, micro: int) -> None:
        """From now on micro-batches of so many rows."""

    @abstractmethod
    def loss(self, i: int) -> Tensor:
        """The share of micro-batch i in the step's loss, with its graph."""

    def back(self, loss: Tensor) -> None:
        """The backward pass of a micro-batch's loss."""
        loss.backward()

    def trained(self) -> dict[str, Tensor]:
        return {canonical(name): p for name, p in self.net.named_parameters() if p.requires_grad}

    @abstractmethod
    def step(self) -> float:
        """A whole step; the loss."""

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """The step's loss and gradients, without an update."""
        total = 0.0
        for i in range(len(self.batches)):
            loss = self.loss(i)
            self.back(loss)
            total += loss.item()
        return total, {name: p.grad for name, p in self.trained().items() if p.grad is not None}

    def clear(self) -> None:
        self.opt.zero_grad(set_to_none=True)


class Ours(Side):
    """As train.py: its config, `assemble`, the objective, the optimizer and the order of a step.

    micro: rows of one micro-batch, packed end to end; words: keys of the config on top.
    """

    def __init__(self, work: Work, device: torch.device, micro: int, words: str = ""):
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            arch, self.cfg = settings(replace(work, rows=micro), device.type, words, Path(folder))
        self.device, mesh = device, Mesh.build(self.cfg.parallel, device)
        check(self.cfg, mesh.axes, arch, self.cfg.lora)
        self.net, self.words = assemble(self.cfg, arch, mesh)
        allocate(self.net, device)
        self.net.reset_buffers(device)
        fill(self.net.named_parameters())
        self.opt = offload.optimizer(partial(build_optimizer, self.trained().items(), self.cfg.optim), self.cfg.offload, device)
        self.work = work
        self.cut(micro)
        self.units = sum(map(lm.count, self.batches))
        self.net.train()

    def cut(self, micro: int) -> None:
        rows = self.work.documents()
        parts = [[ids for row in rows[i : i + micro] for ids in row] for i in range(0, len(rows), micro)]
        self.batches = [pack(part, micro * self.work.row, self.work.row, max(map(len, parts))) for part in parts]
        self._learn = micro_step(self._forward_backward, self.trained().values(), self.cfg.kernels.cuda_graph)  # of rows of this size

    def _forward_backward(self, batch: Batch, units: int | Tensor) -> Tensor:
        loss = lm.loss(self.net, batch, units)
        self.back(loss)
        return loss.detach()

    def back(self, loss: Tensor) -> None:
        loss.backward(upstream(loss))

    def learn(self) -> Tensor:
        """Forward and backward of all micro-batches; the loss."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, batch in enumerate(self.batches):
            lm.seed_dropout(self.cfg.train.seed, i)
            last_backward(self.net, i == len(self.batches) - 1, self.cfg.parallel)
            total += self._learn(batch.to(self.device), self.units)
        return total

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        for _ in range(RECORDED - 1):  # a graph is to be compared, not what came before it
            self.learn()
        self.clear()
        total = self.learn().item()
        return total, {name: p.grad for name, p in self.trained().items() if p.grad is not None}

    def loss(self, i: int) -> Tensor:
        lm.seed_dropout(self.cfg.train.seed, i)
        last_backward(self.net, i == len(self.batches) - 1, self.cfg.parallel)
        return lm.loss(self.net, self.batches[i].to(self.device), self.units)

    def step(self) -> float:
        total = self.learn()
        clip(self.trained().values(), self.cfg.optim.max_norm, self.opt).item()
        self.opt.step()
        self.clear()
        return total.item()


def pack(documents: list[Tensor], slots: int, longest: int, most: int) -> Batch:
    """Documents end to end in one row of so many slots, which they fill; borders for `most` of them. All tokens are learned but the
    first one of each document."""
    tokens = torch.cat(documents)
    assert len(tokens) == slots, f"documents of {len(tokens)} tokens do not fill {slots} slots"
    labels = torch.cat([torch.cat([ids[1:], torch.tensor([IGNORE])]) for ids in documents])
    positions = torch.cat([torch.arange(len(ids), dtype=torch.int32) for ids in documents])
    borders = torch.full((most + 1,), slots, dtype=torch.int32)
    borders[: len(documents) + 1] = F.pad(torch.tensor([len(ids) for ids in documents]).cumsum(0), (1, 0))
    return Batch(tokens, labels, positions, borders, longest, 0, slots)


# -- theirs ----------------------------------------------------------------------------------------------------------------


def probe(module: str) -> object:
    """The module.

    Raises:
        Unavailable: with the reason.
    """
    import importlib
    import importlib.util

    if importlib.util.find_spec(module.split(".")[0]) is None:
        raise Unavailable(f"{module.split('.')[0]} is not installed")
    try:
        return importlib.import_module(module)
    except Exception as error:  # some of these look for a GPU, for other packages and for the network when they are imported
        raise Unavailable(
            f"{module} does not import: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error


class Theirs(Side):
    """transformers' llama and peft, sdpa attention, rows as a batch without padding.

    adapters: dtype of the adapters beside the bf16 base, fp32 (peft's default) or bf16; liger: with its kernels; kernels: module with
    LoRA kernels to put in (Unsloth's, Axolotl's); checkpoint: gradient checkpointing.
    """

    def __init__(
        self,
        work: Work,
        device: torch.device,
        micro: int,
        adapters: str = "fp32",
        liger: bool = False,
        kernels: str = "",
        checkpoint: bool = False,
    ):
        import transformers
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        assert not work.mean, "rows of several documents would need padding or another attention here"
        if liger:
            probe("liger_kernel.transformers").apply_liger_kernel_to_llama()
        module = probe(kernels) if kernels else None
        config = transformers.LlamaConfig(**work.shape.config(), use_cache=False, attn_implementation="sdpa")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with torch.device("meta"):
            net = transformers.LlamaForCausalLM(config).to(dtype)
        net.to_empty(device=device)
        net.tie_weights()
        net.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)  # its buffers are computed, not loaded
        if work.lora:
            import peft

            lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
            net = peft.get_peft_model(net, lora, autocast_adapter_dtype=adapters == "fp32")
        fill(net.named_parameters())
        if module is not None:
            put_in(net, module)
        if checkpoint:
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.net, self.device = net.train(), device
        self.words = [f"transformers {transformers.__version__}, adapters {adapters}, liger {liger}, kernels {kernels or 'none'}"]
        self.rows, self.units = torch.stack([row[0] for row in work.documents()]), work.rows * (work.row - 1)
        self.cut(micro)
        self.opt = torch.optim.AdamW(self.trained().values(), lr=LR, fused=True)

    def cut(self, micro: int) -> None:
        self.batches = list(self.rows.split(micro))

    def loss(self, i: int) -> Tensor:
        ids = self.batches[i].to(self.device, non_blocking=True)
        return self.net(input_ids=ids, labels=ids, num_items_in_batch=self.units).loss

    def step(self) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i in range(len(self.batches)):
            loss = self.loss(i)
            self.back(loss)
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.trained().values(), MAX_NORM).item()
        self.opt.step()
        self.clear()
        return total.item()


def put_in(net: nn.Module, kernels: object) -> None:
    """Replaces the forwards of transformers' llama by ones that call LoRA kernels. Unsloth's and Axolotl's have the same names and
    arguments, `apply_lora_qkv(attention, x)`, `apply_lora_o(attention, x)`, `apply_lora_mlp_swiglu(mlp, x)`."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    def attend(attention, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_) -> tuple[Tensor, None]:
        q, k, v = kernels.apply_lora_qkv(attention, hidden_states)
        q, k, v = (t.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for t in (q, k, v))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attention.scaling, enable_gqa=q.shape[1] != k.shape[1])
        return kernels.apply_lora_o(attention, out.transpose(1, 2).flatten(2)), None

    def feed(mlp, x: Tensor) -> Tensor:
        return kernels.apply_lora_mlp_swiglu(mlp, x)

    for module in net.modules():
        if type(module).__name__ == "LlamaAttention":
            module.forward = partial(attend, module)
        elif type(module).__name__.endswith(("LlamaMLP", "SwiGLUMLP")):  # the second is Liger's
            module.forward = partial(feed, module)
