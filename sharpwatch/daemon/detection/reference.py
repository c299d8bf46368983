"""A run against a reference: whether its loss stays above that of a run that is right, though neither leaves its band.

The test is sequential: as pairs of losses at equal steps come in, windows of the newest differences are judged by the
t-statistic of 16 batch means, as in `parting`. A window of W pairs is looked at every W/4 pairs, and the probability
that one look is beyond its bound by chance is such that all lengths together hold the budget of false pages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sharpwatch.daemon.detection.history import Losses
from sharpwatch.daemon.detection.parting import BATCHES, Differences, Mean, batch_lengths, change_point, t_bound
from sharpwatch.daemon.detection.thresholds import MARGIN, PER, USUAL, Budget
from sharpwatch.daemon.records import Finding, Severity
from sharpwatch.wire import Doubles

TOLERANCE = 0.01  # of the reference's loss: healthy twins on other hardware part by up to 0.5 %
MATTERS = 0.1  # difference of losses that is critical where it lasts
LASTS = 200  # pairs
KEPT = 4_096  # pairs, the newest
_SHORTEST = 4  # pairs of a batch
_LENGTHS = 7  # of windows, from 64 pairs to 4,096
_LOOKS = 4  # at a window, in its length


@dataclass(frozen=True, slots=True)
class Gap:
    """How far a run is above its reference.

    Attributes:
        onset: The first step at which they are apart.
        count: Which pair that is, from 0.
        window: Pairs of the windows that show it.
        first: The mean difference of the window that showed it first.
        newest: That of the newest window.
    """

    onset: int
    count: int
    window: int
    first: Mean
    newest: Mean


class ReferenceTest:
    """A sequential test of whether a run's loss is above its reference's.

    Args:
        name: The reference's.
        own: The losses of the run; read, also as more come.
        reference: Those of the reference, likewise.
        budget: Of false alarms.
    """

    def __init__(self, name: str, own: Losses, reference: Losses, budget: Budget = USUAL) -> None:
        self.name = name
        self.gap: Gap | None = None
        self._own, self._reference = own, reference
        self._rate = budget.pages / PER / MARGIN / _LENGTHS  # false alarms a pair, for each length
        self._bounds: dict[int, float] = {}
        self._pairs: Doubles = np.zeros((3, 2 * KEPT))  # step, loss, reference's loss; the newest last
        self._size = 0  # of these
        self._count = 0
        common = np.intersect1d(own.steps, reference.steps).tolist()
        for step in common:
            self.see(step)
        # Steps since the newest pair.
        self._unpaired = own.stride * int((own.steps > (common[-1] if common else -1)).sum())

    def judge_by(self, budget: Budget) -> None:
        """Goes by another budget from now on."""
        self._rate = budget.pages / PER / MARGIN / _LENGTHS
        self._bounds.clear()

    def __len__(self) -> int:
        return self._count

    def is_against(self, losses: Losses) -> bool:
        """Whether these are the very losses that the run is held against."""
        return self._reference is losses

    def see(self, step: int) -> None:
        """Take in a step that the run or the reference has come to."""
        self._go_back(step)
        loss, reference = self._own.at(step), self._reference.at(step)
        if loss is None or reference is None:
            self._unpaired += 1
            return
        self._unpaired = 0
        if self._size == 2 * KEPT:
            self._pairs[:, :KEPT] = self._pairs[:, KEPT:]
            self._size = KEPT
        self._pairs[:, self._size] = step, loss, reference
        self._size += 1
        self._count += 1
        if self._count % (_LOOKS * _SHORTEST) == 0:
            self._look()

    def finding(self, step: int) -> Finding | None:
        """What it says at a step of the run: nothing any more once the reference has ended a window ago."""
        gap = self.gap
        if gap is None or self._unpaired > gap.window:
            return None
        lasts = self._count - gap.count >= LASTS
        severity: Severity = "critical" if lasts and gap.newest.value >= MATTERS else "warning"
        evidence = (
            f"loss above the reference {self.name} from step {gap.onset} on: by {gap.first.value:.3g}, "
            f"{gap.first.errors:.1f} standard errors over {gap.window} common steps; now by {gap.newest.value:.3g}"
        )
        return Finding("SilentFailure", severity, evidence, step, gap.onset)

    @property
    def difference(self) -> Mean:
        """The mean difference of the newest pairs, with its standard error where that can be told."""
        _, loss, reference = self._newest
        values = (loss - reference)[-LASTS:]
        return Differences(values).mean(0, len(values))

    @property
    def _newest(self) -> Doubles:
        """The newest pairs [3, pairs]: steps, losses, the reference's losses."""
        return self._pairs[:, max(0, self._size - KEPT) : self._size]

    def _go_back(self, step: int) -> None:
        """Forget the pairs from a step on: the run or its reference comes to that step again."""
        kept = int(np.searchsorted(self._pairs[0, : self._size], step))
        self._count -= self._size - kept
        self._size = kept
        if self.gap is not None and self.gap.onset >= step:
            self.gap = None

    def _look(self) -> None:
        _, loss, reference = self._newest
        differences = Differences(loss - reference)
        excess: Doubles = differences.values - TOLERANCE * np.abs(reference)
        if self.gap is not None:
            self._follow(self.gap, differences, excess)
            return
        for batch in batch_lengths(differences):
            window = batch * BATCHES
            if batch < _SHORTEST or self._count % (window // _LOOKS):
                continue
            mean = differences.mean(len(excess) - window, len(excess))
            if excess[-window:].mean() > self._bound(window) * mean.stderr:
                self.gap = self._begun(differences, window, mean)
                return

    def _begun(self, differences: Differences, window: int, mean: Mean) -> Gap:
        """The gap that the newest window shows: it may have begun up to the window's length before it."""
        earliest = max(0, len(differences) - 2 * window)
        place = earliest + change_point(differences.values[earliest:], mean.value)
        return Gap(int(self._newest[0, place]), self._count - len(differences) + place, window, mean, mean)

    def _follow(self, gap: Gap, differences: Differences, excess: Doubles) -> None:
        """Renew what is known of the gap, or end it where the newest window is within what is tolerated."""
        newest = differences.mean(max(0, len(excess) - gap.window), len(excess))
        self.gap = replace(gap, newest=newest) if excess[-gap.window :].mean() > 0 else None

    def _bound(self, window: int) -> float:
        """The standard errors that the mean of a window must be above."""
        if window not in self._bounds:
            self._bounds[window] = t_bound(2 * self._rate * window / _LOOKS)  # of one side
        return self._bounds[window]
