"""The growth of attention logits: each layer's scale, probe by probe, against the layer's own past.

Scales of attention grow in healthy runs too, fastest at the start. What counts is growth that is faster than the run's
own growth and scatter predict, and that goes on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sharpwatch.daemon.detection.baselines import MEAN_TO_SD
from sharpwatch.daemon.detection.state import Arrays, gathered, put_back
from sharpwatch.wire import Doubles, Floats

_FLOOR = 0.005  # smallest standard deviation of a log scale's change taken for real


@dataclass(frozen=True, slots=True)
class AttentionScores:
    """How the scales of a probe stand, by layer block [L]; NaN where nothing is known.

    Attributes:
        change: z of the change of the log scale since the probe before.
        rise: How much the log scale has risen since before the growth began; NaN unless two of the newest three
            changes stand out, this one among them, and no single change made most of the rise.
        excess: The part of that rise that is beyond the drift.
        z: Of the excess.
        onset: The step of the probe before the growth began.
    """

    change: Doubles
    rise: Doubles
    excess: Doubles
    z: Doubles
    onset: Doubles


class AttentionTrend:
    """The changes of log scales from probe to probe, as a drift and a scatter of the run's own.

    A log scale s is taken for a random walk with drift, whose steps are as large as their learning rates η: a change
    Δs has mean m·τ and variance σ²·q, with τ = Ση and q = Ση² over the steps passed. So neither a schedule of the rates
    nor the probes' pace is news. m is the median of Δs/τ over the newest probes, and σ comes from the mean distance
    from it. The variance of a change to come has that of the median too: σ²·(q + π/2·τ²·Q/T²), where T and Q are the
    sums of τ and q over these probes.

    Args:
        columns: The number L of layer blocks.
    """

    WINDOW = 10  # changes that drift and scatter are made of: before there are so many, nothing is judged
    STANDS_OUT = 1.5  # z of a change; of the whole rise more is asked
    AT_ONCE = 0.75  # share of a rise that one change may have made: a jump is no growth
    PATIENCE = 10  # changes in a row that are kept out of the window; then it is how the scale grows now
    _STATE = (
        *("_changes", "_taus", "_squares", "_last", "_tau", "_square", "_far"),
        *("_from", "_tau_since", "_square_since", "_largest", "_onset", "_kept_out", "_step"),
    )

    def __init__(self, columns: int) -> None:
        self._changes = np.full((self.WINDOW, columns), np.nan)  # newest first, as all that follows
        self._taus = np.full((self.WINDOW, columns), np.nan)
        self._squares = np.full((self.WINDOW, columns), np.nan)
        self._last: Doubles = np.full(columns, np.nan)  # log scale at the newest probe
        self._tau, self._square = np.zeros(columns), np.zeros(columns)  # τ and q since then
        self._far = np.zeros((3, columns), dtype=bool)  # whether the changes of the newest probes stand out
        self._from: Doubles = np.full(columns, np.nan)  # log scale before the growth that goes on
        self._tau_since, self._square_since = np.zeros(columns), np.zeros(columns)  # τ and q since then
        self._largest = np.zeros(columns)  # change since then
        self._onset: Doubles = np.full(columns, np.nan)
        self._kept_out = np.zeros(columns, dtype=np.int64)
        self._step = -1  # of the newest probe

    def step(self, rates: Floats) -> None:
        """A step is taken at the learning rates [L]."""
        known = rates.astype(np.float64)
        known[np.isnan(known)] = 0.0
        self._tau = self._tau + known
        self._square = self._square + known**2

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
            changes = np.where(self._tau > 0, logs - self._last, np.nan)
            _, change = self._judged(changes, self._tau, self._square)
            far = change > self.STANDS_OUT
            quiet = ~self._far.any(axis=0)
            self._from = np.where(quiet, self._last, self._from)
            self._onset = np.where(quiet, float(self._step), self._onset)
            self._tau_since = np.where(quiet, 0.0, self._tau_since) + self._tau
            self._square_since = np.where(quiet, 0.0, self._square_since) + self._square
            self._largest = np.fmax(np.where(quiet, 0.0, self._largest), changes)
            self._far = np.vstack([far, self._far[:-1]])
            rise = logs - self._from
            rise[~far | (self._far.sum(axis=0) < 2) | (self._largest > self.AT_ONCE * rise)] = np.nan
            excess, z = self._judged(rise, self._tau_since, self._square_since)
        self._keep(changes, far | keep_out)
        known = ~np.isnan(logs)
        self._last = np.where(known, logs, self._last)
        self._tau, self._square = np.where(known, 0.0, self._tau), np.where(known, 0.0, self._square)
        self._step = step
        return AttentionScores(change, rise, excess, z, self._onset)

    def state(self) -> Arrays:
        """All that `load_state` needs to go on."""
        return gathered(self, self._STATE, "attention")

    def load_state(self, arrays: Arrays) -> None:
        """Go on from `state`; raises `ValueError` for one of other layer blocks."""
        put_back(self, self._STATE, arrays, "attention")

    def _judged(self, change: Doubles, tau: Doubles, square: Doubles) -> tuple[Doubles, Doubles]:
        """A change [L] over τ and q beyond the drift, and its z; NaN before there are enough changes."""
        drift = np.median(self._changes / self._taus, axis=0)
        scatter = MEAN_TO_SD * (np.abs(self._changes - drift * self._taus) / np.sqrt(self._squares)).mean(axis=0)
        of_drift = math.pi / 2 * self._squares.sum(axis=0) / self._taus.sum(axis=0) ** 2
        excess = change - drift * tau
        return excess, excess / np.maximum(scatter * np.sqrt(square + of_drift * tau**2), _FLOOR)

    def _keep(self, changes: Doubles, out: np.ndarray) -> None:
        known = ~np.isnan(changes)
        self._kept_out = np.where(known & out, self._kept_out + 1, np.where(known, 0, self._kept_out))
        kept = known & (~out | (self._kept_out > self.PATIENCE))
        for window, newest in (
            (self._changes, changes),
            (self._taus, self._tau),
            (self._squares, self._square),
        ):
            window[:, kept] = np.vstack([newest, window[:-1]])[:, kept]
