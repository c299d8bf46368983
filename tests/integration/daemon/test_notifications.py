"""A running daemon tells its webhook of an incident, of the proposal that answers it, and of the answer."""

from __future__ import annotations

import asyncio
import contextlib

from aiohttp import web

from sharpwatch import wire
from sharpwatch.v1 import operator_pb2 as pb

POLICIES = "policies: [{name: cut, match: {alert: NonFinite}, mode: advise, action: {kind: scale_lr, factor: 0.5}}]"


@contextlib.asynccontextmanager
async def webhook():
    """A receiver: its URL, the alerts that come one by one, and the status that it answers where that is not 200."""
    answers: list[int] = []
    got: asyncio.Queue[dict] = asyncio.Queue()

    async def take(request: web.Request) -> web.Response:
        for alert in (await request.json())["alerts"]:
            got.put_nowait(alert)
        return web.Response(status=answers[0] if answers else 200)

    app = web.Application()
    app.router.add_post("/", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/", got, answers
    await runner.cleanup()


async def test_what_happens_to_a_run_reaches_the_webhook(running, build):
    async with (
        webhook() as (url, got, _),
        running(policies=f'{POLICIES}\nnotifications: {{webhook: "{url}"}}') as daemon,
    ):

        async def told(name: str) -> dict:
            async with asyncio.timeout(60):
                while (alert := await got.get())["labels"]["alertname"] != name:
                    pass
            return alert

        trainer = await daemon.train("run", "run-1")
        tap = build.tap()
        tap.non_finite.CopyFrom(wire.encode([1] * 5, "int64"))
        await trainer.send(build.sample(1, tap=tap))
        proposal = await told("SharpwatchProposal")
        command, made = proposal["annotations"]["command"].rsplit(" ", 1)
        assert (command, proposal["status"]) == ("sharpwatch approve", "firing")
        await daemon.operator.RejectDecision(
            pb.RejectDecisionRequest(id=made, author="ann"), metadata=daemon.credentials
        )
        answer = await told("SharpwatchDecision")
        assert (answer["fingerprint"], answer["labels"]["outcome"]) == (made, "rejected")
        assert answer["startsAt"] == proposal["startsAt"]


async def test_a_proposal_that_could_not_be_told_is_told_after_a_restart(running, build):
    """The webhook answers 503, a proposal is made, the daemon restarts, and only then the webhook works again."""
    async with webhook() as (url, got, answers):
        policies = f'{POLICIES}\nnotifications: {{webhook: "{url}", severity: warning}}'

        async def told(name: str) -> dict:
            async with asyncio.timeout(60):
                while (alert := await got.get())["labels"]["alertname"] != name:
                    pass
            return alert

        answers.append(503)
        async with running(policies=policies) as daemon:
            trainer = await daemon.train("run", "run-1")
            tap = build.tap()
            tap.non_finite.CopyFrom(wire.encode([1] * 5, "int64"))
            await trainer.send(build.sample(1, tap=tap))
            incident = await told("NonFinite")
            proposal = await told("SharpwatchProposal")
            trainer.call.cancel()
        answers.clear()
        while not got.empty():  # all that the webhook has refused
            got.get_nowait()
        async with running(policies=policies):
            async with asyncio.timeout(60):
                first, second = await got.get(), await got.get()
        again = {alert["fingerprint"]: (alert["status"], alert["startsAt"]) for alert in (first, second)}
        assert again == {each["fingerprint"]: ("firing", each["startsAt"]) for each in (incident, proposal)}
