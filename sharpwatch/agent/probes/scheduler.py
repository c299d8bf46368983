"""When probes run: which are due after which step, on which batch, and what is prepared for them before the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from sharpwatch.agent.probes.budget import OverheadBudget
from sharpwatch.agent.probes.context import ProbedStep
from sharpwatch.agent.probes.runner import Captured, ProbeRun, ProbeRunner
from sharpwatch.agent.statistics.tap import PendingTap, Tap


@dataclass(frozen=True, slots=True)
class DueProbes:
    """The probes due after one step; `step` has what was prepared for them, None where nothing was."""

    names: tuple[str, ...] = ()
    step: ProbedStep | None = None


_NONE_DUE = DueProbes()


class ProbingStrategy(Protocol):
    """What of a `distributed.strategy.Strategy` the scheduler asks."""

    @property
    def probes_from_start(self) -> bool:
        """Whether a probe may be due at the first step."""

    @property
    def all_ranks_probe(self) -> bool:
        """Whether all ranks run a probe at once, on the model that they share."""

    @property
    def tap(self) -> Tap:
        """The tap, whose reading knows the squared gradients of the step."""

    def due_probes(self, planned: tuple[str, ...], names: Sequence[str], /) -> tuple[str, ...]:
        """The probes due after the next step, the same on all ranks that probe together."""

    def all_ready(self, step: int, captured: bool, has_room: Callable[[], bool], /) -> bool:
        """Whether every rank that probes together can run the probe now."""


class ProbeScheduler:
    """Runs the probes of a run step by step; with several ranks, those that the ranks have agreed on.

    Args:
        runner: The probes.
        budget: Says which of them fit after the next step.
        strategy: How the processes that train the model act as one run.

    Attributes:
        running: Whether a probe is running now, whose own forwards are not the loop's.
        last_steps: The step at which each probe last ran, by its name.
    """

    def __init__(self, runner: ProbeRunner, budget: OverheadBudget, strategy: ProbingStrategy) -> None:
        self.running = False
        self.last_steps: dict[str, int] = {}
        self.runner = runner
        self.budget = budget
        self._strategy = strategy
        self._captured: Captured | None = None
        self._due: tuple[str, ...] = ()  # after the next step
        self.begin()

    def begin(self) -> None:
        """The next step is the first; several ranks have agreed on nothing by then."""
        self._due = self._planned() if self._strategy.probes_from_start else ()

    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model is called in training."""
        if self._due:
            self._captured = self.runner.forward(self._due, args, kwargs)

    def prepare(self) -> DueProbes:
        """The gradients of a step are complete: prepares the probes that are due after it."""
        # Where all ranks probe together, they also agree on whether each of them has seen a batch.
        if not self._due or (self._captured is None and not self._strategy.all_ranks_probe):
            return _NONE_DUE
        return DueProbes(self._due, self.runner.before_step(self._due))

    def run(self, step: int, due: DueProbes, tap: PendingTap | None) -> ProbeRun:
        """Step number `step` is taken: runs the probes that are due."""
        captured, self._captured = self._captured, None
        names = self._due if self._strategy.all_ranks_probe else due.names  # or one rank would wait for another
        if not names or not self._all_ready(captured, step) or captured is None:
            return ProbeRun()
        probed = due.step or self.runner.before_step(())
        if tap is not None:
            probed.gradient_squares = partial(self._strategy.tap.stepped, tap)
        self.running = True
        try:
            probes = self.runner.run(names, captured, probed)
        finally:
            self.running = False
        self.last_steps |= dict.fromkeys(probes.seconds, step)
        for name in self.runner.disabled:
            self.budget.disable(name)
        return probes

    def account(self, seconds: tuple[float, float] | None, probe_seconds: Mapping[str, float]) -> None:
        """Records the seconds of a step (the loop's own, the agent's), and plans the probes after the next."""
        if seconds is not None:
            own, agents = seconds
            self.budget.record(own, max(0.0, agents - sum(probe_seconds.values())), probe_seconds)
        self._due = self._planned()

    @property
    def wanted(self) -> int:
        """The probes that this rank plans, with a bit for each."""
        return sum(1 << self.runner.names.index(name) for name in self._due)

    def agree(self) -> None:
        """Keeps the probes that the ranks have agreed on, or that this rank runs alone."""
        due = self._strategy.due_probes(self._due, self.runner.names)
        # Some may have been given up since they were agreed on, on all ranks alike.
        self._due = tuple(name for name in due if name not in self.runner.disabled)

    def forget(self) -> None:
        """What was captured belongs to no step: the run was put back."""
        self._captured = None
        self.runner.discard()

    def close(self) -> None:
        """Removes all hooks."""
        self.runner.discard()

    def _planned(self) -> tuple[str, ...]:
        """The probes that fit the budget after the next step, or after a later one where ranks must agree first."""
        names = self.budget.plan()
        if self._strategy.all_ranks_probe:
            self.budget.started(names)
        return names

    def _all_ready(self, captured: Captured | None, step: int) -> bool:
        """Returns whether every rank that takes part in a probe can."""
        ready = self._strategy.all_ready(step, captured is not None, self.runner.has_room)
        if not ready:
            self.budget.missed()
        return ready
