"""Promise: a program that waits for its children meets none of ours, not even where it takes in orphans."""

from __future__ import annotations

from daemons import await_end

# A child of the program's own ends beside each courier, and the program reaps whatever there is.
WAITING = """
from pathlib import Path

def children():
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()

def reap():
    reaped = []
    while True:
        try:
            reaped.append(os.wait()[0])
        except ChildProcessError:
            return reaped

signals = []
signal.signal(signal.SIGCHLD, lambda *_: signals.append(1))
trainer = Trainer()
for _ in range(2):
    newest = trainer.steps
    while trainer.transport._spool.settled <= newest:  # it is at work
        trainer.step()
    say(signals=len(signals), children=children(), courier=trainer.transport.courier_pid)
    if (own := os.fork()) == 0:
        os._exit(0)
    say(reaped=reap(), own=[own])
    os.kill(trainer.transport.courier_pid, signal.SIGKILL)
    while trainer.transport.courier_pid is not None:
        trainer.step()
    signals.clear()
trainer.train_until_stopped()
trainer.close()
say(left=children())
"""
# As process 1 of a container does.
ADOPTING = """
import ctypes
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0

def children():
    return list(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))

trainer = Trainer()
for _ in range(2):
    newest = trainer.steps
    while trainer.transport._spool.settled <= newest:
        trainer.step()
    old = trainer.transport.courier_pid
    os.kill(old, signal.SIGKILL)
    while trainer.transport.courier_pid in (old, None):
        trainer.step()
    say(children=children(), courier=[trainer.transport.courier_pid])
trainer.close()
say(left=children())
"""


def test_a_program_that_waits_for_whatever_child_there_is(train, serve, assert_unchanged):
    daemon = serve()
    trainer = train(WAITING, address=daemon.address)
    trainer.wait_for("own")
    trainer.await_stream()
    assert trainer.end() == 0
    assert_unchanged(trainer)
    assert trainer.all_values("signals") == [1, 1]  # what starts a courier ends at once
    assert trainer.all_values("children") == [[], []]
    assert trainer.all_values("reaped") == trainer.all_values("own")
    assert trainer.latest("left") == []
    assert trainer.latest("swallowed") == 0
    assert trainer.latest("dropped") == {}
    for courier in trainer.all_values("courier"):
        await_end(courier)


def test_a_program_that_takes_in_orphans(train, serve, assert_unchanged):
    daemon = serve()
    trainer = train(ADOPTING, address=daemon.address)
    assert trainer.end() == 0
    assert_unchanged(trainer)
    assert trainer.all_values("children") == trainer.all_values("courier")  # and no zombie of the one before
    assert trainer.latest("left") == []
    assert trainer.latest("swallowed") == 0
    assert trainer.latest("dropped") == {}
