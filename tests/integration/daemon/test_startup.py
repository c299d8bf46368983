"""A start brings live runs back while the daemon serves; ended ones wait in the journal until they are asked for."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
from contextlib import closing

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sharpwatch.daemon import run_loader
from sharpwatch.v1 import operator_pb2 as pb

RATES = pb.SetLearningRatesRequest(run="live", multipliers={"qk": 0.5}, author="ann", reason="too sharp")


async def names(daemon, **request) -> list[str]:
    return [run.run for run in (await daemon.operator.ListRuns(pb.ListRunsRequest(**request))).runs]


async def trained(daemon, build, run, *, end="closed", steps=3, **parts):
    """A run whose trainer has sent some samples, and then ended in order, or was killed, or is still there."""
    trainer = await daemon.train(run, f"{run}-1")
    for sequence in range(1, steps + 1):
        await trainer.send(build.sample(sequence, closing=end == "closed" and sequence == steps, **parts))
    await trainer.acknowledged(steps)
    await daemon.shown(run, lambda detail: detail.run.step == steps)
    if end != "there":
        await trainer.leave()
    return trainer


async def health(daemon) -> str:
    answer = await health_pb2_grpc.HealthStub(daemon.channel).Check(health_pb2.HealthCheckRequest())
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


async def test_agents_are_taken_while_other_runs_are_brought_back(running, build, monkeypatch):
    async with running() as daemon:
        await trained(daemon, build, "live", end="there")
        await daemon.operator.SetLearningRates(RATES, metadata=daemon.credentials)
    go_on = asyncio.Event()
    bring_back = run_loader.RunLoader.bring_back_live

    async def held_up(loader, since, of):
        await go_on.wait()
        return await bring_back(loader, since, of)

    monkeypatch.setattr(run_loader.RunLoader, "bring_back_live", held_up)
    async with running(wait=False) as daemon:
        assert await daemon.get("/-/healthy") == (200, "ok\n")
        assert await daemon.get("/-/ready") == (503, "restoring\n")
        assert await health(daemon) == "NOT_SERVING"
        trainer = await daemon.train("live", "live-1")
        assert trainer.welcome.acknowledged_sequence == 3
        assert (await trainer.next("command")).set_multipliers.revision == 1
        await trainer.send(build.sample(4))
        await trainer.acknowledged(4)
        assert (await daemon.operator.GetRun(pb.GetRunRequest(run="live"))).detail.run.lr_revision == 1
        go_on.set()
        async with asyncio.timeout(30):
            while await health(daemon) != "SERVING":
                pass
        assert await daemon.get("/-/ready") == (200, "ready\n")
        trainer.call.cancel()


async def test_only_runs_that_may_go_on_are_brought_back_at_the_start(start, build):
    first = await start(stale_after=60)
    daemon = first.client
    for run, end in (("live", "there"), ("killed", "killed"), ("closed", "closed")):
        await trained(daemon, build, run, end=end)
    assert await first.exit(signal.SIGTERM) == 0
    second = await start(stale_after=60)
    # The closed one comes back after the others, as /metrics still shows it.
    assert second.log[-1]["runs"] == 2
    assert await names(second.client) == ["closed", "killed", "live"]
    await second.client.metric_reaches('sharpwatch_run_step{run="closed"', 3)
    assert await second.exit(signal.SIGTERM) == 0


async def test_a_run_that_ended_long_ago_is_listed_and_comes_back_when_it_is_asked_for(start, build, tmp_path):
    first = await start()
    await trained(first.client, build, "ended")
    before = (await first.client.operator.GetRun(pb.GetRunRequest(run="ended"))).detail
    assert await first.exit(signal.SIGTERM) == 0
    with closing(sqlite3.connect(tmp_path / "journal.db")) as journal, journal:
        journal.execute("UPDATE attempts SET seen_at = seen_at - 3600")
    second = await start()
    daemon = second.client
    assert second.log[-1]["runs"] == 0
    assert await names(daemon, held_only=True) == []
    assert await names(daemon) == ["ended"]
    after = (await daemon.operator.GetRun(pb.GetRunRequest(run="ended"))).detail
    an_hour = 3600 * 10**9
    assert before.run.last_sample_at_unix_ns - after.run.last_sample_at_unix_ns == pytest.approx(an_hour, abs=2e9)
    after.run.last_sample_at_unix_ns = before.run.last_sample_at_unix_ns
    assert after == before
    assert await names(daemon, held_only=True) == ["ended"]


async def test_an_ended_twin_of_a_live_run_comes_back_too(start, build):
    first = await start(stale_after=60)
    for run in ("old", "live"):
        trainer = await first.client.train(run, f"{run}-1", data_order="seed 7")
        await trainer.send(build.sample(1, closing=run == "old"))
        await trainer.acknowledged(1)
        await first.client.shown(run, lambda detail: detail.run.step == 1)
    assert await first.exit(signal.SIGKILL) == -signal.SIGKILL
    daemon = (await start(stale_after=60)).client
    await daemon.shown("live", lambda detail: list(detail.twins) == ["old"])


async def test_a_run_that_can_not_be_brought_back_is_in_nobodys_way(running, build, monkeypatch):
    async with running() as daemon:
        for run in ("bad", "good"):
            await trained(daemon, build, run, end="killed")
    restore = run_loader.restore_run

    def fails(runs, stored):
        if stored.run == "bad":
            raise KeyError("a field that this version does not know")
        return restore(runs, stored)

    monkeypatch.setattr(run_loader, "restore_run", fails)
    async with running() as daemon:
        assert await names(daemon, held_only=True) == ["good"]
        assert await daemon.metric('sharpwatch_internal_errors_total{where="restore"}') == 1
