"""A rank that dies, stops, hangs or fails: the others end within the limit and name it; a slow one is no error."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch.distributed as dist

import train
from objective import lm
from parallel import mesh, peers
from parallel import start as start_module
from parallel.peers import BEAT_S, SILENT_S, Beat, about_peers, behind, blame, overdue, process, silent
from runtime.checkpoint import store
from runtime.checkpoint.team import RankFailed
from runtime.metrics import read
from tests import launch
from tests.tiny import write_chats, write_config, write_model

LIMIT_S = 3.0
AFTER_S = 6.0  # two looks and the ending, on a busy machine
EXTRA = """
[train]
steps = {steps}
[log]
every = 1
[checkpoint]
every = {every}
[parallel]
timeout_s = {limit}
{axes}
"""
SHARD = "shard = 2"
CONTEXT = "context = 2"
TENSOR = "tensor = 2"
HSDP = "replicate = 2\nshard = 2"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("peers")
    return write_model(root / "model"), write_chats(root / "data.jsonl", 60)


def start(base, out: Path, axes: str, steps: int = 100_000, limit: float = LIMIT_S, every: int = 2) -> launch.Ranks:
    """Ranks of a run that ends by itself only after `steps`."""
    world = 4 if axes == HSDP else 2
    out.parent.mkdir(exist_ok=True)
    config = write_config(out.parent / "c.toml", *base, out, EXTRA.format(steps=steps, axes=axes, limit=limit, every=every))
    return launch.start(["--config", str(config)], world, out / "out")


def until_step(ranks: launch.Ranks, out: Path, step: int) -> None:
    while not (out / "metrics.jsonl").exists() or not any(r["step"] >= step for r in read(out / "metrics.jsonl")):
        assert not ranks.poll(), ranks.output()
        time.sleep(0.01)


def others_end(ranks: launch.Ranks, out: Path, victim: int, within_s: float) -> str:
    """The last line that every rank but `victim` ends with, in time: on stderr and in its log."""
    others, deadline = set(range(len(ranks.pids))) - {victim}, time.monotonic() + within_s
    while not others <= ranks.codes.keys() and time.monotonic() < deadline:
        ranks.poll()
        time.sleep(0.01)
    ended = dict(ranks.codes)
    ranks.signal(signal.SIGKILL)
    ranks.wait()
    assert others <= ended.keys(), f"still there: {others - ended.keys()}\n{ranks.output()}"
    assert {ended[r] for r in others} == {1}, ranks.output()
    lines = set()
    for rank in others:
        lines.add(ranks.output(rank).rstrip().splitlines()[-1])
        logged = (out / "logs" / f"rank_{rank}.log").read_text().rstrip().splitlines()
        assert logged[-1].endswith(ranks.output(rank).rstrip().splitlines()[-1])
        assert sum("error: " in line for line in logged) == 1
    assert len(lines) == 1, lines  # all name the same
    line = lines.pop()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(("axes", "victim"), [(SHARD, 1), (SHARD, 0), (TENSOR, 1)])
def test_killed(base, tmp_path, axes, victim):
    out = tmp_path / "out"
    ranks = start(base, out, axes, limit=600)  # nobody waits for the limit
    until_step(ranks, out, 3)
    time.sleep(2 * BEAT_S)
    ranks.signal(signal.SIGKILL, victim)
    line = others_end(ranks, out, victim, AFTER_S)
    assert f"rank {victim}" in line
    assert "is gone" in line
    assert "its process ended" in line
    assert f"{out / 'checkpoints' / 'step_'}" in line
    assert "the same command resumes" in line
    if victim:
        assert " in step " in line
    else:
        assert "meeting point" in line


@pytest.mark.parametrize(("victim", "phase"), [(1, "identity"), (0, "inputs")])
def test_killed_before_there_is_a_group(base, tmp_path, monkeypatch, victim, phase):
    """Nothing limits how long a rank may read and tokenize, so those that wait for it look whether it is there."""
    name = {"identity": "identity", "inputs": "read_inputs"}[phase]
    work, arrived = getattr(train, name), tmp_path / "arrived"

    def waits(*args):
        if os.environ["RANK"] == str(victim):
            arrived.touch()
            time.sleep(100)
        return work(*args)

    monkeypatch.setattr(train, name, waits)
    if victim == 0:  # it leads its node; the store is then torchrun's, here this process's
        monkeypatch.setattr(launch, "free_port", lambda: store.port)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = start(base, tmp_path / "out", SHARD)
    while not arrived.exists():
        assert not ranks.poll(), ranks.output()
        time.sleep(0.01)
    time.sleep(1)
    assert not ranks.poll(), "a rank that is only slow is waited for"
    ranks.signal(signal.SIGKILL, victim)
    other = 1 - victim
    assert ranks.wait(AFTER_S)[other] == 1
    last = ranks.output(other).rstrip().splitlines()[-1]
    assert f"rank {victim} is gone (its process {ranks.pids[victim]} ended in phase '{phase}')" in last, last


def early(base, out: Path, axes: str, victim: int, survivors: set[int], within_s: float = 60) -> str:
    """The one line that each rank but `victim`, which ends by itself, ends with before there is a group: no traceback, code 1."""
    out.parent.mkdir(exist_ok=True)
    config = write_config(out.parent / "c.toml", *base, out, EXTRA.format(steps=100_000, axes=axes, limit=600, every=0))
    ranks = launch.start(["--config", str(config)], len(survivors) + 1, out.parent / "logs")
    codes = ranks.wait(within_s)
    assert {codes[r] for r in survivors} == {1} and codes[victim] in (-signal.SIGTERM, -signal.SIGKILL, 130), (codes, ranks.output())
    lines = set()
    for rank in survivors:
        assert "Traceback" not in ranks.output(rank), ranks.output(rank)
        said = ranks.output(rank).rstrip().splitlines()
        assert [line for line in said if "error: " in line] == said[-1:], said
        lines.add(said[-1])
    assert len(lines) == 1, lines
    return lines.pop()


def ends_in(monkeypatch, place, name: str, rank: int, number: int) -> None:
    """Rank `rank` ends where it calls `name`, once the others wait for it there."""
    work = getattr(place, name)

    def does(*args, **kwargs):
        if os.environ["RANK"] == str(rank):
            time.sleep(0.8)
            os.kill(os.getpid(), number)
        return work(*args, **kwargs)

    monkeypatch.setattr(place, name, does)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize(("place", "name"), [(mesh, "sizes"), (train, "read_inputs")], ids=["layout", "inputs"])
def test_rank_0_ends_before_there_is_a_group(base, tmp_path, monkeypatch, place, name, number):
    ends_in(monkeypatch, place, name, 0, number)
    line = early(base, tmp_path / "out", SHARD, 0, {1})
    gone = "error: the ranks' meeting point is gone, in phase '"
    assert line.startswith((gone, "error: rank 0 was stopped in phase") if number == signal.SIGINT else gone)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_who_are_left_name_the_rank_that_ended(base, tmp_path, monkeypatch, number):
    ends_in(monkeypatch, train, "identity", 1, number)
    line = early(base, tmp_path / "out", "shard = 3", 1, {0, 2})
    how = "was stopped in phase" if number == signal.SIGINT else "is gone (its process"
    assert line.startswith(f"error: rank 1 {how}") and "in phase 'identity'" in line


def test_the_store_is_gone_when_a_rank_connects_once_more(base, tmp_path, monkeypatch):
    """A client of torch's goes on trying for half an hour."""

    class Late(dist.PrefixStore):
        def clone(self):
            (tmp_path / os.environ["RANK"]).touch()
            while not ((tmp_path / "0").exists() and (tmp_path / "1").exists()):
                time.sleep(0.01)
            if os.environ["RANK"] == "0":
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
            return super().clone()

    monkeypatch.setattr(dist, "PrefixStore", Late)
    monkeypatch.setattr(peers, "MEET_AGAIN_S", 1.0)
    assert "meeting point is gone, in phase 'peers'" in early(base, tmp_path / "out", SHARD, 0, {1})


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_never_comes(base, tmp_path, monkeypatch, victim):
    monkeypatch.setattr(start_module, "MEET_S", 1.0)
    ends_in(monkeypatch, dist, "rendezvous", victim, signal.SIGTERM)
    line = early(base, tmp_path / "out", SHARD, victim, {1 - victim})
    if victim:
        assert "error: the 2 ranks did not all meet at 127.0.0.1:" in line and "within 1 s: some have ended or were never started" in line
    else:
        assert "error: nobody answers at 127.0.0.1:" in line and "rank 0 has ended or was never started" in line


def test_a_rank_that_does_not_say_hello(base, tmp_path, monkeypatch):
    """It has come to the store, as old processes have, but is not of this start."""
    monkeypatch.setattr(start_module, "MEET_S", 1.0)
    ends_in(monkeypatch, start_module, "this_machine", 1, signal.SIGTERM)
    line = early(base, tmp_path / "out", SHARD, 1, {0})
    assert "error: of 2 ranks, 1 did not come within 1 s: they have ended or were never started" in line


def test_a_port_that_another_program_has(base, tmp_path, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setattr(launch, "free_port", lambda: other.getsockname()[1])
        ranks = launch.start(["--config", "none.toml"], 1, tmp_path / "logs")
        assert ranks.wait(AFTER_S) == [1]
    assert re.search(r"^error: cannot listen at 127\.0\.0\.1:\d+: another program, or another torchrun, does", ranks.output(), re.MULTILINE)


def stops_in_a_save(rank: int):
    return lambda point: point == "write" and dist.get_rank() == rank and os.kill(os.getpid(), signal.SIGSTOP)


def test_stopped(base, tmp_path, monkeypatch):
    """Four runs at once, as all wait for the limit. Without a launcher rank 0 holds the store, which then hangs, too."""
    runs = []
    for name, axes, victim in (("a", CONTEXT, 1), ("b", SHARD, 0)):
        out = tmp_path / name / "out"
        runs.append((start(base, out, axes, every=0), out, victim))
        until_step(*runs[-1][:2], 3)
        runs[-1][0].signal(signal.SIGSTOP, victim)
    for name, victim in (("c", 1), ("d", 0)):
        monkeypatch.setattr(store, "at", stops_in_a_save(victim))  # where collectives may take longer
        out = tmp_path / name / "out"
        runs.append((start(base, out, SHARD), out, victim))
    for ranks, out, victim in runs:
        line = others_end(ranks, out, victim, LIMIT_S + SILENT_S + AFTER_S)
        assert f"rank {victim}" in line
        assert "does not answer" in line
        assert "its process is stopped" in line
        assert ("meeting point" in line) == (victim == 0)


def in_loss(monkeypatch, rank: int, step: int, does) -> None:
    """`does` runs on `rank` in its `step`-th micro-batch, before the loss."""
    real, calls = lm.loss, []

    def loss(*args):
        calls.append(1)
        if dist.get_rank() == rank and len(calls) == step:
            does()
        return real(*args)

    monkeypatch.setattr(lm, "loss", loss)


def endless() -> None:
    while True:
        time.sleep(0.1)


def test_hanging_main_thread(base, tmp_path, monkeypatch):
    in_loss(monkeypatch, 3, 3, endless)
    out = tmp_path / "out"
    line = others_end(start(base, out, HSDP), out, 3, LIMIT_S + AFTER_S + 10)  # 10: until step 3
    assert "rank 3 hangs" in line
    assert "has not joined a collective" in line
    assert "in step 3" in line
    assert "test_peers.py" in line
    assert "endless" in line
    assert not any(f"rank {r}" in line for r in range(3))
    assert "endless" in (out / "logs" / "rank_3.log").read_text()  # the hanging one says where it hangs


def fail() -> None:
    raise ValueError("the moon is full")


def test_failing_rank(base, tmp_path, monkeypatch):
    in_loss(monkeypatch, 1, 3, fail)
    out = tmp_path / "out"
    ranks = start(base, out, SHARD, limit=600)
    line = others_end(ranks, out, 1, AFTER_S + 10)
    assert "rank 1 failed: ValueError: the moon is full" in line
    assert ranks.codes[1] == 1
    assert "Traceback" in (out / "logs" / "rank_1.log").read_text()
    assert ranks.output(1).startswith(f"rank 1: ValueError: the moon is full (traceback in {out / 'logs' / 'rank_1.log'})")
    assert "error: " not in ranks.output(1)


def test_failing_rank_0_is_named_although_it_holds_the_store(base, tmp_path, monkeypatch):
    in_loss(monkeypatch, 0, 2, fail)
    out = tmp_path / "out"
    assert "rank 0 failed: ValueError: the moon is full" in others_end(start(base, out, TENSOR, limit=600), out, 0, AFTER_S + 10)


def test_slow_rank_is_no_error(base, tmp_path, monkeypatch):
    in_loss(monkeypatch, 1, 2, lambda: time.sleep(0.75 * LIMIT_S))
    ranks = start(base, tmp_path / "out", SHARD, steps=3)
    assert ranks.wait(60) == [0, 0], ranks.output()
    assert "error: " not in ranks.output()
    assert "TCPStore" not in ranks.output()  # nor noise of a store that went before its clients


def test_preparing_the_data_may_take_longer_than_the_limit(base, tmp_path, monkeypatch):
    """Nobody waits for it in a collective."""
    work = train.read_inputs

    def slow(*args):
        if os.environ["RANK"] == "0":
            time.sleep(2 * LIMIT_S)
        return work(*args)

    monkeypatch.setattr(train, "read_inputs", slow)
    begun = time.monotonic()
    ranks = start(base, tmp_path / "out", SHARD, steps=2)
    assert ranks.wait(60) == [0, 0], ranks.output()
    assert time.monotonic() - begun > 2 * LIMIT_S and "error: " not in ranks.output()


@pytest.mark.parametrize("victim", [1, 0])
def test_a_rank_that_waits_outside_of_collectives_is_ended_too(base, tmp_path, monkeypatch, victim):
    """Its main thread cannot notice; the thread does, although the store goes with rank 0."""
    in_loss(monkeypatch, 1 - victim, 3, endless)
    out = tmp_path / "out"
    ranks = start(base, out, SHARD, limit=600)
    until_step(ranks, out, 2)
    time.sleep(0.5)
    ranks.signal(signal.SIGKILL, victim)
    line = others_end(ranks, out, victim, AFTER_S + 5)
    assert ("rank 1 is gone" if victim else "rank 0, which holds the ranks' meeting point, is gone") in line
    assert "endless" in (out / "logs" / f"rank_{1 - victim}.log").read_text()


# ------------------------------------------------------------------------------------------------------ made-up beats


def beats(*issued: dict[str, int], n: int = 5, machine: str = "elsewhere") -> dict[int, Beat]:
    return {r: Beat(n=n, step=7, issued=groups, host=f"host{r}", pid=100 + r, machine=machine) for r, groups in enumerate(issued)}


def test_behind_is_who_waits_for_nobody():
    assert behind(beats({"w": 8}, {"w": 8}, {"w": 7}, {"w": 8})) == [2]
    assert behind(beats({"w": 8}, {"w": 8})) == []
    # rank 2 waits for 1, which waits for 0
    assert behind(beats({"a": 3}, {"a": 4, "b": 3}, {"b": 4})) == [0]
    # a group that only some ranks are in says nothing about others
    assert behind(beats({"w": 8, "a": 90}, {"w": 8, "a": 90}, {"w": 8, "b": 1}, {"w": 8, "b": 1})) == []
    # two hang
    assert behind(beats({"w": 8}, {"w": 7}, {"w": 7})) == [1, 2]


def test_silence_comes_before_counts():
    before = beats({"w": 8}, {"w": 7}, {"w": 7})
    after = beats({"w": 8}, {"w": 7}, {"w": 7}, n=11)
    after[1].n = 5
    assert silent(before, after) == [1]
    text = blame(after, silent(before, after), "here")
    assert text == "rank 1 does not answer (last seen in step 7 on host host1, pid 101)"
    after[1].left = True
    assert silent(before, after) == []
    after[2].at = "objective/lm.py:3 loss"
    after[2].issued = {"w": 6}
    assert blame(after, [], "here") == (
        "rank 2 hangs: it has not joined a collective that others wait in (at objective/lm.py:3 loss, in step 7 on host host2, pid 102)"
    )
    assert blame(beats({"w": 1}, {"w": 1}), [], "here") == ""


def test_only_nccl_needs_the_clock():
    assert overdue(beats({"nccl:0": 8, "gloo:0": 3}, {"nccl:0": 7, "gloo:0": 3}), [], 0)
    assert not overdue(beats({"nccl:0": 8, "gloo:0": 3}, {"nccl:0": 7, "gloo:0": 3}), [], 1)  # it waits for nobody
    assert not overdue(beats({"nccl:0": 8, "gloo:0": 4}, {"nccl:0": 8, "gloo:0": 3}), [], 0)  # a save: gloo has its own limit
    assert overdue(beats({"nccl:0": 8, "gloo:0": 3}, {"nccl:0": 8, "gloo:0": 3}), [1], 0)
    assert not overdue(beats({"nccl:0": 8, "gloo:0": 3}, {"nccl:0": 8, "gloo:0": 3}), [], 0)


def test_processes_are_seen_on_the_same_machine_only():
    mine, pid = Beat(), os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    child = Beat(pid=pid)
    assert process(mine, mine.machine) == process(child, mine.machine) == "runs"
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    assert process(child, mine.machine) == "stopped"
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert process(child, mine.machine) == "ended"  # a zombie
    os.waitpid(pid, 0)
    assert process(child, mine.machine) == "ended"
    assert process(child, "elsewhere") == process(child, "") == ""


def test_what_is_about_peers():
    gloo = RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")
    assert about_peers(gloo)
    assert about_peers(dist.DistNetworkError("Connection reset by peer"))
    try:
        try:
            raise gloo
        except RuntimeError as error:
            raise KeyError("while closing") from error
    except KeyError as error:
        assert about_peers(error)
    assert not about_peers(None)
    assert not about_peers(RuntimeError("CUDA error: out of memory"))
    assert not about_peers(RankFailed(1, "ValueError", "ValueError: the moon is full"))
