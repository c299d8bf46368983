"""Which probe runs at the next step: a token bucket over measured seconds. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

_WINDOW = 1000  # steps of the exported overhead ratio
_SMOOTHING = 0.3  # weight of the newest measurement in a probe's expected cost
_PROBE_SHARE = 0.25  # of the budget that probes keep where the tap alone exceeds it


class OverheadBudget:
    """Spaces probes so that the agent's seconds stay under `budget` × the loop's own seconds.

    Every kind runs twice at once, one a step, so that a short run shows something. The first of them warms up what it
    uses (allocator, kernels, lazy imports) and can take a hundred times what later ones do: it is reported, but says
    nothing of their cost and is not charged. From the second on what a probe cost is owed, and paid back before the
    next. Kinds take turns. `probe_every` fixes the cadence instead: each such step runs all kinds.
    """

    def __init__(self, kinds: Sequence[str], *, budget: float, probe_every: int | None = None) -> None:
        self._kinds = list(kinds)
        self._budget = budget
        self._probe_every = probe_every
        self._expected: dict[str, float] = {}
        self._cold = set(kinds)
        self._under_way: set[str] = set()
        self._credit = 0.0
        self._steps = 0
        self._window: deque[tuple[float, float]] = deque()
        self._agent_seconds = 0.0
        self._step_seconds = 0.0

    @property
    def overhead_ratio(self) -> float:
        """Agent seconds over the loop's own seconds, over the last 1000 steps."""
        return self._agent_seconds / self._step_seconds if self._step_seconds > 0 else 0.0

    @property
    def step_seconds(self) -> float:
        """Mean seconds of a step without the agent, over the last 1000 steps."""
        return self._step_seconds / len(self._window) if self._window else 0.0

    def plan(self) -> tuple[str, ...]:
        """The kinds to run at the next step; asking again before `started` or `record` gives the same."""
        if not self._kinds:
            return ()
        if self._probe_every is not None:
            return tuple(self._kinds) if (self._steps + 1) % self._probe_every == 0 else ()
        if self._under_way:
            return ()
        kind = self._kinds[0]
        return (kind,) if kind not in self._expected or self._credit >= self._expected[kind] else ()

    def started(self, kinds: Sequence[str]) -> None:
        """`kinds` are to run, and recorded some steps later; none is planned until then, but by `probe_every`."""
        self._under_way.update(kinds)

    def missed(self) -> None:
        """What was started could not run."""
        self._under_way.clear()

    def record(self, step_seconds: float, tap_seconds: float, probe_seconds: Mapping[str, float]) -> None:
        """Account for one step: the loop's own seconds, the tap's, and those of each probe that ran (or failed)."""
        self._steps += 1
        agent = tap_seconds + sum(probe_seconds.values())
        self._remember(agent, step_seconds)
        allowance = self._budget * step_seconds
        self._credit += max(allowance - tap_seconds, _PROBE_SHARE * allowance)
        for kind, seconds in probe_seconds.items():
            self._under_way.discard(kind)
            if kind in self._cold:
                self._cold.remove(kind)
            else:
                self._credit -= seconds
                self._learn(kind, seconds)
            self._end_turn(kind)
        # A long pause between steps (an evaluation) earns no burst of probes afterwards.
        self._credit = min(self._credit, sum(self._expected.values()))

    def disable(self, kind: str) -> None:
        """Never plan `kind` again."""
        if kind in self._kinds:
            self._kinds.remove(kind)
        self._expected.pop(kind, None)

    def state_dict(self) -> dict[str, Any]:
        """What probes cost and whose turn it is, as plain values."""
        return {
            "kinds": list(self._kinds),
            "expected": dict(self._expected),
            "cold": sorted(self._cold),
            "credit": self._credit,
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was made, with the kinds of now.

        Raises `KeyError`, `TypeError` or `ValueError` for what is no such state; nothing is changed then.
        """
        order = {kind: place for place, kind in enumerate(state["kinds"])}
        expected = {kind: float(state["expected"][kind]) for kind in self._kinds if kind in state["expected"]}
        cold, credit, steps = set(state["cold"]), float(state["credit"]), int(state["steps"])
        self._kinds.sort(key=lambda kind: order.get(kind, -1))
        self._cold = {kind for kind in self._kinds if kind in cold or kind not in order}
        self._expected, self._credit, self._steps = expected, credit, steps

    def _learn(self, kind: str, seconds: float) -> None:
        if kind in self._kinds:
            known = self._expected.get(kind, seconds)
            self._expected[kind] = known + _SMOOTHING * (seconds - known)

    def _end_turn(self, kind: str) -> None:
        if kind in self._kinds:
            self._kinds.remove(kind)
            self._kinds.append(kind)

    def _remember(self, agent: float, step: float) -> None:
        self._window.append((agent, step))
        self._agent_seconds += agent
        self._step_seconds += step
        if len(self._window) > _WINDOW:
            old_agent, old_step = self._window.popleft()
            self._agent_seconds -= old_agent
            self._step_seconds -= old_step
