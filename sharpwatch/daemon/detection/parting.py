"""Where two series that are paired step by step part: windows of their difference, judged by t-tests on batch means.

A window is divided into 16 batches. Their means are nearly independent once a batch is longer than the correlation of
the differences, and then the t-statistic of these 16 means has Student's tails or lighter ones, also where the noise
is not the same in all batches: Ibragimov and Müller, "t-statistic based correlation and heterogeneity robust
inference", Journal of Business & Economic Statistics 28 (2010), 453-468. The bound is corrected for all windows that
are looked at (Bonferroni). The shortest windows beyond it are kept, as in Fryzlewicz, "Narrowest significance pursuit",
Journal of the American Statistical Association 119 (2024), 1633-1646. Where in such a window the series part is the
maximum-likelihood estimate of a change point: Hinkley, "Inference about the change-point in a sequence of random
variables", Biometrika 57 (1970), 1-17.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from sharpwatch.wire import Doubles

BATCHES = 16
FALSE_ALARMS = 0.05  # the probability that series which do not differ are said to part
_SLIDE = 4  # windows of one length begin a quarter of it apart
_CORRELATION = 0.3  # of neighbouring batch means, at most; the errors are widened by what is left of it
_TOO_CORRELATED = 0.5  # of the longest batches: then the series are too short to be judged
_MOST_CORRELATED = 0.9
_GAP = 4  # lengths of a window; nothing is concluded from a shorter gap between windows beyond the bound
_STILL_APART = 2.0  # standard errors, between windows beyond the bound and after them


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean and its standard error, NaN where there are too few values for one."""

    value: float
    stderr: float

    @property
    def errors(self) -> float:
        """The mean in standard errors; NaN if the error is unknown."""
        if self.stderr > 0:
            return self.value / self.stderr
        return math.copysign(math.inf, self.value) if self.stderr == 0 and self.value else math.nan


@dataclass(frozen=True, slots=True)
class Stretch:
    """Pairs over which one series stays on one side of the other.

    Attributes:
        first: The first pair.
        end: The pair after the last one.
        onset: The mean difference of the window, at its beginning, that is beyond the bound.
        window: The number of pairs in that window.
        mean: The mean difference of the stretch.
    """

    first: int
    end: int
    onset: Mean
    window: int
    mean: Mean


@dataclass(frozen=True, slots=True)
class Parting:
    """Where two series part.

    Attributes:
        stretches: In order; between them no difference can be told.
        stays: Whether the last stretch goes on to the last pair.
        bound: In standard errors, that the mean of a window must be beyond.
        windows: The number of windows that were judged; 0 if the series are too short, or correlated over too many
            pairs for their length.
        batch: The number of pairs in a batch of the shortest windows.
        correlation: That of neighbouring batch means.
        last: The mean difference of the last pairs: as many as the window at the onset of the last stretch, or as the
            shortest window.
    """

    stretches: tuple[Stretch, ...]
    stays: bool
    bound: float
    windows: int
    batch: int
    correlation: float
    last: Mean


@dataclass(frozen=True, slots=True)
class _Window:
    first: int
    end: int
    is_above: bool


class Differences:
    """The differences of two paired series, with the means of any of their windows.

    Args:
        values: One for each pair, in order; finite.
        tolerance: A mean difference up to this counts as none.

    Attributes:
        batch: The length of the shortest batches whose means are nearly uncorrelated.
        correlation: That of the means of neighbouring batches of this length.
    """

    def __init__(self, values: Sequence[float] | Doubles, tolerance: float = 0.0) -> None:
        self.tolerance = tolerance
        self.values: Doubles = np.asarray(values, dtype=np.float64)
        self._padded = np.append(self.values, 0.0)
        self.batch, self.correlation = self._uncorrelated_batch()
        self._widened = math.sqrt((1 + self.correlation) / (1 - self.correlation))

    def __len__(self) -> int:
        return len(self.values)

    def mean(self, first: int, end: int) -> Mean:
        """The mean difference of some pairs, with its standard error from batch means.

        Args:
            first: The first pair.
            end: The pair after the last one.
        """
        value = float(self.values[first:end].mean()) if end > first else math.nan
        batch = (end - first) // BATCHES
        if batch < self.batch:
            return Mean(value, math.nan)
        _, stderr = self.window_means(np.array([end - batch * BATCHES]), batch)
        return Mean(value, float(stderr[0]))

    def window_means(self, starts: npt.NDArray[np.int64], batch: int) -> tuple[Doubles, Doubles]:
        """The means of windows of 16 batches, and their standard errors.

        Args:
            starts: The first pair of each.
            batch: The length of a batch.
        """
        means = self._batch_means(starts, batch)
        return means.mean(axis=1), means.std(axis=1, ddof=1) / math.sqrt(BATCHES) * self._widened

    def _batch_means(self, starts: npt.NDArray[np.int64], batch: int) -> Doubles:
        edges = starts[:, None] + batch * np.arange(BATCHES + 1)
        if not len(starts):
            return np.zeros((0, BATCHES))
        # Each sum for itself: differences of running sums would lose all digits behind one huge loss.
        sums = np.add.reduceat(self._padded, edges.ravel()).reshape(edges.shape)
        means: Doubles = sums[:, :BATCHES] / batch
        return means

    def _uncorrelated_batch(self) -> tuple[int, float]:
        batch = 1
        while (found := self.neighbour_correlation(batch)) > _CORRELATION and 2 * batch * BATCHES <= len(self):
            batch *= 2
        return batch, min(max(found, 0.0), _MOST_CORRELATED)

    def neighbour_correlation(self, batch: int) -> float:
        """The correlation of the means of neighbouring batches, about a line in each window: a trend is no noise.

        Args:
            batch: The length of a batch.
        """
        means = self._batch_means(_window_starts(len(self), batch), batch)
        found = _neighbours(means @ _about_a_line())
        # Each window weighs the same, as noise is larger early in a run.
        return float(np.interp(found.mean(), *_calibration())) if len(found) else 0.0


@cache
def _about_a_line() -> Doubles:
    """The matrix [16, 16] that takes values to their residuals about the line of least squares."""
    place = np.arange(BATCHES) - (BATCHES - 1) / 2
    residuals: Doubles = np.eye(BATCHES) - 1 / BATCHES - np.outer(place, place) / (place @ place)
    return residuals


@cache
def _calibration() -> tuple[Doubles, Doubles]:
    """What is found from 16 residuals about a line, on average, where neighbours correlate by so much: by simulation.

    Residuals correlate less than what they are of, and a mean of ratios has no closed form.
    """
    correlations = np.linspace(-0.98, 0.98, 50)
    distance = np.abs(np.subtract.outer(np.arange(BATCHES), np.arange(BATCHES)))
    # The same draws for all, so that what is found rises with the correlation.
    draws = np.random.default_rng(0).standard_normal((1000, BATCHES))
    found = [
        _neighbours(draws @ np.linalg.cholesky(correlation**distance).T @ _about_a_line()).mean()
        for correlation in correlations
    ]
    return np.array(found), correlations


def _neighbours(residuals: Doubles) -> Doubles:
    """The correlation of neighbours in each row that is not zero."""
    power = (residuals**2).sum(axis=1)
    noisy = power > 0
    found: Doubles = (residuals[noisy, 1:] * residuals[noisy, :-1]).sum(axis=1) / power[noisy]
    return found


def find_parting(differences: Differences) -> Parting:
    """Find where two paired series part.

    Args:
        differences: Of the two.
    """
    scales = [_judged(differences, batch) for batch in batch_lengths(differences)]
    count = sum(len(errors) for _, _, errors in scales)
    bound = t_bound(FALSE_ALARMS / count) if count else math.inf
    stretches = tuple(_stretches(differences, _shortest(scales, bound, len(differences))))
    stays = bool(stretches) and stretches[-1].end == len(differences)
    shown = stretches[-1].window if stretches else differences.batch * BATCHES
    last = differences.mean(max(0, len(differences) - shown), len(differences))
    return Parting(stretches, stays, bound, count, differences.batch, differences.correlation, last)


def t_bound(probability: float) -> float:
    """The value beyond which Student's t of 15 degrees of freedom is, on either side, with a probability.

    Args:
        probability: Two-sided.
    """
    low, high = 0.0, 1.0
    while t_tail(high) > probability:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle) > probability else (low, middle)
    return high


def t_tail(value: float) -> float:
    """The probability that Student's t of 15 degrees of freedom is beyond a value on either side.

    Abramowitz and Stegun, "Handbook of mathematical functions" (1964), equation 26.7.3.

    Args:
        value: 0 or more.
    """
    freedom = BATCHES - 1
    angle = math.atan(value / math.sqrt(freedom))
    cosine, term, total = math.cos(angle), math.cos(angle), 0.0
    for power in range(1, freedom - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    return max(0.0, 1 - 2 / math.pi * (angle + math.sin(angle) * total))


_Scale = tuple[int, npt.NDArray[np.int64], Doubles]  # length of the windows, first pair of each, mean in its errors


def batch_lengths(differences: Differences) -> list[int]:
    """The lengths of the batches that windows are made of, shortest first; none where they correlate too much.

    Args:
        differences: Of two series.
    """
    if differences.correlation > _TOO_CORRELATED:
        return []
    most = len(differences) // BATCHES
    powers = range(max(0, (most // differences.batch).bit_length()))
    return [differences.batch << power for power in powers]


def _window_starts(pairs: int, batch: int) -> npt.NDArray[np.int64]:
    """The first pair of all windows of 16 batches: a quarter of a window apart, and the last one."""
    last = pairs - batch * BATCHES
    return np.unique(np.append(np.arange(0, last + 1, batch * BATCHES // _SLIDE), last)) if last >= 0 else np.arange(0)


def _judged(differences: Differences, batch: int) -> _Scale:
    """The windows with batches of a length, and their mean differences, less what is tolerated, in standard errors."""
    starts = _window_starts(len(differences), batch)
    means, stderr = differences.window_means(starts, batch)
    beyond = np.sign(means) * np.maximum(np.abs(means) - differences.tolerance, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return batch * BATCHES, starts, np.nan_to_num(beyond / stderr, nan=0.0, posinf=np.inf, neginf=-np.inf)


def _shortest(scales: Sequence[_Scale], bound: float, pairs: int) -> list[_Window]:
    """The windows beyond the bound that have no shorter such window in them, by their first pair."""
    nearest_end = np.full(pairs + 1, pairs + 1)  # by pair: the first end of a window that begins there or later
    kept: list[_Window] = []
    for length, starts, errors in scales:
        found = (np.abs(errors) > bound) & (nearest_end[starts] > starts + length)
        kept += [
            _Window(int(start), int(start) + length, bool(error > 0)) for start, error in _pairs(starts, errors, found)
        ]
        np.minimum.at(nearest_end, starts[found], starts[found] + length)
        nearest_end = np.minimum.accumulate(nearest_end[::-1])[::-1]
    return sorted(kept, key=lambda window: (window.first, window.end))


def _pairs(starts: npt.NDArray[np.int64], errors: Doubles, kept: npt.NDArray[np.bool_]) -> Iterator[tuple[int, float]]:
    return zip(starts[kept].tolist(), errors[kept].tolist(), strict=True)


def _stretches(differences: Differences, windows: Sequence[_Window]) -> Iterator[Stretch]:
    groups = _groups(differences, windows)
    first = 0
    for before, group, after in zip([None, *groups], groups, [*groups[1:], None], strict=False):
        first = max(first, _onset(differences, before[-1] if before else None, group[0]))
        end = max(_end(differences, group[-1], after[0] if after else None), first + 1)
        onset = differences.mean(group[0].first, group[0].end)
        yield Stretch(first, end, onset, group[0].end - group[0].first, differences.mean(first, end))
        first = end


def _groups(differences: Differences, windows: Sequence[_Window]) -> list[list[_Window]]:
    """Windows of one side, with nothing but that side between them."""
    groups: list[list[_Window]] = []
    for window in windows:
        if groups and _goes_on(differences, groups[-1][-1], window):
            groups[-1].append(window)
        else:
            groups.append([window])
    return groups


def _goes_on(differences: Differences, before: _Window, after: _Window) -> bool:
    if before.is_above != after.is_above:
        return False
    longest = max(before.end - before.first, after.end - after.first)
    is_short = after.first - before.end < _GAP * longest
    return is_short or _is_beyond(differences, before.end, after.first, before.is_above)


def _is_beyond(differences: Differences, first: int, end: int, is_above: bool) -> bool:
    mean = differences.mean(first, end)
    beyond = (mean.value if is_above else -mean.value) - differences.tolerance
    return beyond > _STILL_APART * mean.stderr


def _onset(differences: Differences, before: _Window | None, window: _Window) -> int:
    """The pair from which on the series are apart: in the window, or up to its length earlier."""
    earliest = max(0, window.first - (window.end - window.first))
    if before is not None:
        earliest = max(earliest, _between(before, window)[0])
    level = differences.mean(window.first, window.end).value
    return earliest + change_point(differences.values[earliest : window.end], level)


def _end(differences: Differences, window: _Window, after: _Window | None) -> int:
    """The pair after the last one at which the series are apart."""
    length, pairs = window.end - window.first, len(differences)
    if after is None and (pairs - window.end < length or _is_beyond(differences, window.end, pairs, window.is_above)):
        return pairs
    latest = min(pairs, window.end + length)
    if after is not None:
        latest = min(latest, _between(window, after)[1])
    level = differences.mean(window.first, window.end).value
    return latest - change_point(differences.values[window.first : latest][::-1], level)


def _between(before: _Window, after: _Window) -> tuple[int, int]:
    """Where one stretch may end and the next one may begin: windows of two sides may overlap."""
    if before.is_above == after.is_above:
        return before.end, after.first
    return min((before.first + before.end) // 2, after.first), max((after.first + after.end) // 2, before.end)


def change_point(values: Doubles, level: float) -> int:
    """The place from which on values have a level, by maximum likelihood; they are 0 before, with the same noise.

    Args:
        values: In order; the last ones have the level.
        level: The level.
    """
    drift = np.cumsum(values - level / 2) * math.copysign(1, level)
    return int(np.argmin(np.concatenate([[0.0], drift[:-1]])))
