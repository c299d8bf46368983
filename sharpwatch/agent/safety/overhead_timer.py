"""What a step takes, and how much of it is the agent's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class OverheadTimer:
    """Tells the agent's seconds from the loop's own."""

    def __init__(self) -> None:
        self._since: float | None = None  # the last lap
        self._agents = 0.0  # of this lap
        self._working: float | None = None  # since when the agent is at work

    def start(self) -> None:
        """A step is under way, if none was."""
        self._since = self._since or perf_counter()

    def stop(self) -> None:
        """What comes is no part of a step."""
        self._since = None

    @contextmanager
    def agent(self) -> Iterator[None]:
        """The body's seconds are the agent's; those of a body within it count once."""
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
        """A step is over: the loop's own seconds and the agent's; None where its beginning was not seen."""
        now, since = perf_counter(), self._since
        if self._working is not None:
            self._agents += now - self._working
            self._working = now
        agents, self._agents, self._since = self._agents, 0.0, now
        return None if since is None else (max(0.0, now - since - agents), agents)
