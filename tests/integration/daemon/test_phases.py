"""How a run ended is told apart, and a critical incident is on show until somebody has seen it."""

from __future__ import annotations

import asyncio
import signal

import pytest

from sharpwatch.v1 import operator_pb2 as pb

INCIDENT = 'sharpwatch_incident{block="",cause="non-finite"'


async def ended(daemon, build, run: str, how: str) -> None:
    trainer = await daemon.train(run, f"{run}-1")
    await trainer.send(build.sample(1, closing=how == "closed"))
    await trainer.acknowledged(1)
    if how == "silent":
        trainer.call.cancel()
    else:
        await trainer.leave()
    await daemon.shown(run, lambda detail: detail.run.phase != pb.RUN_PHASE_RUNNING)


def phase(run: pb.Run) -> str:
    return pb.RunPhase.Name(run.phase).removeprefix("RUN_PHASE_").lower()


async def test_how_a_run_ended_is_told_apart_also_after_a_restart(running, build):
    hows = ("closed", "killed", "silent")
    async with running() as daemon:
        for how in hows:
            await ended(daemon, build, how, how)
            await daemon.shown(how, lambda detail: phase(detail.run) == detail.run.run)
            _, text = await daemon.get("/metrics")
            (info,) = [line for line in text.splitlines() if f'run="{how}"' in line and "sharpwatch_run_info{" in line]
            assert f'phase="{how}"' in info
    async with running() as daemon:
        assert [phase(run) for run in (await daemon.operator.ListRuns(pb.ListRunsRequest())).runs] == [*hows]
        for how in hows:
            assert phase((await daemon.operator.GetRun(pb.GetRunRequest(run=how))).detail.run) == how
        # A trainer that was killed is not awaited: the next one has the run at once.
        await (await daemon.train("killed", "killed-2")).leave()


async def test_a_run_that_was_killed_and_goes_on_is_as_any_other(running, build):
    async with running() as daemon:
        await ended(daemon, build, "run", "killed")
        trainer = await daemon.train("run", "run-1")
        await trainer.send(build.sample(2))
        await trainer.acknowledged(2)
        assert phase((await daemon.shown("run", lambda detail: detail.run.step == 2)).run) == "running"
    async with running() as daemon:
        assert phase((await daemon.operator.GetRun(pb.GetRunRequest(run="run"))).detail.run) == "silent"


async def no_longer(daemon, name: str) -> None:
    async with asyncio.timeout(30):
        while await daemon.metric(name) is not None:
            pass


@pytest.mark.parametrize("how", ["killed", "silent"])
async def test_a_critical_incident_of_a_run_that_is_gone_is_shown_until_somebody_has_seen_it(start, build, how):
    first = await start(stale_after=1)
    daemon = first.client
    trainer = await daemon.train()
    for sequence in range(1, 6):
        await trainer.send(build.sample(sequence))
    await trainer.send(build.sample(6, loss=float("inf")))
    await trainer.acknowledged(6)
    await daemon.shown("run", lambda detail: [one.severity for one in detail.alerts] == ["critical"])
    if how == "silent":
        trainer.call.cancel()
    else:
        await trainer.leave()
    await no_longer(daemon, "sharpwatch_run_loss{")  # its measurements are let go
    assert await daemon.metric(INCIDENT) == 1
    assert await daemon.metric("sharpwatch_critical_incidents_total") == 1
    assert await first.exit(signal.SIGKILL) == -signal.SIGKILL

    daemon = (await start(stale_after=1)).client
    await no_longer(daemon, "sharpwatch_run_loss{")
    assert await daemon.metric(INCIDENT) == 1
    (alert,) = (await daemon.operator.GetRun(pb.GetRunRequest(run="run"))).detail.alerts
    seen = pb.AcknowledgeIncidentRequest(incident_id=alert.id, author="ann", reason="the node is dead")
    await daemon.operator.AcknowledgeIncident(seen, metadata=daemon.credentials)
    assert await daemon.metric(INCIDENT) is None
    assert await daemon.metric("sharpwatch_run_info{") is None


async def test_a_run_that_is_forgotten_shows_no_incident(running, build):
    async with running(stale_after=1) as daemon:
        trainer = await daemon.train()
        await trainer.send(build.sample(1, loss=float("inf")))
        await trainer.acknowledged(1)
        await trainer.leave()
        await no_longer(daemon, "sharpwatch_run_loss{")
        assert await daemon.metric(INCIDENT) == 1
        await daemon.operator.ForgetRun(pb.ForgetRunRequest(run="run", author="ann"), metadata=daemon.credentials)
        assert await daemon.metric(INCIDENT) is None
