"""A probe is one registration with the agent and one with the daemon; nothing else knows the kinds of probe by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stand_ins import Net

import sharpwatch
from sharpwatch.agent.probes import builtin
from sharpwatch.agent.probes.context import Probe, ProbeSpec
from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.detection.run_detection import RunDetection
from sharpwatch.daemon.estimation import estimator
from sharpwatch.daemon.estimation.hessian import run_by_run
from sharpwatch.daemon.estimation.windows import ReadingSpec
from sharpwatch.daemon.ingest import probes as decoders
from sharpwatch.daemon.ingest.hello import Attempt, read_hello
from sharpwatch.daemon.ingest.samples import read_sample
from sharpwatch.daemon.runs.run import Run
from sharpwatch.errors import AttachError, ProbeError
from sharpwatch.testing import InMemoryTransport
from sharpwatch.v1 import agent_pb2

FIELD = "preconditioned"  # of the wire, which the made-up probe takes over


class LargestGradient(Probe):
    """The largest entry of the gradient that was stepped on, and the rows that it was given."""

    _largest = 0.0

    def before_step(self, step):
        """Reads the gradients."""
        del step
        self._largest = max(float(parameter.grad.abs().max()) for parameter in self.context.model.parameters())

    def run(self, rows, step):
        """As `Probe.run`."""
        del step
        with rows as batch:
            return batch.rows, self._largest


def encode(report, seconds):
    rows, largest = report
    return agent_pb2.PreconditionedProbe(rows=rows, ratio=largest, seconds=seconds)


def refuse(optimizers):
    del optimizers
    raise ProbeError("no optimizer will do")


def largest(hello, window):
    del hello
    values = [value for _, value in window]
    return {("stability_ratio", "", "made_up"): Estimate(max(values), 0.0, len(values), "made_up", window[-1][0])}


class Controller:
    """What a run asks of one to be shown."""

    mode, newest_revision, multipliers, incidents, incidents_in_all = "observe", 0, {}, (), 0
    detection = RunDetection("run", (("emb", ""),), np.ones(1, dtype=np.int64), lambda: "id")


def train(name, steps=3):
    torch.manual_seed(3)
    model = Net().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    transport, seen = InMemoryTransport(), []
    with sharpwatch.attach(
        model, optimizer, training_job="made up", transport=transport, probe_every=1, probes=(name,)
    ):
        for seed in range(steps):
            tokens = torch.randint(11, (16, 5), generator=torch.Generator().manual_seed(seed))
            model(tokens, tokens.roll(1, 1))[1].backward()
            seen.append(max(float(parameter.grad.abs().max()) for parameter in model.parameters()))
            optimizer.step()
            optimizer.zero_grad()
    return transport, seen


@pytest.fixture
def made_up(monkeypatch):
    spec = ProbeSpec(name=FIELD, runner=LargestGradient, encode=encode)
    monkeypatch.setitem(builtin.PROBES, FIELD, spec)
    monkeypatch.setitem(decoders.DECODERS, FIELD, lambda message, _: message.ratio)
    of_window = ReadingSpec(name=FIELD, window=2, estimators=("made_up",), estimate=run_by_run(FIELD, largest))
    monkeypatch.setitem(estimator.PROBES, FIELD, of_window)


@pytest.mark.usefixtures("made_up")
def test_a_made_up_probe_runs_travels_and_is_estimated():
    transport, expected = train(FIELD)
    hello = read_hello(agent_pb2.Hello.FromString(transport.hello.SerializeToString()))
    samples = [
        agent_pb2.Sample.FromString(each.SerializeToString()) for each in transport.samples if each.HasField(FIELD)
    ]
    assert [sample.preconditioned.rows for sample in samples] == [16 // Probe.share] * 3
    assert not any(sample.health.probe_failures for sample in samples)
    run = Run(Attempt(hello, b""), Controller(), now=0.0)
    for sample in samples:
        run.update(read_sample(hello, sample), 0.0, 0.0)
    request = run.request()
    assert list(request.windows) == [FIELD]
    run.take_estimates(request, estimator.estimate_all([request], "cpu")[0])
    run.publish()
    (shown,) = run.snapshot.estimates.items()
    assert shown[0] == ("stability_ratio", "", "made_up")
    assert shown[1].value == pytest.approx(max(expected[-2:]))
    assert (shown[1].draws, shown[1].step) == (2, 3)


def test_a_registered_name_is_one_that_attach_takes(monkeypatch):
    model = Net().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(AttachError, match="'made_up'"):
        sharpwatch.attach(model, optimizer, training_job="made up", probes=("made_up",))
    spec = ProbeSpec(name="made_up", runner=LargestGradient, encode=encode, check=refuse)
    monkeypatch.setitem(builtin.PROBES, "made_up", spec)
    with pytest.raises(AttachError, match="no optimizer will do"):
        sharpwatch.attach(model, optimizer, training_job="made up", probes=("made_up",))


def test_agent_wire_and_daemon_know_the_same_probes():
    fields = agent_pb2.Sample.DESCRIPTOR.fields
    of_wire = {field.name for field in fields if field.message_type and field.message_type.name.endswith("Probe")}
    assert set(builtin.PROBES) == of_wire
    assert set(decoders.DECODERS) == of_wire
    assert set(estimator.PROBES) == of_wire
    for registry in (builtin.PROBES, estimator.PROBES):
        assert all(spec.name == name for name, spec in registry.items())
    assert all(spec.window == 0 or spec.estimate is not None for spec in estimator.PROBES.values())
