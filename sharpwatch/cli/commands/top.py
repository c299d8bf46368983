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
from sharpwatch.errors import OperatorError, SharpwatchError
from sharpwatch.v1.operator_pb2 import Alert, GetRunRequest, ListRunsRequest, Run, RunDetail

_EVERY = 2.0  # seconds between two looks
_AROUND = 4  # lines of the screen that are no runs
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


@dataclass(frozen=True, slots=True)
class View:
    """The runs at one moment, those in trouble first; of `hidden` more only the number is known.

    `missing` says of which shards nothing is.
    """

    details: Sequence[RunDetail]
    hidden: int
    now: float
    missing: str = ""


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
        if view.missing:
            raise OperatorError(view.missing)
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
        names = [resolve_run(stub, run)] if run else _worst_first(stub.ListRuns(ListRunsRequest(held_only=True)).runs)
        details = [stub.GetRun(GetRunRequest(run=name)).detail for name in names[:most]]
        missing = stub.missing
    return View(sorted(details, key=_trouble), len(names) - len(details), time.time(), missing)


def table(view: View, width: int | None = None) -> Grid:
    """A row for each run, in the order of the view.

    Args:
        view: The runs.
        width: The characters that a line may have; None for all. Where the whole table is wider, headings and cells
            are shorter, and as many columns are left out as must be, those first that matter least in trouble.
    """
    whole = _grid(view, _COLUMNS)
    if width is None or _width(whole) <= width:
        return whole
    for left_out in range(len(_LEFT_OUT) + 1):
        kept = [each for each in _COLUMNS if each.heading not in _LEFT_OUT[:left_out]]
        short = _grid(view, kept, is_short=True)
        if _width(short) <= width:
            break
    return short


@dataclass(frozen=True, slots=True)
class _Column:
    """A column, with its heading where there is little room if that is another."""

    align: str
    heading: str
    short: str = ""


_COLUMNS = (
    _Column("l", "run"),
    _Column("r", "step"),
    _Column("r", "steps/s"),
    _Column("r", "loss"),
    _Column("r", "stability"),
    _Column("r", "open"),
    _Column("l", "worst incident", "worst"),
    _Column("l", "rates in force", "rates"),
    _Column("l", "mode"),
    _Column("r", "last sample", "sample"),
)
_LEFT_OUT = ("steps/s", "stability", "loss", "step")  # the first one first
_CUT = {"run": 20, "worst incident": 18, "rates in force": 18}  # characters, where there is little room


def _grid(view: View, columns: Sequence[_Column], *, is_short: bool = False) -> Grid:
    rows = [_row(detail, view.now, is_short=is_short) for detail in view.details]
    return Grid(
        "".join(each.align for each in columns),
        tuple(tuple(_cell(row[each.heading], each, is_short=is_short) for each in columns) for row in rows),
        tuple(each.short or each.heading if is_short else each.heading for each in columns),
        empty="no run yet; a trainer shows up here once sharpwatch.attach() has reached this daemon",
    )


def _cell(text: str, column: _Column, *, is_short: bool) -> str:
    most = _CUT.get(column.heading, len(text)) if is_short else len(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _width(grid: Grid) -> int:
    return max(map(len, output.plain([grid]).splitlines()))


def _worst_first(runs: Sequence[Run]) -> list[str]:
    """The names of the runs, by what is known of all of them: open incidents, and whether a trainer is there."""
    order = {"running": 0, "silent": 1, "killed": 2, "closed": 3}
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


def _row(detail: RunDetail, now: float, *, is_short: bool) -> dict[str, str]:
    """The cells of a run by heading."""
    run, found, stability = detail.run, _open(detail), _stability(detail)
    rates = {block.block: block.lr_multiplier for block in detail.blocks if block.HasField("lr_multiplier")}
    state, age = phase(run), output.age(run.last_sample_at_unix_ns, now)
    worst = output.ABSENT
    if found:
        worst = found[0].name if is_short else f"{found[0].name} since {found[0].onset}"
    in_force = output.multipliers(rates) if rates else output.ABSENT
    return {
        "run": run.run,
        "step": str(run.step),
        "steps/s": output.number(1 / detail.step_seconds, 3) if detail.step_seconds else output.ABSENT,
        "loss": output.measured(run, "loss"),
        "stability": output.ABSENT if stability is None else output.number(stability, 3),
        "open": str(len(found)),
        "worst incident": worst,
        "rates in force": "all 1" if is_short and rates and set(rates.values()) == {1.0} else in_force,
        "mode": run.mode if state == "running" else f"{run.mode}, {state}",
        "last sample": age.removesuffix(" ago") if is_short else age,
    }


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
    more = (f"and {view.hidden} more; " if view.hidden else "") + (f"{view.missing}; " if view.missing else "")
    lines = [
        *output.plain([table(view, size.columns)]).splitlines()[: size.lines - _AROUND + 1],
        "",
        output.clean(f"{more}{note}"),
    ]
    return "\n".join(line[: size.columns] for line in lines)
