"""Where a run stands in its data: which batches each step took, and which are left out. Pure values."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from fractions import Fraction
from math import ceil, floor, gcd

Range = tuple[int, int]  # batches [first, last), counted from 0 as the data brings them


class DataPosition:
    """How many batches had been taken when each step was done.

    Kept as the corners of a line: where every step takes as many batches as the one before, there are only its ends.
    """

    def __init__(self, corners: Iterable[Sequence[int]] = ((0, 0),)) -> None:
        self.corners = [(step, batches) for step, batches in corners]

    def mark(self, step: int, batches: int) -> None:
        """Step `step` is done, and `batches` have been taken; only a step's first mark counts."""
        last = self.corners[-1]
        if step <= last[0]:
            return
        if len(self.corners) > 1 and _pace(self.corners[-2], last) == _pace(last, (step, batches)):
            self.corners.pop()
        self.corners.append((step, batches))

    def batches(self, step: int) -> int:
        """Batches taken up to and with `step`; past the newest step, at its pace."""
        if len(self.corners) == 1:
            return self.corners[0][1] + step - self.corners[0][0]
        right = bisect_right(self.corners, step, key=lambda corner: corner[0])
        right = min(max(right, 1), len(self.corners) - 1)
        start, pace = self.corners[right - 1], _pace(self.corners[right - 1], self.corners[right])
        return start[1] + pace[0] * (step - start[0]) // pace[1]


def union(ranges: Iterable[Sequence[int]]) -> list[Range]:
    """The same batches as disjoint ranges in order."""
    merged: list[Range] = []
    for first, last in sorted((first, last) for first, last in ranges if first < last):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged


def paced(ranges: Iterable[Sequence[int]], pace: Fraction) -> list[Range]:
    """`ranges` of data of which `pace` batches are now made where there was one; rather more of it than less."""
    return union((floor(first * pace), ceil(last * pace)) for first, last in ranges)


def holds(ranges: Sequence[Range], batch: int) -> bool:
    """Whether `batch` is in one of the disjoint `ranges`, which are in order."""
    before = bisect_right(ranges, batch, key=lambda one: one[0])
    return before > 0 and batch < ranges[before - 1][1]


def nth_kept(ranges: Sequence[Range], number: int) -> int:
    """The batch that is number `number`, from 0, of those outside the disjoint `ranges`, which are in order."""
    for first, last in ranges:
        if number < first:
            break
        number += last - first
    return number


def _pace(start: Range, end: Range) -> tuple[int, int]:
    """Batches for each step between two corners, as a reduced fraction."""
    batches, steps = end[1] - start[1], end[0] - start[0]
    divisor = gcd(batches, steps)
    return batches // divisor, steps // divisor
