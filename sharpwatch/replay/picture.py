"""A comparison as an SVG picture: both losses, their difference with its error, and sharpness by block.

The picture follows the reader's choice of light or dark, and needs neither scripts nor fonts of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from sharpwatch.daemon.detection.parting import BATCHES
from sharpwatch.replay.compare import Comparison, Quantity
from sharpwatch.replay.drawing import LEFT, PANEL, RIGHT, WIDTH, Axis, framed, label, padded, polyline, rule
from sharpwatch.replay.paired_estimates import EstimatePair, newest
from sharpwatch.wire import Doubles, Ints

_TOP, _GAP, _ROW = 88, 64, 34  # heights
_POINTS = 240  # of a line
_LOG_FROM = 20  # a part that ends this many times before the last step would be too narrow to be seen
_ERRORS = 2  # standard errors that bands and bars have on each side
_STYLE = """
.page{fill:#fff} text{font:12px system-ui,sans-serif;fill:#1f2328} .title{font-size:14px;font-weight:600}
.faint{fill:#59636e} .grid{stroke:#d1d9e0;stroke-width:1} .zero{stroke:#59636e;stroke-width:1}
.mark{stroke:#1f2328;stroke-width:1;stroke-dasharray:4 3} .line{fill:none;stroke-width:1.75;stroke-linejoin:round}
.run{stroke:#0969da} .reference{stroke:#bc4c00} .difference{stroke:#8250df} .band{fill:#8250df;fill-opacity:.22}
.run-dot{fill:#0969da} .reference-dot{fill:#bc4c00}
@media (prefers-color-scheme:dark){
.page{fill:#0d1117} text{fill:#f0f6fc} .faint{fill:#9198a1} .grid{stroke:#2f363d} .zero{stroke:#9198a1}
.mark{stroke:#f0f6fc} .run{stroke:#4493f8} .reference{stroke:#f0883e} .difference{stroke:#ab7df8}
.band{fill:#ab7df8;fill-opacity:.28} .run-dot{fill:#4493f8} .reference-dot{fill:#f0883e}}
"""


def picture(comparison: Comparison) -> str:
    """Draw a comparison.

    Args:
        comparison: The comparison.

    Returns:
        The text of an SVG file.
    """
    parts: list[str] = [*_title(comparison)]
    bottom = float(_TOP)
    if len(comparison.loss.values) > 1:
        steps = _step_axis(comparison)
        parts += _loss_panel(comparison, steps, bottom)
        parts += _difference_panel(comparison, steps, bottom + PANEL + _GAP)
        bottom += 2 * (PANEL + _GAP)
    if pairs := newest(comparison.sharpness):
        parts += _sharpness_panel(pairs, bottom)
        bottom += _ROW * len(pairs) + _GAP
    frame = f'<rect class="page" width="{WIDTH}" height="{bottom:.0f}"/>'
    size = f'width="{WIDTH}" height="{bottom:.0f}" viewBox="0 0 {WIDTH} {bottom:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><style>{_STYLE}</style>'
    return "\n".join([head, frame, *parts, "</svg>\n"])


def _shortened(text: str, most: int = 72) -> str:
    return text if len(text) <= most else f"…{text[1 - most :]}"


def _title(comparison: Comparison) -> Iterator[str]:
    for y, style, source, role in (
        (22, "run", comparison.run.source, "run"),
        (42, "reference", comparison.reference.source, "reference"),
    ):
        yield f'<circle cx="{LEFT + 5}" cy="{y - 4}" r="5" class="{style}-dot"/>'
        yield label(LEFT + 18, y, f"{role}: {_shortened(source)}", style="title")


def _step_axis(comparison: Comparison) -> Axis:
    steps = comparison.loss.values.steps
    low, high = int(steps[0]), int(steps[-1])
    parting = comparison.loss.parting
    ends = [int(steps[each.first]) for each in parting.stretches] if parting else []
    is_log = bool(ends) and 1 < ends[-1] < high / _LOG_FROM
    return Axis(max(1, low) if is_log else low, high, LEFT, WIDTH - RIGHT, is_log)


def _marks(comparison: Comparison, x: Axis, y: Axis) -> Iterator[str]:
    """A line at the last steps where the losses part or cross; the last one with its step."""
    parting = comparison.loss.parting
    if parting is None or not parting.stretches:
        return
    found = [int(comparison.loss.values.steps[each.first]) for each in parting.stretches[-3:]]
    for step in found:
        yield rule(x.place(step), y.start, x.place(step), y.end, "mark")
    place = x.place(found[-1])
    is_right = place > (x.start + x.end) / 2
    yield label(place + (-6 if is_right else 6), y.end + 14, f"step {found[-1]:,}", "end" if is_right else "start")


def _loss_panel(comparison: Comparison, x: Axis, top: float) -> Iterator[str]:
    values = comparison.loss.values
    lines = [_averaged(values.steps, each, x) for each in (values.run, values.reference)]
    y = padded((value for line in lines for _, value in line), top)
    yield from framed(x, y, "loss")
    for line, style in zip(reversed(lines), ("reference", "run"), strict=True):
        yield polyline(x, y, line, style)
    yield from _marks(comparison, x, y)


def _averaged(steps: Ints, values: Doubles, x: Axis) -> list[tuple[float, float]]:
    """Means of step and value between places that are equally far apart."""
    edges = np.unique(np.searchsorted(steps, x.evenly(_POINTS + 1)[1:-1]))
    parts = zip(np.split(steps, edges), np.split(values, edges), strict=True)
    return [(float(np.mean(part)), float(value.mean())) for part, value in parts if len(part)]


def _difference_panel(comparison: Comparison, x: Axis, top: float) -> Iterator[str]:
    points = list(_local_means(comparison.loss, x))
    ends = [value + side * _ERRORS * error for _, value, error in points for side in (-1, 1) if math.isfinite(error)]
    y = padded([0.0, *(value for _, value, _ in points), *ends], top)
    yield from framed(x, y, f"loss of the run minus reference, with {_ERRORS} standard errors")
    yield rule(x.start, y.place(0), x.end, y.place(0), "zero")
    known = [point for point in points if math.isfinite(point[2])]
    if known:
        upper = [(at, value + _ERRORS * error) for at, value, error in known]
        lower = [(at, value - _ERRORS * error) for at, value, error in reversed(known)]
        places = " ".join(f"{x.place(at):.1f},{y.place(value):.1f}" for at, value in upper + lower)
        yield f'<polygon points="{places}" class="band"/>'
    yield polyline(x, y, [(at, value) for at, value, _ in points], "difference")
    yield from _marks(comparison, x, y)


def _local_means(loss: Quantity, x: Axis) -> Iterator[tuple[float, float, float]]:
    """Step, mean difference and error about places that are equally far apart, of enough pairs for an error."""
    steps, differences = loss.values.steps, loss.differences
    edges = np.unique(np.searchsorted(steps, x.evenly(_POINTS + 1)))
    fewest = min(BATCHES * differences.batch, len(steps))
    for first, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        begin = max(0, min(first, (first + end - fewest) // 2, len(steps) - fewest))
        mean = differences.mean(begin, max(end, begin + fewest))
        yield float(steps[(first + end - 1) // 2]), mean.value, mean.stderr


def _sharpness_panel(pairs: Sequence[EstimatePair], top: float) -> Iterator[str]:
    x = _value_axis(pairs)
    bottom = top + _ROW * len(pairs)
    yield label(LEFT, top - 10, f"sharpness by block, newest pair, with {_ERRORS} standard errors")
    for value in x.ticks():
        yield rule(x.place(value), top, x.place(value), bottom, "grid")
        yield label(x.place(value), bottom + 18, f"{value:.3g}", "middle", "faint")
    for row, pair in enumerate(pairs):
        y = top + (row + 0.5) * _ROW
        yield label(LEFT - 10, y - 1, pair.block, "end")
        yield label(LEFT - 10, y + 11, pair.estimator, "end", "faint")
        yield from _dot(x, y - 5, pair.run.value, pair.run.stderr, "run")
        yield from _dot(x, y + 5, pair.reference.value, pair.reference.stderr, "reference")


def _value_axis(pairs: Sequence[EstimatePair]) -> Axis:
    estimates = [each for pair in pairs for each in (pair.run, pair.reference)]
    values = [each.value for each in estimates]
    errors = [_ERRORS * each.stderr if math.isfinite(each.stderr) else 0.0 for each in estimates]
    high = max(value + error for value, error in zip(values, errors, strict=True))
    if min(values) > 0:
        # A bar that reaches 0 ends at the frame: a logarithm has no place for it.
        ends = [value - error if value > 2 * error else value / 2 for value, error in zip(values, errors, strict=True)]
        return Axis(min(ends) / 1.2, high * 1.2, LEFT, WIDTH - RIGHT, is_log=True)
    low = min(value - error for value, error in zip(values, errors, strict=True))
    room = 0.05 * (high - low) or 1.0
    return Axis(low - room, high + room, LEFT, WIDTH - RIGHT)


def _dot(x: Axis, y: float, value: float, stderr: float, style: str) -> Iterator[str]:
    if math.isfinite(stderr):
        ends = x.place(value - _ERRORS * stderr), x.place(value + _ERRORS * stderr)
        yield f'<line x1="{ends[0]:.1f}" y1="{y:.1f}" x2="{ends[1]:.1f}" y2="{y:.1f}" class="line {style}"/>'
    yield f'<circle cx="{x.place(value):.1f}" cy="{y:.1f}" r="3.5" class="{style}-dot"/>'
