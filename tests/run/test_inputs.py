"""Numbers and paths of a config that no run can work with: one line, not a traceback, a silent wait or a folder in the wrong place."""

from __future__ import annotations

import os
import pwd

import pytest

from runtime.config import parse_args
from runtime.errors import ConfigError
from tests import launch
from tests.tiny import write_chats, write_config, write_model
from train import RunConfig

LARGE = 2**63 - 1
REFUSED = {  # an override: what the line says
    "parallel.timeout_s=1e300": "must be positive and at most 1e7",
    f"parallel.timeout_s={LARGE}": "must be positive and at most 1e7",
    f"lora.rank={LARGE}": "must be from 1 to 65536",
    "lora.rank=1000000000": "must be from 1 to 65536",
    "lora.adapter=": "must name a folder",
    "data.tokens=1000000000": "must lie between 2 and 2^26",
    "train.accumulate=1000000000": "must be at most 1,000,000",
    "train.epochs=1000000000": "must be at most 100,000",
    "recompute.gib=1e300": "must be from 0 to 1e6",
    "data.cache=": "must name a file or a folder",
    "data.template=": "must name a file or a folder",
    "output.path=": "must name a folder",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    data = write_chats(root / "data.jsonl", 8)
    return write_config(root / "c.toml", write_model(root / "model"), data, root / "out", "[train]\nsteps = 1\n")


@pytest.mark.parametrize("override", REFUSED)
def test_a_value_that_cannot_work(config, override):
    with pytest.raises(ConfigError) as caught:
        parse_args(RunConfig, ["--config", str(config), "--train.steps=none", f"--{override}"])
    key = override.partition("=")[0]
    assert str(caught.value).startswith(f"command line: {key}=") and REFUSED[override] in str(caught.value)


PATHS = {"output.path": [], "data.cache": [], "data.template": [], "lora.adapter": [], "offload.folder": ["--offload.activations=disk"]}


@pytest.mark.parametrize("key", PATHS)
def test_a_home_folder_of_nobody(config, tmp_path, key):
    ranks = launch.run(["--config", str(config), f"--{key}=~nosuchuser/x", *PATHS[key]], 1, tmp_path / "logs")
    says = f"error: {key}='~nosuchuser/x' begins with a home folder that is not known here; set {key} to a path without ~, or HOME"
    assert ranks.wait() == [2] and ranks.output().strip() == says, ranks.output()


def test_a_process_without_a_home_folder(config, tmp_path, monkeypatch):
    """As in a container whose user has no entry in passwd."""
    text = "".join(line for line in config.read_text().splitlines(keepends=True) if not line.startswith("cache"))
    (tmp_path / "c.toml").write_text(text)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    ranks = launch.run(["--config", str(tmp_path / "c.toml")], 1, tmp_path / "logs")
    assert ranks.wait() == [2] and ranks.output().startswith("error: data.cache='~/.cache/salamander' begins with a home folder"), (
        ranks.output()
    )


def test_the_home_folder_is_where_the_user_has_it(config, tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    activations = ["--offload.activations=disk", "--offload.folder=~/spill"]
    ranks = launch.run(["--config", str(config), "--output.path=~/out", "--data.cache=~/cache", *activations], 1, tmp_path / "logs")
    assert ranks.wait() == [0], ranks.output()
    assert (home / "out" / "export" / "config.json").is_file() and (home / "out" / "metrics.jsonl").is_file()
    assert {path.name for path in home.iterdir()} == {"out", "cache", "spill"} and list(here.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "dangling link", "pipe", "step is a file", "step is a link", "step is a dangling link"])
def test_something_in_the_way_of_checkpoints(config, tmp_path, kind):
    """It is said before the first step, not once there is something to save."""
    out = tmp_path / "out"
    place = out / "checkpoints" / "step_8" if "step" in kind else out / "checkpoints"
    place.parent.mkdir(parents=True)
    if kind.endswith("file"):
        place.write_text("")
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(tmp_path / "elsewhere")
        if "dangling" not in kind:
            (tmp_path / "elsewhere").mkdir()
    ranks = launch.run(["--config", str(config), f"--output.path={out}"], 2, tmp_path / "logs")
    text = ranks.output()
    assert ranks.wait() == [2, 2] and text.count("\n") == 1, text
    assert text.startswith(f"error: {place}: is no folder") and text.endswith("; move it away\n")
    assert not (out / "logs").exists() and not (tmp_path / "elsewhere" / ".lock").exists()
