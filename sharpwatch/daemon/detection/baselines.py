"""What is normal for a run: what its past predicts for each series, and how far a new value is from that.

Series stand side by side as the columns of arrays. NaN is a value that was not measured; it is neither judged nor kept.
What is divided by may be 0 or unknown: callers ignore floating-point errors, once for a whole sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from sharpwatch.daemon.detection.state import Arrays, gathered, put_back
from sharpwatch.wire import Doubles

# Of a normal distribution: its standard deviation over its median, and over its mean, absolute deviation.
MAD_TO_SD, MEAN_TO_SD = 1.4826, 1.2533
_CLIP = 3.0  # standard deviations up to which a value moves a baseline
# A value beyond it counts as one of this size in a mean: a single odd one must not look like a lasting change.
FAR = 8.0
APART = 6.0  # beyond it a value is not taken into a level of single values
_RUN = 10  # samples of a mean that h is taken from
_SCATTERS = 1e-6  # mean square, in units of the spread's, below which a series is constant but for rounding
_MOST_MEMORY = 0.9  # of h: at 1 a mean would tell no more than a single value
PATIENCE = 500  # samples that may be kept out in a row: a level that stands longer is the run's own


def scatter(values: Doubles) -> float:
    """The standard deviation of series, along the first axis, by the median of their changes; NaN values are left out.

    Neither a shift nor a single odd value moves it, nor one of many series.
    """
    changes = np.diff(values, axis=0)
    known = np.abs(changes[~np.isnan(changes)])
    return MAD_TO_SD * float(np.median(known)) / math.sqrt(2) if known.size else math.nan


class Trend:
    """Lines through the log of the step, fitted to the newest `WINDOW` values that are older than the longest span.

    Losses and norms fall about like this, steeply at first. The lines lag, so that a change that has begun meanwhile
    does not bend them. Huber's weights keep single odd values from doing so.

    Neighbouring values resemble each other, in larger models more than in small ones: the variance of a mean of n of
    them falls as n^(h - 1) rather than as 1/n. h is taken from how means of ten scatter in the fit (the aggregated
    variance method: Beran, Statistics for Long-Memory Processes, 1994, section 4.4), for series that are alike as one.

    Args:
        floors: The smallest standard deviation [columns] taken for real.
        shares: The same as a share of the level.
        spans: Numbers of newest samples whose means are judged, ascending.
        alike: The series that resemble each other; h is 0 for those in none.
    """

    WINDOW = 100  # samples of a fit
    LEAST = 60  # values of a series, of these
    YOUNG = 20  # samples at the start that no line describes
    SETTLED = 250  # samples before which a run bends so much that lines miss: there z is smaller
    _EVERY = 20  # samples between fits
    # Beside the line.
    STATE = ("_values", "_logs", "_scores", "_known", "_total", "_number", "_count", "_kept_out", "_is_old")

    def __init__(self, floors: Doubles, shares: Doubles, spans: Sequence[int], alike: Sequence[slice] = ()) -> None:
        self._floors, self._shares, self._alike = floors, shares, alike
        self._spans, self._lag = np.array(spans), max(spans)
        # By the place of the newest value in the ring, the place of the one that leaves each span: the longest span's
        # is the same place.
        self._leaving = (np.arange(self._lag)[:, None] - self._spans) % self._lag
        self._to_middle = 1 + self._spans // 2
        self._enough = (self._spans[:, None] + 1) / 2  # values of a span without which its mean is not judged
        rows = self.WINDOW + self._lag + self._EVERY
        self._values = np.full((rows, len(floors)), np.nan, dtype=np.float32)
        self._logs = np.zeros(rows)  # of the steps
        self._scores = np.zeros((self._lag, len(floors)))  # of the newest values, clipped; 0 where not known
        self._known = np.zeros((self._lag, len(floors)), dtype=bool)
        self._total = np.zeros((len(spans), len(floors)))  # of the scores over each span
        self._number = np.zeros((len(spans), len(floors)))  # of those that are known
        self._line: _Line | None = None
        self._note_numbers()
        self._count = 0
        self._kept_out = 0
        self._is_old = False  # whether there were too few values for a new line

    @property
    def blind(self) -> int:
        """Samples from the run's start on until the first is judged."""
        return self.YOUNG + self.LEAST + self._lag

    @property
    def young(self) -> bool:
        """Whether the run bends so much yet that lines miss."""
        return self._count <= self.SETTLED

    def see(self, step: int, values: Doubles, *, keep_out: bool = False) -> Doubles:
        """Judge the newest values, then keep them.

        Args:
            step: Their step.
            values: [columns].
            keep_out: Whether they may not become normal, because something is known to be wrong.

        Returns:
            Their z, and below it the z of the means of so many newest values [1 + spans, columns]; NaN where they can't
            be judged. In a mean a value counts as one of `FAR` at most. Unless `keep_out`, the z of a span but the
            longest is the smaller one of that from the line and that from the older values of the longest span.
        """
        log = math.log(max(step, 1))
        self._kept_out = self._kept_out + 1 if keep_out else 0
        row = self._count % len(self._values)
        # Past PATIENCE those before are still kept out, but the line moves over to the new ones as they come.
        out = keep_out and self._kept_out <= PATIENCE
        self._values[row] = np.nan if out else values
        self._logs[row] = log
        self._count += 1
        judged = np.empty((1 + len(self._spans), len(values)))
        if self._line is None:
            judged.fill(np.nan)
        else:
            judged[0] = self._judge(self._line, log, values)
            judged[1:] = self._means(self._line, lasting=keep_out)
        # Last, so that what is judged has not bent the line. While values are kept out nothing new is known, but the
        # first samples of what is wrong, from before anybody knew.
        if self._count % self._EVERY == 0 and self._count >= self.blind and not out:
            self._refit()
        return judged

    def scatter(self, column: int) -> float:
        """How far the newest z of a series scatter, in standard deviations of the line's; at least 1."""
        ages = (self._count - np.arange(self._lag)) % self._lag
        newest = self._scores[ages, column][self._known[ages, column] > 0]
        if 2 * len(newest) < self._lag:
            return 1.0
        return max(1.0, scatter(newest))

    def forget(self, columns: slice) -> None:
        """Begin some series anew: what is normal for them has just changed."""
        self._values[:, columns] = np.nan
        self._scores[:, columns] = self._total[:, columns] = self._number[:, columns] = 0.0
        self._known[:, columns] = False
        self._note_numbers()
        if self._line is not None:
            self._line.sd[columns] = np.nan

    def state(self) -> Arrays:
        """All that `load_state` needs to go on."""
        line = {} if self._line is None else gathered(self._line, _Line.STATE, "line")
        return gathered(self, self.STATE, "trend") | line

    def load_state(self, arrays: Arrays) -> None:
        """Go on from `state`; raises `ValueError` for one of other series."""
        put_back(self, self.STATE, arrays, "trend")
        self._line = None
        if "line.sd" in arrays:
            nothing = np.zeros(len(self._floors))
            self._line = _Line(0.0, 0.0, nothing, nothing, nothing, nothing, nothing, nothing, nothing)
            put_back(self._line, _Line.STATE, arrays, "line")
        self._note_numbers()

    def _judge(self, line: _Line, log: float, values: Doubles) -> Doubles:
        z: Doubles = (values - line.at(log)) / line.sd
        if self.young:
            z *= (self._count / self.SETTLED) ** 2
        unknown = np.isnan(z)
        known = ~unknown
        clipped = np.minimum(np.maximum(z, -FAR), FAR)
        if np.count_nonzero(unknown):
            clipped[unknown] = 0.0
        place = self._count % self._lag
        leaving = self._leaving[place]
        self._total += clipped - self._scores[leaving]
        if np.count_nonzero(known != self._known[leaving]):
            self._number += known.astype(np.float64) - self._known[leaving]
            self._note_numbers()
        self._scores[place], self._known[place] = clipped, known
        return z

    def _means(self, line: _Line, *, lasting: bool) -> Doubles:
        means = self._total / self._number
        # A line is known best where it was fitted: what counts is the middle of a span.
        middles = self._logs[(self._count - self._to_middle) % len(self._logs)]
        # The variance of a mean of so many new values about a line that is not known exactly.
        judged: Doubles = means / np.sqrt(self._variance + line.leverage(middles))
        judged[self._few] = np.nan
        if not lasting:
            # What has just begun also differs from the values right before it; where a line misses, they miss it too.
            rest = (self._total[-1] - self._total[:-1]) / self._others
            fresh = (means[:-1] - rest) / self._fresh_sd
            low, high = np.minimum(fresh, judged[:-1]), np.maximum(fresh, judged[:-1])
            judged[:-1] = np.maximum(low, 0.0) + np.minimum(high, 0.0)  # the smaller one, 0 if their signs differ
        return judged

    def _note_numbers(self) -> None:
        """What follows from the numbers of known values in the spans; they rarely change."""
        slower = (0.0 if self._line is None else self._line.memory) - 1.0
        with np.errstate(divide="ignore", invalid="ignore"):
            self._variance, self._others = self._number**slower, self._number[-1] - self._number[:-1]
            self._fresh_sd = np.sqrt(self._variance[:-1] + self._others**slower)
        self._few = self._number < self._enough

    def _refit(self) -> None:
        line = self._fitted()
        if line is not None:
            # Scores against a line that was drawn on far beyond its values say little of the new one.
            if self._is_old:
                self._scores[:] = self._known[:] = 0
            self._line = line
        self._is_old = line is None
        self._add_up()

    def _add_up(self) -> None:
        """The sums anew, against rounding."""
        ages = (self._count - np.arange(self._lag)) % self._lag
        self._total = np.cumsum(self._scores[ages], axis=0)[self._spans - 1]
        self._number = np.cumsum(self._known[ages], axis=0, dtype=np.float64)[self._spans - 1]
        self._note_numbers()

    def _fitted(self) -> _Line | None:
        size = min(self.WINDOW, self._count - self._lag - self.YOUNG)
        rows = (self._count - self._lag - 1 - np.arange(size)) % len(self._values)
        values = self._values[rows].astype(np.float64)
        return _fit(self._logs[rows], values, self._floors, self._shares, self.LEAST, self._alike)


@dataclass(slots=True)
class _Line:
    """A fitted line: value = level + slope · (log(step) - origin) for each column.

    It is flat from as far past its last value as its first lies before that: nothing says that it goes on.
    """

    STATE: ClassVar = ("origin", "last", "level", "slope", "variance", "middle", "squares", "sd", "memory")

    origin: float
    last: float
    level: Doubles
    slope: Doubles
    variance: Doubles  # of the level, in units of that of a value
    middle: Doubles  # mean of the logs of the steps that were measured, and the sum of squares about it
    squares: Doubles
    sd: Doubles
    memory: Doubles  # h: the variance of a mean of n values falls as n^(h - 1)

    def at(self, log: float) -> Doubles:
        return self.level + self.slope * (min(log, self.last) - self.origin)

    def leverage(self, logs: Doubles) -> Doubles:
        """The variance [logs, columns] of the lines at some steps, in units of that of a value."""
        away = np.minimum(logs, self.last)[:, None] - self.middle
        variance: Doubles = self.variance + away * away / self.squares
        return variance


def _fit(  # noqa: PLR0913, PLR0917 - a fit takes what is fitted and how
    logs: Doubles, values: Doubles, floors: Doubles, shares: Doubles, least: int, alike: Sequence[slice]
) -> _Line | None:
    """Fit each column by least squares with Huber's weights; None if no column has `least` values."""
    measured = np.isfinite(values)
    counts = np.count_nonzero(measured, axis=0)
    enough = counts >= least
    if not np.count_nonzero(enough):
        return None
    origin = float(logs.mean())
    x = (logs - origin)[:, None]
    y = np.where(measured, values, 0.0)
    known = measured.astype(np.float64)
    weights, level, slope, sd = known, floors, floors, floors  # until the first pass
    for again in range(3):
        weighted = weights * x
        total, sum_x, sum_xx = weights.sum(0), weighted.sum(0), (weighted * x).sum(0)
        sum_y, sum_xy = (weights * y).sum(0), (weighted * y).sum(0)
        slope = (total * sum_xy - sum_x * sum_y) / (total * sum_xx - sum_x**2)
        level = (sum_y - slope * sum_x) / total
        residual = y - level - slope * x
        # Robust first, about the median: outliers on one side move least squares. Later over the weights.
        if again == 0:
            residual = np.abs(residual - _medians(residual, measured, counts))
            sd = MAD_TO_SD * _medians(residual, measured, counts)
        else:
            residual = np.abs(residual)
            sd = np.sqrt(((weights * residual) ** 2).sum(0) / np.maximum(total - 2, 1))
        sd = np.maximum(sd, floors + shares * np.abs(level))
        if again < 2:
            weights = np.minimum(known, _CLIP * sd / residual)
    rows = np.maximum(counts, 1).astype(np.float64)
    middle = (known * logs[:, None]).sum(0) / rows
    squares = np.maximum((known * (logs[:, None] - middle) ** 2).sum(0), 1e-300)
    last = float(2 * logs.max() - logs.min())
    memory = np.zeros(len(sd))
    for columns in alike:
        memory[columns] = _memory((y - level - slope * x)[:, columns] / sd[columns], known[:, columns], least)
    sd = np.where(enough, sd, np.nan)
    return _Line(origin, last, level, slope, rows ** (memory - 1), middle, squares / rows**memory, sd, memory)


def _memory(z: Doubles, known: Doubles, least: int) -> float:
    """The exponent h of series that are alike, from how means of `_RUN` neighbours scatter beside single values.

    Of each series with `least` values and some scatter; one that may have shifted counts as twice their median at most.
    Few series say little: of one, h counts half.
    """
    z = np.where(known > 0, np.clip(z, -_CLIP, _CLIP), 0.0)
    runs = len(z) // _RUN
    shape = (runs, _RUN, z.shape[1])
    sums, counts = z[: runs * _RUN].reshape(shape).sum(1), known[: runs * _RUN].reshape(shape).sum(1)
    # Not those of which most was kept out: what is left is where an incident began.
    whole = counts > _RUN / 2
    squares = np.where(whole, sums**2 / np.maximum(counts, 1.0), 0.0).sum(0) / np.maximum(whole.sum(0), 1)
    single = (z**2).sum(0) / np.maximum(known.sum(0), 1.0)
    used = (single > _SCATTERS) & (known.sum(0) >= least) & whole.any(0)
    count = np.count_nonzero(used)
    if not count:
        return 0.0
    # The line has taken part of it; only what is left beyond that of independent values counts.
    ratios = squares[used] / single[used]
    ratio = float(np.minimum(ratios, 2 * np.median(ratios)).mean())
    h = math.log(max(ratio, 1.0)) / math.log(_RUN)
    return min(h * count / (count + 1), _MOST_MEMORY)


def _medians(values: Doubles, measured: npt.NDArray[np.bool_], counts: npt.NDArray[np.intp]) -> Doubles:
    """The upper median of each column over the rows that were measured, so many."""
    rows, columns = values.shape
    if counts.min() < rows:
        values = np.where(measured, values, np.inf)
    middle: Doubles = np.sort(values, axis=0)[counts // 2 - (counts == rows), np.arange(columns)]
    return middle


class Highest:
    """The newest values of a series against the highest of those before, for a run too young for a line.

    A loss that falls, however steeply, does not come above all of its past `BEFORE` values three times in a row. The
    unit is the spread of the changes from value to value, from which a trend is nearly gone. Steps that come again or
    late are no further evidence, and are left out.

    Args:
        share: The smallest spread taken for real, as a share of the level.
    """

    BEFORE, NEWEST = 30, 3
    STATE = ("_values", "_count", "_last")

    def __init__(self, share: float) -> None:
        self._share = share
        self._values = np.full(self.BEFORE + self.NEWEST, np.nan)  # newest last
        self._count, self._last = 0, -1

    def see(self, step: int, value: float, *, keep_out: bool) -> float:
        """Judge a value, then keep it.

        Args:
            step: Its step.
            value: The newest.
            keep_out: Whether it may not become normal.

        Returns:
            By how many spreads the newest three are above the highest before them; NaN where that is not known, or the
            run is no longer young.
        """
        if not math.isfinite(value) or self._count > Trend.SETTLED or step <= self._last:
            return math.nan
        self._count, self._last = self._count + 1, step
        newest = np.append(self._values[1:], value)
        before = newest[: self.BEFORE]
        if not keep_out:
            self._values = newest
        if math.isnan(before[0]):
            return math.nan
        spread = max(
            MEAN_TO_SD * float(np.abs(np.diff(before)).mean()) / math.sqrt(2), self._share * abs(float(before.mean()))
        )
        above = float(newest[self.BEFORE :].min() - before.max())
        return above / spread if spread > 0 else math.nan


class Level:
    """Exponential means of a level and of the distances from it, each with values clipped at 3 standard deviations.

    For series without a trend whose single values count: a change of one step must not be lost in a mean.

    Args:
        columns: Number of series.
        memory: Samples that the level remembers.
        spread_memory: Samples that the spread remembers.
        blind: Values of a series before it is judged.
        patience: Values far from the level, in a row, after which they are the level.
    """

    _FIRST = 10  # values whose median and mean distance begin a baseline
    _STATE = ("_first", "_count", "_kept_out", "_level", "_spread")

    def __init__(self, columns: int, *, memory: int, spread_memory: int, blind: int, patience: int = PATIENCE) -> None:
        self._patience = patience
        self._level_gain, self._spread_gain = 1.0 / memory, 1.0 / spread_memory
        self.blind = blind
        self._first = np.full((self._FIRST, columns), np.nan)
        self._count = np.zeros(columns, dtype=np.int64)
        self._kept_out = np.zeros(columns, dtype=np.int64)
        self._level = np.full(columns, np.nan)
        self._spread = np.full(columns, np.nan)
        self._note_ages()

    def see(self, values: Doubles, floor: Doubles | float, *, keep_out: bool = False) -> Doubles:
        """Judge the newest values, then keep them.

        Args:
            values: [columns].
            floor: The smallest standard deviation taken for real.
            keep_out: Whether they may not become normal.

        Returns:
            The z [columns] of each, NaN where it can't be judged.
        """
        sd = np.maximum(MEAN_TO_SD * self._spread, floor)
        away: Doubles = values - self._level
        z: Doubles = away / sd
        measured = np.isfinite(values)
        kept = measured & self._is_begun
        far = kept if keep_out else kept & self._is_judged & (np.abs(z) > APART)
        bound = _CLIP * sd
        step = np.minimum(np.maximum(away, -bound), bound)
        if np.count_nonzero(far):
            self._kept_out = np.where(far, self._kept_out + 1, 0)
            accepted = self._kept_out > self._patience
            step = np.where(accepted, away, step)
            kept &= ~far | accepted
        else:
            self._kept_out[:] = 0
        every = np.count_nonzero(kept) == len(kept)
        where = slice(None) if every else kept  # a mask takes three times as long
        self._level[where] += (self._gains[0] * step)[where]
        self._spread[where] += (self._gains[1] * (np.abs(step) - self._spread))[where]
        self._count += kept
        if not self._is_old:
            self._begin(values, measured & ~self._is_begun)
            self._note_ages()
            z[~self._is_judged] = np.nan
        return z

    @property
    def level(self) -> Doubles:
        """The level of each series; NaN before it is known."""
        return self._level

    @property
    def sd(self) -> Doubles:
        """The standard deviation of each series; NaN before it is known."""
        return MEAN_TO_SD * self._spread

    def forget(self, columns: np.ndarray) -> None:
        """Begin some series anew: their values mean something else from now on."""
        self._count[columns] = 0
        self._note_ages()

    def state(self, prefix: str) -> Arrays:
        """All that `load_state` needs to go on, under a prefix."""
        return gathered(self, self._STATE, prefix)

    def load_state(self, arrays: Arrays, prefix: str) -> None:
        """Go on from `state`; raises `ValueError` for one of other series."""
        put_back(self, self._STATE, arrays, prefix)
        self._note_ages()

    def _begin(self, values: Doubles, young: npt.NDArray[np.bool_]) -> None:
        """Keep the first values of series, and begin a level with the last of them."""
        self._first[self._count[young], np.flatnonzero(young)] = values[young]
        self._count += young
        begun = young & (self._count == self._FIRST)
        if begun.any():
            first = self._first[:, begun]
            self._level[begun] = np.median(first, axis=0)
            self._spread[begun] = np.abs(first - self._level[begun]).mean(axis=0)

    def _note_ages(self) -> None:
        """What follows from the number of values of each series; it changes no more once all are old."""
        self._is_begun, self._is_judged = self._count >= self._FIRST, self._count > self.blind
        age = 1.0 / (self._count + 1.0)
        self._gains = np.maximum(self._level_gain, age), np.maximum(self._spread_gain, age)
        old = max(self._FIRST, self.blind, 1.0 / self._level_gain, 1.0 / self._spread_gain)
        self._is_old = bool((self._count > old).all())
