"""What the documentation says exists and works: configs load, commands name real tools and keys, links lead somewhere.

The debug configs train two steps each, at the number of ranks they are for.
"""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

import train
from parallel.mesh import sizes
from runtime.config import help_text, load, to_toml
from runtime.metrics import read
from tests import launch
from tools import schema

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "train_configs").rglob("*.toml"))
RANKS = re.compile(r"# (\d+) (?:ranks?|GPUs?)\b")
KEYS = set(re.findall(r"^  --([\w.]+)", help_text(train.RunConfig), re.MULTILINE))
TORCHRUN = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--max-restarts", "--shutdown-timeout"}
OURS = re.compile(r"python -m tools\.|python train\.py|torchrun ")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def world(path: Path) -> int:
    """The number of ranks that the first line of a config says it is for. The quickstart's are for any."""
    first = path.read_text(encoding="utf-8").split("\n")[0]
    found = RANKS.match(first)
    if found is None:
        assert path.parent.name == "quickstart", f"{name(path)} must begin with '# <n> rank(s)' or '# <n> GPU(s)', not with {first!r}"
        return 1
    return int(found[1])


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages."""
    return [body for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if language in languages]


def toml_blocks() -> list:
    found = [(page, i, body) for page in PAGES for i, body in enumerate(blocks(page.read_text(encoding="utf-8"), "toml"))]
    return [pytest.param(body, id=f"{name(page)}:{i}") for page, i, body in found]


def commands(text: str) -> list[list[str]]:
    """Our commands in a page or a config's comments: each from its program on, split into words, without trailing remarks."""
    text = re.sub(r" \\\n[# ]*", " ", text)
    lines = [line.lstrip("#").strip() for line in text.split("\n")]
    words = []
    for line in lines:
        for part in line.split(" && "):
            if OURS.match(part):
                words.append(shlex.split(re.split(r"\s{2,}|\s#\s| > ", part)[0]))
    return words


def faults(words: list[str]) -> list[str]:
    """What a command refers to and is not there: a tool, an option of it, a key, a file of the repository."""
    bad, options = [], {w.split("=")[0].removeprefix("--") for w in words if w.startswith("--")}
    if words[:2] == ["python", "-m"]:
        source = ROOT / (words[2].replace(".", "/") + ".py")
        if not source.is_file():
            return [words[2]]
        known = set(re.findall(r'"--([\w-]+)"', source.read_text(encoding="utf-8"))) | {"help"}
        known |= KEYS | {"config"} if "parse_args(RunConfig" in source.read_text(encoding="utf-8") else set()
    else:
        known = KEYS | {"config", "help"}
        if words[0] == "torchrun":
            known |= {option.removeprefix("--") for option in TORCHRUN}
            bad += [] if {"train.py", "..."} & set(words) else ["no train.py"]
    bad += sorted(o for o in options if re.sub(r"\.\d+\.", ".N.", o) not in known)
    files = [w.split("=")[-1] for w in words if w.split("=")[-1].startswith(("train_configs/", "docs/"))]
    return bad + [f for f in files if not (ROOT / f).exists()]


def missing_links(page: Path) -> list[str]:
    """Relative links of a page that lead to no file, or to no heading of one."""
    text, bad = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL), []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        if not path.exists():
            bad.append(link)
        elif anchor:
            headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            bad += [] if anchor in slugs else [link]
    return bad


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_config_loads_at_its_number_of_ranks(path, tmp_path):
    cfg = load(train.RunConfig, path)
    axes = sizes(cfg.parallel, world(path))
    assert axes["replicate"] * axes["shard"] * axes["context"] * axes["tensor"] == world(path)
    (tmp_path / "resolved.toml").write_text(to_toml(cfg), encoding="utf-8")
    assert load(train.RunConfig, tmp_path / "resolved.toml") == cfg


@pytest.mark.parametrize("text", toml_blocks())
def test_toml_in_the_pages_loads(text, tmp_path):
    """A whole config as it is; a part of one with the required keys that it leaves out."""
    extra = [] if "extends" in text else [f"--{key}=x" for key in ("model.path", "output.path") if not _has(text, key)]
    if not re.search(r"data\.sources", text):
        extra += ["--data.sources.0.path=x", "--data.sources.0.format=chat"]
    (tmp_path / "block.toml").write_text(text, encoding="utf-8")
    load(train.RunConfig, tmp_path / "block.toml", extra)


def _has(text: str, key: str) -> bool:
    table, leaf = key.split(".")
    return bool(re.search(rf"^{re.escape(key)} =|^\[{table}\]\n(?:[^\[]*\n)?{leaf} =", text, re.MULTILINE))


@pytest.mark.parametrize("path", [*PAGES, *CONFIGS], ids=name)
def test_commands_refer_to_what_exists(path):
    text = path.read_text(encoding="utf-8")
    found = commands("\n".join(blocks(text, "bash", "")) if path.suffix == ".md" else text)
    assert {" ".join(words): bad for words in found if (bad := faults(words))} == {}


def test_the_check_of_commands_can_fail():
    good = "torchrun --nproc-per-node 2 train.py --config train_configs/debug/shard.toml --data.sources.0.path=x  # remark"
    assert [faults(words) for words in commands(good)] == [[]]
    assert faults(commands("python -m tools.nothing --help")[0]) == ["tools.nothing"]
    assert faults(commands("pip install -e . && python -m tools.merge --adaptor a")[0]) == ["adaptor"]
    assert faults(commands("python train.py --config train_configs/none.toml --optim.rate=1")[0]) == [
        "optim.rate",
        "train_configs/none.toml",
    ]
    assert len(commands("\n".join(blocks((ROOT / "README.md").read_text(encoding="utf-8"), "bash")))) >= 4


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    assert missing_links(page) == []


def test_every_page_can_be_found_from_the_readme():
    links = set(re.findall(r"\]\((docs/[\w.-]+|SECURITY\.md)\)", PAGES[0].read_text(encoding="utf-8")))
    assert links == {name(page) for page in PAGES[1:]}


def test_config_reference_is_current():
    page = str(ROOT / "docs" / "config.md")
    assert schema.main(["--markdown", page, "--check"]) == 0, "run python -m tools.schema --markdown docs/config.md"


@pytest.fixture(scope="module")
def imports():
    """What a run imports, once here instead of in every forked rank; fully_shard brings torch._dynamo, which takes seconds."""
    for module in ("torch._dynamo", "parallel.apply", "model.safetensors_io", "runtime.checkpoint.checkpointer", "data.prepare"):
        importlib.import_module(module)


@pytest.mark.usefixtures("imports")
@pytest.mark.parametrize("path", [path for path in CONFIGS if path.parent.name == "debug"], ids=name)
def test_debug_config_trains(path, tmp_path):
    out = tmp_path / "out"
    argv = ["--config", str(path), "--train.steps=2", "--log.every=1", f"--output.path={out}", f"--data.cache={tmp_path / 'cache'}"]
    ranks = launch.run(argv, world(path), tmp_path / "logs")
    assert ranks.wait() == [0] * world(path), ranks.output()
    losses = [record["loss"] for record in read(out / "metrics.jsonl") if "loss" in record]
    assert len(losses) == 2
    assert all(4 < loss < 9 for loss in losses), "about log(469) = 6.15, as weights are random"
    assert (out / "export" / "config.json").is_file()
