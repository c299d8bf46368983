"""The trainer's end of the pipe, with couriers that are no processes."""

from __future__ import annotations

import functools
import itertools

from interrupts import interrupted_at

from sharpwatch.agent.transport import courier_handle
from sharpwatch.agent.transport.courier_handle import CourierHandle
from sharpwatch.agent.transport.courier_launcher import Unframer
from sharpwatch.v1 import agent_pb2


class Courier:
    """Takes seven bytes at a time, and can be left, but not read once its stream has lost its place."""

    def __init__(self, started):
        self.unframer, self.payloads, self.pid, self.started = Unframer(10_000), [], 1, 0.0
        self.budget = 0
        started.append(self)

    def write(self, data):
        taken = min(7, len(data), self.budget)
        self.budget -= taken
        self.payloads += self.unframer.feed(bytes(data[:taken]))
        return taken

    def read(self):
        return b""

    def wake(self):
        pass

    def end_input(self):
        pass

    def wait_ready(self, **_):
        self.budget = 1_000

    def leave(self, **_):
        pass


def sequences(courier):
    """Of the samples that have come whole; each message is one that was sent."""
    hello, *samples = [agent_pb2.SessionRequest.FromString(payload) for payload in courier.payloads] or [None]
    assert hello is None or hello.hello.run == "r"
    return [request.sample.sequence for request in samples]


def test_an_interrupt_anywhere_in_a_send_loses_and_breaks_nothing(monkeypatch):
    ends = set()
    for number in itertools.count():
        started = []
        monkeypatch.setattr(courier_handle, "CourierProcess", lambda _, started=started: Courier(started))
        client = CourierHandle(address="127.0.0.1:1")
        client.send_hello(agent_pb2.SessionRequest(hello=agent_pb2.Hello(run="r")).hello)
        for sequence in range(1, 6):
            if started:
                started[-1].budget = 40  # a part of what there is
            request = agent_pb2.SessionRequest(sample=agent_pb2.Sample(sequence=sequence, loss=sequence))
            if sequence == 3:
                interrupted = interrupted_at(courier_handle, number, functools.partial(client.send, request))
            else:
                client.send(request)
        client._await_end = lambda *_: None
        client.close()
        delivered = [sequences(courier) for courier in started]
        # Each courier has what its trainer keeps, in order; the last has all that came before the interrupt, too.
        assert all(seen == sorted(set(seen)) for seen in delivered)
        assert delivered[-1] in ([1, 2, 3, 4, 5], [1, 2, 4, 5])
        assert interrupted or delivered == [[1, 2, 3, 4, 5]]
        ends.add((len(started), 3 in delivered[-1]))
        if not interrupted:
            break
    assert ends == {(1, False), (1, True)}  # not queued yet; after it: the courier is never lost
