"""`sharpwatch release`: give the name of a run to another trainer."""

from __future__ import annotations

import os

import click

from sharpwatch.cli.client import author, operator, run_argument
from sharpwatch.cli.dry_run import dry_run_option, preview
from sharpwatch.cli.options import DaemonCommand, DaemonOptions, reason_option
from sharpwatch.cli.output import print_answer
from sharpwatch.v1.operator_pb2 import ReleaseRunRequest


@click.command(cls=DaemonCommand, example="sharpwatch release gpt2-a1 --reason 'the token of its owner was replaced'")
@run_argument(whole=True)
@reason_option()
@dry_run_option
@click.pass_obj
def release(options: DaemonOptions, run: str, *, reason: str, dry_run: bool) -> None:
    """Give the name of a run to the next trainer of its job that asks for it, and end its session, if it has one.

    The trainer that has had it is not watched any more until it is started anew; it trains on.
    """
    request = ReleaseRunRequest(run=run, author=author(os.environ), reason=reason)
    if dry_run:
        preview(options, [request])
        return
    with operator(options) as stub:
        answer = stub.ReleaseRun(request)
    line = f"{run}: released; the next trainer of {answer.run.training_job} that names it has it"
    print_answer(answer, line, as_json=options.json)
