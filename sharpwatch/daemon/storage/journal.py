"""The SQLite journal: one connection, used from one thread; every write is one transaction.

The journal is in WAL mode with synchronous=FULL. An acknowledged sample is forgotten by the trainer's side, and a
command that was sent must be found again, so a commit has to survive power loss and not only a killed process; NORMAL
would keep the file sound but could lose the newest commits. The price is one fsync a batch, not one a sample.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.records import Alert, Checkpoint, Decision, Mode, Revision, RollbackPlan
from sharpwatch.errors import StoreError

_TABLES = """
CREATE TABLE attempts (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, attempt TEXT NOT NULL UNIQUE, hello BLOB NOT NULL,
    acknowledged INTEGER NOT NULL DEFAULT 0, seen_at REAL NOT NULL, closed INTEGER NOT NULL DEFAULT 0);
CREATE INDEX attempts_by_run ON attempts (run, id);
CREATE TABLE samples (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, attempt TEXT NOT NULL, sequence INTEGER NOT NULL,
    step INTEGER NOT NULL, payload BLOB NOT NULL, UNIQUE (attempt, sequence));
CREATE INDEX samples_by_run ON samples (run, id);
CREATE TABLE alerts (id TEXT PRIMARY KEY, run TEXT NOT NULL, first_step INTEGER NOT NULL, record TEXT NOT NULL);
CREATE INDEX alerts_by_run ON alerts (run);
CREATE TABLE decisions (
    id TEXT PRIMARY KEY, run TEXT NOT NULL, made_at REAL NOT NULL, outcome TEXT NOT NULL, record TEXT NOT NULL);
CREATE INDEX decisions_by_run ON decisions (run, made_at);
CREATE TABLE revisions (
    run TEXT NOT NULL, revision INTEGER NOT NULL, record TEXT NOT NULL, PRIMARY KEY (run, revision));
CREATE TABLE checkpoints (
    run TEXT NOT NULL, step INTEGER NOT NULL, uri TEXT NOT NULL, PRIMARY KEY (run, step, uri));
CREATE TABLE modes (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, mode TEXT NOT NULL, author TEXT NOT NULL, reason TEXT NOT NULL,
    made_at REAL NOT NULL);
CREATE TABLE estimates (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, quantity TEXT NOT NULL, block TEXT NOT NULL, estimator TEXT NOT NULL,
    step INTEGER NOT NULL, value REAL, stderr REAL, draws INTEGER NOT NULL);
CREATE INDEX estimates_by_run ON estimates (run, id);
"""
_TRANSITIONS = """
CREATE TABLE transitions (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, decision TEXT NOT NULL, at REAL NOT NULL, outcome TEXT NOT NULL,
    detail TEXT NOT NULL, author TEXT NOT NULL, reason TEXT NOT NULL);
CREATE INDEX transitions_by_decision ON transitions (decision, id);
"""
_RESIDUALS = """
ALTER TABLE estimates ADD COLUMN residual REAL;
ALTER TABLE estimates ADD COLUMN method TEXT NOT NULL DEFAULT '';
"""
_SCHEMAS = (_TABLES, _TRANSITIONS, _RESIDUALS)  # each on top of the one before; a journal of version n has the first n
SCHEMA_VERSION = len(_SCHEMAS)
_FIRST_TABLES = {"attempts", "samples", "alerts", "decisions", "revisions"}  # that a journal of any version has
_TRIM_EVERY = 100  # appended rows of a run between two trims: retention is exact to this many
_ESTIMATES_PER_SAMPLE = 4


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """An attempt as it first said hello; `hello` is the serialized message."""

    run: str
    attempt: str
    hello: bytes
    seen_at: float


@dataclass(frozen=True, slots=True)
class SampleRow:
    """A sample as it came; `payload` is the serialized SessionRequest."""

    run: str
    attempt: str
    sequence: int
    step: int
    payload: bytes
    received_at: float  # unix seconds
    closing: bool = False


@dataclass(frozen=True, slots=True)
class TransitionRow:
    """One change of a decision, at unix seconds; `author` and `reason` are whoever's brought it there."""

    run: str
    decision: str
    at: float
    outcome: str
    detail: str
    author: str
    reason: str


@dataclass(frozen=True, slots=True)
class ModeRow:
    """A run's mode as an operator set it."""

    run: str
    mode: Mode
    author: str
    reason: str
    made_at: float


@dataclass(frozen=True, slots=True)
class EstimateRow:
    """An estimate; `block` is empty for the whole model."""

    run: str
    quantity: str
    block: str
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class Batch:
    """What goes into the journal in one transaction."""

    attempts: tuple[AttemptRow, ...] = ()
    samples: tuple[SampleRow, ...] = ()
    alerts: tuple[Alert, ...] = ()
    decisions: tuple[Decision, ...] = ()
    transitions: tuple[TransitionRow, ...] = ()
    revisions: tuple[Revision, ...] = ()
    rewinds: tuple[tuple[str, int], ...] = ()  # run, and the step after which its earlier checkpoints are void
    checkpoints: tuple[tuple[str, Checkpoint], ...] = ()
    modes: tuple[ModeRow, ...] = ()
    estimates: tuple[EstimateRow, ...] = ()

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, slots=True)
class StoredAttempt:
    """An attempt found in the journal; all its samples up to `acknowledged` were journalled."""

    attempt: str
    hello: bytes
    acknowledged: int
    seen_at: float
    closed: bool


@dataclass(frozen=True, slots=True)
class StoredRun:
    """All that the journal knows of a run; sequences are oldest first."""

    run: str
    attempts: tuple[StoredAttempt, ...]
    samples: tuple[SampleRow, ...]
    alerts: tuple[Alert, ...]
    decisions: tuple[Decision, ...]
    revisions: tuple[Revision, ...]
    checkpoints: tuple[Checkpoint, ...]
    mode: Mode | None


def database_path(url: str) -> Path:
    """The file that a `sqlite:///relative` or `sqlite:////absolute` URL names."""
    prefix = "sqlite:///"
    if not url.startswith(prefix) or len(url) == len(prefix):
        raise StoreError(f"store {url!r}: expected sqlite:///PATH")
    return Path(url.removeprefix(prefix)).expanduser()


def _record(value: Alert | Decision | Revision) -> str:
    return json.dumps(asdict(value))


def _estimate(row: EstimateRow) -> tuple[str | float, ...]:
    """A NaN is a NULL there."""
    one = row.estimate
    measured = (one.estimator, one.step, one.value, one.stderr, one.draws, one.residual, one.method)
    return (row.run, row.quantity, row.block, *measured)


def _decision(record: str) -> Decision:
    values: dict[str, Any] = json.loads(record)
    plan = values.pop("rollback")
    if plan is not None:
        plan = RollbackPlan(**{**plan, "checkpoint": Checkpoint(**plan["checkpoint"])})
    return Decision(**values, rollback=plan)


def _alert(record: str) -> Alert:
    values: dict[str, Any] = json.loads(record)
    return Alert(**{**values, "blocks": tuple(values["blocks"])})


class Journal:
    """The open journal. Raises `StoreError`, which names the path and the cause, from every method."""

    def __init__(self, url: str, *, retain_samples: int) -> None:
        self.path = database_path(url).absolute()
        self._retain = {"samples": retain_samples, "estimates": retain_samples * _ESTIMATES_PER_SAMPLE}
        self._untrimmed: dict[tuple[str, str], int] = {}
        with self._said():
            self._lock = self._take_lock()
            try:
                self._connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
                self._prepare()
            except BaseException:
                os.close(self._lock)
                raise

    def close(self) -> None:
        """Close the file and let another daemon have it."""
        with self._said():
            self._connection.close()
        os.close(self._lock)

    def write(self, batch: Batch) -> None:
        """Journal `batch` in one transaction: all of it, or none."""
        with self._said(), self._transaction() as connection:
            self._write_attempts(connection, batch)
            self._write_records(connection, batch)
            self._trim(connection, batch)

    def runs(self) -> tuple[str, ...]:
        """The names of all runs, the one that began its newest attempt last at the end."""
        with self._said():
            query = "SELECT run FROM attempts GROUP BY run ORDER BY max(id)"
            return tuple(run for (run,) in self._connection.execute(query))

    def load(self, run: str, *, samples: int) -> StoredRun:
        """All records of a run, and its newest `samples` samples."""
        with self._said():
            return self._load(run, samples)

    @contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            cause = getattr(error, "strerror", None) or str(error)
            raise StoreError(f"journal {self.path}: {cause}") from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException:
            # SQLite ends the transaction itself on some errors, a full disk among them.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _take_lock(self) -> int:
        """Hold `PATH.lock`: a second daemon on the same journal would take the runs for its own."""
        lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise StoreError(f"journal {self.path}: another daemon holds it") from error
        return lock

    def _prepare(self) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"journal {self.path}: schema {version}, written by a newer sharpwatch; this one knows {SCHEMA_VERSION}"
            )
        tables = {name for (name,) in self._connection.execute("SELECT name FROM sqlite_master")}
        if not (tables >= _FIRST_TABLES if version else not tables):
            raise StoreError(f"journal {self.path}: a database of something else")
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")
        if version < SCHEMA_VERSION:
            script = "".join(_SCHEMAS[version:])
            self._connection.executescript(f"BEGIN;{script}PRAGMA user_version={SCHEMA_VERSION};COMMIT;")

    def _write_attempts(self, connection: sqlite3.Connection, batch: Batch) -> None:
        connection.executemany(
            "INSERT INTO attempts (run, attempt, hello, seen_at) VALUES (?, ?, ?, ?) ON CONFLICT (attempt) DO NOTHING",
            [(row.run, row.attempt, row.hello, row.seen_at) for row in batch.attempts],
        )
        connection.executemany(
            "INSERT OR IGNORE INTO samples (run, attempt, sequence, step, payload) VALUES (?, ?, ?, ?, ?)",
            [(row.run, row.attempt, row.sequence, row.step, row.payload) for row in batch.samples],
        )
        newest = {row.attempt: row for row in batch.samples}
        connection.executemany(
            "UPDATE attempts SET acknowledged = max(acknowledged, ?), seen_at = ?, closed = ? WHERE attempt = ?",
            [(row.sequence, row.received_at, row.closing, row.attempt) for row in newest.values()],
        )

    def _write_records(self, connection: sqlite3.Connection, batch: Batch) -> None:
        connection.executemany(
            "INSERT OR REPLACE INTO alerts VALUES (?, ?, ?, ?)",
            [(alert.id, alert.run, alert.first_step, _record(alert)) for alert in batch.alerts],
        )
        connection.executemany(
            "INSERT INTO decisions VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (id) DO UPDATE SET outcome = excluded.outcome, record = excluded.record",
            [(made.id, made.run, made.made_at, made.outcome, _record(made)) for made in batch.decisions],
        )
        connection.executemany(
            "INSERT INTO transitions (run, decision, at, outcome, detail, author, reason) VALUES (?, ?, ?, ?, ?, ?, ?)",
            [astuple(row) for row in batch.transitions],
        )
        connection.executemany(
            "INSERT OR REPLACE INTO revisions VALUES (?, ?, ?)",
            [(revision.run, revision.revision, _record(revision)) for revision in batch.revisions],
        )
        connection.executemany("DELETE FROM checkpoints WHERE run = ? AND step > ?", batch.rewinds)
        connection.executemany(
            "INSERT OR IGNORE INTO checkpoints VALUES (?, ?, ?)",
            [(run, checkpoint.step, checkpoint.uri) for run, checkpoint in batch.checkpoints],
        )
        connection.executemany(
            "INSERT INTO modes (run, mode, author, reason, made_at) VALUES (?, ?, ?, ?, ?)",
            [(row.run, row.mode, row.author, row.reason, row.made_at) for row in batch.modes],
        )
        connection.executemany(
            "INSERT INTO estimates (run, quantity, block, estimator, step, value, stderr, draws, residual, method) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            map(_estimate, batch.estimates),
        )

    def _trim(self, connection: sqlite3.Connection, batch: Batch) -> None:
        appended: Iterable[tuple[str, str]] = (
            *(("samples", row.run) for row in batch.samples),
            *(("estimates", row.run) for row in batch.estimates),
        )
        for key in appended:
            self._untrimmed[key] = self._untrimmed.get(key, 0) + 1
        for key in [key for key, count in self._untrimmed.items() if count >= _TRIM_EVERY]:
            table, run = key
            connection.execute(
                f"DELETE FROM {table} WHERE run = ? AND id <= "  # noqa: S608  one of our two tables
                f"(SELECT id FROM {table} WHERE run = ? ORDER BY id DESC LIMIT 1 OFFSET ?)",
                (run, run, self._retain[table]),
            )
            del self._untrimmed[key]

    def _load(self, run: str, samples: int) -> StoredRun:
        rows = self._connection.execute
        attempts = rows(
            "SELECT attempt, hello, acknowledged, seen_at, closed FROM attempts WHERE run = ? ORDER BY id", [run]
        ).fetchall()
        newest = rows(
            "SELECT attempt, sequence, step, payload FROM samples WHERE run = ? ORDER BY id DESC LIMIT ?",
            [run, samples],
        ).fetchall()
        mode = rows("SELECT mode FROM modes WHERE run = ? ORDER BY id DESC LIMIT 1", [run]).fetchone()
        return StoredRun(
            run=run,
            attempts=tuple(
                StoredAttempt(attempt, hello, acknowledged, seen_at, bool(closed))
                for attempt, hello, acknowledged, seen_at, closed in attempts
            ),
            samples=tuple(
                SampleRow(run, attempt, sequence, step, payload, received_at=0.0)
                for attempt, sequence, step, payload in reversed(newest)
            ),
            alerts=tuple(
                _alert(record)
                for (record,) in rows("SELECT record FROM alerts WHERE run = ? ORDER BY first_step, rowid", [run])
            ),
            decisions=tuple(
                _decision(record)
                for (record,) in rows("SELECT record FROM decisions WHERE run = ? ORDER BY rowid", [run])
            ),
            revisions=tuple(
                Revision(**json.loads(record))
                for (record,) in rows("SELECT record FROM revisions WHERE run = ? ORDER BY revision", [run])
            ),
            checkpoints=tuple(
                Checkpoint(step, uri)
                for step, uri in rows("SELECT step, uri FROM checkpoints WHERE run = ? ORDER BY rowid", [run])
            ),
            mode=mode[0] if mode else None,
        )
