"""Planted secrets: in the environment, in config fields, in data and in what goes wrong. None is in anything a run leaves behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import train
from data.config import DataConfig, SourceConfig
from data.prepare import prepare
from data.tokenizer import Tokenizer
from runtime import metrics
from runtime.config import load, parse_args
from runtime.errors import UserError, redact
from tests import launch
from tests.tiny import write_chats, write_config, write_model
from train import RunConfig

SECRETS = {  # all hold PLANTED, which is looked for; and what JSON, TOML, repr and URLs would write differently
    "HF_TOKEN": "hf_PLANTEDplantedPLANTEDplantedPLANTED00",
    "WANDB_API_KEY": "PLANTED0123456789abcdef0123456789abcdef01",
    "AWS_SECRET_ACCESS_KEY": "PLANTED/+wJalrXUtnFEMI/K7MDENGbPxRfiCY+a",
    "MY_PASSWORD": 'PLANTED "quoted" \\ back',
    "DB_PASSWD": "PLANTED-ünï-码",
    "SERVICE_TOKEN": "PLANTED\ttab",
    "A_SECRET": "  PLANTED spaces around  ",
    "OPENAI_API_KEY": "sk-PLANTED-project",
    "PGPASSWORD": "PLANTED-no-underscore",
    "MYAPIKEY": "PLANTED-nor-here",
    "ghtoken": "PLANTED-in-small-letters",
    "NOTASECRET": "PLANTED-as-the-name-ends-so",
    "KEY": "PLANTED-a-word-of-its-own",
}
URL = "https://someone:PLANTEDpw@host/org/model"  # in no variable: known by its shape, as is a hub token
HUB = "hf_" + "PLANTED" * 5
EXTRA = """
[train]
steps = 4
[checkpoint]
every = 2
[eval]
split = 0.2
every = 2
[log]
every = 1
trackers = ["wandb"]
name = "visible-name"
[lora]
rank = 2
"""


@pytest.fixture
def base(tmp_path, monkeypatch):
    assert len({*SECRETS.values(), URL, HUB}) == 15
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return write_model(tmp_path / "model"), write_chats(tmp_path / "data.jsonl", 30)


@pytest.fixture
def tracker(tmp_path, monkeypatch):
    """A tracker that writes down what it is given."""

    class Double:
        def __init__(self, folder, resumed_at, **about):
            self.path = tmp_path / "out" / "tracked.txt"
            self.write(about)

        def write(self, record):
            with open(self.path, "a") as file:
                file.write(repr(record))

        def close(self):
            self.write("closed")

    monkeypatch.setitem(metrics.TRACKERS, "wandb", Double)
    monkeypatch.setattr(metrics, "check_trackers", lambda names: None)
    monkeypatch.setattr(train, "check_trackers", lambda names: None, raising=False)


def found(folder: Path, word: bytes = b"PLANTED") -> list[str]:
    """Files below `folder` that hold the word, as it is or in UTF-16."""
    forms = (word, word.decode().encode("utf-16-le"))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [str(path.relative_to(folder)) for path in files if any(form in path.read_bytes() for form in forms)]


def test_a_run_leaves_none(base, tmp_path, tracker):
    """Logs, metrics, what trackers get, checkpoints, the export, caches, the console: of a run, and of one that resumes it."""
    config = write_config(tmp_path / "c.toml", *base, tmp_path / "out", EXTRA)
    for steps in (4, 6):
        ranks = launch.run(["--config", str(config), f"--train.steps={steps}", "--checkpoint.allow_change=true"], 2, tmp_path / "console")
        assert ranks.wait() == [0, 0], ranks.output()
    names = {path.name for path in (tmp_path / "out").rglob("*")}
    assert {"resolved.toml", "metrics.jsonl", "rank_0.log", "MANIFEST.json", "adapter_config.json", "tracked.txt"} <= names
    assert found(tmp_path) == []
    seen = {name.split("/")[-1] for name in found(tmp_path, b"visible-name")}  # what is no secret is in them
    assert {"resolved.toml", "MANIFEST.json", "tracked.txt"} <= seen


FIELDS = ("model.path", "model.revision", "data.sources.0.name", "data.template_args.key", "output.path", "log.project", "log.name")


def said(work) -> str:
    with pytest.raises(UserError) as caught:
        work()
    assert "PLANTED" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("field", FIELDS)
def test_a_config_that_holds_one_is_refused_without_saying_it(base, tmp_path, field):
    config = write_config(tmp_path / "c.toml", *base, tmp_path / "out", EXTRA)
    for secret in (*SECRETS.values(), URL, HUB):
        for value in (secret.strip(), f"x {secret.strip()} y"):
            text = said(lambda: load(RunConfig, config, [f"--{field}={json.dumps(value, ensure_ascii=False)}"]))  # noqa: B023
            assert "holds a secret" in text and field in text


def test_errors_that_quote_one_do_not_say_it(base, tmp_path):
    """A role, a field and a key of data; a value, a key and a word of the command line; alone and where a long text is cut."""
    config = write_config(tmp_path / "c.toml", *base, tmp_path / "out")
    tokenizer = Tokenizer.load(base[0])
    for secret in map(str.strip, SECRETS.values()):
        for row in (
            {"messages": [{"role": secret, "content": "x"}]},
            {secret: 1},
            {"messages": [{"x" * 50 + secret: "x"}]},
            {"a" * 70 + secret: 1},
        ):
            for ascii_only in (False, True):
                path = tmp_path / "bad.jsonl"
                path.write_text(json.dumps(row, ensure_ascii=ascii_only), encoding="utf-8")
                cfg = DataConfig(sources=(SourceConfig(path=str(path), format="chat"),))
                assert "bad.jsonl:1: " in said(lambda: prepare(cfg, cfg.sources, tokenizer, tmp_path / "cache", 0))  # noqa: B023
        for word in (f"--optim.lr={secret}", f"--{secret}=1", secret, f"--lora.targets=['{'x' * 100}{secret}", f"--{'x' * 110}{secret}=1"):
            said(lambda: parse_args(RunConfig, ["--config", str(config), word]))  # noqa: B023


def test_what_is_said_of_records_left_out_says_none(base, tmp_path):
    """data.on_bad = "skip": the report, the cache that keeps its reasons, and the error when there are too many."""
    tokenizer, path = Tokenizer.load(base[0]), tmp_path / "some.jsonl"
    rows = [{"messages": [{"role": secret.strip(), "content": "x"}]} for secret in (*SECRETS.values(), URL, HUB)]
    rows += [{secret.strip(): 1} for secret in SECRETS.values()] + [json.loads(line) for line in base[1].read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    cfg = DataConfig(sources=(SourceConfig(path=str(path), format="chat"),), on_bad="skip", max_bad=0.5)
    report = prepare(cfg, cfg.sources, tokenizer, tmp_path / "cache", 0).report()
    assert "28 of 58 records are wrong" in report and "***" in report and "PLANTED" not in report
    assert found(tmp_path / "cache") == []
    few = replace(cfg, max_bad=0.1)
    assert "28 of 58 records are wrong" in said(lambda: prepare(few, few.sources, tokenizer, tmp_path / "cache", 0))


def test_a_crash_says_none(base, tmp_path, monkeypatch):
    """Secrets in the message of an exception, plain and quoted: on the console, and in the logs of both ranks."""
    config = write_config(tmp_path / "c.toml", *base, tmp_path / "out", "[train]\nsteps = 1\n")

    def crash(*args):
        raise RuntimeError(
            "request failed\n" + "\n".join(f"{s} {s!r} {json.dumps(s)} {s.strip()!r}" for s in (*SECRETS.values(), URL, HUB))
        )

    monkeypatch.setattr(train, "assemble", crash)
    ranks = launch.run(["--config", str(config)], 2, tmp_path / "console")
    assert ranks.wait() == [1, 1] and "request failed" in ranks.output()
    logs = [(tmp_path / "out" / "logs" / f"rank_{rank}.log").read_text() for rank in (0, 1)]
    assert any("RuntimeError: request failed\n***" in log for log in logs)  # one of them may only know of the other's
    assert all("request failed" in log and "***" in log for log in logs)
    assert found(tmp_path) == []


def test_a_name_that_only_looks_like_one(monkeypatch):
    for name in ("MONKEY", "TOKENIZER", "KEYBOARD", "PASSWORDS"):
        monkeypatch.setenv(name, f"visible-{name}")
        assert redact(f"a visible-{name} b") == f"a visible-{name} b"
