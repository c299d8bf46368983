"""Brings the database of a journal to the present schema, by alembic.

A revision is a file in `versions`, named after its version. One that was released is never changed. A journal on SQLite
has its version in `PRAGMA user_version` as well, by which earlier versions of sharpwatch know that they can't read it.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection

VERSION_TABLE = "sharpwatch_version"


def upgrade(connection: Connection, to: str = "head") -> None:
    """Brings a database to the present schema.

    Args:
        connection: Its connection. All is done in the transaction that is under way on it, so that a daemon killed in
            the middle leaves the older schema whole.
        to: The revision; the present schema's by default.
    """
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, to)
