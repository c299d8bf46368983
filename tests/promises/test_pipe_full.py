"""Promise: a pipe that nobody reads holds no step up; what is kept is bounded, and what is not is counted."""

from __future__ import annotations

PENDING = 200_000
LARGEST = 100_000  # of one sample, by far: four sketches of six blocks make 25 kB
CODE = f"""
from sharpwatch.agent.transport.courier_handle import CourierHandle
transport = CourierHandle(address=os.environ["SHARPWATCH_ADDRESS"], pending_bytes={PENDING})
trainer = Trainer(transport=transport, probe_every=1)
trainer.train(1)
os.kill(trainer.transport.courier_pid, signal.SIGSTOP)
held = []
while trainer.transport.dropped.get("outbox_full", 0) < 20:
    trainer.step()
    held.append(trainer.transport._spool.size)
say(held=max(held), lost=trainer.transport.dropped["outbox_full"])
os.kill(trainer.transport.courier_pid, signal.SIGCONT)
while trainer.transport._spool.unsent:
    trainer.step()
trainer.close()
"""


def test_a_pipe_that_nobody_reads(train, serve, assert_unchanged):
    daemon = serve()
    trainer = train(CODE, address=daemon.address)
    assert trainer.end() == 0
    assert_unchanged(trainer)
    assert PENDING / 2 < trainer.latest("held") < PENDING + LARGEST
    assert trainer.latest("swallowed") == 0
    assert trainer.latest("dropped")["outbox_full"] >= trainer.latest("lost")
    assert trainer.latest("dropped").keys() == {"outbox_full"}
    assert len(daemon.sequences) == len(trainer.steps) + 1 - trainer.latest("dropped")["outbox_full"]
    assert daemon.sequences == sorted(set(daemon.sequences))
    # The daemon learns how many were dropped.
    assert dict(daemon.samples[-1].health.dropped) == trainer.latest("dropped")
