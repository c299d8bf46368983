"""Which of a run's ranks differs: the loss of each, held against those of the others.

The mean over ranks, which all else is judged by, hides one of many that trains on wrong data or with damaged weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sharpwatch.daemon.detection.baselines import FAR, MEAN_TO_SD, Level, scatter
from sharpwatch.daemon.detection.judged import listed
from sharpwatch.daemon.detection.signals import median
from sharpwatch.daemon.detection.state import Arrays, gathered, put_back
from sharpwatch.daemon.detection.thresholds import Budget, Tail, limit_of
from sharpwatch.daemon.records import Finding, Severity
from sharpwatch.wire import Doubles, Floats

_SPANS = (3, 10, 40)  # samples whose mean is judged
_LAG = max(_SPANS)  # samples that are judged before they become normal
# Samples at the start: after the first the levels are known, and then how the means scatter.
_LEVELS_KNOWN, _BLIND = 100, 150
_MEMORY, _SPREAD_MEMORY, _USUAL_MEMORY = 200, 50, 200  # samples
# The smallest scatter taken for real, as a share of the loss: ranks that share a loss differ by its rounding alone.
_FLOOR = 0.01
# By span: of mean losses of the laboratory's runs, in units of the scatter that they once had. That of ranks is heavier
# than a normal one as well.
_TAILS = {3: Tail(2.84, 0.73, 1.29e-03), 10: Tail(3.32, 0.41, 1.04e-03), 40: Tail(2.80, 0.77, 1.05e-03)}
_LEAST_WARNING, _LEAST_PAGE = 6.0, 9.0  # z below which nothing is told, or paged for, however few ranks there are
_STANDS_OUT = 3.0  # z of a single sample that a change can begin with
_CLIP = 3.0  # times the usual size up to which a mean counts for what is usual
_NAMED = 8  # ranks that a text names


def broken_ranks(losses: Floats | None) -> tuple[int, ...]:
    """The ranks whose loss is not finite; none where no other rank's is finite.

    Args:
        losses: As `Observation.rank_losses`.
    """
    if losses is None or not np.isfinite(losses).any():
        return ()
    return tuple(np.flatnonzero(np.isinf(losses)).tolist())


def ranks_text(ranks: Sequence[int], count: int) -> str:
    """Some of `count` ranks, in words."""
    return f"rank{'s' * (len(ranks) > 1)} {listed([*map(str, ranks)], _NAMED)} of {count}"


class RankLosses:
    """The losses of a run's ranks, each less the median over ranks, against how they usually differ.

    A rank may have data of its own kind, so each has a level of its own. The scatter is the rank's own, but never less
    than is usual for the run's ranks. Where differences go on from step to step, as when each rank reads on in one
    text, their means scatter more than chance alone would have it: that is learned too. Whatever is judged is compared
    with samples older than the longest span, so that what has just begun is not normal yet.

    Args:
        ranks: How many there are.
        budget: Of false alarms.
    """

    STATE = ("_values", "_steps", "_kept_out", "_sizes", "_usual", "_seen")

    def __init__(self, ranks: int, budget: Budget) -> None:
        self.ranks = ranks
        self._levels = Level(ranks, memory=_MEMORY, spread_memory=_SPREAD_MEMORY, blind=_LEVELS_KNOWN - _LAG)
        # Of the newest samples, the newest last: losses less their median, their steps, whether they may not become
        # normal, and how far their means scatter over all ranks.
        self._values = np.full((_LAG, ranks), np.nan, dtype=np.float32)
        self._steps = np.full(_LAG, -1, dtype=np.int64)
        self._kept_out = np.zeros(_LAG, dtype=bool)
        self._sizes = np.full((_LAG, len(_SPANS)), np.nan)
        self._usual = np.ones(len(_SPANS))  # what is usual of the latter
        self._seen = 0  # samples
        limits = [limit_of(_TAILS[span], budget, 2 * (ranks - 1)) for span in _SPANS]
        self._limits = [(max(_LEAST_WARNING, warning), max(_LEAST_PAGE, page)) for warning, page in limits]

    def state(self) -> Arrays:
        """All that `from_state` needs to go on."""
        return gathered(self, self.STATE, "ranks") | self._levels.state("ranks.levels")

    @classmethod
    def from_state(cls, arrays: Arrays, budget: Budget) -> RankLosses | None:
        """What `state` is of; None where that has no losses of ranks. Raises `ValueError` for one that is damaged."""
        if "ranks._values" not in arrays:
            return None
        made = cls(arrays["ranks._values"].shape[-1], budget)
        put_back(made, cls.STATE, arrays, "ranks")
        made._levels.load_state(arrays, "ranks.levels")
        return made

    @np.errstate(over="ignore", under="ignore", invalid="ignore")  # a trainer may report any number
    def see(self, step: int, losses: Floats, *, keep_out: bool) -> list[Finding]:
        """Judge the losses of the newest step, then keep them.

        Args:
            step: The step.
            losses: As `Observation.rank_losses`.
            keep_out: Whether they may not become normal.
        """
        known = np.isfinite(losses)
        if np.count_nonzero(known) < 2:
            return []
        if step <= self._steps[-1]:  # a rollback: what was last seen belongs to a timeline that was left
            self._values[:] = self._sizes[:] = np.nan
            self._steps[:] = step
        finite: Doubles = np.where(known, losses, np.nan).astype(np.float64)
        middle = median(finite)
        floor = np.fmax(_FLOOR * abs(middle), median(self._levels.sd))
        self._levels.see(self._values[0].astype(np.float64), floor, keep_out=bool(self._kept_out[0]))
        for kept, newest in ((self._values, finite - middle), (self._steps, step), (self._kept_out, keep_out)):
            kept[:-1] = kept[1:]
            kept[-1] = newest
        self._seen += 1
        if self._seen <= _LEVELS_KNOWN:
            return []
        z = np.clip((self._values - self._levels.level) / np.fmax(self._levels.sd, floor), -FAR, FAR)
        means = _means(z)
        scores = means / np.maximum(self._usual, 1.0)[:, None]
        self._learn(means)
        if self._seen <= _BLIND or not np.count_nonzero(np.abs(scores) > _LEAST_WARNING):
            return []
        if self.ranks > 2:  # in units of the others' present scatter where that has grown, as after a smaller batch
            farthest = int(np.nanargmax(np.fmax.reduce(np.abs(scores), axis=0)))
            scores /= max(1.0, scatter(np.delete(z, farthest, axis=1)) / max(1.0, self._usual[0]))
        return self._findings(scores, z, finite)

    def _learn(self, means: Doubles) -> None:
        """Take in how far the means scatter, over all ranks; one that is far off counts as less."""
        known = ~np.isnan(means)
        count = known.sum(1)
        bounds = _CLIP * np.maximum(self._usual, 1.0)[:, None]
        total = np.where(known, np.minimum(np.abs(means), bounds), 0.0).sum(1)
        self._sizes[:-1] = self._sizes[1:]
        self._sizes[-1] = np.where(count > 0, MEAN_TO_SD * total / np.maximum(count, 1), np.nan)
        # The oldest, as of all that is normal; of a young run there are too few.
        row = -1 if self._seen <= _BLIND else 0
        if not self._kept_out[row]:
            gain = max(1.0 / _USUAL_MEMORY, 1.0 / (self._seen - _LEVELS_KNOWN))
            self._usual += np.nan_to_num(gain * (self._sizes[row] - self._usual))

    def _findings(self, scores: Doubles, z: Doubles, losses: Doubles) -> list[Finding]:
        known = np.flatnonzero(~np.isnan(losses))
        # Of two, nobody can tell which one is wrong: the higher loss is named.
        sizes = scores if len(known) == 2 else np.abs(scores)
        found = []
        for span, row, score, (warning, page) in zip(_SPANS, sizes, scores, self._limits, strict=True):
            where = row > warning
            if where.any():
                severity: Severity = "critical" if (row > page).any() else "warning"
                worst = int(np.argmax(np.where(where, row, -math.inf)))
                found.append((severity, span, worst, float(score[worst]), np.flatnonzero(where).tolist()))
        if not found:
            return []
        severity, span, worst, score, ranks = min(found, key=lambda each: (each[0] != "critical", each[1]))
        others = median(losses[known[known != worst]])
        step = int(self._steps[-1])
        differs = f"differ{'s' * (len(ranks) == 1)}"
        evidence = f"{ranks_text(ranks, self.ranks)} {differs}: "
        if not math.isnan(losses[worst]):
            evidence += f"loss {losses[worst]:.4g} against {others:.4g}, the others' median; "
        evidence += f"{abs(score):.0f} sd {'above' if score > 0 else 'below'} over {span} samples"
        rank = worst if len(ranks) == 1 else None
        # It began at the first step, of those that the mean is of, at which the rank stood out by itself.
        first = int(np.argmax(math.copysign(1.0, score) * z[-span:, worst] > _STANDS_OUT))
        onset = int(self._steps[-span:][first])
        return [Finding("RankDiffers", severity, evidence, step, onset, span=span, rank=rank)]


def _means(z: Doubles) -> Doubles:
    """The z [spans, ranks] of the means over the newest samples, as if these were independent."""
    known = ~np.isnan(z)
    scores = np.where(known, z, 0.0)
    total = np.stack([scores[-span:].sum(0) for span in _SPANS])
    count = np.stack([known[-span:].sum(0) for span in _SPANS])
    enough = 2 * count > np.array(_SPANS)[:, None]
    return np.where(enough, total / np.sqrt(np.maximum(count, 1.0)), np.nan)
