"""Small things tests train: a tokenizer, a model folder with a random shape, chat data. Made in milliseconds, no download."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from model.config import KernelsConfig
from parallel.config import CompileConfig, OffloadConfig, ParallelConfig, PrecisionConfig, RecomputeConfig, TilingConfig

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% elif m.role in ('user', 'system') %}{{ m.content + '<|im_end|>' }}"
    "{% else %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WORDS = "the cat sat on a mat while seven dogs ran far away from home and nobody knew why it was so cold in june".split()  # noqa: SIM905
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "initializer_range": 0.05,
}


@dataclass(frozen=True)
class Sections:
    """What `parallel/` reads of a config, all at the defaults but for what a test names."""

    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    kernels: KernelsConfig = KernelsConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    offload: OffloadConfig = OffloadConfig()
    tiling: TilingConfig = TilingConfig()
    compile: CompileConfig | None = None


def write_tokenizer(folder: Path, template: str | None = TEMPLATE, vocab: int = 320) -> int:
    """A byte-level BPE tokenizer with ChatML tokens; returns its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tok.get_vocab_size()


def write_model(folder: Path, **changes: object) -> Path:
    """A model folder without weights, for `model.init = "random"`."""
    size = write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": size} | changes), encoding="utf-8")
    return folder


def write_chats(path: Path, n: int, seed: int = 0, shortest: int = 1, longest: int = 24) -> Path:
    """`n` one-turn conversations of ragged length."""
    rng = random.Random(seed)
    text = lambda: " ".join(rng.choices(WORDS, k=rng.randint(shortest, longest)))  # noqa: E731
    rows = [{"messages": [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]} for _ in range(n)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def write_config(path: Path, model: Path, data: Path, out: Path, extra: str = "") -> Path:
    """A run config; `extra` is TOML appended after the sections of data."""
    path.write_text(
        f'[model]\npath = "{model}"\ninit = "random"\n'
        f'[output]\npath = "{out}"\n'
        f'[data]\ntokens = 128\nmax_length = 128\ncache = "{out.parent / "cache"}"\n'
        f'[[data.sources]]\npath = "{data}"\nformat = "chat"\n{extra}',
        encoding="utf-8",
    )
    return path
