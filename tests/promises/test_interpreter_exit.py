"""Promise: a trainer ends as it would without sharpwatch, however it ends, and what it sent arrives.

That it ends at all is held by the patience of the test, also where its courier was stopped.
"""

from __future__ import annotations

import os
import signal

from daemons import await_end

STOP = "os.kill(trainer.transport.courier_pid, signal.SIGSTOP); "
ENDINGS = {  # code: (exit status, whether it ended in order)
    "trainer.watch.close()": (0, True),
    "pass": (0, True),
    "sys.exit(3)": (3, True),
    "raise RuntimeError": (1, False),
    "trainer.watch.close(); os._exit(4)": (4, True),
    "os._exit(4)": (4, False),
    STOP + "pass": (0, True),
    STOP + "raise RuntimeError": (1, False),
}
# Every child is a trainer of its own, which ends as an interpreter does; only the imports are their parent's.
CODE = """
import torch._dynamo  # as the first optimizer does
for ending in ENDINGS:
    if (child := os.fork()) == 0:
        break
    say(ending=ending, status=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
else:
    os._exit(0)
trainer = Trainer(run=ending)
trainer.train(7)
say(courier=trainer.transport.courier_pid)
exec(ending)
"""


def test_endings(train, serve, assert_unchanged):
    daemon = serve()
    trainer = train(CODE.replace("ENDINGS", repr(list(ENDINGS))), address=daemon.address, fresh=True)
    assert trainer.end() == 0
    assert_unchanged(trainer)
    assert dict(zip(trainer.all_values("ending"), trainer.all_values("status"), strict=True)) == {
        ending: status for ending, (status, _) in ENDINGS.items()
    }
    for courier in trainer.all_values("courier"):
        await_end(courier)
    arrived = {hello.run: samples for hello, samples in zip(daemon.hellos, daemon.streams, strict=True)}
    assert arrived.keys() == ENDINGS.keys()
    for ending, (_, in_order) in ENDINGS.items():
        assert [sample.step for sample in arrived[ending]] == [1, 2, 3, 4, 5, 6, 7] + [7] * in_order, ending
        assert arrived[ending][-1].closing == in_order, ending


def test_a_stopped_courier_of_a_trainer_that_is_gone_ends_when_it_may_go_on(train):
    trainer = train(
        "trainer = Trainer()\ntrainer.step()\nsay(courier=trainer.transport.courier_pid)\n" + STOP + "os._exit(0)"
    )
    assert trainer.end() == 0
    os.kill(trainer.latest("courier"), signal.SIGCONT)
    await_end(trainer.latest("courier"))
