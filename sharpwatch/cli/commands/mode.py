"""`sharpwatch mode`: what the daemon's policies may do to a run, or to all runs at once."""

from __future__ import annotations

import os

import click
import grpc

from sharpwatch.cli import output
from sharpwatch.cli.client import (
    all_runs,
    author,
    connected,
    find_connection,
    operator,
    plain_words,
    resolve_run,
    run_argument,
)
from sharpwatch.cli.dry_run import dry_run_option, preview
from sharpwatch.cli.options import DaemonCommand, DaemonOptions, reason_option
from sharpwatch.cli.output import print_answer, to_dict
from sharpwatch.errors import OperatorError
from sharpwatch.v1.operator_pb2 import (
    GetRunRequest,
    ListRunsRequest,
    Run,
    SetModeRequest,
)
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceStub

_MODES = ("observe", "advise", "enforce")
_AT_ONCE = 64  # calls: the daemon has to bring ended runs back from its journal


@click.command(
    cls=DaemonCommand,
    example="sharpwatch mode gpt2-a1 enforce --reason 'on call tonight'\n"
    "sharpwatch mode --all observe --reason 'a policy cuts healthy runs'",
)
@run_argument(required=False)
@click.argument(
    "mode",
    metavar="[MODE]",
    required=False,
    type=click.Choice(_MODES),
    help="The new mode: observe, advise or enforce. Default: print the present one.",
)
@click.option("--all", "every", is_flag=True, help="In place of RUN: set the mode of every run.")
@reason_option()
@dry_run_option
@click.pass_obj
def mode(  # noqa: PLR0913 - click passes every option by name
    options: DaemonOptions, run: str | None, mode: str | None, *, every: bool, reason: str, dry_run: bool
) -> None:
    """Print or set what the daemon's policies may do to a run.

    In mode observe they only record decisions, in mode advise they propose them to an operator, and in mode enforce
    they act. Observe gives no multiplier back: the command says which stay in force. To set a mode, the run's name
    must be given in full.
    """
    if every:
        # The only argument is the mode then, though it stands where RUN does.
        if mode is not None or run not in _MODES:
            raise click.UsageError(f"--all takes a MODE and no RUN; MODE is one of {', '.join(_MODES)}")
        (_preview_all if dry_run else _set_all)(options, run, reason)
        return
    if run is None:
        raise click.UsageError("Missing argument 'RUN'; --all MODE sets every run")
    if mode and dry_run:
        preview(options, [_request(run, mode, reason)])
        return
    with operator(options) as stub:
        if mode:
            found = stub.SetMode(_request(run, mode, reason)).run
        else:
            found = stub.GetRun(GetRunRequest(run=resolve_run(stub, run))).detail.run
    print_answer(found, _set_line(found) if mode else mode_words(found), as_json=options.json)


def mode_words(run: Run) -> str:
    """A run's mode, and who set it when and why, or that it is the one of the configuration."""
    if not run.HasField("mode_set"):
        return f"{run.run}: {run.mode}, by the configuration"
    by = run.mode_set
    reason = f": {by.reason}" if by.reason else ""
    return f"{run.run}: {run.mode}, set by {by.author} at {output.timestamp(by.set_at_unix_ns)}{reason}"


def _set_line(run: Run) -> str:
    kept = output.kept_in_force(run) if run.mode == "observe" else ""
    return f"{run.run}: {run.mode}" + (f"; {kept}" if kept else "")


def _request(run: str, mode: str, reason: str) -> SetModeRequest:
    return SetModeRequest(run=run, mode=mode, author=author(os.environ), reason=reason)


def _set_all(options: DaemonOptions, mode: str, reason: str) -> None:
    """Set every run's mode; a run that can't be set does not keep the others from it."""
    connection = find_connection(options, os.environ)
    done: list[Run] = []
    failed: dict[str, str] = {}
    with connected(connection) as stub:
        names = _all_runs(stub)
        for some in (names[first : first + _AT_ONCE] for first in range(0, len(names), _AT_ONCE)):
            # At once, so that a daemon that does not answer holds up the command for one deadline and not one a run.
            calls = {name: stub.SetMode.future(_request(name, mode, reason)) for name in some}
            for name, call in calls.items():
                try:
                    done.append(call.result().run)
                except grpc.RpcError as error:
                    failed[name] = plain_words(error.code(), error.details() or "", connection)
        missing = stub.missing
    payload = {"runs": [to_dict(run) for run in done], "failed": failed} | ({"missing": missing} if missing else {})
    lines = [_set_line(run) for run in done]
    if lines or options.json or not (failed or missing):
        print_answer(payload, "\n".join(lines) or "there is no run", as_json=options.json)
    not_set = [f"mode {mode} not set for {len(failed)} of {len(names)} runs: {_by_reason(failed)}"] if failed else []
    if missing:
        not_set.append(f"mode {mode} not set for all runs: {missing}")
    if not_set:
        raise OperatorError("; ".join(not_set))


def _preview_all(options: DaemonOptions, mode: str, reason: str) -> None:
    with operator(options) as stub:
        names = _all_runs(stub)
        if stub.missing:
            raise OperatorError(stub.missing)
    preview(options, [_request(name, mode, reason) for name in names])


def _all_runs(stub: OperatorServiceStub) -> list[str]:
    """Ended ones too, after the others: a job that is resumed comes back in the mode that it had."""
    first = [run.run for run in stub.ListRuns(ListRunsRequest(held_only=True)).runs]
    return list(dict.fromkeys((*first, *(run.run for run in all_runs(stub)))))


def _by_reason(failed: dict[str, str]) -> str:
    """All names, those with the same reason together."""
    names: dict[str, list[str]] = {}
    for name, reason in failed.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(each)}: {reason}" for reason, each in names.items())
