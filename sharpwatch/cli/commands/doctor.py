"""`sharpwatch doctor`: checks of this machine and of the daemon, and what to do about each problem."""

from __future__ import annotations

import fcntl
import importlib
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from email.utils import parsedate_to_datetime
from importlib import metadata
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import click

from sharpwatch._version import __version__
from sharpwatch.cli import output
from sharpwatch.cli.options import DaemonCommand, DaemonOptions
from sharpwatch.cli.output import Grid, print_answer
from sharpwatch.common.endpoint import Address, split_addresses
from sharpwatch.errors import OperatorError, TokenFileError

if TYPE_CHECKING:
    from sharpwatch.cli.client import DaemonConnection
    from sharpwatch.v1.operator_pb2 import GetDaemonResponse


PIPE_BYTES = 2**20  # the size that the agent requests for the pipe between trainer and courier
_OLDEST_PYTHON = (3, 11)
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_SKEW_SECONDS = 5.0  # with more, times of steps and decisions cannot be compared; HTTP dates have whole seconds
_HTTP_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check.

    Attributes:
        check: What was checked.
        state: How it went.
        found: What was found.
        remedy: What to do, unless the state is ok.
    """

    check: str
    state: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


@click.command(cls=DaemonCommand, example="sharpwatch doctor")
@click.pass_obj
def doctor(options: DaemonOptions) -> int:
    """Check this installation and its daemon, and say what to do about each problem."""
    results = list(run_checks(options, os.environ))
    failed = any(result.state == "fail" for result in results)
    payload = {"state": "fail" if failed else "ok", "checks": [asdict(result) for result in results]}
    print_answer(payload, [check_table(results)], as_json=options.json)
    return int(failed)


def run_checks(options: DaemonOptions, environ: Mapping[str, str]) -> Iterator[CheckResult]:
    """Run all checks, of this machine first; a check whose precondition failed is left out."""
    yield check_python()
    yield from check_packages()
    yield check_device()
    yield check_pipe()
    wire = check_wire()
    yield wire
    # Everything below speaks the wire, and would only repeat the same error.
    if wire.state != "fail":
        yield from _daemon_checks(options, environ)


def _daemon_checks(options: DaemonOptions, environ: Mapping[str, str]) -> Iterator[CheckResult]:
    # Imported only now: this imports the wire code, which may not load.
    from sharpwatch.cli.client import find_connection  # noqa: PLC0415

    try:
        connection = find_connection(options, environ)
    except (OperatorError, TokenFileError) as error:
        yield CheckResult("token file", "fail", str(error))
        return
    yield check_token(connection)
    for address in split_addresses(connection.address):
        yield from check_daemon(replace(connection, address=address))


def check_table(results: Sequence[CheckResult]) -> Grid:
    """A row for each check, and below it one that says what to do."""
    rows: list[tuple[str, str, str]] = []
    for result in results:
        rows.append((result.state, result.check, result.found))
        if result.remedy:
            rows.append(("", "", f"→ {result.remedy}"))
    return Grid("lll", tuple(rows))


# This machine


def check_python() -> CheckResult:
    """Check that this Python is new enough."""
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < _OLDEST_PYTHON:
        return CheckResult("python", "fail", found, f"install Python {'.'.join(map(str, _OLDEST_PYTHON))} or newer")
    return CheckResult("python", "ok", f"{found} at {sys.executable}")


def check_packages() -> Iterator[CheckResult]:
    """Check the packages that sharpwatch declares: the agent needs its own, the extras may be missing."""
    try:
        declared = metadata.requires("sharpwatch") or []
    except metadata.PackageNotFoundError:
        yield CheckResult("packages", "fail", "sharpwatch is not installed", "pip install sharpwatch")
        return
    yield _group("agent's packages", [line for line in declared if "extra ==" not in line], "fail", "sharpwatch")
    for extra, check in (("cli", "command line's packages"), ("daemon", "daemon's packages")):
        lines = [line for line in declared if re.search(rf"extra == ['\"]{extra}['\"]", line)]
        yield _group(check, lines, "warn", f"sharpwatch[{extra}]")


def _group(check: str, declared: list[str], missing_is: Literal["warn", "fail"], install: str) -> CheckResult:
    names = [match[0] for line in declared if (match := _NAME.match(line)) and match[0] != "sharpwatch"]
    versions = {name: _version(name) for name in names}
    missing = [name for name, version in versions.items() if not version]
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    if missing:
        return CheckResult(check, missing_is, f"missing: {', '.join(missing)}", f"pip install '{install}'")
    return CheckResult(check, "ok", found)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def check_device() -> CheckResult:
    """Check that torch loads, and name the device that it computes curvature on."""
    try:
        # Imported, not looked up: a torch whose shared libraries are missing is installed and yet does not load.
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:  # OSError: a shared library of it can't be loaded
        return CheckResult("torch", "fail", f"does not load: {error}", "reinstall torch for this machine's CPU or GPU")
    if torch.cuda.is_available():
        return CheckResult("torch", "ok", f"{torch.__version__}, {torch.cuda.get_device_name()}")
    if torch.version.cuda:
        return CheckResult(
            "torch",
            "warn",
            f"{torch.__version__} built for CUDA {torch.version.cuda}, no GPU usable",
            "fine for a daemon on CPU; on a GPU node check nvidia-smi and CUDA_VISIBLE_DEVICES",
        )
    return CheckResult("torch", "ok", f"{torch.__version__}, CPU only, {torch.get_num_threads()} threads")


def check_pipe() -> CheckResult:
    """Check that the kernel grants the size of the agent's pipe; only Linux lets a process choose it."""
    if not hasattr(fcntl, "F_SETPIPE_SZ"):
        return CheckResult("pipe size", "ok", "fixed by this system")
    ends = os.pipe()
    try:
        # By trying: the limits also depend on the user's other pipes.
        size = fcntl.fcntl(ends[0], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:
        size = fcntl.fcntl(ends[0], fcntl.F_GETPIPE_SZ)
    finally:
        for end in ends:
            os.close(end)
    if size < PIPE_BYTES:
        return CheckResult(
            "pipe size",
            "warn",
            f"{size} bytes granted, {PIPE_BYTES} requested: samples drop while the courier is busy",
            "raise sysctl fs.pipe-max-size and fs.pipe-user-pages-soft",
        )
    return CheckResult("pipe size", "ok", f"{size} bytes")


def check_wire() -> CheckResult:
    """Check that the generated wire code loads with the installed protobuf and gRPC."""
    try:
        from google.protobuf.runtime_version import VersionError  # noqa: PLC0415 - protobuf may be missing
    except ImportError as error:
        return CheckResult("wire code", "fail", str(error), "pip install --upgrade protobuf")
    try:
        importlib.import_module("sharpwatch.v1.operator_pb2_grpc")
    except (ImportError, RuntimeError, VersionError) as error:
        remedy = "pip install --upgrade sharpwatch grpcio protobuf"
        return CheckResult("wire code", "fail", " ".join(str(error).split()), remedy)
    return CheckResult("wire code", "ok", "loads with the installed grpcio and protobuf")


# The daemon


def check_token(connection: DaemonConnection) -> CheckResult:
    """Check that there is a token to send with commands."""
    if connection.token:
        return CheckResult("token file", "ok", f"{connection.token_file}, readable by its owner only")
    remedy = "write your token there, mode 0600; over the daemon's unix socket none is needed"
    return CheckResult("token file", "warn", f"{connection.token_file} is not there: the daemon may refuse you", remedy)


def check_daemon(connection: DaemonConnection) -> Iterator[CheckResult]:
    """Ask the daemon about itself, and check its answer."""
    # Imported only now: these import the wire code, which may not load.
    from sharpwatch.cli.client import connected  # noqa: PLC0415
    from sharpwatch.v1.operator_pb2 import GetDaemonRequest  # noqa: PLC0415

    try:
        with connected(connection) as stub:
            answer = stub.GetDaemon(GetDaemonRequest())
    except OperatorError as error:
        yield CheckResult("daemon", "fail", str(error))
        return
    yield check_version(answer, connection.address)
    if answer.shards > 1:
        yield check_shard(answer, connection.address)
    yield check_role(answer)
    yield check_store(answer)
    if answer.http_address:
        yield from check_metrics(metrics_url(answer.http_address, connection), connection)
    else:
        yield CheckResult(
            "metrics", "warn", "the daemon serves no HTTP", "set daemon.http to have Prometheus scrape it"
        )


def check_version(answer: GetDaemonResponse, address: str) -> CheckResult:
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


def check_shard(answer: GetDaemonResponse, listed: str) -> CheckResult:
    """Check that a daemon of one of several shards is listed as other daemons name it."""
    found = f"{answer.shard}/{answer.shards}, advertised as {answer.address}"
    if answer.address == listed:
        return CheckResult("shard", "ok", found)
    return CheckResult(
        "shard",
        "warn",
        f"{found}, listed as {listed}",
        "agents and commands follow only addresses of their list: list it as it is advertised, to the letter",
    )


def check_role(answer: GetDaemonResponse) -> CheckResult:
    """Check that the daemon lets the caller send commands."""
    if answer.role == "operator":
        return CheckResult("role", "ok", "operator: may send commands")
    remedy = "to send commands, name the operator's token with --token-file"
    return CheckResult("role", "warn", f"{answer.role or 'none'}: may look but not act", remedy)


def check_store(answer: GetDaemonResponse) -> CheckResult:
    """Check that the daemon can write its journal."""
    if answer.store_writable:
        return CheckResult("store", "ok", f"{answer.store} is writable")
    remedy = "free space or fix permissions there; agents keep a limited spool until then"
    return CheckResult("store", "fail", f"{answer.store}: {answer.store_error or 'not writable'}", remedy)


def metrics_url(http_address: str, connection: DaemonConnection) -> str:
    """The URL of the daemon's metrics, as seen from this machine.

    Args:
        http_address: The daemon's HTTP address. If it listens on every address, the host of its gRPC is used.
        connection: How its gRPC was reached.
    """
    grpc_address = connection.address
    host, _, port = http_address.rpartition(":")
    if host in ("0.0.0.0", "[::]", "", "*"):  # noqa: S104 - compared, not bound
        host = "127.0.0.1" if grpc_address.startswith("unix:") else grpc_address.rpartition(":")[0]
    # One configuration gives both sides of the daemon TLS, or neither.
    return f"http{'' if connection.tls is None else 's'}://{host}:{port}/metrics"


def check_metrics(url: str, connection: DaemonConnection) -> Iterator[CheckResult]:
    """Check that `url` serves sharpwatch's metrics, and compare the daemon's clock with this machine's."""
    ca = None if connection.tls is None else connection.tls.ca
    request = urllib.request.Request(url)  # noqa: S310 - http or https
    # Of the URL, not of the connection: through a tunnel that is local, while HTTP may go over the network.
    if connection.token and (connection.tls is not None or Address(urlsplit(url).netloc).is_loopback):
        request.add_header("Authorization", f"Bearer {connection.token}")
    try:
        https = urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=ca))
        # Without the environment's proxy, which is for other hosts than the user's own daemon.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), https)
        with opener.open(request, timeout=_HTTP_SECONDS) as answer:
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
        yield check_clock(parsedate_to_datetime(date).timestamp(), received)


def check_clock(theirs: float, ours: float) -> CheckResult:
    """Compare two clocks, given in unix seconds."""
    skew = abs(theirs - ours)
    if skew > _SKEW_SECONDS:
        return CheckResult("clock", "warn", f"{output.span(skew)} from the daemon's", "synchronise both with NTP")
    return CheckResult("clock", "ok", f"within {_SKEW_SECONDS:g} s of the daemon's")
