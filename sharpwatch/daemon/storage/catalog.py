"""What the journal says of runs that the daemon does not hold: questions for `Store.ask`, one function each."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sharpwatch.daemon.records import Decision, Incident, LrPlan, Revision
from sharpwatch.daemon.storage.records_json import decision_of, incident_of, plan_of, revision_of
from sharpwatch.daemon.storage.schema import CLOSED, KILLED, ModeRow, StoredAttempt

_NEWEST = 8  # samples among which a list finds a run's newest loss
# What still waits for somebody: `/metrics` shows it for as long.
_UNSEEN_CRITICAL = (
    "json_extract(record, '$.active') AND json_extract(record, '$.severity') = 'critical' "
    "AND coalesce(json_extract(record, '$.acknowledged'), '') = '' AND json_extract(record, '$.foreign') IS NULL"
)


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


def outlines(connection: sqlite3.Connection) -> tuple[RunOutline, ...]:
    """All runs, in the order in which their newest attempts began."""
    query = (
        "SELECT run, id, seen_at, closed FROM attempts WHERE id IN (SELECT max(id) FROM attempts GROUP BY run) "
        "ORDER BY id"
    )
    rows = connection.execute(query)
    return tuple(RunOutline(run, position, seen_at, closed == CLOSED) for run, position, seen_at, closed in rows)


def with_unseen_incidents(connection: sqlite3.Connection) -> frozenset[str]:
    """The runs with an open incident of severity critical that nobody has acknowledged."""
    return frozenset(run for (run,) in connection.execute(f"SELECT DISTINCT run FROM alerts WHERE {_UNSEEN_CRITICAL}"))  # noqa: S608  a constant


def page(connection: sqlite3.Connection, prefix: str, before: int, limit: int) -> tuple[tuple[str, int], ...]:
    """Names of runs, and their positions, those first whose newest attempt began last.

    Args:
        connection: The journal.
        prefix: How the names begin.
        before: The position of the last run of the page before; 0 for the first page.
        limit: How many at most.
    """
    query = (
        "SELECT run, max(id) AS newest FROM attempts WHERE run >= ? AND substr(run, 1, ?) = ? GROUP BY run "
        "HAVING ? = 0 OR newest < ? ORDER BY newest DESC LIMIT ?"
    )
    return tuple(connection.execute(query, [prefix, len(prefix), prefix, before, before, limit]))


def summary(connection: sqlite3.Connection, run: str) -> RunSummary | None:
    """What a list shows of a run; None where there is none of that name."""
    rows = connection.execute
    newest = rows(
        "SELECT attempt, hello, acknowledged, seen_at, closed FROM attempts WHERE run = ? ORDER BY id DESC LIMIT 1",
        [run],
    ).fetchone()
    if newest is None:
        return None
    (attempts,) = rows("SELECT count(*) FROM attempts WHERE run = ?", [run]).fetchone()
    samples = rows("SELECT payload FROM samples WHERE run = ? ORDER BY id DESC LIMIT ?", [run, _NEWEST])
    mode = rows(
        "SELECT run, mode, author, reason, made_at FROM modes WHERE run = ? ORDER BY id DESC LIMIT 1", [run]
    ).fetchone()
    (active,) = rows("SELECT count(*) FROM alerts WHERE run = ? AND json_extract(record, '$.active')", [run]).fetchone()
    revisions = rows("SELECT record FROM revisions WHERE run = ? ORDER BY revision", [run]).fetchall()
    made = rows("SELECT record FROM decisions WHERE run = ? ORDER BY rowid", [run]) if revisions else ()
    attempt, hello, acknowledged, seen_at, closed = newest
    return RunSummary(
        run,
        StoredAttempt(attempt, hello, acknowledged, seen_at, closed == CLOSED, closed == KILLED),
        attempts,
        tuple(payload for (payload,) in samples),
        ModeRow(*mode) if mode else None,
        active,
        tuple(decision_of(record) for (record,) in made),
        tuple(revision_of(record) for (record,) in revisions),
    )


def summaries(connection: sqlite3.Connection, runs: Iterable[str]) -> tuple[RunSummary, ...]:
    """What a list shows of these runs; a name that the journal does not have is left out."""
    return tuple(found for run in runs if (found := summary(connection, run)) is not None)


@dataclass(frozen=True, slots=True)
class RunSize:
    """How much the journal has of a run."""

    attempts: int
    samples: int
    incidents: int
    decisions: int


def size(connection: sqlite3.Connection, run: str) -> RunSize | None:
    """How much the journal has of a run; None for nothing."""
    counts = (
        connection.execute(f"SELECT count(*) FROM {table} WHERE run = ?", [run]).fetchone()[0]  # noqa: S608  names of ours
        for table in ("attempts", "samples", "alerts", "decisions")
    )
    found = RunSize(*counts)
    return found if found.attempts else None


def open_incidents(connection: sqlite3.Connection, run: str) -> tuple[Incident, ...]:
    """The open incidents of a run."""
    query = "SELECT record FROM alerts WHERE run = ? AND json_extract(record, '$.active')"
    return tuple(incident_of(record) for (record,) in connection.execute(query, [run]))


def attempt(connection: sqlite3.Connection, identity: str) -> tuple[str, StoredAttempt] | None:
    """An attempt and the name of its run; None where the journal has none of that id."""
    query = "SELECT run, attempt, hello, acknowledged, seen_at, closed FROM attempts WHERE attempt = ?"
    row = connection.execute(query, [identity]).fetchone()
    if row is None:
        return None
    run, name, hello, acknowledged, seen_at, closed = row
    return run, StoredAttempt(name, hello, acknowledged, seen_at, closed == CLOSED, closed == KILLED)


def names_in_hellos(connection: sqlite3.Connection, text: str, limit: int) -> tuple[str, ...]:
    """The runs whose Hello has `text` somewhere, such as the name of a data order, the newest first."""
    query = "SELECT run FROM attempts WHERE instr(hello, ?) GROUP BY run ORDER BY max(id) DESC LIMIT ?"
    return tuple(run for (run,) in connection.execute(query, [text.encode(), limit]))


def decisions_that_begin(connection: sqlite3.Connection, prefix: str, limit: int) -> tuple[tuple[str, str], ...]:
    """The run and the id of decisions whose id begins with `prefix`."""
    query = "SELECT run, id FROM decisions WHERE id >= ? AND substr(id, 1, ?) = ? ORDER BY id LIMIT ?"
    return tuple(connection.execute(query, [prefix, len(prefix), prefix, limit]))


def incidents_that_begin(connection: sqlite3.Connection, prefix: str, limit: int) -> tuple[tuple[str, str], ...]:
    """The run and the id of incidents whose id begins with `prefix`."""
    query = "SELECT run, id FROM alerts WHERE id >= ? AND substr(id, 1, ?) = ? ORDER BY id LIMIT ?"
    return tuple(connection.execute(query, [prefix, len(prefix), prefix, limit]))


def newest_decisions(connection: sqlite3.Connection, limit: int) -> tuple[Decision, ...]:
    """The newest decisions of all runs, the newest first."""
    query = "SELECT record FROM decisions ORDER BY made_at DESC, rowid DESC LIMIT ?"
    return tuple(decision_of(record) for (record,) in connection.execute(query, [limit]))


def plans(connection: sqlite3.Connection, since: float) -> tuple[LrPlan, ...]:
    """The plans of all runs that were made at unix seconds `since` or later, oldest first."""
    query = "SELECT record FROM plans WHERE made_at >= ? ORDER BY rowid"
    return tuple(plan_of(record) for (record,) in connection.execute(query, [since]))


def told(connection: sqlite3.Connection, ids: Sequence[str]) -> tuple[tuple[Incident, ...], tuple[Decision, ...]]:
    """The incidents and decisions of these ids."""
    rows = connection.execute
    incidents = (rows("SELECT record FROM alerts WHERE id = ?", [each]).fetchone() for each in ids)
    decisions = (rows("SELECT record FROM decisions WHERE id = ?", [each]).fetchone() for each in ids)
    return (
        tuple(incident_of(row[0]) for row in incidents if row),
        tuple(decision_of(row[0]) for row in decisions if row),
    )


def with_foreign_alert(connection: sqlite3.Connection, fingerprint: str) -> tuple[str, ...]:
    """The runs on which the alert of another system with that fingerprint fires."""
    query = (
        "SELECT DISTINCT run FROM alerts WHERE json_extract(record, '$.active') "
        "AND json_extract(record, '$.foreign.fingerprint') = ?"
    )
    return tuple(run for (run,) in connection.execute(query, [fingerprint]))
