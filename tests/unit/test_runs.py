"""Views are swapped whole, and waiting for them misses none."""

from __future__ import annotations

import asyncio

from sharpwatch.daemon.runs import Signal


async def test_a_version_that_came_before_the_wait_is_not_missed():
    signal = Signal()
    seen = signal.version
    signal.notify()
    assert await signal.after(seen) == 1


async def test_every_waiter_is_woken_once_for_many_changes():
    signal = Signal()
    waiters = [asyncio.create_task(signal.after(0)) for _ in range(3)]
    await asyncio.sleep(0)  # one turn of the loop: all of them wait
    signal.notify()
    signal.notify()
    assert await asyncio.gather(*waiters) == [2, 2, 2]
