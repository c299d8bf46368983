"""Windows wait for their estimates, and nobody waits for them until they are too many."""

from __future__ import annotations

import asyncio

from sharpwatch.daemon.estimation.estimator import EstimationQueue, QueuedRequest


class Slow:
    """An estimator that waits for a signal to go on."""

    def __init__(self) -> None:
        self.batches: list[list[QueuedRequest]] = []
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()

    async def __call__(self, batch) -> None:
        self.batches.append(list(batch))
        self.begun.set()
        await self.go_on.wait()


def windows(count: int) -> list[QueuedRequest]:
    return [QueuedRequest(None, float(number)) for number in range(count)]


async def test_what_comes_in_meanwhile_is_the_next_batch_in_its_order():
    slow = Slow()
    queue = EstimationQueue(slow)
    first, *rest = windows(4)
    queue.put(first)
    await slow.begun.wait()
    for one in rest:
        queue.put(one)
    slow.go_on.set()
    await queue.settled()
    assert slow.batches == [[first], rest]
    queue.put(first)
    await queue.settled()
    assert slow.batches[2:] == [[first]]


async def test_there_is_room_until_there_is_none():
    slow = Slow()
    queue = EstimationQueue(slow, capacity=2)
    first, second, third = windows(3)
    await queue.room()
    queue.put(first)
    await slow.begun.wait()
    queue.put(second)
    await queue.room()
    queue.put(third)
    waiting = asyncio.create_task(queue.room())
    await asyncio.sleep(0)  # a turn of the loop, in which it would be done
    assert not waiting.done()
    slow.go_on.set()
    await waiting
    assert slow.batches == [[first], [second, third]]


async def test_who_gives_up_waiting_does_not_end_the_estimates():
    slow = Slow()
    queue = EstimationQueue(slow)
    queue.put(windows(1)[0])
    await slow.begun.wait()
    waiting = asyncio.create_task(queue.settled())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait((waiting,))
    slow.go_on.set()
    await queue.settled()
