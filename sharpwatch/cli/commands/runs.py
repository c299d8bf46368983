"""`sharpwatch jobs`, `show` and `mode`: the runs a daemon knows, and one of them."""

from __future__ import annotations

import argparse
import os
import time

from sharpwatch.cli.arguments import Command, add_reason, add_run
from sharpwatch.cli.client.client import author, operator, resolve_run
from sharpwatch.cli.output import formatting
from sharpwatch.cli.output.output import show
from sharpwatch.cli.output.run_view import phase, picture
from sharpwatch.cli.output.tables import Grid
from sharpwatch.v1.operator_pb2 import GetRunRequest, ListRunsRequest, Run, SetModeRequest

_MODES = ("observe", "advise", "enforce")


def _nothing(parser: argparse.ArgumentParser) -> None:
    """No arguments of its own."""


def _jobs(args: argparse.Namespace) -> int:
    with operator(args) as stub:
        response = stub.ListRuns(ListRunsRequest())
    show(args, response, [table(list(response.runs), time.time())])
    return 0


def table(runs: list[Run], now: float) -> Grid:
    """Runs by training job."""
    return Grid(
        "lllrrlrrl",
        tuple(
            (
                run.training_job,
                run.run,
                phase(run),
                str(run.step),
                formatting.optional(run.loss if run.HasField("loss") else None),
                run.mode,
                str(run.lr_revision),
                str(run.active_alerts),
                formatting.age(run.last_sample_at_unix_ns, now),
            )
            for run in sorted(runs, key=lambda run: (run.training_job, run.run))
        ),
        ("training job", "run", "phase", "step", "loss", "mode", "LR revision", "alerts", "last sample"),
        empty="no run yet; a trainer shows up here once sharpwatch.attach() has reached this daemon",
    )


def _show(args: argparse.Namespace) -> int:
    with operator(args) as stub:
        detail = stub.GetRun(GetRunRequest(run=resolve_run(stub, args.run))).detail
    show(args, detail, picture(detail, time.time()))
    return 0


def _mode_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "mode",
        metavar="MODE",
        nargs="?",
        choices=_MODES,
        help="observe, advise or enforce: the mode to put the run in (default: print it)",
    )
    add_reason(parser)


def _mode(args: argparse.Namespace) -> int:
    with operator(args) as stub:
        name = resolve_run(stub, args.run)
        if args.mode:
            request = SetModeRequest(run=name, mode=args.mode, author=author(os.environ), reason=args.reason)
            run = stub.SetMode(request).run
        else:
            run = stub.GetRun(GetRunRequest(run=name)).detail.run
    show(args, run, f"{run.run}: {run.mode}")
    return 0


COMMANDS = {
    "jobs": Command(_nothing, _jobs),
    "show": Command(add_run, _show),
    "mode": Command(_mode_arguments, _mode),
}
