from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import SIZE, covered, full, least_coverage, sketched, spectrum

from sharpwatch.curvature.statistics.gnb_eigenvalues import top_eigenvalues
from sharpwatch.curvature.statistics.pooling import trace_estimates

WINDOWS = 150
PROPERTY = settings(deadline=None, derandomize=True, max_examples=20, database=None)


def noisy(windows, probes, draws, *, between, within, seed=0):
    generator = torch.Generator().manual_seed(seed)
    data = between * torch.randn(windows, probes, 1, generator=generator)
    return (10 + data + within * torch.randn(windows, probes, draws, generator=generator)).double()


# (2, 4): either of two errors may be the larger, so the claim is above the truth by up to their spread.
@pytest.mark.parametrize(
    ("shape", "between", "within", "above"),
    [
        ((8, 4), 1.0, 0.5, 1.1),
        ((8, 4), 0.0, 1.0, 1.1),
        ((4, 1), 0.5, 0.5, 1.1),
        ((1, 4), 0.0, 1.0, 1.1),
        ((2, 4), 0.0, 1.0, 1.5),
    ],
)
def test_the_error_of_a_trace_is_its_spread(shape, between, within, above):
    traces = noisy(4000, *shape, between=between, within=within)
    found = trace_estimates(traces, full(traces))
    claimed = found.stderr.square().mean().sqrt()
    assert 0.93 < claimed / found.value.std() < above  # 4000 windows: the spread is known to 1.1 %, the claim to 3 %
    assert abs(found.value.mean() - 10) < 4 * found.value.std() / 4000**0.5
    assert (found.draws == shape[0] * shape[1]).all()


def test_a_probe_counts_once_however_many_draws_it_has():
    traces = torch.tensor([[[1.0, 3.0], [8.0, 99.0]]]).double()
    mask = torch.tensor([[[True, True], [True, False]]])
    found = trace_estimates(traces, mask)
    assert found.value.tolist() == [5.0]
    assert found.draws.tolist() == [3]
    # between: sd of (2, 8) over √2 = 3; within: variance 2 of one degree of freedom, (2/2 + 2/1) / 2² under the root.
    assert found.stderr.tolist() == [pytest.approx(3.0)]


def test_padding_changes_nothing():
    traces = noisy(3, 5, 2, between=1.0, within=1.0)
    padded = torch.full((3, 9, 4), torch.nan).double()
    padded[:, 2:7, :2] = traces
    mask = torch.zeros(3, 9, 4, dtype=torch.bool)
    mask[:, 2:7, :2] = True
    for name in ("value", "stderr", "draws"):
        torch.testing.assert_close(
            getattr(trace_estimates(padded, mask), name), getattr(trace_estimates(traces, full(traces)), name)
        )
    sketches = torch.randn(3, 5, 2, 64, generator=torch.Generator().manual_seed(1))
    padded = torch.full((3, 9, 4, 64), torch.nan)
    padded[:, 2:7, :2] = sketches
    for name in ("value", "stderr", "draws", "upper_bound"):
        torch.testing.assert_close(
            getattr(top_eigenvalues(padded, mask), name),
            getattr(top_eigenvalues(sketches, full(sketches)), name),
            rtol=1e-5,  # products of float32, summed in another order
            atol=0,
        )


def test_a_single_draw_has_no_error():
    found = trace_estimates(torch.tensor([[[4.0]]]).double(), torch.ones(1, 1, 1, dtype=torch.bool))
    assert found.value.tolist() == [4.0]
    assert math.isnan(found.stderr.item())
    top = top_eigenvalues(torch.ones(1, 1, 1, SIZE), torch.ones(1, 1, 1, dtype=torch.bool))
    assert math.isnan(top.stderr.item())
    assert top.upper_bound.item()


@pytest.mark.parametrize("name", ["spike", "large spike", "power 1", "power 1.5"])
def test_a_clear_eigenvalue_is_found_within_its_error(name):
    eigenvalues = spectrum(name)
    sketches = sketched(eigenvalues, WINDOWS, 8, 4, seed=0)
    found = top_eigenvalues(sketches, full(sketches))
    truth = eigenvalues.max()
    assert abs(found.value.mean() - truth) < 4 * found.value.std() / WINDOWS**0.5 + 0.02 * truth
    assert covered(found.value, found.stderr, truth) > least_coverage(WINDOWS)
    assert found.stderr.median() < 0.5 * truth
    assert found.upper_bound.double().mean() < 0.4


@pytest.mark.parametrize(("probes", "draws"), [(8, 4), (16, 8)])
@pytest.mark.parametrize(("name", "excess"), [("two", 1.2), ("ten", 1.75)])
def test_equal_ones_read_higher_by_no_more_than_their_error_says(name, excess, probes, draws):
    """The top of several equal eigenvalues is the luckiest of them; what is left of that is said, not hidden."""
    eigenvalues = spectrum(name)
    sketches = sketched(eigenvalues, WINDOWS, probes, draws, seed=1)
    found = top_eigenvalues(sketches, full(sketches))
    truth = eigenvalues.max()
    assert found.value.mean() < excess * truth  # the Gram matrix's own is at 2.6 for ten and 32 draws
    assert covered(found.value, found.stderr, truth) > 0.914 - 6 * (0.914 * 0.086 / WINDOWS) ** 0.5
    high = (found.value - truth > 2 * found.stderr) & ~found.upper_bound
    assert high.double().mean() < 0.2


@pytest.mark.parametrize(("name", "probes"), [("flat", 8), ("flat", 2), ("spike", 1)])
def test_what_does_not_stand_clear_is_called_an_upper_bound(name, probes):
    eigenvalues = spectrum(name)
    sketches = sketched(eigenvalues, 60, probes, 4, seed=2)
    found = top_eigenvalues(sketches, full(sketches))
    bound = found.upper_bound
    assert bound.double().mean() > 0.8
    assert (eigenvalues.max() <= (found.value + 2 * found.stderr)[bound]).double().mean() > 0.95
    # And far below what the Gram matrix says itself: Tr G (1/m + 1/k) at least.
    assert (found.value < 1 / (4 * probes) + 1 / SIZE).double().mean() > 0.5


def test_two_that_are_equal_are_not_one_that_is_larger():
    sketches = sketched(spectrum("two"), 60, 8, 4, seed=3)
    found = top_eigenvalues(sketches, full(sketches))
    alone = top_eigenvalues(sketched(spectrum("power 1.5"), 60, 8, 4, seed=3), full(sketches))
    # Their sample eigenvalues repel each other, so a share stands apart by chance.
    assert found.upper_bound.double().mean() > alone.upper_bound.double().mean() + 0.1


def test_a_direction_alone_is_exact():
    """No rest, no bias: λ is the draws' own mean square."""
    along = torch.randn(3, 8, 4, 1, generator=torch.Generator().manual_seed(4))
    direction = torch.randn(SIZE, generator=torch.Generator().manual_seed(5))
    found = top_eigenvalues(along * direction / direction.norm(), torch.ones(3, 8, 4, dtype=torch.bool))
    torch.testing.assert_close(found.value, along.double().square().mean((1, 2, 3)), rtol=1e-5, atol=0)
    assert not found.upper_bound.any()


def test_a_block_without_gradient_is_zero():
    found = top_eigenvalues(torch.zeros(2, 8, 4, SIZE), torch.ones(2, 8, 4, dtype=torch.bool))
    assert found.value.tolist() == [0.0, 0.0]
    assert found.stderr.tolist() == [0.0, 0.0]


def same(one, other, scale=1.0):
    torch.testing.assert_close(other.value, scale * one.value, rtol=1e-4, atol=0)
    torch.testing.assert_close(other.stderr, scale * one.stderr, rtol=1e-4, atol=0)
    assert torch.equal(one.upper_bound, other.upper_bound)


@PROPERTY
@given(st.integers(0, 2**31), st.floats(1e-6, 1e6), st.permutations(range(4)), st.permutations(range(8)))
def test_estimates_scale_as_their_quantity_does_and_know_no_order(seed, scale, draws, probes):
    sketches = sketched(spectrum("power 1"), 2, 8, 4, seed=seed)
    found = top_eigenvalues(sketches, full(sketches))
    same(found, top_eigenvalues(scale * sketches, full(sketches)), scale**2)
    same(found, top_eigenvalues(sketches[:, probes][:, :, draws], full(sketches)))


def test_windows_in_one_batch_give_the_same_estimates_as_alone():
    sketches = sketched(spectrum("ten"), 5, 8, 4, seed=6)
    batched = top_eigenvalues(sketches, full(sketches))
    for index, alone in enumerate(sketches.split(1)):
        found = top_eigenvalues(alone, full(alone))
        torch.testing.assert_close(found.value, batched.value[index : index + 1], rtol=1e-5, atol=0)
        torch.testing.assert_close(found.stderr, batched.stderr[index : index + 1], rtol=1e-5, atol=0)
