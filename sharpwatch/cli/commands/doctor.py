"""`sharpwatch doctor`: what keeps a run from being watched from here, and what to do about it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import click

from sharpwatch.cli.doctor import local_checks
from sharpwatch.cli.doctor.local_checks import CheckResult
from sharpwatch.cli.options import DaemonCommand, DaemonOptions
from sharpwatch.cli.output import Grid, print_answer
from sharpwatch.errors import OperatorError, TokenFileError


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
    yield local_checks.python()
    yield from local_checks.packages()
    yield local_checks.device()
    yield local_checks.pipe()
    wire = local_checks.wire()
    yield wire
    if wire.state != "fail":
        yield from _daemon_checks(options, environ)


def _daemon_checks(options: DaemonOptions, environ: Mapping[str, str]) -> Iterator[CheckResult]:
    # Imported only now: these import the wire code, which may not load.
    from sharpwatch.cli.client.client import find_connection  # noqa: PLC0415
    from sharpwatch.cli.doctor import daemon_checks  # noqa: PLC0415

    try:
        connection = find_connection(options, environ)
    except (OperatorError, TokenFileError) as error:
        yield CheckResult("token file", "fail", str(error))
        return
    yield daemon_checks.token(connection)
    yield from daemon_checks.daemon(connection)


def check_table(results: Sequence[CheckResult]) -> Grid:
    """A row for each check, and below it one that says what to do."""
    rows: list[tuple[str, str, str]] = []
    for result in results:
        rows.append((result.state, result.check, result.found))
        if result.remedy:
            rows.append(("", "", f"→ {result.remedy}"))
    return Grid("lll", tuple(rows))
