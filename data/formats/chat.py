"""Conversations: a list of messages with a role and a content, rendered by the model's chat template.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], "tools": [...]}

Every message of the assistant is trained (`train_on = "assistant"`), or the last one, or all text. A message's own `weight`
(0 or 1, or false or true), where it has one, decides for that message. Other keys of a message (`tool_calls`,
`reasoning_content`, `name`, ...) go to the template as they are, but that a tool call's `arguments`, which APIs give as JSON
in a string, are decoded: templates expect an object, and most would write a string's quotes twice.

A record may have `system`, text put in front as a message of that role, and `tools`, a list of schemas (or the same as JSON
in a string, for tables that cannot hold lists of unlike objects).
"""

from __future__ import annotations

import json
from datetime import date

from data.chat import Chat
from data.config import DataConfig, SourceConfig
from data.formats import Format, as_object, get, kind_of
from data.sample import BadRecord, Sample
from data.sources import not_too_deep
from data.tokenizer import Tokenizer
from runtime.errors import shown
from runtime.files import expanded

ROLES = {"human": "user", "gpt": "assistant"}  # as data in the ShareGPT form calls them
_TYPES = {"reasoning_content": str, "thinking": str, "reasoning": str, "tool_calls": list}


def template_of(cfg: DataConfig, tokenizer: Tokenizer) -> Chat:
    """The chat template of the config, else the model's."""
    template = expanded(cfg.template, "data.template") if cfg.template else None
    return Chat(tokenizer, template, cfg.template_args, date.fromisoformat(cfg.date))


def template_key(cfg: DataConfig, chat: Chat | None) -> object:
    """What decides the template's output."""
    return chat and [chat.sources, cfg.template_args, cfg.date]


def build(cfg: DataConfig, source: SourceConfig, tokenizer: Tokenizer) -> Format:
    names, roles = source.field_names(), ROLES | source.roles
    chat = template_of(cfg, tokenizer)

    def convert(record: object) -> Sample:
        record = as_object(record)
        messages, weights = [], []
        if (system := get(record, names["system"], str, required=False)) is not None:
            messages.append({"role": "system", "content": system})
            weights.append(None)
        given = get(record, names["messages"], list)
        for i, message in enumerate(given):
            try:
                message, weight = _message(message, names, roles)
            except BadRecord as error:
                raise BadRecord(f"message {i + 1}: {error}") from None
            messages.append(message)
            weights.append(weight)
        if not given:
            raise BadRecord(f"field {names['messages']!r} is empty")
        if system is not None and messages[1]["role"] == "system":
            raise BadRecord(f"has a field {names['system']!r} and a first message of role system; keep one of them")
        tools = _decoded(record.get(names["tools"]), list, names["tools"])
        if source.train_on == "all" and all(weight is None for weight in weights):
            return Sample(chat.render(messages, tools), None)
        trained = _trained(messages, weights, source.train_on)
        for i, message in enumerate(messages):
            if trained[i] and not message.get("content") and not message.get("tool_calls"):
                raise BadRecord(f"message {i + 1} ({message['role']}) is empty, but would be trained; give it weight 0, or remove it")
        return Sample(*chat.spans(messages, tools, trained))

    return Format(convert, ["chat", names, roles, source.train_on, template_key(cfg, chat)])


def _trained(messages: list[dict], weights: list[bool | None], train_on: str) -> list[bool]:
    chosen = [train_on == "all" or message["role"] == "assistant" for message in messages]
    if train_on == "last" and True in chosen:
        last = len(chosen) - 1 - chosen[::-1].index(True)
        chosen = [i == last for i in range(len(chosen))]
    return [wanted if weight is None else weight for wanted, weight in zip(chosen, weights)]


def _message(value: object, names: dict[str, str], roles: dict[str, str]) -> tuple[dict, bool | None]:
    """A message with our names, and what its own weight says."""
    given = as_object(value)
    role, weight = get(given, names["role"], str), given.get(names["weight"])
    if weight is not None and weight not in (0, 1):
        raise BadRecord(f"field {names['weight']!r} must be 0 or 1, got {shown(weight)}")
    message = {"role": roles.get(role, role)}
    content = given.get(names["content"])
    if type(content) is str and given.keys() == {names["role"], names["content"]}:  # as most are
        return message | {"content": content}, None if weight is None else bool(weight)
    if content is not None:
        message["content"] = content
    taken = ("role", "content", names["role"], names["content"], names["weight"])
    message |= {key: item for key, item in given.items() if key not in taken}
    if isinstance(content, list):
        for part in content:
            if get(as_object(part), "type", str) != "text":
                raise BadRecord(f"has content of type {shown(part['type'])}; only text can be trained")
            get(part, "text", str)
    elif content is None:
        if not message.get("tool_calls"):
            get(given, names["content"], str)  # says that it is null, or what there is instead
    elif type(content) is not str:
        raise BadRecord(f"field {names['content']!r} must be a string, got {kind_of(content)}")
    for key in message.keys() & _TYPES.keys():
        get(message, key, _TYPES[key], required=False)
    if message.get("tool_calls") is not None:
        message["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    return message, None if weight is None else bool(weight)


def _call(value: object) -> dict:
    """A tool call, its arguments decoded. Both {"function": {...}} and the function alone are in use."""
    call = as_object(value)
    inner = get(call, "function", dict, required=False, default=call)
    get(inner, "name", str)
    decoded = {**inner, "arguments": _decoded(inner.get("arguments", {}), dict, "arguments")}
    return decoded if inner is call else {**call, "function": decoded}


def _decoded(value: object, kind: type, field: str) -> object:
    """A list or object, which may be given as JSON in a string; None stays None."""
    if isinstance(value, str):
        try:
            value = not_too_deep(json.loads(value))
        except (ValueError, RecursionError):
            raise BadRecord(f"field {field!r} is a string, but not {kind_of(kind())} as JSON") from None
    if value is not None and not isinstance(value, kind):
        raise BadRecord(f"field {field!r} must be {kind_of(kind())}, got {kind_of(value)}")
    return value
