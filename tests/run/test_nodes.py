"""Nodes without a shared file system, as far as one machine can be several: each has a working directory of its own, and relative
paths in the config lead it to its own model folder, data and cache."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import prepare
from model import safetensors_io
from parallel import nodes as nodes_module
from runtime.checkpoint import Checkpointer
from runtime.errors import ConfigError
from runtime.metrics import read
from tests import launch
from tests.tiny import write_chats, write_config, write_model

EXTRA = "[train]\nsteps = {steps}\n[log]\nevery = 1\n[checkpoint]\nevery = 0\n"


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """What one node has: a model with weights, and data."""
    root = tmp_path_factory.mktemp("node")
    model, data = write_model(root / "model"), write_chats(root / "data.jsonl", 40)
    argv = ["--config", str(write_config(root / "c.toml", model, data, root / "out", EXTRA.format(steps=1)))]
    assert launch.run(argv, 1, root / "logs").wait() == [0]
    shutil.copy(root / "out" / "export" / "model.safetensors", model)
    return root


@pytest.fixture
def cluster(node, tmp_path):
    """cluster(sizes) -> nodes for `launch`; and the config that all of them start with: only the output folder is shared."""

    def make(*sizes: int) -> list[tuple[int, Path]]:
        found = []
        for i, ranks in enumerate(sizes):
            home = tmp_path / f"node{i}"
            shutil.copytree(node / "model", home / "model")
            shutil.copy(node / "data.jsonl", home)
            text = write_config(home / "c.toml", Path("model"), Path("data.jsonl"), Path("OUT/out"), EXTRA.format(steps=2)).read_text()
            text = text.replace('"random"', '"pretrained"').replace('"OUT/cache"', '"cache"').replace("OUT/out", str(tmp_path / "out"))
            (home / "c.toml").write_text(text)
            found.append((ranks, home))
        return found

    return make


ARGV = ["--config", "c.toml"]


def refused(nodes, logs: Path, *words: str) -> str:
    """The one line that a run on these nodes ends with, before it has trained."""
    world = sum(ranks for ranks, _ in nodes)
    ranks = launch.run([*ARGV, *words], world, logs, nodes=nodes)
    assert ranks.wait() == [2] * world, ranks.output()
    assert "Traceback" not in ranks.output() and "step 1/" not in ranks.output(), ranks.output()
    (line,) = (line for line in ranks.output().splitlines() if "error:" in line)
    return line


@pytest.mark.parametrize("sizes", [(2, 2), (1, 2)], ids=str)
def test_each_node_has_its_own_cache_and_model(cluster, tmp_path, monkeypatch, sizes):
    tokenize, load = prepare._tokenize, safetensors_io.load_weights

    def noted(what, real):
        def work(*args):
            with (tmp_path / what).open("a") as f:
                f.write(f"{os.environ['RANK']} {Path.cwd().name} {args[1] if what == 'weights' else ''}\n")
            return real(*args)

        return work

    monkeypatch.setattr(prepare, "_tokenize", noted("tokenized", tokenize))
    monkeypatch.setattr(safetensors_io, "load_weights", noted("weights", load))
    nodes, world = cluster(*sizes), sum(sizes)
    ranks = launch.run(ARGV, world, tmp_path / "logs", nodes=nodes)
    assert ranks.wait() == [0] * world, ranks.output()
    tokenized = [line.split() for line in (tmp_path / "tokenized").read_text().splitlines()]
    assert sorted(tokenized) == [["0", "node0"], [str(sizes[0]), "node1"]]  # the first rank of each
    loaded = sorted(line.split() for line in (tmp_path / "weights").read_text().splitlines())
    assert loaded == [[str(r), f"node{int(r >= sizes[0])}", "model"] for r in range(world)]
    for _, home in nodes:
        assert len(list((home / "cache").glob("*/tokens.bin"))) == 1
    out = tmp_path / "out"
    assert [r["step"] for r in read(out / "metrics.jsonl")] == [1, 2]
    assert {p.name for p in out.iterdir()} == {"checkpoints", "export", "logs", "metrics.jsonl", "resolved.toml", "result.json"}
    ranks = launch.run([*ARGV, "--train.steps=3"], world, tmp_path / "logs", nodes=nodes)  # resumes, and no node tokenizes again
    assert ranks.wait() == [0] * world, ranks.output()
    assert [r["step"] for r in read(out / "metrics.jsonl")] == [1, 2, 3]
    assert len((tmp_path / "tokenized").read_text().splitlines()) == 2


def test_an_output_folder_that_nodes_do_not_share(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(nodes_module, "LOOK_S", 0.3)
    nodes = cluster(1, 2)
    line = refused(nodes, tmp_path / "logs", "--output.path=mine")
    assert "output.path='mine' is not one folder" in line
    for place in ("(host node1)", "(host node0)", str(tmp_path / "node0" / "mine"), str(tmp_path / "node1" / "mine"), "rank 0"):
        assert place in line
    assert "rank 1 " in line or "rank 2 " in line
    assert "file system that all nodes share" in line
    for (_, home), written in zip(nodes, ({"checkpoints", "logs"}, {"logs"})):  # rank 0 has claimed its own
        assert not (home / "cache").exists(), "it came out only after the data was tokenized"
        assert {p.name for p in (home / "mine").iterdir()} == written


def test_an_output_folder_that_cannot_be_written_to(tmp_path):
    with pytest.raises(ConfigError, match=r"output.path='.*gone' cannot be written to \(No such file or directory: .*gone"):
        nodes_module._leave(SimpleNamespace(rank=0), tmp_path / "gone", "output.path")


def test_a_checkpoint_that_nodes_do_not_share(cluster, tmp_path, monkeypatch):
    nodes = cluster(2, 1)
    assert launch.run(ARGV, 3, tmp_path / "logs", nodes=nodes).wait() == [0] * 3
    shutil.move(tmp_path / "out", nodes[0][1] / "saved")
    begin, sees = nodes[0][1] / "saved" / "checkpoints" / "step_2", Checkpointer._sees
    # rank 0 gives everybody an absolute path, which on this machine is the same file for all: a rank looks in its node's folder instead
    monkeypatch.setattr(Checkpointer, "_sees", lambda self, path, wanted: sees(self, Path.cwd() / path.relative_to(nodes[0][1]), wanted))
    theirs = nodes[1][1] / "saved" / "checkpoints" / "step_2"
    words = (f"--checkpoint.resume={begin}", "--train.steps=3")

    def said() -> str:
        line = refused(nodes, tmp_path / "logs", *words)
        assert "checkpoint.resume=" in line and "rank 2 on host node1 finds" in line and "file system that all nodes share" in line
        assert not (tmp_path / "out" / "metrics.jsonl").exists()
        return line

    assert "finds no such folder" in said()
    theirs.mkdir(parents=True)
    assert "finds a checkpoint that has no MANIFEST.json" in said()
    shutil.rmtree(theirs)
    alone = [*ARGV, f"--output.path={nodes[1][1] / 'saved'}", "--train.seed=1"]
    assert launch.run(alone, 1, tmp_path / "logs", nodes=[(1, nodes[1][1])]).wait() == [0]
    assert "finds another checkpoint" in said()
    shutil.rmtree(theirs)
    shutil.copytree(begin, theirs)
    ranks = launch.run([*ARGV, *words], 3, tmp_path / "logs", nodes=nodes)
    assert ranks.wait() == [0] * 3, ranks.output()


@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        (lambda home: write_chats(home / "data.jsonl", 41), "fingerprint of data="),
        (lambda home: change(home / "model" / "config.json", rms_norm_eps=1e-4), "fingerprint of model="),
        (lambda home: flip(home / "model" / "model.safetensors"), "fingerprint of model="),
        (lambda home: change(home / "model" / "tokenizer_config.json", eos_token="<|endoftext|>"), "fingerprint of "),
        (lambda home: (home / "c.toml").write_text((home / "c.toml").read_text().replace("steps = 2", "steps = 3")), "train.steps=3"),
    ],
    ids=["data", "config", "weights", "tokenizer", "settings"],
)
def test_nodes_with_other_contents(cluster, tmp_path, breaks, says):
    nodes = cluster(1, 1)
    breaks(nodes[1][1])
    line = refused(nodes, tmp_path / "logs")
    assert says in line and "on rank 1 (host node1)" in line and "on rank 0 (host node0)" in line
    assert line.endswith(("same config", "same model folder, adapter and data"))
    assert {p.name for p in (tmp_path / "out" / "checkpoints").glob("*")} <= {".lock"}


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
