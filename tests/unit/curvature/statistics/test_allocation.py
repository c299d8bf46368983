from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharpwatch.curvature.statistics.allocation import relative_error, worst

finite = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e100, max_value=1e100)


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
    assert worst({"qk": 0.1, "vo": 0.3, "ffn": 0.2}) == "vo"


def test_the_first_of_equals_goes_first():
    assert worst({"qk": math.inf, "vo": 0.3, "ffn": math.inf}) == "qk"
    assert worst({"vo": 0.0, "qk": 0.0}) == "vo"


def test_what_is_not_measured_yet_goes_before_what_is():
    assert worst({"qk": 1e9, "vo": math.nan}) == "vo"
    assert worst({"vo": math.nan, "qk": math.inf}) == "vo"
    assert worst({"vo": math.inf, "qk": math.nan}) == "vo"


def test_of_nothing_there_is_no_worst():
    with pytest.raises(ValueError, match="empty"):
        worst({})
