"""Who may do what, without certificates: loopback and sockets only, and a token for what changes something.

A caller on the unix socket is an operator by the file's mode, 0600: only the daemon's own user (and root) can connect.
gRPC for Python doesn't tell a peer's uid, so the mode has to do it. Loopback is shared by all users of a machine; there
the operator shows the token that only the daemon's user can read.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
import stat
from pathlib import Path
from typing import Any, Literal

import grpc

from sharpwatch.errors import SharpwatchError

Role = Literal["viewer", "operator"]
_SCHEME = "Bearer "


def check_grpc_address(address: str) -> None:
    """Refuse an address that others than this machine's users could reach."""
    if address.startswith("unix:"):
        return
    host = address.rpartition(":")[0].strip("[]")
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local:
        raise SharpwatchError(
            f"grpc {address}: no credentials are configured, so only loopback (127.0.0.1, ::1, localhost) "
            "and unix:PATH are served"
        )


def load_token(file: str | Path) -> str:
    """The operator's token: made, mode 0600, where there is none; refused where others could read it."""
    path = Path(file).expanduser()
    try:
        if not path.exists():
            _make_token(path)
        status = path.stat()
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o077:
            raise SharpwatchError(f"token_file {path}: mode {mode:04o} lets others use it; run: chmod 600 {path}")
        if status.st_uid != os.geteuid():
            raise SharpwatchError(f"token_file {path}: belongs to uid {status.st_uid}, the daemon is {os.geteuid()}")
        token = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise SharpwatchError(f"token_file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SharpwatchError(f"token_file {path}: not a line of ASCII text") from error
    if not token:
        raise SharpwatchError(f"token_file {path}: empty; delete it and a new one is made")
    return token


def _make_token(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_urlsafe(32) + "\n")


class Authorizer:
    """Tells operators from viewers."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def role(self, context: grpc.aio.ServicerContext[Any, Any]) -> Role:
        """What the caller may do."""
        if context.peer().startswith("unix:"):
            return "operator"
        for key, value in context.invocation_metadata() or ():
            shown = value if isinstance(value, bytes) else value.encode()
            if key == "authorization" and hmac.compare_digest(shown, _SCHEME.encode() + self._token):
                return "operator"
        return "viewer"

    async def require_operator(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """End the call unless the caller is an operator."""
        if self.role(context) == "operator":
            return
        if any(key == "authorization" for key, _ in context.invocation_metadata() or ()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this token is not the operator's")
        await context.abort(
            grpc.StatusCode.UNAUTHENTICATED, "a change needs the operator's token: authorization: Bearer"
        )
