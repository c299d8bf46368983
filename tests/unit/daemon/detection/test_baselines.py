"""Baselines against numpy's least squares, closed forms and simulation."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest

from sharpwatch.daemon.detection.baselines import FAR, PATIENCE, Level, Trend

SPANS = (3, 5, 10, 20, 40)
LAG = 40
NOTHING = np.empty(0)


def trend(columns: int) -> Trend:
    return Trend(np.full(columns, 1e-6), np.zeros(columns), SPANS)


def after(values: np.ndarray, **options: bool) -> Trend:
    """A trend that has seen the rows of `values` at steps 1, 2, …"""
    made = trend(values.shape[1])
    for i, row in enumerate(values):
        made.see(i + 1, row, **options)
    return made


def line_of(fitted: Trend, step: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the line of a trend is at a step, and its standard deviation: from the z of two values."""
    low, high = (copy.deepcopy(fitted).see(step, np.full(columns, value))[0] for value in (-100.0, 100.0))
    sd = 200.0 / (high - low)
    return -100.0 - low * sd, sd


def window(last: int) -> np.ndarray:
    """The steps that a line is fitted to at a step that is a multiple of twenty."""
    return np.arange(last - LAG - Trend.WINDOW + 1, last - LAG + 1)


def leverage(logs: np.ndarray, log: float) -> float:
    """The variance of a least-squares line at a point, of values of variance 1 (any textbook on regression)."""
    return 1 / len(logs) + (log - logs.mean()) ** 2 / ((logs - logs.mean()) ** 2).sum()


def test_line_and_spread_are_those_of_least_squares_in_log_step():
    rng = np.random.default_rng(0)
    steps = np.arange(1, 301)
    noise = np.clip(rng.standard_normal((300, 6)), -2, 2)  # nothing for Huber's weights to do
    values = 4.0 - 0.8 * np.log(steps)[:, None] + 0.1 * noise
    level, sd = line_of(after(values), 301, 6)
    used = window(300)
    for column in range(6):
        observed = values[used - 1, column]
        fit = np.polyfit(np.log(used), observed, 1)
        residual = observed - np.polyval(fit, np.log(used))
        # The values are kept in single precision.
        assert level[column] == pytest.approx(np.polyval(fit, math.log(301)), abs=1e-4)
        assert sd[column] == pytest.approx(math.sqrt((residual**2).sum() / (len(used) - 2)), rel=1e-3)


def with_outliers(share: float) -> tuple[np.ndarray, np.ndarray]:
    """Level, in the middle of a window, and sd of 200 series about 0 with a share of outliers of 20 sd."""
    rng = np.random.default_rng(1)
    clean = rng.standard_normal((300, 200))
    values = np.where(rng.random(clean.shape) < share, clean + 20, clean)
    assert values[window(300) - 1].mean() == pytest.approx(20 * share, rel=0.1)  # the level of least squares
    return line_of(after(values), 210, 200)


def test_some_outliers_hardly_move_the_line():
    """Of 2 %: an outlier that counts as 3 sd moves a mean by 0.02 · 3 sd."""
    level, sd = with_outliers(0.02)
    assert abs(level.mean()) < 0.12
    assert 0.9 < sd.mean() < 2.0


def test_a_tenth_of_outliers_hardly_moves_the_line():
    level, sd = with_outliers(0.1)
    assert abs(level.mean()) < 1.0
    assert 0.9 < sd.mean() < 2.5


@pytest.mark.parametrize("slope", [0.0, -5.0])
def test_z_of_the_mean_of_new_values_is_standard_normal(slope):
    """2,000 series: an estimated variance has a standard error of 0.032. An sd of 98 degrees of freedom makes it 98/96.

    A single z is the distance from the line, whose own error comes on top. The values of a long span are measured from
    up to four lines, whose errors cancel in part: its z is a little smaller.
    """
    rng = np.random.default_rng(2)
    logs = np.log(np.arange(1, 341))
    values = rng.standard_normal((340, 2000)) + slope * logs[:, None]
    seen = after(values[:300])
    for i in range(300, 340):
        z, *means = seen.see(i + 1, values[i], keep_out=True)
    assert z.var() == pytest.approx((1 + leverage(np.log(window(330)), logs[-1])) * 98 / 96, abs=4 * 0.032 * 1.1)
    for span, row in zip(SPANS, means, strict=True):
        assert 98 / 96 - 4 * 0.032 - (0.1 if span > 10 else 0) < row.var() < 98 / 96 + 4 * 0.032
    for row in (z, *means):
        assert abs(row.mean()) < 4 * 1.05 / math.sqrt(2000)


@pytest.mark.parametrize("likeness", [0.0, 0.3, 0.5])
def test_means_of_values_that_resemble_their_neighbours_scatter_as_their_z_says(likeness):
    """An autoregressive process, where the mean of 20 scatters up to 1.7 times as much as one of independent values.

    What a line's fit takes of the slow part, and a power law for an exponential one, cost up to a third of it.
    """
    rng = np.random.default_rng(3)
    spreads = []
    for _ in range(8):
        values = rng.standard_normal((261, 40))
        for row in range(1, 261):
            values[row] = likeness * values[row - 1] + math.sqrt(1 - likeness**2) * values[row]
        plain, alike = (Trend(np.full(40, 1e-6), np.zeros(40), SPANS, alike=which) for which in ((), (slice(0, 40),)))
        for step, row in enumerate(values, 1):
            judged = [each.see(step, row, keep_out=step == 261)[1 + SPANS.index(20)] for each in (plain, alike)]
        spreads.append([np.mean(np.square(z)) for z in judged])
    without, with_memory = np.sqrt(np.mean(spreads, axis=0))
    lags = np.arange(1, 20)
    truth = math.sqrt(1 + 2 * ((1 - lags / 20) * likeness**lags).sum())
    assert without == pytest.approx(truth, rel=0.2)
    assert 0.85 < with_memory < 1.3


def last_means(values: np.ndarray) -> np.ndarray:
    """The z of the newest means of 20, of series that are alike."""
    made = Trend(np.full(values.shape[1], 1e-6), np.zeros(values.shape[1]), SPANS, alike=(slice(0, values.shape[1]),))
    with np.errstate(all="ignore"):
        for step, row in enumerate(values, 1):
            judged = made.see(step, row, keep_out=step == len(values))
    return judged[1 + SPANS.index(20)]


@pytest.mark.parametrize("other", [math.nan, 0.0, 3.0, math.inf])
def test_a_series_that_is_missing_or_constant_says_nothing_of_those_like_it(other):
    values = np.random.default_rng(13).standard_normal((261, 8))
    values[:, :4] = other
    np.testing.assert_allclose(last_means(values)[4:], last_means(values[:, 4:]), rtol=0.1)


def test_one_of_eight_series_that_has_shifted_says_little_of_the_others():
    values = np.random.default_rng(14).standard_normal((261, 8))
    as_it_was = last_means(values)
    values[190:, 0] += 6.0
    np.testing.assert_allclose(last_means(values)[1:], as_it_was[1:], rtol=0.1)


def test_without_an_incident_the_smaller_one_of_two_comparisons_counts():
    """So that means of short spans are no larger than normal, and the longest is as before."""
    rng = np.random.default_rng(3)
    values = rng.standard_normal((340, 2000))
    seen = trend(2000)
    for i, row in enumerate(values):
        _, *means = seen.see(i + 1, row)
    for row in means:
        assert 0.3 < row.var() < 1 + 4 * 0.032


def test_a_lasting_change_is_seen_at_full_size_within_each_span():
    rng = np.random.default_rng(4)
    values = rng.standard_normal((340, 1000))
    values[300:] += 3.0
    seen = trend(1000)
    singles, means = [], {}
    for i, row in enumerate(values):
        z, *by_span = seen.see(i + 1, row)
        if i >= 300:
            singles.append(z.mean())
        for span, mean in zip(SPANS, by_span, strict=True):
            if i == 299 + span:
                means[span] = mean.mean()
    # No line is bent by what has just begun; each mean has a standard error of 0.03, and fits scatter by as much.
    np.testing.assert_allclose(singles, 3.0, rtol=0, atol=0.3)
    for span in SPANS[:-1]:
        # Against the rest of the longest span, and against the line.
        line = leverage(np.log(window((299 + span) // 20 * 20)), math.log(300 + span / 2))
        error = max(1 / (LAG - span), line)
        full = 3.0 / math.sqrt(1 / span + error)
        assert 0.85 * full < means[span] < 1.05 * full
    at = np.log(window(320))  # the line that judged at 340
    assert means[40] == pytest.approx(3.0 / math.sqrt(1 / 40 + leverage(at, math.log(320))), rel=0.1)


def test_a_single_wild_value_counts_as_a_bounded_one_in_means():
    values = np.random.default_rng(5).standard_normal((300, 50))
    seen = after(values)
    _, *means = seen.see(301, np.full(50, 1e9))
    assert (means[0] < (FAR + 3) / math.sqrt(3) + 2.5).all()


def test_the_scatter_is_that_of_the_newest_values_and_no_shift_is_part_of_it():
    """Of 200 series at once. A median of 39 changes of normal values, which overlap, is known to some 15 %."""
    rng = np.random.default_rng(5)
    values = 2.0 + 0.1 * rng.standard_normal((400, 200))

    def scatters(changed: np.ndarray) -> list[float]:
        made = after(np.vstack([values, changed]))
        return [made.scatter(column) for column in range(200)]

    noise = rng.standard_normal((LAG, 200))
    assert np.median(scatters(2.0 + 0.2 * noise)) == pytest.approx(2.0, rel=0.1)
    for shift in (0.0, 0.3):
        assert np.median(scatters(2.0 + shift + 0.1 * noise)) < 1.1
    assert trend(1).scatter(0) == 1.0


def test_forgotten_columns_begin_anew_and_the_others_go_on():
    values = np.random.default_rng(6).standard_normal((460, 4))
    one = after(values[:300])
    other = copy.deepcopy(one)
    one.forget(slice(0, 2))
    judged_again = None
    for i in range(300, 460):
        judged, whole = one.see(i + 1, values[i]), other.see(i + 1, values[i])
        np.testing.assert_array_equal(judged[:, 2:], whole[:, 2:])
        if judged_again is None and not np.isnan(judged[0, :2]).any():
            judged_again = i + 1 - 300
        elif judged_again is None:
            assert np.isnan(judged[:, :2]).all()
    # LEAST values that are older than the longest span, up to ten samples until the next fit.
    assert Trend.LEAST + LAG < judged_again <= Trend.LEAST + LAG + 11


def test_kept_out_values_do_not_bend_the_line_until_patience_ends():
    rng = np.random.default_rng(7)
    values = rng.standard_normal((300 + PATIENCE + 200, 100))
    values[300:] += 10
    seen = after(values[:300])
    z = [seen.see(i + 1, values[i], keep_out=True)[0].mean() for i in range(300, len(values))]
    # Lines of fewer values scatter more; mean of 100 series: 0.1 for the values.
    assert all(8 < each < 12 for each in z[:PATIENCE])
    assert abs(z[-1]) < 0.6


def test_missing_values_are_neither_judged_nor_kept():
    rng = np.random.default_rng(8)
    values = np.clip(rng.standard_normal((300, 40)), -2, 2)
    missing = rng.random(values.shape) < 0.25
    level, sd = line_of(after(np.where(missing, np.nan, values)), 301, 40)
    used = window(300)
    for column in range(40):
        kept = used[~missing[used - 1, column]]
        assert len(kept) >= Trend.LEAST
        observed = values[kept - 1, column]
        # Steps of the whole window are the origin, as of any line.
        fit = np.polyfit(np.log(kept), observed, 1)
        assert level[column] == pytest.approx(np.polyval(fit, math.log(301)), abs=1e-3)
        residual = observed - np.polyval(fit, np.log(kept))
        assert sd[column] == pytest.approx(math.sqrt((residual**2).sum() / (len(kept) - 2)), rel=1e-2)
    seen = after(np.where(missing, np.nan, values))
    assert np.isnan(seen.see(301, np.full(40, np.nan))[0]).all()


def test_a_series_with_too_few_values_is_not_judged():
    values = np.random.default_rng(9).standard_normal((300, 2))
    values[::2, 0] = np.nan  # 50 of a window
    judged = after(values).see(301, np.zeros(2))
    assert np.isnan(judged[:, 0]).all()
    assert not np.isnan(judged[:, 1]).any()


def test_running_sums_stay_those_of_the_values():
    """Over 3,000 samples of all sizes, some of them missing."""
    rng = np.random.default_rng(10)
    values = rng.standard_t(1, (3000, 5))
    values[rng.random(values.shape) < 0.1] = np.nan
    seen = trend(5)
    history = []
    for i, row in enumerate(values):
        z, *means = seen.see(i + 1, row)
        history.append(np.clip(z, -FAR, FAR))
    newest = np.array(history[-LAG:])
    count = (~np.isnan(newest)).sum(0)
    fitted = window(2980)  # the newest line that has judged was fitted at 2,980
    known = [fitted[~np.isnan(values[fitted - 1, column])] for column in range(5)]
    error = np.array([leverage(np.log(steps), math.log(2980)) for steps in known])  # in the middle
    expected = np.nanmean(newest, axis=0) / np.sqrt(1 / count + error)
    np.testing.assert_allclose(means[-1], expected, rtol=1e-9)


def test_a_young_run_is_not_judged():
    values = np.zeros((500, 1)) + np.random.default_rng(11).standard_normal((500, 1))
    seen = trend(1)
    blind = [np.isnan(seen.see(i + 1, row)[0][0]) for i, row in enumerate(values)]
    assert all(blind[: seen.blind])
    assert not any(blind[seen.blind :])


def level_after(values: np.ndarray, **options: int) -> Level:
    made = Level(values.shape[1], **({"memory": 10, "spread_memory": 30, "blind": 30} | options))
    for row in values:
        made.see(row, 0.01)
    return made


def test_a_pulse_stands_out_once_and_a_lasting_change_until_patience_ends():
    rng = np.random.default_rng(12)
    quiet = rng.standard_normal((200, 1))
    pulse = level_after(quiet, patience=5)
    lasting = copy.deepcopy(pulse)
    assert pulse.see(np.array([50.0]), 0.01)[0] > 20
    assert abs(pulse.see(np.array([0.0]), 0.01)[0]) < 3
    z = [lasting.see(np.array([50.0]), 0.01)[0] for _ in range(60)]
    assert min(z[:6]) > 20
    # The level goes over with a memory of 10: at most exp(-50 / 10) of the change is left; the spread has grown.
    assert abs(z[-1]) < 0.5


def test_a_value_moves_a_level_by_three_standard_deviations_at_most():
    """Closed form: the level moves by 3 sd / memory, the mean distance by (3 sd - it) / its memory."""
    made = level_after(np.random.default_rng(13).standard_normal((400, 1)))
    low, high = (copy.deepcopy(made).see(np.array([value]), 0.0)[0] for value in (0.0, 1.0))
    sd = 1.0 / (high - low)
    level = -low * sd
    far = level + 5 * sd
    assert made.see(np.array([far]), 0.0)[0] == pytest.approx(5.0)
    factor = 1.2533  # √(π/2): the sd of a normal distribution over its mean distance
    spread = sd / factor
    new_sd = factor * (spread + (3 * sd - spread) / 30)
    expected = (far - (level + 3 * sd / 10)) / new_sd
    assert made.see(np.array([far]), 0.0)[0] == pytest.approx(expected, rel=1e-6)


def test_a_levels_z_is_about_standard_normal():
    """A level of memory m has the variance 1/(2m - 1) of a value; the spread scatters too: within 15 %."""
    values = np.random.default_rng(14).standard_normal((600, 2000))
    made = level_after(values[:-1], memory=100, spread_memory=100)
    z = made.see(values[-1], 0.01)
    assert abs(z.mean()) < 4 / math.sqrt(2000)
    assert z.var() == pytest.approx(1.0, abs=0.15)


def test_a_level_is_blind_at_first_and_after_it_was_forgotten():
    values = np.random.default_rng(15).standard_normal((100, 2))
    made = Level(2, memory=10, spread_memory=30, blind=30)
    judged = np.array([~np.isnan(made.see(row, 0.01)) for row in values])
    assert not judged[:30].any()
    assert judged[30:].all()
    made.forget(np.array([True, False]))
    judged = np.array([~np.isnan(made.see(row + 100, 0.01)) for row in values[:40]])
    assert not judged[:30, 0].any()
    assert judged[30:, 0].all()
    assert judged[:, 1].all()


def test_a_missing_value_leaves_a_level_as_it_is():
    made = level_after(np.random.default_rng(16).standard_normal((100, 1)))
    other = copy.deepcopy(made)
    assert np.isnan(other.see(np.array([np.nan]), 0.01)[0])
    assert np.isinf(other.see(np.array([np.inf]), 0.01)[0])
    assert other.see(np.array([1.0]), 0.01) == made.see(np.array([1.0]), 0.01)


def test_what_is_kept_out_does_not_become_normal():
    made = level_after(np.random.default_rng(17).standard_normal((100, 1)), patience=50)
    first = made.see(np.array([5.0]), 0.01, keep_out=True)[0]
    for _ in range(49):
        assert made.see(np.array([5.0]), 0.01, keep_out=True)[0] == first
    for _ in range(100):
        last = made.see(np.array([5.0]), 0.01, keep_out=True)[0]
    assert abs(last) < 0.5
