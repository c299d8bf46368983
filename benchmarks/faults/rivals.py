"""Detectors in use elsewhere, on the same recordings: each at its own setting.

They see the loss and the norm of all gradients before clipping, as they do in their own projects:

- OLMo: 6 standard deviations above the mean of the last 128 (allenai/OLMo-core, `SkipStepOptimizer`).
- ZClip: z of the gradient norm above 2.5, exponential means with 0.97 (arXiv 2504.02507).
- AdaGC: a gradient norm above 1.05 times its exponential mean with 0.98 (arXiv 2502.11034), as a detector.
- MAD: 8 median absolute deviations above the median of the last 100.
- CUSUM: one-sided, of the loss in standard deviations of samples 100 to 200, slack 0.5, limit 8.
- trainscope: two-sided sums of the loss in median absolute deviations of the last 200, slack 1, limit 6 (the default of
  trainscope 1.8, `ChangePointDetector`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from sharpwatch.daemon.records import Observation

Series = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
_YOUNG = 50  # samples before a rule judges, as sharpwatch's first baselines


def series(observations: Sequence[Observation]) -> tuple[Series, Series]:
    """The loss and the norm of all gradients at each step."""
    loss = [float("nan") if seen.loss is None else seen.loss for seen in observations]
    norms = [
        float("nan")
        if seen.layers is None
        else float(np.sqrt(np.nansum(np.square(seen.layers.gradient_norm, dtype=np.float64))))
        for seen in observations
    ]
    return np.array(loss), np.array(norms)


def olmo(loss: Series, norm: Series, sds: float = 6.0, window: int = 128) -> Flags:
    """Standard deviations above the mean of a window, of either."""
    return _windowed(loss, sds, window, _mean_and_sd) | _windowed(norm, sds, window, _mean_and_sd)


def mad(loss: Series, norm: Series, sds: float = 8.0, window: int = 100) -> Flags:
    """The same by median and median absolute deviation."""
    return _windowed(loss, sds, window, _median_and_mad) | _windowed(norm, sds, window, _median_and_mad)


def zclip(_: Series, norm: Series, sds: float = 2.5, decay: float = 0.97) -> Flags:
    """Z of the gradient norm by exponential means, into which a clipped value goes."""
    flags = np.zeros(len(norm), dtype=bool)
    first = norm[:25]
    mean, variance = float(np.nanmean(first)), float(np.nanvar(first))
    for i, value in enumerate(norm[25:], 25):
        sd = max(np.sqrt(variance), 1e-12)
        flags[i] = not value <= mean + sds * sd
        kept = min(value, mean + sds * sd) if np.isfinite(value) else mean
        variance = decay * variance + (1 - decay) * (kept - mean) ** 2
        mean = decay * mean + (1 - decay) * kept
    return flags


def adagc(_: Series, norm: Series, times: float = 1.05, decay: float = 0.98) -> Flags:
    """A gradient norm that would be clipped to a multiple of its exponential mean."""
    flags = np.zeros(len(norm), dtype=bool)
    mean = float(np.nanmean(norm[:_YOUNG]))
    for i, value in enumerate(norm[_YOUNG:], _YOUNG):
        flags[i] = not value <= times * mean
        mean = decay * mean + (1 - decay) * (min(value, times * mean) if np.isfinite(value) else mean)
    return flags


def cusum(loss: Series, _: Series, limit: float = 8.0, slack: float = 0.5) -> Flags:
    """Sums of standardised losses above their start, which begin anew after an alarm."""
    start = loss[100:200] if len(loss) > 200 else loss[: len(loss) // 2]
    mean, sd = float(np.nanmean(start)), max(float(np.nanstd(start)), 1e-12)
    flags, total = np.zeros(len(loss), dtype=bool), 0.0
    for i, value in enumerate(loss):
        if i < 200:
            continue
        z = (value - mean) / sd if np.isfinite(value) else np.inf
        total = max(0.0, total + z - slack)
        if total > limit:
            flags[i], total = True, 0.0
    return flags


def trainscope(loss: Series, _: Series, limit: float = 6.0, slack: float = 1.0) -> Flags:
    """Page's sums of both signs about a running median; both begin anew after an alarm."""
    flags, up, down = np.zeros(len(loss), dtype=bool), 0.0, 0.0
    for i in range(30, len(loss)):
        level, spread = _median_and_mad(loss[max(0, i - 200) : i])
        z = (loss[i] - level) / max(spread, 1e-12) if np.isfinite(loss[i]) else np.inf
        up, down = max(0.0, up + z - slack), min(0.0, down + z + slack)
        if up >= limit or -down >= limit:
            flags[i], up, down = True, 0.0, 0.0
    return flags


Rule = Callable[[Series, Series, float], Flags]
# By name: the rule, its own setting, and settings up to which it is made less sensitive for equal false alarms.
RIVALS: dict[str, tuple[Rule, float, tuple[float, ...]]] = {
    "OLMo": (olmo, 6.0, (8, 10, 12, 15, 20, 30, 50)),
    "ZClip": (zclip, 2.5, (4, 6, 8, 10, 12, 15, 20, 30, 50)),
    "AdaGC": (adagc, 1.05, (1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20)),
    "MAD": (mad, 8.0, (10, 12, 15, 20, 30, 50, 80)),
    "CUSUM": (cusum, 8.0, (12, 16, 24, 32, 48, 64, 100)),
    "trainscope": (trainscope, 6.0, (8, 12, 16, 24, 32, 48, 64, 100)),
}


def _windowed(values: Series, sds: float, window: int, of: Callable[[Series], tuple[float, float]]) -> Flags:
    flags = np.zeros(len(values), dtype=bool)
    for i in range(_YOUNG, len(values)):
        level, spread = of(values[max(0, i - window) : i])
        flags[i] = not values[i] <= level + sds * max(spread, 1e-12)
    return flags


def _mean_and_sd(values: Series) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    return (float(known.mean()), float(known.std())) if len(known) else (np.nan, np.nan)


def _median_and_mad(values: Series) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    if not len(known):
        return np.nan, np.nan
    median = float(np.median(known))
    return median, 1.4826 * float(np.median(np.abs(known - median)))
