"""The growth of attention logits: each layer's scale, probe by probe, against the layer's own past.

Scales of attention grow in healthy runs too, fastest at the start. What counts is growth that is faster than the run's
own growth and scatter predict, and that goes on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sharpwatch.daemon.detection.state import Arrays, gathered, put_back
from sharpwatch.wire import Doubles, Floats

_MEAN_TO_SD = 1.2533  # of a normal distribution: its standard deviation over its mean absolute deviation
_FLOOR = 0.005  # smallest standard deviation of a log scale's change taken for real


@dataclass(frozen=True, slots=True)
class AttentionScores:
    """How the scales of a probe stand, by layer block [L]; NaN where nothing is known.

    Attributes:
        growth: z of the change of the log scale since the probe before.
        rise: How much the log scale has risen since before the growth began; NaN unless two of the newest three
            changes stand out, this one among them.
        excess: z of that rise beyond the drift.
        onset: The step of the probe before the growth began.
    """

    growth: Doubles
    rise: Doubles
    excess: Doubles
    onset: Doubles


class AttentionTrend:
    """The changes of log scales from probe to probe, as a drift and a scatter of the run's own.

    A log scale s is taken for a random walk with drift over τ, the steps passed, each weighed by its learning rate: a
    change Δs has mean m·Δτ and variance σ²·Δτ. So neither a schedule of the rates nor the probes' pace is news. m is
    the median of Δs/Δτ over the newest probes, and σ comes from the mean distance from it.

    Args:
        columns: The number L of layer blocks.
    """

    WINDOW = 10  # changes that drift and scatter are made of: before there are so many, nothing is judged
    STANDS_OUT = 2.0  # z of a change; of the whole rise more is asked
    PATIENCE = 10  # changes in a row that are kept out of the window; then it is how the scale grows now
    _STATE = ("_changes", "_spans", "_last", "_passed", "_far", "_from", "_since", "_onset", "_kept_out", "_step")

    def __init__(self, columns: int) -> None:
        self._changes = np.full((self.WINDOW, columns), np.nan)  # newest first, as all that follows
        self._spans = np.full((self.WINDOW, columns), np.nan)
        self._last: Doubles = np.full(columns, np.nan)  # log scale at the newest probe
        self._passed = np.zeros(columns)  # τ since then
        self._far = np.zeros((3, columns), dtype=bool)  # whether the changes of the newest probes stand out
        self._from: Doubles = np.full(columns, np.nan)  # log scale before the growth that goes on
        self._since = np.zeros(columns)  # τ since then
        self._onset: Doubles = np.full(columns, np.nan)
        self._kept_out = np.zeros(columns, dtype=np.int64)
        self._step = -1  # of the newest probe

    def step(self, rates: Floats) -> None:
        """A step is taken at the learning rates [L]."""
        self._passed = self._passed + np.nan_to_num(rates)

    def leave(self) -> None:
        """What comes next does not go on from the newest probe: a rollback, or another attempt."""
        self._last = np.full_like(self._last, np.nan)
        self._far[:] = False

    def see(self, step: int, scales: Doubles, *, keep_out: bool = False) -> AttentionScores:
        """Judge the scales of a probe, then keep them.

        Args:
            step: The probe's step.
            scales: [L], NaN where there is none.
            keep_out: Whether they may not become normal, because something is known to be wrong.

        Returns:
            Their scores.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            logs: Doubles = np.log(np.where(scales > 0, scales, np.nan))
            changes = np.where(self._passed > 0, logs - self._last, np.nan)
            drift, scatter = self._usual()
            growth = _z(changes, self._passed, drift, scatter)
            far = growth > self.STANDS_OUT
            quiet = ~self._far.any(axis=0)
            self._from = np.where(quiet, self._last, self._from)
            self._onset = np.where(quiet, float(self._step), self._onset)
            self._since = np.where(quiet, 0.0, self._since) + self._passed
            self._far = np.vstack([far, self._far[:-1]])
            rise = np.where(far & (self._far.sum(axis=0) >= 2), logs - self._from, np.nan)
            excess = _z(rise, self._since, drift, scatter)
        self._keep(changes, far | keep_out)
        known = ~np.isnan(logs)
        self._last = np.where(known, logs, self._last)
        self._passed = np.where(known, 0.0, self._passed)
        self._step = step
        return AttentionScores(growth, rise, excess, self._onset)

    def state(self) -> Arrays:
        """All that `load_state` needs to go on."""
        return gathered(self, self._STATE, "attention")

    def load_state(self, arrays: Arrays) -> None:
        """Go on from `state`; raises `ValueError` for one of other layer blocks."""
        put_back(self, self._STATE, arrays, "attention")

    def _usual(self) -> tuple[Doubles, Doubles]:
        """The drift m and the scatter σ of each scale [L]; NaN before there are enough changes."""
        drift = np.median(self._changes / self._spans, axis=0)
        distances = np.abs(self._changes - drift * self._spans) / np.sqrt(self._spans)
        return drift, _MEAN_TO_SD * distances.mean(axis=0)

    def _keep(self, changes: Doubles, out: np.ndarray) -> None:
        known = ~np.isnan(changes)
        self._kept_out = np.where(known & out, self._kept_out + 1, np.where(known, 0, self._kept_out))
        kept = known & (~out | (self._kept_out > self.PATIENCE))
        for window, newest in ((self._changes, changes), (self._spans, self._passed)):
            window[:, kept] = np.vstack([newest, window[:-1]])[:, kept]


def _z(change: Doubles, passed: Doubles, drift: Doubles, scatter: Doubles) -> Doubles:
    z: Doubles = (change - drift * passed) / np.maximum(scatter * np.sqrt(passed), _FLOOR)
    return z
