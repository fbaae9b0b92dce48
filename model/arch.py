"""Arch: the facts of a model, read once from its config.json and checked; the rest of the code never opens that file.

Both spellings are read: transformers v4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and v5 (`rope_parameters`, per layer
type where a model has two, `dtype`). A setting that would change the computation and that we do not compute is an error
that names it; a setting that transformers itself ignores for the family is ignored here too, since transformers is the
reference for every number. No torch in this file; `Arch.from_folder` imports the family's module, and torch with it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from runtime.errors import ModelError, clean
from runtime.files import has, read_json

MAX_SIZE = 2**24  # no dimension of a real model comes near; beyond it config.json is damaged
ROPES = ("default", "linear", "llama3", "yarn")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
# Settings any family may carry in its config.json, with the values at which they change nothing.
INERT = {
    "quantization_config": (None,),
    "attention_dropout": (None, 0),
    "partial_rotary_factor": (None, 1),
    "use_bidirectional_attention": (None, False),
    "attn_logit_softcapping": (None,),
}


class Kind(NamedTuple):
    """Which keys of its own document a query sees: `full`, all up to itself; `window`, the last `size`, itself included."""

    name: str = "full"
    size: int = 0


class Layer(NamedTuple):
    """What differs between the layers of one model."""

    kind: Kind
    rope: int  # index into Arch.ropes


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: theta and how its frequencies are stretched for longer contexts (model/rope.py)."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int = 0  # llama3, yarn: the context length of pre-training
    low_freq_factor: float = 0.0  # llama3
    high_freq_factor: float = 0.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the borders of the ramp to whole dimensions
    attention_factor: float = 1.0  # yarn: multiplies cos and sin, so logits by its square


@dataclass(frozen=True)
class Arch:
    """Sizes and switches of a decoder. Names are those of Hugging Face configs where they have one."""

    family: str  # module in model/families
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layers: tuple[Layer, ...]
    ropes: tuple[Rope, ...]
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, before RoPE
    norm: str = "rms"  # key of model/norm.py NORMS
    attention_scale: float = 0.0  # multiplies q k^T
    embed_scale: float = 1.0  # multiplies embeddings, rounded to the compute dtype first
    logit_softcap: float | None = None  # logits become cap * tanh(logits / cap)
    initializer_range: float = 0.02
    dtype: str | None = None  # in which the folder keeps its weights, as it says
    wrapped: bool = False  # the text part of a multimodal checkpoint
    name: str = ""  # the folder's name, for messages

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The attention kinds that occur, each once."""
        return tuple(dict.fromkeys(layer.kind for layer in self.layers))

    @staticmethod
    def from_folder(folder: str | Path) -> Arch:
        """Reads `folder/config.json`.

        Raises:
            ModelError: no such file, not JSON, not a supported model (the message lists those), or impossible values.
        """
        from model.families import family_of  # a family holds its block, hence torch

        path = Path(folder) / "config.json"
        if not has(path.parent, path.name):
            raise ModelError("no such file: a model is a folder in Hugging Face layout, with config.json and *.safetensors", path)
        config = Fields(read_json(path), path)
        return family_of(config).read(config)


_REQUIRED = object()


class Fields:
    """A JSON object whose values are taken with a type and limits; errors name the file and the key.

    A key that is absent takes its default. `null` is None where the default is None or `null=True`, an error elsewhere.
    """

    def __init__(self, values: dict, path: Path, prefix: str = ""):
        self.values, self.path, self.prefix = values, path, prefix

    def error(self, key: str, message: str) -> ModelError:
        shown = clean(json.dumps(self.values[key]), 80) if key in self.values else "absent"
        return ModelError(f"{self.prefix}{key}={shown}: {message}", self.path)

    def _take(self, key: str, default: object, null: bool, types: tuple[type, ...], wanted: str) -> object:
        value = self.values.get(key, default)
        if value is _REQUIRED:
            raise self.error(key, f"is needed, {wanted}")
        if value is None and (default is None or null):
            return None
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise self.error(key, f"must be {wanted}")
        return value

    def integer(self, key: str, default: object = _REQUIRED, null: bool = False, low: int = 1, high: int = MAX_SIZE) -> int | None:
        value = self._take(key, default, null, (int,), f"an integer from {low} to {high}")
        if value is not None and not low <= value <= high:
            raise self.error(key, f"must be from {low} to {high}")
        return value

    def number(self, key: str, default: object = _REQUIRED, null: bool = False, above: float = 0.0) -> float | None:
        value = self._take(key, default, null, (int, float), f"a number above {above:g}")
        if value is not None and not (above < value and 1e-30 <= abs(value) <= 1e30):  # refuses NaN too, which Python's JSON reads
            raise self.error(key, f"must be a number above {above:g}, of a usable size")
        return None if value is None else float(value)

    def flag(self, key: str, default: object = _REQUIRED) -> bool:
        return self._take(key, default, False, (bool,), "true or false")

    def text(self, key: str, default: object = _REQUIRED) -> str | None:
        return self._take(key, default, False, (str,), "a string")

    def choice(self, key: str, options: tuple[str, ...], default: object = _REQUIRED) -> str:
        value = self._take(key, default, False, (str,), f"one of {', '.join(options)}")
        if value not in options:
            raise self.error(key, f"is not supported; supported: {', '.join(options)}")
        return value

    def section(self, key: str, default: object = None) -> Fields | None:
        value = self._take(key, default, False, (dict,), "an object")
        return None if value is None else Fields(value, self.path, f"{self.prefix}{key}.")

    def texts(self, key: str) -> tuple[str, ...] | None:
        """A list of strings, or None where absent."""
        value = self._take(key, None, False, (list,), "a list of strings")
        if value is not None and not all(isinstance(v, str) for v in value):
            raise self.error(key, "must be a list of strings")
        return None if value is None else tuple(value)


def read_common(c: Fields, **defaults: object) -> dict:
    """The fields every family has, as arguments of Arch. `defaults` override the defaults below, by config key.

    Keys that older config.json files leave out take the value the family's class in transformers gives them.
    """
    for key, inert in INERT.items():
        if c.values.get(key) not in inert:
            advice = "use the unquantized repository" if key == "quantization_config" else "the computation would differ"
            raise c.error(key, f"is not supported: {advice}")
    heads = c.integer("num_attention_heads", defaults.get("num_attention_heads", _REQUIRED))
    kv_heads = c.integer("num_key_value_heads", defaults.get("num_key_value_heads"), null=True) or heads
    if heads % kv_heads:
        raise c.error("num_key_value_heads", f"must divide num_attention_heads={heads}")
    hidden = c.integer("hidden_size", defaults.get("hidden_size", _REQUIRED))
    head_dim = c.integer("head_dim", defaults.get("head_dim"), null=True)
    if head_dim is None:
        if hidden % heads:
            raise c.error("num_attention_heads", f"must divide hidden_size={hidden}, or head_dim must be given")
        head_dim = hidden // heads
    if head_dim % 2:
        raise c.error("head_dim", f"{head_dim} is odd; rotary embeddings need an even size")
    act_key = "hidden_activation" if "hidden_activation" in defaults else "hidden_act"
    dtype = c.text("dtype", None) or c.text("torch_dtype", None)
    return {
        "vocab_size": c.integer("vocab_size", defaults.get("vocab_size", _REQUIRED)),
        "hidden_size": hidden,
        "intermediate_size": c.integer("intermediate_size", defaults.get("intermediate_size", _REQUIRED)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": c.integer("max_position_embeddings", defaults.get("max_position_embeddings", 2048), high=2**31 - 1),
        "rms_norm_eps": c.number("rms_norm_eps", 1e-6),
        "hidden_act": c.choice(act_key, ACTIVATIONS, defaults.get(act_key, "silu")),
        "tie_word_embeddings": c.flag("tie_word_embeddings", defaults.get("tie_word_embeddings", False)),
        "attention_scale": head_dim**-0.5,
        "initializer_range": c.number("initializer_range", 0.02),
        "dtype": dtype.removeprefix("torch.") if dtype else None,
        "name": c.path.parent.name,
    }


def num_layers(c: Fields, default: object = _REQUIRED) -> int:
    return c.integer("num_hidden_layers", default, high=4096)


def layer_types(c: Fields, count: int) -> tuple[str, ...] | None:
    """`layer_types`, checked: one of full_attention and sliding_attention per layer; None where absent."""
    types = c.texts("layer_types")
    if types is None:
        return None
    if len(types) != count:
        raise c.error("layer_types", f"has {len(types)} entries for num_hidden_layers={count}")
    for t in types:
        if t not in ("full_attention", "sliding_attention"):
            raise c.error("layer_types", f"{t} is not supported; supported: full_attention, sliding_attention")
    return types


def windowed(c: Fields, types: tuple[str, ...], window: int | None, ropes: dict[str, int] | None = None) -> tuple[Layer, ...]:
    """Layers from their types; `ropes` names the rope of each type where a model has more than one."""
    if window is None and "sliding_attention" in types:
        raise c.error("sliding_window", "is needed by the sliding_attention layers of layer_types")
    kinds = {"full_attention": Kind(), "sliding_attention": Kind("window", window or 0)}
    return tuple(Layer(kinds[t], (ropes or {}).get(t, 0)) for t in types)


def read_rope(c: Fields, theta: float = 10000.0) -> Rope:
    """The one rope of a model, from `rope_parameters` (v5) or `rope_theta` and `rope_scaling` (v4)."""
    theta = c.number("rope_theta", theta, above=1.0)
    new, old = c.section("rope_parameters"), c.section("rope_scaling")
    ropes = {rope_from(section, theta, c) for section in (new, old) if section is not None and section.values}
    if len(ropes) > 1:
        raise c.error("rope_scaling", "differs from rope_parameters; keep one of them")
    return ropes.pop() if ropes else Rope(theta)


_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "truncate",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
    },
}


def rope_from(r: Fields, theta: float, c: Fields) -> Rope:
    """One rope dictionary `r` of the config `c`; `theta` where it names none itself."""
    kind = r.choice("rope_type" if "rope_type" in r.values else "type", ROPES, "default")
    unknown = set(r.values) - _ROPE_KEYS[kind] - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if unknown:
        raise r.error(min(unknown), f"is not supported for rope type {kind}")
    if r.number("partial_rotary_factor", 1.0) != 1.0:
        raise r.error("partial_rotary_factor", "is not supported: rotary embeddings here cover the whole head")
    theta = r.number("rope_theta", theta, above=1.0)
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, r.number("factor"))
    limit = c.integer("max_position_embeddings", 2048, high=2**31 - 1)
    # Some configs keep the pre-training length beside the dictionary; transformers lets that one win.
    original = c.integer("original_max_position_embeddings", None, high=2**31 - 1)
    original = original or r.integer("original_max_position_embeddings", limit, high=2**31 - 1)
    if kind == "llama3":
        low, high = r.number("low_freq_factor"), r.number("high_freq_factor")
        if low == high:
            raise r.error("high_freq_factor", "must differ from low_freq_factor")
        return Rope(theta, kind, r.number("factor"), original, low, high)
    factor = r.number("factor", None) or limit / original
    beta_fast, beta_slow = r.number("beta_fast", None) or 32.0, r.number("beta_slow", None) or 1.0
    attention = r.number("attention_factor", None)
    if attention is None:
        mscale, mscale_all = r.number("mscale", None, above=-1.0), r.number("mscale_all_dim", None, above=-1.0)
        attention = _mscale(factor, mscale) / _mscale(factor, mscale_all) if mscale and mscale_all else _mscale(factor)
    return Rope(theta, kind, factor, original, 0.0, 0.0, beta_fast, beta_slow, r.flag("truncate", True), attention)


def _mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature (arXiv 2309.00071, section 3.4): attention entropy stays level as the context grows by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
