"""Reaching a daemon: its address (HOST:PORT, [IPV6]:PORT or unix:PATH), waits between attempts; URLs for people."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ADDRESS = "127.0.0.1:7741"
_HOST_PORT = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
_SOCKET_PATH_BYTES = 107  # sun_path, less its closing zero


@dataclass(frozen=True, slots=True)
class Address:
    """Where a daemon listens.

    Attributes:
        target: The address as gRPC takes it. The path of a socket is absolute, so that a later chdir changes nothing.
    """

    target: str

    @property
    def is_socket(self) -> bool:
        """Whether this is a unix socket."""
        return self.target.startswith("unix:")

    @property
    def is_loopback(self) -> bool:
        """Whether the host is this machine's loopback."""
        import ipaddress  # noqa: PLC0415 - slow to import, and most commands do not ask

        host = self.target.rpartition(":")[0].strip("[]")
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    @property
    def is_local(self) -> bool:
        """Whether what is sent there stays on this machine."""
        return self.is_socket or self.is_loopback

    def __str__(self) -> str:
        return self.target


def parse_address(text: str, *, sockets: bool = True, listen: bool = False) -> Address:
    """Read an address.

    Args:
        text: HOST:PORT, [IPV6]:PORT or unix:PATH.
        sockets: Whether unix:PATH is valid.
        listen: Whether to listen there: port 0, which takes a free one, is valid then.

    Raises:
        ValueError: `text` is no such address; the message says what is valid.
    """
    if sockets and isinstance(text, str) and text.startswith("unix:") and text != "unix:":
        path = str(Path(text.removeprefix("unix:")).absolute())
        # Refused here, because the kernel would cut it.
        if len(path.encode()) > _SOCKET_PATH_BYTES:
            raise ValueError(f"a socket's path must have at most {_SOCKET_PATH_BYTES} bytes, got {path}")
        return Address(f"unix:{path}")
    # IPv6 only in brackets: in `::1:7741` nobody can say where the port begins.
    match = _HOST_PORT.fullmatch(text) if isinstance(text, str) else None
    if match is None or not (0 if listen else 1) <= int(match[2]) < 2**16:
        lowest = "0" if listen else "1"
        forms = "HOST:PORT or unix:PATH" if sockets else "HOST:PORT"
        raise ValueError(f"expected {forms}, the port from {lowest} to 65535, an IPv6 host in brackets, got {text!r}")
    return Address(text)


def split_addresses(text: str) -> list[str]:
    """The addresses in a list, with commas and any spaces between them."""
    return [each.strip() for each in text.split(",")]


def parse_addresses(text: str) -> tuple[Address, ...]:
    """Read the addresses of the daemons of all shards, in the order of these; most often there is one.

    Args:
        text: As of `parse_address`, with a comma between two of them, and spaces there if one likes.

    Raises:
        ValueError: One is no such address, or is there twice.
    """
    addresses = tuple(map(parse_address, split_addresses(text))) if isinstance(text, str) else (parse_address(text),)
    if len(set(addresses)) < len(addresses):
        raise ValueError(f"expected a different address for each shard, got {text!r}")
    return addresses


class Backoff:
    """Waits that double from `first` to `last` seconds.

    Args:
        first: The first wait, in seconds.
        last: The longest wait, in seconds.
        jitter: Draws each wait from [half of it, all of it], so that many clients do not come back at once.
    """

    def __init__(self, first: float, last: float, jitter: random.Random | None = None) -> None:
        self._first, self._last = first, last
        self._jitter = jitter
        self._wait = first

    def reset(self) -> None:
        """Begin anew with the first wait."""
        self._wait = self._first

    def next(self) -> float:
        """Seconds to wait now."""
        wait, self._wait = self._wait, min(2 * self._wait, self._last)
        return wait if self._jitter is None else wait * self._jitter.uniform(0.5, 1.0)


def without_password(url: str) -> str:
    """Returns a URL without its password, for people and logs."""
    # Also of one that can't be parsed.
    url = re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url)
    return re.sub(r"(password=)[^&]*", r"\1***", url)
