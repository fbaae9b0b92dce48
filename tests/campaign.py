"""What campaigns of disturbed runs share (tests/chaos.py, tests/faults.py): the runs, what each rank is doing, how they must end, counts.

A run is train.py's main on gloo ranks, as many as its layout has, forked from this process: a few steps with packing, accumulation, a
checkpoint after every other step and an export. Every record that a disturbed run logs, and every byte it exports, must equal those of
the same run that nobody disturbed; that includes records of steps that a later start did once more.

A visit is a number of disturbances of one combination of features. Visit v takes choice v modulo n of each factor of `FACTORS`; the
numbers of choices have no common divisor, so all 8,415 combinations come in turn, and soon every pair of choices. A campaign may keep to
some of the layouts: then it passes over the other visits.

The counts live in a file and are written after each visit; the same command goes on from there. All that is bad has to be 0, or the
folders of what went wrong stay.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import platform
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

import train
from benchmarks.cpu import commit
from data.stream import Stream
from objective import evaluate
from parallel.peers import Peers
from parallel.start import Launch
from runtime.checkpoint import checkpointer, store
from runtime.metrics import read
from runtime.stop import Stop
from tests import launch
from tests.model import golden
from tests.tiny import write_chats, write_model

STEPS = 10
SURVIVE_S = 30.0
START_S = 120.0
BASE = f"""
[train]
steps = {STEPS}
accumulate = 2
seed = {{seed}}
[optim]
lr = 1e-2
[log]
every = 1
[run]
deterministic = true
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
LAYOUTS = {  # the number of ranks, and the section; on all products of two axes, and each way of a single one
    "shard 2": (2, "[parallel]\n"),
    "replicate 2 x shard 2": (4, "[parallel]\nreplicate = 2\n"),
    "tensor 2": (2, "[parallel]\ntensor = 2\n"),
    "shard 2 x tensor 2": (4, "[parallel]\ntensor = 2\n"),
    "context 2": (2, "[parallel]\ncontext = 2\n"),
    "shard 2 x context 2": (4, "[parallel]\ncontext = 2\n"),
    "replicate 2": (2, "[parallel]\nreplicate = 2\n"),
    "context 2 x tensor 2": (4, "[parallel]\ncontext = 2\ntensor = 2\n"),
    "context 2, ring": (2, '[parallel]\ncontext = 2\ncontext_method = "ring"\n'),
    "replicate 2 x tensor 2": (4, "[parallel]\nreplicate = 2\ntensor = 2\n"),
    "context 2, all-gather": (2, '[parallel]\ncontext = 2\ncontext_method = "allgather"\n'),
    "replicate 2 x context 2": (4, "[parallel]\nreplicate = 2\ncontext = 2\n"),
    "shard 2, gathered once a step": (2, '[parallel]\nreshard = "step"\n'),
    "context 4, ring": (4, '[parallel]\ncontext = 4\ncontext_method = "ring"\n'),
    "shard 2, weights kept for the backward": (2, '[parallel]\nreshard = "backward"\nprefetch = 2\n'),
    "shard 4, whole copies on each 2": (4, "[parallel]\nreshard = 2\n"),
    "one rank": (1, "[parallel]\n"),
}
FACTORS: dict[str, dict[str, str]] = {
    "layout": {name: section for name, (_, section) in LAYOUTS.items()},
    "family": dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma3_text"), ""),  # cases of tests/model/golden.py
    "with": {
        "saves in the background": SAVE + "async = true\n",
        "nothing else": SAVE,
        "evaluation": SAVE + "[eval]\nsplit = 0.2\nevery = 3\npatience = 9\n",
        "recomputation": SAVE + '[recompute]\nkind = "full"\n',
        "optimizer on the host": SAVE + "[offload]\noptimizer = true\n",
        "bf16 masters": SAVE + '[precision]\nmasters = "bf16"\n',
        "tiles": SAVE + "keep = 3\n[tiling]\nmlp = 24\nlogits_mib = 1\n",
        "recomputation of products": SAVE + '[recompute]\nkind = "mlp"\n',
        "selective recomputation": SAVE + '[recompute]\nkind = "selective"\n',
        "activations on the host": SAVE + '[offload]\nactivations = "cpu"\n',
        "activations on disk": SAVE + "async = true\n" + '[offload]\nactivations = "disk"\n',
    },
    "trains": {f"{name}, {schedule}": TRAINED[name] + SCHEDULES[schedule] for schedule in SCHEDULES for name in TRAINED},
}
assert all(math.gcd(len(a), len(b)) == 1 for a in FACTORS.values() for b in FACTORS.values() if a is not b)


# ---------------------------------------------------------------------------------------------------------------- the runs


def layouts(text: str) -> tuple[str, ...]:
    """Those with one of the parts in their names, commas between parts. "4 ranks": all of so many; nothing: all."""
    found: list[str] = []
    for part in text.split(","):
        ranks = re.fullmatch(r"(\d+) ranks", part)
        names = [name for name, (world, _) in LAYOUTS.items() if (world == int(ranks[1]) if ranks else part in name)]
        if not names:
            raise SystemExit(f"--layouts: {part!r} is in none of: {'; '.join(LAYOUTS)}")
        found += names
    return tuple(found)


def combination(visit: int, among: Container[str] = LAYOUTS) -> dict[str, str]:
    """Of the visit with this number, of those `among` these layouts."""
    places = [place for place, layout in enumerate(LAYOUTS) if layout in among]
    rounds, which = divmod(visit, len(places))
    number = rounds * len(LAYOUTS) + places[which]
    return {name: list(choices)[number % len(choices)] for name, choices in FACTORS.items()}


@dataclass(frozen=True)
class Case:
    """The files of one combination: `argv(out)` is the command of a run with the output folder `out`."""

    folder: Path
    text: str
    world: int
    more: tuple[str, ...] = ()

    def argv(self, out: Path) -> list[str]:
        return ["--config", str(self.folder / "case.toml"), f"--output.path={out}", *self.more]

    @classmethod
    def write(cls, folder: Path, choice: dict[str, str], seed: int, evaluation: str = "") -> Case:
        """`evaluation`: a section for combinations that have none."""
        model = write_model(folder / "model")
        size = json.loads((model / "config.json").read_text())["vocab_size"]
        golden.write_config(model, choice["family"], vocab_size=size, initializer_range=0.1)
        data = write_chats(folder / "data.jsonl", 60, seed)
        text = f'[model]\npath = "{model}"\ninit = "random"\n[output]\npath = "{folder}"\n'
        text += f'[data]\ntokens = 128\nmax_length = 128\ncache = "{folder / "cache"}"\n'
        text += f'[[data.sources]]\npath = "{data}"\nformat = "chat"\n' + BASE.format(seed=seed)
        chosen = "".join(choices[choice[name]] for name, choices in FACTORS.items())
        text += chosen.replace("dropout = 0.2", "dropout = 0.0") if "context" in choice["layout"] else chosen  # refused there
        text += evaluation if "[eval]" not in text else ""
        (folder / "case.toml").write_text(text, encoding="utf-8")
        return cls(folder, text, LAYOUTS[choice["layout"]][0])


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
    met: it has found the other ranks. listens: signals ask it to stop. asked: one did. phase, step: where its main thread is.
    Set before ranks start: `at_point` is called by them at each point of a save, with its name; `reading_s` is what each step waits for
    its data.
    """

    FIELDS = ("saving", "begun", "point", "met", "listens", "asked", "phase", "step")
    POINTS = ("", "mkdir", "plan", "open", "write", "fsync", "fsync_folder", "rename", "latest", "trash", "delete", "supersede")
    PHASES = ("start", "data", "step", "evaluation", "export")

    def __init__(self, world: int):
        self.world, self._bytes = world, mmap.mmap(-1, len(self.FIELDS) * world)
        self.at_point: Callable[[str], None] = lambda point: None
        self.reading_s = 0.0

    def reset(self) -> None:
        self._bytes[:] = bytes(len(self._bytes))

    def _get(self, rank: int, name: str) -> int:
        return self._bytes[len(self.FIELDS) * rank + self.FIELDS.index(name)]

    def _set(self, name: str, value: int) -> None:
        """Of the rank that this process is."""
        self._bytes[len(self.FIELDS) * int(os.environ["RANK"]) + self.FIELDS.index(name)] = value

    def saving(self, rank: int) -> bool:
        return self._get(rank, "saving") == 1

    def begun(self) -> int:
        return max(self._get(rank, "begun") for rank in range(self.world))

    def point(self, rank: int) -> str:
        return self.POINTS[self._get(rank, "point")]

    def met(self, rank: int) -> bool:
        return self._get(rank, "met") == 1

    def listens(self, rank: int) -> bool:
        return self._get(rank, "listens") == 1

    def asked(self, rank: int) -> bool:
        return self._get(rank, "asked") == 1

    def phase(self, rank: int) -> str:
        return self.PHASES[self._get(rank, "phase")]

    def step(self, rank: int) -> int:
        return self._get(rank, "step")

    @contextmanager
    def installed(self) -> Iterator[Watch]:
        """Ranks that are forked inside write here."""
        places = (
            (checkpointer.Checkpointer, "_write"),
            (store, "at"),
            (Launch, "__init__"),
            (Stop, "install"),
            (Stop, "_handle"),
            (Peers, "at"),
            (Stream, "take"),
            (evaluate, "evaluate"),
            (train, "export"),
        )
        real = {name: getattr(owner, name) for owner, name in places if owner not in (store, Peers)}
        kept = [(owner, name, getattr(owner, name)) for owner, name in places]
        begins = Peers.at

        def _write(self_, *args):
            self._set("begun", self._get(int(os.environ["RANK"]), "begun") + 1)
            self._set("saving", 1)
            try:
                return real["_write"](self_, *args)
            finally:
                self._set("saving", 0)

        def noted(point: str) -> None:
            self._set("point", self.POINTS.index(point))
            self.at_point(point)

        def met(self_) -> None:
            real["__init__"](self_)
            self._set("met", 1)

        def install(self_) -> Stop:
            installed = real["install"](self_)
            self._set("listens", 1)
            return installed

        def _handle(self_, *args) -> None:
            self._set("asked", 1)
            real["_handle"](self_, *args)

        def begin(self_, step: int) -> None:
            begins(self_, step)
            self._set("step", step)
            self._set("phase", self.PHASES.index("data"))

        def take(self_, step: int) -> list:
            taken = real["take"](self_, step)
            if self.phase(int(os.environ["RANK"])) == "data":
                time.sleep(self.reading_s)
                self._set("phase", self.PHASES.index("step"))
            return taken

        def evaluated(*args) -> dict:
            self._set("phase", self.PHASES.index("evaluation"))
            found = real["evaluate"](*args)
            self._set("phase", self.PHASES.index("step"))
            return found

        def export(*args) -> None:
            self._set("phase", self.PHASES.index("export"))
            real["export"](*args)

        for (owner, name), ours in zip(places, (_write, noted, met, install, _handle, begin, take, evaluated, export), strict=True):
            setattr(owner, name, ours)
        try:
            yield self
        finally:
            for owner, name, value in kept:
                setattr(owner, name, value)


@dataclass(frozen=True)
class Pace:
    """How long the undisturbed run took, one of its saves, and by phase what it spent there in all."""

    whole_s: float
    save_s: float
    phases: dict[str, float]


@dataclass(frozen=True)
class Calm:
    """The undisturbed run: what all others must equal."""

    pace: Pace
    records: dict[tuple, tuple]
    digest: str


def undisturbed(case: Case, watch: Watch) -> Calm:
    out = case.folder / "calm"
    watch.reset()
    begun = last = time.monotonic()
    ranks = launch.start(case.argv(out), case.world, out / "out")
    saving, phases = 0.0, dict.fromkeys(watch.PHASES, 0.0)
    while not ranks.poll():
        assert time.monotonic() < begun + START_S, f"the undisturbed run hangs\n{ranks.output()}"
        time.sleep(0.001)
        now, before = time.monotonic(), last
        phases[watch.phase(0)] += now - before
        saving, last = saving + (now - before) * watch.saving(0), now
    assert ranks.wait() == [0] * case.world, f"the undisturbed run fails\n{ranks.output()}\n{case.text}"
    whole, found = time.monotonic() - begun, records(out)
    steps = [dict(values)["loss"] for (_, trained), values in found.items() if trained]
    assert len(set(steps)) == len(steps) == STEPS and all(map(math.isfinite, steps)), "a run in which nothing happens compares nothing"
    assert watch.begun() == STEPS // 2 and not watch.saving(0) and watch.point(0), "the watch sees nothing"
    assert all(watch.met(r) and watch.listens(r) and watch.step(r) == STEPS and watch.phase(r) == "export" for r in range(case.world))
    return Calm(Pace(whole, max(0.005, saving / watch.begun()), phases), found, digest(out / "export"))


def differing(calm: Calm, out: Path) -> list[tuple]:
    """Records of a run that are not those of the undisturbed one."""
    return [(key, value, calm.records.get(key)) for key, value in records(out).items() if calm.records.get(key) != value]


# ---------------------------------------------------------------------------------------------------------------- campaign


def gpus() -> str:
    """What the driver says of them: to ask torch would begin to use them, and a process that has cannot fork ranks."""
    told = [path.read_text(encoding="utf-8") for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))]
    return ", ".join(line.partition(":")[2].strip() for text in told for line in text.splitlines() if line.startswith("Model:"))


class Counts:
    """The counts of a file, or of one section of it, over all sessions. Kinds of campaigns add theirs to GOOD and BAD. `commits`: what was
    run, session by session; sessions before the first of them did not say."""

    GOOD: tuple[str, ...] = ()
    BAD: tuple[str, ...] = ("lost_runs", "differing_records", "differing_exports", "hangs")

    def __init__(self, file: Path, seed: int, section: str | None = None):
        self.file, self.section, self._commit = file, section, commit()
        self.data = {"seed": seed} | dict.fromkeys(("visits", *self.GOOD, "runs", "starts", "records", *self.BAD, "seconds"), 0)
        there = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self.data |= there.get(section, {}) if section else there
        if self.data["seed"] != seed:
            raise SystemExit(f"{file} counts seed {self.data['seed']}; give that one or another file")

    def __getitem__(self, key: str):
        return self.data[key]

    def add(self, key: str, number: int = 1) -> None:
        self.data[key] += number

    def most(self, key: str, number: float) -> None:
        self.data[key] = max(self.data.get(key, 0.0), round(number, 2))

    def of(self, key: str, kind: str) -> None:
        """Counts `kind` under `key`."""
        kinds = self.data.setdefault(key, {})
        kinds[kind] = kinds.get(kind, 0) + 1
        self.data[key] = dict(sorted(kinds.items()))

    def bad(self) -> int:
        return sum(self.data[key] for key in self.BAD)

    def save(self, command: str, among: str = "") -> None:
        command += f' --layouts "{among}"' * bool(among)
        about = {"command": command, "date": date.today().isoformat(), "machine": f"{os.cpu_count()} CPU cores, {gpus() or 'gloo'}"}
        about |= {"torch": torch.__version__, "python": platform.python_version()}
        about["commits"] = [*(known for known in self.data.get("commits", ()) if known != self._commit), self._commit]
        self.data = {**about, **{key: value for key, value in self.data.items() if key not in about}}
        whole: dict = self.data
        if self.section:
            there = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
            whole = there | {self.section: self.data}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        aside = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        aside.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        aside.replace(self.file)

    def line(self) -> str:
        good, bad = (", ".join(f"{self[key]} {key.replace('_', ' ')}" for key in keys) for keys in ((*self.GOOD, "runs"), self.BAD))
        return f"{good}: {bad}"


@dataclass(frozen=True)
class Stage:
    """A visit: one combination, whose undisturbed run is known. `dice` decide what happens to the others."""

    case: Case
    calm: Calm
    choice: dict[str, str]
    dice: random.Random
    counts: Counts
    watch: Watch

    @property
    def world(self) -> int:
        return self.case.world

    def start(self, out: Path) -> launch.Ranks:
        self.watch.reset()
        self.counts.add("starts")
        return launch.start(self.case.argv(out), self.world, out / "out")

    def wrong(self, key: str, out: Path, what: object) -> None:
        self.counts.add(key)
        print(f"{key.replace('_', ' ')}: {self.choice} in {out}: {what}", file=sys.stderr, flush=True)

    def check_records(self, out: Path) -> None:
        found = differing(self.calm, out)
        self.counts.add("records", len(records(out)))
        if found:
            self.counts.add("differing_records", len(found) - 1)
            self.wrong("differing_records", out, found[:2])

    def check_end(self, out: Path, lost: int = 0) -> None:
        """Of a run that got through: nothing is missing, and the result is the undisturbed run's. Up to the step `lost` the run said that
        records are."""
        self.counts.add("runs")
        missing = self.calm.records.keys() - records(out).keys()
        if lost:
            self.counts.add("lost_records", sum(step <= lost for step, _ in missing))
        if missing := {(step, trained) for step, trained in missing if step > lost}:
            self.wrong("differing_records", out, f"{missing} are missing")
        if not (out / "export").is_dir():
            self.wrong("lost_runs", out, "there is no export")
        elif digest(out / "export") != self.calm.digest:
            self.wrong("differing_exports", out, "other bytes than the undisturbed run's")
        store.verify(store.Store(out).steps()[0])


def campaign(
    counts: Counts,
    key: str,
    goal: int,
    each: int,
    disturbed: Callable[[Stage, Path, int], int],
    folder: Path | None = None,
    command: str = "",
    evaluation: str = "",
    among: str = "",
) -> Counts:
    """Visits combinations of the layouts `among` (see `layouts`) until counts[key] is `goal`, `each` times that of one combination.

    disturbed(stage, out, most): one run in the folder `out`, disturbed `most` times at most. Returns how often.
    """
    good = True
    root = Path(tempfile.mkdtemp(prefix=f"{key}-", dir=folder))
    while counts[key] < goal:
        number, begun, bad = counts["visits"], time.monotonic(), counts.bad()
        choice, dice = combination(number, layouts(among)), random.Random(f"{counts['seed']} {number}")
        here = root / f"visit{number}"
        here.mkdir()
        case = Case.write(here, choice, dice.randrange(1 << 20), evaluation)
        left, run = min(each, goal - counts[key]), 0
        with Watch(case.world).installed() as watch:
            stage = Stage(case, undisturbed(case, watch), choice, dice, counts, watch)
            while left > 0:
                run += 1
                left -= disturbed(stage, here / f"run{run}", left)
        counts.add("visits")
        counts.add("seconds", round(time.monotonic() - begun))
        if counts.bad() == bad:
            shutil.rmtree(here)
        good &= counts.bad() == bad
        counts.save(command, among)
        print(f"visit {number}, {', '.join(choice.values())}: {counts.line()}", flush=True)
    if good:
        shutil.rmtree(root)
    return counts
