"""Whose a run is, over real sockets: who is refused, why, and when another trainer may have the run."""

from __future__ import annotations

import grpc
import pytest

from sharpwatch.daemon.api import admission
from sharpwatch.daemon.exporter import own_metrics
from sharpwatch.daemon.ingest import hello
from sharpwatch.daemon.runs import run as runs
from sharpwatch.v1 import agent_pb2
from sharpwatch.v1 import operator_pb2 as pb

HALVE = pb.SetLearningRatesRequest(run="run", multipliers={"qk": 0.5}, author="ann", reason="too sharp")


async def refused(daemon, build, *, run="run", attempt="a2", **changes) -> tuple[grpc.StatusCode, str]:
    """How a session that is not opened ends."""
    trainer = daemon.connect()
    await trainer.send(build.hello(run, attempt, **changes))
    code, details = await trainer.ended()
    assert "welcome" not in trainer.received
    return code, details


async def names(daemon) -> set[str]:
    return {run.run for run in (await daemon.operator.ListRuns(pb.ListRunsRequest(held_only=True))).runs}


async def test_a_live_run_stays_with_its_trainer(daemon, build):
    first = await daemon.train(host="node3")
    await first.send(build.sample(1))
    await first.acknowledged(1)
    code, reason = await refused(daemon, build)
    assert code is grpc.StatusCode.ALREADY_EXISTS
    assert reason.startswith("run run has a live trainer already on host node3; end that one, or give this run another")
    assert "a1" not in reason  # who knows an attempt's id is taken for its trainer
    assert await refused(daemon, build) == (code, reason)  # the same words each time: the agent logs each once
    made = (await daemon.operator.SetLearningRates(HALVE, metadata=daemon.credentials)).decision
    assert (await first.next("command")).id == made.id
    await first.send(build.sample(2))
    await first.acknowledged(2)
    detail = await daemon.shown("run", lambda detail: detail.run.step == 2)
    assert (detail.run.phase, detail.run.attempts) == (pb.RUN_PHASE_RUNNING, 1)
    assert await daemon.metric('sharpwatch_sessions_refused_total{reason="live_run"}') == 2
    first.call.cancel()


async def test_a_trainer_that_left_leaves_its_run_to_the_next_at_once(daemon, build):
    for number, end in enumerate(("killed", "closed", "killed")):
        trainer = await daemon.train(attempt=f"a{number}")
        await trainer.send(build.sample(1, step=number + 1, closing=end == "closed"))
        await trainer.acknowledged(1)
        await trainer.leave()
    assert (await daemon.shown("run", lambda detail: detail.run.step == 3)).run.attempts == 3


async def test_a_run_that_was_closed_has_no_trainer_though_its_stream_is_open(daemon, build):
    trainer = await daemon.train()
    await trainer.send(build.sample(1, closing=True))
    await daemon.shown("run", lambda detail: detail.run.phase == pb.RUN_PHASE_CLOSED)
    again = await daemon.train(attempt="a2")
    for each in (trainer, again):
        each.call.cancel()


async def test_a_stream_that_broke_may_come_back_before_another_trainer_has_the_run(daemon, build, monkeypatch):
    first = await daemon.train()
    first.call.cancel()
    await daemon.shown("run", lambda detail: detail.run.phase == pb.RUN_PHASE_SILENT)
    assert (await refused(daemon, build))[0] is grpc.StatusCode.ALREADY_EXISTS
    first = await daemon.train()  # the same attempt
    first.call.cancel()
    await daemon.shown("run", lambda detail: detail.run.phase == pb.RUN_PHASE_SILENT)
    monkeypatch.setattr(hello, "RECONNECT_SECONDS", 0.0)
    await daemon.train(attempt="a2")


async def test_a_stream_that_is_silent_does_not_keep_the_run(daemon, build, monkeypatch):
    first = await daemon.train()
    await first.send(build.sample(1, step=1))
    await first.acknowledged(1)
    monkeypatch.setattr(hello, "SILENT_SECONDS", 0.0)
    second = await daemon.train(attempt="a2")
    monkeypatch.setattr(hello, "SILENT_SECONDS", 30.0)
    await second.send(build.sample(1, step=51))
    await second.acknowledged(1)
    made = (await daemon.operator.SetLearningRates(HALVE, metadata=daemon.credentials)).decision
    assert (await second.next("command")).id == made.id
    # The first was only held up. What it still holds is taken, and then it is told.
    await first.send(build.sample(2, step=2))
    await first.acknowledged(2)
    assert "command" not in first.received
    monkeypatch.setattr(admission, "DELIVERY_SECONDS", 0.0)
    await first.send(agent_pb2.Heartbeat())
    code, reason = await first.ended()
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "run run has a live trainer already" in reason
    assert (await refused(daemon, build, attempt="a1"))[0] is grpc.StatusCode.ALREADY_EXISTS
    assert (await daemon.operator.GetRun(pb.GetRunRequest(run="run"))).detail.run.step == 51
    second.call.cancel()


async def test_a_trainer_that_was_replaced_has_its_run_again_once_the_other_is_gone(daemon, build, monkeypatch):
    first = await daemon.train()
    await first.send(build.sample(1, step=100))
    await first.acknowledged(1)
    monkeypatch.setattr(hello, "SILENT_SECONDS", 0.0)
    second = await daemon.train(attempt="a2")
    monkeypatch.setattr(hello, "SILENT_SECONDS", 30.0)
    monkeypatch.setattr(admission, "DELIVERY_SECONDS", 0.0)
    await second.leave()
    again = await daemon.train()
    assert again.welcome.acknowledged_sequence == 1
    await again.send(build.sample(2, step=101))
    await again.acknowledged(2)
    detail = await daemon.shown("run", lambda detail: detail.run.step == 101)
    assert (detail.run.phase, detail.run.attempts) == (pb.RUN_PHASE_RUNNING, 2)
    for each in (first, again):
        each.call.cancel()


async def test_heartbeats_are_no_samples_and_keep_the_run(daemon, build):
    trainer = await daemon.train()
    assert 3 * trainer.welcome.heartbeat_seconds <= hello.SILENT_SECONDS
    await trainer.send(agent_pb2.Heartbeat())
    await trainer.send(build.sample(1))
    await trainer.acknowledged(1)
    assert await daemon.metric("sharpwatch_samples_received_total") == 1
    assert "refusal" not in trainer.received
    trainer.call.cancel()


@pytest.mark.parametrize("closing", [False, True])
async def test_after_a_restart_the_trainer_that_had_the_run_is_awaited(running, build, closing):
    async with running() as daemon:
        trainer = await daemon.train()
        await trainer.send(build.sample(1, closing=closing))
        await trainer.acknowledged(1)
    async with running() as daemon:
        if closing:
            await daemon.train(attempt="a2")
            return
        assert (await refused(daemon, build))[0] is grpc.StatusCode.ALREADY_EXISTS
        again = await daemon.train()
        assert again.welcome.acknowledged_sequence == 1
        again.call.cancel()


async def test_a_client_has_a_bounded_number_of_live_runs(daemon, build, monkeypatch):
    monkeypatch.setattr(admission, "MAX_CLIENT_RUNS", 2)
    one, two = [await daemon.train(name, f"{name}-1", host="node3") for name in ("one", "two")]
    code, reason = await refused(daemon, build, run="three", attempt="three-1", host="node3")
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason.startswith("a client may have 2 live runs, and ipv4:127.0.0.1 node3 has as many")
    assert await names(daemon) == {"one", "two"}
    other = await daemon.train("other", "other-1", host="node4")
    again = await daemon.train("one", "one-1", host="node3")  # its own stream, once more
    await two.leave()
    three = await daemon.train("three", "three-1", host="node3")
    assert await daemon.metric('sharpwatch_sessions_refused_total{reason="client_runs"}') == 1
    for each in (one, other, again, three):
        each.call.cancel()


async def test_a_flood_of_names_drops_no_run_that_was_trained(daemon, build, monkeypatch):
    monkeypatch.setattr(runs, "MAX_RUNS", 4)
    live, trained = await daemon.train("live", "live-1"), await daemon.train("trained", "trained-1")
    await trained.send(build.sample(1))
    await trained.acknowledged(1)
    await trained.leave()
    for number in range(20):
        flood = await daemon.train(f"flood-{number}", f"flood-{number}", host=f"host-{number}")
        await flood.leave()
        await daemon.shown(f"flood-{number}", lambda detail: detail.run.phase == pb.RUN_PHASE_KILLED)
    assert await names(daemon) == {"live", "trained", "flood-18", "flood-19"}
    _, text = await daemon.get("/metrics")
    assert text.count("sharpwatch_run_info{") == 4
    held = [await daemon.train(f"held-{number}", f"held-{number}") for number in range(3)]
    assert await names(daemon) == {"live", "held-0", "held-1", "held-2"}
    code, reason = await refused(daemon, build, run="more", attempt="more-1")
    assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "the daemon holds as many live runs as it can")
    for each in (live, *held):
        each.call.cancel()


async def test_every_reason_is_counted_by_a_label_of_a_fixed_set(daemon, build):
    first = await daemon.train("one", "a1")
    await refused(daemon, build, run="one", attempt="a2")
    await refused(daemon, build, run="two", attempt="a1")
    await refused(daemon, build, run="three", attempt="a3", protocol=99)
    _, text = await daemon.get("/metrics")
    counted = {
        reason: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        for reason in own_metrics.SessionRefusal.__args__
        if line.startswith(f'sharpwatch_sessions_refused_total{{reason="{reason}"}}')
    }
    none = dict.fromkeys(own_metrics.SessionRefusal.__args__, 0)
    assert counted == none | {"malformed": 1, "wrong_run": 1, "live_run": 1}
    assert await daemon.metric('sharpwatch_samples_refused_total{code="hello"}') == 3
    first.call.cancel()
