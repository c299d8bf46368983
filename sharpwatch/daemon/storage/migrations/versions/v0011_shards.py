"""Shards, by which several daemons share one journal, and a count of commits for each of them."""

from __future__ import annotations

from alembic import op

revision = "0011"
down_revision = "0010"

_TABLES = """
ALTER TABLE commits ADD COLUMN shard BIGINT NOT NULL DEFAULT 0;
CREATE TABLE shards (
    shard BIGINT NOT NULL PRIMARY KEY, holder TEXT NOT NULL, address TEXT NOT NULL, beats BIGINT NOT NULL,
    wanted TEXT NOT NULL)
"""


def upgrade() -> None:
    """Make the table and the column."""
    connection = op.get_bind()
    for statement in _TABLES.split(";"):
        connection.exec_driver_sql(statement)
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("PRAGMA user_version=11")
