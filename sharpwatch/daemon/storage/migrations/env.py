"""Run by alembic for each upgrade: on the connection, and in the transaction, that `upgrade` is given."""

from __future__ import annotations

from alembic import context

from sharpwatch.daemon.storage.migrations import VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"], version_table=VERSION_TABLE, transactional_ddl=True
)
context.run_migrations()
