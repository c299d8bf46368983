"""A running daemon asks the gate before a policy raises rates, and no sample waits for the answer."""

from __future__ import annotations

import asyncio
import contextlib

from aiohttp import web

from sharpwatch.v1 import operator_pb2 as pb
from sharpwatch.v1 import types_pb2

POLICIES = """
policies:
  - name: faster
    match: {{foreign: Idle}}
    mode: enforce
    action: {{kind: scale_lr, factor: 2, ttl_steps: 500}}
gate: {{webhook: "{url}"}}
"""
IDLE = {
    "version": "4",
    "alerts": [
        {
            "status": "firing",
            "labels": {"alertname": "Idle", "run": "run"},
            "startsAt": "2026-11-30T10:00:00Z",
            "endsAt": "0001-01-01T00:00:00Z",
            "fingerprint": "f1",
        }
    ],
}


class Questions:
    """A gate: its questions as they come; each waits until it is told the status of its answer."""

    def __init__(self) -> None:
        self.got: asyncio.Queue[dict] = asyncio.Queue()
        self.answers: asyncio.Queue[int] = asyncio.Queue()

    async def take(self, request: web.Request) -> web.Response:
        self.got.put_nowait((await request.json())["decision"])
        return web.Response(status=await self.answers.get())

    async def next(self) -> dict:
        async with asyncio.timeout(30):
            return await self.got.get()


@contextlib.asynccontextmanager
async def gate():
    """The gate, and the configuration that has it."""
    questions = Questions()
    app = web.Application()
    app.router.add_post("/", questions.take)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield questions, POLICIES.format(url=f"http://127.0.0.1:{runner.addresses[0][1]}/")
    await runner.cleanup()


async def told(daemon, trainer, build) -> None:
    """A run at step 1 on which an alert fires that its policy answers with a raise, at step 2."""
    await trainer.send(build.sample(1))
    await trainer.acknowledged(1)
    headers = dict([daemon.credentials[0]])
    async with daemon.web.post(f"http://{daemon.http}/api/v1/alerts", json=IDLE, headers=headers) as response:
        assert response.status == 200
    await trainer.send(build.sample(2))


async def decisions(daemon) -> list[pb.Decision]:
    return list((await daemon.operator.ListDecisions(pb.ListDecisionsRequest(run="run"))).decisions)[::-1]


async def test_a_raise_is_sent_at_a_sample_after_the_answer(running, build):
    async with gate() as (questions, policies), running(policies=policies) as daemon:
        trainer = await daemon.train()
        await told(daemon, trainer, build)
        question = await questions.next()
        assert set(question["multipliers"].values()) == {2.0}
        for sequence in range(3, 20):  # while there is no answer, samples are journalled, and nothing is sent
            await trainer.send(build.sample(sequence))
        await trainer.acknowledged(19)
        assert await decisions(daemon) == []
        questions.answers.put_nowait(204)
        await daemon.metric_reaches('sharpwatch_gate_answers_total{result="passed"}', 1)
        await trainer.send(build.sample(20))
        command = await trainer.next("command")
        assert (command.id, set(command.set_multipliers.multipliers.values())) == (question["id"], {2.0})
        (made,) = await decisions(daemon)
        assert made.detail.endswith("; the gate let it pass: HTTP 204")
        assert questions.got.empty()


async def test_a_raise_that_the_gate_holds_is_refused(running, build):
    async with gate() as (questions, policies), running(policies=policies) as daemon:
        trainer = await daemon.train()
        await told(daemon, trainer, build)
        question = await questions.next()
        questions.answers.put_nowait(403)
        await daemon.metric_reaches('sharpwatch_gate_answers_total{result="held"}', 1)
        await trainer.send(build.sample(3))
        await trainer.acknowledged(3)
        await daemon.shown("run", lambda detail: detail.run.step == 3)
        (made,) = await decisions(daemon)
        assert (made.id, made.outcome, made.guard) == (question["id"], "refused", "gate: HTTP 403")


async def test_a_restart_before_the_answer_neither_loses_nor_repeats_the_raise(running, build):
    async with gate() as (questions, policies):
        async with running(policies=policies) as daemon:
            trainer = await daemon.train()
            await told(daemon, trainer, build)
            await trainer.acknowledged(2)
            lost = await questions.next()
        questions.answers.put_nowait(200)  # to a daemon that is gone
        async with running(policies=policies) as daemon:
            trainer = await daemon.train()
            await trainer.send(build.sample(3))
            question = await questions.next()
            questions.answers.put_nowait(200)
            await daemon.metric_reaches('sharpwatch_gate_answers_total{result="passed"}', 1)
            await trainer.send(build.sample(4))
            command = await trainer.next("command")
            result = types_pb2.CommandResult(command_id=command.id, outcome=types_pb2.COMMAND_OUTCOME_APPLIED, step=5)
            for sequence in range(5, 9):
                await trainer.send(build.sample(sequence, results=[result] if sequence == 5 else []))
            await trainer.acknowledged(8)
            (made,) = await decisions(daemon)
        assert lost["id"] != question["id"] == command.id == made.id
        assert made.outcome == "applied"
        assert "command" not in {kind for kind, received in trainer.received.items() if received}
