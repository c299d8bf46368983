"""The decisions, LR revisions and plans of one run, and what changed since it was last taken to the journal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from sharpwatch.daemon.decisions.transitions import FINAL, UNDER_WAY, Event, advance, is_settled
from sharpwatch.daemon.records import Changes, Decision, Incident, LrPlan, Revision
from sharpwatch.errors import OperatorError

KEPT = 1_000  # settled decisions in memory that changed nothing; the journal has all
Derived = TypeVar("Derived")


class DecisionLog:
    """The decisions, LR revisions and plans of one run.

    It forgets the oldest of those decisions that are settled, gave no revision and were not applied, such as those that
    a guard refused: what others did is still needed to know what is in force.

    The outcome of a decision changes by events alone, as `transitions.TRANSITIONS` has them. `take` returns what
    changed since it was last called.

    Args:
        run: The run's name.
        blocks: The run's block types.
    """

    def __init__(self, run: str, blocks: Iterable[str]) -> None:
        self.run = run
        self.blocks = tuple(blocks)
        self._decisions: dict[str, Decision] = {}
        self._revisions: list[Revision] = []
        self.open: dict[str, None] = {}  # ids of decisions whose outcome may still change
        self._idle: dict[str, None] = {}  # ids of decisions that are settled and changed nothing
        self.newest_revision = 0  # its number
        self.changed = False  # whether `take` has something to return
        self.version = 0  # goes up with every change
        self._changed_incidents: dict[str, Incident] = {}
        self._changed_decisions: dict[str, None] = {}
        self._changed_revisions: dict[int, None] = {}
        self._commands: dict[str, None] = {}
        self._transitions: list[Decision] = []
        self._plans: dict[str, LrPlan] = {}  # by id, oldest first
        self.plan: LrPlan | None = None  # the newest of them
        self._changed_plans: list[LrPlan] = []
        self._derived: dict[str, Any] = {}  # what follows from the records of one version
        self._derived_at = 0

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """The decisions, oldest first: all that ever changed something, and the newest of the others."""
        return self._derive("decisions", lambda: tuple(self._decisions.values()))

    @property
    def changed_at(self) -> tuple[int, ...]:
        """The steps at which decisions came in force, ascending; renewals change nothing."""
        return self._derive("changed at", self._changed_at)

    def _changed_at(self) -> tuple[int, ...]:
        made = (one for one in self._decisions.values() if not one.is_renewal)
        return tuple(sorted(one.applied_step for one in made if one.applied_step is not None))

    @property
    def revisions(self) -> tuple[Revision, ...]:
        """All revisions, numbered from 1 without a gap."""
        return self._derive("revisions", lambda: tuple(self._revisions))

    @property
    def plans(self) -> tuple[LrPlan, ...]:
        """All plans, oldest first; at most the newest one goes on."""
        return tuple(self._plans.values())

    @property
    def multipliers(self) -> dict[str, float]:
        """The multipliers in force or sent to the trainer, of every block of the run."""
        return self.set_before(len(self._revisions) + 1)

    @property
    def intervals(self) -> Mapping[str, int]:
        """The update intervals in force or sent to the trainer, of blocks that rest at some steps."""
        return self.intervals_before(len(self._revisions) + 1)

    def restore(
        self, decisions: Iterable[Decision], revisions: Sequence[Revision], plans: Iterable[LrPlan] = ()
    ) -> None:
        """Starts from journalled records."""
        self._plans = {plan.id: plan for plan in plans}
        self.plan = next(reversed(self._plans.values()), None)
        self._decisions = {decision.id: decision for decision in decisions}
        self._revisions = sorted(revisions, key=lambda revision: revision.revision)
        self.newest_revision = self._revisions[-1].revision if self._revisions else 0
        self.open = {one.id: None for one in self._decisions.values() if not is_settled(one)}
        self._idle = dict.fromkeys(one.id for one in self._decisions.values() if _is_idle(one))
        self._forget()
        self.version += 1

    def unsettled(self) -> tuple[Decision, ...]:
        """Returns the decisions whose outcome may still change."""
        return tuple(self._decisions[identity] for identity in self.open)

    def is_due(self, step: int) -> bool:
        """Returns whether a command is to take effect at any moment; one planned for later than `step` is not."""
        return any(made.apply_at_step <= step for made in self.under_way())

    def under_way(self) -> Iterator[Decision]:
        """Returns the decisions whose command the trainer has not answered yet."""
        return (made for made in self.unsettled() if made.outcome in UNDER_WAY)

    def find(self, identity: str) -> Decision:
        """Returns the decision with the id `identity`.

        Raises:
            OperatorError: The run has no such decision.
        """
        if identity not in self._decisions:
            raise OperatorError(f"run {self.run} has no decision {identity}")
        return self._decisions[identity]

    def note_incidents(self, incidents: Iterable[Incident]) -> None:
        """Has `alerts` journalled."""
        self._changed_incidents.update((incident.id, incident) for incident in incidents)
        self.changed = self.changed or bool(self._changed_incidents)

    def put_plan(self, plan: LrPlan) -> LrPlan:
        """Records a new plan, or a new state of one."""
        self._plans[plan.id] = self.plan = plan
        self._changed_plans.append(plan)
        self.changed = True
        return plan

    def add(self, draft: Decision, event: Event) -> Decision:
        """Records a new decision.

        Args:
            draft: The decision, with the outcome "draft".
            event: What becomes of it first.

        Returns:
            The decision with its outcome.

        Raises:
            ValueError: `event` is not possible for a draft.
        """
        return self._put(replace(draft, outcome=advance(draft.outcome, event)))

    def advance(self, decision: Decision, event: Event, **changes: Any) -> Decision:
        """Records what happened to a decision.

        Args:
            decision: The decision. Its newest state in the log counts; this one may be older.
            event: What happened. It is ignored for a decision that is final, because answers and alerts can come late.
            **changes: New values of other fields than `outcome`.

        Returns:
            The decision as it is now.

        Raises:
            ValueError: `event` is not possible for the decision's outcome.
        """
        current = self._decisions[decision.id]
        if current.outcome in FINAL:
            return current
        return self._put(replace(current, outcome=advance(current.outcome, event), **changes))

    def note(self, decision: Decision, **changes: Any) -> Decision:
        """Records new values of other fields than the outcome; returns the decision as it is now."""
        return self._put(replace(self._decisions[decision.id], **changes))

    def send(self, decision: Decision) -> None:
        """Has the command of `decision` sent once it is journalled."""
        self._commands[decision.id] = None
        self.changed = True

    def revise(  # noqa: PLR0913  whose set it is, and what it was made from
        self, decision: Decision, *, author: str, reason: str, now: float, undoes: int = 0, base: int | None = None
    ) -> Decision:
        """Gives the multipliers and update intervals of a decision the next revision number.

        Args:
            decision: The decision that puts them in force.
            author: Who asked for them.
            reason: Why.
            now: Unix seconds.
            undoes: The revision that this one takes back; 0 for none.
            base: The revision whose set it was made from; None for the one in force or under way.

        Returns:
            The decision with its revision number.
        """
        number = len(self._revisions) + 1
        base = self.number_before(number) if base is None else base
        update_every = self.intervals_before(number) if decision.update_every is None else decision.update_every
        self.newest_revision = number
        self._revisions.append(
            Revision(
                *(self.run, number, dict(decision.multipliers), author, reason, now, decision.id),
                undoes=undoes,
                update_every=dict(update_every),
                base=base,
            )
        )
        self._changed_revisions[number] = None
        return self._put(replace(self._decisions[decision.id], revision=number, update_every=dict(update_every)))

    def applied(self, number: int, step: int) -> None:
        """Records that the trainer put revision `number` in force at `step`."""
        revision = self._revisions[number - 1]
        if revision.applied_step is None:
            self._revisions[number - 1] = replace(revision, applied_step=step)
            self.version += 1
            self._changed_revisions[number] = None
            self.changed = True

    def took_effect(self, revision: Revision) -> bool:
        """Returns whether `revision` was ever in force, or is under way and nobody has asked to cancel it."""
        made = self._decisions[revision.decision_id]
        return revision.applied_step is not None or (made.outcome in UNDER_WAY and not made.cancelled_by)

    def effective(self) -> tuple[Revision, ...]:
        """Returns the revisions that took effect, oldest first: also those that only later sets brought with them.

        A command can come to nothing after another set was made from its own, and that one be applied.
        """
        return self._derive("effective", self._effective)

    def _effective(self) -> tuple[Revision, ...]:
        found: list[Revision] = []
        brought: set[int] = set()
        for revision in reversed(self._revisions):
            if revision.revision in brought or self.took_effect(revision):
                found.append(revision)
                brought.add(revision.base)
        return tuple(reversed(found))

    @property
    def number_in_force(self) -> int:
        """The number of the revision in force or under way; 0 for none."""
        return self._derive("in force", lambda: self._number_before(len(self._revisions) + 1))

    def number_before(self, number: int) -> int:
        """Returns the number of the revision in force before revision `number`; 0 for none."""
        return self.number_in_force if number > len(self._revisions) else self._number_before(number)

    def _number_before(self, number: int) -> int:
        earlier = (self._revisions[each] for each in range(number - 2, -1, -1))
        return next((one.revision for one in earlier if self.took_effect(one)), 0)

    def _derive(self, name: str, make: Callable[[], Derived]) -> Derived:
        """What follows from the records: made once, as it is asked for at every step and rarely changes."""
        if self._derived_at != self.version:
            self._derived, self._derived_at = {}, self.version
        if name not in self._derived:
            self._derived[name] = make()
        found: Derived = self._derived[name]
        return found

    def set_before(self, number: int) -> dict[str, float]:
        """Returns the multipliers in force before revision `number`."""
        base = self.number_before(number)
        return self.complete(self._revisions[base - 1].multipliers if base else {})

    def intervals_before(self, number: int) -> Mapping[str, int]:
        """Returns the update intervals in force before revision `number`, of blocks that rest at some steps."""
        base = self.number_before(number)
        return self._revisions[base - 1].update_every if base else {}

    def complete(self, multipliers: Mapping[str, float]) -> dict[str, float]:
        """Returns `multipliers` with every block of the run; a block that is not named has 1."""
        return {block: multipliers.get(block, 1.0) for block in self.blocks}

    def take(self) -> Changes:
        """Returns what changed since the last call."""
        changes = Changes(
            incidents=tuple(self._changed_incidents.values()),
            decisions=tuple(self._decisions[identity] for identity in self._changed_decisions),
            revisions=tuple(self._revisions[number - 1] for number in self._changed_revisions),
            commands=tuple(self._decisions[identity] for identity in self._commands),
            transitions=tuple(self._transitions),
            plans=tuple(self._changed_plans),
        )
        for changed in (self._changed_incidents, self._changed_decisions, self._changed_revisions, self._commands):
            changed.clear()
        self._transitions.clear()
        self._changed_plans.clear()
        self.changed = False
        self._forget()
        return changes

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Takes back at the end of a `with` all that was recorded in it, so that a request can be tried.

        The version stays ahead: what somebody has made of a version in the trial must not pass for that of a later one.
        """
        # The records are immutable, so that their containers are all there is to copy.
        before = {name: value.copy() if isinstance(value, dict | list) else value for name, value in vars(self).items()}
        try:
            yield
        finally:
            vars(self).update({**before, "version": self.version + 1})

    def _put(self, decision: Decision) -> Decision:
        if _audited(decision) != _audited(self._decisions.get(decision.id)):
            self._transitions.append(decision)
        self._decisions[decision.id] = decision
        self._changed_decisions[decision.id] = None
        self.changed = True
        self.version += 1
        if is_settled(decision):
            self.open.pop(decision.id, None)
        else:
            self.open[decision.id] = None
        if _is_idle(decision):
            self._idle[decision.id] = None
        return decision

    def _forget(self) -> None:
        """Forgets the oldest decisions that are settled and changed nothing, beyond those that are kept."""
        while len(self._idle) > KEPT:
            identity = next(iter(self._idle))
            del self._idle[identity], self._decisions[identity]
            self.version += 1


def _is_idle(decision: Decision) -> bool:
    return is_settled(decision) and not decision.revision and decision.applied_step is None


def _audited(decision: Decision | None) -> tuple[str, ...]:
    """The fields whose changes the journal keeps."""
    return () if decision is None else (decision.outcome, decision.detail, decision.author, decision.reason)
