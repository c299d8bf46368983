"""The ramp-back: takes a policy's change of multipliers back in stages, each held, judged, and undone if it harms.

`ramp_back_due` decides on the next stage, `failed_ramp_back` when the newest one has to be undone. The policy engine
records and sends what they decide; the trainer moves there (`agent.control.controller`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

from sharpwatch.daemon.config.settings import GuardConfig, PolicyConfig
from sharpwatch.daemon.decisions.decision_log import DecisionLog
from sharpwatch.daemon.decisions.guards import OK, Permissions
from sharpwatch.daemon.decisions.policy import ANNOUNCED, EscalationChain
from sharpwatch.daemon.decisions.transitions import UNDER_WAY
from sharpwatch.daemon.records import Decision, Incident, Revision

_LONGEST_DOUBLING = 20
_STAGES = 4  # in a hold: the first stage waits for a whole one, the others for a part of it
_RAISE = 2.0  # by which a stage raises a multiplier at most, until one had to be undone


@dataclass(frozen=True, slots=True)
class ActiveScaling:
    """A cut or raise by a policy, as far as it is still in force.

    Attributes:
        made: The decision.
        factors: By block what the multiplier is changed by; others' changes come on top.
        makes_up_for: By block how many times too high a rate is that it makes up for and goes with; else empty.
    """

    made: Decision
    factors: Mapping[str, float]
    makes_up_for: Mapping[str, float]

    def without(self, blocks: Iterable[str]) -> ActiveScaling:
        """Returns the scaling of its other blocks."""
        return replace(self, factors={b: value for b, value in self.factors.items() if b not in blocks})

    def changed(self, ratios: Mapping[str, float], makes_up_for: Mapping[str, float]) -> ActiveScaling:
        """Returns what is left of it once the multipliers of its blocks have changed by `ratios`."""
        factors = {block: value * ratios.get(block, 1.0) for block, value in self.factors.items()}
        left = {block: value for block, value in factors.items() if not math.isclose(value, 1.0, rel_tol=1e-6)}
        return replace(self, factors=left, makes_up_for=makes_up_for)


@dataclass(frozen=True, slots=True)
class ScalingState:
    """The policies' scalings after all revisions that took effect.

    Attributes:
        active: Those in force, oldest first.
        failed_ramp_backs: How many stages of ramp-backs were undone since there was no scaling in force.
        newest: The newest revision.
        ramped_back: The scaling that `newest` took back, or a part of it, if it is of a ramp-back.
        by_hand: The step at which an operator last changed a block.
        by_plan: The blocks that an operator's plan has changed.
    """

    active: tuple[ActiveScaling, ...] = ()
    failed_ramp_backs: int = 0
    newest: Revision | None = None
    ramped_back: ActiveScaling | None = None
    by_hand: Mapping[str, int] = field(default_factory=dict)
    by_plan: frozenset[str] = frozenset()

    @property
    def operators(self) -> frozenset[str]:
        """The blocks that an operator has changed, by hand or by a plan."""
        return self.by_plan.union(self.by_hand)

    @property
    def following(self) -> tuple[ActiveScaling, ...]:
        """Those that go with the trainer's own rate."""
        return tuple(one for one in self.active if one.makes_up_for)


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
    """A stage that is to be undone: its revision, whose scaling it took back, the multipliers before it, and why."""

    policy: PolicyConfig
    revision: Revision
    scaling: ActiveScaling
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
    scaling = next((one for one in reversed(state.active) if not one.makes_up_for), None)
    if scaling is None or permissions.multipliers() != OK:
        return None
    policy = chain.owner(scaling.made)
    hold = hold_steps(policy, state.failed_ramp_backs)
    wait = stage_steps(policy.guard, log) if state.ramped_back is not None and policy.action.cuts else hold
    since = quiet_since(incidents, log.decisions, step)
    if step - since < wait or _decided_since(log.decisions, since, wait, step):
        return None
    low, high = permissions.lr_bounds
    most = _RAISE ** (0.5**state.failed_ramp_backs)  # growing caution
    now = log.multipliers
    target = {
        block: min(max(whole(now[block] * (min(1 / factor, most) if factor < 1 else 1 / factor)), low), high)
        for block, factor in scaling.factors.items()
    }
    return RampBack(
        policy,
        scaling,
        {**now, **target},
        # Half of the wait on the way up, half of it there, before it counts as recovered.
        ramp_steps=max(policy.action.ramp_steps, wait // 2),
        detail=f"quiet for {wait} steps: {', '.join(f'{b} back to {v:.3g}' for b, v in target.items())}",
    )


def failed_ramp_back(
    log: DecisionLog, chain: EscalationChain, why: str, step: int, *, critical: bool
) -> FailedRampBack | None:
    """Decides whether the newest stage has to be undone for what came after it.

    What is critical undoes it within the whole hold. Else it does while the stage is being judged: some warning comes
    by chance in every few holds of a healthy run.

    Args:
        log: The run's decisions.
        chain: The run's policies.
        why: What came.
        step: The run's step.
        critical: Whether it is an incident of that severity.
    """
    state = scaling_state(log)
    if state.ramped_back is None or state.newest is None or state.newest.applied_step is None:
        return None
    policy, since = chain.owner(state.ramped_back.made), state.newest.applied_step
    hold = hold_steps(policy, state.failed_ramp_backs)
    if not since <= step < since + (hold if critical else min(hold, stage_steps(policy.guard, log))):
        return None
    number = state.newest.revision
    detail = f"{why} after revision {number} was ramped back"
    return FailedRampBack(policy, state.newest, state.ramped_back, log.set_before(number), detail)


def scaling_state(log: DecisionLog) -> ScalingState:
    """Follows the revisions that took effect.

    A block that an operator's revision changes is the operator's from then on: the daemon never ramps it back. What a
    plan changes comes on top of a scaling. A scaling is over once nothing of it is left.
    """
    version, state = _STATES.get(log, (-1, ScalingState()))
    if version != log.version:
        state = _traced(log)
        _STATES[log] = log.version, state
    return state


def rates_are_free(log: DecisionLog) -> bool:
    """Whether no policy's change of rates is in force or judged, and no command is under way."""
    held = (made.outcome in UNDER_WAY or made.outcome == "applied" for made in log.unsettled())
    return not (scaling_state(log).active or any(held))


# It is asked for at every step, and rarely changes.
_STATES: WeakKeyDictionary[DecisionLog, tuple[int, ScalingState]] = WeakKeyDictionary()


def _traced(log: DecisionLog) -> ScalingState:
    active: dict[str, ActiveScaling] = {}  # by the id of the decision, oldest first
    taken: dict[int, ActiveScaling] = {}  # by the revision that ramped it back, or a part of it, as it was before
    by_hand: dict[str, int] = {}
    by_plan: frozenset[str] = frozenset()
    failed = 0
    newest: Revision | None = None
    ramped_back: ActiveScaling | None = None
    before = log.complete({})
    for revision in log.effective():
        made = log.find(revision.decision_id)
        if made.is_renewal:
            continue
        after = log.complete(revision.multipliers)
        ratios = {block: after[block] / before[block] for block in after if after[block] != before[block]}
        if not (ratios or made.policy):
            continue  # of update intervals alone, or what was in force put back
        own = [one for one in active.values() if (one.made.policy, one.made.alert_id) == (made.policy, made.alert_id)]
        newest, ramped_back = revision, None
        by_plan |= ratios.keys() if made.plan else set()
        if not (made.policy or made.plan):
            active = {key: one.without(ratios) for key, one in active.items()}
            by_hand |= dict.fromkeys(ratios, made.step) if made.mode == "operator" else {}
        elif made.action == "scale_lr":
            failed = failed if active else 0
            active[made.id] = ActiveScaling(made, ratios, made.makes_up_for)
        elif revision.undoes in taken:
            failed += 1
            active[taken[revision.undoes].made.id] = taken[revision.undoes]
        elif own and made.action == "ramp_back":
            ramped_back = taken[revision.revision] = own[-1]
            active[own[-1].made.id] = own[-1].changed(ratios, own[-1].makes_up_for)
        elif own and made.makes_up_for:
            active[own[0].made.id] = own[0].changed(ratios, made.makes_up_for)
        active = {key: one for key, one in active.items() if one.factors}
        before = after
    return ScalingState(tuple(active.values()), failed, newest, ramped_back, by_hand, by_plan)


def whole(multiplier: float) -> float:
    """1 where only rounding is in between, also that of rates in single precision."""
    return 1.0 if math.isclose(multiplier, 1.0, rel_tol=1e-6) else multiplier


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
    steps += [made.applied_step for made in decisions if made.applied_step is not None and not made.is_renewal]
    return max((at for at in steps if at <= step), default=step)


def _decided_since(decisions: Iterable[Decision], since: int, hold: int, step: int) -> bool:
    """Whether the newest ramp-back decided in the quiet time still stands, or is more recent than the hold."""
    for made in reversed(tuple(decisions)):
        if made.action == "ramp_back" and since <= made.step <= step:
            return made.outcome in ANNOUNCED or step - made.step < hold
    return False
