"""The journal: a database in which the daemon keeps samples and records, written on a thread of its own."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from itertools import chain
from typing import Any, TypeVar, cast

from sqlalchemy import (
    Connection,
    case,
    delete,
    insert,
    literal,
    select,
    union_all,
)

from sharpwatch.common.shards import WHOLE, Shard, every_run
from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.records import Revision, Silence
from sharpwatch.daemon.storage import tables
from sharpwatch.daemon.storage.database import PostgresqlDatabase, open_database
from sharpwatch.daemon.storage.loading import known, load_commits, load_run, load_silences, newest_rows
from sharpwatch.daemon.storage.records_json import record_of, revision_of
from sharpwatch.daemon.storage.retention import Growth, Limits, Retention
from sharpwatch.daemon.storage.schema import (
    DRAWN_QUANTITIES,
    KILLED,
    EstimateRow,
    NotificationRow,
    PendingWrites,
    RequestRow,
    SampleRow,
    StoredHistory,
    StoredRun,
    TransitionRow,
)
from sharpwatch.daemon.storage.shards import ShardRow
from sharpwatch.daemon.storage.statements import Row, compiled_writes
from sharpwatch.errors import RevisionConflictError, StoreError

Result = TypeVar("Result")
_FORGOTTEN_AT_ONCE = 1_000  # samples
_TRIM_EVERY = 100  # samples and estimates, of all runs


def _estimate(row: EstimateRow) -> Row:
    one = row.estimate
    return {
        "run": row.run,
        "quantity": row.quantity,
        "block": row.block,
        "estimator": one.estimator,
        "step": one.step,
        "value": _finite(one.value),
        "stderr": _finite(one.stderr),
        "draws": one.draws,
        "residual": _finite(one.residual),
        "method": one.method,
    }


def _finite(value: float | None) -> float | None:
    # SQLite stores a NaN as NULL.
    return None if value is None or math.isnan(value) else value


class Journal:
    """An open journal, for one thread at a time.

    Every method raises `StoreError`, with the journal's name and the cause, if it can't be opened, read or written.

    Args:
        url: Where the journal is, as `sqlite:///PATH` or `postgresql+psycopg://USER@HOST/DATABASE`. A file that does
            not exist is made; a database must.
        retain_samples: How many of its newest samples are kept of each run.
        retain_days: For how many days samples are kept; None for no limit.
        retain_bytes: How many bytes of samples are kept of each run; None for no limit.
        shard: The daemon's own shard of the runs; others are taken with `take`.
        holds: Whether a run is of a shard that the daemon holds: retention leaves others alone.
    """

    def __init__(  # noqa: PLR0913  what is kept of which runs
        self,
        url: str,
        *,
        retain_samples: int,
        retain_days: float | None = None,
        retain_bytes: int | None = None,
        shard: Shard = WHOLE,
        holds: Callable[[str], bool] = every_run,
    ) -> None:
        self._retention = Retention(Limits(retain_samples, retain_days, retain_bytes), holds)
        self._shard = shard.index
        self._database = open_database(url, shard)
        self.name = self._database.name
        # The rows of a commit that is under way. If the connection is lost then, nobody knows whether it was made.
        self._uncertain: tuple[object, ...] | None = None
        self._written: dict[int, object] = {}  # rows of such a commit that was made, by their `id()`
        self._grown = Growth()
        try:
            with self._reading() as connection:
                self._writes = compiled_writes(connection.dialect)
                self._commits = load_commits(connection, self._shard)
        except BaseException:
            self._database.close()
            raise
        self._session = self._database.session

    def close(self) -> None:
        """Closes the journal and releases its lock."""
        self._database.close()

    def write(self, records: PendingWrites, samples: Sequence[SampleRow] = ()) -> None:
        """Writes records and samples in one transaction: all of them, or none."""
        with self._transaction(_appended(records)) as connection:
            records = records.without(self._written) if self._written else records
            self._write_attempts(connection, records, samples)
            self._write_states(connection, records)
            self._append(connection, records)
            self._grown.samples.update(row.run for row in samples)
            self._grown.estimates.update(row.run for row in records.estimates)
            if self._grown.samples.total() + self._grown.estimates.total() >= _TRIM_EVERY:
                grown, self._grown = self._grown, Growth()
                self._retention.trim(connection, grown, time.time())

    def forget(self, run: str, request: RequestRow) -> None:
        """Deletes everything of a run, for ever, but for silences.

        Args:
            run: Its name. It must not be live: what it sends is written again.
            request: The operator's request, which is kept.
        """
        with self._transaction((request,)) as connection:
            connection.execute(insert(tables.forgetting).values(run=run))
            for table in tables.metadata.sorted_tables:
                if "run" in table.c and table is not tables.forgetting:
                    connection.execute(delete(table).where(table.c.run == run))
            self._forget_by_content(connection, run)
            connection.execute(delete(tables.forgetting))
            if id(request) not in self._written:
                self._run(connection, "requests", [_row(request)])

    def forget_samples(self, run: str, limit: int) -> bool:
        """Deletes the `limit` oldest samples of a run; returns whether there were as many."""
        oldest = (
            select(tables.samples.c.id).where(tables.samples.c.run == run).order_by(tables.samples.c.id).limit(limit)
        )
        with self._transaction() as connection:
            found = connection.execute(oldest).scalars().all()
            if found:
                connection.execute(
                    delete(tables.samples).where(tables.samples.c.run == run, tables.samples.c.id <= found[-1])
                )
        return len(found) == limit

    def load(self, run: str, *, samples: int) -> StoredRun:
        """Returns all records of a run and its newest `samples` samples."""
        with self._reading() as connection:
            return load_run(connection, run, samples)

    def ask(self, question: Callable[[Connection], Result]) -> Result:
        """Returns the answer of a function that only reads, as those of `catalog`."""
        with self._reading() as connection:
            return question(connection)

    def transitions(self, decisions: Sequence[str]) -> tuple[TransitionRow, ...]:
        """Returns all transitions of the decisions and plans of these ids, oldest first."""
        of = tables.transitions.c
        query = select(of.id, of.run, of.decision, of.at, of.outcome, of.detail, of.author, of.reason)
        with self._reading() as connection:
            # By the order in which they were written, since the clock may go back.
            found = sorted(
                chain.from_iterable(connection.execute(query.where(of.decision == each)) for each in decisions)
            )
        return tuple(TransitionRow(*values) for _, *values in found)

    def requests(self, run: str, since: float, limit: int) -> tuple[RequestRow, ...]:
        """Returns the newest `limit` requests of a run, or of all for an empty name, from `since` on, oldest first.

        Modes and references are among them.
        """
        asked, set_modes, set_to = tables.requests.c, tables.modes.c, tables.run_references.c
        empty = literal("")
        every = union_all(
            select(asked.id, *(asked[field.name] for field in fields(RequestRow))),
            select(
                *(set_modes.id, set_modes.run, set_modes.made_at, literal("mode"), empty, set_modes.mode, empty),
                *(set_modes.author, set_modes.reason),
            ),
            select(
                *(set_to.id, set_to.run, set_to.made_at, literal("reference"), empty),
                *(case((set_to.name == "", "cleared"), else_="set"), set_to.name, set_to.author, set_to.reason),
            ),
        ).subquery()
        query = select(*(every.c[field.name] for field in fields(RequestRow))).where(every.c.at >= since)
        query = query.where(every.c.run == run) if run else query
        with self._reading() as connection:
            found = connection.execute(query.order_by(every.c.at.desc(), every.c.id.desc()).limit(limit)).all()
        return tuple(RequestRow(*values) for values in reversed(found))

    def history(self, run: str, limit: int) -> StoredHistory:
        """Returns the newest `limit` samples of a run, and so many estimates of each quantity that is drawn."""
        began = select(tables.attempts.c.attempt).where(tables.attempts.c.run == run).order_by(tables.attempts.c.id)
        newest = newest_rows(tables.samples, limit, tables.samples.c.run == run)
        of = tables.estimates.c
        with self._reading() as connection:
            attempts = {attempt: number for number, attempt in enumerate(connection.execute(began).scalars(), 1)}
            samples = [(attempts[row.attempt], row.payload) for row in connection.execute(newest)]
            found = chain.from_iterable(
                connection.execute(newest_rows(tables.estimates, limit, of.run == run, of.quantity == each))
                for each in DRAWN_QUANTITIES
            )
            estimates = [
                EstimateRow(
                    *(run, row.quantity, row.block),
                    Estimate(known(row.value), known(row.stderr), row.draws, row.estimator, row.step),
                )
                for row in found
            ]
        return StoredHistory(tuple(samples), tuple(estimates))

    def silences(self) -> tuple[Silence, ...]:
        """Returns all silences, oldest first."""
        with self._reading() as connection:
            return load_silences(connection)

    def notifications(self) -> tuple[NotificationRow, ...]:
        """Returns the notifications that wait or go on, those that have waited longest first."""
        of = tables.notifications.c
        with self._reading() as connection:
            rows = connection.execute(select(of.fingerprint, of.alert, of.waits).order_by(of.rowid))
            return tuple(NotificationRow(fingerprint, alert, bool(waits)) for fingerprint, alert, waits in rows)

    def keep_notifications(self, rows: Mapping[str, NotificationRow | None]) -> None:
        """Replaces notifications by fingerprint; None removes one."""
        with self._transaction() as connection:
            self._run(connection, "notifications gone", [{"of": each} for each in rows])
            new = [{**_row(row), "waits": int(row.waits)} for row in rows.values() if row is not None]
            self._run(connection, "notifications", new)

    def look(self, address: str) -> list[ShardRow]:
        """Shows the other daemons of a shared journal that this one lives, and where agents reach it.

        Returns:
            What the database says of all shards.
        """
        return self._shared.look(address)

    def take(self, shard: int, address: str) -> bool:
        """Takes a shard of a shared journal, if no daemon holds it; returns whether this one does now."""
        return self._shared.take(shard, address)

    def give(self, shard: int) -> None:
        """Releases a shard, all of whose runs' records are written, to the next daemon that asks."""
        self._shared.give(shard)

    @property
    def _shared(self) -> PostgresqlDatabase:
        return cast("PostgresqlDatabase", self._database)  # no other can be opened for a shard

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._database.transaction() as connection:
            yield connection

    @contextmanager
    def _transaction(self, rows: tuple[object, ...] = ()) -> Iterator[Connection]:
        """Runs a transaction and counts it.

        Args:
            rows: Those of it that must be written once.
        """
        with self._database.transaction() as connection:
            self._resume(connection)
            before = self._commits.number
            if self._run(connection, "commit", [{"of": self._shard, "before": before, "after": before + 1}]) != 1:
                raise StoreError(f"journal {self.name}: another daemon has written to it meanwhile; restart this one")
            yield connection
            self._uncertain = rows
        self._uncertain = None
        self._written.clear()
        self._commits = replace(self._commits, number=before + 1)
        self._database.acknowledged(self._commits)

    def _resume(self, connection: Connection) -> None:
        """After a lost connection, finds out whether the commit that was under way then was made."""
        uncertain, self._uncertain = self._uncertain, None
        if self._session != self._database.session:
            found = load_commits(connection, self._shard)
            if uncertain is not None and found == replace(self._commits, number=self._commits.number + 1):
                self._commits = found
                self._written.update((id(row), row) for row in uncertain)
            self._session = self._database.session

    def _run(self, connection: Connection, name: str, rows: Sequence[Row]) -> int:
        """Executes one of `statements` for each row; returns how many rows of the table that concerned."""
        if not rows:
            return 0
        statement = self._writes[name]
        order = statement.order
        values = rows if order is None else [tuple(row[each] for each in order) for row in rows]
        return connection.exec_driver_sql(statement.text, values).rowcount

    def _write_attempts(self, connection: Connection, records: PendingWrites, samples: Sequence[SampleRow]) -> None:
        self._run(connection, "attempts", [_row(row) for row in records.attempts.values()])
        kept = [
            {
                "run": row.run,
                "attempt": row.attempt,
                "sequence": row.sequence,
                "step": row.step,
                "payload": row.payload,
            }
            for row in samples
        ]
        self._run(connection, "samples", kept)
        # Rows of an attempt are in order, so the last one stays.
        newest = {row.attempt: row for row in samples}
        heard = [
            {"of": row.attempt, "newest": row.sequence, "heard_at": row.received_at, "closing": int(row.closing)}
            for row in newest.values()
        ]
        self._run(connection, "heard", heard)
        self._run(connection, "killed", [{"of": attempt, "before": 0, "closing": KILLED} for attempt in records.killed])

    def _write_states(self, connection: Connection, records: PendingWrites) -> None:
        """Writes records of which only the newest state is kept, each in the place of the one before."""
        incidents = [
            {"id": each.id, "run": each.run, "first_step": each.first_step, "record": record_of(each)}
            for each in records.incidents.values()
        ]
        decisions = [
            {
                "id": made.id,
                "run": made.run,
                "made_at": made.made_at,
                "outcome": made.outcome,
                "record": record_of(made),
            }
            for made in records.decisions.values()
        ]
        silences = [
            {"id": each.id, "made_at": each.made_at, "record": record_of(each)} for each in records.silences.values()
        ]
        plans = [
            {"id": plan.id, "run": plan.run, "made_at": plan.made_at, "record": record_of(plan)}
            for plan in records.plans.values()
        ]
        self._run(connection, "incidents", incidents)
        self._run(connection, "decisions", decisions)
        self._run(connection, "silences", silences)
        self._run(connection, "plans", plans)
        self._run(connection, "baselines", [_row(row) for row in records.baselines.values()])
        for revision in records.revisions.values():
            self._write_revision(connection, revision)
        # Also those that were saved: what was at their URI before was overwritten.
        self._run(connection, "checkpoints gone", [{"of": run, "at": uri} for run, uri in records.checkpoints])
        saved = [
            {"run": run, "step": step, "uri": uri}
            for (run, uri), step in records.checkpoints.items()
            if step is not None
        ]
        self._run(connection, "checkpoints", saved)

    def _append(self, connection: Connection, records: PendingWrites) -> None:
        """Writes records of which each is kept."""
        self._run(connection, "transitions", [_row(row) for row in records.transitions])
        self._run(connection, "modes", [_row(row) for row in records.modes])
        self._run(connection, "estimates", [_estimate(row) for row in records.estimates])
        self._run(connection, "requests", [_row(row) for row in records.requests])
        for row in records.references:
            # Who set which reference is kept; the losses of one that is replaced are not.
            self._run(connection, "references replaced", [{"of": row.run}])
            self._run(connection, "references", [_row(row)])

    def _write_revision(self, connection: Connection, new: Revision) -> None:
        of = tables.revisions.c
        this = (of.run == new.run) & (of.revision == new.revision)
        found = connection.execute(select(of.record).where(this)).scalar()
        if found is None:
            values = {"run": new.run, "revision": new.revision, "record": record_of(new)}
            self._run(connection, "revisions", [values])
            return
        kept = revision_of(found)
        # All that may come later is the step at which the trainer put it in force.
        if kept.applied_step not in {None, new.applied_step} or replace(kept, applied_step=new.applied_step) != new:
            raise RevisionConflictError(
                f"journal {self.name}: revision {new.revision} of run {new.run} is there already with other content, "
                f"of decision {kept.decision_id}, and is not overwritten by that of decision {new.decision_id}",
                run=new.run,
                revision=new.revision,
            )
        self._run(connection, "revision", [{"of": new.run, "number": new.revision, "new": record_of(new)}])

    def _forget_by_content(self, connection: Connection, run: str) -> None:
        """Deletes the notifications that are about a run, which only their content says."""
        of = tables.notifications.c
        told = connection.execute(select(of.fingerprint, of.alert)).all()
        gone = [fingerprint for fingerprint, alert in told if json.loads(alert)["labels"].get("run") == run]
        connection.execute(delete(tables.notifications).where(of.fingerprint.in_(gone)))


def _appended(records: PendingWrites) -> tuple[object, ...]:
    """The rows that must be written once; writing one of the other records twice changes nothing."""
    return (
        *records.transitions,
        *records.modes,
        *records.estimates,
        *records.references,
        *records.requests,
    )


def _row(value: Any) -> Row:
    """The columns of a record that has one field for each. Not `asdict`, which copies what is in them."""
    return {field.name: getattr(value, field.name) for field in fields(value)}


class Store:
    """An open journal on a thread of its own, so that a slow disk never blocks the event loop.

    Use `Store.open` to make one. Every method raises `StoreError`, as `Journal` does.
    """

    def __init__(self, journal: Journal, thread: ThreadPoolExecutor) -> None:
        self._journal = journal
        self._thread = thread
        self._reading = asyncio.Lock()

    @classmethod
    async def open(  # noqa: PLR0913  as of `Journal`
        cls,
        url: str,
        *,
        retain_samples: int,
        retain_days: float | None = None,
        retain_bytes: int | None = None,
        shard: Shard = WHOLE,
        holds: Callable[[str], bool] = every_run,
    ) -> Store:
        """Opens a journal, or creates it, for this process alone.

        Args:
            url: Where the journal is, as of `Journal`.
            retain_samples: How many of its newest samples are kept of each run.
            retain_days: For how many days samples are kept; None for no limit.
            retain_bytes: How many bytes of samples are kept of each run; None for no limit.
            shard: As of `Journal`.
            holds: As of `Journal`.

        Raises:
            StoreError: It can't be opened, is of a newer version, or another daemon is using it.
        """
        # One thread: a journal is for one thread at a time, and writes stay in the order in which they were asked for.
        thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        opening = partial(
            Journal,
            url,
            retain_samples=retain_samples,
            retain_days=retain_days,
            retain_bytes=retain_bytes,
            shard=shard,
            holds=holds,
        )
        try:
            journal = await asyncio.get_running_loop().run_in_executor(thread, opening)
        except BaseException:
            thread.shutdown()
            raise
        return cls(journal, thread)

    @property
    def name(self) -> str:
        """Where the journal is: its file, or its URL without a password."""
        return self._journal.name

    async def write(self, records: PendingWrites, samples: Sequence[SampleRow] = ()) -> None:
        """Writes records and samples in one transaction; returns once they would survive power loss."""
        await self._call(partial(self._journal.write, records, samples))

    async def load(self, run: str, *, samples: int) -> StoredRun:
        """Returns all records of a run and its newest `samples` samples."""
        return await self._read(partial(self._journal.load, run, samples=samples))

    async def ask(self, question: Callable[[Connection], Result]) -> Result:
        """Returns the answer of a function that only reads, as those of `catalog`."""
        return await self._read(partial(self._journal.ask, question))

    async def transitions(self, decisions: Sequence[str]) -> tuple[TransitionRow, ...]:
        """Returns all transitions of the decisions and plans of these ids, oldest first."""
        return await self._read(partial(self._journal.transitions, decisions))

    async def requests(self, run: str, since: float, limit: int) -> tuple[RequestRow, ...]:
        """Returns the newest `limit` requests of a run, or of all for an empty name, from `since` on, oldest first."""
        return await self._read(partial(self._journal.requests, run, since, limit))

    async def history(self, run: str, limit: int) -> StoredHistory:
        """Returns the newest `limit` samples of a run, and so many estimates of each quantity that is drawn."""
        return await self._read(partial(self._journal.history, run, limit))

    async def silences(self) -> tuple[Silence, ...]:
        """Returns all silences, oldest first."""
        return await self._read(self._journal.silences)

    async def notifications(self) -> tuple[NotificationRow, ...]:
        """Returns the notifications that wait or go on, those that have waited longest first."""
        return await self._read(self._journal.notifications)

    async def keep_notifications(self, rows: Mapping[str, NotificationRow | None]) -> None:
        """Replaces notifications by fingerprint; None removes one."""
        await self._call(partial(self._journal.keep_notifications, rows))

    async def forget(self, run: str, request: RequestRow) -> None:
        """Deletes everything of a run, for ever, but for silences; returns whether there was such a run.

        Args:
            run: Its name. It must not be live: what it sends is written again.
            request: The operator's request, which is kept.
        """
        # In parts, so that no other run's samples wait for long.
        while await self._call(partial(self._journal.forget_samples, run, _FORGOTTEN_AT_ONCE)):
            pass
        await self._call(partial(self._journal.forget, run, request))

    async def look(self, address: str) -> list[ShardRow]:
        """Shows the other daemons of a shared journal that this one lives; returns what they say of theirs."""
        return await self._call(partial(self._journal.look, address))

    async def take(self, shard: int, address: str) -> bool:
        """Takes a shard of a shared journal, if no daemon holds it; returns whether this one does now."""
        return await self._call(partial(self._journal.take, shard, address))

    async def give(self, shard: int) -> None:
        """Releases a shard, all of whose runs' records are written, to the next daemon that asks."""
        await self._call(partial(self._journal.give, shard))

    async def close(self) -> None:
        """Closes the journal after the writes in progress."""
        await self._call(self._journal.close)
        self._thread.shutdown()

    async def _read(self, function: Callable[[], Result]) -> Result:
        # One at a time, so that no write waits for more than one of them, however many are asked for.
        async with self._reading:
            return await self._call(function)

    async def _call(self, function: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)
