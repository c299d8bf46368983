"""Pools draws from several batches or probes into traces with standard errors, and picks the block to draw from next.

`measure` pools lists of one block. The daemon pools windows: one block of one run, P probes of D draws each. They are
padded to a common shape, and `mask` marks the draws that exist. All W windows go through each call as one batch, on the
device of their tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_EXTRA_DRAWS = 4  # with 2, the true errors after 14 to 28 draws were 1.1 to 1.2 times the stated ones (90 seeds)
_MIN_BATCHES = 4  # from 4 batches on, their spread is a better error estimate than the spread of the draws
MIN_PROBES = 4  # likewise for the probes of a window


@dataclass(frozen=True, slots=True)
class PooledEstimate:
    """The weighted mean of draws over batches.

    Attributes:
        value: The mean.
        stderr: Its standard error; NaN for a single draw.
        batch_stderr: The part of `stderr` that comes from the spread of the batches; more draws do not reduce it.
        draws: Number of draws on each batch.
    """

    value: float
    stderr: float
    batch_stderr: float
    draws: int

    @property
    def stopping_stderr(self) -> float:
        """The standard error to compare with a requested precision; infinite for too few draws.

        A sequential rule that stops at the first small enough error stops too early, at an error that is small by
        chance. A constant number of extra draws compensates for that, whatever their variance (Simons, "On the cost of
        not knowing the variance when making a fixed-width confidence interval for the mean", 1968). So this is `stderr`
        with `_EXTRA_DRAWS` draws fewer.
        """
        fewer = self.draws - 1 - _EXTRA_DRAWS
        return self.stderr * math.sqrt((self.draws - 1) / fewer) if fewer > 0 else math.inf


def pool_draws(draws: Sequence[Sequence[float]], shares: Sequence[float], common: float = 0.0) -> PooledEstimate:
    """Compute Σ_i w_i mean_j x_ij over batches i and draws j, with its standard error.

    With 4 or more batches the error comes from the spread of the batches, which includes the spread of their draws.
    With fewer batches that spread is too uncertain, and the spread of the draws ignores the data, so the larger of the
    two is used.

    Args:
        draws: Values x, as [draws][batches].
        shares: Weight w_i of each batch; they sum to 1.
        common: Standard error of an offset that all draws share.

    Returns:
        The pooled estimate.
    """
    values = torch.tensor(draws, dtype=torch.float64, device="cpu")
    weights = torch.tensor(shares, dtype=torch.float64, device="cpu")
    count, batches = values.shape
    means = values.mean(0)
    value = float((means * weights).sum())
    # Draw j of every batch together make draw j of the pooled value.
    within = float((values * weights).sum(1).std() / math.sqrt(count)) if count > 1 else math.nan
    if batches == 1:
        return PooledEstimate(value, math.hypot(within, common), 0.0, count)
    between = weighted_mean_stderr(means.tolist(), shares)
    # `not between < within` rather than `>=`: with a single draw `within` is NaN, and `between` counts.
    stderr = between if batches >= _MIN_BATCHES or not between < within else within
    # By chance batches may spread less than their draws say.
    batch_stderr = math.sqrt(max(0.0, between**2 - within**2)) if count > 1 else 0.0
    return PooledEstimate(value, math.hypot(stderr if count > 1 else math.nan, common), batch_stderr, count)


def weighted_mean_stderr(values: Sequence[float], shares: Sequence[float]) -> float:
    """Standard error of Σ_i w_i x_i from the spread of the x_i; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    mean = math.fsum(w * x for w, x in zip(shares, values, strict=True))
    squares = math.fsum((w * (x - mean)) ** 2 for w, x in zip(shares, values, strict=True))
    return math.sqrt(squares * len(values) / (len(values) - 1))


def relative_error(value: float, stderr: float) -> float:
    """`stderr` / |`value`|: infinite if either is not finite or only `value` is 0, and 0 if `stderr` is 0."""
    if not (math.isfinite(stderr) and math.isfinite(value)):
        return math.inf
    if stderr == 0:
        return 0.0
    return stderr / abs(value) if value != 0 else math.inf


def least_precise(relative_errors: Mapping[str, float]) -> str:
    """Pick the name with the largest relative error; the first one if several are equal.

    Args:
        relative_errors: Relative standard error by name; NaN counts as infinite, as for a block not measured yet.

    Returns:
        The name.

    Raises:
        ValueError: `relative_errors` is empty.
    """
    return max(
        relative_errors, key=lambda name: math.inf if math.isnan(relative_errors[name]) else relative_errors[name]
    )


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
    # Padding may be NaN, which times zero is NaN again, so it is replaced and not multiplied.
    means = torch.where(mask, traces, 0.0).sum(2) / draws
    value = torch.where(draws > 0, means, 0.0).sum(1) / probes
    between = standard_deviation(means, draws > 0) / probes.sqrt()
    residuals = torch.where(mask, traces - means[:, :, None], 0.0)
    variance = residuals.square().sum((1, 2)) / _positive_or_nan(draws.sum(1) - probes)
    shares = torch.where(draws > 0, 1 / draws, 0.0).sum(1)
    within = (variance * shares).sqrt() / probes
    stderr = torch.where(probes >= MIN_PROBES, between, torch.fmax(between, within))
    return TraceEstimates(value, stderr, draws.sum(1))


def standard_deviation(values: Tensor, present: Tensor) -> Tensor:
    """Standard deviation [W] of the `present` entries of `values` [W, n]; NaN for fewer than two."""
    count = present.sum(1)
    kept = torch.where(present, values, 0.0)
    mean = kept.sum(1) / count
    squares = torch.where(present, values - mean[:, None], 0.0).square().sum(1)
    return (squares / _positive_or_nan(count - 1)).sqrt()


def _positive_or_nan(count: Tensor) -> Tensor:
    """`count` as a divisor: NaN where it is not positive."""
    return torch.where(count > 0, count.double(), torch.nan)
