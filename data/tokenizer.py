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
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as Pipeline

from runtime.errors import DataError, ModelError, clean, shown
from runtime.files import MAX_TEMPLATE, has, is_text, open_regular, read, read_json

NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # special tokens that a config names as `bos_token` and so on
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")  # of an added token
_MAX_IDS = 2**31  # ids beyond have no embedding in any model
_CONVERT = "python -c \"from transformers import AutoTokenizer as T; T.from_pretrained('{folder}').save_pretrained('{folder}')\""


@contextmanager
def _library(what: str) -> Iterator[None]:
    """What the library cannot do with a tokenizer, as a ModelError: it raises these two, or panics, which is no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error) in (Exception, ValueError) or type(error).__name__ == "PanicException":
            raise ModelError(f"{what}: {clean(error, 200)}") from None
        raise


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
        self.prefix_ids, self.suffix_ids = self._take_surroundings()

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Reads the tokenizer of a model folder.

        Raises:
            ModelError: a file is missing, malformed or contradicts another.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not has(folder, path.name):
            others = [name for name in ("tokenizer.model", "tekken.json", "vocab.json", "tiktoken.model") if (folder / name).is_file()]
            advice = f"; it has {others[0]}: convert it once, {_CONVERT.format(folder=folder)}" if others else ""
            raise ModelError(f"the model folder has no tokenizer.json{advice}", folder)
        data = read(path)
        with _library(f"{path}: is not a tokenizer"):
            pipeline = Pipeline.from_buffer(data)
        config = _config(folder / "special_tokens_map.json") | _config(folder / "tokenizer_config.json")
        with _library(f"{folder}: its added tokens do not fit its tokenizer"):
            _add_tokens(pipeline, config.get("added_tokens_decoder"), folder / "tokenizer_config.json")
            _add_named(pipeline, _special_tokens(config))
        templates = _read_templates(folder, config.get("chat_template"))
        eos_ids = _eos_ids(folder / "generation_config.json")
        facts = json.dumps([_special_tokens(config), config.get("added_tokens_decoder"), templates, eos_ids], sort_keys=True)
        fingerprint = hashlib.blake2b(hashlib.blake2b(data).digest() + facts.encode(), digest_size=16).hexdigest()
        with _library(f"{path}: cannot tokenize"):
            return cls(pipeline, config, templates, eos_ids, fingerprint)

    def encode(self, text: str) -> list[int]:
        """The ids of `text` alone, special tokens written in it recognised, nothing added."""
        with _library("the tokenizer fails"):
            return self._pipeline.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """`encode` of many texts on all cores, the interpreter lock released; with the characters of every token."""
        with _library("the tokenizer fails"):
            return self._pipeline.encode_batch(texts, add_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        with _library("the tokenizer fails"):
            return self._pipeline.decode(ids, skip_special_tokens=skip_special)

    @property
    def vocab_size(self) -> int:
        """The largest id and one. A model may have fewer embeddings, if the ids beyond are never used."""
        return 1 + max(self._pipeline.get_vocab(with_added_tokens=True).values(), default=-1)

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

    def _take_surroundings(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the post-processor puts before and after a text; from now on the pipeline is without it."""
        plain, full = (self._pipeline.encode("a", add_special_tokens=special).ids for special in (False, True))
        self._pipeline.post_processor = None
        bare = self._pipeline.encode("a").ids
        for i in range(len(full) - len(bare) + 1) if plain == bare and (bare or not full) else ():
            if full[i : i + len(bare)] == bare:
                return tuple(full[:i]), tuple(full[i + len(bare) :])
        raise ModelError("the tokenizer's post-processor changes the text's own tokens, which is not supported")


def _config(path: Path) -> dict:
    """The object in a file, empty where there is none, once its special tokens are what they may be."""
    config = read_json(path) if has(path.parent, path.name) else {}
    for name in NAMED:
        value = config.get(f"{name}_token")
        if value is not None and not is_text(value["content"] if isinstance(value, dict) and "content" in value else value):
            raise _refused(path, f"{name}_token", value, "must be text, or an object with a text as its content")
    return config


def _refused(path: Path, key: str, value: object, why: str) -> ModelError:
    return ModelError(f"{key}={clean(json.dumps(value), 80)} {why}", path)


def _eos_ids(path: Path) -> list[int]:
    """The tokens that generation_config.json names as ends of a turn."""
    eos = _config(path).get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int and 0 <= i < _MAX_IDS for i in ids):
        raise _refused(path, "eos_token_id", eos, "must be the id of a token, or a list of them")
    return ids


def _special_tokens(config: dict) -> dict[str, str]:
    """`bos_token` and the like, which may be given as text or as an object with `content`."""
    found = {}
    for key, value in config.items():
        if key.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[key] = text
    return found


def _add_tokens(pipeline: Pipeline, entries: object, path: Path) -> None:
    """Adds what tokenizer_config.json lists and tokenizer.json lacks, at the ids it states."""
    if not isinstance(entries, (dict, type(None))):
        raise _refused(path, "added_tokens_decoder", entries, "must map ids to tokens")
    wanted: dict[int, dict] = {}
    for key, entry in (entries or {}).items():
        where = f"added_tokens_decoder.{clean(key, 40)}"
        if not re.fullmatch("[0-9]{1,10}", key) or int(key) >= _MAX_IDS or int(key) in wanted:
            raise ModelError(f"{where} is not the id of a token, or names one twice", path)
        if not isinstance(entry, dict) or not is_text(entry.get("content")):
            raise _refused(path, where, entry, "must be an object with a text as its content")
        if wrong := [flag for flag in _FLAGS if not isinstance(entry.get(flag, False), bool)]:
            raise _refused(path, f"{where}.{wrong[0]}", entry[wrong[0]], "must be true or false")
        wanted[int(key)] = entry
    known = pipeline.get_added_tokens_decoder()
    for i, entry in sorted(wanted.items()):
        text = entry["content"]
        if i in known and known[i].content == text:
            continue
        add = pipeline.add_special_tokens if entry.get("special") else pipeline.add_tokens
        add([AddedToken(text, **{flag: entry[flag] for flag in _FLAGS if flag in entry})])
        if (got := pipeline.token_to_id(text)) != i:
            raise ModelError(f"gives token {shown(text)} the id {i}, but tokenizer.json makes it {got}", path)


def _add_named(pipeline: Pipeline, special: dict[str, str]) -> None:
    """Makes bos, eos and the like tokens of their own where the pipeline does not know them as such, as transformers does.

    One that is in the vocabulary keeps its id; a missing one gets the next free id, in this order.
    """
    known = {token.content for token in pipeline.get_added_tokens_decoder().values()}
    texts = [special.get(f"{name}_token") for name in NAMED]
    pipeline.add_special_tokens([AddedToken(text, special=True) for text in dict.fromkeys(texts) if text and text not in known])


def _read_templates(folder: Path, given: object) -> dict[str, str]:
    """Chat templates by name. A .jinja file is newer than, and wins over, the config's text or list of named texts."""
    templates: object = given if isinstance(given, dict) else {"default": given} if given else {}
    if isinstance(given, list):
        named = all(isinstance(item, dict) and is_text(item.get("name")) for item in given)
        templates = {item["name"]: item.get("template") for item in given} if named else None
    if templates is None or not all(map(is_text, [*templates, *templates.values()])):
        where = folder / "tokenizer_config.json"
        raise _refused(where, "chat_template", given, "must be text, or a list of objects with a name and a template")
    main = folder / "chat_template.jinja"
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    for name, path in [("default", main), *((file.stem, file) for file in more)]:
        if os.path.lexists(path):
            templates[name] = _template_text(read(path, MAX_TEMPLATE, folder), path)
    return templates


def read_template(path: Path) -> str:
    """The text of a template file that the user named, which may lie anywhere."""
    try:
        with open_regular(path) as file:
            data = file.read(MAX_TEMPLATE + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DataError(f"the chat template cannot be read: {getattr(error, 'strerror', None) or error}", path) from None
    if len(data) > MAX_TEMPLATE:
        raise DataError(f"the chat template is larger than {MAX_TEMPLATE >> 20} MiB", path)
    return _template_text(data, path)


def _template_text(data: bytes, path: Path) -> str:
    try:
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8").read()  # lines may end in any way
    except UnicodeDecodeError as error:
        raise DataError(f"the chat template is not UTF-8 (byte 0x{error.object[error.start]:02x})", path) from None
