"""What probes measured in two runs, side by side: sharpness by block, the order of the blocks, and gradient noise."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from sharpwatch.blocks import SHARPNESS_ORDER
from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.detection.parting import Mean
from sharpwatch.replay.paired_steps import newest_attempt
from sharpwatch.replay.recorded_run import RecordedRun

WITHIN = 100  # steps between two estimates that are compared
INVERSION = 2.0  # standard errors

_Key = tuple[str, str]  # block, estimator


@dataclass(frozen=True, slots=True)
class EstimatePair:
    """Estimates of one block by one estimator in both runs, at steps that are near each other."""

    block: str
    estimator: str
    run: Estimate
    reference: Estimate

    @property
    def errors(self) -> float:
        """The difference in standard errors; NaN if they are unknown."""
        return in_errors(self.run.value - self.reference.value, self.run.stderr, self.reference.stderr)


@dataclass(frozen=True, slots=True)
class BlockOrder:
    """How the blocks of a run are ordered by sharpness.

    Attributes:
        estimator: Of the sharpness.
        correlation: Spearman's, with the order that is expected; None for fewer than three blocks.
        inversions: Blocks in the other order by more than 2 standard errors: the one that should be less sharp and is
            sharper, the other one, and by how many standard errors.
    """

    estimator: str
    correlation: float | None
    inversions: tuple[tuple[str, str, float], ...]


@dataclass(frozen=True, slots=True)
class NoisePair:
    """The mean gradient noise of a block over the probes at common steps, in both runs."""

    block: str
    run: Mean
    reference: Mean

    @property
    def errors(self) -> float:
        """The difference in standard errors; NaN if they are unknown."""
        return in_errors(self.run.value - self.reference.value, self.run.stderr, self.reference.stderr)


def in_errors(difference: float, *stderrs: float) -> float:
    """A difference of independent values in standard errors, sqrt(se1² + se2²); NaN if they are unknown.

    Args:
        difference: Of the values.
        stderrs: Of each.
    """
    stderr = math.hypot(*stderrs)
    return difference / stderr if stderr > 0 else math.nan


def pair_estimates(run: RecordedRun, reference: RecordedRun, within: int) -> list[EstimatePair]:
    """Pair the sharpness estimates of two runs, by block and estimator.

    Args:
        run: The run.
        reference: The reference.
        within: The most steps between the two of a pair.

    Returns:
        For each estimate of the run the nearest one of the reference, in the order of blocks and steps.
    """
    here, there = _by_block(run), _by_block(reference)
    return [
        EstimatePair(*key, estimate, nearest)
        for key in here
        if key in there
        for estimate in here[key]
        for nearest in [min(there[key], key=lambda other: abs(other.step - estimate.step))]
        if abs(nearest.step - estimate.step) <= within
    ]


def _by_block(run: RecordedRun) -> dict[_Key, list[Estimate]]:
    found: defaultdict[_Key, list[Estimate]] = defaultdict(list)
    for row in run.estimates:
        if row.quantity == "sharpness" and math.isfinite(row.estimate.value):
            found[row.block, row.estimate.estimator].append(row.estimate)
    return {key: newest_attempt(estimates, lambda estimate: estimate.step) for key, estimates in found.items()}


def newest(pairs: Iterable[EstimatePair]) -> list[EstimatePair]:
    """The newest pair of each block and estimator.

    Args:
        pairs: In the order of their steps.
    """
    return list({(pair.block, pair.estimator): pair for pair in pairs}.values())


def block_orders(pairs: Sequence[EstimatePair]) -> list[tuple[BlockOrder, BlockOrder]]:
    """The order of the blocks in the run and in the reference, for each estimator, by the newest pairs.

    Args:
        pairs: Of estimates.
    """
    last = newest(pairs)
    estimators = dict.fromkeys(pair.estimator for pair in last)
    chosen = {each: [pair for pair in last if pair.estimator == each] for each in estimators}
    return [
        (
            block_order(each, {pair.block: pair.run for pair in found}),
            block_order(each, {pair.block: pair.reference for pair in found}),
        )
        for each, found in chosen.items()
    ]


def block_order(estimator: str, sharpness: dict[str, Estimate]) -> BlockOrder:
    """How blocks are ordered by sharpness, against the order that is expected.

    Args:
        estimator: Of the estimates.
        sharpness: By block.
    """
    from sharpwatch.daemon.estimation.gnb import order_correlation  # noqa: PLC0415 - loads torch

    inversions = []
    for low, high in combinations([block for block in SHARPNESS_ORDER if block in sharpness], 2):
        below, above = sharpness[low], sharpness[high]
        errors = in_errors(below.value - above.value, below.stderr, above.stderr)
        if errors > INVERSION:
            inversions.append((low, high, errors))
    values = {block: estimate.value for block, estimate in sharpness.items()}
    return BlockOrder(estimator, order_correlation(values), tuple(inversions))


def pair_noise(run: RecordedRun, reference: RecordedRun, first_step: int, last_step: int) -> Iterator[NoisePair]:
    """The gradient noise of blocks that both runs probed.

    Args:
        run: The run.
        reference: The reference.
        first_step: The first step of the probes.
        last_step: The last one.
    """
    here, there = (_noise(each, first_step, last_step) for each in (run, reference))
    for block in here:
        if block in there:
            yield NoisePair(block, here[block], there[block])


def _noise(run: RecordedRun, first_step: int, last_step: int) -> dict[str, Mean]:
    found: defaultdict[str, list[float]] = defaultdict(list)
    for step, noise in newest_attempt(run.gradient_noise, lambda each: each[0]):
        if first_step <= step <= last_step:
            for block, value in noise.items():
                if math.isfinite(value):
                    found[block].append(value)
    return {block: _mean(values) for block, values in found.items()}


def _mean(values: Sequence[float]) -> Mean:
    """The mean of independent values; the error of a single one is not known."""
    if len(values) < 2:
        return Mean(values[0], math.nan)
    return Mean(float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values)))
