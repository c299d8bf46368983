"""`sharpwatch measure`: its options and its outputs. Free of torch, so that a mistyped option fails at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sharpwatch.blocks import BLOCKS
from sharpwatch.cli.extras import need
from sharpwatch.cli.measure.files import check_writable, write_whole
from sharpwatch.cli.options import COUNT, LocalCommand, ParsedText, SectionOption, real, whole_number
from sharpwatch.cli.output import print_tables
from sharpwatch.errors import PrecisionError

if TYPE_CHECKING:
    from sharpwatch.cli.measure.session import MeasureSession
    from sharpwatch.curvature.measure.report import SharpnessReport

ESTIMATORS = ("gnb", "hutchinson", "lanczos", "spectrum", "direction", "linesearch", "preconditioned")
_DEFAULT_ESTIMATORS = ESTIMATORS[:3]
_METHODS = ("auto", "autograd", "differences")
_DTYPES = ("float64", "float32", "bfloat16", "float16")
_PLOT_SUFFIXES = (".svg", ".png", ".pdf")
_STANDARD_OUTPUT = Path("-")
_SIGNALLED = 128  # plus the signal's number: the exit status of a process that a signal ended


@dataclass(frozen=True, slots=True)
class MeasureRequest:
    """The arguments of one `sharpwatch measure`; None for an option that was not given."""

    model: str
    data: str
    estimators: tuple[str, ...]
    draws: int
    precision: float | None
    max_draws: int
    blocks: tuple[str, ...] | None
    rules: Path | None
    seed: int
    rows: int | None
    length: int | None
    batches: int | None
    device: str | None
    dtype: str | None
    trust_remote_code: bool
    method: str
    json: Path | None
    plot: Path | None
    state: Path | None
    layers: bool
    quiet: bool


# Argument types


def _list_of(names: tuple[str, ...], kind: str) -> ParsedText:
    def parse(text: str) -> tuple[str, ...]:
        given = tuple(dict.fromkeys(text.split(",")))
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not one of the {kind}, which are {','.join(names)}")
        return given

    return ParsedText("list", parse)


def _relative_error(text: str) -> float:
    value = real(text)
    if not 0 < value < 1:
        raise ValueError(f"{text!r} is not a relative error; it must be above 0 and below 1, such as 0.05")
    return value


def _plot_file(text: str) -> Path:
    path = Path(text)
    if path.suffix not in _PLOT_SUFFIXES:
        raise ValueError(f"{text!r} ends in {path.suffix or 'nothing'}; it must end in {', '.join(_PLOT_SUFFIXES)}")
    return path


_FILE = click.Path(path_type=Path)
_POSITIVE = whole_number(1)
_DRAWS = whole_number(2, "one draw has no standard error")

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _option(section: str, *names: str, **attributes: Any) -> Decorator:
    return click.option(*names, cls=SectionOption, section=section, **attributes)


# The command

_WHAT, _ON, _OUTPUT = "What to measure", "Model and data", "Output"


@click.command(
    cls=LocalCommand,
    example="sharpwatch measure ./checkpoint text.txt --plot sharpness.svg\n"
    "sharpwatch measure train:make_model batches.pt --precision 0.05 --state measurement.json",
)
@click.argument("model", metavar="MODEL", help="A Hugging Face folder, or module:function that returns the model.")
@click.argument(
    "data",
    metavar="DATA",
    help="A text file; or batches of the model's arguments, from a .pt or .safetensors file or module:function.",
)
@_option(
    _WHAT,
    "--estimators",
    metavar="LIST",
    type=_list_of(ESTIMATORS, "estimators"),
    default=_DEFAULT_ESTIMATORS,
    help=f"Some of {', '.join(ESTIMATORS)}, separated by commas. Default: {','.join(_DEFAULT_ESTIMATORS)}. The last "
    "three measure the optimizer's next step, and need a function that returns an optimizer too.",
)
@_option(_WHAT, "--draws", metavar="N", type=_DRAWS, default=8, help="Random draws of each. Default: 8.")
@_option(
    _WHAT,
    "--precision",
    metavar="P",
    type=ParsedText("relative error", _relative_error),
    help="Draw until each relative standard error is below P, such as 0.05.",
)
@_option(
    _WHAT,
    "--max-draws",
    metavar="N",
    type=_DRAWS,
    default=256,
    help="The number of draws at which --precision gives up. Default: 256.",
)
@_option(
    _WHAT,
    "--blocks",
    metavar="LIST",
    type=_list_of(BLOCKS, "blocks"),
    help=f"Some of {', '.join(BLOCKS)}, separated by commas. Default: all.",
)
@_option(_WHAT, "--rules", metavar="FILE", type=_FILE, help="YAML: which parameter is in which block.")
@_option(_WHAT, "--seed", metavar="N", type=COUNT, default=0, help="Of the draws. Default: 0.")
@_option(
    _WHAT,
    "--method",
    type=click.Choice(_METHODS),
    default="auto",
    help="How to compute Hessian-vector products. Default: auto.",
)
@_option(_ON, "--rows", metavar="N", type=_POSITIVE, help="Windows of a text in a batch. Default: 8, or what there is.")
@_option(_ON, "--length", metavar="N", type=_POSITIVE, help="Tokens in a window. Default: 256, or what fits.")
@_option(
    _ON,
    "--batches",
    metavar="N",
    type=_POSITIVE,
    help="Batches made from a text (default: 1), or the first N of those given (default: all).",
)
@_option(_ON, "--device", metavar="NAME", help="Such as cpu or cuda:1. Default: the GPU if there is one.")
@_option(
    _ON,
    "--dtype",
    type=click.Choice(_DTYPES),
    help="Of the weights. Default: float32 for a folder, unchanged for module:function.",
)
@_option(
    _ON,
    "--trust-remote-code",
    is_flag=True,
    help="Run Python code that lies in the folder of the model. Default: only what transformers itself has.",
)
@_option(_OUTPUT, "--json", metavar="FILE", type=_FILE, help="Write all numbers; - prints them instead of the table.")
@_option(
    _OUTPUT,
    "--plot",
    metavar="FILE",
    type=ParsedText("figure", _plot_file),
    help=f"Draw a figure: {', '.join(_PLOT_SUFFIXES)}.",
)
@_option(
    _OUTPUT,
    "--state",
    metavar="FILE",
    type=_FILE,
    help="Keep every draw; if the file exists, continue its measurement.",
)
@_option(_OUTPUT, "--layers", is_flag=True, help="Print a table by layer too.")
@_option(_OUTPUT, "--quiet", is_flag=True, help="Print neither table nor progress.")
def measure(**options: Any) -> int:
    """Measure the sharpness of a checkpoint: the curvature of its loss by block, with standard errors."""
    request = MeasureRequest(**options)
    files = [path for path in (request.json, request.plot, request.state) if path not in (None, _STANDARD_OUTPUT)]
    if len(set(files)) < len(files):
        raise click.UsageError("--json, --plot and --state must be different files")
    _check_outputs(request)
    # Imported only now: torch takes seconds to load, and an error above should show at once.
    from sharpwatch.cli.measure.session import MeasureSession  # noqa: PLC0415

    session = MeasureSession(request)
    signal = session.run()
    return _interrupted(session, signal) if signal else _finish(session)


def _check_outputs(request: MeasureRequest) -> None:
    """Check before the start what would otherwise fail at the end."""
    for path, option in ((request.json, "--json"), (request.plot, "--plot"), (request.state, "--state")):
        if path is not None and path != _STANDARD_OUTPUT:
            check_writable(path, option)
    if request.plot is not None:
        # Imported only at the end, so its absence would cost the whole measurement.
        need("matplotlib", "--plot")


def _interrupted(session: MeasureSession, signal: int) -> int:
    """Show the results so far, and say how to continue; the output files are only for a complete measurement."""
    if session.pieces_done:
        _show(session, session.report())
    print(f"sharpwatch: interrupted after {session.progress()}, {session.state_note()}", file=sys.stderr)
    return _SIGNALLED + signal


def _finish(session: MeasureSession) -> int:
    request, report = session.request, session.report()
    if request.json is not None and request.json != _STANDARD_OUTPUT:
        write_whole(request.json, _json(session, report).encode())
    if request.json == _STANDARD_OUTPUT:
        print(_json(session, report), end="")
    _show(session, report)
    if request.plot is not None:
        from sharpwatch.cli.measure.plot import draw  # noqa: PLC0415 - only if a figure is wanted

        write_whole(request.plot, draw(report, session.title(report), request.plot.suffix))
    # After all output is written: the numbers are good, only less precise than was asked for.
    if report.unreached:
        raise PrecisionError(report)
    return 0


def _show(session: MeasureSession, report: SharpnessReport) -> None:
    from sharpwatch.cli.measure.display import tables  # noqa: PLC0415 - as above

    if not session.request.quiet and session.request.json != _STANDARD_OUTPUT:
        print_tables(tables(report, layers=session.request.layers))


def _json(session: MeasureSession, report: SharpnessReport) -> str:
    found = {"measured": session.provenance(), **report.to_dict()}
    return json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
