"""When probes run: which are due after which step, on which batch, and what is prepared for them before the step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from sharpwatch.agent.parts import Parts
from sharpwatch.agent.probes.context import ProbedStep
from sharpwatch.agent.probes.runner import Captured, ProbeRun
from sharpwatch.agent.statistics.tap import PendingTap


@dataclass(frozen=True, slots=True)
class DueProbes:
    """The probes due after one step; `step` has what was prepared for them, None where nothing was."""

    names: tuple[str, ...] = ()
    step: ProbedStep | None = None


_NONE_DUE = DueProbes()


class ProbeScheduler:
    """Runs the probes of a run step by step; with several ranks, those that the ranks have agreed on.

    Attributes:
        running: Whether a probe is running now, whose own forwards are not the loop's.
        last_steps: The step at which each probe last ran, by its name.
    """

    def __init__(self, parts: Parts) -> None:
        self.running = False
        self.last_steps: dict[str, int] = {}
        self._parts = parts
        self._runner = parts.probes
        self._captured: Captured | None = None
        self._due: tuple[str, ...] = ()  # after the next step
        self.begin()

    def begin(self) -> None:
        """The next step is the first; several ranks have agreed on nothing by then."""
        self._due = self._planned() if self._parts.shared is None else ()

    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model is called in training."""
        if self._due:
            self._captured = self._runner.forward(self._due, args, kwargs)

    def prepare(self) -> DueProbes:
        """The gradients of a step are complete: prepares the probes that are due after it."""
        # Where all ranks probe together, they also agree on whether each of them has seen a batch.
        if not self._due or (self._captured is None and not self._parts.together):
            return _NONE_DUE
        return DueProbes(self._due, self._runner.before_step(self._due))

    def run(self, step: int, due: DueProbes, tap: PendingTap | None) -> ProbeRun:
        """Step number `step` is taken: runs the probes that are due."""
        captured, self._captured = self._captured, None
        names = self._due if self._parts.together else due.names  # or one rank would wait for another
        if not names or not self._all_ready(captured, step) or captured is None:
            return ProbeRun()
        probed = due.step or self._runner.before_step(())
        if tap is not None:
            probed.gradient_squares = partial(self._parts.tap.stepped, tap)
        self.running = True
        try:
            probes = self._runner.run(names, captured, probed)
        finally:
            self.running = False
        self.last_steps |= dict.fromkeys(probes.seconds, step)
        for name in self._runner.disabled:
            self._parts.sampler.disable(name)
        return probes

    def account(self, seconds: tuple[float, float] | None, probe_seconds: Mapping[str, float]) -> None:
        """Records the seconds of a step (the loop's own, the agent's), and plans the probes after the next."""
        if seconds is not None:
            own, agents = seconds
            self._parts.sampler.record(own, max(0.0, agents - sum(probe_seconds.values())), probe_seconds)
        self._due = self._planned()

    @property
    def wish(self) -> int:
        """The probes that this rank plans, with a bit for each."""
        return sum(1 << self._runner.names.index(name) for name in self._due)

    def agree(self, leading: int, *, leads: bool) -> None:
        """Takes over the `wish` of the leading rank where all probe together; elsewhere only that rank probes."""
        if self._parts.together:
            given_up = self._runner.disabled  # since the wish was sent, on all ranks alike
            wanted = (name for i, name in enumerate(self._runner.names) if leading >> i & 1)
            self._due = tuple(name for name in wanted if name not in given_up)
        elif not leads:
            self._due = ()

    def forget(self) -> None:
        """What was captured belongs to no step: the run was put back."""
        self._captured = None
        self._runner.discard()

    def close(self) -> None:
        """Removes all hooks."""
        self._runner.discard()

    def _planned(self) -> tuple[str, ...]:
        """The probes that fit the budget after the next step, or after a later one where ranks must agree first."""
        names = self._parts.sampler.plan()
        if self._parts.together:
            self._parts.sampler.started(names)
        return names

    def _all_ready(self, captured: Captured | None, step: int) -> bool:
        """Returns whether every rank that takes part in a probe can."""
        shared = self._parts.shared
        if shared is None or not shared.sharded:
            return captured is not None
        ready = shared.ready(captured is not None and self._runner.has_room(), step)
        if not ready:
            self._parts.sampler.missed()
        return ready
