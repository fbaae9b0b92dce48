"""metrics.jsonl under kills, restarts, full disks and odd numbers; trackers that fail or hang."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

from runtime import metrics
from runtime.errors import ConfigError, DataError
from runtime.metrics import Metrics, read


def test_lines_are_json_and_come_back(tmp_path):
    m = Metrics(tmp_path)
    m.write({"step": 1, "loss": 0.1 + 0.2, "name": "é\n", "sources": {"a.b": 1.5}})
    m.write({"step": 2, "loss": np.float32(0.5), "grad_norm": np.array(2.0)})
    assert len(read(m.path)) == 2, "a record is in the file as soon as it is written"
    m.close()
    assert read(m.path) == [
        {"step": 1, "loss": 0.1 + 0.2, "name": "é\n", "sources": {"a.b": 1.5}},
        {"step": 2, "loss": 0.5, "grad_norm": 2.0},
    ]


def test_nonfinite_numbers_stay_json(tmp_path):
    m = Metrics(tmp_path)
    m.write({"step": 1, "loss": math.nan, "grad_norm": np.float32("inf"), "sources": {"a": -math.inf, "b": 1.0}, "list": [1.0, math.nan]})
    line = m.path.read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["loss"] is None and record["sources"] == {"a": None, "b": 1.0} and record["list"] == [1.0, None]
    assert record["nonfinite"] == {"loss": "nan", "grad_norm": "inf", "sources.a": "-inf", "list.1": "nan"}


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3}', b'"text"\n', b"\x00\x00\x00", b"{\xff\n"])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    m = Metrics(tmp_path)
    m.write({"step": 1})
    m.write({"step": 2})
    m.close()
    with open(m.path, "ab") as file:
        file.write(torn)
    assert [r["step"] for r in read(m.path)] == [1, 2]


def test_a_damaged_line_in_between_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: is not a JSON object"):
        read(tmp_path / "metrics.jsonl")


def test_resume_rewinds_what_comes_after(tmp_path):
    m = Metrics(tmp_path)
    for step in range(1, 6):
        m.write({"step": step, "loss": step})
        m.write({"step": step, "eval_loss": step})
    m.close()
    with open(m.path, "ab") as file:
        file.write(b'{"step": 6, "loss"')
    again = Metrics(tmp_path)
    again.rewind(3)
    again.write({"step": 4, "loss": 40})
    again.close()
    records = read(m.path)
    assert [r["step"] for r in records] == [1, 1, 2, 2, 3, 3, 4] and records[-1]["loss"] == 40
    again = Metrics(tmp_path)
    again.rewind(3, evaluated=False)  # that evaluation is made once more
    assert [(r["step"], "eval_loss" in r) for r in read(m.path)] == [(1, False), (1, True), (2, False), (2, True), (3, False)]
    fresh = Metrics(tmp_path)
    fresh.rewind(-1)
    assert read(m.path) == []


@pytest.mark.parametrize("step", ['"x"', "null", "[1]", "{}"])
def test_a_step_that_is_no_number_is_named(tmp_path, step):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{{"step": {step}}}\n{{"step": 3}}\n')
    m = Metrics(tmp_path)
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: step=.* is not a number; mend or remove that line$"):
        m.rewind(3)
    assert len(m.path.read_text().splitlines()) == 3
    m.rewind(-1)  # which keeps none of them
    assert m.path.read_text() == ""


def test_a_line_of_many_brackets_is_torn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + "[" * 10**5 + "\n")
    Metrics(tmp_path).rewind(3)
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1}]


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "dangling link", "no room"])
def test_records_that_cannot_go_there(tmp_path, monkeypatch, kind):
    path = tmp_path / "metrics.jsonl"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif "link" in kind:
        path.symlink_to(tmp_path / "outside")
        if kind == "link":
            (tmp_path / "outside").write_text("")
    if kind != "no room":
        with pytest.raises(DataError, match=r"metrics\.jsonl: is not a regular file; move it away"):
            Metrics(tmp_path)
        return

    def full(fd):
        raise OSError(28, "No space left on device")

    m = Metrics(tmp_path)
    m.write({"step": 1})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"metrics\.jsonl: cannot be written: No space left on device"):
        m.rewind(0)
    assert read(path) == [{"step": 1}]


def test_what_is_written_aside_goes_nowhere_else(tmp_path):
    m = Metrics(tmp_path)
    m.write({"step": 1})
    (tmp_path / "metrics.jsonl.tmp").symlink_to(tmp_path / "outside")
    m.rewind(1)
    m.write({"step": 2})
    assert read(m.path) == [{"step": 1}, {"step": 2}] and not (tmp_path / "outside").exists()


def test_a_torn_line_does_not_run_into_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    m = Metrics(tmp_path)
    m.write({"step": 2})
    assert read(m.path) == [{"step": 1}, {"step": 2}]


def test_kill_at_any_moment(tmp_path):
    """SIGKILL while writing: what is on disk reads, without a gap."""
    code = "import sys\nfrom pathlib import Path\nfrom runtime.metrics import Metrics\nm = Metrics(Path(sys.argv[1]))\n"
    code += "for i in range(10**9): m.write({'step': i, 'pad': 'x' * 5000})"
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    path = tmp_path / "metrics.jsonl"
    while not (path.exists() and path.stat().st_size > 200_000):
        time.sleep(0.01)
        assert child.poll() is None
    child.kill()
    child.wait()
    steps = [r["step"] for r in read(path)]
    assert len(steps) > 10 and steps == list(range(len(steps)))


class Refusing:
    """A file on a disk that takes `room` bytes more, then nothing; read-only, it cannot be cut either, nor closed."""

    def __init__(self, real, number: int, room: int = 0):
        self.real, self.number, self.room = real, number, room

    def write(self, data):
        if not self.room:
            raise OSError(self.number, os.strerror(self.number))
        written, self.room = self.real.write(data[: self.room]), 0
        return written

    def truncate(self, size):
        if self.number == errno.EROFS:
            raise OSError(self.number, os.strerror(self.number))
        return self.real.truncate(size)

    def close(self):
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("room", [0, 8])
def test_a_disk_that_refuses_loses_records_and_nothing_else(tmp_path, number, room):
    warnings = []
    m = Metrics(tmp_path, warn=warnings.append)
    m.write({"step": 1})
    real = m._file
    m._file = Refusing(real, number, room)
    m.write({"step": 2})
    assert [r["step"] for r in read(m.path)] == [1]
    m.write({"step": 3})
    m._file = real
    m.write({"step": 4})
    assert [r["step"] for r in read(m.path)] == [1, 4]
    reason = os.strerror(errno.ENOSPC if room else number)  # of a part of a line nobody says why
    assert warnings == [f"{m.path} cannot be written ({reason}); training goes on, records are lost"]
    m._file = Refusing(real, number)
    m.write({"step": 5})
    assert len(warnings) == 2, "it is said again once some were written"
    m.close()


@pytest.fixture
def tracker(monkeypatch):
    """A tracker that behaves as told: `tracker.on_write` is called with each record."""
    double = types.SimpleNamespace(made=[], records=[], closed=0, on_write=lambda record: None)

    class Double:
        def __init__(self, folder, resumed_at, **about):
            double.made.append((resumed_at, about))

        def write(self, record):
            double.on_write(record)
            double.records.append(record)

        def close(self):
            double.closed += 1

    monkeypatch.setitem(metrics.TRACKERS, "wandb", Double)
    monkeypatch.setattr(metrics, "check_trackers", lambda names: None)
    return double


def test_trackers_get_every_record(tmp_path, tracker):
    m = Metrics(tmp_path, ["wandb"], {"optim.lr": 1.0}, project="p", name=None)
    m.rewind(7)
    m.write({"step": 8, "loss": np.float32("nan")})
    m.close()
    assert tracker.made == [(7, {"config": {"optim.lr": 1.0}, "project": "p", "name": tmp_path.name})] and tracker.closed == 1
    assert tracker.records[0]["step"] == 8 and math.isnan(tracker.records[0]["loss"])


def test_a_tracker_that_fails_warns_once(tmp_path, tracker):
    warnings = []
    m = Metrics(tmp_path, ["wandb"], warn=warnings.append)

    def fail(record):
        raise RuntimeError("network\nis down")

    tracker.on_write = fail
    for step in range(20):
        m.write({"step": step})
    m.close()
    assert len(read(m.path)) == 20 and not tracker.records
    assert warnings == ["tracker wandb failed: RuntimeError: network; training goes on without it, metrics.jsonl has every record"]


def test_a_tracker_that_hangs_holds_nothing_up(tmp_path, tracker, monkeypatch):
    monkeypatch.setattr(metrics, "CLOSE_S", 0.2)
    monkeypatch.setattr(metrics, "QUEUE", 5)
    warnings, release = [], threading.Event()
    tracker.on_write = lambda record: release.wait(60)
    began = time.perf_counter()
    m = Metrics(tmp_path, ["wandb"], warn=warnings.append)
    for step in range(50):
        m.write({"step": step})
    m.close()
    assert time.perf_counter() - began < 10 and len(read(m.path)) == 50 and len(warnings) == 1
    release.set()


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"log\.trackers='wandb' is not installed: pip install -e '\.\[wandb\]'"):
        Metrics(tmp_path, ["wandb"])


def test_no_secret_in_any_output(tmp_path, tracker, monkeypatch):
    secrets = {
        "HF_TOKEN": "planted-hub-token",
        "WANDB_API_KEY": 'planted "quoted" \\ key',
        "MY_SECRET": "planted\ttab",
        "X_PASSWORD": "planted-é-ü",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    config = {"model.path": "https://user:planted-pw@host/x", "a": [f"x {secrets['HF_TOKEN']} y"], "b": "hf_" + "planted" * 6}
    m = Metrics(tmp_path, ["wandb"], config, name=secrets["MY_SECRET"])
    for value in secrets.values():
        m.write({"step": 1, "text": value, "deep": {"list": [value]}})
    m.close()
    assert len(tracker.records) == 4
    assert "planted" not in m.path.read_text() + repr(tracker.made) + repr(tracker.records)
    assert "https://***@host/x" in repr(tracker.made)


def stub(monkeypatch, name: str, **attributes) -> list:
    """Puts a module in place of a library; returns the calls it gets, as (name, args, kwargs)."""
    calls = []

    class Target:
        def __getattr__(self, method):
            return lambda *args, **kwargs: calls.append((method, args, kwargs))

    def make(called):
        def record(*args, **kwargs):
            calls.append((called, args, kwargs))
            return Target()

        return record

    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**{key: make(key) for key in attributes}))
    monkeypatch.setattr(metrics, "check_trackers", lambda names: None)
    return calls


def test_tensorboard(tmp_path, monkeypatch):
    calls = stub(monkeypatch, "torch.utils.tensorboard", SummaryWriter=True)
    m = Metrics(tmp_path, ["tensorboard"], {"a": 1}, warn=pytest.fail)
    m.rewind(3)
    m.write({"step": 4, "loss": 1.5, "note": "x", "eval_loss": {"a": 2.0}})
    m.close()
    assert calls[0] == ("SummaryWriter", (str(tmp_path / "trackers" / "tensorboard"),), {"purge_step": 4})
    assert [args for name, args, _ in calls if name == "add_scalar"] == [("loss", 1.5, 4), ("eval_loss/a", 2.0, 4)]
    assert calls[-1][0] == "close"


def test_wandb_continues_its_run(tmp_path, monkeypatch):
    ids = []
    for resumed_at in (None, 3, None):
        calls = stub(monkeypatch, "wandb", init=True, setup=True, Settings=True)
        m = Metrics(tmp_path, ["wandb"], {"a": 1}, project="p", warn=pytest.fail)
        if resumed_at is not None:
            m.rewind(resumed_at)
        m.write({"step": 4, "loss": 1.5, "eval_loss": {"a": 2.0}})
        m.close()
        assert [name for name, _, _ in calls] == ["Settings", "setup", "init", "define_metric", "log", "finish"]
        init = calls[2][2]
        assert init["project"] == "p" and init["name"] == tmp_path.name and init["config"] == {"a": 1} and init["resume"] == "allow"
        assert calls[4][1] == ({"step": 4, "loss": 1.5, "eval_loss/a": 2.0},)
        ids.append(init["id"])
    assert ids[0] == ids[1] != ids[2], "a resumed run goes on in the same run of the service, a fresh one does not"
