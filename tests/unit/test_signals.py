from __future__ import annotations

import itertools
import signal
import sys

import pytest

from sharpwatch.agent import signals
from sharpwatch.agent.signals import signals_held


@pytest.fixture
def terminations():
    """One entry for each SIGTERM that the program's own handler was given."""
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    yield came
    signal.signal(signal.SIGTERM, before)


def interrupted_at(number, call):
    """Call with Ctrl-C pressed at line `number` of those of signals.py that it runs; whether it was interrupted."""
    lines = itertools.count()

    def trace(frame, event, _):
        if frame.f_code.co_filename != signals.__file__:
            return None
        if event == "line" and next(lines) == number:
            signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


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
        interrupted = interrupted_at(number, held)
        signal.raise_signal(signal.SIGTERM)
        assert len(terminations) == number + 1
        if not interrupted:
            break
    assert number > 10
