from __future__ import annotations

import asyncio
import os
import signal

from sharpwatch.agent.transport.base import Destination
from sharpwatch.agent.transport.courier import Courier
from sharpwatch.agent.transport.courier_launcher import frame
from sharpwatch.agent.transport.trainer_writer import TrainerWriter
from sharpwatch.v1 import agent_pb2


async def test_a_delivery_that_fails_on_something_unforeseen_ends_the_courier(monkeypatch):
    """Its end is what the trainer's pipe sees, and starts a new one on; a courier that stays up silent is not."""
    monkeypatch.setattr(signal, "alarm", lambda _: 0)  # the real one would end the test's own process
    monkeypatch.setattr(Courier, "_session", broken)
    inward, outward = os.pipe()
    courier = Courier(Destination(("127.0.0.1:1",), "", None, 2**20, os.getpid()), TrainerWriter(outward))
    trainer = asyncio.StreamReader()
    trainer.feed_data(frame(agent_pb2.SessionRequest(hello=agent_pb2.Hello(run="run")).SerializeToString()))
    await asyncio.wait_for(courier.run(trainer), timeout=30)  # the trainer's side never ended
    os.close(inward)
    os.close(outward)


async def broken(*_):
    raise ValueError("on purpose")
