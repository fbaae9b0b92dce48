"""Errors a user can fix. Standard library only: every package of the project may import this file.

A command prints such an error as one line, without a traceback, and exits with code 2 (see `parallel/start.py` for
how several ranks agree on it). Everything else that is raised is a crash of ours and keeps its traceback.
"""

from __future__ import annotations

from pathlib import Path

_ABSENT = object()


class UserError(Exception):
    """Something outside the code is wrong: the config, the data or a model folder. One line; says what to change."""

    exit_code = 2


class ConfigError(UserError):
    """A config key has a value that cannot work.

    Args:
        message: what is wrong and what to do, as the rest of a sentence that starts with `key=value`.
        key: dotted key relative to the object that raises, e.g. `"rank"`; the loader prefixes its section.
        value: the offending value; shown after the key when given.
    """

    def __init__(self, message: str, key: str | None = None, value: object = _ABSENT):
        super().__init__(message)
        self.message, self.key, self.value = message, key, value

    def under(self, prefix: str) -> ConfigError:
        """The same error with its key inside section `prefix`."""
        key = f"{prefix}.{self.key}" if self.key else prefix
        return ConfigError(self.message, key, self.value)

    def __str__(self) -> str:
        if self.key is None:
            return self.message
        if self.value is _ABSENT:
            return f"{self.key}: {self.message}"
        shown = str(self.value).lower() if isinstance(self.value, bool) else repr(self.value)
        return f"{self.key}={shown} {self.message}"


class DataError(UserError):
    """A data file or record is wrong. `where` is shown as `file` or `file:line`."""

    def __init__(self, message: str, path: str | Path | None = None, line: int | None = None):
        where = "" if path is None else f"{path}: " if line is None else f"{path}:{line}: "
        super().__init__(f"{where}{message}")


class ModelError(UserError):
    """A model folder, adapter or checkpoint is wrong or does not fit. `path` names the file."""

    def __init__(self, message: str, path: str | Path | None = None):
        super().__init__(message if path is None else f"{path}: {message}")
