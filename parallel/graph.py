"""Forward and backward of a micro-batch as one CUDA graph: the host launches it at once, instead of some thousand kernels in turn.

    learn = micro_step(learn, trained, cfg.kernels.cuda_graph)
    loss = learn(batch, units)          # as before: adds to .grad, returns the loss

It pays where the device waits for the host: small models, short rows. Rows have one shape for a whole run (data/batch.py), so what is
recorded once fits all of them. What differs between micro-batches goes in by tensors that stay where they are: the batch, and the
number of units, which as a number would be part of the recording. Gradients are summed in tensors that stay, too; who sets `.grad` to
None between steps, as an optimizer's `zero_grad` does, finds the same tensor there again, zeroed. Random numbers are the ones of
a run without: a replay takes seed and offset of CUDA's generator as they are then. So are losses and gradients, to rounding: to divide by a
tensor is not quite to divide by a number.

The first micro-batches are computed as always, on a stream of their own: kernels are compiled then and libraries take their workspaces.
The first makes the gradients, the second adds to them, the third is recorded, then replayed. The recording holds its activations for as
long as the run lasts.

Rows without a target are computed with the others: their number differs, and with it the shape of what is left when they are taken out.

https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from data.batch import Batch
from parallel.config import Sections
from runtime.errors import ConfigError, UserError, clean

KEY = "kernels.cuda_graph"
FIELDS = ("tokens", "labels", "positions", "cu_seqlens")
Learn = Callable[[Batch, int | Tensor], Tensor]
Replay = Callable[[], None]


class GraphError(UserError):
    """A micro-batch cannot be recorded."""


def check(cfg: Sections, axes: dict[str, int]) -> None:
    """Is a micro-batch of this config nothing but kernels of one stream?

    Raises:
        ConfigError: no; with what to leave out.
    """
    if not cfg.kernels.cuda_graph:
        return
    ranks, again, moved = math.prod(axes.values()), cfg.recompute.kind, cfg.offload.activations
    if ranks > 1:
        raise ConfigError(f"is for one rank, and this run has {ranks}; leave it out", KEY, True)
    if again not in ("none", "mlp", "mlp_8bit"):
        raise ConfigError(f"does not work with recompute.kind={again!r}; use 'none', 'mlp' or 'mlp_8bit'", KEY, True)
    others = {
        "[compile]": cfg.compile is not None,
        f"tiling.mlp={cfg.tiling.mlp}": cfg.tiling.mlp > 0,
        f"offload.activations={moved!r}": moved != "none",
        "offload.parameters=true": cfg.offload.parameters,
        "offload.frozen=true": cfg.offload.frozen,
    }
    for name, there in others.items():
        if there:
            raise ConfigError(f"does not work with {name}; use one of the two", KEY, True)


def check_device(cfg: Sections, device: torch.device) -> None:
    """Raises:
    ConfigError: there is nothing here that records graphs.
    """
    if cfg.kernels.cuda_graph and device.type != "cuda":
        raise ConfigError(f"needs CUDA, and this run is on {device.type}; leave it out", KEY, True)


def apply(cfg: Sections) -> list[str]:
    """Lines for the start-up report; `micro_step` does it."""
    return ["cuda graph: forward and backward of a micro-batch, recorded at the third one"] if cfg.kernels.cuda_graph else []


def micro_step(learn: Learn, trained: Iterable[nn.Parameter], wanted: bool) -> Learn:
    """`learn`, or the same as a graph if that is `wanted`.

    learn: (batch on the device, units of loss of the whole step) -> the loss, a scalar without graph; adds to `.grad` of `trained`.
    """
    return Graphed(learn, trained, warm_up, record) if wanted else learn


class Graphed:
    """See the module docstring. warm_up: runs a function before anything is recorded; record: runs it for the record only and returns
    what replays it."""

    def __init__(
        self,
        learn: Learn,
        trained: Iterable[nn.Parameter],
        warm_up: Callable[[Callable[[], Tensor]], Tensor],
        record: Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]],
    ):
        self.learn, self.trained, self.warm_up, self.record = learn, list(trained), warm_up, record
        self.batch: Batch | None = None
        self.gradients: list[tuple[nn.Parameter, Tensor]] = []
        self.warm = False
        self.replay: Replay | None = None

    def __call__(self, batch: Batch, units: int) -> Tensor:
        """As `learn`. The loss is a tensor of its own."""
        if self.batch is None:
            first = {name: getattr(batch, name).clone() for name in FIELDS}
            there = replace(batch, **first, group={}, targets=None)
            self.units = torch.full((), float(units), device=batch.tokens.device)
            loss = self.warm_up(lambda: self.learn(there, self.units))
            self.batch, self.gradients = there, [(p, p.grad) for p in self.trained if p.grad is not None]
            return loss
        self._put(batch, units)
        self._bring_back_gradients()
        if not self.warm:
            loss, self.warm = self.warm_up(self._run), True
            return loss
        if self.replay is None:
            try:
                self.replay, self.loss = self.record(self._run)
            except torch.OutOfMemoryError:  # it is no reason to leave the graph out
                raise
            except RuntimeError as error:
                said = clean(str(error).partition("\n")[0])
                raise GraphError(f"{KEY}=true cannot record forward and backward; leave it out: {said}") from error
        self.replay()
        return self.loss.clone()

    def _run(self) -> Tensor:
        return self.learn(self.batch, self.units)

    def _put(self, batch: Batch, units: int) -> None:
        for name in FIELDS:
            there, new = getattr(self.batch, name), getattr(batch, name)
            assert there.shape == new.shape and batch.max_seqlen == self.batch.max_seqlen, f"{name}: rows have one shape for a run"
            there.copy_(new, non_blocking=True)
        self.units.fill_(units)

    def _bring_back_gradients(self) -> None:
        gone = [(p, grad) for p, grad in self.gradients if p.grad is not grad]
        if gone:
            torch._foreach_zero_([grad for _, grad in gone])
        for p, grad in gone:
            p.grad = grad


def warm_up(run: Callable[[], Tensor]) -> Tensor:
    """On another stream, as recording happens on one."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loss = run()
    torch.cuda.current_stream().wait_stream(side)
    return loss


def record(run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """Other threads (checkpoints, heartbeats) go on meanwhile: only this one's calls may disturb the recording."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        loss = run()
    return graph.replay, loss
