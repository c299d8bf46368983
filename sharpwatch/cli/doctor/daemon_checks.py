"""Checks of the daemon from here: reachable, who we are to it, its store, its metrics, its clock."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.utils import parsedate_to_datetime

from sharpwatch._version import __version__
from sharpwatch.cli.client.client import Endpoint, connected
from sharpwatch.cli.doctor.local_checks import CheckResult
from sharpwatch.cli.output import formatting
from sharpwatch.errors import OperatorError
from sharpwatch.v1.operator_pb2 import GetDaemonRequest, GetDaemonResponse

_SKEW_SECONDS = 5.0  # an HTTP date has whole seconds; past this, times of steps and of decisions can't be compared
_HTTP_SECONDS = 5.0


def token(to: Endpoint) -> CheckResult:
    """Whether commands can show a token."""
    if to.token:
        return CheckResult("token file", "ok", f"{to.token_file}, its owner's alone")
    remedy = "write the daemon's operator token there, mode 0600; over a unix socket your user id may be enough"
    return CheckResult("token file", "warn", f"{to.token_file} is not there: commands may be refused", remedy)


def daemon(to: Endpoint) -> Iterator[CheckResult]:
    """What the daemon says of itself."""
    try:
        with connected(to) as stub:
            about = stub.GetDaemon(GetDaemonRequest())
    except OperatorError as error:
        yield CheckResult("daemon", "fail", str(error))
        return
    yield version(about, to.address)
    yield role(about)
    yield store(about)
    if about.http_address:
        yield from metrics(metrics_url(about.http_address, to.address))
    else:
        yield CheckResult(
            "metrics", "warn", "the daemon serves no HTTP", "set daemon.http to have Prometheus scrape it"
        )


def version(about: GetDaemonResponse, address: str) -> CheckResult:
    """Whether daemon and command line are of one version."""
    found = (
        f"{address}: sharpwatch {about.version}, up {formatting.span(about.uptime_seconds)}, "
        f"{about.runs} runs, estimates on {about.device}"
    )
    if about.version != __version__:
        return CheckResult("daemon", "warn", found, f"this command is {__version__}: install one version everywhere")
    return CheckResult("daemon", "ok", found)


def role(about: GetDaemonResponse) -> CheckResult:
    """What the daemon lets the caller do."""
    if about.role == "operator":
        return CheckResult("role", "ok", "operator: may send commands")
    remedy = "to send commands, name the operator's token with --token-file"
    return CheckResult("role", "warn", f"{about.role or 'none'}: may look, not act", remedy)


def store(about: GetDaemonResponse) -> CheckResult:
    """Whether the journal takes writes."""
    if about.store_writable:
        return CheckResult("store", "ok", f"{about.store} takes writes")
    remedy = "free space or mend permissions there; agents keep a limited spool until then"
    return CheckResult("store", "fail", f"{about.store}: {about.store_error or 'not writable'}", remedy)


def metrics_url(http_address: str, grpc_address: str) -> str:
    """Where /metrics is seen from here; a daemon that listens on every address is asked where gRPC was."""
    host, _, port = http_address.rpartition(":")
    if host in ("0.0.0.0", "[::]", "", "*"):  # noqa: S104 - compared, not bound
        host = "127.0.0.1" if grpc_address.startswith("unix:") else grpc_address.rpartition(":")[0]
    return f"http://{host}:{port}/metrics"


def metrics(url: str) -> Iterator[CheckResult]:
    """Whether Prometheus would find metrics at `url`, and how far the daemon's clock is from this one's."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_HTTP_SECONDS) as answer:
            body, date, received = answer.read(), answer.headers["Date"], time.time()
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        yield CheckResult(
            "metrics", "fail", f"{url}: {reason}", "check daemon.http, firewalls and what else has the port"
        )
        return
    if b"sharpwatch_" in body:
        yield CheckResult("metrics", "ok", f"{url}, {formatting.number(len(body) / 1024, 3)} KiB")
    else:
        yield CheckResult(
            "metrics", "fail", f"{url} is not sharpwatch's", "something else has the port: change daemon.http"
        )
    if date:
        yield clock(parsedate_to_datetime(date).timestamp(), received)


def clock(theirs: float, ours: float) -> CheckResult:
    """How far two clocks are apart, in unix seconds."""
    skew = abs(theirs - ours)
    if skew > _SKEW_SECONDS:
        return CheckResult("clock", "warn", f"{formatting.span(skew)} from the daemon's", "synchronise both with NTP")
    return CheckResult("clock", "ok", f"within {_SKEW_SECONDS:g} s of the daemon's")
