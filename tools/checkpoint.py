"""Looks after the checkpoints of a run.

    python -m tools.checkpoint ls     RUN            what is there: step, size, ranks, when written, complete or why not
    python -m tools.checkpoint verify RUN [STEP...]  reads every byte (or those of some steps) and compares it with the manifest
    python -m tools.checkpoint rm     RUN STEP...    deletes; not the newest intact one, the best or a pinned one, unless with --force
    python -m tools.checkpoint pin    RUN STEP...    keeps them when old ones are pruned; --off undoes it

The best is the one with the lowest evaluation loss, where a run evaluates the steps that it saves. `rm` reads the newest
checkpoints and the best until it has found intact ones, and deletes nothing while a run is writing there.

RUN is the output folder of a run. Exit code 0, or 2 if something is damaged or refused. Needs no torch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from runtime.checkpoint import store
from runtime.checkpoint.store import Damaged, Store
from runtime.errors import ModelError
from runtime.files import size_text
from tools import command


def ls(run: Store) -> int:
    newest, best = _latest(run), next(iter(run.ranked()), None)
    for path in run.steps():
        notes = ["pinned"] * run.pinned(path) + ["latest"] * (path.name == newest)
        try:
            manifest = run.manifest(path)
        except Damaged as e:  # a run that is under way may delete it between two looks
            print(f"{path.name:<16} damaged: {e}")
            continue
        if (loss := manifest.get("eval_loss")) is not None:
            notes.append(f"eval loss {loss:.4f}" + ", the lowest" * (path == best))
        notes += ["saved between bad steps"] * (not store.is_healthy(manifest))
        size = size_text(sum(record["size"] for record in manifest["files"].values()))
        print(f"{path.name:<16} {size:>10}  {manifest['layout']['world']} ranks  {manifest['written']}  {', '.join(notes)}".rstrip())
    return 0


def _latest(run: Store) -> str | None:
    """What `latest` names; None if it is nothing that a run has written."""
    try:
        return store.read_small(run.folder / "latest", 1 << 10).decode("utf-8").strip()
    except (OSError, ValueError):
        return None


def verify(run: Store, paths: list[Path]) -> int:
    damaged = 0
    for path in paths:
        start = time.monotonic()
        try:
            size = sum(record["size"] for record in store.verify(path)["files"].values())
            rate = size / 2**30 / max(time.monotonic() - start, 1e-9)
            print(f"{path.name:<16} intact  ({size_text(size)}, {rate:.1f} GiB/s)")
        except Damaged as e:
            damaged += 1
            print(f"{path.name:<16} damaged: {e}")
    return 2 if damaged else 0


def rm(run: Store, paths: list[Path], force: bool) -> int:
    run.claim(patience_s=0)
    try:
        guarded = {} if force else _guarded(run, paths)
        for path in paths:
            if path in guarded:
                raise ModelError(f"{guarded[path]}; add --force to delete it all the same", path)
        for path in paths:
            run.remove(path)
            print(f"{path.name:<16} deleted")
        run.point()
    finally:
        run.release()
    return 0


def _guarded(run: Store, paths: list[Path]) -> dict[Path, str]:
    """What must stay, and why: the pinned, and the newest that every byte of is intact, of all and of the healthy ones."""
    guarded = {}
    if any(run.problem(path) is None for path in paths):  # else nothing is deleted that a run could resume from
        for kind, candidates in (("healthy", run.healthy()), ("intact", run.complete())):
            newest = next(filter(run.is_intact, candidates), None)
            guarded |= {newest: f"is the newest {kind} checkpoint"} if newest else {}
        if best := run.best():
            guarded = {best: "has the lowest evaluation loss"} | guarded
    return guarded | {path: "is pinned" for path in paths if run.pinned(path)}


def pin(run: Store, paths: list[Path], on: bool) -> int:
    for path in paths:
        run.pin(path, on)
        print(f"{path.name:<16} {'pinned' if on else 'no longer pinned'}")
    return 0


def _paths(run: Store, steps: Sequence[int]) -> list[Path]:
    there = {store.step_of(p): p for p in run.steps()}
    for step in steps:
        if step not in there:
            raise ModelError(f"has no step_{step}; there are {', '.join(p.name for p in run.steps()) or 'no checkpoints'}", run.folder)
    return [there[step] for step in dict.fromkeys(steps)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.checkpoint", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, some in (("ls", None), ("verify", "*"), ("rm", "+"), ("pin", "+")):
        command = commands.add_parser(name)
        command.add_argument("run", type=Path, metavar="RUN", help="output folder of a run")
        if some:
            command.add_argument("steps", type=int, nargs=some, metavar="STEP")
    commands.choices["rm"].add_argument("--force", action="store_true", help="also the newest intact one, the best or a pinned one")
    commands.choices["pin"].add_argument("--off", action="store_true", help="no longer pinned")
    return parser


@command
def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    run = Store(args.run)
    if not run.folder.is_dir():
        raise ModelError("holds no checkpoints folder; name the output folder of a run", args.run)
    if args.command == "ls":
        return ls(run)
    paths = _paths(run, args.steps)
    if args.command == "verify":
        if not run.steps():
            raise ModelError("holds no checkpoints: there is nothing to verify", run.folder)
        return verify(run, paths or run.steps())
    return rm(run, paths, args.force) if args.command == "rm" else pin(run, paths, not args.off)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
