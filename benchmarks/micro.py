"""Single operations on one GPU: every implementation we have, torch.compile of the plain one, others' kernels, and the floor.

    python -m benchmarks.micro [--only NAME ...] [--deadline 525] [--out FILE.json]
    python -m benchmarks.micro --tiny --device cpu          # toy sizes: shows that the code runs

A cell is an operation at the sizes of an 8B llama, with T tokens. Times are the kernels' own, without launches: before each the device
sleeps for twice as long as the host takes to queue it, measured for each way and size, and what was queued too late nevertheless is
counted (benchmarks/measure.py) and marked in the table. Inputs rotate over sets that L2 does not hold. `of_floor` is the time in units of
the least there is: bytes that must move at the rate of a copy measured here, or operations at the rate of plain products measured here.
An operation is an entry in OPS; a test sees to it that each module of kernels/ with a table of implementations has one.

`lora` compares ways to compute a group of linears with low-rank adapters: the product's own (`Ours`, from kernels/lora.py), and candidates,
which are written out here, forward and backward, since they are no part of the product. A test holds each of them to autograd in fp64.

`optimizer` updates adapters of all linears of the model, with their moments, in fp32: ours in one launch, torch's fused and foreach AdamW.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from operator import methodcaller
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import runner
from benchmarks.cpu import ROOT
from benchmarks.gpu import copy_rate, gemm_rate, sides_device
from benchmarks.measure import free, kernel_seconds, rotating, spread, step_seconds, turns
from benchmarks.runner import Cell, Job, Unavailable
from benchmarks.sides import RANK, SHAPES, Shape, probe
from kernels import launch
from kernels import lora as adapters
from kernels.glu import glu, glu_ref
from kernels.linear_logprob import linear_logprob, linear_logprob_ref
from kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_ref
from kernels.rope import rope, rope_ref
from model.arch import Kind
from model.attention import AttnContext, Borders
from model.backends import BACKENDS
from optim.adamw import build
from optim.config import OptimConfig
from runtime.errors import ConfigError

EPS, DOCUMENT, DROPPED = 1e-5, 4096, 0.1
SIZES = (2048, 8192, 16384, 65536)  # T
Way = Callable[..., Tensor | tuple[Tensor, ...]]


class Floor(NamedTuple):
    """What cannot be avoided for one token: values read or written in either direction, and operations of products."""

    forward: float = 0.0
    backward: float = 0.0
    forward_flops: float = 0.0
    backward_flops: float = 0.0


class Op(NamedTuple):
    """module: in kernels/, whose IMPLS are the ways of `ours`; make: inputs for (shape, T, factory of random tensors), those that need
    a gradient first; needs: how many do, 0: only the forward is timed; ours, plain: on the inputs, `ours(..., impl=name)` where there are
    IMPLS; others: by name, (module to import, what calls it with the module and the inputs); floor: for (shape, T); more: ways by name;
    also: like `ours`, by what is added to its name."""

    module: str
    make: Callable[[Shape, int, Callable[..., Tensor]], tuple[Tensor, ...]]
    needs: int
    ours: Way
    plain: Way | None
    others: dict[str, tuple[str, Callable]]
    floor: Callable[[Shape, int], Floor]
    more: Callable[[Shape, int, torch.device], dict[str, Way]] = lambda shape, tokens, device: {}
    also: dict[str, Way] = {}


def labels(shape: Shape, tokens: int, random: Callable[..., Tensor]) -> Tensor:
    return torch.randint(0, shape.vocab, (tokens,), device=random(1).device)


def head_size(shape: Shape) -> int:
    return shape.hidden // shape.heads


def attend(backend: str, q: Tensor, k: Tensor, v: Tensor, ctx: AttnContext) -> Tensor:
    return BACKENDS[backend](q, k, v, ctx, Kind(), q.shape[-1] ** -0.5)


def backends(shape: Shape, tokens: int, device: torch.device) -> dict[str, Way]:
    """Every attention backend, on documents of DOCUMENT tokens or one that is shorter; sdpa, with its mask, for rows up to 8192."""
    count, longest = max(1, tokens // DOCUMENT), min(tokens, DOCUMENT)
    ctx = AttnContext(Borders(tokens, torch.arange(count + 1, device=device, dtype=torch.int32) * longest, longest), [])
    found = {f"ours {name}": partial(attend, name, ctx=ctx) for name in BACKENDS}
    if tokens > 8192:
        del found["ours sdpa"]
    for name, backend in BACKENDS.items():
        if f"ours {name}" in found:
            backend.prepare(ctx, Kind())
    return found


def add_rms_norm_ref(x: Tensor, add: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x + add, rms_norm_ref(x + add, weight, EPS)


def liger_norm(ops: object, x: Tensor, weight: Tensor) -> Tensor:
    return ops.LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)


def liger_loss(ops: object, h: Tensor, weight: Tensor, label: Tensor) -> Tensor:
    found = ops.LigerFusedLinearCrossEntropyFunction.apply(h, weight, label)
    return found[0] if isinstance(found, tuple) else found


def loss(h: Tensor, w: Tensor, label: Tensor, **how) -> Tensor:
    return -linear_logprob(h, w, label, **how).sum()


def loss_ref(h: Tensor, w: Tensor, label: Tensor) -> Tensor:
    return -linear_logprob_ref(h, w, label).sum()


LOSSES = {
    "liger": ("liger_kernel.ops.fused_linear_cross_entropy", liger_loss),
    # its filter would skip nearly all of the backward of random weights
    "cce": ("cut_cross_entropy", lambda ops, h, w, label: ops.linear_cross_entropy(h, w, label, filter_eps=None)),
}


def head(shape: Shape, tokens: int, random: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    return random(tokens, shape.hidden), 0.02 * random(shape.vocab, shape.hidden), labels(shape, tokens, random)


OPS = {
    "rms_norm": Op(
        "rms_norm",
        lambda s, t, random: (random(t, s.hidden), random(s.hidden)),
        1,
        lambda x, w, impl="torch": rms_norm(x, w, EPS, False, impl),
        lambda x, w: rms_norm_ref(x, w, EPS),
        {"liger": ("liger_kernel.ops.rms_norm", liger_norm)},
        lambda s, t: Floor(2 * s.hidden, 3 * s.hidden),
    ),
    "add_rms_norm": Op(
        "rms_norm",
        lambda s, t, random: (random(t, s.hidden), random(t, s.hidden), random(s.hidden)),
        2,
        lambda x, add, w, impl="torch": add_rms_norm(x, add, w, EPS, False, impl),
        add_rms_norm_ref,
        {},
        lambda s, t: Floor(4 * s.hidden, 4 * s.hidden),
    ),
    "rope": Op(
        "rope",
        lambda s, t, random: (
            random(t, s.heads, head_size(s)),
            random(t, s.kv_heads, head_size(s)),
            random(t, 1, head_size(s)),
            random(t, 1, head_size(s)),
        ),
        2,
        rope,
        rope_ref,
        {},
        lambda s, t: Floor(2 * (s.heads + s.kv_heads) * head_size(s), 2 * (s.heads + s.kv_heads) * head_size(s)),
    ),
    "glu": Op(
        "glu",
        lambda s, t, random: (random(t, s.intermediate), random(t, s.intermediate)),
        2,
        lambda gate, up, **impl: glu(gate, up, "silu", **impl),
        lambda gate, up: glu_ref(gate, up, "silu"),
        {"liger": ("liger_kernel.ops.swiglu", lambda ops, gate, up: ops.LigerSiLUMulFunction.apply(gate, up))},
        lambda s, t: Floor(3 * s.intermediate, 5 * s.intermediate),
    ),
    "dropout": Op(
        "lora",
        lambda s, t, random: (random(t, s.hidden), torch.randint(2**62, (), device=random(1).device)),
        0,  # the backward is the same on gradients
        lambda x, seed, impl="torch": adapters.dropout(x, seed, DROPPED, impl=impl),
        lambda x, seed: adapters.dropout(x, seed, DROPPED),
        {"torch's": ("torch.nn.functional", lambda ops, x, seed: ops.dropout(x, DROPPED))},  # another mask
        lambda s, t: Floor(2 * s.hidden),
    ),
    "linear_logprob": Op(
        "linear_logprob",
        head,
        1,
        loss,
        loss_ref,
        LOSSES,
        lambda s, t: Floor(forward_flops=4 * s.hidden * s.vocab, backward=2 * s.hidden),
    ),
    "linear_logprob_trained": Op(
        "linear_logprob",
        head,
        2,
        loss,
        loss_ref,
        LOSSES,
        # where `summed` makes the head's gradient in the forward, `both` is what can be compared
        lambda s, t: Floor(forward_flops=4 * s.hidden * s.vocab, backward_flops=2 * s.hidden * s.vocab),
        also={", summed": partial(loss, summed=True)},
    ),
    "attention": Op(
        "attention",
        lambda s, t, random: (random(t, s.heads, head_size(s)), random(t, s.kv_heads, head_size(s)), random(t, s.kv_heads, head_size(s))),
        3,
        None,
        None,
        {},
        lambda s, t: Floor(forward_flops=2 * s.hidden * min(t, DOCUMENT), backward_flops=4 * s.hidden * min(t, DOCUMENT)),
        backends,
    ),
}


def tabled() -> set[str]:
    """Modules of kernels/ that have a table of implementations."""
    names = (path.stem for path in (ROOT / "kernels").glob("[!_]*.py"))
    return {name for name in names if hasattr(importlib.import_module(f"kernels.{name}"), "IMPLS")}


def ways(op: Op, shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Way], list[str]]:
    """Every way to compute `op` here, by name, and why others are missing."""
    found, missing = op.more(shape, tokens, device), []
    impls = importlib.import_module(f"kernels.{op.module}").IMPLS if op.module in tabled() else None
    if op.ours is not None and impls is None:
        found["ours"] = op.ours
    for name in impls or () if op.ours is not None else ():
        why = launch.unsupported(device, dtype) if name == "triton" else None
        if why is None:
            found |= {f"ours {name}{more}": partial(call, impl=name) for more, call in {"": op.ours, **op.also}.items()}
        else:
            missing.append(f"ours {name}: {why}")
    if op.plain is not None:
        torch.compiler.reset()  # each shape is compiled for itself
        found["plain torch"] = op.plain
        found["torch.compile"] = torch.compile(op.plain, dynamic=False, backend="inductor" if device.type == "cuda" else "aot_eager")
    for name, (module, call) in op.others.items():  # at the end: some write into their inputs
        try:
            found[name] = partial(call, probe(module))
        except Unavailable as error:
            missing.append(f"{name}: {error}")
    return found, missing


def measured(name: str, job: Job) -> dict:
    """All ways, forward and backward, at each T."""
    device, op = sides_device(job), OPS[name]
    shape, dtype = SHAPES["tiny" if job.tiny else "8b"], torch.float32 if job.tiny else torch.bfloat16
    copies = copy_rate(device, 1 << 20 if job.tiny else 1 << 30, job)["bytes_per_s"]
    side = 64 if job.tiny else 8192
    products = gemm_rate(side, side, side, dtype, device, job)["flops_per_s"]
    rows, missing = [], []
    for tokens in (32,) if job.tiny else SIZES:
        free(device)
        found, missing = ways(op, shape, tokens, device, dtype)
        floor = op.floor(shape, tokens)
        least = {
            "forward": tokens * max(floor.forward * dtype.itemsize / copies, floor.forward_flops / products),
            "backward": tokens * max(floor.backward * dtype.itemsize / copies, floor.backward_flops / products),
        }
        least["both"] = sum(least.values())

        def random(*size: int) -> Tensor:
            return torch.randn(size, device=device, dtype=dtype)

        def inputs(_: int, tokens: int = tokens) -> tuple[Tensor, ...]:
            made = op.make(shape, tokens, random)
            return tuple(x.requires_grad_(i < op.needs) for i, x in enumerate(made))

        sets = turns(inputs, sum(x.numel() * x.itemsize for x in inputs(0)[: max(1, op.needs)]), device)
        for way, call in found.items():
            if job.late():
                rows.append({"way": way, "half": "forward", "tokens": tokens, "unavailable": "no time left"})
                continue
            try:
                halves = apart(call, sets, op.needs, device, job)
            except (RuntimeError, TypeError, AttributeError) as error:  # too large, or another version of others' code
                halves = {}
                reason = (
                    "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {error}".splitlines()[0]
                )
                rows.append({"way": way, "half": "forward", "tokens": tokens, "unavailable": reason})
            for half, seconds in halves.items():
                of_floor = seconds["median"] / least[half] if least[half] else None
                rows.append({"way": way, "half": half, "tokens": tokens, "seconds": seconds, "of_floor": of_floor})
        del sets
    return {"copy_bytes_per_s": copies, "gemm_flops_per_s": products, "rows": rows, "missing": missing}


def apart(call: Way, sets: list[tuple[Tensor, ...]], needs: int, device: torch.device, job: Job) -> dict[str, dict]:
    """Seconds of the forward and the backward of `call`. What it saves for the backward counts for the forward. `both` is their sum,
    which is what can be compared where gradients are made in the forward."""
    forward = kernel_seconds(rotating(sets), lambda given: call(*given), device, job.kernels)
    if not needs:
        return {"forward": forward}
    upstream = [torch.randn_like(y) for y in together(call(*sets[0]))]

    def graph(i: int) -> tuple:
        given = sets[i % len(sets)]
        return together(call(*given)), given[:needs]

    def back(given: tuple) -> None:
        torch.autograd.grad(given[0], given[1], upstream)

    backward = kernel_seconds(graph, back, device, job.kernels)
    return {"forward": forward, "backward": backward, "both": {key: forward[key] + backward[key] for key in forward}}


def together(y: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)


# -- a group of linears with adapters ----------------------------------------------------------------------------------------


class Group(NamedTuple):
    """Linears that read one input, y_i = W_i x + s B_i A_i x. w: [N, K], the W_i one under the other; a: [G, r, K]; b: of each linear
    [N_i, r]; s: the scale."""

    w: Tensor
    a: Tensor
    b: tuple[Tensor, ...]
    s: float

    def spans(self) -> list[slice]:
        """The columns of y that are linear i's."""
        return [slice(begin, end) for begin, end in pairwise(accumulate((b.shape[0] for b in self.b), initial=0))]


Gradients = tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]  # dx [T, K], da [G, r, K], db


class Base:
    """The products without adapters, and the gradient of x alone: what the others are measured by."""

    parts = ("forward", "backward")  # what is timed

    def __init__(self, group: Group, x: Tensor, dy: Tensor):
        self.group, self.x, self.dy = group, x, dy

    def forward(self) -> Tensor | list[Tensor]:
        return self.x @ self.group.w.T

    def backward(self) -> Tensor | Gradients:
        return self.dy @ self.group.w


class Ours(Base):
    """kernels/lora.py, as regions of a block call it: an output and a gradient for each linear, adapters in at least fp32."""

    def __init__(self, group: Group, x: Tensor, dy: Tensor):
        super().__init__(group, x, dy)
        wide = launch.wide_dtype(x.dtype)
        tensors = zip(group.spans(), group.a, group.b)
        self.linears = [adapters.Part(group.w[span], None, a.to(wide), b.to(wide)) for span, a, b in tensors]
        self.kinds = [adapters.Kind(group.s)] * len(group.b)
        self.grads = [dy[:, span].contiguous() for span in group.spans()]

    def forward(self) -> list[Tensor]:
        y, self.low = adapters.linears(self.x, self.linears, self.kinds, None, "torch")
        return y

    def backward(self) -> Gradients:
        needs = [adapters.Needs(False, False, True, True)] * len(self.kinds)
        dx, slopes = adapters.inputs_gradient(self.grads, self.linears, self.kinds, needs, None, True, "torch")
        found = adapters.weights_gradients(self.grads, self.x, self.low, slopes, self.linears, self.kinds, needs, None, "torch")
        return dx, [part.a for part in found], [part.b for part in found]


class Split(Base):
    """Base products, then low-rank ones that add in place: y and dx are read and written once more for each linear."""

    def forward(self) -> Tensor:
        g, rank = self.group, self.group.a.shape[1]
        y = self.x @ g.w.T
        self.down = self.x @ g.a.flatten(0, 1).T  # [T, G r], kept for the backward
        for i, (span, b) in enumerate(zip(g.spans(), g.b)):
            y[:, span].addmm_(self.down[:, i * rank : (i + 1) * rank], b.T, alpha=g.s)
        return y

    def backward(self) -> Gradients:
        g, rank = self.group, self.group.a.shape[1]
        parts = [self.dy[:, span] for span in g.spans()]
        slope = torch.cat([dy @ b for dy, b in zip(parts, g.b)], 1)  # [T, G r]
        dx = (self.dy @ g.w).addmm_(slope, g.a.flatten(0, 1), alpha=g.s)
        da = torch.mm(slope.T, self.x).mul_(g.s).view_as(g.a)
        return dx, da, tuple((dy.T @ self.down[:, i * rank : (i + 1) * rank]).mul_(g.s) for i, dy in enumerate(parts))


class Augmented(Base):
    """One product for base and adapters, with R more columns, G r rounded up to 64 (layout needs of tensor cores):

        P = [[W | B_1 .. B_G on the diagonal], [A | 0]]   [N+R, K+R]     X' = [x | s x A^T]   [T, K+R]     dY' = [dy | s dy B]   [T, N+R]
        y = X' P[:N]^T,   dx = dY' P[:, :K],   dA = (s dy B)^T x,   dB_i = dy_i^T (s x A_i^T)

    x and dy lie in X' and dY' from the start, as producers that take strides can put them. P is packed once a step (`pack`).
    """

    parts = ("forward", "backward", "pack")

    def __init__(self, group: Group, x: Tensor, dy: Tensor):
        super().__init__(group, x, dy)
        (n, k), more = group.w.shape, -(-group.a.shape[0] * group.a.shape[1] // 64) * 64
        self.p, self.wide, self.back = x.new_zeros(n + more, k + more), x.new_zeros(len(x), k + more), x.new_zeros(len(x), n + more)
        self.p[:n, :k] = group.w
        self.wide[:, :k], self.back[:, :n] = x, dy
        self.pack()

    def pack(self) -> None:
        (n, k), rank = self.group.w.shape, self.group.a.shape[1]
        self.p[n : n + self.group.a.shape[0] * rank, :k] = self.group.a.flatten(0, 1)
        for i, (span, b) in enumerate(zip(self.group.spans(), self.group.b)):
            self.p[span, k + i * rank : k + (i + 1) * rank] = b

    def forward(self) -> Tensor:
        (n, k), s = self.group.w.shape, self.group.s
        x, low = self.wide[:, :k], self.wide[:, k:]
        torch.addmm(low, x, self.p[n:, :k].T, beta=0, alpha=s, out=low)
        return self.wide @ self.p[:n].T

    def backward(self) -> Gradients:
        (n, k), (count, rank, _), s = self.group.w.shape, self.group.a.shape, self.group.s
        dy, slope = self.back[:, :n], self.back[:, n:]
        torch.addmm(slope, dy, self.p[:n, k:], beta=0, alpha=s, out=slope)
        dx = self.back @ self.p[:, :k]
        da = (slope[:, : count * rank].T @ self.wide[:, :k]).view_as(self.group.a)
        low = self.wide[:, k:]
        return dx, da, tuple(dy[:, span].T @ low[:, i * rank : (i + 1) * rank] for i, span in enumerate(self.group.spans()))


class AugmentedCopying(Augmented):
    """The same where producers cannot: x and dy are copied in."""

    parts = ("forward", "backward")

    def forward(self) -> Tensor:
        self.wide[:, : self.x.shape[1]] = self.x
        return super().forward()

    def backward(self) -> Gradients:
        self.back[:, : self.dy.shape[1]] = self.dy
        return super().backward()


class Merged(Base):
    """W + s B A, then plain products. The backward makes the sum again instead of keeping it, and needs x A^T, which the forward does
    not. `merge` goes over the weights twice, as torch's addmm copies before it adds; a kernel could do with once."""

    parts = ("forward", "backward", "merge")

    def __init__(self, group: Group, x: Tensor, dy: Tensor):
        super().__init__(group, x, dy)
        self.sum = torch.empty_like(group.w)

    def merge(self) -> Tensor:
        for span, a, b in zip(self.group.spans(), self.group.a, self.group.b):
            torch.addmm(self.group.w[span], b, a, alpha=self.group.s, out=self.sum[span])
        return self.sum

    def forward(self) -> Tensor:
        return self.x @ self.merge().T

    def backward(self) -> Gradients:
        g = self.group
        dx = self.dy @ self.merge()
        parts = [self.dy[:, span] for span in g.spans()]
        da = torch.stack([(dy @ b).T @ self.x for dy, b in zip(parts, g.b)]).mul_(g.s)
        return dx, da, tuple((dy.T @ (self.x @ a.T)).mul_(g.s) for dy, a in zip(parts, g.a))


CANDIDATES = {
    "plain gemm": Base,
    "ours": Ours,
    "split": Split,
    "augmented": Augmented,
    "augmented, copying": AugmentedCopying,
    "merged": Merged,
}


def groups(shape: Shape) -> dict[str, tuple[int, tuple[int, ...]]]:
    """(in, outs) of a layer's groups of linears that read one input."""
    kv = shape.kv_heads * head_size(shape)
    return {
        "qkv": (shape.hidden, (shape.hidden, kv, kv)),
        "o": (shape.hidden, (shape.hidden,)),
        "gate_up": (shape.hidden, (shape.intermediate, shape.intermediate)),
        "down": (shape.intermediate, (shape.hidden,)),
    }


def group_of(k: int, outs: tuple[int, ...], rank: int, device: torch.device, dtype: torch.dtype) -> Group:
    """Random and at scales where both paths count."""

    def random(*size: int, by: float) -> Tensor:
        return (torch.randn(size, device=device) * by).to(dtype)

    b = tuple(random(n, rank, by=0.02) for n in outs)
    return Group(random(sum(outs), k, by=0.02), random(len(outs), rank, k, by=k**-0.5), b, 2.0)


def lora(name: str, job: Job) -> dict:
    """Every candidate on one group of linears; the floor is the plain product."""
    device, dtype = sides_device(job), torch.float32 if job.tiny else torch.bfloat16
    k, outs = groups(SHAPES["tiny" if job.tiny else "8b"])[name]
    rows = []
    for tokens in (32,) if job.tiny else (2048, 8192, 16384):

        def inputs(tokens: int = tokens) -> tuple[Group, Tensor, Tensor]:
            x, dy = (torch.randn(tokens, n, device=device, dtype=dtype) for n in (k, sum(outs)))
            return group_of(k, outs, RANK, device, dtype), x, dy

        plain = {}
        for way, candidate in CANDIDATES.items():
            free(device)
            for half, took in timed(candidate, inputs, (tokens + sum(outs)) * k * dtype.itemsize, device, job).items():
                plain.setdefault(half, took["median"])
                of_floor = took["median"] / plain[half] if half in Base.parts else None
                rows.append({"way": way, "half": half, "tokens": tokens, "seconds": took, "of_floor": of_floor})
    return {"rows": rows, "missing": []}


def timed(candidate: type[Base], inputs: Callable[[], tuple], size: int, device: torch.device, job: Job) -> dict[str, dict]:
    """Seconds of each part of a candidate; size: bytes of its inputs."""
    sets = turns(lambda _: candidate(*inputs()), size, device)
    for one in sets:  # the backward reads what the forward kept
        one.forward()
    return {part: kernel_seconds(rotating(sets), methodcaller(part), device, job.kernels) for part in candidate.parts}


# -- the optimizer -----------------------------------------------------------------------------------------------------------


def optimizers(tensors: list[Tensor]) -> tuple[dict[str, Callable[[], torch.optim.Optimizer]], list[str]]:
    """What makes each optimizer over these parameters, and why ours is missing."""
    named = [(str(i), p) for i, p in enumerate(tensors)]
    found, missing = {"torch fused": {"fused": True}, "torch foreach": {"foreach": True}}, []
    found = {name: partial(torch.optim.AdamW, tensors, lr=1e-4, weight_decay=0.0, **how) for name, how in found.items()}
    try:
        build(named, OptimConfig(lr=1e-4, impl="triton"))
    except ConfigError as error:
        missing.append(f"ours triton: {error}")
        return found, missing
    return {"ours triton": partial(build, named, OptimConfig(lr=1e-4, impl="triton"))} | found, missing


def scaled(opt: torch.optim.Optimizer, grads: list[Tensor], factor: Tensor) -> None:
    """A step with gradients times `factor`, [] fp32: ours scales as it reads them, for torch's they are scaled before."""
    if "grad_scale" in opt.defaults:
        for group in opt.param_groups:
            group["grad_scale"] = factor
    else:
        torch._foreach_mul_(grads, factor)
    opt.step()


def optimizer(job: Job) -> dict:
    """Steps alone and with clipping's factor, without launches and with them: small tensors by the hundred are done before the host has
    launched for the next ones. The floor is 28 bytes a parameter: four fp32 numbers read, three written."""
    device, shape = sides_device(job), SHAPES["tiny" if job.tiny else "8b"]
    linears = [(k, n) for k, outs in groups(shape).values() for n in outs]
    sizes = [size for k, n in linears for size in ((RANK, k), (n, RANK))] * shape.layers
    tensors = [torch.randn(size, device=device).requires_grad_() for size in sizes]
    grads = [torch.randn_like(p) for p in tensors]
    count, factor = sum(p.numel() for p in tensors), torch.ones((), device=device)
    copies = copy_rate(device, 1 << 20 if job.tiny else 1 << 30, job)["bytes_per_s"]
    makers, missing = optimizers(tensors)
    rows = []
    for way, make in makers.items():
        free(device)
        opt = make()
        for p, grad in zip(tensors, grads):
            p.grad = grad
        took = {
            "step": kernel_seconds(lambda i, opt=opt: opt, lambda opt: opt.step(), device, job.kernels),
            "scaled step": kernel_seconds(lambda i, opt=opt: opt, lambda opt: scaled(opt, grads, factor), device, job.kernels),
            "scaled step, with launches": spread(step_seconds(lambda opt=opt: scaled(opt, grads, factor), device, job.kernels)),
        }
        for half, seconds in took.items():
            of_floor = seconds["median"] * copies / (28 * count)
            rows.append({"way": way, "half": half, "tokens": count, "seconds": seconds, "of_floor": of_floor})
    return {"copy_bytes_per_s": copies, "axis": "parameters", "rows": rows, "missing": missing}


HEADS = ("linear_logprob", "linear_logprob_trained")
CELLS = {name: Cell(75 if name in HEADS else 40, partial(measured, name)) for name in OPS}
CELLS |= {f"lora_{name}": Cell(25, partial(lora, name)) for name in groups(SHAPES["8b"])}
CELLS["optimizer"] = Cell(15, optimizer)


def main(argv: list[str]) -> int:
    return runner.main("micro", __doc__.splitlines()[0], CELLS, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
