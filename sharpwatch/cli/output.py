"""How the commands print: tables of text or JSON, with numbers and times for people to read."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

if TYPE_CHECKING:
    from rich.console import Console

    from sharpwatch.v1.operator_pb2 import Decision, ForgetRunResponse, Run, UndoLearningRatesResponse
    from sharpwatch.v1.types_pb2 import Estimate

_INTEGER_TYPES = frozenset(
    {
        FieldDescriptor.CPPTYPE_INT32,
        FieldDescriptor.CPPTYPE_INT64,
        FieldDescriptor.CPPTYPE_UINT32,
        FieldDescriptor.CPPTYPE_UINT64,
    }
)
_FLOAT_TYPES = frozenset({FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT})


def to_dict(message: Message) -> dict[str, Any]:
    """Convert a message for JSON: the proto's field names, every field present, and numbers as numbers.

    An absent, infinite or nan value becomes None, since JSON has no other value for it.

    Args:
        message: Any message.
    """
    from google.protobuf.json_format import MessageToDict  # noqa: PLC0415 - slow to import, and only JSON needs it

    # protobuf's JSON has 64-bit integers as text, and NaN as the text "NaN"; `_with_numbers` undoes both.
    found = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return _with_numbers(message.DESCRIPTOR, found)


def _with_numbers(descriptor: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    # Over all fields of the type: protobuf leaves out an optional one that is absent.
    return {field.name: _field(field, found.get(field.name)) for field in descriptor.fields}


def _field(field: FieldDescriptor, value: Any) -> Any:
    entry = field.message_type
    if value is None:
        return None
    if entry is not None and entry.GetOptions().map_entry:
        value_field = entry.fields_by_name["value"]
        return {key: _scalar(value_field, item) for key, item in sorted(value.items())}
    return [_scalar(field, item) for item in value] if isinstance(value, list) else _scalar(field, value)


def _scalar(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None:
        return _with_numbers(field.message_type, value)
    if field.cpp_type in _INTEGER_TYPES:
        return int(value)
    if field.cpp_type in _FLOAT_TYPES:
        return float(value) if math.isfinite(float(value)) else None
    return value


def print_answer(payload: Message | dict[str, Any], grids: Sequence[Grid] | str, *, as_json: bool) -> None:
    """Print an answer.

    Args:
        payload: The answer for JSON.
        grids: The answer as tables, or as one line of text.
        as_json: Whether to print the payload rather than the text.
    """
    if as_json:
        import json  # noqa: PLC0415 - as above

        found = to_dict(payload) if isinstance(payload, Message) else payload
        print(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
    elif isinstance(grids, str):
        print(grids)
    else:
        print_tables(grids)


# Numbers and times

ABSENT = "–"
_DIGITS = 6  # at most, however small the error
_PLAIN = (1e-3, 1e5)  # values between these are written without an exponent


def number(value: float, digits: int = 4) -> str:
    """Format `value` to `digits` significant digits."""
    return f"{value:.{digits}g}"


def measured(message: Message, name: str) -> str:
    """Format a number in a message, or a dash if the field is absent, because it was not measured."""
    return number(getattr(message, name)) if message.HasField(name) else ABSENT


def with_error(value: float, stderr: float) -> str:
    """Format a value with its standard error, such as `3.4e-09 ± 2e-10`.

    The error has one digit; the value ends at the error's place, with one digit at least. An unknown error (of a
    single draw) is written `?`, and the value to three digits.

    Args:
        value: The value.
        stderr: Its standard error; nan or inf if unknown.
    """
    from decimal import Decimal  # noqa: PLC0415 - slow to import, and only errors need it

    if not math.isfinite(value):
        return number(value)
    if not (math.isfinite(stderr) and stderr >= 0):
        return f"{number(value, 3)} ± ?"
    if stderr == 0:
        return f"{number(value, _DIGITS)} ± 0"
    # Decimal, because the place of a digit is exact in it; a float's logarithm is off by one near powers of ten.
    error = Decimal(f"{stderr:.0e}")
    place = error.adjusted()
    if value:
        # The value keeps a digit where the error is larger than it, and at most six where the error is tiny.
        size = Decimal(f"{value:e}").adjusted()
        place = min(size, max(place, size - _DIGITS + 1))
    rounded = Decimal(repr(float(value))).quantize(Decimal(1).scaleb(place))
    if _PLAIN[0] <= max(abs(value), stderr) < _PLAIN[1]:
        return f"{rounded:f} ± {error:f}" if error.adjusted() >= place else f"{rounded:f} ± {stderr:.0e}"
    shown = max(0, rounded.adjusted() - place) if rounded else 0
    return f"{float(rounded):.{shown}e} ± {stderr:.0e}"


def estimate(message: Estimate | None) -> str:
    """Format an estimate with its error, or a dash."""
    return ABSENT if message is None else with_error(message.value, message.stderr)


def percent(ratio: float) -> str:
    """Format a ratio as a percentage with two digits."""
    return f"{number(100 * ratio, 2)} %"


def timestamp(unix_ns: int) -> str:
    """Format a time in UTC to the second, or a dash for 0."""
    if not unix_ns:
        return ABSENT
    return datetime.fromtimestamp(unix_ns // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def age(unix_ns: int, now: float) -> str:
    """Format the time that passed until `now` (unix seconds), in its largest unit."""
    if not unix_ns:
        return "never"
    passed = now - unix_ns / 1e9
    # The daemon may be on a machine with another clock, so a second ahead is no error.
    if passed < 0:
        return f"{span(-passed)} ahead of this clock" if passed < -1 else "now"
    return f"{span(passed)} ago"


def span(duration: float) -> str:
    """Format a duration, given in seconds, in its largest unit."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        # From two units on: `90 min` says more than `2 h`.
        if duration >= 2 * size:
            return f"{duration / size:.0f} {unit}"
    return f"{duration:.0f} s"


def multipliers(values: Mapping[str, float], requested: Mapping[str, float] | None = None) -> str:
    """Format multipliers, such as `emb 2, qk 0.5`.

    Args:
        values: The multiplier of each block; only those other than 1 are shown.
        requested: Blocks to show in any case.
    """
    shown = {block: value for block, value in values.items() if value != 1 or block in (requested or ())}
    return ", ".join(f"{block} {value:g}" for block, value in sorted(shown.items())) or "every block 1"


def intervals(update_every: Mapping[str, int]) -> str:
    """Format update intervals, such as `emb every 4 steps`; empty where every block is updated at every step."""
    return ", ".join(f"{block} every {steps} steps" for block, steps in sorted(update_every.items()))


def describe_size(of: ForgetRunResponse) -> str:
    """How much is kept of a run."""
    counts = {"attempt": of.attempts, "sample": of.samples, "incident": of.incidents, "decision": of.decisions}
    return ", ".join(f"{count:,} {kind}{'' if count == 1 else 's'}" for kind, count in counts.items())


def describe_change(decision: Decision, requested: Mapping[str, float] | None = None) -> str:
    """What a decision changes: its multipliers, or the checkpoint to go back to."""
    if decision.HasField("rollback"):
        rollback = decision.rollback
        place = f" ({rollback.checkpoint.uri})" if rollback.checkpoint.uri else ""
        skipped = (
            f", skipping steps {rollback.skip_from_step} to {rollback.skip_to_step - 1}"
            if rollback.skip_to_step > rollback.skip_from_step
            else ""
        )
        return f"back to step {rollback.checkpoint.step}{place}{skipped}"
    if decision.multipliers or decision.action in ("set_lr", "scale_lr", "ramp_back"):
        changed = (multipliers(decision.multipliers, requested), intervals(decision.update_every))
        return ", ".join(filter(None, changed))
    return ABSENT


def describe_undo(answer: UndoLearningRatesResponse) -> str:
    """What an undo takes back, as the number alone does not say whether that was a cut or the end of one."""
    undone, by = answer.undone, answer.undone_decision
    who = f"policy {by.policy}" if by.policy else undone.author
    what = f"by {who}" + (f": {undone.reason}" if undone.reason else "")
    if by.action == "ramp_back":
        what = f"in which {who} gave back a change of its own: that change holds again"
    elif undone.undoes:
        what = f"{what}; it undid revision {undone.undoes}, which holds again"
    return f"takes back revision {undone.revision} ({multipliers(undone.multipliers)}), {what}"


def kept_in_force(run: Run) -> str:
    """What stays in force in a run in the mode observe, in which no policy gives a cut back; empty for nothing."""
    if not run.multipliers:
        return ""
    return f"stays in force until somebody changes it: {multipliers(run.multipliers)}"


# Tables

_GAP = "  "
# Words for good, doubtful and bad states; a cell that is one of them is coloured.
_STYLES = {
    **dict.fromkeys(("ok", "running", "applied", "recovered"), "green"),
    **dict.fromkeys(("warn", "warning", "proposed", "silent", "no-effect", "inconclusive"), "yellow"),
    **dict.fromkeys(("fail", "critical", "failed", "refused", "expired", "worse"), "bold red"),
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
    # Names and reasons come from other machines. An escape sequence in one could rewrite the reader's terminal.
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


def print_tables(grids: Sequence[Grid], stream: TextIO | None = None) -> None:
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
        # As Text: rich would obey markup in a plain string, and `[red]` may be part of a run's name.
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in clean_row(row)))
    console.print(table)
