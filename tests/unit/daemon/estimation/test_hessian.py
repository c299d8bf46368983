"""Estimates of Hessian probes against the same numbers computed plainly."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hellos import run_hello

from sharpwatch.daemon.detection.run_detection import RunDetection
from sharpwatch.daemon.estimation.estimator import estimate_all
from sharpwatch.daemon.estimation.windows import WINDOW_PROBES, EstimateRequest
from sharpwatch.daemon.ingest.hello import Attempt
from sharpwatch.daemon.ingest.probes import (
    DirectionReading,
    GnbReading,
    HutchinsonReading,
    LanczosReading,
    LineSearchReading,
    PreconditionedReading,
)
from sharpwatch.daemon.ingest.samples import Reading
from sharpwatch.daemon.runs.run import Run

NAN = math.nan
HELLO = run_hello({("emb", ""): 64, ("qk", "0"): 8, ("qk", "1"): 8})


def estimates_from(**windows):
    """The estimates of a run from its windows, by probe."""
    (found,) = estimate_all([EstimateRequest(HELLO, windows)], "cpu")
    return found.values


def hutchinson(block: str, draws) -> HutchinsonReading:
    return HutchinsonReading(8, block, np.array(draws, dtype=np.float64), "autograd")


def lanczos(block: str, top: float, bottom: float = -1.0, residual: float = 0.1) -> LanczosReading:
    return LanczosReading(8, block, top, residual, bottom, 2 * residual, "autograd")


def search(whole: float, emb: float = NAN, qk: float = NAN) -> LineSearchReading:
    return LineSearchReading(8, whole, 0.02, np.array([emb, qk]), np.array([0.03, 0.03]))


def test_a_trace_is_the_mean_over_a_blocks_own_probes():
    random = np.random.default_rng(0)
    draws = {block: random.normal(10, 2, (6, 2)) for block in ("emb", "qk")}
    window = tuple(
        (2 * turn + offset, hutchinson(block, draws[block][turn]))
        for turn in range(6)
        for offset, block in enumerate(draws)
    )
    found = estimates_from(hutchinson=window)
    for offset, (block, size) in enumerate((("emb", 64), ("qk", 16))):
        trace, means = found["trace", block, "hutchinson"], draws[block].mean(1)
        assert trace.value == pytest.approx(means.mean())
        assert trace.stderr == pytest.approx(means.std(ddof=1) / math.sqrt(6))
        assert (trace.draws, trace.step, trace.method) == (12, 10 + offset, "autograd")
        assert found["sharpness", block, "hutchinson"].value == pytest.approx(trace.value / size)
        assert found["sharpness", block, "hutchinson"].stderr == pytest.approx(trace.stderr / size)


def test_of_a_block_only_the_newest_probes_count_and_one_draw_has_no_error():
    old = [(step, hutchinson("emb", [100.0, 101.0])) for step in range(9)]
    new = [(9 + step, hutchinson("emb", [1.0, 2.0])) for step in range(WINDOW_PROBES)]
    found = estimates_from(hutchinson=(*old, *new, (99, hutchinson("qk", [5.0]))))
    assert found["trace", "emb", "hutchinson"].value == pytest.approx(1.5)
    assert ("trace", "qk", "hutchinson") not in found


def test_probes_with_fewer_draws_weigh_as_probes():
    window = ((1, hutchinson("emb", [1.0, 3.0])), (2, hutchinson("emb", [5.0])))
    trace = estimates_from(hutchinson=window)["trace", "emb", "hutchinson"]
    assert (trace.value, trace.draws) == (pytest.approx(3.5), 3)


def test_an_eigenvalue_is_the_newest_with_its_residual_and_the_scatter_of_its_block():
    window = (
        (1, lanczos("qk", 7.0)),
        (2, lanczos("qk", 9.0, -3.0)),
        (3, lanczos("", 20.0)),
        (4, lanczos("qk", 8.0, -2.0, residual=0.25)),
    )
    found = estimates_from(lanczos=window)
    top, bottom = found["top_eigenvalue", "qk", "lanczos"], found["bottom_eigenvalue", "qk", "lanczos"]
    assert (top.value, top.residual, top.step, top.draws, top.method) == (8.0, 0.25, 4, 3, "autograd")
    assert top.stderr == pytest.approx(math.sqrt((2.0**2 + 1.0**2) / 2 / 2))
    assert (bottom.value, bottom.residual) == (-2.0, 0.5)
    whole = found["top_eigenvalue", "", "lanczos"]
    assert (whole.value, whole.step) == (20.0, 3)
    assert math.isnan(whole.stderr)  # one alone has no scatter, but a residual


def test_line_searches_are_averaged_over_the_turns_of_each_block():
    window = ((1, search(0.5, emb=0.0)), (2, search(0.7, qk=0.4)), (3, search(0.6, emb=1.0)))
    found = estimates_from(linesearch=window)
    whole, emb = found["stability_ratio", "", "linesearch"], found["stability_ratio", "emb", "linesearch"]
    assert (whole.value, whole.draws, whole.step, whole.residual) == (pytest.approx(0.6), 3, 3, 0.02)
    assert (emb.value, emb.residual) == (0.5, 0.03)
    error = 0.1 / 0.6745 * math.sqrt(math.pi / 2 / 3)  # the median deviation, as a normal distribution has it
    assert whole.stderr == pytest.approx(math.hypot(error, 0.02 / math.sqrt(3)), rel=1e-4)
    assert ("stability_ratio", "qk", "linesearch") not in found
    assert estimates_from(linesearch=window[:1]) == {}


def test_one_search_along_a_climbing_step_does_not_rule_the_others():
    window = tuple(enumerate(map(search, [0.5, 0.52, 4000.0, 0.48, 0.51, 0.49])))
    whole = estimates_from(linesearch=window)["stability_ratio", "", "linesearch"]
    assert whole.value == pytest.approx(0.505)
    assert whole.stderr < 0.03


def test_the_errors_are_those_of_the_scatter():
    """Of 2000 windows of 8 normal probes with a trend: the claimed error of a value is its standard deviation."""
    random = np.random.default_rng(0)
    values = random.normal(0, 1, (2000, WINDOW_PROBES)) + 50 + 0.2 * np.arange(WINDOW_PROBES)
    claimed, medians = [], []
    for row in values:
        tops = tuple(enumerate(lanczos("qk", top) for top in row))
        claimed.append(estimates_from(lanczos=tops)["top_eigenvalue", "qk", "lanczos"].stderr)
        searches = tuple(enumerate(search(one) for one in row - 0.2 * np.arange(WINDOW_PROBES)))
        medians.append(estimates_from(linesearch=searches)["stability_ratio", "", "linesearch"])
    assert np.sqrt(np.mean(np.square(claimed))) == pytest.approx(1, abs=0.05)
    errors = np.mean([one.stderr**2 for one in medians])
    assert np.sqrt(errors) == pytest.approx(np.std([one.value for one in medians]), rel=0.15)


def test_the_preconditioned_ratio_is_the_newest():
    readings = [PreconditionedReading(8, ratio, 0.01, "autograd") for ratio in (0.5, 0.9, 0.7)]
    found = estimates_from(preconditioned=tuple(enumerate(readings, 1)))
    (ratio,) = found.values()
    assert list(found) == [("stability_ratio", "", "preconditioned")]
    assert (ratio.value, ratio.residual, ratio.step) == (0.7, 0.01, 3)
    assert ratio.stderr == pytest.approx(math.sqrt((0.4**2 + 0.2**2) / 2 / 2))


class FakeController:
    """What a run reads of a controller to publish it."""

    mode, newest_revision, multipliers, incidents, incidents_in_all = "observe", 0, {}, (), 0
    detection = RunDetection("run", (("emb", ""),), np.ones(1, dtype=np.int64), lambda: "id")


EMPTY = Reading(1, 1, 0.0, None, None, {}, None, (), (), closing=False, restored=False, dropped_probes=())
ONES = np.ones((2, 3))
PROBES = {
    "gnb": GnbReading(8, ONES, None),
    "direction": DirectionReading(8, 1.0, 1.0, np.ones(2), np.ones(2), np.ones(2)),
    "hutchinson": hutchinson("qk", [1.0, 2.0]),
    "lanczos": lanczos("qk", 4.0),
    "linesearch": search(0.5, emb=0.5),
    "preconditioned": PreconditionedReading(8, 0.5, 0.01, "autograd"),
}


def after(run: Run, step: int, *probes: str) -> list[tuple[str, str, str]]:
    """What is shown once a sample with `probes` is estimated."""
    reading = replace(EMPTY, sequence=step, step=step, probes={probe: PROBES[probe] for probe in probes})
    run.update(reading, 0.0, 0.0)
    request = run.request(reading.probes)
    assert (tuple(request.windows), request.new_steps) == (probes, {step})
    run.windows.note_taken(request)
    run.take_estimates(request, estimate_all([request], "cpu")[0])
    run.publish()
    return list(run.snapshot.estimates)


def test_a_probe_renews_its_own_estimates_alone_and_all_keep_one_order():
    run = Run(Attempt(HELLO, b""), FakeController(), now=0.0)
    shown = [after(run, step, *PROBES) for step in (1, 2)][-1]
    assert {estimator for _, _, estimator in shown} == {*PROBES}
    assert [key[2] for key in shown] == sorted((key[2] for key in shown), key=list(PROBES).index)
    first = dict(run.snapshot.estimates)
    for step, probe in enumerate(PROBES, 3):
        assert after(run, step, probe) == shown
        changed = {key[2] for key, one in run.snapshot.estimates.items() if one.step == step}
        assert changed == {probe}
    assert run.snapshot.estimates.keys() == first.keys()
