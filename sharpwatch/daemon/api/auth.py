"""Authorization: the daemon serves loopback and unix sockets only, and changes need the operator's token.

There are no certificates. A caller on the unix socket is an operator, because its mode 0600 lets only the daemon's own
user (and root) connect; gRPC for Python does not tell the uid of a peer. Loopback is shared by all users of a machine,
so there an operator sends the token, which only the daemon's user can read.
"""

from __future__ import annotations

import hmac
import os
from pathlib import Path
from typing import Any, Literal

import grpc

from sharpwatch.common.endpoint import Address
from sharpwatch.common.token_file import make_token, read_token, token_path
from sharpwatch.errors import SharpwatchError, TokenFileError

Role = Literal["viewer", "operator"]
_SCHEME = "Bearer "


def check_grpc_address(address: str) -> None:
    """Refuses an address that other machines could reach.

    Raises:
        SharpwatchError: `address` is neither loopback nor a unix socket.
    """
    if not Address(address).is_local:
        raise SharpwatchError(
            f"grpc {address}: no credentials are configured, so only loopback (127.0.0.1, ::1, localhost) "
            "and unix:PATH are served"
        )


def load_token(file: str | Path) -> str:
    """Reads the operator's token; makes the file if there is none.

    Raises:
        TokenFileError: The file cannot be used, or belongs to another user than the daemon's.
    """
    path = token_path(file)
    if not path.exists():
        make_token(path)
    token = read_token(path)
    # Whoever owns the file can read the token, whatever its mode.
    owner = path.stat().st_uid
    if owner != os.geteuid():
        raise TokenFileError(f"token file {path} belongs to uid {owner}, but the daemon runs as uid {os.geteuid()}")
    return token


class Authorizer:
    """Tells operators from viewers.

    Args:
        token: The operator's token.
    """

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def is_operator(self, authorization: bytes) -> bool:
        """Whether a header `authorization` shows the operator's token."""
        # Compared in constant time, so that a wrong token's answer does not tell how much of it was right.
        return hmac.compare_digest(authorization, _SCHEME.encode() + self._token)

    def role(self, context: grpc.aio.ServicerContext[Any, Any]) -> Role:
        """Returns the role of the caller."""
        if context.peer().startswith("unix:"):
            return "operator"
        for key, value in context.invocation_metadata() or ():
            if key == "authorization" and self.is_operator(value if isinstance(value, bytes) else value.encode()):
                return "operator"
        return "viewer"

    async def require_operator(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Ends the call unless the caller is an operator."""
        if self.role(context) == "operator":
            return
        if any(key == "authorization" for key, _ in context.invocation_metadata() or ()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this token is not the operator's")
        await context.abort(
            grpc.StatusCode.UNAUTHENTICATED, "a change needs the operator's token, in the header authorization: Bearer"
        )
