"""Adapter folders in PEFT's layout: adapter_config.json and adapter_model.safetensors, read strictly and written plainly.

A tensor's name is `base_model.model.` + its name in the base model: `<linear>.lora_A.weight` [r, in] and
`<linear>.lora_B.weight` [out, r] of each adapted linear, `<module>.weight` of each module trained in full (PEFT's
`modules_to_save`). Its effect on a linear is W + scale * B A, with scale = lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA.

PEFT itself loads names it does not know with a warning and then computes the base model; here they are errors. So is every
setting that changes the computation and that we do not compute (DoRA, ranks per layer, trained biases, ...), by its name.
What an adapter covers is read from its tensors, not from the patterns in its config.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from model.arch import MAX_SIZE
from model.config import LoraConfig
from model.tensor_folder import TensorFolder, listed
from runtime.errors import ModelError, clean
from runtime.files import has, is_text, read_json

PREFIX = "base_model.model."
STEM = "adapter_model"
CONFIG = "adapter_config.json"

# Keys that change nothing about what a finished adapter computes; all others must be empty, false or absent.
HARMLESS = {
    "alora_invocation_string",
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "eva_config",
    # read and checked below
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "use_rslora",
}
SAME_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # initializations that leave the base weights alone


@dataclass(frozen=True)
class Adapter:
    """A checked adapter folder. Names are those of the base model in transformers, without PEFT's prefix."""

    tensors: TensorFolder
    rank: int
    alpha: float  # scale * rank, rsLoRA folded in
    dropout: float
    linears: tuple[str, ...]  # modules with a pair lora_A, lora_B
    saved: tuple[str, ...]  # tensors of modules trained in full
    wanted: tuple[str, ...]  # ends of names that must all be adapted; () where the config leaves that open

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def check_covers(self, linears: list[str]) -> None:
        """Every linear that the adapter's config targets must have its pair, or PEFT would compute it as if untrained.

        Raises:
            ModelError: with the names of those that have none.
        """
        asked = {n for n in linears if any(n == w or n.endswith(f".{w}") for w in self.wanted)}
        if missing := asked - set(self.linears):
            raise ModelError(f"holds no matrices for {listed(missing)}, which its target_modules name", self.tensors.folder)


def open_adapter(folder: str | Path) -> Adapter:
    """Reads and checks an adapter folder, headers only.

    Raises:
        ModelError: a file is missing or damaged, a setting is not supported, or a tensor is misnamed, missing or misshapen.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not has(folder, CONFIG):
        raise ModelError("no such file: an adapter is a folder in PEFT layout", path)
    config = read_json(path)
    rank, alpha, dropout = _settings(config, path)
    tensors = TensorFolder(folder, STEM)

    if misnamed := [n for n in tensors.specs if not n.startswith(PREFIX)]:
        raise ModelError(f"names must begin with {PREFIX!r}, which {listed(misnamed)} does not; PEFT would ignore them", folder)
    names = {n[len(PREFIX) :] for n in tensors.specs}
    linears = sorted({n.removesuffix(f".lora_{m}.weight") for n in names for m in "AB" if n.endswith(f".lora_{m}.weight")})
    pairs = {f"{linear}.lora_{m}.weight" for linear in linears for m in "AB"}
    if not linears:
        raise ModelError("holds no lora_A and lora_B matrices", folder)
    if missing := pairs - names:
        raise ModelError(f"lacks {listed(missing)}", folder)
    for name in pairs:
        shape = tensors.specs[PREFIX + name].shape
        if len(shape) != 2 or shape[0 if ".lora_A." in name else 1] != rank:
            raise ModelError(f"{name} has shape {list(shape)}, which does not fit r = {rank}", folder)

    modules = config.get("modules_to_save") or []
    # PEFT also saves embeddings it finds resized or targeted, without listing them
    saved = {n for n in names - pairs if _under(n, [*modules, "embed_tokens", "lm_head"])}
    if extra := names - pairs - saved:
        raise ModelError(f"holds {listed(extra)}: neither LoRA of a linear layer nor a module of modules_to_save", folder)
    target = config.get("target_modules")
    partial = config.get("exclude_modules") or config.get("layers_to_transform") is not None
    wanted = tuple(target) if isinstance(target, list) and not partial else ()
    return Adapter(tensors, rank, alpha, dropout, tuple(linears), tuple(sorted(saved)), wanted)


def _under(name: str, modules: list[str]) -> bool:
    module = name.rsplit(".", 1)[0]
    return any(module == m or module.endswith(f".{m}") for m in modules)


def _settings(config: dict, path: Path) -> tuple[int, float, float]:
    """(rank, alpha, dropout), once nothing else in the config changes the computation."""

    def refuse(key: str, why: str) -> ModelError:
        return ModelError(f"{key}={clean(json.dumps(config.get(key)), 80)} {why}", path)

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type", "is not supported; only LORA is")
    for key in sorted(config.keys() - HARMLESS):
        if config[key]:
            raise refuse(key, "is not supported: it changes what the adapter computes")
    if config.get("bias") not in (None, "none"):
        raise refuse("bias", "is not supported: trained biases change the base model")
    if config.get("init_lora_weights") not in SAME_BASE:
        raise refuse("init_lora_weights", "is not supported: it changes the base weights; convert the adapter to plain LoRA with PEFT")
    for key, pattern in (("target_modules", True), ("modules_to_save", False)):
        value = config.get(key)
        names = isinstance(value, list) and all(map(is_text, value))
        if not (value is None or names or (pattern and is_text(value))):
            raise refuse(key, "must be a list of names" + (" or a pattern" if pattern else ""))
    if not isinstance(rslora := config.get("use_rslora", False), (bool, type(None))):
        raise refuse("use_rslora", "must be true or false")
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    if type(rank) is not int or not 1 <= rank <= MAX_SIZE:
        raise refuse("r", f"must be an integer from 1 to {MAX_SIZE}")
    if type(alpha) not in (int, float) or not 1e-30 <= alpha <= 1e30:
        raise refuse("lora_alpha", "must be a positive number of a usable size")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise refuse("lora_dropout", "must be at least 0 and below 1")
    return rank, alpha * (math.sqrt(rank) if rslora else 1.0), float(dropout)


def config_json(cfg: LoraConfig, base: str, target_modules: list[str], modules_to_save: list[str]) -> bytes:
    """adapter_config.json as PEFT reads it; whole alphas as integers, as PEFT declares them."""
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": cfg.rank,
        "lora_alpha": int(cfg.alpha) if cfg.alpha == int(cfg.alpha) else cfg.alpha,
        "lora_dropout": cfg.dropout,
        "target_modules": target_modules,
        "modules_to_save": modules_to_save or None,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    return json.dumps(values, indent=2).encode() + b"\n"
