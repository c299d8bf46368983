"""Numbers are written as their errors allow."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharpwatch.cli.output import formatting


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (3.4e-9, 2e-10, "3.4e-09 ± 2e-10"),
        (3.4123e-9, 2.4e-10, "3.4e-09 ± 2e-10"),
        (3.4123e-9, 2.4e-12, "3.412e-09 ± 2e-12"),
        (2e-10, 3e-9, "2e-10 ± 3e-09"),  # nothing known but the size
        (9.97e-9, 9.6e-11, "1.00e-08 ± 1e-10"),  # both round up over a power of ten
        (0.4187, 0.031, "0.42 ± 0.03"),
        (412.3, 15.0, "410 ± 20"),
        (-14.92, 0.31, "-14.9 ± 0.3"),
        (123456789.0, 2e6, "1.23e+08 ± 2e+06"),
        (1.0, 1e-12, "1.00000 ± 1e-12"),
        (0.0, 0.2, "0.0 ± 0.2"),
        (1.5, 0.0, "1.5 ± 0"),
        (3.4123e-9, math.nan, "3.41e-09 ± ?"),
        (3.4123e-9, math.inf, "3.41e-09 ± ?"),
        (math.nan, 1.0, "nan"),
    ],
)
def test_value_and_error_stop_at_the_same_digit(value, stderr, text):
    assert formatting.with_error(value, stderr) == text


@given(
    value=st.floats(-1e30, 1e30, allow_nan=False).filter(lambda value: value == 0 or abs(value) > 1e-30),
    stderr=st.floats(1e-30, 1e30),
)
def test_what_is_written_is_within_rounding_of_what_was_measured(value, stderr):
    left, right = map(float, formatting.with_error(value, stderr).split(" ± "))
    # Rounded to the error's own place (half of it at most 0.5 × 10^place ≤ half the written error), to one digit of the
    # value where the error is larger than it, or to six digits.
    allowed = max(0.5 * right, 1e-5 * abs(value))
    assert abs(left - value) <= allowed * (1 + 1e-9) + (0.5 * abs(value) if stderr >= abs(value) else 0)
    assert right == pytest.approx(stderr, rel=0.5)


@pytest.mark.parametrize(
    ("ns", "now", "text"),
    [
        (0, 100.0, "never"),
        (100 * 10**9, 102.4, "2 s ago"),
        (100 * 10**9, 400.0, "5 min ago"),
        (10**9, 3 * 86400.0, "3 d ago"),
        (100 * 10**9, 99.5, "now"),
        (100 * 10**9, 70.0, "30 s ahead of this clock"),
    ],
)
def test_age(ns, now, text):
    assert formatting.age(ns, now) == text


def test_timestamps_are_utc():
    assert formatting.timestamp(1_700_000_000_123_456_789) == "2023-11-14T22:13:20Z"
    assert formatting.timestamp(0) == "–"


@pytest.mark.parametrize(
    ("values", "named", "text"),
    [
        ({"qk": 0.5}, None, "qk 0.5"),
        ({"vo": 0.8, "emb": 2.0, "ffn": 1.0}, None, "emb 2, vo 0.8"),
        ({"vo": 0.8, "ffn": 1.0}, {"ffn": 1.0}, "ffn 1, vo 0.8"),
        ({}, None, "every block 1"),
    ],
)
def test_multipliers_name_what_differs_from_one_or_was_asked_for(values, named, text):
    assert formatting.multipliers(values, named) == text
