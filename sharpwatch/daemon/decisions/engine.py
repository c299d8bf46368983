"""Turns findings into decisions: follows the escalation chain, undoes a ramp back that failed, ramps back held cuts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from sharpwatch.daemon.config.config import PolicyConfig
from sharpwatch.daemon.decisions.decision_log import DecisionLog
from sharpwatch.daemon.decisions.guards import (
    OK,
    GuardContext,
    Permissions,
    bounds,
    guard_name,
    judge_rollback,
    judge_scale,
)
from sharpwatch.daemon.decisions.lifecycle import UNDER_WAY
from sharpwatch.daemon.decisions.operator_requests import issue, time_out_kept
from sharpwatch.daemon.decisions.policy import EscalationChain, affected, rollback_plan, scaled
from sharpwatch.daemon.decisions.ramp_back import HeldCuts, held_cuts, hold_steps, quiet_since
from sharpwatch.daemon.detection.alerts import AlertBook
from sharpwatch.daemon.records import Action, Alert, Checkpoint, Decision, Finding, Mode

_ANNOUNCED = ("observed", "proposed", "rejected")  # journalled already; not repeated for the same reason


@dataclass(frozen=True, slots=True)
class _StepContext:
    """This step, and what holds at it."""

    step: int
    now: float
    mode: Mode | None  # the run's own
    checkpoints: Sequence[Checkpoint]

    def mode_of(self, policy: PolicyConfig) -> Mode:
        return self.mode or policy.mode


class PolicyEngine:
    """Makes the decisions of one run's policies."""

    def __init__(
        self,
        log: DecisionLog,
        book: AlertBook,
        chain: EscalationChain,
        permissions: Permissions,
        new_id: Callable[[], str],
    ) -> None:
        self._log = log
        self._book = book
        self._chain = chain
        self._permissions = permissions
        self._new_id = new_id

    def act(
        self, findings: Sequence[Finding], checkpoints: Sequence[Checkpoint], mode: Mode | None, step: int, now: float
    ) -> None:
        """Decide what there is to decide at `step`. While a command is under way its effect is waited for."""
        if not findings and self._book.open:
            return
        at = _StepContext(step, now, mode, checkpoints)
        if findings:
            self._answer(findings, at)
        elif not self._under_way(None):
            self._ramp_back(at)

    def _answer(self, findings: Iterable[Finding], at: _StepContext) -> None:
        alerts = [alert for finding in findings if (alert := self._book.active(finding.name)) is not None]
        if not self._under_way(at.step) and self._undo_ramp_back(alerts, at):
            return
        for alert in alerts:
            for policy in self._chain.answering(alert, self._log.decisions, at.step):
                if policy.action.kind == "notify":
                    self._notify(policy, alert, at)
                elif not self._under_way(at.step):
                    self._act_on(policy, alert, at)

    def _under_way(self, step: int | None) -> bool:
        """Whether a command is to take effect at any moment; with a `step`, those planned for later don't count."""
        return any(
            made.outcome in UNDER_WAY and (step is None or made.apply_at_step <= step) for made in self._log.unsettled()
        )

    def _planned(self) -> str:
        """The verdict on a change ahead of one that an operator has planned: that one would undo it unseen."""
        for made in self._log.unsettled():
            if made.outcome in UNDER_WAY:
                return f"operator: {made.id} is planned for step {made.apply_at_step}"
        return OK

    def _notify(self, policy: PolicyConfig, alert: Alert, at: _StepContext) -> None:
        if not self._decided_before(policy, alert, _ANNOUNCED):
            made = self._draft("notify", policy, at.mode_of(policy), alert, at)
            self._log.add(replace(made, detail=alert.evidence), "observe")

    def _act_on(self, policy: PolicyConfig, alert: Alert, at: _StepContext) -> None:
        mode = at.mode_of(policy)
        if mode != "enforce" and self._decided_before(policy, alert, _ANNOUNCED if mode == "advise" else ("observed",)):
            return
        made = self._draft(policy.action.kind, policy, mode, alert, at)
        context = GuardContext(at.step, at.now, self._log.decisions)
        if policy.action.kind == "rollback":
            plan = rollback_plan(policy, alert, at.checkpoints, at.step)
            made = replace(made, rollback=plan, guard=judge_rollback(policy, plan, self._permissions, context))
        else:
            before = self._log.multipliers
            blocks = affected(policy, alert, self._log.blocks)
            after = scaled(before, blocks, policy.action.factor, bounds(policy, self._permissions))
            verdict = self._planned()
            if verdict == OK:
                verdict = judge_scale(policy, before, after, self._permissions, context)
            ttl = policy.action.ttl_steps if policy.action.factor > 1 else 0  # cuts hold
            made = replace(made, multipliers=after, ramp_steps=policy.action.ramp_steps, ttl_steps=ttl, guard=verdict)
        made = replace(made, detail=_describe(made, alert, self._log.multipliers))
        if self._record(made, policy, at) in UNDER_WAY:
            self._supersede(made)

    def _record(self, made: Decision, policy: PolicyConfig, at: _StepContext, undoes: int = 0) -> str:
        """Record `made` as its mode and guard have it; returns the outcome, empty where there is nothing new."""
        if made.action != "rollback" and not made.ttl_steps:
            made = replace(made, ttl_steps=time_out_kept(self._log, made.multipliers))
        if made.mode == "observe":
            return self._log.add(made, "observe").outcome
        if made.guard != OK:
            return "" if self._refused_before(made) else self._log.add(made, "refuse").outcome
        life = policy.guard.expires_after_steps
        if made.mode == "advise":
            # A proposal's expiry counts from its approval; until then it is the number of steps alone.
            return self._log.add(replace(made, expires_at_step=life), "propose").outcome
        made = replace(made, expires_at_step=at.step + life)
        if made.action == "rollback":
            made = self._log.add(made, "send")
            self._log.send(made)
        else:
            made = issue(self._log, made, author=f"policy {policy.name}", now=at.now, undoes=undoes)
        return made.outcome

    def _decided_before(self, policy: PolicyConfig, alert: Alert, outcomes: tuple[str, ...], action: str = "") -> bool:
        return any(
            made.policy == policy.name
            and made.alert_id == alert.id
            and made.outcome in outcomes
            and made.action == (action or policy.action.kind)
            for made in self._log.decisions
        )

    def _refused_before(self, made: Decision) -> bool:
        return any(
            other.outcome == "refused"
            and (other.policy, other.alert_id, other.action) == (made.policy, made.alert_id, made.action)
            and guard_name(other.guard) == guard_name(made.guard)
            for other in self._log.decisions
        )

    def _supersede(self, made: Decision) -> None:
        """Mark earlier decisions on the same alert as superseded."""
        for other in self._log.unsettled():
            if other.id != made.id and other.outcome == "applied" and other.alert_name == made.alert_name:
                self._log.advance(other, "supersede", detail=f"{other.detail}; not enough: {made.id} followed")

    def _undo_ramp_back(self, alerts: Sequence[Alert], at: _StepContext) -> bool:
        """Reapply a cut if an alert fires within the hold after its ramp-back."""
        state = held_cuts(self._log)
        policy = self._chain.named(state.ramped.policy) if state.ramped is not None else None
        if state.newest is None or state.newest.applied_step is None or policy is None:
            return False
        since = state.newest.applied_step
        if not since <= at.step < since + hold_steps(policy, state.relapses):
            return False
        made = self._draft("set_lr", policy, at.mode_of(policy), alerts[0], at)
        if self._decided_before(policy, alerts[0], (*_ANNOUNCED, "refused", "expired"), "set_lr"):
            return False
        made = replace(
            made,
            multipliers=self._log.set_before(state.newest.revision),
            guard=self._permissions.multipliers(),
            detail=f"{alerts[0].name} came back after revision {state.newest.revision} was ramped back",
        )
        done = self._record(made, policy, at, undoes=state.newest.revision) in UNDER_WAY
        if done:
            self._log.advance(self._log.find(state.newest.decision_id), "fail", detail=f"{alerts[0].name} came back")
        return done

    def _ramp_back(self, at: _StepContext) -> None:
        """Ramp back the newest cut after a quiet hold."""
        state = held_cuts(self._log)
        policy = self._chain.named(state.cuts[-1].policy) if state.cuts else None
        if policy is None or self._permissions.multipliers() != OK:
            return
        since = quiet_since(self._book.all, self._log.decisions, at.step)
        hold = hold_steps(policy, state.relapses)
        if at.step - since < hold or self._ramp_back_pending(since, hold, at.step):
            return
        self._record(self._ramp(policy, state, hold, at), policy, at)

    def _ramp(self, policy: PolicyConfig, state: HeldCuts, hold: int, at: _StepContext) -> Decision:
        cut = state.cuts[-1]
        low, high = self._permissions.lr_bounds
        before = {block: min(max(value, low), high) for block, value in cut.before.items()}
        made = self._draft("ramp_back", policy, at.mode_of(policy), None, at)
        return replace(
            made,
            alert_name=cut.alert_name,
            multipliers={**self._log.multipliers, **before},
            # Half the hold on the way up, half of it there, before it counts as held.
            ramp_steps=max(policy.action.ramp_steps, hold // 2),
            detail=f"quiet for {hold} steps: {', '.join(f'{b} back to {v:.3g}' for b, v in before.items())}",
        )

    def _ramp_back_pending(self, since: int, hold: int, step: int) -> bool:
        for made in reversed(self._log.decisions):
            if made.action == "ramp_back" and since <= made.step <= step:
                return made.outcome in _ANNOUNCED or step - made.step < hold
        return False

    def _draft(
        self, action: Action, policy: PolicyConfig, mode: Mode, alert: Alert | None, at: _StepContext
    ) -> Decision:
        return Decision(
            id=self._new_id(),
            run=self._log.run,
            made_at=at.now,
            step=at.step,
            action=action,
            mode=mode,
            outcome="draft",
            policy=policy.name,
            alert_id=alert.id if alert is not None else "",
            alert_name=alert.name if alert is not None else "",
        )


def _describe(made: Decision, alert: Alert, before: Mapping[str, float]) -> str:
    if made.rollback is not None:
        plan = made.rollback
        return (
            f"{alert.name} since step {alert.first_step}: back to the checkpoint of step {plan.checkpoint.step}, "
            f"round the data of steps {plan.skip_from_step} to {plan.skip_to_step - 1}"
        )
    changed = (f"{b} {before[b]:.3g} to {v:.3g}" for b, v in made.multipliers.items() if v != before.get(b))
    return f"{alert.name} since step {alert.first_step}: {', '.join(changed) or 'nothing to change'}"
