"""The gated feed-forward network: down( act(gate(x)) * up(x) ), SwiGLU or GeGLU by the activation (arXiv 2002.05202)."""

from __future__ import annotations

from torch import Tensor

from kernels.glu import glu
from model.arch import Arch
from model.linear import Linear, Slots


def gated(ffn: FeedForward, x: Tensor) -> Tensor:
    """The default `impl`: one operation after the other."""
    return ffn.down_proj(glu(ffn.gate_proj(x), ffn.up_proj(x), ffn.act))


class FeedForward(Slots):
    """Slot `impl`: a function `impl(ffn, x) -> [T, D]` over the parts of its Linears, where a fused one may go."""

    slots = ("impl",)
    TP = {"gate_proj": "col", "up_proj": "col", "down_proj": "row"}

    def __init__(self, arch: Arch):
        super().__init__()
        self.act = arch.hidden_act
        self.gate_proj = Linear(arch.hidden_size, arch.intermediate_size, arch.mlp_bias)
        self.up_proj = Linear(arch.hidden_size, arch.intermediate_size, arch.mlp_bias)
        self.down_proj = Linear(arch.intermediate_size, arch.hidden_size, arch.mlp_bias)
        self.impl = gated

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, D] -> [T, D]."""
        return self.impl(self, x)
