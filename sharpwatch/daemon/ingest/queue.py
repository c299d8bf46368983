"""The bounded queue between sessions and journal, over all runs; when full, the busiest run loses its oldest sample."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sharpwatch.daemon.ingest.samples import Reading

if TYPE_CHECKING:
    from sharpwatch.daemon.runs.runs import Attempt


@dataclass(slots=True, eq=False)
class QueuedSample:
    """A sample on its way: `payload` is what the journal keeps, `received_at` a monotonic clock's seconds."""

    attempt: Attempt
    reading: Reading
    payload: bytes
    received_at: float
    processed: bool = field(default=False)

    @property
    def run(self) -> str:
        """The run's name."""
        return self.attempt.manifest.run


class SampleQueue:
    """Holds at most `capacity` samples and `capacity_bytes` of payload; `on_evict` hears of each sample lost."""

    def __init__(self, capacity: int, capacity_bytes: int, on_evict: Callable[[QueuedSample], None]) -> None:
        self.capacity = capacity
        self._capacity_bytes = capacity_bytes
        self._on_evict = on_evict
        self._runs: dict[str, deque[QueuedSample]] = {}
        self._run_bytes: dict[str, int] = {}
        self._depth = 0
        self._bytes = 0
        self._filled = asyncio.Event()

    @property
    def depth(self) -> int:
        """Samples held."""
        return self._depth

    def put(self, entry: QueuedSample) -> None:
        """Add the newest sample of its run."""
        self._runs.setdefault(entry.run, deque()).append(entry)
        self._account(entry, 1)
        self._shrink()
        self._filled.set()

    def put_back(self, entries: Iterable[QueuedSample]) -> None:
        """Return what `take` gave, ahead of what has come since; it wakes nobody."""
        for entry in reversed(list(entries)):
            self._runs.setdefault(entry.run, deque()).appendleft(entry)
            self._account(entry, 1)
        self._shrink()

    def take(self) -> list[QueuedSample]:
        """Everything held, each run's samples in their order."""
        self._filled.clear()
        entries = [entry for queue in self._runs.values() for entry in queue]
        self._runs, self._run_bytes, self._depth, self._bytes = {}, {}, 0, 0
        return entries

    async def filled(self) -> None:
        """Wait until a sample was put since the last `take`."""
        await self._filled.wait()

    def wake(self) -> None:
        """Have `filled` return though nothing came."""
        self._filled.set()

    def _account(self, entry: QueuedSample, sign: int) -> None:
        size = sign * len(entry.payload)
        self._depth += sign
        self._bytes += size
        self._run_bytes[entry.run] = self._run_bytes.get(entry.run, 0) + size

    def _shrink(self) -> None:
        while self._depth > self.capacity or self._bytes > self._capacity_bytes:
            if self._depth > self.capacity:
                busiest = max(self._runs, key=lambda run: len(self._runs[run]))
            else:
                busiest = max(self._run_bytes, key=self._run_bytes.__getitem__)
            entry = self._runs[busiest].popleft()
            self._account(entry, -1)
            if not self._runs[busiest]:
                del self._runs[busiest], self._run_bytes[busiest]
            self._on_evict(entry)
