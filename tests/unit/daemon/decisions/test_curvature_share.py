"""Multipliers from curvature shares, as a pure rule."""

from __future__ import annotations

import pytest

from sharpwatch.daemon.config.settings import CurvatureShareConfig
from sharpwatch.daemon.decisions.curvature_share import at_unit_multipliers, multipliers_from_shares


def test_small_shares_are_raised_by_the_root_of_their_ratio_up_to_the_largest():
    shares = {"ffn": 0.36, "vo": 0.16, "emb": 0.04, "qk": 0.01, "norm": 0.0}
    expected = {"ffn": 1.0, "vo": 1.5, "emb": 3.0, "qk": 4.0, "norm": 4.0}
    assert multipliers_from_shares(shares) == pytest.approx(expected)
    assert multipliers_from_shares(shares, CurvatureShareConfig(max=8.0, exponent=1.0)) == pytest.approx(
        {"ffn": 1.0, "vo": 2.25, "emb": 8.0, "qk": 8.0, "norm": 8.0}
    )


def test_only_ratios_count_and_a_share_below_zero_costs_nothing():
    assert multipliers_from_shares({"ffn": 9.0, "emb": 1.0}) == multipliers_from_shares({"ffn": 0.9, "emb": 0.1})
    assert multipliers_from_shares({"ffn": 0.9, "emb": -0.1}) == {"ffn": 1.0, "emb": 4.0}


@pytest.mark.parametrize("shares", [{"ffn": 0.0, "emb": -1.0}, {"ffn": float("nan")}, {}])
def test_without_a_positive_share_nothing_is_raised(shares):
    assert multipliers_from_shares(shares) == dict.fromkeys(shares, 1.0)


def test_parts_are_carried_back_to_multipliers_of_one():
    assert at_unit_multipliers({"ffn": 0.5, "emb": 0.2}, {"emb": 4.0}) == {"ffn": 0.5, "emb": 0.05}
