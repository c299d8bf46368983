"""Tables of text: drawn by rich on a terminal, aligned plain text anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_GAP = "  "
# Words for good, doubtful and bad states; a cell that is one of them is coloured.
_STYLES = {
    **dict.fromkeys(("ok", "running", "applied", "recovered"), "green"),
    **dict.fromkeys(("warn", "warning", "proposed", "silent"), "yellow"),
    **dict.fromkeys(("fail", "critical", "failed", "refused", "expired"), "bold red"),
}


@dataclass(frozen=True, slots=True)
class Grid:
    """A table.

    Attributes:
        align: An `l` or `r` for each column.
        rows: The cells. The first column names the row; a table split for a narrow terminal repeats it in each part.
        headings: One for each column, or none for no heading line.
        title: A line above the table.
        empty: The text to print if there are no rows.
    """

    align: str
    rows: tuple[tuple[str, ...], ...]
    headings: tuple[str, ...] = ()
    title: str = ""
    empty: str = ""

    def widths(self) -> list[int]:
        """The width of each column in characters."""
        lines = [clean_row(row) for row in (self.headings, *self.rows) if row]
        return [max((len(line[column]) for line in lines), default=0) for column in range(len(self.align))]

    def split(self, width: int) -> list[Grid]:
        """Split the columns into grids at most `width` wide, unless the first and one other column are wider."""
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
    """Put `text` on one line, and make control characters visible."""
    return "".join(c if c.isprintable() else " " if c.isspace() else f"\\x{ord(c):02x}" for c in text)


def clean_row(row: Sequence[str]) -> tuple[str, ...]:
    """Clean every cell."""
    return tuple(clean(cell) for cell in row)


def plain(grids: Sequence[Grid]) -> str:
    """Format grids as aligned text, with an empty line between them."""
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
    """Print grids: with rich if the stream is a terminal and rich is installed, else as plain text.

    Args:
        grids: The tables.
        stream: Where to; standard output by default.
    """
    out = stream or sys.stdout
    if not out.isatty():
        print(plain(grids), file=out)
        return
    try:
        import rich  # noqa: F401, PLC0415 - only for a terminal; the extra `cli` does not install it
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
        # Only tables with headings are split; in others the last column wraps.
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
