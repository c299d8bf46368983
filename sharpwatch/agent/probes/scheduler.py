"""When probes run: which are due, on what the model was called with, and what is kept of the time before the step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sharpwatch.agent.parts import Parts
from sharpwatch.agent.probes.builtin import MOVING
from sharpwatch.agent.probes.context import BeforeStep
from sharpwatch.agent.probes.gradient_noise import GradientNoise, MicroBatches, averaged_over
from sharpwatch.agent.probes.runner import Captured, ProbeRun
from sharpwatch.agent.statistics.tap import PendingTap


@dataclass(slots=True)
class DueProbes:
    """The kinds due at one step, and what is kept for them of the time before it."""

    kinds: tuple[str, ...] = ()
    micro_batches: MicroBatches | None = None
    before: BeforeStep = field(default_factory=BeforeStep)


class ProbeScheduler:
    """The probes of a run, step by step; where several ranks train, those that they have agreed on."""

    def __init__(self, parts: Parts) -> None:
        self.running = False
        self._parts = parts
        self._probes = parts.probes
        self._noise = GradientNoise(parts.block_map, parts.model, parts.border, ranks=_averaged(parts))
        self._captured: Captured | None = None
        self._kinds: tuple[str, ...] = ()  # due at the next step
        self.begin()

    def begin(self) -> None:
        """The first step is next; ranks have agreed on nothing then."""
        self._kinds = self._planned() if self._parts.shared is None else ()

    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model is called in training."""
        if self._kinds:
            self._captured = self._probes.capture(args, kwargs)
        if "gnb" in self._kinds:
            self._noise.forward()

    def prepare(self) -> DueProbes:
        """The gradients of a step stand: keep what its probes need."""
        # Where all probe together, whether a batch was seen is asked of all.
        kinds = self._kinds if self._parts.together or self._captured is not None else ()
        due, guard = DueProbes(kinds, self._noise.take()), self._parts.border.guard
        moving = next((kind for kind in kinds if kind in MOVING), None)
        if moving is not None:
            with guard("copying the weights"), due.before.spending(moving):
                due.before.weights = self._probes.copy_weights()
        if "gnb" in kinds:
            with guard("sketching the gradient"), due.before.spending("gnb"):
                due.before.gradient_sketch = self._probes.sketch_gradient()
        return due

    def run(self, step: int, due: DueProbes, tap: PendingTap | None) -> ProbeRun:
        """Step `step` is taken: probe it."""
        if due.micro_batches is not None and tap is not None:
            with self._parts.border.guard("working out the gradient noise"), due.before.spending("gnb"):
                self._work_out_noise(due.micro_batches, tap, due.before)
        captured, self._captured = self._captured, None
        kinds = self._kinds if self._parts.together else due.kinds  # or one rank would wait for another
        if not kinds or not self._all_ready(captured, step) or captured is None:
            return ProbeRun()
        self.running = True
        try:
            probes = self._probes.run(kinds, captured, due.before)
        finally:
            self.running = False
        for kind in self._probes.disabled():
            self._parts.sampler.disable(kind)
        return probes

    def account(self, seconds: tuple[float, float] | None, probe_seconds: Mapping[str, float]) -> None:
        """Tell the sampler what a step took (the loop's own, the agent's), and ask what is due at the next."""
        if seconds is not None:
            own, agents = seconds
            self._parts.sampler.record(own, max(0.0, agents - sum(probe_seconds.values())), probe_seconds)
        self._kinds = self._planned()

    @property
    def wish(self) -> int:
        """What this rank finds due, a bit for each kind."""
        return sum(1 << self._probes.kinds.index(kind) for kind in self._kinds)

    def agree(self, leading: int, *, leads: bool) -> None:
        """What the leading rank found due at an earlier step: what all do together is due now; else it probes alone."""
        if self._parts.together:
            given_up = self._probes.disabled()  # since it was said, on all ranks alike
            wanted = (kind for i, kind in enumerate(self._probes.kinds) if leading >> i & 1)
            self._kinds = tuple(kind for kind in wanted if kind not in given_up)
        elif not leads:
            self._kinds = ()

    def forget(self) -> None:
        """What was seen is of no step."""
        self._captured = None
        self._noise.take()

    def close(self) -> None:
        """Take the gradients' hooks away."""
        self._noise.remove()

    def _planned(self) -> tuple[str, ...]:
        """What the sampler wants at the next step; where ranks are told first, at a later one."""
        kinds = self._parts.sampler.plan()
        if self._parts.together:
            self._parts.sampler.started(kinds)
        return kinds

    def _all_ready(self, captured: Captured | None, step: int) -> bool:
        """Whether every rank that is to take part in a probe can."""
        shared = self._parts.shared
        if shared is None or not shared.sharded:
            return captured is not None
        ready = shared.ready(captured is not None and self._probes.has_room(), step)
        if not ready:
            self._parts.sampler.missed()
        return ready

    def _work_out_noise(self, heard: MicroBatches, tap: PendingTap, before: BeforeStep) -> None:
        before.seconds["gnb"] = before.seconds.get("gnb", 0.0) + heard.seconds
        before.gradient_noise = heard.noise(self._parts.block_map, self._parts.tap.stepped(tap))


def _averaged(parts: Parts) -> int:
    """How many ranks' gradients are averaged into each that the optimizer sees; 0 where that can't be told."""
    if parts.shared is None:
        return 1
    return 0 if parts.shared.sharded else averaged_over(parts.model)
