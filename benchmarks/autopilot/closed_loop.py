"""The product's own loop in one process: the agent's probes, the daemon's rules, the agent's multipliers.

The rules are called where the agent would send a sample, so that a run gives the same result each time; a daemon's
command comes one to three steps later (`tests/integration/test_autopilot.py` runs one).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np

from sharpwatch import wire
from sharpwatch.daemon.config.settings import AutopilotConfig, CurvatureShareConfig
from sharpwatch.daemon.decisions.autopilot import WINDOW, wanted_multipliers
from sharpwatch.daemon.records import ProbedStep
from sharpwatch.testing import InMemoryTransport
from sharpwatch.v1 import agent_pb2

LR_BOUNDS = (0.01, 16.0)


class ClosedLoop(InMemoryTransport):
    """Answers each probe by the multipliers that the autopilot wants.

    Args:
        config: Its rules.
        of_applied: Takes shares of the applied steps as they are, without the multipliers undone.

    Attributes:
        probes: How many probes came.
        probe_rows: How many rows of a batch they saw.
        probe_seconds: How long they took.
        changes: Each step at which multipliers were changed, and to what.
    """

    def __init__(self, config: AutopilotConfig, *, of_applied: bool = False) -> None:
        super().__init__()
        self._config = config
        self._of_applied = of_applied
        self._window: deque[ProbedStep] = deque(maxlen=WINDOW)
        self._in_force: dict[str, float] = {}
        self.probes = self.probe_rows = 0
        self.probe_seconds = 0.0
        self.changes: list[tuple[int, dict[str, float]]] = []

    def send_hello(self, hello: agent_pb2.Hello, /) -> None:
        """As `InMemoryTransport.send_hello`."""
        super().send_hello(hello)
        self._in_force = dict.fromkeys(hello.blocks, 1.0)

    def send(self, request: agent_pb2.SessionRequest, /) -> None:
        """Keep the sample alone, and answer its probe."""
        self.samples = [request.sample]
        if request.sample.HasField("direction"):
            self.probes += 1
            self.probe_rows += request.sample.direction.rows
            self.probe_seconds += request.sample.direction.seconds
            self._answer(request.sample)

    def _answer(self, sample: agent_pb2.Sample) -> None:
        probe = sample.direction
        parts = self._by_block(wire.decode(probe.curvature_parts, name="parts", dtype="float64", shape=(None,)), np.sum)
        if not np.isfinite([*parts.values(), probe.descent]).all():
            return
        applied = wire.decode(sample.tap.lr_multiplier, name="multiplier", dtype="float32", shape=(None,))
        multipliers = self._by_block(np.ones_like(applied) if self._of_applied else applied, np.min)
        self._window.append(ProbedStep(parts, probe.curvature, probe.descent, multipliers))
        wanted = wanted_multipliers(tuple(self._window), self._in_force, self._config, LR_BOUNDS)
        if wanted is not None:
            self._in_force = wanted
            self.changes.append((sample.step, wanted))
            self.set_multipliers(wanted, revision=len(self.changes), ramp_steps=self._config.ramp_steps)

    def _by_block(self, values: wire.Floats, reduce: Callable[[wire.Floats], float]) -> Mapping[str, float]:
        hello = self.hellos[-1]
        types = np.array([each.block for each in hello.layer_blocks])
        return {block: float(reduce(values[types == block])) for block in hello.blocks}


class LayerShares(ClosedLoop):
    """The curvature share with each block in each layer by itself; the agent sets types alone, so the loop applies it.

    Args:
        rule: The curvature share's.
    """

    def __init__(self, rule: CurvatureShareConfig) -> None:
        config = AutopilotConfig(curvature_share=rule)
        super().__init__(config)
        self._ramp = config.ramp_steps
        self._start = self._target = self._now = np.ones(0)
        self._since = 0

    def send_hello(self, hello: agent_pb2.Hello, /) -> None:
        """As `InMemoryTransport.send_hello`."""
        super().send_hello(hello)
        self._start = self._target = self._now = np.ones(len(hello.layer_blocks))

    def at(self, step: int) -> dict[str, float]:
        """By parameter the factor at a step; a fused one takes the smallest of its blocks'."""
        share = min(1.0, (step - self._since) / max(1, self._ramp))
        self._now = self._start + share * (self._target - self._start)
        found: dict[str, float] = {}
        for each, factor in zip(self.hellos[-1].layer_blocks, self._now, strict=True):
            for name in each.parameter_names:
                found[name] = min(found.get(name, math.inf), float(factor))
        return found

    def _answer(self, sample: agent_pb2.Sample) -> None:
        probe = sample.direction
        parts = wire.decode(probe.curvature_parts, name="parts", dtype="float64", shape=(None,))
        if not np.isfinite([*parts, probe.descent]).all():
            return
        names = [f"{each.layer}.{each.block}" for each in self.hellos[-1].layer_blocks]
        applied, target = (dict(zip(names, each.tolist(), strict=True)) for each in (self._now, self._target))
        found = dict(zip(names, parts.tolist(), strict=True))
        self._window.append(ProbedStep(found, probe.curvature, probe.descent, applied))
        wanted = wanted_multipliers(tuple(self._window), target, self._config, LR_BOUNDS)
        if wanted is not None:
            self._start, self._target, self._since = self._now, np.array([*wanted.values()]), sample.step
            self.changes.append((sample.step, wanted))
