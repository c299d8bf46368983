"""Group commit: when samples come thick, how long the pipeline gathers them into one transaction.

A transaction costs about as much for one sample as for twenty: a sync of the disk, and two changes of thread. A daemon
with little to do writes at once, so that nobody waits there.
"""

from __future__ import annotations

import math

GATHER_SECONDS = 0.025  # between the beginnings of two transactions, while it pays
_PAYS = 4.0  # samples that are expected in that time, from which on it does
_MEMORY = 0.5  # seconds over which arrivals are averaged


class Gathering:
    """Says when the next transaction may begin. All times are in monotonic seconds."""

    def __init__(self) -> None:
        self._rate = 0.0  # samples a second
        self._began = -math.inf  # the newest transaction

    def begin(self, samples: int, now: float) -> None:
        """Notes that a transaction of so many samples begins."""
        passed = now - self._began
        kept = math.exp(-passed / _MEMORY)
        # Those that come at once, too, are so many in the time that is averaged over.
        self._rate = kept * self._rate + samples * ((1 - kept) / passed if passed > 0 else 1 / _MEMORY)
        self._began = now

    def wait(self, now: float) -> float:
        """Returns for how many seconds to gather before the next one."""
        if self._rate * GATHER_SECONDS < _PAYS:
            return 0.0
        return max(0.0, self._began + GATHER_SECONDS - now)
