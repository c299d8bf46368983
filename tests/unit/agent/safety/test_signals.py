from __future__ import annotations

import itertools
import signal

import pytest
from interrupts import interrupted_at

from sharpwatch.agent.safety import signals
from sharpwatch.agent.safety.signals import signals_held


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
        interrupted = interrupted_at(signals, number, held)
        signal.raise_signal(signal.SIGTERM)
        assert len(terminations) == number + 1
        if not interrupted:
            break
    assert number > 10
