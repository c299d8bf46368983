"""The tables of version 9: on SQLite by the scripts from the version that it has, on PostgreSQL all of them."""

from __future__ import annotations

import re

from alembic import op

from sharpwatch.daemon.storage.schema import SCHEMAS

revision = "0009"
down_revision = None

# SQLite numbers the rows of every table, PostgreSQL only where it is told to.
_UNNUMBERED = ("alerts", "decisions", "checkpoints", "silences", "plans", "notifications")
_NUMBERED = "BIGINT GENERATED ALWAYS AS IDENTITY"
_TYPES = {
    r"\bid INTEGER PRIMARY KEY": f"id {_NUMBERED} PRIMARY KEY",
    r"\bINTEGER\b": "BIGINT",
    r"\bBLOB\b": "BYTEA",
    r"\bREAL\b": "DOUBLE PRECISION",
}


def upgrade() -> None:
    """Make the tables, or those that later versions brought."""
    connection = op.get_bind()
    if connection.dialect.name == "sqlite":
        script = "".join(SCHEMAS[connection.exec_driver_sql("PRAGMA user_version").scalar_one() :])
    else:
        script = "".join(SCHEMAS)
        for sqlite, postgresql in _TYPES.items():
            script = re.sub(sqlite, postgresql, script)
        script += "".join(f"ALTER TABLE {table} ADD COLUMN rowid {_NUMBERED};" for table in _UNNUMBERED)
    for statement in filter(str.strip, script.split(";")):
        connection.exec_driver_sql(statement)
