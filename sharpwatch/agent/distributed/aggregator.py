"""Records of steps, completed with the sums over all ranks, in the same order on each of them."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from sharpwatch.agent.distributed.channel import StepMessage
from sharpwatch.agent.losses import StepLoss
from sharpwatch.agent.reporting import StepRecord
from sharpwatch.agent.safety import ExceptionBarrier
from sharpwatch.agent.statistics.host_copy import number
from sharpwatch.agent.statistics.tap import Tap


class RecordAggregator:
    """Queues step records until this rank's values (`lag` steps later) and then the sums over all ranks arrive.

    The lag exists because a loss may come late, and an accelerator computes asynchronously. Where taps are `summed`,
    no rank has whole gradients; else rank 0's tap is everyone's, and `is_rank_zero` says whether this is rank 0.
    """

    def __init__(self, tap: Tap, barrier: ExceptionBarrier, *, summed: bool, is_rank_zero: bool, lag: int) -> None:
        self.lag = lag
        self._tap = tap
        self._barrier = barrier
        self._summed = summed
        self._is_rank_zero = is_rank_zero
        self._waiting: deque[StepRecord] = deque()  # for their own numbers
        self._sent: deque[StepRecord | None] = deque()  # one for each message under way

    def add(self, record: StepRecord) -> None:
        """The record of the newest step."""
        record.awaits_loss = False  # it waits here
        self._waiting.append(record)

    def late_loss(self, loss: StepLoss) -> None:
        """The loss of the newest record."""
        if self._waiting:
            self._waiting[-1].loss = loss

    def fill(self, message: StepMessage, *, closing: bool = False) -> StepMessage:
        """`message` with the numbers of the record that is due; one is due whenever more than `lag` wait."""
        due = len(self._waiting) > (0 if closing else self.lag)
        record = self._waiting.popleft() if due else None
        # Also None: messages and records are matched by their order alone.
        self._sent.append(record)
        return message if record is None else self._filled(message, record)

    def complete(self, summed: StepMessage, ranks: int) -> list[StepRecord]:
        """The record, if any, whose numbers `summed` has of all `ranks`; each message once, in order."""
        record = self._sent.popleft()
        if record is None:
            return []
        told_norm = number(record.loss.gradient_norm)
        # Ranks may lack a loss, so the mean is over those that had one.
        record.loss = StepLoss([(summed.loss / summed.losses, [1.0])] if summed.losses else [])
        record.rank_losses = summed.rank_losses if summed.losses else None
        if self._summed and record.tap is not None:
            # A sum that lacks one rank's part would look like a smaller gradient.
            if summed.taps == ranks and summed.tap_sums is not None:
                record.reading = self._tap.reading(summed.tap_sums.reshape(-1, self._tap.columns), told_norm)
            record.tap = None  # one rank's numbers alone would be false
        return [record]

    def remaining(self) -> list[StepRecord]:
        """All records on their way, with the numbers that this rank has by itself."""
        records = [record for record in (*self._sent, *self._waiting) if record is not None]
        self._sent.clear()
        self._waiting.clear()
        for record in records:
            if self._summed:
                record.tap = None
        return records

    def _filled(self, message: StepMessage, record: StepRecord) -> StepMessage:
        loss = record.loss.read()
        sums = None
        if record.tap is not None and (self._summed or self._is_rank_zero):
            with self._barrier.guard("adding up the tap"):  # or this rank alone would send nothing
                local = self._tap.local(record.tap)
                if self._summed:
                    sums = local.reshape(-1)
                else:
                    record.reading = self._tap.reading(local, number(record.loss.gradient_norm))
        return replace(
            message, loss=loss or 0.0, losses=int(loss is not None), taps=int(sums is not None), tap_sums=sums
        )
