"""Measures the seconds of a step, and which of them are the agent's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class OverheadTimer:
    """Splits the seconds of each step into the agent's and the loop's own."""

    def __init__(self) -> None:
        self._since: float | None = None  # when the step began
        self._agents = 0.0  # the agent's seconds in this step
        self._working: float | None = None  # when the agent's present work began

    def start(self) -> None:
        """Begin a step, unless one has begun."""
        self._since = self._since or perf_counter()

    def stop(self) -> None:
        """Forget the step: the time until the next `start` belongs to none."""
        self._since = None

    @contextmanager
    def agent(self) -> Iterator[None]:
        """Count the body's seconds as the agent's; nested bodies count once."""
        if self._working is not None:
            yield
            return
        self._working = perf_counter()
        try:
            yield
        finally:
            self._agents += perf_counter() - self._working
            self._working = None

    def lap(self) -> tuple[float, float] | None:
        """End a step: returns the loop's own seconds and the agent's, or None if its beginning was not seen."""
        now, since = perf_counter(), self._since
        if self._working is not None:
            self._agents += now - self._working
            self._working = now
        agents, self._agents, self._since = self._agents, 0.0, now
        return None if since is None else (max(0.0, now - since - agents), agents)
