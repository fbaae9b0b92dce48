"""Errors a user can fix, and what may be shown of them. Standard library only: every package of the project may import this file.

A command prints such an error as one line, without a traceback, and exits with code 2 (see `parallel/start.py` for
how several ranks agree on it). Everything else that is raised is a crash of ours and keeps its traceback. The text of
an error shows no secret (`redact`), whatever it quotes.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

MAX_LINE = 2000  # characters of a message
_ABSENT = object()
_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|APIKEY|(^|_)KEY)$", re.IGNORECASE)
_SECRET_SHAPE = re.compile(r"(?<=://)[^/\s@]+(?=@)|\bhf_[A-Za-z0-9]{30,}\b")


def redact(text: str) -> str:
    """`text` with `***` in place of secrets: values of environment variables named like one, user:password in URLs, hub tokens.

    Secrets are found by value, because a name says little ("token" is in `tokenizer` and `num_tokens`). Values below 8
    characters are left alone: they would match ordinary words.
    """
    secrets = {v.strip() for name, v in os.environ.items() if _SECRET_NAME.search(name) and len(v.strip()) >= 8}
    for secret in sorted(secrets, key=len, reverse=True):
        for form in (secret, repr(secret)[1:-1], json.dumps(secret)[1:-1]):  # as it is, and as error messages and JSON escape it
            text = text.replace(form, "***")
    return _SECRET_SHAPE.sub("***", text)


def printable(text: str, kept: str = "") -> str:
    """`text` with escapes in place of what could control a terminal or reorder what it shows: all that is not printable but `kept`.

    Names, roles and messages in files may be a stranger's.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


def clean(text: object, limit: int = 300) -> str:
    """Somebody else's message within one of ours: on one line, without secrets (looked for before anything is cut off), and short."""
    text = printable(" ".join(redact(str(text)).split()))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def shown(value: object) -> str:
    """`value` for a message: on one line, spelled as in TOML where that differs, and short."""
    if isinstance(value, bool):
        return str(value).lower()
    text = printable(redact(value.isoformat() if hasattr(value, "isoformat") else repr(value)))  # before half of a secret is cut off
    return text if len(text) <= 80 else text[:77] + "..."


def _one_line(text: str) -> str:
    """`text` without secrets as one line that is not endless, whatever names and values of strangers it quotes."""
    text = printable(redact(text))
    return text if len(text) <= MAX_LINE else f"{text[: MAX_LINE // 2]} ... {text[-MAX_LINE // 2 :]}"


class UserError(Exception):
    """Something outside the code is wrong: the config, the data or a model folder. One line; says what to change."""

    exit_code = 2

    def __str__(self) -> str:
        return _one_line(super().__str__())


class ConfigError(UserError):
    """A config key has a value that cannot work.

    Args:
        message: what is wrong and what to do, as the rest of a sentence that starts with `key=value`.
        key: dotted key relative to the object that raises, e.g. `"rank"`; the loader prefixes its section.
        value: the offending value; shown after the key when given.
        where: `file:line` or "command line"; shown first. The loader fills it in.
    """

    def __init__(self, message: str, key: str | None = None, value: object = _ABSENT, where: str | None = None):
        super().__init__(message)
        self.message, self.key, self.value, self.where = message, key, value, where

    def under(self, prefix: str) -> ConfigError:
        """The same error with its key inside section `prefix`."""
        key = f"{prefix}.{self.key}" if self.key else prefix
        return ConfigError(self.message, key, self.value, self.where)

    def at(self, where: str) -> ConfigError:
        """The same error with the place it comes from."""
        return ConfigError(self.message, self.key, self.value, where)

    def __str__(self) -> str:
        if self.key is None:
            text = self.message
        elif self.value is _ABSENT:
            text = f"{self.key}: {self.message}"
        else:
            text = f"{self.key}={shown(self.value)} {self.message}"
        return _one_line(f"{self.where}: {text}" if self.where else text)


class DataError(UserError):
    """A data file or record is wrong. `where` is shown as `file` or `file:line`."""

    def __init__(self, message: str, path: str | Path | None = None, line: int | None = None):
        self.message, self.path, self.line = printable(message), path, line
        where = "" if path is None else f"{path}: " if line is None else f"{path}:{line}: "
        super().__init__(f"{where}{message}")


class StepError(UserError):
    """Training cannot go on: steps are not finite, or nothing is learned (runtime/guard.py). Nothing of it is a mistake in the config
    for sure, so it is a failure of the run (exit code 1); but a traceback would say nothing."""

    exit_code = 1


class ModelError(UserError):
    """A model folder, adapter or checkpoint is wrong or does not fit. `path` names the file."""

    def __init__(self, message: str, path: str | Path | None = None):
        super().__init__(message if path is None else f"{path}: {message}")
