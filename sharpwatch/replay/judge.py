"""A recorded run through detectors and policies: incidents, decisions, and what could be judged from which sample on.

Policies only record what they would do, as in a run whose mode is `observe`: nothing can be applied to a run that
is over.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sharpwatch.daemon.config.settings import PolicyConfig
from sharpwatch.daemon.decisions.guards import OK
from sharpwatch.daemon.decisions.run_controller import RunController
from sharpwatch.daemon.detection.history import Losses
from sharpwatch.daemon.detection.signals import Scores
from sharpwatch.daemon.detection.thresholds import USUAL, Budget
from sharpwatch.daemon.records import Decision, Incident, Outcome
from sharpwatch.replay.log import Column
from sharpwatch.replay.recorded_run import RecordedRun, reference_losses


@dataclass(frozen=True, slots=True)
class JudgedIncident:
    """An incident; the step at which it was closed, None where the run ended first, and at which it became critical."""

    incident: Incident
    closed_step: int | None
    critical_step: int | None = None


@dataclass(frozen=True, slots=True)
class WouldBe:
    """A decision that a policy would have made.

    Attributes:
        made: The decision, which was only recorded.
        incident: The incident that it answers, as it was known then.
        outcome: What would have become of it first, by the policy's mode and the verdict of its guard.
        is_hypothetical: Whether an earlier action would have changed what it stands on.
    """

    made: Decision
    incident: Incident
    outcome: Outcome
    is_hypothetical: bool


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the detectors find in a run, and what policies would do about it.

    Attributes:
        run: The run.
        incidents: In the order they were opened.
        blind: By column the samples before the first one that was judged; None where none was.
        policies: The policies that were asked.
        decisions: What they would have decided, in order.
    """

    run: RecordedRun
    incidents: tuple[JudgedIncident, ...]
    blind: Mapping[Column, int | None]
    policies: tuple[PolicyConfig, ...] = ()
    decisions: tuple[WouldBe, ...] = ()

    @property
    def first_action(self) -> int | None:
        """The step of the first decision that would have changed the run, once approved where it has to be."""
        return next((each.made.step for each in self.decisions if _acts(each.made, each.outcome)), None)


def judge(
    run: RecordedRun,
    budget: Budget = USUAL,
    reference: RecordedRun | None = None,
    policies: Sequence[PolicyConfig] = (),
) -> Judgement:
    """Give a run to the detectors and policies as a daemon would, from its first step to its last.

    Args:
        run: The run.
        budget: Of false alarms.
        reference: A run whose losses its own are held against.
        policies: Asked what they would do; a trainer is assumed that takes learning rates and rollbacks.

    Raises:
        LogError: The reference has no loss.
    """
    controller = _controller(run, budget, policies)
    detection = controller.detection
    if reference is not None:
        detection.history.losses = Losses(capacity=max(1, len(run.observations)))
        detection.set_reference(reference.source, reference_losses(reference))
    closed: dict[str, int] = {}
    critical: dict[str, int] = {}
    decisions: list[WouldBe] = []
    blind: dict[Column, int | None] = {"loss": None, "grad-norm": None, "lr": None}
    reports = list(run.checkpoints)
    for count, observation in enumerate(run.observations):
        while reports and reports[0][0] <= count:
            controller.note_checkpoints(reports.pop(0)[1])
        with warnings.catch_warnings():
            # A log says nothing of updates and weights, and the means of nothing are NaN.
            warnings.simplefilter("ignore", RuntimeWarning)
            changes = controller.observe(observation, observation.time)
        for incident in changes.incidents:
            if incident.severity == "critical":
                critical.setdefault(incident.id, observation.step)
        closed |= {incident.id: observation.step for incident in changes.incidents if not incident.active}
        for made in changes.decisions:
            decisions.append(_would_be(made, controller, policies, decisions))
        newest = detection.recent[-1]
        blind |= {column: count for column, known in blind.items() if known is None and _is_judged(column, newest)}
    incidents = tuple(JudgedIncident(each, closed.get(each.id), critical.get(each.id)) for each in controller.incidents)
    return Judgement(run, incidents, blind, tuple(policies), tuple(decisions))


def _controller(run: RecordedRun, budget: Budget, policies: Sequence[PolicyConfig]) -> RunController:
    numbers = itertools.count(1)
    return RunController(
        run.source,
        layer_blocks=run.layer_blocks,
        parameters=run.parameters,
        parameter_names=run.parameter_names,
        policies=policies,
        budget=budget,
        mode="observe",
        control="rollback",
        can_roll_back=True,
        new_id=lambda: str(next(numbers)),
    )


def _would_be(
    made: Decision, controller: RunController, policies: Sequence[PolicyConfig], before: Sequence[WouldBe]
) -> WouldBe:
    policy = next(each for each in policies if each.name == made.policy)
    incident = controller.incident(made.alert_id)
    assert incident is not None  # noqa: S101 - a decision that is only recorded answers an incident
    outcome: Outcome = "observed"
    if policy.mode != "observe" and not policy.dry_run and made.action != "notify":
        outcome = "refused" if made.guard != OK else "sent" if policy.mode == "enforce" else "proposed"
    return WouldBe(made, incident, outcome, any(_acts(each.made, each.outcome) for each in before))


def _acts(made: Decision, outcome: Outcome) -> bool:
    return outcome in ("sent", "proposed") and made.action != "notify"


def _is_judged(column: Column, scores: Scores) -> bool:
    """Whether the newest sample has a score of a loss, of a gradient norm, or of a rate."""
    if column == "loss":
        return not np.isnan(scores.loss).all()
    if column == "grad-norm":
        return bool(np.isfinite(scores.gradient).any())
    return bool(np.isfinite(scores.rate).any())
