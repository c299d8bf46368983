"""`sharpwatch compare`: how a run differs from a reference, and where they part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from sharpwatch.cli.commands.compare_view import comparison_view, to_dict
from sharpwatch.cli.commands.replay import JOURNAL, STANDARD_INPUT, read_one, reading_options
from sharpwatch.cli.extras import needs_extra
from sharpwatch.cli.measure.files import check_writable, write_whole
from sharpwatch.cli.options import LocalCommand, ParsedText, real, whole_number
from sharpwatch.cli.output import print_answer

if TYPE_CHECKING:
    from sharpwatch.replay.compare import Comparison


@dataclass(frozen=True, slots=True)
class CompareRequest:
    """The command line."""

    run: str
    reference: str
    store: str | None
    format_: str | None
    columns: tuple[tuple[str, str], ...]
    tolerance: float
    within: int
    picture: Path | None
    as_json: bool


def _store(text: str) -> str:
    if not text.startswith(JOURNAL) or text == JOURNAL:
        raise ValueError(f"{text!r} must be {JOURNAL}PATH")
    return text


def _tolerance(text: str) -> float:
    value = real(text)
    if not 0 <= value < math.inf:
        raise ValueError(f"{text!r} must be a number, 0 or more")
    return value


def _picture_file(text: str) -> Path:
    if not text.endswith(".svg"):
        raise ValueError(f"{text!r} must end in .svg")
    return Path(text)


@click.command(
    cls=LocalCommand,
    example="sharpwatch compare gpt2-b.csv gpt2-a.csv --picture difference.svg\n"
    "sharpwatch compare --store sqlite:///sharpwatch.db gpt2-b gpt2-a",
)
@click.argument(
    "run",
    metavar="RUN",
    help="A file of any kind that `sharpwatch replay` reads, a run in a daemon's journal as sqlite:///PATH#NAME, or "
    "with --store the run's name. A prefix of a name is enough.",
)
@click.argument("reference", metavar="REFERENCE", help="The run to hold it against; named in the same ways.")
@click.option(
    "--store",
    metavar="sqlite:///PATH",
    type=ParsedText("journal", _store),
    help="A daemon's journal, in which RUN and REFERENCE are names unless there is a file of that name.",
)
@reading_options
@click.option(
    "--tolerance",
    metavar="LOSS",
    default=0.0,
    type=ParsedText("loss", _tolerance),
    help="A mean difference of the losses up to this counts as none. Default: 0.",
)
@click.option(
    "--within",
    metavar="STEPS",
    default=100,  # as in sharpwatch.replay, which is not imported for the help
    type=whole_number(0),
    help="The most steps between two sharpness estimates that are compared. Default: 100.",
)
@click.option(
    "--picture", metavar="FILE.svg", type=ParsedText("picture", _picture_file), help="Draw losses and sharpness."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(**options: Any) -> None:
    """Show how a run differs from a reference: loss, gradient norm, learning rate, sharpness, and where they part.

    Steps are paired by their numbers. The losses part where the mean of their difference is beyond what chance makes of
    two runs that do not differ, in 5 % of comparisons. It needs no daemon.
    """
    request = CompareRequest(**options)
    if request.run == request.reference == STANDARD_INPUT:
        raise click.UsageError("only one of RUN and REFERENCE can be -, standard input")
    if request.picture is not None:
        check_writable(request.picture, "--picture")
    with needs_extra("compare", "daemon"):
        found = _compared(request)
    if request.picture is not None:
        _draw(found, request.picture)
    print_answer(to_dict(found), comparison_view(found), as_json=request.as_json)


def _compared(request: CompareRequest) -> Comparison:
    from sharpwatch.replay.compare import compare as compare_runs  # noqa: PLC0415 - loads numpy
    from sharpwatch.replay.files import ReadOptions  # noqa: PLC0415 - as above

    options = ReadOptions(cast("Any", request.format_), cast("Any", dict(request.columns)))
    run, reference = (read_one(given, request.store, options) for given in (request.run, request.reference))
    return compare_runs(run, reference, tolerance=request.tolerance, within=request.within)


def _draw(found: Comparison, path: Path) -> None:
    from sharpwatch.replay.picture import picture  # noqa: PLC0415 - as above

    write_whole(path, picture(found).encode())
