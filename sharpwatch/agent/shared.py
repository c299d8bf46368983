"""A step's record where several ranks train: summed over them on its way out, on all of them in the same order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from sharpwatch.agent.border import Border
from sharpwatch.agent.outbox import StepRecord
from sharpwatch.agent.ranks import DELAY, Ranks, Word
from sharpwatch.agent.tap import Later, Tap

_CLOSING = timedelta(seconds=0.3)  # for each of the last words


@dataclass(frozen=True, slots=True)
class Heard:
    """What has come of earlier steps by now: records that are complete, and what rank 0 says to all."""

    records: Sequence[StepRecord] = ()
    messages: Sequence[bytes] = ()
    kinds: int = 0


class Shared:
    """Records that wait: `lag` steps for their own numbers (a loss may come late, a device is behind), then for others.

    `sharded`: no rank has whole parameters, so that all probe together. `summed`: nor whole gradients, so that taps
    must be added up; else rank 0's is everyone's.
    """

    def __init__(  # noqa: PLR0913 - what ranks have found out of each other at attach
        self, ranks: Ranks, tap: Tap, border: Border, *, sharded: bool, summed: bool, lag: int
    ) -> None:
        self.ranks = ranks
        self.sharded = sharded
        self.clock = 0  # rank 0's, as all have last heard it; unix ns
        self.swallowed_errors = 0  # of all ranks
        self._summed = summed
        self._tap = tap
        self._border = border
        self._lag = lag
        self._unsaid: deque[StepRecord] = deque()
        self._said: deque[StepRecord | None] = deque()

    def end(self, record: StepRecord, *, messages: Sequence[bytes], kinds: int, swallowed_errors: int) -> Heard:
        """The step of `record` is over; `messages` and `kinds` are rank 0's, to be heard by all at a later step."""
        self._unsaid.append(record)
        due = self._unsaid.popleft() if len(self._unsaid) > self._lag else None
        own = Word(record.step, time.time_ns(), kinds, swallowed_errors=swallowed_errors, messages=messages)
        return self._say(due, own)

    def late_loss(self, loss: float | Later) -> None:
        """The loss of the newest record."""
        if self._unsaid:
            self._unsaid[-1].losses = [loss]

    def rest(self, step: int) -> Heard:
        """What is complete once nothing more is under way; every rank asks after the same step."""
        heard = []
        for _ in range(self._lag + DELAY):
            if self.ranks.lost:
                break
            due = self._unsaid.popleft() if self._unsaid else None
            heard.append(self._say(due, Word(step, time.time_ns())))
        heard.append(Heard(records=self._alone()))
        return Heard(
            records=[record for each in heard for record in each.records],
            messages=[message for each in heard for message in each.messages],
        )

    def leave(self, step: int) -> Heard:
        """`rest`, without patience; then agree to nothing more."""
        self.ranks.patience = _CLOSING
        heard = self.rest(step)
        self.ranks.leave()
        return heard

    def _say(self, due: StepRecord | None, own: Word) -> Heard:
        self._said.append(due)
        word = self.ranks.agree(self._with(own, due))
        if self.ranks.lost:
            return Heard(records=self._alone())
        if word is None:
            return Heard()
        self.clock, self.swallowed_errors = int(word.clock_unix_ns), word.swallowed_errors
        record = self._said.popleft()
        records = [] if record is None else [self._completed(record, word)]
        return Heard(records, word.messages, word.kinds)

    def _with(self, own: Word, record: StepRecord | None) -> Word:
        """`own` with the numbers of `record`."""
        if record is None:
            return own
        values = [loss.read().item() if isinstance(loss, Later) else loss for loss in record.losses]
        sums = None
        if self._summed and record.tap is not None:
            with self._border.guard("adding up the tap"):  # or this rank alone would say nothing
                sums = self._tap.local(record.tap).reshape(-1)
        return replace(own, loss=sum(values), losses=len(values), taps=int(sums is not None), sums=sums)

    def _completed(self, record: StepRecord, word: Word) -> StepRecord:
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
