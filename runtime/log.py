"""What a run says: messages, a live progress line, and a log file for every rank.

    with Log(folder, rank) as log:
        log("model: 1.2 B parameters")            # logs/rank_<n>.log; on rank 0 the console too
        progress = Progress(log, steps=1000)
        progress.step(step)                       # every step: redraws the line on a terminal
        progress.report(record)                   # when there are new numbers: one line in the log

The console is stderr. Inside the `with`, what Python writes to stderr (warnings, progress bars, prints of libraries) goes
to the rank's file as well, and only rank 0 shows it. A crash leaves its traceback in the file; a rank other than 0 then
says on the console only which file that is. What C++ libraries write to the file descriptor itself is not seen here.

Secrets of the environment are replaced in all of it (`redact`). What could control the terminal is escaped in messages and
tracebacks, which quote names of strangers; what else is written to stderr reaches the console as it is. A disk that is full or
read-only, or a closed console, stops the log, not the run.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from runtime.errors import ConfigError, UserError, printable, redact
from runtime.files import open_to_append

REDRAW_S = 0.1
CLEAR = "\r\x1b[K"  # to the start of the line, and erase it
_COLOURS = re.compile("(\x1b\\[1;32m|\x1b\\[0m)")  # of the preview of documents


class Log:
    """Messages of one rank; calling it says one.

    Args:
        folder: the run's folder, for `logs/rank_<n>.log`; None writes no file.
        rank: of this process; rank 0 owns the console.
    """

    def __init__(self, folder: Path | None, rank: int = 0):
        self.rank = rank
        self.path = None if folder is None else folder / "logs" / f"rank_{rank}.log"
        self._console = sys.stderr
        self.is_terminal = rank == 0 and self._console.isatty()
        self._file = None
        self._live = False  # the terminal's last line is the progress line
        self._unfinished = ""  # of stderr: a line without its end
        self._lock = threading.RLock()  # trackers and checkpoint writers speak from their threads
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open_to_append(self.path)
            except OSError as error:
                raise ConfigError(f"cannot be written to ({error.strerror}: {error.filename})", "output.path", str(folder)) from None
            self._to_file(f"-- {time.strftime('%Y-%m-%d')} rank {rank} pid {os.getpid()}")

    def __call__(self, message: str) -> None:
        """Says `message`: in the file, and on the console of rank 0."""
        with self._lock:
            self._to_file(message)
            self._to_console(f"{_safe(message)}\n")

    def live(self, line: str, keep: bool) -> None:
        """Shows `line` as the last line of the terminal until something replaces it.

        With `keep` it is a line of the file as well, and of a console that is no terminal.
        """
        with self._lock:
            if keep:
                self._to_file(line)
            if self.is_terminal:
                self._to_console(_safe(line)[: shutil.get_terminal_size().columns - 1])
                self._live = True
            elif keep:
                self._to_console(f"{_safe(line)}\n")

    def settle(self) -> None:
        """Leaves the progress line where it is; what follows goes below it."""
        with self._lock:
            if self._live:
                self._live = False
                self._to_console("\n")

    def last(self, line: str, before: str) -> None:
        """The last line of a process that ends here, on the console of any rank; in the file, what led there comes `before` it."""
        self.settle()
        with self._lock:
            self._to_file(f"{before.rstrip()}\n{line}")
            with contextlib.suppress(OSError, ValueError):
                print(_safe(redact(line)), file=self._console, flush=True)

    def __enter__(self) -> Log:
        sys.stderr = _Stderr(self, self._console)
        return self

    def __exit__(self, kind, error, trace) -> None:
        sys.stderr = self._console
        self.settle()
        if self._unfinished:
            self._to_file(self._unfinished)
        if isinstance(error, UserError):
            self._to_file(str(error))
        elif error is not None:
            self._to_file("".join(traceback.format_exception(kind, error, trace)).rstrip())
            sys.excepthook = self._last_words
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _last_words(self, kind: type[BaseException], error: BaseException, trace) -> None:
        """`sys.excepthook` after a crash. Several tracebacks at once are none: only rank 0 shows its own."""
        text = "".join(traceback.format_exception(kind, error, trace)).rstrip()
        if self.rank and self.path:
            text = f"rank {self.rank}: {kind.__name__}: {(str(error).splitlines() or [''])[0]} (traceback in {self.path})"
        print(_safe(redact(text)), file=self._console)

    def _stderr(self, text: str) -> None:
        """Text that something wrote to stderr: to the console at once, to the file when its line is complete."""
        with self._lock:
            self._to_console(text)
            *lines, self._unfinished = (self._unfinished + text).split("\n")
            for line in lines:
                self._to_file(line.rstrip("\r").rpartition("\r")[2])  # of a progress bar, what it showed last

    def _to_file(self, text: str) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.write(f"{time.strftime('%H:%M:%S')} {_safe(redact(text))}\n".encode(errors="backslashreplace"))

    def _to_console(self, text: str) -> None:
        if self.rank == 0:
            with contextlib.suppress(OSError, ValueError):  # ValueError: closed
                self._console.write((CLEAR if self._live else "") + redact(text))
                self._console.flush()
            self._live = False


def _safe(text: str) -> str:
    parts = _COLOURS.split(text)
    return "".join(part if i % 2 else printable(part, kept="\n\t") for i, part in enumerate(parts))


class _Stderr:
    """Stands in for sys.stderr while a Log is open."""

    def __init__(self, log: Log, console):
        self._log, self._console = log, console

    def write(self, text: str) -> int:
        self._log._stderr(text)
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return self._log.is_terminal

    def __getattr__(self, name: str):
        return getattr(self._console, name)


class Progress:
    """The line that says how far a run is, its numbers, and when it will end.

    Args:
        steps: of the whole run; start: steps done before this process (a resumed run).
    """

    WINDOW = 100  # steps over which the pace is taken

    def __init__(self, log: Log, steps: int, start: int = 0, clock: Callable[[], float] = time.monotonic):
        self.log, self.steps, self.at, self.clock = log, steps, start, clock
        self._ends: collections.deque[tuple[float, int]] = collections.deque(maxlen=self.WINDOW)
        self._drawn = float("-inf")
        self._numbers: dict[str, object] = {}

    def step(self, step: int) -> None:
        """Step `step` is done. Costs nothing where there is no terminal."""
        now = self.clock()
        self.at = step
        self._ends.append((now, step))
        if self.log.is_terminal and now - self._drawn >= REDRAW_S:
            self._drawn = now
            self.log.live(self.line(), keep=False)

    def report(self, record: dict[str, object]) -> None:
        """Puts a metrics record into the log as one line; the terminal shows the newest number of each kind from then on."""
        self._numbers |= record
        self.log.live(self.line(record), keep=True)

    def line(self, record: dict[str, object] | None = None) -> str:
        numbers = self._numbers if record is None else record
        parts = [f"step {self.at}/{self.steps}"]
        parts += [form(numbers[key]) for key, form in _SHOWN.items() if numbers.get(key) is not None]
        if (eta := self.eta_s()) is not None:
            parts.append(f"eta {duration(eta)}")
        return "  ".join(parts)

    def eta_s(self) -> float | None:
        """Seconds to the end at the pace of the last steps; the first step, which compiles and allocates, does not count."""
        if len(self._ends) < 2:
            return None
        (t0, first), (t1, last) = self._ends[0], self._ends[-1]
        return (self.steps - self.at) * (t1 - t0) / max(last - first, 1)


_SHOWN: dict[str, Callable[[float], str]] = {
    "loss": lambda v: f"loss {v:.4f}",
    "eval_loss": lambda v: f"eval loss {v:.4f}",
    "lr": lambda v: f"lr {v:.2e}",
    "grad_norm": lambda v: f"grad {v:.3g}",
    "tokens_per_s": lambda v: f"{count(v)} tok/s",
    "memory_gib": lambda v: f"{v:.1f} GiB",
}


def duration(seconds: float) -> str:
    """`4:05`, `2:04:05` or `3d 2:04:05`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return (f"{days}d " if days else "") + (f"{h}:{m:02}:{s:02}" if hours else f"{m}:{s:02}")


def count(number: float) -> str:
    """`950`, `12.3k`, `4.56M`: three digits."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 999.5 or unit == "G":
            break
        number /= 1000
    return f"{number:.3g}{unit}"
