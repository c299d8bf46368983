"""Runs leave memory, never the journal: whatever names one that left brings it back as it was."""

from __future__ import annotations

import grpc
import pytest

from sharpwatch import wire
from sharpwatch.daemon.decisions import decision_log
from sharpwatch.daemon.detection import incidents
from sharpwatch.daemon.runs import restore
from sharpwatch.daemon.runs import run as runs
from sharpwatch.v1 import agent_pb2, types_pb2
from sharpwatch.v1 import operator_pb2 as pb


def rates(run="old", **multipliers) -> pb.SetLearningRatesRequest:
    return pb.SetLearningRatesRequest(run=run, multipliers=multipliers, author="ann", reason="too sharp")


async def revised(daemon, build, run="old", attempt="old-1", **changes) -> list[str]:
    """A run with two revisions in force, three samples, a checkpoint and a mode, whose trainer was then killed."""
    trainer = await daemon.train(run, attempt, **changes)
    await trainer.send(build.sample(1, checkpoints=[types_pb2.Checkpoint(step=1, uri="c1")]))
    made = []
    for sequence, block in enumerate(("qk", "vo"), 2):
        made.append(
            (
                await daemon.operator.SetLearningRates(rates(run, **{block: 0.5}), metadata=daemon.credentials)
            ).decision.id
        )
        done = types_pb2.CommandResult(command_id=(await trainer.next("command")).id, outcome=1, step=sequence)
        await trainer.send(build.sample(sequence, results=[done]))
    mode = pb.SetModeRequest(run=run, mode="enforce", author="ann", reason="night")
    await daemon.operator.SetMode(mode, metadata=daemon.credentials)
    await trainer.acknowledged(3)
    await daemon.shown(run, lambda detail: detail.run.step == 3)
    await trainer.leave()
    return made


async def leaves(daemon, build, *names) -> None:
    """As many newer runs as are held, so that runs `names` are held no more."""
    for number in range(3):
        trainer = await daemon.train(f"new-{number}", f"new-{number}-1")
        await trainer.send(build.sample(1))
        await trainer.acknowledged(1)
        await daemon.shown(f"new-{number}", lambda detail: detail.run.step == 1)
        await trainer.leave()
    _, text = await daemon.get("/metrics")
    assert not [name for name in names if f'run="{name}"' in text]


@pytest.fixture
async def small(running, monkeypatch):
    """A daemon that holds three runs."""
    monkeypatch.setattr(runs, "MAX_RUNS", 3)
    async with running() as client:
        yield client


async def revisions(daemon, run="old") -> list[tuple[int, dict]]:
    answer = await daemon.operator.ListRevisions(pb.ListRevisionsRequest(run=run))
    return [(one.revision, dict(one.multipliers)) for one in answer.revisions]


@pytest.mark.parametrize("attempt", ["old-1", "old-2"])
async def test_a_trainer_that_returns_goes_on_with_its_revisions_and_their_audit(small, build, attempt):
    made = await revised(small, build)
    before = await revisions(small)
    await leaves(small, build, "old")
    trainer = await small.train("old", attempt)
    again = attempt == "old-1"
    assert trainer.welcome.acknowledged_sequence == (3 if again else 0)
    changed = await small.operator.SetLearningRates(rates(ffn=0.25), metadata=small.credentials)
    assert changed.decision.revision == 3
    command = await trainer.next("command")
    assert dict(command.set_multipliers.multipliers) == {"emb": 1, "qk": 0.5, "vo": 0.5, "ffn": 0.25, "norm": 1}
    assert await revisions(small) == [*before, (3, dict(command.set_multipliers.multipliers))]
    audit = await small.operator.ListTransitions(pb.ListTransitionsRequest(run="old"))
    assert [one.decision_id for one in audit.transitions if one.outcome == "applied"] == made
    assert [(one.action, one.outcome) for one in audit.events] == [("mode", "enforce")]
    await trainer.send(build.sample(4 if again else 1, step=4))
    await trainer.acknowledged(4 if again else 1)
    detail = await small.shown("old", lambda detail: detail.run.step == 4)
    assert (detail.run.mode, detail.run.attempts, [one.uri for one in detail.checkpoints]) == (
        "enforce",
        1 if again else 2,
        ["c1"],
    )
    trainer.call.cancel()


async def test_a_sample_that_is_sent_again_is_not_taken_twice(small, build):
    await revised(small, build)
    await leaves(small, build, "old")
    trainer = await small.train("old", "old-1")
    received = await small.metric("sharpwatch_samples_received_total")
    for sequence in (2, 3, 4):
        await trainer.send(build.sample(sequence))
    await trainer.acknowledged(4)
    history = await small.operator.GetHistory(pb.GetHistoryRequest(run="old"))
    assert [point.step for point in history.points] == [1, 2, 3, 4]
    assert await small.metric("sharpwatch_samples_received_total") == received + 3
    trainer.call.cancel()


async def test_an_attempt_older_than_those_in_memory_goes_on_where_its_samples_were(small, build):
    await revised(small, build)
    for number in range(runs.MAX_ATTEMPTS + 1):
        other = await small.train("old", f"other-{number}")
        await other.leave()
    trainer = await small.train("old", "old-1")
    assert trainer.welcome.acknowledged_sequence == 3
    trainer.call.cancel()


async def test_an_attempt_of_a_run_that_left_is_no_attempt_of_another(small, build):
    await revised(small, build)
    await leaves(small, build, "old")
    other = await small.train("other", "other-1")
    await other.leave()
    trainer = small.connect()
    await trainer.send(build.hello("other", "old-1"))
    assert await trainer.ended() == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "wrong_run: attempt old-1 belongs to run old",
    )


async def test_an_attempt_of_a_run_that_left_begins_no_run(small, build):
    await revised(small, build)
    await leaves(small, build, "old")
    trainer = small.connect()
    await trainer.send(build.hello("never-seen", "old-1"))
    assert await trainer.ended() == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "wrong_run: attempt old-1 belongs to run old",
    )


async def test_a_decision_that_left_memory_is_still_found(small, build, monkeypatch):
    monkeypatch.setattr(decision_log, "KEPT", 0)
    await revised(small, build)
    stub, operator = small.operator, {"metadata": small.credentials}
    planned = pb.SetLearningRatesRequest(run="old", multipliers={"ffn": 0.5}, apply_at_step=1_000, author="ann")
    made = (await stub.SetLearningRates(planned, **operator)).decision
    await stub.CancelDecision(pb.CancelDecisionRequest(id=made.id, author="ann"), **operator)
    watch = stub.WatchDecision(pb.WatchDecisionRequest(id=made.id[:-1]))
    assert (await watch.read()).decision.outcome == "cancelled"
    newest = (await stub.ListDecisions(pb.ListDecisionsRequest(run="old"))).decisions[0]
    assert (newest.id, newest.outcome) == (made.id, "cancelled")
    for given, code, words in (
        (made.id, grpc.StatusCode.FAILED_PRECONDITION, f"decision {made.id} is cancelled, which is final"),
        (made.id[:-1], grpc.StatusCode.NOT_FOUND, f"no decision that begins with {made.id[:-1]!r} can take approve"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ApproveDecision(pb.ApproveDecisionRequest(id=given, author="ann"), **operator)
        assert (caught.value.code(), caught.value.details()) == (code, words)


PROPOSES = "policies: [{name: cut, match: {alert: NonFinite}, mode: advise, action: {kind: scale_lr, factor: 0.5}}]"


async def test_a_proposal_of_a_run_that_left_is_answered_by_its_id(running, build, monkeypatch):
    monkeypatch.setattr(runs, "MAX_RUNS", 3)
    async with running(policies=PROPOSES) as daemon:
        trainer = await daemon.train("old", "old-1")
        tap = build.tap()
        tap.non_finite.CopyFrom(wire.encode([1] * 5, "int64"))
        await trainer.send(build.sample(1, tap=tap))
        await trainer.acknowledged(1)
        await trainer.leave()
        await daemon.shown("old", lambda detail: detail.run.active_alerts)
        (made,) = (await daemon.operator.ListDecisions(pb.ListDecisionsRequest(run="old"))).decisions
        operator = {"metadata": daemon.credentials}
        # A run whose incident nobody has seen leaves last.
        seen = pb.AcknowledgeIncidentRequest(incident_id=made.alert_id, author="ann")
        await daemon.operator.AcknowledgeIncident(seen, **operator)
        await leaves(daemon, build, "old")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await daemon.operator.RejectDecision(pb.RejectDecisionRequest(id=made.id[:-1], author="ann"), **operator)
        assert caught.value.details().endswith(f"say which one is meant: {made.id}")
        approval = pb.ApproveDecisionRequest(id=made.id, author="ann")
        sent = (await daemon.operator.ApproveDecision(approval, **operator)).decision
        assert (sent.outcome, sent.waits) == ("approved", "run old has no trainer now: its next one gets it")


@pytest.mark.parametrize("how", ["closed", "killed", "live"])
async def test_what_is_sent_where_no_trainer_is_says_that_it_waits(daemon, build, how):
    trainer = await daemon.train("old", "old-1")
    await trainer.send(build.sample(1, closing=how == "closed"))
    await trainer.acknowledged(1)
    if how != "live":
        await trainer.leave()
        phase = {"closed": pb.RUN_PHASE_CLOSED, "killed": pb.RUN_PHASE_KILLED}[how]
        await daemon.shown("old", lambda detail: detail.run.phase == phase)
    made = (await daemon.operator.SetLearningRates(rates(qk=0.5), metadata=daemon.credentials)).decision
    waits = "" if how == "live" else "run old has no trainer now: its next one gets it"
    assert (made.outcome, made.waits) == ("sent", waits)
    (listed,) = (await daemon.operator.ListDecisions(pb.ListDecisionsRequest(run="old"))).decisions
    assert listed == made


async def test_an_incident_that_left_memory_is_said_to_be_closed(daemon, build, monkeypatch):
    monkeypatch.setattr(incidents, "KEPT", 0)
    trainer = await daemon.train("old", "old-1")
    tap = build.tap()
    tap.non_finite.CopyFrom(wire.encode([1] * 5, "int64"))
    await trainer.send(build.sample(1, tap=tap))
    opened = (await daemon.shown("old", lambda detail: detail.alerts)).alerts[0]
    for sequence in range(2, 200):
        await trainer.send(build.sample(sequence))
    await daemon.shown("old", lambda detail: not detail.run.active_alerts)
    await trainer.send(build.sample(200, tap=tap))
    await daemon.shown("old", lambda detail: detail.run.active_alerts and detail.alerts[0].id != opened.id)
    request = pb.AcknowledgeIncidentRequest(incident_id=opened.id, author="ann")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await daemon.operator.AcknowledgeIncident(request, metadata=daemon.credentials)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert caught.value.details() == f"incident {opened.id} of run old is closed, and only the journal has it still"


@pytest.mark.parametrize("call", ["lr set", "show", "mode", "undo", "history", "silence", "audit of all", "decision"])
async def test_an_operator_who_names_a_run_that_left_gets_it_as_it_was(small, build, call):
    made = await revised(small, build)
    before = (await small.operator.GetRun(pb.GetRunRequest(run="old"))).detail
    await leaves(small, build, "old")
    stub, shown = small.operator, {"author": "ann", "reason": "why"}
    operator = {"metadata": small.credentials}
    match call:
        case "lr set":
            assert (await stub.SetLearningRates(rates(ffn=0.5), **operator)).decision.revision == 3
        case "show":
            after = (await stub.GetRun(pb.GetRunRequest(run="old"))).detail
            assert after.run.last_sample_at_unix_ns == pytest.approx(before.run.last_sample_at_unix_ns, abs=2e9)
            after.run.last_sample_at_unix_ns = before.run.last_sample_at_unix_ns
            assert after == before
        case "mode":
            answer = await stub.SetMode(pb.SetModeRequest(run="old", mode="observe", **shown), **operator)
            assert (answer.run.lr_revision, answer.run.multipliers["vo"]) == (2, 0.5)
        case "undo":
            answer = await stub.UndoLearningRates(pb.UndoLearningRatesRequest(run="old", **shown), **operator)
            assert (answer.undone.revision, answer.decision.revision) == (2, 3)
        case "history":
            assert len((await stub.GetHistory(pb.GetHistoryRequest(run="old"))).points) == 3
        case "silence":
            silence = pb.AddSilenceRequest(run="old", duration_seconds=60, **shown)
            assert (await stub.AddSilence(silence, **operator)).silence.run == "old"
        case "audit of all":
            answer = await stub.ListTransitions(pb.ListTransitionsRequest())
            assert {one.id for one in answer.decisions} == {*made}
            assert [one.run for one in answer.events] == ["old"]
        case "decision":
            watch = stub.WatchDecision(pb.WatchDecisionRequest(id=made[0][:-1]))
            assert (await watch.read()).decision.run == "old"
            watch.cancel()


async def test_runs_that_are_held_against_each_other_come_back_where_there_is_room_for_one(small, build, monkeypatch):
    for name in ("old", "older"):
        await revised(small, build, name, f"{name}-1")
    for name, other in (("old", "older"), ("older", "old")):
        reference = pb.SetReferenceRequest(run=name, reference=other, author="ann")
        await small.operator.SetReference(reference, metadata=small.credentials)
    await leaves(small, build, "old", "older")
    monkeypatch.setattr(runs, "MAX_RUNS", 1)
    for name in ("old", "older"):
        found = await small.operator.GetRun(pb.GetRunRequest(run=name), timeout=20)
        assert found.detail.run.lr_revision == 2


async def test_a_run_comes_back_though_what_it_is_held_against_cannot(small, build, monkeypatch):
    for name in ("old", "older"):
        await revised(small, build, name, f"{name}-1")
    reference = pb.SetReferenceRequest(run="old", reference="older", author="ann")
    await small.operator.SetReference(reference, metadata=small.credentials)
    await leaves(small, build, "old", "older")
    readable = restore.read_attempt
    monkeypatch.setattr(restore, "read_attempt", lambda row: None if row.attempt == "older-1" else readable(row))
    trainer = await small.train("old", "old-1")
    assert trainer.welcome.acknowledged_sequence == 3
    trainer.call.cancel()


async def test_a_run_that_left_is_held_against_and_tells_how_it_went_on(small, build):
    """A reference that left memory is still one, and one that comes back is followed again."""
    await revised(small, build)
    await leaves(small, build, "old")
    follower = await small.train("follower", "follower-1")
    reference = pb.SetReferenceRequest(run="follower", reference="old", author="ann")
    assert (await small.operator.SetReference(reference, metadata=small.credentials)).reference.name == "old"
    for sequence in range(1, 5):
        await follower.send(build.sample(sequence))
    await follower.acknowledged(4)
    detail = await small.shown("follower", lambda detail: detail.run.step == 4)
    assert detail.reference.common_steps == 3
    for number in range(3):  # of which none is trained: they leave before it does
        await (await small.train(f"newer-{number}", f"newer-{number}-1")).leave()
    back = await small.train("old", "old-1")
    await back.send(build.sample(4))
    await back.acknowledged(4)
    await small.shown("follower", lambda detail: detail.reference.common_steps == 4)
    for each in (follower, back):
        each.call.cancel()


async def test_an_alert_of_another_system_finds_a_run_that_left(running, build, monkeypatch):
    monkeypatch.setattr(runs, "MAX_RUNS", 3)
    policies = "policies: [{name: slow, match: {foreign: DiskSlow}, mode: observe, action: {kind: notify}}]"
    async with running(policies=policies) as daemon:
        await revised(daemon, build)
        alert = {
            "labels": {"alertname": "DiskSlow", "run": "old"},
            "startsAt": "2026-01-01T00:00:00Z",
            "endsAt": "0001-01-01T00:00:00Z",
            "fingerprint": "f1",
            "status": "firing",
        }

        async def tell(**changes) -> list[tuple[str, str]]:
            message = {"version": "4", "alerts": [alert | changes]}
            url, headers = f"http://{daemon.http}/api/v1/alerts", dict(daemon.credentials)
            async with daemon.web.post(url, json=message, headers=headers) as response:
                told = (await response.json())["alerts"]
                return [(one["run"], one["result"]) for one in told if one["result"] != "unchanged"]

        await leaves(daemon, build, "old")
        assert await tell() == [("old", "begun")]
        await leaves(daemon, build, "old")
        resolved = {"status": "resolved", "endsAt": "2026-01-02T00:00:00Z"}
        assert await tell(**resolved, labels={"alertname": "DiskSlow", "training_job": "job"}) == [("old", "ended")]


async def test_where_only_live_runs_are_held_one_that_left_is_refused_and_never_begun_anew(small, build):
    await revised(small, build)
    live = [await small.train(f"live-{number}", f"live-{number}-1") for number in range(3)]
    trainer = small.connect()
    await trainer.send(build.hello("old", "old-2"))
    assert await trainer.ended() == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "the daemon holds as many live runs as it can",
    )
    with pytest.raises(grpc.aio.AioRpcError, match="as many live runs"):
        await small.operator.SetLearningRates(rates(qk=0.5), metadata=small.credentials)
    await live[0].leave()
    await small.shown("live-0", lambda detail: detail.run.phase != pb.RUN_PHASE_RUNNING)
    trainer = await small.train("old", "old-2")
    assert [number for number, _ in await revisions(small)] == [1, 2]
    for each in (*live[1:], trainer):
        each.call.cancel()


async def test_a_watch_goes_on_though_its_run_has_left_and_come_back(small, build):
    await revised(small, build)
    watch = small.operator.WatchRun(pb.WatchRunRequest(run="old"))
    assert (await watch.read()).detail.run.step == 3
    await leaves(small, build)
    trainer = await small.train("old", "old-1")
    await trainer.send(build.sample(4))
    while (await watch.read()).detail.run.step != 4:
        pass
    watch.cancel()
    trainer.call.cancel()


async def test_runs_that_left_are_listed_as_those_in_memory(small, build):
    await revised(small, build)
    trainer = await small.train("old", "old-1")  # its farewell has no loss
    await trainer.send(agent_pb2.Sample(sequence=4, step=3, closing=True))
    await trainer.acknowledged(4)
    await small.shown("old", lambda detail: detail.run.phase == pb.RUN_PHASE_CLOSED)
    await trainer.leave()
    (before,) = (await small.operator.ListRuns(pb.ListRunsRequest())).runs
    assert (before.lr_revision, before.mode, before.step, dict(before.multipliers)) == (
        2,
        "enforce",
        3,
        {"qk": 0.5, "vo": 0.5},
    )
    await leaves(small, build, "old")
    after = (await small.operator.ListRuns(pb.ListRunsRequest())).runs
    assert [run.run for run in after] == ["new-0", "new-1", "new-2", "old"]
    assert after[-1].last_sample_at_unix_ns == pytest.approx(before.last_sample_at_unix_ns, abs=2e9)
    after[-1].last_sample_at_unix_ns = before.last_sample_at_unix_ns
    assert after[-1] == before
    held = (await small.operator.ListRuns(pb.ListRunsRequest(held_only=True))).runs
    assert [run.run for run in held] == ["new-0", "new-1", "new-2"]


async def test_runs_are_listed_page_by_page_those_that_began_last_first(small):
    names = [f"run-{number}" for number in range(7)]
    for name in (*names, "other"):
        trainer = await small.train(name, f"{name}-1")
        await trainer.leave()
        await small.shown(name, lambda detail: detail.run.phase != pb.RUN_PHASE_RUNNING)
    request, pages = pb.ListRunsRequest(name_prefix="run-", page_size=3), []
    for _ in range(3):
        answer = await small.operator.ListRuns(request)
        pages.append([run.run for run in answer.runs])
        request.page_token = answer.next_page_token
    assert not request.page_token
    assert pages == [names[4:], names[1:4], names[:1]]
    with pytest.raises(grpc.aio.AioRpcError, match="page_token must be of a page, got 'x'"):
        await small.operator.ListRuns(pb.ListRunsRequest(page_token="x"))  # noqa: S106  no password
