"""λ_max of the Gauss-Newton matrix G, its effective rank, drift and alignment, from windows of sketched `gnb` draws.

The λ_max of the Hessian is in `estimators.lanczos`. `pooling` says what a window and its mask are.

Effective rank, drift and alignment come from moments of pairs of probes; no eigenvector is needed. Let draws of probes
p ≠ q have E gg' = G_p and G_q, and sketches s of k numbers. Then

    E <s_p, s_q>² = (1 + 1/k) Tr(G_p G_q) + Tr G_p Tr G_q / k,
    E |s_p|² |s_q|² = Tr G_p Tr G_q + (2/k) Tr(G_p G_q),

by the variance in sketch.py and the analogous covariance of two squared norms. (The terms of single rows are left out:
one part in the number of rows of the block.) Solving them gives the traces of products. Only pairs of different probes
are used: two draws of one probe share its rows, so the structure of those few rows would count as structure of G. The
window's G is therefore the average over the data and the steps of the window, and the mean over pairs is unbiased for
Tr G² (Hoeffding's U-statistics).

The jackknife over probes removes the first-order bias and gives standard errors (Arvesen, "Jackknifing U-statistics",
1969). The error of the sketch, which no window averages out, is added. By chance an estimate can leave the range of its
quantity; it is not clipped, since clipping would bias the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sharpwatch.curvature.statistics.pooling import MIN_PROBES, standard_deviation

# For a flat spectrum and m = 4, 8, 32, 128 draws (400 windows each), the top sample eigenvalue was 0.96 to 0.98 of the
# bulk edge on average and never above 1.25 of it. With eigenvalues λ_i ~ 1/√i it reaches 1.16 on average (m = 128).
_EDGE_MARGIN = 1.25
_MIN_JACKKNIFE_PROBES = 4  # for a jackknife; with 3 probes the standard error has a relative error of one half


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
    # Padding becomes rows of zeros: they add eigenvalues of zero, which `_debiased_top` leaves out.
    rows = torch.where(present[..., None], sketches.flatten(1, 2).float(), 0.0)
    # The Gram matrix of m draws has the eigenvalues of the sketched G, k × k, that are not zero, and is smaller.
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
    # `fmax` passes over NaN, which the scatter of too few draws is.
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
    # A zero of the padding adds top/(top − 0) = 1 to the sum.
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
    by_probe = standard_deviation((projections * mask).sum(2) / counts, counts > 0) / probes.sqrt()
    by_draw = standard_deviation(projections.flatten(1), mask.flatten(1)) / mask.sum((1, 2)).sqrt()
    return torch.where(probes >= MIN_PROBES, by_probe, by_draw)


@dataclass(frozen=True, slots=True, eq=False)
class SketchMoments:
    """Float64 moments of W windows of P probes each.

    Attributes:
        size: Numbers in each sketch.
        traces: [W, P], Tr G_p of each probe.
        products: [W, P, P], Tr(G_p G_q) of each pair; the diagonal has no meaning.
        projections: [W, P, P], g_p'G_q g_p / |g_p|² for the mean gradient g_p of probe p's step; the diagonal has no
            meaning.
        present: Bool [W, P], True where the probe has draws.
        has_gradient: Bool [W, P], True where the probe has draws and a gradient.
    """

    size: int
    traces: Tensor
    products: Tensor
    projections: Tensor
    present: Tensor
    has_gradient: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class WindowValues:
    """Float64 [W] values and standard errors; both NaN where a window does not resolve the quantity."""

    value: Tensor
    stderr: Tensor


def sketch_moments(sketches: Tensor, mask: Tensor, gradients: Tensor | None = None) -> SketchMoments:
    """Compute the moments of W windows.

    Args:
        sketches: Float [W, P, D, k], sketched draws.
        mask: Bool [W, P, D], True where a draw exists.
        gradients: Float [W, P, k], sketches of the mean gradient of each probe's step, of any positive scale; zeros
            where there is none.

    Returns:
        The moments.
    """
    windows, probes, per_probe, size = sketches.shape
    draws = mask.sum(2)
    rows = torch.where(mask[..., None], sketches.float(), 0.0).flatten(1, 2)
    gram = (rows @ rows.mT).double()
    traces = gram.diagonal(dim1=1, dim2=2).view(windows, probes, per_probe).sum(2) / draws.clamp(min=1)
    counts = (draws[:, :, None] * draws[:, None]).clamp(min=1)
    squares = gram.square().view(windows, probes, per_probe, probes, per_probe).sum((2, 4)) / counts
    given = torch.zeros_like(sketches[:, :, 0]) if gradients is None else gradients
    norms = given.double().norm(dim=2)
    directions = (given / torch.where(norms > 0, norms, 1.0)[..., None]).float()
    onto = (directions @ rows.mT).double().square().view(windows, probes, probes, per_probe).sum(3)
    return SketchMoments(
        size,
        traces,
        _without_collisions(squares, traces[:, :, None] * traces[:, None], size),
        _without_collisions(onto / draws.clamp(min=1)[:, None], traces[:, None].expand_as(squares), size),
        draws > 0,
        (draws > 0) & (norms > 0),
    )


def effective_ranks(moments: SketchMoments, top: Tensor) -> WindowValues:
    """Estimate the participation ratio (Tr G)² / Tr G²: the rank of a matrix with equal eigenvalues and the same ratio.

    The inverse is estimated, then inverted to second order; the result is NaN if the inverse is within two standard
    errors of zero. The error of the sketch is that of the squared norms |Su_i|² of the eigenvectors, of variance 2/k
    each. They change the inverse by 2 Σ (λ_i²/Tr G² − λ_i/Tr G) times the deviation, which the largest eigenvalue
    bounds.

    Args:
        moments: Moments of W windows.
        top: Float64 [W], largest eigenvalues.

    Returns:
        The effective ranks.
    """
    chosen = _leave_one_out(moments.present)
    inverse = _jackknife(_normalized_product(moments, chosen, chosen), moments.present)
    share = (top.square() / _mean(moments.products, chosen, chosen)[:, 0]).clamp(0, 1) - inverse.value
    own = inverse.value.square() * 8 / moments.size * share.clamp(min=0)
    relative = inverse.stderr.square().add(own).sqrt() / inverse.value
    # The mean of 1/x is (1 + relative²)/mean(x) to second order.
    rank = 1 / (inverse.value * (1 + relative.square()))
    return _where_resolved(rank, rank * relative, (relative > 0) & (relative < 0.5))


def drifts(moments: SketchMoments) -> WindowValues:
    """Estimate how far G turned from the older to the newer half of each window: 0 is no change, 1 is orthogonal.

    With Ĝ = G / Tr G of each half, the drift is |Ĝ_old − Ĝ_new|² / (|Ĝ_old|² + |Ĝ_new|²) in Frobenius norms. It ignores
    a change of scale, and the sharpest directions weigh the most. A half needs two probes or more. Pairs within a half
    are some probes apart too, so a steady drift over half of a window of 8 reads 0.58 of its value.

    Args:
        moments: Moments of W windows.

    Returns:
        The drifts.
    """
    order = moments.present.cumsum(1)
    # By order, not by step: halves of as many probes each have errors of the same size.
    older = moments.present & (order <= order[:, -1:] // 2)
    newer = moments.present & ~older
    chosen = _leave_one_out(moments.present)
    old, new = chosen * older[:, None], chosen * newer[:, None]
    within = _normalized_product(moments, old, old) + _normalized_product(moments, new, new)
    similarity = _jackknife(2 * _normalized_product(moments, old, new) / within, older, newer)
    error = _with_sketch_error(similarity, moments.size)
    # An error as large as the range says nothing: an effective rank of hundreds needs a longer window (docs/log.md).
    return _where_resolved(1 - similarity.value, error, error < 1)


def alignments(moments: SketchMoments) -> WindowValues:
    """Estimate the cosine g'Gg / (|g|² |G|_F) between G and gg', for the mean gradients g of the steps.

    It lies between 0 and λ_max/|G|_F ≤ 1. If G is flat on r sharp directions, any gradient within them gives 1/√r. The
    ratio to λ_max is not used, since it needs an eigenvalue and is wrong wherever several are nearly equal.

    Args:
        moments: Moments of W windows, computed with gradients.

    Returns:
        The alignments.
    """
    chosen = _leave_one_out(moments.present)
    projections = _mean(moments.projections, chosen * moments.has_gradient[:, None], chosen)
    norm = _mean(moments.products, chosen, chosen).clamp(min=0).sqrt()
    cosine = _jackknife(projections / norm, moments.present)
    error = _with_sketch_error(cosine, moments.size)
    return _where_resolved(cosine.value, error, (moments.has_gradient.sum(1) >= _MIN_JACKKNIFE_PROBES) & (error < 1))


def _without_collisions(squares: Tensor, norms: Tensor, size: int) -> Tensor:
    """Mean squared inner products of vectors, from those of their sketches and the sketches' squared norms."""
    return (squares - norms / size) / (1 + 1 / size - 2 / size**2)


def _leave_one_out(present: Tensor) -> Tensor:
    """0/1 weights, float64 [W, 1 + P, P]: first all `present` [W, P] probes, then all but one, in turn."""
    kept = 1 - torch.eye(present.shape[1], dtype=torch.float64, device=present.device)
    weights = present.double()[:, None]
    return torch.cat([weights, weights * kept], 1)


def _normalized_product(moments: SketchMoments, left: Tensor, right: Tensor) -> Tensor:
    """Tr(G G') / (Tr G Tr G') as [W, R], for the means over the probes in `left` and in `right` [W, R, P].

    Numerator and denominator use the same pairs, so that the noise of a few draws cancels.
    """
    product = _mean(moments.products, left, right)
    outer = moments.traces[:, :, None] * moments.traces[:, None]
    return product / (_mean(outer, left, right) - 2 / moments.size * product)


def _mean(cells: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Mean [W, R] of `cells` [W, P, P] over pairs of different probes; `left` and `right` [W, R, P] are 0/1 weights."""
    # Draws of one probe share its rows, so a probe's product with itself is not unbiased.
    apart = 1 - torch.eye(cells.shape[1], dtype=cells.dtype, device=cells.device)
    count = (left @ apart * right).sum(2)
    return (left @ (cells * apart) * right).sum(2) / torch.where(count > 0, count, torch.nan)


def _jackknife(statistic: Tensor, *strata: Tensor) -> WindowValues:
    """Jackknife estimate: the value without its first-order bias, and its standard error.

    Args:
        statistic: Float64 [W, 1 + P], of all probes and without each probe in turn.
        *strata: Bool [W, P] each, sets of probes that were drawn independently; NaN if one has too few.

    Returns:
        The W values.
    """
    whole, without = statistic[:, 0], statistic[:, 1:]
    bias, variance = torch.zeros_like(whole), torch.zeros_like(whole)
    for stratum in strata:
        count = stratum.sum(1)
        mean = torch.where(stratum, without, 0.0).sum(1) / count
        spread = torch.where(stratum, without - mean[:, None], 0.0).square().sum(1)
        bias += (count - 1) * (mean - whole)
        variance += torch.where(count >= _MIN_JACKKNIFE_PROBES, (count - 1) / count * spread, torch.nan)
    return WindowValues(whole - bias, variance.sqrt())


def _with_sketch_error(cosine: WindowValues, size: int) -> Tensor:
    """Standard error of a cosine c of two matrices, with the error of the sketch added.

    The sketch's error is largest for matrices of rank one. It is that of the squared correlation of two vectors from
    `size` numbers, with variance 4c(1−c)²/k + 2/k² (Fisher 1915, to first order and at c = 0).
    """
    c = cosine.value.clamp(0, 1)
    own = 4 * c * (1 - c).square() / size + 2 / size**2
    return cosine.stderr.square().add(own).sqrt()


def _where_resolved(value: Tensor, stderr: Tensor, resolved: Tensor) -> WindowValues:
    return WindowValues(torch.where(resolved, value, torch.nan), torch.where(resolved, stderr, torch.nan))
