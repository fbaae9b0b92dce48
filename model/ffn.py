"""The gated feed-forward network: down( act(gate(x)) * up(x) ), SwiGLU or GeGLU by the activation (arXiv 2002.05202)."""

from __future__ import annotations

from torch import Tensor

from kernels.glu import glu
from kernels.regions import Ops
from model.arch import Arch
from model.linear import Linear, Slots
from model.norm import RMSNorm


def gated(ffn: FeedForward, x: Tensor) -> Tensor:
    """The network itself, one operation after the other."""
    return ffn.down_proj(glu(ffn.gate_proj(x), ffn.up_proj(x), ffn.act, ffn.ops.glu))


def separate(ffn: FeedForward, h: Tensor, add: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """The default `impl`."""
    h = h + add
    return h, gated(ffn, norm(h))


class FeedForward(Slots):
    """Slot `impl`: a function like `separate` over the parts of its Linears, where a fused one may go (model/transforms/ops.py).
    Slot `ops`: which implementation computes each operation."""

    slots = ("impl", "ops")
    keep = "all"  # of gate and up, for the backward of a fused network: kernels/regions.py KEEP
    only_added = False  # does nothing but the residual stream read the result? Recomputation may then leave it out
    TP = {"gate_proj": "col", "up_proj": "col", "down_proj": "row"}

    def __init__(self, arch: Arch):
        super().__init__()
        self.act = arch.hidden_act
        self.gate_proj = Linear(arch.hidden_size, arch.intermediate_size, arch.mlp_bias)
        self.up_proj = Linear(arch.hidden_size, arch.intermediate_size, arch.mlp_bias)
        self.down_proj = Linear(arch.intermediate_size, arch.hidden_size, arch.mlp_bias)
        self.impl, self.ops = separate, Ops()

    def forward(self, h: Tensor, add: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """h, add: [T, D] -> (h + add, the network's result for its norm). The norm before a half of a block belongs to what reads it,
        so that a fused half need not keep both."""
        return self.impl(self, h, add, norm)
