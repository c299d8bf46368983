"""Where the courier connects to, and with which credentials; `attach` checks them."""

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
    """What the courier is started with; `trainer` is the trainer's process id."""

    target: str
    token: str
    tls: Tls | None
    spool_bytes: int
    trainer: int

    def to_json(self) -> str:
        """Return it as JSON for the courier's environment; every user of the machine could read its argv."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Destination:
        """Read what `to_json` returned."""
        values = json.loads(text)
        tls = values.pop("tls")
        return cls(tls=None if tls is None else Tls(**tls), **values)


def parse_daemon_address(text: str) -> Address:
    """Read the `address` given to `attach`.

    Raises:
        AttachError: It is not a valid address.
    """
    try:
        return parse_address(text)
    except ValueError as error:
        raise AttachError(f"address: {error}") from error


def parse_tls(tls: Mapping[str, str] | None) -> Tls | None:
    """Read the `tls` option of `attach`, {"ca": PATH, "cert": PATH, "key": PATH}, each optional.

    Raises:
        AttachError: A key or a value is wrong, or a file does not exist.
    """
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
