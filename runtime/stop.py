"""Stop requests by signal. A handler only sets a flag; the loop reads it between steps and between the
batches of an evaluation, and all ranks agree there.

The first SIGTERM, SIGINT or SIGUSR1 asks for a checkpoint and a clean end. A second one ends the process at once. Ctrl-C under
torchrun reaches a rank twice, from the terminal and from the agent that forwards it, within milliseconds: signals within
`GRACE_S` of the first count as the same request.
"""

from __future__ import annotations

import os
import signal
import sys
import time

GRACE_S = 2.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stop:
    """`requested` is the name of the signal that asked this process to stop, or None."""

    def __init__(self):
        self.requested: str | None = None
        self._since = 0.0

    def install(self) -> Stop:
        for number in SIGNALS:
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.requested is None:
            self.requested, self._since = signal.Signals(number).name, now
            os.write(sys.stderr.fileno(), b"\nstopping after this step; a second signal ends at once\n")
        elif now - self._since > GRACE_S:
            os._exit(128 + number)
