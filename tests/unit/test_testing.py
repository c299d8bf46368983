"""`sharpwatch.testing`: what users test their loops with."""

from __future__ import annotations

import doctest

import pytest
import torch
from stand_ins import Net

import sharpwatch
import sharpwatch.testing
from sharpwatch.agent.transport.base import NullTransport, Transport
from sharpwatch.testing import InMemoryTransport
from sharpwatch.v1 import types_pb2


@pytest.fixture
def transport():
    return InMemoryTransport()


@pytest.fixture
def train(transport):
    """Train a watched model for a number of steps, and close the watch."""

    def run(steps, **options):
        model = Net().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"training_job": "test", "probes": (), "transport": transport} | options
        with sharpwatch.attach(model, optimizer, **options) as watch:
            for _ in range(steps):
                model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))[1].backward()
                optimizer.step()
        return watch

    return run


def test_the_example_runs():
    assert doctest.testmod(sharpwatch.testing).attempted
    assert not doctest.testmod(sharpwatch.testing).failed


@pytest.mark.parametrize("kind", [InMemoryTransport, NullTransport])
def test_both_are_transports(kind):
    assert isinstance(kind(), Transport)


def test_what_the_agent_sends_is_kept(transport, train):
    assert transport.hello is None
    train(2, run="named")
    assert transport.hello is transport.hellos[-1]
    assert transport.hello.run == "named"
    assert [(sample.step, sample.closing) for sample in transport.samples] == [(1, False), (2, False), (2, True)]
    assert transport.closed
    assert transport.results == []


def test_multipliers_are_applied_with_all_that_was_asked(transport, train):
    name = transport.set_multipliers({"emb": 0.25}, revision=5, ramp_steps=2, apply_at_step=2, reason="spike")
    train(4)
    (result,) = transport.results
    assert (result.command_id, result.outcome, result.step) == (name, "applied", 2)
    assert [round(sample.health.multipliers["emb"], 3) for sample in transport.samples[:4]] == [1, 0.5, 0.25, 0.25]
    assert transport.samples[-1].health.lr_revision == 5


def test_a_rollback_reaches_the_callback(transport, train):
    asked = []
    name = transport.roll_back(1, "file:///one", skip=(2, 4), id="back", apply_at_step=2, reason="spike")
    train(3, on_rollback=asked.append)
    assert asked == [sharpwatch.RollbackRequest(1, "file:///one", (2, 4), "spike")]
    assert [(result.command_id, result.outcome, result.step) for result in transport.results] == [(name, "applied", 2)]


def test_any_command_may_be_sent_and_each_has_an_id_of_its_own(transport, train):
    first = transport.command(set_multipliers=types_pb2.MultiplierSet(multipliers={"emb": 99.0}))
    second = transport.command(expires_at_unix_ns=1, set_multipliers=types_pb2.MultiplierSet())
    train(3)
    assert first != second
    assert {result.command_id: result.outcome for result in transport.results} == {first: "refused", second: "expired"}
    assert "lr_bounds" in transport.results[0].detail


def test_samples_that_a_test_says_were_dropped_are_reported(transport, train):
    transport.dropped["outbox_full"] = 3
    train(1)
    assert dict(transport.samples[-1].health.dropped) == {"outbox_full": 3}


def test_one_transport_serves_one_watch_after_the_other(transport, train):
    train(1, run="first")
    transport.set_multipliers({"emb": 0.5})
    train(2, run="second")
    assert [hello.run for hello in transport.hellos] == ["first", "second"]
    assert [result.outcome for result in transport.results] == ["applied"]
    assert transport.closed
