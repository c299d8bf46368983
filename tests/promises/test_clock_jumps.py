"""Promise: a wall clock that jumps, for the trainer and its courier alike, changes nothing."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

from daemons import ack, response, welcome

from sharpwatch.v1 import types_pb2

DAY = 86_400
CODE = """
import time
trainer = Trainer()
while not select.select([sys.stdin], [], [], 0)[0]:
    trainer.step()
    say(clock=time.time())
trainer.close()
"""


def test_a_clock_that_jumps_a_year_ahead_and_two_back(train, serve, assert_unchanged, tmp_path):
    late = types_pb2.Command(
        id="late",
        apply_at_step=1,
        expires_at_unix_ns=int((time.time() + DAY) * 1e9),
        set_multipliers=types_pb2.MultiplierSet(multipliers={"ffn": 0.5}),
    )
    order = []

    def ordering(_, samples):
        yield welcome()
        for sample in samples:
            yield ack(sample.sequence)
            while order:
                yield order.pop()

    daemon = serve(ordering)
    offset = tmp_path / "offset"
    offset.write_text("+0d")
    library = Path(importlib.util.find_spec("libfaketime").origin).parent / "vendor/libfaketime/src/libfaketime.so.1"
    trainer = train(
        CODE,
        address=daemon.address,
        fresh=True,
        LD_PRELOAD=str(library),
        FAKETIME_TIMESTAMP_FILE=str(offset),
        FAKETIME_NO_CACHE="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",
    )
    trainer.wait(lambda: trainer.latest("clock"))
    for days in (365, -365):
        offset.write_text(f"{days:+d}d")
        trainer.wait(lambda days=days: abs(trainer.latest("clock") - time.time() - days * DAY) < DAY)
        sent = len(daemon.sequences)
        daemon.wait(lambda sent=sent: len(daemon.sequences) > sent + 5)
        if days > 0:
            order.append(response(command=late))  # it has expired by this trainer's clock
            daemon.wait(lambda: any(sample.results for sample in daemon.samples))
    assert trainer.end() == 0
    assert_unchanged(trainer)
    assert trainer.latest("swallowed") == 0
    assert trainer.latest("dropped") == {}
    assert daemon.sequences == list(range(1, len(trainer.steps) + 2))
    assert len(daemon.hellos) == 1
    (result,) = [each for sample in daemon.samples for each in sample.results]
    assert result.outcome == types_pb2.COMMAND_OUTCOME_EXPIRED
    taken = [sample.taken_at_unix_ns / 1e9 for sample in daemon.samples]
    assert max(taken) - min(taken) > 700 * DAY
