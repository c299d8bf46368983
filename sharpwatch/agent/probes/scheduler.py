"""When probes run: within the overhead budget, and what is prepared for them before the step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from sharpwatch.agent.calls import OtherCalls
from sharpwatch.agent.probes.context import ProbedStep
from sharpwatch.agent.probes.observed import ObservedBatch
from sharpwatch.agent.probes.runner import Captured, ProbeRun, ProbeRunner
from sharpwatch.agent.statistics.tap import PendingTap, Tap

_MISSED_STEPS = 3  # in a row, before that is a failure; now and then a step may be another model's
_WINDOW = 1000  # steps that the overhead ratio is taken over
_SMOOTHING = 0.3  # weight of the newest measurement in a probe's expected cost
_EARLY, _EARLY_EVERY = "direction", 3  # what is lost in the first steps of a run is not made up for later
# With 1.3 million parameters the tap alone takes 2 % of a step; without a share of theirs probes would never run.
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
        early_probes: Up to this step, `direction` also runs at every third, whatever it costs.
    """

    def __init__(
        self, probes: Sequence[str], *, budget: float, probe_every: int | None = None, early_probes: int = 0
    ) -> None:
        self._probes = list(probes)
        self._budget = budget
        self._probe_every = probe_every
        self._early_probes = early_probes
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
        early = self._early()
        if self._probe_every is not None:
            return tuple(self._probes) if (self._steps + 1) % self._probe_every == 0 else early
        if self._started or early:
            return early
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
            # A first run took 4.4 s where the second took 0.3 s; charged, it silenced all probes for 300 steps.
            if probe in self._cold:
                self._cold.remove(probe)
            else:
                # Early probes were asked for whatever they cost; charged, they would silence all others for long.
                is_early = probe == _EARLY and self._steps <= self._early_probes
                self._credit -= 0.0 if is_early else seconds
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
        # A probe that the earlier run did not have goes first, as it has never run.
        self._probes.sort(key=lambda probe: order.get(probe, -1))
        self._cold = {probe for probe in self._probes if probe in cold or probe not in order}
        self._expected, self._credit, self._steps = expected, credit, steps

    def _early(self) -> tuple[str, ...]:
        next_step = self._steps + 1
        due = next_step <= self._early_probes and next_step % _EARLY_EVERY == _EARLY_EVERY - 1
        return (_EARLY,) if due and _EARLY in self._probes else ()

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
        missed: In how many steps in a row, after which probes were due, no forward was seen.
    """

    def __init__(self, runner: ProbeRunner, budget: OverheadBudget, strategy: ProbingStrategy) -> None:
        self.running = False
        self.last_steps: dict[str, int] = {}
        self.missed = 0
        self.runner = runner
        self.budget = budget
        self._strategy = strategy
        self._captured: Captured | None = None
        self._observed: ObservedBatch | None = None  # the loop's own batch in this step
        self._observes = False  # whether it ever showed one
        self._due: tuple[str, ...] = ()  # after the next step
        for name in runner.disabled:
            budget.disable(name)
        self.begin()

    def begin(self) -> None:
        """The next step is the first; several ranks have agreed on nothing by then."""
        self._due = self._planned() if self._strategy.probes_from_start else ()

    def capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Captured | None:
        """What the model is called with, if a probe is due."""
        return self.runner.capture(args, kwargs) if self._due else None

    def forward(self, captured: Captured | None) -> None:
        """The model is called in training."""
        if captured is not None:
            self._captured = captured
            self.runner.forward(self._due)

    def output(self, output: Any, trained_on: Callable[[], bool] | None) -> None:
        """The call returned `output`; of a loss in it `trained_on` tells later whether backward ran from it."""
        self._captured = self.returned(self._captured, output, trained_on)

    def returned(
        self, captured: Captured | None, output: Any, trained_on: Callable[[], bool] | None
    ) -> Captured | None:
        """As `output`, for a call whose backward may never come."""
        if captured is None:
            return None
        self.runner.output(self._due, captured, output)
        return replace(captured, trained_on=trained_on)

    def observe(self, batch: Any, *, late: bool) -> None:
        """The loop shows its batch; it is `late` where the probes of its step have run already."""
        self._observes = True
        if self._due:
            self._observed = ObservedBatch(batch, late=late)

    def prepare(self) -> DueProbes:
        """The gradients of a step are complete: prepares the probes that are due after it."""
        # Where all ranks probe together, they also agree on whether each of them has seen a batch.
        if not self._due or not (self._seen or self._strategy.all_ranks_probe):
            return _NONE_DUE
        return DueProbes(self._due, self.runner.before_step(self._due))

    def look_for(self, calls: OtherCalls) -> None:
        """A step is taken whose probes may lack a forward: finds what the loop calls, or says why no probe runs."""
        if self._due:
            self.missed = 0 if self._seen else self.missed + 1
        # A probe of all ranks together takes the model's own forward alone.
        missed = self.missed > 0 and not self._strategy.all_ranks_probe
        found = calls.step_ends(missed=missed) if missed or calls.active else None
        if found is not None:
            self.runner.call_by(found)
        elif self.missed >= _MISSED_STEPS:
            seen = calls.reason or "none with gradients enabled, through whose output a backward came"
            self.runner.not_called(self._due, f"no forward of the model was seen in {self.missed} steps: {seen}")

    def run(
        self, step: int, due: DueProbes, tap: PendingTap | None, losses: Callable[[], Sequence[float]] = tuple
    ) -> ProbeRun:
        """Step number `step` is taken: runs the probes that are due; `losses` returns what the loop observed."""
        captured = self._take()
        names = self._due if self._strategy.all_ranks_probe else due.names  # or one rank would wait for another
        # The vote comes before this rank's own batch is looked at: every rank must take part in it.
        if not names or not self._all_ready(captured, step) or captured is None:
            if names:
                self.runner.discard()
            return ProbeRun()
        probed = due.step or self.runner.before_step(())
        if tap is not None:
            probed.gradient_squares = partial(self._strategy.tap.stepped, tap)
        probed.losses = losses
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
        self._captured = self._observed = None
        self.runner.discard()

    def close(self) -> None:
        """Removes all hooks."""
        self.runner.discard()

    @property
    def _seen(self) -> bool:
        """Whether there is a batch to probe on: where the loop shows its own, the one of this step."""
        return self._observed is not None or (self._captured is not None and not self._observes)

    def _take(self) -> Captured | None:
        """What was captured in this step."""
        seen, captured, observed = self._seen, self._captured, self._observed
        self._captured = self._observed = None
        return replace(captured or self.runner.without_forward(), observed=observed) if seen else None

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
