"""What a user can get wrong: one line that says what and where, exit code 2, on every rank; printed once."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import train
from runtime.errors import ConfigError, DataError, ModelError, clean, shown
from tests import launch
from tests.tiny import LLAMA, write_chats, write_config, write_model


def change_config(root: Path, **changes: object) -> None:
    path = root / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def row(text: str):
    return lambda root: (root / "data.jsonl").open("a", encoding="utf-8").write(text + "\n")


def chat(*messages: tuple[str, str]) -> str:
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in messages]})


def truncate(root: Path) -> None:
    path = root / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def not_a_number(root: Path) -> None:
    path = root / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][-1, -3:] = float("nan")
    save_file(tensors, path)


def index(name: str):
    def write(root: Path) -> None:
        shutil.move(root / "model" / "model.safetensors", root / "model" / "model-00001-of-00001.safetensors")
        weights = {"model.embed_tokens.weight": name}
        (root / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))

    return write


def missing_tensor_shard(root: Path) -> None:
    index("model-00001-of-00002.safetensors")(root)


def change_template(template: str):
    def write(root: Path) -> None:
        path = root / "model" / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))

    return write


LONG = chat(("user", "hello " * 200), ("assistant", "yes " * 200))
PRETRAINED = "--model.init=pretrained"
CASES = {  # name: (what to break, arguments, what the line must say)
    "mistyped key": (None, ["--optim.learnig_rate=1"], ["optim.learnig_rate", "did you mean", "optim.lr"]),
    "mistyped section": (None, ["--lorra.rank=1"], ["lorra", "did you mean", "lora"]),
    "wrong type": (None, ["--train.steps=many"], ["train.steps", "integer"]),
    "missing config": (None, ["--config=nowhere.toml"], ["nowhere.toml"]),
    "missing data": (lambda root: (root / "data.jsonl").unlink(), [], ["data.jsonl"]),
    "empty data": (lambda root: (root / "data.jsonl").write_text(""), [], ["data.jsonl"]),
    "malformed line": (row('{"messages": ['), [], ["data.jsonl:9"]),
    "missing field": (row('{"text": "x"}'), [], ["data.jsonl:9", "messages"]),
    "rejected role": (row(chat(("wizard", "x"), ("assistant", "y"))), [], ["data.jsonl:9", "wizard"]),
    "template does not parse": (change_template("{% if messages %}"), [], ["template"]),
    "template fails": (change_template("{{ messages[0].content + 1 }}"), [], ["data.jsonl:1", "template"]),
    "no template": (change_template(""), [], ["template"]),
    "not utf-8": (lambda root: (root / "data.jsonl").open("ab").write(b'{"messages": "\xff"}\n'), [], ["data.jsonl:9"]),
    "over-long document": (row(LONG), ["--data.overflow=error"], ["data.jsonl:9", "128"]),
    "vocabulary": (lambda root: change_config(root, vocab_size=100), [], ["100"]),
    "unsupported architecture": (lambda root: change_config(root, model_type="mamba"), [], ["mamba", "llama", "qwen3", "gemma3"]),
    "no weights": (lambda root: (root / "model" / "model.safetensors").unlink(), [PRETRAINED], ["model.safetensors"]),
    "truncated weights": (truncate, [PRETRAINED], ["model.safetensors"]),
    "NaN among the weights": (not_a_number, [PRETRAINED], ["/model: lm_head.weight: 3 of ", " elements are NaN; the file is damaged"]),
    "missing shard": (missing_tensor_shard, [PRETRAINED], ["model-00001-of-00002.safetensors"]),
    "index leaves folder": (index("../../secret.safetensors"), [PRETRAINED], ["../../secret.safetensors"]),
    "wrong shapes": (lambda root: change_config(root, intermediate_size=48), [PRETRAINED], ["gate_proj", "64", "48"]),
    "target matches nothing": (None, ["--lora.rank=4", '--lora.targets=["q_porj"]'], ["q_porj", "q_proj"]),
    "world size": (None, ["--parallel.replicate=3"], ["replicate=3", "2"]),
    "output is a file": (lambda root: (root / "out").write_text(""), [], ["output.path"]),
    "no model": (None, ["--model.path=/does/not/exist"], ["/does/not/exist"]),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A model with weights and eight conversations."""
    root = tmp_path_factory.mktemp("errors")
    write_model(root / "model")
    data = write_chats(root / "data.jsonl", 8)
    argv = ["--config", str(write_config(root / "c.toml", root / "model", data, root / "out", "[train]\nsteps = 1\n"))]
    assert launch.run(argv, 1, root / "logs").wait() == [0]
    shutil.copy(root / "out" / "export" / "model.safetensors", root / "model")
    return root


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_exit_code_2(good, tmp_path, case):
    breaks, extra, says = CASES[case]
    shutil.copytree(good / "model", tmp_path / "model")
    shutil.copy(good / "data.jsonl", tmp_path)
    if breaks is not None:
        breaks(tmp_path)
    config = write_config(tmp_path / "c.toml", tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "out", "[train]\nsteps = 1\n")
    argv = extra if any(a.startswith("--config") for a in extra) else ["--config", str(config), *extra]
    ranks = launch.run(argv, 2, tmp_path / "logs")
    assert ranks.wait() == [2, 2], ranks.output()
    lines = [line for line in ranks.output().splitlines() if "error:" in line]
    assert len(lines) == 1, ranks.output()
    assert "Traceback" not in ranks.output()
    for word in says:
        assert word in lines[0], lines[0]


def test_the_good_case_is_good(good, tmp_path):
    config = write_config(tmp_path / "c.toml", good / "model", good / "data.jsonl", tmp_path / "out", "[train]\nsteps = 1\n")
    argv = ["--config", str(config)]
    ranks = launch.run([*argv, PRETRAINED], 2, tmp_path / "logs")
    assert ranks.wait() == [0, 0], ranks.output()
    assert LLAMA["model_type"] in (tmp_path / "out" / "export" / "config.json").read_text()


def test_a_message_is_one_line_whatever_it_quotes():
    for error in (DataError("x\ny\r\nz", "a\nb", 3), ConfigError("is\nwrong", "a.b", "v"), ModelError("x" * 10**6 + "!")):
        text = str(error)
        assert not set(text) & set("\n\r") and len(text) < 2100
    assert text.endswith("x!") and text.startswith("xxx") and " ... " in text


MEND = "start several ranks with torchrun, or unset it"
THERE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
LAUNCHER = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
ABSENT = "is not in the environment, but MASTER_ADDR and WORLD_SIZE are; start ranks with torchrun, or unset them"


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": "2"}, f"WORLD_SIZE=2 is set but MASTER_ADDR is not; {MEND}"),
        ({"RANK": "first"}, f"RANK='first' in the environment is not a number of at most 9 digits; {MEND}"),
        ({"WORLD_SIZE": "9" * 5000}, f"WORLD_SIZE='{'9' * 76}... in the environment is not a number of at most 9 digits; {MEND}"),
        ({"RANK": "1"}, f"RANK=1 in the environment must be below WORLD_SIZE=1; {MEND}"),
        ({"LOCAL_RANK": "3"}, f"LOCAL_RANK=3 in the environment must be below LOCAL_WORLD_SIZE=1; {MEND}"),
        ({"LOCAL_WORLD_SIZE": "2"}, f"LOCAL_WORLD_SIZE=2 in the environment must be from 1 to WORLD_SIZE=1; {MEND}"),
        ({"LOCAL_WORLD_SIZE": "0"}, f"LOCAL_WORLD_SIZE=0 in the environment must be from 1 to WORLD_SIZE=1; {MEND}"),
        ({"WORLD_SIZE": "0", **THERE}, f"WORLD_SIZE=0 in the environment must be at least 1; {MEND}"),
        ({"WORLD_SIZE": "2", "RANK": "5", **THERE}, f"RANK=5 in the environment must be below WORLD_SIZE=2; {MEND}"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "1", **THERE}, f"LOCAL_RANK=1 in the environment must be at most RANK=0; {MEND}"),
        ({"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}, f"MASTER_PORT: {ABSENT}"),
        ({"WORLD_SIZE": "2", **THERE}, f"RANK: {ABSENT}"),
        (
            {"WORLD_SIZE": "1", **THERE, "MASTER_PORT": "abc"},
            f"MASTER_PORT='abc' in the environment is not a number of at most 9 digits; {MEND}",
        ),
        ({"WORLD_SIZE": "1", **THERE, "MASTER_PORT": "65536"}, f"MASTER_PORT=65536 in the environment must be at most 65535; {MEND}"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_half_of_a_launchers_environment(good, monkeypatch, capsys, environment, says):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert train.main(["--config", str(good / "c.toml")]) == 2
    assert capsys.readouterr().err == f"error: {says}\n"


@pytest.mark.parametrize("module", ["torch.distributed", "parallel.start"])
def test_ctrl_c_during_imports(good, monkeypatch, capfd, module):
    """Those of torch take seconds. The interrupt arrives inside of one; nothing is there to be saved, and nothing is said."""
    original = builtins.__import__

    def interrupted(name, *args):
        if name == module:
            raise KeyboardInterrupt
        return original(name, *args)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    assert train.main(["--config", str(good / "c.toml")]) == 130
    assert capfd.readouterr() == ("", "")


HOSTILE = "\x1b[31mred\x07\x9b2J\u202edesrever\u2066\u200b\x85\u2028\ud800\x7f"


def test_a_message_controls_no_terminal():
    """Escape sequences, C1 controls and what reorders text are spelled out, wherever a name of a stranger is quoted."""
    quoted = "\\x1b[31mred\\x07\\x9b2J\\u202edesrever\\u2066\\u200b\\x85\\u2028\\ud800\\x7f"
    errors = (
        DataError(HOSTILE),
        DataError("x", HOSTILE, 3),
        ModelError("x", HOSTILE),
        ConfigError(HOSTILE, "k"),
        ConfigError("x", HOSTILE, 1),
    )
    for error in errors:
        assert str(error).isprintable() and quoted in str(error)
    assert errors[0].message == quoted  # as the report on records that were left out quotes it
    assert shown(HOSTILE) == f"'{quoted}'" and clean("é 東京 😀 a\nb") == "é 東京 😀 a b"
    assert clean("\x1b]0;title\x07") == "\\x1b]0;title\\x07"


def test_a_role_in_data_controls_no_terminal(tmp_path, good):
    data = tmp_path / "x.jsonl"
    data.write_text(json.dumps({"messages": [{"role": HOSTILE.replace("\ud800", ""), "content": "q"}]}) + "\n", encoding="utf-8")
    config = write_config(tmp_path / "c.toml", good / "model", data, tmp_path / "out", "[train]\nsteps = 1\n")
    ranks = launch.run(["--config", str(config)], 1, tmp_path / "logs")
    text = ranks.output()
    assert ranks.wait() == [2] and "\\x1b[31mred" in text
    assert not set(text) & set("\x1b\x07\x9b\u202e\u2066")
