"""What the journal says of runs that the daemon does not hold: questions for `Store.ask`, one function each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Table, func, select, text

from sharpwatch.common.shards import every_run
from sharpwatch.daemon.records import Decision, Incident, LrPlan, Revision
from sharpwatch.daemon.storage import tables
from sharpwatch.daemon.storage.loading import stored_attempt
from sharpwatch.daemon.storage.records_json import decision_of, incident_of, plan_of, revision_of
from sharpwatch.daemon.storage.schema import CLOSED, ModeRow, StoredAttempt

_NEWEST = 8  # samples among which a list finds a run's newest loss


@dataclass(frozen=True, slots=True)
class RunOutline:
    """A run's newest attempt, in few words.

    Attributes:
        run: The run's name.
        position: Grows with each attempt that begins; runs are listed by it.
        seen_at: When its newest sample came, or else its Hello, in unix seconds.
        closed: Whether it said farewell.
    """

    run: str
    position: int
    seen_at: float
    closed: bool


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a list of runs shows of one.

    Attributes:
        run: The run's name.
        attempt: Its newest attempt.
        attempts: How many it has had.
        samples: The payloads of its newest samples, newest first: the last of an attempt has no loss.
        mode: The mode that was set for it, if any.
        open_incidents: How many.
        decisions: Its decisions where it has revisions, which say what is in force.
        revisions: Its revisions.
    """

    run: str
    attempt: StoredAttempt
    attempts: int
    samples: tuple[bytes, ...]
    mode: ModeRow | None
    open_incidents: int
    decisions: tuple[Decision, ...]
    revisions: tuple[Revision, ...]


def outlines(connection: Connection, of: Callable[[str], bool] = every_run) -> tuple[RunOutline, ...]:
    """The runs whose names `of` is true of, in the order in which their newest attempts began."""
    begun = tables.attempts.c
    newest = select(func.max(begun.id)).group_by(begun.run)
    query = select(begun.run, begun.id, begun.seen_at, begun.closed).where(begun.id.in_(newest)).order_by(begun.id)
    return tuple(
        RunOutline(run, position, seen_at, closed == CLOSED)
        for run, position, seen_at, closed in connection.execute(query)
        if of(run)
    )


def with_unseen_incidents(connection: Connection) -> frozenset[str]:
    """The runs with an open incident of severity critical that nobody has acknowledged."""
    # What still waits for somebody: `/metrics` shows it for as long.
    return frozenset(
        each.run
        for each in _open_incidents(connection)
        if each.severity == "critical" and not each.acknowledged and each.foreign is None
    )


def page(connection: Connection, prefix: str, before: int, limit: int) -> tuple[tuple[str, int], ...]:
    """Names of runs, and their positions, those first whose newest attempt began last.

    Args:
        connection: The journal.
        prefix: How the names begin.
        before: The position of the last run of the page before; 0 for the first page.
        limit: How many at most.
    """
    of, newest = tables.attempts.c, func.max(tables.attempts.c.id)
    query = select(of.run, newest).where(_begins(of.run, prefix)).group_by(of.run)
    query = query.having(newest < before) if before else query
    rows = connection.execute(query.order_by(newest.desc()).limit(limit))
    return tuple((run, position) for run, position in rows)


def summary(connection: Connection, run: str) -> RunSummary | None:
    """What a list shows of a run; None where there is none of that name."""
    attempts, samples, modes = tables.attempts.c, tables.samples.c, tables.modes.c
    of_run = select(tables.attempts).where(attempts.run == run)
    newest = connection.execute(of_run.order_by(attempts.id.desc()).limit(1)).first()
    if newest is None:
        return None
    payloads = select(samples.payload).where(samples.run == run).order_by(samples.id.desc()).limit(_NEWEST)
    of_mode = select(modes.run, modes.mode, modes.author, modes.reason, modes.made_at).where(modes.run == run)
    mode = connection.execute(of_mode.order_by(modes.id.desc()).limit(1)).first()
    revisions = _records(connection, tables.revisions, run, by="revision")
    made = _records(connection, tables.decisions, run, by="rowid") if revisions else ()
    return RunSummary(
        run,
        stored_attempt(newest),
        _count(connection, tables.attempts, run),
        tuple(connection.execute(payloads).scalars()),
        ModeRow(*mode) if mode else None,
        len(open_incidents(connection, run)),
        tuple(map(decision_of, made)),
        tuple(map(revision_of, revisions)),
    )


def summaries(connection: Connection, runs: Iterable[str]) -> tuple[RunSummary, ...]:
    """What a list shows of these runs; a name that the journal does not have is left out."""
    return tuple(found for run in runs if (found := summary(connection, run)) is not None)


@dataclass(frozen=True, slots=True)
class RunSize:
    """How much the journal has of a run."""

    attempts: int
    samples: int
    incidents: int
    decisions: int


def size(connection: Connection, run: str) -> RunSize | None:
    """How much the journal has of a run; None for nothing."""
    of = (tables.attempts, tables.samples, tables.alerts, tables.decisions)
    found = RunSize(*(_count(connection, table, run) for table in of))
    return found if found.attempts else None


def open_incidents(connection: Connection, run: str) -> tuple[Incident, ...]:
    """The open incidents of a run."""
    return tuple(_open_incidents(connection, tables.alerts.c.run == run))


def attempt(connection: Connection, identity: str) -> tuple[str, StoredAttempt] | None:
    """An attempt and the name of its run; None where the journal has none of that id."""
    row = connection.execute(select(tables.attempts).where(tables.attempts.c.attempt == identity)).first()
    return None if row is None else (row.run, stored_attempt(row))


def released_at(connection: Connection, run: str) -> float:
    """When an operator last released a run, in unix seconds; minus infinity for never."""
    of = tables.requests.c
    released = (of.run == run) & (of.action == "release") & (of.outcome == "released")
    found = connection.execute(select(func.max(of.at)).where(released)).scalar_one()
    return -math.inf if found is None else found


def names_in_hellos(connection: Connection, word: str, limit: int) -> tuple[str, ...]:
    """The runs whose Hello has `word` somewhere, such as the name of a data order, the newest first."""
    of = tables.attempts.c
    has = "instr(hello, :word) > 0" if connection.dialect.name == "sqlite" else "position(:word in hello) > 0"
    query = select(of.run).where(text(has).bindparams(word=word.encode())).group_by(of.run)
    return tuple(connection.execute(query.order_by(func.max(of.id).desc()).limit(limit)).scalars())


def decisions_that_begin(connection: Connection, prefix: str, limit: int) -> tuple[tuple[str, str], ...]:
    """The run and the id of decisions whose id begins with `prefix`."""
    return _that_begin(connection, tables.decisions, prefix, limit)


def incidents_that_begin(connection: Connection, prefix: str, limit: int) -> tuple[tuple[str, str], ...]:
    """The run and the id of incidents whose id begins with `prefix`."""
    return _that_begin(connection, tables.alerts, prefix, limit)


def newest_decisions(connection: Connection, run: str, limit: int, until: float | None = None) -> tuple[Decision, ...]:
    """The newest decisions of a run, or of all runs for an empty name, the newest first.

    Args:
        connection: The journal.
        run: The run.
        limit: How many at most.
        until: In unix seconds, when the newest of them was made; None for no matter when.
    """
    of = tables.decisions.c
    query = select(of.record).order_by(of.made_at.desc(), of.rowid.desc()).limit(limit)
    query = query.where(of.run == run) if run else query
    query = query if until is None else query.where(of.made_at <= until)
    return tuple(map(decision_of, connection.execute(query).scalars()))


def plans(connection: Connection, since: float) -> tuple[LrPlan, ...]:
    """The plans of all runs that were made at unix seconds `since` or later, oldest first."""
    of = tables.plans.c
    query = select(of.record).where(of.made_at >= since).order_by(of.rowid)
    return tuple(map(plan_of, connection.execute(query).scalars()))


def told(connection: Connection, ids: Sequence[str]) -> tuple[tuple[Incident, ...], tuple[Decision, ...]]:
    """The incidents and decisions of these ids."""

    def records(table: Table) -> Iterator[str]:
        for each in ids:
            yield from connection.execute(select(table.c.record).where(table.c.id == each)).scalars()

    return tuple(map(incident_of, records(tables.alerts))), tuple(map(decision_of, records(tables.decisions)))


def with_foreign_alert(connection: Connection, fingerprint: str) -> tuple[str, ...]:
    """The runs on which the alert of another system with that fingerprint fires."""
    fires = (
        each.run
        for each in _open_incidents(connection)
        if each.foreign is not None and each.foreign.fingerprint == fingerprint
    )
    return tuple(dict.fromkeys(fires))


def _open_incidents(connection: Connection, *where: ColumnElement[bool]) -> Iterator[Incident]:
    # By the text first, since to decode every incident there ever was takes long.
    of = tables.alerts.c
    query = select(of.record).where(of.record.like('%"active": true%'), *where)
    for record in connection.execute(query).scalars():
        incident = incident_of(record)
        if incident.active:
            yield incident


def _begins(column: ColumnElement[str], prefix: str) -> ColumnElement[bool]:
    # Not LIKE, to which letters in either case are the same in SQLite.
    return func.substr(column, 1, len(prefix)) == prefix


def _that_begin(connection: Connection, table: Table, prefix: str, limit: int) -> tuple[tuple[str, str], ...]:
    query = select(table.c.run, table.c.id).where(_begins(table.c.id, prefix)).order_by(table.c.id).limit(limit)
    return tuple((run, identity) for run, identity in connection.execute(query))


def _records(connection: Connection, table: Table, run: str, *, by: str) -> Sequence[str]:
    return connection.execute(select(table.c.record).where(table.c.run == run).order_by(table.c[by])).scalars().all()


def _count(connection: Connection, table: Table, run: str) -> Any:
    return connection.execute(select(func.count()).select_from(table).where(table.c.run == run)).scalar_one()
