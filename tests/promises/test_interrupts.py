"""Promise: Ctrl-C and signals end a trainer as they would without sharpwatch; the courier delivers, then ends."""

from __future__ import annotations

import os
import pty
import signal

import pytest
from daemons import await_end

# Opening a terminal makes it the session's own: Ctrl-C on it is for every process of the foreground group.
START = """
os.open(os.environ["TERMINAL"], os.O_RDWR)
trainer = Trainer()
trainer.step()
say(courier=trainer.transport.courier_pid)
"""
ON = "trainer.train(10**6)\n"
CAUGHT = """
try:
    trainer.train(10**6)
except KeyboardInterrupt:
    say(interrupted=True)
    select.select([sys.stdin], [], [])  # time in which a courier that had been interrupted would end
    trainer.close()
"""
HANDLED = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
trainer.train(10**6)
"""


@pytest.fixture
def terminal():
    """(write here, the name that a process opens)."""
    master, slave = pty.openpty()
    yield master, os.ttyname(slave)
    os.close(slave)
    os.close(master)


@pytest.fixture
def start(train, serve, terminal):
    def start(code):
        daemon = serve()
        trainer = train(START + code, address=daemon.address, TERMINAL=terminal[1])
        trainer.more(8)
        return daemon, trainer

    return start


@pytest.fixture
def assert_delivered(assert_unchanged):
    def check(daemon, trainer, *, goodbye):
        assert_unchanged(trainer)
        await_end(trainer.latest("courier"))
        assert len(daemon.hellos) == 1
        # The step at which it was interrupted may be taken and not printed.
        taken = len([sample for sample in daemon.samples if not sample.closing])
        assert taken in (len(trainer.steps), len(trainer.steps) + 1)
        assert daemon.sequences == list(range(1, len(daemon.samples) + 1))
        assert daemon.samples[-1].closing == goodbye

    return check


def test_ctrl_c_caught_by_the_loop(start, terminal, assert_delivered):
    daemon, trainer = start(CAUGHT)
    os.write(terminal[0], b"\x03")
    assert trainer.wait_for("interrupted")
    taken = trainer.latest("step")
    daemon.wait(lambda: len(daemon.samples) >= taken)  # the courier is well
    assert trainer.end() == 0
    assert_delivered(daemon, trainer, goodbye=True)
    assert trainer.latest("dropped") == {}


def test_ctrl_c_that_ends_the_trainer(start, terminal, assert_delivered):
    daemon, trainer = start(ON)
    os.write(terminal[0], b"\x03")
    assert trainer.end() == -signal.SIGINT
    assert_delivered(daemon, trainer, goodbye=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_that_ends_the_trainer_at_once(start, assert_delivered, number):
    daemon, trainer = start(ON)
    trainer.process.send_signal(number)
    assert trainer.end() == -number
    assert_delivered(daemon, trainer, goodbye=False)


def test_a_handler_that_ends_the_trainer_in_order(start, assert_delivered):
    daemon, trainer = start(HANDLED)
    trainer.process.send_signal(signal.SIGTERM)
    assert trainer.end() == 5
    assert_delivered(daemon, trainer, goodbye=True)
