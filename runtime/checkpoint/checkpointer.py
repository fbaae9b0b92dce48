"""The protocol (see the package): finding, saving, loading; on one rank or many, at once or in the background."""

from __future__ import annotations

import datetime
import errno
import json
import math
import platform
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from runtime.checkpoint import drift, shards, store
from runtime.checkpoint.store import Damaged, Say, Store
from runtime.checkpoint.team import RankFailed, Team
from runtime.errors import ConfigError, ModelError, clean
from runtime.files import expanded, once, size_text

_SLACK = 16 << 20  # bytes beside the tensors: metadata, random states, the manifest


class Config(Protocol):
    """The keys of `[checkpoint]` that are used here (`runtime.sections.CheckpointConfig`)."""

    every: int
    keep: int
    async_: bool
    resume: str
    allow_change: bool


@dataclass(frozen=True)
class Found:
    """A checkpoint to resume from, every byte of it verified; the same on all ranks."""

    path: Path
    step: int
    manifest: dict[str, Any]

    @property
    def layout(self) -> dict[str, Any]:
        return self.manifest["layout"]

    @property
    def state(self) -> dict[str, Any]:
        """What was saved beside the tensors.

        Raises:
            ModelError: another program wrote it, and sealed it as ours.
        """
        path = self.path / "state.json"
        try:
            state = json.loads(store.read_small(path, store.LIMITS[path.name]).decode("utf-8"), object_pairs_hook=once)
        except (OSError, ValueError, RecursionError) as e:
            raise ModelError(f"is not one of ours: {getattr(e, 'strerror', None) or e}", path) from None
        if not isinstance(state, dict):
            raise ModelError("is not one of ours: it must hold a JSON object", path)
        return state

    def state_like(self, fresh: dict[str, Any]) -> dict[str, Any]:
        """`state` over `fresh`, which has a value of each kind: numbers, None where there may be none, objects of those.

        Raises:
            ModelError: it is of another kind, out of the range that a run can reach, or of another step than the manifest.
        """
        path = self.path / "state.json"
        state = _over(fresh, self.state, path)
        if state["step"] != self.step:
            raise ModelError(f"is not one of ours: step={state['step']}, but the checkpoint is of step {self.step}", path)
        return state


_MOST = {"packs_per_step": (1, 10**6)}  # from, to
_COUNT = (0, 1 << 53)  # all others: far from where sums leave int64, and exact in every reader of JSON
_MEASURED = ("best", "loss")  # what training makes of numbers may be NaN or infinite; whatever else is saved is not


def _over(fresh: dict[str, Any], given: dict[str, Any], path: Path, within: str = "") -> dict[str, Any]:
    found = dict(fresh)
    for key, value in given.items():
        like, name = fresh.get(key, ...), f"{within}{key}"
        if isinstance(like, dict) and isinstance(value, dict):
            value = _over(like, value, path, f"{name}.")
        elif not _alike(key, like, value):
            raise ModelError(f"is not one of ours: {clean(name, 40)}={clean(json.dumps(value), 40)}", path)
        found[key] = value
    return found


def _alike(key: str, like: object, value: object) -> bool:
    if isinstance(like, bool) or isinstance(value, bool):
        return type(like) is type(value)
    if isinstance(like, int):
        low, high = _MOST.get(key, _COUNT)
        return isinstance(value, int) and low <= value <= high
    if isinstance(value, int):
        return (isinstance(like, float) or like is None) and abs(value) <= _COUNT[1]
    if isinstance(value, float):
        return (isinstance(like, float) or like is None) and (key in _MEASURED or 0 <= value < math.inf)
    return like is None and value is None


@dataclass(frozen=True)
class Outcome:
    """How a save ended; the same on all ranks."""

    step: int
    path: Path | None  # where it lies; None if it was not saved
    problem: str = ""  # why not; with a path: what went wrong after it was published
    nbytes: int = 0
    seconds: float = 0.0


class Checkpointer:
    """Saves and finds the checkpoints of one run. Every method but `due` is called by all ranks together.

    Args:
        folder: the run's output folder, on a file system that all ranks share.
        cfg: the `[checkpoint]` section.
        identity: fingerprints of what makes the run this run (model, data, optimizer, ...); JSON values, may be nested.
        resolved_toml: the whole config, kept in each checkpoint.
        config: the same as dotted keys; with `rules`, decides what may differ on resuming (see `drift`).
        layout: what the random state of a rank depends on: world size and mesh axes.
        say: where messages for the user go, on rank 0.
        timeout_s: how long ranks wait for each other, a rank that writes to a slow disk included.
    """

    def __init__(
        self,
        folder: Path,
        cfg: Config,
        identity: Mapping[str, Any],
        resolved_toml: str,
        config: Mapping[str, Any] | None = None,
        *,
        rules: Sequence[drift.Rule] = (),
        layout: Mapping[str, Any] | None = None,
        say: Say = print,
        timeout_s: float = 1800.0,
    ):
        timeout = datetime.timedelta(seconds=timeout_s)
        self.cfg, self.store = cfg, Store(Path(folder))
        self.run = json.loads(json.dumps({"identity": identity, "config": config or {}}))  # as it will be read back
        self.layout = json.loads(json.dumps({"world": dist.get_world_size(), **(layout or {})}))
        self.resolved_toml, self.rules = resolved_toml, tuple(rules)
        self.team = Team(dist.new_group(backend="gloo", timeout=timeout))
        # the background thread talks on its own group: two threads on one would interleave their collectives
        background = {"backend": "gloo", "timeout": timeout, "group_desc": "background"}  # parallel/peers.py knows it by this
        self._writers = Team(dist.new_group(**background)) if cfg.async_ else self.team
        self._say = say
        self._origin: dict[str, Any] | None = None  # the checkpoint that resume=PATH began this history from
        self._last: Outcome | None = None  # the newest checkpoint of this history
        self._flight: Future[Outcome] | None = None
        self._copying: shards.Snapshot | None = None  # what the flight carries, until training waited for the copy
        self._buffers: dict[str, Tensor] = {}
        self._untold: list[Outcome] = []

    # ------------------------------------------------------------------------------------------------------------ resume

    def find(self, policy: str | None = None) -> Found | None:
        """Decides where this run begins: the checkpoint to `load`, or None for a fresh start. Called once, before training.

        `auto` takes the newest checkpoint of the folder that is intact. `never` takes none. A path takes that checkpoint, or the
        newest of this folder that goes back to it, so that repeating a command goes on instead of starting over.
        Checkpoints that the run thereby goes back behind are moved to `checkpoints/superseded_<k>`.

        Raises:
            ConfigError: the checkpoint is of another run (see `drift`); a path that is no checkpoint.
            ModelError: there are checkpoints, but none is intact; what is gone back behind cannot be moved aside.
        """
        try:
            return self._find(policy or self.cfg.resume)
        except RankFailed as e:
            if not e.storage:
                raise
            raise ModelError(f"cannot be resumed from: {e.text}", self.store.folder) from e

    def _find(self, policy: str) -> Found | None:
        candidates, skipped = self.team.share(self.team.together(lambda: self._candidates(policy), only=0))
        found = None
        for path, manifest in candidates:
            self.team.together(lambda: self._sees(Path(path), manifest["id"]))  # noqa: B023 (called at once)
            problems = self._verify(Path(path), manifest["files"])
            if not problems:
                found = Found(Path(path), manifest["step"], manifest)
                break
            skipped.append([path, "; ".join(problems)])
        notes = self.team.together(lambda: self._decide(policy, found, skipped), only=0)
        if self.team.rank == 0:
            for note in notes:
                self._say(note)
        if found is not None:
            ours = found.path.parent == self.store.folder.resolve()
            if ours:
                self.store.trust(found.path)
            if self.team.rank == 0:  # which writes it
                self._origin = found.manifest["origin"] if ours and not self._begins_at(policy, found) else _origin(found)
            self._last = Outcome(found.step, found.path) if ours else None
        return found

    def _candidates(self, policy: str) -> tuple[list, list]:
        """Rank 0: [path, manifest] of what may be resumed from, best first, and [path, reason] of what may not."""
        self.store.claim()
        self.store.sweep()
        if policy == "never":
            return [], []
        candidates, skipped = [], []
        for path in self.store.steps():
            try:
                candidates.append([str(path.resolve()), self.store.manifest(path)])
            except Damaged as e:
                skipped.append([str(path.resolve()), str(e)])
        if policy == "auto":
            return candidates, skipped
        path = expanded(policy, "checkpoint.resume").resolve()
        try:
            wanted = store.read_manifest(path)
        except Damaged as e:
            wanted = None
            reason = str(e) if path.is_dir() else "there is no such folder"
        heirs = [c for c in candidates if _comes_from(c[1]["origin"], path, wanted)]
        if wanted is None and not heirs:
            near = self.store.complete()
            hint = f"; the newest checkpoint of this run is {near[0]}" if near else ""
            raise ConfigError(f"is not a checkpoint: {reason}{hint}", "checkpoint.resume", policy)
        return heirs + ([[str(path), wanted]] if wanted else []), []

    def _sees(self, path: Path, wanted: str) -> None:
        """This rank looks at a checkpoint that rank 0 has found: is it the same one here?"""
        try:
            problem = None if store.read_manifest(path)["id"] == wanted else "another checkpoint"
        except Damaged as e:
            problem = f"a checkpoint that {e}" if path.is_dir() else "no such folder"
        if problem:
            raise ConfigError(
                f"is not the same on all nodes: rank {self.team.rank} on host {socket.gethostname()} finds {problem} there; "
                "put it on a file system that all nodes share",
                "checkpoint.resume",
                str(path),
            )

    def _begins_at(self, policy: str, found: Found) -> bool:
        return policy not in ("auto", "never") and expanded(policy, "checkpoint.resume").resolve() == found.path

    def _verify(self, path: Path, files: dict[str, dict]) -> list[str]:
        """Reads a checkpoint, a share of the files on each rank; all of them get all problems."""
        names = sorted(files, key=lambda name: (-files[name]["size"], name))
        mine = {name: files[name] for name in names[self.team.rank :: self.team.world]}
        problems = self.team.together(lambda: store.check_contents(path, mine))
        return [problem for of_rank in self.team.gather(problems) for problem in of_rank]

    def _decide(self, policy: str, found: Found | None, skipped: list) -> list[str]:
        """Rank 0: refuses what must not be resumed from, moves aside what is gone back behind; returns what to tell."""
        skipped = sorted(skipped, key=lambda item: store.step_of(Path(item[0])) or 0, reverse=True)
        told = [f"skipped {path}: {reason}" for path, reason in skipped if not found or store.step_of(Path(path)) > found.step]
        if found is None and skipped:
            if policy != "auto":
                raise ConfigError(f"is damaged: {skipped[-1][1]}", "checkpoint.resume", policy)
            listed = "; ".join(f"{Path(path).name}: {reason}" for path, reason in skipped[:3])
            raise ModelError(f"no checkpoint is intact ({listed}); start anew with checkpoint.resume=never", self.store.folder)
        if found is not None:
            changes = drift.check(str(found.path), found.manifest, self.run, self.rules, self.cfg.allow_change)
            told += [f"differs from the checkpoint: {change}" for change in changes]
        ours = found is not None and found.path.parent == self.store.folder.resolve()
        behind = [p for p in self.store.steps() if not ours or store.step_of(p) > found.step]
        if target := self.store.supersede(behind, afresh=policy == "never"):
            names = ", ".join(p.name for p in behind) or "no checkpoint, but the records so far,"
            told.append(f"{names} moved to {target}: this run continues without them")
        if found is not None:
            told.append(f"resuming from {found.path}")
        return told

    def load(self, found: Found, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fills `tensors` (plain or DTensors of any layout, by name) in place; returns the state that was saved.

        Raises:
            ModelError: names, shapes or dtypes differ from the checkpoint's.
        """

        def read() -> dict[str, Any]:
            shards.read(found.path, found.manifest["files"], tensors)
            return found.state

        return self.team.together(read)

    def rng(self, found: Found) -> dict[str, Tensor] | None:
        """This rank's random state; None at another layout than the checkpoint's, where ranks do other work than then."""
        if found.layout != self.layout:
            if self.team.rank == 0:
                self._say(f"random states are derived anew: the checkpoint is of layout {found.layout}, this run has {self.layout}")
            return None
        try:
            return self.team.together(lambda: self._own_rng(found))
        except RankFailed as e:
            raise ModelError(str(e), found.path) from e

    def _own_rng(self, found: Found) -> dict[str, Tensor]:
        name = _rng_file(self.team.rank)
        if name not in found.manifest["files"]:
            raise ModelError(f"holds no {name}", found.path)
        try:
            return safetensors.torch.load(store.read_small(found.path / name, _SLACK))
        except Exception as e:  # safetensors raises its own kind, and others for dtypes it does not know
            raise ModelError(f"cannot be read: {clean(e)}", found.path / name) from e

    # -------------------------------------------------------------------------------------------------------------- save

    def due(self, step: int) -> bool:
        """Whether the config asks for a checkpoint after this step."""
        return self.cfg.every > 0 and step % self.cfg.every == 0

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        rng: Mapping[str, Tensor],
        healthy: bool = True,
        eval_loss: float | None = None,
        eval_data: str = "",
    ) -> Outcome | None:
        """Saves a checkpoint. A disk that refuses makes no exception: training can go on, what was saved before stands.

        Args:
            step: steps done; the checkpoint becomes `step_<step>`.
            tensors: all to keep, by name: DTensors, or plain tensors equal on all ranks that have them.
            state: anything else, as JSON values, equal on all ranks.
            rng: this rank's random state.
            healthy: False where the run may be about to fail: such a checkpoint is kept beside the healthy ones, not instead of one.
            eval_loss: of these weights, on held-out data, if they were evaluated: the lowest is kept, however old.
            eval_data: fingerprint of that data; losses on other data are not compared.

        Returns:
            The outcome; None if the save goes on in the background: `poll` or `wait` will tell, and `before_update` has to be called
            before `tensors` change.

        Raises:
            RankFailed: on all ranks, for errors in programs. The unfinished checkpoint is removed.
        """
        self._land_previous()
        if self._last is not None and self._last.step == step:
            return self._last
        assert self._last is None or self._last.step < step, f"step {step} after step {self._last.step}"
        text, snapshot = self.team.together(lambda: (json.dumps(state), shards.Snapshot(tensors)))
        measured = eval_loss is not None and math.isfinite(eval_loss)
        about = {"healthy": healthy, "eval_loss": eval_loss if measured else None, "eval_data": eval_data}
        if not self.cfg.async_:
            return self._tell(self._write(step, snapshot, text, rng, about))
        self.team.together(lambda: snapshot.reserve(self._buffers))
        self._flight, self._copying = Future(), snapshot
        work = partial(self._copy_and_write, step, snapshot, text, {name: t.clone() for name, t in rng.items()}, about)
        threading.Thread(target=_fulfil, args=(self._flight, work), name=f"checkpoint-{step}", daemon=True).start()
        return None

    def before_update(self) -> None:
        """To be called before anything changes the tensors that were given to `save`: a background save copies them beside the forward and
        backward that follow, and has most often done so by now."""
        if self._copying is not None:
            self._copying.wait_until_copied()
            self._copying = None

    def poll(self) -> Outcome | None:
        """After each step: the outcome of a background save that has ended on all ranks since the last call, if any."""
        if self._flight is not None and self.team.all(self._flight.done()):
            self._land_previous()
        return self._untold.pop(0) if self._untold else None

    def wait(self) -> Outcome | None:
        """At the end: as `poll`, but waits for a save that is still going on."""
        self._land_previous()
        return self._untold.pop(0) if self._untold else None

    def _land_previous(self) -> None:
        if self._flight is not None:
            flight, self._flight = self._flight, None
            self._untold.append(self._tell(flight.result()))

    def _tell(self, outcome: Outcome) -> Outcome:
        if outcome.path is not None:
            self._last = outcome
        if self.team.rank == 0:
            kept = f"the newest checkpoint is step {self._last.step}" if self._last else "there is no checkpoint yet"
            good = f"{size_text(outcome.nbytes)} in {outcome.seconds:.1f} s"
            self._say(f"checkpoint of step {outcome.step}: " + (f"{outcome.problem}; {kept}" if outcome.problem else good))
        return outcome

    def _copy_and_write(self, step: int, snapshot: shards.Snapshot, *rest) -> Outcome:
        """In the background."""
        self._writers.together(snapshot.stage)
        return self._write(step, snapshot, *rest)

    def _write(self, step: int, snapshot: shards.Snapshot, state: str, rng: Mapping[str, Tensor], about: dict) -> Outcome:
        """One save, on the main thread or in the background; the same outcome on all ranks."""
        team, begun = self._writers, time.monotonic()
        nbytes = team.total(snapshot.nbytes)
        folder = None
        try:
            folder = Path(team.share(team.together(lambda: str(self._begin(step, nbytes)), only=0)))
            path = self._fill(team, folder, step, snapshot, state, rng, about)
        except BaseException as e:
            if team.rank == 0 and folder is not None:
                store.discard(folder)
            if isinstance(e, RankFailed) and e.storage:
                problem = team.share(self._disk_problem(e, nbytes) if team.rank == 0 else None)
                return Outcome(step, None, problem, nbytes, time.monotonic() - begun)
            raise
        try:
            team.together(lambda: self.store.settle(self.cfg.keep), only=0)
            problem = ""
        except RankFailed as e:
            if not e.storage:
                raise
            problem = f"saved, but tidying up failed: {e}"
        return Outcome(step, path, problem, nbytes, time.monotonic() - begun)

    def forecast(self, tensors: Mapping[str, Tensor]) -> str:
        """For the start-up report: is there room for a checkpoint of `tensors`? A collective."""
        need, free = self.team.total(shards.Snapshot(tensors).nbytes), self.store.free_bytes()
        short = "" if free >= need + _SLACK else f": none can be saved until there are {size_text(need + _SLACK)}"
        return f"checkpoints: {size_text(need)} each, {size_text(free)} are free in {self.store.folder}{short}"

    def _begin(self, step: int, nbytes: int) -> Path:
        self.store.claim()
        if self.store.free_bytes() < nbytes + _SLACK:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.store.folder))
        return self.store.begin(step)

    def _fill(
        self, team: Team, folder: Path, step: int, snapshot: shards.Snapshot, state: str, rng: Mapping[str, Tensor], about: dict
    ) -> Path:
        """Writes all files into `folder` and publishes it."""
        files = team.together(lambda: shards.write(folder, snapshot, team.group))

        def write_rest() -> None:
            name = _rng_file(team.rank)
            files[name] = store.write_file(folder / name, safetensors.torch.save(dict(rng)))
            if team.rank == 0:
                for name, text in (("state.json", state), ("resolved.toml", self.resolved_toml)):
                    files[name] = store.write_file(folder / name, text.encode())

        team.together(write_rest)
        everything = {name: record for records in team.gather(files) for name, record in records.items()}
        return Path(team.share(team.together(lambda: str(self._publish(folder, step, everything, about)), only=0)))

    def _publish(self, folder: Path, step: int, files: dict[str, dict], about: dict) -> Path:
        """Rank 0: what the ranks say they wrote is what lies here; then the manifest, then the name."""
        if problems := store.check_sizes(folder, files):
            raise OSError(errno.EIO, f"files of other ranks are not as written: {'; '.join(problems[:3])}", str(folder))
        store.write_manifest(
            folder,
            {
                "format": store.FORMAT,
                "step": step,
                "written": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "origin": self._origin,
                **about,
                "layout": self.layout,
                "versions": {"torch": torch.__version__, "python": platform.python_version()},
                **self.run,
                "files": files,
            },
        )
        return self.store.publish(folder, step)

    def _disk_problem(self, failure: RankFailed, nbytes: int) -> str:
        free = size_text(self.store.free_bytes())
        return f"not saved, the disk failed on {failure} (it needs {size_text(nbytes + _SLACK)}, {free} are free in {self.store.folder})"


def _rng_file(rank: int) -> str:
    return f"rng_{rank}.safetensors"


def _origin(found: Found) -> dict[str, Any]:
    return {"path": str(found.path), "step": found.step, "id": found.manifest["id"]}


def _comes_from(origin: dict[str, Any] | None, path: Path, wanted: dict[str, Any] | None) -> bool:
    """Whether a history that began at `origin` began at the checkpoint at `path` (which retention may have removed since)."""
    return origin is not None and origin["path"] == str(path) and (wanted is None or wanted["id"] == origin["id"])


def _fulfil(future: Future, work) -> None:
    try:
        future.set_result(work())
    except BaseException as e:
        future.set_exception(e)
