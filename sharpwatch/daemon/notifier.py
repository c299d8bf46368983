"""Tells a webhook of incidents, waiting proposals and what came of decisions, as Alertmanager tells its receivers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import aiohttp
import structlog

from sharpwatch.daemon.config.settings import NotificationsConfig
from sharpwatch.daemon.decisions.transitions import FINAL, is_settled
from sharpwatch.daemon.exporter.own_metrics import OwnMetrics
from sharpwatch.daemon.records import Decision, Incident
from sharpwatch.daemon.storage.schema import NotificationRow
from sharpwatch.daemon.webhooks import shown_webhook, webhook_headers
from sharpwatch.errors import StoreError

log = structlog.get_logger(__name__)

_WAITING = 1_000  # alerts that wait for a webhook that does not answer; beyond it the oldest are dropped, and counted
_IN_ONE = 64  # alerts in one message
_TIMEOUT = aiohttp.ClientTimeout(total=10.0)
_FIRST_RETRY, _LAST_RETRY = 1.0, 300.0  # seconds
_KEEP_RETRY = 5.0  # seconds
_TOO_MANY = 429
_NEVER = "0001-01-01T00:00:00Z"  # how Alertmanager writes the end of what goes on
_QUIET = frozenset({"observed", "refused"})  # decisions that changed nothing and wait for nobody
_ASKS = frozenset(
    {"proposed", "approved", "rejected", "expired", "cancelled"}
)  # of a proposal, from its beginning to its end


# Journals rows by fingerprint; None for what need not be kept any more.
Keep = Callable[[Mapping[str, NotificationRow | None]], Awaitable[None]]


async def _keep_none(rows: Mapping[str, NotificationRow | None]) -> None:
    """For a notifier without a journal."""


class Notifier:
    """Sends alerts to one webhook, the newest state of each; nothing in the daemon waits for it.

    An alert is told again only once something else than its evidence has changed: an open incident is recorded about
    every ten steps, and each time with other numbers. What waits to be sent, and what goes on, is journalled: after a
    restart the one is sent, and the other told with the time at which it began.

    Args:
        config: The webhook.
        metrics: Where it counts what was sent and what was not.
        keep: Journals rows; raises `StoreError` where it can't.

    Raises:
        SharpwatchError: The file of the token can't be read, or holds none.
    """

    def __init__(self, config: NotificationsConfig, metrics: OwnMetrics, keep: Keep = _keep_none) -> None:
        self._config = config
        self._metrics = metrics
        self._keep = keep
        self._waiting: dict[str, dict[str, Any]] = {}  # by fingerprint, oldest first
        self._began: dict[str, str] = {}  # by fingerprint, of what goes on
        self._told: dict[str, str] = {}  # by fingerprint, what was told of what goes on, without the evidence
        self._unkept: dict[str, NotificationRow | None] = {}  # by fingerprint, what the journal does not have yet
        self._to_keep = asyncio.Event()
        self._filled = asyncio.Event()
        self._headers = webhook_headers("notifications", config.token_file)
        self._shown = shown_webhook(config.webhook)

    def tell(self, incidents: Iterable[Incident], decisions: Iterable[Decision]) -> None:
        """Have records sent that somebody should know of, as far as they say something new."""
        if not self._config.webhook:
            return
        critical = self._config.severity == "critical"
        for incident in incidents:
            # Whoever raised an alert of another system knows of it, and may be the webhook itself.
            if incident.foreign is None and (incident.severity == "critical" or not critical):
                self._put(_incident(incident))
        for made in decisions:
            if _is_told(made):
                self._put(_decision(made))

    def restore(
        self, rows: Iterable[NotificationRow], incidents: Iterable[Incident], decisions: Iterable[Decision]
    ) -> None:
        """Go on after a restart: what waited is sent, and what goes on is told once more.

        Once more, because nothing says what the webhook still knows, or whether it is the same one. Receivers of
        Alertmanager's messages know an alert by its fingerprint.

        Args:
            rows: The journalled ones.
            incidents: Those of all runs.
            decisions: Those of all runs.
        """
        if not self._config.webhook:
            return
        for row in rows:
            alert = json.loads(row.alert)
            if alert["status"] == "firing":
                self._began[row.fingerprint] = alert["startsAt"]
            if row.waits:
                self._waiting[row.fingerprint] = alert
                self._filled.set()
        # Those too that have ended since they were told, as the daemon may have ended before it could tell that.
        self.tell(
            [each for each in incidents if each.active or each.id in self._began],
            [made for made in decisions if not is_settled(made) or made.id in self._began],
        )

    async def leave(self, rows: Iterable[NotificationRow]) -> None:
        """Leave notifications to another daemon, which goes on with them by what is journalled.

        Args:
            rows: The journalled ones.

        Raises:
            StoreError: What is not journalled yet can't be.
        """
        if not await self.keep():
            raise StoreError("notifications can't be journalled")
        for row in rows:
            for known in (self._waiting, self._began, self._told):
                known.pop(row.fingerprint, None)
        if not self._waiting:
            self._filled.clear()

    def _put(self, alert: dict[str, Any]) -> None:
        fingerprint, news = alert["fingerprint"], _news(alert)
        alert["startsAt"] = self._began.setdefault(fingerprint, alert["startsAt"])
        # What still waits is replaced in any case, so that the newest evidence goes out.
        if self._told.get(fingerprint) == news and fingerprint not in self._waiting:
            return
        self._told[fingerprint] = news
        if alert["status"] == "resolved":
            del self._began[fingerprint], self._told[fingerprint]
        self._waiting.pop(fingerprint, None)
        self._waiting[fingerprint] = alert
        self._note(alert, waits=True)
        while len(self._waiting) > _WAITING:
            lost = next(iter(self._waiting))
            self._note(self._waiting.pop(lost), waits=False)
            self._told.pop(lost, None)  # so that its next record is told
            self._metrics.notifications.labels("dropped").inc()
        self._filled.set()

    def _note(self, alert: dict[str, Any], *, waits: bool) -> None:
        """Have an alert journalled that waits, or goes on; and one forgotten that does neither."""
        fingerprint = alert["fingerprint"]
        is_over = alert["status"] == "resolved" and not waits
        self._unkept[fingerprint] = None if is_over else NotificationRow(fingerprint, json.dumps(alert), waits)
        self._to_keep.set()

    async def run(self) -> None:
        """Sends what waits, and journals what is to be known after a restart, until it is cancelled."""
        # Two tasks, so that what comes while a webhook does not answer is journalled all the same.
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send_all())
            tasks.create_task(self._keep_all())

    async def _keep_all(self) -> None:
        while True:
            await self._to_keep.wait()
            if not await self.keep():
                await asyncio.sleep(_KEEP_RETRY)

    async def keep(self) -> bool:
        """Journals what is not journalled yet; returns whether the journal took it."""
        rows, self._unkept = self._unkept, {}
        self._to_keep.clear()
        kept = False
        try:
            if rows:
                await self._keep(rows)
            kept = True
        except StoreError:  # the pipeline, which writes to the same journal, logs and counts that
            self._to_keep.set()
        finally:
            if not kept:  # also where it is cancelled
                self._unkept = rows | self._unkept
        return kept

    async def _send_all(self) -> None:
        retry = _FIRST_RETRY
        async with aiohttp.ClientSession(timeout=_TIMEOUT, headers=self._headers) as session:
            while True:
                await self._filled.wait()
                batch = dict(list(self._waiting.items())[:_IN_ONE])
                again = await self._send(session, list(batch.values()))
                if again:
                    self._metrics.notifications.labels("failed").inc()
                    await asyncio.sleep(retry)
                    retry = min(2 * retry, _LAST_RETRY)
                    continue
                retry = _FIRST_RETRY
                for fingerprint, alert in batch.items():
                    if self._waiting.get(fingerprint) is alert:  # else a newer state has come meanwhile
                        del self._waiting[fingerprint]
                        self._note(alert, waits=False)
                if not self._waiting:
                    self._filled.clear()

    async def _send(self, session: aiohttp.ClientSession, alerts: list[dict[str, Any]]) -> bool:
        """Sends one message; returns whether it has to be sent again."""
        try:
            async with session.post(self._config.webhook, data=json.dumps(message(alerts))) as response:
                status = response.status
        except (aiohttp.ClientError, TimeoutError) as error:
            log.warning("notification_failed", webhook=self._shown, reason=type(error).__name__)
            return True
        except Exception:  # what goes wrong with one message must not end all; counted
            log.exception("notification_failed", webhook=self._shown)
            return True
        if status < 300:
            self._metrics.notifications.labels("sent").inc()
            return False
        log.warning("notification_failed", webhook=self._shown, reason=f"HTTP {status}")
        if status >= 500 or status == _TOO_MANY:
            return True
        self._metrics.notifications.labels("refused").inc()  # it would be refused again
        return False


def message(alerts: list[dict[str, Any]]) -> dict[str, Any]:
    """Alerts as version 4 of the message that Alertmanager sends to a webhook."""
    return {
        "version": "4",
        "groupKey": "sharpwatch",
        "truncatedAlerts": 0,
        "status": "firing" if any(each["status"] == "firing" for each in alerts) else "resolved",
        "receiver": "sharpwatch",
        "groupLabels": {},
        "commonLabels": {},
        "commonAnnotations": {},
        "externalURL": "",
        "alerts": alerts,
    }


def _news(alert: dict[str, Any]) -> str:
    """What must change for an alert to be told again: all that it says but the evidence and the times."""
    said = {name: text for name, text in alert["annotations"].items() if name != "description"}
    return json.dumps([alert["status"], alert["labels"], said])


def _incident(incident: Incident) -> dict[str, Any]:
    culprit = incident.layer_blocks[0] if incident.layer_blocks else ""
    where = f" in {culprit}" if culprit else ""
    return _alert(
        incident.id,
        firing=incident.active,
        labels={
            "alertname": incident.name,
            "run": incident.run,
            "severity": incident.severity,
            "cause": incident.cause,
            "block": incident.blocks[0] if incident.blocks else "",
        },
        annotations={
            "summary": f"{incident.run}: {incident.name}{where} since step {incident.onset}, cause {incident.cause}",
            "description": "; ".join(incident.evidence) + (f". Closed: {incident.closed}" if incident.closed else ""),
            "command": f"sharpwatch incidents {incident.run}",
            **({"acknowledged": incident.acknowledged} if incident.acknowledged else {}),
        },
    )


def _is_told(made: Decision) -> bool:
    if not made.policy:  # the autopilot's small changes are told only where somebody has to approve them
        return made.mode == "advise" and made.outcome in _ASKS
    return made.action != "notify" and made.outcome not in _QUIET


def _decision(made: Decision) -> dict[str, Any]:
    waits = made.outcome == "proposed"
    whose = f"policy {made.policy}" if made.policy else "the autopilot"
    return _alert(
        made.id,
        firing=made.outcome not in FINAL if made.policy else waits,
        labels={
            "alertname": "SharpwatchProposal" if waits else "SharpwatchDecision",
            "run": made.run,
            "severity": "critical" if made.outcome in {"worse", "inconclusive", "failed"} else "warning",
            "policy": made.policy,
            "action": made.action,
            "outcome": made.outcome,
        },
        annotations={
            "summary": f"{made.run}: {made.action} by {whose} is {made.outcome}",
            "description": made.detail,
            "command": f"sharpwatch approve {made.id}" if waits else f"sharpwatch decisions {made.run} --audit",
        },
        since=made.made_at,
    )


def _alert(
    fingerprint: str, *, firing: bool, labels: dict[str, str], annotations: dict[str, str], since: float | None = None
) -> dict[str, Any]:
    now = datetime.now(UTC)
    began = now if since is None else datetime.fromtimestamp(since, UTC)
    return {
        "status": "firing" if firing else "resolved",
        "labels": labels,
        "annotations": annotations,
        "startsAt": began.isoformat(),
        "endsAt": _NEVER if firing else now.isoformat(),
        "generatorURL": "",
        "fingerprint": fingerprint,
    }
