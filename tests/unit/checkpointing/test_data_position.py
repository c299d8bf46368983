"""Which batches each step took, held against lists of them."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from sharpwatch.checkpointing.data_position import DataPosition, holds, nth_kept, rescaled, union

RANGES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=5)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=40))
def test_a_position_knows_what_every_step_took(paces):
    position, taken = DataPosition(), [0]
    for step, pace in enumerate(paces, 1):
        taken.append(taken[-1] + pace)
        position.mark(step, taken[-1])
        position.mark(step, taken[-1] + 1)  # a later micro-batch, of the next step
    again = DataPosition(position.corners)
    assert [again.batches(step) for step in range(len(taken))] == taken
    assert again.batches(len(taken) + 1) == taken[-1] + 2 * paces[-1]


def test_a_steady_position_stays_small():
    position = DataPosition()
    for step in range(1, 10_000):
        position.mark(step, 4 * step)
    assert len(position.corners) == 2


@given(RANGES)
def test_a_union_is_the_same_batches_in_order_and_apart(ranges):
    merged = union(ranges)
    truth = {batch for first, last in ranges for batch in range(first, last)}
    assert [batch for batch in range(40) if holds(merged, batch)] == sorted(truth)
    assert all(left[1] < right[0] for left, right in pairwise(merged))


@given(RANGES, st.integers(0, 30))
def test_the_nth_kept_batch(ranges, number):
    merged = union(ranges)
    assert nth_kept(merged, number) == [batch for batch in range(200) if not holds(merged, batch)][number]


@given(RANGES, st.integers(1, 4), st.integers(1, 4))
def test_ranges_hold_as_much_data_at_another_pace(ranges, was, now):
    merged = union(ranges)
    again = rescaled(merged, Fraction(was, now))  # a batch of n ranks is n portions of data
    held = {portion for portion in range(200) if holds(merged, portion // was)}
    found = {portion for portion in range(200) if holds(again, portion // now)}
    assert held <= found
    assert len(found - held) <= 2 * (now - 1) * len(merged)
