from __future__ import annotations

import asyncio
import os
import random
import signal

from sharpwatch.agent.transport.courier import FIRST_WAIT_SECONDS, LAST_WAIT_SECONDS, Backoff, Courier
from sharpwatch.agent.transport.framing import frame
from sharpwatch.agent.transport.trainer_writer import TrainerWriter
from sharpwatch.common.endpoint import Destination
from sharpwatch.v1 import agent_pb2


def test_waits_double_up_to_the_last_and_fall_back():
    backoff = Backoff(random.Random(0))  # noqa: S311 - a test's own
    full = [min(FIRST_WAIT_SECONDS * 2**i, LAST_WAIT_SECONDS) for i in range(10)]
    waits = [backoff.next() for _ in full]
    assert all(wait / 2 <= got <= wait for wait, got in zip(full, waits, strict=True))
    assert full[-1] == LAST_WAIT_SECONDS < 5
    backoff.reset()
    assert backoff.next() <= FIRST_WAIT_SECONDS


def test_waits_differ_between_couriers():
    firsts = {Backoff(random.Random(seed)).next() for seed in range(20)}  # noqa: S311 - a test's own
    assert len(firsts) > 10


async def test_a_delivery_that_fails_on_something_unforeseen_ends_the_courier(monkeypatch):
    """Its end is what the trainer's pipe sees, and starts a new one on; a courier that stays up silent is not."""
    monkeypatch.setattr(signal, "alarm", lambda _: 0)  # the real one would end the test's own process
    monkeypatch.setattr(Courier, "_session", broken)
    inward, outward = os.pipe()
    courier = Courier(Destination("127.0.0.1:1", "", None, 2**20, os.getpid()), TrainerWriter(outward))
    trainer = asyncio.StreamReader()
    trainer.feed_data(frame(agent_pb2.SessionRequest(hello=agent_pb2.Hello(run="run")).SerializeToString()))
    await asyncio.wait_for(courier.run(trainer), timeout=30)  # the trainer's side never ended
    os.close(inward)
    os.close(outward)


async def broken(*_):
    raise ValueError("on purpose")
