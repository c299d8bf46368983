"""The statements by which the journal is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BindParameter,
    Dialect,
    Insert,
    Table,
    UpdateBase,
    bindparam,
    case,
    delete,
    insert,
    null,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from sharpwatch.daemon.storage import tables

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Compiled:
    """A statement as the driver takes it.

    Attributes:
        text: The statement.
        order: The order of its parameters; None where it takes them by name.
    """

    text: str
    order: Sequence[str] | None


def compiled_writes(dialect: Dialect) -> dict[str, Compiled]:
    """Returns the statements by their names.

    Compiled once and for all: over a small row that takes longer than SQLite to write it.

    Args:
        dialect: That of the database.
    """
    return {name: _compiled(statement, dialect) for name, statement in _writes(dialect).items()}


def _compiled(statement: UpdateBase, dialect: Dialect) -> Compiled:
    columns = None
    if isinstance(statement, Insert):
        # The database numbers rows by itself, and an attempt has no samples at first.
        columns = [
            column.name
            for column in tables.metadata.tables[statement.table.name].columns
            if column is not column.table.autoincrement_column
            and column.name not in {"rowid", "acknowledged", "closed"}
        ]
    made = statement.compile(dialect=dialect, column_keys=columns)
    return Compiled(str(made), made.positiontup if made.positional else None)


def _on_conflict(dialect: Dialect, table: Table) -> sqlite.Insert | postgresql.Insert:
    return sqlite.insert(table) if dialect.name == "sqlite" else postgresql.insert(table)


def _upsert(dialect: Dialect, table: Table, *changing: str, key: str = "id") -> UpdateBase:
    """Inserts rows, or updates the columns `changing` of those that are there; the order of rows stays."""
    into = _on_conflict(dialect, table)
    values = {column: into.excluded[column] for column in changing}
    return into.on_conflict_do_update(index_elements=[key], set_=values)


def _once(dialect: Dialect, table: Table, *key: str) -> UpdateBase:
    """Inserts rows that are not there; the first one of a key stays."""
    # With the key named: without, rows that violate another constraint would be dropped too, and so acknowledged.
    return _on_conflict(dialect, table).on_conflict_do_nothing(index_elements=key)


def _writes(dialect: Dialect) -> dict[str, UpdateBase]:
    attempts, revisions, checkpoints = tables.attempts.c, tables.revisions.c, tables.checkpoints.c
    newest: BindParameter[int] = bindparam("newest")
    fingerprint = tables.notifications.c.fingerprint
    return {
        "commit": update(tables.commits)
        .where(tables.commits.c.shard == bindparam("of"), tables.commits.c.number == bindparam("before"))
        .values(number=bindparam("after")),
        "attempts": _once(dialect, tables.attempts, "attempt"),
        # A sample may come twice: journalled, but sent again because the acknowledgement was lost.
        "samples": _once(dialect, tables.samples, "attempt", "sequence"),
        "heard": update(tables.attempts)
        .where(attempts.attempt == bindparam("of"))
        .values(
            acknowledged=case((attempts.acknowledged < newest, newest), else_=attempts.acknowledged),
            seen_at=bindparam("heard_at"),
            closed=bindparam("closing"),
        ),
        "killed": update(tables.attempts)
        .where(attempts.attempt == bindparam("of"), attempts.closed == bindparam("before"))
        .values(closed=bindparam("closing")),
        "incidents": _upsert(dialect, tables.alerts, "record"),
        "decisions": _upsert(dialect, tables.decisions, "outcome", "record"),
        "silences": _upsert(dialect, tables.silences, "record"),
        "plans": _upsert(dialect, tables.plans, "record"),
        "baselines": _upsert(dialect, tables.baselines, "attempt", "sequence", "state", key="run"),
        "revisions": insert(tables.revisions),
        "revision": update(tables.revisions)
        .where(revisions.run == bindparam("of"), revisions.revision == bindparam("number"))
        .values(record=bindparam("new")),
        "checkpoints": insert(tables.checkpoints),
        "checkpoints gone": delete(tables.checkpoints).where(
            checkpoints.run == bindparam("of"), checkpoints.uri == bindparam("at")
        ),
        "transitions": insert(tables.transitions),
        "modes": insert(tables.modes),
        "estimates": insert(tables.estimates),
        "requests": insert(tables.requests),
        "references": insert(tables.run_references),
        "references replaced": update(tables.run_references)
        .where(tables.run_references.c.run == bindparam("of"))
        .values(losses=null()),
        "notifications": insert(tables.notifications),
        "notifications gone": delete(tables.notifications).where(fingerprint == bindparam("of")),
    }
