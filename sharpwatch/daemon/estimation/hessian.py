"""Estimates from the windows of direction, Hutchinson, Lanczos, line search and preconditioned probes, run by run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import torch

from sharpwatch.curvature.statistics.estimate import Estimate, Ratio, ratio_of_sums, stability_ratio
from sharpwatch.curvature.statistics.pooling import trace_estimates
from sharpwatch.daemon.estimation.windows import (
    WINDOW_ALL_BLOCKS,
    WINDOW_PROBES,
    EstimateRequest,
    Estimates,
    Key,
    ReadingSpec,
    Window,
)
from sharpwatch.daemon.ingest.hello import RunHello
from sharpwatch.daemon.ingest.probes import DirectionReading

_ENDS = (("top_eigenvalue", "top"), ("bottom_eigenvalue", "bottom"))


@dataclass(frozen=True, slots=True)
class ObservedStability:
    """The stability ratios of one direction probe; `no_descent` if gᵀd ≤ 0, where the ratio is undefined."""

    whole: Estimate | None = None
    no_descent: bool = False
    blocks: Mapping[str, Estimate] = field(default_factory=dict)


def observed_stability(blocks: Sequence[str], step: int, reading: DirectionReading) -> ObservedStability:
    """Returns the stability ratios of the probe of one step, as the detectors need them."""
    whole = _whole_ratio([reading], step)
    by_block = _block_ratios(blocks, [reading], step)
    return ObservedStability(whole, no_descent=not reading.descent > 0, blocks=by_block)


def _ratio(curvatures: Sequence[float], descents: Sequence[float], step: int, method: str) -> Estimate | None:
    return _estimate(stability_ratio(curvatures, descents), step, method)


def _estimate(ratio: Ratio | None, step: int, method: str) -> Estimate | None:
    return (
        None if ratio is None else Estimate(ratio.value, ratio.stderr, ratio.probes, "direction", step, method=method)
    )


def _whole_ratio(readings: Sequence[DirectionReading], step: int) -> Estimate | None:
    curvatures, descents = [one.curvature for one in readings], [one.descent for one in readings]
    return _ratio(curvatures, descents, step, readings[-1].method)


def _block_ratios(blocks: Sequence[str], readings: Sequence[DirectionReading], step: int) -> dict[str, Estimate]:
    """Estimates the ratio of each block from the newest probes that measured it."""
    ratios = {}
    for index, block in enumerate(blocks):
        # Blocks take turns, so a block's last eight probes lie further back than the model's last eight.
        taken = [one for one in readings if not math.isnan(one.block_curvature[index])][-WINDOW_PROBES:]
        curvatures = [float(one.block_curvature[index]) for one in taken]
        descents = [float(one.block_descent[index]) for one in taken]
        ratio = _ratio(curvatures, descents, step, readings[-1].method)
        if ratio is not None:
            ratios[block] = ratio
    return ratios


def _curvature_shares(blocks: Sequence[str], readings: Sequence[DirectionReading], step: int) -> dict[str, Estimate]:
    """Estimates each block's share in the curvature along the step; none where the loss is concave along it."""
    taken = [(one.curvature_parts, one.curvature) for one in readings if one.curvature_parts is not None]
    shares = {}
    for index, block in enumerate(blocks):
        ratio = ratio_of_sums([float(parts[index]) for parts, _ in taken], [curvature for _, curvature in taken])
        share = _estimate(ratio, step, readings[-1].method)
        if share is not None:
            shares[block] = share
    return shares


def _along_the_step(hello: RunHello, window: Window) -> dict[Key, Estimate]:
    """Estimates the ratio of the whole model and of each block, and the blocks' shares in the curvature.

    One whose error is not known yet is left out.
    """
    step = window[-1][0]
    readings = [reading for _, reading in window]
    whole = _whole_ratio(readings[-WINDOW_PROBES:], step)
    ratios = {"": whole} if whole is not None else {}
    ratios |= _block_ratios(hello.blocks, readings, step)
    shares = _curvature_shares(hello.blocks, readings[-WINDOW_PROBES:], step)
    found = {
        **{("stability_ratio", block, "direction"): ratio for block, ratio in ratios.items()},
        **{("curvature_share", block, "direction"): share for block, share in shares.items()},
    }
    return {key: one for key, one in found.items() if math.isfinite(one.stderr)}


def _traces(hello: RunHello, window: Window) -> dict[Key, Estimate]:
    """Means over the draws and probes of each block; a block whose error is not known yet is left out."""
    by_block = _by_block(window)
    probes = max(map(len, by_block.values()))
    draws = max(len(reading.traces) for taken in by_block.values() for _, reading in taken)
    values = torch.zeros(len(by_block), probes, draws, dtype=torch.float64)
    # Blocks and probes differ in their draws; all are pooled in one call.
    mask = torch.zeros(values.shape, dtype=torch.bool)
    for row, taken in enumerate(by_block.values()):
        for column, (_, reading) in enumerate(taken):
            values[row, column, : len(reading.traces)] = torch.from_numpy(reading.traces)
            mask[row, column, : len(reading.traces)] = True
    found = trace_estimates(values, mask)
    rows = zip(by_block.items(), found.value.tolist(), found.stderr.tolist(), found.draws.tolist(), strict=True)
    estimates: dict[Key, Estimate] = {}
    for (block, taken), value, stderr, count in rows:
        step, newest = taken[-1]
        trace = Estimate(value, stderr, count, "hutchinson", step, method=newest.method)
        size = int(hello.block_parameters[hello.blocks.index(block)])
        if math.isfinite(stderr):
            estimates["trace", block, "hutchinson"] = trace
            estimates["sharpness", block, "hutchinson"] = replace(trace, value=value / size, stderr=stderr / size)
    return estimates


def _eigenvalues(hello: RunHello, window: Window) -> dict[Key, Estimate]:
    """The newest probe of each block and of the whole model; its error is the scatter of probes on other batches."""
    del hello
    estimates = {}
    for block, taken in _by_block(window).items():
        step, newest = taken[-1]
        for quantity, end in _ENDS:
            values = [getattr(reading, end) for _, reading in taken]
            residual = getattr(newest, f"{end}_residual")
            # The newest, not a mean: the eigenvalue drifts while the run trains, and each probe is a whole measurement.
            found = Estimate(values[-1], _deviation(values), len(values), "lanczos", step, residual, newest.method)
            if not math.isinf(found.stderr):
                estimates[quantity, block, "lanczos"] = found
    return estimates


def _critical_sharpness(hello: RunHello, window: Window) -> dict[Key, Estimate]:
    """Medians over the newest probes, for a block over those that measured it; at least two.

    A median, because a step that climbs on the probe's rows raises the loss at any scale, and one such search would
    dominate a mean.
    """
    searches = {"": [(step, one.sharpness, one.half_width) for step, one in window]}
    for index, block in enumerate(hello.blocks):
        each = ((step, float(one.block_sharpness[index]), float(one.block_half_width[index])) for step, one in window)
        searches[block] = [search for search in each if not math.isnan(search[1])]
    estimates = {}
    for block, all_searches in searches.items():
        taken = all_searches[-WINDOW_PROBES:]
        if len(taken) > 1:
            steps, values, widths = zip(*taken, strict=True)
            middle = statistics.median(values)
            # The search ends with the edge somewhere within ± half_width, and a uniform value there has a standard
            # deviation of half_width/√3.
            stderr = math.hypot(_median_error(values, middle), widths[-1] / math.sqrt(3))
            found = Estimate(middle, stderr, len(values), "linesearch", steps[-1], widths[-1], "losses")
            if math.isfinite(stderr):
                estimates["stability_ratio", block, "linesearch"] = found
    return estimates


def _preconditioned(hello: RunHello, window: Window) -> dict[Key, Estimate]:
    """The newest probe; its error is the scatter of probes on other batches."""
    del hello
    step, newest = window[-1]
    values = [one.ratio for _, one in window]
    found = Estimate(
        newest.ratio, _deviation(values), len(values), "preconditioned", step, newest.residual, newest.method
    )
    return {} if math.isinf(found.stderr) else {("stability_ratio", "", "preconditioned"): found}


def _by_block(window: Window) -> dict[str, Window]:
    """The newest probes of each block that has any."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for step, reading in window:
        found.setdefault(reading.block, []).append((step, reading))
    return {block: taken[-WINDOW_PROBES:] for block, taken in found.items()}


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation of one of `values`, from their successive differences; NaN for a single value.

    Differences do not count a trend as error (von Neumann et al., "The mean square successive difference", 1941).
    It is infinite where a float can't hold it; `hypot` does not square, so that it has no overflow before that.
    """
    differences = [after - before for before, after in pairwise(values)]
    return math.hypot(*differences) / math.sqrt(2 * len(differences)) if differences else math.nan


def _median_error(values: Sequence[float], middle: float) -> float:
    """Standard error of the median from the median absolute deviation, both as for a normal distribution."""
    spread = statistics.median(abs(value - middle) for value in values) / NormalDist().inv_cdf(0.75)
    return spread * math.sqrt(math.pi / 2 / len(values))


def run_by_run(
    probe: str, estimate: Callable[[RunHello, Window], Mapping[Key, Estimate]]
) -> Callable[[Sequence[EstimateRequest], str], list[Estimates]]:
    """Makes the estimate of one run's window of `probe` into one of a batch of requests, on the CPU."""

    def of_batch(requests: Sequence[EstimateRequest], device: str) -> list[Estimates]:
        del device
        return [Estimates(estimate(request.hello, request.windows[probe])) for request in requests]

    return of_batch


def _update_ratio(reading: DirectionReading) -> Mapping[str, tuple[float, ...]]:
    return {"update_ratio": tuple(map(float, reading.update_ratio))}


DIRECTION = ReadingSpec(
    name="direction",
    window=WINDOW_ALL_BLOCKS,
    estimators=("direction",),
    estimate=run_by_run("direction", _along_the_step),
    shown=_update_ratio,
)
HUTCHINSON = ReadingSpec(
    name="hutchinson",
    window=WINDOW_ALL_BLOCKS,
    estimators=("hutchinson",),
    estimate=run_by_run("hutchinson", _traces),
)
LANCZOS = ReadingSpec(
    name="lanczos",
    window=WINDOW_ALL_BLOCKS + WINDOW_PROBES,  # the whole model is probed in turn too
    estimators=("lanczos",),
    estimate=run_by_run("lanczos", _eigenvalues),
)
LINE_SEARCH = ReadingSpec(
    name="linesearch",
    window=WINDOW_ALL_BLOCKS,
    estimators=("linesearch",),
    estimate=run_by_run("linesearch", _critical_sharpness),
)
PRECONDITIONED = ReadingSpec(
    name="preconditioned",
    window=WINDOW_PROBES,
    estimators=("preconditioned",),
    estimate=run_by_run("preconditioned", _preconditioned),
)
