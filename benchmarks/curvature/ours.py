"""sharpwatch's side: one call for all blocks."""

from __future__ import annotations

import time

from torch import nn

from benchmarks.curvature.counting import counted
from benchmarks.curvature.models import Batch
from benchmarks.curvature.outcome import Outcome, reason
from benchmarks.curvature.peers import Value
from sharpwatch import classify
from sharpwatch.curvature.measure.measure import measure
from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.errors import PrecisionError


def run_sharpwatch(model: nn.Module, batch: Batch, seed: int, precision: float | None) -> Outcome:
    """Trace and both ends of the spectrum of every block; a `precision` of None is the default of 8 draws."""
    outcome = Outcome()
    start = time.perf_counter()
    with counted(model) as outcome.passes:
        try:
            report = measure(
                model,
                [batch],
                estimators=("hutchinson", "lanczos"),
                seed=seed,
                precision=precision,
                blocks=classify(model).blocks,
            )
        except PrecisionError as error:
            report, outcome.failed = error.report, reason(error)
    outcome.seconds = time.perf_counter() - start
    for block, found in report.blocks.items():
        outcome.traces[block] = _value(found.trace)
        outcome.tops[block] = _value(found.top_eigenvalue)
        outcome.bottoms[block] = _value(found.bottom_eigenvalue)
        outcome.methods |= {found.trace.method} if found.trace else set()
    return outcome


def run_gnb(model: nn.Module, batch: Batch, seed: int, draws: int) -> Outcome:
    """Tr G of every block."""
    outcome = Outcome()
    start = time.perf_counter()
    with counted(model) as outcome.passes:
        report = measure(model, [batch], estimators=("gnb",), draws=draws, seed=seed)
    outcome.seconds = time.perf_counter() - start
    outcome.traces = {block: _value(found.trace) for block, found in report.blocks.items()}
    return outcome


def _value(estimate: Estimate | None) -> Value:
    assert estimate is not None
    error = estimate.residual if estimate.estimator == "lanczos" else estimate.stderr
    return Value(estimate.value, error)
