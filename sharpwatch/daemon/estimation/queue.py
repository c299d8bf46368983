"""Windows that wait to be estimated: the pipeline hands them in and goes on, so that no sample waits for another's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from sharpwatch.daemon.estimation.windows import Request

CAPACITY = 1024  # windows; past it the pipeline waits, its queue fills, and the busiest run gives way


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """A window as it was once its newest sample came in; `received_at` is that sample's, of a monotonic clock."""

    request: Request
    received_at: float


class EstimationQueue:
    """Has `estimate` take all that waits at once, again and again, one batch at a time; `estimate` may not raise."""

    def __init__(self, estimate: Callable[[Sequence[Waiting]], Awaitable[None]], capacity: int = CAPACITY) -> None:
        self._estimate = estimate
        self._capacity = capacity
        self._waiting: list[Waiting] = []
        self._task: asyncio.Task[None] | None = None

    def put(self, window: Waiting) -> None:
        """Have `window` estimated, together with all that comes in until it is its turn."""
        self._waiting.append(window)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work(), name="estimates")

    async def room(self) -> None:
        """Wait while as many windows wait as may."""
        if len(self._waiting) >= self._capacity:
            await self.settled()

    async def settled(self) -> None:
        """Wait until no window waits."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def _work(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            await self._estimate(batch)
