"""The operator's connection to the daemon: address, token, and errors in plain words."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from heapq import merge
from pathlib import Path
from typing import Any

import click
import grpc

from sharpwatch.cli.options import DaemonOptions, Decorator
from sharpwatch.cli.shards import OperatorStub
from sharpwatch.common.endpoint import DEFAULT_ADDRESS, parse_addresses, split_addresses
from sharpwatch.common.tls import Tls, channel_credentials, tls_variables
from sharpwatch.common.token_file import default_token_file, read_token, token_path
from sharpwatch.errors import OperatorError, TokenFileError
from sharpwatch.v1.operator_pb2 import (
    Decision,
    ListDecisionsRequest,
    ListRevisionsRequest,
    ListRunsRequest,
    ListTransitionsRequest,
    ListTransitionsResponse,
    Revision,
    Run,
)
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceStub

_PAGE = 200  # runs that are asked for at once
_CALL_SECONDS = 10.0  # deadline of calls that need no trainer
_COMPLETION_SECONDS = 1.0  # a shell waits so long for the names that it offers
# No HTTP proxy: the daemon is the user's own and near, the environment's proxy is for other hosts.
# No limit on size: the user asked for the answer, and a long list of decisions exceeds gRPC's 4 MiB.
_CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", -1))


@dataclass(frozen=True, slots=True)
class DaemonConnection:
    """How to reach the daemon.

    Attributes:
        address: HOST:PORT or unix:PATH; of several daemons those of all shards, in order, with commas between them.
        token: The token; empty for none.
        token_file: The file that the token is from, or would be.
        tls: The PEM files; None to connect without TLS.
    """

    address: str
    token: str
    token_file: Path
    tls: Tls | None = None

    @property
    def is_local(self) -> bool:
        """Whether everything sent stays on this machine."""
        return all(each.is_local for each in parse_addresses(self.address))


def find_connection(options: DaemonOptions, environ: Mapping[str, str]) -> DaemonConnection:
    """Take address and token from the options, else from the environment, else from their default places.

    Args:
        options: The options on the command line.
        environ: The environment's variables.

    Raises:
        OperatorError: $SHARPWATCH_ADDRESS is not an address.
        TokenFileError: Others can read the token file, or a named one does not exist.
    """
    address = options.address or _environment_address(environ) or DEFAULT_ADDRESS
    named = options.token_file or environ.get("SHARPWATCH_TOKEN_FILE")
    path = token_path(named) if named else default_token_file()
    # A file that was named must exist. Without one, a unix socket or the daemon's own words tell what is needed.
    token = read_token(path) if named or path.exists() else ""
    return DaemonConnection(address, token, path, _tls(options, environ))


def _tls(options: DaemonOptions, environ: Mapping[str, str]) -> Tls | None:
    given = {"ca": options.tls_ca, "cert": options.tls_cert, "key": options.tls_key}
    files = tls_variables(environ) | {name: path for name, path in given.items() if path}
    if ("cert" in files) != ("key" in files):
        raise OperatorError("TLS: a certificate and its key go together: --tls-cert and --tls-key")
    return Tls(**files) if files else None


def _environment_address(environ: Mapping[str, str]) -> str:
    text = environ.get("SHARPWATCH_ADDRESS", "")
    if not text:
        return ""
    try:
        parse_addresses(text)
    except ValueError as error:
        raise OperatorError(f"$SHARPWATCH_ADDRESS: {error}") from None
    return text


def author(environ: Mapping[str, str]) -> str:
    """Who makes a change: $SHARPWATCH_AUTHOR, else user@host."""
    if environ.get("SHARPWATCH_AUTHOR"):
        return environ["SHARPWATCH_AUTHOR"]
    import getpass  # noqa: PLC0415 - only commands that change something have an author

    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's uid without a name
        user = f"uid{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


class _CallDetails(grpc.ClientCallDetails):
    """The details of a call, with other metadata and another deadline."""

    def __init__(
        self, details: grpc.ClientCallDetails, metadata: tuple[tuple[str, str], ...], timeout: float | None
    ) -> None:
        self.method = details.method
        self.timeout = timeout
        self.metadata = metadata
        self.credentials = details.credentials
        self.wait_for_ready = getattr(details, "wait_for_ready", None)
        self.compression = getattr(details, "compression", None)


# Generic in grpc's stubs, not at run time.
class _TokenInterceptor(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    """Sends the token with every call, and sets a deadline for calls with a single answer."""

    def __init__(self, token: str, deadline: float) -> None:
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._deadline = deadline

    def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: grpc.ClientCallDetails, request: Any
    ) -> Any:
        """Add the token and a deadline."""
        # gRPC waits for ever by default, and a hung daemon would hang the command.
        timeout = client_call_details.timeout or self._deadline
        return continuation(_CallDetails(client_call_details, self._metadata, timeout), request)

    def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: grpc.ClientCallDetails, request: Any
    ) -> Any:
        """Add the token; the caller sets the deadline of a stream."""
        return continuation(_CallDetails(client_call_details, self._metadata, client_call_details.timeout), request)


@contextmanager
def operator(options: DaemonOptions) -> Iterator[OperatorStub]:
    """Open the operator service of the daemon that the options and the environment name.

    Raises:
        OperatorError: A call in the `with` block failed.
        TokenFileError: The token file cannot be used.
    """
    with connected(find_connection(options, os.environ)) as stub:
        yield stub


@contextmanager
def connected(connection: DaemonConnection, deadline: float = _CALL_SECONDS) -> Iterator[OperatorStub]:
    """Open the operator service of a connection.

    Args:
        connection: How to reach the daemon.
        deadline: Seconds within which a call must be answered.

    Raises:
        OperatorError: A call in the `with` block failed, or the token would cross the network unencrypted.
    """
    # Before the channel opens: the token goes out with the first call.
    if connection.token and connection.tls is None and not connection.is_local:
        raise OperatorError(
            f"the token in {connection.token_file} would cross the network to {connection.address} unencrypted; "
            "use an SSH tunnel to its loopback address, or TLS: --tls-ca FILE"
        )
    with ExitStack() as stack:
        channels = {
            each: grpc.intercept_channel(
                stack.enter_context(_channel(replace(connection, address=each))),
                _TokenInterceptor(connection.token, deadline),
            )
            for each in split_addresses(connection.address)
        }
        stub = OperatorStub(channels)
        try:
            yield stub
        except grpc.RpcError as error:
            asked = replace(connection, address=stub.address)
            raise OperatorError(plain_words(error.code(), error.details() or "", asked)) from error


def _channel(connection: DaemonConnection) -> grpc.Channel:
    if connection.tls is None:
        return grpc.insecure_channel(connection.address, options=_CHANNEL_OPTIONS)
    try:
        credentials = channel_credentials(connection.tls)
    except OSError as error:
        raise OperatorError(f"TLS: {error.filename}: {error.strerror}") from error
    return grpc.secure_channel(connection.address, credentials, options=_CHANNEL_OPTIONS)


def plain_words(code: grpc.StatusCode, details: str, connection: DaemonConnection) -> str:
    """Say in one line what the status of a failed call means to the user.

    Args:
        code: The status.
        details: The daemon's or gRPC's own message; may be empty.
        connection: The connection that was used.
    """
    address, token_file = connection.address, connection.token_file
    message = " ".join(details.split())
    reason = f": {message}" if message else ""
    token = (
        f"the token shown is {token_file}"
        if connection.token
        else f"no token was shown ({token_file} is not there; --token-file or $SHARPWATCH_TOKEN_FILE names yours)"
    )
    words = {
        grpc.StatusCode.UNAVAILABLE: _unavailable(message, address),
        grpc.StatusCode.DEADLINE_EXCEEDED: f"daemon at {address} did not answer in time; is it overloaded or hung?",
        grpc.StatusCode.UNAUTHENTICATED: f"daemon at {address} does not know you{reason}; {token}",
        grpc.StatusCode.PERMISSION_DENIED: f"not allowed at {address}{reason}; {token}",
        grpc.StatusCode.UNIMPLEMENTED: f"daemon at {address} does not know this command; is it an older version?",
        grpc.StatusCode.RESOURCE_EXHAUSTED: f"daemon at {address} has no room for this now{reason}",
        grpc.StatusCode.CANCELLED: f"daemon at {address} cancelled the call{reason}",
    }
    if code in words:
        return words[code]
    if message and code in (
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.OUT_OF_RANGE,
    ):
        return message  # the daemon's own message names the argument, the value and the rule
    return f"daemon at {address} failed with {code.name}{reason}; its log says more"


def _unavailable(message: str, address: str) -> str:
    if "handshake failed" in message:
        found = re.search(r"certificate verify failed|CERTIFICATE_VERIFY_FAILED", message, re.IGNORECASE)
        why = "its certificate is not one of --tls-ca, or names another host" if found else "does it serve TLS?"
        return f"no TLS with the daemon at {address}: {why}"
    if message.startswith("failed to connect") and "Socket closed" in message:  # taken, and closed at the first bytes
        return f"daemon at {address} closes the connection; does it serve TLS? then name its authority: --tls-ca FILE"
    # gRPC's message for a failed connection lists every address it tried, which only distracts.
    if not message or message.startswith(
        ("failed to connect", "connections to all", "DNS resolution", "Socket closed")
    ):
        return f"daemon not reachable at {address}; is it running? start it with: sharpwatch serve"
    return f"daemon at {address} can't do this now: {message}"


def run_argument(*, required: bool = True, whole: bool = False) -> Decorator:
    """The argument RUN, which the shell completes with the names that the daemon knows.

    Args:
        required: Whether it must be given.
        whole: Whether the command changes something: the daemon then refuses a name that is not given in full.
    """
    about = (
        "A run's name in full." if whole else "A run's name, or the beginning of it if no other run's name begins so."
    )
    metavar = "RUN" if required else "[RUN]"
    return click.argument("run", metavar=metavar, required=required, help=about, shell_complete=_complete_run)


def _complete_run(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    del param
    return completions(ctx, lambda stub: [run.run for run in all_runs(stub, incomplete)], incomplete)


def completions(
    ctx: click.Context, names: Callable[[OperatorServiceStub], Sequence[str]], incomplete: str
) -> list[str]:
    """What a shell may offer for a half-written name; nothing if the daemon can't be asked.

    Args:
        ctx: The command line so far.
        names: Asks the daemon for all names.
        incomplete: What is written of the name.
    """
    options = ctx.find_object(DaemonOptions) or DaemonOptions()
    try:
        with connected(find_connection(options, os.environ), deadline=_COMPLETION_SECONDS) as stub:
            return sorted(name for name in names(stub) if name.startswith(incomplete))
    except (OperatorError, TokenFileError):
        return []


def pages(call: Callable[[Any], Any], request: Any) -> Iterator[Any]:
    """The answers to a call, page by page.

    Args:
        call: The method of the stub.
        request: The request for the first page; it is changed.
    """
    while True:
        page = call(request)
        yield page
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


def all_runs(stub: OperatorServiceStub, prefix: str = "") -> list[Run]:
    """All runs whose names begin with `prefix`, ended ones too."""
    runs: dict[str, Run] = {}
    for page in pages(stub.ListRuns, ListRunsRequest(name_prefix=prefix, page_size=_PAGE)):
        runs.update((run.run, run) for run in page.runs)  # by name: one may begin anew between two pages
    return list(runs.values())


def all_decisions(stub: OperatorServiceStub, run: str, limit: int) -> list[Decision]:
    """The newest `limit` decisions of a run, or of all for an empty name, the newest first."""
    found = pages(stub.ListDecisions, ListDecisionsRequest(run=run, limit=limit))
    return [decision for page in found for decision in page.decisions]


def all_revisions(stub: OperatorServiceStub, run: str) -> list[Revision]:
    """The LR revisions of a run."""
    found = pages(stub.ListRevisions, ListRevisionsRequest(run=run))
    return [revision for page in found for revision in page.revisions]


def audit(stub: OperatorServiceStub, run: str, limit: int = 0) -> ListTransitionsResponse:
    """What became of the newest `limit` (0: of all) decisions of a run, or of all for an empty name, as one answer."""
    found = list(pages(stub.ListTransitions, ListTransitionsRequest(run=run, limit=limit)))
    return ListTransitionsResponse(
        # Each page in its own order, since the clock may go back.
        transitions=merge(*(page.transitions for page in found), key=lambda one: one.at_unix_ns),
        decisions=(one for page in found for one in page.decisions),
        plans=(one for page in found for one in page.plans),
        events=(one for page in found for one in page.events),
    )


def resolve_run(stub: OperatorStub, given: str) -> str:
    """Find the full name of a run that is to be shown; a command that changes a run takes its name as it is given.

    Args:
        stub: The operator service.
        given: The run's name or its beginning.

    Raises:
        OperatorError: No run's name begins so, or more than one.
    """
    found = [run.run for run in all_runs(stub, given)]
    # The others are named in the error alone; a daemon that has no run in memory may have some in its journal.
    for others in (ListRunsRequest(held_only=True), ListRunsRequest()):
        found = found or [run.run for run in stub.ListRuns(others).runs]
    try:
        return match_run(given, found)
    except OperatorError as error:
        raise OperatorError("; ".join(filter(None, (str(error), stub.missing)))) from None


def match_run(given: str, names: Sequence[str]) -> str:
    """Find the name that equals `given`, or else the only one that begins with it.

    Raises:
        OperatorError: There is no such name, or more than one; the message lists the candidates.
    """
    # A whole name wins, else it could not be named where a longer one begins with it.
    if given in names:
        return given
    found = sorted(name for name in names if name.startswith(given))
    if len(found) == 1:
        return found[0]
    if found:
        raise OperatorError(f"run {given!r} may be any of {some(found)}; write more of it")
    known = f"the daemon knows {some(sorted(names))}" if names else "the daemon knows no run yet"
    raise OperatorError(f"no run {given!r}; {known}")


def some(names: Sequence[str], limit: int = 8) -> str:
    """The first of some names, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
