"""TLS on the side that connects: which authorities it trusts, and by which certificate it is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import grpc


@dataclass(frozen=True, slots=True)
class Tls:
    """Paths of PEM files: authorities to trust (None: the system's), and the client's own certificate and key."""

    ca: str | None = None
    cert: str | None = None
    key: str | None = None


def tls_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The files that the environment names, by ca, cert and key; empty for none."""
    named = {
        "ca": environ.get("SHARPWATCH_TLS_CA"),
        "cert": environ.get("SHARPWATCH_TLS_CERT"),
        "key": environ.get("SHARPWATCH_TLS_KEY"),
    }
    return {name: path for name, path in named.items() if path}


def channel_credentials(tls: Tls) -> grpc.ChannelCredentials:
    """Read the PEM files; for every connection anew, as certificates are replaced during long runs.

    Raises:
        OSError: A file can't be read.
    """
    import grpc  # noqa: PLC0415 - no gRPC in a trainer

    ca, key, cert = (None if path is None else Path(path).read_bytes() for path in (tls.ca, tls.key, tls.cert))
    return grpc.ssl_channel_credentials(ca, key, cert)
