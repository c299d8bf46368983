"""The result of an estimator: a value with its standard error and its cost, a spectrum, a stability ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Cost:
    """Passes over the data: 1 forward is one loss over all batches.

    A Hessian-vector product through the kept graph of a gradient counts as one backward; it takes about as long as the
    backward of two losses.
    """

    forwards: float = 0.0
    backwards: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forwards + other.forwards, self.backwards + other.backwards)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.forwards - other.forwards, self.backwards - other.backwards)


@dataclass(frozen=True, slots=True)
class Estimate:
    """One estimated quantity with its standard error.

    Attributes:
        value: The estimate.
        stderr: Its standard error, in the unit of `value`; NaN for a single draw.
        draws: Number of independent draws behind the estimate.
        estimator: Name of the estimator: `gnb`, `hutchinson`, `lanczos`, `direction`, ...
        step: The newest optimizer step that the estimate includes.
        residual: For an eigenvalue, ‖Hu − λu‖, which bounds the distance to a true eigenvalue. For a line search, half
            the width of the final bracket.
        method: How derivatives were computed: "autograd", "gradient differences", "loss differences" or "losses".
        cost: Passes over the data that the estimate took.
    """

    value: float
    stderr: float
    draws: int
    estimator: str
    step: int = 0
    residual: float = math.nan
    method: str = ""
    cost: Cost = Cost()


def per_parameter(trace: Estimate, parameters: int) -> Estimate:
    """`trace` divided by the number of parameters: average sharpness."""
    return replace(trace, value=trace.value / parameters, stderr=trace.stderr / parameters)


@dataclass(frozen=True, slots=True)
class Spectrum:
    """A spectral density as weighted atoms, from stochastic Lanczos quadrature.

    Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature" (2017).

    Attributes:
        eigenvalues: Positions of the atoms.
        weights: Weight of each atom; they sum to 1.
        draws: Number of random starts.
    """

    eigenvalues: tuple[float, ...]
    weights: tuple[float, ...]
    draws: int


@dataclass(frozen=True, slots=True)
class StabilityRatio:
    """ρ = Σ dᵀHd / (2 Σ gᵀd) over several probes; 1 is the edge of stability. `stderr` is NaN for a single probe."""

    value: float
    stderr: float
    probes: int


def stability_ratio(curvature: Sequence[float], descent: Sequence[float]) -> StabilityRatio | None:
    """Compute the directional stability ratio, averaging numerators and denominators separately.

    The standard error is the delta method's for a ratio of means (Cochran, "Sampling techniques", section 6.4): with
    residuals r_i = c_i − 2ρ a_i, Var ρ ≈ n/(n−1) Σ r_i² / (2 Σ a_i)².

    Args:
        curvature: dᵀHd of each probe.
        descent: gᵀd of each probe.

    Returns:
        The ratio, or None if the steps do not descend in sum, or there are none.
    """
    count = len(descent)
    # Sums, not a mean of ratios: where a single probe's descent is near zero its own ratio is arbitrarily large.
    whole = 2 * math.fsum(descent)
    if not whole > 0:
        return None
    value = math.fsum(curvature) / whole
    # A single probe has no spread to tell an error from.
    if count < 2:
        return StabilityRatio(value, math.nan, count)
    residuals = (c - 2 * value * a for c, a in zip(curvature, descent, strict=True))
    scatter = math.fsum(residual**2 for residual in residuals) * count / (count - 1)
    return StabilityRatio(value, math.sqrt(scatter) / whole, count)
