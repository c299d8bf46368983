"""What a run's Hessian probes and line searches say: windows to estimates, each block's from its own newest probes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import NormalDist
from typing import TypeVar

import torch

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.curvature.statistics.gnb_estimators import trace_estimates
from sharpwatch.daemon.estimation.windows import WINDOW_PROBES, Key, Request
from sharpwatch.daemon.ingest.hello import RunHello
from sharpwatch.daemon.ingest.probes import (
    HutchinsonReading,
    LanczosReading,
    LineSearchReading,
    PreconditionedReading,
)

Reading = TypeVar("Reading", HutchinsonReading, LanczosReading)
_ENDS = (("top_eigenvalue", "top"), ("bottom_eigenvalue", "bottom"))


def probe_estimates(request: Request) -> dict[Key, Estimate]:
    """All that the windows of `request` say, but for those of `gnb` and `direction`."""
    return {
        **_traces(request.manifest, request.hutchinson),
        **_eigenvalues(request.lanczos),
        **_critical_sharpness(request.manifest.blocks, request.linesearch),
        **_preconditioned(request.preconditioned),
    }


def _traces(manifest: RunHello, window: Sequence[tuple[int, HutchinsonReading]]) -> dict[Key, Estimate]:
    """Means over draws and probes; a block that has no error yet is left out."""
    by_block = _by_block(window)
    if not by_block:
        return {}
    probes = max(map(len, by_block.values()))
    draws = max(len(reading.traces) for taken in by_block.values() for _, reading in taken)
    values = torch.zeros(len(by_block), probes, draws, dtype=torch.float64)
    mask = torch.zeros(values.shape, dtype=torch.bool)
    for row, taken in enumerate(by_block.values()):
        for column, (_, reading) in enumerate(taken):
            own = reading.traces.sum(1)  # zero outside the block
            values[row, column, : len(own)] = torch.from_numpy(own)
            mask[row, column, : len(own)] = True
    found = trace_estimates(values, mask)
    rows = zip(by_block.items(), found.value.tolist(), found.stderr.tolist(), found.draws.tolist(), strict=True)
    estimates: dict[Key, Estimate] = {}
    for (block, taken), value, stderr, count in rows:
        step, newest = taken[-1]
        trace = Estimate(value, stderr, count, "hutchinson", step, method=newest.method)
        size = int(manifest.block_parameters[manifest.blocks.index(block)])
        if math.isfinite(stderr):
            estimates["trace", block, "hutchinson"] = trace
            estimates["sharpness", block, "hutchinson"] = replace(trace, value=value / size, stderr=stderr / size)
    return estimates


def _eigenvalues(window: Sequence[tuple[int, LanczosReading]]) -> dict[Key, Estimate]:
    """The newest probe's of each block and of the whole; its error is the scatter of probes, on batches unlike it."""
    estimates = {}
    for block, taken in _by_block(window).items():
        step, newest = taken[-1]
        for quantity, end in _ENDS:
            values = [getattr(reading, end) for _, reading in taken]
            residual = getattr(newest, f"{end}_residual")
            found = Estimate(values[-1], _deviation(values), len(values), "lanczos", step, residual, newest.method)
            estimates[quantity, block, "lanczos"] = found
    return estimates


def _critical_sharpness(blocks: Sequence[str], window: Sequence[tuple[int, LineSearchReading]]) -> dict[Key, Estimate]:
    """Medians over the newest probes, those of a block over its turns; from two on, for one has no scatter.

    A step that climbs on the probe's rows raises the loss at any scale, and one such search would rule a mean.
    """
    searches = {"": [(step, one.sharpness, one.half_width) for step, one in window]}
    for index, block in enumerate(blocks):
        each = ((step, float(one.block_sharpness[index]), float(one.block_half_width[index])) for step, one in window)
        searches[block] = [search for search in each if not math.isnan(search[1])]
    estimates = {}
    for block, all_searches in searches.items():
        taken = all_searches[-WINDOW_PROBES:]
        if len(taken) > 1:
            steps, values, widths = zip(*taken, strict=True)
            middle = statistics.median(values)
            stderr = math.hypot(_median_error(values, middle), widths[-1] / math.sqrt(3))
            found = Estimate(middle, stderr, len(values), "linesearch", steps[-1], widths[-1], "losses")
            estimates["stability_ratio", block, "linesearch"] = found
    return estimates


def _preconditioned(window: Sequence[tuple[int, PreconditionedReading]]) -> dict[Key, Estimate]:
    """The newest probe's, as of an eigenvalue."""
    if not window:
        return {}
    step, newest = window[-1]
    values = [one.ratio for _, one in window]
    found = Estimate(
        newest.ratio, _deviation(values), len(values), "preconditioned", step, newest.residual, newest.method
    )
    return {("stability_ratio", "", "preconditioned"): found}


def _by_block(window: Sequence[tuple[int, Reading]]) -> dict[str, list[tuple[int, Reading]]]:
    """The newest probes of each block that has any."""
    found: dict[str, list[tuple[int, Reading]]] = {}
    for step, reading in window:
        found.setdefault(reading.block, []).append((step, reading))
    return {block: taken[-WINDOW_PROBES:] for block, taken in found.items()}


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation of one of `values`, by their successive differences; NaN for a single one.

    A trend, as early in training, is no error (von Neumann et al., "The mean square successive difference", 1941).
    """
    squares = [(after - before) ** 2 for before, after in pairwise(values)]
    return math.sqrt(statistics.fmean(squares) / 2) if squares else math.nan


def _median_error(values: Sequence[float], middle: float) -> float:
    """Standard error of the median, from the median deviation from it; both as of a normal distribution."""
    spread = statistics.median(abs(value - middle) for value in values) / NormalDist().inv_cdf(0.75)
    return spread * math.sqrt(math.pi / 2 / len(values))
