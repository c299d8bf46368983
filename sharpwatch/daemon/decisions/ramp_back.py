"""After a cut: which cuts still stand, when one of them may be ramped back, and what puts it in force again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sharpwatch.daemon.config.config import PolicyConfig
from sharpwatch.daemon.records import Alert, Decision, Revision

if TYPE_CHECKING:
    from sharpwatch.daemon.decisions.decision_log import DecisionLog

_LONGEST_DOUBLING = 20


@dataclass(frozen=True, slots=True)
class ActiveCut:
    """One policy's change that still stands: what its blocks had before it."""

    policy: str
    alert_name: str
    before: Mapping[str, float]

    def without(self, blocks: Iterable[str]) -> ActiveCut:
        """The cut over the other blocks."""
        return ActiveCut(
            self.policy, self.alert_name, {b: value for b, value in self.before.items() if b not in blocks}
        )


@dataclass(frozen=True, slots=True)
class HeldCuts:
    """The cuts that stand, oldest first; how often a ramp back had to be taken back; the ramp back just made."""

    cuts: tuple[ActiveCut, ...] = ()
    relapses: int = 0
    newest: Revision | None = None  # of all that took effect
    ramped: ActiveCut | None = None  # what `newest` took away, where it is a ramp back


def held_cuts(log: DecisionLog) -> HeldCuts:
    """Follow the revisions that took effect.

    A block that an operator's revision changes is the operator's from then on: the daemon never ramps it back.
    """
    cuts: list[ActiveCut] = []
    taken: dict[int, ActiveCut] = {}
    relapses = 0
    newest: Revision | None = None
    ramped: ActiveCut | None = None
    before = log.complete({})
    for revision in log.effective():
        made = log.find(revision.decision_id)
        after = log.complete(revision.multipliers)
        changed = {block: before[block] for block in after if after[block] != before[block]}
        newest, ramped = revision, None
        if not made.policy:
            cuts = [cut for old in cuts if (cut := old.without(changed)).before]
        elif made.action == "scale_lr":
            relapses = relapses if cuts else 0
            cuts.append(ActiveCut(made.policy, made.alert_name, changed))
        elif made.action == "ramp_back" and cuts:
            ramped = taken[revision.revision] = cuts.pop()
        elif made.action == "set_lr" and revision.undoes in taken:
            relapses += 1
            cuts.append(taken[revision.undoes])
        before = after
    return HeldCuts(tuple(cuts), relapses, newest, ramped)


def hold_steps(policy: PolicyConfig, relapses: int) -> int:
    """How long to wait before the next ramp back: twice as long after each that had to be taken back.

    A raise ends at its TTL at the latest, before the trainer ends it by itself.
    """
    hold = policy.guard.hold_steps << min(relapses, _LONGEST_DOUBLING)
    return min(hold, policy.action.ttl_steps) if policy.action.factor > 1 else hold


def quiet_since(alerts: Iterable[Alert], decisions: Iterable[Decision], step: int) -> int:
    """The last step at which there was trouble or a change; a rollback discarded the steps after `step`."""
    steps = [alert.last_step for alert in alerts]
    steps += [made.applied_step for made in decisions if made.applied_step is not None]
    return max((at for at in steps if at <= step), default=step)
