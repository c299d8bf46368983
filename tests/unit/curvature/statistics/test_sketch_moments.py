from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import ENTRIES, SIZE, covered, full, least_coverage, sketched, spectrum

from sharpwatch.curvature.statistics.gnb_eigenvalues import (
    alignments,
    drifts,
    effective_ranks,
    sketch_moments,
    top_eigenvalues,
)

WINDOWS = 150
PROPERTY = settings(deadline=None, derandomize=True, max_examples=20, database=None)


def estimates(sketches, mask=None, gradients=None):
    """Rank, drift and alignment: values and errors [3, 2, W]."""
    mask = full(sketches) if mask is None else mask
    moments = sketch_moments(sketches, mask, gradients)
    found = (effective_ranks(moments, top_eigenvalues(sketches, mask).value), drifts(moments), alignments(moments))
    return torch.stack([torch.stack([one.value, one.stderr]) for one in found])


def turned(eigenvalues, share, scale=1.0):
    """Covariances [8, n] of a window whose newer half has `share` of its curvature in directions of its own."""
    newer = (1 - share) * eigenvalues + share * eigenvalues.roll(ENTRIES // 2)
    return torch.cat([eigenvalues.expand(4, -1), scale * newer.expand(4, -1)])


def toward_top(share, seed=9):
    """Unit gradients [8, n] with `share` of their square along the first eigenvector."""
    rest = torch.randn(8, ENTRIES, generator=torch.Generator().manual_seed(seed)).double()
    rest[:, 0] = 0
    directions = (1 - share) ** 0.5 * rest / rest.norm(dim=1, keepdim=True)
    directions[:, 0] = share**0.5
    return directions


def check(value, stderr, truth, *, bias):
    """Mean within 4 of its errors and the bias of second order that is left; error bars that hold."""
    assert abs(value.mean() - truth) < 4 * value.std() / len(value) ** 0.5 + bias
    assert covered(value, stderr, truth) > least_coverage(len(value))


@pytest.mark.parametrize("name", ["large spike", "power 1", "power 1.5", "ten", "flat"])
def test_the_rank_is_the_participation_ratio(name):
    eigenvalues = spectrum(name)
    sketches = sketched(eigenvalues, WINDOWS, 8, 4, seed=1)
    value, stderr = estimates(sketches)[0]
    shown = value.isfinite()
    assert shown.double().mean() > 0.85  # a flat spectrum's is not told from an infinite one in one window of ten
    truth = float(1 / eigenvalues.square().sum())
    check(value[shown], stderr[shown], truth, bias=0.05 * truth if name != "flat" else 0.12 * truth)
    assert stderr[shown].median() < 0.4 * truth


@pytest.mark.parametrize("name", ["large spike", "power 1", "ten"])
@pytest.mark.parametrize(("share", "scale"), [(0, 1), (0, 3), (0.3, 1), (1, 1)])
def test_drift_is_how_far_the_halves_have_turned(name, share, scale):
    covariances = turned(spectrum(name), share, scale)
    old, new = covariances[0], covariances[-1] / scale
    truth = float(1 - 2 * (old @ new) / (old @ old + new @ new))
    value, stderr = estimates(sketched(covariances, WINDOWS, 8, 4, seed=2))[1]
    assert value.isfinite().double().mean() > 0.97
    shown = value.isfinite()
    check(value[shown], stderr[shown], truth, bias=0.03)
    assert stderr[shown].median() < 0.3


@pytest.mark.parametrize("name", ["large spike", "power 1", "ten"])
@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_alignment_is_the_cosine_of_the_gradients_square_and_the_curvature(name, share):
    eigenvalues, directions = spectrum(name), toward_top(share)
    truth = float((directions.square() @ eigenvalues).mean() / eigenvalues.norm())
    sketches, gradients = sketched(eigenvalues, WINDOWS, 8, 4, seed=3, directions=directions)
    value, stderr = estimates(sketches, gradients=gradients)[2]
    check(value, stderr, truth, bias=0.02)
    assert stderr.median() < 0.15


def test_rows_of_one_probe_are_not_taken_for_curvature():
    """Each probe's own few rows make directions that no other has: the window's G is what all share."""
    own = torch.zeros(8, ENTRIES)
    for probe in range(8):
        own[probe, 100 + probe] = 0.5
    shared = spectrum("large spike").float()
    truth = float((1.5**2) / shared.square().sum())
    value, stderr = estimates(sketched(shared + own, WINDOWS, 8, 4, seed=4))[0]
    shown = value.isfinite()
    check(value[shown], stderr[shown], truth, bias=0.06 * truth)
    # Pairs of draws of one probe, 3 in 31, would add 0.5² each to Tr G², which is 0.09: a fifth less rank.
    drift, error = estimates(sketched(shared + own, WINDOWS, 8, 4, seed=4))[1]
    assert abs(drift[error < 1].mean()) < 0.05


def window(seed, probes=8, draws=3):
    generator = torch.Generator().manual_seed(seed)
    covariances = torch.rand(1, ENTRIES, generator=generator).pow(8).double()
    directions = torch.rand(probes, ENTRIES, generator=generator).pow(4)
    return sketched(covariances, 2, probes, draws, seed=seed, directions=directions)


def same(left, right):
    # Products of float32 summed in another order; the jackknife takes small differences of them.
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6, equal_nan=True)


@PROPERTY
@given(st.integers(0, 2**31), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_no_scale_matters(seed, scale, other):
    sketches, gradients = window(seed)
    same(estimates(sketches, None, gradients), estimates(scale * sketches, None, other * gradients))


@PROPERTY
@given(st.integers(0, 2**31), st.permutations(range(3)), st.permutations(range(4)), st.permutations(range(4)))
def test_no_order_matters_but_that_of_the_halves(seed, draws, older, newer):
    sketches, gradients = window(seed)
    found = estimates(sketches, None, gradients)
    order = [*older, *(4 + index for index in newer)]
    same(estimates(sketches[:, order][:, :, draws], None, gradients[:, order]), found)
    halves = [4, 5, 6, 7, 0, 1, 2, 3]
    same(estimates(sketches[:, halves], None, gradients[:, halves]), found)


@PROPERTY
@given(st.integers(0, 2**31), st.sets(st.integers(0, 11), min_size=8, max_size=8))
def test_padding_changes_nothing(seed, places):
    sketches, gradients = window(seed)
    at = sorted(places)
    padded, along = torch.full((2, 12, 5, SIZE), torch.nan), torch.zeros(2, 12, SIZE)
    mask = torch.zeros(2, 12, 5, dtype=torch.bool)
    for probe, place in enumerate(at):
        padded[:, place, 1:4], along[:, place], mask[:, place, 1:4] = sketches[:, probe], gradients[:, probe], True
    same(estimates(padded, mask, along), estimates(sketches, None, gradients))


@PROPERTY
@given(st.lists(st.integers(0, 2**31), min_size=2, max_size=4))
def test_windows_in_one_batch_give_the_same_estimates_as_alone(seeds):
    each = [window(seed) for seed in seeds]
    batched = estimates(torch.cat([one for one, _ in each]), None, torch.cat([one for _, one in each]))
    same(batched, torch.cat([estimates(sketches, None, gradients) for sketches, gradients in each], dim=2))


def test_too_small_a_window_says_nothing():
    sketches, gradients = window(5)
    assert estimates(sketches[:, :3], None, gradients[:, :3]).isnan().all()
    rank, drift, alignment = estimates(sketches[:, :7], None, gradients[:, :7])
    assert rank.isfinite().all()
    assert drift.isnan().all()  # an older half of three
    assert alignment.isfinite().all()
    assert estimates(torch.zeros(2, 8, 4, SIZE), None, gradients).isnan().all()


def test_alignment_needs_four_gradients_and_no_more():
    eigenvalues, directions = spectrum("power 1.5"), toward_top(1.0)
    sketches, gradients = sketched(eigenvalues, WINDOWS, 8, 4, seed=6, directions=directions)
    gradients[:, :4] = 0
    value, stderr = estimates(sketches, None, gradients)[2]
    check(value, stderr, float(eigenvalues[0] / eigenvalues.norm()), bias=0.02)
    gradients[:, 4] = 0
    assert estimates(sketches, None, gradients)[2].isnan().all()
    assert estimates(sketches)[2].isnan().all()


def test_a_spectrum_too_flat_to_resolve_has_no_rank():
    """Rank 3000 at 32 draws: the inverse's error is about its size."""
    value, _ = estimates(sketched(torch.full((3000,), 1 / 3000), 60, 8, 4, seed=7))[0]
    assert value.isnan().double().mean() > 0.8
    assert math.isfinite(value[value.isfinite()].sum())
