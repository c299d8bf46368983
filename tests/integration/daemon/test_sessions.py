"""The agent's side of a daemon over a real socket, with messages made by hand."""

from __future__ import annotations

import asyncio
import threading

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from sharpwatch import wire
from sharpwatch.daemon.api import agent_service
from sharpwatch.daemon.estimation import estimator
from sharpwatch.daemon.runs.run import Run
from sharpwatch.v1 import agent_pb2, types_pb2
from sharpwatch.v1 import operator_pb2 as pb

SERVICES = ("sharpwatch.v1.AgentService", "sharpwatch.v1.OperatorService")
PATIENCE = 30  # seconds until a test is held to hang


def estimated(detail: pb.RunDetail) -> int:
    """The step of the newest estimates of a window; they follow their sample."""
    steps = [one.step for block in detail.blocks for one in block.estimates if one.estimator != "moment"]
    return max(steps, default=0)


async def counted(daemon, name: str, value: float) -> None:
    """Wait until a counter says so."""
    async with asyncio.timeout(PATIENCE):
        while await daemon.metric(name) != value:
            pass


async def test_samples_are_acknowledged_and_exported(daemon, build):
    trainer = await daemon.train()
    assert trainer.welcome.acknowledged_sequence == 0
    assert trainer.welcome.max_message_bytes == wire.MAX_MESSAGE_BYTES
    for sequence in range(1, 5):
        await trainer.send(build.sample(sequence, gnb=build.gnb(sequence), direction=build.direction()))
    await trainer.acknowledged(4)
    detail = await daemon.shown("run", lambda detail: estimated(detail) == 4)
    assert detail.run.loss == pytest.approx(4.04)
    assert detail.run.phase == 1
    assert {block.block: block.parameters for block in detail.blocks}["emb"] == 512
    assert detail.overhead_ratio == 0.005
    assert await daemon.metric("sharpwatch_run_step{") == 4
    assert await daemon.metric("sharpwatch_samples_received_total") == 4
    assert await daemon.metric("sharpwatch_sessions") == 1
    await counted(daemon, "sharpwatch_ingest_to_metric_seconds_count", 4)
    trainer.call.cancel()
    await daemon.shown("run", lambda detail: detail.run.phase == 2)


async def test_a_session_that_says_all_is_answered_to_the_end(daemon, build):
    trainer = await daemon.train()
    for sequence in range(1, 30):
        await trainer.send(build.sample(sequence, closing=sequence == 29))
    await trainer.call.done_writing()
    await trainer.acknowledged(29)
    assert (await trainer.ended())[0] is grpc.StatusCode.OK
    await daemon.shown("run", lambda detail: detail.run.phase == 3)


async def test_a_run_that_said_goodbye_while_its_last_sample_was_estimated_is_closed(daemon, build, monkeypatch):
    begun, release = threading.Event(), threading.Event()

    def held(*asked):
        begun.set()
        release.wait(PATIENCE)
        return estimate_all(*asked)

    estimate_all = estimator.estimate_all
    monkeypatch.setattr(estimator, "estimate_all", held)
    trainer = await daemon.train()
    await trainer.send(build.sample(1, gnb=build.gnb(1), closing=True))
    await asyncio.to_thread(begun.wait, PATIENCE)
    trainer.call.cancel()
    await counted(daemon, "sharpwatch_sessions", 0)
    release.set()
    detail = await daemon.shown("run", lambda detail: detail.run.step == 1)
    assert detail.run.phase == pb.RUN_PHASE_CLOSED


async def test_no_sample_waits_for_the_estimates_of_another(daemon, build, monkeypatch):
    begun, release = threading.Event(), threading.Event()

    def held(*asked):
        begun.set()
        release.wait(PATIENCE)
        return estimate_all(*asked)

    estimate_all = estimator.estimate_all
    monkeypatch.setattr(estimator, "estimate_all", held)
    trainer, other = await daemon.train(), await daemon.train("other", "o1")
    await trainer.send(build.sample(1, gnb=build.gnb(1)))
    await asyncio.to_thread(begun.wait, PATIENCE)
    await trainer.send(build.sample(2))
    await trainer.acknowledged(2)
    await other.send(build.sample(1))
    await daemon.shown("run", lambda detail: detail.run.step == 2)
    await daemon.shown("other", lambda detail: detail.run.step == 1)
    assert await daemon.metric("sharpwatch_ingest_to_metric_seconds_count") == 2
    release.set()
    detail = await daemon.shown("run", lambda detail: any(one.estimator == "gnb" for one in detail.blocks[0].estimates))
    assert {one.step for one in detail.blocks[0].estimates if one.estimator == "gnb"} == {1}
    assert detail.run.step == 2
    trainer.call.cancel()
    other.call.cancel()


async def test_estimates_agree_with_what_the_probes_were_drawn_from(daemon, build):
    trainer = await daemon.train()
    for sequence in range(1, 9):
        await trainer.send(build.sample(sequence, gnb=build.gnb(sequence, draws=4)))
    await trainer.acknowledged(8)
    detail = await daemon.shown("run", lambda detail: estimated(detail) == 8)
    true = {"emb": 1e-3, "qk": 1e-2, "ffn": 2e-2, "vo": 4e-2, "norm": 1.0}
    for block in detail.blocks:
        by_gnb = [one for one in block.estimates if one.estimator == "gnb"]
        (sharpness,) = [one for one in by_gnb if one.quantity == "sharpness"]
        (trace,) = [one for one in by_gnb if one.quantity == "trace"]
        # 32 draws of 64 normal numbers each: the claimed error is that of a mean of chi-squares, and 4 of it suffice.
        assert sharpness.stderr == pytest.approx(true[block.block] * np.sqrt(2 / (64 * 32)), rel=0.75)
        assert abs(sharpness.value - true[block.block]) < 4 * sharpness.stderr
        assert trace.value == pytest.approx(sharpness.value * block.parameters)
        assert sharpness.draws == 32
        assert sharpness.estimator == "gnb"
    assert detail.block_order_correlation == 1.0
    assert await daemon.metric('sharpwatch_block_sharpness{block="norm"') == pytest.approx(1.0, rel=0.2)
    trainer.call.cancel()


async def test_the_stability_ratio_is_shown_whole_and_for_the_blocks_that_had_their_turn(daemon, build):
    trainer = await daemon.train()
    await trainer.send(build.sample(1, direction=build.direction(0.5)))
    await trainer.send(build.sample(2, direction=build.direction(0.25)))
    await trainer.acknowledged(2)
    detail = await daemon.shown("run", lambda detail: len(detail.estimates) > 0 and detail.estimates[0].step == 2)
    (whole,) = [one for one in detail.estimates if one.quantity == "stability_ratio"]
    assert whole.value == pytest.approx(0.375)
    ratios = {block.block: [one.value for one in block.estimates] for block in detail.blocks}
    assert ratios == {"emb": [pytest.approx(0.375)], "qk": [], "ffn": [], "vo": [], "norm": []}
    trainer.call.cancel()


async def test_a_resend_is_acknowledged_and_not_taken_twice(daemon, build):
    first = await daemon.train()
    for sequence in (1, 2, 3):
        await first.send(build.sample(sequence))
    await first.acknowledged(3)
    first.call.cancel()
    second = await daemon.train()
    assert second.welcome.acknowledged_sequence == 3
    await second.send(build.sample(2))
    await second.acknowledged(3)
    await second.send(build.sample(4))
    await second.acknowledged(4)
    assert await daemon.metric("sharpwatch_ingest_to_metric_seconds_count") == 4
    second.call.cancel()


async def test_a_newer_session_of_an_attempt_takes_over(daemon, build):
    first = await daemon.train()
    second = await daemon.train()
    code, details = await first.ended()
    assert code is grpc.StatusCode.ABORTED
    assert "took over" in details
    await second.send(build.sample(1))
    await second.acknowledged(1)
    assert await daemon.metric("sharpwatch_sessions") == 1
    second.call.cancel()


async def test_bad_samples_are_refused_with_a_reason_and_harm_nobody(daemon, build):
    good, bad = await daemon.train("good", "g1"), await daemon.train("bad", "b1")
    bad_tap = build.tap()
    bad_tap.learning_rate.CopyFrom(wire.encode([np.nan] * 5, "float32"))
    await bad.send(build.sample(1, step=5))
    await bad.send(build.sample(2, tap=agent_pb2.Tap()))
    await bad.send(build.sample(3, tap=bad_tap))
    await bad.send(build.sample(4, step=2))
    await bad.send(build.sample(5, step=6))
    await bad.acknowledged(5)
    refusals = [await bad.next("refusal") for _ in range(3)]
    assert [(one.sequence, one.code) for one in refusals] == [
        (2, "malformed"),
        (3, "non_finite"),
        (4, "out_of_order"),
    ]
    assert all(one.reason for one in refusals)
    for code in ("malformed", "non_finite", "out_of_order"):
        assert await daemon.metric(f'sharpwatch_samples_refused_total{{code="{code}"}}') == 1
    await good.send(build.sample(1))
    await good.acknowledged(1)
    good.call.cancel()
    bad.call.cancel()


async def test_bytes_that_are_no_message_are_refused(daemon, build):
    session = daemon.channel.stream_stream(
        "/sharpwatch.v1.AgentService/Session", response_deserializer=agent_pb2.SessionResponse.FromString
    )()
    await session.write(agent_pb2.SessionRequest(hello=build.hello()).SerializeToString())
    assert (await session.read()).HasField("welcome")
    await session.write(b"\xff\xff\xff\xff")
    refusal = (await session.read()).refusal
    assert (refusal.sequence, refusal.code) == (0, "malformed")
    await session.write(agent_pb2.SessionRequest(sample=build.sample(1)).SerializeToString())
    assert (await session.read()).ack.sequence == 1
    session.cancel()


@pytest.mark.parametrize("excess", [1, wire.MAX_MESSAGE_BYTES])
async def test_an_oversized_message_ends_its_stream_alone(daemon, build, excess):
    good, bad = await daemon.train("good", "g1"), await daemon.train("bad", "b1")
    await bad.send(build.sample(1, results=[types_pb2.CommandResult(detail="x" * (wire.MAX_MESSAGE_BYTES + excess))]))
    assert (await bad.ended())[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    await good.send(build.sample(1))
    await good.acknowledged(1)
    if excess == 1:  # what is twice too large gRPC itself cuts off, uncounted
        assert await daemon.metric('sharpwatch_samples_refused_total{code="oversized"}') == 1
    again = await daemon.train("bad", "b1")
    await again.send(build.sample(1))
    await again.acknowledged(1)
    for trainer in (good, again):
        trainer.call.cancel()


async def test_a_session_without_a_good_hello_is_turned_away(daemon, build):
    silent, hasty, wrong = daemon.connect(), daemon.connect(), daemon.connect()
    await silent.call.done_writing()
    await hasty.send(build.sample(1))
    await wrong.send(build.hello(protocol=99))
    for trainer, says in ((silent, "no Hello"), (hasty, "must be a Hello"), (wrong, "protocol must be 1, got 99")):
        code, details = await trainer.ended()
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert says in details
    assert await daemon.metric('sharpwatch_samples_refused_total{code="hello"}') == 3


async def test_an_attempt_stays_with_its_run_and_its_blocks(daemon, build):
    await daemon.train("one", "a1")
    thief, other = daemon.connect(), daemon.connect()
    await thief.send(build.hello("two", "a1"))
    assert "wrong_run" in (await thief.ended())[1]
    rows = [types_pb2.LayerBlock(block="emb", parameters=1)]
    await other.send(build.hello("one", "a1", blocks=["emb"], layer_blocks=rows))
    assert "other blocks" in (await other.ended())[1]


async def test_a_run_stays_with_its_training_job(daemon, build):
    """Another job of the same run's name would be given this one's multipliers."""
    await daemon.train("one", "a1", training_job="mine")
    thief = daemon.connect()
    await thief.send(build.hello("one", "a2", training_job="yours"))
    assert "run one belongs to training job mine" in (await thief.ended())[1]


async def test_what_a_bad_message_is_refused_for_is_short_however_long_the_message(daemon, build):
    trainer, greeter = await daemon.train(), daemon.connect()
    bad = build.sample(1)
    bad.tap.gradient_norm.shape.extend([1] * 2_000_000)
    await trainer.send(bad)
    assert len((await trainer.next("refusal")).reason) == 1_000
    await greeter.send(build.hello(attempt="a2", control="x" * 100_000))
    code, details = await greeter.ended()
    assert (code, len(details) < 1_100) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    await trainer.send(build.sample(2))
    await trainer.acknowledged(2)


async def test_a_step_that_leaves_no_room_for_an_expiry_does_not_end_the_daemon(running, build):
    cut = "policies: [{name: cut, match: {alert: NonFinite}, mode: enforce, action: {kind: scale_lr, factor: 0.5}}]"
    async with running(policies=cut) as daemon:
        liar = await daemon.train("liar", "a1")
        await liar.send(build.sample(1, 2**63 - 1, loss=float("nan"), taken_at_unix_ns=1))
        assert (await liar.next("refusal")).code == "malformed"
        await liar.send(build.sample(2, 2**53, loss=float("nan"), taken_at_unix_ns=1))
        assert (await liar.next("command")).expires_at_step > 2**53
        other = await daemon.train("other", "b1")
        await other.send(build.sample(1))
        await other.acknowledged(1)


async def test_a_new_attempt_continues_the_run(daemon, build):
    first = await daemon.train(attempt="a1")
    await first.send(build.sample(1, step=100))
    await first.acknowledged(1)
    await first.leave()
    second = await daemon.train(attempt="a2", initial_step=50)
    assert second.welcome.acknowledged_sequence == 0
    await second.send(build.sample(1, step=51))  # not out of order: another attempt
    await second.acknowledged(1)
    again = await daemon.train(attempt="a1")
    await again.send(build.sample(2, step=101))  # what the old attempt still had is kept, and moves nothing
    await again.acknowledged(2)
    detail = await daemon.shown("run", lambda detail: detail.run.attempts == 2)
    assert detail.run.step == 51
    again.call.cancel()
    second.call.cancel()


async def test_a_client_that_does_not_read_its_refusals_is_ended(daemon, build, monkeypatch):
    monkeypatch.setattr(agent_service, "MAX_OUTGOING", 0)
    trainer = await daemon.train()
    await trainer.send(build.sample(1, tap=agent_pb2.Tap()))
    assert (await trainer.ended())[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_defect_met_in_one_run_is_counted_and_harms_no_other(daemon, build, monkeypatch):
    def broken(self, *arguments):
        if self.name == "bad":
            raise ZeroDivisionError
        return update(self, *arguments)

    update = Run.update
    monkeypatch.setattr(Run, "update", broken)
    good, bad = await daemon.train("good", "g1"), await daemon.train("bad", "b1")
    for trainer in (bad, good):
        await trainer.send(build.sample(1))
        await trainer.acknowledged(1)
    await daemon.shown("good", lambda detail: detail.run.step == 1)
    assert await daemon.metric('sharpwatch_internal_errors_total{where="fold"}') == 1
    good.call.cancel()
    bad.call.cancel()


async def test_a_defect_in_the_estimates_leaves_taps_and_alerts(daemon, build, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(estimator, "estimate_all", broken)
    trainer = await daemon.train()
    await trainer.send(build.sample(1, gnb=build.gnb(1)))
    await trainer.acknowledged(1)
    detail = await daemon.shown("run", lambda detail: detail.run.step == 1)
    assert detail.blocks[0].gradient_norm > 0
    await counted(daemon, 'sharpwatch_internal_errors_total{where="estimate"}', 1)
    trainer.call.cancel()


async def test_a_defect_met_in_a_message_ends_its_session(daemon, build, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    trainer = await daemon.train()
    monkeypatch.setattr(agent_service, "read_sample", broken)
    await trainer.send(build.sample(1))
    assert (await trainer.ended())[0] is grpc.StatusCode.INTERNAL
    assert await daemon.metric('sharpwatch_internal_errors_total{where="session"}') == 1


async def test_health_is_served_beside(daemon):
    stub = health_pb2_grpc.HealthStub(daemon.channel)
    for service in ("", *SERVICES):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert await daemon.get("/-/healthy") == (200, "ok\n")
    assert await daemon.get("/-/ready") == (200, "ready\n")


async def test_a_draining_daemon_is_not_healthy(daemon):
    stub = health_pb2_grpc.HealthStub(daemon.channel)
    watches = [stub.Watch(health_pb2.HealthCheckRequest(service=service)) for service in SERVICES]
    for watch in watches:
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    stopping = asyncio.create_task(daemon.stop())
    for watch in watches:
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
    await stopping


async def reflected(daemon) -> list[str]:
    call = reflection_pb2_grpc.ServerReflectionStub(daemon.channel).ServerReflectionInfo(metadata=daemon.credentials)
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    response = await call.read()
    call.cancel()
    return [service.name for service in response.list_services_response.service]


async def test_the_bytes_of_a_runs_messages_are_counted(daemon, build):
    trainer = await daemon.train()
    await trainer.send(build.sample(1))
    await trainer.acknowledged(1)
    sent = (
        agent_pb2.SessionRequest(hello=build.hello()),
        agent_pb2.SessionRequest(sample=build.sample(1)),
    )
    await daemon.metric_reaches("sharpwatch_received_bytes_total", sum(each.ByteSize() for each in sent))
    trainer.call.cancel()


async def test_reflection_is_there_where_it_is_asked_for_alone(running, tmp_path):
    async with running(reflection=True) as daemon:
        assert set(SERVICES) <= set(await reflected(daemon))
        call = reflection_pb2_grpc.ServerReflectionStub(daemon.channel).ServerReflectionInfo(
            metadata=daemon.credentials
        )
        await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICES[0]))
        assert (await call.read()).file_descriptor_response.file_descriptor_proto
        call.cancel()
    async with running(store=f"sqlite:///{tmp_path}/second.db") as daemon:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reflected(daemon)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_trainer_that_stops_stepping_is_told_from_one_that_is_gone(running, build):
    """Its agent says that it lives; the incident closes with the next step, or when the agent goes."""
    async with running(detection={"stall_after": 1}) as daemon:
        trainer = await daemon.train()
        await trainer.send(build.sample(1))

        def stalled(active):
            return lambda detail: (
                [(one.name, one.cause, one.active) for one in detail.alerts[-1:]] == [("RunStalled", "stalled", active)]
            )

        detail = await daemon.shown("run", stalled(active=True))
        assert "after step 1, though the agent is connected" in detail.alerts[0].evidence
        assert await daemon.metric('sharpwatch_alert_active{alert="RunStalled"') == 1
        await trainer.send(build.sample(2))
        assert (await daemon.shown("run", stalled(active=False))).alerts[0].closed == "the run makes steps again"
        detail = await daemon.shown("run", lambda shown: len(shown.alerts) == 2 and stalled(active=True)(shown))
        trainer.call.cancel()
        # It is no better because nothing is heard of it any more, nor because its process was killed.
        await daemon.shown("run", lambda shown: shown.run.phase == pb.RUN_PHASE_SILENT and stalled(active=True)(shown))
        trainer = await daemon.train()
        await trainer.leave()
        await daemon.shown("run", lambda shown: shown.run.phase == pb.RUN_PHASE_KILLED and stalled(active=True)(shown))
        trainer = await daemon.train()
        await trainer.send(agent_pb2.Sample(sequence=3, step=2, closing=True))
        assert (await daemon.shown("run", stalled(active=False))).alerts[1].closed == "the run was closed"
