"""Promise: a courier that hangs ends itself, whatever signals the trainer blocks or ignores, and is replaced."""

from __future__ import annotations

from daemons import await_end

CODE = """
from sharpwatch.agent.transport import courier_launcher

HANGING = '''
import os, time
from sharpwatch.agent.transport import courier
async def hang(*_):
    os.write(2, b"hangs")
    time.sleep(3600)
courier._HANG_SECONDS = 1
courier.Courier._session = hang
main()
'''
whole = courier_launcher._COURIER_CODE
courier_launcher._COURIER_CODE = whole.removesuffix("main()\\n") + HANGING
signal.signal(signal.SIGALRM, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
trainer = Trainer()
trainer.step()
say(courier=trainer.transport.courier_pid)
courier_launcher._COURIER_CODE = whole
while trainer.transport._spool.settled < 1:
    trainer.step()
trainer.close()
"""


def test_a_courier_that_hangs(train, serve, assert_unchanged, tmp_path):
    daemon = serve()
    log = tmp_path / "log"
    trainer = train(CODE, address=daemon.address, SHARPWATCH_COURIER_LOG=str(log))
    assert trainer.end() == 0
    assert_unchanged(trainer)
    assert log.read_text().startswith("hangs")
    await_end(trainer.latest("courier"))
    assert trainer.latest("swallowed") == 0
    assert trainer.latest("dropped") == {}
    assert len(daemon.hellos) == 1
    assert set(daemon.sequences) == set(range(1, len(trainer.steps) + 2))
