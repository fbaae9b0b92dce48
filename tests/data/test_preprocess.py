"""The command that prepares data ahead of a run, and the keys of `[data]`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from data.config import DataConfig, SourceConfig
from runtime.config import load, to_toml
from runtime.errors import ConfigError
from tests import tiny
from tests.data.making import turns, write_jsonl
from tools import preprocess


@pytest.fixture
def config(tmp_path):
    model = tiny.write_model(tmp_path / "model")
    data = write_jsonl(
        tmp_path / "talk.jsonl", [{"messages": turns("the cat", "sat on a mat")}, {"messages": turns("why", "so cold")}] * 10
    )
    return tiny.write_config(tmp_path / "run.toml", model, data, tmp_path / "out")


def test_shows_what_a_run_will_train(config, capsys):
    assert preprocess.main(["--config", str(config), "--show", "3"]) == 0
    out = capsys.readouterr().out
    assert "20 documents, " in out and "% trained" in out and "packs of 128 tokens" in out
    assert "<|im_start|>assistant\n⟦so cold<|im_end|>⟧\n" in out or "<|im_start|>assistant\n⟦sat on a mat<|im_end|>⟧\n" in out
    assert out.count(" tokens from talk") == 3
    assert preprocess.main(["--config", str(config), "--show=0", "--data.tokens=256", "--eval.split=4"]) == 0
    out = capsys.readouterr().out
    assert "packs of 256 tokens" in out and "held out:\n4 documents" in out and "tokens from" not in out


@pytest.mark.parametrize(
    "more, message",
    [
        (["--show=x"], "error: --show='x' must be a number of documents"),
        (["--data.toknes=5"], "error: command line: --data.toknes: no such key"),
        (["--data.sources.0.path=none.jsonl"], "error: none.jsonl: there is no such file or folder"),
        (["--data.max_length=4", "--data.overflow=error"], "error: PATH:1: the document has 26 tokens, more than 4; raise data.max_length"),
        (["--data.sources.0.fields.messages=talk"], "error: PATH:1: has no field 'talk' (it has 'messages'); names can be set with fields"),
        (["--eval.split=900"], "error: cannot hold 900 out of 20 documents; hold out less, or set eval.sources"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(config, capsys, more, message):
    assert preprocess.main(["--config", str(config), *more]) == 2
    error = capsys.readouterr().err
    path = str(config.parent / "talk.jsonl")
    assert error.startswith(message.replace("PATH", path)), error
    assert error.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------ [data] keys

SOURCE = {"path": "a.jsonl", "format": "chat"}


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"path": ""}, "path='' must name a file, a glob, a folder or a hub dataset"),
        ({"weight": 0.0}, "weight=0.0 must lie above 0 and at most 1000; remove the source to leave it out"),
        ({"weight": float("nan")}, "weight=nan must lie above 0"),
        ({"fields": {"mesages": "x"}}, "fields.mesages='x' is not a field of format = \"chat\"; did you mean messages?"),
        (
            {"fields": {"zzz": "x"}},
            "fields.zzz='x' is not a field of format = \"chat\"; it has messages, role, content, weight, system, tools",
        ),
        ({"fields": {"role": ""}}, "fields.role='' must not be empty"),
        ({"fields": {"role": "content"}}, "fields={'role': 'content'} gives two fields the same name"),
        ({"format": "completion", "roles": {"a": "b"}}, "roles={'a': 'b'} is a key of format = \"chat\" only"),
        ({"format": "completion", "train_on": "last"}, 'train_on=\'last\' is a key of format = "chat" and "instruct" only'),
        ({"prompt": "chat"}, "prompt='chat' is a key of format = \"instruct\" only"),
    ],
)
def test_sources(keys, message):
    with pytest.raises(ConfigError) as caught:
        SourceConfig(**{**SOURCE, **keys})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"sources": ()}, "sources: must name at least one source"),
        ({"tokens": 1}, "tokens=1 must lie between 2 and 2^26"),
        ({"max_length": 600}, "max_length=600 must lie between 2 and data.tokens=512, which a document has to fit into"),
        ({"date": "July 26"}, "date='July 26' must be a date such as 2024-07-26"),
        (
            {"sources": (SourceConfig(**SOURCE, name="a"), SourceConfig(**SOURCE, name="a"))},
            "sources=['a', 'a'] gives two sources the same name",
        ),
    ],
)
def test_data(keys, message):
    with pytest.raises(ConfigError) as caught:
        DataConfig(**{"sources": (SourceConfig(**SOURCE),), "tokens": 512, **keys})
    assert str(caught.value).startswith(message)


def test_configs_of_the_documentation(tmp_path):
    page = Path(__file__).resolve().parents[2] / "docs" / "data.md"
    blocks = re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        (tmp_path / "run.toml").write_text('[model]\npath = "m"\n[output]\npath = "o"\n' + block, encoding="utf-8")
        assert load(preprocess.RunConfig, tmp_path / "run.toml").data.sources


def test_every_key_survives_its_toml(tmp_path, config):
    extra = [
        "--data.sources.0.fields.role=from",
        '--data.sources.0.roles={bot = "assistant"}',
        "--data.template_args={enable_thinking = false}",
    ]
    cfg = load(preprocess.RunConfig, config, [*extra, "--data.date=2025-01-01", "--data.overflow=split", "--data.sources.0.weight=2.5"])
    (tmp_path / "again.toml").write_text(to_toml(cfg), encoding="utf-8")
    again = load(preprocess.RunConfig, tmp_path / "again.toml")
    assert again == cfg and again.data.sources[0].field_names()["role"] == "from" and again.data.template_args == {"enable_thinking": False}
    assert json.dumps(again.data.sources[0].roles) == '{"bot": "assistant"}'
