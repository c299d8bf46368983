"""The figure of a measurement: sharpness by layer and by block, and the spectrum of each block's Hessian."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sharpwatch.cli import output
from sharpwatch.curvature.measure.report import BlockReport, SharpnessReport
from sharpwatch.curvature.statistics.estimate import Estimate, Spectrum, per_parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# The colours of Okabe and Ito, which colour-blind people can tell apart.
_COLOURS = {
    "emb": "#56B4E9",
    "qk": "#0072B2",
    "vo": "#D55E00",
    "ffn": "#009E73",
    "norm": "#CC79A7",
    "head": "#B58900",
    "other": "#777777",
    "whole": "#333333",
}
_MARKS = {"hutchinson": ("o", "Hessian"), "gnb": ("s", "Gauss-Newton matrix")}
_SPREAD = 0.5  # the width in which the blocks of a layer stand side by side; layers are 1 apart
_WIDTH, _UPPER, _LOWER = 11.0, 4.6, 2.5  # inches: the figure, the part with sharpness, a row of spectra
_DPI = 150
_DECADES = 4  # of eigenvalues on each side of 0 that the axis spreads out; smaller ones are in its linear middle
_SIGMA = 0.4  # of the Gaussian drawn for an eigenvalue, in units of asinh(λ/width): a sixth of a decade
_MARGIN = 6 * _SIGMA
_POINTS = 300


@dataclass(frozen=True, slots=True, eq=False)
class Density:
    """A smoothed spectrum.

    Attributes:
        width: A power of ten. The axis asinh(λ/width) is linear up to about it, and logarithmic beyond on both sides.
        eigenvalues: Where the density is given.
        share: The share of the eigenvalues per unit of asinh(λ/width); its integral over that axis is 1.
    """

    width: float
    eigenvalues: NDArray[np.float64]
    share: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Point:
    """A sharpness in the figure.

    Attributes:
        x: Its place on the axis.
        block: The block type, which gives the colour.
        estimator: The estimator, which gives the marker.
        sharpness: The value and its error.
    """

    x: float
    block: str
    estimator: str
    sharpness: Estimate


def draw(report: SharpnessReport, title: str, suffix: str) -> bytes:
    """Draw the figure as the content of a file.

    Args:
        report: The measurement.
        title: The title.
        suffix: The format: ".svg", ".png" or ".pdf".
    """
    from matplotlib import rc_context  # noqa: PLC0415 - slow to import, and only a figure needs it

    content = io.BytesIO()
    # A fixed salt and no date: the same measurement gives the same bytes.
    undated: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with rc_context({"svg.hashsalt": "sharpwatch", "font.size": 9}):
        figure(report, title).savefig(content, format=suffix[1:], dpi=_DPI, metadata=undated.get(suffix))
    return content.getvalue()


def figure(report: SharpnessReport, title: str) -> Figure:
    """Draw the sharpness, and below it a spectrum for each block that has one."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - as above

    everything = {**report.blocks, "whole": report.whole}
    spectra = {name: block for name, block in everything.items() if block.spectrum is not None}
    in_line = 4 if len(spectra) > 6 else 3
    lines = math.ceil(len(spectra) / in_line)
    heights = [_UPPER, _LOWER * lines] if lines else [_UPPER]
    drawn = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    parts = drawn.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    parts[0].suptitle(title, fontsize=10)
    _sharpness(parts[0], report)
    if lines:
        _spectra(parts[1], spectra, lines, in_line)
    return drawn


def layer_positions(report: SharpnessReport) -> dict[str, float]:
    """The place of each layer on the axis, in the report's order, with a gap between stacks of layers."""
    places: dict[str, float] = {}
    x, stack = 0.0, None
    for name in report.layers:
        layer, _, _ = name.rpartition(".")
        if not layer or layer in places:
            continue
        here = layer.rpartition(".")[0]
        x += 0.0 if stack is None else 1.0 if here == stack else 2.0
        places[layer], stack = x, here
    return places


def layer_points(report: SharpnessReport) -> list[Point]:
    """The blocks of each layer, side by side in the same order for every layer."""
    places, kinds = layer_positions(report), block_types(report)
    points = []
    for name, block in report.layers.items():
        layer, _, kind = name.rpartition(".")
        if layer and block.sharpness is not None and block.trace is not None:
            points.append(
                Point(
                    places[layer] + _shift(kinds.index(kind), len(kinds)), kind, block.trace.estimator, block.sharpness
                )
            )
    return points


def block_types(report: SharpnessReport) -> list[str]:
    """The block types in the report, in their usual order; layers may have more types than were measured as a whole."""
    there = {*report.blocks, *(name.rpartition(".")[2] for name in report.layers)}
    return [kind for kind in _COLOURS if kind in there]


def outside_points(report: SharpnessReport) -> list[Point]:
    """The blocks outside all layers: embeddings, the head, the last norm."""
    outside = {name: block for name, block in report.layers.items() if "." not in name}
    return [
        Point(x, name, block.trace.estimator, block.sharpness)
        for x, (name, block) in enumerate(outside.items())
        if block.trace is not None and block.sharpness is not None
    ]


def type_points(report: SharpnessReport) -> list[Point]:
    """The block types over all layers, a point for each estimator."""
    return [
        Point(x + _shift(index, len(block.estimates)), name, kind, per_parameter(trace, block.parameters))
        for x, (name, block) in enumerate(report.blocks.items())
        for index, (kind, trace) in enumerate(block.estimates.items())
    ]


def _shift(index: int, of: int) -> float:
    return _SPREAD * ((index + 0.5) / of - 0.5) if of > 1 else 0.0


def _sharpness(part: SubFigure, report: SharpnessReport) -> None:
    places, outside = layer_positions(report), outside_points(report)
    widths = [max(3.0, len(places)), max(1.0, 0.9 * len(outside)), max(1.0, len(report.blocks))]
    layered, side, types = part.subplots(1, 3, sharey=True, width_ratios=_bounded(widths))
    layered.set_yscale("log")
    layered.set_ylabel("average sharpness: mean curvature\nper parameter, Tr/n (loss per weight²)")
    _panel(layered, layer_points(report), "by layer", joined=True)
    _panel(side, outside, "in no layer")
    _panel(types, type_points(report), "block types, all layers")
    step = max(1, math.ceil(len(places) / 24))
    shown = list(places.items())[::step]
    layered.set_xticks([x for _, x in shown], [_short(name, places) for name, _ in shown])
    layered.set_xlabel("layer")
    side.set_xticks(range(len(outside)), [point.block for point in outside], fontsize=8)
    types.set_xticks(range(len(report.blocks)), list(report.blocks), fontsize=8)
    _set_limits(layered, [*layer_points(report), *outside, *type_points(report)])
    _legend(part, report)


def _set_limits(axes: Axes, points: list[Point]) -> None:
    """Leave a factor of 2 around the points and their upper errors; a lower error that passes 0 is cut off."""
    sizes = [abs(p.sharpness.value) for p in points if p.sharpness.value != 0 and math.isfinite(p.sharpness.value)]
    tops = [abs(p.sharpness.value) + p.sharpness.stderr for p in points if math.isfinite(p.sharpness.stderr)]
    if sizes:
        axes.set_ylim(min(sizes) / 2, max(sizes + tops) * 2)


def _bounded(widths: list[float]) -> list[float]:
    """Give the panel of layers between a third and a little more than half of the width; names need the rest."""
    rest = widths[1] + widths[2]
    return [min(max(widths[0], rest / 2), 1.1 * rest), *widths[1:]]


def _short(layer: str, places: Mapping[str, float]) -> str:
    """`3` for layers.3, or `enc 3` if there are several stacks of layers."""
    stack, _, number = layer.rpartition(".")
    return number if len({name.rpartition(".")[0] for name in places}) == 1 else f"{stack[:3]} {number}"


def _panel(axes: Axes, points: list[Point], title: str, *, joined: bool = False) -> None:
    axes.set_title(title, fontsize=9)
    axes.grid(visible=True, axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for kind in dict.fromkeys(point.block for point in points):
        mine = [point for point in points if point.block == kind]
        if joined:
            axes.plot(
                [p.x for p in mine], [abs(p.sharpness.value) for p in mine], color=_COLOURS[kind], alpha=0.3, lw=1
            )
        for point in mine:
            _mark(axes, point)
    axes.set_xlim(min((p.x for p in points), default=0) - 0.5, max((p.x for p in points), default=0) + 0.5)


def _mark(axes: Axes, point: Point) -> None:
    """Draw a point with its error. A negative one is hollow and at its size, since the axis is logarithmic."""
    value, colour = point.sharpness.value, _COLOURS[point.block]
    if not math.isfinite(value) or value == 0:
        return
    size = abs(value)
    error = point.sharpness.stderr if math.isfinite(point.sharpness.stderr) else 0.0
    below = min(error, 0.999 * size)  # an error bar that passes 0 reaches the bottom of the axis
    axes.errorbar(
        point.x,
        size,
        yerr=[[below], [error]],
        fmt=_MARKS.get(point.estimator, ("D", ""))[0],
        color=colour,
        markersize=5,
        markerfacecolor=colour if value > 0 else "white",
        elinewidth=1.2,
        capsize=2,
    )


def _legend(part: SubFigure, report: SharpnessReport) -> None:
    from matplotlib.lines import Line2D  # noqa: PLC0415 - as above

    def mark(label: str, colour: str, shape: str, face: str | None = None) -> Line2D:
        return Line2D([], [], linestyle="", marker=shape, color=colour, markerfacecolor=face or colour, label=label)

    handles = [mark(kind, _COLOURS[kind], "o") for kind in block_types(report)]
    used = dict.fromkeys(kind for block in report.blocks.values() for kind in block.estimates)
    handles += [mark(f"of the {_MARKS[kind][1]}", "#333333", _MARKS[kind][0]) for kind in used if kind in _MARKS]
    everything = [*report.blocks.values(), *report.layers.values()]
    if any(trace.value < 0 for block in everything for trace in block.estimates.values()):
        handles.append(mark("negative: its size is shown", "#333333", "o", "white"))
    handles.append(mark("± one standard error", "#333333", "|"))
    part.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=8)


def _spectra(part: SubFigure, spectra: Mapping[str, BlockReport], lines: int, in_line: int) -> None:
    grid = part.subplots(lines, in_line, squeeze=False).ravel()
    for axes, (name, block) in zip(grid, spectra.items(), strict=False):
        _spectrum(axes, name, block)
    for axes in grid[::in_line]:
        axes.set_ylabel("share of eigenvalues\nper e-fold of λ")
    for axes in grid[len(spectra) :]:
        axes.set_visible(False)
    part.supxlabel(
        "eigenvalue λ of the block's Hessian (loss per weight²); linear around 0, logarithmic beyond", fontsize=9
    )


def _spectrum(axes: Axes, name: str, block: BlockReport) -> None:
    if block.spectrum is None:
        return
    found = density(block.spectrum)
    axes.set_xscale("asinh", linear_width=found.width)
    axes.set_yscale("log")
    axes.fill_between(found.eigenvalues, found.share, 1e-300, color=_COLOURS[name], alpha=0.35, linewidth=0)
    axes.plot(found.eigenvalues, found.share, color=_COLOURS[name], linewidth=1.2)
    axes.set_ylim(
        0.1 / block.parameters, found.share.max() * 8
    )  # one eigenvalue of n is visible, and there is room for labels
    starts = f"{block.spectrum.draws} random start{'' if block.spectrum.draws == 1 else 's'}"
    axes.set_title(f"{'whole model' if name == 'whole' else name}, {starts}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xticks(*_ticks(found), fontsize=7.5)
    for end, side in ((block.top_eigenvalue, "right"), (block.bottom_eigenvalue, "left")):
        if end is not None and math.isfinite(end.value):
            _mark_end(axes, end.value, side)


def density(spectrum: Spectrum) -> Density:
    """Smooth a spectrum with a Gaussian of one width on the asinh axis.

    On λ itself, a Gaussian of one width would hide all structure near 0, or be invisible far from it.
    """
    values, weights = np.array(spectrum.eigenvalues), np.array(spectrum.weights)
    largest = float(np.abs(values).max())
    width = 10.0 ** (math.floor(math.log10(largest)) - _DECADES) if largest > 0 else 1.0
    at = np.arcsinh(values / width)
    axis = np.linspace(at.min() - _MARGIN, at.max() + _MARGIN, _POINTS)
    bells = np.exp(-0.5 * ((axis[:, None] - at) / _SIGMA) ** 2) / (_SIGMA * math.sqrt(2 * math.pi))
    return Density(width, np.sinh(axis) * width, bells @ weights)


def _mark_end(axes: Axes, value: float, side: str) -> None:
    """Mark an extreme eigenvalue by a line, with its value at the top on the inner side."""
    axes.axvline(value, color="#333333", linewidth=0.8, linestyle="--")
    axes.annotate(
        output.number(value).replace("-", "−"),
        (value, 0.98),
        xycoords=("data", "axes fraction"),
        xytext=(-3 if side == "right" else 3, 0),
        textcoords="offset points",
        ha=side,
        va="top",
        fontsize=8,
    )


def _ticks(found: Density) -> tuple[list[float], list[str]]:
    """Place ticks at 0 and at every second power of ten; the first decade is left free for the 0."""
    low, high = float(found.eigenvalues[0]), float(found.eigenvalues[-1])
    first = round(math.log10(found.width)) + 2
    exponents = range(first, first + _DECADES, 2)
    sizes = [(10.0**exponent, exponent) for exponent in exponents]
    ticks = [(-size, rf"$-10^{{{exponent}}}$") for size, exponent in reversed(sizes) if -size >= low]
    ticks += [(0.0, "0")] if low <= 0 <= high else []
    ticks += [(size, rf"$10^{{{exponent}}}$") for size, exponent in sizes if size <= high]
    return [at for at, _ in ticks], [label for _, label in ticks]
