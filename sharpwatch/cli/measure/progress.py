"""The progress of a measurement, on standard error: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from sharpwatch.curvature.measure.measure import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

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
