"""The registry of model families. A family is one module here with

    ARCHITECTURES    the `architectures` names it computes
    read(config)     config.json as an Arch
    Block            one decoder layer, Block(arch, index); forward(h [T, D], ctx) -> [T, D]
    rules(arch)      weight rules between the folder's tensor names and ours; () is the identity

and a line in FAMILIES. tests/model/golden.py needs a tiny config for every line; the tests run over them.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from model.arch import Arch, Fields

FAMILIES = {  # model_type -> module
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",
}


def get(arch: Arch) -> ModuleType:
    """The module of `arch.family`."""
    return import_module(f"model.families.{arch.family}")


def family_of(config: Fields) -> ModuleType:
    """The module for a config.json.

    Raises:
        ModelError: none computes it; the message lists the supported `model_type`s, or architectures of this one.
    """
    module = import_module(f"model.families.{FAMILIES[config.choice('model_type', tuple(FAMILIES))]}")
    for name in config.texts("architectures") or ():
        if name not in module.ARCHITECTURES:
            raise config.error("architectures", f"{name} is not supported; supported: {', '.join(module.ARCHITECTURES)}")
    return module
