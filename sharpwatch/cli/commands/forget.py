"""`sharpwatch forget`: delete all that a daemon keeps of a run that has ended."""

from __future__ import annotations

import os

import click

from sharpwatch.cli.client import author, operator, run_argument
from sharpwatch.cli.dry_run import dry_run_option, preview
from sharpwatch.cli.options import DaemonCommand, DaemonOptions, reason_option
from sharpwatch.cli.output import describe_size, print_answer
from sharpwatch.v1.operator_pb2 import ForgetRunRequest


@click.command(cls=DaemonCommand, example="sharpwatch forget gpt2-a1 --dry-run\nsharpwatch forget gpt2-a1")
@run_argument(whole=True)
@reason_option()
@dry_run_option
@click.pass_obj
def forget(options: DaemonOptions, run: str, *, reason: str, dry_run: bool) -> None:
    """Delete all that the daemon keeps of a run that has ended: samples, incidents, decisions, revisions.

    It can't be undone. A run with a live trainer is refused. That you asked for it is kept in the audit.
    """
    request = ForgetRunRequest(run=run, author=author(os.environ), reason=reason)
    if dry_run:
        preview(options, [request])
        return
    with operator(options) as stub:
        gone = stub.ForgetRun(request)
    print_answer(gone, f"forgot run {gone.run}: {describe_size(gone)}", as_json=options.json)
