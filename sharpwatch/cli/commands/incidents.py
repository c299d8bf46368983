"""`sharpwatch incidents` and `ack`: what the daemon's detectors have found in a run, and that someone has seen it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace

import click

from sharpwatch.cli import output
from sharpwatch.cli.client import all_runs, author, completions, operator, resolve_run, run_argument
from sharpwatch.cli.dry_run import dry_run_option, preview
from sharpwatch.cli.options import DaemonCommand, DaemonOptions, reason_option
from sharpwatch.cli.output import Grid, print_answer
from sharpwatch.v1.operator_pb2 import AcknowledgeIncidentRequest, Alert, GetRunRequest
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceStub

_NAMED = 3  # layer blocks that a table names
WHOLE_MODEL = "whole model"
# What stands for the model in the replay of a log, which says nothing of layer blocks.
_STANDS_FOR_ALL = ("the model",)


@click.command(cls=DaemonCommand, example="sharpwatch incidents gpt2-a1\nsharpwatch incidents gpt2-a1 --all")
@run_argument()
@click.option("--all", "with_closed", is_flag=True, help="Closed ones too. Default: only those that are open.")
@click.pass_obj
def incidents(options: DaemonOptions, run: str, with_closed: bool) -> None:
    """List the incidents of a run, the newest first: what is wrong, where and since when."""
    with operator(options) as stub:
        detail = stub.GetRun(GetRunRequest(run=resolve_run(stub, run))).detail
    found = [alert for alert in detail.alerts if with_closed or alert.active]
    payload = {"run": detail.run.run, "incidents": [output.to_dict(alert) for alert in found]}
    hidden = len(detail.alerts) - len(found)
    is_cut = with_closed and detail.alerts_total > len(detail.alerts)
    title = f"the newest {len(detail.alerts)} of {detail.alerts_total} incidents" if is_cut else ""
    print_answer(payload, [replace(incident_table(found, hidden), title=title)], as_json=options.json)


def incident_table(found: Sequence[Alert], hidden: int = 0) -> Grid:
    """A row for each incident, the newest first.

    Args:
        found: The incidents.
        hidden: How many closed ones are left out.
    """
    more = f"; {hidden} closed, see --all" if hidden else ""
    return Grid(
        "lrrllllll",
        tuple(_row(alert) for alert in sorted(found, key=lambda alert: -alert.first_step)),
        ("id", "onset", "opened", "severity", "cause", "name", "culprit", "evidence", "acknowledged"),
        empty=f"no open incident{more}" if more else "no incident",
    )


def _row(alert: Alert) -> tuple[str, ...]:
    return (
        alert.id,
        str(alert.onset),
        str(alert.first_step),
        alert.severity,
        alert.cause,
        alert.name,
        culprit_of(alert),
        alert.evidence + (f" (closed: {alert.closed})" if alert.closed else ""),
        alert.acknowledged or output.ABSENT,
    )


def culprit_of(alert: Alert) -> str:
    """As `culprit`, of an incident in an answer."""
    return culprit(alert.layer_blocks or alert.blocks, alert.parameter, alert.rank if alert.HasField("rank") else None)


def culprit(layer_blocks: Iterable[str], parameter: str = "", rank: int | None = None) -> str:
    """What an incident is about.

    Args:
        layer_blocks: The layer blocks, the likeliest culprit first; the first three are named.
        parameter: The parameter of the first one, if known.
        rank: The rank that differs, if one does.
    """
    names = tuple(layer_blocks)
    whose = "" if rank is None else f"rank {rank}"
    if names in {(), _STANDS_FOR_ALL}:
        return whose or WHOLE_MODEL
    rest = len(names) - _NAMED
    first = f"{names[0]} ({parameter})" if parameter else names[0]
    named = ", ".join((first, *names[1:_NAMED])) + (f" and {rest} more" if rest > 0 else "")
    return f"{named}; {whose}" if whose else named


@click.command(cls=DaemonCommand, example="sharpwatch ack 3f9c01d2ab47 --reason 'bad shard, skipping it'")
@click.argument(
    "id_",
    metavar="ID",
    help="The incident's id in full, as `sharpwatch incidents` shows it.",
    shell_complete=lambda ctx, param, incomplete: completions(ctx, _open_incidents, incomplete),  # noqa: ARG005
)
@reason_option()
@dry_run_option
@click.pass_obj
def ack(options: DaemonOptions, id_: str, *, reason: str, dry_run: bool) -> None:
    """Note that you have seen an incident. It stays open, and policies go on."""
    request = AcknowledgeIncidentRequest(incident_id=id_, author=author(os.environ), reason=reason)
    if dry_run:
        preview(options, [request])
        return
    with operator(options) as stub:
        incident = stub.AcknowledgeIncident(request).incident
    line = f"incident {incident.id} of {incident.run} ({incident.name}) acknowledged: {incident.acknowledged}"
    print_answer(incident, line, as_json=options.json)


def _open_incidents(stub: OperatorServiceStub) -> list[str]:
    runs = [run.run for run in all_runs(stub) if run.active_alerts]
    details = [stub.GetRun(GetRunRequest(run=run)).detail for run in runs]
    return [alert.id for detail in details for alert in detail.alerts if alert.active]
