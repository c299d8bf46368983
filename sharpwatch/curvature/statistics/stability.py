"""The directional stability ratio of several probes: numerators and denominators are averaged apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StabilityRatio:
    """ρ = Σ dᵀHd / (2 Σ gᵀd); 1 is the edge. `stderr` is NaN for a single probe, which has no scatter."""

    value: float
    stderr: float
    probes: int


def stability_ratio(curvature: Sequence[float], descent: Sequence[float]) -> StabilityRatio | None:
    """The ratio of probes with these dᵀHd and gᵀd, or None where the steps, summed, do not descend (or there are none).

    The error is the delta method's for a ratio of means (Cochran, "Sampling techniques", section 6.4): with
    residuals r_i = c_i − 2ρ a_i, Var ρ ≈ n/(n−1) Σ r_i² / (2 Σ a_i)².
    """
    count = len(descent)
    whole = 2 * math.fsum(descent)
    if not whole > 0:
        return None
    value = math.fsum(curvature) / whole
    if count < 2:
        return StabilityRatio(value, math.nan, count)
    residuals = (c - 2 * value * a for c, a in zip(curvature, descent, strict=True))
    scatter = math.fsum(residual**2 for residual in residuals) * count / (count - 1)
    return StabilityRatio(value, math.sqrt(scatter) / whole, count)
