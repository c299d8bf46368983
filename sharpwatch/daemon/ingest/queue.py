"""Attempts of runs, how far the samples of each have come, and the bounded queue of samples for the journal."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from sharpwatch.daemon.ingest.hello import RunHello
from sharpwatch.daemon.ingest.samples import Reading
from sharpwatch.errors import WireError


class Cursor:
    """How far the samples of one attempt have come: the sequences journalled, those in the queue, and the newest step.

    Args:
        journalled: The newest sequence in the journal; 0 before the first.
        step: The step of the newest sample; -1 before the first.
    """

    def __init__(self, journalled: int = 0, step: int = -1) -> None:
        self.journalled = journalled
        self.step = step
        self._waiting: set[int] = set()
        self._highest = journalled

    def place(self, sequence: int, step: int, *, restored: bool) -> Literal["new", "waiting", "journalled"]:
        """Tells a new sample from one that was sent again, and remembers a new one.

        Args:
            sequence: The sample's sequence.
            step: Its step.
            restored: Whether it says that the run was restored. Only then can its step be lower than the last.

        Returns:
            "new"; "waiting" if it is in the queue already; "journalled" if it is in the journal.

        Raises:
            WireError: Code "out_of_order", if its sequence or its step is lower than an earlier sample's.
        """
        if sequence <= self.journalled:
            return "journalled"
        if sequence in self._waiting:
            return "waiting"
        if sequence < self._highest:
            raise WireError("out_of_order", f"sequence {sequence} after {self._highest}: sequences must rise")
        if step < self.step and not restored:
            raise WireError(
                "out_of_order", f"step {step} after {self.step}: steps must not fall unless the run was restored"
            )
        self.step = step
        self._highest = sequence
        self._waiting.add(sequence)
        return "new"

    @property
    def idle(self) -> bool:
        """Whether no sample waits for the journal."""
        return not self._waiting

    def mark_journalled(self, sequence: int) -> None:
        """Records that `sequence` is journalled, and with it every earlier one that was not dropped."""
        self._waiting.discard(sequence)
        self.journalled = max(self.journalled, sequence)

    def forget(self, sequence: int) -> None:
        """Records that `sequence` was dropped from the queue and will never be journalled."""
        self._waiting.discard(sequence)


@dataclass(slots=True, eq=False)
class Attempt:
    """One attach of a run: its Hello, the bytes of that for the journal, and the cursor of its samples."""

    hello: RunHello
    message: bytes
    cursor: Cursor = field(default_factory=Cursor)
    journalled: bool = False  # whether its Hello is in the journal


@dataclass(slots=True, eq=False)
class QueuedSample:
    """A sample in the queue; `payload` is its bytes for the journal, `received_at` is in monotonic seconds."""

    run: str
    attempt: Attempt
    reading: Reading
    payload: bytes
    received_at: float
    processed: bool = field(default=False)


class SampleQueue:
    """The samples of all runs that wait for the journal. When it is full, the busiest run loses its oldest sample.

    Args:
        capacity: How many samples it holds.
        capacity_bytes: How many bytes of payload it holds.
        on_evict: Called with each sample that is dropped.
    """

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
        """How many samples it holds now."""
        return self._depth

    def put(self, entry: QueuedSample) -> None:
        """Appends the newest sample of its run."""
        self._runs.setdefault(entry.run, deque()).append(entry)
        self._account(entry, 1)
        self._shrink()
        self._filled.set()

    def requeue(self, entries: Iterable[QueuedSample]) -> None:
        """Returns what `take` gave, ahead of what has come since, without waking `filled`."""
        for entry in reversed(list(entries)):
            self._runs.setdefault(entry.run, deque()).appendleft(entry)
            self._account(entry, 1)
        self._shrink()

    def take(self) -> list[QueuedSample]:
        """Removes and returns all samples; those of a run are in their order."""
        self._filled.clear()
        entries = [entry for queue in self._runs.values() for entry in queue]
        self._runs, self._run_bytes, self._depth, self._bytes = {}, {}, 0, 0
        return entries

    async def filled(self) -> None:
        """Waits until a sample was put since the last `take`."""
        await self._filled.wait()

    def wake(self) -> None:
        """Makes `filled` return although nothing was put."""
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
