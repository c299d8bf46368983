"""Which samples and estimates the journal keeps of each run: by number, by bytes and by age.

Samples are trimmed by segments, each a twentieth of what is kept, that came one after the other. A table has for each
its newest id, when that came, and the bytes. So nothing is read of the samples that are kept, and few writes trim.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate, islice

from sqlalchemy import Connection, delete, func, insert, select

from sharpwatch.common.shards import every_run
from sharpwatch.daemon.storage import tables

_SMALLEST, _LARGEST = 100, 500  # samples of a segment
_AT_ONCE = 5  # segments dropped in one transaction, so that none takes long where limits were lowered
_ENDED_AT_ONCE = 20  # segments of runs that no longer grow, made in one transaction; each reads 500 rows
_LOOK_EVERY = 3600.0  # seconds between two looks for what is too old
_DAY = 86_400.0
_ESTIMATES_PER_SAMPLE = 4
_samples, _segments, _estimates = tables.samples.c, tables.segments.c, tables.estimates.c


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is kept of each run; what exceeds any of these goes, the oldest first.

    Attributes:
        samples: The number of samples.
        days: Days since a sample came; None for no limit.
        bytes: What the samples have; None for no limit. The newest few hundred stay in any case.
    """

    samples: int
    days: float | None = None
    bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Growth:
    """How many samples and estimates were written, by run."""

    samples: Counter[str] = field(default_factory=Counter)
    estimates: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Segment:
    last_id: int
    received_at: float
    samples: int
    bytes: int


class Retention:
    """Trims a journal while it is written.

    Args:
        limits: What is kept.
        holds: Whether a run is this daemon's. Others write and trim those of theirs.
    """

    def __init__(self, limits: Limits, holds: Callable[[str], bool] = every_run) -> None:
        self._limits = limits
        self._holds = holds
        self._segment = min(max(limits.samples // 20, _SMALLEST), _LARGEST)
        self._samples: Counter[str] = Counter()  # by run, since its last trim
        self._estimates: Counter[str] = Counter()
        self._growing: set[str] = set()  # runs that have grown since the last look
        self._next_look = 0.0

    def trim(self, connection: Connection, grown: Growth, now: float) -> None:
        """Trims the runs that have grown, in the transaction that is under way.

        Args:
            connection: The database.
            grown: What was written since the last call.
            now: Unix seconds.
        """
        self._samples.update(grown.samples)
        self._growing.update(grown.samples)
        self._estimates.update(grown.estimates)
        for run in [run for run, count in self._samples.items() if count >= self._segment]:
            del self._samples[run]
            self._end_segments(connection, run, now)
            self._drop_segments(connection, run, now)
        for run in [run for run, count in self._estimates.items() if count >= self._segment]:
            del self._estimates[run]
            self._drop_estimates(connection, run)
        if self._limits.days is not None and now >= self._next_look:
            self._next_look = now + _LOOK_EVERY
            self._drop_old(connection, now)

    def _end_segments(self, connection: Connection, run: str, now: float, *, whole: bool = True) -> int:
        """Makes segments of samples that are in none, if `whole` only of as many as one has; returns how many."""
        last = connection.execute(select(func.max(_segments.last_id)).where(_segments.run == run)).scalar_one() or 0
        query = select(_samples.id, func.length(tables.samples.c.payload))
        rows = connection.execute(query.where(_samples.run == run, _samples.id > last).order_by(_samples.id)).all()
        chunks = [rows[start : start + self._segment] for start in range(0, len(rows), self._segment)]
        if whole and chunks and len(chunks[-1]) < self._segment:
            chunks.pop()
        if chunks and not whole:  # nothing has come for some time
            seen = select(func.max(tables.attempts.c.seen_at)).where(tables.attempts.c.run == run)
            now = min(now, connection.execute(seen).scalar() or now)
        made = [
            {
                "run": run,
                "last_id": chunk[-1][0],
                "received_at": now,
                "samples": len(chunk),
                "bytes": sum(size for _, size in chunk),
            }
            for chunk in chunks
        ]
        if made:
            connection.execute(insert(tables.segments), made)
        return len(made)

    def _drop_segments(self, connection: Connection, run: str, now: float) -> None:
        query = select(tables.segments).where(_segments.run == run).order_by(_segments.last_id.desc())
        segments = [_Segment(*values) for _, *values in connection.execute(query)]
        if not segments:
            return
        newest, *older = segments
        dropped: list[int] = []
        kept = accumulate((each.bytes for each in older), initial=newest.bytes)
        newer = accumulate((each.samples for each in older), initial=newest.samples)
        next(kept)
        for each, total, after in zip(older, kept, newer, strict=False):
            if (
                dropped
                or after >= self._limits.samples
                or total > (self._limits.bytes or total)
                or self._is_old(each, now)
            ):
                dropped.append(each.last_id)
        if dropped:
            _drop(connection, run, dropped[-_AT_ONCE:][0])

    def _is_old(self, segment: _Segment, now: float) -> bool:
        return self._limits.days is not None and segment.received_at < now - _DAY * self._limits.days

    def _drop_estimates(self, connection: Connection, run: str) -> None:
        count = self._limits.samples * _ESTIMATES_PER_SAMPLE
        last = select(_estimates.id).where(_estimates.run == run).order_by(_estimates.id.desc()).offset(count).limit(1)
        connection.execute(
            delete(tables.estimates).where(_estimates.run == run, _estimates.id <= last.scalar_subquery())
        )

    def _drop_old(self, connection: Connection, now: float) -> None:
        """Drops samples that are too old, also of runs that no longer grow, and estimates of runs without samples."""
        ended = 0
        for run in connection.execute(select(tables.attempts.c.run).distinct()).scalars().all():
            if run not in self._growing and self._holds(run):
                ended += self._end_segments(connection, run, now, whole=False)
            if ended >= _ENDED_AT_ONCE:  # only after an upgrade; the others are next
                self._next_look = now
                return
        self._growing.clear()
        oldest = select(_segments.run, _segments.last_id).where(
            _segments.received_at < now - _DAY * (self._limits.days or 0)
        )
        rows = connection.execute(oldest.order_by(_segments.received_at))
        found = list(islice(((run, last) for run, last in rows if self._holds(run)), _AT_ONCE))
        for run, last in found:
            _drop(connection, run, last)
            if connection.execute(select(_samples.id).where(_samples.run == run).limit(1)).first() is None:
                connection.execute(delete(tables.estimates).where(_estimates.run == run))
        if len(found) == _AT_ONCE:
            self._next_look = now


def _drop(connection: Connection, run: str, last: int) -> None:
    connection.execute(delete(tables.samples).where(_samples.run == run, _samples.id <= last))
    connection.execute(delete(tables.segments).where(_segments.run == run, _segments.last_id <= last))
