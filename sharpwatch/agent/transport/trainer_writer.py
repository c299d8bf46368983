"""The courier's way back to the trainer: it never waits for a trainer that is busy with a step, and stays small."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Iterator

from sharpwatch.agent.transport.framing import frame
from sharpwatch.v1 import agent_pb2

_MAX_REASON = 300  # characters
_MAX_COMMANDS = 256  # the daemon sends again what was not answered


class TrainerWriter:
    """Writes frames to `end` as the trainer reads them; only the newest acknowledgement waits."""

    def __init__(self, end: int) -> None:
        self._end = end
        self._settled = 0
        self._told = 0
        self._refused: deque[tuple[int, str]] = deque()
        self._commands: deque[bytes] = deque(maxlen=_MAX_COMMANDS)
        self._session: agent_pb2.SessionResponse | None = None  # the newest state of the session, not told yet
        self._writing = b""
        os.set_blocking(end, False)

    def connected(self, acknowledged: int) -> None:
        """A session is open, and the daemon has acknowledged all samples up to number `acknowledged`."""
        self._session = agent_pb2.SessionResponse(welcome=agent_pb2.Welcome(acknowledged_sequence=acknowledged))
        self._flush()

    def disconnected(self, reason: str) -> None:
        """No session is open, for `reason`."""
        drain = agent_pb2.Drain(reason=reason[:_MAX_REASON])
        self._session = agent_pb2.SessionResponse(drain=drain)
        self._flush()

    def settle(self, sequence: int) -> None:
        """The courier holds nothing any more up to and with `sequence`."""
        if sequence > self._settled:
            self._settled = sequence
            self._flush()

    def refuse(self, sequence: int, code: str) -> None:
        """A sample was lost, for the reason `code`; at most one call for each sample that the trainer sent."""
        self._refused.append((sequence, code))
        self._flush()

    def command(self, payload: bytes) -> None:
        """Pass on a serialized SessionResponse with a command."""
        self._commands.append(payload)
        self._flush()

    def _flush(self) -> None:
        """Write what fits; the event loop calls again when more does."""
        try:
            while self._writing or self._take_up():
                self._writing = self._writing[os.write(self._end, self._writing) :]
        except BlockingIOError:
            asyncio.get_running_loop().add_writer(self._end, self._flush)
            return
        except OSError:  # the trainer reads no more; the end of our input says the rest
            self._writing = b""
        asyncio.get_running_loop().remove_writer(self._end)

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
        if self._told < self._settled:
            self._told = self._settled
            yield agent_pb2.SessionResponse(ack=agent_pb2.Ack(sequence=self._settled)).SerializeToString()
