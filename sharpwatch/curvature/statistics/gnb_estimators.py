"""What a window of gnb probes says: traces and top eigenvalues with their errors, batched over windows.

A window W is one block of one run: P probes of D draws each, padded; `mask` says which draws are there. All windows go
through each call together, on whatever device their tensors are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MIN_PROBES = 4  # from so many on, the scatter of probes says more than that of draws
# Of 400 windows of a flat spectrum, for m = 4, 8, 32 and 128 each, the top eigenvalue stood at 0.96 to 0.98 of the edge
# on average and in none above 1.25 of it. A power law's bulk reaches further: λ_i ~ 1/√i has it at 1.16 (m = 128).
_EDGE_MARGIN = 1.25


@dataclass(frozen=True, slots=True, eq=False)
class TraceEstimates:
    """Float64 [W] values and standard errors (NaN where nothing scatters), int64 [W] draws."""

    value: Tensor
    stderr: Tensor
    draws: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TopEigenvalues:
    """Float64 [W] values and standard errors (NaN for a single draw), int64 [W] draws.

    `upper_bound` bool [W]: the eigenvalue doesn't stand clear of what finite windows make of the rest of the spectrum,
    or not of the second one; the true one is then likely to be smaller.
    """

    value: Tensor
    stderr: Tensor
    draws: Tensor
    upper_bound: Tensor


def trace_estimates(traces: Tensor, mask: Tensor) -> TraceEstimates:
    """The mean over probes of each probe's mean, from `traces` [W, P, D] (float64) and `mask` [W, P, D].

    The error is that of the probes' scatter, which covers data and draws, where there are 4 probes or more. Else it is
    the larger of that and the error from the draws' scatter within probes: the first is too uncertain (at 2 probes its
    median is 0.67 of the truth), the second leaves the data out.
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
    """The largest eigenvalue of G from `sketches` [W, P, D, k] of its √N-scaled gradients, and `mask` [W, P, D].

    What m draws and k buckets make of the rest of the spectrum is taken off by `_without_bias`. Where neighbours stand
    near, that takes off about half of what it should if they are equal (a top one of equals is the luckiest, not a
    spike among noise), so what neighbours alone took off goes into the error.

    The error joins it with the scatter of the squared projections on the top direction (at least the √(2/m) of
    Gaussian ones, for it is uncertain itself) and the sketch's own √(2/k), which no window can average out.
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
    # Each draw's share of the top: their mean is `top`.
    projections = (top * draws)[:, None] * vectors[:, :, -1].square()
    scatter = _projection_error(projections.view(windows, probes, per_probe), mask)
    gaussian = value * (2 / draws).sqrt()
    variance = torch.fmax(scatter, gaussian).square() + value.square() * 2 / size + neighbours.square()
    stderr = torch.where(draws < 2, torch.nan, variance.sqrt())
    edge = rest * (1 / draws.sqrt() + size**-0.5).square()
    upper_bound = (top <= _EDGE_MARGIN * edge) | (top - second <= stderr) | (draws < 2)
    return TopEigenvalues(value, stderr, draws, upper_bound)


def _debiased_top(values: Tensor, draws: Tensor, size: int) -> Tensor:
    """λ [W] of the top of each window's ascending eigenvalues l [W, n], of which all but `draws` are padding.

    With a = Σ l_1/(l_1 − l_j)/(m − 1) over the other draws and b the same over the k − 1 other dimensions of the
    sketch, λ = l_1/(ab): a spike's size from where it stands among noise (Benaych-Georges and Nadakuditi 2012, "The
    singular values and vectors of low rank perturbations of large rectangular random matrices"), exact for a spike
    alone. It falls to nothing as the top meets the next one; T/√(mk), T the rest's trace, is the largest that could
    hide below the edge T(1/√m + 1/√k)².
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
    """λ [W] with l = (λ + T/m)(λ + T/k)/λ, as it were if the `rest` T of the trace were spread thinly."""
    linear = top - rest * (1 / draws + 1 / size)
    root = (linear.square() - 4 * rest.square() / (draws * size)).clamp(min=0).sqrt()
    return (linear + root) / 2


def _projection_error(projections: Tensor, mask: Tensor) -> Tensor:
    """Standard error [W] of the mean of `projections` [W, P, D], by probes where there are enough, else by draws."""
    counts = mask.sum(2)
    probes = (counts > 0).sum(1)
    by_probe = _standard_deviation((projections * mask).sum(2) / counts, counts > 0) / probes.sqrt()
    by_draw = _standard_deviation(projections.flatten(1), mask.flatten(1)) / mask.sum((1, 2)).sqrt()
    return torch.where(probes >= _MIN_PROBES, by_probe, by_draw)


def _standard_deviation(values: Tensor, present: Tensor) -> Tensor:
    """Standard deviation [W] of those of `values` [W, n] that are `present`; NaN for fewer than two."""
    count = present.sum(1)
    kept = torch.where(present, values, 0.0)
    mean = kept.sum(1) / count
    squares = torch.where(present, values - mean[:, None], 0.0).square().sum(1)
    return (squares / _positive_or_nan(count - 1)).sqrt()


def _positive_or_nan(count: Tensor) -> Tensor:
    """`count` as a divisor, NaN where it is not above zero."""
    return torch.where(count > 0, count.double(), torch.nan)
