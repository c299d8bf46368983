"""What the gate's webhook is asked, and what counts as an answer."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from sharpwatch.daemon.config.settings import GateConfig
from sharpwatch.daemon.decisions.gate import Gate
from sharpwatch.daemon.exporter.own_metrics import OwnMetrics
from sharpwatch.daemon.gate_webhook import GateWebhook
from sharpwatch.daemon.records import Decision
from sharpwatch.errors import SharpwatchError

MADE = Decision(
    "d1",
    "run",
    1e9,
    9,
    "ramp_back",
    "enforce",
    "draft",
    "cut",
    "i1",
    "LossSpike",
    detail="qk back",
    multipliers={"qk": 1},
)


class Answers(Gate):
    """A gate that keeps answers."""

    def __init__(self) -> None:
        super().__init__([].append)
        self.got: asyncio.Queue[tuple[str, str, bool]] = asyncio.Queue()

    def answer(self, identity: str, why: str, *, passed: bool) -> None:
        self.got.put_nowait((identity, why, passed))


@contextlib.asynccontextmanager
async def asking(answer, **options):
    """A webhook that answers by `answer(request)`; yields how to ask it, and how often each result was counted."""
    app = web.Application()
    app.router.add_post("/gate", answer)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    registry = CollectorRegistry()
    metrics = OwnMetrics(registry, queue_depth=lambda: 0, queue_capacity=1)
    config = GateConfig(**{"webhook": f"http://127.0.0.1:{runner.addresses[0][1]}/gate"} | options)
    made, answers = GateWebhook(config, metrics), Answers()
    task = asyncio.create_task(made.run(answers))

    async def ask() -> tuple[str, str, bool]:
        made.ask(MADE)
        return await asyncio.wait_for(answers.got.get(), 30)

    yield ask, lambda result: registry.get_sample_value("sharpwatch_gate_answers_total", {"result": result})
    task.cancel()
    await runner.cleanup()


async def test_it_is_asked_with_the_decision_and_the_token(tmp_path):
    token = tmp_path / "token"
    token.write_text("secret\n")
    seen = []

    async def answer(request: web.Request) -> web.Response:
        seen.append((request.headers["Authorization"], await request.json()))
        return web.Response(status=204)

    async with asking(answer, token_file=str(token)) as (ask, count):
        assert await ask() == ("d1", "HTTP 204", True)
        assert (count("passed"), count("held"), count("failed")) == (1, 0, 0)
    ((authorization, body),) = seen
    assert authorization == "Bearer secret"
    assert body["version"] == "1"
    assert body["decision"] == {
        "id": "d1",
        "run": "run",
        "step": 9,
        "policy": "cut",
        "action": "ramp_back",
        "alert_id": "i1",
        "alert_name": "LossSpike",
        "multipliers": {"qk": 1},
        "ramp_steps": 0,
        "ttl_steps": 0,
        "detail": "qk back",
    }


@pytest.mark.parametrize("status", [302, 403, 404, 429, 500])
async def test_any_other_answer_holds(status):
    async def answer(request: web.Request) -> web.Response:
        del request
        return web.Response(status=status, headers={"Location": "/elsewhere"})

    async with asking(answer) as (ask, count):
        assert await ask() == ("d1", f"HTTP {status}", False)
        assert count("held") == 1


async def test_no_answer_holds_and_holds_up_no_other():
    over = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        del request
        await over.wait()
        return web.Response()

    async with asking(answer, timeout=1.0) as (ask, count):
        assert await asyncio.gather(ask(), ask()) == [("d1", "no answer within 1 s", False)] * 2
        assert count("failed") == 2
        over.set()


async def test_a_webhook_that_is_not_there_holds():
    async def answer(request: web.Request) -> web.Response:
        raise AssertionError(request)

    async with asking(answer, webhook="http://user:secret@127.0.0.1:9/gate") as (ask, _):
        identity, why, passed = await ask()
    assert (identity, passed) == ("d1", False)
    assert why == "http://127.0.0.1 can't be asked: ClientConnectorError"


async def test_whatever_goes_wrong_is_no_answer_and_the_next_is_asked():
    async def answer(request: web.Request) -> web.Response:
        raise AssertionError(request)

    async with asking(answer, webhook="http://..:80/gate") as (ask, count):  # a host that has no address
        for _ in range(20):  # more than are asked at a time
            assert await ask() == ("d1", "http://.. can't be asked: UnicodeError", False)
        assert count("failed") == 20


@pytest.mark.parametrize("token", [b"two\nlines", b"", b" \n", b"nul\0", b"\xff\xfe"])
def test_a_token_that_no_header_takes_is_said_before_anything_starts(tmp_path, token):
    (tmp_path / "token").write_bytes(token)
    metrics = OwnMetrics(CollectorRegistry(), queue_depth=lambda: 0, queue_capacity=1)
    with pytest.raises(SharpwatchError, match=r"gate\.token_file .*token .*; it must hold one line with the token"):
        GateWebhook(GateConfig(webhook="http://h/", token_file=str(tmp_path / "token")), metrics)


def test_a_token_file_that_is_not_there_is_said_before_anything_starts(tmp_path):
    metrics = OwnMetrics(CollectorRegistry(), queue_depth=lambda: 0, queue_capacity=1)
    with pytest.raises(SharpwatchError, match=r"gate\.token_file .*nothing: No such file"):
        GateWebhook(GateConfig(webhook="http://h/", token_file=str(tmp_path / "nothing")), metrics)
