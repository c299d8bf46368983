"""Parts of SVG charts: scales, grids, labels and lines, as text. Styles are those of the page that they are put in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

import numpy as np

from sharpwatch.wire import Doubles

WIDTH, LEFT, RIGHT = 760, 84, 24
PANEL = 180  # height


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale from values to places.

    Attributes:
        low: The value at `start`.
        high: The value at `end`.
        start: In pixels.
        end: In pixels.
        is_log: Whether equal ratios are equally long.
    """

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """The pixel of a value.

        Args:
            value: Any; beyond the ends it is taken to the end.
        """
        low, high, at = (self._scaled(each) for each in (self.low, self.high, value))
        return self.start + (self.end - self.start) * min(1.0, max(0.0, (at - low) / (high - low)))

    def ticks(self) -> list[float]:
        """Round values to label: about five, or powers of ten with their 2 and 5 where there are few of them."""
        if not self.is_log:
            return _round_values(self.low, self.high)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        digits = (1, 2, 5) if len(powers) <= 3 else (1,)
        thinned = powers[:: max(1, len(powers) // 6)]
        return [
            value for power in thinned for digit in digits if self.low <= (value := digit * 10.0**power) <= self.high
        ]

    def evenly(self, count: int) -> Doubles:
        """Values at places that are equally far apart, from end to end.

        Args:
            count: Their number.
        """
        if self.is_log:
            return np.geomspace(self.low, self.high, count)
        return np.linspace(self.low, self.high, count)

    def _scaled(self, value: float) -> float:
        if not self.is_log:
            return value
        return math.log(max(value, self.low))


def _round_values(low: float, high: float) -> list[float]:
    size = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(size))
    step = next(digit * power for digit in (1, 2, 2.5, 5, 10) if digit * power >= size)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def label(x: float, y: float, text: str, anchor: str = "start", style: str = "") -> str:
    """A text at a place, of which control characters are left out."""
    # A name may hold control characters, which XML can't.
    shown = escape("".join(c if c.isprintable() else " " for c in text))
    of_style = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{of_style}>{shown}</text>'


def rule(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def framed(x: Axis, y: Axis, title: str) -> Iterator[str]:
    """The grid of a panel with its labels; `y` runs from bottom to top."""
    yield label(LEFT, y.end - 10, title)
    for value in y.ticks():
        yield rule(x.start, y.place(value), x.end, y.place(value), "grid")
        yield label(x.start - 8, y.place(value) + 4, f"{value:.6g}", "end", "faint")
    for value in x.ticks():
        yield label(x.place(value), y.start + 18, f"{value:,.10g}", "middle", "faint")
    yield label(x.end, y.start + 34, "step (logarithmic)" if x.is_log else "step", "end", "faint")


def padded(values: Iterable[float], top: float) -> Axis:
    """The axis of a panel that begins at `top`, with some room beyond the values; at least one must be finite."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite), max(finite)
    room = 0.06 * (high - low) or abs(high) * 0.01 or 1.0
    return Axis(low - room, high + room, top + PANEL, top)


def polyline(x: Axis, y: Axis, points: Sequence[tuple[float, float]], style: str) -> str:
    """A line through points, each a step and a value."""
    places = " ".join(f"{x.place(at):.1f},{y.place(value):.1f}" for at, value in points)
    return f'<polyline points="{places}" class="line {style}"/>'
