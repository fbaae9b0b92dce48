"""docs/preemption.md: its scripts do what it says, where commands stand in for Slurm's, and its numbers fit together."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.run import get_args_parser

from runtime.stop import GRACE_S, SIGNALS
from tests.test_docs import ROOT, TORCHRUN, blocks, faults

PAGE = (ROOT / "docs" / "preemption.md").read_text(encoding="utf-8")
BASH, YAML = blocks(PAGE, "bash"), blocks(PAGE, "yaml")
SBATCH = next(text for text in BASH if "#SBATCH" in text)
TRAP = next(text for text in BASH if "trap" in text)
JOB, HOOK = map(yaml.safe_load, YAML)
POD = JOB["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]


def launches() -> list[list[str]]:
    """Every torchrun command of the page, as words."""
    text = re.sub(r" \\\n\s*", " ", "\n".join(BASH))
    lines = [re.sub(r"^srun ", "", line) for line in text.split("\n")]
    found = [shlex.split(re.split(r" &$", line)[0]) for line in lines if line.startswith("torchrun ")]
    return [*found, CONTAINER["command"], shlex.split(HOOK["command"][2].split(";")[0])]


def test_commands_have_flags_and_keys_that_exist():
    assert len(launches()) == 5
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 13):  # as the page says
        assert "--shutdown-timeout" not in known
        known.add("--shutdown-timeout")
    assert known >= TORCHRUN
    for words in launches():
        ours = words.index("train.py")
        assert faults(words) == [] and words[0] == "torchrun", words
        assert {word for word in words[:ours] if word.startswith("--")} <= known


@pytest.mark.parametrize("text", [*BASH, *(part for part in (HOOK["command"][2], HOOK["lifecycle"]["preStop"]["exec"]["command"][2]))])
def test_scripts_are_bash(text):
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""


def seconds(words: list[str]) -> int | None:
    return int(words[words.index("--shutdown-timeout") + 1]) if "--shutdown-timeout" in words else None


def test_times_fit_together():
    """torchrun must give up before the scheduler does, and both leave more than torchrun's default."""
    announced = int(re.search(r"--signal=TERM@(\d+)", SBATCH)[1])
    (slurm,) = (words for words in launches() if "--rdzv-id" in words)
    assert 30 < seconds(slurm) < announced
    hours, minutes, _ = map(int, re.search(r"--time=(\d+):(\d+):(\d+)", SBATCH).groups())
    assert announced < 60 * (60 * hours + minutes) / 2
    assert 30 < seconds(CONTAINER["command"]) < POD["terminationGracePeriodSeconds"]
    assert all(seconds(words) in (None, 540) for words in launches())
    assert "--shutdown-timeout 540` gives them nine minutes" in PAGE and f"within {GRACE_S:g} s" in PAGE


def test_the_job_is_one_that_goes_on():
    assert (JOB["apiVersion"], JOB["kind"], POD["restartPolicy"]) == ("batch/v1", "Job", "Never")  # podFailurePolicy needs Never
    (rule,) = JOB["spec"]["podFailurePolicy"]["rules"]
    assert rule == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]} and JOB["spec"]["backoffLimit"] > 0
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in POD["volumes"]}
    paths = [word.split("=")[1] for word in CONTAINER["command"] if "=/" in word]
    assert len(paths) == 2 and all(path.startswith(mounts["data"]) for path in paths), "what must outlive the pod"


def test_signals_and_words_are_those_of_the_code():
    (row,) = re.findall(r"^\| (SIG\w+(?:, | or )SIG.*?), any one rank", PAGE, re.MULTILINE)
    assert set(re.findall(r"SIG\w+", row)) == {signal.Signals(number).name for number in SIGNALS}
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    assert 'f"stopped by request after step ' in source and '"result.json").unlink()' in source


# ------------------------------------------------------------------------------------------------------ scripts that run


def commands(folder: Path, **scripts: str) -> dict[str, str]:
    """An environment in which these commands are these scripts."""
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    "log, result, again",
    [
        ("stopped by request after step 9; the same command resumes", False, True),
        ("stopped by request after step 9; the same command resumes\n12:00:00 exported", True, False),
        ("stopped by request after step 9\n12:00:00 started again\n12:00:09 RuntimeError: no", False, False),
        ("error: optim.lr=-1", False, False),
    ],
    ids=["stopped", "finished", "crashed", "refused"],
)
def test_slurm_requeues_what_was_stopped_and_nothing_else(tmp_path, log, result, again):
    (tmp_path / "out/run/logs").mkdir(parents=True)
    (tmp_path / "log.txt").write_text(f"12:00:00 {log}\n")
    srun = f'printf "%s\\n" "$@" > words; cp log.txt out/run/logs/rank_0.log; {"touch out/run/result.json;" if result else ""} exit 1'
    scontrol = 'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> requeued; fi'
    slurm = {"SLURM_JOB_ID": "42", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_RESTART_COUNT": "1"}
    subprocess.run(["bash", "-c", SBATCH], cwd=tmp_path, env=commands(tmp_path, srun=srun, scontrol=scontrol) | slurm, check=True)
    words = (tmp_path / "words").read_text().split("\n")
    assert words[:3] == ["torchrun", "--nnodes", "2"] and words[words.index("--rdzv-endpoint") + 1] == "node7:29500"
    assert "--output.path=out/run" in words and words[words.index("--rdzv-id") + 1] == "42-1"
    assert (tmp_path / "requeued").exists() == again
    assert not again or (tmp_path / "requeued").read_text() == "requeue 42\n"


def test_the_trap_waits_for_the_run_to_end(tmp_path):
    """The signal reaches the script, the script's pkill a rank, and the script ends after torchrun does."""
    run = "echo $$ > pid; trap 'sleep 0.5; touch saved; exit 0' TERM; while :; do sleep 0.05; done"
    env = commands(tmp_path, torchrun=run, pkill='printf "%s\\n" "$@" > words; kill -TERM $(cat pid)')
    script = subprocess.Popen(["bash", "-c", f"run=out\n{TRAP}\ntest -e saved"], cwd=tmp_path, env=env)
    try:
        deadline = time.monotonic() + 20
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        script.send_signal(signal.SIGUSR1)
        assert script.wait(20) == 0, "it did not wait for the save"
    finally:
        if script.poll() is None:
            script.kill()
    *flags, pattern, _ = (tmp_path / "words").read_text().split("\n")
    assert flags == ["-TERM", "-o", "-U", str(os.getuid()), "-f"]
    for shell in (TRAP, " ".join(HOOK["lifecycle"]["preStop"]["exec"]["command"])):
        assert pattern in shell and not re.search(pattern, shell), "pkill and pgrep would find the shell they are in"
    assert re.search(pattern, "/usr/bin/python3 -u train.py --config run.toml") and not re.search(pattern, "python torchrun train.py")
