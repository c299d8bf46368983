"""The full check of a journal on SQLite, for which a daemon that starts has no time."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sharpwatch.daemon.storage.sqlite_file import SqliteFiles, schema_version, store_errors, stored_commits

_MOST = 100  # problems of one kind that are listed
# Each finds records whose counterpart is missing: what it finds, and a name of each.
_ORPHANS = {
    "samples of an attempt that is not there": """
        SELECT DISTINCT attempt FROM samples WHERE attempt NOT IN (SELECT attempt FROM attempts)""",
    "samples of an attempt of another run": """
        SELECT DISTINCT s.attempt FROM attempts a JOIN samples s ON s.attempt = a.attempt WHERE s.run != a.run""",
    "a newest acknowledged sample that is not there": """
        SELECT a.attempt FROM attempts a JOIN samples s ON s.attempt = a.attempt
        GROUP BY a.attempt HAVING max(s.sequence) < a.acknowledged""",
    "transitions of a decision or plan that is not there": """
        SELECT DISTINCT decision FROM transitions
        WHERE decision NOT IN (SELECT id FROM decisions) AND decision NOT IN (SELECT id FROM plans)""",
    "a revision of a decision that is not there": """
        SELECT run || ' ' || revision FROM revisions
        WHERE json_extract(record, '$.decision_id') NOT IN (SELECT id FROM decisions)""",
    "revisions that are not numbered from 1 on without a gap": """
        SELECT run FROM revisions GROUP BY run HAVING min(revision) != 1 OR max(revision) != count(*)""",
    "baselines of an attempt that is not there": """
        SELECT run FROM baselines WHERE attempt NOT IN (SELECT attempt FROM attempts)""",
}
_GAPS = (
    "SELECT count(*), sum(missing) FROM (SELECT max(sequence) - min(sequence) + 1 - count(*) AS missing FROM samples "
    "GROUP BY attempt) WHERE missing > 0"
)


@dataclass(frozen=True, slots=True)
class JournalReport:
    """What a check found.

    Attributes:
        problems: What is wrong; empty if the journal is whole.
        notes: What need not be wrong.
        counts: Of runs, attempts, samples, decisions and acknowledged commits.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    counts: dict[str, int]


def check_journal(path: Path) -> JournalReport:
    """Checks all of a journal, which takes about as long as reading it; a daemon may be using it.

    Args:
        path: The journal.

    Raises:
        StoreError: It is none, or can't be read at all.
    """
    files = SqliteFiles(path)
    if not path.exists():
        raise files.error("there is no such file")
    with store_errors(path):
        live = _check_files(files)
        noted = files.noted()
        with closing(sqlite3.connect(files.url, uri=True, isolation_level=None)) as connection:
            connection.execute("BEGIN")  # one snapshot for all of it
            if (version := schema_version(connection, path)) == 0:
                raise files.error("the file is empty")
            files.check_commits(noted, found := stored_commits(connection, version))
            # Of a damaged database the rest may be anything.
            problems = [text for (text,) in connection.execute(f"PRAGMA quick_check({_MOST})") if text != "ok"]
            problems = problems or list(_orphans(connection))
            counts = {
                **{name: _count(connection, name) for name in ("attempts", "samples", "decisions")},
                "commits": 0 if found is None else found.number,
            }
            notes = ["a daemon is using it; its log and length were not checked"] if live else []
            return JournalReport(tuple(problems), (*notes, *_gaps(connection)), counts)


def _check_files(files: SqliteFiles) -> bool:
    """Checks the files if no daemon is writing to them; returns whether one is."""
    descriptor = os.open(files.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        files.check(descriptor)
        return False
    finally:
        os.close(descriptor)


def _orphans(connection: sqlite3.Connection) -> Iterator[str]:
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    for what, query in _ORPHANS.items():
        try:
            found = connection.execute(f"{query} LIMIT {_MOST}").fetchall()
        except sqlite3.OperationalError:
            if {"transitions", "baselines", "plans"} <= tables:
                raise
            continue  # an earlier version, without these tables
        yield from (f"{what}: {name}" for (name,) in found)


def _gaps(connection: sqlite3.Connection) -> Iterator[str]:
    attempts, missing = connection.execute(_GAPS).fetchone()
    if attempts:
        yield f"{missing} samples between others were never taken in, of {attempts} attempts: a full queue or spool"


def _count(connection: sqlite3.Connection, table: str) -> int:
    (count,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()  # noqa: S608  a name of ours
    return int(count)
