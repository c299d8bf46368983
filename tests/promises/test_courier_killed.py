"""Promise: a courier that is killed or stopped changes nothing, is replaced, and loses nothing that is kept."""

from __future__ import annotations

from daemons import await_end

KILLING = """
trainer = Trainer()
for _ in range(3):
    newest = trainer.steps
    while trainer.transport._spool.settled <= newest:  # it is at work
        trainer.step()
    old = trainer.transport.courier_pid
    os.kill(old, signal.SIGKILL)
    while trainer.transport.courier_pid in (old, None):
        trainer.step()
trainer.train(10)
trainer.close()
"""
STOPPED = """
trainer = Trainer()
trainer.train(1)
os.kill(trainer.transport.courier_pid, signal.SIGSTOP)
say(courier=trainer.transport.courier_pid)
trainer.train(60)
say(acknowledged=trainer.transport._spool.settled)
trainer.close()
"""


def test_a_courier_killed_three_times(train, serve, assert_unchanged):
    daemon = serve()
    trainer = train(KILLING, address=daemon.address)
    assert trainer.end() == 0
    assert_unchanged(trainer)
    assert trainer.latest("swallowed") == 0
    assert trainer.latest("dropped") == {}
    assert len(daemon.hellos) in (3, 4)  # the last may not have come so far
    assert set(daemon.sequences) == set(range(1, len(trainer.steps) + 2))


def test_a_courier_that_is_stopped(train, serve, assert_unchanged):
    daemon = serve()
    trainer = train(STOPPED, address=daemon.address)
    assert trainer.end() == 0
    assert_unchanged(trainer)
    assert trainer.latest("acknowledged") <= 1  # nothing of the sixty steps
    assert trainer.latest("swallowed") == 0
    await_end(trainer.latest("courier"))
    assert daemon.sequences == list(range(1, 63))  # as soon as it could go on
