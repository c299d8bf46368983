"""Promise: a daemon that is not there changes nothing, holds nothing up, and costs what was not delivered, counted."""

from __future__ import annotations

from daemons import await_end, free_port

CODE = """
for address in ADDRESSES:
    trainer = Trainer(address=address)
    trainer.train(30)
    say(courier=trainer.transport.courier_pid)
    trainer.close()
"""


def test_without_a_daemon_the_run_is_the_same(train, assert_unchanged, tmp_path):
    addresses = [f"127.0.0.1:{free_port()}", f"unix:{tmp_path}/nobody.sock", "nowhere.invalid:7741"]
    trainer = train(CODE.replace("ADDRESSES", repr(addresses)))
    assert trainer.end() == 0
    assert_unchanged(trainer)
    assert [len(run) for run in trainer.runs] == [30] * len(addresses)
    assert trainer.all_values("swallowed") == [0] * len(addresses)
    assert trainer.all_values("failed_probes") == [{}] * len(addresses)
    # A sample a step and the goodbye.
    assert trainer.all_values("dropped") == [{"undelivered": 31}] * len(addresses)
    for courier in trainer.all_values("courier"):
        await_end(courier)
