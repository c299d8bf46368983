"""Promise: a full disk, the daemon's or the trainer's own, changes nothing and loses nothing."""

from __future__ import annotations

import json
import resource
import sqlite3
from contextlib import closing
from pathlib import Path


def events(daemon):
    return [json.loads(line)["event"] for line in tuple(daemon.log) if line.startswith("{")]


def test_the_daemons_disk(train, daemon, assert_unchanged):
    trainer = train(address=daemon.grpc)
    trainer.await_stream()
    # No file of the daemon may grow past this.
    unlimited = resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    trainer.wait(lambda: "store_failed" in events(daemon))
    acknowledged = trainer.latest("acknowledged")
    trainer.more(30)
    assert trainer.latest("acknowledged") - acknowledged < 30
    resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, unlimited)
    trainer.await_stream()
    assert trainer.end() == 0
    assert_unchanged(trainer)
    assert trainer.latest("swallowed") == 0
    assert trainer.latest("dropped") == {}
    with closing(sqlite3.connect(f"{daemon.folder}/sharpwatch.db")) as journal:
        held = [sequence for (sequence,) in journal.execute("SELECT sequence FROM samples ORDER BY sequence")]
    assert held == list(range(1, len(trainer.steps) + 2))


# Not a byte can be written to any file; /dev/full answers every write as a full disk does.
FULL = """
import resource, torch._dynamo  # which writes to a temporary folder, once
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
trainer = Trainer()
trainer.train(10)
old = trainer.transport.courier_pid
os.kill(old, signal.SIGKILL)  # which is something to log
while trainer.transport.courier_pid in (old, None):
    trainer.step()
trainer.train(10)
trainer.close()
"""


def test_the_trainers_disk(train, serve, assert_unchanged, tmp_path):
    daemon = serve()
    with Path("/dev/full").open("w") as full:
        environment = {"SHARPWATCH_COURIER_LOG": "/dev/full", "TMPDIR": str(tmp_path / "none")}
        trainer = train(FULL, address=daemon.address, folder=tmp_path, stderr=full, **environment)
    assert trainer.end() == 0
    assert_unchanged(trainer)
    assert trainer.latest("swallowed") == 0
    assert trainer.latest("dropped") == {}
    assert set(daemon.sequences) == set(range(1, len(trainer.steps) + 2))
    assert not list(tmp_path.iterdir())
