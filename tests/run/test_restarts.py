"""Two torchruns, as on two nodes, that start their ranks again after one of them was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from runtime.metrics import read
from tests import launch
from tests.tiny import write_chats, write_config, write_model

ROOT = Path(__file__).resolve().parents[2]
EXTRA = "[train]\nsteps = {}\n[log]\nevery = 1\n[checkpoint]\nevery = 1\n"


def workers(agent: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]


def another(agent: subprocess.Popen, old: int, until: float) -> list[int]:
    while time.monotonic() < until:
        if (found := workers(agent)) and old not in found:
            return found
        time.sleep(0.01)
    raise AssertionError(f"torchrun {agent.pid} starts no other rank")


def restarts(pid: int, until: float) -> int:
    """What the rank is told, once it has become one."""
    while time.monotonic() < until:
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"TORCHELASTIC_RESTART_COUNT="):
                return int(entry.partition(b"=")[2])
        time.sleep(0.01)
    raise AssertionError(f"{pid} is no rank")


def test_ranks_of_two_nodes_find_each_other_again(tmp_path):
    """Only the node whose rank died counts a restart, and the store that ranks meet in is the one of before."""
    model, data = write_model(tmp_path / "model"), write_chats(tmp_path / "data.jsonl", 60)
    calm = ["--config", str(write_config(tmp_path / "calm.toml", model, data, tmp_path / "calm", EXTRA.format(12)))]
    assert launch.run(calm, 2, tmp_path / "logs").wait() == [0, 0]
    out = tmp_path / "out"
    config = write_config(tmp_path / "out.toml", model, data, out, EXTRA.format(12))
    nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test", "--max-restarts", "3"]
    endpoint = ["--rdzv-endpoint", f"localhost:{launch.free_port()}"]
    command = [sys.executable, "-m", "torch.distributed.run", *nodes, *endpoint, "train.py", "--config", str(config)]
    agents, said = [], open(tmp_path / "torchrun.txt", "ab")  # noqa: SIM115
    try:
        for _ in range(2):
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            agents.append(subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, env=env))
        until = time.monotonic() + 120
        first = {agent.pid: None for agent in agents}
        while not all(first.values()):
            first |= {agent.pid: pid for agent in agents for pid in workers(agent)}
            assert time.monotonic() < until and all(agent.poll() is None for agent in agents), (tmp_path / "torchrun.txt").read_text()
            time.sleep(0.01)
        os.kill(first[agents[1].pid], signal.SIGKILL)  # it has met nobody yet: the other rank waits for it, and does not end by itself
        begun_again = {agent.pid: pid for agent in agents for pid in another(agent, first[agent.pid], until)}
        counts = [restarts(begun_again[agent.pid], until) for agent in agents]
        while not (out / "checkpoints" / "step_2").exists():
            assert time.monotonic() < until and all(agent.poll() is None for agent in agents), (tmp_path / "torchrun.txt").read_text()
            time.sleep(0.02)
        os.kill(begun_again[agents[1].pid], signal.SIGKILL)
        codes = [agent.wait(until + 120 - time.monotonic()) for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                agent.terminate()
                agent.wait(60)
        said.close()
    text = (tmp_path / "torchrun.txt").read_text(errors="replace")
    assert codes == [0, 0], text
    assert counts == [0, 1], "nodes that count alike show nothing"
    assert "resuming from" in text
    kept = ("step", "loss", "grad_norm", "lr", "tokens")
    found, wanted = ([[r[key] for key in kept] for r in read(folder / "metrics.jsonl")] for folder in (out, tmp_path / "calm"))
    assert found == wanted and len(found) == 12
