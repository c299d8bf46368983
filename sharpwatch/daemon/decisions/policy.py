"""What a policy would do about an alert: the multipliers it would put in force, the rollback it would ask for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sharpwatch.daemon.config.config import PolicyConfig
from sharpwatch.daemon.records import Alert, Checkpoint, Decision, Mode, RollbackPlan

MODES: tuple[Mode, ...] = ("observe", "advise", "enforce")


@dataclass(frozen=True, slots=True)
class EscalationChain:
    """The policies of a run, and which of them answers an alert now."""

    policies: tuple[PolicyConfig, ...]

    def named(self, name: str) -> PolicyConfig | None:
        """The policy of that name."""
        return next((policy for policy in self.policies if policy.name == name), None)

    def answering(self, alert: Alert, decisions: Iterable[Decision], step: int) -> tuple[PolicyConfig, ...]:
        """The policies that answer `alert` at `step`: of each that matches, the last it has escalated to."""
        answered = [made for made in decisions if made.alert_id == alert.id]
        return tuple(
            dict.fromkeys(
                self._escalate(policy, answered, step) for policy in self.policies if policy.match.alert == alert.name
            )
        )

    def _escalate(self, policy: PolicyConfig, answered: Sequence[Decision], step: int) -> PolicyConfig:
        first = next((made for made in answered if made.policy == policy.name), None)
        if policy.escalate is None or first is None or step - first.step < policy.escalate.after_steps:
            return policy
        above = self.named(policy.escalate.to)
        return policy if above is None else self._escalate(above, answered, step)


def strongest(policies: Iterable[PolicyConfig]) -> Mode:
    """The mode that reaches furthest among the policies' own."""
    return max((policy.mode for policy in policies), key=MODES.index, default="observe")


def affected(policy: PolicyConfig, alert: Alert, blocks: Sequence[str]) -> tuple[str, ...]:
    """The blocks of the run that the action is about; an alert that names none is about all of them."""
    chosen = policy.action.blocks
    if chosen == "all" or (chosen == "alert" and not alert.blocks):
        return tuple(blocks)
    named = alert.blocks if chosen == "alert" else chosen
    return tuple(block for block in blocks if block in named)


def scaled(
    in_force: Mapping[str, float], blocks: Iterable[str], factor: float, bounds: tuple[float, float]
) -> dict[str, float]:
    """`in_force` with `blocks` scaled, held within `bounds`; a block that stands beyond them is not moved back."""
    low, high = bounds
    result = dict(in_force)
    for block in blocks:
        now = in_force[block]
        result[block] = max(now * factor, min(low, now)) if factor < 1 else min(now * factor, max(high, now))
    return result


def rollback_plan(
    policy: PolicyConfig, alert: Alert, checkpoints: Iterable[Checkpoint], step: int
) -> RollbackPlan | None:
    """Back to the newest checkpoint before the onset, and round the data of the alert; None without a checkpoint."""
    checkpoint = newest(checkpoints, alert.first_step - 1)
    if checkpoint is None:
        return None
    margin = policy.action.skip_margin
    skip_from = max(checkpoint.step + 1, alert.first_step - margin)
    return RollbackPlan(checkpoint, skip_from, max(alert.last_step, step) + margin + 1)


def newest(checkpoints: Iterable[Checkpoint], at_most: int | None) -> Checkpoint | None:
    """The checkpoint of the highest step up to `at_most`; of several of one step the one saved last."""
    best: Checkpoint | None = None
    for checkpoint in checkpoints:
        if (at_most is None or checkpoint.step <= at_most) and (best is None or checkpoint.step >= best.step):
            best = checkpoint
    return best
