"""Model folders for tests of loading and export, and models in the states a run has them in."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model import build
from model.arch import Arch
from model.config import LoraConfig
from model.decoder import Decoder
from model.transforms.lora import apply_lora, is_adapter
from model.transforms.trainable import apply_trainable
from model.weights import NameMap, local, region
from parallel.apply import parallelize
from parallel.config import ParallelConfig
from parallel.mesh import Mesh
from tests.model.golden import fresh, write_config
from tests.tiny import Sections


def write_model(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """A golden case with weights, in one file, without transformers."""
    net = fresh(Arch.from_folder(write_config(folder, name, **changes)))
    names = NameMap.of(net)
    save_file({names.to_hf(n): p.detach().to(dtype) for n, p in net.named_parameters()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def theirs(folder: Path, name: str, dtype: torch.dtype):
    """A golden case made and saved by transformers, with weights of some size. Returns the model, the folder is written."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(write_config(folder, name))
    torch.manual_seed(0)
    model = getattr(transformers, config.architectures[0])._from_config(config, attn_implementation="eager", dtype=dtype).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
    model.save_pretrained(folder)
    return model


def prepared(folder: Path, lora: LoraConfig | None = None, compute: torch.dtype = torch.float32) -> Decoder:
    """The folder's decoder on meta, as a run prepares it before sharding."""
    net = build(Arch.from_folder(folder))
    if lora is not None:
        apply_lora(net, lora)
    apply_trainable(net, lora, compute)
    net.compute_dtype = compute
    return net


def shard(net: Decoder, axes: dict[str, int], compute: torch.dtype = torch.float32) -> None:
    """Spreads a prepared model over the ranks, e.g. `{"shard": 2, "tensor": 2}`."""
    mesh = Mesh.build(ParallelConfig(**axes), torch.device("cpu"))
    parallelize(net, mesh, Sections(), compute)


@torch.no_grad()
def train_a_little(net: nn.Module, seed: int = 7) -> None:
    """What training does to an export's eyes: everything that trains has moved, B is no longer zero."""
    for i, (name, p) in enumerate(net.named_parameters()):
        if p.requires_grad:
            whole = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i)) * p.shape[-1] ** -0.5
            local(p).add_((whole if is_adapter(name) else 0.1 * whole)[region(p)])


def digests(folder: Path) -> dict[str, str]:
    """File name -> hash of its content."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    return {name: t for p in sorted(folder.glob("*.safetensors")) for name, t in load_file(p).items()}


LAYOUTS = [{"shard": 2}, {"shard": 4}, {"replicate": 2, "shard": 2}, {"shard": 2, "tensor": 2}]
SMALL = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2}  # K has 2 rows: some of 4 ranks hold none
ODD = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 2, "intermediate_size": 54}  # 27 rows a rank over 2 more


def sizes_for(axes: dict[str, int]) -> dict[str, int]:
    """Sizes that a layout splits unevenly where it may."""
    return ODD if "tensor" in axes else SMALL


def same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal names, dtypes, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a
    )
