"""The command `sharpwatch report`: asks the daemon for all about a run, and writes the page."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import click

from sharpwatch.cli.client import all_decisions, audit, operator, resolve_run, run_argument
from sharpwatch.cli.extras import needs_extra
from sharpwatch.cli.measure.files import check_writable, write_whole
from sharpwatch.cli.options import DaemonCommand, DaemonOptions, ParsedText
from sharpwatch.cli.output import print_answer
from sharpwatch.v1.operator_pb2 import (
    GetHistoryRequest,
    GetRunRequest,
)
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceStub

_MOST = 10_000  # decisions
_HISTORY_SECONDS = 60.0  # deadline: the daemon decodes thousands of samples, beside its work
_STANDARD_OUTPUT = "-"


@click.command(cls=DaemonCommand, example="sharpwatch report gpt2-a1 --output incident.html")
@run_argument()
@click.option(
    "--output",
    metavar="FILE.html",
    type=ParsedText("output", str),
    help="The file, which is overwritten; - for standard output. Default: the run's name with .html.",
)
@click.pass_obj
def report(options: DaemonOptions, run: str, *, output: str | None) -> None:
    """Write what happened in a run as one HTML file.

    It has the signals by step, incidents, decisions with everything that became of them, checkpoints, and what all that
    has cost in steps and hours. The file needs nothing else: no script, no network.
    """
    if output not in (None, _STANDARD_OUTPUT):
        check_writable(Path(output), "--output")
    with operator(options) as stub:
        name = resolve_run(stub, run)
        with needs_extra("report", "daemon"):
            text = _page(stub, name)
    if output == _STANDARD_OUTPUT:
        sys.stdout.write(text)
        return
    path = Path(output or f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name).lstrip('.-') or 'run'}.html")
    write_whole(path, text.encode())
    print_answer({"run": name, "file": str(path)}, f"report of {name} written to {path}", as_json=options.json)


def _page(stub: OperatorServiceStub, run: str) -> str:
    from sharpwatch.cli.report.page import Report, page  # noqa: PLC0415 - what draws it loads numpy

    detail = stub.GetRun(GetRunRequest(run=run)).detail
    decisions = all_decisions(stub, run, _MOST)
    history = stub.GetHistory(GetHistoryRequest(run=run), timeout=_HISTORY_SECONDS)
    return page(Report(detail, decisions[::-1], audit(stub, run), history, time.time()))
