"""Where two series part, against series whose parting is known, and against SciPy."""

from __future__ import annotations

import numpy as np
import pytest

from sharpwatch.daemon.detection.parting import (
    BATCHES,
    FALSE_ALARMS,
    Differences,
    change_point,
    find_parting,
    t_bound,
    t_tail,
)

stats = pytest.importorskip("scipy.stats")
signal = pytest.importorskip("scipy.signal")


def autoregressive(correlation, count, rng):
    """AR(1) noise of variance 1."""
    noise = rng.standard_normal(count + 500) * np.sqrt(1 - correlation**2)
    return signal.lfilter([1], [1, -correlation], noise)[500:]


NOISES = {
    "white": lambda count, rng: rng.standard_normal(count),
    "heavy tails": lambda count, rng: rng.standard_t(3, count),
    "larger early": lambda count, rng: rng.standard_normal(count) / (1 + np.arange(count) / 50),
    "AR(1) 0.5": lambda count, rng: autoregressive(0.5, count, rng),
    "AR(1) 0.9": lambda count, rng: autoregressive(0.9, count, rng),
    "AR(1) -0.5": lambda count, rng: autoregressive(-0.5, count, rng),
}


@pytest.mark.parametrize("count", [200, 2000])
@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_series_that_do_not_differ_part_in_5_percent_at_most(noise, count):
    rng = np.random.default_rng(0)
    tries = 300
    parted = sum(bool(find_parting(Differences(noise(count, rng))).stretches) for _ in range(tries))
    assert parted <= stats.binom.ppf(0.999, tries, FALSE_ALARMS)


@pytest.mark.parametrize(("size", "correlation", "near"), [(2.0, 0.0, 16), (1.0, 0.5, 80), (2.0, 0.9, 120)])
def test_a_step_is_found_where_it_is(size, correlation, near):
    rng = np.random.default_rng(1)
    onsets, stays = [], 0
    for _ in range(60):
        values = autoregressive(correlation, 4000, rng)
        values[2500:] += size
        found = find_parting(Differences(values))
        stays += found.stays
        onsets += [stretch.first for stretch in found.stretches[-1:]]
    assert stays >= 57
    assert abs(np.median(onsets) - 2500) < near / 4
    assert np.quantile(np.abs(np.array(onsets) - 2500), 0.9) < near


def test_both_crossings_of_a_line():
    rng = np.random.default_rng(2)
    values = np.clip((np.arange(3000) - 1000) / 200, -1, 2) + 0.2 * rng.standard_normal(3000)
    below, above = find_parting(Differences(values)).stretches
    assert below.first == 0
    assert 850 < below.end <= above.first < 1150
    assert above.end == 3000
    assert below.onset.value < 0 < above.onset.value
    assert above.mean.value == pytest.approx(values[above.first :].mean())


def test_series_that_come_together_again():
    rng = np.random.default_rng(3)
    values = 0.1 * rng.standard_normal(4000)
    values[1000:1500] += 1
    found = find_parting(Differences(values))
    (stretch,) = found.stretches
    assert (abs(stretch.first - 1000) <= 4, abs(stretch.end - 1500) <= 4, found.stays) == (True, True, False)
    assert abs(found.last.errors) < 4


def test_one_spike_is_no_parting():
    values = 0.1 * np.random.default_rng(4).standard_normal(2000)
    values[700:710] += 5
    assert find_parting(Differences(values)).stretches == ()


def test_one_huge_loss_hides_nothing():
    values = 0.1 * np.random.default_rng(4).standard_normal(2000)
    values[1200:] += 0.5
    values[300] = 1e30
    (stretch,) = find_parting(Differences(values)).stretches
    assert abs(stretch.first - 1200) <= 4


def test_what_is_tolerated():
    values = 0.1 + 0.05 * np.random.default_rng(5).standard_normal(2000)
    assert find_parting(Differences(values, tolerance=0.05)).stays
    assert find_parting(Differences(values, tolerance=0.1)).stretches == ()
    values[:500] += 0.2
    found = find_parting(Differences(values, tolerance=0.2))
    assert ([abs(stretch.end - 500) <= 4 for stretch in found.stretches], found.stays) == ([True], False)


@pytest.mark.parametrize(("value", "sides"), [(0.0, []), (0.25, [True]), (-0.25, [False])])
def test_differences_without_noise(value, sides):
    found = find_parting(Differences(np.full(100, value)))
    assert [stretch.onset.value > 0 for stretch in found.stretches] == sides
    assert found.last.value == value


@pytest.mark.parametrize("count", [0, 1, BATCHES - 1])
def test_too_few_to_judge(count):
    found = find_parting(Differences(np.ones(count)))
    assert (found.windows, found.stretches, found.stays) == (0, (), False)
    assert np.isnan(found.last.stderr)


@pytest.mark.parametrize("correlation", [0.95, 0.99, 0.999])
def test_series_shorter_than_their_correlation_are_not_judged(correlation):
    rng = np.random.default_rng(9)
    found = [find_parting(Differences(autoregressive(correlation, 100, rng))) for _ in range(200)]
    assert np.mean([not each.windows for each in found]) > 0.6
    assert np.mean([bool(each.stretches) for each in found]) < 0.1


def test_the_error_of_a_mean():
    """Of means over many series: white noise, and noise whose mean has a known variance."""
    rng = np.random.default_rng(6)
    for correlation in (0.0, 0.6):
        found = [Differences(autoregressive(correlation, 2000, rng)).mean(400, 2000) for _ in range(200)]
        scatter = np.std([mean.value for mean in found])
        theory = np.sqrt((1 + correlation) / (1 - correlation) / 1600)
        assert scatter == pytest.approx(theory, rel=0.2)
        assert np.median([mean.stderr for mean in found]) == pytest.approx(theory, rel=0.3)


def test_a_mean_shorter_than_the_correlation_has_no_error():
    differences = Differences(autoregressive(0.9, 4000, np.random.default_rng(7)))
    assert differences.batch >= 8
    assert np.isnan(differences.mean(0, 64).stderr)
    assert np.isfinite(differences.mean(0, 4000).stderr)


@pytest.mark.parametrize("correlation", [-0.5, 0.0, 0.3, 0.6, 0.9])
def test_the_correlation_of_neighbours(correlation):
    differences = Differences(autoregressive(correlation, 100_000, np.random.default_rng(10)))
    assert differences.neighbour_correlation(1) == pytest.approx(correlation, abs=0.02)


@pytest.mark.parametrize("value", [0.0, 0.7, 3.0, 8.0])
def test_students_tail(value):
    assert t_tail(value) == pytest.approx(2 * stats.t.sf(value, BATCHES - 1), rel=1e-6)


@pytest.mark.parametrize("probability", [0.05, 1e-3, 1e-7])
def test_students_bound(probability):
    assert t_bound(probability) == pytest.approx(stats.t.isf(probability / 2, BATCHES - 1), rel=1e-6)


@pytest.mark.parametrize("level", [0.8, -0.8])
def test_the_change_point_has_the_highest_likelihood(level):
    rng = np.random.default_rng(8)
    for _ in range(20):
        values = rng.standard_normal(60) + level * (np.arange(60) >= 25)
        likelihood = [
            stats.norm.logpdf(values[:change]).sum() + stats.norm.logpdf(values[change:], level).sum()
            for change in range(60)
        ]
        assert change_point(values, level) == np.argmax(likelihood)
