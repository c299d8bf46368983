"""Promise: memory is bounded, in the trainer and in the courier, however long nobody takes the samples."""

from __future__ import annotations

import os
import select
import time
from pathlib import Path

from daemons import PATIENCE, free_port

from sharpwatch.agent.transport.courier_handle import CourierHandle
from sharpwatch.v1 import agent_pb2

MEBIBYTE = 2**20


def resident(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# A sample with its sketches has 30 kB, so 150 of them 4.5 MB: a trainer that kept them all would grow by twice as much.
# Counted is what malloc has handed out: resident pages come and go 3 MB at a time.
STEPS, GROWTH = 150, 2.25e6
CODE = f"""
import ctypes, gc
from sharpwatch.agent.transport.courier_handle import CourierHandle

class MallInfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = MallInfo

def allocated():
    gc.collect()
    found = mallinfo()
    return found.uordblks + found.hblkhd

transport = CourierHandle(address=os.environ["SHARPWATCH_ADDRESS"], pending_bytes=200_000)
trainer = Trainer(transport=transport, probe_every=1, probes=("gnb",))
trainer.train(50)
before = allocated()
trainer.train({STEPS})
say(growth=allocated() - before, size=trainer.transport._spool.size)
trainer.close()
"""


def test_a_trainer_whose_samples_nobody_takes(train, assert_unchanged):
    trainer = train(CODE, address=f"127.0.0.1:{free_port()}")
    assert trainer.end() == 0
    assert_unchanged(trainer)
    assert trainer.latest("size") < 200_000
    assert trainer.latest("growth") < GROWTH
    assert sum(trainer.latest("dropped").values()) == len(trainer.steps) + 1


def test_a_courier_whose_samples_nobody_takes():
    """Sixteen times what it may keep; it holds that, and what is on its way in."""
    limit, size = 4 * MEBIBYTE, 20_000
    client = CourierHandle(address=f"127.0.0.1:{free_port()}", spool_bytes=limit)
    client.send_hello(agent_pb2.Hello(run="run"))
    sent = 0

    def send_until_dropped(bytes_dropped):
        nonlocal sent
        deadline = time.monotonic() + PATIENCE
        while client.dropped.get("spool_full", 0) * size < bytes_dropped:
            assert time.monotonic() < deadline, client.dropped
            if client._spool.unsent < 10:
                sent += 1
                sample = agent_pb2.Sample(sequence=sent, step=sent)
                sample.gnb.sketches.data = bytes(size)
                client.send(agent_pb2.SessionRequest(sample=sample))
            else:
                select.select([], [], [], 0.01)
                client.flush()

    try:
        send_until_dropped(limit)
        before = resident(client.courier_pid)
        send_until_dropped(16 * limit)
        assert resident(client.courier_pid) - before < limit
    finally:
        client.close()
    assert client.dropped.keys() == {"spool_full", "undelivered"}
    assert sum(client.dropped.values()) == sent
