"""The file of a journal on SQLite: one daemon at a time has it, and damage is found before anything is written to it.

SQLite itself opens a file that has lost its newest commits, and goes on from an earlier state. Beside the journal there
is therefore a small file, PATH-commits, with the number of commits that were acknowledged.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sharpwatch.common.endpoint import without_password
from sharpwatch.daemon.storage.schema import COUNTED, FIRST_TABLES, SCHEMA_VERSION
from sharpwatch.daemon.storage.wal import read_wal
from sharpwatch.errors import JournalInUseError, StoreError

APPLICATION_ID = 0x73687277  # "shrw" in the header of a journal since version 10
_MAGIC = b"SQLite format 3\0"
_LOCK_BYTE = 0x40000000  # the page with it is never written
_REMEDY = "nothing was changed; restore a backup (sharpwatch restore FILE), or move the journal away to begin a new one"


def database_path(url: str) -> Path:
    """Returns the path in a `sqlite:///relative` or `sqlite:////absolute` URL.

    Raises:
        StoreError: The URL has another form, or names a home directory that does not exist.
    """
    prefix = "sqlite:///"
    if not url.startswith(prefix) or len(url) == len(prefix):
        raise StoreError(
            f"store must be sqlite:///PATH or postgresql+psycopg://USER@HOST/DATABASE, got {without_password(url)!r}"
        )
    try:
        return Path(url.removeprefix(prefix)).expanduser()
    except RuntimeError:
        raise StoreError(f"store {url}: this user has no home directory; set $HOME, or name another path") from None


@dataclass(frozen=True, slots=True)
class Commits:
    """How many commits a journal has, and which journal it is."""

    journal: str
    number: int


class SqliteFiles:
    """A journal's file and those beside it, and whether they are whole. Nothing is opened for writing.

    Args:
        path: The database.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        real = os.path.realpath(path)  # SQLite follows links before it names these
        self.log, self.index, self.marker = (Path(f"{real}-{name}") for name in ("wal", "shm", "commits"))
        self._has_log = self.log.exists()

    @property
    def url(self) -> str:
        """The database for a connection of SQLite that changes neither it nor what is beside it."""
        # SQLite would make an empty log where there is none.
        return f"{Path(os.path.realpath(self.path)).as_uri()}?mode=ro{'' if self._has_log else '&immutable=1'}"

    def check(self, descriptor: int) -> None:
        """Checks header and length of the database, and the log.

        Args:
            descriptor: Of the database. It must be locked, since a daemon may write at any time.

        Raises:
            StoreError: They are damaged.
        """
        size = os.fstat(descriptor).st_size
        if size == 0:
            self.refuse_leftovers("is empty")
            return
        header = os.pread(descriptor, 100, 0)
        if not header.strip(b"\0"):
            raise self.error(f"the file is zeroed; {_REMEDY}")
        if not header.startswith(_MAGIC) or len(header) < 100:
            raise self.error("file is not a database")
        (page_size,) = struct.unpack_from(">H", header, 16)
        page_size = 65_536 if page_size == 1 else page_size
        if page_size < 512 or page_size & (page_size - 1):
            raise self.error(f"the header of the file is damaged; {_REMEDY}")
        self._check_size(header, size, page_size)

    def _check_size(self, header: bytes, size: int, page_size: int) -> None:
        log = read_wal(self.log, page_size)
        if log.damage:
            raise self.error(f"the file {self.log} is damaged: {log.damage}; {_REMEDY}")
        pages = log.size
        if not pages:
            changes, counted, valid_for = (struct.unpack_from(">I", header, at)[0] for at in (24, 28, 92))
            pages = counted if changes == valid_for else 0
        needed = set(range(size // page_size + 1, pages + 1)) - log.pages - {_LOCK_BYTE // page_size + 1}
        if needed:
            raise self.error(f"the file is truncated: {size} of {pages * page_size} bytes are there; {_REMEDY}")

    def check_commits(self, noted: Commits | None, found: Commits | None) -> None:
        """Checks that no acknowledged commit is missing.

        Args:
            noted: What the marker had before the database was read.
            found: What the database has; None for one of a version that did not count them, or a new one.

        Raises:
            StoreError: Commits are missing, or it is not the journal that was here.
        """
        if noted is None or found is None:
            return
        if noted.journal != found.journal:
            problem = "this is not the journal that was here"
        elif noted.number > found.number:
            log = "" if self._has_log else ", and there is no -wal file"
            problem = f"{noted.number - found.number} acknowledged commits are missing{log}"
        else:
            return
        raise self.error(f"{problem}: {self._begin_with('what is there')}")

    def noted(self) -> Commits | None:
        """Returns the commits that the marker has; None without one."""
        try:
            journal, number = self.marker.read_text(encoding="ascii").split()
            return Commits(journal, int(number))
        except (FileNotFoundError, ValueError):
            return None  # a torn one tells nothing

    def refuse_leftovers(self, what: str) -> None:
        """Refuses to begin a new journal where another one was."""
        if self.log.exists() and self.log.stat().st_size:
            raise self.error(f"the file {what}, but there is {self.log}; {_REMEDY}")
        if self.noted() is not None:
            raise self.error(f"the file {what}, but it had acknowledged commits: {self._begin_with('a new journal')}")

    def _begin_with(self, what: str) -> str:
        return (
            "nothing was changed; put the files back, or restore a backup (sharpwatch restore FILE). "
            f"To go on with {what}, remove {self.marker}"
        )

    def lock(self, descriptor: int) -> None:
        """Locks the database for this process.

        Raises:
            JournalInUseError: Another process has it.
        """
        # On the file itself, so that it is the same lock by any path, link or mount. SQLite's own locks are held for
        # one transaction, and would let two daemons write in turn. The kernel releases this one also after kill -9.
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalInUseError(f"journal {self.path}: another daemon is using it") from error

    def error(self, cause: str) -> StoreError:
        """Returns an error about the journal."""
        return StoreError(f"journal {self.path}: {cause}")


class LockedJournal:
    """The files of a journal, locked for this process and found whole.

    It must be opened before SQLite opens the file, and closed after that has closed it: closing any descriptor of a
    file drops all POSIX locks that the process has on it, SQLite's own among them.

    Args:
        path: The database, which is made if it does not exist.

    Raises:
        StoreError: Another daemon is using it, or it is damaged.
        OSError: It can't be opened.
    """

    def __init__(self, path: Path) -> None:
        self.files = SqliteFiles(path)
        if not path.exists():
            self.files.refuse_leftovers("is gone")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._descriptor: int | None = descriptor
        self._marker: int | None = None
        try:
            self.files.lock(descriptor)
            self._make_private(descriptor)
            self.files.check(descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def close(self) -> None:
        """Releases the lock. Closing it again does nothing."""
        marker, descriptor = self._marker, self._descriptor
        self._marker, self._descriptor = None, None
        if marker is not None:
            with suppress(OSError):  # of a disk that fails; a number that lags is no false alarm
                os.fsync(marker)
            os.close(marker)
        if descriptor is not None:
            os.close(descriptor)

    def open_marker(self) -> int:
        """Opens the file with the number of acknowledged commits; returns the descriptor, which `close` closes."""
        self._marker = os.open(self.files.marker, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return self._marker

    def _make_private(self, descriptor: int) -> None:
        # SQLite gives -wal and -shm the mode of the database when it makes them.
        with suppress(PermissionError):  # another user's, who has given this one access
            os.fchmod(descriptor, 0o600)
        for beside in (self.files.log, self.files.index):
            with suppress(FileNotFoundError, PermissionError):
                beside.chmod(0o600)


def schema_version(connection: sqlite3.Connection, path: Path) -> int:
    """Returns the version of a journal's schema; 0 of an empty database.

    Raises:
        StoreError: It is of a newer version, or another program's.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    is_ours = application == (APPLICATION_ID if version >= COUNTED else 0)
    if version > SCHEMA_VERSION and (is_ours or not tables):
        raise StoreError(
            f"journal {path}: cannot read schema version {version}, which a newer sharpwatch wrote; "
            f"this version reads up to {SCHEMA_VERSION}"
        )
    if not is_ours or not (tables >= FIRST_TABLES if version else not tables):
        raise StoreError(f"journal {path}: the file is a database of another program")
    return int(version)


def stored_commits(connection: sqlite3.Connection, version: int) -> Commits | None:
    """Returns how many commits a journal has; None for one of a version that did not count them."""
    if version < COUNTED:
        return None
    return Commits(*connection.execute("SELECT journal, number FROM commits").fetchone())


@contextmanager
def store_errors(path: Path) -> Iterator[None]:
    """Turns errors of SQLite and of the system into `StoreError`, with the path."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise StoreError(f"journal {path}: {cause}") from error
