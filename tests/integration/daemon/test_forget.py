"""`ForgetRun`: nothing of an ended run stays but that it was forgotten."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing

import grpc
import pytest

from sharpwatch.v1 import operator_pb2 as pb
from sharpwatch.v1 import types_pb2

FORGET = pb.ForgetRunRequest(run="old", author="ann", reason="a smoke test")
RATES = pb.SetLearningRatesRequest(multipliers={"qk": 0.5}, author="ann", reason="too sharp")


async def ended(daemon, build, run="old") -> None:
    """A run with a revision, an incident, a mode, a reference and estimates, which said farewell."""
    trainer = await daemon.train(run, f"{run}-1")
    other = await daemon.train("other", "other-1")
    for sequence in range(1, 121):
        await trainer.send(build.sample(sequence, gnb=build.gnb(sequence)))
    await trainer.send(build.sample(121, loss=float("inf")))
    await trainer.acknowledged(121)
    rates = pb.SetLearningRatesRequest()
    rates.CopyFrom(RATES)
    rates.run = run
    operator = {"metadata": daemon.credentials}
    await daemon.operator.SetLearningRates(rates, **operator)
    await daemon.operator.SetMode(pb.SetModeRequest(run=run, mode="advise", author="ann"), **operator)
    await daemon.operator.SetReference(pb.SetReferenceRequest(run=run, reference="other", author="ann"), **operator)
    done = types_pb2.CommandResult(command_id=(await trainer.next("command")).id, outcome=1, step=122)
    saved = [types_pb2.Checkpoint(step=1, uri="c1")]
    await trainer.send(build.sample(122, results=[done], checkpoints=saved, closing=True))
    await trainer.acknowledged(122)
    await daemon.shown(run, lambda detail: detail.run.phase == pb.RUN_PHASE_CLOSED and detail.alerts)
    await trainer.leave()
    await other.leave()


def rows(folder, run: str) -> dict[str, int]:
    """How many rows of a run each table of the journal has."""
    with closing(sqlite3.connect(folder / "journal.db")) as journal:
        tables = [name for (name,) in journal.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = {table: [row[1] for row in journal.execute(f"PRAGMA table_info({table})")] for table in tables}
        of_runs = [table for table in tables if "run" in columns[table]]
        counts = {
            table: journal.execute(f"SELECT count(*) FROM {table} WHERE run = ?", [run]).fetchone()[0]  # noqa: S608  names of ours
            for table in of_runs
        }
    return {table: count for table, count in counts.items() if count}


async def test_nothing_of_a_run_stays_in_the_journal_and_in_memory(running, build, tmp_path):
    async with running() as daemon:
        await ended(daemon, build)
    kept = rows(tmp_path, "old")
    assert {"attempts", "samples", "estimates", "baselines", "checkpoints", "alerts", "decisions"} <= kept.keys()
    assert {"transitions", "revisions", "modes", "run_references"} <= kept.keys()
    others = rows(tmp_path, "other")
    async with running() as daemon:
        tried = pb.ForgetRunRequest(run="old", author="ann", dry_run=True)
        would_be = await daemon.operator.ForgetRun(tried, metadata=daemon.credentials)
        assert (would_be.samples, would_be.attempts, would_be.decisions) == (122, 1, 1)
        assert rows(tmp_path, "old") == kept
        gone = await daemon.operator.ForgetRun(FORGET, metadata=daemon.credentials)
        assert gone == would_be
        assert rows(tmp_path, "old") == {"requests": 1}
        with pytest.raises(grpc.aio.AioRpcError, match="no run 'old'"):
            await daemon.operator.GetRun(pb.GetRunRequest(run="old"))
        assert [run.run for run in (await daemon.operator.ListRuns(pb.ListRunsRequest())).runs] == ["other"]
        assert 'run="old"' not in (await daemon.get("/metrics"))[1]
        (event,) = (await daemon.operator.ListTransitions(pb.ListTransitionsRequest())).events
        assert (event.run, event.action, event.outcome, event.author) == ("old", "forget", "forgotten", "ann")
        assert event.detail == "1 attempts, 122 samples, 1 incidents, 1 decisions"
        again = await daemon.train("old", "old-1")
        assert again.welcome.acknowledged_sequence == 0
        again.call.cancel()
    assert rows(tmp_path, "old") == {"attempts": 1, "requests": 1}
    assert rows(tmp_path, "other") == others


async def test_a_live_run_and_a_caller_without_the_token_are_refused(daemon, build):
    trainer = await daemon.train("old", "old-1")
    await trainer.send(build.sample(1))
    await trainer.acknowledged(1)

    async def refused(**changes) -> grpc.StatusCode:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await daemon.operator.ForgetRun(FORGET, **{"metadata": daemon.credentials} | changes)
        return caught.value.code()

    assert await refused() is grpc.StatusCode.FAILED_PRECONDITION
    assert await refused(metadata=()) is grpc.StatusCode.UNAUTHENTICATED
    trainer.call.cancel()
    await daemon.shown("old", lambda detail: detail.run.phase != pb.RUN_PHASE_RUNNING)
    assert await refused() is grpc.StatusCode.FAILED_PRECONDITION  # its courier may be about to come back
    asked = pb.ForgetRunRequest(run="ol", author="ann")
    with pytest.raises(grpc.aio.AioRpcError, match="must be named in full"):
        await daemon.operator.ForgetRun(asked, metadata=daemon.credentials)
    refusals = (await daemon.operator.ListTransitions(pb.ListTransitionsRequest())).events
    assert [(one.action, one.outcome) for one in refusals] == [("forget", "refused")] * 3
    back = await daemon.train("old", "old-1")
    assert back.welcome.acknowledged_sequence == 1
    await back.leave()
    await daemon.shown("old", lambda detail: detail.run.phase != pb.RUN_PHASE_RUNNING)
    assert (await daemon.operator.ForgetRun(FORGET, metadata=daemon.credentials)).samples == 1


async def test_whoever_watches_a_run_that_is_forgotten_is_told(daemon, build):
    trainer = await daemon.train("old", "old-1")
    await trainer.send(build.sample(1))
    await trainer.acknowledged(1)
    await trainer.leave()
    watch = daemon.operator.WatchRun(pb.WatchRunRequest(run="old"))
    while (await watch.read()).detail.run.phase == pb.RUN_PHASE_RUNNING:
        pass
    await daemon.operator.ForgetRun(FORGET, metadata=daemon.credentials)
    async with asyncio.timeout(30):
        assert await watch.code() is grpc.StatusCode.NOT_FOUND
