"""The `[checkpoint]` and `[log]` sections. No torch here: `--help` must stay instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from runtime.errors import ConfigError


@dataclass(frozen=True)
class CheckpointConfig:
    """Complete, verified snapshots of the run under `<output>/checkpoints/`."""

    every: Annotated[int, "Steps between checkpoints; 0 saves only at the end and when the run is asked to stop."] = 500
    keep: Annotated[int, "How many intact checkpoints stay, at least 2 in case the newest is damaged, beside the best; 0 keeps all."] = 2
    async_: Annotated[bool, "Write in the background while training goes on; costs one copy of the saved state in host memory."] = False
    resume: Annotated[
        str, "auto: from the newest complete checkpoint in the output folder, if any; never: start anew; else a checkpoint's path."
    ] = "auto"
    allow_change: Annotated[bool, "Resume even though keys that decide the result differ from the checkpoint's."] = False

    def __post_init__(self):
        if self.every < 0:
            raise ConfigError("must not be negative", "every", self.every)
        if self.keep < 0 or self.keep == 1:
            raise ConfigError("must be at least 2 (the newest may turn out damaged), or 0 to keep all", "keep", self.keep)
        if not self.resume:
            raise ConfigError('must be "auto", "never" or the path of a checkpoint', "resume", self.resume)


@dataclass(frozen=True)
class LogConfig:
    """What the run reports, and where. `<output>/metrics.jsonl` and `<output>/logs/` are always written."""

    every: Annotated[int, "Steps between records in metrics.jsonl and lines in the log."] = 10
    trackers: Annotated[
        tuple[Literal["tensorboard", "wandb"], ...], "Also send the records here; each is an optional dependency of the same name."
    ] = ()
    project: Annotated[str, "Project of the run in trackers that have projects."] = "salamander"
    name: Annotated[str | None, "Name of the run in trackers; absent: the name of the output folder."] = None

    def __post_init__(self):
        if self.every < 1:
            raise ConfigError("must be at least 1", "every", self.every)
        if len(set(self.trackers)) < len(self.trackers):
            raise ConfigError("names a tracker twice", "trackers", list(self.trackers))
