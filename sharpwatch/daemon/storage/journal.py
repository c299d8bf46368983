"""The journal: an SQLite file in which the daemon keeps samples and records, written on a thread of its own.

The file is in WAL mode with synchronous=FULL. An agent forgets a sample once it is acknowledged, and a command that
was sent must not be lost, so a commit has to survive power loss, not only a killed process. With NORMAL the file would
stay consistent but could lose its newest commits. The price is one fsync a batch of samples.
"""

from __future__ import annotations

import asyncio
import json
import math
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import astuple, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.records import Checkpoint, Revision, Silence
from sharpwatch.daemon.storage.records_json import decision_of, incident_of, plan_of, record_of, revision_of
from sharpwatch.daemon.storage.schema import (
    CLOSED,
    DRAWN_QUANTITIES,
    KILLED,
    SCHEMA_VERSION,
    SCHEMAS,
    BaselinesRow,
    EstimateRow,
    ModeRow,
    NotificationRow,
    PendingWrites,
    ReferenceRow,
    RequestRow,
    SampleRow,
    StoredAttempt,
    StoredHistory,
    StoredRun,
    TransitionRow,
)
from sharpwatch.daemon.storage.sqlite_file import (
    APPLICATION_ID,
    Commits,
    LockedJournal,
    database_path,
    schema_version,
    store_errors,
    stored_commits,
)
from sharpwatch.errors import RevisionConflictError

Result = TypeVar("Result")
_OF_A_RUN = (
    *("attempts", "samples", "estimates", "baselines", "checkpoints"),
    *("alerts", "decisions", "transitions", "revisions", "plans", "modes", "run_references", "requests"),
)  # the tables whose rows are of a run
_TRIM_EVERY = 100  # rows of a run appended between two trims, so retention is exact to this many
_ESTIMATES_PER_SAMPLE = 4


def _estimate(row: EstimateRow) -> tuple[str | float, ...]:
    # SQLite stores a NaN as NULL.
    one = row.estimate
    measured = (one.estimator, one.step, one.value, one.stderr, one.draws, one.residual, one.method)
    return (row.run, row.quantity, row.block, *measured)


def _known(value: float | None) -> float:
    return math.nan if value is None else value


class Journal:
    """An open journal, for one thread at a time.

    Every method raises `StoreError`, with the path and the cause, if the file can't be opened, read or written.

    Args:
        url: Where the journal is, as `sqlite:///PATH`. A file that does not exist is made.
        retain_samples: How many of its newest samples are kept of each run.
    """

    def __init__(self, url: str, *, retain_samples: int) -> None:
        self.path = database_path(url).absolute()
        self._retain = {"samples": retain_samples, "estimates": retain_samples * _ESTIMATES_PER_SAMPLE}
        self._untrimmed: Counter[tuple[str, str]] = Counter()  # rows appended since the last trim
        self._commits: Commits
        with store_errors(self.path):
            self._file = LockedJournal(self.path)
            try:
                self._check()
                # `isolation_level=None`: Python would otherwise begin and commit transactions by itself.
                self._connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
                self._prepare()
            except BaseException:
                self._file.close()
                raise

    def close(self) -> None:
        """Closes the file and releases its lock."""
        with store_errors(self.path):
            self._connection.close()
        self._file.close()

    def write(self, records: PendingWrites, samples: Sequence[SampleRow] = ()) -> None:
        """Writes records and samples in one transaction: all of them, or none."""
        with store_errors(self.path), self._transaction() as connection:
            self._write_attempts(connection, records, samples)
            self._write_records(connection, records)
            self._trim(connection, records, samples)

    def runs(self) -> tuple[str, ...]:
        """Returns the names of all runs, in the order in which their newest attempts began."""
        with store_errors(self.path):
            query = "SELECT run FROM attempts GROUP BY run ORDER BY max(id)"
            return tuple(run for (run,) in self._connection.execute(query))

    def load(self, run: str, *, samples: int) -> StoredRun:
        """Returns all records of a run and its newest `samples` samples."""
        with store_errors(self.path):
            return self._load(run, samples)

    def ask(self, question: Callable[[sqlite3.Connection], Result]) -> Result:
        """Returns the answer of a function that only reads, as those of `catalog`."""
        with store_errors(self.path):
            return question(self._connection)

    def forget(self, run: str) -> None:
        """Deletes all that there is of a run; what operators did elsewhere, and silences, stay."""
        with store_errors(self.path), self._transaction() as connection:
            # The journal lets records go with all of their run alone, while its name is noted there.
            connection.execute("INSERT INTO forgetting VALUES (?)", [run])
            told = "SELECT id FROM alerts WHERE run = ? UNION SELECT id FROM decisions WHERE run = ?"
            connection.execute(f"DELETE FROM notifications WHERE fingerprint IN ({told})", [run, run])  # noqa: S608  a constant
            for table in _OF_A_RUN:
                connection.execute(f"DELETE FROM {table} WHERE run = ?", [run])  # noqa: S608  one of the names above
            connection.execute("DELETE FROM forgetting")
        for table in ("samples", "estimates"):
            self._untrimmed.pop((table, run), None)

    def transitions(self, decisions: Sequence[str]) -> tuple[TransitionRow, ...]:
        """Returns all transitions of the decisions and plans of these ids, oldest first."""
        query = (
            "SELECT id, run, decision, at, outcome, detail, author, reason FROM transitions "
            "WHERE decision = ? ORDER BY id"
        )
        with store_errors(self.path):
            # By the order in which they were written, since the clock may go back.
            found = sorted(chain.from_iterable(self._connection.execute(query, [each]) for each in decisions))
        return tuple(TransitionRow(*values) for _, *values in found)

    def requests(self, run: str, since: float, limit: int) -> tuple[RequestRow, ...]:
        """Returns the newest `limit` requests of a run, or of all for an empty name, from `since` on, oldest first.

        Modes and references are among them.
        """
        query = (
            "SELECT run, at, action, subject, outcome, detail, author, reason FROM ("
            "SELECT * FROM requests UNION ALL "
            "SELECT id, run, made_at, 'mode', '', mode, '', author, reason FROM modes UNION ALL "
            "SELECT id, run, made_at, 'reference', '', CASE name WHEN '' THEN 'cleared' ELSE 'set' END, name, author, "
            "reason FROM run_references) WHERE ? IN ('', run) AND at >= ? ORDER BY at DESC, id DESC LIMIT ?"
        )
        with store_errors(self.path):
            found = self._connection.execute(query, [run, since, limit]).fetchall()
        return tuple(RequestRow(*values) for values in reversed(found))

    def history(self, run: str, limit: int) -> StoredHistory:
        """Returns the newest `limit` samples of a run, and so many estimates of each quantity that is drawn."""
        newest = (
            "SELECT attempt, payload FROM "
            "(SELECT id, attempt, payload FROM samples WHERE run = ? ORDER BY id DESC LIMIT ?) ORDER BY id"
        )
        of_quantity = (
            "SELECT quantity, block, value, stderr, draws, estimator, step FROM "
            "(SELECT * FROM estimates WHERE run = ? AND quantity = ? ORDER BY id DESC LIMIT ?) ORDER BY id"
        )
        with store_errors(self.path):
            rows = self._connection.execute
            order = [each for (each,) in rows("SELECT attempt FROM attempts WHERE run = ? ORDER BY id", [run])]
            attempts = {attempt: number for number, attempt in enumerate(order, 1)}
            samples = [(attempts[attempt], payload) for attempt, payload in rows(newest, [run, limit])]
            found = chain.from_iterable(rows(of_quantity, [run, each, limit]) for each in DRAWN_QUANTITIES)
            estimates = [
                EstimateRow(run, quantity, block, Estimate(_known(value), _known(stderr), draws, estimator, step))
                for quantity, block, value, stderr, draws, estimator, step in found
            ]
        return StoredHistory(tuple(samples), tuple(estimates))

    def silences(self) -> tuple[Silence, ...]:
        """Returns all silences, oldest first."""
        with store_errors(self.path):
            rows = self._connection.execute("SELECT record FROM silences ORDER BY rowid")
            return tuple(Silence(**json.loads(record)) for (record,) in rows)

    def notifications(self) -> tuple[NotificationRow, ...]:
        """Returns the notifications that wait or go on, those that have waited longest first."""
        with store_errors(self.path):
            rows = self._connection.execute("SELECT fingerprint, alert, waits FROM notifications ORDER BY rowid")
            return tuple(NotificationRow(fingerprint, alert, bool(waits)) for fingerprint, alert, waits in rows)

    def keep_notifications(self, rows: Mapping[str, NotificationRow | None]) -> None:
        """Replaces notifications by fingerprint; None removes one."""
        with store_errors(self.path), self._transaction() as connection:
            connection.executemany("DELETE FROM notifications WHERE fingerprint = ?", [(each,) for each in rows])
            connection.executemany(
                "INSERT INTO notifications VALUES (?, ?, ?)", [astuple(row) for row in rows.values() if row is not None]
            )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        commits = replace(self._commits, number=self._commits.number + 1)
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            self._connection.execute("UPDATE commits SET number = ?", [commits.number])
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException:
            # On some errors, such as a full disk, SQLite has ended the transaction already.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        self._commits = commits
        self._file.note(commits)

    def _check(self) -> None:
        """Refuses a file that is no journal of ours, or not whole, by a connection that can't change it."""
        # A new journal is not in WAL mode at first. If its making was cut off, SQLite has to undo that.
        if Path(f"{self.path.resolve()}-journal").exists():
            with closing(sqlite3.connect(self.path)) as recovered:
                recovered.execute("SELECT 1 FROM sqlite_master")
        files = self._file.files
        with closing(sqlite3.connect(files.url, uri=True)) as connection:
            found = stored_commits(connection, schema_version(connection, self.path))
        files.check_commits(files.noted(), found)

    def _prepare(self) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.execute("PRAGMA recursive_triggers=ON")  # else OR REPLACE would delete rows unseen by triggers
        if version < SCHEMA_VERSION:
            # Tables and version in one transaction: a daemon killed in the middle leaves the older schema whole.
            script = "".join(SCHEMAS[version:])
            mark = f"PRAGMA application_id={APPLICATION_ID};PRAGMA user_version={SCHEMA_VERSION};"
            self._connection.executescript(f"BEGIN;{script}{mark}COMMIT;")
        self._commits = Commits(*self._connection.execute("SELECT journal, number FROM commits").fetchone())
        self._file.note(self._commits)

    def _write_attempts(
        self, connection: sqlite3.Connection, records: PendingWrites, samples: Sequence[SampleRow]
    ) -> None:
        connection.executemany(
            "INSERT INTO attempts (run, attempt, hello, seen_at) VALUES (?, ?, ?, ?) ON CONFLICT (attempt) DO NOTHING",
            [(row.run, row.attempt, row.hello, row.seen_at) for row in records.attempts.values()],
        )
        connection.executemany(
            # A sample may come twice: journalled, but sent again because the acknowledgement was lost. The first stays.
            # Not OR IGNORE, which would also drop, and so acknowledge, a sample that violates another constraint.
            "INSERT INTO samples (run, attempt, sequence, step, payload) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (attempt, sequence) DO NOTHING",
            [(row.run, row.attempt, row.sequence, row.step, row.payload) for row in samples],
        )
        # Rows of an attempt are in order, so the last one stays.
        newest = {row.attempt: row for row in samples}
        connection.executemany(
            "UPDATE attempts SET acknowledged = max(acknowledged, ?), seen_at = ?, closed = ? WHERE attempt = ?",
            [(row.sequence, row.received_at, row.closing, row.attempt) for row in newest.values()],
        )

        connection.executemany(
            "UPDATE attempts SET closed = ? WHERE attempt = ? AND closed = 0",
            [(KILLED, attempt) for attempt in records.killed],
        )

    def _write_records(self, connection: sqlite3.Connection, records: PendingWrites) -> None:
        connection.executemany(
            "INSERT INTO alerts VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET record = excluded.record",
            [
                (incident.id, incident.run, incident.first_step, record_of(incident))
                for incident in records.incidents.values()
            ],
        )
        connection.executemany(
            # Not OR REPLACE, which deletes the row and inserts a new one: decisions are loaded by rowid, the order in
            # which they were made, since the clock may go back.
            "INSERT INTO decisions VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (id) DO UPDATE SET outcome = excluded.outcome, record = excluded.record",
            [(made.id, made.run, made.made_at, made.outcome, record_of(made)) for made in records.decisions.values()],
        )
        connection.executemany(
            "INSERT INTO transitions (run, decision, at, outcome, detail, author, reason) VALUES (?, ?, ?, ?, ?, ?, ?)",
            [astuple(row) for row in records.transitions],
        )
        for revision in records.revisions.values():
            self._write_revision(connection, revision)
        # Also those that were saved: what was at their URI before was overwritten.
        connection.executemany("DELETE FROM checkpoints WHERE run = ? AND uri = ?", list(records.checkpoints))
        connection.executemany(
            "INSERT INTO checkpoints VALUES (?, ?, ?)",
            [(run, step, uri) for (run, uri), step in records.checkpoints.items() if step is not None],
        )
        connection.executemany(
            "INSERT INTO modes (run, mode, author, reason, made_at) VALUES (?, ?, ?, ?, ?)",
            [(row.run, row.mode, row.author, row.reason, row.made_at) for row in records.modes],
        )
        connection.executemany(
            "INSERT INTO estimates (run, quantity, block, estimator, step, value, stderr, draws, residual, method) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            map(_estimate, records.estimates),
        )
        connection.executemany(
            "INSERT INTO requests (run, at, action, subject, outcome, detail, author, reason) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [astuple(row) for row in records.requests],
        )
        for row in records.references:
            # Who set which reference is kept; the losses of one that is replaced are not.
            connection.execute("UPDATE run_references SET losses = NULL WHERE run = ?", [row.run])
            connection.execute(
                "INSERT INTO run_references (run, name, losses, author, reason, made_at) VALUES (?, ?, ?, ?, ?, ?)",
                [row.run, row.name, row.losses, row.author, row.reason, row.made_at],
            )
        connection.executemany(
            # A state: an earlier one is of no use.
            "INSERT INTO baselines VALUES (?, ?, ?, ?) ON CONFLICT (run) DO UPDATE SET "
            "attempt = excluded.attempt, sequence = excluded.sequence, state = excluded.state",
            [(row.run, row.attempt, row.sequence, row.state) for row in records.baselines.values()],
        )
        connection.executemany(
            # As decisions, in the order in which they were made.
            "INSERT INTO silences VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET record = excluded.record",
            [(silence.id, silence.made_at, record_of(silence)) for silence in records.silences.values()],
        )
        connection.executemany(
            # As decisions, in the order in which they were made.
            "INSERT INTO plans VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET record = excluded.record",
            [(plan.id, plan.run, plan.made_at, record_of(plan)) for plan in records.plans.values()],
        )

    def _write_revision(self, connection: sqlite3.Connection, new: Revision) -> None:
        key = (new.run, new.revision)
        found = connection.execute("SELECT record FROM revisions WHERE run = ? AND revision = ?", key).fetchone()
        if found is None:
            connection.execute("INSERT INTO revisions VALUES (?, ?, ?)", (*key, record_of(new)))
            return
        kept = revision_of(found[0])
        # All that may come later is the step at which the trainer put it in force.
        if kept.applied_step not in {None, new.applied_step} or replace(kept, applied_step=new.applied_step) != new:
            raise RevisionConflictError(
                f"journal {self.path}: revision {new.revision} of run {new.run} is there already with other content, "
                f"of decision {kept.decision_id}, and is not overwritten by that of decision {new.decision_id}",
                run=new.run,
                revision=new.revision,
            )
        connection.execute("UPDATE revisions SET record = ? WHERE run = ? AND revision = ?", (record_of(new), *key))

    def _trim(self, connection: sqlite3.Connection, records: PendingWrites, samples: Sequence[SampleRow]) -> None:
        self._untrimmed.update(("samples", row.run) for row in samples)
        self._untrimmed.update(("estimates", row.run) for row in records.estimates)
        for key in [key for key, count in self._untrimmed.items() if count >= _TRIM_EVERY]:
            table, run = key
            connection.execute(
                f"DELETE FROM {table} WHERE run = ? AND id <= "  # noqa: S608  the name of one of two tables
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
        baselines = rows("SELECT attempt, sequence, state FROM baselines WHERE run = ?", [run]).fetchone()
        reference = rows(
            "SELECT name, losses, author, reason, made_at FROM run_references WHERE run = ? ORDER BY id DESC LIMIT 1",
            [run],
        ).fetchone()
        mode = rows(
            "SELECT run, mode, author, reason, made_at FROM modes WHERE run = ? ORDER BY id DESC LIMIT 1", [run]
        ).fetchone()
        return StoredRun(
            run=run,
            attempts=tuple(
                StoredAttempt(attempt, hello, acknowledged, seen_at, closed == CLOSED, closed == KILLED)
                for attempt, hello, acknowledged, seen_at, closed in attempts
            ),
            samples=tuple(
                SampleRow(run, attempt, sequence, step, payload, received_at=0.0)
                for attempt, sequence, step, payload in reversed(newest)
            ),
            incidents=tuple(
                incident_of(record)
                for (record,) in rows("SELECT record FROM alerts WHERE run = ? ORDER BY first_step, rowid", [run])
            ),
            decisions=tuple(
                decision_of(record)
                for (record,) in rows("SELECT record FROM decisions WHERE run = ? ORDER BY rowid", [run])
            ),
            revisions=tuple(
                revision_of(record)
                for (record,) in rows("SELECT record FROM revisions WHERE run = ? ORDER BY revision", [run])
            ),
            checkpoints=tuple(
                Checkpoint(step, uri)
                for step, uri in rows("SELECT step, uri FROM checkpoints WHERE run = ? ORDER BY rowid", [run])
            ),
            mode=ModeRow(*mode) if mode else None,
            baselines=None if baselines is None else BaselinesRow(run, *baselines),
            reference=ReferenceRow(run, *reference) if reference and reference[0] else None,
            plans=tuple(
                plan_of(record) for (record,) in rows("SELECT record FROM plans WHERE run = ? ORDER BY rowid", [run])
            ),
            outcomes=tuple(
                rows(
                    "SELECT t.decision, t.outcome FROM decisions d JOIN transitions t ON t.decision = d.id "
                    "WHERE d.run = ? ORDER BY t.id",
                    [run],
                )
            ),
        )


class Store:
    """An open journal on a thread of its own, so that a slow disk never blocks the event loop.

    Use `Store.open` to make one. Every method raises `StoreError`, as `Journal` does.
    """

    def __init__(self, journal: Journal, thread: ThreadPoolExecutor) -> None:
        self._journal = journal
        self._thread = thread

    @classmethod
    async def open(cls, url: str, *, retain_samples: int) -> Store:
        """Opens a journal, or creates it, for this process alone.

        Args:
            url: Where the journal is, as `sqlite:///PATH`.
            retain_samples: How many of its newest samples are kept of each run.

        Raises:
            StoreError: It can't be opened, is of a newer version, or another daemon is using it.
        """
        # One thread: a journal is for one thread at a time, and writes stay in the order in which they were asked for.
        thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        opening = partial(Journal, url, retain_samples=retain_samples)
        try:
            journal = await asyncio.get_running_loop().run_in_executor(thread, opening)
        except BaseException:
            thread.shutdown()
            raise
        return cls(journal, thread)

    @property
    def path(self) -> Path:
        """The journal's file."""
        return self._journal.path

    async def write(self, records: PendingWrites, samples: Sequence[SampleRow] = ()) -> None:
        """Writes records and samples in one transaction; returns once they would survive power loss."""
        await self._call(partial(self._journal.write, records, samples))

    async def runs(self) -> tuple[str, ...]:
        """Returns the names of all runs, in the order in which their newest attempts began."""
        return await self._call(self._journal.runs)

    async def load(self, run: str, *, samples: int) -> StoredRun:
        """Returns all records of a run and its newest `samples` samples."""
        return await self._call(partial(self._journal.load, run, samples=samples))

    async def ask(self, question: Callable[[sqlite3.Connection], Result]) -> Result:
        """Returns the answer of a function that only reads, as those of `catalog`."""
        return await self._call(partial(self._journal.ask, question))

    async def forget(self, run: str) -> None:
        """Deletes all that there is of a run."""
        await self._call(partial(self._journal.forget, run))

    async def transitions(self, decisions: Sequence[str]) -> tuple[TransitionRow, ...]:
        """Returns all transitions of the decisions and plans of these ids, oldest first."""
        return await self._call(partial(self._journal.transitions, decisions))

    async def requests(self, run: str, since: float, limit: int) -> tuple[RequestRow, ...]:
        """Returns the newest `limit` requests of a run, or of all for an empty name, from `since` on, oldest first."""
        return await self._call(partial(self._journal.requests, run, since, limit))

    async def history(self, run: str, limit: int) -> StoredHistory:
        """Returns the newest `limit` samples of a run, and so many estimates of each quantity that is drawn."""
        return await self._call(partial(self._journal.history, run, limit))

    async def silences(self) -> tuple[Silence, ...]:
        """Returns all silences, oldest first."""
        return await self._call(self._journal.silences)

    async def notifications(self) -> tuple[NotificationRow, ...]:
        """Returns the notifications that wait or go on, those that have waited longest first."""
        return await self._call(self._journal.notifications)

    async def keep_notifications(self, rows: Mapping[str, NotificationRow | None]) -> None:
        """Replaces notifications by fingerprint; None removes one."""
        await self._call(partial(self._journal.keep_notifications, rows))

    async def close(self) -> None:
        """Closes the journal after the writes in progress."""
        await self._call(self._journal.close)
        self._thread.shutdown()

    async def _call(self, function: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)
