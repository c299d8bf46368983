"""What a policy does about an incident: which one answers it, on which blocks, and back to which checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sharpwatch.daemon.config.settings import ActionConfig, MaintenanceConfig, PolicyConfig
from sharpwatch.daemon.decisions.guards import NO_REMEDY, guard_name
from sharpwatch.daemon.decisions.muting import was_muted
from sharpwatch.daemon.decisions.transitions import JUDGED, took_effect
from sharpwatch.daemon.records import Checkpoint, Decision, Incident, Mode, Outcome, RollbackPlan

MODES: tuple[Mode, ...] = ("observe", "advise", "enforce")
# A decision that ended so is not repeated for the same reason.
ANNOUNCED: tuple[Outcome, ...] = ("observed", "proposed", "rejected", "cancelled")


@dataclass(frozen=True, slots=True)
class EscalationChain:
    """The policies of a run, and which of them answers an alert now."""

    policies: tuple[PolicyConfig, ...]

    def named(self, name: str) -> PolicyConfig | None:
        """The policy of that name."""
        return next((policy for policy in self.policies if policy.name == name), None)

    def acting(self, incident: Incident) -> Iterator[PolicyConfig]:
        """The policies that answer an incident, and those that they escalate to, but for what only notifies."""
        for policy in self.policies:
            current: PolicyConfig | None = policy if policy.match.answers(incident) else None
            while current is not None:
                if current.action.kind != "notify":
                    yield current
                current = self.named(current.escalate.to) if current.escalate is not None else None

    def owner(self, made: Decision) -> PolicyConfig:
        """The policy that made a decision; one with the usual guards where it is no longer in the configuration."""
        mode: Mode = "enforce" if made.mode == "operator" else made.mode
        return self.named(made.policy) or PolicyConfig(made.policy, mode=mode, action=ActionConfig(factor=0.5))

    def answering(
        self,
        incident: Incident,
        incidents: Iterable[Incident],
        decisions: Iterable[Decision],
        step: int,
        mode_of: Callable[[PolicyConfig], Mode],
    ) -> tuple[PolicyConfig, ...]:
        """The policies that answer `incident` at `step`: of each that matches, the last it has escalated to.

        Args:
            incident: An open incident.
            incidents: All of the run: trouble that comes in bursts is one, though each is an incident of its own.
            decisions: All of the run.
            step: The step.
            mode_of: How far a policy may go now.
        """
        every, made = tuple(incidents), tuple(decisions)
        found = []
        for policy in self.policies:
            if policy.match.answers(incident):
                # What does not escalate need not know what led up to it: this runs at each step of an open incident.
                stays = policy.escalate is None or bool(incident.contained_step)
                ids = set() if stays else bursts(incident, every, policy.guard.hold_steps)
                # A policy that was kept from acting has not been given its time to help yet.
                answered = [each for each in made if each.alert_id in ids and not was_muted(each)]
                found.append(self._escalate(policy, incident, answered, step, mode_of))
        return tuple(dict.fromkeys(found))

    def _escalate(
        self,
        policy: PolicyConfig,
        incident: Incident,
        answered: Sequence[Decision],
        step: int,
        mode_of: Callable[[PolicyConfig], Mode],
    ) -> PolicyConfig:
        # What was only observed has not been given its time either, once it may be done.
        mode, by_policy = mode_of(policy), (made for made in answered if made.policy == policy.name)
        own = [made for made in by_policy if made.mode == mode or took_effect(made)]
        if policy.escalate is None or not own:
            return policy
        if own[-1].outcome in ("rejected", "cancelled"):
            return policy  # somebody has said no to the milder action: that asks for no harsher one
        # The newest may not be judged yet, as while a cut goes with the rate.
        newest = next((made for made in reversed(own) if made.outcome in JUDGED), own[-1])
        # Trouble that comes back as another burst was not cured for good.
        if newest.outcome == "recovered" and newest.alert_id == incident.id:
            return policy
        if not _is_helpless(policy, newest) and step - own[0].step < policy.escalate.after_steps:
            return policy
        above = self.named(policy.escalate.to)
        return policy if above is None else self._escalate(above, incident, answered, step, mode_of)


def _is_helpless(policy: PolicyConfig, made: Decision) -> bool:
    """Whether it is known that a policy does not help, so that nothing is to be waited for."""
    measured = policy.action.factor == "auto" or policy.action.kind == "rollback"
    in_vain = made.outcome == "no-effect" and measured  # a fixed cut may help where it comes once more
    return in_vain or made.outcome == "worse" or guard_name(made.guard) == NO_REMEDY


def bursts(incident: Incident, incidents: Iterable[Incident], quiet: int) -> set[str]:
    """The ids of `incident`, and of those of its cause that lead up to it with at most `quiet` steps in between."""
    ids, began = {incident.id}, incident.onset
    for other in sorted(incidents, key=lambda each: -each.last_step):
        if other.is_same_trouble(incident) and other.onset <= began <= other.last_step + quiet:
            ids.add(other.id)
            began = other.onset
    return ids


def in_maintenance(mode: Mode, windows: Iterable[MaintenanceConfig], now: float) -> Mode:
    """The mode at `now` in unix seconds: in a maintenance window what would be enforced is only proposed."""
    return "advise" if mode == "enforce" and any(window.contains(now) for window in windows) else mode


def strongest(policies: Iterable[PolicyConfig]) -> Mode:
    """The mode that reaches furthest among the policies' own."""
    return max((policy.mode for policy in policies if not policy.dry_run), key=MODES.index, default="observe")


def affected(policy: PolicyConfig, incident: Incident, blocks: Sequence[str]) -> tuple[str, ...]:
    """The blocks of the run that the action is about; an alert that names none is about all of them."""
    chosen = policy.action.blocks
    if chosen == "all" or (chosen == "alert" and not incident.blocks):
        return tuple(blocks)
    named = incident.blocks if chosen == "alert" else chosen
    return tuple(block for block in blocks if block in named)


def scaled(
    in_force: Mapping[str, float], factors: Mapping[str, float], bounds: tuple[float, float]
) -> dict[str, float]:
    """`in_force` times `factors`, held within `bounds`; a block that stands beyond them is not moved back."""
    low, high = bounds
    result = dict(in_force)
    for block, factor in factors.items():
        now = in_force[block]
        result[block] = max(now * factor, min(low, now)) if factor < 1 else min(now * factor, max(high, now))
    return result


def rollback_plan(
    policy: PolicyConfig, incident: Incident, checkpoints: Iterable[Checkpoint], step: int
) -> RollbackPlan | None:
    """Back to the newest checkpoint before the onset, and round the data of the alert; None without a checkpoint."""
    checkpoint = newest(checkpoints, incident.onset - 1)
    if checkpoint is None:
        return None
    margin = policy.action.skip_margin
    skip_from = max(checkpoint.step + 1, incident.onset - margin)
    return RollbackPlan(checkpoint, skip_from, max(incident.last_step, step) + margin + 1)


def newest(checkpoints: Iterable[Checkpoint], at_most: int | None) -> Checkpoint | None:
    """The checkpoint of the highest step up to `at_most`; of several of one step the one saved last."""
    best: Checkpoint | None = None
    for checkpoint in checkpoints:
        if (at_most is None or checkpoint.step <= at_most) and (best is None or checkpoint.step >= best.step):
            best = checkpoint
    return best


def is_trouble(incident: Incident) -> bool:
    """Whether the run is in trouble by itself: not how it compares with a reference, nor what an action holds down."""
    return incident.name != "SilentFailure" and not incident.contained_step


def changed_blocks(multipliers: Mapping[str, float], before: Mapping[str, float]) -> str:
    """What `multipliers` change, in words."""
    return ", ".join(f"{b} {before[b]:.3g} to {v:.3g}" for b, v in multipliers.items() if v != before.get(b))
