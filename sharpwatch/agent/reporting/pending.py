"""Samples on their way out: a step's numbers may still be on the device, and its loss may come after `step()`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from sharpwatch.agent.probes.runner import ProbeRun
from sharpwatch.agent.statistics.host_copy import AsyncHostCopy
from sharpwatch.agent.statistics.tap import PendingTap, TapReading

_LIMIT = 8  # steps whose numbers may be under way
FORWARDS = 1024  # of a step, the newest, whose own losses count


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

    @property
    def ready(self) -> bool:
        """Whether every number is on the host."""
        tapped = self.tap is None or self.tap.ready
        return tapped and all(loss.ready for loss in self.losses if isinstance(loss, AsyncHostCopy))

    def loss(self) -> float | None:
        """The mean over the step's micro-batches."""
        values = [float(loss.read()) if isinstance(loss, AsyncHostCopy) else loss for loss in self.losses]
        return sum(values) / len(values) if values else None


class Losses:
    """Which step a loss belongs to.

    An observed loss wins over the model's own. Where a loss is observed with no forward since the last `step()`, the
    loop observes after stepping: the loss is that step's, whose record therefore waits for it.
    """

    def __init__(self) -> None:
        self.comes_after_step = False
        self._observed: float | AsyncHostCopy | None = None
        self._own: deque[float | AsyncHostCopy] = deque(maxlen=FORWARDS)
        self._forwards = 0
        self._sees_forwards = False

    def forward(self) -> int:
        """A training forward begins: the how many-th of its step."""
        self._forwards += 1
        self._sees_forwards = True
        return self._forwards

    def output(self, loss: Tensor) -> None:
        """The model's output carries a loss."""
        self._own.append(value_of(loss))

    def observe(self, loss: float | Tensor) -> float | AsyncHostCopy | None:
        """The loss if it belongs to the step already taken; None if it is kept for the next."""
        value = value_of(loss)
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


class PendingRecords:
    """Records in order, sent when their numbers have arrived; bounded, the oldest goes first."""

    def __init__(self, send: Callable[[StepRecord], None]) -> None:
        self.dropped = 0
        self._send = send
        self._records: deque[StepRecord] = deque()
        self._waiting: StepRecord | None = None  # the newest, where its loss may still come

    def add(self, record: StepRecord, *, wait_for_loss: bool) -> None:
        """Queue `record`; it may wait for a loss until the next step begins."""
        self._records.append(record)
        self._waiting = record if wait_for_loss else None
        if len(self._records) > _LIMIT:
            self._records.popleft()
            self.dropped += 1
        self.flush()

    def late_loss(self, loss: float | AsyncHostCopy) -> None:
        """The loss of the newest record, if it still waits."""
        if self._waiting is not None:
            self._waiting.losses = [loss]
        self.begin()

    def begin(self) -> None:
        """The next step begins: no loss comes any more for the last one."""
        self._waiting = None
        self.flush()

    def flush(self, *, wait: bool = False) -> None:
        """Send what is ready; with `wait` everything, waiting for the device."""
        while self._records and (wait or (self._records[0].ready and self._records[0] is not self._waiting)):
            self._send(self._records.popleft())


def value_of(loss: float | Tensor) -> float | AsyncHostCopy:
    """A loss as it is now; one on a device is on its way, without a sync."""
    if isinstance(loss, Tensor) and loss.device.type != "cpu":
        return AsyncHostCopy(loss)
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
