"""Messages, the live line, rank files, crashes and secrets."""

from __future__ import annotations

import errno
import io
import os
import pty
import re
import subprocess
import sys
import threading
import types

import pytest

from runtime.errors import ConfigError, redact
from runtime.log import CLEAR, Log, Progress, count, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """What a person sees: the last line is cleared by CLEAR."""
        rows = [""]
        for part in re.split(f"({re.escape(CLEAR)}|\n)", self.getvalue()):
            if part == CLEAR:
                rows[-1] = ""
            elif part == "\n":
                rows.append("")
            else:
                rows[-1] += part
        return rows


@pytest.fixture
def console(monkeypatch):
    def console(stream):
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return console


def lines(path) -> list[str]:
    """A log file without its header and the times."""
    return [line[9:] for line in path.read_text().splitlines()[1:]]


def test_messages(tmp_path, console):
    screen = console(io.StringIO())
    for rank in (0, 1):
        with Log(tmp_path, rank) as log:
            log(f"from {rank}\nsecond line")
            print("to stderr", end="", file=sys.stderr)
            print(" in pieces", file=sys.stderr)
            sys.stderr.write("10%\r 50%\r100%\n")
        assert sys.stderr is screen
        text = log.path.read_text()
        assert log.path == tmp_path / "logs" / f"rank_{rank}.log" and f"rank {rank} pid {os.getpid()}" in text
        assert lines(log.path)[2:4] == ["to stderr in pieces", "100%"]
    shown = screen.getvalue()
    assert "from 0\nsecond line\nto stderr in pieces\n" in shown and "from 1" not in shown
    with Log(tmp_path, 0) as log:
        log("more")
    assert "from 0" in log.path.read_text() and "more" in log.path.read_text(), "a resumed run adds to its log"
    with Log(None, 0) as log:
        log("no folder")
    assert "no folder" in screen.getvalue()


def test_the_live_line_is_redrawn_in_place(tmp_path, console, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    screen = console(Terminal())
    now = [0.0]
    with Log(tmp_path) as log:
        progress = Progress(log, steps=100, clock=lambda: now[0])
        for step in range(1, 31):
            now[0] += 2.0
            progress.step(step)
            if step == 10:
                progress.report({"step": 10, "eval_loss": 2.0, "eval_loss_by_source": {"a": 2.0}})
            if step % 10 == 0:
                progress.report({"step": step, "loss": step / 7, "lr": 1e-4, "grad_norm": 0.5, "tokens_per_s": 12345.0, "memory_gib": 3.14})
            if step == 15:
                log("a message")
                print("a warning", file=sys.stderr)
    assert screen.screen() == ["a message", "a warning", progress.line().replace("  eval loss 2.0000", ""), ""]
    assert progress.line() == "step 30/100  loss 4.2857  eval loss 2.0000  lr 1.00e-04  grad 0.5  12.3k tok/s  3.1 GiB  eta 2:20"
    assert [line.split("  ")[0] for line in lines(log.path)] == [
        "step 10/100",
        "step 10/100",
        "a message",
        "a warning",
        "step 20/100",
        "step 30/100",
    ]


def test_the_live_line_is_not_drawn_too_often(console):
    screen = console(Terminal())
    now = [0.0]
    with Log(None) as log:
        progress = Progress(log, steps=10000, clock=lambda: now[0])
        for step in range(1, 1001):
            now[0] += 0.001
            progress.step(step)
    assert 5 < screen.getvalue().count("\r") < 15


def test_a_long_live_line_does_not_wrap(console, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    screen = console(Terminal())
    with Log(None) as log:
        log.live("x" * 100, keep=False)
    assert screen.screen() == ["x" * 29, ""]


def test_plain_lines_without_a_terminal(tmp_path, console):
    screen = console(io.StringIO())
    with Log(tmp_path) as log:
        progress = Progress(log, steps=4)
        for step in range(1, 5):
            progress.step(step)
            if step % 2 == 0:
                progress.report({"step": step, "loss": 1.0})
    assert [line.split("  ")[0] for line in screen.getvalue().splitlines()] == ["step 2/4", "step 4/4"]
    assert "\r" not in screen.getvalue() and "\x1b" not in screen.getvalue()


def test_eta_leaves_out_the_first_step():
    now = [0.0]
    progress = Progress(Log(None, rank=1), steps=110, start=10, clock=lambda: now[0])
    now[0] += 500.0  # compiling
    progress.step(11)
    assert progress.eta_s() is None
    for step in (12, 13):
        now[0] += 2.0
        progress.step(step)
    assert progress.eta_s() == pytest.approx(97 * 2.0)


def test_units():
    assert [duration(s) for s in (0, 59.6, 245, 7445, 266645)] == ["0:00", "1:00", "4:05", "2:04:05", "3d 2:04:05"]
    assert [count(n) for n in (0, 950, 999.6, 12345, 4.56e6, 7.8e12)] == ["0", "950", "1k", "12.3k", "4.56M", "7.8e+03G"]


CRASH = """
import sys
from pathlib import Path
from runtime.errors import DataError
from runtime.log import Log
with Log(Path(sys.argv[1]), int(sys.argv[2])) as log:
    import os
    os.environ["X_TOKEN"] = "planted-in-a-crash"
    raise {"user": DataError("bad", "f", 3), "crash": RuntimeError("broken planted-in-a-crash\\nin two lines")}[sys.argv[3]]
"""


def test_crashes_are_in_the_file(tmp_path):
    def run(rank, kind):
        done = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path), str(rank), kind], capture_output=True, text=True)
        assert done.returncode == 1
        return done.stderr, (tmp_path / "logs" / f"rank_{rank}.log").read_text()

    shown, kept = run(0, "crash")
    assert "broken ***\nin two lines" in shown and "planted" not in shown.replace(CRASH, "") + kept
    assert shown.count("Traceback") == kept.count("Traceback") == 1
    shown, kept = run(1, "crash")
    assert shown == f"rank 1: RuntimeError: broken *** (traceback in {tmp_path}/logs/rank_1.log)\n" and "Traceback" in kept
    _, kept = run(2, "user")
    assert kept.endswith("f:3: bad\n") and "Traceback" not in kept


def test_on_a_real_terminal():
    """Through a pty: isatty, width and escapes are the terminal's."""
    code = "from runtime.log import Log, Progress\nwith Log(None) as log:\n p = Progress(log, 3)\n"
    code += " for s in (1, 2, 3): p.step(s); p.report({'loss': s})"
    leader, follower = pty.openpty()
    child = subprocess.Popen([sys.executable, "-c", code], stderr=follower)
    os.close(follower)
    shown = b""
    try:
        while part := os.read(leader, 4096):
            shown += part
    except OSError:  # the other end is closed
        pass
    os.close(leader)
    assert child.wait() == 0
    assert CLEAR.encode() in shown and b"step 3/3  loss 3.0000" in shown and shown.endswith(b"\r\n")


def test_no_secret_in_console_or_file(tmp_path, console, monkeypatch):
    screen = console(Terminal())
    secrets = {
        "HF_TOKEN": "planted-hub-token",
        "A_KEY": "planted\\key'\"",
        "B_SECRET": "planted-é",
        "C_PASSWORD": "planted pass word",
        "D_TOKEN": "planted",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    del secrets["D_TOKEN"]  # seven characters: too short to be told from a word
    with pytest.raises(ConfigError), Log(tmp_path) as log:
        for value in secrets.values():
            log(f"message {value}")
            log.live(f"live {value}", keep=True)
            print("stderr", value, file=sys.stderr)
            print(repr(value), file=sys.stderr)
        log("https://user:pw-of-url@host/path https://tok-of-url@host hf_" + "x" * 34)
        raise ConfigError("is wrong", "model.path", secrets["A_KEY"])
    text = screen.getvalue() + log.path.read_text()
    assert text.count("***") > 16
    for value in [*secrets.values(), *(repr(v)[1:-1] for v in secrets.values()), "pw-of-url", "tok-of-url", "xxxx"]:
        assert value not in text
    assert "https://***@host/path" in text
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "num_tokens")
    assert redact("num_tokens planted tokenizer") == "num_tokens planted tokenizer"


def test_names_of_strangers_control_no_terminal(tmp_path, console, monkeypatch):
    screen = console(Terminal())
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    hostile = "\x1b[2J\x07\x9b1m\u202e"
    with pytest.raises(KeyError), Log(tmp_path) as log:
        log(f"tensor {hostile} \x1b[1;32mtrained\x1b[0m\tis new\nline")
        log.live(f"live {hostile}", keep=True)
        log.last(f"last {hostile}", before=hostile)
        raise KeyError(hostile) from ValueError(hostile)
    sys.excepthook(ValueError, ValueError(hostile), None)
    shown = screen.getvalue()
    for text in (shown.replace(CLEAR, ""), log.path.read_text()):
        assert text.count("\x1b") == 2 and "\x1b[1;32mtrained\x1b[0m\tis new\nline" in text, "the colours of the preview"
        assert not set(text) & set("\x07\x9b\u202e")
        assert text.count("\\x1b[2J\\x07\\x9b1m\\u202e") >= 3


def test_a_broken_console_or_disk_stops_nothing(tmp_path, console):
    stream = console(io.StringIO())
    with Log(tmp_path) as log:
        stream.close()
        log("said to nobody")
        log._file.close()
        log._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        log("written nowhere")
        log._file.close()
        log._file = types.SimpleNamespace(write=refuse, close=refuse)
        log("written nowhere either")
    assert "said to nobody" in log.path.read_text()


def refuse(*args):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_threads_do_not_mix_lines(tmp_path, console):
    console(io.StringIO())
    with Log(tmp_path) as log:
        threads = [threading.Thread(target=lambda c=c: [log(c * 50) for _ in range(50)]) for c in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(len(set(line)) == 1 for line in lines(log.path)) and len(lines(log.path)) == 200


@pytest.mark.parametrize("kind", ["pipe", "pipe that is read", "link", "dangling link", "folder"])
def test_a_log_goes_into_a_file_of_its_folder(tmp_path, kind):
    """Not where a link leads, and not into a pipe, which would wait for its reader."""
    path, outside = tmp_path / "run" / "logs" / "rank_0.log", tmp_path / "outside"
    path.parent.mkdir(parents=True)
    reader = None
    if kind == "folder":
        path.mkdir()
    elif kind.startswith("pipe"):
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK) if "read" in kind else None
    else:
        path.symlink_to(outside)
        if kind == "link":
            outside.write_text("as it was")
    what = {"folder": "Is a directory", "link": "it is a link", "dangling link": "it is a link"}.get(kind, "it is no regular file")
    with pytest.raises(ConfigError) as caught:
        Log(tmp_path / "run")
    assert str(caught.value) == f"output.path={str(tmp_path / 'run')!r} cannot be written to ({what}: {path})"
    assert outside.read_text() == "as it was" if kind == "link" else not outside.exists()
    if reader is not None:
        os.close(reader)
