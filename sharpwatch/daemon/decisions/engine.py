"""Turns alerts into decisions: asks policies, guards and the ramp-back what to do, and records and sends it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from sharpwatch.daemon.config.settings import MaintenanceConfig, PolicyConfig
from sharpwatch.daemon.decisions.decision_log import DecisionLog
from sharpwatch.daemon.decisions.effect import against_raise
from sharpwatch.daemon.decisions.gate import AskGate
from sharpwatch.daemon.decisions.guards import (
    HOUR,
    NO_REMEDY,
    OK,
    GuardContext,
    Permissions,
    bounds,
    guard_name,
    judge_rate_cut,
    judge_rollback,
    judge_scale,
)
from sharpwatch.daemon.decisions.muting import ActiveSilences, blocked, muted, was_muted
from sharpwatch.daemon.decisions.operator_requests import issue, time_out_kept
from sharpwatch.daemon.decisions.policy import (
    ANNOUNCED,
    EscalationChain,
    affected,
    bursts,
    changed_blocks,
    in_maintenance,
    is_trouble,
    rollback_plan,
    scaled,
)
from sharpwatch.daemon.decisions.ramp_back import ActiveScaling, failed_ramp_back, ramp_back_due, scaling_state
from sharpwatch.daemon.decisions.remedy import (
    WHY_BACK,
    Correction,
    Cut,
    correction,
    holds_down,
    is_of_first_steps,
    measured_cut,
)
from sharpwatch.daemon.decisions.transitions import UNDER_WAY, came_to_nothing, took_effect
from sharpwatch.daemon.detection.run_detection import RunDetection
from sharpwatch.daemon.records import Action, Checkpoint, Decision, Finding, Incident, Mode, Outcome

_FOLLOW_EVERY = 10  # steps between two corrections of a cut that goes with a rate, unless that is far too high
# Outcomes after which a policy does not decide the same on an incident once more.
_NOT_AGAIN: Mapping[Mode, tuple[Outcome, ...]] = {
    "observe": ("observed",),
    "advise": ANNOUNCED,
    "enforce": ("cancelled",),
}


@dataclass(frozen=True, slots=True)
class _StepContext:
    """This step, and what holds at it."""

    step: int
    now: float
    mode: Mode | None  # the run's own
    checkpoints: Sequence[Checkpoint]
    maintenance: Sequence[MaintenanceConfig]

    def mode_of(self, policy: PolicyConfig) -> Mode:
        return _mode_of(policy, self.mode, self.maintenance, self.now)


def _mode_of(policy: PolicyConfig, of_run: Mode | None, maintenance: Sequence[MaintenanceConfig], now: float) -> Mode:
    return in_maintenance("observe" if policy.dry_run else of_run or policy.mode, maintenance, now)


class PolicyEngine:
    """Makes the decisions of one run's policies."""

    def __init__(  # noqa: PLR0913, PLR0917  what a run's policies know, and what limits them
        self,
        log: DecisionLog,
        detection: RunDetection,
        chain: EscalationChain,
        permissions: Permissions,
        new_id: Callable[[], str],
        silences: ActiveSilences,
        maintenance: Sequence[MaintenanceConfig],
        gate: AskGate,
    ) -> None:
        self._log = log
        self._detection = detection
        self._incidents = detection.incidents
        self._chain = chain
        self._permissions = permissions
        self._new_id = new_id
        self._silences = silences
        self._maintenance = maintenance
        self._gate = gate

    def configure(self, chain: EscalationChain, maintenance: Sequence[MaintenanceConfig]) -> None:
        """Goes by other rules from now on."""
        self._chain, self._maintenance = chain, maintenance

    def act(
        self, findings: Sequence[Finding], checkpoints: Sequence[Checkpoint], mode: Mode | None, step: int, now: float
    ) -> None:
        """Decide what there is to decide at `step`. While a command is under way its effect is waited for.

        A silent failure is about another run, and may last: policies answer it, and it is no trouble that a ramp-back
        has to wait for. Nor is an alert of another system that no policy acts on.
        """
        at = _StepContext(step, now, mode, checkpoints, self._maintenance)
        own = [finding for finding in findings if finding.name != "SilentFailure"]
        to_answer = findings if len(own) == len(findings) or self._is_unanswered("SilentFailure") else own
        # What its first steps have done to a run is found in them alone, and is not over with them.
        lasting = [*self._incidents.foreign.values(), *filter(is_of_first_steps, self._incidents.open)]
        if to_answer or lasting:
            self._answer(to_answer, lasting, at)
        if not self._log.newest_revision:
            return
        self._follow_rates(at)
        state = scaling_state(self._log)
        if (
            not (state.active or state.ramped_back)
            or any(self._log.under_way())
            or any(self._is_trouble(one, at) for one in self._incidents.open)
        ):
            return
        against = self._against_stage()
        if not (against and self._undo_ramp_back(against, None, at)):
            self._ramp_back(at)

    def expire_overtaken(self, mode: Mode | None, now: float) -> None:
        """Expire the proposals of policies that act by themselves by now, as after maintenance: they decide anew.

        Args:
            mode: The run's own.
            now: Unix seconds.
        """
        for made in self._log.unsettled():
            policy = self._chain.named(made.policy) if made.outcome == "proposed" else None
            if policy is not None and _mode_of(policy, mode, self._maintenance, now) == "enforce":
                detail = "; ".join(filter(None, (made.detail, "its policy acts by itself by now")))
                self._log.advance(made, "expire", detail=detail)

    def _is_unanswered(self, name: str) -> bool:
        """Whether a policy that matches the open incident of an alert has decided nothing on it so far."""
        incident = self._incidents.active(name)
        if incident is None:
            return False
        decided = (made for made in self._log.decisions if made.alert_id == incident.id)
        answered = {made.policy for made in decided if not was_muted(made)}
        return any(policy.match.answers(incident) and policy.name not in answered for policy in self._chain.policies)

    def _answer(self, findings: Iterable[Finding], lasting: Iterable[Incident], at: _StepContext) -> None:
        found = (self._incidents.active(finding.name) for finding in findings)
        incidents = [*{one.id: one for one in (*found, *lasting) if one is not None}.values()]
        trouble = next((one for one in incidents if self._is_trouble(one, at)), None)
        may_undo = not self._log.is_due(at.step)
        if trouble is not None and may_undo and self._undo_ramp_back(f"{trouble.title} came back", trouble, at):
            return
        for incident in incidents:
            for policy in self._chain.answering(
                incident, self._incidents.all, self._log.decisions, at.step, at.mode_of
            ):
                if policy.action.kind == "notify":
                    self._notify(policy, incident, at)
                elif not self._log.is_due(at.step):
                    self._act_on(policy, incident, at)

    def _is_trouble(self, incident: Incident, at: _StepContext) -> bool:
        """Whether an incident is one of the run itself: not how it compares with a reference, nor what is held down.

        An alert of another system is one where a policy does something about it, or would with an approval.
        """
        if incident.foreign is not None:
            return any(at.mode_of(policy) != "observe" for policy in self._chain.acting(incident))
        return is_trouble(incident)

    def _planned(self) -> str:
        """The verdict on a change ahead of one that an operator has planned: that one would undo it unseen."""
        made = next(self._log.under_way(), None)
        return OK if made is None else f"operator: {made.id} is planned for step {made.apply_at_step}"

    def _in_force(self, policy: PolicyConfig, incident: Incident, blocks: Collection[str], step: int) -> str:
        """The verdict on a cut of `blocks` that are cut already: cuts must not add up without fresh evidence.

        That is an incident that lasts in spite of the cut. One that begins meanwhile only shows that it is too early to
        ramp back.
        """
        needed = policy.guard.recover_within_steps
        for scaling in scaling_state(self._log).active if policy.action.cuts else ():
            made = scaling.made
            began = max(incident.onset, made.step if made.applied_step is None else made.applied_step)
            if made.policy == policy.name and step - began < needed and scaling.factors.keys() >= set(blocks):
                return f"recover_within_steps: {made.id} has cut; once more if {incident.title} lasts {needed} steps"
        return OK

    def _notify(self, policy: PolicyConfig, incident: Incident, at: _StepContext) -> None:
        if not self._decided_before(policy, incident, ANNOUNCED):
            made = self._draft("notify", policy, at.mode_of(policy), incident, at)
            self._log.add(replace(made, detail="; ".join(incident.evidence)), "observe")

    def _act_on(self, policy: PolicyConfig, incident: Incident, at: _StepContext) -> None:
        mode = at.mode_of(policy)
        if self._decided_before(policy, incident, _NOT_AGAIN[mode]):
            return
        if incident.foreign is not None and self._acted_before(policy, incident):
            return
        made = self._draft(policy.action.kind, policy, mode, incident, at)
        own = bursts(incident, self._incidents.all, policy.guard.hold_steps)
        unseen = {each for each in own if (one := self._incidents.get(each)) is not None and not one.acknowledged}
        context = GuardContext(at.step, at.now, self._log.decisions, incident.id, unseen, mode)
        if policy.action.kind == "rollback":
            plan = rollback_plan(policy, incident, at.checkpoints, at.step)
            made = replace(made, rollback=plan, guard=judge_rollback(policy, plan, self._permissions, context))
            why = WHY_BACK.get(incident.cause, "")
        else:
            cut = self._cut(policy, incident)
            if cut is None:
                return
            before = self._log.multipliers
            after = scaled(before, cut.factors, bounds(policy, self._permissions))
            verdict = self._planned() if cut.factors else f"{NO_REMEDY}: {cut.why}"
            if verdict == OK:
                judge = judge_rate_cut if cut.makes_up_for else judge_scale
                verdict = judge(policy, before, after, self._permissions, context)
            if verdict == OK and not cut.makes_up_for:
                verdict = self._in_force(policy, incident, cut.factors, at.step)
            ttl = 0 if policy.action.cuts else policy.action.ttl_steps  # cuts hold
            made = replace(made, multipliers=after, ramp_steps=policy.action.ramp_steps, ttl_steps=ttl, guard=verdict)
            made = replace(made, makes_up_for={block: before[block] / after[block] for block in cut.makes_up_for})
            why = cut.why
        made = replace(made, detail=_describe(made, incident, self._log.multipliers, why))
        done = self._record(made, policy, at)
        if done is not None and done.outcome in UNDER_WAY:
            self._supersede(done)

    def _cut(self, policy: PolicyConfig, incident: Incident) -> Cut | None:
        """How far `policy` changes which blocks; None where nothing is left for it to do."""
        blocks = affected(policy, incident, self._log.blocks)
        if policy.action.factor != "auto":
            return Cut(dict.fromkeys(blocks, policy.action.factor), "")
        state = scaling_state(self._log)
        # A cut goes with the rates already, or an operator has chosen since.
        taken = {block for scaling in state.following for block in scaling.factors}
        taken |= {block for block, step in state.by_hand.items() if step >= incident.onset}
        return measured_cut(incident, self._detection, [block for block in blocks if block not in taken])

    def _follow_rates(self, at: _StepContext) -> None:
        """Have cuts that make up for rates go with them: further as they climb, and back as they come down.

        What a rate should be is known from what the trainer reports. So this is no raise that might harm.
        """
        following = scaling_state(self._log).following
        excess = self._detection.rate_excess if following else {}
        held = any(holds_down(one, excess) for one in following)
        for open_now in self._incidents.open:
            # One that begins under an earlier cut, as at steps that come again, does no harm.
            is_new = open_now.name == "RateRaise" and open_now.first_step == at.step
            begins = is_new and held and all(one.made.alert_id != open_now.id for one in following)
            if begins or (open_now.contained_step and not following):  # else somebody has taken the cut back
                self._log.note_incidents([self._incidents.contain(open_now.id, at.step if begins else 0)])
        for scaling in following:
            policy = self._chain.owner(scaling.made)
            incident = self._incidents.get(scaling.made.alert_id)
            low = bounds(policy, self._permissions)[0]
            change = correction(scaling, self._log.multipliers, excess, low)
            # A cut that was approved goes with the rate without being asked for each time.
            may_act = at.mode_of(policy) != "observe" and not any(self._log.under_way())
            if change is None or incident is None or not may_act or self._followed_lately(scaling, change, policy, at):
                continue
            if at.step < incident.onset and not change.is_urgent:
                continue  # at steps that come again the fault is still to come
            made = self._draft("set_lr", policy, "enforce", incident, at)
            most = max(excess[block] for block in change.multipliers)
            now = f"×{most:.3g} of what it would have" if most > 1 else "what it would have again"
            made = replace(
                made,
                multipliers={**self._log.multipliers, **change.multipliers},
                guard=self._permissions.multipliers(),
                detail=f"its schedule has {now}: {changed_blocks(change.multipliers, self._log.multipliers)}",
                makes_up_for=change.makes_up_for,
            )
            self._record(made, policy, at)

    def _followed_lately(
        self, scaling: ActiveScaling, change: Correction, policy: PolicyConfig, at: _StepContext
    ) -> bool:
        """Whether a cut waits: it went with its rate lately and that is not far off, or it did in vain too often."""
        identity = scaling.made.alert_id
        made = [one for one in self._log.decisions if one.makes_up_for and one.alert_id == identity]
        in_vain = [one for one in made if came_to_nothing(one) and at.now - one.made_at < HOUR]
        if len(in_vain) >= policy.guard.max_actions_per_hour:
            return True
        newest = made[-1]
        is_lately = 0 <= at.step - newest.step < _FOLLOW_EVERY
        return is_lately and not (change.is_urgent and took_effect(newest))

    def _record(self, made: Decision, policy: PolicyConfig, at: _StepContext, undoes: int = 0) -> Decision | None:
        """Record `made` as its mode, its guard and the gate have it; returns it, None where there is nothing new."""
        made = self._muted(made, policy, at)
        if made.action != "rollback" and not made.ttl_steps:
            made = replace(made, ttl_steps=time_out_kept(self._log, made.multipliers))
        if made.mode == "observe":
            return self._log.add(made, "observe")
        life = policy.guard.expires_after_steps
        if made.guard == OK and made.mode == "enforce" and self._raises(made):
            judged = self._gate(made, life)
            if judged is None:
                return None
            made = judged
        if made.guard != OK:
            return None if self._refused_before(made) else self._log.add(made, "refuse")
        if made.mode == "advise":
            # A proposal's expiry counts from its approval; until then it is the number of steps alone.
            return self._log.add(replace(made, expires_at_step=life), "propose")
        made = replace(made, expires_at_step=at.step + life)
        if made.action == "rollback":
            made = self._log.add(made, "send")
            self._log.send(made)
        else:
            made = issue(self._log, made, author=f"policy {policy.name}", now=at.now, undoes=undoes)
        return made

    def _raises(self, made: Decision) -> bool:
        """Whether rates become higher by it; one that goes with the trainer's own rate leaves them as they are."""
        before = self._log.multipliers
        return not made.makes_up_for and any(value > before[block] for block, value in made.multipliers.items())

    def _muted(self, made: Decision, policy: PolicyConfig, at: _StepContext) -> Decision:
        """Have a decision refused where its policy is muted, whatever the guards say."""
        incident = self._incidents.get(made.alert_id)
        before = self._log.multipliers
        if made.makes_up_for and all(value >= before[each] for each, value in made.multipliers.items()):
            return made  # it gives back what the trainer's own rate has come down by
        verdict = blocked(policy.guard.blocked_by, self._incidents.foreign.values())
        if verdict == OK and incident is not None and made.action != "ramp_back":
            verdict = muted(made.policy, incident, self._silences(at.now), self._incidents.open)
        return made if verdict == OK else replace(made, guard=verdict)

    def _decided_before(
        self, policy: PolicyConfig, incident: Incident, outcomes: tuple[str, ...], action: str = ""
    ) -> bool:
        return any(
            made.policy == policy.name
            and made.alert_id == incident.id
            and made.outcome in outcomes
            and made.action == (action or policy.action.kind)
            for made in self._log.decisions
        )

    def _acted_before(self, policy: PolicyConfig, incident: Incident) -> bool:
        """Whether a policy has acted on an alert of another system, or on one of that name while this one fires.

        That it still fires is no new evidence, nor that it also fires elsewhere, as on each node of a run.
        """
        others = (each for each in self._incidents.all if each.is_same_trouble(incident))
        same = {each.id for each in others if each.active or each.last_step > incident.onset}
        answers = (made for made in self._log.decisions if made.alert_id in same)
        return any(made.policy == policy.name and took_effect(made) for made in answers)

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
            # By the id as well: an incident can have got another name meanwhile.
            same = other.alert_id == made.alert_id or other.alert_name == made.alert_name
            if other.id != made.id and other.outcome == "applied" and same:
                self._log.advance(other, "supersede", detail=f"{other.detail}; not enough: {made.id} followed")

    def _against_stage(self) -> str:
        """What speaks against the newest stage of a cut's ramp-back, though nothing is found; empty for nothing."""
        state = scaling_state(self._log)
        applied = None if state.newest is None else state.newest.applied_step
        if state.ramped_back is None or applied is None or not self._chain.owner(state.ramped_back.made).action.cuts:
            return ""
        return against_raise(self._detection, applied)

    def _undo_ramp_back(self, why: str, incident: Incident | None, at: _StepContext) -> bool:
        """Reapply a change if trouble comes within the hold after a stage of its ramp-back; `why` says which."""
        critical = incident is not None and incident.severity == "critical"
        failed = failed_ramp_back(self._log, self._chain, why, at.step, critical=critical)
        if failed is None:
            return False
        policy, stage = failed.policy, self._log.find(failed.revision.decision_id)
        tried = (made for made in self._log.decisions if made.action == "set_lr" and made.policy == policy.name)
        ended = (*ANNOUNCED, "refused", "expired")
        if any(made.made_at >= stage.made_at and made.outcome in ended and not was_muted(made) for made in tried):
            return False
        made = self._draft("set_lr", policy, at.mode_of(policy), incident, at)
        made = replace(
            made,
            alert_id=made.alert_id or failed.scaling.made.alert_id,
            alert_name=made.alert_name or failed.scaling.made.alert_name,
            multipliers=failed.multipliers,
            guard=self._permissions.multipliers(),
            detail=failed.detail,
        )
        done = self._record(made, policy, at, undoes=failed.revision.revision)
        if done is None or done.outcome not in UNDER_WAY:
            return False
        self._log.advance(stage, "worsen", detail=why)
        return True

    def _ramp_back(self, at: _StepContext) -> None:
        trouble = (one for one in self._incidents.all if self._is_trouble(one, at))
        due = ramp_back_due(self._log, trouble, self._chain, self._permissions, at.step)
        if due is None:
            return
        made = self._draft("ramp_back", due.policy, at.mode_of(due.policy), None, at)
        made = replace(
            made,
            alert_id=due.scaling.made.alert_id,
            alert_name=due.scaling.made.alert_name,
            multipliers=due.multipliers,
            ramp_steps=due.ramp_steps,
            detail=due.detail,
        )
        self._record(made, due.policy, at)

    def _draft(
        self, action: Action, policy: PolicyConfig, mode: Mode, incident: Incident | None, at: _StepContext
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
            alert_id=incident.id if incident is not None else "",
            alert_name=incident.title if incident is not None else "",
        )


def _describe(made: Decision, incident: Incident, before: Mapping[str, float], why: str) -> str:
    since = f"{incident.title} since step {incident.onset}: "
    because = f": {why}" if why else ""
    if made.rollback is not None:
        plan = made.rollback
        return (
            f"{since}back to the checkpoint of step {plan.checkpoint.step}, "
            f"round the data of steps {plan.skip_from_step} to {plan.skip_to_step - 1}{because}"
        )
    return f"{since}{changed_blocks(made.multipliers, before) or 'nothing to change'}{because}"
