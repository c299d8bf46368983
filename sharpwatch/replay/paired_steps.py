"""Two runs paired by step: the values that both have at a step, and whether they train on the same data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from sharpwatch.daemon.records import LayerTap
from sharpwatch.errors import LogError
from sharpwatch.replay.log import Column
from sharpwatch.replay.recorded_run import RecordedRun
from sharpwatch.wire import Doubles, Ints

Pair = tuple[float, float]  # a value of the run and one of the reference
SAME_DATA = 0.5  # correlation of two losses' changes, above which both runs see the same data in the same order
_WINDOW = 64  # steps over which losses are correlated
_FEWEST = 8  # steps for a correlation
_Item = TypeVar("_Item")


def newest_attempt(items: Iterable[_Item], step: Callable[[_Item], int]) -> list[_Item]:
    """What a run is made of after restarts: an attempt replaces all from its first step on.

    Args:
        items: In the order in which they were written.
        step: The step of one.

    Returns:
        The items that are not replaced, by step.
    """
    kept: list[_Item] = []
    for item in items:
        while kept and step(kept[-1]) >= step(item):
            kept.pop()
        kept.append(item)
    return kept


@dataclass(frozen=True, slots=True)
class Columns:
    """A run's values by step, of its newest attempts; NaN where there is none.

    Attributes:
        steps: Ascending.
        values: By column; those of the loss may also be infinite or NaN because they are bad.
        bad_loss: Whether the loss was measured and is not finite.
        replaced: The number of rows that newer attempts replace.
    """

    steps: Ints
    values: Mapping[Column, Doubles]
    bad_loss: Ints
    replaced: int


def columns_of(run: RecordedRun) -> Columns:
    """The values of a run by step.

    Args:
        run: The run.
    """
    kept = newest_attempt(run.observations, lambda observation: observation.step)
    losses = [observation.loss for observation in kept]
    values: dict[Column, Doubles] = {
        "loss": np.array([math.nan if loss is None else loss for loss in losses], dtype=np.float64),
        "grad-norm": np.array([_gradient_norm(each.layers) for each in kept], dtype=np.float64),
        "lr": np.array([_rate(each.layers) for each in kept], dtype=np.float64),
    }
    if not (run.is_own or "lr" in run.names):
        values["lr"][:] = math.nan
    bad = np.array([loss is not None and not math.isfinite(loss) for loss in losses], dtype=np.int64)
    steps = np.array([observation.step for observation in kept], dtype=np.int64)
    return Columns(steps, values, bad, len(run.observations) - len(kept))


def _gradient_norm(layers: LayerTap | None) -> float:
    """The norm of the whole gradient; NaN where a layer block's is unknown, or not finite."""
    if layers is None or layers.non_finite.any():
        return math.nan
    return float(np.linalg.norm(layers.gradient_norm.astype(np.float64)))


def _rate(layers: LayerTap | None) -> float:
    """The highest learning rate of any layer block."""
    if layers is None or not np.isfinite(layers.learning_rate).any():
        return math.nan
    return float(np.nanmax(layers.learning_rate))


def common_steps(run: RecordedRun, reference: RecordedRun, columns: tuple[Columns, Columns]) -> Ints:
    """The steps that both runs have.

    Args:
        run: The run.
        reference: The reference.
        columns: Of both.

    Raises:
        LogError: There is none.
    """
    steps: Ints = np.intersect1d(columns[0].steps, columns[1].steps)
    if not len(steps):
        here, there = map(_extent, columns)
        raise LogError(f"no step in common with {reference.source}: {here} here, {there} there", run.source)
    return steps


def _extent(columns: Columns) -> str:
    steps = columns.steps
    if not len(steps):
        return "no step"
    spacing = int(np.median(np.diff(steps))) if len(steps) > 1 else 1
    every = f", every {spacing}th" if spacing > 1 else ""
    return f"steps {steps[0]} to {steps[-1]}{every}"


@dataclass(frozen=True, slots=True)
class PairedValues:
    """One quantity at the steps where both runs have it and it is finite.

    Attributes:
        steps: The steps.
        run: Its values in the run.
        reference: Its values in the reference.
    """

    steps: Ints
    run: Doubles
    reference: Doubles

    def __len__(self) -> int:
        return len(self.steps)

    def means(self, first_step: int, last_step: int) -> Pair | None:
        """The means from one step to another; None where there is no value.

        Args:
            first_step: The first step.
            last_step: The last one.
        """
        first, end = np.searchsorted(self.steps, (first_step, last_step + 1))
        return (float(self.run[first:end].mean()), float(self.reference[first:end].mean())) if end > first else None


def pair_values(columns: tuple[Columns, Columns], column: Column) -> PairedValues:
    """The values of a column at the steps where both runs have one.

    Args:
        columns: Of the run and of the reference.
        column: The column.
    """
    steps, here, there = np.intersect1d(columns[0].steps, columns[1].steps, return_indices=True)
    run, reference = columns[0].values[column][here], columns[1].values[column][there]
    kept = np.isfinite(run) & np.isfinite(reference)
    return PairedValues(steps[kept], run[kept], reference[kept])


@dataclass(frozen=True, slots=True)
class Twins:
    """What the losses say of the data of both runs.

    Attributes:
        equal_steps: The number of common steps at the start with equal losses.
        equal_until: The last one of them; None if there is none.
        first_other: The first common step whose losses differ; None if there is none.
        correlation: Of both losses' changes from step to step, over windows of 64 steps; NaN for too few.
    """

    equal_steps: int
    equal_until: int | None
    first_other: int | None
    correlation: float

    @property
    def same_data(self) -> bool:
        """Whether both runs see the same data in the same order."""
        return self.equal_steps > 1 or self.correlation > SAME_DATA


def find_twins(loss: PairedValues) -> Twins | None:
    """Whether two runs see the same data, by their losses.

    Args:
        loss: Of both.

    Returns:
        None if there is no pair of losses.
    """
    if not len(loss):
        return None
    others = np.flatnonzero(loss.run != loss.reference)
    equal = int(others[0]) if len(others) else len(loss)
    return Twins(
        equal,
        int(loss.steps[equal - 1]) if equal else None,
        int(loss.steps[equal]) if equal < len(loss) else None,
        _correlation(np.diff(loss.run), np.diff(loss.reference)),
    )


def _correlation(run: Doubles, reference: Doubles) -> float:
    """Of the changes in windows, which all weigh the same: changes are larger early in a run."""
    window = min(_WINDOW, len(run))
    if window < _FEWEST:
        return math.nan
    whole = len(run) // window * window
    both = [each[:whole].reshape(-1, window) for each in (run, reference)]
    here, there = (each - each.mean(axis=1, keepdims=True) for each in both)
    power = np.sqrt((here**2).sum(axis=1) * (there**2).sum(axis=1))
    noisy = power > 0
    return float(((here * there).sum(axis=1)[noisy] / power[noisy]).mean()) if noisy.any() else math.nan
