"""Waits between attempts: exponential backoff."""

from __future__ import annotations

import random


class Backoff:
    """Waits that double from `first` to `last` seconds.

    Args:
        first: The first wait, in seconds.
        last: The longest wait, in seconds.
        jitter: Draws each wait from [half of it, all of it], so that many clients do not come back at once.
    """

    def __init__(self, first: float, last: float, jitter: random.Random | None = None) -> None:
        self._first, self._last = first, last
        self._jitter = jitter
        self._wait = first

    def reset(self) -> None:
        """Begin anew with the first wait."""
        self._wait = self._first

    def next(self) -> float:
        """Seconds to wait now."""
        wait, self._wait = self._wait, min(2 * self._wait, self._last)
        return wait if self._jitter is None else wait * self._jitter.uniform(0.5, 1.0)
