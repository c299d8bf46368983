"""Two runs side by side: how their losses, gradient norms, rates and curvature differ, and where they part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sharpwatch.daemon.detection.parting import Differences, Mean, Parting, find_parting
from sharpwatch.replay.paired_estimates import (
    WITHIN,
    BlockOrder,
    EstimatePair,
    NoisePair,
    block_orders,
    pair_estimates,
    pair_noise,
)
from sharpwatch.replay.paired_steps import (
    Columns,
    Pair,
    PairedValues,
    Twins,
    columns_of,
    common_steps,
    find_twins,
    pair_values,
)
from sharpwatch.replay.recorded_run import RecordedRun
from sharpwatch.wire import Ints

SECTIONS = 8  # rows of the table
_EQUAL_RATES = 1e-5  # relative; logs round rates


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the common steps, with means over it.

    Attributes:
        first_step: The first step.
        last_step: The last one.
        loss: Of both runs; None where one has none.
        difference: Of the losses, with its standard error.
        gradient_norm: Of both runs.
        learning_rate: Of both runs.
    """

    first_step: int
    last_step: int
    loss: Pair | None
    difference: Mean
    gradient_norm: Pair | None
    learning_rate: Pair | None


@dataclass(frozen=True, slots=True)
class Quantity:
    """A quantity of both runs, and where it parts.

    Attributes:
        values: At the common steps where both have it.
        differences: Of the values, or of their logarithms.
        parting: Where they part; None where there is no pair.
    """

    values: PairedValues
    differences: Differences
    parting: Parting | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a run differs from a reference.

    Attributes:
        run: The run.
        reference: The reference.
        steps: The common steps.
        replaced: The rows of the run and of the reference that a newer attempt replaces.
        loss: The losses, and their differences.
        gradient_norm: The norms of the whole gradient where they are above 0, and the differences of their logarithms.
        learning_rate: The highest rates of any layer block.
        first_other_rate: The first step at which the rates differ.
        first_bad_loss: For the run and the reference: the first common step at which the loss is not finite.
        twins: What the losses say of the data; None without losses.
        sections: Means over parts of the common steps.
        sharpness: All pairs of sharpness estimates, by block, estimator and step.
        orders: Of the run and of the reference by estimator, by the newest pairs.
        gradient_noise: By block, where both probed it.
        within: The most steps between the two estimates of a pair.
        tolerance: A mean difference of the losses up to this counted as none.
    """

    run: RecordedRun
    reference: RecordedRun
    steps: Ints
    replaced: tuple[int, int]
    loss: Quantity
    gradient_norm: Quantity
    learning_rate: PairedValues
    first_other_rate: int | None
    first_bad_loss: tuple[int | None, int | None]
    twins: Twins | None
    sections: tuple[Section, ...]
    sharpness: tuple[EstimatePair, ...]
    orders: tuple[tuple[BlockOrder, BlockOrder], ...]
    gradient_noise: tuple[NoisePair, ...]
    within: int
    tolerance: float


def compare(run: RecordedRun, reference: RecordedRun, *, tolerance: float = 0.0, within: int = WITHIN) -> Comparison:
    """Hold a run against a reference.

    Args:
        run: The run.
        reference: The reference.
        tolerance: A mean difference of the losses up to this counts as none.
        within: The most steps between two estimates that are compared.

    Raises:
        LogError: The runs have no step in common.
    """
    columns = columns_of(run), columns_of(reference)
    steps = common_steps(run, reference, columns)
    loss, norms = _loss(columns, tolerance), _gradient_norm(columns)
    rates = pair_values(columns, "lr")
    pairs = pair_estimates(run, reference, within)
    return Comparison(
        run=run,
        reference=reference,
        steps=steps,
        replaced=(columns[0].replaced, columns[1].replaced),
        loss=loss,
        gradient_norm=norms,
        learning_rate=rates,
        first_other_rate=_first_other(rates),
        first_bad_loss=(_first_bad_loss(columns[0], steps), _first_bad_loss(columns[1], steps)),
        twins=find_twins(loss.values),
        sections=tuple(_sections(steps, loss, norms.values, rates)),
        sharpness=tuple(pairs),
        orders=tuple(block_orders(pairs)),
        gradient_noise=tuple(pair_noise(run, reference, int(steps[0]), int(steps[-1]))),
        within=within,
        tolerance=tolerance,
    )


def _loss(columns: tuple[Columns, Columns], tolerance: float) -> Quantity:
    values = pair_values(columns, "loss")
    differences = Differences(values.run - values.reference, tolerance)
    return Quantity(values, differences, find_parting(differences) if len(values) else None)


def _gradient_norm(columns: tuple[Columns, Columns]) -> Quantity:
    found = pair_values(columns, "grad-norm")
    kept = (found.run > 0) & (found.reference > 0)
    values = PairedValues(found.steps[kept], found.run[kept], found.reference[kept])
    # Of the logarithms: the noise of a norm is in proportion to it.
    differences = Differences(np.log(values.run) - np.log(values.reference))
    return Quantity(values, differences, find_parting(differences) if len(values) else None)


def _first_other(rates: PairedValues) -> int | None:
    others = ~np.isclose(rates.run, rates.reference, rtol=_EQUAL_RATES, atol=0.0)
    return int(rates.steps[others][0]) if others.any() else None


def _first_bad_loss(columns: Columns, steps: Ints) -> int | None:
    bad = np.intersect1d(columns.steps[columns.bad_loss > 0], steps)
    return int(bad[0]) if len(bad) else None


def _sections(steps: Ints, loss: Quantity, norms: PairedValues, rates: PairedValues) -> Iterator[Section]:
    for part in np.array_split(steps, min(SECTIONS, len(steps))):
        first, last = int(part[0]), int(part[-1])
        begin, end = np.searchsorted(loss.values.steps, (first, last + 1))
        yield Section(
            first,
            last,
            loss.values.means(first, last),
            loss.differences.mean(int(begin), int(end)),
            norms.means(first, last),
            rates.means(first, last),
        )
