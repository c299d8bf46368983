from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharpwatch.curvature.statistics.pooling import least_precise, pool_draws, relative_error, weighted_mean_stderr

SHARES = (0.2, 0.5, 0.3)
finite = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e100, max_value=1e100)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(3.0, 1.0, shape)


def by_hand(draws, shares):
    """Value, and standard errors by the draws' and by the batches' scatter."""
    draws, shares = np.asarray(draws), np.asarray(shares)
    means = draws.mean(0)
    value = shares @ means
    within = (draws @ shares).std(ddof=1) / math.sqrt(len(draws)) if len(draws) > 1 else math.nan
    count = len(means)
    between = math.sqrt(count / (count - 1) * (shares**2 @ (means - value) ** 2)) if count > 1 else math.nan
    return value, within, between


@pytest.mark.parametrize("draws", [2, 8])
def test_one_batch_has_the_error_of_its_draws(draws):
    given = random(draws, 1)
    found = pool_draws(given.tolist(), [1.0])
    assert found.value == pytest.approx(given.mean())
    assert found.stderr == pytest.approx(given.std(ddof=1) / math.sqrt(draws))
    assert found.batch_stderr == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_a_few_batches_have_the_larger_error_of_two(seed):
    given = random(5, 3, seed=seed)
    value, within, between = by_hand(given, SHARES)
    found = pool_draws(given.tolist(), SHARES)
    assert found.value == pytest.approx(value)
    assert found.stderr == pytest.approx(max(within, between))


@pytest.mark.parametrize("batches", [4, 9])
def test_many_batches_have_the_error_of_their_scatter(batches):
    given = random(3, batches) * 10.0 ** np.arange(-1, 2)[:, None]  # draws that scatter more than batches
    shares = np.arange(1, batches + 1) / np.arange(1, batches + 1).sum()
    value, within, between = by_hand(given, shares)
    assert within > between
    found = pool_draws(given.tolist(), shares.tolist())
    assert found.value == pytest.approx(value)
    assert found.stderr == pytest.approx(between)


def test_equal_batches_have_the_standard_error_of_a_mean():
    values = random(6)
    assert weighted_mean_stderr(values.tolist(), [1 / 6] * 6) == pytest.approx(values.std(ddof=1) / math.sqrt(6))


def test_fewer_than_two_values_have_no_scatter():
    assert math.isnan(weighted_mean_stderr([1.0], [1.0]))
    assert math.isnan(weighted_mean_stderr([], []))


@pytest.mark.parametrize("batches", [1, 3, 5])
def test_a_single_draw_has_no_error(batches):
    found = pool_draws([[1.0, 2.0, 3.0, 4.0, 5.0][:batches]], [1 / batches] * batches)
    assert math.isnan(found.stderr)
    assert found.batch_stderr == 0.0
    assert found.value == pytest.approx((1 + batches) / 2)


@pytest.mark.parametrize("batches", [1, 3, 5])
def test_a_common_error_adds_to_the_draws_and_is_not_the_batches_spread(batches):
    given = random(6, batches).tolist()
    shares = [1 / batches] * batches
    alone, common = pool_draws(given, shares), pool_draws(given, shares, 2.0)
    assert common.value == alone.value
    assert common.stderr == pytest.approx(math.hypot(alone.stderr, 2.0))
    assert common.batch_stderr == alone.batch_stderr
    assert common.stderr >= 2.0


def test_the_floor_is_what_batches_scatter_beyond_their_draws():
    offsets = np.array([-1.0, 1.0, -1.0, 1.0])
    noise = random(16, 4) - 3.0
    given = 10 + offsets + 0.1 * (noise - noise.mean(0))  # every batch's mean is exact
    _, within, between = by_hand(given, [0.25] * 4)
    found = pool_draws(given.tolist(), [0.25] * 4)
    assert between == pytest.approx(math.sqrt(4 / 3) / 2)
    assert found.batch_stderr == pytest.approx(math.sqrt(between**2 - within**2))
    assert found.batch_stderr < found.stderr


def test_batches_that_scatter_less_than_their_draws_have_no_floor():
    noise = random(16, 4) - 3.0
    given = 10 + 0.001 * np.arange(4) + noise - noise.mean(0)
    assert pool_draws(given.tolist(), [0.25] * 4).batch_stderr == 0.0


def test_batches_alike_to_the_last_bit_are_known_exactly():
    found = pool_draws([[2.0, 2.0, 2.0, 2.0]] * 3, [0.25] * 4)
    assert (found.value, found.stderr, found.batch_stderr) == (2.0, 0.0, 0.0)


def test_is_the_same_in_whatever_order_draws_and_batches_come():
    given = random(7, 3)
    order = [2, 0, 1]
    one = pool_draws(given.tolist(), SHARES)
    other = pool_draws(given[::-1][:, order].tolist(), [SHARES[i] for i in order])
    assert [one.value, one.stderr, one.batch_stderr] == pytest.approx([other.value, other.stderr, other.batch_stderr])


# What t with the error's own degrees of freedom covers within two errors: 31 (one batch, 32 draws) 0.946; 7 batches'
# worth 0.914, 3 degrees (4 batches) 0.861, by tables. Bound: four deviations of the binomial count.
@pytest.mark.parametrize(("batches", "draws", "expected"), [(1, 32, 0.946), (8, 4, 0.914), (4, 8, 0.861)])
def test_covers_the_truth_as_often_as_its_degrees_of_freedom_say(batches, draws, expected):
    runs, rng = 3000, np.random.default_rng(5)
    centres = rng.normal(0.0, 1.0 if batches > 1 else 0.0, (runs, 1, batches))
    given = 5 + centres + rng.normal(0.0, 1.0, (runs, draws, batches))
    found = [pool_draws(each.tolist(), [1 / batches] * batches) for each in given]
    covered = np.mean([abs(each.value - 5) < 2 * each.stderr for each in found])
    assert abs(covered - expected) < 4 * math.sqrt(expected * (1 - expected) / runs)


@pytest.mark.parametrize("spread", [0.0, 0.2])
def test_few_batches_cover_at_least_what_the_draws_alone_would(spread):
    # The larger of two errors is at least the draws' own, which has 31 degrees of freedom. With no spread that covers
    # 0.946 within two; a spread that takes the true error from 0.125 to 0.189 leaves 1.32 deviations of it, 0.80.
    runs, draws, batches = 3000, 32, 2
    rng = np.random.default_rng(6)
    given = 5 + rng.normal(0.0, spread, (runs, 1, batches)) + rng.normal(0.0, 1.0, (runs, draws, batches))
    found = [pool_draws(each.tolist(), [0.5, 0.5]) for each in given]
    covered = np.mean([abs(each.value - 5) < 2 * each.stderr for each in found])
    least = 0.946 if spread == 0.0 else 0.80
    assert covered > least - 4 * math.sqrt(least * (1 - least) / runs)


def test_a_common_error_of_the_right_size_keeps_the_coverage():
    runs, rng = 3000, np.random.default_rng(7)
    shift = rng.normal(0.0, 0.5, (runs, 1, 1))
    given = 5 + shift + rng.normal(0.0, 1.0, (runs, 32, 1))
    found = [pool_draws(each.tolist(), [1.0], 0.5) for each in given]
    covered = np.mean([abs(each.value - 5) < 2 * each.stderr for each in found])
    assert abs(covered - 0.954) < 4 * math.sqrt(0.954 * 0.046 / runs)  # nearly all of the error is the known normal one


@given(value=finite.filter(lambda x: abs(x) > 1e-100), stderr=st.floats(0, 1e100))
def test_is_the_error_over_the_size_of_the_value(value, stderr):
    assert relative_error(value, stderr) == stderr / abs(value)
    assert relative_error(-value, stderr) == relative_error(value, stderr)


@pytest.mark.parametrize(("value", "stderr"), [(1.0, math.nan), (1.0, math.inf), (math.nan, 1.0), (0.0, 1.0)])
def test_is_infinite_where_nothing_is_known(value, stderr):
    assert relative_error(value, stderr) == math.inf


def test_an_exact_zero_has_none():
    assert relative_error(0.0, 0.0) == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_no_number_is_not_exact(value):
    assert relative_error(value, 0.0) == math.inf


def test_the_worst_is_the_one_with_the_largest_error():
    assert least_precise({"qk": 0.1, "vo": 0.3, "ffn": 0.2}) == "vo"


def test_the_first_of_equals_goes_first():
    assert least_precise({"qk": math.inf, "vo": 0.3, "ffn": math.inf}) == "qk"
    assert least_precise({"vo": 0.0, "qk": 0.0}) == "vo"


def test_what_is_not_measured_yet_goes_before_what_is():
    assert least_precise({"qk": 1e9, "vo": math.nan}) == "vo"
    assert least_precise({"vo": math.nan, "qk": math.inf}) == "vo"
    assert least_precise({"vo": math.inf, "qk": math.nan}) == "vo"


def test_of_nothing_there_is_no_worst():
    with pytest.raises(ValueError, match="empty"):
        least_precise({})
