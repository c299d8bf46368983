"""The ramp-back: takes a policy's change of multipliers back in stages, each held, judged, and undone if it harms.

`ramp_back_due` decides on the next stage, `failed_ramp_back` when the newest one has to be undone. The policy engine
records and sends what they decide; the trainer moves there (`agent.control.controller`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from sharpwatch.daemon.config.settings import GuardConfig, PolicyConfig
from sharpwatch.daemon.decisions.decision_log import DecisionLog
from sharpwatch.daemon.decisions.guards import OK, Permissions
from sharpwatch.daemon.decisions.policy import ANNOUNCED, EscalationChain
from sharpwatch.daemon.records import Decision, Incident, Revision

_LONGEST_DOUBLING = 20
_STAGES = 4  # in a hold: the first stage waits for a whole one, the others for a part of it
_RAISE = 2.0  # by which a stage raises a multiplier at most, until one had to be undone


@dataclass(frozen=True, slots=True)
class ActiveScaling:
    """A cut or raise by a policy that is still in force.

    Attributes:
        made: The decision.
        before: The multipliers of its blocks before it.
    """

    made: Decision
    before: Mapping[str, float]

    def without(self, blocks: Iterable[str]) -> ActiveScaling:
        """Returns the scaling of its other blocks."""
        return replace(self, before={b: value for b, value in self.before.items() if b not in blocks})


@dataclass(frozen=True, slots=True)
class ScalingState:
    """The policies' scalings after all revisions that took effect.

    Attributes:
        active: Those in force, oldest first.
        failed_ramp_backs: How many stages of ramp-backs were undone since there was no scaling in force.
        newest: The newest revision.
        ramped_back: The scaling that `newest` took back, or a part of it, if it is of a ramp-back.
    """

    active: tuple[ActiveScaling, ...] = ()
    failed_ramp_backs: int = 0
    newest: Revision | None = None
    ramped_back: ActiveScaling | None = None


@dataclass(frozen=True, slots=True)
class RampBack:
    """A stage that is due: whose scaling it takes back, and the multipliers of all blocks at its end."""

    policy: PolicyConfig
    scaling: ActiveScaling
    multipliers: Mapping[str, float]
    ramp_steps: int
    detail: str


@dataclass(frozen=True, slots=True)
class FailedRampBack:
    """A stage that is to be undone: its revision, the multipliers before it, and why."""

    policy: PolicyConfig
    revision: Revision
    multipliers: Mapping[str, float]
    detail: str


def ramp_back_due(
    log: DecisionLog, incidents: Iterable[Incident], chain: EscalationChain, permissions: Permissions, step: int
) -> RampBack | None:
    """Decides whether to take the next stage of the newest scaling in force back.

    It is due once the run was quiet for the hold, or after a stage for a part of it: no finding and no change of
    multipliers.

    Args:
        log: The run's decisions.
        incidents: All incidents of the run.
        chain: The run's policies.
        permissions: What the run allows.
        step: The run's step.

    Returns:
        The stage, or None if none is due.
    """
    state = scaling_state(log)
    # A cut that goes with the trainer's rate comes back with it (`PolicyEngine`).
    scaling = next((one for one in reversed(state.active) if not one.made.follows_rate), None)
    policy = chain.named(scaling.made.policy) if scaling is not None else None
    if scaling is None or policy is None or permissions.multipliers() != OK:
        return None
    hold = hold_steps(policy, state.failed_ramp_backs)
    wait = stage_steps(policy.guard, log) if state.ramped_back is not None and policy.action.cuts else hold
    since = quiet_since(incidents, log.decisions, step)
    if step - since < wait or _decided_since(log.decisions, since, wait, step):
        return None
    low, high = permissions.lr_bounds
    most = _RAISE ** (0.5**state.failed_ramp_backs)  # growing caution
    now = log.multipliers
    target = {
        block: min(max(min(value, now[block] * most) if now[block] < value else value, low), high)
        for block, value in scaling.before.items()
    }
    return RampBack(
        policy,
        scaling,
        {**now, **target},
        # Half of the wait on the way up, half of it there, before it counts as recovered.
        ramp_steps=max(policy.action.ramp_steps, wait // 2),
        detail=f"quiet for {wait} steps: {', '.join(f'{b} back to {v:.3g}' for b, v in target.items())}",
    )


def failed_ramp_back(log: DecisionLog, chain: EscalationChain, why: str, step: int) -> FailedRampBack | None:
    """Decides whether the newest stage has to be undone for what came within the hold after it; `why` says what."""
    state = scaling_state(log)
    policy = chain.named(state.ramped_back.made.policy) if state.ramped_back is not None else None
    if state.newest is None or state.newest.applied_step is None or policy is None:
        return None
    since = state.newest.applied_step
    if not since <= step < since + hold_steps(policy, state.failed_ramp_backs):
        return None
    number = state.newest.revision
    detail = f"{why} after revision {number} was ramped back"
    return FailedRampBack(policy, state.newest, log.set_before(number), detail)


def scaling_state(log: DecisionLog) -> ScalingState:
    """Follows the revisions that took effect.

    A block that an operator's revision changes is the operator's from then on: the daemon never ramps it back. A
    scaling is over once its blocks are back at what they were before it.
    """
    active: list[ActiveScaling] = []
    taken: dict[int, ActiveScaling] = {}  # by the revision that ramped it back, or a part of it
    failed = 0
    newest: Revision | None = None
    ramped_back: ActiveScaling | None = None
    before = log.complete({})
    for revision in log.effective():
        made = log.find(revision.decision_id)
        after = log.complete(revision.multipliers)
        changed = {block: before[block] for block in after if after[block] != before[block]}
        newest, ramped_back = revision, None
        if not made.policy:
            active = [scaling for old in active if (scaling := old.without(changed)).before]
        elif made.action == "scale_lr":
            failed = failed if active else 0
            active.append(ActiveScaling(made, changed))
        elif made.action == "ramp_back":
            ramped_back = next((one for one in reversed(active) if changed.keys() <= one.before.keys()), None)
            if ramped_back is not None:
                taken[revision.revision] = ramped_back
        elif made.action == "set_lr" and revision.undoes in taken:
            failed += 1
            if taken[revision.undoes] not in active:
                active.append(taken[revision.undoes])
        active = [one for one in active if any(after[block] != value for block, value in one.before.items())]
        before = after
    return ScalingState(tuple(active), failed, newest, ramped_back)


def hold_steps(policy: PolicyConfig, failed_ramp_backs: int) -> int:
    """Returns how long to wait before the first stage: twice as long after each that failed.

    A raise ends at its TTL at the latest, before the trainer ends it by itself.
    """
    hold = policy.guard.hold_steps << min(failed_ramp_backs, _LONGEST_DOUBLING)
    return hold if policy.action.cuts else min(hold, policy.action.ttl_steps)


def stage_steps(guard: GuardConfig, log: DecisionLog) -> int:
    """Returns how long a stage takes and is held before the next one."""
    failed = min(scaling_state(log).failed_ramp_backs, _LONGEST_DOUBLING)
    return max(1, (guard.hold_steps << failed) // _STAGES)


def quiet_since(incidents: Iterable[Incident], decisions: Iterable[Decision], step: int) -> int:
    """Returns the last step with an alert or a change; a rollback discarded the steps after `step`."""
    steps = [incident.last_step for incident in incidents]
    steps += [made.applied_step for made in decisions if made.applied_step is not None]
    return max((at for at in steps if at <= step), default=step)


def _decided_since(decisions: Iterable[Decision], since: int, hold: int, step: int) -> bool:
    """Whether the newest ramp-back decided in the quiet time still stands, or is more recent than the hold."""
    for made in reversed(tuple(decisions)):
        if made.action == "ramp_back" and since <= made.step <= step:
            return made.outcome in ANNOUNCED or step - made.step < hold
    return False
