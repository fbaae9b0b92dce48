"""What runs and what lives, seen from the dispatcher: operators counted, bytes of storages that are still referenced."""

from __future__ import annotations

from collections import Counter

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """ran: how often each operator ran; peak: the most bytes that lived at once, of what was made inside."""

    def __init__(self):
        super().__init__()
        self.ran: Counter = Counter()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.most = 0  # most: no less than what lives

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)} - self.made.keys()
        out = func(*args, **(kwargs or {}))
        self.ran[func] += 1
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (storage := t.untyped_storage())._cdata not in given:
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.most += storage.nbytes()
        if self.most > self.peak:
            self.peak = max(self.peak, self.live())
        return out

    def live(self) -> int:
        self.made = {key: (ref, size) for key, (ref, size) in self.made.items() if not ref.expired()}
        self.most = sum(size for _, size in self.made.values())
        return self.most
