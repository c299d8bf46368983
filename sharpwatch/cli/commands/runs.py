"""`sharpwatch jobs`, `show` and `mode`: the runs that a daemon knows, and one of them."""

from __future__ import annotations

import os
import time

import click

from sharpwatch.cli.client.client import author, operator, resolve_run
from sharpwatch.cli.options import DaemonCommand, DaemonOptions, reason_option, run_argument
from sharpwatch.cli.output import formatting
from sharpwatch.cli.output.output import show as print_answer
from sharpwatch.cli.output.run_view import phase, run_view
from sharpwatch.cli.output.tables import Grid
from sharpwatch.v1.operator_pb2 import GetRunRequest, ListRunsRequest, Run, SetModeRequest

_MODES = ("observe", "advise", "enforce")


@click.command(cls=DaemonCommand, example="sharpwatch jobs\nsharpwatch jobs --json")
@click.pass_obj
def jobs(options: DaemonOptions) -> None:
    """List the runs that the daemon knows, by training job."""
    with operator(options) as stub:
        response = stub.ListRuns(ListRunsRequest())
    print_answer(response, [run_table(list(response.runs), time.time())], as_json=options.json)


def run_table(runs: list[Run], now: float) -> Grid:
    """A row for each run, sorted by training job; `now` in unix seconds."""
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


@click.command(cls=DaemonCommand, example="sharpwatch show gpt2-a1")
@run_argument()
@click.pass_obj
def show(options: DaemonOptions, run: str) -> None:
    """Show one run: its state, the sharpness of its blocks, its alerts, and failures of its agent."""
    with operator(options) as stub:
        detail = stub.GetRun(GetRunRequest(run=resolve_run(stub, run))).detail
    print_answer(detail, run_view(detail, time.time()), as_json=options.json)


@click.command(cls=DaemonCommand, example="sharpwatch mode gpt2-a1 enforce --reason 'on call tonight'")
@run_argument()
@click.argument(
    "mode",
    metavar="[MODE]",
    required=False,
    type=click.Choice(_MODES),
    help="The run's new mode: observe, advise or enforce. Default: print the present one.",
)
@reason_option()
@click.pass_obj
def mode(options: DaemonOptions, run: str, mode: str | None, reason: str) -> None:
    """Print or set what the daemon's policies may do to a run.

    In mode observe they only record decisions, in mode advise they propose them to an operator, and in mode enforce
    they act.
    """
    with operator(options) as stub:
        name = resolve_run(stub, run)
        if mode:
            request = SetModeRequest(run=name, mode=mode, author=author(os.environ), reason=reason)
            found = stub.SetMode(request).run
        else:
            found = stub.GetRun(GetRunRequest(run=name)).detail.run
    print_answer(found, f"{found.run}: {found.mode}", as_json=options.json)
