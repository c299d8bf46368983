"""Authorization: who calls, and what they may do.

Roles are `agent` (opens sessions), `viewer` (reads) and `operator` (all of it). A caller on the unix socket is an
operator, because its mode 0600 lets only the daemon's own user (and root) connect; gRPC for Python does not tell the
uid of a peer. Any other caller shows a token: the operator's own, which lies in a file that only the daemon's user can
read, or one of the file of credentials. Loopback is shared by all users of a machine, so reading there needs a token as
well. Without a file of credentials, agents need none; then only this machine is served.
"""

from __future__ import annotations

import hmac
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grpc
import structlog

from sharpwatch.common.credentials import Credential, Role, hash_token, read_credentials
from sharpwatch.common.endpoint import Address
from sharpwatch.common.shards import parse_shard
from sharpwatch.common.token_file import make_token, read_token, token_path
from sharpwatch.common.watched_file import WatchedFile
from sharpwatch.daemon.config.settings import DaemonConfig
from sharpwatch.errors import SharpwatchError, TokenFileError

log = structlog.get_logger(__name__)

NO_ROLES: Mapping[str, Role] = {}
_OWN = "operator"  # the name of who shows the operator's own token, or comes over the socket


def check_doors(settings: DaemonConfig) -> None:
    """Refuses addresses that other machines could reach without showing who they are, or that would show a token.

    Nor may a daemon of several have agents sent to an address that is none.

    Raises:
        SharpwatchError: Names the key, and what is needed.
    """
    address, is_safe = Address(settings.grpc), settings.tls is not None and bool(settings.credentials)
    if not (address.is_local or is_safe):
        raise SharpwatchError(
            f"grpc {address}: no credentials are configured, so only loopback (127.0.0.1, ::1, localhost) "
            "and unix:PATH are served; other addresses need daemon.tls and daemon.credentials"
            if not settings.credentials
            else f"grpc {address}: tokens would cross the network unencrypted; other addresses than loopback and "
            "unix:PATH need daemon.tls"
        )
    if parse_shard(settings.shard).count > 1 and not (settings.advertise or address.is_local):
        raise SharpwatchError(
            f"advertise: shard {settings.shard} needs it where grpc is {address}: HOST:PORT where agents reach this "
            "daemon, as it stands in their list of addresses (--advertise)"
        )
    if settings.tls is not None and settings.tls.client_roles and not settings.tls.client_ca:
        raise SharpwatchError("tls.client_roles: it needs tls.client_ca, whose authorities sign clients' certificates")
    if settings.metrics_auth == "token" and settings.tls is None and not Address(settings.http).is_loopback:
        raise SharpwatchError(
            f"http {settings.http}: with metrics_auth: token, tokens would cross the network unencrypted; "
            "it needs daemon.tls, or an address on loopback"
        )


def read_own_token(path: Path) -> str:
    """Reads the operator's token.

    Raises:
        TokenFileError: The file cannot be used, or belongs to another user than the daemon's.
    """
    token = read_token(path)
    # Whoever owns the file can read the token, whatever its mode.
    owner = path.stat().st_uid
    if owner != os.geteuid():
        raise TokenFileError(f"token file {path} belongs to uid {owner}, but the daemon runs as uid {os.geteuid()}")
    return token


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls.

    Attributes:
        name: The name of their credential; empty for one who shows none that is known.
        role: Their role; empty for none.
        jobs: The training jobs that they may speak for; empty for all.
        sha256: The hash of the token that they showed, where it is one of the credentials.
        why: Why they have not shown who they are; empty if they have.
    """

    name: str
    role: Role | Literal[""]
    jobs: tuple[str, ...] = ()
    sha256: str = ""
    why: str = ""

    def may(self, role: Role) -> bool:
        """Whether they may do what `role` may."""
        return self.role in {"operator", role}

    def speaks_for(self, job: str) -> bool:
        """Whether they may open sessions of a training job."""
        return self.may("agent") and (not self.jobs or job in self.jobs)


class Authorizer:
    """Knows callers by what they show.

    Args:
        token: The operator's token.
        credentials: The credentials; None where none are configured.
        client_roles: The roles of names in certificates that clients show.
    """

    def __init__(
        self,
        token: WatchedFile[str],
        credentials: WatchedFile[tuple[Credential, ...]] | None = None,
        client_roles: Mapping[str, Role] = NO_ROLES,
    ) -> None:
        self._token = token
        self._credentials = credentials
        self._client_roles = client_roles

    @classmethod
    def of(cls, settings: DaemonConfig) -> Authorizer:
        """The authorizer of a configuration; makes the operator's token if there is none.

        Raises:
            SharpwatchError: One of the files can't be used, or an address must not be served.
        """
        check_doors(settings)
        path = token_path(settings.token_file)
        if not path.exists():
            make_token(path)
        token = WatchedFile(path, read_own_token, lambda error: _note("token_file", path, error))
        token.current()
        client_roles = NO_ROLES if settings.tls is None else settings.tls.client_roles
        if not settings.credentials:
            return cls(token, client_roles=client_roles)
        file = token_path(settings.credentials)
        credentials = WatchedFile(file, read_credentials, lambda error: _note("credentials", file, error))
        credentials.current()
        return cls(token, credentials, client_roles)

    def caller(self, peer: str, authorization: bytes) -> Caller:
        """Who calls.

        Args:
            peer: The peer as gRPC has it, such as `ipv4:127.0.0.1:4711` or `unix:`.
            authorization: The header of that name; empty for none.
        """
        if peer.startswith("unix:"):
            return Caller(_OWN, "operator")
        scheme, _, token = authorization.partition(b" ")
        if not token or scheme.lower() != b"bearer":
            return self._stranger("no token was shown, in the header authorization: Bearer TOKEN")
        try:
            # Compared in constant time, so that a wrong token's answer does not tell how much of it was right.
            if hmac.compare_digest(token, self._token.current().encode()):
                return Caller(_OWN, "operator")
        except SharpwatchError:
            return self._by_hash(token, "; the file of the operator's token can't be used, as the daemon's log says")
        return self._by_hash(token, "")

    def caller_of(self, context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
        """Who makes a call."""
        shown = (value for key, value in context.invocation_metadata() or () if key == "authorization")
        value = next(shown, b"")
        if not value and self._client_roles:
            names = context.auth_context()
            for encoded in (*names.get("x509_common_name", ()), *names.get("x509_subject_alternative_name", ())):
                name = encoded.decode(errors="replace")
                if role := self._client_roles.get(name):
                    return Caller(name, role)
        return self.caller(context.peer(), value if isinstance(value, bytes) else value.encode())

    def knows(self, name: str) -> bool:
        """Whether there is a credential of that name, also one that has expired, or a certificate's name has a role."""
        credentials = () if self._credentials is None else self._credentials.current()
        return name in self._client_roles or any(each.name == name for each in credentials)

    def still_holds(self, caller: Caller) -> bool:
        """Whether what a caller showed is valid still: its credential was not revoked, changed, or has not expired."""
        if not caller.sha256:
            return True
        try:
            return self._known(caller.sha256) == caller
        except SharpwatchError:
            return False

    async def require(self, role: Role, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Ends the call unless the caller may do what `role` may."""
        caller = self.caller_of(context)
        if caller.may(role):
            return
        if caller.why:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, f"{_NEEDS[role]}: {caller.why}")
        await context.abort(
            grpc.StatusCode.PERMISSION_DENIED, f"{_NEEDS[role]}; {caller.name} has the role {caller.role}"
        )

    def _stranger(self, why: str) -> Caller:
        # Without credentials there is nothing that an agent could show.
        return Caller("", "agent" if self._credentials is None else "", why=why)

    def _by_hash(self, token: bytes, more: str) -> Caller:
        try:
            known = self._known(hash_token(token))
        except SharpwatchError:
            return self._stranger("the file of credentials can't be used, as the daemon's log says")
        return known or self._stranger(f"this token is not known{more}")

    def _known(self, sha256: str) -> Caller | None:
        """Who holds the token of that hash, None for nobody."""
        for each in () if self._credentials is None else self._credentials.current():
            if hmac.compare_digest(each.sha256, sha256):
                if each.expires is not None and each.expires.timestamp() <= time.time():
                    return self._stranger(f"the token of {each.name} has expired, at {each.expires:%Y-%m-%dT%H:%M:%SZ}")
                return Caller(each.name, each.role, each.jobs, sha256)
        return None


_NEEDS: dict[Role, str] = {
    "agent": "a session needs a token of role agent",
    "viewer": "reading needs the operator's token, or one of role viewer",
    "operator": "a change needs the operator's token, or one of role operator",
}


def _note(key: str, path: Path, error: SharpwatchError | None) -> None:
    if error is None:
        log.info("file_read", key=key, file=str(path))
    else:
        log.error("file_refused", key=key, file=str(path), reason=str(error))
