"""What the agent needs of a transport, the transport of a rank that sends nothing, and where a courier connects to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, runtime_checkable

from sharpwatch.common.endpoint import Address, parse_addresses
from sharpwatch.common.tls import Tls, tls_variables
from sharpwatch.common.token_file import read_token, token_path
from sharpwatch.errors import AttachError, TokenFileError
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
        refused: Whether the daemon is there, but does not take the run. It is asked again every few seconds.
    """

    address: str = ""
    connected: bool = False
    since_unix_ns: int = 0
    acknowledged: int = 0
    reason: str = ""
    refused: bool = False


@runtime_checkable
class Transport(Protocol):
    """Carries an agent's messages to a daemon and commands back.

    The training loop calls `send` and `receive` in every step, so they must neither block nor raise.
    """

    def send_hello(self, hello: agent_pb2.Hello, /) -> None:
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
    """Sends nothing: the transport of every rank but rank 0."""

    dropped: Mapping[str, int] = MappingProxyType({})
    connection = Connection(reason="rank 0 sends for all ranks")

    def send_hello(self, hello: agent_pb2.Hello, /) -> None:
        """Do nothing."""

    def send(self, request: agent_pb2.SessionRequest, /) -> None:
        """Do nothing."""

    def receive(self) -> list[agent_pb2.SessionResponse]:
        """Return no command."""
        return []

    def close(self) -> None:
        """Do nothing."""


_TLS_KEYS = ("ca", "cert", "key")


@dataclass(frozen=True, slots=True)
class Destination:
    """What the courier is started with.

    Attributes:
        targets: The addresses of the daemons, in the order of their shards; of one daemon for all runs, its own.
        token: The bearer token; empty for none, or for the one in `token_file`.
        tls: The PEM files; None to connect without TLS.
        spool_bytes: How many bytes of samples it keeps.
        trainer: The trainer's process id.
        token_file: A file with the token, read for each session anew; empty for none.
    """

    targets: tuple[str, ...]
    token: str
    tls: Tls | None
    spool_bytes: int
    trainer: int
    token_file: str = ""

    def to_json(self) -> str:
        """Return it as JSON for the courier's environment; every user of the machine could read its argv."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Destination:
        """Read what `to_json` returned."""
        values = json.loads(text)
        tls, targets = values.pop("tls"), values.pop("targets")
        return cls(targets=tuple(targets), tls=None if tls is None else Tls(**tls), **values)


def parse_daemon_addresses(text: str) -> tuple[Address, ...]:
    """Read the `address` given to `attach`.

    Raises:
        AttachError: It is not a valid address, nor a list of such.
    """
    try:
        return parse_addresses(text)
    except ValueError as error:
        raise AttachError(f"address: {error}") from error


def parse_tls(tls: Mapping[str, str] | None) -> Tls | None:
    """Read the `tls` option of `attach`, {"ca": PATH, "cert": PATH, "key": PATH}, each optional.

    None is what $SHARPWATCH_TLS_CA, $SHARPWATCH_TLS_CERT and $SHARPWATCH_TLS_KEY name, and no TLS without them.

    Raises:
        AttachError: A key or a value is wrong, or a file does not exist.
    """
    if tls is None and any(name.startswith("SHARPWATCH_TLS_") for name in os.environ):
        tls = tls_variables(os.environ) or None  # a variable may be empty
    if tls is None:
        return None
    if not isinstance(tls, Mapping) or not set(tls) <= set(_TLS_KEYS):
        raise AttachError(f"tls must map any of {', '.join(_TLS_KEYS)} to paths of PEM files, or be None, got {tls!r}")
    if ("cert" in tls) != ("key" in tls):
        raise AttachError(f"tls must have both cert and key, or neither, got {', '.join(tls)}")
    paths: dict[str, Path] = {}
    for name, given in tls.items():
        if not isinstance(given, str | os.PathLike):
            raise AttachError(f"tls[{name!r}] must be a path, got {type(given).__name__}")
        path = paths[name] = Path(given).absolute()
        if not path.is_file():
            raise AttachError(f"tls[{name!r}] must be a file, and there is none at {path}")
    return Tls(**{name: str(path) for name, path in paths.items()})


def parse_token(token: str | None) -> str:
    """Read the `token` option of `attach`; "" for none.

    Raises:
        AttachError: It can't stand in a header. The message does not show it.
    """
    if token is not None and not isinstance(token, str):
        raise AttachError(f"token must be a string or None, got {type(token).__name__}")
    stripped = (token or "").strip()
    if not (stripped.isascii() and stripped.isprintable()):
        raise AttachError("token must consist of printable ASCII characters on one line")
    return stripped


def find_token_file(token: str | None) -> str:
    """The file of the token where `attach` was given none: $SHARPWATCH_TOKEN_FILE; empty for none.

    Raises:
        AttachError: The file can't be used.
    """
    named = os.environ.get("SHARPWATCH_TOKEN_FILE")
    if token is not None or not named:
        return ""
    try:
        path = token_path(named).absolute()
        read_token(path)
    except TokenFileError as error:
        raise AttachError(f"$SHARPWATCH_TOKEN_FILE: {error}") from error
    return str(path)


def check_secrecy(addresses: Sequence[Address], *, has_token: bool, tls: Tls | None) -> None:
    """Refuse to send a token over a network unencrypted.

    Raises:
        AttachError: It would be; says what to do.
    """
    remote = next((address for address in addresses if not address.is_local), None)
    if has_token and tls is None and remote is not None:
        raise AttachError(
            f"token: it would cross the network to {remote} unencrypted; give tls={{'ca': PATH}} "
            "(or $SHARPWATCH_TLS_CA), or use an SSH tunnel to the daemon's loopback address"
        )
