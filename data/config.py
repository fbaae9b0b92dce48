"""The `[data]` section and its sources. No torch here: `--help` must stay instant."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from datetime import date
from typing import Annotated, Literal

from runtime.errors import ConfigError

# What a record of each format holds: our name for a field -> its usual name in data, which `fields` can change.
FIELDS = {
    "chat": {
        "messages": "messages",
        "role": "role",
        "content": "content",
        "weight": "weight",
        "system": "system",
        "tools": "tools",
    },
    "instruct": {"instruction": "instruction", "input": "input", "output": "output"},
    "completion": {"text": "text"},
    "tokenized": {"input_ids": "input_ids", "labels": "labels", "mask": "mask"},
}


@dataclass(frozen=True)
class SourceConfig:
    """Where documents come from and how their records are read."""

    path: Annotated[str, "A file (.jsonl .json .csv .txt .parquet), a glob, a folder, or the id of a dataset on the Hugging Face hub."]
    format: Annotated[Literal["chat", "instruct", "completion", "tokenized"], "What a record is."]
    name: Annotated[str | None, "Its name in reports and metrics; absent: from the path."] = None
    weight: Annotated[float, "How often an epoch takes each document: 0.5 a random half, 2.5 twice and a random half more."] = 1.0
    fields: Annotated[dict[str, str], 'Names the fields have in the data, e.g. {messages = "conversations", role = "from"}.'] = field(
        default_factory=dict
    )
    roles: Annotated[dict[str, str], 'chat: what roles are called in the data, e.g. {bot = "assistant"}; human and gpt are known.'] = field(
        default_factory=dict
    )
    train_on: Annotated[
        Literal["assistant", "last", "all"], "chat, instruct: every answer, only the last answer, or every token (prompts too)."
    ] = "assistant"
    prompt: Annotated[Literal["alpaca", "chat"], "instruct: the Alpaca prompt, or the model's chat template."] = "alpaca"
    split: Annotated[str | None, "hub: which files, by the split their path names; absent: train."] = None
    revision: Annotated[str | None, "hub: branch, tag or commit; absent: main."] = None

    def __post_init__(self):
        if not self.path:
            raise ConfigError("must name a file, a glob, a folder or a hub dataset", "path", self.path)
        if not (math.isfinite(self.weight) and 0 < self.weight <= 1000):
            raise ConfigError("must lie above 0 and at most 1000; remove the source to leave it out", "weight", self.weight)
        known = FIELDS[self.format]
        for key, value in self.fields.items():
            if key not in known:
                close = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(known)}"
                raise ConfigError(f'is not a field of format = "{self.format}"; {hint}', f"fields.{key}", value)
            if not value:
                raise ConfigError("must not be empty", f"fields.{key}", value)
        names = list((known | self.fields).values())
        if len(set(names)) < len(names):
            raise ConfigError("gives two fields the same name", "fields", self.fields)
        if self.roles and self.format != "chat":
            raise ConfigError('is a key of format = "chat" only', "roles", self.roles)
        if self.train_on != "assistant" and self.format not in ("chat", "instruct"):
            raise ConfigError('is a key of format = "chat" and "instruct" only', "train_on", self.train_on)
        if self.prompt != "alpaca" and self.format != "instruct":
            raise ConfigError('is a key of format = "instruct" only', "prompt", self.prompt)

    def field_names(self) -> dict[str, str]:
        """Our name of each field -> the data's."""
        return FIELDS[self.format] | self.fields


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, and how it is cut and packed."""

    sources: Annotated[tuple[SourceConfig, ...], "One table per source."]
    tokens: Annotated[int, "Token slots of a micro-batch, per data rank; documents are packed into them."] = 8192
    max_length: Annotated[
        int | None, "Longest document in tokens; absent: as many as a micro-batch has.", "sequence_len", "max_seq_length"
    ] = None
    overflow: Annotated[
        Literal["drop", "truncate", "split", "error"],
        "A longer document: leave it out, keep its beginning, cut it into pieces that all train, or stop.",
    ] = "truncate"
    on_bad: Annotated[
        Literal["error", "skip"], "A record that is wrong (no JSON, a field missing, refused by the template): stop, or leave it out."
    ] = "error"
    max_bad: Annotated[float, "skip: share of a source's records that may be wrong; more is an error."] = 0.001
    template: Annotated[str | None, "A file with a chat template (jinja) instead of the model's own."] = None
    template_args: Annotated[
        dict[str, str | int | float | bool], "Variables given to the chat template, e.g. {enable_thinking = false}."
    ] = field(default_factory=dict)
    date: Annotated[str, "What a chat template that asks for today's date is told: data must not change from day to day."] = "2024-07-26"
    cache: Annotated[str, "Folder for tokenized data; safe to delete."] = "~/.cache/salamander"

    def __post_init__(self):
        if not self.sources:
            raise ConfigError("must name at least one source", "sources")
        if not 2 <= self.tokens <= 2**26:
            raise ConfigError("must lie between 2 and 2^26, as memory holds several whole rows", "tokens", self.tokens)
        if self.max_length is not None and not 2 <= self.max_length <= self.tokens:
            raise ConfigError(
                f"must lie between 2 and data.tokens={self.tokens}, which a document has to fit into", "max_length", self.max_length
            )
        if not 0 <= self.max_bad < 1:
            raise ConfigError("must be a share of the records: at least 0, and below 1", "max_bad", self.max_bad)
        try:
            date.fromisoformat(self.date)
        except ValueError:
            raise ConfigError("must be a date such as 2024-07-26", "date", self.date) from None
        for key in ("template", "cache"):
            if getattr(self, key) == "":
                raise ConfigError("must name a file or a folder; leave it out for the default", key, "")
        names = [source.name for source in self.sources if source.name]
        if len(set(names)) < len(names):
            raise ConfigError("gives two sources the same name", "sources", names)

    @property
    def longest(self) -> int:
        """Tokens that a document may have."""
        return self.max_length or self.tokens
