"""Grids of text: drawn by rich on a terminal, aligned plain text anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_GAP = "  "
# Words that carry a judgement, coloured wherever a cell is exactly one of them.
_STYLES = {
    **dict.fromkeys(("ok", "running", "applied", "recovered"), "green"),
    **dict.fromkeys(("warn", "warning", "proposed", "silent"), "yellow"),
    **dict.fromkeys(("fail", "critical", "failed", "refused", "expired"), "bold red"),
}


@dataclass(frozen=True, slots=True)
class Grid:
    """Rows of cells under `headings` (none: no heading line); `align` has an `l` or `r` for each column.

    The first column names the row: where a grid is too wide for a terminal, it is repeated in each part.
    """

    align: str
    rows: tuple[tuple[str, ...], ...]
    headings: tuple[str, ...] = ()
    title: str = ""
    empty: str = ""  # what to say where there is no row

    def widths(self) -> list[int]:
        """Characters of each column."""
        lines = [clean_row(row) for row in (self.headings, *self.rows) if row]
        return [max((len(line[column]) for line in lines), default=0) for column in range(len(self.align))]

    def split(self, width: int) -> list[Grid]:
        """Grids no wider than `width`, where single columns allow that, which together have all columns."""
        widths = self.widths()
        groups: list[list[int]] = [[0]]
        for column in range(1, len(widths)):
            used = sum(widths[index] + len(_GAP) for index in groups[-1])
            if len(groups[-1]) > 1 and used + widths[column] > width:
                groups.append([0])
            groups[-1].append(column)
        return [self._columns(group, "" if index else self.title) for index, group in enumerate(groups)]

    def _columns(self, columns: Sequence[int], title: str) -> Grid:
        def pick(row: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(row[column] for column in columns) if row else ()

        align = "".join(self.align[column] for column in columns)
        return Grid(align, tuple(map(pick, self.rows)), pick(self.headings), title, self.empty)


def clean(text: str) -> str:
    """`text` on one line, with what a terminal would obey instead of showing made visible."""
    return "".join(c if c.isprintable() else " " if c.isspace() else f"\\x{ord(c):02x}" for c in text)


def clean_row(row: Sequence[str]) -> tuple[str, ...]:
    """Every cell `clean`."""
    return tuple(clean(cell) for cell in row)


def plain(grids: Sequence[Grid]) -> str:
    """The grids as aligned text, an empty line between them."""
    return "\n\n".join(filter(None, map(_plain_grid, grids)))


def _plain_grid(grid: Grid) -> str:
    if not grid.rows:
        return grid.empty
    widths = grid.widths()
    lines = [grid.title] if grid.title else []
    for row in (grid.headings, *grid.rows):
        cells = [
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(clean_row(row), widths, grid.align, strict=False)
        ]
        if cells:
            lines.append(_GAP.join(cells).rstrip())
    return "\n".join(lines)


def write(grids: Sequence[Grid], stream: TextIO | None = None) -> None:
    """Print the grids, with rich where `stream` (standard output) is a terminal and rich is installed."""
    out = stream or sys.stdout
    if not out.isatty():
        print(plain(grids), file=out)
        return
    try:
        import rich  # noqa: F401, PLC0415 - only for a terminal; the agent's installation comes without it
    except ModuleNotFoundError:
        print(plain(grids), file=out)
        return
    _draw(grids, out)


def _draw(grids: Sequence[Grid], out: TextIO) -> None:
    from rich.console import Console  # noqa: PLC0415 - only for a terminal
    from rich.text import Text  # noqa: PLC0415 - only for a terminal

    console = Console(file=out, highlight=False)
    shown = [grid for grid in grids if grid.rows or grid.empty]
    for index, grid in enumerate(shown):
        if index:
            console.print()
        if not grid.rows:
            console.print(Text(grid.empty, style="dim"))
            continue
        if grid.title:
            console.print(Text(grid.title, style="bold"))
        # Only tables are split; facts without a heading wrap in their last column.
        for part in grid.split(console.width) if grid.headings else [grid]:
            _draw_grid(part, console)


def _draw_grid(grid: Grid, console: Console) -> None:
    from rich.table import Table  # noqa: PLC0415 - only for a terminal
    from rich.text import Text  # noqa: PLC0415 - only for a terminal

    table = Table(
        box=None, show_header=bool(grid.headings), header_style="dim", padding=(0, len(_GAP), 0, 0), pad_edge=False
    )
    for index, side in enumerate(grid.align):
        heading = Text(grid.headings[index]) if grid.headings else ""
        table.add_column(heading, justify="right" if side == "r" else "left", overflow="fold")
    for row in grid.rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in clean_row(row)))
    console.print(table)
