"""The model folder's tokenizer, over the `tokenizers` library: text to ids and back, exactly as transformers does it.

Read from the folder: `tokenizer.json` (the whole pipeline), `tokenizer_config.json` and `special_tokens_map.json` (which
tokens are bos, eos, pad, and added tokens the first file lacks), `chat_template.jinja` (or `chat_template` in the config) and
`generation_config.json` (further tokens that end a turn). Formats that need another library (`tokenizer.model`,
`tekken.json`) are refused with the way to convert them.

Beginning and end of text. A tokenizer says in its post-processor whether a text starts with bos or ends with eos (flags such
as `add_bos_token` mean nothing beside a tokenizer.json, in transformers 5 as here). We ask it once, for `prefix_ids` and
`suffix_ids`, and then encode without it: what is added is in one place, a chat template that writes its own bos never gets a
second one, and character offsets keep the spaces that some post-processors trim away.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as Pipeline

from runtime.errors import DataError, ModelError, clean

_CONVERT = "python -c \"from transformers import AutoTokenizer as T; T.from_pretrained('{folder}').save_pretrained('{folder}')\""


class Tokenizer:
    """Text to ids and back.

    bos_id, eos_id, pad_id: int or None (pad falls back to eos, then to 0: padding is never attended to nor learned).
    eos_ids: every token that ends generation, eos_id first. prefix_ids, suffix_ids: what goes before and after a text.
    special: names and texts of the special tokens, as chat templates see them (`bos_token`, ...).
    templates: chat templates by name ("default", "tool_use", ...); empty if the model has none.
    """

    def __init__(self, pipeline: Pipeline, config: dict, templates: dict[str, str], eos_ids: Sequence[int] = (), fingerprint: str = ""):
        self.templates = templates
        self.fingerprint = fingerprint
        self.special = _special_tokens(config)
        self._pipeline = pipeline
        pipeline.no_truncation()  # a saved tokenizer may carry either, and would cut or pad silently
        pipeline.no_padding()
        self.bos_id, self.eos_id = self._id_of("bos_token"), self._id_of("eos_token")
        self.pad_id = next(i for i in (self._id_of("pad_token"), self.eos_id, 0) if i is not None)
        self.eos_ids = tuple(dict.fromkeys(i for i in (self.eos_id, *eos_ids) if i is not None))
        self.prefix_ids, self.suffix_ids = self._surroundings()
        pipeline.post_processor = None

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Reads the tokenizer of a model folder.

        Raises:
            ModelError: a file is missing, malformed or contradicts another.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            others = [name for name in ("tokenizer.model", "tekken.json", "vocab.json", "tiktoken.model") if (folder / name).is_file()]
            advice = f"; it has {others[0]}: convert it once, {_CONVERT.format(folder=folder)}" if others else ""
            raise ModelError(f"the model folder has no tokenizer.json{advice}", folder)
        data = path.read_bytes()
        try:
            pipeline = Pipeline.from_buffer(data)
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"is not a tokenizer: {clean(error, 200)}", path) from None
        config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
        _add_tokens(pipeline, config.get("added_tokens_decoder") or {}, folder / "tokenizer_config.json")
        _add_named(pipeline, _special_tokens(config))
        templates = _read_templates(folder, config)
        eos = _read_json(folder / "generation_config.json").get("eos_token_id")
        eos_ids = [eos] if isinstance(eos, int) else eos or []
        facts = json.dumps([_special_tokens(config), config.get("added_tokens_decoder"), templates, eos_ids], sort_keys=True)
        fingerprint = hashlib.blake2b(hashlib.blake2b(data).digest() + facts.encode(), digest_size=16).hexdigest()
        return cls(pipeline, config, templates, eos_ids, fingerprint)

    def encode(self, text: str) -> list[int]:
        """The ids of `text` alone, special tokens written in it recognised, nothing added."""
        return self._pipeline.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """`encode` of many texts on all cores, the interpreter lock released; with the characters of every token."""
        return self._pipeline.encode_batch(texts, add_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        return self._pipeline.decode(ids, skip_special_tokens=skip_special)

    @property
    def vocab_size(self) -> int:
        """The largest id and one. A model may have fewer embeddings, if the ids beyond are never used."""
        return 1 + max(self._pipeline.get_vocab(with_added_tokens=True).values())

    @cached_property
    def special_texts(self) -> dict[str, int]:
        """Text and id of every special token: these are what a template's control tokens are made of."""
        return {token.content: i for i, token in self._pipeline.get_added_tokens_decoder().items() if token.special}

    def check_vocabulary(self, size: int) -> None:
        """Refuses a model whose embeddings have fewer rows than the tokenizer has tokens.

        Added tokens may lie beyond (gemma-3-1b's image token does) as long as no document uses them:
        `Documents.check_vocabulary` looks at those.
        """
        own = 1 + max(self._pipeline.get_vocab(with_added_tokens=False).values(), default=-1)
        if own > size:
            raise ModelError(f"the tokenizer has {own} tokens, but the model's embeddings have {size} rows: they do not belong together")
        for name, token in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            if token is not None and token >= size:
                raise ModelError(f"the tokenizer's {name} has id {token}, but the model's embeddings have {size} rows")

    def _id_of(self, name: str) -> int | None:
        text = self.special.get(name)
        return None if text is None else self._pipeline.token_to_id(text)

    def _surroundings(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the post-processor puts before and after a text."""
        bare = self._pipeline.encode("a", add_special_tokens=False).ids
        full = self._pipeline.encode("a", add_special_tokens=True).ids
        for i in range(len(full) - len(bare) + 1):
            if full[i : i + len(bare)] == bare:
                return tuple(full[:i]), tuple(full[i + len(bare) :])
        raise ModelError("the tokenizer's post-processor changes the text's own tokens, which is not supported")


def _special_tokens(config: dict) -> dict[str, str]:
    """`bos_token` and the like, which may be given as text or as an object with `content`."""
    found = {}
    for key, value in config.items():
        if key.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[key] = text
    return found


def _add_tokens(pipeline: Pipeline, entries: dict, path: Path) -> None:
    """Adds what tokenizer_config.json lists and tokenizer.json lacks, at the ids it states."""
    known = pipeline.get_added_tokens_decoder()
    try:
        wanted = sorted((int(i), entry["content"], entry) for i, entry in entries.items())
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ModelError("added_tokens_decoder must map ids to tokens with a content", path) from None
    for i, text, entry in wanted:
        if i in known and known[i].content == text:
            continue
        flags = {key: entry[key] for key in ("lstrip", "rstrip", "single_word", "normalized", "special") if key in entry}
        add = pipeline.add_special_tokens if entry.get("special") else pipeline.add_tokens
        add([AddedToken(text, **flags)])
        if (got := pipeline.token_to_id(text)) != i:
            raise ModelError(f"gives token {text!r} the id {i}, but tokenizer.json makes it {got}", path)


def _add_named(pipeline: Pipeline, special: dict[str, str]) -> None:
    """Makes bos, eos and the like tokens of their own where the pipeline does not know them as such, as transformers does.

    One that is in the vocabulary keeps its id; a missing one gets the next free id, in this order.
    """
    known = {token.content for token in pipeline.get_added_tokens_decoder().values()}
    texts = [special.get(f"{name}_token") for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    pipeline.add_special_tokens([AddedToken(text, special=True) for text in dict.fromkeys(texts) if text and text not in known])


def _read_templates(folder: Path, config: dict) -> dict[str, str]:
    """Chat templates by name. A .jinja file is newer than, and wins over, the config's text or list of named texts."""
    given = config.get("chat_template") or {}
    if isinstance(given, list):
        given = {item["name"]: item["template"] for item in given}
    templates = {"default": given} if isinstance(given, str) else dict(given)
    main = folder / "chat_template.jinja"
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    for name, path in [("default", main), *((file.stem, file) for file in more)]:
        if path.is_file():
            templates[name] = read_template(path)
    return templates


def read_template(path: Path) -> str:
    """The text of a template file."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"the chat template cannot be read: {error.strerror}", path) from None
    except UnicodeDecodeError as error:
        raise DataError(f"the chat template is not UTF-8 (byte 0x{error.object[error.start]:02x})", path) from None


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"is not valid JSON: {error}", path) from None
    if not isinstance(value, dict):
        raise ModelError(f"must hold an object, not {type(value).__name__}", path)
    return value
