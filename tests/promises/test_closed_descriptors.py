"""Promise: in a program that closes descriptors that are not its own, no file gets a byte of ours, or is closed."""

from __future__ import annotations

CODE = """
trainer = Trainer()
trainer.train(5)
old = trainer.transport.courier_pid
os.closerange(3, 256)
files = [open(str(number), "w+b") for number in range(32)]  # under the numbers that the pipes had, too
assert max(file.fileno() for file in files) > 16
while trainer.transport.courier_pid in (old, None):
    trainer.step()
trainer.train(5)
trainer.close()
say(sizes=[os.fstat(file.fileno()).st_size for file in files])
"""


def test_files_under_the_numbers_of_our_pipes(train, serve, assert_unchanged, tmp_path):
    daemon = serve()
    trainer = train(CODE, address=daemon.address, folder=tmp_path)
    assert trainer.end() == 0
    assert_unchanged(trainer)
    assert trainer.latest("sizes") == [0] * 32
    assert trainer.latest("swallowed") == 0
    assert trainer.latest("dropped") == {}
    assert set(daemon.sequences) == set(range(1, len(trainer.steps) + 2))
