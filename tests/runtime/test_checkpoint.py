"""Saving, finding and loading when nothing goes wrong: layouts, policies, retention, background saves, drift, the tool."""

from __future__ import annotations

import math
import os
import random
import sys
import threading
import time
from collections import Counter
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint

from parallel.local import run
from runtime.checkpoint import shards, store
from runtime.checkpoint.store import Store
from runtime.checkpoint.team import RankFailed
from runtime.errors import ConfigError, ModelError, UserError
from runtime.sections import CheckpointConfig
from tests.runtime.saving import IDENTITY, LAYOUTS, checkpointer, empty, gathered, resumed, run_folder, same, save, spread, whole
from tools.checkpoint import main as tool


@pytest.fixture
def folder():
    with run_folder() as path:
        yield path


def names(folder) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir() if p.name != ".lock")


def test_the_reference_is_not_trivial():
    assert not same(whole(1), whole(2))
    assert all(t.float().abs().sum() > 0 for t in whole(1).values())


def test_every_layout_loads_into_every_other(folder):
    def write(rank, world):
        for layout, (shape, _) in LAYOUTS.items():
            if torch.Size(shape).numel() == world:
                save(checkpointer(folder / layout, async_=layout == "fsdp2"), 3, layout)

    def read(rank, world):
        count = 0
        for source in LAYOUTS:
            for target, (shape, _) in LAYOUTS.items():
                if torch.Size(shape).numel() == world:
                    count += resumed(checkpointer(folder / source), target) == 3
        return count

    for world in (1, 2, 4):
        run(write, world)
    assert sum(run(read, world)[0] for world in (1, 2, 4)) == len(LAYOUTS) ** 2


def test_replicas_share_the_writing(folder):
    """Under replicate, each tensor is written once, and both ranks write some."""

    def work(rank, world):
        many = spread({f"w{i}": torch.full((64, 8), float(i)) for i in range(16)}, "replicate2")
        outcome = checkpointer(folder).save(1, many, {}, {})
        return outcome.nbytes, (outcome.path / f"__{rank}_0.distcp").stat().st_size

    (nbytes, first), (_, second) = run(work, 2)
    assert nbytes == 16 * 64 * 8 * 4
    assert min(first, second) > nbytes / 5
    assert first + second < 2 * nbytes


def test_what_a_checkpoint_holds(folder):
    def work(rank, world):
        ckpt = checkpointer(folder, config={"a.b": (1, 2)})
        outcome = save(ckpt, 7, "fsdp2")
        assert outcome.path == folder / "checkpoints/step_7" and not outcome.problem
        again = save(ckpt, 7, "fsdp2")
        assert again == outcome  # the same step twice is one save
        found = checkpointer(folder, config={"a.b": (1, 2)}).find()
        rng = ckpt.rng(found)["cpu"].tolist()
        return found.step, found.layout, rng

    assert run(work, 2) == [(7, {"world": 2}, [70] * 4), (7, {"world": 2}, [71] * 4)]
    assert names(folder) == ["latest", "step_7"]
    step = folder / "checkpoints/step_7"
    assert (folder / "checkpoints/latest").read_text() == "step_7\n"
    assert (step / "resolved.toml").read_text() == "x = 1\n"
    manifest = store.verify(step)
    assert manifest["files"].keys() | {store.MANIFEST} == {p.name for p in step.iterdir()}
    assert manifest["config"] == {"a.b": [1, 2]} and manifest["identity"] == IDENTITY

    def elsewhere(rank, world):
        said = []
        ckpt = checkpointer(folder, said, config={"a.b": (1, 2)})
        return ckpt.rng(ckpt.find()), said[-1]

    assert run(elsewhere, 1) == [
        (None, "random states are derived anew: the checkpoint is of layout {'world': 2}, this run has {'world': 1}")
    ]


def test_torch_itself_can_read_it(folder):
    def work(rank, world):
        path = save(checkpointer(folder), 2, "fsdp2").path
        into = {name: torch.zeros_like(t) for name, t in whole(0).items()}
        dist.checkpoint.load(into, checkpoint_id=path)
        return same(into, whole(2))

    assert run(work, 2) == [True, True]


# ------------------------------------------------------------------------------------------------------------- retention


def test_retention_keeps_the_newest_and_the_pinned(folder):
    def work(rank, world):
        ckpt = checkpointer(folder, keep=3)
        for step in range(1, 5):
            save(ckpt, step, "one")
        ckpt.store.pin(ckpt.store.path(2))
        (ckpt.store.path(3) / "state.json").write_text("x")  # damaged: it does not count, and is not deleted
        for step in range(5, 8):
            save(ckpt, step, "one")
            assert names(folder)[0] == "latest"

    run(work, 1)
    assert names(folder) == ["latest", "step_2", "step_2.pin", "step_3", "step_5", "step_6", "step_7"]


def test_retention_never_takes_the_newest_two(folder):
    def work(rank, world):
        ckpt = checkpointer(folder)
        for step in range(1, 4):
            save(ckpt, step, "one")
        for keep in (1, 2):
            assert ckpt.store.prune(keep) == []
        assert ckpt.store.prune(0) == []

    run(work, 1)
    assert names(folder) == ["latest", "step_2", "step_3"]


def test_retention_keeps_the_best(folder, said):
    """The lowest evaluation loss of the intact and healthy stays, of equals the newest; what was not evaluated is not ranked."""
    losses = {1: 2.0, 2: 1.5, 3: 1.5, 4: 0.1, 5: None, 6: math.nan, 7: 1.9, 8: 1.8}

    def work(rank, world):
        ckpt = checkpointer(folder)
        for step, loss in losses.items():
            ckpt.save(step, spread(whole(step), "one"), {}, {}, healthy=step != 4, eval_loss=loss)

    run(work, 1)
    assert names(folder) == ["latest", "step_3", "step_7", "step_8"]
    there = Store(folder)
    assert there.best() == there.path(3) and there.manifest(there.path(3))["eval_loss"] == 1.5
    code, listed = said("ls", folder)
    assert code == 0 and [line.partition("ranks")[2].partition("eval")[2] for line in listed.splitlines()] == [
        " loss 1.8000",
        " loss 1.9000",
        " loss 1.5000, the lowest",
    ]
    assert said("rm", folder, 3) == (2, f"error: {there.path(3)}: has the lowest evaluation loss; add --force to delete it all the same\n")
    rot(there.path(3))
    assert Store(folder).best() == there.path(8)
    assert Store(folder).ranked()[0] == there.path(3)  # which reads nothing
    assert said("rm", folder, 3) == (0, "step_3           deleted\n")


def test_losses_on_other_held_out_data_are_not_compared(folder):
    def work(rank, world):
        ckpt = checkpointer(folder)
        for step, (loss, data) in enumerate([(0.5, "old"), (0.1, "old"), (1.7, "new"), (1.9, "new"), (1.8, "new")], 1):
            ckpt.save(step, spread(whole(step), "one"), {}, {}, eval_loss=loss, eval_data=data)

    run(work, 1)
    assert names(folder) == ["latest", "step_3", "step_4", "step_5"]


def test_what_is_deleted_while_others_look_is_passed_over(folder, request):
    """By a run that is under way, between two looks of a tool."""

    def work(rank, world):
        ckpt = checkpointer(folder, keep=0)
        for step in (1, 2):
            ckpt.save(step, spread(whole(step), "one"), {}, {}, eval_loss=1.0)

    run(work, 1)
    there, stop = Store(folder), threading.Event()
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-5)  # between any two looks

    def come_and_go() -> None:
        while not stop.is_set():
            there.path(1).rename(folder / "away")
            (folder / "away").rename(there.path(1))

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        seen, looks, until = set(), 0, time.monotonic() + 30
        while looks < 150 or (len(seen) < 2 and time.monotonic() < until):
            seen |= {tuple(map(store.step_of, look())) for look in (there.healthy, there.ranked, there.complete)}
            looks += 1
    finally:
        stop.set()
        thread.join()
    assert seen == {(2,), (2, 1)}


def rot(path) -> None:
    """One bit of a tensor's file turns; sizes stay."""
    file = path / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_retention_counts_what_was_verified(folder):
    """A checkpoint that rots does not push an intact one out, however complete it looks; nor is a save the time to read them all again."""

    def work(rank, world):
        read, check = [], store.check_contents
        store.check_contents = lambda path, files: read.append(path.name) or check(path, files)
        ckpt = checkpointer(folder)
        for step in (2, 4):
            save(ckpt, step, "one")
        rot(ckpt.store.path(4))
        save(ckpt, 6, "one")
        assert names(folder) == ["latest", "step_2", "step_4", "step_6"]  # two intact ones: 6 and 2
        assert read.count("step_4") == 1 and set(read) == {"step_4"}
        save(ckpt, 8, "one")
        assert names(folder) == ["latest", "step_6", "step_8"] and set(read) == {"step_4"}
        read.clear()
        again = checkpointer(folder, keep=4)
        assert resumed(again, "one") == 8
        for step in (10, 12, 14):
            save(again, step, "one")
        assert names(folder) == ["latest", "step_10", "step_12", "step_14", "step_8"]
        assert read == ["step_8"]  # to resume from it; what deletes the oldest was known then
        third = checkpointer(folder, keep=4)
        third.find()
        read.clear()
        for step in (16, 18):
            save(third, step, "one")
        return read

    assert run(work, 1) == [["step_12", "step_10"]]  # once: they are of the four, and nobody in this process had read them


@pytest.fixture
def said(capsys):
    """said(arguments) -> the tool's exit code, and what it printed."""

    def call(*argv) -> tuple[int, str]:
        code = tool([str(a) for a in argv])
        out = capsys.readouterr()
        return code, out.out + out.err

    return call


def test_rm_leaves_something_intact(folder, said):
    def work(rank, world):
        ckpt = checkpointer(folder, keep=0)
        for step in (2, 4, 6, 8):
            ckpt.save(step, spread(whole(step), "one"), {}, {}, healthy=step != 4) or ckpt.wait()

    run(work, 1)
    at = Store(folder).path
    rot(at(8))
    rot(at(6))
    assert "damaged" not in said("ls", folder)[1]  # it looks at sizes only
    code, text = said("rm", folder, 4, 2)
    assert code == 2 and text == f"error: {at(4)}: is the newest intact checkpoint; add --force to delete it all the same\n"
    code, text = said("rm", folder, 2, 8)
    assert code == 2 and text == f"error: {at(2)}: is the newest healthy checkpoint; add --force to delete it all the same\n"
    assert len(Store(folder).steps()) == 4
    assert said("rm", folder, 8, 6, 8) == (0, "step_8           deleted\nstep_6           deleted\n")
    assert (folder / "checkpoints/latest").read_text() == "step_4\n"
    assert said("rm", folder, 4, 2, "--force")[0] == 0 and names(folder) == []
    nothing = "holds no checkpoints: there is nothing to verify"
    assert said("verify", folder) == (2, f"error: {folder / 'checkpoints'}: {nothing}\n") and said("ls", folder) == (0, "")


def test_rm_waits_for_no_run(folder, capsys):
    def work(rank, world):
        ckpt = checkpointer(folder, keep=0)
        for step in (2, 4):
            save(ckpt, step, "one")
        pid = os.fork()
        if pid == 0:
            os._exit(tool(["rm", str(folder), "2"]))
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert run(work, 1) == [2]
    assert names(folder) == ["latest", "step_2", "step_4"]
    assert tool(["rm", str(folder), "2"]) == 0
    assert run(lambda rank, world: resumed(checkpointer(folder), "one"), 1) == [4]  # this process holds the claim no longer
    capsys.readouterr()


def test_the_tool_meets_odd_folders(folder, said, monkeypatch):
    """One line and code 2, never a traceback."""

    def work(rank, world):
        ckpt = checkpointer(folder, keep=0)
        for step in (2, 4, 6):
            save(ckpt, step, "one")

    run(work, 1)
    latest = folder / "checkpoints/latest"
    latest.write_bytes(b"\xff\xfe")
    code, text = said("ls", folder)
    assert code == 0 and text.count("\n") == 3 and "latest" not in text
    latest.unlink()
    latest.mkdir()
    assert said("ls", folder)[0] == 0
    assert said("rm", folder, 2) == (2, f"step_2           deleted\nerror: {latest}: Is a directory\n")
    assert names(folder) == ["latest", "step_4", "step_6"]
    (folder / "checkpoints/step_4.pin").mkdir()
    assert said("pin", folder, 4)[0] == 0
    assert said("pin", folder, 4, "--off") == (2, f"error: {folder}/checkpoints/step_4.pin: Is a directory\n")

    def read_only(*args, **kwargs):
        raise OSError(30, "Read-only file system", str(folder / "checkpoints"))

    for name in ("touch", "rename"):
        monkeypatch.setattr(store.Path, name, read_only)
    for argv in (("pin", folder, 6), ("rm", folder, 4, "--force")):
        assert said(*argv) == (2, f"error: {folder}/checkpoints: Read-only file system\n")
    assert len(Store(folder).steps()) == 2


class Dies(BaseException):
    """Stands for the end of a process at a point of a save."""


def test_random_sequences_against_an_oracle(folder, monkeypatch, capsys):
    """Save, die at a random point of it, damage, rot, pin, unpin, rm, verify, restart; a few sets say what must be there."""
    dice, run_ = random.Random(0), Store(folder)
    run_.folder.mkdir()
    about = {"format": store.FORMAT, "written": "", "origin": None, "layout": {"world": 1}, "identity": {}, "config": {}}
    there, healthy, pins, short, rotten = set(), set(), set(), set(), set()  # steps; short and rotten: how they are damaged
    losses: dict[int, float | None] = {}
    step, seen, last = 0, [], 0
    done = Counter()

    def at(point: str) -> None:
        seen.append(point)
        if len(seen) == last:
            raise Dies

    def old(keep: int) -> list[int]:
        """What retention deletes, in its order. What is rotten does not count, and goes like any other: nobody has read it."""
        kept = sorted((there - short - rotten) & healthy)[-keep:]
        return sorted((s for s in there - short - pins - best() if len(kept) == keep and s < kept[0]), reverse=True)

    def best() -> set[int]:
        ranked = sorted((losses[s], -s) for s in (there - short - rotten) & healthy if losses[s] is not None)
        return {-step for _, step in ranked[:1]}

    def tool_(*argv: object) -> int:
        code = tool([str(a) for a in argv])
        capsys.readouterr()
        return code

    monkeypatch.setattr(store, "at", at)
    acts = ["save"] * 4 + ["die"] * 2 + ["short", "rot", "pin", "unpin", "rm", "rm --force", "rm --force", "verify", "restart"]
    for act in dice.choices(acts, k=2000):
        one = dice.choice(sorted(there)) if there else None
        if act in ("save", "die"):
            step += dice.randint(1, 3)
            keep, well, losses[step] = dice.randint(2, 4), dice.random() < 0.7, dice.choice((None, 1.0, 1.5, 2.0))
            seen, last = [], dice.randint(1, 18) if act == "die" else 0
            try:
                aside = run_.begin(step)
                files = {name: store.write_file(aside / name, b"%d" % step * 9) for name in ("data", *store.LIMITS)}
                store.write_manifest(aside, about | {"step": step, "healthy": well, "eval_loss": losses[step], "files": files})
                run_.publish(aside, step)
                run_.settle(keep)
                died = False
            except Dies:
                died = True
            last = 0
            done["died"] += died
            passed = seen[:-1] if died else seen
            if "rename" in passed:
                there.add(step)
                healthy |= {step} if well else set()
                gone = old(keep)[: passed.count("trash") if died else None]
                done["pruned"] += len(gone)
                there, pins = there - set(gone), pins - set(gone)
            if not died:
                assert (run_.folder / "latest").read_text() == f"step_{step}\n"
        elif act == "restart":
            run_.sweep()
            assert not [name for name in names(folder) if name.startswith(".")]
            begins = next((s for s in sorted(there, reverse=True) if intact(run_.path(s))), None)
            assert begins == max(there - short - rotten, default=None)
        elif one is None:
            continue
        elif act in ("short", "rot"):
            data = (run_.path(one) / "data").read_bytes()
            (run_.path(one) / "data").write_bytes(data[:-1] if act == "short" else data[:-1] + b"x")
            (short if act == "short" else rotten).add(one)
        elif act in ("pin", "unpin"):
            assert tool_("pin", folder, one, *["--off"] * (act == "unpin")) == 0
            (pins.add if act == "pin" else pins.discard)(one)
        elif act == "verify":
            assert tool_("verify", folder, one) == (2 if one in short | rotten else 0)
        else:
            whole = sorted(there - short - rotten, reverse=True)
            guarded = {one} & (pins | best() | set(whole[:1]) | set([s for s in whole if s in healthy][:1]))
            code = tool_("rm", folder, one, *["--force"] * (act != "rm"))
            assert code == (2 if guarded and act == "rm" else 0)
            done["refused"] += code == 2
            if code == 0:
                there, pins = there - {one}, pins - {one}
                newest = max(there - short, default=None)
                assert (run_.folder / "latest").exists() == (newest is not None)
                assert newest is None or (run_.folder / "latest").read_text() == f"step_{newest}\n"
        done[act] += 1
        assert {store.step_of(p) for p in run_.steps()} == there
        assert {store.step_of(p) for p in run_.complete()} == there - short
        assert {store.step_of(p) for p in run_.healthy()} == (there - short) & healthy
        assert {s for s in there if run_.pinned(run_.path(s))} == pins & there
    assert min(done.values()) > 50, done


def intact(path) -> bool:
    try:
        return bool(store.verify(path))
    except store.Damaged:
        return False


# -------------------------------------------------------------------------------------------------------------- policies


def test_policies(folder):
    def fresh(rank, world):
        ckpt = checkpointer(folder)
        assert ckpt.find() is None and ckpt.find("never") is None
        for step in (5, 10, 15):
            save(ckpt, step, "fsdp2")

    def auto(rank, world):
        return resumed(checkpointer(folder), "fsdp2")

    def branch(rank, world):
        said = []
        ckpt = checkpointer(folder, said)
        step = resumed(ckpt, "fsdp2", str(folder / "checkpoints/step_10"))
        save(ckpt, 12, "fsdp2")
        return step, said

    def never(rank, world):
        ckpt = checkpointer(folder)
        return ckpt.find("never"), ckpt.find("auto")

    run(fresh, 2)
    assert run(auto, 2) == [15, 15]
    (step, said), (_, silent) = run(branch, 2)
    assert step == 10 and not silent
    assert said[0].startswith("step_15 moved to") and said[1].startswith("resuming from")
    assert names(folder) == ["latest", "step_10", "step_12", "superseded_1"]
    assert run(auto, 2) == [12, 12]  # not 15, which is of the history that was left
    (step, said), _ = run(branch, 2)  # the same command again goes on: 12 goes back to 10
    assert step == 12
    (folder / "checkpoints/step_12/state.json").write_text("{}")
    (step, said), _ = run(branch, 2)  # its heir is damaged, so from the start of the branch
    assert step == 10 and "step_12 moved to" in said[0]
    assert run(never, 2)[0] == (None, None)
    assert names(folder) == ["superseded_1", "superseded_2", "superseded_3"]


def test_records_of_what_is_left_behind_are_kept(folder):
    """A copy beside the checkpoints, before the run that goes on without them rewinds its own."""
    records = folder / "metrics.jsonl"

    def work(rank, world):
        ckpt = checkpointer(folder)
        for step in (5, 10):
            save(ckpt, step, "one")
        records.write_text('{"step": 5}\n{"step": 10}\n')
        assert resumed(checkpointer(folder), "one") == 10
        assert names(folder) == ["latest", "step_10", "step_5"]  # nothing is left behind
        assert resumed(checkpointer(folder), "one", str(folder / "checkpoints/step_5")) == 5
        said = []
        assert checkpointer(folder, said).find("never") is None
        records.write_text('{"step": 1}\n')
        assert checkpointer(folder, said).find("never") is None
        records.write_text("")
        assert checkpointer(folder, said).find("never") is None
        return said

    (said,) = run(work, 1)
    assert names(folder) == ["superseded_1", "superseded_2", "superseded_3"]
    kept = {p.parent.name: p.read_text() for p in (folder / "checkpoints").glob("superseded_*/metrics.jsonl")}
    both = '{"step": 5}\n{"step": 10}\n'
    assert kept == {"superseded_1": both, "superseded_2": both, "superseded_3": '{"step": 1}\n'}
    assert [line.partition(" moved to ")[0] for line in said] == ["step_5", "no checkpoint, but the records so far,"]


def test_a_checkpoint_in_the_home_folder(folder, monkeypatch):
    def work(rank, world):
        for step in (5, 10):
            save(checkpointer(folder), step, "one")
        with pytest.raises(ConfigError, match=r"checkpoint\.resume='~nosuchuser/x' begins with a home folder that is not known here"):
            checkpointer(folder).find("~nosuchuser/x")
        return resumed(checkpointer(folder), "one", "~/checkpoints/step_5")

    monkeypatch.setenv("HOME", str(folder))
    assert run(work, 1) == [5]


def test_records_that_cannot_be_kept_stop_the_run(folder):
    """Nothing is moved, and nothing is left half copied."""

    def work(rank, world):
        ckpt = checkpointer(folder)
        save(ckpt, 5, "fsdp2")
        if rank == 0:
            (folder / "metrics.jsonl").write_text('{"step": 5}\n')

        def full(*paths):
            raise OSError(28, "No space left on device")

        store.shutil.copyfile = full
        where = r"checkpoints: cannot be resumed from: .*/superseded_1/metrics\.jsonl: No space left on device$"
        with pytest.raises(ModelError, match=where):
            checkpointer(folder).find("never")

    run(work, 2)
    assert names(folder) == ["latest", "step_5"]


def test_a_path_in_another_folder_starts_a_history_of_its_own(folder):
    def work(rank, world):
        other = checkpointer(folder / "a")
        for step in (1, 2):
            save(other, step, "one")
        path = str(folder / "a/checkpoints/step_2")
        steps = []
        for step in (4, 6):
            ckpt = checkpointer(folder / "b", keep=0)
            steps.append(resumed(ckpt, "one", path))
            save(ckpt, step, "one")
        store.shutil.rmtree(path)  # even without its beginning the history is recognized
        steps.append(resumed(checkpointer(folder / "b"), "one", path))
        return steps

    assert run(work, 1) == [[2, 4, 6]]
    assert names(folder / "b") == ["latest", "step_4", "step_6"]


@pytest.mark.parametrize("where, reason", [("nowhere", "there is no such folder"), ("checkpoints", "has no MANIFEST.json")])
def test_a_path_that_is_no_checkpoint(folder, where, reason):
    def work(rank, world):
        ckpt = checkpointer(folder)
        save(ckpt, 1, "one" if world == 1 else "fsdp2")
        with pytest.raises(ConfigError, match=f"checkpoint.resume=.*{where}' is not a checkpoint: {reason}; the newest .*/step_1$"):
            ckpt.find(str(folder / where))

    run(work, 2)


def test_another_run_in_the_folder_is_refused_with_the_difference(folder):
    rules = (("optim.*", "forbidden"), ("data.sources*", "allow"), ("identity.data", "allow"))
    config = {"optim.lr": 1.0, "log.every": 1, "data.sources": [{"path": "a"}, {"path": "b"}], "x.off": None}

    def work(rank, world):
        base = {"config": config, "rules": rules}
        save(checkpointer(folder, **base), 1, "fsdp2")

        def error(change=None, allow=False, **identity) -> str:
            said = []
            try:
                both = {"config": config | (change or {}), "identity": IDENTITY | identity}
                checkpointer(folder, said, rules=rules, allow_change=allow, **both).find()
            except ConfigError as e:
                return str(e)
            return "; ".join(said)

        other = {"data.sources": [{"path": "a"}, {"path": "c"}]}
        return (
            error(model={"layers": 2}),
            error({"optim.lr": 2.0, "log.every": 5}),
            error(other, data="other"),
            error(other, True, data="other"),
            error({"log.every": 5}),
        )

    first, second = run(work, 2)
    assert first[:3] == second[:3]
    model, forbidden, refused, allowed, free = first
    assert "step_1 is of another run: fingerprint of model was 'aa', now absent; fingerprint of model.layers was absent, now 2." in model
    assert "is of another run: optim.lr was 1.0, now 2.0. Restore" in forbidden
    assert "fingerprint of data was 'bb', now 'other'; data.sources.1.path was 'b', now 'c'" in refused and "allow_change=true" in refused
    assert "differs from the checkpoint: data.sources.1.path was 'b', now 'c'" in allowed and "resuming from" in allowed
    assert free.startswith("differs from the checkpoint: log.every was 1, now 5; resuming from")


def test_tensors_that_do_not_fit(folder):
    def work(rank, world):
        ckpt = checkpointer(folder)
        save(ckpt, 1, "fsdp2")
        found = ckpt.find()
        full = empty("fsdp2")
        first = next(iter(full))
        cases = {
            "extra is not in the checkpoint": full | {"extra": torch.zeros(2)},
            f"{first} is only in the checkpoint": {name: t for name, t in full.items() if name != first},
            r"count has shape \[\] in the checkpoint, \[1\] here": full | {"count": torch.zeros(1)},
            "count has dtype torch.float32 in the checkpoint, torch.float64 here": full | {"count": torch.zeros((), dtype=torch.float64)},
        }
        for message, tensors in cases.items():
            # one rank alone: the other is told
            with pytest.raises(ModelError, match=message):
                ckpt.load(found, tensors if rank == 1 else full)

    run(work, 2)


# ------------------------------------------------------------------------------------------------------------ background


def test_background_saves_hold_the_moment_of_the_call(folder):
    """The disk is slow and training changes the tensors at once; one save at a time, in order, seen by all in the same poll."""

    def work(rank, world):
        published, slow = [], store.CountedFile.close

        def close(self):
            time.sleep(0.1 * (1 + rank))
            slow(self)

        store.CountedFile.close = close
        ckpt = checkpointer(folder, async_=True, keep=0)
        polls = []
        for step in (1, 2):
            tensors = spread(whole(step), "fsdp2")
            assert ckpt.save(step, tensors, {"position": step}, {}) is None
            if step == 1:
                assert ckpt.poll() is None  # it is still being written
            ckpt.before_update()
            for t in tensors.values():
                t.fill_(-1)
            published.append(ckpt.store.path(step - 1).exists())
        while len(polls) < 2:
            if outcome := ckpt.poll():
                polls.append(outcome.step)
        assert threading.active_count() <= 2
        return published, polls, resumed(checkpointer(folder), "fsdp2")

    assert run(work, 2) == [([False, True], [1, 2], 2)] * 2


def late(rank: int) -> None:
    """Copies that begin when the step after them is long under way, on rank 1 longer still."""
    stage = shards.Snapshot.stage

    def slow(self) -> None:
        time.sleep(0.3 + 0.3 * rank)
        stage(self)

    shards.Snapshot.stage = slow


def test_the_copy_is_made_beside_the_step_and_its_update_waits_for_it(folder):
    def work(rank, world):
        late(rank)
        ckpt, tensors = checkpointer(folder, async_=True), spread(whole(1), "fsdp2")
        ckpt.before_update()  # nothing to wait for
        begun = time.monotonic()
        ckpt.save(1, tensors, {"position": 1}, {})
        asked = time.monotonic() - begun
        ckpt.before_update()
        waited = time.monotonic() - begun
        for t in tensors.values():
            t.fill_(-1)
        assert ckpt.wait().path is not None
        return asked, waited, resumed(checkpointer(folder), "fsdp2")

    for rank, (asked, waited, step) in enumerate(run(work, 2)):
        assert asked < 0.25 and waited >= 0.3 + 0.3 * rank and step == 1


def test_tensors_that_change_before_they_are_copied_are_an_error(folder):
    def work(rank, world):
        late(rank)
        ckpt, tensors = checkpointer(folder, async_=True), spread(whole(1), "fsdp2")
        ckpt.save(1, tensors, {"position": 1}, {})
        if rank == 1:
            next(iter(tensors.values())).fill_(-1)
        with pytest.raises(RankFailed, match=r"rank 1: AssertionError: .* was changed while it was copied"):
            ckpt.wait()
        return ckpt.store.steps()

    assert run(work, 2) == [[], []]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_from_a_gpu_is_of_the_moment_of_the_call(folder):
    """What was launched before the call is in it, what was launched after `before_update` is not; the host waits for neither."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ckpt, x = checkpointer(folder, async_=True), torch.zeros(1 << 27, device="cuda")
        for step in (1, 2):
            torch.cuda._sleep(1 << 28)  # about 0.15 s, in which nothing that follows has begun
            x.fill_(step)
            begun = time.monotonic()
            ckpt.save(step, {"x": x}, {"position": step}, {})
            ckpt.before_update()
            asked = time.monotonic() - begun
            x.fill_(-1)
            assert ckpt.wait().path is not None
            found = checkpointer(folder).find()
            back = {"x": torch.full_like(x, math.nan, device="cpu")}
            assert checkpointer(folder).load(found, back) == {"position": step}
            assert back["x"].eq(step).all()
        assert asked < 0.1  # at the second one, whose memory is there
    finally:
        dist.destroy_process_group()


def test_a_background_failure_comes_with_the_next_poll(folder):
    def work(rank, world):
        said = []
        ckpt = checkpointer(folder, said, async_=True)
        save(ckpt, 1, "fsdp2")
        if rank == 1:
            store.at = lambda point: (_ for _ in ()).throw(OSError(28, "No space left on device")) if point == "write" else None
        ckpt.save(2, spread(whole(2), "fsdp2"), {}, {})
        while (outcome := ckpt.poll()) is None:
            time.sleep(0.01)
        store.at = lambda point: None
        third = save(ckpt, 3, "fsdp2")
        return outcome.path, outcome.problem, said, third.path.name

    a, b = run(work, 2)
    assert a[:2] == b[:2] and b[2] == []
    assert a[0] is None and "rank 1" in a[1] and "No space left on device" in a[1] and "are free in" in a[1]
    assert [line.partition(": ")[0] for line in a[2]] == [f"checkpoint of step {n}" for n in (1, 2, 3)]
    assert a[2][1].endswith("the newest checkpoint is step 1")
    assert names(folder) == ["latest", "step_1", "step_3"]


# ------------------------------------------------------------------------------------------------------------- the folder


def test_two_runs_in_one_folder_are_refused(folder):
    held, done = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        Store(folder).claim()
        os.write(held[1], b"x")
        os.read(done[0], 1)
        os._exit(0)
    os.read(held[0], 1)
    with pytest.raises(UserError, match="another run is writing here"):
        Store(folder).claim(patience_s=0.2)
    os.kill(pid, 9)  # a run that was killed holds nothing
    os.waitpid(pid, 0)
    Store(folder).claim(patience_s=0.2)


@pytest.mark.parametrize("point, problem", [("mkdir", "exists, and was not written by this run"), ("rename", "Directory not empty")])
def test_a_checkpoint_that_appeared_meanwhile_is_not_touched(folder, point, problem):
    def work(rank, world):
        def appear(at):
            if at == point and not (folder / "checkpoints/step_2").exists():
                (folder / "checkpoints/step_2").mkdir()
                (folder / "checkpoints/step_2/theirs").write_text("x")

        ckpt = checkpointer(folder)
        save(ckpt, 1, "fsdp2")
        store.at = appear
        return save(ckpt, 2, "fsdp2").problem

    assert problem in run(work, 2)[1]
    assert [p.name for p in (folder / "checkpoints/step_2").iterdir()] == ["theirs"]


def test_the_tool(folder, said):
    def work(rank, world):
        ckpt = checkpointer(folder, keep=0)
        for step in (1, 2, 3, 4):
            save(ckpt, step, "one")

    run(work, 1)
    assert said("pin", folder, 2) == (0, "step_2           pinned\n")
    (folder / "checkpoints/step_3/state.json").write_text('{"position": 9}')
    code, text = said("ls", folder)
    assert code == 0 and [line.split()[0] for line in text.splitlines()] == ["step_4", "step_3", "step_2", "step_1"]
    assert text.splitlines()[0].endswith("latest") and text.splitlines()[2].endswith("pinned")
    code, text = said("verify", folder)
    assert code == 2 and "step_3           damaged: state.json: contents were changed" in text and text.count("intact") == 3
    assert said("verify", folder, 1, 2)[0] == 0
    for step, why in ((2, "is pinned"), (4, "is the newest intact checkpoint"), (9, "has no step_9")):
        code, text = said("rm", folder, step)
        assert code == 2 and why in text and text.startswith("error: ") and text.count("\n") == 1
    assert said("rm", folder, 3, 1)[0] == 0
    assert said("pin", folder, 2, "--off")[0] == 0
    assert said("rm", folder, 4, "--force")[0] == 0
    assert names(folder) == ["latest", "step_2"] and (folder / "checkpoints/latest").read_text() == "step_2\n"
    assert said("ls", folder / "no")[0] == 2


def test_due():
    def work(rank, world):
        ckpt = checkpointer(path)
        ckpt.cfg = CheckpointConfig(every=5)
        yes = [step for step in range(1, 12) if ckpt.due(step)]
        ckpt.cfg = CheckpointConfig(every=0)
        return yes, [step for step in range(1, 12) if ckpt.due(step)]

    with run_folder() as path:
        assert run(work, 1) == [([5, 10], [])]
        assert gathered({}) == {}
