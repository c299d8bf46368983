"""Which probes run after the next step, by a token bucket over measured seconds. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

_WINDOW = 1000  # steps that the overhead ratio is taken over
_SMOOTHING = 0.3  # weight of the newest measurement in a probe's expected cost
_PROBE_SHARE = 0.25  # of the budget, which probes keep even if the tap alone exceeds it


class OverheadBudget:
    """Spaces probes so that the agent's seconds stay below `budget` times the loop's own seconds.

    Each probe first runs twice without waiting, one probe a step, so that a short run shows something. The first run
    warms up the allocator, kernels and lazy imports and can take a hundred times as long as later ones, so its cost is
    not charged. From the second run on the cost is charged, and must be earned back before the next probe. Probes take
    turns.

    Args:
        probes: The names of the probes.
        budget: The agent's share of the loop's own seconds.
        probe_every: Runs all probes every so many steps instead, whatever they cost.
    """

    def __init__(self, probes: Sequence[str], *, budget: float, probe_every: int | None = None) -> None:
        self._probes = list(probes)
        self._budget = budget
        self._probe_every = probe_every
        self._expected: dict[str, float] = {}
        self._cold = set(probes)
        self._started: set[str] = set()
        self._credit = 0.0
        self._steps = 0
        self._window: deque[tuple[float, float]] = deque()
        self._agent_seconds = 0.0
        self._step_seconds = 0.0

    @property
    def budget(self) -> float | None:
        """The share of step time that the agent may take; None where `probe_every` fixes the cadence instead."""
        return self._budget if self._probe_every is None else None

    @property
    def overhead_ratio(self) -> float:
        """The agent's seconds over the loop's own, in the last 1000 steps."""
        return self._agent_seconds / self._step_seconds if self._step_seconds > 0 else 0.0

    @property
    def step_seconds(self) -> float:
        """Mean seconds of a step without the agent, in the last 1000 steps."""
        return self._step_seconds / len(self._window) if self._window else 0.0

    def plan(self) -> tuple[str, ...]:
        """Returns the probes to run after the next step; it changes nothing."""
        if not self._probes:
            return ()
        if self._probe_every is not None:
            return tuple(self._probes) if (self._steps + 1) % self._probe_every == 0 else ()
        if self._started:
            return ()
        probe = self._probes[0]
        return (probe,) if probe not in self._expected or self._credit >= self._expected[probe] else ()

    def started(self, probes: Sequence[str]) -> None:
        """`probes` will be recorded some steps later; until then no other is planned, except by `probe_every`."""
        self._started.update(probes)

    def missed(self) -> None:
        """The probes that were started could not run."""
        self._started.clear()

    def record(self, step_seconds: float, tap_seconds: float, probe_seconds: Mapping[str, float]) -> None:
        """Accounts for one step: the seconds of the loop itself, of the tap, and of each probe that ran or failed."""
        self._steps += 1
        agent = tap_seconds + sum(probe_seconds.values())
        self._remember(agent, step_seconds)
        allowance = self._budget * step_seconds
        self._credit += max(allowance - tap_seconds, _PROBE_SHARE * allowance)
        for probe, seconds in probe_seconds.items():
            self._started.discard(probe)
            if probe in self._cold:
                self._cold.remove(probe)
            else:
                self._credit -= seconds
                self._learn(probe, seconds)
            self._end_turn(probe)
        # A long pause between steps, such as an evaluation, must not be followed by a burst of probes.
        self._credit = min(self._credit, sum(self._expected.values()))

    def disable(self, probe: str) -> None:
        """Never plans `probe` again."""
        if probe in self._probes:
            self._probes.remove(probe)
        self._expected.pop(probe, None)

    def state_dict(self) -> dict[str, Any]:
        """What probes cost and which has its turn, as plain values."""
        return {
            "kinds": list(self._probes),
            "expected": dict(self._expected),
            "cold": sorted(self._cold),
            "credit": self._credit,
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`, with the probes of this run.

        Raises:
            KeyError, TypeError, ValueError: `state` is no such state. Nothing is changed then.
        """
        order = {probe: place for place, probe in enumerate(state["kinds"])}
        expected = {probe: float(state["expected"][probe]) for probe in self._probes if probe in state["expected"]}
        cold, credit, steps = set(state["cold"]), float(state["credit"]), int(state["steps"])
        self._probes.sort(key=lambda probe: order.get(probe, -1))
        self._cold = {probe for probe in self._probes if probe in cold or probe not in order}
        self._expected, self._credit, self._steps = expected, credit, steps

    def _learn(self, probe: str, seconds: float) -> None:
        if probe in self._probes:
            known = self._expected.get(probe, seconds)
            self._expected[probe] = known + _SMOOTHING * (seconds - known)

    def _end_turn(self, probe: str) -> None:
        if probe in self._probes:
            self._probes.remove(probe)
            self._probes.append(probe)

    def _remember(self, agent: float, step: float) -> None:
        self._window.append((agent, step))
        self._agent_seconds += agent
        self._step_seconds += step
        if len(self._window) > _WINDOW:
            old_agent, old_step = self._window.popleft()
            self._agent_seconds -= old_agent
            self._step_seconds -= old_step
