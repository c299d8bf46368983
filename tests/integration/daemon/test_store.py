"""The journal on a real file: what it keeps, what it refuses, what a full disk does."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager
from dataclasses import asdict, astuple, replace
from pathlib import Path

import pytest
from observations import incident
from sqlalchemy import MetaData, Table, UniqueConstraint, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.records import Checkpoint, Decision, LrPlan, Revision, RollbackPlan, Silence
from sharpwatch.daemon.storage import catalog
from sharpwatch.daemon.storage.journal import Journal
from sharpwatch.daemon.storage.migrations import upgrade
from sharpwatch.daemon.storage.schema import (
    SCHEMA_VERSION,
    SCHEMAS,
    AttemptRow,
    EstimateRow,
    ModeRow,
    PendingWrites,
    ReferenceRow,
    RequestRow,
    SampleRow,
    TransitionRow,
)
from sharpwatch.daemon.storage.tables import metadata
from sharpwatch.errors import JournalInUseError, RevisionConflictError, StoreError

ATTEMPT = AttemptRow("run", "a1", b"hello", 100.0)


def write(journal: Journal, samples=(), **rows) -> None:
    """Write rows, given by their kind, in one transaction."""
    by_id = {
        "attempts": lambda row: row.attempt,
        "incidents": lambda row: row.id,
        "decisions": lambda row: row.id,
        "revisions": lambda row: (row.run, row.revision),
        "silences": lambda row: row.id,
    }
    records = {kind: {key(row): row for row in rows.pop(kind, ())} for kind, key in by_id.items()}
    records["checkpoints"] = {(run, uri): step for run, step, uri in rows.pop("checkpoints", ())}
    journal.write(PendingWrites(**records, **rows), samples)


def samples(first: int, last: int, *, size: int = 8, closed: bool = False) -> tuple[SampleRow, ...]:
    return tuple(
        SampleRow("run", "a1", sequence, sequence + 10, b"x" * size, 100.0 + sequence, closed)
        for sequence in range(first, last + 1)
    )


@pytest.fixture
def file_url(tmp_path):
    return f"sqlite:///{tmp_path}/journal.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request):
    """Of a new journal on either database."""
    return (
        request.getfixturevalue("file_url")
        if request.param == "sqlite"
        else request.getfixturevalue("postgresql").url()
    )


@pytest.fixture
def journal(url):
    with closing(Journal(url, retain_samples=100)) as opened:
        yield opened


def test_checkpoints_that_are_gone_are_forgotten_and_others_come_in_the_order_they_were_saved(journal):
    first = (("run", 3, "c3"), ("run", 9, "c9"), ("run", 4, "last"), ("else", 9, "c9"))
    write(journal, attempts=(ATTEMPT,), checkpoints=first)
    write(journal, checkpoints=(("run", None, "c9"), ("run", 5, "c5"), ("run", 6, "last"), ("run", 3, "c3")))
    assert journal.load("run", samples=0).checkpoints == (
        Checkpoint(5, "c5"),
        Checkpoint(6, "last"),
        Checkpoint(3, "c3"),
    )
    assert journal.load("else", samples=0).checkpoints == (Checkpoint(9, "c9"),)


def test_the_newest_reference_counts_and_who_set_the_others_is_kept(journal, url):
    assert journal.load("run", samples=0).reference is None
    rows = [
        ReferenceRow("run", "old.csv", b"losses", "ann", "trains", 4.0),
        ReferenceRow("run", "good", b"", "bob", "", 5.0),
        ReferenceRow("else", "old.csv", b"losses", "ann", "", 6.0),
    ]
    for row, expected in zip(rows, (rows[0], rows[1], rows[1]), strict=True):
        write(journal, attempts=(ATTEMPT,), references=[row])
        assert journal.load("run", samples=0).reference == expected
    assert journal.load("else", samples=0).reference == rows[2]
    write(journal, references=[ReferenceRow("run", "", b"", "ann", "done", 7.0)])
    assert journal.load("run", samples=0).reference is None
    kept = audit(url, "SELECT name, author, losses FROM run_references WHERE run = 'run' ORDER BY id")
    assert kept == [("old.csv", "ann", None), ("good", "bob", None), ("", "ann", b"")]


def test_silences_come_back_in_the_order_they_were_added_as_they_are_now(journal):
    assert journal.silences() == ()
    second = Silence("s2", "bob", "a bad shard", 3.0, 90.0, cause="data")
    first = Silence("s1", "ann", "night", 4.0, 80.0, run="run", alert="LossSpike", policy="cut")  # the clock went back
    write(journal, silences=(first, second))
    expired = replace(first, expired_at=50.0, expired_by="bob", expired_reason="day")
    write(journal, silences=(expired,))
    assert journal.silences() == (expired, second)


def test_every_record_comes_back_as_it_went(journal, url):
    seen = incident(
        "al1",
        names=("LossSpike", "GradientSpike"),
        severity="critical",
        layer_blocks=("layers.0.qk", "layers.0.vo"),
        evidence=("z 9", "z 8"),
        onset=4,
        last_step=107,
        active=False,
        closed="no finding for 20 samples",
        acknowledged="ann: a bad shard",
    )
    plan = RollbackPlan(Checkpoint(3, "file:///c"), 3, 9)
    made = Decision(
        "d1",
        "run",
        1.5,
        7,
        "rollback",
        "enforce",
        "sent",
        policy="p",
        alert_id="al1",
        multipliers={"qk": 0.5},
        ramp_steps=20,
        ttl_steps=500,
        apply_at_step=8,
        expires_at_step=90,
        rollback=plan,
        author="ann",
        reason="why",
    )
    revision = Revision("run", 1, {"qk": 0.5}, "ann", "why", 1.5, "d1", applied_step=9)
    traced = EstimateRow("run", "trace", "qk", Estimate(2.0, math.nan, 4, "gnb", 7))
    sharp = EstimateRow("run", "top_eigenvalue", "", Estimate(9.0, 0.5, 2, "lanczos", 8, 0.25, "autograd"))
    write(
        journal,
        attempts=(ATTEMPT,),
        samples=samples(1, 3),
        incidents=(seen,),
        decisions=(made,),
        revisions=(revision,),
        checkpoints=(("run", 3, "file:///c"),),
        modes=(ModeRow("run", "enforce", "ann", "why", 2.0),),
        estimates=(traced, sharp),
    )
    stored = journal.load("run", samples=2)
    assert stored.incidents == (seen,)
    assert stored.decisions == (made,)
    assert stored.revisions == (revision,)
    assert stored.checkpoints == (plan.checkpoint,)
    assert stored.mode is not None
    assert stored.mode.mode == "enforce"
    assert [row.sequence for row in stored.samples] == [2, 3]
    assert stored.attempts[0].acknowledged == 3
    columns = "quantity, block, estimator, value, stderr, draws, step, residual, method"
    kept = audit(url, f"SELECT {columns} FROM estimates ORDER BY id")  # noqa: S608  a NaN is a NULL there
    assert kept == [
        ("trace", "qk", "gnb", 2.0, None, 4, 7, None, ""),
        ("top_eigenvalue", "", "lanczos", 9.0, 0.5, 2, 8, 0.25, "autograd"),
    ]


def test_a_record_that_changes_keeps_its_place(journal):
    first = Decision("d1", "run", 1.0, 7, "notify", "advise", "proposed")
    second = Decision("d2", "run", 2.0, 8, "notify", "advise", "observed")
    write(journal, attempts=(ATTEMPT,), decisions=(first, second))
    write(journal, decisions=(Decision("d1", "run", 1.0, 7, "notify", "advise", "rejected"),))
    assert [(made.id, made.outcome) for made in journal.load("run", samples=0).decisions] == [
        ("d1", "rejected"),
        ("d2", "observed"),
    ]


@contextmanager
def beside(url: str):
    """Another connection to a journal's database."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        yield connection


def audit(url: str, query: str) -> list[tuple]:
    with beside(url) as connection:
        return [tuple(row) for row in connection.exec_driver_sql(query)]


def test_what_people_and_policies_did_is_kept_step_by_step_for_ever(journal, url):
    rows = [
        TransitionRow("run", "d1", 1.0, "proposed", "z 9", "", ""),
        TransitionRow("run", "d1", 2.0, "approved", "z 9", "ann", "go on"),
        TransitionRow("run", "d1", 3.0, "applied", "z 9", "ann", "go on"),
    ]
    modes = [ModeRow("run", "enforce", "ann", "night", 4.0), ModeRow("run", "observe", "bob", "day", 5.0)]
    write(journal, attempts=(ATTEMPT,), transitions=tuple(rows[:2]), modes=tuple(modes[:1]))
    write(journal, transitions=tuple(rows[2:]), modes=tuple(modes[1:]))
    for first in range(1, 1000, 50):  # far beyond what is retained of samples
        write(journal, samples=samples(first, first + 49))
    columns = "run, decision, at, outcome, detail, author, reason"
    assert audit(url, f"SELECT {columns} FROM transitions ORDER BY id") == list(map(astuple, rows))  # noqa: S608
    kept = audit(url, "SELECT run, mode, author, reason, made_at FROM modes ORDER BY id")
    assert kept == list(map(astuple, modes))
    assert journal.load("run", samples=0).mode.mode == "observe"


def test_a_decision_and_its_transition_are_written_together_or_not_at_all(journal, url):
    made = Decision("d1", "run", 1.0, 7, "notify", "advise", "proposed")
    broken = TransitionRow("run", "d1", 1.0, None, "", "", "")  # violates NOT NULL
    with pytest.raises(StoreError):
        write(journal, attempts=(ATTEMPT,), decisions=(made,), transitions=(broken,))
    assert audit(url, "SELECT * FROM decisions") == []


def old_journal(path: Path, version: int) -> None:
    """A journal as the sharpwatch of that schema left it, with three samples and an estimate."""
    with closing(sqlite3.connect(path)) as old:
        old.executescript("".join(SCHEMAS[:version]))
        rows = [("run", "a1", n, n + 10, b"x") for n in (1, 2, 3)]
        old.executemany("INSERT INTO samples (run, attempt, sequence, step, payload) VALUES (?, ?, ?, ?, ?)", rows)
        old.execute(
            "INSERT INTO estimates (run, quantity, block, estimator, step, value, stderr, draws) "
            "VALUES ('run', 'trace', 'qk', 'gnb', 7, 2.0, 0.5, 4)"
        )
        old.execute(f"PRAGMA user_version={min(version, len(SCHEMAS))}")
        old.commit()
    if version > len(SCHEMAS):
        with beside(f"sqlite:///{path}") as connection:
            upgrade(connection, f"{version:04d}")


@pytest.mark.parametrize("version", range(1, SCHEMA_VERSION))
def test_a_journal_of_an_earlier_schema_is_taken_on(file_url, tmp_path, version):
    url = file_url
    old_journal(tmp_path / "journal.db", version)
    sharp = EstimateRow("run", "top_eigenvalue", "qk", Estimate(9.0, 0.5, 2, "lanczos", 8, 0.25, "autograd"))
    sent = TransitionRow("run", "d1", 1.0, "sent", "", "ann", "")
    with closing(Journal(url, retain_samples=100)) as journal:
        write(journal, transitions=(sent,), estimates=(sharp,))
        assert len(journal.load("run", samples=10).samples) == 3
    with closing(Journal(url, retain_samples=100)) as journal:
        assert audit(url, "SELECT decision FROM transitions") == [("d1",)]
        assert_tables_of_the_code(url)
        kept = audit(url, "SELECT value, residual, method FROM estimates ORDER BY id")
        assert kept == [(2.0, None, ""), (9.0, 0.25, "autograd")]


REVISION = Revision("run", 1, {"qk": 0.5}, "ann", "why", 1.5, "d1")


def test_a_revision_may_only_be_put_in_force(journal):
    write(journal, attempts=(ATTEMPT,), revisions=(REVISION,))
    write(journal, revisions=(REVISION,))  # as a try after a failed one does
    applied = replace(REVISION, applied_step=9)
    write(journal, revisions=(applied,))
    for other in (replace(applied, multipliers={"qk": 0.1}), replace(applied, applied_step=10), REVISION):
        with pytest.raises(RevisionConflictError, match=r"revision 1 of run run is there .* decision d1"):
            write(journal, samples=samples(1, 1), revisions=(other,))
        assert journal.load("run", samples=1).revisions == (applied,)
    assert journal.load("run", samples=1).samples == ()  # nothing of a transaction that is refused
    write(journal, revisions=(replace(REVISION, run="else"), replace(REVISION, revision=2)))
    assert journal.load("run", samples=1).revisions == (applied, replace(REVISION, revision=2))


def test_a_revision_of_an_earlier_version_may_be_put_in_force(journal, url):
    write(journal, attempts=(ATTEMPT,), revisions=(REVISION,))
    old = {key: value for key, value in asdict(REVISION).items() if key not in {"base", "update_every", "undoes"}}
    with beside(url) as connection:
        connection.execute(text("UPDATE revisions SET record = :old"), {"old": json.dumps(old)})
    applied = replace(REVISION, applied_step=9)
    write(journal, revisions=(applied,))
    assert journal.load("run", samples=1).revisions == (applied,)


def filled(journal: Journal) -> None:
    """One row at least in every table that is append-only."""
    write(
        journal,
        attempts=(ATTEMPT,),
        samples=samples(1, 3),
        incidents=(incident("al1"),),
        decisions=(Decision("d1", "run", 1.5, 7, "notify", "advise", "proposed"),),
        revisions=(REVISION,),
        modes=[ModeRow("run", "enforce", "ann", "why", 2.0)],
        estimates=(EstimateRow("run", "trace", "qk", Estimate(2.0, 0.5, 4, "gnb", 7)),),
        transitions=[TransitionRow("run", "d1", 1.0, "proposed", "z 9", "", "")],
        references=[ReferenceRow("run", "old.csv", b"losses", "ann", "trains", 4.0)],
        silences=(Silence("s1", "ann", "night", 4.0, 80.0, run="run"),),
        plans={
            "p1": LrPlan(
                "p1", "run", "mine", "ann", "why", 1.0, {"qk": 2.0}, {"qk": 1.0}, (("qk",),), 10, automatic=False
            )
        },
        requests=[RequestRow("run", 1.0, "ack", "al1", "done", "", "ann", "")],
    )


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE samples SET payload = x'00'",
        "UPDATE samples SET sequence = sequence + 9",
        "UPDATE attempts SET hello = x'00'",
        "UPDATE attempts SET acknowledged = 2",
        "UPDATE alerts SET run = 'else'",
        "UPDATE decisions SET made_at = 0",
        "UPDATE estimates SET value = 0",
        "UPDATE transitions SET author = 'bob'",
        "UPDATE modes SET mode = 'observe'",
        "UPDATE requests SET outcome = 'refused'",
        "UPDATE run_references SET losses = x'00'",
        "UPDATE silences SET made_at = 0",
        "UPDATE plans SET run = 'else'",
        "DELETE FROM attempts",
        "DELETE FROM alerts",
        "DELETE FROM decisions",
        "DELETE FROM revisions",
        "DELETE FROM modes",
        "DELETE FROM transitions",
        "DELETE FROM run_references",
        "DELETE FROM silences",
        "DELETE FROM plans",
        "DELETE FROM requests",
    ],
)
def test_what_is_kept_for_ever_can_not_be_changed_or_deleted(journal, url, statement):
    filled(journal)
    table = statement.split()[2] if "DELETE" in statement else statement.split()[1]
    before = audit(url, f"SELECT * FROM {table}")  # noqa: S608
    assert before
    # Bytes are written otherwise in PostgreSQL.
    statement = statement if url.startswith("sqlite") else statement.replace("x'00'", "'x'::bytea")
    with pytest.raises(DBAPIError, match="the journal is append-only"), beside(url) as connection:
        connection.exec_driver_sql(statement)
    assert audit(url, f"SELECT * FROM {table}") == before  # noqa: S608


def test_replacing_a_row_is_deleting_it(file_url):
    """`INSERT OR REPLACE` would go around the constraints on deletions, if SQLite were not told otherwise."""
    with closing(Journal(file_url, retain_samples=100)) as journal:
        write(journal, attempts=(ATTEMPT,), revisions=(REVISION,))
        with (
            pytest.raises(StoreError, match="the journal is append-only"),
            journal._database.transaction() as connection,
        ):
            connection.exec_driver_sql("INSERT OR REPLACE INTO revisions VALUES ('run', 1, '{}')")
        assert journal.load("run", samples=1).revisions == (REVISION,)


def test_a_sample_that_violates_the_schema_is_not_taken_for_one_that_came_twice(journal):
    write(journal, attempts=(ATTEMPT,))
    (broken,) = samples(1, 1)
    with pytest.raises(StoreError, match=r"(?i)not.null"):
        write(journal, samples=(replace(broken, payload=None),))


def shape(table: Table) -> dict:
    """What the code relies on of a table."""
    columns = {
        column.name: (
            column.type.python_type,
            column.nullable or column.primary_key,
        )  # a key is never NULL in SQLAlchemy
        for column in table.columns
        if column.name != "rowid"
    }
    unique = {tuple(each.columns.keys()) for each in table.constraints if isinstance(each, UniqueConstraint)}
    indexes = {(each.name, tuple(each.columns.keys())) for each in table.indexes if not each.unique}
    return {"columns": columns, "key": table.primary_key.columns.keys(), "unique": unique, "indexes": indexes}


def assert_tables_of_the_code(url: str) -> None:
    found = MetaData()
    with beside(url) as connection:
        found.reflect(connection)
    assert found.tables.keys() == {*metadata.tables, "sharpwatch_version"}
    for name, table in metadata.tables.items():
        assert shape(found.tables[name]) == shape(table), name
    assert audit(url, "SELECT version_num FROM sharpwatch_version") == [(f"{SCHEMA_VERSION:04d}",)]


@pytest.mark.usefixtures("journal")
def test_the_database_has_the_tables_of_the_code(url):
    assert_tables_of_the_code(url)


def test_resent_samples_are_kept_once_and_old_ones_go(journal):
    write(journal, attempts=(ATTEMPT,))
    for first in range(1, 1000, 50):
        write(journal, samples=samples(first, first + 49))
        write(journal, samples=samples(first, first + 49))
    kept = [row.sequence for row in journal.load("run", samples=10_000).samples]
    assert kept[-1] == 1000
    assert kept == sorted(set(kept))
    assert 100 <= len(kept) < 200  # the newest 100, and fewer than the 100 between two trims
    assert journal.load("run", samples=1).attempts[0].acknowledged == 1000


def test_a_closing_sample_closes_its_attempt(journal):
    write(journal, attempts=(ATTEMPT,), samples=samples(1, 1, closed=True))
    assert journal.load("run", samples=1).attempts[0].closed


def test_a_second_daemon_is_kept_out(journal, url):
    with pytest.raises(JournalInUseError, match=": another daemon is using it"):
        Journal(url, retain_samples=100)
    assert not journal.ask(catalog.outlines)
    journal.close()
    Journal(url, retain_samples=100).close()


def test_what_can_not_be_a_journal_is_refused_with_path_and_cause(tmp_path):
    with pytest.raises(StoreError, match="must be sqlite:///PATH or postgresql"):
        Journal("mysql://somewhere", retain_samples=1)
    with pytest.raises(StoreError, match=r"nowhere/j\.db: No such file or directory"):
        Journal(f"sqlite:///{tmp_path}/nowhere/j.db", retain_samples=1)
    (tmp_path / "text.db").write_text("this is not a database, and long enough that SQLite looks at its header\n" * 20)
    with pytest.raises(StoreError, match=r"text\.db: file is not a database"):
        Journal(f"sqlite:///{tmp_path}/text.db", retain_samples=1)
    with closing(sqlite3.connect(tmp_path / "newer.db")) as newer:
        newer.execute("PRAGMA user_version=99")
    with pytest.raises(StoreError, match="schema version 99, which a newer sharpwatch wrote"):
        Journal(f"sqlite:///{tmp_path}/newer.db", retain_samples=1)
    with closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE cats (name)")
    with pytest.raises(StoreError, match="a database of another program"):
        Journal(f"sqlite:///{tmp_path}/other.db", retain_samples=1)


@pytest.mark.parametrize("version", range(SCHEMA_VERSION + 1))
def test_a_database_of_something_else_is_left_as_it_is(tmp_path, version):
    with closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.executescript(f"CREATE TABLE cats (name); PRAGMA user_version={version};")
    before = (tmp_path / "other.db").read_bytes()
    with pytest.raises(StoreError, match="a database of another program"):
        Journal(f"sqlite:///{tmp_path}/other.db", retain_samples=1)
    assert (tmp_path / "other.db").read_bytes() == before


def test_decisions_come_back_in_the_order_they_were_made_though_the_clock_went_back(journal):
    made = [Decision(name, "run", at, 1, "notify", "observe", "observed") for name, at in (("a", 9.0), ("b", 5.0))]
    for one in made:
        write(journal, decisions=(one,))
    assert journal.load("run", samples=1).decisions == tuple(made)


def test_a_full_disk_takes_nothing_and_says_so_then_all_of_it(file_url):
    with closing(Journal(file_url, retain_samples=100)) as journal:
        write(journal, attempts=(ATTEMPT,), samples=samples(1, 2))
        connection = journal._database.connection().connection.driver_connection
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count={pages + 2}")  # SQLITE_FULL, as a full disk gives it
        large = samples(3, 10, size=100_000)
        with pytest.raises(StoreError, match=r"journal\.db: database or disk is full"):
            write(journal, samples=large)
        assert [row.sequence for row in journal.load("run", samples=99).samples] == [1, 2]
        connection.execute("PRAGMA max_page_count=1000000")
        write(journal, samples=large)
        assert journal.load("run", samples=99).attempts[0].acknowledged == 10


def test_a_journal_is_closed_also_on_a_disk_that_has_become_read_only(file_url, monkeypatch):
    journal = Journal(file_url, retain_samples=100)
    write(journal, attempts=(ATTEMPT,), samples=samples(1, 2))

    def fails(_: int) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fails)
        journal.close()
    with closing(Journal(file_url, retain_samples=100)) as again:  # its lock is released
        assert again.load("run", samples=99).attempts[0].acknowledged == 2


WRITER = """
import sys
from sharpwatch.daemon.storage.journal import Journal
from sharpwatch.daemon.storage.schema import PendingWrites
from sharpwatch.daemon.storage.schema import AttemptRow, SampleRow
journal = Journal(sys.argv[1], retain_samples=100_000)
journal.write(PendingWrites(attempts={"a1": AttemptRow("run", "a1", b"", 0.0)}))
sequence = 0
while True:
    sequence += 1
    journal.write(PendingWrites(), [SampleRow("run", "a1", sequence, sequence, b"x" * 500, 0.0)])
    print(sequence, flush=True)
"""


def test_what_was_acknowledged_survives_kill_9(url):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE, text=True)
    acknowledged = 0
    for line in writer.stdout:
        acknowledged = int(line)
        if acknowledged == 50:
            os.kill(writer.pid, signal.SIGKILL)
            break
    rest = writer.stdout.read().split()
    acknowledged = int(rest[-1]) if rest else acknowledged
    writer.wait()
    writer.stdout.close()
    with closing(Journal(url, retain_samples=100_000)) as journal:
        stored = journal.load("run", samples=100_000)
    sequences = [row.sequence for row in stored.samples]
    assert sequences[:acknowledged] == list(range(1, acknowledged + 1))
    assert stored.attempts[0].acknowledged == sequences[-1] <= acknowledged + 1
