"""Kills training runs at random moments and starts them again, until so many kills are counted.

    python -m tests.chaos --kills 1000 [--layouts "4 ranks"] [--seed 0] [--each 10] [--out benchmarks/results/chaos.json]

A run (tests/campaign.py) is killed (SIGKILL: one rank, of four sometimes two, or all), started again by the same command, killed again,
until it gets through. A visit is `--each` kills of one combination of features.

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
import random
import signal
import sys
import time
from pathlib import Path

import torch

from tests import campaign, launch
from tests.campaign import START_S, SURVIVE_S, Pace, Stage, Watch

AIM = 0.6  # of the kills are aimed at a save
ALL = 0.25  # of the kills take all ranks, as a node that goes away does
TWO = 0.25  # take two of four, as one of two nodes that goes away does
PATIENCE = 12  # kills of one run, after which it may go on undisturbed


class Counts(campaign.Counts):
    GOOD = ("kills", "in_saves", "of_all_ranks", "of_some_ranks", "before_they_met")
    BAD = (*campaign.Counts.BAD, "manual_actions")

    def kill(self, dead: list[int], world: int, point: str | None, choice: dict[str, str]) -> None:
        self.add("kills")
        self.add("in_saves", point is not None)
        self.add("of_all_ranks", len(dead) == world)
        self.add("of_some_ranks", 1 < len(dead) < world)
        if point is not None:
            self.of("at", point or "before the first point")
        for name, value in choice.items():
            there = self.data.setdefault("by", {}).setdefault(name, {}).setdefault(value, {"kills": 0, "in_saves": 0})
            there["kills"] += 1
            there["in_saves"] += point is not None
        self.data["share_in_saves"] = round(self["in_saves"] / self["kills"], 3)


def strike(ranks: launch.Ranks, watch: Watch, dice: random.Random, pace: Pace) -> tuple[list[int], str | None]:
    """Waits for a random moment and kills. Returns who died of it (nobody, if the run was faster), and the point of the save
    in which it happened, or None outside of saves."""
    many = dice.random()
    victims = dice.sample(range(watch.world), watch.world if many < ALL else 2 if many < ALL + TWO and watch.world > 2 else 1)
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


def disturbed(stage: Stage, out: Path, most: int) -> int:
    """One run, killed up to `most` times on its way to the end. Returns how often."""
    counts, watch = stage.counts, stage.watch
    kills, failed = 0, False
    while True:
        ranks = stage.start(out)
        dead, point = strike(ranks, watch, stage.dice, stage.calm.pace) if kills < min(most, PATIENCE) else ([], None)
        if dead:
            kills += 1
            counts.kill(dead, stage.world, point, stage.choice)
        begun = time.monotonic()
        early = not all(watch.met(rank) for rank in dead)
        counts.add("before_they_met", early)
        try:
            codes = ranks.end_after_one() if early else ranks.wait(SURVIVE_S if dead else START_S)
        except AssertionError as hang:
            stage.wrong("hangs", out, hang)
            codes = []
        if dead:
            counts.most("slowest_end_s", time.monotonic() - begun)
        stage.check_records(out)
        if dead:
            failed = False
            continue
        if codes != [0] * stage.world:
            stage.wrong("manual_actions", out, f"exit codes {codes}\n{ranks.output()}")
            if failed:
                stage.wrong("lost_runs", out, "the same command failed twice")
                return max(kills, 1)
            failed = True
            continue
        break
    stage.check_end(out)
    return kills


def kill(kills: int, file: Path, seed: int = 0, each: int = 10, folder: Path | None = None, layouts: str = "") -> Counts:
    """Visits combinations until `file` counts so many kills."""
    command = f"python -m tests.chaos --kills {kills}"
    return campaign.campaign(Counts(file, seed), "kills", kills, each, disturbed, folder, command, among=layouts)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Kill training runs at random moments; see the module.")
    parser.add_argument("--kills", type=int, required=True, help="kills in all, those that the file counts already included")
    parser.add_argument("--layouts", default="", help='only those with one of these in their names: "tensor,context 4", or "4 ranks"')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/chaos.json"), help="the file with the counts")
    parser.add_argument("--each", type=int, default=10, help="kills of each combination")
    parser.add_argument("--folder", type=Path, help="where the runs lie; default: the system's temporary folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts = kill(args.kills, args.out, args.seed, args.each, args.folder, args.layouts)
    print(counts.line())
    return 1 if counts.bad() else 0


if __name__ == "__main__":
    sys.exit(main())
