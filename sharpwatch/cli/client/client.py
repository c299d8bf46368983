"""The operator's channel to the daemon: where it is, who we are, and its refusals in plain words."""

from __future__ import annotations

import argparse
import getpass
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from sharpwatch.common.endpoint import DEFAULT_ADDRESS, parse_address
from sharpwatch.common.token_file import default_token_file, read_token
from sharpwatch.errors import OperatorError
from sharpwatch.v1.operator_pb2 import ListRunsRequest
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceStub

_ANSWER_SECONDS = 10.0  # for calls that need no trainer
# The daemon is ours and near: an HTTP proxy of the environment is for other hosts.
# And what it sends was asked for: a long list of decisions is more than gRPC's 4 MiB.
_OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", -1))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the daemon is, and the token to show it ("": none)."""

    address: str
    token: str
    token_file: Path

    @property
    def private(self) -> bool:
        """Whether what is sent stays on this machine."""
        return parse_address(self.address).is_local


def endpoint(given: Mapping[str, Any], environ: Mapping[str, str]) -> Endpoint:
    """The daemon to speak to, from options, then the environment, then the defaults.

    Raises `OperatorError` for an address that is none, a token file that others can read, or one that was named and
    is not there.
    """
    chosen = given.get("address") or _environment_address(environ) or DEFAULT_ADDRESS
    named = given.get("token_file") or environ.get("SHARPWATCH_TOKEN_FILE")
    path = Path(named).expanduser() if named else default_token_file()
    token = read_token(path) if named or path.exists() else ""
    return Endpoint(chosen, token, path)


def _environment_address(environ: Mapping[str, str]) -> str:
    text = environ.get("SHARPWATCH_ADDRESS", "")
    if not text:
        return ""
    try:
        parse_address(text)
    except ValueError as error:
        raise OperatorError(f"$SHARPWATCH_ADDRESS: {error}") from None
    return text


def author(environ: Mapping[str, str]) -> str:
    """Who a change is put down to: $SHARPWATCH_AUTHOR, else user@host."""
    if environ.get("SHARPWATCH_AUTHOR"):
        return environ["SHARPWATCH_AUTHOR"]
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's uid without a name
        user = f"uid{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


class _CallDetails(grpc.ClientCallDetails):
    """A call's details with other metadata and deadline."""

    def __init__(
        self, of: grpc.ClientCallDetails, metadata: tuple[tuple[str, str], ...], timeout: float | None
    ) -> None:
        self.method = of.method
        self.timeout = timeout
        self.metadata = metadata
        self.credentials = of.credentials
        self.wait_for_ready = getattr(of, "wait_for_ready", None)
        self.compression = getattr(of, "compression", None)


# Generic in the stubs, not at run time.
class _Caller(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    """Shows the token with every call, and gives every single answer a deadline."""

    def __init__(self, token: str) -> None:
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()

    def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: grpc.ClientCallDetails, request: Any
    ) -> Any:
        """Add token and deadline."""
        timeout = client_call_details.timeout or _ANSWER_SECONDS
        return continuation(_CallDetails(client_call_details, self._metadata, timeout), request)

    def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: grpc.ClientCallDetails, request: Any
    ) -> Any:
        """Add the token; a stream's deadline is its caller's choice."""
        return continuation(_CallDetails(client_call_details, self._metadata, client_call_details.timeout), request)


@contextmanager
def operator(args: argparse.Namespace) -> Iterator[OperatorServiceStub]:
    """The operator service for the length of a `with`; a failed call leaves it as an `OperatorError`."""
    with connected(endpoint(vars(args), os.environ)) as stub:
        yield stub


@contextmanager
def connected(to: Endpoint) -> Iterator[OperatorServiceStub]:
    """`operator`, of an endpoint."""
    if to.token and not to.private:
        raise OperatorError(
            f"the token in {to.token_file} would cross the network to {to.address} unencrypted; "
            "use an SSH tunnel to its loopback address, or its unix socket"
        )
    with grpc.insecure_channel(to.address, options=_OPTIONS) as channel:
        try:
            yield OperatorServiceStub(grpc.intercept_channel(channel, _Caller(to.token)))
        except grpc.RpcError as error:
            raise OperatorError(plain_words(error.code(), error.details() or "", to)) from error


def plain_words(code: grpc.StatusCode, details: str, to: Endpoint) -> str:
    """What a gRPC status means for the one who typed the command, in one line."""
    said = " ".join(details.split())
    reason = f": {said}" if said else ""
    shown = f"the token shown is {to.token_file}" if to.token else f"no token was shown ({to.token_file} is not there)"
    words = {
        grpc.StatusCode.UNAVAILABLE: _unavailable(said, to.address),
        grpc.StatusCode.DEADLINE_EXCEEDED: f"daemon at {to.address} did not answer in time; is it overloaded or hung?",
        grpc.StatusCode.UNAUTHENTICATED: f"daemon at {to.address} does not know you{reason}; {shown}",
        grpc.StatusCode.PERMISSION_DENIED: f"not allowed at {to.address}{reason}; {shown}",
        grpc.StatusCode.UNIMPLEMENTED: f"daemon at {to.address} does not know this command; is it an older version?",
        grpc.StatusCode.RESOURCE_EXHAUSTED: f"daemon at {to.address} has no room for this now{reason}",
        grpc.StatusCode.CANCELLED: f"daemon at {to.address} broke the call off{reason}",
    }
    if code in words:
        return words[code]
    if said and code in (
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.OUT_OF_RANGE,
    ):
        return said  # the daemon's own words say what, where and what is allowed
    return f"daemon at {to.address} failed with {code.name}{reason}; its log says more"


def _unavailable(said: str, address: str) -> str:
    # gRPC's own words for a connection that fails list every address it tried: noise beside the one that was asked for.
    if not said or said.startswith(("failed to connect", "connections to all", "DNS resolution", "Socket closed")):
        return f"daemon not reachable at {address}; is it running? start it with: sharpwatch serve"
    return f"daemon at {address} can't do this now: {said}"


def resolve_run(stub: OperatorServiceStub, given: str) -> str:
    """The full name of the run that `given` is the name, or the start of the name, of."""
    return match_run(given, [run.run for run in stub.ListRuns(ListRunsRequest()).runs])


def match_run(given: str, names: Sequence[str]) -> str:
    """The name that is `given`, or the only one that starts with it.

    Raises `OperatorError`, with the candidates, where there is none or more than one.
    """
    if given in names:
        return given
    found = sorted(name for name in names if name.startswith(given))
    if len(found) == 1:
        return found[0]
    if found:
        raise OperatorError(f"run {given!r} may be any of {_some(found)}; write more of it")
    known = f"the daemon knows {_some(sorted(names))}" if names else "the daemon knows no run yet"
    raise OperatorError(f"no run {given!r}; {known}")


def _some(names: Sequence[str], limit: int = 8) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
