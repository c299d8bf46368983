"""Two trainers under the name of one run, each with the courier that a training process has."""

from __future__ import annotations

import os
import select
import signal
import time

import pytest
from daemons import PATIENCE
from wire_trainer import BLOCKS

from sharpwatch.agent.transport.courier_handle import CourierHandle
from sharpwatch.v1 import agent_pb2, types_pb2


class Trainer:
    """The trainer's side of a run: a courier, and a sample for each step."""

    def __init__(self, address: str, attempt: str) -> None:
        rows = [types_pb2.LayerBlock(block=block, parameters=8) for block in BLOCKS]
        fields = {"protocol": 1, "training_job": "job", "run": "prod", "attempt": attempt, "host": attempt}
        fields |= {"control": "lr", "min_multiplier": 0.1, "max_multiplier": 10.0}
        self.courier = CourierHandle(address=address)
        self.courier.send_hello(agent_pb2.Hello(**fields, blocks=BLOCKS, layer_blocks=rows))
        self.commands: list[agent_pb2.SessionResponse] = []
        self.sent = 0

    def step(self, step: int) -> None:
        self.sent += 1
        sample = agent_pb2.Sample(sequence=self.sent, step=step, taken_at_unix_ns=time.time_ns(), loss=1.0)
        self.courier.send(agent_pb2.SessionRequest(sample=sample))

    def until(self, condition) -> None:
        """As a loop goes on in the meantime."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.courier.connection
            self.commands += self.courier.receive()
            select.select([], [], [], 0.01)


@pytest.fixture
def trainers(daemon):
    first, second = Trainer(daemon.grpc, "first"), Trainer(daemon.grpc, "second")
    yield first, second
    for each in (first, second):
        each.courier.close()


def test_the_second_is_told_why_and_is_watched_once_the_first_is_gone(daemon, trainers, caplog):
    first, second = trainers
    first.step(10)
    first.until(lambda: first.courier.connection.acknowledged == 1)
    second.step(1)
    second.until(lambda: second.courier.connection.refused)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"the daemon at {daemon.grpc} does not take this run, which is not watched until it does")
    assert "run prod has a live trainer already on host first" in warning
    assert "run prod has a live trainer" in second.courier.connection.reason

    assert daemon.command("lr", "set", "prod", "qk=0.5", "--reason", "sharp", "--no-wait").returncode == 0
    first.until(lambda: first.commands)
    first.step(11)
    first.until(lambda: first.courier.connection.acknowledged == 2)
    (shown,) = daemon.cli("jobs")["runs"]
    assert (shown["phase"], shown["step"], shown["attempts"]) == ("RUN_PHASE_RUNNING", 11, 1)
    assert (second.commands, second.courier.connection.connected) == ([], False)
    assert len(caplog.records) == 1  # it has tried several times

    first.courier.close()  # without a closing sample, as when the trainer is killed
    second.until(lambda: second.courier.connection.acknowledged == 1)
    assert (daemon.cli("show", "prod")["run"]["step"], second.courier.dropped) == (1, {})
    assert caplog.records[-1].getMessage() == f"the daemon at {daemon.grpc} takes this run now"


def test_a_courier_that_is_killed_does_not_lose_the_run_to_another_trainer(daemon, trainers):
    first, second = trainers
    first.step(10)
    first.until(lambda: first.courier.connection.acknowledged == 1)
    second.step(1)
    second.until(lambda: second.courier.connection.refused)
    killed = first.courier.courier_pid
    os.kill(killed, signal.SIGKILL)
    first.until(lambda: not first.courier.connection.connected)
    first.step(11)
    first.until(lambda: first.courier.connection.acknowledged == 2)
    second.until(lambda: second.courier.connection.refused)
    (shown,) = daemon.cli("jobs")["runs"]
    assert (shown["step"], shown["attempts"]) == (11, 1)
