"""The messages that the ranks of a run exchange, and the sums they take, without one rank waiting for another.

A step's `StepMessage` is summed over ranks by an asynchronous gloo reduction, which is launched at the end of the step
and read once it has completed. All ranks act on a message `COMMIT_DELAY_STEPS` steps later.

Every reduction has the same width, because gloo ends a process whose peer sends another. The first numbers of each say
what it is and of which step, so that ranks that are out of step detect it. A rank that can't read a reduction, or
detects this, stops exchanging messages, and the others soon do too.
"""

from __future__ import annotations

import ctypes
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from sharpwatch.agent.distributed.commit import CHUNK_BYTES, COMMIT_DELAY_STEPS, Ack, Committed, TwoPhaseCommit
from sharpwatch.agent.distributed.rendezvous import Channel, collective_timeout, retire
from sharpwatch.wire import MAX_RANKS

_WAIT_SECONDS = 2.0  # that a step waits for a reduction which all ranks should have launched
_MAX_UNREAD = 128  # messages; ranks that are further apart are lost to each other
# A single wait of gloo's may run out and be repeated; the group's own timeout ends the group.
_FOREVER = timedelta(days=30)  # the timeout of the group itself: it can't be used again after one
_MODULUS = 2**20  # of the header's numbers, so that the sum of 8192 ranks' squares is exact
_LARGEST = 3.4e38  # of a loss: what single precision holds
_LOG = logging.getLogger("sharpwatch")

_Array = npt.NDArray[np.float64]


class _ReductionKind(IntEnum):
    STEP = 1
    VOTE = 2
    SUM = 3
    LEAVE = 4


@dataclass(frozen=True, slots=True)
class RankProgress:
    """How far a rank is: its step, and how many forwards it has begun of a model that all ranks call together."""

    step: int
    forwards: int = 0


@dataclass(frozen=True, slots=True)
class StepMessage:
    """The message of one step: rank 0's own numbers, and sums over all ranks.

    `tap_sums` and `loss` are those of one step, which may be an earlier one than that of `progress`. `rank_losses` [R]
    has the loss of each rank in a message that was received, infinite where it is not finite and NaN where a rank had
    none; it is None with one rank, and with more than `MAX_RANKS`.
    """

    progress: RankProgress
    clock_unix_ns: float = 0.0  # rank 0's
    due_probes: int = 0  # rank 0's, one bit each
    loss: float = 0.0  # the sum of `losses` losses
    losses: int = 0
    taps: int = 0  # ranks whose tap was read
    swallowed_errors: int = 0
    tap_sums: _Array | None = None
    rank_losses: _Array | None = None


@dataclass(frozen=True, slots=True)
class _PendingReduction:
    """A reduction under way."""

    work: Any
    numbers: _Array
    header: _Array  # that every rank should have sent
    message: int = 0  # the number of a step message

    @property
    def progress(self) -> RankProgress:
        """Of this rank when it was launched."""
        return RankProgress(*self.header[1:].astype(int).tolist())


_HEADER = 3  # numbers that say what a reduction is; their squares follow
_FIELDS = 9  # of a step message: clock, due probes, loss, losses, taps, errors, bytes left, acknowledged, objections
_CHUNK = CHUNK_BYTES // 4  # then a command's chunk, four bytes in a number; then each rank's loss; then the tap's sums


class RankGroup:
    """This process among the ranks of a run. `tap_size` numbers of a tap fit in each step message.

    `lost`: this rank takes part in nothing any more.
    """

    def __init__(self, channel: Channel, tap_size: int) -> None:
        self._group, self._arbiter = channel.group, channel.arbiter
        dist.distributed_c10d._set_pg_timeout(_FOREVER, self._group)  # noqa: SLF001 - there is no public way
        self.rank, self.size = dist.get_rank(channel.group), dist.get_world_size(channel.group)
        self.lost = False
        self._tap_size = tap_size
        # Fixed at attach, also for votes and sums: gloo ends a process whose peer sends another size.
        told = self.size if 1 < self.size <= MAX_RANKS else 0  # ranks whose own losses are told
        self._losses = slice(_FIELDS + _CHUNK, _FIELDS + _CHUNK + told)
        self._width = self._losses.stop + tap_size
        self._commit = TwoPhaseCommit(self.size, channel.arbiter)
        self._next = 0  # number of the next step message
        self._unread: deque[_PendingReduction] = deque()  # step messages
        self._read_messages: list[StepMessage] = []
        self._votes = 0
        self._abandoned: list[_PendingReduction] = []  # not waited for any more
        self._progress = RankProgress(0)  # at the last vote
        self._timeout = collective_timeout().total_seconds()

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process speaks to the daemon."""
        return self.rank == 0

    @property
    def expecting(self) -> bool:
        """Whether a command may be committed before the next step."""
        return self._commit.expecting

    def object_to(self, objects: Callable[[bytes], bool]) -> None:
        """Have `objects` asked whether this rank can't apply a command; if one rank can't, it is refused on all."""
        self._commit.objects = objects

    def propose(self, command: bytes) -> None:
        """Rank 0 has `command` for all ranks: `committed` returns it on each of them before the same step."""
        self._commit.propose(command)

    def committed(self) -> list[Committed]:
        """The commands to apply before the next step: the same on every rank.

        Waits at most 2 s, and only while a step message that may commit a command has not arrived.
        """
        try:
            deadline = time.monotonic() + _WAIT_SECONDS
            while not self.lost and self._commit.in_doubt(self._next) and self._arrived(self._unread[0], deadline):
                self._read()
            # The others may have read the message that this rank misses; the arbiter knows what they decided.
            if self._commit.in_doubt(self._next):
                self._commit.abort()
            return self._commit.committed(self._next)
        except (RuntimeError, ValueError) as error:
            self._lose(error)
            return []

    def refused(self) -> list[bytes]:
        """Rank 0's commands that can't be committed any more, as the ranks are not in lock step."""
        never = self._commit.stopped or (self.lost and not self._commit.is_scheduled)
        return self._commit.withdraw() if never else []

    def exchange(self, own: StepMessage, *, lock_step: bool = False) -> list[StepMessage]:
        """Launch this step's message; the messages that have arrived, in order.

        Every rank calls this once a step. `own.tap_sums` has as many numbers on every rank, at every step. In
        `lock_step`, where all ranks call one model together, the message of `COMMIT_DELAY_STEPS` steps before the next
        one has arrived, or the ranks are lost. Newer ones are not read then, so that all ranks act on a message at the
        same step.
        """
        number, self._next = self._next, self._next + 1
        if not self.lost:
            with self._losing():
                if lock_step:
                    due = number + 2 - COMMIT_DELAY_STEPS - self._first_unread
                    self._read_all(due, time.monotonic() + _WAIT_SECONDS, must_arrive=True)
                else:
                    self._read_all(len(self._unread), time.monotonic())
                if len(self._unread) >= _MAX_UNREAD:
                    raise ValueError(f"no messages from the other ranks for {_MAX_UNREAD} steps")
                self._unread.append(self._launch_message(own, number))
        return self._take_read()

    def vote(self, ready: bool, progress: RankProgress) -> bool:
        """Whether every rank is ready and equally far. All ranks get the same answer, after 2 s at most."""
        if self.lost:
            return False
        question = f"vote {self._votes}"
        self._votes, self._progress = self._votes + 1, progress
        try:
            vote = self._launch(_ReductionKind.VOTE, progress, np.array([float(ready)]))
            arrived = self._arrived(vote, time.monotonic() + _WAIT_SECONDS)
            # Every rank that has the sum sees the same "no", so nobody proposes "yes" to the arbiter.
            if arrived and self._payload(vote)[0] != self.size:
                return False
            if not arrived:
                self._abandoned.append(vote)
            # A rank whose wait ran out can't know whether the others' did too; the first record holds for all.
            return self._arbiter(question, "yes" if arrived else "no") == "yes"
        except (RuntimeError, ValueError) as error:
            self._lose(error)
            with suppress(RuntimeError):
                self._arbiter(question, "no")
            return False

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' `tensor`, float64 on the CPU; for places where all wait for each other anyway.

        Raises `RuntimeError` where a rank is lost.
        """
        if self.lost:
            raise RuntimeError("the other ranks are lost")
        own = tensor.detach().to("cpu", torch.float64).numpy().reshape(-1)
        summed = [own[:0]]
        try:
            deadline = time.monotonic() + self._timeout
            # Cut to the common width, as every reduction must have it.
            pieces = [own[i : i + self._width] for i in range(0, len(own), self._width)]
            # All are launched before the first is waited for, so that they overlap.
            for part in [self._launch(_ReductionKind.SUM, self._progress, piece) for piece in pieces]:
                if not self._arrived(part, deadline):
                    raise ValueError(f"no sum of a probe within {self._timeout:.0f} s")  # noqa: TRY301 - lost either way
                summed.append(self._payload(part))
        except (RuntimeError, ValueError) as error:
            self._lose(error)
            raise RuntimeError(f"the other ranks are lost: {error}") from error
        return torch.from_numpy(np.concatenate(summed)[: len(own)]).view(tensor.shape)

    def drain(self, seconds: float) -> list[StepMessage]:
        """The messages that arrive within `seconds`; then `leave`."""
        if not self.lost:
            with self._losing():
                self._read_all(len(self._unread), time.monotonic() + seconds)
            self.leave()
        return self._take_read()

    def leave(self) -> None:
        """Take part in nothing any more; reductions under way are left to themselves."""
        self.lost = True
        with suppress(RuntimeError):
            self._commit.abort()
        if all(each.work.is_completed() for each in (*self._unread, *self._abandoned)):
            retire(self._group)
            self._group = None
        else:
            _LEFT.append(self)

    @property
    def _first_unread(self) -> int:
        return self._unread[0].message if self._unread else self._next

    def _launch_message(self, own: StepMessage, number: int) -> _PendingReduction:
        ack = self._commit.outgoing(number, len(self._unread))
        payload = np.zeros(self._width)
        payload[2:6] = own.loss, own.losses, own.taps, own.swallowed_errors
        payload[7], payload[8] = ack.acknowledged, ack.objections
        if self.is_rank_zero:
            payload[0], payload[1], payload[6] = own.clock_unix_ns, own.due_probes, ack.bytes_left
            payload[_FIELDS : _FIELDS + _CHUNK] = np.frombuffer(ack.chunk.ljust(CHUNK_BYTES, b"\0"), "<u4")
        # Each rank writes in a place of its own, so that the sum has all of them.
        payload[self._losses][self.rank : self.rank + 1] = _slot(own)
        if own.tap_sums is not None:
            payload[self._losses.stop :] = own.tap_sums
        return self._launch(_ReductionKind.STEP, own.progress, payload, number)

    def _launch(
        self, kind: _ReductionKind, progress: RankProgress, payload: _Array, message: int = 0
    ) -> _PendingReduction:
        header = np.array([kind, progress.step, progress.forwards], dtype=np.float64) % _MODULUS
        numbers = np.zeros(2 * _HEADER + self._width)
        # The mean alone could hide a difference, as of ranks at steps 4 and 6 for one at 5; the squares then differ.
        numbers[: 2 * _HEADER] = *header, *header**2
        numbers[2 * _HEADER : 2 * _HEADER + len(payload)] = payload
        work = dist.all_reduce(torch.from_numpy(numbers), group=self._group, async_op=True)
        return _PendingReduction(work, numbers, header, message)

    def _arrived(self, launched: _PendingReduction, deadline: float) -> bool:
        """Whether it has completed by `deadline`, on the monotonic clock. Raises `RuntimeError` where it never will."""
        left = deadline - time.monotonic()
        if not launched.work.is_completed() and left > 0:
            with suppress(RuntimeError):  # a timeout, or a failure that the next `wait` raises
                launched.work.wait(timedelta(milliseconds=1 + int(1000 * left)))  # 0 is forever
        if not launched.work.is_completed():
            return False
        # A failed reduction counts as completed as well; this raises its error.
        launched.work.wait()
        return True

    def _payload(self, launched: _PendingReduction) -> _Array:
        """The summed numbers. Raises `ValueError` where ranks sent different kinds, or of different steps."""
        squares = launched.numbers[_HEADER : 2 * _HEADER]
        mean = launched.numbers[:_HEADER] / self.size
        if (mean != launched.header).any() or (squares != self.size * launched.header**2).any():
            raise ValueError(
                f"ranks take different steps: this one is at {_place(launched.header)}, their mean {_place(mean)}"
            )
        return launched.numbers[2 * _HEADER :]

    def _read_all(self, count: int, deadline: float, *, must_arrive: bool = False) -> None:
        """Read the oldest `count` messages, or those that arrive by `deadline`.

        Raises `ValueError` where one that `must_arrive` does not.
        """
        for _ in range(count):
            if not self._arrived(self._unread[0], deadline):
                if must_arrive:
                    step = self._unread[0].progress.step
                    raise ValueError(f"no message from the other ranks for step {step} within {_WAIT_SECONDS:.0f} s")
                return
            self._read()

    def _read(self) -> None:
        """Read the oldest message, which has arrived."""
        launched = self._unread.popleft()
        payload = self._payload(launched)
        clock, due_probes, loss, losses, taps, errors, left, acknowledged, objections = payload[:_FIELDS].tolist()
        # The last chunk of a command is padded to the common width; `left` says how many bytes are its own.
        chunk = payload[_FIELDS : _FIELDS + _CHUNK].astype("<u4").tobytes()[: min(CHUNK_BYTES, int(left))]
        summed = Ack(chunk, int(left), int(acknowledged), int(objections))
        self._commit.receive(launched.message, summed, int(clock))
        sums = payload[self._losses.stop :] if self._tap_size else None
        of_ranks = payload[self._losses]
        self._read_messages.append(
            StepMessage(
                *(launched.progress, clock, int(due_probes), loss, int(losses), int(taps), int(errors), sums),
                of_ranks if of_ranks.size else None,
            )
        )

    def _take_read(self) -> list[StepMessage]:
        messages, self._read_messages = self._read_messages, []
        return messages

    @contextmanager
    def _losing(self) -> Iterator[None]:
        """Run the body; where it fails to talk to the other ranks they are lost."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        if not self.lost:
            with suppress(RuntimeError):  # the others read it in place of this rank's next message
                self._abandoned.append(self._launch(_ReductionKind.LEAVE, self._progress, np.zeros(0)))
            self.leave()
            _LOG.warning(
                "rank %d/%d: %s. Training continues; commands will be refused on all ranks from now on",
                self.rank,
                self.size,
                error,
            )


# Freed while torch still works on them, a group and its tensors can deadlock the process; at its end it would wait.
_LEFT: list[RankGroup] = []
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_LEFT))


def _slot(own: StepMessage) -> float:
    """This rank's loss as `StepMessage.rank_losses` has it."""
    if not own.losses:
        return math.nan
    return own.loss if abs(own.loss) <= _LARGEST else math.inf  # not so for NaN


def _place(header: _Array) -> str:
    return f"step {header[1]:g}, forward {header[2]:g}"
