"""The statistics that are judged, and how large one must be for a warning or a page: a budget of false alarms.

Each statistic of a healthy run exceeds a level u now and then, and the excess above u is about exponential: a value x
comes at the rate r·exp(-(x - u)/m) a sample, where exceedances within 20 samples count once (Davison & Smith, Models
for exceedances over high thresholds, J. R. Statist. Soc. B 52, 1990, with shape 0). `TAILS` has u, m and r as fitted to
healthy runs of the fault laboratory; a run's own tail takes over as it grows, within a factor of 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sharpwatch.daemon.config.settings import DetectionConfig
from sharpwatch.daemon.detection.signals import ROW, Scores
from sharpwatch.daemon.detection.state import Arrays, gathered, put_back
from sharpwatch.wire import Doubles

_RENEWED = 500  # samples after which thresholds follow the run's own tail: as often as they are journalled
TOGETHER = 20  # samples within which exceedances count once
_SURE = 5_000  # samples after which a run's own tail counts fully
_OFTEN = 2.5  # pages for one statistic in about 5,000 samples after which it takes more
_MORE, _MOST = 1.25, 5.0  # times what it has paged for, and at most so many times its threshold
# Of weights more: where their changes have heavy tails, damage is what no step can do, and that pages by itself.
_MOST_OF_WEIGHTS = 25.0
_UP, _DOWN = 2.0, 0.8  # factors by which it moves a threshold at most
_LEAST_EXCEEDANCES = 10  # that a run's own mean excess is made of
_USUAL_BLOCKS = 20  # layer blocks of the laboratory's models
PER = 10_000.0  # steps that a budget is for
MARGIN = 10.0  # times fewer pages are aimed at: far out, a tail is not known to a factor of two


Limit = tuple[float, float]  # of a statistic: what is worth a warning, and what a page


@dataclass(frozen=True, slots=True)
class Budget:
    """False alarms allowed in 10,000 healthy steps.

    Attributes:
        pages: Incidents that open at severity critical.
        warnings: Incidents of severity warning.
    """

    pages: float = 1.0
    warnings: float = 10.0

    @classmethod
    def of(cls, config: DetectionConfig) -> Budget:
        """The budget that a daemon is configured with."""
        return cls(config.pages_per_10k_steps, config.warnings_per_10k_steps)


USUAL = Budget()


@dataclass(frozen=True, slots=True)
class Tail:
    """The upper tail of a statistic.

    Attributes:
        level: u: where the tail begins.
        excess: m: the mean excess above it.
        rate: r: exceedances a sample.
    """

    level: float
    excess: float
    rate: float

    def exceeded_at(self, rate: float) -> float:
        """The value that is exceeded at a rate a sample."""
        return self.level + self.excess * math.log(max(1.0, self.rate / rate))


# By `python -m benchmarks.faults.tails`, on seeds 0, 1 and 20 to 27 of 0.5M parameters, 0 and 2 of 5M.
TAILS: Mapping[str, Tail] = {
    "weight": Tail(1.85, 0.24, 4.53e-04),
    "update-5": Tail(5.46, 0.52, 5.29e-04),
    "update-20": Tail(5.07, 0.79, 4.95e-04),
    "gradient-5": Tail(6.00, 0.55, 4.63e-04),
    "gradient-20": Tail(6.12, 0.60, 5.40e-04),
    "both-10": Tail(7.09, 0.44, 5.32e-04),
    "both-20": Tail(6.60, 0.52, 5.62e-04),
    "loss-3": Tail(3.27, 0.43, 5.77e-04),
    "loss-10": Tail(3.20, 0.51, 5.33e-04),
    "loss-40": Tail(3.39, 0.51, 5.15e-04),
    "drop-3": Tail(3.11, 0.24, 7.45e-04),
    "drop-10": Tail(2.77, 0.39, 4.85e-04),
    "drop-40": Tail(3.31, 1.45, 4.91e-04),
}
NAMES = tuple(TAILS)
# Samples over which the norms of layer blocks, and the loss, are compared with thresholds.
_NORM_SPANS = slice(ROW[5], ROW[20] + 1, ROW[20] - ROW[5])
_BOTH_SPANS = slice(ROW[10], ROW[20] + 1)
_LOSS_SPANS = slice(ROW[3], ROW[40] + 1, ROW[10] - ROW[3])
# z of a gradient norm that counts beside that of the update RMS: updates follow gradients, but forget how large they
# are, and a rare token's gradient must not stand for both.
_BESIDE = 3.0
# Below these is no page, and below those no warning. Damage, by definition, moves weights by more than 10 standard
# deviations. The loss of a large batch scatters little and wanders with its data, which the laboratory's small batches
# do not show. A loss that falls faster is mostly good news.
_LEAST_PAGE = {"weight": 8.0, "loss-3": 8.0, "loss-10": 9.0}
_LEAST_WARNING = {"weight": 8.0, "loss-3": 5.0, "drop-3": 5.0, "drop-10": 5.0, "drop-40": 6.0}
# A loss that falls is worth no page, nor is one that has risen slowly: lines miss the bend of a young run's loss.
_PAGED = tuple(name for name in TAILS if not name.startswith("drop") and name != "loss-40")
# Those with a least value stay below the budget, and use up none of it.
_SHARING_PAGES = tuple(name for name in _PAGED if name not in _LEAST_PAGE)
_SHARING_WARNINGS = tuple(name for name in TAILS if name not in _LEAST_WARNING)
_OF_LOSS = 0.5  # share of the warnings that is the loss's
_OVERLAP = 1.4  # statistics of layer blocks that are worth a warning together: 1.3 to 1.6 in healthy runs
_OF_BLOCKS = ("weight", "update", "gradient", "both")


def statistics(recent: Sequence[Scores]) -> Doubles:
    """What is compared with thresholds, of the newest sample: a row [L] for each of `NAMES`, NaN where not judged.

    "weight" is how far the change of weights in the step before stands out from those in the steps around it; it is 0
    where they are back since. "update-5" and the like are sizes of z over so many samples, "both-10" and the like z
    of the update RMS, plus that of the gradient norm where it is high, up to `_BESIDE`. "loss-3" and "drop-3" are the
    two sides of the loss, in the first column.
    """
    now = recent[-1]
    found = np.full((len(NAMES), now.update.shape[1]), np.nan)
    if len(recent) > 2:
        _judge_weight(recent[-3], recent[-2], now, out=found[0])
    if now.observation.layers is not None:
        np.abs(now.update[_NORM_SPANS], out=found[1:3])
        np.abs(now.gradient[_NORM_SPANS], out=found[3:5])
        # 0 where the gradient is not known.
        beside = np.fmin(np.fmax(now.gradient[_BOTH_SPANS], 0.0), _BESIDE)
        np.add(now.update[_BOTH_SPANS], beside, out=found[5:7])
    found[7:10, 0] = now.loss[_LOSS_SPANS]
    found[10:, 0] = -found[7:10, 0]
    return found


def _judge_weight(before: Scores, then: Scores, now: Scores, *, out: Doubles) -> None:
    first = before.observation.step
    follow = then.observation.step == first + 1 and now.observation.step == first + 2
    if not (follow and before.weight.size and then.weight.size and now.weight.size):
        return
    rise, fall = then.weight - before.weight, then.weight - now.weight
    # The smaller one of both, 0 where they have not the same sign.
    out[:] = np.maximum(np.minimum(rise, fall), 0.0) - np.minimum(np.maximum(rise, fall), 0.0)
    if np.count_nonzero(np.isfinite(then.weight)) < len(out):
        # Infinite where a norm overflows: the difference of two such is no number.
        out[np.isinf(then.weight)] = np.inf
        out[np.isnan(then.weight)] = np.nan
    out[now.taken_back | then.taken_back] = 0.0  # the latter are the way back


class Limits:
    """The thresholds of one run.

    Args:
        budget: Of false alarms.
        layer_blocks: Number of its layer blocks: of more there are more that can stand out by chance.
    """

    STATE = ("_samples", "_counts", "_sums", "_last", "_peaks", "_seen", "_paged", "_paged_last", "_floors")

    def __init__(self, budget: Budget, layer_blocks: int) -> None:
        self._budget = budget
        more = layer_blocks / _USUAL_BLOCKS
        self._tails = {
            name: Tail(tail.level, tail.excess, tail.rate * (more if name.startswith(_OF_BLOCKS) else 1.0))
            for name, tail in TAILS.items()
        }
        self._samples = 0
        self._counts = np.zeros(len(TAILS))  # exceedances of the run's own, the sum of their peaks, when the last was
        self._sums = np.zeros(len(TAILS))
        self._last = np.full(len(TAILS), -float(TOGETHER))
        self._peaks = np.zeros(len(TAILS))
        self._levels = np.array([tail.level for tail in TAILS.values()])
        # The same of what was worth a page: how many there were lately, and below what no more are.
        self._paged = np.zeros(len(TAILS))
        self._paged_last = np.full(len(TAILS), -float(TOGETHER))
        self._floors = np.zeros(len(TAILS))
        self._seen = 0
        self.now: Mapping[str, Limit] = {}
        self._warnings = np.empty(0)
        self._set()
        self._is_event = np.array([name == "weight" for name in NAMES])
        most = np.where(self._is_event, _MOST_OF_WEIGHTS, _MOST)
        self._highest = most * [self.now[name][1] for name in NAMES]  # that floors may become

    def state(self) -> Arrays:
        """All that `load_state` needs to go on."""
        return gathered(self, self.STATE, "limits")

    def load_state(self, arrays: Arrays) -> None:
        """Go on from `state`; raises `ValueError` for one of other statistics."""
        put_back(self, self.STATE, arrays, "limits")
        self._set()

    def see(self, found: Doubles, *, keep_out: bool, explained: bool = False) -> tuple[list[str], Mapping[str, Limit]]:
        """Judge the statistics of a sample, then take them in, unless an incident is open.

        Args:
            found: The sample's `statistics`.
            keep_out: Whether an incident is open.
            explained: Whether it is another page's consequence, and so no sign of what the run always does.

        Returns:
            Those that are worth a warning, and the limits that held for this sample.
        """
        # NaN, where a statistic can't be judged, is no size; `fmax` passes it over.
        worst: Doubles = np.fmax.reduce(found, axis=1, initial=-math.inf)
        limits, exceeded = self.now, []
        above = worst > self._warnings
        if np.count_nonzero(above):
            exceeded = [name for name, is_above in zip(NAMES, above, strict=True) if is_above]
            if not explained:
                self._tire(worst)
        self._seen += 1
        if not keep_out:
            self._learn(worst)
        return exceeded, limits

    def _tire(self, worst: Doubles) -> None:
        """What a run pages for again and again is how it is: from the fourth time on only larger ones do."""
        pages = np.array([self.now[name][1] for name in NAMES])
        new = (worst > pages) & (self._seen - self._paged_last >= TOGETHER)
        if new.any():
            self._paged = np.where(new, self._paged * 0.5 ** ((self._seen - self._paged_last) / _SURE) + 1, self._paged)
            tired = new & (self._paged > _OFTEN)
            more = np.minimum(_MORE * worst, self._highest)
            self._floors = np.where(tired, np.maximum(self._floors, more), self._floors)
            self._set()
        # What stands for long is one page; weights are judged by single steps, each of which is an event.
        goes_on = (worst > pages) & ~self._is_event
        self._paged_last = np.where(new | goes_on, self._seen, self._paged_last)

    def _learn(self, worst: Doubles) -> None:
        self._samples += 1
        above = worst > self._levels
        if np.count_nonzero(above):
            new = above & (self._samples - self._last >= TOGETHER)
            higher = above & ~new & (worst > self._peaks)
            self._counts += new
            # An infinite one would leave nothing of the others.
            size = np.minimum(worst, 100 * self._levels)
            self._sums += np.where(new, size - self._levels, np.where(higher, size - self._peaks, 0.0))
            self._peaks = np.where(new | higher, size, self._peaks)
            # From its first sample on, or a run that is above a level most of the time would have one peak for ever.
            self._last = np.where(new, self._samples, self._last)
        if self._samples % _RENEWED == 0:
            self._set()

    def _set(self) -> None:
        self.now = self._limits()
        self._warnings = np.array([self.now[name][0] for name in NAMES])

    def _limits(self) -> dict[str, Limit]:
        pages = self._budget.pages / PER / len(_SHARING_PAGES) / MARGIN
        warnings = self._budget.warnings / PER
        of_blocks = sum(name.startswith(_OF_BLOCKS) for name in _SHARING_WARNINGS)
        for_loss = _OF_LOSS / (len(_SHARING_WARNINGS) - of_blocks) * warnings
        for_blocks = (1 - _OF_LOSS) / (of_blocks / _OVERLAP) * warnings
        limits = {}
        for i, name in enumerate(NAMES):
            rate = for_blocks if name.startswith(_OF_BLOCKS) else for_loss
            warning = self._limit(i, rate, _LEAST_WARNING.get(name, 0.0))
            page = self._limit(i, pages, _LEAST_PAGE.get(name, 0.0)) if name in _PAGED else math.inf
            limits[name] = (warning, max(float(self._floors[i]), page))
        return limits

    def _limit(self, index: int, rate: float, least: float) -> float:
        laboratory = self._tails[NAMES[index]]
        limit = max(least, laboratory.exceeded_at(rate))
        if not self._samples:
            return limit
        # Of few samples a part: until then a run without an odd one has shown nothing.
        weight = min(1.0, self._samples / _SURE)
        count = self._counts[index]
        excess = float(self._sums[index] / count) if count >= _LEAST_EXCEEDANCES else laboratory.excess
        own = Tail(laboratory.level, excess, float(count + 1) / self._samples).exceeded_at(rate)
        moved: float = min(_UP, max(_DOWN, own / limit)) ** weight
        return max(least, limit * moved)


def limit_of(tail: Tail, budget: Budget, series: int) -> Limit:
    """The limit of the largest of so many series with a tail; its share of the budget is that of one statistic.

    Args:
        tail: Of each series.
        budget: Of false alarms.
        series: How many there are.
    """
    warnings, pages = budget.warnings / PER / len(NAMES), budget.pages / PER / len(_PAGED) / MARGIN
    return tail.exceeded_at(warnings / series), tail.exceeded_at(pages / series)
