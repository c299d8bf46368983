"""Alerts of other systems come in over HTTP: who may send them, what is taken, what is answered, and what it does."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import grpc
import pytest

from sharpwatch import wire
from sharpwatch.daemon.api import foreign_alerts
from sharpwatch.v1 import operator_pb2 as pb
from sharpwatch.v1 import types_pb2

POLICIES = """
policies:
  - name: cool
    match: {foreign: NodeHot}
    mode: enforce
    action: {kind: scale_lr, factor: 0.5}
  - name: cut
    match: {alert: NonFinite}
    mode: enforce
    action: {kind: scale_lr, blocks: all, factor: 0.25}
    guard: {blocked_by: [NodeDown], cooldown_steps: 0, recover_within_steps: 1}
"""


def alert(name: str = "NodeHot", fingerprint: str = "f1", **changes) -> dict:
    """As Alertmanager sends it."""
    usual = {
        "status": "firing",
        "labels": {"alertname": name, "run": "run", "training_job": "job"},
        "annotations": {"summary": "node 7 is \x1b[31mhot"},
        "startsAt": "2026-11-30T10:00:00.123Z",
        "endsAt": "0001-01-01T00:00:00Z",
        "generatorURL": "http://prometheus/graph",
        "fingerprint": fingerprint,
    }
    return usual | changes


def message(*alerts: dict, **changes) -> dict:
    usual = {
        "version": "4",
        "groupKey": '{}:{run="run"}',
        "truncatedAlerts": 0,
        "status": "firing",
        "receiver": "sharpwatch",
        "groupLabels": {},
        "commonLabels": {},
        "commonAnnotations": {},
        "externalURL": "http://alertmanager",
        "alerts": list(alerts),
    }
    return usual | changes


# https://grafana.com/docs/grafana/latest/alerting/configure-notifications/manage-contact-points/integrations/webhook-notifier/
GRAFANA = message(
    alert(
        startsAt="2026-11-30T11:00:00.123456789+01:00",
        silenceURL="http://grafana/silence",
        dashboardURL="",
        panelURL="",
        values={"B": 44.2},
    ),
    version="1",
    orgId=1,
    title="[FIRING:1]",
    state="alerting",
    message="text",
)


@pytest.fixture
def send():
    """Post a message to a daemon; returns the status and the answer."""

    async def post(daemon, body: dict | bytes, authorization: str | None = None) -> tuple[int, dict]:
        given = f"Bearer {daemon.token}" if authorization is None else authorization
        headers = {"Authorization": given, "Content-Type": "application/json"} if given else {}
        data = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
        async with daemon.web.post(f"http://{daemon.http}/api/v1/alerts", data=data, headers=headers) as response:
            return response.status, await response.json()

    return post


async def applied(trainer, build, sequence: int) -> types_pb2.Command:
    """Take the next command, and apply it at the next step."""
    command = await trainer.next("command")
    result = types_pb2.CommandResult(command_id=command.id, outcome=types_pb2.COMMAND_OUTCOME_APPLIED, step=sequence)
    await trainer.send(build.sample(sequence, results=[result]))
    return command


async def decisions(daemon) -> list[pb.Decision]:
    return list((await daemon.operator.ListDecisions(pb.ListDecisionsRequest(run="run"))).decisions)[::-1]


@pytest.mark.parametrize("body", [message(alert()), GRAFANA], ids=["alertmanager", "grafana"])
async def test_an_alert_becomes_an_incident_and_a_command(running, build, send, body):
    async with running(policies=POLICIES) as daemon:
        trainer = await daemon.train()
        await trainer.send(build.sample(1))
        await trainer.acknowledged(1)
        status, answer = await send(daemon, body)
        (told,) = answer["alerts"]
        assert (status, told["result"], told["run"], answer["truncated"]) == (200, "begun", "run", 0)
        await trainer.send(build.sample(2))
        command = await applied(trainer, build, 3)
        assert set(command.set_multipliers.multipliers.values()) == {0.5}
        detail = await daemon.shown("run", lambda detail: detail.run.lr_revision)
        (incident,) = detail.alerts
        assert (incident.id, incident.name, incident.cause, incident.active) == (
            told["detail"],
            "NodeHot",
            "foreign",
            True,
        )
        assert incident.evidence == "fires since 2026-11-30T10:00:00Z (fingerprint f1): node 7 is  [31mhot"
        (made,) = await decisions(daemon)
        assert (made.policy, made.alert_id, made.alert_name) == ("cool", incident.id, "NodeHot")
        audit = await daemon.operator.ListTransitions(pb.ListTransitionsRequest(run="run"))
        assert audit.transitions[0].detail.startswith("NodeHot since step 1: ")


async def test_an_end_that_was_lost_is_told_as_the_documentation_says(running, send):
    page = (Path(__file__).parents[3] / "docs/operating/foreign-alerts.md").read_text(encoding="utf-8")
    end = re.search(r"--data '(.*?)'", page, re.DOTALL)[1]
    async with running(policies=POLICIES) as daemon:
        await daemon.train()
        status, _ = await send(daemon, message(alert(startsAt="2026-07-01T10:00:00Z")))
        assert status == 200
        evidence = (await daemon.shown("run", lambda detail: detail.alerts)).alerts[0].evidence
        fingerprint = re.search(r"\(fingerprint (.*?)\)", evidence)[1]
        body = end.replace("gpt2-a1", "run").replace("FINGERPRINT", fingerprint)
        status, answer = await send(daemon, body.encode())
        assert (status, answer["alerts"][0]["result"]) == (200, "ended")


async def test_it_survives_a_restart_is_told_once_and_ends(running, build, send):
    async with running(policies=POLICIES) as daemon:
        trainer = await daemon.train()
        await trainer.send(build.sample(1))
        await trainer.acknowledged(1)
        await send(daemon, message(alert()))
        await trainer.send(build.sample(2))
        await applied(trainer, build, 3)
        await trainer.acknowledged(3)
    async with running(policies=POLICIES) as daemon:
        trainer = await daemon.train()
        _, answer = await send(daemon, message(alert(), alert()))
        assert [told["result"] for told in answer["alerts"]] == ["unchanged", "unchanged"]
        assert await daemon.metric('sharpwatch_foreign_alert{alert="NodeHot"') == 1
        await trainer.send(build.sample(4))
        await trainer.acknowledged(4)
        _, answer = await send(daemon, message(alert(status="resolved", endsAt="2026-11-30T11:00:00Z")))
        assert [told["result"] for told in answer["alerts"]] == ["ended"]
        detail = await daemon.shown("run", lambda detail: not detail.alerts[0].active)
        assert detail.alerts[0].closed == "resolved"
        assert await daemon.metric('sharpwatch_foreign_alert{alert="NodeHot"') == 0
        assert [made.policy for made in await decisions(daemon) if made.policy] == ["cool"]  # once


async def test_it_is_no_incident_to_prometheus(running, build, send):
    """Else a rule that goes by incidents would keep itself firing."""
    async with running(policies=POLICIES.replace("NodeHot", "SharpwatchIncidentCritical")) as daemon:
        trainer = await daemon.train()
        await trainer.send(build.sample(1))
        await trainer.acknowledged(1)
        labels = {"alertname": "SharpwatchIncidentCritical", "run": "run", "severity": "critical"}
        await send(daemon, message(alert(labels=labels)))
        _, text = await daemon.get("/metrics")
        assert re.search(r'^sharpwatch_foreign_alert\{alert="SharpwatchIncidentCritical",.*\} 1', text, re.MULTILINE)
        assert not re.search(r"^sharpwatch_(incident|alert_active)\{", text, re.MULTILINE)
        assert await daemon.metric("sharpwatch_critical_incidents_total{") == 0


async def test_a_policy_is_blocked_while_it_fires(running, build, send):
    async with running(policies=POLICIES) as daemon:
        trainer = await daemon.train()
        broken = build.tap()
        broken.non_finite.CopyFrom(wire.encode([0, 3, 0, 0, 0], "int64"))
        await trainer.send(build.sample(1))
        await trainer.acknowledged(1)
        await send(daemon, message(alert("NodeDown")))
        await trainer.send(build.sample(2, tap=broken))
        await trainer.acknowledged(2)
        (refused,) = await decisions(daemon)
        assert (refused.outcome, refused.policy) == ("refused", "cut")
        assert refused.guard.startswith("blocked_by: NodeDown fires since step 1 (incident ")
        await send(daemon, message(alert("NodeDown", status="resolved", endsAt="2026-11-30T11:00:00Z")))
        await trainer.send(build.sample(3, tap=broken))
        command = await trainer.next("command")
        assert set(command.set_multipliers.multipliers.values()) == {0.25}


async def test_a_silence_of_its_name_keeps_policies_from_it(running, build, send):
    async with running(policies=POLICIES) as daemon:
        trainer = await daemon.train()
        silence = {"author": "ann", "reason": "the fan is being changed", "duration_seconds": 3600}
        add = daemon.operator.AddSilence
        with pytest.raises(grpc.aio.AioRpcError, match=r"no alert 'NodeHit'.*NodeHot"):
            await add(pb.AddSilenceRequest(alert="NodeHit", **silence), metadata=daemon.credentials)
        await add(pb.AddSilenceRequest(alert="NodeHot", **silence), metadata=daemon.credentials)
        await send(daemon, message(alert()))
        await trainer.send(build.sample(1))
        await trainer.acknowledged(1)
        (made,) = await decisions(daemon)
        assert (made.policy, made.outcome) == ("cool", "refused")
        assert made.guard.startswith("silence: ")


async def test_one_that_is_about_no_run_is_no_error_for_the_others(running, build, send):
    async with running(policies=POLICIES) as daemon:
        for run in ("run", "run-2"):
            await (await daemon.train(run, run)).send(build.sample(1))
            await daemon.shown(run, lambda detail: detail.run.step == 1)
        hot = {"alertname": "NodeHot"}
        status, answer = await send(
            daemon,
            message(
                alert(labels=hot | {"run": "other"}),
                alert(labels=hot),
                alert(labels=hot | {"run": "run", "training_job": "another"}),
                alert("PodRestarted"),
                alert(labels=hot | {"training_job": "job"}),
                truncatedAlerts=3,
            ),
        )
        assert status == 200
        told = [(one["result"], one["run"]) for one in answer["alerts"]]
        assert told == [("unknown_run", "")] * 3 + [("unnamed", ""), ("begun", "run"), ("begun", "run-2")]
        details = [one["detail"] for one in answer["alerts"]]
        assert details[0] == "the daemon holds no run with run='other'"
        assert details[1] == "the labels must name a run, by run or training_job"
        assert details[3] == "no policy names 'PodRestarted'; named are: NodeDown, NodeHot"
        assert await daemon.metric('sharpwatch_foreign_alerts_received_total{result="unknown_run"}') == 3
        assert await daemon.metric('sharpwatch_foreign_alerts_received_total{result="begun"}') == 2
        assert await daemon.metric("sharpwatch_foreign_alerts_truncated_total") == 3


async def test_what_the_configuration_no_longer_names_ends_nevertheless(running, build, send):
    async with running(policies=POLICIES) as daemon:
        trainer = await daemon.train()
        await trainer.send(build.sample(1))
        await trainer.acknowledged(1)
        await send(daemon, message(alert()))
    async with running() as daemon:
        over = {"status": "resolved", "endsAt": "2026-11-30T11:00:00Z"}
        for result in ("ended", "unnamed"):
            _, answer = await send(daemon, message(alert(**over)))
            assert [told["result"] for told in answer["alerts"]] == [result]


@pytest.mark.parametrize("authorization", ["", "Bearer wrong", "Basic abc", "Bearer ", "Bearer \xff"])
async def test_without_the_operators_token_nothing_is_read(running, send, authorization):
    async with running(policies=POLICIES) as daemon:
        status, answer = await send(daemon, b"no JSON", authorization)
        assert (status, "the operator's token" in answer["error"]) == (401, True)


async def test_no_other_machine_may_send(running, send, monkeypatch):
    monkeypatch.setattr(foreign_alerts, "_is_loopback", lambda peer: peer != "127.0.0.1")
    async with running(policies=POLICIES) as daemon:
        status, answer = await send(daemon, message(alert()))
        assert (status, "from this machine alone, not from 127.0.0.1" in answer["error"]) == (403, True)


@pytest.mark.parametrize(
    ("peer", "is_loopback"),
    [("127.0.0.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("10.0.0.5", False), (None, False)],
)
def test_loopback(peer, is_loopback):
    assert foreign_alerts._is_loopback(peer) is is_loopback


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        (b"no JSON", 400, "the body: Invalid JSON"),
        (b"[" * 100_000, 400, "the body: Invalid JSON"),
        (message(alert(), version="3"), 400, "version: Input should be '4' or '1'"),
        (message(alert(), alert(status="silent")), 400, "alerts[1].status: Input should be 'firing' or 'resolved'"),
        (message(alert(startsAt="now")), 400, "alerts[0].startsAt: "),
        (message(alert(startsAt="0001-01-01T00:00:00+02:00")), 400, "alerts[0].startsAt: Input should be greater"),
        (message(alert(startsAt="9999-12-31T23:59:59-02:00")), 400, "alerts[0].startsAt: Input should be less"),
        (message(alert(fingerprint="")), 400, "alerts[0].fingerprint: String should have at least 1 character"),
        (message({"status": "firing"}), 400, "alerts[0].labels: Field required"),
        (message(alert(), truncatedAlerts=-1), 400, "truncatedAlerts: Input should be greater than or equal to 0"),
        (message(*[alert()] * 513), 400, "alerts: Tuple should have at most 512 items"),
        (b"x" * (2**20 + 1), 413, "the body must have at most 1048576 bytes"),
    ],
)
async def test_what_is_no_message_is_refused_with_its_place(running, send, body, status, error):
    async with running(policies=POLICIES) as daemon:
        got, answer = await send(daemon, body)
        assert got == status
        assert answer["error"].startswith(error)
