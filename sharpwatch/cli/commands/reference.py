"""`sharpwatch reference`: what the losses of a run are held against while it trains."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

import click

from sharpwatch.cli import output
from sharpwatch.cli.client import all_runs, author, operator, resolve_run, run_argument
from sharpwatch.cli.commands.replay import read_one, reading_options
from sharpwatch.cli.commands.runs import reference_words
from sharpwatch.cli.dry_run import dry_run_option, preview
from sharpwatch.cli.extras import needs_extra
from sharpwatch.cli.options import DaemonCommand, DaemonOptions, reason_option
from sharpwatch.cli.output import print_answer
from sharpwatch.errors import LogError
from sharpwatch.v1.operator_pb2 import GetRunRequest, SetReferenceRequest
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceStub

if TYPE_CHECKING:
    from collections.abc import Sequence


@click.command(
    cls=DaemonCommand,
    example="sharpwatch reference gpt2-b7 gpt2-a1 --reason 'same recipe, known to train'\n"
    "sharpwatch reference gpt2-b7 last-week.csv.gz\nsharpwatch reference gpt2-b7 --clear",
)
@run_argument()
@click.argument(
    "reference",
    metavar="[REFERENCE]",
    required=False,
    help="Another run of the daemon by its name in full, or a file of any kind that `sharpwatch replay` reads. "
    "Default: print the present one.",
)
@click.option("--clear", is_flag=True, help="Hold the run against no reference any more.")
@reading_options
@reason_option()
@dry_run_option
@click.pass_obj
def reference(  # noqa: PLR0913, PLR0917 - its options
    options: DaemonOptions,
    run: str,
    reference: str | None,
    clear: bool,
    format_: str | None,
    columns: tuple[tuple[str, str], ...],
    reason: str,
    dry_run: bool,
) -> None:
    """Set, clear or print what a run's losses are held against at equal steps.

    Where the run stays above its reference by more than chance and 1 %, the daemon raises SilentFailure, also for what
    lies behind. To set or clear a reference, the run's name must be given in full.
    """
    if clear and reference is not None:
        raise click.UsageError("--clear goes without REFERENCE")
    with operator(options) as stub:
        if not clear and reference is None:
            name = resolve_run(stub, run)
            detail = stub.GetRun(GetRunRequest(run=name)).detail
            found = detail.reference if detail.HasField("reference") else None
        else:
            name = run
            request = SetReferenceRequest(run=run, author=author(os.environ), reason=reason)
            if reference is not None:
                _name_reference(stub, request, reference, format_, columns)
            if dry_run:
                preview(options, [request])
                return
            answer = stub.SetReference(request)
            found = answer.reference if answer.HasField("reference") else None
    payload = {"run": name, "reference": None if found is None else output.to_dict(found)}
    print_answer(payload, f"{name}: {reference_words(found)}", as_json=options.json)


def _name_reference(
    stub: OperatorServiceStub,
    request: SetReferenceRequest,
    given: str,
    format_: str | None,
    columns: Sequence[tuple[str, str]],
) -> None:
    """Put a reference into a request: a run of the daemon by its name, or else the losses in a file."""
    request.reference = given
    if given in {run.run for run in all_runs(stub, given)}:
        return
    with needs_extra("reference", "daemon"):
        from sharpwatch.replay.files import ReadOptions  # noqa: PLC0415 - loads numpy
        from sharpwatch.replay.recorded_run import reference_losses  # noqa: PLC0415 - as above

        try:
            recorded = read_one(given, None, ReadOptions(cast("Any", format_), cast("Any", dict(columns))))
        except LogError as error:
            raise LogError(f"neither a run of the daemon nor a file that can be read: {error}", "REFERENCE") from None
        losses = reference_losses(recorded).thinned()
    request.steps.extend(losses.steps.tolist())
    request.losses.extend(losses.losses.tolist())
