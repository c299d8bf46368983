"""The ramp-back: takes a policy's change of multipliers back after a quiet hold, and reapplies it if its alert returns.

`ramp_back_due` decides when, and to which multipliers; `failed_ramp_back` decides when that has to be undone. The
policy engine records and sends what they decide; the trainer moves there step by step (`agent.control.controller`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sharpwatch.daemon.config.settings import PolicyConfig
from sharpwatch.daemon.decisions.policy import ANNOUNCED, OK, EscalationChain, Permissions
from sharpwatch.daemon.records import Decision, Incident, Revision

if TYPE_CHECKING:
    from sharpwatch.daemon.decisions.decision_log import DecisionLog

_LONGEST_DOUBLING = 20


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
        failed_ramp_backs: How many ramp-backs were undone since there was no scaling in force.
        newest: The newest revision.
        ramped_back: The scaling that `newest` took back, if it is a ramp-back.
    """

    active: tuple[ActiveScaling, ...] = ()
    failed_ramp_backs: int = 0
    newest: Revision | None = None
    ramped_back: ActiveScaling | None = None


@dataclass(frozen=True, slots=True)
class RampBack:
    """A ramp-back that is due: whose scaling is taken back, and the multipliers of all blocks at its end."""

    policy: PolicyConfig
    alert_name: str
    multipliers: Mapping[str, float]
    ramp_steps: int
    detail: str


@dataclass(frozen=True, slots=True)
class FailedRampBack:
    """A ramp-back that is to be undone: its revision, and the multipliers before it."""

    policy: PolicyConfig
    revision: Revision
    multipliers: Mapping[str, float]
    detail: str


def ramp_back_due(
    log: DecisionLog, incidents: Iterable[Incident], chain: EscalationChain, permissions: Permissions, step: int
) -> RampBack | None:
    """Decides whether to ramp back the newest active scaling.

    It is due once the run was quiet for the hold: no finding and no change of multipliers.

    Args:
        log: The run's decisions.
        incidents: All incidents of the run.
        chain: The run's policies.
        permissions: What the run allows.
        step: The run's step.

    Returns:
        The ramp-back, or None if none is due.
    """
    state = scaling_state(log)
    policy = chain.named(state.active[-1].made.policy) if state.active else None
    if policy is None or permissions.multipliers() != OK:
        return None
    since = quiet_since(incidents, log.decisions, step)
    hold = hold_steps(policy, state.failed_ramp_backs)
    if step - since < hold or _decided_since(log.decisions, since, hold, step):
        return None
    scaling = state.active[-1]
    low, high = permissions.lr_bounds
    before = {block: min(max(value, low), high) for block, value in scaling.before.items()}
    return RampBack(
        policy,
        scaling.made.alert_name,
        {**log.multipliers, **before},
        # Half the hold on the way up, half of it there, before it counts as recovered.
        ramp_steps=max(policy.action.ramp_steps, hold // 2),
        detail=f"quiet for {hold} steps: {', '.join(f'{b} back to {v:.3g}' for b, v in before.items())}",
    )


def failed_ramp_back(log: DecisionLog, chain: EscalationChain, incident: Incident, step: int) -> FailedRampBack | None:
    """Decides whether `incident` shows that the newest ramp-back failed: it fired within the hold after it."""
    state = scaling_state(log)
    policy = chain.named(state.ramped_back.made.policy) if state.ramped_back is not None else None
    if state.newest is None or state.newest.applied_step is None or policy is None:
        return None
    since = state.newest.applied_step
    if not since <= step < since + hold_steps(policy, state.failed_ramp_backs):
        return None
    number = state.newest.revision
    detail = f"{incident.name} came back after revision {number} was ramped back"
    return FailedRampBack(policy, state.newest, log.set_before(number), detail)


def scaling_state(log: DecisionLog) -> ScalingState:
    """Follows the revisions that took effect.

    A block that an operator's revision changes is the operator's from then on: the daemon never ramps it back.
    """
    active: list[ActiveScaling] = []
    taken: dict[int, ActiveScaling] = {}  # by the revision that ramped it back
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
        elif made.action == "ramp_back" and active:
            ramped_back = taken[revision.revision] = active.pop()
        elif made.action == "set_lr" and revision.undoes in taken:
            failed += 1
            active.append(taken[revision.undoes])
        before = after
    return ScalingState(tuple(active), failed, newest, ramped_back)


def hold_steps(policy: PolicyConfig, failed_ramp_backs: int) -> int:
    """Returns how long to wait before the next ramp-back: twice as long after each that failed.

    A raise ends at its TTL at the latest, before the trainer ends it by itself.
    """
    hold = policy.guard.hold_steps << min(failed_ramp_backs, _LONGEST_DOUBLING)
    return min(hold, policy.action.ttl_steps) if policy.action.factor > 1 else hold


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
