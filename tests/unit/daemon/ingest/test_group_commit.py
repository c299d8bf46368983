"""When the pipeline gathers samples, on a clock that the test moves."""

from __future__ import annotations

import pytest

from sharpwatch.daemon.ingest.group_commit import GATHER_SECONDS, Gathering


class Daemon:
    """A pipeline whose transactions take no time; samples come one by one, `rate` a second."""

    def __init__(self, rate: float) -> None:
        self.gathering = Gathering()
        self.now = 1000.0
        self.rate = rate
        self.waits: list[float] = []  # of the first sample of each transaction
        self.sizes: list[int] = []

    def work(self, seconds: float) -> None:
        end, due = self.now + seconds, self.now + 1 / self.rate
        while due < end:
            first = self.now = due
            wait = self.gathering.wait(self.now)
            self.now += wait
            count = 0
            while due <= self.now:
                due, count = due + 1 / self.rate, count + 1
            self.gathering.begin(count, self.now)
            self.waits.append(self.now - first)
            self.sizes.append(count)


@pytest.mark.parametrize("rate", [0.1, 1, 10, 100])
def test_nobody_waits_while_few_samples_come(rate):
    daemon = Daemon(rate)
    daemon.work(max(20.0, 5 / rate))
    assert set(daemon.waits) == {0.0}


@pytest.mark.parametrize("rate", [400, 1_000, 10_000])
def test_a_transaction_takes_in_what_comes_in_its_time(rate):
    daemon = Daemon(rate)
    daemon.work(3.0)
    later = daemon.sizes[len(daemon.sizes) // 2 :]
    assert sum(later) / len(later) == pytest.approx(rate * GATHER_SECONDS, rel=0.15)
    assert max(daemon.waits) <= GATHER_SECONDS


def test_the_wait_ends_when_samples_become_few():
    daemon = Daemon(2_000)
    daemon.work(2.0)
    assert daemon.waits[-1] > 0
    daemon.rate = 2.0
    daemon.waits.clear()
    daemon.work(10.0)
    assert set(daemon.waits[2:]) == {0.0}


def test_samples_that_come_at_once_are_counted():
    gathering = Gathering()
    for _ in range(200):
        gathering.begin(1, 1000.0)
    assert gathering.wait(1000.0) == pytest.approx(GATHER_SECONDS)
