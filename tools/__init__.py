"""One-shot commands, `python -m tools.<name>`. Each has `main(argv) -> exit code`; `command` is what they share."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

from runtime.errors import UserError


def command(main: Callable[[Sequence[str]], int | None]) -> Callable[[Sequence[str]], int]:
    """A `main` that returns 0 for None, and turns a user's error into one line on stderr and exit code 2, as train.py does.

    So does an error of the system: a one-shot command that may not read or write what it is told to is told the wrong thing.
    """

    @functools.wraps(main)
    def guarded(argv: Sequence[str]) -> int:
        try:
            return main(argv) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            print(f"error: {UserError(f'{where}{error.strerror or error}')}", file=sys.stderr)
            return UserError.exit_code

    return guarded
