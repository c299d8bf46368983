"""A value is nothing without its error, nor without what it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cost:
    """Passes over the data. A product through a kept graph of the gradient is one backward, about twice a loss's."""

    forwards: float = 0.0
    backwards: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forwards + other.forwards, self.backwards + other.backwards)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.forwards - other.forwards, self.backwards - other.backwards)


@dataclass(frozen=True, slots=True)
class Estimate:
    """One estimated quantity.

    `value`, `stderr` and `residual` share their unit; `draws` is the number of independent draws behind them;
    `estimator` says what was estimated how (`gnb`, `hutchinson`, `lanczos`, `direction`, ...); `step` is the newest
    optimizer step in it. `residual` is ‖Hu − λu‖ of an eigenvalue, which bounds its distance to a true one, or half the
    bracket of a line search. `method` is how the derivatives were got: "autograd", "gradient differences",
    "loss differences" or "losses".
    """

    value: float
    stderr: float
    draws: int
    estimator: str
    step: int = 0
    residual: float = math.nan
    method: str = ""
    cost: Cost = Cost()


@dataclass(frozen=True, slots=True)
class Spectrum:
    """A spectral density as atoms: `weights` (their sum is 1) at `eigenvalues`, by stochastic Lanczos quadrature.

    Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature" (2017).
    """

    eigenvalues: tuple[float, ...]
    weights: tuple[float, ...]
    draws: int


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
