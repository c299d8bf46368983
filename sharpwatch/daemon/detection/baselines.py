"""What is normal for a run: robust levels of its signals, and how far each new observation stands above them."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.records import Observation

WINDOW = 100
WARM_UP = 50  # samples of a step signal before it can raise an alert
WARM_UP_PROBES = 10  # of a probe signal, which comes every tenth step or so
SET_ASIDE = 6.0  # z from which a sample stays out of the baseline: a spike must not become normal
# A level that stands for so many samples in a row is the run's new level. It takes several windows, longer than any
# sensible `escalate.after_steps`: trouble that lasts must not end its own alert. After a *raise* of a multiplier the
# shift has a known cause, and one full window at the new level is enough.
PATIENCE = 5 * WINDOW
PATIENCE_AFTER_RAISE = WINDOW
SETTLE = 20  # samples after a change of multipliers that say nothing of the run's own level
# Lowest spread taken for real, in log units; 6 of them are the smallest rise worth an alert however quiet the run:
# 6 % of the loss, a third of a gradient norm or update RMS; for the stability ratio see `detectors.stability_limit`.
LOSS_FLOOR, NORM_FLOOR, RATIO_FLOOR = 0.01, 0.05, 0.25
LEAST_RATIO = 0.05  # ratios below it (also negative ones: negative curvature along the step) are all alike: no danger
_MAD_TO_SD = 1.4826  # of a normal distribution


class Baseline:
    """Median and MAD of the log of the last `WINDOW` ordinary samples of one signal."""

    def __init__(self, floor: float, warm_up: int) -> None:
        self._floor = floor
        self._warm_up = warm_up
        self._window: deque[float] = deque()
        self._sorted: list[float] = []
        self._aside: deque[float] = deque(maxlen=WINDOW)  # in a row, so far above that they stayed out
        self._aside_count = 0

    @property
    def ready(self) -> bool:
        """Whether there are enough samples to judge by."""
        return len(self._window) >= self._warm_up

    def z(self, value: float) -> float | None:
        """How many robust standard deviations `value` stands above the level, in logs; None in warm-up."""
        if not self.ready or not math.isfinite(value) or value <= 0.0:
            return None
        level = self._median()
        return (math.log(value) - level) / max(self._floor, _MAD_TO_SD * self._deviation(level))

    def update(self, value: float, patience: int) -> None:
        """Take `value` in, or set it aside; after `patience` in a row set aside, they are the new level."""
        if not math.isfinite(value) or value <= 0.0:
            return
        z = self.z(value)
        if z is not None and z > SET_ASIDE:
            self._aside.append(math.log(value))
            self._aside_count += 1
            if self._aside_count >= patience:
                self._window = deque(self._aside)
                self._sorted = sorted(self._window)
                self._forget_aside()
            return
        self._forget_aside()
        self._push(math.log(value))

    def _push(self, log: float) -> None:
        if len(self._window) == WINDOW:
            del self._sorted[bisect_left(self._sorted, self._window.popleft())]
        self._window.append(log)
        insort(self._sorted, log)

    def _forget_aside(self) -> None:
        self._aside.clear()
        self._aside_count = 0

    def _median(self) -> float:
        return _middle(self._sorted)

    def _deviation(self, level: float) -> float:
        """The median distance from `level`: the half-width of the shortest interval around it with half the samples.

        Seen from `level`, the low end comes nearer and the high end goes away as the interval moves up the sorted
        samples, so where they cross is found by bisection; sorting the distances at every step costs ten times that.
        """
        ordered, half = self._sorted, len(self._sorted) // 2
        low, high = 0, len(ordered) - half - 1
        while low < high:
            middle = (low + high) // 2
            if ordered[middle + half] - level < level - ordered[middle]:
                low = middle + 1
            else:
                high = middle
        width = max(ordered[low + half] - level, level - ordered[low])
        return min(width, level - ordered[low - 1]) if low else width


def _middle(ordered: list[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


@dataclass(frozen=True, slots=True)
class Scores:
    """One observation with the z of each signal; a signal in warm-up or not measured is absent."""

    observation: Observation
    loss: float | None = None
    gradient_norm: Mapping[str, float] = field(default_factory=dict)
    update_rms: Mapping[str, float] = field(default_factory=dict)
    stability: float | None = None
    block_stability: Mapping[str, float] = field(default_factory=dict)


class History:
    """The baselines of one run and its last scores; made of observations alone, so a replay gives the same."""

    def __init__(self) -> None:
        self.recent: deque[Scores] = deque(maxlen=3)  # newest last
        self.probes: deque[Scores] = deque(maxlen=3)  # those with a stability ratio
        self._loss = Baseline(LOSS_FLOOR, WARM_UP)
        self._gradient_norm: dict[str, Baseline] = {}
        self._update_rms: dict[str, Baseline] = {}
        self._stability = Baseline(RATIO_FLOOR, WARM_UP_PROBES)
        self._block_stability: dict[str, Baseline] = {}
        self._multipliers: Mapping[str, float] = {}
        self._settling = 0
        self._patience = PATIENCE

    def see(self, observation: Observation) -> Scores:
        """Score `observation` against what came before it, then take it in."""
        if self.recent and observation.step <= self.recent[-1].observation.step:
            self._go_back()
        scores = self._score(observation)
        self.recent.append(scores)
        if scores.stability is not None:
            self.probes.append(scores)
        self._note_multipliers(observation.multipliers)
        if self._settling:
            self._settling -= 1
        else:
            self._update(observation)
        return scores

    def _go_back(self) -> None:
        """A rollback: what was last seen belongs to a timeline that was left; the levels before it stand."""
        self.recent.clear()
        self.probes.clear()
        self._settling = SETTLE

    def _score(self, seen: Observation) -> Scores:
        return Scores(
            seen,
            loss=self._loss.z(seen.loss) if seen.loss is not None else None,
            gradient_norm=_each(self._gradient_norm, seen.gradient_norm),
            update_rms=_each(self._update_rms, seen.update_rms),
            stability=self._stability.z(surely(seen.stability)) if seen.stability is not None else None,
            block_stability=_each(self._block_stability, {b: surely(e) for b, e in seen.block_stability.items()}),
        )

    def _update(self, seen: Observation) -> None:
        patience = self._patience
        if seen.loss is not None:
            self._loss.update(seen.loss, patience)
        for baselines, values in ((self._gradient_norm, seen.gradient_norm), (self._update_rms, seen.update_rms)):
            for block, value in values.items():
                baselines.setdefault(block, Baseline(NORM_FLOOR, WARM_UP)).update(value, patience)
        if seen.stability is not None:
            self._stability.update(_ratio(seen.stability.value), patience)
        for block, estimate in seen.block_stability.items():
            baseline = self._block_stability.setdefault(block, Baseline(RATIO_FLOOR, WARM_UP_PROBES))
            baseline.update(_ratio(estimate.value), patience)

    def _note_multipliers(self, now: Mapping[str, float]) -> None:
        before = self._multipliers
        if not now or now == before:
            return
        self._multipliers = now
        changed = [block for block, value in now.items() if value != before.get(block, 1.0)]
        if changed:
            self._settling = SETTLE
            raised = any(now[block] > before.get(block, 1.0) for block in changed)
            self._patience = PATIENCE_AFTER_RAISE if raised else PATIENCE


def surely(ratio: Estimate) -> float:
    """What `ratio` is at least, by one standard error where that is known; small and negative ones are alike."""
    return _ratio(ratio.value - ratio.stderr if math.isfinite(ratio.stderr) else ratio.value)


def _ratio(value: float) -> float:
    return max(value, LEAST_RATIO)


def _each(baselines: Mapping[str, Baseline], values: Mapping[str, float]) -> dict[str, float]:
    scored = {block: baselines[block].z(value) for block, value in values.items() if block in baselines}
    return {block: z for block, z in scored.items() if z is not None}
