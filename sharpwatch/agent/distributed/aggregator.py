"""A step's record where several ranks train: summed over them on its way out, on all of them in the same order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from sharpwatch.agent.distributed.channel import RankGroup, RankProgress, StepMessage
from sharpwatch.agent.distributed.commit import COMMIT_DELAY_STEPS
from sharpwatch.agent.reporting.pending import StepRecord
from sharpwatch.agent.safety.exception_barrier import ExceptionBarrier
from sharpwatch.agent.statistics.host_copy import AsyncHostCopy
from sharpwatch.agent.statistics.tap import Tap

_CLOSING = 1.0  # seconds for the last words


class RecordAggregator:
    """Records that wait: `lag` steps for their own numbers (a loss may come late, a device is behind), then for others.

    `sharded`: no rank has whole parameters, so that all probe together. `summed`: nor whole gradients, so that taps
    must be added up; else rank 0's is everyone's. `in_step`: all call the model together, and a step of theirs is over
    for none before it has begun for all.
    """

    def __init__(  # noqa: PLR0913 - what ranks have found out of each other at attach
        self,
        ranks: RankGroup,
        tap: Tap,
        border: ExceptionBarrier,
        *,
        sharded: bool,
        summed: bool,
        in_step: bool,
        lag: int,
    ) -> None:
        self.ranks = ranks
        self.sharded = sharded
        self.clock = 0  # rank 0's when all knew of the message taken last; unix ns
        self.swallowed_errors = 0  # of all ranks
        self.kinds = 0  # that rank 0 has found due, for all to probe after the next step
        self._summed = summed
        self._in_step = in_step
        self._forwards = 0
        self._tap = tap
        self._border = border
        self._lag = lag
        self._unsaid: deque[StepRecord] = deque()
        self._said: deque[StepRecord | None] = deque()
        self._kinds: deque[int] = deque([0] * (COMMIT_DELAY_STEPS - 1))  # of the words of the last steps

    def forward(self) -> None:
        """The model is called in training."""
        self._forwards += self._in_step  # else ranks may differ in it

    def take(self) -> list[tuple[bytes, bool]]:
        """Messages of rank 0's whose time has come, with whether all ranks take them; else none does."""
        messages = []
        for settled in self.ranks.take():
            if settled.taken:
                self.clock = settled.clock_unix_ns
            messages += [(message, settled.taken) for message in _apart(settled.message)]
        return messages

    def ready(self, own: bool, step: int) -> bool:
        """Whether every rank is ready to probe after `step`."""
        return self.ranks.all(own, RankProgress(step, self._forwards))

    def end(
        self, record: StepRecord, *, messages: Sequence[bytes], kinds: int, swallowed_errors: int
    ) -> list[StepRecord]:
        """The step of `record` is over; `messages` and `kinds` are rank 0's, for all. The records complete by now."""
        if messages:
            self.ranks.send(_joined(messages))
        self._unsaid.append(record)
        due = self._unsaid.popleft() if len(self._unsaid) > self._lag else None
        place = RankProgress(record.step, self._forwards)
        own = StepMessage(place, time.time_ns(), kinds, swallowed_errors=swallowed_errors)
        records = self._say(due, own, in_step=self._in_step)
        self.kinds = self._kinds.popleft() if self._in_step and not self.ranks.lost else 0
        return records

    def late_loss(self, loss: float | AsyncHostCopy) -> None:
        """The loss of the newest record."""
        if self._unsaid:
            self._unsaid[-1].losses = [loss]

    def leave(self, step: int) -> list[StepRecord]:
        """The records that are complete within a second, then the others as this rank knows them; the end."""
        records = []
        for _ in range(self._lag):
            due = self._unsaid.popleft() if self._unsaid else None
            records += self._say(due, StepMessage(RankProgress(step, self._forwards), time.time_ns()))
        records += [record for word in self.ranks.finish(_CLOSING) for record in self._of(word)]
        return records + self._alone()

    def _say(self, due: StepRecord | None, own: StepMessage, *, in_step: bool = False) -> list[StepRecord]:
        self._said.append(due)
        words = self.ranks.agree(self._with(own, due), in_step=in_step)
        records = [record for word in words for record in self._of(word)]
        return records + self._alone() if self.ranks.lost else records

    def _of(self, word: StepMessage) -> list[StepRecord]:
        """The record, if any, that `word` completes."""
        self.swallowed_errors = word.swallowed_errors
        if self._in_step:
            self._kinds.append(word.kinds)
        record = self._said.popleft()
        return [] if record is None else [self._completed(record, word)]

    def _with(self, own: StepMessage, record: StepRecord | None) -> StepMessage:
        """`own` with the numbers of `record`."""
        if record is None:
            return own
        values = [loss.read().item() if isinstance(loss, AsyncHostCopy) else loss for loss in record.losses]
        sums = None
        if record.tap is not None and (self._summed or self.ranks.leads):
            with self._border.guard("adding up the tap"):  # or this rank alone would say nothing
                local = self._tap.local(record.tap)
                if self._summed:
                    sums = local.reshape(-1)
                else:
                    record.reading = self._tap.reading(local)
        return replace(own, loss=sum(values), losses=len(values), taps=int(sums is not None), sums=sums)

    def _completed(self, record: StepRecord, word: StepMessage) -> StepRecord:
        record.losses = [word.loss / word.losses] if word.losses else []
        if self._summed and record.tap is not None:
            if word.taps == self.ranks.size and word.sums is not None:
                record.reading = self._tap.reading(word.sums.reshape(-1, self._tap.columns))
            record.tap = None  # one rank's numbers alone would be false
        return record

    def _alone(self) -> list[StepRecord]:
        """All that waits, with what this rank knows by itself."""
        records = [record for record in (*self._said, *self._unsaid) if record is not None]
        self._said.clear()
        self._unsaid.clear()
        for record in records:
            if self._summed:
                record.tap = None
        return records


def _joined(messages: Sequence[bytes]) -> bytes:
    return b"".join(len(each).to_bytes(4, "little") + each for each in messages)


def _apart(joined: bytes) -> list[bytes]:
    messages = []
    while joined:
        size = int.from_bytes(joined[:4], "little")
        messages.append(joined[4 : 4 + size])
        joined = joined[4 + size :]
    return messages
