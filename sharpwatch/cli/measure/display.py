"""What `sharpwatch measure` shows: its progress on standard error, its results as tables."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from sharpwatch.cli import output
from sharpwatch.cli.output import Grid
from sharpwatch.curvature.measure.embedding_rows import TokenGroup
from sharpwatch.curvature.measure.measure import Progress
from sharpwatch.curvature.measure.report import BlockReport, SharpnessReport
from sharpwatch.curvature.statistics.estimate import Estimate, per_parameter

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


_MATRIX = {"hutchinson": "Hessian", "gnb": "Gauss-Newton"}
_STABILITY = {"direction": "step", "linesearch": "line search", "preconditioned": "preconditioned"}


def tables(report: SharpnessReport, *, layers: bool = False) -> list[Grid]:
    """The results of a measurement: by block, layer and token frequency, of the next step, and facts about it all.

    Args:
        report: The results.
        layers: Whether to add the table by layer.
    """
    found = [_grid({**report.blocks, "whole": report.whole}, "block")]
    if layers:
        found.append(_grid(report.layers, "layer block"))
    return [*found, *_embedding_rows(report), _stability(report), _facts(report)]


def _grid(blocks: Mapping[str, BlockReport], name: str) -> Grid:
    traces = [kind for kind in _MATRIX if any(kind in block.estimates for block in blocks.values())]
    ends = any(block.top_eigenvalue is not None for block in blocks.values())
    headings = [name, "parameters"]
    for kind in traces:
        headings += [f"{_MATRIX[kind]} trace", "per parameter"]
    headings += ["λ_max", "λ_min"] if ends else []
    rows = tuple((of, f"{block.parameters:,}", *_cells(block, traces, ends=ends)) for of, block in blocks.items())
    return Grid("l" + "r" * (len(headings) - 1), rows, tuple(headings), empty="nothing is measured yet")


def _cells(block: BlockReport, traces: list[str], *, ends: bool) -> Iterator[str]:
    for kind in traces:
        trace = block.estimates.get(kind)
        yield _cell(trace)
        yield _cell(None if trace is None else per_parameter(trace, block.parameters))
    if ends:
        yield _cell(block.top_eigenvalue)
        yield _cell(block.bottom_eigenvalue)


def _embedding_rows(report: SharpnessReport) -> list[Grid]:
    found = report.embedding_rows
    if found is None:
        return []
    rows = tuple(
        (
            name,
            f"{group.tokens:,}",
            _counts(group),
            output.percent(group.share),
            _cell(group.trace),
            _cell(group.sharpness),
        )
        for name, group in found.groups.items()
    )
    headings = (
        "group",
        "tokens",
        "occurrences of each",
        "share",
        f"{_MATRIX['gnb']} trace",
        "per parameter",
    )
    title = f"{found.parameter} by token frequency, most frequent first" if found.groups else ""
    notes = tuple(("embedding rows", note) for note in found.notes)
    return [Grid("lrrrrr", rows, headings, title), Grid("ll", notes)]


def _counts(group: TokenGroup) -> str:
    same = group.min_count == group.max_count
    return f"{group.max_count:,}" if same else f"{group.max_count:,} to {group.min_count:,}"


def _stability(report: SharpnessReport) -> Grid:
    blocks = {**report.blocks, "whole": report.whole}
    kinds = [kind for kind in _STABILITY if any(kind in block.stability for block in blocks.values())]
    rows = tuple(
        (name, *(_cell(block.stability.get(kind)) for kind in kinds))
        for name, block in blocks.items()
        if block.stability
    )
    headings = ("block", *(f"stability ratio, {_STABILITY[kind]}" for kind in kinds))
    return Grid("l" + "r" * len(kinds), rows, headings)


def _cell(estimate: Estimate | None) -> str:
    """Format a value and its standard error, or the residual of an eigenvalue that was computed from one start."""
    if estimate is None:
        return output.ABSENT
    # One start on one batch has no scatter, so its error is the residual, which bounds something else than ± does.
    if math.isfinite(estimate.residual) and not (math.isfinite(estimate.stderr) and estimate.stderr > 0):
        return f"{output.number(estimate.value)} [{output.number(estimate.residual, 1)}]"
    return output.with_error(estimate.value, estimate.stderr)


def _facts(report: SharpnessReport) -> Grid:
    cost, batches = report.cost, f"{report.batches} batch{'' if report.batches == 1 else 'es'}"
    loss = output.number(report.loss) if math.isfinite(report.loss) else output.ABSENT  # gnb does not compute it
    facts = [
        ("loss", f"{loss} over {report.tokens:,} tokens in {batches}"),
        ("seed", str(report.seed)),
        ("cost", f"{cost.forwards:g} forwards, {cost.backwards:g} backwards of all of them"),
        (
            "error",
            "± one standard error over draws and batches; [residual] bounds an eigenvalue's distance to a true one",
        ),
    ]
    facts += [(f"not reached: {block}", why) for block, why in report.unreached.items()]
    return Grid("ll", tuple(facts))


_LINE_SECONDS = 10.0  # between two lines if there is no terminal


class ProgressDisplay:
    """Shows the pieces of work of a measurement. A context manager, which removes its bar at the end.

    Args:
        quiet: Show nothing.
        stream: Where to show them; standard error by default.
        clock: Seconds.
    """

    def __init__(
        self, *, quiet: bool, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._shown = clock()
        self._quiet = quiet
        self._bar: Bar | None = None
        self._open = ExitStack()

    def __enter__(self) -> Self:
        if not self._quiet and self._stream.isatty():
            self._bar = _bar(self._stream)
        if self._bar is not None:
            self._open.enter_context(self._bar)
            self._bar.add_task("", total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def show(self, piece: Progress) -> None:
        """Show that a piece is done."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=piece.done, total=piece.total, description=piece.what)
        elif not self._quiet and self._clock() - self._shown >= _LINE_SECONDS:
            self._shown = self._clock()
            print(f"sharpwatch measure: {count_pieces(piece)}, {piece.what}", file=self._stream, flush=True)


def count_pieces(piece: Progress) -> str:
    """The progress so far, such as `12 of 40 pieces`."""
    return f"{piece.done} pieces" if piece.total is None else f"{piece.done} of {piece.total} pieces"


def _bar(stream: TextIO) -> Bar | None:
    """A bar, or None if rich is not installed."""
    try:
        from rich import progress  # noqa: PLC0415 - only for a terminal
        from rich.console import Console  # noqa: PLC0415 - only for a terminal
    except ModuleNotFoundError:
        return None
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress(*columns, console=Console(file=stream), transient=True)
