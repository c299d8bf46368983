"""Runs that are nothing but noise keep the budget of false alarms; `benchmarks.faults.noise` has the long ones."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from benchmarks.faults.noise import DISTRIBUTIONS, correlated, false_alarms, observations

STEPS = 3_000
# A run within the budget has 0.3 pages and 3 warnings. A Poisson number exceeds this once in 4,000 cases.
PAGES, WARNINGS = (int(stats.poisson.ppf(1 - 1 / 4_000, budget * STEPS / 10_000)) for budget in (1.0, 10.0))
NORMAL = DISTRIBUTIONS["normal"]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_each_distribution_has_mean_0_and_variance_1(name):
    """But for regimes, whose variance changes. Correlated series have half of it in common."""
    drawn = DISTRIBUTIONS[name](np.random.default_rng(0), 200_000, 2)
    assert drawn.shape == (200_000, 2)
    assert abs(drawn.mean()) < 0.02
    expected = (0.7**2 + 1.5**2) / 2 if name == "regimes" else 1.0
    assert drawn.var() == pytest.approx(expected, rel=0.15)  # of Student's t3 the variance itself hardly has one
    shared = correlated(NORMAL)(np.random.default_rng(0), 100_000, 2)
    assert np.corrcoef(shared.T)[0, 1] == pytest.approx(0.5, abs=0.01)


def test_a_seed_gives_the_same_run():
    first, second = (list(observations(NORMAL, 50, seed=3)) for _ in range(2))
    assert repr(first) == repr(second)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "blocks"),
    [("normal", "independent"), ("student-t3", "independent"), ("ar-0.5", "correlated"), ("regimes", "independent")],
)
def test_noise_keeps_the_budget_of_pages(name, blocks):
    noise = DISTRIBUTIONS[name] if blocks == "independent" else correlated(DISTRIBUTIONS[name])
    found = false_alarms(noise, STEPS, seed=1, weights=NORMAL)
    assert found.pages <= PAGES, found.paged_by
    if name == "normal":
        assert found.warnings <= WARNINGS


@pytest.mark.slow
def test_noise_in_weights_keeps_the_budget_of_pages():
    """Of normal noise; changes of weights with heavy tails do not (docs/detection.md)."""
    found = false_alarms(NORMAL, STEPS, seed=1, weights=NORMAL)
    assert found.pages <= PAGES, found.paged_by
