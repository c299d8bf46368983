"""Rolls a run's plan out: sends its stages, undoes the one that harms, and answers the operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from sharpwatch.daemon.decisions.decision_log import DecisionLog
from sharpwatch.daemon.decisions.lr_plan import (
    LARGEST_RAMP,
    LONGEST_NAME,
    Estimates,
    PlanRequest,
    advanced,
    moved,
    paused,
    promoted,
    set_before,
    signs,
    stage_name,
    stage_set,
    stages_of,
    target_of,
)
from sharpwatch.daemon.decisions.operator_requests import OperatorContext, OperatorRequests
from sharpwatch.daemon.decisions.ramp_back import rates_are_free, scaling_state
from sharpwatch.daemon.decisions.transitions import came_to_nothing
from sharpwatch.daemon.detection.run_detection import RunDetection
from sharpwatch.daemon.records import Decision, LrPlan
from sharpwatch.errors import OperatorError

_RETRY = 100  # steps until multipliers that the trainer did not take back are sent once more; then twice as many


class PlanRollout:
    """The plan of one run.

    Args:
        log: The run's decisions, which have its plans.
        detection: What is found in the run, and its losses.
        requests: Makes the plan's decisions, as it does an operator's.
        new_id: Makes the ids of plans.
    """

    def __init__(
        self, log: DecisionLog, detection: RunDetection, requests: OperatorRequests, new_id: Callable[[], str]
    ) -> None:
        self._log = log
        self._detection = detection
        self._requests = requests
        self._new_id = new_id

    def drafted(self, request: PlanRequest, estimates: Estimates, operator: OperatorContext) -> LrPlan:
        """The plan as it would be started; raises `OperatorError` where it can't be."""
        self._requests.require_multipliers()
        if self._active is not None:
            raise OperatorError(f"plan {self._active.name} is {self._active.state}: abort it first")
        if not 0 < len(request.name) <= LONGEST_NAME:
            raise OperatorError(f"a plan's name must have 1 to {LONGEST_NAME} characters, got {len(request.name)}")
        if not 0 <= request.ramp_steps <= LARGEST_RAMP:
            raise OperatorError(f"ramp_steps must be 0 to {LARGEST_RAMP}, got {request.ramp_steps}")
        before = self._log.multipliers
        target = target_of(request, before, estimates)
        self._requests.check_set(target)
        stages = stages_of(target, before, request.stages)
        self._require_calm()
        changed = [block for stage in stages for block in stage]
        return LrPlan(
            id=self._new_id(),
            run=self._log.run,
            name=request.name,
            author=operator.author,
            reason=operator.reason,
            made_at=operator.now,
            target={block: target[block] for block in changed},
            before={block: before[block] for block in changed},
            stages=stages,
            ramp_steps=request.ramp_steps,
            automatic=request.automatic,
            changed_by=operator.author,
            changed_reason=operator.reason,
        )

    def start(self, request: PlanRequest, estimates: Estimates, operator: OperatorContext) -> None:
        """Start a plan; raises `OperatorError` where it can't be."""
        plan = self._log.put_plan(self.drafted(request, estimates, operator))
        self._send_if_due(plan, operator)

    def promote(self, operator: OperatorContext) -> None:
        """Have the next stage sent, or a plan that was paused go on; raises `OperatorError` where that can't be."""
        after = promoted(self._found(), operator.author, operator.reason)
        self._require_calm()
        self._send_if_due(self._log.put_plan(after), operator)

    def pause(self, operator: OperatorContext) -> None:
        """Have no further stage sent; raises `OperatorError` where none would be."""
        self._log.put_plan(paused(self._found(), operator.author, operator.reason))

    def stop(self, operator: OperatorContext) -> None:
        """Pause the plan, if one goes on."""
        plan = self._active
        if plan is not None and plan.state != "paused":
            self._log.put_plan(paused(plan, operator.author, operator.reason))

    def abort(self, operator: OperatorContext) -> None:
        """End the plan, with the multipliers from before it; raises `OperatorError` where none goes on."""
        plan = self._found()
        if not plan.is_active:
            raise OperatorError(f"plan {plan.name} is {plan.state} already; to undo a revision: sharpwatch lr undo")
        ended = moved(
            plan,
            "aborted",
            f"aborted by {operator.author}",
            changed_by=operator.author,
            changed_reason=operator.reason,
            under_way="",
        )
        self._log.put_plan(ended)
        sent = range(plan.stages_done + bool(plan.under_way))
        self._take_back(ended, sent, operator, f"plan {plan.name} aborted")

    def taken_over(self, made: Decision) -> None:
        """An operator has changed multipliers by hand: what is in force is theirs, and the plan ends."""
        plan = self._active
        if plan is None:
            return
        why = f"{made.author} has changed multipliers by hand, with revision {made.revision}"
        by = {"changed_by": made.author, "changed_reason": made.reason}
        self._log.put_plan(moved(plan, "aborted", why, under_way="", **by))

    def step(self, step: int, now: float) -> None:
        """Do what is due after a step of the run."""
        plan = self._active
        if plan is None:
            self._return_again(step, now)
            return
        made = self._log.find(plan.under_way) if plan.under_way else None
        after = advanced(plan, made, signs(self._detection, plan, made, step))
        if after != plan:
            self._log.put_plan(after)
        if after.state == "aborted":
            daemon = OperatorContext("sharpwatch", after.detail, step, now)
            self._take_back(after, [after.stages_done], daemon, f"plan {plan.name} of {plan.author}")
        else:
            self._send_if_due(after, OperatorContext(plan.author, plan.reason, step, now))

    @property
    def _active(self) -> LrPlan | None:
        plan = self._log.plan
        return plan if plan is not None and plan.is_active else None

    def _found(self) -> LrPlan:
        if self._log.plan is None:
            raise OperatorError(f"run {self._log.run} has no plan; start one with: sharpwatch lr plan")
        return self._log.plan

    def _require_calm(self) -> None:
        """Nothing is raised in an incident, nor on top of what a policy has changed, ramps back or has judged."""
        for incident in self._detection.incidents.open:
            raise OperatorError(f"incident {incident.id} ({incident.title}) is open: a plan goes on once it is closed")
        for scaling in scaling_state(self._log).active:
            raise OperatorError(
                f"{scaling.made.id} of policy {scaling.made.policy} is in force on {', '.join(scaling.factors)}: "
                "a plan goes on once it is ramped back"
            )
        for made in self._log.unsettled():
            if made.outcome == "applied":
                raise OperatorError(f"{made.id} of policy {made.policy} is being judged: a plan goes on once it is")

    def _send_if_due(self, plan: LrPlan, operator: OperatorContext) -> None:
        """Send the next stage, unless a policy's change is in force or a command is to take effect at any moment."""
        if plan.state != "running" or plan.under_way:
            return
        if not rates_are_free(self._log):
            return
        stage = stage_name(plan, plan.stages_done)
        multipliers = {**self._log.multipliers, **stage_set(plan, plan.stages_done)}
        why = _joined(f"plan {plan.name}, {stage}", operator.reason)
        made = self._requests.roll_out(plan, multipliers, plan.ramp_steps, replace(operator, reason=why))
        self._log.put_plan(
            replace(
                plan, detail=f"{stage} was sent as {made.id}", decisions=(*plan.decisions, made.id), under_way=made.id
            )
        )

    def _take_back(self, plan: LrPlan, stages: Sequence[int], operator: OperatorContext, what: str) -> None:
        """Put the multipliers from before some stages in force. What policies have changed since stays, as a factor."""
        back = set_before(plan, stages)
        for scaling in scaling_state(self._log).active:
            back |= {block: value * back[block] for block, value in scaling.factors.items() if block in back}
        multipliers = {**self._log.multipliers, **back}
        if multipliers == self._log.multipliers:
            return
        revisions = [self._log.find(identity).revision for identity in plan.decisions]
        undoes = revisions[-1] if len(stages) == 1 else revisions[0]
        why = _joined(what, operator.reason)
        self._requests.roll_out(plan, multipliers, 0, replace(operator, reason=why), undoes=undoes)

    def _return_again(self, step: int, now: float) -> None:
        """Send the multipliers from before a plan once more where the trainer did not take them, ever more rarely."""
        plan, number = self._log.plan, self._log.number_in_force
        if plan is None or plan.state != "aborted" or not number or any(self._log.under_way()):
            return
        if self._log.revisions[number - 1].decision_id not in plan.decisions:
            return  # it was taken, or somebody has set others since
        tried = [made for made in self._log.decisions if made.plan == plan.id and made.id not in plan.decisions]
        if not tried or not came_to_nothing(tried[-1]) or tried[-1].outcome == "cancelled":
            return
        last = tried[-1]
        if step - last.step < _RETRY * 2 ** (len(tried) - 1):
            return
        undoes = self._log.revisions[last.revision - 1].undoes
        again = OperatorContext(last.author, last.reason, step, now)
        self._requests.roll_out(plan, last.multipliers, 0, again, undoes=undoes)
        self._log.put_plan(replace(plan, detail=f"{plan.detail}; {last.id} {last.outcome}, sent again"))


def _joined(what: str, why: str) -> str:
    return f"{what}: {why}" if why else what
