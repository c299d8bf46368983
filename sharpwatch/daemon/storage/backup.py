"""Backups of a journal on SQLite: made while its daemon goes on, and put back while there is none."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from sharpwatch.daemon.storage.sqlite_file import SqliteFiles, schema_version, store_errors
from sharpwatch.errors import StoreError

_PAGES_AT_ONCE = 4096  # between which Ctrl-C is heard


def back_up(path: Path, target: Path) -> int:
    """Copies a journal as it is at this moment into one file; a daemon may be using it.

    Args:
        path: The journal.
        target: The backup, which must not exist.

    Returns:
        Its size in bytes.

    Raises:
        StoreError: It is no journal, or damaged, or can't be copied.
    """
    if not path.exists():
        raise StoreError(f"journal {path}: there is no such file")
    if os.path.lexists(target):
        raise StoreError(f"{target}: there is such a file already")
    with store_errors(target), _made_whole(target) as part:
        with (
            store_errors(path),
            closing(sqlite3.connect(SqliteFiles(path).url, uri=True, isolation_level=None)) as source,
            closing(sqlite3.connect(part, isolation_level=None)) as copy,
        ):
            # One snapshot for all of it. Without, the copy would begin again with each commit of the daemon.
            source.execute("BEGIN")
            _check_version(source, path)
            source.backup(copy, pages=_PAGES_AT_ONCE)
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, which can be read from anywhere
        _check_whole(part, f"journal {path}")
    return target.stat().st_size


def restore(backup: Path, path: Path, *, force: bool) -> tuple[Path, ...]:
    """Puts a backup in the place of a journal.

    Args:
        backup: The backup.
        path: The journal; no daemon may be using it.
        force: Whether a journal that is there is moved aside. Else it is refused.

    Returns:
        The files that were moved aside, under their new names.

    Raises:
        StoreError: There is a journal already, a daemon is using it, or the backup is none.
    """
    source = SqliteFiles(backup)
    if not backup.exists():
        raise source.error("there is no such file")
    if source.log.exists() and source.log.stat().st_size:
        raise source.error(f"it is no backup: {source.log} has commits that are not in it")
    place = SqliteFiles(Path(os.path.realpath(path)))
    with store_errors(backup):
        _check_whole(backup, f"journal {backup}")
    with store_errors(path):
        there = [each for each in (place.path, place.log, place.index, place.marker) if each.exists()]
        if there and not force:
            raise place.error("there is a journal already; --force moves it aside")
        with _locked(place), _made_whole(place.path) as part:
            shutil.copyfile(backup, part)
            if os.geteuid() == 0:  # else the daemon's user could not open what root restores
                owner = (place.path if place.path.exists() else place.path.parent).stat()
                os.chown(part, owner.st_uid, owner.st_gid)
            # After the copy, so that a full disk leaves the journal where it is.
            return tuple(_moved_aside(place, there))


def _moved_aside(place: SqliteFiles, files: list[Path]) -> Iterator[Path]:
    # The time before the endings, so that the files still are a journal with its log.
    stamp = time.strftime("%Y%m%dT%H%M%S")
    for each in files:
        yield each.rename(f"{place.path}.{stamp}{each.name.removeprefix(place.path.name)}")


@contextmanager
def _locked(files: SqliteFiles) -> Iterator[None]:
    """Keeps daemons from a journal that is there."""
    if not files.path.exists():
        yield
        return
    descriptor = os.open(files.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        files.lock(descriptor)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _made_whole(target: Path) -> Iterator[Path]:
    """Has a file written under another name, which becomes `target` once all of it is on the disk."""
    descriptor, name = tempfile.mkstemp(prefix=f"{target.name}.", suffix=".part", dir=target.parent)  # of mode 0600
    os.close(descriptor)
    part = Path(name)
    try:
        yield part
        _sync(part)
        # A link, because that never replaces a file that came meanwhile.
        os.link(part, target)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_whole(path: Path, name: str) -> None:
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
        _check_version(connection, path)
        ((found, *_),) = connection.execute("PRAGMA quick_check(1)").fetchall()
    if found != "ok":
        raise StoreError(f"{name}: it is damaged, so that no backup of it is of use: {found}")


def _check_version(connection: sqlite3.Connection, path: Path) -> None:
    if schema_version(connection, path) == 0:
        raise StoreError(f"journal {path}: the file is empty")
