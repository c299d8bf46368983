"""Where the courier connects to, and the credentials it shows: checked by `attach`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from sharpwatch.common.endpoint import Address, parse_address
from sharpwatch.errors import AttachError

_TLS_KEYS = ("ca", "cert", "key")


@dataclass(frozen=True, slots=True)
class Tls:
    """Paths of PEM files: authorities to trust (None: the system's), and the agent's own certificate and key."""

    ca: str | None = None
    cert: str | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Destination:
    """All that the courier needs to know; `trainer` is a process id."""

    target: str
    token: str
    tls: Tls | None
    spool_bytes: int
    trainer: int

    def to_json(self) -> str:
        """For the courier's environment: never its argv, which everyone can read."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Destination:
        """What `to_json` wrote."""
        values = json.loads(text)
        tls = values.pop("tls")
        return cls(tls=None if tls is None else Tls(**tls), **values)


def parse_daemon_address(text: str) -> Address:
    """Read the `address` given to `attach`.

    Raises:
        AttachError: It is no address.
    """
    try:
        return parse_address(text)
    except ValueError as error:
        raise AttachError(f"address: {error}") from error


def parse_tls(tls: Mapping[str, str] | None) -> Tls | None:
    """Read {"ca": PATH, "cert": PATH, "key": PATH}, each optional; raises `AttachError`."""
    if tls is None:
        return None
    if not isinstance(tls, Mapping) or not set(tls) <= set(_TLS_KEYS):
        raise AttachError(f"tls={tls!r}: allowed is a mapping of {', '.join(_TLS_KEYS)} to paths of PEM files, or None")
    if ("cert" in tls) != ("key" in tls):
        raise AttachError("tls: a certificate needs its key: give both cert and key, or neither")
    paths: dict[str, Path] = {}
    for name, given in tls.items():
        if not isinstance(given, str | os.PathLike):
            raise AttachError(f"tls {name}: expected a path, got {type(given).__name__}")
        path = paths[name] = Path(given).absolute()
        if not path.is_file():
            raise AttachError(f"tls {name}: no file at {path}")
    return Tls(**{name: str(path) for name, path in paths.items()})


def parse_token(token: str | None) -> str:
    """Check that the token can stand in a header; "" for none. Raises `AttachError`, which does not show it."""
    if token is not None and not isinstance(token, str):
        raise AttachError(f"token: expected a string or None, got {type(token).__name__}")
    stripped = (token or "").strip()
    if not (stripped.isascii() and stripped.isprintable()):
        raise AttachError("token: allowed are printable ASCII characters on one line")
    return stripped
