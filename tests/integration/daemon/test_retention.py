"""What the journal keeps of samples: by number, by bytes and by age; and what is left of a run that is forgotten."""

from __future__ import annotations

from contextlib import closing
from itertools import pairwise

import pytest
from observations import incident
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.records import Decision, LrPlan, Revision, Silence
from sharpwatch.daemon.storage import catalog, tables
from sharpwatch.daemon.storage.journal import Journal, Store
from sharpwatch.daemon.storage.schema import (
    AttemptRow,
    BaselinesRow,
    EstimateRow,
    ModeRow,
    NotificationRow,
    PendingWrites,
    ReferenceRow,
    RequestRow,
    SampleRow,
    TransitionRow,
)
from sharpwatch.errors import StoreError

DAY = 86_400.0
NOW = 1_800_000_000.0
FORGET = RequestRow("gone", 9.0, "forget", "", "done", "150 samples", "ann", "asked to")


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("sharpwatch.daemon.storage.journal.time.time", clock)
    return clock


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    return (
        f"sqlite:///{tmp_path}/journal.db" if request.param == "sqlite" else request.getfixturevalue("postgresql").url()
    )


def attempt(run: str) -> PendingWrites:
    return PendingWrites(attempts={run: AttemptRow(run, run, b"hello", NOW)})


def add(journal: Journal, run: str, first: int, last: int, *, size: int = 10, at: int = 40) -> None:
    """Write samples `first` to `last` of a run, `at` at once."""
    for start in range(first, last + 1, at):
        numbers = range(start, min(start + at, last + 1))
        journal.write(PendingWrites(), [SampleRow(run, run, n, n, b"x" * size, NOW) for n in numbers])


def kept(journal: Journal, run: str) -> list[int]:
    return [row.sequence for row in journal.load(run, samples=100_000).samples]


def test_the_newest_samples_of_each_run_are_kept(url):
    with closing(Journal(url, retain_samples=1000)) as journal:
        journal.write(attempt("long"))
        journal.write(attempt("short"))
        add(journal, "short", 1, 300)
        add(journal, "long", 1, 3000)
        assert kept(journal, "short") == list(range(1, 301))
        found = kept(journal, "long")
        assert found == list(range(found[0], 3001))
        assert 1000 <= len(found) < 1000 + 100 + 100 + 40  # a segment, what is in none yet, and a write


def test_bytes_limit_the_large_runs_alone(url):
    with closing(Journal(url, retain_samples=1000, retain_bytes=200_000)) as journal:
        journal.write(attempt("large"))
        journal.write(attempt("small"))
        add(journal, "large", 1, 600, size=1000)
        add(journal, "small", 1, 600, size=10)
        found = kept(journal, "large")
        assert found == list(range(found[0], 601))
        assert 100 <= len(found) <= 200 + 100 + 40
        assert kept(journal, "small") == list(range(1, 601))


def test_the_newest_segment_stays_however_large_its_samples(url):
    with closing(Journal(url, retain_samples=1000, retain_bytes=1000)) as journal:
        journal.write(attempt("run"))
        add(journal, "run", 1, 400, size=1000, at=100)
        assert kept(journal, "run") == list(range(301, 401))


def test_samples_go_with_their_age_also_of_runs_that_have_ended(url, clock):
    sharp = EstimateRow("ended", "sharpness", "qk", Estimate(9.0, 0.5, 2, "gnb", 8))
    with closing(Journal(url, retain_samples=1000, retain_days=7)) as journal:
        journal.write(attempt("ended"))
        journal.write(PendingWrites(estimates=[sharp]))
        add(journal, "ended", 1, 230)
        clock.now += 2 * DAY
        journal.write(attempt("live"))
        add(journal, "live", 1, 130)
        assert kept(journal, "ended") == list(range(1, 231))
        clock.now += 5.5 * DAY
        add(journal, "live", 131, 260)
        assert kept(journal, "ended") == []
        assert journal.history("ended", 10).estimates == ()
        assert len(journal.load("ended", samples=1).attempts) == 1  # the records stay
        assert kept(journal, "live") == list(range(1, 261))


def test_limits_that_were_lowered_are_reached_bit_by_bit(url):
    with closing(Journal(url, retain_samples=100_000)) as journal:
        journal.write(attempt("run"))
        add(journal, "run", 1, 4000, at=500)
    with closing(Journal(url, retain_samples=1000)) as journal:
        lengths = []
        for first in range(4001, 5001, 100):
            add(journal, "run", first, first + 99, at=100)
            lengths.append(len(kept(journal, "run")))
    assert lengths[-1] <= 1000 + 500 + 100
    assert all(before - after <= 5 * 500 for before, after in pairwise(lengths))


def test_a_journal_that_was_not_in_segments_is_trimmed_by_them(url):
    with closing(Journal(url, retain_samples=100_000)) as journal:
        journal.write(attempt("run"))
        add(journal, "run", 1, 1500, at=500)
    with create_engine(url, poolclass=NullPool).begin() as connection:
        connection.execute(tables.segments.delete())
    with closing(Journal(url, retain_samples=1000)) as journal:
        add(journal, "run", 1501, 1700, at=100)
        found = kept(journal, "run")
    assert 1000 <= len(found) <= 1300
    assert found[-1] == 1700


def test_after_an_upgrade_old_runs_age_bit_by_bit(url, clock):
    with closing(Journal(url, retain_samples=1000)) as journal:
        for number in range(5):
            journal.write(attempt(f"run{number}"))
            add(journal, f"run{number}", 1, 1030, at=1030)
    with create_engine(url, poolclass=NullPool).begin() as connection:
        connection.execute(tables.segments.delete())
    clock.now += 30 * DAY
    with closing(Journal(url, retain_samples=1000, retain_days=7)) as journal:
        journal.write(attempt("live"))
        left = []
        for first in range(1, 3001, 100):
            add(journal, "live", first, first + 99, at=100)
            left.append(sum(len(kept(journal, f"run{number}")) for number in range(5)))
    assert left[-1] == 0
    assert all(before - after <= 5 * 100 for before, after in pairwise(left))


def everything(run: str) -> tuple[PendingWrites, list[SampleRow]]:
    """Records of every kind."""
    made = Decision(f"{run}-d", run, 1.5, 7, "notify", "advise", "proposed")
    records = PendingWrites(
        attempts={run: AttemptRow(run, run, b"hello", 100.0)},
        incidents={f"{run}-i": incident(f"{run}-i", run=run)},
        decisions={made.id: made},
        transitions=[TransitionRow(run, made.id, 1.0, "proposed", "z 9", "", "")],
        revisions={(run, 1): Revision(run, 1, {"qk": 0.5}, "ann", "why", 1.5, made.id)},
        checkpoints={(run, "c3"): 3},
        modes=[ModeRow(run, "enforce", "ann", "why", 2.0)],
        commands={},
        baselines={run: BaselinesRow(run, run, 3, b"state")},
        references=[ReferenceRow(run, "old.csv", b"losses", "ann", "trains", 4.0)],
        silences={f"{run}-s": Silence(f"{run}-s", "ann", "night", 4.0, 80.0, run=run)},
        plans={
            f"{run}-p": LrPlan(
                *(f"{run}-p", run, "mine", "ann", "why", 1.0, {"qk": 2.0}, {"qk": 1.0}, (("qk",),), 10), automatic=False
            )
        },
        requests=[RequestRow(run, 1.0, "ack", "al1", "done", "", "ann", "")],
    )
    records.estimates.append(EstimateRow(run, "trace", "qk", Estimate(2.0, 0.5, 4, "gnb", 7)))
    return records, [SampleRow(run, run, n, n, b"x", 100.0) for n in range(1, 151)]


def contents(url: str) -> dict[str, list[tuple]]:
    """All rows, but for silences, and the request to forget, which are kept."""
    with create_engine(url, poolclass=NullPool).begin() as connection:
        return {
            table.name: [
                row for each in connection.execute(table.select()) if FORGET.reason not in (row := tuple(each))
            ]
            for table in tables.metadata.sorted_tables
            if table not in {tables.commits, tables.silences}
        }


def test_a_run_that_is_forgotten_leaves_nothing_and_others_are_as_they_were(url):
    with closing(Journal(url, retain_samples=1000)) as journal:
        journal.write(*everything("kept"))
        journal.write(PendingWrites(silences={"all": Silence("all", "ann", "night", 4.0, 80.0)}))
        told = {
            each: NotificationRow(each, f'{{"labels": {{"run": "{each}"}}}}', waits=True) for each in ("kept", "gone")
        }
        journal.keep_notifications({"kept": told["kept"]})
        before = contents(url)
        journal.forget("gone", FORGET)
        journal.write(*everything("gone"))
        journal.keep_notifications({"gone": told["gone"]})
        grown = contents(url)
        assert {name for name in grown if grown[name] == before[name]} == {"forgetting", "shards"}
        journal.forget("gone", FORGET)
        assert contents(url) == before
        assert [one.run for one in journal.ask(catalog.outlines)] == ["kept"]
        journal.write(*everything("gone"))  # a new run of that name begins from nothing
        assert [each.revision for each in journal.load("gone", samples=1).revisions] == [1]


def test_the_request_to_forget_is_kept(url):
    with closing(Journal(url, retain_samples=1000)) as journal:
        journal.write(*everything("gone"))
        journal.forget("gone", FORGET)
        assert journal.requests("", 0.0, 10) == (FORGET,)


def test_a_failing_forget_forgets_nothing(url):
    broken = RequestRow("gone", 9.0, None, "", "done", "", "ann", "")  # violates NOT NULL
    with closing(Journal(url, retain_samples=1000)) as journal:
        journal.write(*everything("gone"))
        before = contents(url)
        with pytest.raises(StoreError, match=r"(?i)not.null"):
            journal.forget("gone", broken)
        assert contents(url) == before


async def test_the_store_forgets_in_parts(url):
    store = await Store.open(url, retain_samples=10_000)
    try:
        await store.write(*everything("gone"))
        more = [SampleRow("gone", "gone", n, n, b"x", 100.0) for n in range(151, 2501)]
        await store.write(PendingWrites(), more)
        await store.forget("gone", FORGET)
        assert not await store.ask(catalog.outlines)
    finally:
        await store.close()
    assert all(not found for found in contents(url).values())
