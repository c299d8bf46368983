"""The journal on a PostgreSQL server: who may have it, and what a server that goes away does."""

from __future__ import annotations

import asyncio
from contextlib import closing

import grpc
import psycopg
import pytest
from postgresql import postgresql_server
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from sharpwatch.daemon.records import Decision
from sharpwatch.daemon.storage import catalog
from sharpwatch.daemon.storage.journal import Journal
from sharpwatch.daemon.storage.schema import (
    SCHEMA_VERSION,
    AttemptRow,
    ModeRow,
    PendingWrites,
    RequestRow,
    SampleRow,
    TransitionRow,
)
from sharpwatch.errors import JournalInUseError, StoreError
from sharpwatch.v1 import operator_pb2 as pb

ATTEMPT = {"a1": AttemptRow("run", "a1", b"hello", 100.0)}


@pytest.fixture
def url(postgresql):
    return postgresql.url()


@pytest.fixture
def journal(url):
    with closing(Journal(url, retain_samples=1000)) as opened:
        yield opened


def rows(url: str, query: str) -> list[tuple]:
    with create_engine(url, poolclass=NullPool).begin() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(query)]


def execute(url: str, statement: str) -> None:
    with create_engine(url, poolclass=NullPool).begin() as connection:
        connection.exec_driver_sql(statement)


def records(number: int) -> PendingWrites:
    """Records of each kind that must be written once, and one that may be written twice."""
    made = Decision(f"d{number}", "run", 1.0, 7, "notify", "advise", "proposed")
    return PendingWrites(
        decisions={made.id: made},
        transitions=[TransitionRow("run", made.id, 1.0, "proposed", "", "", "")],
        modes=[ModeRow("run", "enforce", "ann", str(number), 2.0)],
        requests=[RequestRow("run", 1.0, "ack", str(number), "done", "", "ann", "")],
    )


def sample(sequence: int) -> SampleRow:
    return SampleRow("run", "a1", sequence, sequence, b"x", 100.0)


async def test_a_server_that_is_killed_and_comes_back_loses_and_doubles_nothing(running, build):
    with postgresql_server(durable=True) as server:
        url = server.url()
        async with running(store=url) as daemon:
            trainer = await daemon.train()
            for sequence in range(1, 51):
                await trainer.send(build.sample(sequence))
            await trainer.acknowledged(50)
            # In the middle of a stream: some of these are under way when it goes.
            for sequence in range(51, 101):
                await trainer.send(build.sample(sequence))
            await asyncio.to_thread(server.kill)
            for sequence in range(101, 151):
                await trainer.send(build.sample(sequence))
            await daemon.metric_reaches("sharpwatch_store_writable", 0)
            acknowledged = max((ack.sequence for ack in trainer.received.get("ack", ())), default=50)
            mode = pb.SetModeRequest(run="run", mode="observe", author="ann", reason="night")
            with pytest.raises(grpc.aio.AioRpcError, match="no change can be journalled now"):
                await daemon.operator.SetMode(mode, metadata=daemon.credentials)
            assert await daemon.get("/-/healthy") == (200, "ok\n")
            await asyncio.to_thread(server.start)
            held = rows(url, "SELECT sequence FROM samples ORDER BY sequence")
            assert held[:acknowledged] == [(number,) for number in range(1, acknowledged + 1)]
            await daemon.metric_reaches("sharpwatch_store_writable", 1)
            await trainer.acknowledged(150)
            await daemon.operator.SetMode(mode, metadata=daemon.credentials)
        assert rows(url, "SELECT sequence FROM samples ORDER BY id") == [(number,) for number in range(1, 151)]
        assert rows(url, "SELECT mode FROM modes") == [("observe",)]
        async with running(store=url) as daemon:
            assert (await daemon.train()).welcome.acknowledged_sequence == 150


@pytest.mark.parametrize("made", [True, False], ids=["made", "not made"])
def test_what_was_under_way_when_the_connection_was_lost_is_written_once(journal, url, made):
    journal.write(PendingWrites(attempts=ATTEMPT), [sample(1)])
    driver = journal._database.connection().connection.driver_connection
    commit = driver.commit

    def lost() -> None:
        """The connection is lost during a commit, and nobody says whether that was made."""
        if made:
            commit()
        driver.close()
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    driver.commit = lost
    pending = records(1)
    with pytest.raises(StoreError, match="server closed the connection unexpectedly"):
        journal.write(pending, [sample(2)])
    pending.add_newer(records(2))
    journal.write(pending, [sample(2), sample(3)])
    journal.write(records(3), [sample(4)])
    assert rows(url, "SELECT decision FROM transitions ORDER BY id") == [("d1",), ("d2",), ("d3",)]
    assert rows(url, "SELECT reason FROM modes ORDER BY id") == [("1",), ("2",), ("3",)]
    assert rows(url, "SELECT subject FROM requests ORDER BY id") == [("1",), ("2",), ("3",)]
    assert rows(url, "SELECT sequence FROM samples ORDER BY id") == [(1,), (2,), (3,), (4,)]
    assert journal.load("run", samples=9).attempts[0].acknowledged == 4


def test_a_daemon_that_lost_its_connection_does_not_write_beside_another_one(journal, url):
    journal.write(PendingWrites(attempts=ATTEMPT), [sample(1)])
    journal._database._drop()
    with closing(Journal(url, retain_samples=1000)) as second:
        with pytest.raises(JournalInUseError, match="another daemon is using it"):
            journal.write(records(1))
        second.write(PendingWrites(), [sample(2)])
    for _ in range(2):
        with pytest.raises(StoreError, match="another daemon has written to it meanwhile; restart this one"):
            journal.write(records(1))
    assert rows(url, "SELECT count(*) FROM transitions") == [(0,)]


def test_journals_in_schemas_of_one_database_are_apart(postgresql):
    first, second = (Journal(postgresql.url(), retain_samples=1000) for _ in range(2))
    with closing(first), closing(second):
        first.write(PendingWrites(attempts=ATTEMPT))
        assert [[one.run for one in each.ask(catalog.outlines)] for each in (first, second)] == [["run"], []]


def test_a_server_that_is_not_there_is_said_without_the_password():
    with pytest.raises(StoreError, match=r"journal postgresql\+psycopg://ann:\*\*\*@127\.0\.0\.1:1/x: ") as refused:
        Journal("postgresql+psycopg://ann:secret@127.0.0.1:1/x", retain_samples=1000)
    assert "secret" not in str(refused.value)
    with pytest.raises(StoreError, match="store must be postgresql") as refused:
        Journal("postgresql+psycopg://ann:secret@host:port/x", retain_samples=1000)
    assert "secret" not in str(refused.value)


async def test_a_password_is_not_logged_or_shown(start, postgresql):
    running = await start(store=postgresql.url().replace("sharpwatch@", "sharpwatch:secret@"))
    about = await running.client.operator.GetDaemon(pb.GetDaemonRequest())
    assert about.store.startswith("postgresql+psycopg://sharpwatch:***@/postgres")
    assert "secret" not in str(running.log)


def test_a_text_with_nul_is_written(journal, url):
    """Which PostgreSQL refuses, and a trainer may send: it must not stop the journal."""
    journal.write(PendingWrites(requests=[RequestRow("run", 1.0, "ack", "", "done", "a\0b", "ann", "")]))
    assert rows(url, "SELECT detail FROM requests") == [("a\N{REPLACEMENT CHARACTER}b",)]


def test_a_database_of_something_else_or_of_a_newer_version_is_left_as_it_is(url):
    execute(url, "CREATE TABLE decisions (name TEXT)")
    with pytest.raises(StoreError, match="there are tables of another program, such as decisions; give sharpwatch"):
        Journal(url, retain_samples=1000)
    assert rows(url, "SELECT count(*) FROM pg_tables WHERE schemaname = current_schema()") == [(1,)]
    execute(url, "DROP TABLE decisions")
    Journal(url, retain_samples=1000).close()
    execute(url, "UPDATE sharpwatch_version SET version_num = '0099'")
    with pytest.raises(StoreError, match=f"schema version 99, which a newer .* reads up to {SCHEMA_VERSION}"):
        Journal(url, retain_samples=1000)


def test_commits_are_synchronous(journal):
    with journal._database.transaction() as connection:
        assert connection.exec_driver_sql("SHOW synchronous_commit").scalar_one() == "on"
