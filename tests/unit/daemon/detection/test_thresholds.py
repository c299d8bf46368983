"""Thresholds against closed forms of exponential tails, and against simulated ones: do they keep the budget?"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from scipy import stats

from sharpwatch.daemon.detection.thresholds import NAMES, TAILS, TOGETHER, USUAL, Budget, Limit, Limits, Tail

FREE = tuple(name for name in NAMES if name.startswith(("update", "gradient", "both")))  # without a smallest threshold


def simulated(steps: int, seed: int, *, excess: float = 1.0, rate: float = 1.0) -> np.ndarray:
    """Statistics [steps, names] whose tails are those of the laboratory, or so many times as long and as frequent."""
    rng = np.random.default_rng(seed)
    level = np.array([tail.level for tail in TAILS.values()])
    length = np.array([tail.excess for tail in TAILS.values()]) * excess
    often = np.array([tail.rate for tail in TAILS.values()]) * rate
    shape = (steps, len(NAMES))
    above = rng.random(shape) < often
    return np.where(above, level + rng.exponential(length, shape), level * rng.random(shape))


def see(limits: Limits, row: np.ndarray, *, keep_out: bool = False) -> tuple[list[str], Mapping[str, Limit]]:
    return limits.see(row[:, None], keep_out=keep_out)


def found(**sizes: list[float]) -> np.ndarray:
    """Statistics of two layer blocks; those that are not named can't be judged."""
    return np.array([sizes.get(name.replace("-", "_"), [math.nan, math.nan]) for name in NAMES])


def alarms(rows: np.ndarray, limits: Limits, skip: int = 0) -> tuple[int, int]:
    """Warnings and pages, of any statistic, from sample `skip` on."""
    warnings = pages = 0
    for i, row in enumerate(rows):
        exceeded, now = see(limits, row)
        if i >= skip:
            warnings += bool(exceeded)
            pages += any(value > now[name][1] for name, value in zip(NAMES, row, strict=True))
    return warnings, pages


def test_a_tail_is_exceeded_as_often_as_an_exponential_one():
    tail = Tail(level=4.0, excess=0.5, rate=0.01)
    for rate in (1e-3, 1e-5, 1e-7):
        x = tail.exceeded_at(rate)
        assert tail.rate * stats.expon.sf(x, loc=4.0, scale=0.5) == pytest.approx(rate)
    assert tail.exceeded_at(0.5) == 4.0  # no tail is known below its level


def test_runs_with_the_laboratorys_tails_keep_the_budget():
    """Ten warnings in 10,000 steps, less those of "weight", which needs 8 sd; a third of one page."""
    steps = 60_000
    warnings, pages = alarms(simulated(steps, 0), Limits(USUAL, 20))
    assert pages <= stats.poisson.ppf(0.999, USUAL.pages * steps / 10_000)
    expected = USUAL.warnings * steps / 10_000
    # Estimated tails: each of the eleven mean excesses is known to 1/√(number of exceedances, about 70).
    assert 0.4 * expected < warnings < 1.5 * expected


@pytest.mark.parametrize(("excess", "rate"), [(1.5, 1.0), (1.0, 4.0), (1.5, 3.0)])
def test_a_runs_own_tail_is_learnt(excess, rate):
    """Up to a factor of 2 in the threshold, once 10,000 samples are seen."""
    steps = 50_000
    warnings, pages = alarms(simulated(steps, 1, excess=excess, rate=rate), Limits(USUAL, 20), skip=10_000)
    assert pages <= stats.poisson.ppf(0.999, USUAL.pages * 4)
    assert warnings <= stats.poisson.ppf(0.999, 1.3 * USUAL.warnings * 4)


@pytest.mark.parametrize(("values", "least", "most"), [(0.5, 0.8, 0.95), (100.0, 1.9, 2.0)], ids=["quiet", "wild"])
def test_a_runs_own_tail_moves_thresholds_within_bounds(values, least, most):
    """Warnings', to 0.8 to 2 times what they were. Pages that come again and again raise their own further."""
    first, limits = Limits(USUAL, 20).now, Limits(USUAL, 20)
    level = np.array([tail.level for tail in TAILS.values()])
    for i in range(20_000):
        see(limits, values * level if i % (TOGETHER + 1) == 0 else 0.5 * level)
    for name in FREE:
        assert least - 1e-9 <= limits.now[name][0] / first[name][0] <= most + 1e-9
        if values < 1:
            assert least - 1e-9 <= limits.now[name][1] / first[name][1] <= most + 1e-9
    for name in NAMES:
        most = 25.0 if name == "weight" else 5.0
        assert limits.now[name][1] <= max(most * first[name][1], limits.now[name][0])


@pytest.mark.parametrize("sigma", [0.7, 1.0])
def test_weights_whose_changes_have_heavy_tails_keep_the_budget_of_pages(sigma):
    """Lognormal ones, whose median is above the level that tails of the laboratory begin at."""
    sizes = np.random.default_rng(4).lognormal(0.5, sigma, (60_000, 5)).max(1)
    limits, pages, last = Limits(USUAL, 20), 0, -TOGETHER
    for i, size in enumerate(sizes):
        _, now = limits.see(found(weight=[size, 0.0]), keep_out=False)
        if size > now["weight"][1]:
            pages += i - last >= TOGETHER
            last = i
    assert limits.now["weight"][0] > 8.0  # warnings have learnt, too
    assert pages <= stats.poisson.ppf(0.99, USUAL.pages * len(sizes) / 10_000)


def test_of_few_samples_a_part_counts():
    """After a fifth of 5,000 the factor is at most 2 to the power of a fifth."""
    first, limits = Limits(USUAL, 20).now, Limits(USUAL, 20)
    for i in range(1_000):
        see(limits, np.full(len(NAMES), 1e3 if i % 30 == 0 else 0.0))
        moved = [limits.now[name][0] / first[name][0] for name in FREE]
        assert 1.0 <= min(moved) <= max(moved) <= 2**0.2 + 1e-9
    assert moved == pytest.approx([2**0.2] * len(moved))


def pages_at(sizes: dict[int, float], steps: int) -> list[int]:
    """The samples at which a statistic that has some sizes, else 1, is worth a page."""
    limits = Limits(USUAL, 20)
    pages = []
    for i in range(steps):
        size = sizes.get(i, 1.0)
        _, held = limits.see(found(weight=[size, 0.0]), keep_out=False)
        if size > held["weight"][1]:
            pages.append(i)
    return pages


@pytest.mark.parametrize("size", [20.0, math.inf])
def test_what_pages_rarely_always_pages(size):
    every = dict.fromkeys(range(3_000, 60_000, 9_000), size)
    assert pages_at(every, 60_000) == list(every)


def test_what_pages_again_and_again_pages_three_times_unless_it_grows():
    often = dict.fromkeys(range(300, 3_000, 300), 20.0)
    assert pages_at(often | {2_900: 40.0}, 3_000) == [300, 600, 900, 2_900]


def test_more_layer_blocks_stand_out_by_chance_more_often():
    few, many = Limits(USUAL, 20).now, Limits(USUAL, 200).now
    for name in NAMES:
        shift = TAILS[name].excess * math.log(10) if name in FREE else 0.0
        assert many[name][0] - few[name][0] == pytest.approx(shift)


def test_a_smaller_budget_has_higher_thresholds():
    usual, small = Limits(USUAL, 20).now, Limits(Budget(pages=0.1, warnings=1.0), 20).now
    for name in NAMES:
        assert small[name][0] >= usual[name][0]
        assert small[name][1] >= usual[name][1]
    for name in FREE:
        further = TAILS[name].excess * math.log(10)  # for ten times as rare ones
        assert np.subtract(small[name], usual[name]) == pytest.approx(further)


def test_pages_are_rarer_than_warnings_and_some_statistics_are_worth_none():
    for name, (warning, page) in Limits(USUAL, 20).now.items():
        assert page >= warning
        assert math.isinf(page) == (name.startswith("drop") or name == "loss-40")
        assert warning >= 8 or name != "weight"


def test_what_an_incident_shows_is_not_learnt():
    limits = Limits(USUAL, 20)
    first = limits.now
    for i in range(6_000):
        see(limits, np.full(len(NAMES), 1e3 if i % 30 == 0 else 0.0), keep_out=True)
    assert [limit for limit, _ in limits.now.values()] == [limit for limit, _ in first.values()]


def test_neighbouring_exceedances_count_once():
    """A peak of ten samples is learnt as one of its highest."""
    level = np.array([tail.level for tail in TAILS.values()])
    single, wide = Limits(USUAL, 20), Limits(USUAL, 20)
    for i in range(10_000):
        see(single, level + 0.5 if i % 100 == 5 else level - 1)
        see(wide, level + 0.05 * min(i % 100, 10) if 0 < i % 100 < 15 else level - 1)
    for name in NAMES:
        assert wide.now[name] == pytest.approx(single.now[name])


def test_what_can_not_be_judged_is_passed_over():
    limits = Limits(USUAL, 20)
    assert limits.see(found(), keep_out=False)[0] == []
    assert limits.see(found(weight=[math.nan, 100.0]), keep_out=False)[0] == ["weight"]
    for _ in range(3_000):
        assert limits.see(found(update_5=[math.inf, math.nan]), keep_out=False)[0] == ["update-5"]
    assert all(math.isfinite(limit) for limit, _ in limits.now.values())
