"""The position of a run in its data: which batches each step took, and which are left out. Pure values."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from fractions import Fraction
from math import ceil, floor, gcd

Range = tuple[int, int]  # batches [first, last), counted from 0 in the order in which the data yields them


class DataPosition:
    """The number of batches taken when each step was done.

    It is a piecewise linear function, kept as its corners (step, batches). If every step takes the same number of
    batches, these are only its two ends.
    """

    def __init__(self, corners: Iterable[Sequence[int]] = ((0, 0),)) -> None:
        self.corners = [(step, batches) for step, batches in corners]

    def mark(self, step: int, batches: int) -> None:
        """Note that `batches` had been taken when `step` was done; only the first call for a step counts."""
        last = self.corners[-1]
        if step <= last[0]:
            return
        if len(self.corners) > 1 and _slope(self.corners[-2], last) == _slope(last, (step, batches)):
            self.corners.pop()
        self.corners.append((step, batches))

    def batches(self, step: int) -> int:
        """The number of batches taken when `step` was done; extrapolated past the newest step."""
        if len(self.corners) == 1:
            return self.corners[0][1] + step - self.corners[0][0]
        right = bisect_right(self.corners, step, key=lambda corner: corner[0])
        right = min(max(right, 1), len(self.corners) - 1)
        start, slope = self.corners[right - 1], _slope(self.corners[right - 1], self.corners[right])
        return start[1] + slope[0] * (step - start[0]) // slope[1]


def union(ranges: Iterable[Sequence[int]]) -> list[Range]:
    """The same batches as disjoint ranges in ascending order."""
    merged: list[Range] = []
    for first, last in sorted((first, last) for first, last in ranges if first < last):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged


def rescaled(ranges: Iterable[Sequence[int]], ratio: Fraction) -> list[Range]:
    """`ranges` in batches of which there are `ratio` for each old one; rounded so that they cover all of the data."""
    return union((floor(first * ratio), ceil(last * ratio)) for first, last in ranges)


def holds(ranges: Sequence[Range], batch: int) -> bool:
    """Whether `batch` is in one of `ranges`, which must be disjoint and in ascending order."""
    before = bisect_right(ranges, batch, key=lambda one: one[0])
    return before > 0 and batch < ranges[before - 1][1]


def nth_kept(ranges: Sequence[Range], number: int) -> int:
    """Batch `number`, from 0, of those outside `ranges`, which must be disjoint and in ascending order."""
    for first, last in ranges:
        if number < first:
            break
        number += last - first
    return number


def _slope(start: Range, end: Range) -> tuple[int, int]:
    """Batches for each step between two corners, as a reduced fraction."""
    batches, steps = end[1] - start[1], end[0] - start[0]
    divisor = gcd(batches, steps)
    return batches // divisor, steps // divisor
