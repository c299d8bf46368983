"""What an operator asks of a run, checked and made into decisions."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from sharpwatch.daemon.decisions.decision_log import DecisionLog
from sharpwatch.daemon.decisions.guards import OK, Permissions
from sharpwatch.daemon.decisions.policy import newest
from sharpwatch.daemon.decisions.ramp_back import scaling_state
from sharpwatch.daemon.decisions.transitions import Event, can
from sharpwatch.daemon.records import Action, Checkpoint, Decision, LrPlan, Observation, Revision, RollbackPlan
from sharpwatch.errors import OperatorError
from sharpwatch.wire import MAX_INTERVAL

SENT_BEFORE = 50  # steps that a planned set is sent ahead, so that a fast trainer has it in time
EXPIRES_AFTER_STEPS = 1000  # an operator's command that a trainer could not take for so long is not wanted any more


@dataclass(frozen=True, slots=True)
class OperatorContext:
    """Who asks and why, at which step of the run (None: not known yet) and when, in unix seconds."""

    author: str
    reason: str
    step: int | None
    now: float


class OperatorRequests:
    """Writes an operator's decisions into the decision log; raises `OperatorError` if a request is invalid."""

    def __init__(self, log: DecisionLog, permissions: Permissions, new_id: Callable[[], str]) -> None:
        self._log = log
        self._permissions = permissions
        self._new_id = new_id

    def set(
        self,
        wanted: Mapping[str, float],
        ramp_steps: int,
        apply_at_step: int,
        operator: OperatorContext,
        update_every: Mapping[str, int] | None = None,
    ) -> Decision:
        """Put `wanted` and `update_every` in force; blocks that are not named keep what they have, or have by then."""
        self.require_multipliers()
        if wanted or not update_every:
            self.check_set(wanted)
        self._check_intervals(update_every or {})
        if ramp_steps < 0:
            raise OperatorError(f"ramp_steps must be 0 or more, got {ramp_steps}")
        self._check_conflict(operator, (*wanted, *(update_every or {})))
        step = operator.step or 0
        if apply_at_step and not step < apply_at_step <= step + EXPIRES_AFTER_STEPS:
            allowed = f"0 for the next step, or {step + 1} to {step + EXPIRES_AFTER_STEPS}"
            raise OperatorError(f"apply_at_step {apply_at_step}: the run stands at step {step}; allowed: {allowed}")
        made = replace(
            self._draft("set_lr", operator, apply_at_step),
            multipliers=wanted,
            ramp_steps=ramp_steps,
            update_every=update_every or {},
        )
        return self._log.add(made, "plan") if apply_at_step else self._complete(made, operator.now)

    def send_planned(self, step: int, now: float) -> list[Decision]:
        """Send the sets whose step has come near, with what the blocks that they do not name have by now.

        Returns:
            Those that set multipliers.
        """
        near = (made for made in self._log.unsettled() if made.outcome == "planned")
        due = [made for made in near if made.apply_at_step <= step + SENT_BEFORE]
        verdict = self._permissions.multipliers()
        if verdict != OK:
            for made in due:
                self._log.advance(made, "refuse", guard=verdict)
            return []
        return [sent for made in due if (sent := self._complete(made, now)) and made.multipliers]

    def _complete(self, made: Decision, now: float) -> Decision:
        """Send an operator's set with the multipliers and update intervals of the blocks that it does not name."""
        log, wanted = self._log, made.multipliers
        every = {block: steps for block, steps in {**log.intervals, **(made.update_every or {})}.items() if steps > 1}
        multipliers = self._within({**log.multipliers, **wanted})
        made = replace(
            made,
            multipliers=multipliers,
            update_every=every,
            # Update intervals alone end no ramp.
            ramp_steps=made.ramp_steps if wanted else self._ramp_left(made.apply_at_step or made.step),
            ttl_steps=time_out_kept(log, multipliers, wanted),
        )
        return self._revise(made, at=now)

    def _ramp_left(self, step: int) -> int:
        """The steps that the newest set has yet to go until all multipliers are what it says."""
        newest = self._log.number_in_force
        applied = self._log.revisions[newest - 1].applied_step if newest else None
        return 0 if applied is None else max(0, applied + self.newest_ramp() - step)

    def undo(self, number: int, operator: OperatorContext) -> Decision:
        """Put the set before revision `number` in force again; 0 is the newest that changed something."""
        self.require_multipliers()
        self._check_conflict(operator, self._log.blocks)
        log = self._log
        done = {revision.revision: revision for revision in log.effective()}
        if not number:
            changing = (n for n, one in done.items() if _set_of(log, one) != _set_before(log, n))
            number = max(changing, default=0)
            newest = done.get(number)
            if newest is not None and newest.undoes and log.find(newest.decision_id).mode == "operator":
                raise OperatorError(
                    f"{newest.author} has taken revision {newest.undoes} back already, with revision {number}; to put "
                    "it in force again, name that one"
                )
        if number not in done:
            known = ", ".join(map(str, done)) or "none yet"
            raise OperatorError(f"no revision {number or ''} of run {log.run} took effect; known: {known}")
        target, every = _set_before(log, number)
        if (target, every) == (log.multipliers, log.intervals):
            raise OperatorError(f"the set before revision {number} is in force already")
        self._stop_planned(operator)
        made = self._draft("set_lr", replace(operator, reason=operator.reason or f"undo of revision {number}"))
        return self._revise(replace(made, multipliers=self._within(target), update_every=every), undoes=number)

    def roll_out(
        self,
        plan: LrPlan,
        multipliers: Mapping[str, float],
        ramp_steps: int,
        operator: OperatorContext,
        undoes: int = 0,
    ) -> Decision:
        """Put the set in force that a stage of a plan leads to, or with `undoes` one from before it."""
        if undoes:
            self._stop_planned(operator)
        made = replace(self._draft("set_lr", operator), plan=plan.id, ramp_steps=ramp_steps)
        made = replace(made, multipliers=self._within(multipliers))
        return self._revise(made, undoes=undoes, base=self._log.number_in_force)

    def put_back(self, seen: Observation, now: float, *, may_raise: bool = True) -> Decision | None:
        """Put the set in force again where the trainer has another one, as after a resume; None where it has not.

        Args:
            seen: What it has.
            now: Unix seconds.
            may_raise: Whether raises are part of it. Else what has come down to 1, or further, stays at most there, and
                a multiplier between the smallest and its own is taken for one of shared parameters.
        """
        log = self._log
        multipliers = self._within(log.multipliers)
        if not may_raise:
            ended = {block: max(1.0, value) for block, value in seen.multipliers.items()}
            multipliers = {block: min(value, ended.get(block, value)) for block, value in multipliers.items()}
            least = min(multipliers.values())
            if all(0.9999 * least <= each <= 1.0001 * multipliers[b] for b, each in seen.multipliers.items()):
                return None
        if not log.newest_revision or self._permissions.multipliers() != OK:
            return None
        if has_set(seen, multipliers, log.intervals if self._permissions.takes_intervals else None):
            return None
        others = {b: now for b, now in seen.multipliers.items() if not math.isclose(now, multipliers[b], rel_tol=1e-5)}
        began = ", ".join(f"{block} {value:.3g}" for block, value in others.items()) or "other update intervals"
        reason = f"the trainer resumed with {began}: what was in force is put back"
        made = self._draft("set_lr", OperatorContext("sharpwatch", reason, seen.step, now))
        # A raise comes as slowly as it came before; what is cut is cut at once.
        ramp_steps = 0 if any(multipliers[block] < value for block, value in others.items()) else self.newest_ramp()
        ttl_steps = time_out_kept(log, multipliers)
        return self._revise(replace(made, multipliers=multipliers, ramp_steps=ramp_steps, ttl_steps=ttl_steps))

    def newest_ramp(self) -> int:
        """The steps over which the newest set comes in force; 0 where there is none."""
        newest = self._log.number_in_force
        return self._log.find(self._log.revisions[newest - 1].decision_id).ramp_steps if newest else 0

    def rollback(
        self, checkpoints: Iterable[Checkpoint], to_step: int | None, skip: tuple[int, int], operator: OperatorContext
    ) -> Decision:
        """Go back to the newest checkpoint at or before `to_step`, round the batches of steps [skip[0], skip[1])."""
        _permitted(self._permissions.rollback())
        if skip[0] < 0 or skip[1] < skip[0]:
            raise OperatorError(f"skip {skip[0]} to {skip[1]}: the range ends before it begins")
        limit = min((at for at in (to_step, operator.step) if at is not None), default=None)
        saved = tuple(checkpoints)
        target = newest(saved, limit)
        if target is None:
            have = ", ".join(str(one.step) for one in saved[-8:]) or "none"
            before = "" if limit is None else f" at or before step {limit}"
            raise OperatorError(f"no checkpoint to go back to{before}; there are those of steps: {have}")
        plan = RollbackPlan(target, *skip)
        self._check_rollback(plan, operator.step)
        made = self._log.add(replace(self._draft("rollback", operator), rollback=plan), "send")
        self._log.send(made)
        return made

    def approve(self, identity: str, operator: OperatorContext) -> Decision:
        """Have a proposal sent."""
        made = self._proposal(identity, "approve", "approved")
        is_rollback = made.action == "rollback"
        _permitted(self._permissions.rollback() if is_rollback else self._permissions.multipliers())
        if made.rollback is not None:
            self._check_rollback(made.rollback, operator.step)
        life = made.expires_at_step  # of a proposal: how many steps its command may live
        approved = self._log.advance(
            made,
            "approve",
            author=operator.author,
            reason=operator.reason,
            expires_at_step=operator.step + life if operator.step is not None else 0,
        )
        if is_rollback:
            self._log.send(approved)
            return approved
        return self._revise(approved, undoes=self._undone_ramp_back(approved), at=operator.now)

    def reject(self, identity: str, operator: OperatorContext) -> Decision:
        """Put a proposal away."""
        made = self._proposal(identity, "reject", "rejected")
        return self._log.advance(made, "reject", author=operator.author, reason=operator.reason)

    def cancel(self, identity: str, operator: OperatorContext) -> Decision:
        """Take back what is not applied yet: a proposal at once, a command once the trainer has let go of it."""
        made = self._log.find(identity)
        if not can(made.outcome, "cancel"):
            at = f" at step {made.applied_step}" if made.applied_step is not None else ""
            by = f" by {made.author}" if made.outcome in ("rejected", "cancelled") else ""
            hint = f": take revision {made.revision} back with lr undo" if made.revision and at else ""
            raise OperatorError(
                f"decision {identity} is {made.outcome}{at}{by}: only what is proposed, approved, planned or sent "
                f"can be cancelled{hint}"
            )
        if made.cancelled_by:
            raise OperatorError(f"{made.cancelled_by} has asked to cancel decision {identity} already")
        if made.outcome in ("proposed", "planned"):
            return self._log.advance(made, "cancel", author=operator.author, reason=operator.reason)
        why = f": {operator.reason}" if operator.reason else ""
        asked = f"{operator.author} asks to cancel it{why}"
        made = self._log.note(
            made,
            detail=f"{made.detail}; {asked}" if made.detail else asked,
            cancelled_by=operator.author,
            cancel_reason=operator.reason,
        )
        self._log.send(made)
        return made

    def _stop_planned(self, operator: OperatorContext) -> None:
        """Cancel the sets that are planned for later steps: they would put in force again what is taken back now."""
        for made in self._log.under_way():
            if made.revision and made.apply_at_step > (operator.step or 0) and not made.cancelled_by:
                self.cancel(made.id, replace(operator, reason="it was made from a set that is taken back"))

    def _check_rollback(self, plan: RollbackPlan, step: int | None) -> None:
        """A proposal may have been made before the run went back by another."""
        if any(made.action == "rollback" for made in self._log.under_way()):
            raise OperatorError("another rollback is under way")
        if step is not None and plan.checkpoint.step > step:
            raise OperatorError(f"the checkpoint of step {plan.checkpoint.step} lies ahead: the run stands at {step}")

    def _undone_ramp_back(self, made: Decision) -> int:
        """A policy's `set_lr` takes back the ramp back that is the newest revision, or goes with a rate."""
        takes_back = made.action == "set_lr" and made.policy and not made.makes_up_for
        return self._log.effective()[-1].revision if takes_back else 0

    def _proposal(self, identity: str, event: Event, participle: str) -> Decision:
        made = self._log.find(identity)
        if not can(made.outcome, event):
            raise OperatorError(f"decision {identity} is {made.outcome}: only a proposal can be {participle}")
        return made

    def require_multipliers(self) -> None:
        """Raise `OperatorError` where the run takes no multipliers."""
        _permitted(self._permissions.multipliers())

    def check_set(self, wanted: Mapping[str, float]) -> None:
        """Raise `OperatorError` where a set names a block that the run lacks, or a multiplier that it does not take."""
        low, high = self._permissions.lr_bounds
        blocks = self._log.blocks
        if not wanted:
            raise OperatorError(f"no block is named; allowed: {', '.join(blocks)}")
        for block, value in wanted.items():
            if block not in blocks:
                raise OperatorError(f"run {self._log.run} has no block {block!r}; allowed: {', '.join(blocks)}")
            if not math.isfinite(value) or not low <= value <= high:
                raise OperatorError(f"{block}={value:g} is outside the run's lr_bounds; allowed: {low:g} to {high:g}")

    def _check_conflict(self, operator: OperatorContext, blocks: Collection[str]) -> None:
        """Raise `OperatorError` where somebody else's set of one of the blocks is on its way: one would be lost."""
        for made in self._log.under_way():
            if not made.revision or made.mode != "operator" or made.author in ("sharpwatch", operator.author):
                continue
            before, intervals = _set_before(self._log, made.revision)
            every = made.update_every or {}
            changed = [
                b for b in blocks if made.multipliers.get(b) != before.get(b) or every.get(b) != intervals.get(b)
            ]
            if changed:
                raise OperatorError(
                    f"{made.author} has just set {', '.join(changed)}, with revision {made.revision}, which the "
                    "trainer has not applied yet: look at it, then ask again"
                )

    def _check_intervals(self, wanted: Mapping[str, int]) -> None:
        blocks = self._log.blocks
        if wanted and not self._permissions.takes_intervals:
            raise OperatorError(
                f"the trainer of run {self._log.run} takes no update intervals: it has an older sharpwatch, or an "
                "optimizer such as LBFGS, which steps all parameters as one"
            )
        for block, steps in wanted.items():
            if block not in blocks:
                raise OperatorError(f"run {self._log.run} has no block {block!r}; allowed: {', '.join(blocks)}")
            if not 1 <= steps <= MAX_INTERVAL:
                raise OperatorError(f"{block} every {steps} steps; allowed: 1 to {MAX_INTERVAL}")

    def _draft(self, action: Action, operator: OperatorContext, apply_at_step: int = 0) -> Decision:
        if not operator.author.strip():
            raise OperatorError("a change needs an author")
        expires = max(apply_at_step, operator.step) + EXPIRES_AFTER_STEPS if operator.step is not None else 0
        return Decision(
            id=self._new_id(),
            run=self._log.run,
            made_at=operator.now,
            step=operator.step or 0,
            action=action,
            mode="operator",
            outcome="draft",
            apply_at_step=apply_at_step,
            expires_at_step=expires,
            author=operator.author,
            reason=operator.reason,
        )

    def _revise(self, made: Decision, *, undoes: int = 0, at: float | None = None, base: int | None = None) -> Decision:
        now = made.made_at if at is None else at
        return issue(self._log, made, author=made.author, now=now, undoes=undoes, base=base)

    def _within(self, multipliers: Mapping[str, float]) -> dict[str, float]:
        """An earlier attempt may have had wider bounds."""
        low, high = self._permissions.lr_bounds
        return {block: min(max(value, low), high) for block, value in multipliers.items()}


def _set_of(log: DecisionLog, revision: Revision) -> tuple[Mapping[str, float], Mapping[str, int]]:
    return log.complete(revision.multipliers), revision.update_every


def _set_before(log: DecisionLog, number: int) -> tuple[Mapping[str, float], Mapping[str, int]]:
    return log.set_before(number), log.intervals_before(number)


def has_set(seen: Observation, multipliers: Mapping[str, float], every: Mapping[str, int] | None) -> bool:
    """Whether the trainer has a set of multipliers and, unless `every` is None, of update intervals."""
    both = ((seen.multipliers[block], value) for block, value in multipliers.items() if block in seen.multipliers)
    same = every is None or {block: steps for block, steps in seen.update_every.items() if steps > 1} == dict(every)
    return bool(seen.multipliers) and same and all(math.isclose(one, value, rel_tol=1e-5) for one, value in both)


def issue(  # noqa: PLR0913  whose set it is, and what it was made from
    log: DecisionLog, made: Decision, *, author: str, now: float, undoes: int = 0, base: int | None = None
) -> Decision:
    """Number the set of `made` and have it sent; proposals that started from the set before it are void.

    One that `undoes` a revision is made from the set before that, unless `base` says otherwise.
    """
    for other in log.unsettled():
        if other.outcome == "proposed" and other.action != "rollback" and other.id != made.id:
            log.advance(other, "supersede", detail=f"{other.detail}; another set came in force first")
    if can(made.outcome, "send"):  # an approved proposal is on its way already
        made = log.add(made, "send")
    base = log.number_before(undoes) if undoes and base is None else base
    made = log.revise(made, author=author, reason=made.reason or made.detail, now=now, undoes=undoes, base=base)
    log.send(made)
    return made


def time_out_kept(log: DecisionLog, multipliers: Mapping[str, float], by_hand: Iterable[str] = ()) -> int:
    """The TTL of the set in force where `multipliers` keep raises of it: a raise that ends must not become lasting.

    A time-out ends all raises, so that there is none where an operator has raised one of the blocks, as of `by_hand`.
    """
    effective = log.effective()
    lasting = {*by_hand, *scaling_state(log).by_hand}
    raised = {block for block, value in multipliers.items() if value > 1}
    if not (effective and raised) or raised & lasting:
        return 0
    return log.find(effective[-1].decision_id).ttl_steps


def _permitted(verdict: str) -> None:
    if verdict != OK:
        raise OperatorError(verdict)
