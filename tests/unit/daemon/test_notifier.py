"""What a webhook is told, and what is done where it does not answer."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import aiohttp
import pytest
from aiohttp import web
from observations import incident
from prometheus_client import CollectorRegistry

from sharpwatch.daemon import notifier
from sharpwatch.daemon.config.settings import NotificationsConfig
from sharpwatch.daemon.exporter.own_metrics import OwnMetrics
from sharpwatch.daemon.notifier import Notifier
from sharpwatch.daemon.records import Decision, ForeignAlert
from sharpwatch.errors import SharpwatchError, StoreError

PAGE = replace(incident(first_step=5, last_step=9, active=True), id="i1", severity="critical")
PROPOSAL = Decision("d1", "run", 1e9, 9, "scale_lr", "advise", "proposed", policy="hold", detail="ffn 1 to 0.1")


class Webhook:
    """A receiver that keeps what it is sent, and answers as it is told."""

    def __init__(self) -> None:
        self.got: asyncio.Queue[tuple[dict, dict]] = asyncio.Queue()
        self.answers: list[int] = []  # then 200

    async def take(self, request: web.Request) -> web.Response:
        await self.got.put((dict(request.headers), await request.json()))
        return web.Response(status=self.answers.pop(0) if self.answers else 200)

    async def alerts(self) -> list[dict]:
        return (await asyncio.wait_for(self.got.get(), 30))[1]["alerts"]


class Kept(dict):
    """What a journal would have, by fingerprint; `failing` as long as it takes no writes."""

    failing = False

    async def keep(self, rows) -> None:
        if self.failing:
            raise StoreError("disk full")
        for fingerprint, row in rows.items():
            self.pop(fingerprint, None)
            if row is not None:
                self[fingerprint] = row


@contextlib.asynccontextmanager
async def notifying(kept=None, **options):
    webhook = Webhook()
    app = web.Application()
    app.router.add_post("/hook", webhook.take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    registry, kept_by = CollectorRegistry(), Kept() if kept is None else kept
    metrics = OwnMetrics(registry, queue_depth=lambda: 0, queue_capacity=1)
    made = Notifier(NotificationsConfig(webhook=f"http://127.0.0.1:{port}/hook", **options), metrics, kept_by.keep)
    task = asyncio.create_task(made.run())
    try:
        yield (
            webhook,
            made,
            lambda result: registry.get_sample_value("sharpwatch_notifications_total", {"result": result}),
        )
    finally:
        task.cancel()
        await runner.cleanup()


async def test_an_incident_is_told_when_it_opens_and_when_it_closes():
    async with notifying() as (webhook, made, _):
        made.tell([PAGE, replace(PAGE, id="i2", severity="warning")], [])
        (opened,) = await webhook.alerts()
        made.tell([replace(PAGE, active=False, closed="no finding")], [])
        (closed,) = await webhook.alerts()
    assert (opened["status"], closed["status"]) == ("firing", "resolved")
    assert opened["fingerprint"] == closed["fingerprint"] == "i1"
    assert opened["startsAt"] == closed["startsAt"]
    assert opened["labels"] | {"alertname": PAGE.name, "run": PAGE.run, "severity": "critical"} == opened["labels"]
    assert closed["annotations"]["description"].endswith("Closed: no finding")


async def test_an_incident_that_merely_goes_on_is_told_once():
    """One that is open is recorded again and again, with other numbers in its evidence."""
    async with notifying() as (webhook, made, _):
        made.tell([PAGE], [])
        (first,) = await webhook.alerts()
        for step in range(10, 60):
            made.tell([replace(PAGE, last_step=step, evidence=(f"no step for {step} s",))], [PROPOSAL])
            made.tell([], [replace(PROPOSAL, detail=f"as of step {step}")])
        assert [each["fingerprint"] for each in await webhook.alerts()] == ["d1"]
        made.tell([replace(PAGE, active=False, evidence=("no step for 60 s",))], [])
        (closed,) = await webhook.alerts()
        assert (closed["status"], closed["startsAt"]) == ("resolved", first["startsAt"])
        assert closed["annotations"]["description"] == "no step for 60 s"
        assert webhook.got.empty()


@pytest.mark.parametrize(
    "change",
    [
        {"severity": "critical"},
        {"name": "WeightJump"},
        {"cause": "damaged-weight"},
        {"blocks": ("vo",), "layer_blocks": ("layers.1.vo",)},
        {"onset": 3},
        {"acknowledged": "ann: bad shard"},
    ],
    ids=str,
)
async def test_an_incident_is_told_again_once_it_is_another(change):
    warning = replace(PAGE, severity="warning")
    async with notifying(severity="warning") as (webhook, made, _):
        made.tell([warning], [])
        await webhook.alerts()
        made.tell([replace(warning, **change)], [])
        (again,) = await webhook.alerts()
    assert (again["status"], again["fingerprint"]) == ("firing", "i1")
    assert again["annotations"].get("acknowledged", "") == change.get("acknowledged", "")


async def test_an_alert_of_another_system_is_not_told_back():
    async with notifying() as (webhook, made, _):
        made.tell([replace(PAGE, id="f1", foreign=ForeignAlert("NodeDown", "print", 1e9)), PAGE], [])
        assert [alert["fingerprint"] for alert in await webhook.alerts()] == ["i1"]


async def test_a_message_is_as_alertmanager_sends_it():
    """Version 4: https://prometheus.io/docs/alerting/latest/configuration/#webhook_config."""
    async with notifying() as (webhook, made, _):
        made.tell([PAGE], [])
        _, sent = await webhook.got.get()
    assert sent["version"] == "4"
    assert sent.keys() >= {"groupKey", "truncatedAlerts", "status", "receiver", "groupLabels", "commonLabels"}
    assert sent["alerts"][0].keys() >= {"status", "labels", "annotations", "startsAt", "endsAt", "fingerprint"}


async def test_a_proposal_comes_with_the_command_that_approves_it_and_then_with_its_outcome():
    async with notifying() as (webhook, made, _):
        made.tell(
            [],
            [
                PROPOSAL,
                replace(PROPOSAL, id="d2", outcome="observed"),
                replace(PROPOSAL, id="d3", policy="", mode="operator"),
            ],
        )
        (asked,) = await webhook.alerts()
        made.tell([], [replace(PROPOSAL, outcome="worse")])
        (ended,) = await webhook.alerts()
    assert asked["annotations"]["command"] == "sharpwatch approve d1"
    assert asked["annotations"]["description"] == "ffn 1 to 0.1"
    assert (ended["status"], ended["labels"]["outcome"], ended["labels"]["severity"]) == (
        "resolved",
        "worse",
        "critical",
    )


async def test_the_autopilot_is_told_of_where_somebody_has_to_approve():
    asks = replace(PROPOSAL, policy="", author="autopilot", action="set_lr")
    async with notifying() as (webhook, made, _):
        made.tell([], [asks, replace(asks, id="d2", mode="enforce", outcome="applied")])
        (asked,) = await webhook.alerts()
        made.tell([], [replace(asks, author="ann", outcome="approved")])
        (ended,) = await webhook.alerts()
    assert (asked["status"], asked["fingerprint"], ended["status"]) == ("firing", "d1", "resolved")
    assert asked["annotations"]["summary"] == "run: set_lr by the autopilot is proposed"


@pytest.mark.parametrize("outcome", ["rejected", "expired", "cancelled"])
async def test_a_proposal_of_the_autopilot_is_resolved_however_it_ends(outcome):
    asks = replace(PROPOSAL, policy="", author="autopilot", action="set_lr")
    async with notifying() as (webhook, made, _):
        made.tell([], [asks])
        await webhook.alerts()
        made.tell([], [replace(asks, author="ann", outcome=outcome)])
        (ended,) = await webhook.alerts()
    assert (ended["status"], ended["labels"]["outcome"]) == ("resolved", outcome)


async def test_a_message_that_fails_is_sent_again_with_what_is_newest(monkeypatch):
    monkeypatch.setattr(notifier, "_FIRST_RETRY", 0.01)
    async with notifying() as (webhook, made, count):
        webhook.answers = [503, 500]
        made.tell([PAGE], [])
        assert (await webhook.alerts())[0]["status"] == "firing"
        made.tell([replace(PAGE, active=False)], [])
        while (await webhook.alerts())[0]["status"] == "firing":
            pass
        assert count("failed") == 2


async def test_what_was_not_delivered_before_a_restart_is_sent_after_it():
    """A proposal; and the end of an incident, whose receiver would show it for ever."""
    kept = Kept()
    closed = replace(PAGE, active=False, closed="no finding for 20 samples")
    async with notifying(kept) as (webhook, made, _):
        made.tell([PAGE], [])
        (opened,) = await webhook.alerts()
        webhook.answers = [503] * 1_000
        made.tell([closed], [PROPOSAL])
        await webhook.alerts()
        await made.keep()
    async with notifying(kept) as (webhook, made, _):
        made.restore(kept.values(), [closed], [PROPOSAL])
        told = {alert["fingerprint"]: alert for alert in await webhook.alerts()}
        await made.keep()
    assert {identity: alert["status"] for identity, alert in told.items()} == {"i1": "resolved", "d1": "firing"}
    assert told["i1"]["startsAt"] == opened["startsAt"]
    assert list(kept) == ["d1"]  # nothing need be known of what has ended


async def test_what_goes_on_is_told_again_after_a_restart_and_began_when_it_did():
    kept = Kept()
    async with notifying(kept) as (webhook, made, _):
        made.tell([PAGE], [PROPOSAL])
        before = await webhook.alerts()
        await made.keep()
    over, never_told = replace(PROPOSAL, outcome="expired"), replace(PAGE, id="i2")
    async with notifying(kept) as (webhook, made, _):
        # The daemon ended before it could tell that the proposal has expired, and of the second incident.
        others = [replace(PAGE, id="i0", active=False), never_told]
        made.restore(kept.values(), [PAGE, *others], [over, replace(PROPOSAL, id="d0", outcome="worse")])
        after = {alert["fingerprint"]: alert for alert in await webhook.alerts()}
    assert {identity: alert["status"] for identity, alert in after.items()} == {
        "i1": "firing",
        "i2": "firing",
        "d1": "resolved",
    }
    assert [after[alert["fingerprint"]]["startsAt"] for alert in before] == [alert["startsAt"] for alert in before]


async def test_what_is_left_to_another_daemon_is_told_by_that_one_alone(monkeypatch):
    monkeypatch.setattr(notifier, "_FIRST_RETRY", 0.01)
    kept = Kept()
    async with notifying(kept) as (webhook, first, _):
        webhook.answers = [500] * 10_000
        first.tell([PAGE], [PROPOSAL])
        began = {alert["fingerprint"]: alert["startsAt"] for alert in await webhook.alerts()}
        kept.failing = True
        first.tell([replace(PAGE, blocks=("ffn",))], [])
        with pytest.raises(StoreError, match="notifications can't be journalled"):
            await first.leave(())
        kept.failing = False
        await first.leave([row for row in kept.values() if row.fingerprint == "i1"])
        async with notifying(kept) as (other, second, _):
            second.restore([row for row in kept.values() if row.fingerprint == "i1"], [], [])
            (told,) = await other.alerts()
            assert (told["fingerprint"], told["startsAt"]) == ("i1", began["i1"])
        while len(alerts := await webhook.alerts()) > 1:
            pass  # tried before it was left
        assert [alert["fingerprint"] for alert in alerts] == ["d1"]


async def test_a_journal_that_takes_no_writes_holds_up_no_message_and_loses_nothing():
    kept = Kept()
    kept.failing = True
    async with notifying(kept) as (webhook, made, _):
        made.tell([PAGE], [])
        await webhook.alerts()
        assert not await made.keep()
        kept.failing = False
        assert await made.keep()
    assert list(kept) == ["i1"]


async def test_whatever_goes_wrong_with_a_message_it_is_to_be_sent_again():
    metrics = OwnMetrics(CollectorRegistry(), queue_depth=lambda: 0, queue_capacity=1)
    made = Notifier(NotificationsConfig(webhook="http://..:80/"), metrics)  # a host that has no address
    async with aiohttp.ClientSession() as session:
        assert await made._send(session, [])


async def test_what_the_webhook_refuses_is_not_sent_again():
    async with notifying() as (webhook, made, count):
        webhook.answers = [400]
        made.tell([PAGE], [])
        await webhook.alerts()
        made.tell([], [PROPOSAL])
        assert [each["fingerprint"] for each in await webhook.alerts()] == ["d1"]
        assert count("refused") == 1


async def test_what_waits_is_bounded_and_the_loss_is_counted():
    async with notifying() as (_, made, count):
        made.tell([replace(PAGE, id=f"i{i}") for i in range(1_200)], [])
        assert count("dropped") == 200


async def test_a_token_is_shown_and_a_missing_one_said_at_once(tmp_path):
    (tmp_path / "token").write_text("secret\n")
    async with notifying(token_file=str(tmp_path / "token")) as (webhook, made, _):
        made.tell([PAGE], [])
        headers, _ = await webhook.got.get()
    assert headers["Authorization"] == "Bearer secret"
    metrics = OwnMetrics(CollectorRegistry(), queue_depth=lambda: 0, queue_capacity=1)
    with pytest.raises(SharpwatchError, match=r"notifications\.token_file .*none: No such file"):
        Notifier(NotificationsConfig(webhook="http://localhost", token_file=str(tmp_path / "none")), metrics)


async def test_without_a_webhook_nothing_waits():
    made = Notifier(NotificationsConfig(), OwnMetrics(CollectorRegistry(), queue_depth=lambda: 0, queue_capacity=1))
    made.tell([PAGE], [PROPOSAL])
    assert made._waiting == {}
