"""The picture of a comparison: well-formed, with everything in it inside the frame."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.storage.schema import EstimateRow
from sharpwatch.replay.compare import compare
from sharpwatch.replay.drawing import Axis
from sharpwatch.replay.log import Log, Row
from sharpwatch.replay.picture import picture
from sharpwatch.replay.recorded_run import RecordedRun, from_log

SVG = "{http://www.w3.org/2000/svg}"


def run(losses, source="run.csv", sharpness=()):
    found = from_log(
        Log([Row(step, float(loss)) for step, loss in enumerate(losses, 1)], {"step": "step", "loss": "loss"}),
        source,
        "csv",
    )
    estimates = [
        EstimateRow("run", "sharpness", block, Estimate(value, error, 8, "gnb", 1)) for block, value, error in sharpness
    ]
    return RecordedRun(
        source, "csv", found.layer_blocks, found.parameters, found.observations, found.names, (), estimates
    )


def drawn(here, there):
    return ET.fromstring(picture(compare(here, there)))  # noqa: S314 - it is our own


def texts(svg):
    return [element.text for element in svg.iter(f"{SVG}text")]


def coordinates(svg):
    for element in svg.iter():
        if points := element.get("points"):
            numbers = map(float, re.split("[ ,]", points))
            yield from zip(numbers, numbers, strict=True)
        yield from (
            (float(element.get(x, 0)), float(element.get(y, 0)))
            for x, y in (("x1", "y1"), ("x2", "y2"), ("x", "y"), ("cx", "cy"))
        )


LOSSES = 3 + 0.1 * np.random.default_rng(0).standard_normal(3000)
NOISE = 0.01 * np.random.default_rng(1).standard_normal(3000)
STEP = np.arange(3000) >= 1000


@pytest.mark.parametrize(
    ("losses", "sharpness"),
    [
        (LOSSES + NOISE + STEP, [("qk", 1e-6, 1e-7), ("vo", 2.0, np.nan), ("norm", 1.0, 3.0)]),
        (LOSSES, [("qk", -1.0, 0.5), ("vo", 2.0, 0.1)]),
        (LOSSES + 1e100, []),
        (LOSSES[:2], []),
        (LOSSES[:1], [("qk", 1.0, 0.1)]),
        (np.full(3000, 3.0), []),
    ],
)
def test_all_is_inside_the_frame(losses, sharpness):
    svg = drawn(run(losses, sharpness=sharpness), run(LOSSES[: len(losses)], sharpness=sharpness))
    width, height = float(svg.get("width")), float(svg.get("height"))
    assert all(0 <= x <= width and 0 <= y <= height for x, y in coordinates(svg))


def test_the_parting_step_is_marked():
    svg = drawn(run(LOSSES + NOISE + STEP), run(LOSSES))
    assert "step 1,001" in texts(svg)
    marks = [element for element in svg.iter(f"{SVG}line") if element.get("class") == "mark"]
    assert len({mark.get("x1") for mark in marks}) == 1
    assert float(marks[0].get("x1")) == pytest.approx(84 + (760 - 24 - 84) * 1000 / 2999, abs=0.1)


def test_an_early_parting_gets_room():
    svg = drawn(run(LOSSES + NOISE + (np.arange(3000) >= 40)), run(LOSSES))
    assert "step (logarithmic)" in texts(svg)
    assert "step 41" in texts(svg)


def test_names_of_any_characters():
    svg = drawn(run(LOSSES, "<b> & \x1b[31m"), run(LOSSES, "x" * 500))
    assert "run: <b> &  [31m" in texts(svg)
    assert max(len(text) for text in texts(svg)) < 100


def test_there_are_colours_for_dark_pages():
    style = picture(compare(run(LOSSES), run(LOSSES))).partition("<style>")[2].partition("</style>")[0]
    light, dark = style.split("@media (prefers-color-scheme:dark)")
    for name in (".page", ".run", ".reference", ".difference", ".band", ".mark", ".run-dot", ".reference-dot", ".grid"):
        assert f"{name}{{" in light
        assert f"{name}{{" in dark


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 12), (1e-9, 2e-9), (1e6, 1.1e6), (0.5, 50_000)])
def test_ticks_are_few_round_and_inside(low, high):
    for is_log in (False, True) if low > 0 else (False,):
        axis = Axis(low, high, 0, 100, is_log)
        ticks = axis.ticks()
        assert len(ticks) <= 9
        assert all(low - 1e-9 * abs(low) <= tick <= high * (1 + 1e-9) for tick in ticks)
        places = [axis.place(tick) for tick in ticks]
        assert all(here < there for here, there in itertools.pairwise(places))
