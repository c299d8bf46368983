"""Moves decisions that are not final yet on: by the trainer's answer, by recovery or its absence, and by expiry.

`transitions` has the outcomes and the events. Policies (`engine`) and operators (`operator_requests`) raise the other
events, and set the step by which a trainer must answer; the trainer refuses what comes later
(`agent.control.controller`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from sharpwatch.daemon.config.settings import GuardConfig
from sharpwatch.daemon.decisions.effect import Effect, effect
from sharpwatch.daemon.decisions.operator_requests import has_set
from sharpwatch.daemon.decisions.policy import EscalationChain
from sharpwatch.daemon.decisions.ramp_back import scaling_state, stage_steps
from sharpwatch.daemon.decisions.remedy import holds_down, is_of_first_steps
from sharpwatch.daemon.decisions.transitions import REFUSED_THERE, UNDER_WAY, Event
from sharpwatch.daemon.detection.run_detection import RunDetection
from sharpwatch.daemon.records import Checkpoint, Decision, Observation, ReportedResult

if TYPE_CHECKING:
    from sharpwatch.daemon.decisions.decision_log import DecisionLog

LOST_AFTER = 100  # steps that a result may come after its command's expiry: the samples that carry it can be dropped
_RESULT_EVENTS: Mapping[str, Event] = {
    "applied": "apply",
    "refused": "refuse",
    "expired": "expire",
    "failed": "fail",
    "cancelled": "cancel",
}
_EFFECT_EVENTS: Mapping[Effect, Event] = {
    "recovered": "recover",
    "worse": "worsen",
    "no-effect": "no_effect",
    "inconclusive": "inconclusive",
}


_DONE_BEFORE = "what the steps before it have done to fresh weights stays: only beginning anew takes that back"


class DecisionLifecycle:
    """Advances a run's unsettled decisions to their next outcome.

    Args:
        log: The run's decisions.
        detection: What is found in the run, and its losses, which tell whether a change has cured its incident.
        chain: The run's policies, whose guards say how long to wait.
    """

    def __init__(self, log: DecisionLog, detection: RunDetection, chain: EscalationChain) -> None:
        self._log = log
        self._detection = detection
        self._incidents = detection.incidents
        self._chain = chain

    def configure(self, chain: EscalationChain) -> None:
        """Goes by other policies from now on."""
        self._chain = chain

    def record_result(self, decision: Decision, result: ReportedResult) -> None:
        """Records the trainer's answer to the command of `decision`; a second answer changes nothing."""
        if decision.outcome not in UNDER_WAY:
            return
        if result.is_of_a_cancellation:
            self._refuse_cancellation(decision, result)
            return
        event = _RESULT_EVENTS[result.outcome]
        detail = _joined(decision.detail, result.detail)
        if event == "cancel":
            who = {"author": decision.cancelled_by, "reason": decision.cancel_reason} if decision.cancelled_by else {}
            self._log.advance(decision, event, detail=detail, **who)
        elif event == "apply":
            self._apply(decision, result, detail)
        elif event == "refuse":
            self._log.advance(decision, event, detail=detail, guard=f"{REFUSED_THERE}: {result.detail}")
        else:
            self._log.advance(decision, event, detail=detail)

    def settle(self, observation: Observation, now: float) -> None:
        """Judges every unsettled decision by a step of the run.

        Args:
            observation: The step.
            now: Unix seconds.
        """
        self.expire_proposals(now)
        for decision in self._log.unsettled():
            if decision.outcome in UNDER_WAY:
                self._settle_unanswered(decision, observation)
            elif decision.applied_step is not None:
                self._settle_effect(decision, decision.applied_step, observation.step)

    def expire_proposals(self, now: float) -> None:
        """Expires the proposals that nobody approved in time; also called on approval, as a silent run has no steps."""
        for decision in self._log.unsettled():
            if decision.outcome != "proposed":
                continue
            if now - decision.made_at > self._guard(decision).approve_within:
                self._expire(decision, "nobody approved it in time")
            elif decision.makes_up_for and all(value == 1.0 for value in self._detection.rate_excess.values()):
                self._expire(decision, "the rate is what it was again")

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
            for other in self._log.unsettled():
                if other.outcome == "applied" and other.id != decision.id:
                    self._log.advance(other, "inconclusive", detail=_joined(other.detail, "the run was rolled back"))

    def _refuse_cancellation(self, decision: Decision, result: ReportedResult) -> None:
        """The command stands; it is sent again, as an attempt that has begun meanwhile has not received it."""
        detail = _joined(decision.detail, f"it can't be cancelled: {result.detail}")
        self._log.send(self._log.note(decision, detail=detail, cancelled_by="", cancel_reason=""))

    def _settle_unanswered(self, decision: Decision, observation: Observation) -> None:
        if not decision.expires_at_step or observation.step <= decision.expires_at_step + LOST_AFTER:
            return
        if not decision.revision or not has_set(observation, decision.multipliers, None):
            self._expire(decision, "the trainer never answered")
            return
        self._log.applied(decision.revision, observation.step)
        detail = _joined(decision.detail, "the result was lost; the trainer's multipliers show it")
        self._log.advance(decision, "apply", detail=detail, applied_step=observation.step)

    def _settle_effect(self, decision: Decision, applied: int, step: int) -> None:
        if decision.action == "ramp_back":
            # What speaks against it is looked for as long, and undoes it (`engine`).
            if step - applied >= stage_steps(self._guard(decision), self._log):
                self._log.advance(decision, "recover")
            return
        incident = self._incidents.get(decision.alert_id)
        if incident is None:
            return
        if decision.action == "scale_lr" and not decision.makes_up_for and is_of_first_steps(incident):
            self._log.advance(decision, "no_effect", detail=_joined(decision.detail, _DONE_BEFORE))
            return
        # What came back after a rollback is another incident.
        same = [other for other in self._incidents.open if other.is_same_trouble(incident)]
        held = bool(same) and self._is_held_down(decision)
        is_right = bool(decision.makes_up_for) and all(one == 1.0 for one in self._detection.rate_excess.values())
        waited = step - applied >= self._guard(decision).recover_within_steps
        is_quiet = bool(same) and all(other.last_step < step for other in same)  # then it is soon known to be over
        judged = effect(
            self._detection.history.losses,
            incident.onset,
            applied,
            over=held or is_right or not same,
            last=waited and not is_quiet,
        )
        if judged is None:
            return
        came_of_it, why = judged
        if held and came_of_it in ("recovered", "inconclusive"):
            why = f"{why}; held down while the rate is too high"
            if not incident.contained_step:
                self._log.note_incidents([self._incidents.contain(incident.id, step)])
            if came_of_it == "inconclusive":
                return  # the rate at least is what it would be; more losses come
        self._log.advance(decision, _EFFECT_EVENTS[came_of_it], detail=_joined(decision.detail, why))

    def _is_held_down(self, decision: Decision) -> bool:
        """Whether the cut of a decision's incident, which goes with the trainer's rate, holds that down."""
        excess = self._detection.rate_excess if decision.makes_up_for else {}
        following = scaling_state(self._log).following if decision.makes_up_for else ()
        return any(one.made.alert_id == decision.alert_id and holds_down(one, excess) for one in following)

    def _expire(self, decision: Decision, why: str) -> None:
        self._log.advance(decision, "expire", detail=_joined(decision.detail, why))

    def _guard(self, decision: Decision) -> GuardConfig:
        return self._chain.owner(decision).guard


def _joined(before: str, more: str) -> str:
    return f"{before}; {more}" if before and more else before or more
