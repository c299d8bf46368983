from __future__ import annotations

import math

import pytest
import torch

from sharpwatch.curvature.window import top_eigenvalues, trace_estimates

SIZE = 256


def full(tensor):
    return torch.ones(tensor.shape[:3], dtype=torch.bool)


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


def spectrum(name, n=2000):
    match name:
        case "spike":
            values = torch.cat([torch.tensor([0.1]), torch.full((n - 1,), 0.9 / (n - 1))])
        case "flat":
            values = torch.ones(n)
        case "power 1":
            values = torch.arange(1, n + 1).float().reciprocal()
        case "power 1.5":
            values = torch.arange(1, n + 1).float().pow(-1.5)
        case "two":
            values = torch.cat([torch.tensor([1.0, 1.0]), torch.full((n,), 1.0 / n)])
    return values / values.sum()


def sketched(eigenvalues, windows, probes, draws, seed):
    """Gaussian gradients of covariance diag(eigenvalues), under a random CountSketch a window."""
    generator = torch.Generator().manual_seed(seed)
    shape = (windows, len(eigenvalues))
    buckets = torch.randint(0, SIZE, shape, generator=generator)
    signs = 2.0 * torch.randint(0, 2, shape, generator=generator) - 1
    gradients = torch.randn(windows, probes * draws, len(eigenvalues), generator=generator)
    gradients *= eigenvalues.sqrt() * signs[:, None]
    sums = torch.zeros(windows, probes * draws, SIZE)
    sums.scatter_add_(2, buckets[:, None].expand_as(gradients), gradients)
    return sums.view(windows, probes, draws, SIZE)


@pytest.mark.parametrize("name", ["spike", "power 1", "power 1.5"])
def test_a_clear_eigenvalue_is_found_within_its_error(name):
    eigenvalues = spectrum(name)
    sketches = sketched(eigenvalues, 120, 8, 4, seed=0)
    found = top_eigenvalues(sketches, full(sketches))
    truth = eigenvalues.max()
    assert abs(found.value.mean() - truth) < 4 * found.value.std() / 120**0.5 + 0.05 * truth
    # Two errors cover 95 % of a Gaussian; squares of 32 Gaussians have a longer tail. 120 windows: 2.7 % for each sd.
    assert ((found.value - truth).abs() < 2 * found.stderr).double().mean() > 0.88
    assert found.stderr.median() < 0.5 * truth
    assert found.upper_bound.double().mean() < 0.4


@pytest.mark.parametrize(("name", "probes"), [("flat", 8), ("flat", 2), ("spike", 1)])
def test_what_does_not_stand_clear_is_called_an_upper_bound(name, probes):
    eigenvalues = spectrum(name)
    sketches = sketched(eigenvalues, 60, probes, 4, seed=1)
    found = top_eigenvalues(sketches, full(sketches))
    bound = found.upper_bound
    assert bound.double().mean() > 0.8
    assert (eigenvalues.max() <= (found.value + 2 * found.stderr)[bound]).double().mean() > 0.95
    # And far below what the Gram matrix says itself: Tr G (1/m + 1/k) at least.
    assert (found.value < 1 / (4 * probes) + 1 / SIZE).double().mean() > 0.5


def test_two_that_are_equal_are_not_one_that_is_larger():
    eigenvalues = spectrum("two")
    sketches = sketched(eigenvalues, 60, 8, 4, seed=2)
    found = top_eigenvalues(sketches, full(sketches))
    alone = top_eigenvalues(sketched(spectrum("power 1.5"), 60, 8, 4, seed=2), full(sketches))
    # Their sample eigenvalues repel each other, so a share stands apart by chance.
    assert found.upper_bound.double().mean() > alone.upper_bound.double().mean() + 0.1


def test_a_block_without_gradient_is_zero():
    found = top_eigenvalues(torch.zeros(2, 8, 4, SIZE), torch.ones(2, 8, 4, dtype=torch.bool))
    assert found.value.tolist() == [0.0, 0.0]
    assert found.stderr.tolist() == [0.0, 0.0]


def test_estimates_scale_as_their_quantity_does():
    sketches = sketched(spectrum("power 1"), 4, 8, 4, seed=3)
    one, other = top_eigenvalues(sketches, full(sketches)), top_eigenvalues(1e-4 * sketches, full(sketches))
    torch.testing.assert_close(other.value, 1e-8 * one.value, rtol=1e-4, atol=0)
    torch.testing.assert_close(other.stderr, 1e-8 * one.stderr, rtol=1e-4, atol=0)
    assert torch.equal(one.upper_bound, other.upper_bound)
