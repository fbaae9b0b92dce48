"""Where a model lies: a local folder as it is, or a Hugging Face hub id fetched into the hub's cache.

Only what a run reads is fetched: configs, tokenizer files, templates and safetensors. Never code, never pickles.
`HF_HUB_OFFLINE`, `HF_HOME`, `HF_ENDPOINT` and `HF_TOKEN` mean what they mean to huggingface-hub.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from runtime.errors import ModelError
from runtime.files import has
from runtime.hub import NotHad, snapshot

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)
PATTERNS = ["*.json", "*.jinja", "model*.safetensors", "adapter_model.safetensors"]


def fetch(path: str, revision: str | None = None) -> Path:
    """The folder of `path`, downloaded first if it is a hub id (`owner/name`) and no folder of that name exists.

    Raises:
        ModelError: there is neither; the hub's reason is in the line. Or a file that an export would copy leads out of the folder:
            that is said now, and not once the model has trained.
    """
    folder = Path(os.path.expanduser(path))
    if os.path.isdir(folder):
        for name in MODEL_FILES + TOKENIZER_FILES:
            has(folder, name)
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise ModelError("no such folder, and not a hub id of the form owner/name", path)
    try:
        return snapshot(path, revision=revision, allow_patterns=PATTERNS)
    except NotHad as error:
        raise ModelError(f"no such folder, and the hub did not give it ({error})", path) from error
