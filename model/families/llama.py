"""Llama 1 to 3.x: pre-norm blocks, grouped-query attention, RoPE (llama3 scaling), SwiGLU; biases where the config says."""

from __future__ import annotations

from torch import Tensor, nn

from model.arch import Arch, Fields, layer_types, num_layers, read_common, read_rope, windowed
from model.attention import Attention, AttnContext
from model.ffn import FeedForward
from model.norm import NORMS

ARCHITECTURES = ("LlamaForCausalLM",)


def read(c: Fields) -> Arch:
    count = num_layers(c)
    types = layer_types(c, count) or ("full_attention",) * count
    bias = c.flag("attention_bias", False)
    return Arch(
        family="llama",
        layers=windowed(c, types, None),
        ropes=(read_rope(c),),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=c.flag("mlp_bias", False),
        **read_common(c),
    )


class Block(nn.Module):
    """h + attention(norm(h)), then h + ffn(norm(h))."""

    TP = {"input_layernorm": "gather", "post_attention_layernorm": "gather"}

    def __init__(self, arch: Arch, index: int):
        super().__init__()
        norm = NORMS[arch.norm]
        self.input_layernorm = norm(arch.hidden_size, arch.rms_norm_eps)
        self.self_attn = Attention(arch, index)
        self.post_attention_layernorm = norm(arch.hidden_size, arch.rms_norm_eps)
        self.mlp = FeedForward(arch)
        self.mlp.only_added = True

    def forward(self, h: Tensor, ctx: AttnContext) -> Tensor:
        h, out = self.mlp(h, self.self_attn(h, ctx, self.input_layernorm), self.post_attention_layernorm)
        return h + out


def rules(arch: Arch) -> tuple:
    return ()
