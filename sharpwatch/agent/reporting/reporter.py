"""Samples on their way to the daemon: the record of each step, its loss, and news that belong to no step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sharpwatch.agent.control.controller import Controller
from sharpwatch.agent.probes.budget import OverheadBudget
from sharpwatch.agent.probes.runner import ProbeFailure, ProbeRun
from sharpwatch.agent.reporting import messages
from sharpwatch.agent.statistics.host_copy import AsyncHostCopy
from sharpwatch.agent.statistics.tap import PendingTap, Tap, TapReading
from sharpwatch.agent.transport.base import Transport
from sharpwatch.v1 import agent_pb2

_MAX_RECORDS = 8  # whose numbers may be on their way from the device
_MAX_CHECKPOINTS = 256  # in one sample
MAX_FORWARDS = 1024  # of a step, the newest, whose own losses count


@dataclass(slots=True)
class StepRecord:
    """What one step brought, before it is a message."""

    step: int
    taken_at_unix_ns: int
    tap: PendingTap | None  # None: it could not be read
    probes: ProbeRun
    losses: list[float | AsyncHostCopy] = field(default_factory=list)
    reading: TapReading | None = None  # of all ranks, in place of `tap`
    restored: bool = False  # the first since the run was put back
    awaits_loss: bool = False  # until the next step begins

    @property
    def ready(self) -> bool:
        """Whether every number is on the host."""
        tapped = self.tap is None or self.tap.ready
        return tapped and all(loss.ready for loss in self.losses if isinstance(loss, AsyncHostCopy))

    def loss(self) -> float | None:
        """The mean over the step's micro-batches."""
        values = [float(loss.read()) if isinstance(loss, AsyncHostCopy) else loss for loss in self.losses]
        return sum(values) / len(values) if values else None

    def late_loss(self, loss: float | AsyncHostCopy) -> None:
        """Take the loss that came after the step, if it is still awaited."""
        if self.awaits_loss:
            self.losses = [loss]
        self.awaits_loss = False


class LossTracker:
    """Tells which step a loss belongs to.

    An observed loss wins over the model's own. Where a loss is observed with no forward since the last `step()`, the
    loop observes after stepping: the loss is that step's, whose record therefore waits for it.
    """

    def __init__(self) -> None:
        self.comes_after_step = False
        self._observed: float | AsyncHostCopy | None = None
        self._own: deque[float | AsyncHostCopy] = deque(maxlen=MAX_FORWARDS)
        self._forwards = 0
        self._sees_forwards = False

    def forward(self) -> int:
        """A training forward begins; how many there were since the last step, with this one."""
        self._forwards += 1
        self._sees_forwards = True
        return self._forwards

    def output(self, output: Any) -> None:
        """Keep the loss that the model's `output` carries, if any."""
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._own.append(_value_of(loss))

    def observe(self, loss: float | Tensor) -> float | AsyncHostCopy | None:
        """The loss if it belongs to the step already taken; None if it is kept for the next."""
        value = _value_of(loss)
        if self._sees_forwards and self._forwards == 0:
            self.comes_after_step = True
            return value
        self._observed = value
        return None

    def take(self) -> list[float | AsyncHostCopy]:
        """The losses of the step just taken."""
        losses = list(self._own) if self._observed is None else [self._observed]
        self._own.clear()
        self._observed, self._forwards = None, 0
        return losses


class Reporter:
    """Sends the records of steps, in order and as their numbers arrive, and other news, over `transport`.

    The queue of records is bounded: when full, the oldest is dropped. Each sample carries all events pending by then.

    Args:
        transport: takes the samples.
        tap: makes a reading of what a record has of it.
        control: its results and multipliers are in the samples.
        budget: its overhead is.
        failures: the failures of probes, now.
        swallowed_errors: how many errors were swallowed, now.
    """

    def __init__(  # noqa: PLR0913 - all that a sample contains
        self,
        transport: Transport,
        *,
        tap: Tap,
        control: Controller,
        budget: OverheadBudget,
        failures: Callable[[], Sequence[ProbeFailure]],
        swallowed_errors: Callable[[], int],
    ) -> None:
        self._transport = transport
        self._tap = tap
        self._control = control
        self._budget = budget
        self._failures = failures
        self._swallowed_errors = swallowed_errors
        self._records: deque[StepRecord] = deque()
        self._dropped = 0
        self._sequence = 0
        self._checkpoints: deque[tuple[int, str]] = deque(maxlen=_MAX_CHECKPOINTS)  # not sent yet
        self._restored = False  # since the last sample

    def checkpoint(self, step: int, uri: str) -> None:
        """There is a checkpoint of `step` at `uri`."""
        self._checkpoints.append((step, uri))

    def restored(self) -> None:
        """The run was put back: send what was before, and mark the next sample."""
        self.flush(wait=True)
        self._restored = True

    def add(self, record: StepRecord) -> None:
        """Queue `record`; where it awaits a loss, no further than until the next step begins."""
        if record.restored:
            self.restored()
        self._records.append(record)
        if len(self._records) > _MAX_RECORDS:
            self._records.popleft()
            self._dropped += 1
        self.flush()

    def next_step(self) -> None:
        """The next step begins: no loss comes any more for the last one."""
        if self._records:
            self._records[-1].awaits_loss = False
            self.flush()

    def flush(self, *, wait: bool = False) -> None:
        """Send the records that are ready; with `wait` all of them, waiting for the device."""
        while self._records and (wait or (not self._records[0].awaits_loss and self._records[0].ready)):
            record = self._records.popleft()
            tap = record.reading or (None if record.tap is None else self._tap.resolve(record.tap))
            self._send(record.step, record.taken_at_unix_ns, loss=record.loss(), tap=tap, probes=record.probes)

    def send_news(self, step: int, *, closing: bool = False) -> None:
        """Send a sample that is no step's: results and checkpoints that would else wait, or the goodbye."""
        self._send(step, time.time_ns(), closing=closing)

    def _send(self, step: int, taken_at_unix_ns: int, **values: Any) -> None:
        checkpoints = tuple(self._checkpoints)
        self._checkpoints.clear()
        restored, self._restored = self._restored, False
        sample = messages.SampleValues(
            sequence=self._sequence + 1,
            step=step,
            taken_at_unix_ns=taken_at_unix_ns,
            health=self._health(),
            results=self._control.take_results(),
            checkpoints=checkpoints,
            restored=restored,
            **values,
        )
        request = agent_pb2.SessionRequest(sample=messages.sample(sample))
        self._sequence += 1  # only now: a signal handler that raises before leaves no gap
        self._transport.send(request)

    def _health(self) -> messages.Health:
        dropped = dict(self._transport.dropped)
        if self._dropped:
            dropped["device_backlog"] = self._dropped
        return messages.Health(
            overhead_ratio=self._budget.overhead_ratio,
            step_seconds=self._budget.step_seconds,
            dropped=dropped,
            swallowed_errors=self._swallowed_errors(),
            probe_failures=self._failures(),
            lr_revision=self._control.revision,
            multipliers=self._control.multipliers,
        )


def _value_of(loss: float | Tensor) -> float | AsyncHostCopy:
    """A loss as it is now; one on a device is copied without a sync."""
    if isinstance(loss, Tensor) and loss.device.type != "cpu":
        return AsyncHostCopy(loss)
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
