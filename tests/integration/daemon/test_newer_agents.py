"""Agents of a later version than the daemon's: what they add is ignored, what they know alone is not taken for less."""

from __future__ import annotations

import pytest
from newer import UNKNOWN, newer

from sharpwatch import wire
from sharpwatch.v1 import agent_pb2, types_pb2
from sharpwatch.v1 import operator_pb2 as pb

LATER = "0.99.0"
UNKNOWN_OUTCOME = 77


async def test_what_a_newer_agent_adds_is_ignored(daemon, build):
    trainer = daemon.connect()
    await trainer.send(newer(build.hello(agent_version=LATER, probes=["gnb", "one of tomorrow"])))
    await trainer.next("welcome")
    for sequence in range(1, 6):
        parts = build.hessian(sequence) | {"gnb": build.gnb(sequence), "direction": build.direction()}
        await trainer.send(newer(build.sample(sequence, **parts)))
    await trainer.send(newer(agent_pb2.Heartbeat()))
    await trainer.acknowledged(5)
    detail = await daemon.shown("run", lambda detail: any(one.step == 5 for one in detail.estimates))
    assert detail.run.step == 5
    assert detail.run.loss == pytest.approx(4.05)
    assert await daemon.metric("sharpwatch_samples_refused_total") is None
    await trainer.send(newer(agent_pb2.Heartbeat(last=True)))
    await trainer.call.done_writing()
    await trainer.ended()


async def test_a_message_of_a_kind_that_is_not_known_costs_nothing_else(daemon, build):
    trainer = await daemon.train(agent_version=LATER)
    await trainer.call.write(agent_pb2.SessionRequest.FromString(UNKNOWN))
    assert (await trainer.next("refusal")).sequence == 0  # of no sample
    await trainer.send(build.sample(1))
    await trainer.acknowledged(1)
    trainer.call.cancel()


async def test_an_outcome_that_is_not_known_is_told_and_its_sample_taken(daemon, build):
    trainer = await daemon.train(agent_version=LATER)
    await trainer.send(build.sample(1))
    await trainer.acknowledged(1)
    asked = pb.SetLearningRatesRequest(run="run", multipliers={"ffn": 0.5}, author="ann")
    made = (await daemon.operator.SetLearningRates(asked, metadata=daemon.credentials)).decision
    command = await trainer.next("command")
    result = types_pb2.CommandResult(command_id=command.id, outcome=UNKNOWN_OUTCOME, step=2, detail="half of it")
    await trainer.send(build.sample(2, results=[result]))
    await trainer.acknowledged(2)
    detail = await daemon.shown("run", lambda detail: detail.run.step == 2)
    assert detail.run.step == 2
    listed = await daemon.operator.ListDecisions(pb.ListDecisionsRequest(run="run"))
    (shown,) = [each for each in listed.decisions if each.id == made.id]
    assert shown.outcome == "failed"
    assert "outcome 77, which this version of the daemon does not know: half of it" in shown.detail
    trainer.call.cancel()


async def test_another_protocol_is_refused_with_the_one_that_is_spoken(daemon, build):
    trainer = daemon.connect()
    await trainer.send(build.hello(protocol=wire.PROTOCOL + 1, agent_version=LATER))
    _, reason = await trainer.ended()
    assert reason == f"malformed: protocol must be {wire.PROTOCOL}, got {wire.PROTOCOL + 1}"
