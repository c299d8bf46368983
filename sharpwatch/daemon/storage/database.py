"""The database of a journal, on SQLite or PostgreSQL: opening it for this daemon alone, transactions, errors.

Either way a commit must survive power loss: an agent forgets a sample once it is acknowledged, and a command that was
sent must not be lost. SQLite is therefore in WAL mode with synchronous=FULL; with NORMAL the file would stay consistent
but could lose its newest commits. PostgreSQL has synchronous_commit=on. The price is one fsync a batch of samples.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, event, inspect
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from sharpwatch.common.endpoint import without_password
from sharpwatch.common.shards import WHOLE, Shard
from sharpwatch.daemon.storage.loading import load_commits
from sharpwatch.daemon.storage.schema import SCHEMA_VERSION
from sharpwatch.daemon.storage.shards import ShardLocks, ShardRow
from sharpwatch.daemon.storage.sqlite_file import (
    Commits,
    LockedJournal,
    database_path,
    schema_version,
    store_errors,
    stored_commits,
)
from sharpwatch.daemon.storage.tables import metadata
from sharpwatch.errors import StoreError

POSTGRESQL = "postgresql+psycopg"
# Of the session: a dead server or network is noticed on both sides within 15 s, so that the lock of a daemon whose
# machine is gone is free soon, and this one's writes fail and are tried again.
_SESSION = (
    "-c synchronous_commit=on -c tcp_keepalives_idle=6 -c tcp_keepalives_interval=3 -c tcp_keepalives_count=3 "
    "-c tcp_user_timeout=15000"
)
_NETWORK = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
    "application_name": "sharpwatch",
}


class Database(ABC):
    """An open database, for one thread at a time.

    Attributes:
        name: Where it is, for people; without a password.
        session: Changes with each new connection.
    """

    name: str
    session = 0

    @abstractmethod
    def connection(self) -> Connection:
        """Returns the connection, which is made again if it was lost."""

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Runs a transaction, which is rolled back on an error. Errors of the database become `StoreError`."""
        with self.errors():
            connection = self.connection()
            with connection.begin():
                yield connection

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turns errors of the database into `StoreError`, with its name."""
        try:
            yield
        except DBAPIError as error:  # whose own text has the statement, and may have what is written
            raise StoreError(f"journal {self.name}: {' '.join(str(error.orig).split())}") from error
        except (SQLAlchemyError, OSError) as error:
            raise StoreError(f"journal {self.name}: {getattr(error, 'strerror', None) or error}") from error

    @abstractmethod
    def acknowledged(self, found: Commits) -> None:
        """Notes how many commits there are, where their loss could otherwise go unseen."""

    @abstractmethod
    def close(self) -> None:
        """Closes it, so that another daemon may open it."""


def open_database(url: str, shard: Shard = WHOLE) -> Database:
    """Opens a database, or makes it, and brings it to the present schema.

    Args:
        url: `sqlite:///PATH`, or `postgresql+psycopg://USER@HOST/DATABASE`.
        shard: The daemon's own shard.

    Raises:
        StoreError: It can't be opened, is damaged, of a newer version or another program's; or a file was to be shared.
    """
    if url.startswith(f"{POSTGRESQL}:"):
        return PostgresqlDatabase(url, shard)
    if shard.count > 1:
        raise StoreError(f"shard {shard}: the daemons share a journal on {POSTGRESQL}://..., got store {url}")
    return SqliteDatabase(database_path(url).absolute())


class SqliteDatabase(Database):
    """A database in a file."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        with store_errors(path), self.errors(), ExitStack() as opened:
            self._file = LockedJournal(path)
            opened.callback(self._file.close)
            self._check()
            self._connection = _engine_on(path).connect()
            opened.callback(self._connection.close)
            self._prepare()
            opened.pop_all()

    def connection(self) -> Connection:
        """Returns the connection."""
        return self._connection

    def acknowledged(self, found: Commits) -> None:
        """Notes how many commits there are beside the file."""
        # The commit is done: its writer must not be told that it failed. A number that lags is no false alarm.
        with suppress(OSError):
            os.pwrite(self._marker, _marker_line(found), 0)

    def close(self) -> None:
        """Closes the file and releases its lock."""
        with self.errors():
            self._connection.close()
        self._file.close()

    def _check(self) -> None:
        """Refuses a file that is no journal of ours, or not whole, by a connection that can't change it."""
        # A new journal is not in WAL mode at first. If its making was cut off, SQLite has to undo that.
        if Path(f"{self._path.resolve()}-journal").exists():
            with closing(sqlite3.connect(self._path)) as recovered:
                recovered.execute("SELECT 1 FROM sqlite_master")
        files = self._file.files
        with closing(sqlite3.connect(files.url, uri=True)) as connection:
            found = stored_commits(connection, schema_version(connection, self._path))
        files.check_commits(files.noted(), found)

    def _prepare(self) -> None:
        with self.transaction() as connection:
            if connection.exec_driver_sql("PRAGMA user_version").scalar_one() < SCHEMA_VERSION:
                _upgrade(connection)
            found = load_commits(connection, WHOLE.index)
        self._marker = self._file.open_marker()
        os.pwrite(self._marker, _marker_line(found), 0)


def _marker_line(found: Commits) -> bytes:
    # Of one length, so that a shorter one leaves nothing of it.
    return f"{found.journal} {found.number:020d}\n".encode()


def _engine_on(path: Path) -> Engine:
    def connect() -> sqlite3.Connection:
        # `isolation_level=None`: Python would otherwise begin and commit transactions by itself.
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA recursive_triggers=ON")  # else OR REPLACE would delete rows unseen by triggers
        return connection

    engine = create_engine("sqlite://", creator=connect, poolclass=NullPool, hide_parameters=True)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine


class PostgresqlDatabase(Database):
    """A database, or a schema of one, on a PostgreSQL server.

    Locks of the server's own keep other daemons out, of all runs or of those of a shard.
    """

    def __init__(self, url: str, shard: Shard = WHOLE) -> None:
        try:
            parsed = make_url(url)
        except (ArgumentError, ValueError) as error:
            raise StoreError(
                f"store must be {POSTGRESQL}://USER@HOST/DATABASE, got {without_password(url)!r}"
            ) from error
        self.name = without_password(url)
        self._engine = self._make_engine(parsed)
        self._connection: Connection | None = None
        self._locks = ShardLocks(self.name, shard)
        self._entered = self._alone = False
        try:
            with self.transaction() as connection:
                self._prepare(connection)
            with self.errors():
                connection = self.connection()
                self._locks.claim(connection)
                connection.commit()
            self._entered = True
        except BaseException:
            self._drop()
            raise

    def connection(self) -> Connection:
        """Returns the connection, a new one with new locks if the server has ended the last."""
        if self._connection is None:
            self._connection = self._engine.connect()
            try:
                self._take_locks(self._connection)
            except BaseException:
                self._drop()
                raise
            self.session += 1
        return self._connection

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Runs a transaction as above. After a lost connection the next one makes another."""
        try:
            with super().transaction() as connection:
                yield connection
        except StoreError as error:
            if isinstance(error.__cause__, OperationalError | InterfaceError):
                self._drop()
            raise

    def look(self, address: str) -> list[ShardRow]:
        """Shows that this daemon lives and where, in `shards`; returns what that has."""
        with self.transaction() as connection:
            return self._locks.look(connection, address)

    def take(self, shard: int, address: str) -> bool:
        """Takes a shard, if no daemon holds it; returns whether this one does now."""
        with self._moving(), self.transaction() as connection:
            taken = self._locks.take(connection, shard, address)
        if taken:
            self._locks.held.add(shard)
        return taken

    def give(self, shard: int) -> None:
        """Releases a shard."""
        self._locks.held.discard(shard)
        with self._moving(), self.transaction() as connection:
            self._locks.give(connection, shard)

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """After an error nobody knows which locks this connection has; the next one takes those of `held`."""
        try:
            yield
        except StoreError:
            self._drop()
            raise

    def acknowledged(self, found: Commits) -> None:
        """Does nothing: a server does not lose commits unseen."""

    def close(self) -> None:
        """Closes the connection, and with it releases the locks; others need not wait to see that nobody has them."""
        # Not by a new connection: by then another daemon may have taken them.
        if self._connection is not None:
            with suppress(StoreError):  # they are free nevertheless, and are taken in a while
                for shard in sorted(self._locks.held):
                    self.give(shard)
        self._drop()

    def _make_engine(self, url: URL) -> Engine:
        # Those of the URL as well, such as -csearch_path=SCHEMA.
        options = " ".join([_SESSION, *url.normalized_query.get("options", ())])
        try:
            return create_engine(
                url, poolclass=NullPool, connect_args={"options": options, **_NETWORK}, hide_parameters=True
            )
        except ModuleNotFoundError as error:
            raise StoreError(
                f"journal {self.name}: needs the package {error.name}, which is not installed; "
                "run: pip install 'sharpwatch[postgresql]'"
            ) from error

    def _take_locks(self, connection: Connection) -> None:
        connection.exec_driver_sql("SET client_encoding TO 'UTF8'")
        if self._entered:
            self._locks.resume(connection)
        else:
            self._alone = self._locks.enter(connection)
        connection.commit()
        _without_nul(connection)

    def _prepare(self, connection: Connection) -> None:
        from sharpwatch.daemon.storage.migrations import VERSION_TABLE  # noqa: PLC0415 - loads alembic

        there = set(inspect(connection).get_table_names())
        if VERSION_TABLE not in there:
            if ours := there & set(metadata.tables):
                raise StoreError(
                    f"journal {self.name}: there are tables of another program, such as {min(ours)}; "
                    "give sharpwatch a database or a schema of its own"
                )
            _upgrade(connection)
            return
        version = int(connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalar_one())  # noqa: S608
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"journal {self.name}: cannot read schema version {version}, which a newer sharpwatch wrote; "
                f"this version reads up to {SCHEMA_VERSION}"
            )
        if version < SCHEMA_VERSION and not self._alone:
            raise StoreError(
                f"journal {self.name}: daemons of an earlier version share it; stop all of them before the first of "
                "this one starts"
            )
        if version < SCHEMA_VERSION:
            _upgrade(connection)

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.invalidate()  # not returned to be used again
            connection.close()


def _without_nul(connection: Connection) -> None:
    """Has texts written without NUL, which PostgreSQL refuses: one in a trainer's message must not stop the journal."""
    from psycopg.types.string import StrDumperUnknown  # noqa: PLC0415 - of an extra

    class Dumper(StrDumperUnknown):
        def dump(self, obj: str) -> bytes | bytearray | memoryview | None:
            return super().dump(obj.replace("\0", "\N{REPLACEMENT CHARACTER}"))

    driver = connection.connection.driver_connection
    driver.adapters.register_dumper(str, Dumper)  # type: ignore[union-attr]


def _upgrade(connection: Connection) -> None:
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of each of its parts, and of each step
    from sharpwatch.daemon.storage.migrations import upgrade  # noqa: PLC0415 - loads alembic, which few starts need

    upgrade(connection)
