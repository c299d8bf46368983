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
class Ratio:
    """A ratio of sums over several probes; `stderr` is NaN for a single one."""

    value: float
    stderr: float
    probes: int


def stability_ratio(curvature: Sequence[float], descent: Sequence[float]) -> Ratio | None:
    """Compute the directional stability ratio ρ = Σ dᵀHd / (2 Σ gᵀd); 1 is the edge of stability.

    Args:
        curvature: dᵀHd of each probe.
        descent: gᵀd of each probe.

    Returns:
        The ratio, or None if the steps do not descend in sum, or there are none.
    """
    return ratio_of_sums(curvature, [2 * one for one in descent])


def ratio_of_sums(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio | None:
    """Divide sums over several probes.

    The standard error is the delta method's for a ratio of means (Cochran, "Sampling techniques", section 6.4): with
    residuals r_i = a_i − ρ b_i, Var ρ ≈ n/(n−1) Σ r_i² / (Σ b_i)².

    Args:
        numerators: Of each probe.
        denominators: Of each probe.

    Returns:
        The ratio, or None if the denominators' sum is not positive, or a sum or an error is beyond what a float holds.
    """
    count = len(denominators)
    try:
        # Sums, not a mean of ratios: where a single probe's denominator is near zero its ratio is arbitrarily large.
        whole, above = math.fsum(denominators), math.fsum(numerators)
    except (OverflowError, ValueError):  # ValueError: of opposite infinities
        return None
    if not whole > 0:
        return None
    value = above / whole
    # A single probe has no spread to tell an error from.
    if count < 2:
        return Ratio(value, math.nan, count) if math.isfinite(value) else None
    # `hypot` does not square, so that it has no overflow below its result's.
    scatter = math.hypot(*(a - value * b for a, b in zip(numerators, denominators, strict=True)))
    stderr = scatter * math.sqrt(count / (count - 1)) / whole
    return Ratio(value, stderr, count) if math.isfinite(stderr) else None
