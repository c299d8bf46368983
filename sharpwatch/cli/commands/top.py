"""`sharpwatch top`: a view of all runs that is kept up to date, those in trouble first."""

from __future__ import annotations

import math
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import click
import grpc

from sharpwatch.cli import output
from sharpwatch.cli.client import operator, resolve_run, run_argument
from sharpwatch.cli.commands.runs import phase
from sharpwatch.cli.options import DaemonCommand, DaemonOptions
from sharpwatch.cli.output import Grid, print_answer
from sharpwatch.errors import SharpwatchError
from sharpwatch.v1.operator_pb2 import Alert, GetRunRequest, ListRunsRequest, Run, RunDetail

_EVERY = 2.0  # seconds between two looks
_AROUND = 4  # lines of the screen that are no runs
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


@dataclass(frozen=True, slots=True)
class View:
    """The runs at one moment, those in trouble first; of `hidden` more only the number is known."""

    details: Sequence[RunDetail]
    hidden: int
    now: float


@click.command(cls=DaemonCommand, example="sharpwatch top\nsharpwatch top --once")
@run_argument(required=False)
@click.option("--once", is_flag=True, help="Print the view once, of all runs. So it is also where it is no terminal.")
@click.pass_obj
def top(options: DaemonOptions, run: str | None, once: bool) -> None:
    """Show all runs, or one, kept up to date: the worst first. Ctrl-C ends it.

    It shows as many runs as the terminal has lines for, and goes on through a restart of the daemon.
    """
    if once or options.json or not sys.stdout.isatty():
        view = look(options, run, None)
        payload = {"runs": [output.to_dict(detail) for detail in view.details]}
        print_answer(payload, [table(view)], as_json=options.json)
        return
    try:
        for shown in _views(options, run):
            click.clear()
            click.echo(shown)
    except KeyboardInterrupt:
        click.echo()


def look(options: DaemonOptions, run: str | None, most: int | None) -> View:
    """Ask the daemon for its runs.

    Args:
        options: Which daemon.
        run: The run that is asked for; None for all.
        most: How many runs are asked for in full; None for all.

    Raises:
        OperatorError: The daemon can't be asked, or has no such run.
    """
    with operator(options) as stub:
        names = [resolve_run(stub, run)] if run else _worst_first(stub.ListRuns(ListRunsRequest()).runs)
        details = [stub.GetRun(GetRunRequest(run=name)).detail for name in names[:most]]
    return View(sorted(details, key=_trouble), len(names) - len(details), time.time())


def table(view: View) -> Grid:
    """A row for each run, in the order of the view.

    Args:
        view: The runs.
    """
    return Grid(
        "lrrrrrlllr",
        tuple(_row(detail, view.now) for detail in view.details),
        (
            *("run", "step", "steps/s", "loss", "stability", "open"),
            *("worst incident", "rates in force", "mode", "last sample"),
        ),
        empty="no run yet; a trainer shows up here once sharpwatch.attach() has reached this daemon",
    )


def _worst_first(runs: Sequence[Run]) -> list[str]:
    """The names of the runs, by what is known of all of them: open incidents, and whether a trainer is there."""
    order = {"running": 0, "silent": 1, "closed": 2}
    return [run.run for run in sorted(runs, key=lambda run: (-run.active_alerts, order[phase(run)], run.run))]


def _open(detail: RunDetail) -> list[Alert]:
    """The open incidents, critical ones first, then the oldest."""
    found = [alert for alert in detail.alerts if alert.active]
    return sorted(found, key=lambda alert: (alert.severity != "critical", alert.onset))


def _trouble(detail: RunDetail) -> tuple[float, ...]:
    found = _open(detail)
    critical = sum(alert.severity == "critical" for alert in found)
    return (-critical, -len(found), phase(detail.run) != "running", -(_stability(detail) or 0.0))


def _stability(detail: RunDetail) -> float | None:
    """The highest stability ratio of the model and its blocks."""
    estimates = [*detail.estimates, *(each for block in detail.blocks for each in block.estimates)]
    found = [each.value for each in estimates if each.quantity == "stability_ratio" and math.isfinite(each.value)]
    return max(found, default=None)


def _row(detail: RunDetail, now: float) -> tuple[str, ...]:
    run, found, stability = detail.run, _open(detail), _stability(detail)
    rates = {block.block: block.lr_multiplier for block in detail.blocks if block.HasField("lr_multiplier")}
    state = phase(run)
    return (
        run.run,
        str(run.step),
        output.number(1 / detail.step_seconds, 3) if detail.step_seconds else output.ABSENT,
        output.measured(run, "loss"),
        output.ABSENT if stability is None else output.number(stability, 3),
        str(len(found)),
        f"{found[0].name} since {found[0].onset}" if found else output.ABSENT,
        output.multipliers(rates) if rates else output.ABSENT,
        run.mode if state == "running" else f"{run.mode}, {state}",
        output.age(run.last_sample_at_unix_ns, now),
    )


def _views(options: DaemonOptions, run: str | None) -> Iterator[str]:
    """The text of the screen, again and again.

    Raises:
        SharpwatchError: The daemon could not be reached at first, or refuses.
    """
    looks: SimpleQueue[View | SharpwatchError] = SimpleQueue()
    # In another thread: a Ctrl-C inside gRPC can leave one of its locks held, and the command would never end.
    threading.Thread(target=_look_again, args=(options, run, looks), daemon=True).start()
    newest: View | None = None
    while True:
        found = looks.get()
        if isinstance(found, View):
            newest = found
            yield _screen(newest, "Ctrl-C ends")
        elif newest is None or not _is_gone(found):
            raise found
        else:
            yield _screen(newest, f"waiting for the daemon, as of {output.timestamp(round(newest.now * 1e9))}: {found}")


def _look_again(options: DaemonOptions, run: str | None, looks: SimpleQueue[View | SharpwatchError]) -> None:
    while True:
        try:
            looks.put(look(options, run, max(1, shutil.get_terminal_size().lines - _AROUND)))
        except SharpwatchError as error:
            looks.put(error)
        time.sleep(_EVERY)


def _is_gone(error: SharpwatchError) -> bool:
    code = getattr(error.__cause__, "code", None)  # of gRPC's error
    return code is not None and code() in _GONE


def _screen(view: View, note: str) -> str:
    """The lines that the terminal has room for, each cut to its width."""
    size = shutil.get_terminal_size()
    more = f"and {view.hidden} more; " if view.hidden else ""
    lines = [*output.plain([table(view)]).splitlines()[: size.lines - _AROUND + 1], "", output.clean(f"{more}{note}")]
    return "\n".join(line[: size.columns] for line in lines)
