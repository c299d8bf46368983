"""The samples of a run: each step's, and those of no step of their own."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from sharpwatch.agent.parts import Parts
from sharpwatch.agent.reporting import messages
from sharpwatch.agent.reporting.pending import PendingRecords, StepRecord
from sharpwatch.v1 import agent_pb2

_CHECKPOINTS = 256  # that one sample may tell of


class Reporter:
    """Records of steps and other news to messages down the pipe; each tells all there is to tell by then.

    `outbox` has the steps whose numbers may still be under way.
    """

    def __init__(self, parts: Parts) -> None:
        self.outbox = PendingRecords(self._send)
        self._parts = parts
        self._sequence = 0
        self._checkpoints: deque[tuple[int, str]] = deque(maxlen=_CHECKPOINTS)  # not told yet
        self._restored = False  # since the last sample

    def checkpoint(self, step: int, uri: str) -> None:
        """A checkpoint of `step` stands at `uri`."""
        self._checkpoints.append((step, uri))

    def restored(self) -> None:
        """Steps go back: what was before goes out before the mark."""
        self.outbox.flush(wait=True)
        self._restored = True

    def send_news(self, step: int, *, closing: bool = False) -> None:
        """A sample of no step of its own: results and checkpoints that would else wait, or the goodbye."""
        self._post(step, time.time_ns(), closing=closing)

    def _send(self, record: StepRecord) -> None:
        self._post(
            record.step,
            record.taken_at_unix_ns,
            loss=record.loss(),
            tap=record.reading or (None if record.tap is None else self._parts.tap.resolve(record.tap)),
            probes=record.probes,
        )

    def _post(self, step: int, taken_at_unix_ns: int, **values: Any) -> None:
        self._sequence += 1
        checkpoints = tuple(self._checkpoints)
        self._checkpoints.clear()
        restored, self._restored = self._restored, False
        sample = messages.SampleValues(
            sequence=self._sequence,
            step=step,
            taken_at_unix_ns=taken_at_unix_ns,
            health=self._health(),
            results=self._parts.control.take_results(),
            checkpoints=checkpoints,
            restored=restored,
            **values,
        )
        self._parts.pipe.send(agent_pb2.SessionRequest(sample=messages.sample(sample)))

    def _health(self) -> messages.Health:
        parts = self._parts
        dropped = dict(parts.pipe.dropped)
        if self.outbox.dropped:
            dropped["device_backlog"] = self.outbox.dropped
        return messages.Health(
            overhead_ratio=parts.sampler.overhead_ratio,
            step_seconds=parts.sampler.step_seconds,
            dropped=dropped,
            swallowed_errors=parts.border.swallowed if parts.shared is None else parts.shared.swallowed_errors,
            probe_failures=parts.probes.failures,
            lr_revision=parts.control.revision,
            multipliers=parts.control.multipliers,
        )
