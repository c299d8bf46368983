"""Checks of the daemon: whether it is reachable, the caller's role, its store, its metrics and its clock."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.utils import parsedate_to_datetime

from sharpwatch._version import __version__
from sharpwatch.cli import output
from sharpwatch.cli.client.client import DaemonConnection, connected
from sharpwatch.cli.doctor.local_checks import CheckResult
from sharpwatch.errors import OperatorError
from sharpwatch.v1.operator_pb2 import GetDaemonRequest, GetDaemonResponse

_SKEW_SECONDS = 5.0  # with more, times of steps and decisions cannot be compared; HTTP dates have whole seconds
_HTTP_SECONDS = 5.0


def token(connection: DaemonConnection) -> CheckResult:
    """Check that there is a token to send with commands."""
    if connection.token:
        return CheckResult("token file", "ok", f"{connection.token_file}, readable by its owner only")
    remedy = "write the daemon's operator token there, mode 0600; over a unix socket your user id may be enough"
    return CheckResult("token file", "warn", f"{connection.token_file} is not there: commands may be refused", remedy)


def daemon(connection: DaemonConnection) -> Iterator[CheckResult]:
    """Ask the daemon about itself, and check its answer."""
    try:
        with connected(connection) as stub:
            answer = stub.GetDaemon(GetDaemonRequest())
    except OperatorError as error:
        yield CheckResult("daemon", "fail", str(error))
        return
    yield version(answer, connection.address)
    yield role(answer)
    yield store(answer)
    if answer.http_address:
        yield from metrics(metrics_url(answer.http_address, connection.address))
    else:
        yield CheckResult(
            "metrics", "warn", "the daemon serves no HTTP", "set daemon.http to have Prometheus scrape it"
        )


def version(answer: GetDaemonResponse, address: str) -> CheckResult:
    """Check that daemon and command line have the same version."""
    found = (
        f"{address}: sharpwatch {answer.version}, up {output.span(answer.uptime_seconds)}, "
        f"{answer.runs} runs, estimates on {answer.device}"
    )
    if answer.version != __version__:
        return CheckResult(
            "daemon", "warn", found, f"this command is {__version__}: install the same version everywhere"
        )
    return CheckResult("daemon", "ok", found)


def role(answer: GetDaemonResponse) -> CheckResult:
    """Check that the daemon lets the caller send commands."""
    if answer.role == "operator":
        return CheckResult("role", "ok", "operator: may send commands")
    remedy = "to send commands, name the operator's token with --token-file"
    return CheckResult("role", "warn", f"{answer.role or 'none'}: may look but not act", remedy)


def store(answer: GetDaemonResponse) -> CheckResult:
    """Check that the daemon can write its journal."""
    if answer.store_writable:
        return CheckResult("store", "ok", f"{answer.store} is writable")
    remedy = "free space or fix permissions there; agents keep a limited spool until then"
    return CheckResult("store", "fail", f"{answer.store}: {answer.store_error or 'not writable'}", remedy)


def metrics_url(http_address: str, grpc_address: str) -> str:
    """The URL of the daemon's metrics, as seen from this machine.

    Args:
        http_address: The daemon's HTTP address. If it listens on every address, the host of `grpc_address` is used.
        grpc_address: The address that the daemon's gRPC was reached at.
    """
    host, _, port = http_address.rpartition(":")
    if host in ("0.0.0.0", "[::]", "", "*"):  # noqa: S104 - compared, not bound
        host = "127.0.0.1" if grpc_address.startswith("unix:") else grpc_address.rpartition(":")[0]
    return f"http://{host}:{port}/metrics"


def metrics(url: str) -> Iterator[CheckResult]:
    """Check that `url` serves sharpwatch's metrics, and compare the daemon's clock with this machine's."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_HTTP_SECONDS) as answer:
            body, date, received = answer.read(), answer.headers["Date"], time.time()
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        yield CheckResult(
            "metrics",
            "fail",
            f"{url}: {reason}",
            "check daemon.http, firewalls, and whether another program has the port",
        )
        return
    if b"sharpwatch_" in body:
        yield CheckResult("metrics", "ok", f"{url}, {output.number(len(body) / 1024, 3)} KiB")
    else:
        yield CheckResult(
            "metrics", "fail", f"{url} is not sharpwatch's", "another program has the port: change daemon.http"
        )
    if date:
        yield clock(parsedate_to_datetime(date).timestamp(), received)


def clock(theirs: float, ours: float) -> CheckResult:
    """Compare two clocks, given in unix seconds."""
    skew = abs(theirs - ours)
    if skew > _SKEW_SECONDS:
        return CheckResult("clock", "warn", f"{output.span(skew)} from the daemon's", "synchronise both with NTP")
    return CheckResult("clock", "ok", f"within {_SKEW_SECONDS:g} s of the daemon's")
