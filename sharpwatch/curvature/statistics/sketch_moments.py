"""What pairs of probes in a window say: effective rank, drift and alignment, without an eigenvector.

Draws of probes p ≠ q with E gg' = G_p and G_q, sketched to k numbers as s, have

    E <s_p, s_q>² = (1 + 1/k) Tr(G_p G_q) + Tr G_p Tr G_q / k,
    E |s_p|² |s_q|² = Tr G_p Tr G_q + (2/k) Tr(G_p G_q),

by sketch.py's variance and the like covariance of two squared norms. (What single rows spare is left out: one part in
the block's number of rows.) These are solved for the traces of products. Two draws of one probe share its rows, and
would count what a few rows make of G as G's own; those of two probes share nothing. So the window's G is that of the
run's data, averaged over the window's steps, and the mean over pairs is unbiased for Tr G² (Hoeffding's U-statistics).

Values are freed of their first-order bias, and errors come, from the jackknife over probes (Arvesen, "Jackknifing
U-statistics", 1969); the errors are joined with that of the sketch, which no window averages out. Estimates may leave
their quantity's range by chance: pressed into it, their mean would be wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MIN_PROBES = 4  # probes that a jackknife needs; at 3 the error's own error is half of it


@dataclass(frozen=True, slots=True, eq=False)
class SketchMoments:
    """Float64 moments of windows of P probes, whose sketches have `size` numbers.

    `products` [W, P, P] are of Tr(G_p G_q), `along` [W, P, P] of g_p'G_q g_p / |g_p|² for the mean gradient g_p of the
    step of probe p; their diagonals say nothing. `traces` [W, P] are of Tr G_p. `present` and `directed` bool [W, P]:
    the probe has draws, and also a gradient.
    """

    size: int
    traces: Tensor
    products: Tensor
    projections: Tensor
    present: Tensor
    has_gradient: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class WindowValues:
    """Float64 [W] values and standard errors, both NaN where a window says nothing."""

    value: Tensor
    stderr: Tensor


def sketch_moments(sketches: Tensor, mask: Tensor, gradients: Tensor | None = None) -> SketchMoments:
    """Moments of windows of `sketches` [W, P, D, k], of which those in `mask` [W, P, D] are there.

    `gradients` [W, P, k] are sketches of the steps' mean gradients, of any positive scale; zeros where there is none.
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
    """The participation ratio (Tr G)² / Tr G²: how many equal eigenvalues would spread G as far.

    Its inverse is estimated, and inverted to second order; none is given where that is within two errors of zero. The
    sketch's share of the error is that of the squared norms |Su_i|² of the eigenvectors, of variance 2/k each: the
    inverse moves by 2 Σ (λ_i²/Tr G² − λ_i/Tr G) of it, which `top` [W], the largest eigenvalue, bounds.
    """
    chosen = _leave_one_out(moments.present)
    inverse = _jackknife(_normalized_product(moments, chosen, chosen), moments.present)
    share = (top.square() / _mean(moments.products, chosen, chosen)[:, 0]).clamp(0, 1) - inverse.value
    own = inverse.value.square() * 8 / moments.size * share.clamp(min=0)
    relative = inverse.stderr.square().add(own).sqrt() / inverse.value
    rank = 1 / (inverse.value * (1 + relative.square()))
    return _where_resolved(rank, rank * relative, (relative > 0) & (relative < 0.5))


def drifts(moments: SketchMoments) -> WindowValues:
    """How far the window's newer half has turned from its older half, 0 to 1; the sharp directions weigh the most.

    With Ĝ = G / Tr G of either half it is |Ĝ_old − Ĝ_new|² / (|Ĝ_old|² + |Ĝ_new|²) in Frobenius norms, so a change of
    scale is none. A single probe in a half is no pair, and pairs within a half are some probes apart as well: a steady
    drift reads 0.58 of what it is over half of a window of 8.
    """
    order = moments.present.cumsum(1)
    older = moments.present & (order <= order[:, -1:] // 2)
    newer = moments.present & ~older
    chosen = _leave_one_out(moments.present)
    old, new = chosen * older[:, None], chosen * newer[:, None]
    within = _normalized_product(moments, old, old) + _normalized_product(moments, new, new)
    similarity = _jackknife(2 * _normalized_product(moments, old, new) / within, older, newer)
    error = _with_sketch_error(similarity, moments.size)
    return _where_resolved(1 - similarity.value, error, error < 1)


def alignments(moments: SketchMoments) -> WindowValues:
    """The cosine between G and gg', g'Gg / (|g|² |G|_F), of the steps' mean gradients g: 0 to λ_max/|G|_F ≤ 1.

    One on whose r sharp directions G is flat gives 1/√r for any gradient within them. No eigenvalue is needed: as a
    fraction of λ_max it would be wrong wherever several are nearly equal.
    """
    chosen = _leave_one_out(moments.present)
    projections = _mean(moments.projections, chosen * moments.has_gradient[:, None], chosen)
    norm = _mean(moments.products, chosen, chosen).clamp(min=0).sqrt()
    cosine = _jackknife(projections / norm, moments.present)
    error = _with_sketch_error(cosine, moments.size)
    return _where_resolved(cosine.value, error, (moments.has_gradient.sum(1) >= _MIN_PROBES) & (error < 1))


def _without_collisions(squares: Tensor, norms: Tensor, size: int) -> Tensor:
    """Mean squared products of vectors from those of their sketches and the sketches' squared norms."""
    return (squares - norms / size) / (1 + 1 / size - 2 / size**2)


def _leave_one_out(present: Tensor) -> Tensor:
    """Float64 [W, 1 + P, P] of 0 and 1: all that are `present` [W, P], then all but one of them in turn."""
    kept = 1 - torch.eye(present.shape[1], dtype=torch.float64, device=present.device)
    weights = present.double()[:, None]
    return torch.cat([weights, weights * kept], 1)


def _normalized_product(moments: SketchMoments, left: Tensor, right: Tensor) -> Tensor:
    """Tr(G G') / (Tr G Tr G') [W, R] of the means of probes in `left` and in `right` [W, R, P].

    Both traces are taken from the same pairs: what a few draws make of them, they make of the numerator as well.
    """
    product = _mean(moments.products, left, right)
    outer = moments.traces[:, :, None] * moments.traces[:, None]
    return product / (_mean(outer, left, right) - 2 / moments.size * product)


def _mean(cells: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Mean [W, R] of `cells` [W, P, P] over the pairs of two probes of `left` and `right` [W, R, P], 0 or 1 each."""
    apart = 1 - torch.eye(cells.shape[1], dtype=cells.dtype, device=cells.device)
    count = (left @ apart * right).sum(2)
    return (left @ (cells * apart) * right).sum(2) / torch.where(count > 0, count, torch.nan)


def _jackknife(statistic: Tensor, *strata: Tensor) -> WindowValues:
    """From `statistic` [W, 1 + P], of the whole and without each probe: the value without its bias, and its error.

    `strata` [W, P]: sets of probes that were drawn apart; NaN where one of them has too few.
    """
    whole, without = statistic[:, 0], statistic[:, 1:]
    bias, variance = torch.zeros_like(whole), torch.zeros_like(whole)
    for stratum in strata:
        count = stratum.sum(1)
        mean = torch.where(stratum, without, 0.0).sum(1) / count
        spread = torch.where(stratum, without - mean[:, None], 0.0).square().sum(1)
        bias += (count - 1) * (mean - whole)
        variance += torch.where(count >= _MIN_PROBES, (count - 1) / count * spread, torch.nan)
    return WindowValues(whole - bias, variance.sqrt())


def _with_sketch_error(cosine: WindowValues, size: int) -> Tensor:
    """The error of a cosine c of two matrices, with the sketch's share.

    Matrices of rank one have the most: the squared correlation of two vectors from `size` numbers, of variance
    4c(1−c)²/k + 2/k² (Fisher 1915, to first order, and at c = 0).
    """
    c = cosine.value.clamp(0, 1)
    own = 4 * c * (1 - c).square() / size + 2 / size**2
    return cosine.stderr.square().add(own).sqrt()


def _where_resolved(value: Tensor, stderr: Tensor, resolved: Tensor) -> WindowValues:
    return WindowValues(torch.where(resolved, value, torch.nan), torch.where(resolved, stderr, torch.nan))
