"""metrics.jsonl, the record of a run, and the trackers that are shown it.

The file is the truth: one JSON object per line, written by rank 0, a line at a time. A kill can tear the last line, so
readers drop it, and a resumed run drops every record after the step it resumes from before it writes them again. On a
disk that is full or read-only records are lost, with a warning, and the run goes on.

JSON has no NaN or infinity. Such a number is written as null, and `"nonfinite": {"loss": "nan"}` says what it was, so that
every line is valid JSON for every reader.

Trackers get the same records from a thread of their own: the network may hang or fail, training goes on. What fails is
said once, then that tracker gets nothing more.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import queue
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.errors import ConfigError, DataError, redact, shown
from runtime.files import open_to_append

QUEUE = 1000  # records a tracker may lag behind
CLOSE_S = 30.0  # how long the end of a run waits for trackers


class Metrics:
    """Writer of `<folder>/metrics.jsonl`. Make one on rank 0 only.

    Args:
        folder: the run's folder; trackers keep their files in `<folder>/trackers/`.
        trackers: names out of TRACKERS.
        config: flat config, shown by trackers; secrets are removed.
        project, name: of the run, in trackers that have these.
        warn: gets one line for each tracker that fails.
    """

    def __init__(
        self,
        folder: Path,
        trackers: Sequence[str] = (),
        config: dict[str, object] | None = None,
        project: str = "salamander",
        name: str | None = None,
        warn: Callable[[str], None] = print,
    ):
        check_trackers(trackers)
        self.path, self._warn, self._lost = folder / "metrics.jsonl", warn, False
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(self.path) and (self.path.is_symlink() or not self.path.is_file()):
            raise DataError("is not a regular file; move it away, the run's records go there", self.path)
        with _said_of(self.path):
            self._file = open_to_append(self.path)
            self._drop_torn_line()
        about = {"config": _clean(config or {}), "project": redact(project), "name": redact(name or folder.resolve().name)}
        self._trackers = [_Feed(tracker, TRACKERS[tracker], folder / "trackers", about, warn) for tracker in trackers]

    def write(self, record: dict[str, object]) -> None:
        """Appends one record: str keys; values JSON types, 0-dim tensors or arrays, dicts and lists of these; has a `step`."""
        found: dict[str, str] = {}
        record = _clean(record)
        clean = _clean(record, found)
        if found:
            clean["nonfinite"] = found
        line = json.dumps(clean, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            if self._lost:  # the disk that did not take the line before may hold a part of it
                self._drop_torn_line()
            problem = "" if self._file.write(line) == len(line) else os.strerror(errno.ENOSPC)
        except OSError as error:
            problem = error.strerror or str(error)
        if problem and not self._lost:
            self._warn(f"{self.path} cannot be written ({problem}); training goes on, records are lost")
        self._lost = bool(problem)
        for tracker in self._trackers:
            tracker.put(record)

    def rewind(self, step: int, evaluated: bool = True) -> None:
        """Drops the records after `step`, for a run that resumes there; -1 drops all. `evaluated`: keep the evaluation at `step`.

        Raises:
            DataError: a record's step is no number, or the file cannot be written.
        """

        def stays(record: dict | None, number: int) -> bool:
            at = (record or {}).get("step", step)
            if not isinstance(at, int | float):
                raise DataError(f"step={shown(at)} is not a number; mend or remove that line", self.path, number)
            return record is not None and at <= step and (evaluated or at < step or "eval_loss" not in record)

        kept = [line for number, line in enumerate(_lines(self.path), 1) if step >= 0 and stays(_parsed(line), number)]
        aside = self.path.with_suffix(".jsonl.tmp")
        with _said_of(self.path):
            aside.unlink(missing_ok=True)  # of a run that was killed here
            with open(aside, "xb") as file:
                file.writelines(kept)
                file.flush()
                os.fsync(file.fileno())
            self._file.close()
            os.replace(aside, self.path)
            self._file = open_to_append(self.path)
        for tracker in self._trackers:
            tracker.resumed_at = step

    def _drop_torn_line(self) -> None:
        """A line that a kill or a full disk cut short must not run into the next one."""
        end = self.path.read_bytes().rfind(b"\n") + 1
        self._file.truncate(end)

    def close(self) -> None:
        """Waits for the trackers, at most `CLOSE_S` in all."""
        with suppress(OSError):  # a network's file system may only now say that it took nothing
            self._file.close()
        for tracker in self._trackers:
            tracker.put(None)
        for tracker in self._trackers:
            tracker.join(CLOSE_S / len(self._trackers))


def read(path: str | Path) -> list[dict]:
    """The records of a metrics.jsonl. A torn last line is left out.

    Raises:
        DataError: another line is not a JSON object.
    """
    lines = _lines(Path(path))
    records = [_parsed(line) for line in lines]
    if records and records[-1] is None:
        records.pop()
    if None in records:
        raise DataError("is not a JSON object", path, records.index(None) + 1)
    return records


@contextmanager
def _said_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise DataError(f"cannot be written: {e.strerror or e}", path) from None


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def _parsed(line: bytes) -> dict | None:
    """The record of a line; None if it is torn."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _clean(value: object, found: dict[str, str] | None = None, name: str = "") -> object:
    """`value` as JSON types without secrets. With `found`, non-finite numbers become None and are noted there by dotted name."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, dict):
        return {key: _clean(item, found, f"{name}.{key}" if name else key) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item, found, f"{name}.{i}") for i, item in enumerate(value)]
    if isinstance(value, str):
        return redact(value)
    if found is not None and isinstance(value, float) and not math.isfinite(value):
        found[name] = str(value)
        return None
    return value


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError where a tracker's package is not installed. Imports nothing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"is not installed: pip install -e '.[{name}]'", "log.trackers", name)


def _numbers(record: dict[str, object], prefix: str = "") -> dict[str, float]:
    """The numbers of a record under names like `eval_loss/alpaca`."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            flat[f"{prefix}{key}"] = value
    return flat


class _TensorBoard:
    def __init__(self, folder: Path, resumed_at: int | None, config: dict, project: str, name: str):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=None if resumed_at is None else resumed_at + 1)
        self.writer.add_text("config", "\n".join(f"    {key} = {value}" for key, value in config.items()))

    def write(self, record: dict[str, object]) -> None:
        step = record.get("step")
        for key, value in _numbers(record).items():
            if key != "step":
                self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    """One run on the service per output folder, over all restarts: its id is kept in `trackers/wandb_id`."""

    def __init__(self, folder: Path, resumed_at: int | None, config: dict, project: str, name: str):
        import wandb

        kept = folder / "wandb_id"
        if resumed_at is None or not kept.exists():
            kept.write_text(uuid.uuid4().hex[:8])
        # no console output, code, or command line leaves the machine: only what this file has cleaned does
        private = wandb.Settings(console="off", disable_code=True, disable_git=True, x_disable_meta=True, silent=True, init_timeout=30)
        about = {"project": project, "name": name, "config": config, "id": kept.read_text(), "resume": "allow"}
        wandb.setup(private)  # silent before init: without a key init fails, instead of asking for one on the terminal
        self.run = wandb.init(dir=str(folder), settings=private, **about)
        # the service refuses steps that go back, as they do on resume; so the step is an axis, not its own count
        self.run.define_metric("*", step_metric="step")

    def write(self, record: dict[str, object]) -> None:
        self.run.log(_numbers(record))

    def close(self) -> None:
        self.run.finish()


TRACKERS = {"tensorboard": _TensorBoard, "wandb": _Wandb}


class _Feed(threading.Thread):
    """Carries records to one tracker, which is opened with the first of them. Never blocks, never raises."""

    def __init__(self, tracker: str, make: Callable, folder: Path, about: dict, warn: Callable[[str], None]):
        super().__init__(name=f"tracker-{tracker}", daemon=True)
        self.tracker, self.make, self.folder, self.about, self.warn = tracker, make, folder, about, warn
        self.resumed_at: int | None = None
        self._records: queue.Queue[dict | None] = queue.Queue(QUEUE)
        self._failed = False
        self.start()

    def put(self, record: dict | None) -> None:
        """Hands over a record; None ends."""
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._fail(f"is {QUEUE} records behind")

    def join(self, timeout: float | None = None) -> None:
        super().join(timeout)
        if self.is_alive():
            self._fail(f"did not finish within {timeout:.0f} s")

    def run(self) -> None:
        target = None
        while (record := self._records.get()) is not None:
            if self._failed:
                continue
            try:
                if target is None:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    target = self.make(self.folder, self.resumed_at, **self.about)
                target.write(record)
            except Exception as error:
                self._fail(f"failed: {type(error).__name__}: {error}")
        try:
            if target is not None and not self._failed:
                target.close()
        except Exception as error:
            self._fail(f"failed at its end: {type(error).__name__}: {error}")

    def _fail(self, problem: str) -> None:
        if not self._failed:
            self._failed = True
            first = problem.splitlines()[0]
            self.warn(redact(f"tracker {self.tracker} {first}; training goes on without it, metrics.jsonl has every record"))
