"""A bounded queue of samples that were not acknowledged yet, which keeps the events of samples it has to drop.

Trainer and courier have one each. The trainer's holds what is lost if the courier dies, the courier's what the daemon
has not journalled. Events must survive their sample: command results, checkpoints saved and deleted, and the flags
`closing` and `restored`. A dropped sample passes them on to the next one.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from sharpwatch.v1 import agent_pb2, types_pb2

MAX_EVENTS = 256  # of a kind in one sample, the daemon's limit; beyond it the oldest are dropped


@dataclass(frozen=True, slots=True)
class SpooledRequest:
    """A sample as the daemon gets it: a serialized `SessionRequest`. `eventful`: it holds events."""

    sequence: int
    payload: bytes
    eventful: bool


class Spool:
    """Unacknowledged samples in the order of their numbers: first those already sent, then those not yet sent.

    Where it holds more than `limit_bytes` (`overfull`), the owner drops samples.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.newest = 0  # highest sequence number put in so far
        self.size = 0  # bytes held
        self._limit = limit_bytes
        self._sent: OrderedDict[int, SpooledRequest] = OrderedDict()
        self._unsent: OrderedDict[int, SpooledRequest] = OrderedDict()
        self._stranded = agent_pb2.Sample()  # events of dropped samples, for the next one put in

    def __len__(self) -> int:
        return len(self._sent) + len(self._unsent)

    @property
    def unsent(self) -> int:
        """How many samples were not sent yet."""
        return len(self._unsent)

    @property
    def sent(self) -> int:
        """How many samples were sent and not answered yet."""
        return len(self._sent)

    @property
    def overfull(self) -> bool:
        """Whether a sample must be dropped; the newest one never is."""
        # The newest stays even if it is larger than the limit: events of the others have moved into it.
        return self.size > self._limit and len(self) > 1

    @property
    def settled(self) -> int:
        """The highest sequence number such that no sample up to it is held."""
        for entries in (self._sent, self._unsent):
            if entries:
                return next(iter(entries)) - 1
        return self.newest

    def put(self, sample: agent_pb2.Sample, payload: bytes) -> bool:
        """Add a sample with its serialized `SessionRequest`; returns False, and does not, if it is not the newest."""
        if sample.sequence <= self.newest:
            return False
        self.newest = sample.sequence
        self._store(self._unsent, SpooledRequest(sample.sequence, payload, has_events(sample)))
        stranded, self._stranded = self._stranded, agent_pb2.Sample()
        self._carry(stranded, self._unsent)
        return True

    def next(self) -> SpooledRequest | None:
        """Return the oldest unsent sample and count it as sent; None if there is none."""
        if not self._unsent:
            return None
        sequence, entry = self._unsent.popitem(last=False)
        self._sent[sequence] = entry
        return entry

    def rewind(self) -> None:
        """Count every sample as unsent, for a new receiver."""
        # Sent samples are all older than the unsent ones, so the order by number is kept.
        self._sent.update(self._unsent)
        self._sent, self._unsent = OrderedDict(), self._sent

    def settle(self, sequence: int) -> None:
        """Remove every sample up to `sequence`: they have arrived."""
        for entries in (self._sent, self._unsent):
            while entries and next(iter(entries)) <= sequence:
                self._forget(entries)

    def refuse(self, sequence: int, *, keep_events: bool) -> bool:
        """Remove the sent sample `sequence`; returns False if it is not held.

        With `keep_events` its events go to the first unsent sample.
        """
        entry = self._sent.pop(sequence, None)
        if entry is None:
            return False
        self.size -= len(entry.payload)
        if keep_events and entry.eventful:
            self._carry(_sample(entry), self._unsent)
        return True

    def release_sent(self) -> int | None:
        """Remove the oldest sent sample with its events; returns its number, or None if no sample was sent."""
        return self._forget(self._sent).sequence if self._sent else None

    def drop_oldest(self) -> int:
        """Remove the oldest sample, pass its events on to the next one, and return its number."""
        entry = self._forget(self._sent or self._unsent)
        if entry.eventful:
            self._carry(_sample(entry), self._sent or self._unsent)
        return entry.sequence

    def _store(self, entries: OrderedDict[int, SpooledRequest], entry: SpooledRequest) -> None:
        replaced = entries.get(entry.sequence)
        self.size += len(entry.payload) - (0 if replaced is None else len(replaced.payload))
        entries[entry.sequence] = entry

    def _forget(self, entries: OrderedDict[int, SpooledRequest]) -> SpooledRequest:
        _, entry = entries.popitem(last=False)
        self.size -= len(entry.payload)
        return entry

    def _carry(self, events: agent_pb2.Sample, entries: OrderedDict[int, SpooledRequest]) -> None:
        """Add `events` to the first of `entries`, or keep them for the next sample that is put in."""
        if not has_events(events):
            return
        if not entries:
            _add_events(self._stranded, events, before=False)
            return
        first = next(iter(entries.values()))
        sample = _sample(first)
        _add_events(sample, events, before=True)
        payload = agent_pb2.SessionRequest(sample=sample).SerializeToString()
        self._store(entries, SpooledRequest(first.sequence, payload, eventful=True))


def has_events(sample: agent_pb2.Sample) -> bool:
    """Whether `sample` holds events, which must not be lost with it."""
    listed = sample.results or sample.checkpoints or sample.deleted_checkpoints
    return bool(listed or sample.closing or sample.restored)


def without_arrays(sample: agent_pb2.Sample) -> agent_pb2.Sample:
    """A copy of `sample` without its tap and probes, for a sample that is too large to send."""
    lean = agent_pb2.Sample()
    lean.CopyFrom(sample)
    for name in ("tap", "gnb", "direction"):
        lean.ClearField(name)
    return lean


def _sample(entry: SpooledRequest) -> agent_pb2.Sample:
    return agent_pb2.SessionRequest.FromString(entry.payload).sample


def _add_events(sample: agent_pb2.Sample, events: agent_pb2.Sample, *, before: bool) -> None:
    first, second = (events, sample) if before else (sample, events)
    results = [*first.results, *second.results][-MAX_EVENTS:]
    checkpoints, deleted = _checkpoints(first, second)
    del sample.results[:], sample.checkpoints[:], sample.deleted_checkpoints[:]
    sample.results.extend(results)
    sample.checkpoints.extend(checkpoints[-MAX_EVENTS:])
    sample.deleted_checkpoints.extend(deleted[-MAX_EVENTS:])
    sample.closing = sample.closing or events.closing
    sample.restored = sample.restored or events.restored


def _checkpoints(first: agent_pb2.Sample, second: agent_pb2.Sample) -> tuple[list[types_pb2.Checkpoint], list[str]]:
    """The checkpoints that two samples tell of together, and the URIs of those that are gone."""
    last = second.step if second.restored else math.inf  # those of later steps were undone
    undone = [each.uri for each in first.checkpoints if each.step > last]
    saved = {each.uri for each in second.checkpoints}
    deleted = [uri for uri in (*first.deleted_checkpoints, *undone) if uri not in saved]
    gone = {*deleted, *second.deleted_checkpoints}
    kept = [each for each in first.checkpoints if each.uri not in gone | saved]
    return [*kept, *second.checkpoints], [*deleted, *second.deleted_checkpoints]
