"""Moves decisions that are not final yet on: by the trainer's answer, by recovery or its absence, and by expiry.

`transitions` has the outcomes and the events. Policies (`engine`) and operators (`operator_requests`) raise the other
events, and set the step by which a trainer must answer; the trainer refuses what comes later
(`agent.control.controller`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from sharpwatch.daemon.config.settings import GuardConfig
from sharpwatch.daemon.decisions.policy import EscalationChain
from sharpwatch.daemon.decisions.ramp_back import hold_steps, scaling_state
from sharpwatch.daemon.decisions.transitions import REFUSED_THERE, UNDER_WAY, Event
from sharpwatch.daemon.detection.incidents import IncidentLog
from sharpwatch.daemon.records import Checkpoint, Decision, Observation, ReportedResult

if TYPE_CHECKING:
    from sharpwatch.daemon.decisions.decision_log import DecisionLog

LOST_AFTER = 100  # steps that a result may come after its command's expiry: the samples that carry it can be dropped
_RESULT_EVENTS: Mapping[str, Event] = {"applied": "apply", "refused": "refuse", "expired": "expire", "failed": "fail"}


class DecisionLifecycle:
    """Advances a run's unsettled decisions to their next outcome.

    Args:
        log: The run's decisions.
        alerts: The run's alerts, which tell whether a change has cured its alert.
        chain: The run's policies, whose guards say how long to wait.
    """

    def __init__(self, log: DecisionLog, incidents: IncidentLog, chain: EscalationChain) -> None:
        self._log = log
        self._incidents = incidents
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
            self._log.note_incidents(self._incidents.close_all("the run was rolled back"))

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
            elif waited and self._incidents.active(decision.alert_name) is None:
                self._log.advance(decision, "recover")
        elif self._incidents.active(decision.alert_name) is None:
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
