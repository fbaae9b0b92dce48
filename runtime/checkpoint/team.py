"""Ranks that agree: JSON through uint8 tensors on a gloo group, and stages whose failure on one rank is a failure on all.

Only tensors travel, never pickled objects. All ranks of the group call every method, in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from runtime import errors

T = TypeVar("T")


class RankFailed(RuntimeError):
    """A stage failed on some rank. `storage`: the disk said no (an OSError there), as opposed to an error in a program."""

    def __init__(self, rank: int, kind: str, text: str):
        super().__init__(f"rank {rank}: {text}")
        self.rank, self.kind, self.text = rank, kind, text
        self.storage = kind == "OSError"


class Team:
    """The ranks of a gloo process group."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def total(self, value: int) -> int:
        """Sum over the ranks."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def all(self, flag: bool) -> bool:
        return bool(self._reduce(int(flag), dist.ReduceOp.MIN))

    def _reduce(self, value: int, op: dist.ReduceOp) -> int:
        number = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(number, op, group=self.group)
        return int(number)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. Values are what JSON can say."""
        data = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=self.group)
        rows = [torch.empty(int(max(sizes)), dtype=torch.uint8) for _ in range(self.world)]
        mine = torch.zeros_like(rows[0])
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.all_gather(rows, mine, group=self.group)
        return [json.loads(row[: int(size)].numpy().tobytes()) for row, size in zip(rows, sizes)]

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        data = json.dumps(value).encode() if self.rank == 0 else b""
        row = torch.frombuffer(bytearray(data), dtype=torch.uint8) if self.rank == 0 else None
        size = self.total(len(data))
        row = torch.empty(size, dtype=torch.uint8) if row is None else row
        dist.broadcast(row, group=self.group, group_src=0)
        return json.loads(row.numpy().tobytes())

    def together(self, work: Callable[[], T], only: int | None = None) -> T | None:
        """Runs `work` on every rank (or on rank `only`) and returns its result there; a failure anywhere is raised everywhere.

        Raises:
            UserError: some rank met one; all raise the same.
            RankFailed: some rank met anything else.
        """
        failure = result = caught = None
        if only is None or only == self.rank:
            try:
                result = work()
            except BaseException as e:  # DCP's CheckpointException is not an Exception
                caught, failure = e, _describe(e, self.rank)
        if self.all(failure is None):
            return result
        first = next(f for f in self.gather(failure) if f is not None)
        kind = getattr(errors, first["kind"], None)
        raise (kind(first["text"]) if kind else RankFailed(**first)) from caught


def _describe(error: BaseException, rank: int) -> dict[str, Any]:
    """What the other ranks will be told. DCP wraps what its ranks met: the first of them is the cause."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (error, _) = min(error.failures.items(), key=lambda item: item[0])
        return _describe(error, rank)
    if isinstance(error, errors.UserError):
        kind = next(c.__name__ for c in type(error).__mro__ if hasattr(errors, c.__name__))
        return {"rank": rank, "kind": kind, "text": str(error)}
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return {"rank": rank, "kind": "OSError", "text": f"{where}{error.strerror or error}"}
    return {"rank": rank, "kind": type(error).__name__, "text": f"{type(error).__name__}: {error}"}
