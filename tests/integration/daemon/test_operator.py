"""The operators' side of a daemon, and the commands that come of it on the trainer's side."""

from __future__ import annotations

import math
import re
import sqlite3
import stat
from contextlib import closing, suppress
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from structlog.testing import capture_logs

from sharpwatch import wire
from sharpwatch.daemon.decisions import run_controller
from sharpwatch.errors import SharpwatchError
from sharpwatch.v1 import operator_pb2 as pb
from sharpwatch.v1 import types_pb2
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceStub

APPLIED = types_pb2.COMMAND_OUTCOME_APPLIED
HALVE = pb.SetLearningRatesRequest(run="run", multipliers={"qk": 0.5}, author="ann", reason="too sharp")


async def refused(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


async def outcomes(daemon, decision: str) -> list[str]:
    """What a watch of the decision tells, to its end."""
    call = daemon.operator.WatchDecision(pb.WatchDecisionRequest(id=decision))
    return [response.decision.outcome async for response in call]


async def test_a_change_needs_the_token_and_a_name(daemon):
    trainer = await daemon.train()
    rates, token = daemon.operator.SetLearningRates, daemon.credentials
    assert (await refused(rates(HALVE)))[0] is grpc.StatusCode.UNAUTHENTICATED
    wrong = (("authorization", "Bearer wrong"),)
    assert await refused(rates(HALVE, metadata=wrong)) == (
        grpc.StatusCode.UNAUTHENTICATED,
        "reading needs the operator's token, or one of role viewer: this token is not known",
    )
    nameless = pb.SetLearningRatesRequest(run="run", multipliers={"qk": 0.5}, author=" ")
    code, details = await refused(rates(nameless, metadata=token))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "author" in details
    for call in (
        daemon.operator.UndoLearningRates(pb.UndoLearningRatesRequest(run="run", author="eve")),
        daemon.operator.RequestRollback(pb.RequestRollbackRequest(run="run", author="eve")),
        daemon.operator.SetMode(pb.SetModeRequest(run="run", mode="enforce", author="eve")),
        daemon.operator.ApproveDecision(pb.ApproveDecisionRequest(id="d", author="eve")),
        daemon.operator.RejectDecision(pb.RejectDecisionRequest(id="d", author="eve")),
        daemon.operator.CancelDecision(pb.CancelDecisionRequest(id="d", author="eve")),
        daemon.operator.AcknowledgeIncident(pb.AcknowledgeIncidentRequest(incident_id="i", author="eve")),
    ):
        assert (await refused(call))[0] is grpc.StatusCode.UNAUTHENTICATED
    assert not (await daemon.operator.ListDecisions(pb.ListDecisionsRequest())).decisions
    assert (await daemon.operator.GetDaemon(pb.GetDaemonRequest(), metadata=token)).role == "operator"
    trainer.call.cancel()


async def test_who_was_refused_what_and_why_is_in_the_log_and_in_the_audit(daemon, build):
    trainer = await daemon.train()
    await trainer.send(build.sample(1))
    await trainer.acknowledged(1)
    token, ann = daemon.credentials, {"author": "ann", "reason": "too slow"}
    made = (await daemon.operator.SetLearningRates(HALVE, metadata=token)).decision
    high = pb.SetLearningRatesRequest(run="run", multipliers={"qk": 100.0}, **ann)
    with capture_logs() as logs:
        await refused(daemon.operator.SetLearningRates(high, metadata=token))
        await refused(
            daemon.operator.UndoLearningRates(pb.UndoLearningRatesRequest(run="other", **ann), metadata=token)
        )
        await refused(daemon.operator.RejectDecision(pb.RejectDecisionRequest(id=made.id, **ann), metadata=token))
        await refused(daemon.operator.SetMode(pb.SetModeRequest(run="run", mode="enforce", author="eve")))
        high.dry_run = True
        await refused(daemon.operator.SetLearningRates(high, metadata=token))
    logged = [
        {key: each[key] for key in ("action", "run", "author")} for each in logs if each["event"] == "request_refused"
    ]
    assert logged == [
        {"action": "lr set", "run": "run", "author": "ann"},
        {"action": "lr undo", "run": "other", "author": "ann"},
        {"action": "reject", "run": "run", "author": "ann"},
    ]
    # What somebody without a token says of themselves is worth nothing.
    (stranger,) = (each for each in logs if each["event"] == "call_refused")
    assert stranger["method"] == "/sharpwatch.v1.OperatorService/SetMode"
    assert stranger["reason"] == "no token was shown, in the header authorization: Bearer TOKEN"
    assert {each["log_level"] for each in logs if each["event"] == "request_refused"} == {"warning"}
    out_of_bounds = "multipliers qk 100: qk=100 is outside the run's lr_bounds; allowed: 0.1 to 10"

    async def audit(run: str) -> list[tuple[str, ...]]:
        found = (await daemon.operator.ListTransitions(pb.ListTransitionsRequest(run=run))).events
        return [(one.run, one.action, one.outcome, one.author, one.reason, one.id, one.detail) for one in found]

    who = ("refused", "ann", "too slow")
    only_run = [
        ("run", "lr set", *who, "", out_of_bounds),
        ("run", "reject", *who, made.id, f"decision {made.id} is sent: only a proposal can be rejected"),
    ]
    assert await audit("run") == only_run
    # Without a token nobody fills the journal, and a dry run changes nothing at all.
    assert await audit("") == [only_run[0], ("other", "lr undo", *who, "", "no run 'other'"), only_run[1]]
    trainer.call.cancel()


async def test_the_audit_has_what_operators_did_beside_decisions(daemon, build):
    """The mode, the kill switch too, silences that concern the run, what somebody has seen, and references."""
    trainer, other = await daemon.train("run", "a1"), await daemon.train("other", "a2")
    bad = build.tap()
    bad.non_finite.CopyFrom(wire.encode([1] * 5, "int64"))
    await trainer.send(build.sample(1, tap=bad))
    incident = (await daemon.shown("run", lambda detail: detail.alerts)).alerts[0]
    token, ann = {"metadata": daemon.credentials}, {"author": "ann", "reason": "why"}
    add = {"cause": "data", "duration_seconds": 60.0, **ann}
    await daemon.operator.SetMode(pb.SetModeRequest(run="run", mode="observe", **ann), **token)
    await daemon.operator.SetMode(pb.SetModeRequest(run="other", mode="advise", **ann), **token)
    everywhere = (await daemon.operator.AddSilence(pb.AddSilenceRequest(**add), **token)).silence
    elsewhere = (await daemon.operator.AddSilence(pb.AddSilenceRequest(run="other", **add), **token)).silence
    await daemon.operator.ExpireSilence(pb.ExpireSilenceRequest(id=everywhere.id, author="bob", reason="day"), **token)
    await daemon.operator.AcknowledgeIncident(
        pb.AcknowledgeIncidentRequest(incident_id=incident.id, author="bob", reason="bad shard"), **token
    )
    await daemon.operator.SetReference(pb.SetReferenceRequest(run="run", reference="other", **ann), **token)
    await daemon.operator.SetReference(pb.SetReferenceRequest(run="run", **ann), **token)

    async def audit(run: str) -> list[tuple[str, ...]]:
        found = (await daemon.operator.ListTransitions(pb.ListTransitionsRequest(run=run))).events
        assert [one.at_unix_ns for one in found] == sorted(one.at_unix_ns for one in found)
        return [(one.run, one.action, one.outcome, one.author, one.reason, one.id, one.detail) for one in found]

    until = everywhere.ends_at_unix_ns // 10**9
    until = f", until {datetime.fromtimestamp(until, UTC):%Y-%m-%dT%H:%M:%SZ}"
    who = ("ann", "why")
    assert await audit("run") == [
        ("run", "mode", "observe", *who, "", ""),
        ("", "silence", "added", *who, everywhere.id, f"cause data{until}"),
        ("", "silence", "ended", "bob", "day", everywhere.id, "cause data"),
        ("run", "ack", "acknowledged", "bob", "bad shard", incident.id, "NonFinite"),
        ("run", "reference", "set", *who, "", "other"),
        ("run", "reference", "cleared", *who, "", ""),
    ]
    of_other = [one for one in await audit("other") if one[0]]
    assert [one[:2] + one[5:6] for one in of_other] == [("other", "mode", ""), ("other", "silence", elsewhere.id)]
    assert len(await audit("")) == 8
    for each in (trainer, other):
        each.call.cancel()


async def test_who_set_the_mode_is_known_and_survives_a_restart(running):
    async with running() as daemon:
        trainer = await daemon.train()
        before = (await daemon.shown("run", lambda detail: detail.run.run)).run
        assert (before.mode, before.HasField("mode_set")) == ("observe", False)
        change = pb.SetModeRequest(run="run", mode="advise", author="ann", reason="on call")
        answer = (await daemon.operator.SetMode(change, metadata=daemon.credentials)).run
        trainer.call.cancel()
    async with running() as daemon:
        after = (await daemon.operator.GetRun(pb.GetRunRequest(run="run"))).detail.run
    assert (after.mode, after.mode_set.author, after.mode_set.reason) == ("advise", "ann", "on call")
    assert after.mode_set == answer.mode_set
    assert after.mode_set.set_at_unix_ns > 0


async def test_what_is_not_there_is_not_found(daemon):
    trainer = await daemon.train()
    token = daemon.credentials
    missing = [
        daemon.operator.GetRun(pb.GetRunRequest(run="none")),
        daemon.operator.GetHistory(pb.GetHistoryRequest(run="none")),
        daemon.operator.ListRevisions(pb.ListRevisionsRequest(run="none")),
        daemon.operator.ListDecisions(pb.ListDecisionsRequest(run="none")),
        daemon.operator.ListTransitions(pb.ListTransitionsRequest(run="none")),
        daemon.operator.ApproveDecision(pb.ApproveDecisionRequest(id="none", author="ann"), metadata=token),
        daemon.operator.SetMode(pb.SetModeRequest(run="none", mode="advise", author="ann"), metadata=token),
        daemon.operator.AcknowledgeIncident(
            pb.AcknowledgeIncidentRequest(incident_id="none", author="ann"), metadata=token
        ),
    ]
    for call in missing:
        assert (await refused(call))[0] is grpc.StatusCode.NOT_FOUND
    unknown = pb.SetLearningRatesRequest(run="run", multipliers={"attention": 0.5}, author="ann")
    code, details = await refused(daemon.operator.SetLearningRates(unknown, metadata=token))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "attention" in details
    code, details = await refused(
        daemon.operator.SetMode(pb.SetModeRequest(run="run", mode="yolo", author="ann"), metadata=token)
    )
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "observe, advise, enforce" in details
    trainer.call.cancel()


async def test_a_learning_rate_goes_out_comes_back_and_is_kept(daemon, build, tmp_path):
    trainer = await daemon.train()
    await trainer.send(build.sample(1))
    await trainer.acknowledged(1)
    made = (await daemon.operator.SetLearningRates(HALVE, metadata=daemon.credentials)).decision
    assert (made.outcome, made.author, made.reason) == ("sent", "ann", "too sharp")
    command = await trainer.next("command")
    assert command.id == made.id
    assert command.set_multipliers.multipliers["qk"] == 0.5
    assert (command.author, command.reason) == ("ann", "too sharp")
    assert (await daemon.operator.ListRevisions(pb.ListRevisionsRequest(run="run"))).revisions[0].author == "ann"

    result = types_pb2.CommandResult(command_id=made.id, outcome=APPLIED, step=2)
    await trainer.send(build.sample(2, results=[result]))
    assert (await outcomes(daemon, made.id))[-1] == "applied"
    (revision,) = (await daemon.operator.ListRevisions(pb.ListRevisionsRequest(run="run"))).revisions
    assert revision.applied_step == 2
    (kept,) = (await daemon.operator.ListDecisions(pb.ListDecisionsRequest(run="run"))).decisions
    assert (kept.outcome, kept.applied_step) == ("applied", 2)
    assert await daemon.metric("sharpwatch_lr_revision{") == 1
    trainer.call.cancel()
    await daemon.stop()  # which writes what is left
    with closing(sqlite3.connect(tmp_path / "journal.db")) as journal:
        rows = journal.execute("SELECT run, decision, outcome, author, reason FROM transitions ORDER BY id").fetchall()
        times = journal.execute("SELECT at FROM transitions ORDER BY id").fetchall()
    assert rows == [("run", made.id, outcome, "ann", "too sharp") for outcome in ("sent", "applied")]
    assert made.made_at_unix_ns / 1e9 <= times[0][0] <= times[1][0]


async def test_a_command_that_was_not_answered_is_sent_again_and_an_answered_one_not(daemon, build):
    trainer = await daemon.train()
    await trainer.send(build.sample(1))
    await trainer.acknowledged(1)
    made = (await daemon.operator.SetLearningRates(HALVE, metadata=daemon.credentials)).decision
    await trainer.next("command")
    trainer.call.cancel()
    again = await daemon.train()
    assert (await again.next("command")).id == made.id
    result = types_pb2.CommandResult(command_id=made.id, outcome=APPLIED, step=2)
    await again.send(build.sample(2, results=[result]))
    await again.acknowledged(2)
    await outcomes(daemon, made.id)
    again.call.cancel()
    third = await daemon.train()
    await third.send(build.sample(3))
    await third.acknowledged(3)
    assert "command" not in third.received
    third.call.cancel()


async def test_a_new_attempt_is_given_the_multipliers_in_force(daemon, build):
    trainer = await daemon.train(attempt="a1")
    await trainer.send(build.sample(1))
    await trainer.acknowledged(1)
    made = (await daemon.operator.SetLearningRates(HALVE, metadata=daemon.credentials)).decision
    await trainer.send(build.sample(2, results=[types_pb2.CommandResult(command_id=made.id, outcome=APPLIED, step=2)]))
    await outcomes(daemon, made.id)
    await trainer.leave()
    resumed = await daemon.train(attempt="a2", initial_step=2)
    await resumed.send(build.sample(1, step=3))  # its multipliers stand at 1
    command = await resumed.next("command")
    assert command.set_multipliers.multipliers["qk"] == 0.5
    assert command.author == "sharpwatch"
    resumed.call.cancel()


async def test_a_rollback_lets_the_steps_go_back(daemon, build):
    trainer = await daemon.train()
    saved = [types_pb2.Checkpoint(step=step, uri=f"file:///c{step}") for step in (5, 10)]
    await trainer.send(build.sample(1, step=10, checkpoints=saved))
    await trainer.acknowledged(1)
    request = pb.RequestRollbackRequest(
        run="run", to_step=9, skip_from_step=6, skip_to_step=9, author="ann", reason="spike"
    )
    made = (await daemon.operator.RequestRollback(request, metadata=daemon.credentials)).decision
    command = await trainer.next("command")
    assert command.rollback.checkpoint.uri == "file:///c5"
    assert (command.rollback.skip_from_step, command.rollback.skip_to_step) == (6, 9)
    result = types_pb2.CommandResult(command_id=made.id, outcome=APPLIED, step=6)
    await trainer.send(build.sample(2, step=11))
    await trainer.send(build.sample(3, step=6, restored=True, results=[result]))
    await trainer.acknowledged(3)
    assert "refusal" not in trainer.received
    detail = await daemon.shown("run", lambda detail: detail.run.step == 6)
    assert [checkpoint.uri for checkpoint in detail.checkpoints] == ["file:///c5"]  # the later one was left behind
    trainer.call.cancel()


async def test_a_mode_is_set_and_shown(daemon):
    trainer = await daemon.train()
    request = pb.SetModeRequest(run="run", mode="enforce", author="ann")
    assert (await daemon.operator.SetMode(request, metadata=daemon.credentials)).run.mode == "enforce"
    (run,) = (await daemon.operator.ListRuns(pb.ListRunsRequest())).runs
    assert (run.mode, run.control, run.attempts) == ("enforce", "rollback", 1)
    trainer.call.cancel()


PROPOSES = "policies: [{name: cut, match: {alert: NonFinite}, mode: advise, action: {kind: scale_lr, factor: 0.5}}]"


async def proposal(daemon, build, run: str) -> str:
    """The id of what the policy proposes for a run whose gradients are not finite."""
    trainer = await daemon.train(run, f"{run}-1")
    tap = build.tap()
    tap.non_finite.CopyFrom(wire.encode([1] * 5, "int64"))
    await trainer.send(build.sample(1, tap=tap))
    await trainer.acknowledged(1)
    await daemon.shown(run, lambda detail: detail.run.active_alerts)
    (made,) = (await daemon.operator.ListDecisions(pb.ListDecisionsRequest(run=run))).decisions
    assert made.outcome == "proposed"
    return made.id


async def test_a_decision_is_answered_by_its_whole_id(running, build, monkeypatch):
    numbers = count(1)
    monkeypatch.setattr(run_controller, "uuid4", lambda: SimpleNamespace(hex=f"{next(numbers):04x}{'f' * 28}"))
    async with running(policies=PROPOSES) as daemon:
        token = daemon.credentials
        first, second = await proposal(daemon, build, "one"), await proposal(daemon, build, "two")
        approve, reject = daemon.operator.ApproveDecision, daemon.operator.RejectDecision
        for given, meant in (("", f"{first}, {second}"), ("00", f"{first}, {second}"), (first[:-1], first)):
            code, details = await refused(approve(pb.ApproveDecisionRequest(id=given, author="ann"), metadata=token))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert details.endswith(f"got {given!r}; say which one is meant: {meant}")
        code, _ = await refused(reject(pb.RejectDecisionRequest(id="fff", author="ann"), metadata=token))
        assert code is grpc.StatusCode.NOT_FOUND
        done = await approve(pb.ApproveDecisionRequest(id=first, author="ann"), metadata=token)
        assert (done.decision.id, done.decision.run, done.decision.author) == (first, "one", "ann")
        done = await reject(pb.RejectDecisionRequest(id=second, author="ann"), metadata=token)
        assert (done.decision.id, done.decision.outcome) == (second, "rejected")
        # To read, a beginning that no other has is enough.
        assert await outcomes(daemon, second[:4]) == ["rejected"]


async def transitions(daemon, **request) -> list[tuple[str, ...]]:
    found = await daemon.operator.ListTransitions(pb.ListTransitionsRequest(**request))
    times = [one.at_unix_ns for one in found.transitions]
    assert times == sorted(times)
    assert {one.decision_id for one in found.transitions} == {made.id for made in found.decisions}
    return [(one.decision_id, one.outcome, one.author, one.reason) for one in found.transitions]


async def every_page(call, request) -> list:
    """All pages; none is larger than the 4 MB that a client takes by itself."""
    found = [await call(request)]
    while found[-1].next_page_token:
        request.page_token = found[-1].next_page_token
        found.append(await call(request))
    return found


async def test_what_is_too_long_for_one_answer_comes_page_by_page(daemon, build):
    trainer = await daemon.train()
    await trainer.send(build.sample(1))
    await trainer.acknowledged(1)
    await trainer.leave()
    long, operator = {"author": "ä" * 2_000, "reason": "€" * 2_000}, {"metadata": daemon.credentials}
    made = []
    for turn in range(450):
        rates = pb.SetLearningRatesRequest(run="run", multipliers={"qk": 0.5 + turn / 1_000}, **long)
        made.append((await daemon.operator.SetLearningRates(rates, **operator)).decision.id)
    for _ in range(300):
        await daemon.operator.SetMode(pb.SetModeRequest(run="run", mode="advise", **long), **operator)
    first = await daemon.operator.ListDecisions(pb.ListDecisionsRequest(run="run", limit=10_000))
    rates = pb.SetLearningRatesRequest(run="run", multipliers={"qk": 1.0}, author=long["author"])
    later = (await daemon.operator.SetLearningRates(rates, **operator)).decision.id
    rest = pb.ListDecisionsRequest(run="run", limit=10_000, page_token=first.next_page_token)
    listed = [first, *await every_page(daemon.operator.ListDecisions, rest)]
    assert len(listed) == 2
    assert [one.id for page in listed for one in page.decisions] == made[::-1]
    made.append(later)
    revisions = await every_page(daemon.operator.ListRevisions, pb.ListRevisionsRequest(run="run"))
    assert len(revisions) == 2
    assert [one.revision for page in revisions for one in page.revisions] == [*range(1, 452)]
    audit = await every_page(daemon.operator.ListTransitions, pb.ListTransitionsRequest(run="run"))
    assert len(audit) > 3
    assert [one.id for page in audit for one in page.decisions] == made[::-1]
    assert sorted(one.decision_id for page in audit for one in page.transitions) == sorted(made)
    for page in audit:
        assert {one.decision_id for one in page.transitions} == {one.id for one in page.decisions}
    assert [one.action for page in audit for one in page.events].count("mode") == 300
    for token in ("x", "-1", "1@", "1" * 19):
        wrong = pb.ListDecisionsRequest(page_token=token)
        code, details = await refused(daemon.operator.ListDecisions(wrong))
        assert (code, details) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            f"page_token must be of a page, got {token!r}",
        )


async def test_every_transition_of_a_decision_is_kept_with_its_author_and_reason(running, build):
    async with running(policies=PROPOSES) as daemon:
        token, who = daemon.credentials, {"author": "ann", "reason": "agreed"}
        first, second = await proposal(daemon, build, "one"), await proposal(daemon, build, "two")
        await daemon.operator.ApproveDecision(pb.ApproveDecisionRequest(id=first, **who), metadata=token)
        await daemon.operator.RejectDecision(pb.RejectDecisionRequest(id=second, author="bob"), metadata=token)
        await transitions(daemon)
        one = [(first, "proposed", "", ""), (first, "approved", "ann", "agreed")]
        two = [(second, "proposed", "", ""), (second, "rejected", "bob", "")]
        assert await transitions(daemon, run="one") == one
        assert await transitions(daemon, run="two") == two
        assert sorted(await transitions(daemon)) == sorted(one + two)
        assert await transitions(daemon, limit=1) == two  # of the newest decision
    async with running(policies=PROPOSES) as daemon:
        assert await transitions(daemon, run="one") == one
        assert await transitions(daemon, run="two") == two


async def test_a_sent_command_is_cancelled_by_the_trainer_also_after_a_restart(running, build):
    who = {"author": "bob", "reason": "the wrong step"}
    async with running() as daemon:
        token = daemon.credentials
        trainer = await daemon.train()
        await trainer.send(build.sample(1))
        await trainer.acknowledged(1)
        planned = pb.SetLearningRatesRequest(run="run", multipliers={"qk": 0.5}, apply_at_step=90, author="ann")
        answer = await daemon.operator.SetLearningRates(planned, metadata=token)
        made = answer.decision.id
        assert (answer.decision.outcome, answer.decision.revision) == ("planned", 0)
        await trainer.send(build.sample(40))  # 50 steps before
        assert (await trainer.next("command")).id == made
        beginning = pb.CancelDecisionRequest(id=made[:5], **who)
        code, details = await refused(daemon.operator.CancelDecision(beginning, metadata=token))
        assert (code, details) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            f"a decision that is changed must be named in full, got {made[:5]!r}; say which one is meant: {made}",
        )
        answer = await daemon.operator.CancelDecision(pb.CancelDecisionRequest(id=made, **who), metadata=token)
        # Until the trainer has answered.
        assert (answer.decision.outcome, answer.decision.cancelled_by) == ("sent", "bob")
        command = await trainer.next("command")
        assert (command.cancel, command.author, command.reason) == (made, "bob", "the wrong step")
        request = pb.CancelDecisionRequest(id=made, author="cleo")
        code, details = await refused(daemon.operator.CancelDecision(request, metadata=token))
        assert (code, details) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            f"bob has asked to cancel decision {made} already",
        )
    async with running() as daemon:
        trainer = await daemon.train()
        assert (await trainer.next("command")).cancel == made  # and not the command itself
        result = types_pb2.CommandResult(command_id=made, outcome="COMMAND_OUTCOME_CANCELLED", step=41)
        await trainer.send(build.sample(41, results=[result]))
        await trainer.acknowledged(41)
        call = daemon.operator.WatchDecision(pb.WatchDecisionRequest(id=made))
        seen = [response.decision.outcome async for response in call]
        assert seen[-1] == "cancelled"
        assert (await transitions(daemon))[-1] == (made, "cancelled", "bob", "the wrong step")
        assert [one[1] for one in await transitions(daemon)] == ["planned", "sent", "sent", "cancelled"]
        (revision,) = (await daemon.operator.ListRevisions(pb.ListRevisionsRequest(run="run"))).revisions
        assert (revision.outcome, revision.HasField("applied_step")) == ("cancelled", False)


async def test_an_incident_that_was_acknowledged_is_shown_so_also_after_a_restart(running, build):
    async with running(policies=PROPOSES) as daemon:
        await proposal(daemon, build, "run")
        (alert,) = (await daemon.operator.GetRun(pb.GetRunRequest(run="run"))).detail.alerts
        assert (alert.name, list(alert.names), alert.cause) == ("NonFinite", ["NonFinite"], "non-finite")
        assert (alert.onset, alert.first_step, alert.active, alert.closed, alert.acknowledged) == (1, 1, True, "", "")
        assert sorted(alert.layer_blocks) == sorted(
            ["emb", *(f"layers.0.{block}" for block in alert.blocks if block != "emb")]
        )
        acknowledge, token = daemon.operator.AcknowledgeIncident, daemon.credentials
        seen = {"author": "ann", "reason": "a bad shard"}
        code, details = await refused(
            acknowledge(pb.AcknowledgeIncidentRequest(incident_id=alert.id[:-1], **seen), metadata=token)
        )
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details.endswith(f"say which one is meant: {alert.id}")
        done = await acknowledge(pb.AcknowledgeIncidentRequest(incident_id=alert.id, **seen), metadata=token)
        assert (done.incident.id, done.incident.acknowledged) == (alert.id, "ann: a bad shard")
        detail = await daemon.shown("run", lambda detail: detail.alerts[0].acknowledged)
        assert detail.alerts[0] == done.incident
    async with running(policies=PROPOSES) as daemon:
        (kept,) = (await daemon.operator.GetRun(pb.GetRunRequest(run="run"))).detail.alerts
        assert kept == done.incident


async def not_finite(daemon, build, run: str) -> pb.Decision:
    """The newest decision on a new run whose gradients are not finite."""
    trainer = await daemon.train(run, f"{run}-1")
    tap = build.tap()
    tap.non_finite.CopyFrom(wire.encode([1] * 5, "int64"))
    await trainer.send(build.sample(1, tap=tap))
    await daemon.shown(run, lambda detail: detail.run.active_alerts)
    return (await daemon.operator.ListDecisions(pb.ListDecisionsRequest(run=run))).decisions[0]


async def test_a_silence_holds_for_runs_that_begin_later_and_over_a_restart_until_it_is_expired(running, build):
    async with running(policies=PROPOSES) as daemon:
        request = pb.AddSilenceRequest(
            cause="non-finite", policy="cut", duration_seconds=600, author="ann", reason="moving data"
        )
        added = (await daemon.operator.AddSilence(request, metadata=daemon.credentials)).silence
        assert (added.active, added.ends_at_unix_ns - added.made_at_unix_ns) == (True, 600 * 10**9)
        made = await not_finite(daemon, build, "one")
        assert made.outcome == "refused"
        assert re.fullmatch(rf"silence: {added.id} by ann until 20[0-9T:-]+Z: moving data", made.guard)
    async with running(policies=PROPOSES) as daemon:
        assert list((await daemon.operator.ListSilences(pb.ListSilencesRequest())).silences) == [added]
        assert (await not_finite(daemon, build, "two")).outcome == "refused"
        expire, token = daemon.operator.ExpireSilence, daemon.credentials
        for given, expected in ((added.id[:-1], f"say which one is meant: {added.id}"), ("zz", "no silence 'zz'")):
            _, details = await refused(expire(pb.ExpireSilenceRequest(id=given, author="bob"), metadata=token))
            assert details.endswith(expected)
        request = pb.ExpireSilenceRequest(id=added.id, author="bob", reason="moved")
        expired = (await expire(request, metadata=token)).silence
        assert (expired.active, expired.expired_by, expired.expired_reason) == (False, "bob", "moved")
        assert added.made_at_unix_ns < expired.expired_at_unix_ns < expired.ends_at_unix_ns
        code, details = await refused(expire(request, metadata=token))
        assert (code, "has ended already" in details) == (grpc.StatusCode.FAILED_PRECONDITION, True)
        assert (await not_finite(daemon, build, "three")).outcome == "proposed"
    async with running(policies=PROPOSES) as daemon:
        assert not (await daemon.operator.ListSilences(pb.ListSilencesRequest())).silences
        ended = (await daemon.operator.ListSilences(pb.ListSilencesRequest(include_ended=True))).silences
        assert list(ended) == [expired]
        assert (await not_finite(daemon, build, "four")).outcome == "proposed"


@pytest.mark.parametrize(("window", "outcome"), [("", "sent"), ("{from: 00:00, to: 24:00}", "proposed")])
async def test_a_maintenance_window_of_the_configuration_holds_policies_to_proposals(running, build, window, outcome):
    policies = f"{PROPOSES.replace('advise', 'enforce')}\nmaintenance: [{window}]"
    async with running(policies=policies) as daemon:
        assert (await not_finite(daemon, build, "run")).outcome == outcome


async def test_a_silence_that_would_match_nothing_or_everything_is_refused(running):
    async with running(policies=PROPOSES) as daemon:
        await daemon.train("prod-2", "a1")
        good = {"cause": "data", "duration_seconds": 60, "author": "ann", "reason": "why"}
        for wrong, expected in (
            ({"cause": ""}, "must name a run, an alert, a cause or a policy"),
            ({"cause": "dta"}, "no cause 'dta'; allowed: data, learning-rate, "),
            ({"alert": "LosSpike"}, "did you mean 'LossSpike'?"),
            ({"policy": "cutt"}, "no policy 'cutt'; allowed: cut; did you mean 'cut'?"),
            ({"run": "prod"}, "say which one is meant: prod-2"),
            ({"run": "llama"}, "no run 'llama'"),
            ({"reason": " "}, "must have a comment"),
            ({"author": " "}, "author must name who asks for the change"),
            ({"duration_seconds": 0.5}, "must last 1 s to 30 days, got 0.5 s"),
            ({"duration_seconds": math.nan}, "must last 1 s to 30 days, got nan s"),
            ({"duration_seconds": 31 * 86400}, "must last 1 s to 30 days, got"),
        ):
            request = pb.AddSilenceRequest(**good | wrong)
            _, details = await refused(daemon.operator.AddSilence(request, metadata=daemon.credentials))
            assert expected in details
        request = pb.AddSilenceRequest(**good)
        code, _ = await refused(daemon.operator.AddSilence(request))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert not (await daemon.operator.ListSilences(pb.ListSilencesRequest(include_ended=True))).silences


async def test_a_change_of_a_run_takes_its_whole_name(daemon):
    for run in ("prod", "prod-2"):
        await daemon.train(run, f"{run}-1")
    token, who = daemon.credentials, {"author": "ann", "reason": "why"}
    for given, meant in (("", "prod, prod-2"), ("pro", "prod, prod-2"), ("prod-", "prod-2")):
        for call in (
            daemon.operator.SetLearningRates(
                pb.SetLearningRatesRequest(run=given, multipliers={"qk": 0.5}, **who), metadata=token
            ),
            daemon.operator.UndoLearningRates(pb.UndoLearningRatesRequest(run=given, **who), metadata=token),
            daemon.operator.RequestRollback(pb.RequestRollbackRequest(run=given, **who), metadata=token),
            daemon.operator.SetMode(pb.SetModeRequest(run=given, mode="enforce", **who), metadata=token),
        ):
            code, details = await refused(call)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert details == (
                f"a run that is changed must be named in full, got {given!r}; say which one is meant: {meant}"
            )
    assert not (await daemon.operator.ListDecisions(pb.ListDecisionsRequest())).decisions


async def test_a_unix_socket_is_the_operators_alone_and_needs_no_token(running, build, tmp_path):
    path = tmp_path / "daemon.sock"
    async with running(grpc=f"unix:{path}") as daemon:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        trainer = await daemon.train()
        await trainer.send(build.sample(1))
        await trainer.acknowledged(1)
        made = (await daemon.operator.SetLearningRates(HALVE)).decision
        assert (await trainer.next("command")).id == made.id
        trainer.call.cancel()


def shared_token(path: Path) -> None:
    path.write_text("secret\n")
    path.chmod(0o644)


async def test_a_daemon_that_all_could_command_does_not_start(running, tmp_path):
    with pytest.raises(SharpwatchError, match=r"grpc 0\.0\.0\.0:0: no credentials are configured"):
        async with running(grpc="0.0.0.0:0"):
            pass
    shared_token(tmp_path / "operator.token")
    with pytest.raises(SharpwatchError, match=r"operator\.token has mode 0644: others can read it"):
        async with running():
            pass


async def test_two_daemons_do_not_share_a_port_or_a_journal(running, daemon, tmp_path):
    with pytest.raises(SharpwatchError, match="another daemon is using it"):
        async with running():
            pass
    with pytest.raises(SharpwatchError, match=r"grpc 127\.0\.0\.1:\d+: cannot listen there"):
        async with running(grpc=daemon.grpc, store=f"sqlite:///{tmp_path}/second.db"):
            pass
    with pytest.raises(SharpwatchError, match=r"http 127\.0\.0\.1:\d+: .*in use"):
        async with running(http=daemon.http, store=f"sqlite:///{tmp_path}/third.db"):
            pass


async def test_a_stopping_daemon_sends_everyone_away(running, build):
    async with running() as daemon:
        trainer = await daemon.train()
        await trainer.send(build.sample(1))
        watch = daemon.operator.WatchRun(pb.WatchRunRequest(run="run"))
        await watch.read()
        stub = OperatorServiceStub(daemon.channel)
        assert (await stub.GetDaemon(pb.GetDaemonRequest(), metadata=daemon.credentials)).store_writable
        trainer_end, daemon_end = trainer.next("drain"), daemon.stop()
        await daemon_end
        assert (await trainer_end).retry_after_seconds > 0
        assert trainer.received["ack"][-1].sequence == 1
        assert (await trainer.ended())[0] is grpc.StatusCode.OK
        with suppress(grpc.aio.AioRpcError):
            while await watch.read() is not grpc.aio.EOF:
                pass
        assert (await watch.code(), await watch.details()) == (grpc.StatusCode.UNAVAILABLE, "the daemon is stopping")
