"""What survives kill -9, a full disk, and a stop in order; the daemon is a process of its own."""

from __future__ import annotations

import asyncio
import itertools
import json
import resource
import signal
import sqlite3
from contextlib import closing
from dataclasses import asdict

import grpc
import pytest
from structlog.testing import capture_logs

from sharpwatch import wire
from sharpwatch.daemon import pipeline
from sharpwatch.daemon.records import Revision
from sharpwatch.daemon.storage.journal import Journal
from sharpwatch.errors import StoreError
from sharpwatch.v1 import operator_pb2 as pb
from sharpwatch.v1 import types_pb2

FAILED = types_pb2.COMMAND_OUTCOME_FAILED
RATES = pb.SetLearningRatesRequest(run="run", multipliers={"qk": 0.5}, author="ann", reason="too sharp")


def comparable(detail: pb.RunDetail) -> pb.RunDetail:
    """`detail` without what a restart rightly changes, and without estimates."""
    same = pb.RunDetail()
    same.CopyFrom(detail)
    same.run.phase = pb.RUN_PHASE_UNSPECIFIED
    same.run.last_sample_at_unix_ns = 0
    for part in (same, *same.blocks):
        del part.estimates[:]
    return same


def estimates(detail: pb.RunDetail) -> dict[tuple, tuple[float, float]]:
    return {
        (one.quantity, one.block, one.estimator, one.draws, one.step): (one.value, one.stderr)
        for part in (detail, *detail.blocks)
        for one in part.estimates
    }


def estimated(detail: pb.RunDetail) -> int:
    """The step of the oldest estimates; they follow their sample."""
    return min((key[-1] for key in estimates(detail)), default=0)


async def test_a_daemon_killed_takes_its_runs_up_where_they_were(start, build):
    first = await start()
    daemon = first.client
    trainer = await daemon.train()
    checkpoint = types_pb2.Checkpoint(step=3, uri="file:///c3")
    for sequence in range(1, 21):
        await trainer.send(
            build.sample(
                sequence,
                gnb=build.gnb(sequence),
                direction=build.direction(0.1 + 0.01 * sequence),
                checkpoints=[checkpoint] if sequence == 3 else [],
            )
        )
    await trainer.acknowledged(20)
    mode = pb.SetModeRequest(run="run", mode="enforce", author="ann", reason="night")
    await daemon.operator.SetMode(mode, metadata=daemon.credentials)
    made = (await daemon.operator.SetLearningRates(RATES, metadata=daemon.credentials)).decision
    before = await daemon.shown("run", lambda detail: estimated(detail) == 20 and detail.run.lr_revision == 1)
    assert await first.exit(signal.SIGKILL) == -signal.SIGKILL

    daemon = (await start()).client
    after = (await daemon.operator.GetRun(pb.GetRunRequest(run="run"))).detail
    assert after.run.phase == pb.RUN_PHASE_SILENT
    assert comparable(after) == comparable(before)
    assert estimates(after).keys() == estimates(before).keys()
    for key, found in estimates(after).items():  # in another batch, so rounded otherwise
        assert found == pytest.approx(estimates(before)[key], rel=1e-4)
    assert await daemon.metric("sharpwatch_run_step{") == 20
    again = await daemon.train()
    assert again.welcome.acknowledged_sequence == 20
    assert (await again.next("command")).id == made.id
    await again.send(build.sample(21, results=[types_pb2.CommandResult(command_id=made.id, outcome=1, step=21)]))
    await again.acknowledged(21)
    await daemon.shown("run", lambda detail: detail.run.step == 21)
    found = (await daemon.operator.ListDecisions(pb.ListDecisionsRequest())).decisions
    kept = next(one for one in found if one.id == made.id)
    assert (kept.outcome, kept.author, kept.applied_step) == ("applied", "ann", 21)
    again.call.cancel()


async def test_only_checkpoints_that_exist_are_offered_also_after_a_restart(start, build):
    def saved(*steps: int) -> list[types_pb2.Checkpoint]:
        return [types_pb2.Checkpoint(step=step, uri=f"c{step}") for step in steps]

    def steps(detail: pb.RunDetail) -> list[int]:
        return [checkpoint.step for checkpoint in detail.checkpoints]

    first = await start()
    daemon = first.client
    trainer = await daemon.train()
    await trainer.send(build.sample(1, step=50, checkpoints=saved(10, 20, 30, 40)))
    await trainer.send(build.sample(2, step=51, deleted_checkpoints=["c20", "unknown"]))
    await daemon.shown("run", lambda detail: steps(detail) == [10, 30, 40])
    request = pb.RequestRollbackRequest(run="run", author="ann", reason="spike")
    made = (await daemon.operator.RequestRollback(request, metadata=daemon.credentials)).decision
    assert (await trainer.next("command")).rollback.checkpoint.uri == "c40"
    failed = types_pb2.CommandResult(command_id=made.id, outcome=FAILED, step=52, detail="c40 does not exist any more")
    await trainer.send(build.sample(3, step=52, results=[failed]))
    await trainer.acknowledged(3)
    await daemon.shown("run", lambda detail: steps(detail) == [10, 30])
    assert await first.exit(signal.SIGKILL) == -signal.SIGKILL

    daemon = (await start()).client
    assert steps((await daemon.operator.GetRun(pb.GetRunRequest(run="run"))).detail) == [10, 30]
    (kept,) = (await daemon.operator.ListDecisions(pb.ListDecisionsRequest())).decisions
    assert (kept.outcome, kept.detail) == ("failed", "c40 does not exist any more")
    trainer = await daemon.train()
    await trainer.send(build.sample(4, step=53, checkpoints=saved(40)))  # anew
    await daemon.shown("run", lambda detail: steps(detail) == [10, 30, 40])
    request.to_step = 39
    await daemon.operator.RequestRollback(request, metadata=daemon.credentials)
    assert (await trainer.next("command")).rollback.checkpoint.uri == "c30"
    trainer.call.cancel()


async def test_a_new_attempt_gets_its_multipliers_though_the_daemon_ended_before_its_first_step(running, build):
    async with running() as daemon:
        first = await daemon.train("run", "a1")
        await first.send(build.sample(1))
        asked = pb.SetLearningRatesRequest(run="run", multipliers={"qk": 0.5}, author="ann")
        await daemon.operator.SetLearningRates(asked, metadata=daemon.credentials)
        done = types_pb2.CommandResult(command_id=(await first.next("command")).id, outcome=1, step=2)
        await first.send(build.sample(2, results=[done]))
        await first.acknowledged(2)
        await first.leave()
        await daemon.train("run", "a2")
    async with running() as daemon:
        second = await daemon.train("run", "a2")
        await second.send(build.sample(1, 3))
        command = await second.next("command")
        assert dict(command.set_multipliers.multipliers)["qk"] == 0.5


async def test_no_acknowledged_sample_is_lost_whenever_the_daemon_is_killed(start, build):
    first = await start()
    trainer = await first.client.train()
    acknowledged = 0

    async def listen() -> None:
        nonlocal acknowledged
        while True:
            acknowledged = (await trainer.next("ack")).sequence
            if acknowledged > 200:
                first.process.kill()

    async def speak() -> None:
        for sequence in itertools.count(1):
            await trainer.send(build.sample(sequence))

    done, rest = await asyncio.wait(
        (asyncio.create_task(listen()), asyncio.create_task(speak())), return_when=asyncio.FIRST_EXCEPTION
    )
    for task in rest:
        task.cancel()
    assert all(task.exception() is not None for task in done)  # the daemon was killed under them
    await asyncio.to_thread(first.process.wait)
    trainer = await (await start()).client.train()
    assert trainer.welcome.acknowledged_sequence >= acknowledged > 200
    trainer.call.cancel()


async def test_a_full_disk_stops_acknowledgements_and_not_the_daemon(start, build):
    running = await start(queue_capacity=16)
    daemon = running.client
    quiet, busy = await daemon.train("quiet", "q1"), await daemon.train("busy", "b1")
    for trainer in (quiet, busy):
        await trainer.send(build.sample(1))
        await trainer.acknowledged(1)

    # No file may grow past this: for the journal the disk is full.
    unlimited = resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    await quiet.send(build.sample(2))
    failed = await running.event("store_failed")
    assert "journal.db" in failed["error"]
    for sequence in range(2, 21):
        await busy.send(build.sample(sequence, gnb=build.gnb(sequence)))
    await daemon.shown("busy", lambda detail: estimated(detail) == 20)  # still seen, still estimated
    lost = [await busy.next("refusal") for _ in range(4)]
    assert {one.code for one in lost} == {"overflow"}
    # The oldest: but for those that a retry of the journal has in its hands at that moment.
    assert max(one.sequence for one in lost) < 20
    assert "refusal" not in quiet.received
    assert "ack" not in {kind for kind, received in busy.received.items() if received}
    status, reason = await daemon.get("/-/ready")
    assert status == 503
    assert "journal.db" in reason
    assert await daemon.get("/-/healthy") == (200, "ok\n")
    assert await daemon.metric("sharpwatch_store_writable") == 0
    await daemon.metric_reaches("sharpwatch_queue_depth", 16)  # it is 0 while a retry has them in its hands
    about = await daemon.operator.GetDaemon(pb.GetDaemonRequest())
    assert not about.store_writable
    assert "journal.db" in about.store_error
    for dry_run in (False, True):
        change = pb.SetLearningRatesRequest(run="busy", multipliers={"qk": 0.5}, author="ann", dry_run=dry_run)
        with pytest.raises(grpc.aio.AioRpcError, match="no change can be journalled now"):
            await daemon.operator.SetLearningRates(change, metadata=daemon.credentials)
    message, headers = {"version": "4", "alerts": []}, dict([daemon.credentials[0]])
    async with daemon.web.post(f"http://{daemon.http}/api/v1/alerts", json=message, headers=headers) as response:
        assert (response.status, "journal.db" in (await response.json())["error"]) == (503, True)

    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, unlimited)
    await running.event("store_recovered")
    await quiet.acknowledged(2)
    await busy.acknowledged(20)
    assert await daemon.get("/-/ready") == (200, "ready\n")
    assert await daemon.metric("sharpwatch_store_writable") == 1
    assert "command" not in busy.received
    assert [event["event"] for event in running.log].count("store_failed") == 1
    for trainer in (quiet, busy):
        trainer.call.cancel()


async def test_records_that_wait_for_the_journal_are_bounded(daemon, build, monkeypatch):
    monkeypatch.setattr(pipeline, "MAX_RECORD_BYTES", 0)
    trainer = await daemon.train()
    await trainer.send(build.sample(1))
    await trainer.acknowledged(1)

    def failing(*_):
        raise StoreError("journal: the disk is full")

    with monkeypatch.context() as outage, capture_logs() as logs:
        outage.setattr(Journal, "write", failing)
        tap = build.tap()
        tap.non_finite.CopyFrom(wire.encode([1] * 5, "int64"))
        await trainer.send(build.sample(2, tap=tap))
        await daemon.shown("run", lambda detail: detail.run.active_alerts)  # the incident waits for the journal
        await trainer.send(build.sample(3))
        await daemon.metric_reaches("sharpwatch_queue_depth", 2)
        assert (await daemon.operator.GetRun(pb.GetRunRequest(run="run"))).detail.run.step == 2
        new = daemon.connect()
        await new.send(build.hello("new", "n1"))
        code, details = await new.ended()
        assert (code, details) == (
            grpc.StatusCode.UNAVAILABLE,
            "no new attempt can be journalled now: journal: the disk is full",
        )
        unknown = pb.SetModeRequest(run="none", mode="observe", author="ann")
        with pytest.raises(grpc.aio.AioRpcError, match="no run"):
            await daemon.operator.SetMode(unknown, metadata=daemon.credentials)
    assert [each["event"] for each in logs].count("records_full") == 1
    await trainer.acknowledged(3)
    detail = await daemon.shown("run", lambda detail: detail.run.step == 3)
    assert detail.run.active_alerts
    audit = await daemon.operator.ListTransitions(pb.ListTransitionsRequest())
    assert not audit.events  # the log alone has what was refused meanwhile
    await daemon.train("new", "n1")


async def test_sigterm_flushes_says_goodbye_and_exits_0(start, build):
    running = await start()
    trainer = await running.client.train()
    for sequence in range(1, 50):
        await trainer.send(build.sample(sequence))
    await trainer.acknowledged(1)
    status = await running.exit(signal.SIGTERM)
    assert status == 0
    assert (await trainer.next("drain")).reason == "the daemon is stopping"
    acknowledged = trainer.received["ack"][-1].sequence if trainer.received.get("ack") else 1
    assert running.log[-1]["event"] == "stopped"
    again = await (await start()).client.train()
    assert again.welcome.acknowledged_sequence >= acknowledged
    again.call.cancel()


async def test_a_daemon_that_can_not_start_says_why_and_exits_1(start, tmp_path):
    (tmp_path / "journal.db").write_bytes(b"not a database, and long enough to be looked at as one" * 40)
    with pytest.raises(AssertionError, match=r"file is not a database.*not_serving"):
        await start()


async def test_a_revision_that_the_journal_has_already_is_refused_and_stops_nothing_else(daemon, build, tmp_path):
    trainer = await daemon.train()
    await trainer.send(build.sample(1))
    await trainer.acknowledged(1)
    kept = json.dumps(asdict(Revision("run", 1, {"qk": 0.1}, "bob", "", 1.0, "another")))
    with closing(sqlite3.connect(tmp_path / "journal.db")) as journal, journal:
        journal.execute("INSERT INTO revisions VALUES ('run', 1, ?)", [kept])
    with pytest.raises(grpc.aio.AioRpcError, match="revision 1 of run run is there already with other content"):
        await daemon.operator.SetLearningRates(RATES, metadata=daemon.credentials)
    await trainer.send(build.sample(2))
    await trainer.acknowledged(2)
    assert "command" not in trainer.received
    assert await daemon.metric('sharpwatch_internal_errors_total{where="journal"}') == 1
    with closing(sqlite3.connect(tmp_path / "journal.db")) as journal:
        assert journal.execute("SELECT record FROM revisions").fetchall() == [(kept,)]
