"""`sharpwatch silence`: keep policies from acting on some incidents for some time."""

from __future__ import annotations

import os
from collections.abc import Iterable

import click

from sharpwatch.cli import output
from sharpwatch.cli.client import author, completions, operator, run_argument
from sharpwatch.cli.dry_run import dry_run_option, preview
from sharpwatch.cli.options import DURATION, CommandGroup, DaemonCommand, DaemonOptions, reason_option
from sharpwatch.cli.output import Grid, print_answer
from sharpwatch.v1.operator_pb2 import AddSilenceRequest, ExpireSilenceRequest, ListSilencesRequest, Silence
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceStub

silence = CommandGroup(
    "silence",
    help="Keep policies from acting on some incidents for some time. Incidents are found, exported and listed as ever, "
    "and policies that only notify go on.",
    example="sharpwatch silence add gpt2-a1 --for 2h --comment 'changing the data by hand'\n"
    "sharpwatch silence expire 3f9c01d2ab47",
)


@silence.command(
    cls=DaemonCommand,
    example="sharpwatch silence add gpt2-a1 --for 2h --comment 'changing the data by hand'\n"
    "sharpwatch silence add --cause data --for 1d --comment 'shards of last night are bad'",
)
@run_argument(required=False, whole=True)
@click.option("--alert", metavar="NAME", default="", help="Incidents with this alert. Default: with any.")
@click.option("--cause", metavar="CAUSE", default="", help="Incidents of this cause. Default: of any.")
@click.option("--policy", metavar="NAME", default="", help="Only this policy. Default: all.")
@click.option(
    "--for",
    "duration",
    metavar="DURATION",
    type=DURATION,
    required=True,
    help="How long, from now on: 1s to 30d, such as 90s, 30m, 2h or 1d.",
)
@click.option("--comment", metavar="TEXT", required=True, help="Why; it stands in each decision that is refused.")
@dry_run_option
@click.pass_obj
def add(  # noqa: PLR0913 - click passes every option by name
    options: DaemonOptions,
    run: str | None,
    *,
    alert: str,
    cause: str,
    policy: str,
    duration: float,
    comment: str,
    dry_run: bool,
) -> None:
    """Add a silence: until it ends, policies refuse to act on the incidents that match all that is given.

    Without RUN it is for all runs, those that begin later too. RUN, --alert, --cause or --policy must be given.
    """
    if not (run or alert or cause or policy):
        raise click.UsageError("name what to silence: RUN, --alert, --cause or --policy")
    request = AddSilenceRequest(
        run=run or "",
        alert=alert,
        cause=cause,
        policy=policy,
        duration_seconds=duration,
        author=author(os.environ),
        reason=comment,
    )
    if dry_run:
        preview(options, [request])
        return
    with operator(options) as stub:
        added = stub.AddSilence(request).silence
    until = output.timestamp(added.ends_at_unix_ns)
    print_answer(added, f"silence {added.id} ({matched(added)}) until {until}", as_json=options.json)


@silence.command("list", cls=DaemonCommand, example="sharpwatch silence list\nsharpwatch silence list --all")
@click.option("--all", "with_ended", is_flag=True, help="Those that have ended too. Default: only active ones.")
@click.pass_obj
def list_silences(options: DaemonOptions, with_ended: bool) -> None:
    """List the silences, the newest first: what each matches, until when, who added it and why."""
    with operator(options) as stub:
        found = stub.ListSilences(ListSilencesRequest(include_ended=with_ended))
    print_answer(found, [silence_table(found.silences)], as_json=options.json)


@silence.command(cls=DaemonCommand, example="sharpwatch silence expire 3f9c01d2ab47 --reason 'the data are good again'")
@click.argument(
    "id_",
    metavar="ID",
    help="The silence's id in full, as `sharpwatch silence list` shows it.",
    shell_complete=lambda ctx, param, incomplete: completions(ctx, _active, incomplete),  # noqa: ARG005
)
@reason_option()
@dry_run_option
@click.pass_obj
def expire(options: DaemonOptions, id_: str, *, reason: str, dry_run: bool) -> None:
    """End a silence before its time."""
    request = ExpireSilenceRequest(id=id_, author=author(os.environ), reason=reason)
    if dry_run:
        preview(options, [request])
        return
    with operator(options) as stub:
        ended = stub.ExpireSilence(request).silence
    print_answer(ended, f"silence {ended.id} ({matched(ended)}) has ended", as_json=options.json)


def silence_table(found: Iterable[Silence]) -> Grid:
    """A row for each silence, in the given order."""
    return Grid(
        "lllllll",
        tuple(
            (
                each.id,
                matched(each),
                output.timestamp(each.made_at_unix_ns),
                output.timestamp(each.expired_at_unix_ns or each.ends_at_unix_ns),
                _state(each),
                each.author,
                each.comment,
            )
            for each in found
        ),
        ("id", "matches", "added at", "until", "state", "author", "comment"),
        empty="no silence",
    )


def matched(one: Silence) -> str:
    """What a silence matches, such as `run gpt2-a1, cause data`."""
    return ", ".join(f"{name} {value}" for name in ("run", "alert", "cause", "policy") if (value := getattr(one, name)))


def _state(one: Silence) -> str:
    if one.active:
        return "active"
    return f"ended by {one.expired_by}: {one.expired_reason}".removesuffix(": ") if one.expired_by else "ended"


def _active(stub: OperatorServiceStub) -> list[str]:
    return [each.id for each in stub.ListSilences(ListSilencesRequest()).silences]
