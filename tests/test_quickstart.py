"""The quickstart: its data are right, held-out questions are really held out, and every stage of the chain runs."""

from __future__ import annotations

import calendar
import hashlib
import json
import operator
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import skills

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("skills")
    skills.write(folder)
    rows = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").open(encoding="utf-8")] for name in ("skills", "spell", "held_out")
    }
    return folder, rows


def test_the_data_set_is_the_same_everywhere_and_small(made):
    folder, _ = made
    digest = hashlib.sha256(b"".join((folder / f"{name}.jsonl").read_bytes() for name in ("skills", "spell", "held_out"))).hexdigest()
    assert digest == "1284afc8f3c5017632d72427cd0a4db8ee59c17e58061ac4cb1ba5b1a1aeb2b2"
    assert sum(p.stat().st_size for p in folder.iterdir()) < 3_000_000


def test_no_held_out_question_was_ever_trained(made):
    _, rows = made
    trained = {row["messages"][0]["content"] for name in ("skills", "spell") for row in rows[name]}
    asked = [row["messages"][0]["content"] for row in rows["held_out"]]
    assert len(asked) == len(set(asked)) == 900
    assert not trained & set(asked)
    for skill in (*skills.SKILLS, *skills.LATER):
        train, held_out = skills.make(skill, 0)
        assert not {q.operands for q in train} & {q.operands for q in held_out}, skill.__name__


def test_answers_are_right_by_another_way_of_finding_them(made):
    """Arithmetic by Python's own operators on the numbers of the question, edits by slicing, months by the calendar."""
    _, rows = made
    checked = 0
    for row in rows["held_out"]:
        question, answer = row["messages"][0]["content"], row["answer"]
        numbers = [int(n) for n in re.findall(r"\d+", question)]
        words = re.findall(r'"([^"]+)"', question)
        if row["skill"] in ("add", "subtract") and len(numbers) == 2:
            results = {operator.add(*numbers), operator.sub(*numbers), numbers[1] - numbers[0]}
            assert int(answer) in results, question
            assert (int(answer) == sum(numbers)) == (row["skill"] == "add" or 0 in numbers), question
        elif row["skill"] == "sort" and len(numbers) > 2:
            assert sorted(numbers) == sorted(int(n) for n in re.findall(r"\d+", answer)), question
        elif row["skill"] == "reverse" and words:
            assert answer.strip('"') == words[0][::-1], question
        elif row["skill"] == "upper" and words:
            assert answer.strip('"') == words[0].upper(), question
        elif row["skill"] == "dates":
            month = next((m for m in calendar.month_name if m and answer.startswith(m)), None)
            assert month is None or int(re.findall(r"\d+", answer)[0]) <= 31, question
        else:
            continue
        checked += 1
    assert checked > 400


def test_every_stage_runs(tmp_path):
    out = tmp_path / "quick"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tools.quickstart", "--quick", "--out", str(out)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "skills/export/model.safetensors").exists()
    assert (out / "lora/export/adapter_model.safetensors").exists()
    assert (out / "merged/model.safetensors").exists()
    assert "mean of the 8 first skills" in done.stdout
    assert done.stdout.count("$ python") == 6
