"""The ramp-back: takes a policy's change of multipliers back in stages, each held, judged, and undone if it harms.

`ramp_back_due` decides on the next stage, `failed_ramp_back` when the newest one has to be undone. The policy engine
records and sends what they decide; the trainer moves there (`agent.control.controller`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
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
    since = quiet_since(incidents, log.changed_at, step)
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
    followed = _FOLLOWED.get(log)
    if followed is None:
        followed = _FOLLOWED[log] = _Followed()
    return followed.state(log)


def rates_are_free(log: DecisionLog) -> bool:
    """Whether no policy's change of rates is in force or judged, and no command is under way."""
    held = (made.outcome in UNDER_WAY or made.outcome == "applied" for made in log.unsettled())
    return not (scaling_state(log).active or any(held))


@dataclass(slots=True)
class _Trace:
    """What is known after the revisions so far."""

    before: dict[str, float]  # the multipliers of all blocks
    active: dict[str, ActiveScaling] = field(default_factory=dict)  # by the id of the decision, oldest first
    # By the revision that ramped it back, or a part of it, as it was before.
    taken: dict[int, ActiveScaling] = field(default_factory=dict)
    by_hand: dict[str, int] = field(default_factory=dict)
    by_plan: frozenset[str] = frozenset()
    failed: int = 0
    newest: Revision | None = None
    ramped_back: ActiveScaling | None = None

    def copy(self) -> _Trace:
        return replace(self, active=self.active.copy(), taken=self.taken.copy(), by_hand=self.by_hand.copy())

    @property
    def state(self) -> ScalingState:
        active = tuple(self.active.values())
        return ScalingState(active, self.failed, self.newest, self.ramped_back, self.by_hand.copy(), self.by_plan)

    def follow(self, revision: Revision, made: Decision, after: dict[str, float]) -> None:
        """Takes in the next revision that took effect, its decision and the multipliers of all blocks in it."""
        if made.is_renewal:
            return
        ratios = {block: after[block] / self.before[block] for block in after if after[block] != self.before[block]}
        if not (ratios or made.policy):
            return  # of update intervals alone, or what was in force put back
        same = (made.policy, made.alert_id)
        own = [one for one in self.active.values() if (one.made.policy, one.made.alert_id) == same]
        self.newest, self.ramped_back = revision, None
        self.by_plan |= ratios.keys() if made.plan else set()
        if not (made.policy or made.plan):
            self.active = {key: one.without(ratios) for key, one in self.active.items()}
            self.by_hand |= dict.fromkeys(ratios, made.step) if made.mode == "operator" else {}
        elif made.action == "scale_lr":
            self.failed = self.failed if self.active else 0
            self.active[made.id] = ActiveScaling(made, ratios, made.makes_up_for)
        elif revision.undoes in self.taken:
            self.failed += 1
            self.active[self.taken[revision.undoes].made.id] = self.taken[revision.undoes]
        elif own and made.action == "ramp_back":
            self.ramped_back = self.taken[revision.revision] = own[-1]
            self.active[own[-1].made.id] = own[-1].changed(ratios, own[-1].makes_up_for)
        elif own and made.makes_up_for:
            self.active[own[0].made.id] = own[0].changed(ratios, made.makes_up_for)
        self.active = {key: one for key, one in self.active.items() if one.factors}
        self.before = after


class _Followed:
    """The revisions of one log that were followed, and what was known after the newest of them.

    It is asked for at every step and rarely changes; what changes then is the fate of the newest revisions.
    """

    _KEPT = 16  # traces

    def __init__(self) -> None:
        self._version = -1
        self._state = ScalingState()
        self._path: list[tuple[Revision, Decision]] = []
        self._traces: dict[int, _Trace] = {}  # by the number of revisions

    def state(self, log: DecisionLog) -> ScalingState:
        """The state of the log as it is now."""
        if self._version != log.version:
            self._state = self._follow(log)
            self._version = log.version
        return self._state

    def _follow(self, log: DecisionLog) -> ScalingState:
        path = [(revision, log.find(revision.decision_id)) for revision in log.effective()]
        # Records are replaced, never changed: one object is one record.
        pairs = enumerate(zip(self._path, path, strict=False))
        same = next((i for i, (was, now) in pairs if was[0] is not now[0] or was[1] is not now[1]), None)
        same = min(len(self._path), len(path)) if same is None else same
        known = {count: trace for count, trace in self._traces.items() if count <= same}
        begun = max(known, default=0)
        trace = known[begun].copy() if begun else _Trace(log.complete({}))
        for count, (revision, made) in enumerate(path[begun:], begun + 1):
            trace.follow(revision, made, log.complete(revision.multipliers))
            if count > len(path) - self._KEPT:
                known[count] = trace.copy()
        self._path = path
        self._traces = {count: known[count] for count in sorted(known)[-self._KEPT :]}
        return trace.state


_FOLLOWED: WeakKeyDictionary[DecisionLog, _Followed] = WeakKeyDictionary()


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


def quiet_since(incidents: Iterable[Incident], changed_at: Sequence[int], step: int) -> int:
    """Returns the last step with an alert or a change; a rollback discarded the steps after `step`.

    Args:
        incidents: The run's.
        changed_at: The steps of changes, ascending, as `DecisionLog.changed_at` has them.
        step: The run's step.
    """
    steps = [incident.last_step for incident in incidents]
    past = bisect_right(changed_at, step)
    return max((at for at in (*steps, *changed_at[max(0, past - 1) : past]) if at <= step), default=step)


def _decided_since(decisions: Iterable[Decision], since: int, hold: int, step: int) -> bool:
    """Whether the newest ramp-back decided in the quiet time still stands, or is more recent than the hold."""
    for made in reversed(tuple(decisions)):
        if made.action == "ramp_back" and since <= made.step <= step:
            return made.outcome in ANNOUNCED or step - made.step < hold
    return False
