"""Two-phase commit of commands, over the messages that ranks exchange once a step.

Two-phase commit. Rank 0 streams a command in its per-step messages. A rank that has received all of it acknowledges in
each following message. The first message acknowledged by every rank fixes the commit step: every rank applies the
command `COMMIT_DELAY_STEPS` steps later. A rank commits only if it has by then read every message in which
it acknowledged. A rank that can't apply a command objects as it acknowledges it, and all ranks refuse it in place of
applying it.

Where ranks run in lock step these messages have arrived. A rank that still misses one is in doubt: the others may have
read it. Messages alone can't settle that (it is the two generals' problem), so each rank records its decision with an
arbiter before it acts, and the first record holds for all. After an abort no rank commits a command any more: ranks
that are so far apart are not in lock step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

COMMIT_DELAY_STEPS = 3  # from the message that every rank acknowledges to the step before which the command is applied
# Every step's message has room for a chunk, whether there is a command or not, so it is small.
CHUNK_BYTES = 512  # of a command in one message
_MAX_UNREAD = 2  # messages under way to a rank that keeps up
_ABORT = "abort"
_STOPPED = -(2**40)  # in place of an acknowledgement: makes the sum over ranks negative

Arbiter = Callable[[str, str], str]  # (question, proposed answer): the answer that was proposed first


@dataclass(frozen=True, slots=True)
class Ack:
    """The part of a step message: rank 0's chunk, how many bytes it and the rest have, and the command acknowledged."""

    chunk: bytes = b""
    bytes_left: int = 0
    acknowledged: int = 0  # its number; 0 for none, negative from a rank that has stopped
    objections: int = 0  # ranks that can't apply it


@dataclass(frozen=True, slots=True)
class Committed:
    """A command to apply now, and rank 0's clock in the message that every rank acknowledged.

    `objected`: to refuse now, as a rank can't apply it.
    """

    command: bytes
    clock_unix_ns: int
    objected: bool = False


class TwoPhaseCommit:
    """One rank's side of the protocol, among `size` ranks. Messages are numbered as the steps since attach.

    `stopped`: a command was aborted, and none is committed any more. `objects`: asked once for each command, before it
    is acknowledged, whether this rank can't apply it.
    """

    def __init__(self, size: int, arbiter: Arbiter) -> None:
        self.stopped = False
        self.objects: Callable[[bytes], bool] = lambda _: False
        self._size = size
        self._arbiter = arbiter
        self._number = 1  # of the command that is under way, or comes next
        self._queue: deque[bytes] = deque()  # rank 0's, the first of them under way
        self._sent = 0  # bytes of it
        self._received = b""
        self._is_complete = False
        self._acknowledged_in: deque[int] = deque()  # messages, not read yet, in which this rank acknowledged
        self._commit_step: int | None = None
        self._clock = 0
        self._objects: bool | None = None  # this rank to the command under way; None before it was asked
        self._objected = False  # any rank, in the message that all acknowledged

    @property
    def expecting(self) -> bool:
        """Whether a command may be committed before the next step."""
        return self._is_complete and not self.stopped

    @property
    def is_scheduled(self) -> bool:
        """Whether the commit step of a command is known."""
        return self._commit_step is not None

    def propose(self, command: bytes) -> None:
        """Rank 0 has `command` for all ranks."""
        self._queue.append(command)

    def withdraw(self) -> list[bytes]:
        """Rank 0's commands that are not committed; they never will be."""
        commands = list(self._queue)
        self._queue.clear()
        return commands

    def outgoing(self, message: int, unread: int) -> Ack:
        """The part of message number `message`, while `unread` earlier ones are under way to this rank."""
        if self.stopped:
            return Ack(acknowledged=_STOPPED)
        chunk, left = b"", 0
        if self._queue:
            left = len(self._queue[0]) - self._sent
            chunk = self._queue[0][self._sent : self._sent + CHUNK_BYTES]
            self._sent += len(chunk)
        # A rank that lags would acknowledge what it can't act on in time, and put all ranks in doubt.
        if not self._is_complete or unread > _MAX_UNREAD:
            return Ack(chunk, left)
        self._acknowledged_in.append(message)
        if self._objects is None:
            self._objects = self.objects(self._received)
        return Ack(chunk, left, self._number, int(self._objects))

    def receive(self, message: int, summed: Ack, clock_unix_ns: int) -> None:
        """Read message number `message`: rank 0's chunk and clock, and the sum of what each rank acknowledges."""
        if self.stopped:
            return
        if self._acknowledged_in and self._acknowledged_in[0] == message:
            self._acknowledged_in.popleft()
        # A rank adds the command's number or 0, or a large negative number; the sum is this only if all acknowledged.
        if self._commit_step is None and summed.acknowledged == self._size * self._number:
            self._commit_step, self._clock = message + COMMIT_DELAY_STEPS, clock_unix_ns
            self._objected = summed.objections > 0
        if summed.acknowledged < 0:
            self.abort()
        if summed.bytes_left:
            self._received += summed.chunk
            self._is_complete = summed.bytes_left <= CHUNK_BYTES

    def in_doubt(self, step: int) -> bool:
        """Whether a message that is still under way may commit a command before `step`."""
        oldest = self._acknowledged_in[0] if self._acknowledged_in else step
        return self._commit_step is None and oldest + COMMIT_DELAY_STEPS <= step

    def abort(self) -> None:
        """Stop committing, unless another rank has decided for the command that this rank acknowledged."""
        # Without an acknowledgement of this rank no message can have committed the command: there is nothing to ask.
        may_commit = self._commit_step is not None or self._acknowledged_in
        self._commit_step, self.stopped = None, True  # also where the arbiter is gone
        answer = self._record(_ABORT) if may_commit else _ABORT
        if answer != _ABORT:
            self._commit_step, self.stopped = int(answer), False

    def committed(self, step: int) -> list[Committed]:
        """The command to apply before `step`, if any."""
        if self._commit_step is None or self._commit_step > step:
            return []
        if self._record(str(self._commit_step)) == _ABORT:
            self._commit_step, self.stopped = None, True
            return []
        return [self._next_command()]

    def _next_command(self) -> Committed:
        """End the command that is committed; the next one's turn."""
        committed = Committed(self._received, self._clock, self._objected)
        if self._queue:
            self._queue.popleft()
        self._number += 1
        self._sent, self._received, self._is_complete, self._commit_step = 0, b"", False, None
        self._objects, self._objected = None, False
        self._acknowledged_in.clear()
        return committed

    def _record(self, decision: str) -> str:
        return self._arbiter(f"command {self._number}", decision)
