"""What is normal for a run: what its past predicts for each series, and how far a new value is from that.

Series stand side by side as the columns of arrays. NaN is a value that was not measured; it is neither judged nor kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sharpwatch.daemon.detection.state import Arrays, gathered, put_back
from sharpwatch.wire import Doubles

# Of a normal distribution: its standard deviation over its median, and over its mean, absolute deviation.
_MAD_TO_SD, MEAN_TO_SD = 1.4826, 1.2533
_CLIP = 3.0  # standard deviations up to which a value moves a baseline
# A value beyond it counts as one of this size in a mean: a single odd one must not look like a lasting change.
FAR = 8.0
APART = 6.0  # beyond it a value is not taken into a level of single values
PATIENCE = 500  # samples that may be kept out in a row: a level that stands longer is the run's own


class Trend:
    """Lines through the log of the step, fitted to the newest `WINDOW` values that are older than the longest span.

    Losses and norms fall about like this, steeply at first. The lines lag, so that a change that has begun meanwhile
    does not bend them. Huber's weights keep single odd values from doing so.

    Args:
        floors: The smallest standard deviation [columns] taken for real.
        shares: The same as a share of the level.
        spans: Numbers of newest samples whose means are judged, ascending.
    """

    WINDOW = 100  # samples of a fit
    LEAST = 60  # values of a series, of these
    YOUNG = 20  # samples at the start that no line describes
    SETTLED = 250  # samples before which a run bends so much that lines miss: there z is smaller
    _EVERY = 10  # samples between fits
    STATE = ("_values", "_logs", "_scores", "_known", "_sums", "_count", "_kept_out", "_is_old")  # beside the line

    def __init__(self, floors: Doubles, shares: Doubles, spans: Sequence[int]) -> None:
        self._floors, self._shares = floors, shares
        self._spans, self._lag = np.array(spans), max(spans)
        rows = self.WINDOW + self._lag + self._EVERY
        self._values = np.full((rows, len(floors)), np.nan, dtype=np.float32)
        self._logs = np.zeros(rows)  # of the steps
        self._scores = np.zeros((self._lag, len(floors)))  # of the newest values, clipped; 0 where not known
        self._known = np.zeros((self._lag, len(floors)))  # 1 where they are, else 0
        self._sums = np.zeros((2, len(spans), len(floors)))  # of both over each span
        self._count = 0
        self._kept_out = 0
        self._is_old = False  # whether there were too few values for a new line
        self._line: _Line | None = None

    @property
    def blind(self) -> int:
        """Samples from the run's start on until the first is judged."""
        return self.YOUNG + self.LEAST + self._lag

    @property
    def young(self) -> bool:
        """Whether the run bends so much yet that lines miss."""
        return self._count <= self.SETTLED

    def see(self, step: int, values: Doubles, *, keep_out: bool = False) -> tuple[Doubles, Doubles]:
        """Judge the newest values, then keep them.

        Args:
            step: Their step.
            values: [columns].
            keep_out: Whether they may not become normal, because something is known to be wrong.

        Returns:
            Their z [columns], and the z [spans, columns] of the means of so many newest values; NaN where they can't be
            judged. In a mean a value counts as one of `FAR` at most. Unless `keep_out`, the z of a span but the longest
            is the smaller one of that from the line and that from the older values of the longest span.
        """
        log = math.log(max(step, 1))
        self._kept_out = self._kept_out + 1 if keep_out else 0
        row = self._count % len(self._values)
        # Past PATIENCE those before are still kept out, but the line moves over to the new ones as they come.
        self._values[row] = np.nan if keep_out and self._kept_out <= PATIENCE else values
        self._logs[row] = log
        self._count += 1
        judged = self._judge(self._line, log, values, lasting=keep_out)
        # Last, so that what is judged has not bent the line.
        if self._count % self._EVERY == 0 and self._count >= self.blind:
            self._refit()
        return judged

    def scatter(self, column: int) -> float:
        """How far the newest z of a series scatter about each other, in standard deviations of the line's; at least 1.

        By the median of their changes, which neither a shift nor a single odd value moves.
        """
        ages = (self._count - np.arange(self._lag)) % self._lag
        newest = self._scores[ages, column][self._known[ages, column] > 0]
        if 2 * len(newest) < self._lag:
            return 1.0
        return max(1.0, _MAD_TO_SD * float(np.median(np.abs(np.diff(newest)))) / math.sqrt(2))

    def forget(self, columns: slice) -> None:
        """Begin some series anew: what is normal for them has just changed."""
        self._values[:, columns] = np.nan
        self._known[:, columns] = self._scores[:, columns] = 0.0
        self._sums[..., columns] = 0.0
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
            self._line = _Line(np.array([0.0, 1.0]), np.ones((2, len(nothing)), dtype=bool), nothing, nothing, nothing)
            put_back(self._line, _Line.STATE, arrays, "line")

    def _judge(self, line: _Line | None, log: float, values: Doubles, *, lasting: bool) -> tuple[Doubles, Doubles]:
        if line is None:
            nothing = np.full((len(self._spans) + 1, len(values)), np.nan)
            return nothing[0], nothing[1:]
        with np.errstate(invalid="ignore", divide="ignore"):
            z: Doubles = (values - line.at(log)) / line.sd
            z *= min(1.0, self._count / self.SETTLED) ** 2
            known = ~np.isnan(z)
            place = self._count % self._lag
            newest = np.stack([np.where(known, np.clip(z, -FAR, FAR), 0.0), known])
            oldest = (self._count - self._spans) % self._lag  # the longest span's is the place of the newest
            self._sums += newest[:, None] - np.stack([self._scores[oldest], self._known[oldest]])
            self._scores[place], self._known[place] = newest
            return z, self._means(line, lasting=lasting)

    def _means(self, line: _Line, *, lasting: bool) -> Doubles:
        total, count = self._sums
        # A line is known best where it was fitted: what counts is the middle of a span.
        middles = self._logs[(self._count - 1 - self._spans // 2) % len(self._logs)]
        # The variance of a mean of `count` new values about a line that is not known exactly.
        means: Doubles = total / count / np.sqrt(1.0 / count + line.leverage(middles))
        means[2 * count < self._spans[:, None] + 1] = np.nan
        if not lasting:
            # What has just begun also differs from the values right before it; where a line misses, they miss it too.
            rest, others = total[-1] - total[:-1], count[-1] - count[:-1]
            fresh = (total[:-1] / count[:-1] - rest / others) / np.sqrt(1.0 / count[:-1] + 1.0 / others)
            low = np.minimum(np.abs(fresh), np.abs(means[:-1]))
            means[:-1] = np.where(others > 0, np.where(fresh * means[:-1] > 0, np.copysign(low, fresh), 0.0), np.nan)
        return means

    def _refit(self) -> None:
        line = self._fitted()
        if line is not None:
            # Scores against a line that was drawn on far beyond its values say little of the new one.
            if self._is_old:
                self._scores[:] = self._known[:] = 0.0
            self._line = line
        self._is_old = line is None
        self._add_up()

    def _add_up(self) -> None:
        """The sums anew, against rounding."""
        ages = (self._count - np.arange(self._lag)) % self._lag
        for sums, kept in zip(self._sums, (self._scores, self._known), strict=True):
            sums[:] = np.cumsum(kept[ages], axis=0)[self._spans - 1]

    def _fitted(self) -> _Line | None:
        size = min(self.WINDOW, self._count - self._lag - self.YOUNG)
        rows = (self._count - self._lag - 1 - np.arange(size)) % len(self._values)
        return _fit(self._logs[rows], self._values[rows].astype(np.float64), self._floors, self._shares, self.LEAST)


class _Line:
    """A fitted line: value = level + slope · (log(step) - origin) for each column.

    It is flat from as far past its last value as its first lies before that: nothing says that it goes on.
    """

    STATE = ("_origin", "_level", "_slope", "_rows", "_middle", "_squares", "_last", "sd")

    def __init__(
        self, logs: Doubles, measured: npt.NDArray[np.bool_], level: Doubles, slope: Doubles, sd: Doubles
    ) -> None:
        self._origin, self._level, self._slope = float(logs.mean()), level, slope
        self._rows = np.maximum(measured.sum(0), 1).astype(np.float64)
        self._middle = (measured * logs[:, None]).sum(0) / self._rows
        self._squares = (measured * (logs[:, None] - self._middle) ** 2).sum(0)
        self._last = float(2 * logs.max() - logs.min())
        self.sd = sd

    def at(self, log: float) -> Doubles:
        return self._level + self._slope * (min(log, self._last) - self._origin)

    def leverage(self, logs: Doubles) -> Doubles:
        """The variance [logs, columns] of the lines at some steps, in units of that of a value."""
        away = np.minimum(logs, self._last)[:, None] - self._middle
        variance: Doubles = 1.0 / self._rows + away**2 / np.maximum(self._squares, 1e-300)
        return variance


def _fit(logs: Doubles, values: Doubles, floors: Doubles, shares: Doubles, least: int) -> _Line | None:
    """Fit each column by least squares with Huber's weights; None if no column has `least` values."""
    measured = np.isfinite(values)
    enough = measured.sum(0) >= least
    if not enough.any():
        return None
    x = (logs - logs.mean())[:, None]
    y = np.where(measured, values, 0.0)
    weights = measured.astype(np.float64)
    level = slope = sd = least_sd = np.zeros(values.shape[1])
    with np.errstate(invalid="ignore", divide="ignore"):
        for again in range(4):
            weighted = weights * x
            total, sum_x, sum_xx = weights.sum(0), weighted.sum(0), (weighted * x).sum(0)
            sum_y, sum_xy = (weights * y).sum(0), (weighted * y).sum(0)
            slope = (total * sum_xy - sum_x * sum_y) / (total * sum_xx - sum_x**2)
            level = (sum_y - slope * sum_x) / total
            residual = y - level - slope * x
            # Robust first, about the median: outliers on one side move least squares. Later over the weights.
            if again == 0:
                residual -= _medians(residual, measured)
            residual = np.abs(residual)
            if again == 0:
                sd = _MAD_TO_SD * _medians(residual, measured)
            else:
                sd = np.sqrt(((weights * residual) ** 2).sum(0) / np.maximum(total - 2, 1))
            least_sd = floors + shares * np.abs(level)
            bound = _CLIP * np.maximum(sd, least_sd)
            weights = measured * np.minimum(1.0, bound / np.maximum(residual, bound / 1e6))
    return _Line(logs, measured, level, slope, np.where(enough, np.maximum(sd, least_sd), np.nan))


def _medians(values: Doubles, measured: npt.NDArray[np.bool_]) -> Doubles:
    """The upper median of each column over the rows that were measured."""
    ordered = np.sort(np.where(measured, values, np.inf), axis=0)
    middle: Doubles = ordered[measured.sum(0) // 2 - (measured.sum(0) == len(ordered)), np.arange(values.shape[1])]
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
    STATE = ("_first", "_count", "_kept_out", "_level", "_spread")

    def __init__(self, columns: int, *, memory: int, spread_memory: int, blind: int, patience: int = PATIENCE) -> None:
        self._patience = patience
        self._level_gain, self._spread_gain = 1.0 / memory, 1.0 / spread_memory
        self.blind = blind
        self._first = np.full((self._FIRST, columns), np.nan)
        self._count = np.zeros(columns, dtype=np.int64)
        self._kept_out = np.zeros(columns, dtype=np.int64)
        self._level = np.full(columns, np.nan)
        self._spread = np.full(columns, np.nan)

    def see(self, values: Doubles, floor: Doubles | float, *, keep_out: bool = False) -> Doubles:
        """Judge the newest values, then keep them.

        Args:
            values: [columns].
            floor: The smallest standard deviation taken for real.
            keep_out: Whether they may not become normal.

        Returns:
            The z [columns] of each, NaN where it can't be judged.
        """
        with np.errstate(invalid="ignore", over="ignore"):
            sd = np.maximum(MEAN_TO_SD * self._spread, floor)
            z: Doubles = (values - self._level) / sd
        self._keep(values, z, sd, keep_out=keep_out)
        z[self._count <= self.blind] = np.nan
        return z

    def forget(self, columns: np.ndarray) -> None:
        """Begin some series anew: their values mean something else from now on."""
        self._count[columns] = 0

    def _keep(self, values: Doubles, z: Doubles, sd: Doubles, *, keep_out: bool) -> None:
        measured = np.isfinite(values)
        young = measured & (self._count < self._FIRST)
        self._first[self._count[young], np.flatnonzero(young)] = values[young]
        with np.errstate(invalid="ignore"):
            far = measured & ~young & ((np.abs(z) > APART) & (self._count > self.blind) | keep_out)
        self._kept_out = np.where(far, self._kept_out + 1, 0)
        accepted = self._kept_out > self._patience
        kept = measured & ~young & (~far | accepted)
        with np.errstate(invalid="ignore"):
            step = np.where(accepted, values - self._level, np.clip(values - self._level, -_CLIP * sd, _CLIP * sd))
        age = 1.0 / (self._count + 1.0)
        self._level[kept] += (np.maximum(self._level_gain, age) * step)[kept]
        self._spread[kept] += (np.maximum(self._spread_gain, age) * (np.abs(step) - self._spread))[kept]
        self._count[young | kept] += 1
        begun = young & (self._count == self._FIRST)
        if begun.any():
            first = self._first[:, begun]
            self._level[begun] = np.median(first, axis=0)
            self._spread[begun] = np.abs(first - self._level[begun]).mean(axis=0)
