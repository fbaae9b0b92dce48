"""A ledger of tensor memory: what storages live when, and what they are for. Works on real and on fake tensors, on any device.

    with Ledger() as ledger, ledger.saving():
        ledger.tag("parameters", net.parameters())
        loss = net(batch)
        ledger.mark("forward")
        loss.backward()
        ledger.mark("backward")
    ledger.peak("backward")         # {"parameters": ..., "activations": ..., ...} at the fullest moment of the backward pass

A dispatch mode sees every operator's results; a storage counts from its first tensor until it is freed, and the storages that FSDP2
empties and fills again are followed. The order of events is that of the host's code, as it is for the counters of CUDA's caching
allocator (`torch.cuda.max_memory_allocated`), with which this is meant to agree; sizes are multiples of 512 bytes, as there.

Kinds: what `tag` says; `gathered`, storages that are emptied and filled; `activations`, what autograd keeps for the backward
pass; `temporary`, the rest. Kind `host` is memory elsewhere: it counts for itself, not for the peak.

Collectives are entered in `traffic`: bytes that this rank receives, by namespace of the operator and name of the group (axes may
share a group, but FSDP2 calls `c10d` and models call `_c10d_functional`), each collective moving (n - 1) / n of the whole.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK = 512


@dataclass
class Entry:
    """One storage. changes: (time, bytes from then on)."""

    kind: str = "temporary"
    changes: list[tuple[int, int]] = field(default_factory=list)

    def at(self, time: int) -> int:
        return next((size for when, size in reversed(self.changes) if when <= time), 0)


class Ledger(TorchDispatchMode):
    """See the module docstring. received: for operators that exchange by themselves, bytes from (arguments, ranks), and the group's
    name last among the arguments; by `namespace::name`."""

    def __init__(self, received: dict[str, Callable[[tuple, int], int]] | None = None):
        super().__init__()
        self.time = 0
        self.live: dict[int, Entry] = {}
        self.entries: list[Entry] = []
        self.marks: list[tuple[str, int]] = []
        self.traffic: dict[tuple[str, str], int] = defaultdict(int)
        self.received = received or {}
        self.blind = 0

    def _set(self, entry: Entry, size: int) -> None:
        self.time += 1
        entry.changes.append((self.time, -(-size // BLOCK) * BLOCK))

    def entry(self, t: Tensor) -> Entry:
        """Of the storage of `t`, made if it is new."""
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self.live:
            entry = self.live[key] = Entry()
            self.entries.append(entry)
            self._set(entry, storage.nbytes())
            weakref.finalize(storage, self._freed, key, entry)
        return self.live[key]

    def _freed(self, key: int, entry: Entry) -> None:
        if self.live.get(key) is entry:
            del self.live[key]
            self._set(entry, 0)

    def tag(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Says what these tensors' storages are for; of a DTensor, what this rank holds of it."""
        for t in tensors:
            self.entry(t.detach().to_local() if isinstance(t, DTensor) else t).kind = kind

    def host(self, memory: Tensor) -> None:
        """This lies in host memory."""
        self.tag("host", [memory])

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Inside, what autograd keeps becomes `activations`, unless it has a kind already."""

        def pack(t: Tensor) -> Tensor:
            entry = self.entry(t)
            if entry.kind == "temporary":
                entry.kind = "activations"
            return t.detach()  # an output that its own node kept would never be freed

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            yield

    def mark(self, name: str) -> None:
        """What was done since the last mark was `name`. A name may come again."""
        self.marks.append((name, self.time))

    def moments(self) -> dict[str, int]:
        """For each name the time at which most memory was alive, `host` aside."""
        steps = [0] * (self.time + 1)
        for entry in list(self.entries):
            if entry.kind != "host":
                changes = [change for change in entry.changes if change[0] < len(steps)]  # threads of gloo free while this counts
                for (_, before), (when, after) in zip([(0, 0), *changes], changes):
                    steps[when] += after - before
        levels, found, begin = list(accumulate(steps)), {}, 0
        for name, end in self.marks:
            fullest = max(range(begin, end + 1), key=levels.__getitem__)
            if name not in found or levels[fullest] > levels[found[name]]:
                found[name] = fullest
            begin = end
        return found

    def peaks(self) -> dict[str, dict[str, int]]:
        """For each name bytes by kind at its fullest moment."""
        return {name: self.at(time) for name, time in self.moments().items()}

    def peak(self, name: str) -> dict[str, int]:
        return self.at(self.moments()[name])

    def at(self, time: int) -> dict[str, int]:
        found: dict[str, int] = defaultdict(int)
        for entry in self.entries:
            if size := entry.at(time):
                found[entry.kind] += size
        return dict(found)

    def __enter__(self):
        self._resize = resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:  # no operator, so the mode does not see it
            found = resize(storage, size)
            if (entry := self.live.get(storage._cdata)) is not None:
                entry.kind = "gathered" if entry.kind in ("temporary", "activations") else entry.kind  # also weights that autograd keeps
                self._set(entry, int(size))
            return found

        self._shapes = shapes = ShardingPropagator._propagate_tensor_meta_non_cached

        def unseen(*args, **kwargs):  # DTensor finds shapes out on fake tensors of the whole size, which are no run's
            self.blind += 1
            try:
                return shapes(*args, **kwargs)
            finally:
                self.blind -= 1

        torch.UntypedStorage.resize_, ShardingPropagator._propagate_tensor_meta_non_cached = resized, unseen
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_, ShardingPropagator._propagate_tensor_meta_non_cached = self._resize, self._shapes
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its own handler comes first, and what it calls comes here
        if func is torch.ops._c10d_functional.wait_tensor.default and isinstance(args[0], FakeTensor):
            return args[0]  # as a real one does; the fake kernel makes another tensor
        out = func(*args, **(kwargs or {}))
        if self.blind:
            return out
        if func.namespace in ("c10d", "_c10d_functional") or func._schema.name in self.received:
            self._collective(func.namespace, func._schema.name, args, out)
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.entry(t)
        return out

    def _collective(self, namespace: str, name: str, args: tuple, out: object) -> None:
        group = next((found for a in reversed(args) if (found := group_name(a))), None)
        if group is None:  # it only waits
            return
        n = dist.distributed_c10d._resolve_process_group(group).size()
        if name in self.received:
            self.traffic[namespace, group] += self.received[name](args, n)
            return
        inputs, outputs = ([t.nbytes for t in tree_leaves(x) if isinstance(t, Tensor)] for x in (args, out))
        whole = max(inputs + outputs) * (2 if "all_reduce" in name or "allreduce" in name else 1)
        self.traffic[namespace, group] += whole * (n - 1) // n


def group_name(x: object) -> str | None:
    """The name of the group that an operator's argument stands for: a name, or c10d's own object."""
    if isinstance(x, str) and x in dist.distributed_c10d._world.pg_names.values():
        return x
    if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()):
        return dist.ProcessGroup.unbox(x).group_name
    return None
