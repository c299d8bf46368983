"""The guards: what can refuse an action of a policy, and what a run allows at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

from sharpwatch.daemon.config.settings import PolicyConfig
from sharpwatch.daemon.decisions.transitions import came_to_nothing, took_effect
from sharpwatch.daemon.records import Decision, Mode, RollbackPlan

OK = "ok"
NO_REMEDY = "factor"  # the guard's name where nothing measured says that a cut helps
Control = Literal["none", "lr", "rollback"]
_RATES = ("scale_lr", "set_lr", "rollback")  # what a further cut waits after: each may be the cure already
_COUNTED = ("scale_lr", "rollback")  # a cut put back after a ramp that failed must never find its quota used up
HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Permissions:
    """What the run allows."""

    control: Control
    lr_bounds: tuple[float, float]
    can_roll_back: bool
    takes_intervals: bool = True

    def multipliers(self) -> str:
        """Returns whether multipliers may be set: "ok", or the guard that refuses it and why."""
        return OK if self.control != "none" else 'control: the run was attached with control="none"'

    def rollback(self) -> str:
        """Returns whether a rollback may be requested: "ok", or the guard that refuses it and why."""
        if self.control == "none":
            return self.multipliers()
        if self.can_roll_back or self.control == "rollback":
            return OK
        return 'control: the run takes no rollback: neither on_rollback nor control="rollback" was given to attach'


@dataclass(frozen=True, slots=True)
class GuardContext:
    """Where the run stands.

    Attributes:
        step: Its step.
        now: Unix seconds.
        decisions: What was decided before.
        alert_id: The incident to answer.
        bursts: Its id, and those that lead up to it, without those that somebody has acknowledged.
        mode: In which mode.
    """

    step: int
    now: float
    decisions: Sequence[Decision]
    alert_id: str = ""
    bursts: AbstractSet[str] = frozenset()
    mode: Mode = "enforce"


def bounds(policy: PolicyConfig, permissions: Permissions) -> tuple[float, float]:
    """The tighter of the policy's and the run's bounds on a multiplier."""
    low, high = permissions.lr_bounds
    return max(low, policy.guard.min_multiplier), min(high, policy.guard.max_multiplier)


def judge_scale(
    policy: PolicyConfig,
    before: Mapping[str, float],
    after: Mapping[str, float],
    permissions: Permissions,
    context: GuardContext,
) -> str:
    """The verdict on setting the multipliers from `before` to `after`."""
    return _first_refusal(
        permissions.multipliers(),
        _cooldown(policy, context),
        _effect(policy, before, after, permissions),
        _time_out(policy, before),
        _hourly(policy, context),
        _outcomes(policy, context),
        _repeated(policy, context),
    )


def judge_rate_cut(
    policy: PolicyConfig,
    before: Mapping[str, float],
    after: Mapping[str, float],
    permissions: Permissions,
    context: GuardContext,
) -> str:
    """The verdict on multipliers that only make up for a rate that is too high: nothing is tried by that."""
    return _first_refusal(
        permissions.multipliers(),
        _effect(policy, before, after, permissions),
        _hourly(policy, context),
        _repeated(policy, context),
    )


def judge_rollback(
    policy: PolicyConfig, plan: RollbackPlan | None, permissions: Permissions, context: GuardContext
) -> str:
    """The verdict on asking for `plan`."""
    return _first_refusal(
        permissions.rollback(),
        OK if plan is not None else "checkpoint: there is none from before the onset",
        _rollback_window(policy, context),
        _hourly(policy, context),
        _outcomes(policy, context),
        _repeated(policy, context),
    )


def guard_name(verdict: str) -> str:
    """Returns the name of the guard that gave the verdict."""
    return verdict.partition(":")[0]


def _first_refusal(*verdicts: str) -> str:
    return next((verdict for verdict in verdicts if verdict != OK), OK)


def _effect(
    policy: PolicyConfig, before: Mapping[str, float], after: Mapping[str, float], permissions: Permissions
) -> str:
    if any(not math.isclose(after[block], before[block], rel_tol=1e-6) for block in after):
        return OK
    low, high = bounds(policy, permissions)
    if policy.action.cuts:
        return f"min_multiplier: every block is at or below {low:g} already"
    return f"max_multiplier: every block is at or above {high:g} already"


def _time_out(policy: PolicyConfig, before: Mapping[str, float]) -> str:
    """A raise comes with a TTL, which ends all raises in force; an operator's stay."""
    if not policy.action.cuts and any(value > 1 for value in before.values()):
        return "ttl_steps: its time-out would end the raises in force too"
    return OK


def _acted(decisions: Iterable[Decision], actions: tuple[str, ...]) -> list[Decision]:
    return [made for made in decisions if made.policy and made.action in actions and took_effect(made)]


def _since(made: Decision) -> int:
    return made.step if made.applied_step is None else made.applied_step


def _this_timeline(context: GuardContext) -> Sequence[Decision]:
    """What was decided on the timeline the run is on.

    From the newest applied rollback on, and of that nothing at a step still ahead: there the run began again from a
    checkpoint, and its cooldown would last until it had come as far once more.
    """
    decisions = [made for made in context.decisions if made.step <= context.step or _went_back(made)]
    for index in range(len(decisions) - 1, -1, -1):
        if _went_back(decisions[index]):
            return decisions[index:]
    return decisions


def _went_back(made: Decision) -> bool:
    return made.action == "rollback" and made.applied_step is not None


def _cooldown(policy: PolicyConfig, context: GuardContext) -> str:
    """Any policy's action counts: two policies that see the same trouble must not cut twice."""
    for made in reversed(_acted(_this_timeline(context), _RATES)):
        if made.makes_up_for and made.action == "set_lr":
            continue  # it has only gone with the trainer's rate
        if context.step - _since(made) < policy.guard.cooldown_steps:
            return f"cooldown_steps: {policy.guard.cooldown_steps} have to pass after {made.id} (step {_since(made)})"
    return OK


def _hourly(policy: PolicyConfig, context: GuardContext) -> str:
    recent = [
        made
        for made in _acted(context.decisions, _COUNTED)
        if made.policy == policy.name and context.now - made.made_at < HOUR
    ]
    if len(recent) < policy.guard.max_actions_per_hour:
        return OK
    return f"max_actions_per_hour: {policy.guard.max_actions_per_hour} in the last hour"


def _outcomes(policy: PolicyConfig, context: GuardContext) -> str:
    """What has not helped is not done again and again: a person has to look."""
    before = _this_timeline(context)
    made = [one for one in before if one.policy == policy.name and one.alert_id in context.bursts]
    limits = (
        ("worse", "max_worse", policy.guard.max_worse),
        ("no-effect", "max_no_effect", policy.guard.max_no_effect),
        ("inconclusive", "max_inconclusive", policy.guard.max_inconclusive),
    )
    for outcome, name, most in limits:
        ended = [one.id for one in made if one.outcome == outcome]
        if len(ended) >= most:
            return f"{name}: {', '.join(ended)} ended {outcome}; on once somebody has acknowledged their incidents"
    return OK


def _repeated(policy: PolicyConfig, context: GuardContext) -> str:
    """What came to nothing does not count as an action, but to try it again at every step would be a storm.

    Proposals that nobody approved hold up proposals alone: they must not keep a run that is set to enforce from acting.
    """
    tries = [
        made
        for made in context.decisions
        if (made.policy, made.alert_id, made.mode) == (policy.name, context.alert_id, context.mode)
        and came_to_nothing(made)
    ]
    wait, most = policy.guard.cooldown_steps, policy.guard.max_actions_per_hour
    if any(0 <= context.step - made.step < wait for made in tries):
        return f"cooldown_steps: {wait} have to pass after {tries[-1].id}, which came to nothing"
    if sum(context.now - made.made_at < HOUR for made in tries) >= most:
        return f"max_actions_per_hour: {most} in the last hour came to nothing"
    return OK


def _rollback_window(policy: PolicyConfig, context: GuardContext) -> str:
    window = policy.guard.rollback_window_steps
    for made in reversed(_acted(_this_timeline(context), ("rollback",))):
        if context.step - _since(made) < window:
            return f"rollback_window_steps: one rollback in {window} steps, and {made.id} was at step {_since(made)}"
    return OK
