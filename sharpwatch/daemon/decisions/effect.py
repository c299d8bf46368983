"""What an action has done: whether the run's loss is back where it stood before the trouble began."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sharpwatch.daemon.detection.baselines import scatter
from sharpwatch.daemon.detection.history import Losses
from sharpwatch.daemon.detection.run_detection import RunDetection
from sharpwatch.wire import Doubles

Effect = Literal["recovered", "worse", "no-effect", "inconclusive"]
BEFORE = 40  # losses that a band is made of
NEWEST = 20  # losses whose mean is judged by it
FEW = 5  # losses without which nothing can be said
# Standard deviations of single losses above the level of the band. Of independent losses, a mean of 20 is by chance
# above that of 40 others by 0.27 of them; neighbouring losses resemble each other, which makes it up to twice as much.
IN_BAND, OUT_OF_BAND = 1.0, 2.0
_STAGE_Z = 3.0  # of a stability ratio that speaks against a raise


@dataclass(frozen=True, slots=True)
class LossBand:
    """Where a run's loss stood before a step, from above: that it falls on is no harm.

    Attributes:
        level: Mean of its losses.
        sd: Standard deviation of single losses, from their changes, so that a trend counts for nothing.
    """

    level: float
    sd: float

    @classmethod
    def before(cls, losses: Losses, step: int) -> LossBand | None:
        """The band of the newest losses before a step; None where there are too few."""
        values = np.array(list(losses.before(step, BEFORE).values()))
        if len(values) < NEWEST:
            return None
        with np.errstate(all="ignore"):
            return cls(mean_of(values), scatter(values[:, None]))

    def above(self, mean: float) -> float:
        """By how many standard deviations a mean is above the level."""
        away = mean - self.level
        if not math.isfinite(away):
            return math.inf
        if self.sd > 0:
            return away / self.sd
        return math.inf if away > 0 else 0.0


def mean_of(losses: Doubles) -> float:
    """The mean of losses: a trainer may report any number, and NaN or infinity is above every band."""
    with np.errstate(all="ignore"):
        return float(losses.mean())


def against_raise(detection: RunDetection, applied: int) -> str:
    """What speaks against a raise of multipliers, though nothing is found; empty for nothing.

    Args:
        detection: What is known of the run.
        applied: The step from which the raise is in force.
    """
    losses, now = detection.history.losses, detection.recent[-1]
    newest, band = losses.since(applied, NEWEST), LossBand.before(losses, applied)
    if band is not None and len(newest) == NEWEST and band.above(mean := mean_of(newest)) > OUT_OF_BAND:
        return f"loss {mean:.4g}, {band.level:.4g} before"
    if now.stability > _STAGE_Z:
        return f"stability ratio {now.stability:.1f} sd above its level"
    return "a step that does not descend" if now.observation.no_descent else ""


def effect(losses: Losses, onset: int, applied: int, *, over: bool, last: bool) -> tuple[Effect, str] | None:
    """Judge an action by the run's losses.

    Args:
        losses: All of the run so far.
        onset: The step at which the trouble began.
        applied: The step from which the action is in force.
        over: Whether what was found is over, or held down by the action.
        last: Whether the time is up in which the action must have helped.

    Returns:
        The effect and why, or None while it is not known.
    """
    before = min(onset, applied)  # after a rollback the steps before the onset come again
    band, newest = LossBand.before(losses, before), losses.since(applied, NEWEST)
    if band is None or len(newest) < (FEW if last else NEWEST):
        return _without_losses(over=over, last=last, some=bool(len(losses)))
    mean, at = mean_of(newest), losses.before(applied, FEW)
    compared = f"loss {mean:.4g}, {band.level:.4g} before step {before}"
    is_back = band.above(mean) < IN_BAND
    if over and is_back:
        return "recovered", compared
    then = max(band.level, mean_of(np.array(list(at.values()))))
    if mean > then + IN_BAND * band.sd:
        judged: tuple[Effect, str] = "worse", f"{compared}, {then:.4g} when it was applied"
    else:
        judged = "no-effect", f"{compared}; what was found goes on" if is_back else compared
    return judged if last else None


def _without_losses(*, over: bool, last: bool, some: bool) -> tuple[Effect, str] | None:
    """The effect by what is found alone; one that reports losses, but too few of them, has not recovered by that."""
    if over and not some:
        return "recovered", "nothing is found any more"
    if not last:
        return None
    return ("inconclusive", "too few losses to say where it stands") if over else ("no-effect", "it goes on")
