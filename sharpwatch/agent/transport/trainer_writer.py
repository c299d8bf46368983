"""The courier's writer to the trainer.

It writes `SessionResponse` messages: commands as they came, and four that it makes itself. `Welcome`: a session with
the daemon is open. `Drain`: none is. `Refusal`: a sample was lost. `Ack`: the courier holds no sample up to its number.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Iterator

from sharpwatch.agent.transport.courier_launcher import frame
from sharpwatch.v1 import agent_pb2

_MAX_REASON = 300  # characters
_MAX_COMMANDS = 256  # the daemon sends unanswered commands again


class TrainerWriter:
    """The courier's writer to the trainer: never blocks, and bounds what waits for a trainer busy with a step.

    Of acknowledgements and session states only the newest is kept until the pipe has room.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._settled = 0
        self._settled_written = 0
        self._refused: deque[tuple[int, str]] = deque()
        self._commands: deque[bytes] = deque(maxlen=_MAX_COMMANDS)
        self._session: agent_pb2.SessionResponse | None = None  # the newest state, not yet written
        self._writing = b""
        os.set_blocking(descriptor, False)

    def connected(self, acknowledged: int) -> None:
        """Report an open session, in which the daemon has acknowledged every sample up to `acknowledged`."""
        self._session = agent_pb2.SessionResponse(welcome=agent_pb2.Welcome(acknowledged_sequence=acknowledged))
        self._flush()

    def disconnected(self, reason: str, *, refused: bool = False) -> None:
        """Report that no session is open, and why; `refused`: the daemon is there, but does not take the run."""
        drain = agent_pb2.Drain(reason=reason[:_MAX_REASON], refused=refused)
        self._session = agent_pb2.SessionResponse(drain=drain)
        self._flush()

    def settle(self, sequence: int) -> None:
        """Report that the courier holds no sample up to `sequence` any more."""
        if sequence > self._settled:
            self._settled = sequence
            self._flush()

    def refuse(self, sequence: int, code: str) -> None:
        """Report that a sample was lost, with the reason `code`; called at most once for each sample."""
        self._refused.append((sequence, code))
        self._flush()

    def command(self, payload: bytes) -> None:
        """Pass on a serialized `SessionResponse` that holds a command."""
        self._commands.append(payload)
        self._flush()

    def _flush(self) -> None:
        """Write what the pipe takes; the event loop calls this again when it takes more."""
        try:
            while self._writing or self._take_up():
                self._writing = self._writing[os.write(self._descriptor, self._writing) :]
        except BlockingIOError:
            asyncio.get_running_loop().add_writer(self._descriptor, self._flush)
            return
        except OSError:  # the trainer has closed its end; the courier learns that from its input
            self._writing = b""
        asyncio.get_running_loop().remove_writer(self._descriptor)

    def _take_up(self) -> bool:
        self._writing = b"".join(frame(payload) for payload in self._waiting())
        return bool(self._writing)

    def _waiting(self) -> Iterator[bytes]:
        while self._commands:
            yield self._commands.popleft()
        while self._refused:
            sequence, code = self._refused.popleft()
            refusal = agent_pb2.Refusal(sequence=sequence, code=code)
            yield agent_pb2.SessionResponse(refusal=refusal).SerializeToString()
        if self._session is not None:
            session, self._session = self._session, None
            yield session.SerializeToString()
        if self._settled_written < self._settled:
            self._settled_written = self._settled
            yield agent_pb2.SessionResponse(ack=agent_pb2.Ack(sequence=self._settled)).SerializeToString()
