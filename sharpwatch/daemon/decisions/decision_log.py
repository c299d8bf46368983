"""The records of one run: decisions and revisions as they stand, and which of them changed since the last look."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sharpwatch.daemon.records import Alert, Decision, Revision
from sharpwatch.errors import OperatorError

UNDER_WAY = ("approved", "sent")
FINAL = ("observed", "rejected", "refused", "recovered", "failed", "expired")


@dataclass(frozen=True, slots=True)
class Changes:
    """Records that changed, to be upserted; `commands` are decisions to be sent once they are journalled.

    `transitions` are the changed decisions in every form they took on the way, in order.
    """

    alerts: tuple[Alert, ...] = ()
    decisions: tuple[Decision, ...] = ()
    revisions: tuple[Revision, ...] = ()
    commands: tuple[Decision, ...] = ()
    transitions: tuple[Decision, ...] = ()


class DecisionLog:
    """Decisions and revisions of one run. A decision with a final outcome never changes again."""

    def __init__(self, run: str, blocks: Iterable[str]) -> None:
        self.run = run
        self.blocks = tuple(blocks)
        self._decisions: dict[str, Decision] = {}
        self._revisions: list[Revision] = []
        self._unsettled: dict[str, None] = {}  # ids of decisions whose outcome may still change
        self._changed_alerts: dict[str, Alert] = {}
        self._changed_decisions: dict[str, None] = {}
        self._changed_revisions: dict[int, None] = {}
        self._commands: dict[str, None] = {}
        self._transitions: list[Decision] = []

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Every decision, oldest first."""
        return tuple(self._decisions.values())

    @property
    def revisions(self) -> tuple[Revision, ...]:
        """Every revision, from 1 on without a gap."""
        return tuple(self._revisions)

    @property
    def multipliers(self) -> dict[str, float]:
        """The set in force, or on its way there: every block of the run."""
        return self.set_before(len(self._revisions) + 1)

    def restore(self, decisions: Iterable[Decision], revisions: Sequence[Revision]) -> None:
        """Take up journalled records."""
        self._decisions = {made.id: made for made in decisions}
        self._revisions = sorted(revisions, key=lambda revision: revision.revision)
        self._unsettled = {made.id: None for made in self._decisions.values() if _unsettled(made)}

    def unsettled(self) -> Iterator[Decision]:
        """The decisions whose outcome may still change."""
        return iter([self._decisions[identity] for identity in self._unsettled])

    def find(self, identity: str) -> Decision:
        """The decision of that id; raises `OperatorError`."""
        if identity not in self._decisions:
            raise OperatorError(f"run {self.run} has no decision {identity}")
        return self._decisions[identity]

    def note_alerts(self, alerts: Iterable[Alert]) -> None:
        """Have `alerts` recorded."""
        self._changed_alerts.update((alert.id, alert) for alert in alerts)

    def add(self, made: Decision) -> Decision:
        """Record a new decision."""
        return self._put(made)

    def update(self, made: Decision, **changes: Any) -> Decision:
        """Record `made` with `changes`; a final outcome stays what it is."""
        current = self._decisions[made.id]
        return current if current.outcome in FINAL else self._put(replace(current, **changes))

    def send(self, made: Decision) -> None:
        """Have the command of `made` sent."""
        self._commands[made.id] = None

    def revise(self, made: Decision, *, author: str, reason: str, now: float, undoes: int = 0) -> Decision:
        """Number the set that `made` puts in force, and tell `made` its number."""
        number = len(self._revisions) + 1
        self._revisions.append(
            Revision(self.run, number, dict(made.multipliers), author, reason, now, made.id, undoes=undoes)
        )
        self._changed_revisions[number] = None
        return self.update(made, revision=number)

    def applied(self, number: int, step: int) -> None:
        """The trainer put revision `number` in force at `step`."""
        revision = self._revisions[number - 1]
        if revision.applied_step is None:
            self._revisions[number - 1] = replace(revision, applied_step=step)
            self._changed_revisions[number] = None

    def took_effect(self, revision: Revision) -> bool:
        """Whether `revision` is or was in force, or is on its way there."""
        return revision.applied_step is not None or self._decisions[revision.decision_id].outcome in UNDER_WAY

    def effective(self) -> list[Revision]:
        """The revisions that took effect, oldest first."""
        return [revision for revision in self._revisions if self.took_effect(revision)]

    def set_before(self, number: int) -> dict[str, float]:
        """The set in force before revision `number`."""
        for revision in reversed(self._revisions[: number - 1]):
            if self.took_effect(revision):
                return self.complete(revision.multipliers)
        return self.complete({})

    def complete(self, multipliers: Mapping[str, float]) -> dict[str, float]:
        """`multipliers` with every block of the run; a block that is not named stands at 1."""
        return {block: multipliers.get(block, 1.0) for block in self.blocks}

    def take(self) -> Changes:
        """What changed since the last call."""
        changes = Changes(
            alerts=tuple(self._changed_alerts.values()),
            decisions=tuple(self._decisions[identity] for identity in self._changed_decisions),
            revisions=tuple(self._revisions[number - 1] for number in self._changed_revisions),
            commands=tuple(self._decisions[identity] for identity in self._commands),
            transitions=tuple(self._transitions),
        )
        for changed in (self._changed_alerts, self._changed_decisions, self._changed_revisions, self._commands):
            changed.clear()
        self._transitions.clear()
        return changes

    def _put(self, made: Decision) -> Decision:
        if _state(made) != _state(self._decisions.get(made.id)):
            self._transitions.append(made)
        self._decisions[made.id] = made
        self._changed_decisions[made.id] = None
        if _unsettled(made):
            self._unsettled[made.id] = None
        else:
            self._unsettled.pop(made.id, None)
        return made


def _state(made: Decision | None) -> tuple[str, ...]:
    """What an audit tells of a decision at one time."""
    return () if made is None else (made.outcome, made.detail, made.author, made.reason)


def _unsettled(made: Decision) -> bool:
    """An operator's own decision is done once it is applied; a policy's has still to prove itself."""
    return made.outcome not in FINAL and not (made.outcome == "applied" and not made.policy)
