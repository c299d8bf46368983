from __future__ import annotations

import math

import pytest
import torch

from sharpwatch.curvature.statistics.estimate import stability_ratio


def test_averages_numerators_and_denominators_apart():
    found = stability_ratio([1.0, 8.0], [1.0, 2.0])
    assert found.value == pytest.approx(9.0 / 6.0)  # not the mean of 0.5 and 2
    assert found.probes == 2


def test_a_constant_ratio_has_no_error():
    found = stability_ratio([0.6, 1.2, 3.0], [1.0, 2.0, 5.0])
    assert found.value == pytest.approx(0.3)
    assert found.stderr == pytest.approx(0.0, abs=1e-12)


def test_one_probe_has_no_scatter():
    found = stability_ratio([1.0], [2.0])
    assert found.value == 0.25
    assert math.isnan(found.stderr)


@pytest.mark.parametrize("descent", [[], [-1.0], [0.0], [1.0, -2.0]])
def test_no_descent_has_no_ratio(descent):
    assert stability_ratio([1.0] * len(descent), descent) is None


def test_one_ascending_step_does_not_hide_the_rest():
    assert stability_ratio([1.0, 1.0], [3.0, -1.0]).value == pytest.approx(0.5)


def test_the_sign_of_curvature_stays():
    assert stability_ratio([-1.0, -3.0], [1.0, 1.0]).value == pytest.approx(-1.0)


def test_the_error_is_the_spread():
    # Correlated numerators and denominators, 30 % scatter: the delta method leaves out terms of 1/n, 8 probes.
    generator = torch.Generator().manual_seed(0)
    runs, probes = 4000, 8
    descent = 1 + 0.3 * torch.randn(runs, probes, generator=generator).double()
    curvature = 0.8 * descent + 0.3 * torch.randn(runs, probes, generator=generator)
    found = [stability_ratio(c.tolist(), d.tolist()) for c, d in zip(curvature, descent, strict=True)]
    values = torch.tensor([each.value for each in found])
    claimed = torch.tensor([each.stderr for each in found]).square().mean().sqrt()
    assert float(claimed / values.std()) == pytest.approx(1.0, abs=0.1)
    assert float(values.mean()) == pytest.approx(0.4, abs=4 * float(values.std()) / runs**0.5)
