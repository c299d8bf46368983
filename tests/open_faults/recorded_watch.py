"""A watch at a daemon that takes every sample, and what that daemon received."""

from __future__ import annotations

import numpy as np
from daemons import ScriptedDaemon

import sharpwatch
from sharpwatch.v1 import agent_pb2, types_pb2


def values(array: types_pb2.Array) -> np.ndarray:
    """The numbers of an array on the wire."""
    return np.frombuffer(array.data, array.dtype).reshape(array.shape)


class RecordedWatch:
    """Everything that one watch says on the wire, from its Hello to its goodbye."""

    def __init__(self, daemon: ScriptedDaemon) -> None:
        self.daemon = daemon
        self.watch: sharpwatch.Watch | None = None

    def attach(self, model, optimizer, **options) -> sharpwatch.Watch:
        self.watch = sharpwatch.attach(model, optimizer, training_job="faults", address=self.daemon.address, **options)
        return self.watch

    def close(self) -> None:
        """Close the watch, and wait until all its messages have arrived."""
        self.watch.close()
        self.daemon.wait(lambda: any(sample.closing for sample in self.samples))

    @property
    def hello(self) -> agent_pb2.Hello:
        return self.daemon.hellos[0]

    @property
    def samples(self) -> list[agent_pb2.Sample]:
        return self.daemon.samples

    def probes(self, kind: str) -> list:
        """Every probe of `kind`."""
        return [getattr(sample, kind) for sample in self.samples if sample.HasField(kind)]

    def traces(self, newest: int) -> dict[str, float]:
        """By block, the mean trace over the `newest` gnb probes and their draws."""
        rows = np.mean([values(probe.traces).mean(0) for probe in self.probes("gnb")[-newest:]], axis=0)
        names = [row.block for row in self.hello.layer_blocks]
        return {block: float(sum(rows[i] for i, name in enumerate(names) if name == block)) for block in set(names)}

    @property
    def reasons(self) -> dict[str, str]:
        """Why a kind of probe did not run, as reported to the daemon."""
        failures = (failure for sample in self.samples for failure in sample.health.probe_failures)
        return {failure.probe: failure.reason for failure in failures}
