"""Kills training runs at random moments and starts them again, until so many kills are counted.

    python -m tests.chaos --kills 1000 [--seed 0] [--out benchmarks/results/chaos.json] [--each 10] [--folder DIR]

A run is train.py's main on two gloo ranks, forked from this process: a few steps with packing, accumulation, a checkpoint after every
other step and an export. It is killed (SIGKILL, one rank or both), started again by the same command, killed again, until it gets
through. Then every record it logged, and every byte it exported, must equal those of the same run that nobody disturbed; that
includes records of steps that a later start did once more.

A visit is `--each` kills of one combination of features. Visit v takes choice v modulo n of each factor of `FACTORS`; the numbers
of choices have no common divisor, so all 1,260 combinations come in turn, and soon every pair of choices.

The moment: with probability `AIM` somewhere in one of the next saves, else anywhere between the fork and the time a whole run takes. A
rank notes in memory shared with this process whether it saves and how far it is, so what a kill has hit is read, not guessed. A
signal that reaches no living rank is no kill. Survivors must end by themselves, unless the killed rank had not met them yet (had not
come to the key-value store in which ranks find each other): then nobody but a launcher knows of it, and the harness ends them as
one does.

Counted, beside kills: hangs (ranks that outlive a killed one by `SURVIVE_S`, or a start that takes more than `START_S`), manual
actions (starts that end by themselves, but not well: a person would have to look; the harness tries the same command once more),
lost runs (that fails too), and records and exports that differ. All but kills have to be 0, or the exit code is 1, and the folders of
what went wrong stay.

The counts live in a file and are written after each visit. The same command goes on from there, up to `--kills` in all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import mmap
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from parallel.start import Launch
from runtime.checkpoint import checkpointer, store
from runtime.metrics import read
from tests import launch
from tests.model import golden
from tests.tiny import write_chats, write_model

WORLD = 2
AIM = 0.6  # of the kills are aimed at a save
ALL = 0.25  # of the kills take both ranks, as a node that goes away does
SURVIVE_S = 30.0
START_S = 120.0
PATIENCE = 12  # kills of one run, after which it may go on undisturbed
BASE = """
[train]
steps = 10
accumulate = 2
seed = {seed}
[optim]
lr = 1e-2
[log]
every = 1
"""
LORA = "[lora]\nrank = 4\ndropout = 0.2\ntargets = {}\n"
TRAINED = {
    "lora": LORA.format('"all-linear"'),
    "lora and modules": LORA.format('["q_proj", "v_proj"]') + 'train_modules = ["norm", "embed_tokens"]\n',
    "full": "",
}
SCHEDULES = {
    "cosine": '[schedule]\nkind = "cosine"\nwarmup = 0.2\n',
    "linear": '[schedule]\nkind = "linear"\nmin = 0.1\n',
    "constant": '[schedule]\nkind = "constant"\nwarmup = 3\n',
}
SAVE = "[checkpoint]\nevery = 2\n"
FACTORS: dict[str, dict[str, str]] = {
    "layout": {
        "shard 2": "[parallel]\n",
        "tensor 2": "[parallel]\ntensor = 2\n",
        "context 2": "[parallel]\ncontext = 2\n",
        "replicate 2": "[parallel]\nreplicate = 2\n",
    },
    "family": dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma3_text"), ""),  # cases of tests/model/golden.py
    "with": {
        "saves in the background": SAVE + "async = true\n",
        "nothing else": SAVE,
        "evaluation": SAVE + "[eval]\nsplit = 0.2\nevery = 3\npatience = 9\n",
        "recomputation": SAVE + '[recompute]\nkind = "full"\n',
        "optimizer on the host": SAVE + "[offload]\noptimizer = true\n",
        "bf16 masters": SAVE + '[precision]\nmasters = "bf16"\n',
        "tiles": SAVE + "keep = 3\n[tiling]\nmlp = 24\nlogits_mib = 1\n",
    },
    "trains": {f"{name}, {schedule}": TRAINED[name] + SCHEDULES[schedule] for schedule in SCHEDULES for name in TRAINED},
}
assert all(math.gcd(len(a), len(b)) == 1 for a in FACTORS.values() for b in FACTORS.values() if a is not b)


# ---------------------------------------------------------------------------------------------------------------- the runs


def combination(visit: int) -> dict[str, str]:
    return {name: list(choices)[visit % len(choices)] for name, choices in FACTORS.items()}


@dataclass(frozen=True)
class Case:
    """The files of one combination: `argv(out)` is the command of a run with the output folder `out`."""

    folder: Path
    text: str

    def argv(self, out: Path) -> list[str]:
        return ["--config", str(self.folder / "case.toml"), f"--output.path={out}"]

    @classmethod
    def write(cls, folder: Path, choice: dict[str, str], seed: int) -> Case:
        model = write_model(folder / "model")
        size = json.loads((model / "config.json").read_text())["vocab_size"]
        golden.write_config(model, choice["family"], vocab_size=size, initializer_range=0.1)
        data = write_chats(folder / "data.jsonl", 60, seed)
        text = f'[model]\npath = "{model}"\ninit = "random"\n[output]\npath = "{folder}"\n'
        text += f'[data]\ntokens = 128\nmax_length = 128\ncache = "{folder / "cache"}"\n'
        text += f'[[data.sources]]\npath = "{data}"\nformat = "chat"\n' + BASE.format(seed=seed)
        chosen = "".join(choices[choice[name]] for name, choices in FACTORS.items())
        text += chosen.replace("dropout = 0.2", "dropout = 0.0") if choice["layout"] == "context 2" else chosen  # refused there
        (folder / "case.toml").write_text(text, encoding="utf-8")
        return cls(folder, text)


def records(out: Path) -> dict[tuple, tuple]:
    """What a run has logged: by step (and kind), the numbers that do not depend on the clock."""
    if not (out / "metrics.jsonl").exists():
        return {}
    timeless = ("loss", "grad_norm", "lr", "tokens", "epoch", "eval_loss", "eval_tokens")
    found = {}
    for record in read(out / "metrics.jsonl"):
        found[record["step"], "loss" in record] = tuple((key, record[key]) for key in timeless if key in record)
    return found


def digest(folder: Path) -> str:
    """Of the tensors of an export."""
    files = sorted(folder.glob("*.safetensors"))
    assert files, f"nothing in {folder}"
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


# ------------------------------------------------------------------------------------------------------------------- watch


class Watch:
    """What each rank is doing: bytes it shares with this process, which stay as they were when it dies.

    saving: a save goes on. begun: how many have begun since the start. point: the last point of a save (`store.at`) it came to.
    met: it has found the other ranks.
    """

    POINTS = ("", "mkdir", "plan", "open", "write", "fsync", "fsync_folder", "rename", "latest", "trash", "delete", "supersede")

    def __init__(self):
        self._bytes = mmap.mmap(-1, 4 * WORLD)

    def reset(self) -> None:
        self._bytes[:] = bytes(len(self._bytes))

    def saving(self, rank: int) -> bool:
        return self._bytes[4 * rank] == 1

    def begun(self) -> int:
        return max(self._bytes[4 * rank + 1] for rank in range(WORLD))

    def point(self, rank: int) -> str:
        return self.POINTS[self._bytes[4 * rank + 2]]

    def met(self, rank: int) -> bool:
        return self._bytes[4 * rank + 3] == 1

    @contextmanager
    def installed(self) -> Iterator[Watch]:
        """Ranks that are forked inside write here."""
        write, at, meet = checkpointer.Checkpointer._write, store.at, Launch.__init__

        def place() -> int:
            return 4 * int(os.environ["RANK"])

        def watched(self_, *args):
            self._bytes[place() + 1] += 1
            self._bytes[place()] = 1
            try:
                return write(self_, *args)
            finally:
                self._bytes[place()] = 0

        def noted(point: str) -> None:
            self._bytes[place() + 2] = self.POINTS.index(point)

        def met(self_) -> None:
            meet(self_)
            self._bytes[place() + 3] = 1

        checkpointer.Checkpointer._write, store.at, Launch.__init__ = watched, noted, met
        try:
            yield self
        finally:
            checkpointer.Checkpointer._write, store.at, Launch.__init__ = write, at, meet


@dataclass(frozen=True)
class Pace:
    """How long the undisturbed run took, and one of its saves."""

    whole_s: float
    save_s: float


@dataclass(frozen=True)
class Calm:
    """The undisturbed run: what all others must equal."""

    pace: Pace
    records: dict[tuple, tuple]
    digest: str


def undisturbed(case: Case, watch: Watch) -> Calm:
    out = case.folder / "calm"
    watch.reset()
    begun = time.monotonic()
    ranks = launch.start(case.argv(out), WORLD, out / "out")
    saving = 0.0
    while not ranks.poll():
        assert time.monotonic() < begun + START_S, f"the undisturbed run hangs\n{ranks.output()}"
        time.sleep(0.001)
        saving += 0.001 * watch.saving(0)
    assert ranks.wait() == [0] * WORLD, f"the undisturbed run fails\n{ranks.output()}\n{case.text}"
    whole, found = time.monotonic() - begun, records(out)
    steps = [dict(values)["loss"] for (_, trained), values in found.items() if trained]
    assert len(set(steps)) == len(steps) == 10 and all(map(math.isfinite, steps)), "a run in which nothing happens compares nothing"
    assert watch.begun() == 5 and watch.met(0) and watch.met(1) and not watch.saving(0) and watch.point(0), "the watch sees nothing"
    return Calm(Pace(whole, max(0.005, saving / watch.begun())), found, digest(out / "export"))


def strike(ranks: launch.Ranks, watch: Watch, dice: random.Random, pace: Pace) -> tuple[list[int], str | None]:
    """Waits for a random moment and kills. Returns who died of it (nobody, if the run was faster), and the point of the save
    in which it happened, or None outside of saves."""
    victims = list(range(WORLD)) if dice.random() < ALL else [dice.randrange(WORLD)]
    begun = time.monotonic()
    if dice.random() < AIM:
        number, later = dice.randint(1, 3), dice.uniform(0, pace.save_s)
        while watch.begun() < number and not ranks.poll() and time.monotonic() < begun + START_S:
            time.sleep(0.0005)
        time.sleep(later)
    else:
        until = begun + dice.uniform(0, pace.whole_s)
        while time.monotonic() < until and not ranks.poll():
            time.sleep(0.001)
    ranks.poll()
    for rank in victims:
        ranks.signal(signal.SIGKILL, rank)
    ended = time.monotonic() + SURVIVE_S
    while not all(rank in ranks.codes for rank in victims) and time.monotonic() < ended:
        ranks.poll()
    dead = [rank for rank in victims if ranks.codes.get(rank) == -signal.SIGKILL]
    inside = [rank for rank in dead if watch.saving(rank)]
    return dead, watch.point(inside[0]) if inside else None


# ---------------------------------------------------------------------------------------------------------------- campaign


class Counts:
    """The counts of a file, over all sessions."""

    BAD = ("lost_runs", "differing_records", "differing_exports", "hangs", "manual_actions")

    def __init__(self, file: Path, seed: int):
        self.file = file
        zero = ("visits", "kills", "in_saves", "of_both_ranks", "before_they_met", "runs", "starts", "records", *self.BAD, "seconds")
        self.data = {"seed": seed} | dict.fromkeys(zero, 0) | {"slowest_end_s": 0.0, "at": {}, "by": {}}
        if file.exists():
            self.data = json.loads(file.read_text(encoding="utf-8"))
            if self.data["seed"] != seed:
                raise SystemExit(f"{file} counts seed {self.data['seed']}; give that one or another file")

    def __getitem__(self, key: str):
        return self.data[key]

    def add(self, key: str, number: int = 1) -> None:
        self.data[key] += number

    def kill(self, dead: list[int], point: str | None, choice: dict[str, str]) -> None:
        self.data["kills"] += 1
        self.data["in_saves"] += point is not None
        self.data["of_both_ranks"] += len(dead) == WORLD
        if point is not None:
            self.data["at"] = dict(sorted((Counter(self.data["at"]) + Counter([point or "before the first point"])).items()))
        for name, value in choice.items():
            there = self.data["by"].setdefault(name, {}).setdefault(value, {"kills": 0, "in_saves": 0})
            there["kills"] += 1
            there["in_saves"] += point is not None

    def bad(self) -> int:
        return sum(self.data[key] for key in self.BAD)

    def save(self, command: str) -> None:
        about = {"command": command, "date": date.today().isoformat(), "machine": f"{os.cpu_count()} CPU cores, {WORLD} gloo ranks"}
        about |= {"torch": torch.__version__, "python": platform.python_version()}
        self.data = {**about, **{key: value for key, value in self.data.items() if key not in about}}
        self.data["share_in_saves"] = round(self["in_saves"] / max(1, self["kills"]), 3)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        aside = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        aside.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        aside.replace(self.file)

    def line(self) -> str:
        bad = ", ".join(f"{self[key]} {key.replace('_', ' ')}" for key in self.BAD)
        return f"{self['kills']} kills, {self['in_saves']} of them in saves, {self['runs']} runs: {bad}"


def differing(calm: Calm, out: Path) -> list[tuple]:
    """Records of a run that are not those of the undisturbed one."""
    return [(key, value, calm.records.get(key)) for key, value in records(out).items() if calm.records.get(key) != value]


def visit(counts: Counts, folder: Path, number: int, kills: int, watch: Watch) -> bool:
    """Kills runs of one combination `kills` times. Returns whether all went well; says what did not."""
    choice, dice = combination(number), random.Random(f"{counts['seed']} {number}")
    begun, bad = time.monotonic(), counts.bad()
    folder.mkdir(parents=True)
    case = Case.write(folder, choice, dice.randrange(1 << 20))
    calm = undisturbed(case, watch)
    left, run = kills, 0
    while left > 0:
        run += 1
        left -= disturbed(counts, case, folder / f"run{run}", calm, dice, left, choice, watch)
    counts.add("visits")
    counts.add("seconds", round(time.monotonic() - begun))
    return counts.bad() == bad


def disturbed(
    counts: Counts, case: Case, out: Path, calm: Calm, dice: random.Random, most: int, choice: dict[str, str], watch: Watch
) -> int:
    """One run, killed up to `most` times on its way to the end. Returns how often."""
    kills, failed = 0, False

    def wrong(key: str, what: object) -> None:
        counts.add(key)
        print(f"{key.replace('_', ' ')}: {choice} in {out}: {what}", file=sys.stderr, flush=True)

    while True:
        watch.reset()
        counts.add("starts")
        ranks = launch.start(case.argv(out), WORLD, out / "out")
        dead, point = strike(ranks, watch, dice, calm.pace) if kills < min(most, PATIENCE) else ([], None)
        if dead:
            kills += 1
            counts.kill(dead, point, choice)
        begun = time.monotonic()
        early = not all(watch.met(rank) for rank in dead)
        counts.add("before_they_met", early)
        try:
            codes = ranks.end_after_one() if early else ranks.wait(SURVIVE_S if dead else START_S)
        except AssertionError as hang:
            wrong("hangs", hang)
            codes = []
        if dead:
            counts.data["slowest_end_s"] = max(counts["slowest_end_s"], round(time.monotonic() - begun, 2))
        found = differing(calm, out)
        counts.add("records", len(records(out)))
        if found:
            counts.add("differing_records", len(found) - 1)
            wrong("differing_records", found[:2])
        if dead:
            failed = False
            continue
        if codes != [0] * WORLD:
            wrong("manual_actions", f"exit codes {codes}\n{ranks.output()}")
            if failed:
                wrong("lost_runs", "the same command failed twice")
                return max(kills, 1)
            failed = True
            continue
        break
    counts.add("runs")
    if missing := calm.records.keys() - records(out).keys():
        wrong("differing_records", f"{missing} are missing")
    if not (out / "export").is_dir():
        wrong("lost_runs", "there is no export")
    elif digest(out / "export") != calm.digest:
        wrong("differing_exports", "other bytes than the undisturbed run's")
    store.verify(store.Store(out).steps()[0])
    return kills


def campaign(kills: int, file: Path, seed: int = 0, each: int = 10, folder: Path | None = None, command: str = "") -> Counts:
    """Visits combinations until `file` counts so many kills."""
    counts, good = Counts(file, seed), True
    root = Path(tempfile.mkdtemp(prefix="chaos-", dir=folder))
    with Watch().installed() as watch:
        while counts["kills"] < kills:
            number = counts["visits"]
            here = root / f"visit{number}"
            fine = visit(counts, here, number, min(each, kills - counts["kills"]), watch)
            good &= fine
            if fine:
                shutil.rmtree(here)
            counts.save(command)
            print(f"visit {number}, {', '.join(combination(number).values())}: {counts.line()}", flush=True)
    if good:
        shutil.rmtree(root)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Kill training runs at random moments; see the module.")
    parser.add_argument("--kills", type=int, required=True, help="kills in all, those that the file counts already included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/chaos.json"), help="the file with the counts")
    parser.add_argument("--each", type=int, default=10, help="kills of each combination")
    parser.add_argument("--folder", type=Path, help="where the runs lie; default: the system's temporary folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts = campaign(args.kills, args.out, args.seed, args.each, args.folder, f"python -m tests.chaos --kills {args.kills}")
    print(counts.line())
    return 1 if counts.bad() else 0


if __name__ == "__main__":
    sys.exit(main())
