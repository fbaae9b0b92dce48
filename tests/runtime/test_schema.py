"""What dataclasses may say, and the pages generated from them."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from runtime.config import help_text, json_schema, markdown
from runtime.schema import section
from runtime.suggest import _everywhere
from tests.runtime.sample import Cosine, Sample
from tools import schema as tool
from train import RunConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("cls", [Sample, RunConfig])
def test_help_names_every_key_within_120_columns(cls):
    text = help_text(cls)
    assert max(map(len, text.splitlines())) <= 120
    for place in _everywhere(section(cls)):
        flag = "--" + ".".join("N" if part == 0 else part for part in place)
        assert f"  {flag} " in text or any(
            len(other) > len(place) and other[: len(place)] == place for other in _everywhere(section(cls))
        ), flag


def test_help_shows_type_default_and_meaning():
    text = help_text(Sample, "train.py")
    row = {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines() if line.startswith("  --")}
    assert row["--model.path"] == "str, required A model folder."
    assert row["--model.init"] == "pretrained | random = pretrained Where weights come from."
    assert row["--optim.max_norm"] == "float = none Clipping."
    assert row["--checkpoint.async"] == "bool = false In the background."
    assert row["--schedule.kind"] == "constant | cosine = cosine Which schedule."
    assert row["--schedule.min"] == "float = 0.0 (cosine) Where it ends."
    assert row["--data.sources.N.path"] == "str, required A file."
    assert "Off when absent." in text and "relative to the directory the command is run in" in " ".join(text.split())


def test_help_is_instant_and_needs_no_torch():
    command = [sys.executable, "train.py", "--help"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "--model.path" in done.stdout
    # time of the processor, as other tests may run beside this one
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    traced = subprocess.run([command[0], "-X", "importtime", *command[1:]], cwd=ROOT, capture_output=True, text=True)
    imported = {line.rsplit("|")[-1].strip().split(".")[0] for line in traced.stderr.splitlines()}
    assert "dataclasses" in imported and not imported & {"torch", "numpy", "tokenizers", "transformers", "safetensors"}


def test_markdown():
    page = markdown(Sample)
    assert "## `[lora]`" in page and "## `[[data.sources]]`" in page
    assert '| `init` | `"pretrained" \\| "random"` | `"pretrained"` | Where weights come from. |' in page
    assert "| `path` | `str` | required | A model folder. |" in page


def test_json_schema():
    page = json_schema(Sample)
    assert json.loads(json.dumps(page)) == page
    assert page["additionalProperties"] is False and page["anyOf"] == [{"required": ["extends"]}, {"required": ["model", "data"]}]
    keys = page["properties"]
    assert keys["model"]["required"] == ["path"] and keys["model"]["properties"]["init"]["enum"] == ["pretrained", "random"]
    assert keys["lora"]["properties"]["targets"]["anyOf"] == [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]
    assert keys["data"]["properties"]["sources"]["items"]["required"] == ["path"]
    kinds = keys["schedule"]["oneOf"]
    assert [k["properties"]["kind"] for k in kinds] == [{"const": "constant"}, {"const": "cosine"}]
    assert kinds[0]["required"] == ["kind"] and "required" not in kinds[1], "the default kind may be left out"
    assert keys["checkpoint"]["properties"]["async"]["default"] is False


def fields(**annotations):
    """A config class with the given fields."""
    namespace = {"__doc__": "A section.", "__annotations__": {}}
    for name, (kind, default) in annotations.items():
        namespace["__annotations__"][name] = kind
        if default is not ...:
            namespace[name] = default
    return dataclass(frozen=True)(type("Config", (), namespace))


@pytest.mark.parametrize(
    "annotations, message",
    [
        ({"x": (int, 1)}, "needs documentation"),
        ({"x": (Annotated[int | None, "d"], 1)}, "must default to None"),
        ({"x": (Annotated[int | None, "d"], ...)}, "must default to None"),
        ({"x": (Annotated[set[int], "d"], ...)}, "cannot hold"),
        ({"x": (Annotated[tuple[int, str], "d"], ...)}, "cannot hold"),
        ({"x": (Annotated[object, "d"], ...)}, "cannot hold"),
        ({"x": (Cosine, Cosine(min=0.5))}, "must be the class's own defaults"),
        ({"x": (fields(a=(Annotated[int, "d"], 1)) | Cosine, ...)}, "need a kind"),
    ],
)
def test_what_a_config_cannot_be(annotations, message):
    with pytest.raises(AssertionError, match=message):
        section(fields(**annotations))


def test_a_section_needs_a_docstring():
    @dataclass(frozen=True)
    class Bare:
        x: Annotated[Literal["a"], "d"] = "a"

    with pytest.raises(AssertionError, match="needs a docstring"):
        section(Bare)


def test_the_tool_writes_and_checks(tmp_path, capsys):
    page, schema = str(tmp_path / "config.md"), str(tmp_path / "schema.json")
    both = ["--markdown", page, "--json", schema]
    assert tool.main([*both, "--check"], Sample) == 1 and "not up to date" in capsys.readouterr().err
    assert tool.main(both, Sample) == 0 and tool.main([*both, "--check"], Sample) == 0
    assert Path(page).read_text() == markdown(Sample) and json.loads(Path(schema).read_text()) == json_schema(Sample)
    Path(page).write_text(markdown(Sample) + "edited by hand")
    assert tool.main([*both, "--check"], Sample) == 1 and tool.main(["--json", schema, "--check"], Sample) == 0
    assert tool.main(["--markdown", "-"], Sample) == 0 and "Config reference" in capsys.readouterr().out
    for argv in ([], ["--json", str(tmp_path / "no" / "x")]):
        with pytest.raises(SystemExit) as end:
            tool.main(argv, Sample)
        assert end.value.code == 2


def test_the_config_reference_is_up_to_date():
    assert tool.main(["--markdown", str(ROOT / "docs" / "config.md"), "--check"]) == 0, "python -m tools.schema --markdown docs/config.md"
