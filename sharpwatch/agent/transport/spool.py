"""Samples that nobody has acknowledged yet: in order, bounded, and none of their events lost.

Both ends of the pipe keep one: the trainer for what the courier might lose by dying, the courier for what the daemon
has not journalled. Events are what must not go with a dropped sample: command results, checkpoints, the flags that
say it is the last or that a checkpoint was restored.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from sharpwatch.v1 import agent_pb2

MAX_EVENTS = 256  # of a kind in one sample, the daemon's limit; past it the oldest go


@dataclass(frozen=True, slots=True)
class SpooledRequest:
    """A sample as it goes over the wire: a serialized SessionRequest."""

    sequence: int
    payload: bytes
    eventful: bool


class Spool:
    """Unacknowledged samples by sequence: first those sent, then those not."""

    def __init__(self, limit_bytes: int) -> None:
        self.newest = 0  # highest sequence that ever came in
        self.size = 0  # bytes held
        self._limit = limit_bytes
        self._sent: OrderedDict[int, SpooledRequest] = OrderedDict()
        self._unsent: OrderedDict[int, SpooledRequest] = OrderedDict()
        self._stranded = agent_pb2.Sample()  # events that wait for a sample to go with

    def __len__(self) -> int:
        return len(self._sent) + len(self._unsent)

    @property
    def unsent(self) -> int:
        """Samples that still have to be sent."""
        return len(self._unsent)

    @property
    def sent(self) -> int:
        """Samples that were sent and still wait for an answer."""
        return len(self._sent)

    @property
    def overfull(self) -> bool:
        """Whether something has to go; the newest sample never does."""
        return self.size > self._limit and len(self) > 1

    @property
    def settled(self) -> int:
        """Every sequence up to and with this one has left."""
        for entries in (self._sent, self._unsent):
            if entries:
                return next(iter(entries)) - 1
        return self.newest

    def put(self, sample: agent_pb2.Sample, payload: bytes) -> bool:
        """Take in the newest sample, `payload` being its serialized SessionRequest; False if it is not the newest."""
        if sample.sequence <= self.newest:
            return False
        self.newest = sample.sequence
        self._store(self._unsent, SpooledRequest(sample.sequence, payload, has_events(sample)))
        stranded, self._stranded = self._stranded, agent_pb2.Sample()
        self._carry(stranded, self._unsent)
        return True

    def next(self) -> SpooledRequest | None:
        """The oldest sample not sent; it now counts as sent."""
        if not self._unsent:
            return None
        sequence, entry = self._unsent.popitem(last=False)
        self._sent[sequence] = entry
        return entry

    def rewind(self) -> None:
        """The receiver is a new one: nothing counts as sent."""
        self._sent.update(self._unsent)
        self._sent, self._unsent = OrderedDict(), self._sent

    def settle(self, sequence: int) -> None:
        """Let all go up to and with `sequence`: they have arrived."""
        for entries in (self._sent, self._unsent):
            while entries and next(iter(entries)) <= sequence:
                self._forget(entries)

    def refuse(self, sequence: int, *, keep_events: bool) -> bool:
        """Let the sent sample `sequence` go, its events to the first that is not sent; False if it is not held."""
        entry = self._sent.pop(sequence, None)
        if entry is None:
            return False
        self.size -= len(entry.payload)
        if keep_events and entry.eventful:
            self._carry(_sample(entry), self._unsent)
        return True

    def release_sent(self) -> int | None:
        """Let the oldest sent sample go, events and all; its sequence, or None where nothing is sent."""
        return self._forget(self._sent).sequence if self._sent else None

    def drop_oldest(self) -> int:
        """Let the oldest sample go, its events to the one after it; its sequence."""
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
        """Give `events` to the first of `entries`, or keep them for the next sample that comes."""
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
    """Whether `sample` holds what must not be lost with it."""
    return bool(sample.results or sample.checkpoints or sample.closing or sample.restored)


def without_arrays(sample: agent_pb2.Sample) -> agent_pb2.Sample:
    """`sample` without its statistics and probes, where those are what makes it too large."""
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
    checkpoints = [*first.checkpoints, *second.checkpoints][-MAX_EVENTS:]
    del sample.results[:], sample.checkpoints[:]
    sample.results.extend(results)
    sample.checkpoints.extend(checkpoints)
    sample.closing = sample.closing or events.closing
    sample.restored = sample.restored or events.restored
