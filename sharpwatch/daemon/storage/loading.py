"""Reads records out of the tables of the journal, also as earlier versions wrote them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Select, Table, select

from sharpwatch.daemon.records import Checkpoint, Silence
from sharpwatch.daemon.storage import tables
from sharpwatch.daemon.storage.records_json import decision_of, incident_of, plan_of, revision_of
from sharpwatch.daemon.storage.schema import (
    CLOSED,
    KILLED,
    BaselinesRow,
    ModeRow,
    ReferenceRow,
    SampleRow,
    StoredAttempt,
    StoredRun,
)
from sharpwatch.daemon.storage.sqlite_file import Commits


def known(value: float | None) -> float:
    """Returns a value of an estimate as it was before it was written."""
    return math.nan if value is None else value


def newest_rows(table: Table, limit: int, *where: Any) -> Select[Any]:
    """Selects the newest `limit` rows of a table, oldest first."""
    newest = select(table).where(*where).order_by(table.c.id.desc()).limit(limit).subquery()
    return select(newest).order_by(newest.c.id)


def load_commits(connection: Connection, shard: int) -> Commits:
    """Returns which journal it is, and how many commits it has by the daemon whose own shard is `shard`."""
    of = tables.commits.c
    return Commits(*connection.execute(select(of.journal, of.number).where(of.shard == shard)).one())


def load_silences(connection: Connection) -> tuple[Silence, ...]:
    """Returns all silences, oldest first."""
    rows = connection.execute(select(tables.silences.c.record).order_by(tables.silences.c.rowid)).scalars()
    return tuple(Silence(**json.loads(record)) for record in rows)


def stored_attempt(row: Any) -> StoredAttempt:
    """Returns an attempt from its row."""
    ended = row.closed == CLOSED, row.closed == KILLED
    return StoredAttempt(row.attempt, row.hello, row.acknowledged, row.seen_at, *ended)


def load_run(connection: Connection, run: str, samples: int) -> StoredRun:
    """Returns all records of a run and its newest `samples` samples."""

    def rows(table: Table, *columns: str, by: str = "id") -> Sequence[Any]:
        query = select(*(table.c[name] for name in columns)).where(table.c.run == run).order_by(table.c[by])
        return connection.execute(query).all()

    def newest(table: Table, *columns: str) -> Any:
        query = select(*(table.c[name] for name in columns)).where(table.c.run == run)
        return connection.execute(query.order_by(table.c.id.desc()).limit(1)).first()

    attempts = rows(tables.attempts, "attempt", "hello", "acknowledged", "seen_at", "closed")
    kept = connection.execute(newest_rows(tables.samples, samples, tables.samples.c.run == run))
    baselines = rows(tables.baselines, "attempt", "sequence", "state", by="run")
    reference = newest(tables.run_references, "name", "losses", "author", "reason", "made_at")
    mode = newest(tables.modes, "run", "mode", "author", "reason", "made_at")
    alerts = tables.alerts.c
    made, entered = tables.decisions.c, tables.transitions.c
    outcomes = (
        select(entered.decision, entered.outcome)
        .join(tables.decisions, made.id == entered.decision)
        .where(made.run == run)
        .order_by(entered.id)
    )
    incidents = select(alerts.record).where(alerts.run == run).order_by(alerts.first_step, alerts.rowid)
    return StoredRun(
        run=run,
        attempts=tuple(stored_attempt(row) for row in attempts),
        samples=tuple(
            SampleRow(run, row.attempt, row.sequence, row.step, row.payload, received_at=0.0) for row in kept
        ),
        incidents=tuple(map(incident_of, connection.execute(incidents).scalars())),
        decisions=tuple(decision_of(record) for (record,) in rows(tables.decisions, "record", by="rowid")),
        revisions=tuple(revision_of(record) for (record,) in rows(tables.revisions, "record", by="revision")),
        checkpoints=tuple(Checkpoint(*values) for values in rows(tables.checkpoints, "step", "uri", by="rowid")),
        mode=ModeRow(*mode) if mode else None,
        baselines=BaselinesRow(run, *baselines[0]) if baselines else None,
        reference=ReferenceRow(run, *reference) if reference and reference[0] else None,
        plans=tuple(plan_of(record) for (record,) in rows(tables.plans, "record", by="rowid")),
        outcomes=tuple((decision, outcome) for decision, outcome in connection.execute(outcomes)),
    )
