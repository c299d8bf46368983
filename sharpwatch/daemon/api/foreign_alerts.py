"""`POST /api/v1/alerts`: takes in alerts of other systems, as Alertmanager and Grafana send them to a webhook.

The way in is narrow. It needs the operator's token, from this machine; and an alert changes nothing unless a policy of
the configuration names it, and only in the way that this policy says. Of the payload, the labels `alertname`, `run`,
`training_job` and `severity` choose, and the rest is text to be shown.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any, Literal

import structlog
from aiohttp import web
from pydantic import AwareDatetime, Field, TypeAdapter, ValidationError

from sharpwatch.daemon.api.auth import Authorizer
from sharpwatch.daemon.config.settings import Config
from sharpwatch.daemon.exporter.own_metrics import ForeignResult, OwnMetrics
from sharpwatch.daemon.pipeline import Pipeline
from sharpwatch.daemon.records import NO_CHANGES, Changes, ForeignAlert
from sharpwatch.daemon.run_loader import RunLoader
from sharpwatch.daemon.runs.run import Run, Runs
from sharpwatch.daemon.storage import catalog
from sharpwatch.errors import NoRoomError, NotHeldError, OperatorError, StoreError

log = structlog.get_logger(__name__)

MAX_BYTES = 2**20  # of a message
MAX_ALERTS = 512  # in a message
_BODY_SECONDS = 10.0  # within which a message must have come
_MOST_TEXT = 300  # characters of an alert's summary that are kept
# Of a start: others can't be told in every time zone.
_EARLIEST, _LATEST = datetime(1970, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)
_NAMED = 8  # names that an answer lists


@dataclass(frozen=True, slots=True)
class SentAlert:
    """An alert in a message, as far as it is read; senders add other fields, which are ignored."""

    status: Literal["firing", "resolved"]
    labels: dict[str, str]
    starts_at: Annotated[AwareDatetime, Field(alias="startsAt", ge=_EARLIEST, lt=_LATEST)]
    ends_at: Annotated[AwareDatetime, Field(alias="endsAt")]  # of what still fires, any time
    fingerprint: Annotated[str, Field(min_length=1, max_length=128)]
    annotations: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its rule."""
        return self.labels.get("alertname", "")

    @property
    def evidence(self) -> str:
        """What it says, in one line of printable text: it is shown in terminals."""
        shown = _printable(self.annotations.get("summary") or self.annotations.get("description", ""))
        since = f"fires since {self.starts_at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
        since += f" (fingerprint {_printable(self.fingerprint)})"  # by which an end that was lost can be told
        return f"{since}: {shown}" if shown else since


@dataclass(frozen=True, slots=True)
class AlertMessage:
    """A message of Alertmanager, whose version is "4", or of Grafana, whose version is "1"."""

    version: Literal["4", "1"]
    alerts: Annotated[tuple[SentAlert, ...], Field(max_length=MAX_ALERTS)]
    receiver: str = ""
    truncated: Annotated[int, Field(alias="truncatedAlerts", ge=0)] = 0


class _RefusedError(Exception):
    """A message is not taken in: the sender is answered with a status and the text."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        self.status = status
        super().__init__(text)


_ADAPTER = TypeAdapter(AlertMessage)


def read_message(body: bytes) -> AlertMessage:
    """Read a message.

    Args:
        body: JSON.

    Raises:
        ValueError: It is none; says what is wrong, and where.
    """
    try:
        return _ADAPTER.validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"]).lstrip(".")
        raise ValueError(
            f"{where or 'the body'}: {first['msg']}; expected a message of Alertmanager's webhook, version 4, or of "
            "Grafana's"
        ) from error


class ForeignAlerts:
    """Takes messages and has the runs that they name take in their alerts.

    Args:
        names: The alerts that the configuration names; others change nothing.
        runs: The runs that the daemon holds.
        loader: Brings back others.
        pipeline: Journals what changes.
        authorizer: Tells operators from others.
        metrics: Where it counts.
    """

    def __init__(  # noqa: PLR0913  the parts that it connects
        self,
        *,
        names: frozenset[str],
        runs: Runs,
        loader: RunLoader,
        pipeline: Pipeline,
        authorizer: Authorizer,
        metrics: OwnMetrics,
    ) -> None:
        self._names = names
        self._runs = runs
        self._loader = loader
        self._pipeline = pipeline
        self._authorizer = authorizer
        self._metrics = metrics

    def configure(self, config: Config) -> None:
        """Takes in the alerts that another configuration names."""
        self._names = config.foreign_alerts

    async def post(self, request: web.Request) -> web.Response:
        """Answers a message with what became of each alert in it."""
        try:
            self._authorize(request)
            return web.json_response(await self._take_in(await _body(request)))
        except _RefusedError as error:
            headers = {"WWW-Authenticate": "Bearer"} if error.status == HTTPStatus.UNAUTHORIZED else None
            return web.json_response({"error": str(error)}, status=error.status, headers=headers)

    def _authorize(self, request: web.Request) -> None:
        # Plain HTTP shows a token to the whole network, as gRPC without TLS would.
        if not (request.secure or _is_loopback(request.remote)):
            raise _RefusedError(
                HTTPStatus.FORBIDDEN,
                f"alerts are taken from this machine alone, not from {request.remote}: the daemon speaks plain HTTP; "
                "configure daemon.tls, put a proxy that ends TLS beside it, or use a tunnel",
            )
        shown = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        if not self._authorizer.caller("http", shown).may("operator"):
            raise _RefusedError(
                HTTPStatus.UNAUTHORIZED, "alerts need the operator's token, in the header Authorization: Bearer TOKEN"
            )

    async def _take_in(self, body: bytes) -> dict[str, Any]:
        """Has a message change what it changes; returns the answer."""
        try:
            message = read_message(body)
        except ValueError as error:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, str(error)) from error
        if self._pipeline.store_error:
            # Before anything changes. Alertmanager sends again what is answered so.
            text = f"no change can be journalled now: {self._pipeline.store_error}"
            raise _RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, text)
        self._count_truncated(message)
        for alert in message.alerts:
            await self._bring_back(alert)
        taken = [one for alert in message.alerts for one in self._take(alert)]
        results = Counter(told["result"] for told, _ in taken)
        for result, count in results.items():
            self._metrics.foreign_alerts.labels(result).inc(count)
        log.info("foreign_alerts", receiver=message.receiver, results=dict(results))
        try:
            await self._pipeline.submit_all(changed for _, changed in taken if changed is not None)
        except StoreError as error:
            text = f"it is in force, and journalled once that is possible: {error}"
            raise _RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, text) from error
        return {"alerts": [told for told, _ in taken], "truncated": message.truncated}

    async def _bring_back(self, alert: SentAlert) -> None:
        """Has those runs in memory that an alert is about, if the journal has them."""
        if alert.name not in self._names and alert.status == "firing":
            return
        try:
            names: Iterable[str] = (alert.labels.get("run", ""),)
            if alert.status == "resolved" and not any(names):
                names = await self._loader.ask(partial(catalog.with_foreign_alert, fingerprint=alert.fingerprint))
            for name in names:
                with suppress(NotHeldError):  # its own daemon gets the message as well
                    await self._loader.get(name)
        except (NoRoomError, StoreError) as error:
            raise _RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from error

    def _count_truncated(self, message: AlertMessage) -> None:
        if message.truncated:
            self._metrics.foreign_truncated.inc(message.truncated)
            log.warning("foreign_alerts_truncated", receiver=message.receiver, alerts=message.truncated)

    def _take(self, alert: SentAlert) -> list[tuple[dict[str, str], tuple[Run, Changes] | None]]:
        """What became of an alert, for each run that it names; and what that changed."""
        is_named = alert.name in self._names
        # What began under another configuration has to end nevertheless.
        taken = [self._put(alert, run) for run in self._meant(alert)] if is_named or alert.status == "resolved" else []
        if not is_named:
            ended = [one for one in taken if one[1] is not None]
            named = _some(self._names)
            return ended or [(_told(alert, "unnamed", f"no policy names {alert.name!r}; named are: {named}"), None)]
        return taken or [(_told(alert, "unknown_run", _whose(alert.labels)), None)]

    def _meant(self, alert: SentAlert) -> list[Run]:
        """The run that the labels name, or else those of the training job that they name which have not ended."""
        name, job = alert.labels.get("run", ""), alert.labels.get("training_job", "")
        if not (name or job):
            return []
        runs = [run for run in self._runs if not job or run.attempt.hello.training_job == job]
        if name:
            return [run for run in runs if run.name == name]
        return [run for run in runs if run.phase != "closed" or alert.status == "resolved"]

    def _put(self, alert: SentAlert, run: Run) -> tuple[dict[str, str], tuple[Run, Changes] | None]:
        began = alert.starts_at.timestamp()
        # The same alert has the same id however often it comes, also after a restart.
        identity = hashlib.sha256(f"{run.name}\n{alert.fingerprint}\n{began!r}".encode()).hexdigest()[:12]
        try:
            changes = run.controller.foreign_alert(
                identity,
                ForeignAlert(alert.name, alert.fingerprint, began),
                "critical" if alert.labels.get("severity") == "critical" else "warning",
                alert.evidence,
                None if alert.status == "firing" else alert.ends_at.timestamp(),
            )
        except OperatorError as error:
            return _told(alert, "too_many", str(error), run.name), None
        if changes == NO_CHANGES:
            return _told(alert, "unchanged", "", run.name), None
        result: ForeignResult = "begun" if alert.status == "firing" else "ended"
        return _told(alert, result, changes.incidents[-1].id, run.name), (run, changes)


def _printable(text: str) -> str:
    return "".join(one if one.isprintable() else " " for one in text[:_MOST_TEXT]).strip()


async def _body(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        text = f"the body must have at most {MAX_BYTES} bytes; max_alerts of the receiver limits it"
        raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text) from error
    except TimeoutError as error:
        raise _RefusedError(HTTPStatus.REQUEST_TIMEOUT, f"the body must come within {_BODY_SECONDS:g} s") from error


def _is_loopback(peer: str | None) -> bool:
    if peer is None:
        return False
    address = ipaddress.ip_address(peer)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _told(alert: SentAlert, result: ForeignResult, detail: str, run: str = "") -> dict[str, str]:
    return {
        "alertname": alert.name,
        "fingerprint": alert.fingerprint,
        "status": alert.status,
        "run": run,
        "result": result,
        "detail": detail,
    }


def _whose(labels: dict[str, str]) -> str:
    """Why an alert is about no run."""
    given = [f"{key}={labels[key]!r}" for key in ("training_job", "run") if labels.get(key)]
    if not given:
        return "the labels must name a run, by run or training_job"
    return f"the daemon holds no run with {' and '.join(given)}"


def _some(names: Iterable[str]) -> str:
    found = sorted(names)
    more = len(found) - _NAMED
    return (", ".join(found[:_NAMED]) + (f" and {more} more" if more > 0 else "")) or "none"
