"""Reads records out of the tables of the journal, also as earlier versions wrote them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Select, Table, select

from sharpwatch.daemon.records import (
    CAUSES,
    Checkpoint,
    Decision,
    ForeignAlert,
    Incident,
    LrPlan,
    Revision,
    RollbackPlan,
    Silence,
)
from sharpwatch.daemon.storage import tables
from sharpwatch.daemon.storage.schema import (
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


def _decision(record: str) -> Decision:
    values: dict[str, Any] = json.loads(record)
    plan = values.pop("rollback")
    if plan is not None:
        plan = RollbackPlan(**{**plan, "checkpoint": Checkpoint(**plan["checkpoint"])})
    return Decision(**values, rollback=plan)


def _incident(record: str) -> Incident:
    values: dict[str, Any] = json.loads(record)
    if "cause" not in values:  # an alert of version 0.1, of one detector
        evidence, name = values.pop("evidence"), values["name"]
        values |= {"names": [name], "cause": CAUSES[name], "evidence": [evidence], "onset": values["first_step"]}
        values["layer_blocks"] = values["blocks"]
    if values.get("foreign") is not None:
        values["foreign"] = ForeignAlert(**values["foreign"])
    lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return Incident(**{**values, **lists})


def _plan(record: str) -> LrPlan:
    values: dict[str, Any] = json.loads(record)
    lists = {"stages": tuple(map(tuple, values["stages"])), "decisions": tuple(values["decisions"])}
    return LrPlan(**{**values, **lists})


def newest_rows(table: Table, limit: int, *where: Any) -> Select[Any]:
    """Selects the newest `limit` rows of a table, oldest first."""
    newest = select(table).where(*where).order_by(table.c.id.desc()).limit(limit).subquery()
    return select(newest).order_by(newest.c.id)


def load_commits(connection: Connection) -> Commits:
    """Returns which journal it is, and how many commits it has."""
    return Commits(*connection.execute(select(tables.commits)).one())


def load_silences(connection: Connection) -> tuple[Silence, ...]:
    """Returns all silences, oldest first."""
    rows = connection.execute(select(tables.silences.c.record).order_by(tables.silences.c.rowid)).scalars()
    return tuple(Silence(**json.loads(record)) for record in rows)


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
    incidents = select(alerts.record).where(alerts.run == run).order_by(alerts.first_step, alerts.rowid)
    return StoredRun(
        run=run,
        attempts=tuple(
            StoredAttempt(row.attempt, row.hello, row.acknowledged, row.seen_at, bool(row.closed)) for row in attempts
        ),
        samples=tuple(
            SampleRow(run, row.attempt, row.sequence, row.step, row.payload, received_at=0.0) for row in kept
        ),
        incidents=tuple(map(_incident, connection.execute(incidents).scalars())),
        decisions=tuple(_decision(record) for (record,) in rows(tables.decisions, "record", by="rowid")),
        revisions=tuple(
            Revision(**json.loads(record)) for (record,) in rows(tables.revisions, "record", by="revision")
        ),
        checkpoints=tuple(Checkpoint(*values) for values in rows(tables.checkpoints, "step", "uri", by="rowid")),
        mode=ModeRow(*mode) if mode else None,
        baselines=BaselinesRow(run, *baselines[0]) if baselines else None,
        reference=ReferenceRow(run, *reference) if reference and reference[0] else None,
        plans=tuple(_plan(record) for (record,) in rows(tables.plans, "record", by="rowid")),
    )
