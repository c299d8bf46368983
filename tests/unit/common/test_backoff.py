from __future__ import annotations

import random

from sharpwatch.agent.transport.courier import FIRST_WAIT_SECONDS, LAST_WAIT_SECONDS
from sharpwatch.common.backoff import Backoff


def test_waits_double_up_to_the_last_and_fall_back():
    backoff = Backoff(FIRST_WAIT_SECONDS, LAST_WAIT_SECONDS, random.Random(0))  # noqa: S311 - a test's own
    full = [min(FIRST_WAIT_SECONDS * 2**i, LAST_WAIT_SECONDS) for i in range(10)]
    waits = [backoff.next() for _ in full]
    assert all(wait / 2 <= got <= wait for wait, got in zip(full, waits, strict=True))
    assert full[-1] == LAST_WAIT_SECONDS < 5
    backoff.reset()
    assert backoff.next() <= FIRST_WAIT_SECONDS


def test_waits_differ_between_couriers():
    firsts = {Backoff(0.2, 4.0, random.Random(seed)).next() for seed in range(20)}  # noqa: S311 - a test's own
    assert len(firsts) > 10


def test_without_jitter_waits_are_whole():
    backoff = Backoff(1.0, 5.0)
    assert [backoff.next() for _ in range(4)] == [1.0, 2.0, 4.0, 5.0]
