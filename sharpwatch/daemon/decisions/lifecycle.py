"""The life of a decision: which outcomes it can have, and which event leads from one to the next.

                observe ──▶ observed
                refuse ───▶ refused
    draft ──────send ─────▶ sent ────────┐  apply ──▶ applied ──┐  recover ───▶ recovered
                propose ──▶ proposed     ├─ refuse ─▶ refused   ├─ fail ──────▶ failed
                              │          ├─ fail ───▶ failed    └─ supersede ─▶ failed
                              ├─ approve ▶ approved  expire ─▶ expired
                              ├─ reject ─▶ rejected
                              └─ expire, supersede ─▶ expired

`TRANSITIONS` is this picture as a table, and `advance` is the only way to a new outcome: `DecisionLog` calls it for
every event. `DecisionLifecycle` raises the events of decisions that are not final yet: the trainer's answer, recovery
or its absence, and expiry. Policies (`engine`) and operators (`operator_requests`) raise the others, and set the
step by which a trainer must answer; the trainer refuses what comes later (`agent.control.controller`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Literal, get_args

from sharpwatch.daemon.config.settings import GuardConfig
from sharpwatch.daemon.decisions.policy import REFUSED_THERE, EscalationChain
from sharpwatch.daemon.decisions.ramp_back import hold_steps, scaling_state
from sharpwatch.daemon.detection.detectors import AlertLog
from sharpwatch.daemon.records import Checkpoint, Decision, Observation, Outcome, ReportedResult

if TYPE_CHECKING:
    from sharpwatch.daemon.decisions.decision_log import DecisionLog

Event = Literal[
    "observe", "propose", "refuse", "send", "approve", "reject", "supersede", "apply", "fail", "expire", "recover"
]

TRANSITIONS: Mapping[tuple[Outcome, Event], Outcome] = {
    # A policy or an operator makes the decision; a guard can refuse it.
    ("draft", "observe"): "observed",
    ("draft", "propose"): "proposed",
    ("draft", "refuse"): "refused",
    ("draft", "send"): "sent",
    # An operator answers a proposal, nobody does in time, or another set of multipliers comes into force first.
    ("proposed", "approve"): "approved",
    ("proposed", "reject"): "rejected",
    ("proposed", "expire"): "expired",
    ("proposed", "supersede"): "expired",
    # The trainer answers the command, or never does.
    ("approved", "apply"): "applied",
    ("approved", "refuse"): "refused",
    ("approved", "fail"): "failed",
    ("approved", "expire"): "expired",
    ("sent", "apply"): "applied",
    ("sent", "refuse"): "refused",
    ("sent", "fail"): "failed",
    ("sent", "expire"): "expired",
    # The change cures the alert, does not, or the policy acts again because it was not enough.
    ("applied", "recover"): "recovered",
    ("applied", "fail"): "failed",
    ("applied", "supersede"): "failed",
}
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
EVENTS: tuple[Event, ...] = get_args(Event)
FINAL = frozenset(OUTCOMES) - {outcome for outcome, _ in TRANSITIONS}  # no event leads on from these
UNDER_WAY = frozenset(outcome for outcome, event in TRANSITIONS if event == "apply")  # the trainer's answer is due

LOST_AFTER = 100  # steps that a result may come after its command's expiry: the samples that carry it can be dropped
_RESULT_EVENTS: Mapping[str, Event] = {"applied": "apply", "refused": "refuse", "expired": "expire", "failed": "fail"}


def can(outcome: Outcome, event: Event) -> bool:
    """Returns whether a decision with `outcome` can take `event`."""
    return (outcome, event) in TRANSITIONS


def advance(outcome: Outcome, event: Event) -> Outcome:
    """Looks up the outcome that an event leads to.

    Args:
        outcome: The decision's present outcome; "draft" before it is recorded.
        event: What happened to it.

    Returns:
        The new outcome.

    Raises:
        ValueError: `TRANSITIONS` has no such transition.
    """
    if not can(outcome, event):
        possible = ", ".join(other for other in EVENTS if can(outcome, other)) or "none, it is final"
        raise ValueError(f"event {event!r} is not possible for a decision that is {outcome}; possible: {possible}")
    return TRANSITIONS[outcome, event]


def is_settled(decision: Decision) -> bool:
    """Returns whether the outcome of `decision` can no longer change.

    An operator's own decision is settled once it is applied; a policy's has still to cure its alert.
    """
    return decision.outcome in FINAL or (decision.outcome == "applied" and not decision.policy)


class DecisionLifecycle:
    """Advances a run's unsettled decisions to their next outcome.

    Args:
        log: The run's decisions.
        alerts: The run's alerts, which tell whether a change has cured its alert.
        chain: The run's policies, whose guards say how long to wait.
    """

    def __init__(self, log: DecisionLog, alerts: AlertLog, chain: EscalationChain) -> None:
        self._log = log
        self._alerts = alerts
        self._chain = chain

    def record_result(self, decision: Decision, result: ReportedResult) -> None:
        """Records the trainer's answer to the command of `decision`; a second answer changes nothing."""
        if decision.outcome not in UNDER_WAY:
            return
        event = _RESULT_EVENTS[result.outcome]
        detail = _joined(decision.detail, result.detail)
        if event == "apply":
            self._apply(decision, result, detail)
        elif event == "refuse":
            self._log.advance(decision, event, detail=detail, guard=f"{REFUSED_THERE}: {result.detail}")
        else:
            self._log.advance(decision, event, detail=detail)

    def settle(self, observation: Observation, found: AbstractSet[str], now: float) -> None:
        """Judges every unsettled decision by a step of the run.

        Args:
            observation: The step.
            found: The names of the alerts that the detectors found at it.
            now: Unix seconds.
        """
        self.expire_proposals(now)
        for decision in self._log.unsettled():
            if decision.outcome in UNDER_WAY:
                self._settle_unanswered(decision, observation)
            elif decision.applied_step is not None:
                self._settle_effect(decision, decision.applied_step, observation.step, found)

    def expire_proposals(self, now: float) -> None:
        """Expires the proposals that nobody approved in time; also called on approval, as a silent run has no steps."""
        for decision in self._log.unsettled():
            waited = now - decision.made_at
            if decision.outcome == "proposed" and waited > self._guard(decision).approve_within:
                self._expire(decision, "nobody approved it in time")

    def checkpoints_lost(self, lost: Collection[Checkpoint]) -> None:
        """Expires the proposals to go back to one of `lost`: approved, they could only fail."""
        for decision in self._log.unsettled() if lost else ():
            if decision.outcome == "proposed" and decision.rollback and decision.rollback.checkpoint in lost:
                self._expire(decision, "its checkpoint can no longer be restored")

    def _apply(self, decision: Decision, result: ReportedResult, detail: str) -> None:
        if result.unchanged_blocks:
            detail = _joined(detail, f"unchanged: {', '.join(result.unchanged_blocks)}")
        self._log.advance(decision, "apply", detail=detail, applied_step=result.step)
        if decision.action == "rollback":
            self._log.note_alerts(self._alerts.close_all())

    def _settle_unanswered(self, decision: Decision, observation: Observation) -> None:
        if not decision.expires_at_step or observation.step <= decision.expires_at_step + LOST_AFTER:
            return
        if not decision.revision or not _in_force(decision, observation):
            self._expire(decision, "the trainer never answered")
            return
        self._log.applied(decision.revision, observation.step)
        detail = _joined(decision.detail, "the result was lost; the trainer's multipliers show it")
        self._log.advance(decision, "apply", detail=detail, applied_step=observation.step)

    def _settle_effect(self, decision: Decision, applied: int, step: int, found: AbstractSet[str]) -> None:
        if decision.action == "ramp_back":
            if step - applied >= self._hold(decision):
                self._log.advance(decision, "recover")
            return
        within = self._guard(decision).recover_within_steps
        waited = step - applied >= within
        came_back = decision.alert_name in found
        if decision.action == "rollback":
            if came_back:
                self._fail(decision, "the alert came back after the rollback")
            elif waited and self._alerts.active(decision.alert_name) is None:
                self._log.advance(decision, "recover")
        elif self._alerts.active(decision.alert_name) is None:
            self._log.advance(decision, "recover")
        elif came_back and waited:
            self._fail(decision, f"no recovery within {within} steps")

    def _fail(self, decision: Decision, why: str) -> None:
        self._log.advance(decision, "fail", detail=_joined(decision.detail, why))

    def _expire(self, decision: Decision, why: str) -> None:
        self._log.advance(decision, "expire", detail=_joined(decision.detail, why))

    def _guard(self, decision: Decision) -> GuardConfig:
        policy = self._chain.named(decision.policy)
        return policy.guard if policy is not None else GuardConfig()

    def _hold(self, decision: Decision) -> int:
        policy = self._chain.named(decision.policy)
        return (
            hold_steps(policy, scaling_state(self._log).failed_ramp_backs)
            if policy is not None
            else GuardConfig().hold_steps
        )


def _in_force(decision: Decision, observation: Observation) -> bool:
    seen = observation.multipliers
    return bool(seen) and all(
        math.isclose(seen[block], value, rel_tol=1e-5) for block, value in decision.multipliers.items() if block in seen
    )


def _joined(before: str, more: str) -> str:
    return f"{before}; {more}" if before and more else before or more
