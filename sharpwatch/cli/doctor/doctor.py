"""`sharpwatch doctor`: what stands in the way of watching a run from here, and what to do about it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping

from sharpwatch.cli.arguments import Command
from sharpwatch.cli.doctor import local_checks
from sharpwatch.cli.doctor.local_checks import CheckResult
from sharpwatch.cli.output.output import show
from sharpwatch.cli.output.tables import Grid
from sharpwatch.errors import OperatorError, TokenFileError


def _nothing(parser: argparse.ArgumentParser) -> None:
    """No arguments of its own."""


def _doctor(args: argparse.Namespace) -> int:
    findings = list(examine(vars(args), os.environ))
    worst = "fail" if any(finding.state == "fail" for finding in findings) else "ok"
    payload = {
        "state": worst,
        "checks": [
            {"check": finding.check, "state": finding.state, "found": finding.found, "remedy": finding.remedy}
            for finding in findings
        ],
    }
    show(args, payload, [table(findings)])
    return int(worst == "fail")


def examine(given: Mapping[str, object], environ: Mapping[str, str]) -> Iterator[CheckResult]:
    """Every check, from this machine outwards; what stands on a failed one is left out."""
    yield local_checks.python()
    yield from local_checks.packages()
    yield local_checks.device()
    yield local_checks.pipe()
    wire = local_checks.wire()
    yield wire
    if wire.state != "fail":
        yield from _daemon(given, environ)


def _daemon(given: Mapping[str, object], environ: Mapping[str, str]) -> Iterator[CheckResult]:
    # Loaded only now: these need the wire code to load.
    from sharpwatch.cli.client.client import endpoint  # noqa: PLC0415
    from sharpwatch.cli.doctor import daemon_checks  # noqa: PLC0415

    try:
        to = endpoint(given, environ)
    except (OperatorError, TokenFileError) as error:
        yield CheckResult("token file", "fail", str(error))
        return
    yield daemon_checks.token(to)
    yield from daemon_checks.daemon(to)


def table(findings: list[CheckResult]) -> Grid:
    """A line for each check, and one below it that says what to do."""
    rows: list[tuple[str, str, str]] = []
    for finding in findings:
        rows.append((finding.state, finding.check, finding.found))
        if finding.remedy:
            rows.append(("", "", f"→ {finding.remedy}"))
    return Grid("lll", tuple(rows))


COMMANDS = {"doctor": Command(_nothing, _doctor)}
