"""Outcomes to a table: medians, errors against the truth, coverage, ratios."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.curvature.outcome import Outcome, coverage, relative, top_error
from benchmarks.curvature.truth import BlockTruth

_HEAD = (
    "library",
    "setting",
    "seconds",
    "× sharpwatch's",
    "forwards + backwards",
    "trace: RMS error, worst block (all)",
    "λ_max: RMS error, worst block",
    "within 1, 2, 4 s.e.",
)


@dataclass
class Row:
    """One way to use one library, over the rounds."""

    library: str
    setting: str
    outcomes: list[Outcome] = field(default_factory=list)
    trace_errors: dict[str, float] = field(default_factory=dict)
    top_errors: dict[str, float] = field(default_factory=dict)
    negative: set[str] = field(default_factory=set)  # blocks whose most negative eigenvalue was given as the top
    covered: dict[int, float] | None = None

    @property
    def failed(self) -> str:
        """Why there is no result."""
        return next((outcome.failed for outcome in self.outcomes if outcome.failed and not outcome.traces), "")

    @property
    def seconds(self) -> float:
        """Median over rounds."""
        return statistics.median(outcome.seconds for outcome in self.outcomes)

    def judge(self, truth: Mapping[str, BlockTruth]) -> None:
        """Compare with the truth."""
        if self.failed:
            return
        good = [outcome for outcome in self.outcomes if outcome.traces]
        for block in good[0].traces:
            self.trace_errors[block] = relative([o.traces[block].value for o in good], truth[block].trace)
            error, negative = top_error([o.tops[block].value for o in good], truth[block])
            self.top_errors[block] = error
            self.negative |= {block} if negative else set()
        self.covered = coverage([(o.traces[block], truth[block].trace) for o in good for block in o.traces])

    def over(self, other: Row) -> float:
        """The median over rounds of this row's seconds over `other`'s."""
        pairs = zip(self.outcomes, other.outcomes, strict=False)
        return statistics.median(mine.seconds / theirs.seconds for mine, theirs in pairs)


def table(rows: Sequence[Row]) -> str:
    """Markdown; ratios are to the first row. A library that can't is named once."""
    lines = [_HEAD, ("---",) * len(_HEAD)]
    lines += [_cells(row, rows[0]) for row in rows if not row.failed]
    lines += [_failure(row) for row in {row.library: row for row in rows if row.failed}.values()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def per_block(rows: Sequence[Row]) -> str:
    """Markdown: every row's errors by block, trace / λ_max."""
    rows = [row for row in rows if not row.failed]
    blocks = list(rows[0].trace_errors)
    lines = [("library", "setting", *blocks), ("---",) * (2 + len(blocks))]
    for row in rows:
        errors = (f"{row.trace_errors[block]:.1%} / {_top(row, block)}" for block in blocks)
        lines.append((row.library, row.setting, *errors))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: Row, first: Row) -> tuple[str, ...]:
    passes = [outcome.passes for outcome in row.outcomes]
    forwards = statistics.median(p.forwards for p in passes)
    backwards = statistics.median(p.vectors for p in passes)
    trace, top = _worst(row.trace_errors), _worst(row.top_errors)
    middle = statistics.median(row.trace_errors.values())
    unreached = sum(bool(outcome.failed) for outcome in row.outcomes)
    return (
        row.library,
        row.setting + (f" (not reached in {unreached} of {len(row.outcomes)})" if unreached else ""),
        f"{row.seconds:.2f}",
        f"{row.over(first):.2f}",
        f"{forwards:g} + {backwards:g}",
        f"{row.trace_errors[trace]:.1%} {trace} (median block {middle:.1%})",
        f"{_top(row, top)} {top}",
        "states none" if row.covered is None else " ".join(f"{share:.2f}" for share in row.covered.values()),
    )


def _failure(row: Row) -> tuple[str, ...]:
    return row.library, "any", f"can't: {row.failed}", *("–",) * (len(_HEAD) - 3)


def _worst(errors: Mapping[str, float]) -> str:
    return max(errors, key=lambda block: errors[block])


def _top(row: Row, block: str) -> str:
    return f"{row.top_errors[block]:.1%}{' of the negative end' if block in row.negative else ''}"
