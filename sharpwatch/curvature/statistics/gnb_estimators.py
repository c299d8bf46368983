"""Trace and top eigenvalue of the Gauss-Newton matrix with standard errors, from windows of `gnb` probes.

A window is one block of one run: P probes of D draws each. Windows are padded to a common shape, and `mask` marks the
draws that exist. All W windows go through each call as one batch, on the device of their tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MIN_PROBES = 4  # from 4 probes on, their spread is a better error estimate than the spread of the draws
# For a flat spectrum and m = 4, 8, 32, 128 draws (400 windows each), the top sample eigenvalue was 0.96 to 0.98 of the
# bulk edge on average and never above 1.25 of it. With eigenvalues λ_i ~ 1/√i it reaches 1.16 on average (m = 128).
_EDGE_MARGIN = 1.25


@dataclass(frozen=True, slots=True, eq=False)
class TraceEstimates:
    """Traces of W windows.

    Attributes:
        value: Float64 [W].
        stderr: Float64 [W]; NaN for a single draw.
        draws: Int64 [W].
    """

    value: Tensor
    stderr: Tensor
    draws: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TopEigenvalues:
    """Largest eigenvalues of W windows.

    Attributes:
        value: Float64 [W].
        stderr: Float64 [W]; NaN for a single draw.
        draws: Int64 [W].
        upper_bound: Bool [W]: the eigenvalue is not clearly above the bulk edge of a finite window, or not clearly
            above the second one. The true eigenvalue is then likely smaller.
    """

    value: Tensor
    stderr: Tensor
    draws: Tensor
    upper_bound: Tensor


def trace_estimates(traces: Tensor, mask: Tensor) -> TraceEstimates:
    """Estimate traces as the mean over probes of each probe's mean draw.

    With 4 or more probes the standard error comes from the spread of the probes, which covers both data and draws. With
    fewer, that spread is too uncertain (with 2 probes its median is 0.67 of the truth), and the spread of draws within
    probes ignores the data. So the larger of the two is used.

    Args:
        traces: Float64 [W, P, D], one trace for each draw.
        mask: Bool [W, P, D], True where a draw exists.

    Returns:
        The W traces.
    """
    draws = mask.sum(2)
    probes = (draws > 0).sum(1)
    means = torch.where(mask, traces, 0.0).sum(2) / draws
    value = torch.where(draws > 0, means, 0.0).sum(1) / probes
    between = _standard_deviation(means, draws > 0) / probes.sqrt()
    residuals = torch.where(mask, traces - means[:, :, None], 0.0)
    variance = residuals.square().sum((1, 2)) / _positive_or_nan(draws.sum(1) - probes)
    shares = torch.where(draws > 0, 1 / draws, 0.0).sum(1)
    within = (variance * shares).sqrt() / probes
    stderr = torch.where(probes >= _MIN_PROBES, between, torch.fmax(between, within))
    return TraceEstimates(value, stderr, draws.sum(1))


def top_eigenvalues(sketches: Tensor, mask: Tensor) -> TopEigenvalues:
    """Estimate the largest eigenvalue of G from sketched gradients.

    The bias that m draws and k sketch buckets add is removed by `_debiased_top`. If the next eigenvalues are close,
    that removes about half of the bias in case they are equal (the largest of equals is the luckiest one, not a spike
    above noise). So the part removed because of close neighbours is added to the error.

    The error combines this with the spread of the squared projections on the top direction (at least √(2/m), its value
    for Gaussian projections, since the spread is uncertain itself) and the sketch's own √(2/k), which no window
    averages out.

    Args:
        sketches: Float [W, P, D, k], sketches of √N-scaled gradients.
        mask: Bool [W, P, D], True where a draw exists.

    Returns:
        The W eigenvalues.
    """
    windows, probes, per_probe, size = sketches.shape
    present = mask.flatten(1)
    draws = present.sum(1)
    rows = torch.where(present[..., None], sketches.flatten(1, 2).float(), 0.0)
    values, vectors = torch.linalg.eigh((rows @ rows.mT).double() / draws[:, None, None])
    top, trace = values[:, -1], values.sum(1)
    second = values[:, -2] if values.shape[1] > 1 else torch.zeros_like(top)
    value = _debiased_top(values.clamp(min=0), draws, size)
    rest = (trace - value).clamp(min=0)
    neighbours = (_debiased_isolated_top(top, rest, draws, size) - value).clamp(min=0)
    # Squared projection of each draw on the top direction: their mean is `top`.
    projections = (top * draws)[:, None] * vectors[:, :, -1].square()
    scatter = _projection_error(projections.view(windows, probes, per_probe), mask)
    gaussian = value * (2 / draws).sqrt()
    variance = torch.fmax(scatter, gaussian).square() + value.square() * 2 / size + neighbours.square()
    stderr = torch.where(draws < 2, torch.nan, variance.sqrt())
    edge = rest * (1 / draws.sqrt() + size**-0.5).square()
    upper_bound = (top <= _EDGE_MARGIN * edge) | (top - second <= stderr) | (draws < 2)
    return TopEigenvalues(value, stderr, draws, upper_bound)


def _debiased_top(values: Tensor, draws: Tensor, size: int) -> Tensor:
    """Largest eigenvalue λ [W] of each window, from its ascending sample eigenvalues l.

    Let a = Σ_j l_1/(l_1 − l_j)/(m − 1) over the other draws, and b the same over the other k − 1 sketch dimensions.
    Then λ = l_1/(ab): the size of a spike, given where it stands relative to the noise (Benaych-Georges and Nadakuditi,
    "The singular values and vectors of low rank perturbations of large rectangular random matrices", 2012). It is exact
    for a single spike. It goes to zero as the top approaches the next eigenvalue, so it is floored at T/√(mk), with T
    the trace of the rest: the largest spike that could hide below the edge T(1/√m + 1/√k)².

    Args:
        values: Float64 [W, n], ascending, zero-padded at the front.
        draws: Int64 [W], number m of eigenvalues that are not padding.
        size: Number k of sketch buckets.

    Returns:
        Float64 [W].
    """
    top = values[:, -1]
    padding = values.shape[1] - draws
    repelled = (top[:, None] / (top[:, None] - values[:, :-1])).sum(1) - padding
    by_draws = torch.where(draws > 1, repelled / (draws - 1), 1.0)
    by_buckets = (size - draws + repelled) / (size - 1)
    value = torch.where(top > 0, top / (by_draws * by_buckets), 0.0)
    rest = (values.sum(1) - value).clamp(min=0)
    return torch.maximum(value, torch.where(draws > 1, rest / (draws * size).sqrt(), 0.0))


def _debiased_isolated_top(top: Tensor, rest: Tensor, draws: Tensor, size: int) -> Tensor:
    """Solve l = (λ + T/m)(λ + T/k)/λ for λ [W]: the spike if the `rest` T of the trace were spread thinly."""
    linear = top - rest * (1 / draws + 1 / size)
    root = (linear.square() - 4 * rest.square() / (draws * size)).clamp(min=0).sqrt()
    return (linear + root) / 2


def _projection_error(projections: Tensor, mask: Tensor) -> Tensor:
    """Standard error [W] of the mean of `projections` [W, P, D]: over probes if there are enough, else over draws."""
    counts = mask.sum(2)
    probes = (counts > 0).sum(1)
    by_probe = _standard_deviation((projections * mask).sum(2) / counts, counts > 0) / probes.sqrt()
    by_draw = _standard_deviation(projections.flatten(1), mask.flatten(1)) / mask.sum((1, 2)).sqrt()
    return torch.where(probes >= _MIN_PROBES, by_probe, by_draw)


def _standard_deviation(values: Tensor, present: Tensor) -> Tensor:
    """Standard deviation [W] of the `present` entries of `values` [W, n]; NaN for fewer than two."""
    count = present.sum(1)
    kept = torch.where(present, values, 0.0)
    mean = kept.sum(1) / count
    squares = torch.where(present, values - mean[:, None], 0.0).square().sum(1)
    return (squares / _positive_or_nan(count - 1)).sqrt()


def _positive_or_nan(count: Tensor) -> Tensor:
    """`count` as a divisor: NaN where it is not positive."""
    return torch.where(count > 0, count.double(), torch.nan)
