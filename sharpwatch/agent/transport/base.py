"""What the agent needs of a transport, and the transport of a rank that sends nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, runtime_checkable

from sharpwatch.v1 import agent_pb2


@dataclass(frozen=True, slots=True)
class Connection:
    """Whether a daemon is reached, as last reported by the courier.

    Attributes:
        address: The daemon's address; empty for a transport that has none.
        connected: Whether a session with the daemon is open.
        since_unix_ns: When `connected` last changed; 0 before the first session.
        acknowledged: Sequence number of the newest sample that the daemon has acknowledged; 0 before the first.
        reason: Why no session is open; empty if one is, or before the first report.
    """

    address: str = ""
    connected: bool = False
    since_unix_ns: int = 0
    acknowledged: int = 0
    reason: str = ""


@runtime_checkable
class Transport(Protocol):
    """Carries an agent's messages to a daemon and commands back.

    The training loop calls `send` and `receive` in every step, so they must neither block nor raise.
    """

    def greet(self, hello: agent_pb2.Hello, /) -> None:
        """Open every session with `hello`.

        `attach` calls this once. A run that takes up the state of a checkpoint calls it again with its new name and
        step, before the first sample is sent.
        """

    @property
    def dropped(self) -> Mapping[str, int]:
        """Samples lost so far, by reason."""

    @property
    def connection(self) -> Connection:
        """Whether the daemon is reached."""

    def send(self, request: agent_pb2.SessionRequest, /) -> None:
        """Queue a message, which holds one sample."""

    def receive(self) -> list[agent_pb2.SessionResponse]:
        """Return the commands that came in since the last call, oldest first."""

    def close(self) -> None:
        """Send what is queued and end the session; must return within 2 s."""


class NullTransport:
    """Sends nothing: the transport of every rank but the leading one."""

    dropped: Mapping[str, int] = MappingProxyType({})
    connection = Connection(reason="the leading rank sends for all ranks")

    def greet(self, hello: agent_pb2.Hello, /) -> None:
        """Do nothing."""

    def send(self, request: agent_pb2.SessionRequest, /) -> None:
        """Do nothing."""

    def receive(self) -> list[agent_pb2.SessionResponse]:
        """Return no command."""
        return []

    def close(self) -> None:
        """Do nothing."""
