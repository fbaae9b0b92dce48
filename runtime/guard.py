"""Steps that must not change the weights: the gradient is not finite, or exactly zero.

The gradient's norm is read once a step anyway, is the same number on every rank, and is known before the update. So it carries
all there is to agree on, without a further reduction:

    a gradient that is not finite   gives a norm that is not
    a loss that is not finite       may have a finite gradient (a target of probability 0: the loss is infinite, its derivative is
                                    softmax - onehot), and only one rank has it. `upstream` makes its gradient NaN
    nothing is learned              a gradient of exactly zero: no token of the step has a target, or nothing that trains has a part in
                                    the loss. Rounding does not give it; a text known by heart has a tiny one

A loss of exactly zero alone is no fault: it is what rounding makes of a text known by heart. Where it is one, so is its gradient.

A bad step ends the run ("halt") or is left out ("skip"): gradients are thrown away, weights and optimizer state stay as they are to
the bit, and the data and the schedule move on, as the step's number does. Too many of them end the run as well: the weights may be
what is broken. For the same reason a checkpoint between bad steps does not count as healthy until a good step follows: it is kept in
addition to the healthy ones, never instead of one (checkpoint/store.py).

What was in the step is written to `<output>/bad_steps/step_<n>.json`, for which every document is computed once more.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from runtime.checkpoint.team import Team
from runtime.errors import StepError, redact

PER_RANK = 20  # documents a rank may name
NAMED = 3  # of them in the message


class Config(Protocol):
    """The keys of `[train]` that are used here."""

    on_nonfinite: str
    max_skips_in_a_row: int
    max_skips: int


def upstream(loss: Tensor) -> Tensor:
    """The gradient to begin the backward pass of `loss` (a scalar) with: 1, or NaN where the loss is not finite."""
    return 1 + 0 * loss.detach()


class Guard:
    """Decides about each step. in_a_row, total: steps skipped so far, kept in checkpoints (`state`).

    Args:
        folder: the run's.
        team: all ranks.
        say: where messages for the user go.
        healthy: says where the newest healthy checkpoint is, for the last message of a run.
    """

    def __init__(
        self,
        cfg: Config,
        folder: Path,
        team: Team,
        say: Callable[[str], None],
        healthy: Callable[[], str],
        in_a_row: int = 0,
        total: int = 0,
    ):
        self.cfg, self.folder, self.team, self._say, self._newest = cfg, folder / "bad_steps", team, say, healthy
        self.in_a_row, self.total = in_a_row, total

    @property
    def healthy(self) -> bool:
        """Was the last step good?"""
        return self.in_a_row == 0

    def state(self) -> dict[str, int]:
        return {"in_a_row": self.in_a_row, "total": self.total}

    def numbers(self) -> dict[str, int]:
        """For the metrics, once there is something to tell."""
        return {"skipped_steps": self.total} if self.total else {}

    def passes(self, step: int, norm: float, units: int, look: Callable[[], list[dict]]) -> bool:
        """May the weights be updated? The same answer on all ranks.

        norm: of the gradient of `step`; units: tokens with a target that all ranks have in it.
        look: this rank's documents of the step, as dicts with `where`, `pack` and `loss`; called for bad steps only. May hold collectives.

        Raises:
            StepError: no, and the run must end.
        """
        if math.isfinite(norm) and norm > 0:
            self.in_a_row = 0
            return True
        problem = _problem(norm, units)
        records = self.team.gather(sorted(look(), key=lambda d: (math.isfinite(d["loss"]), -d["loss"]))[:PER_RANK])
        documents = list({(d["pack"], d["where"]): d for of_rank in records for d in of_rank}.values())  # ranks may share packs
        wrong = [d for d in documents if not math.isfinite(d["loss"])]
        told = f"step {step}: {problem}; {_suspects(wrong, documents)}{self._dump(step, problem, norm, units, wrong or documents)}"
        end = self._end()
        if end is not None:
            raise StepError(f"{told}; the weights are still those of step {step - 1 - self.in_a_row}; {self._newest()}; {end}")
        self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
        self._say(f"{told}; skipped ({self.in_a_row} in a row, {self.total} in all)")
        return False

    def _end(self) -> str | None:
        """What to do about it, if this bad step is the run's last."""
        if self.cfg.on_nonfinite == "halt":
            return 'mend or leave out these documents, lower optim.lr, or set train.on_nonfinite="skip"'
        for key, n in (("max_skips_in_a_row", self.in_a_row), ("max_skips", self.total)):
            if n >= (limit := getattr(self.cfg, key)):
                return f"train.{key}={limit} steps were skipped before it: go back to a checkpoint before them, or lower optim.lr"
        return None

    def _dump(self, step: int, problem: str, norm: float, units: int, documents: list[dict]) -> str:
        """Rank 0 writes the file; returns what to say of it. A disk that refuses costs the file only."""
        path = self.folder / f"step_{step}.json"
        if self.team.rank:
            return f" ({path})"
        record = {"step": step, "problem": problem, "grad_norm": norm, "tokens_with_target": units, "documents": documents}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:  # it quotes the data
                file.write(redact(json.dumps(_plain(record), indent=1, ensure_ascii=False)) + "\n")
        except OSError as error:
            return f" ({path} cannot be written: {error.strerror})"
        return f" ({path})"


def _problem(norm: float, units: int) -> str:
    if not math.isfinite(norm):
        return f"the loss or its gradient is not finite (norm {norm})"
    if units:
        return f"the gradient is exactly zero although {units:,} tokens have a target"
    return "no token has a target"


def _suspects(wrong: list[dict], documents: list[dict]) -> str:
    """Which documents, for the message."""
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        return f"the loss is not finite in {', '.join(d['where'] for d in wrong[:NAMED])}{more}"
    packs = sorted({d["pack"] for d in documents})
    return f"the loss of each document by itself is finite; packs {', '.join(map(str, packs[:8]))}{', ...' if len(packs) > 8 else ''}"


def _plain(value: object) -> object:
    """JSON has no NaN: numbers that are not finite become text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
