"""torch.compile, one block at a time and in place: no wrapper modules, so names in the state dict stay what they are.

A block is one graph or an error (`fullgraph=True`): nothing falls back to eager in silence. Blocks of one kind share a graph, and
so do all packings, as lengths reach a block in tensors only; there is a graph for each kind of attention, one more for a first
block whose input needs no gradient (LoRA), and as many again for evaluation. More graphs than torch's limit per function are an
error, too.

What surrounds the blocks is not compiled. FSDP2's hooks stay outside, recomputation inside, where the partitioner carries it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

from parallel.config import Sections
from runtime.errors import ConfigError


class CompileError(RuntimeError):
    """A block does not compile as asked."""


def check(cfg: Sections, dropout: float) -> None:
    """Does this backend compute the rest of the config rightly? `dropout`: LoRA's.

    Raises:
        ConfigError: no; with what to use.
    """
    if cfg.compile is None or not dropout:
        return
    backend, again = cfg.compile.backend, cfg.recompute.kind
    # measured: the backward pass draws other masks than the forward did
    if (backend == "eager" and (again != "none" or cfg.tiling.mlp)) or (backend == "aot_eager" and again == "budget"):
        what = f"recompute.kind={again!r}" if again != "none" else f"tiling.mlp={cfg.tiling.mlp}"
        raise ConfigError(f"does not keep dropout masks with {what}; use 'inductor', or lora.dropout=0", "compile.backend", backend)


def apply(blocks: list[nn.Module], cfg: Sections) -> list[str]:
    """Compiles the forward of every block when it is first called. Returns lines for the start-up report."""
    if cfg.compile is None:
        return []
    backend, mode = cfg.compile.backend, cfg.compile.mode
    settings = partial(_settings, cfg.recompute.budget if cfg.recompute.kind == "budget" else None, cfg.tiling.mlp > 0)
    for i, block in enumerate(blocks):
        compiled = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend, mode=mode)
        block.forward = partial(_call, compiled, settings, f"model.layers.{i}", backend)
    kept = f", keeps {cfg.recompute.budget:g} of a block's activations" if cfg.recompute.kind == "budget" else ""
    return [f"compile: {len(blocks)} blocks, {backend}{kept}"]


def _call(compiled: Callable, settings: Callable[[], AbstractContextManager], name: str, backend: str, *args):
    """Runs a compiled forward; says which block it was that did not compile."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        with settings():
            return compiled(*args)
    except (FailOnRecompileLimitHit, TorchDynamoException) as error:
        raise CompileError(
            f"{name} does not compile with compile.backend={backend!r}; leave out [compile] to train without: {error}"
        ) from error


@contextmanager
def _settings(budget: float | None, tiled: bool) -> Iterator[None]:
    """torch's settings while a block may be compiled, which is when it is called: their defaults are left to others."""
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch

    with ExitStack() as stack:
        if budget is not None:
            stack.enter_context(functorch.patch(activation_memory_budget=budget))
        if tiled:  # parallel/tiling.py exchanges weights around a tile, and a recomputation can do without
            stack.enter_context(dynamo.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True))
        yield
