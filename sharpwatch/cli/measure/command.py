"""`sharpwatch measure`: one look at a checkpoint, with its errors, resumable."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from sharpwatch.cli.arguments import Command
from sharpwatch.cli.measure import arguments
from sharpwatch.cli.measure.arguments import STANDARD_OUTPUT, Request
from sharpwatch.cli.measure.files import check_writable, need, write_whole
from sharpwatch.cli.output.tables import write
from sharpwatch.errors import PrecisionError

if TYPE_CHECKING:
    from sharpwatch.cli.measure.session import Session
    from sharpwatch.curvature.measure.report import SharpnessReport

_SIGNALLED = 128  # exit status of what a signal ended, plus the signal's number


def _arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add(parser)
    parser.set_defaults(refuse=parser.error)


def _measure(args: argparse.Namespace) -> int:
    request = arguments.request(args)
    files = [path for path in (request.json, request.plot, request.state) if path not in (None, STANDARD_OUTPUT)]
    if len(set(files)) < len(files):
        args.refuse("--json, --plot and --state need a file each")
    _check_outputs(request)
    # Loaded only now: it takes torch seconds to load, and a mistake above should be answered at once.
    from sharpwatch.cli.measure.session import Session  # noqa: PLC0415

    session = Session(request)
    stopped = session.run()
    return _interrupted(session, stopped) if stopped else _finish(session)


def _check_outputs(request: Request) -> None:
    """What could fail only at the end, tried before anything starts."""
    for path, option in ((request.json, "--json"), (request.plot, "--plot"), (request.state, "--state")):
        if path is not None and path != STANDARD_OUTPUT:
            check_writable(path, option)
    if request.plot is not None:
        need("matplotlib", "--plot")


def _interrupted(session: Session, signal: int) -> int:
    """Show what there is, and say how to go on; the files are left for a whole measurement."""
    if session.pieces:
        _show(session, session.report())
    print(f"sharpwatch: interrupted after {session.told()}, {session.kept()}", file=sys.stderr)
    return _SIGNALLED + signal


def _finish(session: Session) -> int:
    request, report = session.request, session.report()
    if request.json is not None and request.json != STANDARD_OUTPUT:
        write_whole(request.json, _json(session, report).encode())
    if request.json == STANDARD_OUTPUT:
        print(_json(session, report), end="")
    _show(session, report)
    if request.plot is not None:
        from sharpwatch.cli.measure.plot import draw  # noqa: PLC0415 - only where it was asked for

        write_whole(request.plot, draw(report, session.title(report), request.plot.suffix))
    if report.unreached:
        raise PrecisionError(report)
    return 0


def _show(session: Session, report: SharpnessReport) -> None:
    from sharpwatch.cli.measure.table import tables  # noqa: PLC0415 - as above

    if not session.request.quiet and session.request.json != STANDARD_OUTPUT:
        write(tables(report, layers=session.request.layers))


def _json(session: Session, report: SharpnessReport) -> str:
    found = {"measured": session.provenance(), **report.to_dict()}
    return json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


COMMANDS = {"measure": Command(_arguments, _measure)}
