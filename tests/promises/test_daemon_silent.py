"""Promise: a daemon that takes everything and never answers changes nothing and holds nothing up.

Every run here has ended before any answer came: that no step waited for one needs no clock.
"""

from __future__ import annotations

import socket

from daemons import await_end, welcome

CODE = """
for address in ADDRESSES:
    trainer = Trainer(address=address)
    trainer.train(30)
    say(courier=trainer.transport.courier_pid)
    trainer.close()
"""


def never_welcomes(daemon, samples):
    del samples
    daemon.closing.wait()
    yield from ()


def never_acknowledges(daemon, samples):
    yield welcome()
    for _ in samples:
        pass
    daemon.closing.wait()


def test_a_daemon_that_never_answers(train, serve, assert_unchanged):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        daemons = serve(never_welcomes), serve(never_acknowledges)
        addresses = [f"127.0.0.1:{mute.getsockname()[1]}", *(daemon.address for daemon in daemons)]
        trainer = train(CODE.replace("ADDRESSES", repr(addresses)))
        assert trainer.end() == 0
    assert_unchanged(trainer)
    assert [len(run) for run in trainer.runs] == [30] * 3
    assert trainer.all_values("swallowed") == [0] * 3
    assert trainer.all_values("dropped") == [{"undelivered": 31}] * 3  # a sample a step and the goodbye
    for courier in trainer.all_values("courier"):
        await_end(courier)
