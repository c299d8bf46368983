"""The processes of one run: what they agree on, and what they add up, without one that waits for another.

A step's `StepMessage` is summed over ranks by an asynchronous gloo reduction, launched at the end of the step and
read once it has completed: no step waits for it. All ranks act on a message `COMMIT_DELAY_STEPS` messages later.

Everything said between ranks is a reduction of one width, for gloo ends a process whose peer sends another. Each says
in its first numbers what it is and of which step, so that ranks that have come apart read it. A rank that can't read,
or reads that, is lost to sharpwatch: it agrees to nothing any more, and soon neither do the others.
"""

from __future__ import annotations

import ctypes
import logging
import secrets
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from sharpwatch.agent.distributed.commit import CHUNK_BYTES, COMMIT_DELAY_STEPS, Ack, Arbiter, Committed, TwoPhaseCommit
from sharpwatch.agent.distributed.rendezvous import patience
from sharpwatch.errors import AttachError

_AT_MOST = 2.0  # seconds that a step waits for what all should have launched
_BEHIND = 128  # words under way, and the run's ranks are not in step
_FOREVER = timedelta(days=30)  # the group's own patience: an operation that it gives up can't be taken up again
_MODULUS = 2**20  # so that the squares of 8192 ranks' numbers add up exactly
_LOG = logging.getLogger("sharpwatch")

_Array = npt.NDArray[np.float64]


class _ReductionKind(IntEnum):
    WORD = 1
    VOTE = 2
    SUM = 3
    FAREWELL = 4


@dataclass(frozen=True, slots=True)
class RankProgress:
    """Where a rank is: its step, and how often it has called a model that all call together."""

    step: int
    forwards: int = 0


@dataclass(frozen=True, slots=True)
class StepMessage:
    """What the ranks say at the end of a step: rank 0's own numbers, and sums over all.

    `sums` are a tap's, of the step of `losses`, which may be an earlier one than that of `place`.
    """

    place: RankProgress
    clock_unix_ns: float = 0.0  # rank 0's
    kinds: int = 0  # rank 0's: probes that are due, one bit each
    loss: float = 0.0  # the sum of `losses` losses
    losses: int = 0
    taps: int = 0  # ranks whose tap was read
    swallowed_errors: int = 0
    sums: _Array | None = None


@dataclass(frozen=True, slots=True)
class Channel:
    """The gloo group that ranks talk over, and the referee where one question has one answer."""

    group: Any
    referee: Arbiter


@dataclass(frozen=True, slots=True)
class _PendingReduction:
    """A reduction under way."""

    work: Any
    numbers: _Array
    same: _Array  # what every rank should have put first
    number: int = 0  # a word's


_SAME = 3  # numbers that say what a reduction is; their squares follow
_NUMBERS = 8  # of a word: clock, kinds, loss, losses, taps, errors, bytes left, standing
_PIECE = CHUNK_BYTES // 4  # then a message's, four bytes in each; then the tap's sums


class RankGroup:
    """This process among `size`, as rank 0 to `size` - 1."""

    def __init__(self, channel: Channel, entries: int) -> None:
        self._group, self._referee = channel.group, channel.referee
        dist.distributed_c10d._set_pg_timeout(_FOREVER, self._group)  # noqa: SLF001 - there is no public way
        self.rank, self.size = dist.get_rank(channel.group), dist.get_world_size(channel.group)
        self.lost = False
        self._entries = entries
        self._room = _NUMBERS + _PIECE + entries
        self._consent = TwoPhaseCommit(self.size, channel.referee)
        self._next = 0  # number of the coming word
        self._words: deque[_PendingReduction] = deque()
        self._read_words: list[StepMessage] = []
        self._votes = 0
        self._given_up: list[_PendingReduction] = []  # what is not waited for any more
        self._place = RankProgress(0)  # of the last vote
        self._patience = patience().total_seconds()

    @property
    def leads(self) -> bool:
        """Whether this process speaks to the daemon."""
        return self.rank == 0

    @property
    def expecting(self) -> bool:
        """Whether a message may be taken before the next step."""
        return self._consent.expecting

    def send(self, message: bytes) -> None:
        """Rank 0 has `message` for all ranks: `take` hands it out on each before the same step."""
        if not self.lost:
            self._consent.send(message)

    def take(self) -> list[Committed]:
        """What is settled of messages before the step to come: the same on every rank.

        Waits 2 s at most, and only where a word that is still under way may say that it is to be taken now.
        """
        try:
            deadline = time.monotonic() + _AT_MOST
            while not self.lost and self._consent.unclear(self._next) and self._come(self._words[0], deadline):
                self._read()
            if self._consent.unclear(self._next):
                self._consent.give_up()
            return self._consent.settle(self._next)
        except (RuntimeError, ValueError) as error:
            self._part(error)
            return []

    def agree(self, own: StepMessage, *, in_step: bool = False) -> list[StepMessage]:
        """Launch the word of this step; those that have come, in order.

        Every rank calls this once a step. `own.sums` has as many numbers on every rank, at every step. Where ranks are
        `in_step`, all calling one model together, the message of `COMMIT_DELAY_STEPS` steps before the next has come,
        or the ranks are lost; newer ones are not read, so that what follows from a word does at the same step on all.
        """
        number, self._next = self._next, self._next + 1
        if not self.lost:
            with self._parting():
                late = number + 1 - COMMIT_DELAY_STEPS
                if not in_step:
                    self._read_all(time.monotonic(), len(self._words))
                elif not self._read_all(time.monotonic() + _AT_MOST, late - self._first + 1):
                    raise ValueError(f"the word of {COMMIT_DELAY_STEPS - 1} steps ago has not come")
                if len(self._words) >= _BEHIND:
                    raise ValueError(f"words of {_BEHIND} steps have not come")
                self._words.append(self._say(own, number))
        return self._handed_on()

    def all(self, ready: bool, place: RankProgress) -> bool:
        """Whether every rank is ready, and at the same place; all come to the same, and wait for it 2 s at most."""
        if self.lost:
            return False
        name = f"vote {self._votes}"
        self._votes, self._place = self._votes + 1, place
        try:
            vote = self._launch(_ReductionKind.VOTE, place, np.array([float(ready)]))
            came = self._come(vote, time.monotonic() + _AT_MOST)
            if came and self._payload(vote)[0] != self.size:
                return False
            if not came:
                self._given_up.append(vote)
            return self._referee(name, "yes" if came else "no") == "yes"
        except (RuntimeError, ValueError) as error:
            self._part(error)
            with suppress(RuntimeError):
                self._referee(name, "no")
            return False

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' `tensor`, float64 on the CPU; for places where all wait for each other anyway.

        Raises `RuntimeError` where a rank is lost.
        """
        if self.lost:
            raise RuntimeError("the other ranks are lost")
        own = tensor.detach().to("cpu", torch.float64).numpy().reshape(-1)
        summed = [own[:0]]
        try:
            deadline = time.monotonic() + self._patience
            pieces = [own[i : i + self._room] for i in range(0, len(own), self._room)]
            for part in [self._launch(_ReductionKind.SUM, self._place, piece) for piece in pieces]:
                self._come(part, deadline, or_fail="a sum of a probe has not come")
                summed.append(self._payload(part))
        except (RuntimeError, ValueError) as error:
            self._part(error)
            raise RuntimeError(f"the other ranks are lost: {error}") from error
        return torch.from_numpy(np.concatenate(summed)[: len(own)]).view(tensor.shape)

    def finish(self, seconds: float) -> list[StepMessage]:
        """The words that come within `seconds`; then `leave`."""
        if not self.lost:
            with self._parting():
                self._read_all(time.monotonic() + seconds, len(self._words))
            self.leave()
        return self._handed_on()

    def leave(self) -> None:
        """Agree to nothing more; what is under way is left to itself."""
        self.lost = True
        with suppress(RuntimeError):
            self._consent.give_up()
        if all(each.work.is_completed() for each in (*self._words, *self._given_up)):
            _IDLE.append(self._group)
            self._group = None
        else:
            _LEFT.append(self)

    @property
    def _first(self) -> int:
        """Number of the oldest word under way."""
        return self._words[0].number if self._words else self._next

    def _say(self, own: StepMessage, number: int) -> _PendingReduction:
        said = self._consent.say(number, len(self._words))
        payload = np.zeros(self._room)
        payload[2:6] = own.loss, own.losses, own.taps, own.swallowed_errors
        payload[7] = said.standing
        if self.leads:
            payload[0], payload[1], payload[6] = own.clock_unix_ns, own.kinds, said.left
            payload[_NUMBERS : _NUMBERS + _PIECE] = np.frombuffer(said.piece.ljust(CHUNK_BYTES, b"\0"), "<u4")
        if own.sums is not None:
            payload[_NUMBERS + _PIECE :] = own.sums
        return self._launch(_ReductionKind.WORD, own.place, payload, number)

    def _launch(self, what: _ReductionKind, place: RankProgress, payload: _Array, number: int = 0) -> _PendingReduction:
        same = np.array([what, place.step, place.forwards], dtype=np.float64) % _MODULUS
        numbers = np.zeros(2 * _SAME + self._room)
        numbers[: 2 * _SAME] = *same, *same**2
        numbers[2 * _SAME : 2 * _SAME + len(payload)] = payload
        work = dist.all_reduce(torch.from_numpy(numbers), group=self._group, async_op=True)
        return _PendingReduction(work, numbers, same, number)

    def _come(self, launched: _PendingReduction, deadline: float, *, or_fail: str = "") -> bool:
        """Whether it has come by `deadline`, on the monotonic clock.

        Raises `RuntimeError` where it never will, `ValueError` with `or_fail` where it has not.
        """
        left = deadline - time.monotonic()
        if not launched.work.is_completed() and left > 0:
            with suppress(RuntimeError):  # it waits in vain, or has failed: the next `wait` says so
                launched.work.wait(timedelta(milliseconds=1 + int(1000 * left)))  # 0 is forever
        if not launched.work.is_completed():
            if or_fail:
                raise ValueError(or_fail)
            return False
        launched.work.wait()
        return True

    def _payload(self, launched: _PendingReduction) -> _Array:
        """The summed numbers. Raises `ValueError` where ranks have said different things."""
        squares = launched.numbers[_SAME : 2 * _SAME]
        mean = launched.numbers[:_SAME] / self.size
        if (mean != launched.same).any() or (squares != self.size * launched.same**2).any():
            raise ValueError(
                f"ranks take different steps: this one is at {_place(launched.same)}, their mean {_place(mean)}"
            )
        return launched.numbers[2 * _SAME :]

    def _read_all(self, deadline: float, count: int) -> bool:
        """Read the oldest `count` words; False where they have not come by `deadline`."""
        for _ in range(count):
            if not self._come(self._words[0], deadline):
                return False
            self._read()
        return True

    def _read(self) -> None:
        """Read the oldest word, which has come."""
        launched = self._words.popleft()
        payload = self._payload(launched)
        clock, kinds, loss, losses, taps, errors, left, standing = payload[:_NUMBERS].tolist()
        piece = payload[_NUMBERS : _NUMBERS + _PIECE].astype("<u4").tobytes()[: min(CHUNK_BYTES, int(left))]
        self._consent.hear(launched.number, Ack(piece, int(left), int(standing)), int(clock))
        place = RankProgress(*launched.same[1:].astype(int).tolist())
        sums = payload[_NUMBERS + _PIECE :] if self._entries else None
        self._read_words.append(StepMessage(place, clock, int(kinds), loss, int(losses), int(taps), int(errors), sums))

    def _handed_on(self) -> list[StepMessage]:
        words, self._read_words = self._read_words, []
        return words

    @contextmanager
    def _parting(self) -> Iterator[None]:
        """The body talks to the others; where that fails they are lost, and it ends there."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            self._part(error)

    def _part(self, error: Exception) -> None:
        if not self.lost:
            with suppress(RuntimeError):  # read by the others in place of what they say next
                self._given_up.append(self._launch(_ReductionKind.FAREWELL, self._place, np.zeros(0)))
            self.leave()
            _LOG.warning(
                "rank %d of %d has lost the others and agrees to nothing any more: %s", self.rank, self.size, error
            )


_IDLE: list[Any] = []  # groups, to be freed when all ranks have met again, and so all have left
# Freed while torch still works on them, a group and its tensors can deadlock the process; at its end it would wait.
_LEFT: list[RankGroup] = []
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_LEFT))


def _place(same: _Array) -> str:
    return f"step {same[1]:g}, forward {same[2]:g}"


@dataclass(frozen=True, slots=True)
class Introduction:
    """What a rank says of itself at attach: an `error`, or what must be `equal` on all, and its `own` part."""

    error: str = ""
    equal: Mapping[str, object] = field(default_factory=dict)
    own: object = None


def join(mine: Introduction) -> tuple[Channel, list[Introduction]]:
    """A channel between all ranks of the run, and what each says of itself.

    Raises `AttachError` on every rank where one of them failed, has other settings, or did not come while the loop's
    own collectives would have waited for it.
    """
    size, wait = dist.get_world_size(), patience()
    try:
        group = dist.new_group(backend="gloo", timeout=wait)
        gathered: list[Any] = [None] * size
        dist.all_gather_object(gathered, (secrets.token_hex(8), mine), group=group)
    except (RuntimeError, ValueError) as error:
        seconds = int(wait.total_seconds())
        raise AttachError(
            f"not all {size} ranks called attach within {seconds} s (all must, not rank 0 alone): {error}"
        ) from error
    _free_idle()
    introductions = [each for _, each in gathered]
    try:
        _compare(introductions)
    except AttachError:
        _IDLE.append(group)
        raise
    return Channel(group, _referee(gathered[0][0])), introductions


def _referee(watch: str) -> Arbiter:
    """The store that all ranks have met at: it asks rank 0's host, and raises `RuntimeError` where that is gone."""
    store = dist.distributed_c10d._get_default_store()  # noqa: SLF001 - torch gives it nowhere else

    def settle(name: str, proposal: str) -> str:
        return str(store.compare_set(f"sharpwatch/{watch}/{name}", "", proposal).decode())

    return settle


def _compare(introductions: Sequence[Introduction]) -> None:
    """Raises `AttachError` where a rank has failed, or has other settings."""
    for rank, each in enumerate(introductions):
        if each.error:
            raise AttachError(f"rank {rank}: {each.error}")
        for name, value in each.equal.items():
            if value != introductions[0].equal[name]:
                raise AttachError(f"{name}: rank 0 has {introductions[0].equal[name]!r}, rank {rank} {value!r}")


def _free_idle() -> None:
    """Free the groups of watches that have ended."""
    while _IDLE:
        with suppress(RuntimeError, ValueError, AssertionError):  # the loop has destroyed all groups itself
            dist.destroy_process_group(_IDLE.pop())
