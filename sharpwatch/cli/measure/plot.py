"""One figure of a measurement: sharpness by layer and by block, and the spectrum of each block's Hessian."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sharpwatch.cli.measure.density import DECADES, Density, density
from sharpwatch.cli.output import formatting
from sharpwatch.curvature.measure.report import BlockReport, SharpnessReport, per_parameter
from sharpwatch.curvature.statistics.estimate import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Okabe and Ito's colours, which colour-blind people can tell apart.
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
_SPREAD = 0.5  # of a layer's place on the axis, that its blocks share side by side
_WIDTH, _UPPER, _LOWER = 11.0, 4.6, 2.5  # inches: of the figure, of sharpness, of a line of spectra
_DPI = 150


@dataclass(frozen=True, slots=True)
class Point:
    """A sharpness where it is drawn: `x`, the block type that gives the colour, the estimator that gives the mark."""

    x: float
    block: str
    estimator: str
    sharpness: Estimate


def draw(report: SharpnessReport, title: str, suffix: str) -> bytes:
    """The figure as a file's content, in the format that `suffix` (".svg", ".png" or ".pdf") names."""
    from matplotlib import rc_context  # noqa: PLC0415 - slow to load, and only a figure needs it

    content = io.BytesIO()
    # A fixed salt and no date: the same measurement gives the same bytes.
    undated: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with rc_context({"svg.hashsalt": "sharpwatch", "font.size": 9}):
        figure(report, title).savefig(content, format=suffix[1:], dpi=_DPI, metadata=undated.get(suffix))
    return content.getvalue()


def figure(report: SharpnessReport, title: str) -> Figure:
    """Sharpness above; below, a spectrum for each block that has one."""
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


def layer_places(report: SharpnessReport) -> dict[str, float]:
    """Where each layer stands on the axis, in the report's order; a gap before a stack of another name."""
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
    """Blocks of one layer side by side, each type at the same side of every layer."""
    places, kinds = layer_places(report), kinds_of(report)
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


def kinds_of(report: SharpnessReport) -> list[str]:
    """The block types there are, in their usual order; by layer there may be more than were asked for as a whole."""
    there = {*report.blocks, *(name.rpartition(".")[2] for name in report.layers)}
    return [kind for kind in _COLOURS if kind in there]


def outside_points(report: SharpnessReport) -> list[Point]:
    """Blocks in no layer: embeddings, the head, the last norm."""
    outside = {name: block for name, block in report.layers.items() if "." not in name}
    return [
        Point(x, name, block.trace.estimator, block.sharpness)
        for x, (name, block) in enumerate(outside.items())
        if block.trace is not None and block.sharpness is not None
    ]


def type_points(report: SharpnessReport) -> list[Point]:
    """Whole block types, by every estimator there is."""
    return [
        Point(x + _shift(index, len(block.estimates)), name, kind, per_parameter(trace, block.parameters))
        for x, (name, block) in enumerate(report.blocks.items())
        for index, (kind, trace) in enumerate(block.estimates.items())
    ]


def _shift(index: int, of: int) -> float:
    return _SPREAD * ((index + 0.5) / of - 0.5) if of > 1 else 0.0


def _sharpness(part: SubFigure, report: SharpnessReport) -> None:
    places, outside = layer_places(report), outside_points(report)
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
    """A decade's third beyond the points and their upper errors; a lower error that passes 0 has no end."""
    sizes = [abs(p.sharpness.value) for p in points if p.sharpness.value != 0 and math.isfinite(p.sharpness.value)]
    tops = [abs(p.sharpness.value) + p.sharpness.stderr for p in points if math.isfinite(p.sharpness.stderr)]
    if sizes:
        axes.set_ylim(min(sizes) / 2, max(sizes + tops) * 2)


def _bounded(widths: list[float]) -> list[float]:
    """The layers' panel takes between a third and a little more than half of the width: names need theirs."""
    rest = widths[1] + widths[2]
    return [min(max(widths[0], rest / 2), 1.1 * rest), *widths[1:]]


def _short(layer: str, places: Mapping[str, float]) -> str:
    """`3` for layers.3; with its stack's first letters where there are several: `enc 3`."""
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
    """A point with its error; a negative one at its size, hollow: a logarithmic axis has no place for it."""
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

    handles = [mark(kind, _COLOURS[kind], "o") for kind in kinds_of(report)]
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
    axes.set_ylim(0.1 / block.parameters, found.share.max() * 8)  # one eigenvalue of n is seen, and room for the labels
    starts = f"{block.spectrum.draws} random start{'' if block.spectrum.draws == 1 else 's'}"
    axes.set_title(f"{'whole model' if name == 'whole' else name}, {starts}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xticks(*_ticks(found), fontsize=7.5)
    for end, side in ((block.top_eigenvalue, "right"), (block.bottom_eigenvalue, "left")):
        if end is not None and math.isfinite(end.value):
            _mark_end(axes, end.value, side)


def _mark_end(axes: Axes, value: float, side: str) -> None:
    """An extreme eigenvalue: a line, and its value at the top, on the inner side."""
    axes.axvline(value, color="#333333", linewidth=0.8, linestyle="--")
    axes.annotate(
        formatting.number(value).replace("-", "−"),
        (value, 0.98),
        xycoords=("data", "axes fraction"),
        xytext=(-3 if side == "right" else 3, 0),
        textcoords="offset points",
        ha=side,
        va="top",
        fontsize=8,
    )


def _ticks(found: Density) -> tuple[list[float], list[str]]:
    """0 and every second power of ten on each side; the first decade is left to the 0."""
    low, high = float(found.eigenvalues[0]), float(found.eigenvalues[-1])
    first = round(math.log10(found.width)) + 2
    exponents = range(first, first + DECADES, 2)
    sizes = [(10.0**exponent, exponent) for exponent in exponents]
    ticks = [(-size, rf"$-10^{{{exponent}}}$") for size, exponent in reversed(sizes) if -size >= low]
    ticks += [(0.0, "0")] if low <= 0 <= high else []
    ticks += [(size, rf"$10^{{{exponent}}}$") for size, exponent in sizes if size <= high]
    return [at for at, _ in ticks], [label for _, label in ticks]
