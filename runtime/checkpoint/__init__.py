"""Checkpoints that survive anything: written aside, counted, published by one rename, verified before they are trusted.

A checkpoint is a folder `<run>/checkpoints/step_<n>/` that appears complete or not at all. Saving step n:

1. rank 0 makes `.tmp-<n>-<nonce>/`, after a look at the free space;
2. every rank writes its part of the tensors (torch.distributed.checkpoint's format) and its random state through a writer
   that counts bytes and crc32 as they pass, and fsyncs; rank 0 adds state.json and resolved.toml;
3. rank 0 gathers (file, size, crc32), compares the sizes with what it sees on disk, writes MANIFEST.json, fsyncs the
   folder, renames it to `step_<n>`, fsyncs the parent and rewrites `latest` by another rename;
4. rank 0 prunes: whole checkpoints only, never the newest two, a pinned one, or the one with the lowest evaluation loss.

Ranks agree on the outcome of each stage: an exception on one is the same exception on all, and nobody is left waiting.
Nothing is ever written into a published folder. With `async` all of this runs on a copy of the tensors in a thread with a
process group of its own, one save at a time, so a later step cannot be published before an earlier one. The thread makes
the copy too, beside the next step's forward and backward; only its update waits for that.

Resuming takes the newest checkpoint whose every byte matches its manifest; all ranks read a share of the files and come
to one decision. Tensors are stored by name and load into any layout and any number of ranks.

`store` is the part on disk (no torch: `tools.checkpoint` needs none), `team` how ranks agree, `shards` the bridge to
torch.distributed.checkpoint and its safe reader, `drift` what may differ between a checkpoint and the run that resumes
it, `checkpointer` the protocol. Not here: object stores (there is no rename; the folder must be a POSIX file system that
all ranks share).
"""

from __future__ import annotations

import importlib

_EXPORTS = {"Checkpointer": "checkpointer", "Found": "checkpointer", "Outcome": "checkpointer", "Rule": "drift"}
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
