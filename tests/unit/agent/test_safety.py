from __future__ import annotations

import itertools
import signal

import pytest
from interrupts import interrupted_at

from sharpwatch.agent import safety
from sharpwatch.agent.safety import OverheadTimer, signals_held


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds

    def fail(self):
        self.now += 1
        raise ZeroDivisionError


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(safety, "perf_counter", clock)
    return clock


def test_a_lap_tells_the_agents_seconds_from_the_loops(clock):
    watch = OverheadTimer()
    watch.start()
    clock.advance(8)
    with watch.agent():
        clock.advance(1)
        with watch.agent():
            clock.advance(2)
    watch.start()  # under way already
    clock.advance(16)
    assert watch.lap() == (24, 3)
    clock.advance(4)
    assert watch.lap() == (4, 0)


def test_a_lap_in_the_agents_work_divides_it(clock):
    watch = OverheadTimer()
    watch.start()
    with watch.agent():
        clock.advance(1)
        assert watch.lap() == (0, 1)
        clock.advance(2)
    clock.advance(4)
    assert watch.lap() == (4, 2)


def test_what_raises_is_counted_too(clock):
    watch = OverheadTimer()
    watch.start()
    with pytest.raises(ZeroDivisionError), watch.agent():
        clock.fail()
    clock.advance(2)
    assert watch.lap() == (2, 1)


def test_before_a_beginning_was_seen_nothing_is_returned(clock):
    watch = OverheadTimer()
    with watch.agent():
        clock.advance(1)
    assert watch.lap() is None
    clock.advance(2)
    watch.stop()
    assert watch.lap() is None
    clock.advance(4)
    assert watch.lap() == (4, 0)


@pytest.fixture
def terminations():
    """One entry for each SIGTERM that the program's own handler was given."""
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    yield came
    signal.signal(signal.SIGTERM, before)


def test_a_signal_waits_for_the_end_and_is_not_held_twice(terminations):
    with signals_held():
        signal.raise_signal(signal.SIGTERM)
        assert terminations == []
        signal.raise_signal(signal.SIGTERM)
        assert len(terminations) == 1
    assert len(terminations) == 2


def test_a_context_that_is_interrupted_anywhere_holds_nothing_later(terminations):
    def held():
        with signals_held():
            pass

    for number in itertools.count():
        interrupted = interrupted_at(safety, number, held)
        signal.raise_signal(signal.SIGTERM)
        assert len(terminations) == number + 1
        if not interrupted:
            break
    assert number > 10
