"""Asks a webhook whether a policy may raise rates; nothing in the daemon waits for it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import structlog

from sharpwatch.daemon.config.settings import GateConfig
from sharpwatch.daemon.decisions.gate import Gate
from sharpwatch.daemon.exporter.own_metrics import GateResult, OwnMetrics
from sharpwatch.daemon.records import Decision
from sharpwatch.daemon.webhooks import shown_webhook, webhook_headers

log = structlog.get_logger(__name__)

_AT_ONCE = 16  # questions that are asked at a time


class GateWebhook:
    """Posts decisions to the gate's webhook.

    Args:
        config: The webhook.
        metrics: Where it counts answers.

    Raises:
        SharpwatchError: The file of the token can't be read, or holds none.
    """

    def __init__(self, config: GateConfig, metrics: OwnMetrics) -> None:
        self._config = config
        self._metrics = metrics
        self._headers = webhook_headers("gate", config.token_file)
        self._shown = shown_webhook(config.webhook)
        self._waiting: asyncio.Queue[Decision] = asyncio.Queue()

    def ask(self, made: Decision) -> None:
        """Has a decision asked about."""
        self._waiting.put_nowait(made)

    async def run(self, gate: Gate) -> None:
        """Asks, and tells `gate` the answers, until it is cancelled."""
        timeout = aiohttp.ClientTimeout(total=self._config.timeout)
        async with aiohttp.ClientSession(timeout=timeout, headers=self._headers) as session:
            await asyncio.gather(*(self._ask_on(session, gate) for _ in range(_AT_ONCE)))

    async def _ask_on(self, session: aiohttp.ClientSession, gate: Gate) -> None:
        while True:
            made = await self._waiting.get()
            result, why = await self._asked(session, made)
            self._metrics.gate.labels(result).inc()
            log.info("gate", run=made.run, decision=made.id, result=result, why=why)
            gate.answer(made.id, why, passed=result == "passed")

    async def _asked(self, session: aiohttp.ClientSession, made: Decision) -> tuple[GateResult, str]:
        # Without redirects: they would turn the question into one for a page, which answers 200.
        try:
            async with session.post(
                self._config.webhook, data=json.dumps(question(made)), allow_redirects=False
            ) as got:
                status = got.status
        except TimeoutError:
            return "failed", f"no answer within {self._config.timeout:g} s"
        except aiohttp.ClientError as error:
            return "failed", self._cannot_be_asked(error)
        except Exception as error:  # without an answer every raise would wait for ever; counted
            log.exception("gate_failed", run=made.run, decision=made.id)
            return "failed", self._cannot_be_asked(error)
        return ("passed" if 200 <= status < 300 else "held"), f"HTTP {status}"

    def _cannot_be_asked(self, error: Exception) -> str:
        return f"{self._shown} can't be asked: {type(error).__name__}"


def question(made: Decision) -> dict[str, Any]:
    """A decision as the gate is asked about it."""
    names = (
        "id",
        "run",
        "step",
        "policy",
        "action",
        "alert_id",
        "alert_name",
        "multipliers",
        "ramp_steps",
        "ttl_steps",
    )
    return {"version": "1", "decision": {**{name: getattr(made, name) for name in names}, "detail": made.detail}}
