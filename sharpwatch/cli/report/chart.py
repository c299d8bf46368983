"""The timeline of a report: signals by step, with incidents, actions and checkpoints, as one SVG element."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from sharpwatch.blocks import BLOCKS
from sharpwatch.v1.operator_pb2 import Alert, Decision, HistoryPoint, RunDetail
from sharpwatch.v1.types_pb2 import Estimate

if TYPE_CHECKING:
    from sharpwatch.replay.drawing import Axis

_TOP, _GAP, _LANE = 28, 56, 16
_POINTS = 400  # of a line, each of which may have the highest and the lowest of several
_LOG_FROM = 30.0  # the ratio of the largest to the smallest value from which a scale is logarithmic
_SIGNALS = {
    "loss": "loss",
    "gradient_norm": "gradient norm, of the whole gradient before clipping",
    "update_rms": "update RMS, the largest of all layer blocks",
    "learning_rate": "learning rate, the largest of all layer blocks, multiplier included",
    "lr_multiplier": "learning-rate multiplier, the smallest of all layer blocks",
}
_QUANTITIES = {"sharpness": "sharpness by block", "stability_ratio": "stability ratio by block (1 is the edge)"}
_WHOLE = "model"

Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Panel:
    """One signal: its lines by their style, such as the name of a block."""

    title: str
    lines: dict[str, list[Points]]

    @property
    def values(self) -> list[float]:
        """All values that can be drawn."""
        return [value for parts in self.lines.values() for part in parts for _, value in part]


def timeline(
    detail: RunDetail, points: Sequence[HistoryPoint], estimates: Sequence[Estimate], decisions: Sequence[Decision]
) -> str:
    """Draw a run.

    Args:
        detail: The run.
        points: Its recorded samples.
        estimates: Its estimates of sharpness and stability.
        decisions: Its decisions.

    Returns:
        An SVG element; empty with fewer than two steps.
    """
    from sharpwatch.replay.drawing import LEFT, PANEL, RIGHT, WIDTH, Axis  # noqa: PLC0415 - loads numpy

    steps = [point.step for point in points]
    if len(set(steps)) < 2:
        return ""
    x = Axis(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    panels = [*_signal_panels(points), *_estimate_panels(estimates, x)]
    parts: list[str] = []
    top = float(_TOP + _LANE)
    for panel in panels:
        parts += _drawn(panel, x, top, detail.alerts, decisions)
        top += PANEL + _GAP
    parts += _lane(detail, decisions, x)
    size = f'viewBox="0 0 {WIDTH} {top:.0f}" width="{WIDTH}" height="{top:.0f}"'
    return "\n".join([f'<svg {size} role="img" aria-label="signals by step">', *parts, "</svg>"])


def _signal_panels(points: Sequence[HistoryPoint]) -> Iterator[Panel]:
    for field, title in _SIGNALS.items():
        known = [point for point in points if point.HasField(field) and math.isfinite(getattr(point, field))]  # type: ignore[arg-type]
        if known and (field != "lr_multiplier" or any(point.lr_multiplier != 1.0 for point in known)):
            parts = _unbroken([(float(point.step), float(getattr(point, field))) for point in known])
            yield Panel(title, {_WHOLE: [_thinned(part) for part in parts]})


def _unbroken(points: Points) -> list[Points]:
    """The points in parts, a new one where the run went back."""
    parts: list[Points] = [[]]
    for point in points:
        if parts[-1] and point[0] <= parts[-1][-1][0]:
            parts.append([])
        parts[-1].append(point)
    return parts


def _thinned(points: Points) -> Points:
    """The lowest and the highest of each of at most `_POINTS` stretches, so that no spike is lost."""
    size = math.ceil(len(points) / _POINTS)
    kept = []
    for first in range(0, len(points), size):
        stretch = points[first : first + size]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _estimate_panels(estimates: Iterable[Estimate], x: Axis) -> Iterator[Panel]:
    fitting = [each for each in estimates if math.isfinite(each.value) and x.low <= each.step <= x.high]
    for quantity, title in _QUANTITIES.items():
        of_quantity = [each for each in fitting if each.quantity == quantity]
        # The estimator with the most estimates: those of several differ in what they measure.
        estimators = [each.estimator for each in of_quantity]
        usual = max(sorted(set(estimators)), key=estimators.count, default="")
        kept = sorted((each for each in of_quantity if each.estimator == usual), key=lambda each: each.block)
        lines = {
            block or _WHOLE: [_thinned(part) for part in _unbroken([(each.step, each.value) for each in found])]
            for block, found in groupby(kept, key=lambda each: each.block)
        }
        if lines:
            yield Panel(f"{title}, estimator {usual}", lines)


def _drawn(panel: Panel, x: Axis, top: float, alerts: Iterable[Alert], decisions: Iterable[Decision]) -> Iterator[str]:
    from sharpwatch.replay.drawing import PANEL, Axis, framed, label, padded, polyline, rule  # noqa: PLC0415 - as above

    values = panel.values
    low, high = min(values), max(values)
    if low > 0 and high / low > _LOG_FROM:
        y = Axis(low / 1.2, high * 1.2, top + PANEL, top, is_log=True)
    else:
        y = padded(values, top)
    for alert in alerts:
        begin, end = x.place(alert.onset), x.place(alert.last_step)
        width = max(3.0, end - begin)
        style = "critical" if alert.severity == "critical" else "warning"
        yield f'<rect x="{begin:.1f}" y="{top:.1f}" width="{width:.1f}" height="{PANEL}" class="band {style}"/>'
    yield from framed(x, y, panel.title)
    for made in decisions:
        if made.HasField("applied_step"):
            place = x.place(made.applied_step)
            yield rule(place, y.start, place, y.end, "mark")
    for style, parts in panel.lines.items():
        for part in parts:
            yield polyline(x, y, part, _style(style))
    if len(panel.lines) > 1:
        for row, name in enumerate(panel.lines):
            yield rule(x.end - 64, top + 12 + 14 * row, x.end - 48, top + 12 + 14 * row, f"line {_style(name)}")
            yield label(x.end - 44, top + 16 + 14 * row, name, style="faint")


def _style(name: str) -> str:
    return f"of-{name}" if name in BLOCKS else "of-model"


def _lane(detail: RunDetail, decisions: Iterable[Decision], x: Axis) -> Iterator[str]:
    """Above the panels: what was applied, and the checkpoints."""
    from sharpwatch.replay.drawing import label  # noqa: PLC0415 - as above

    for checkpoint in detail.checkpoints:
        if x.low <= checkpoint.step <= x.high:
            place = x.place(checkpoint.step)
            yield f'<path d="M{place:.1f} {_TOP - 4}l4 6h-8z" class="checkpoint"/>'
    last = -math.inf
    for made in sorted(
        (each for each in decisions if each.HasField("applied_step")), key=lambda each: each.applied_step
    ):
        place = x.place(made.applied_step)
        if place - last > 90:
            yield label(place, 16, f"{made.action} {made.id[:4]}", "middle", "faint")
            last = place
