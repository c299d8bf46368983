"""Promise: no step waits for a slow daemon, and it gets every sample in the end."""

from __future__ import annotations

import threading

from daemons import ack, welcome

STEPS = 100


def test_a_daemon_that_takes_one_sample_while_a_hundred_steps_are_taken(train, serve, assert_unchanged):
    go_on = threading.Event()

    def slow(_, samples):
        yield welcome()
        for sample in samples:
            yield ack(sample.sequence)
            go_on.wait()

    daemon = serve(slow)
    trainer = train(address=daemon.address)
    try:
        daemon.wait(lambda: daemon.samples)
        trainer.more(STEPS)
        assert len(daemon.samples) == 1  # it still holds the first in its hands
    finally:
        go_on.set()
    assert trainer.end() == 0
    assert_unchanged(trainer)
    assert trainer.latest("dropped") == {}
    assert trainer.latest("swallowed") == 0
    assert daemon.sequences == list(range(1, len(trainer.steps) + 2))
    assert daemon.samples[-1].closing
