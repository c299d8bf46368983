"""Promise: a daemon that is killed and comes back, twenty times, under load, has lost nothing that it acknowledged."""

from __future__ import annotations

import signal
import sqlite3
from contextlib import closing

TIMES = 20
TRAIN = "trainer = Trainer()\ntrainer.train_until_stopped(backlog=10)\ntrainer.close()\n"


def journalled(daemon):
    with closing(sqlite3.connect(f"file:{daemon.folder}/sharpwatch.db?mode=ro", uri=True)) as journal:
        return [sequence for (sequence,) in journal.execute("SELECT sequence FROM samples ORDER BY sequence")]


def test_a_daemon_killed_twenty_times(train, assert_unchanged, daemon):
    trainer = train(TRAIN, address=daemon.grpc)
    for _ in range(TIMES):
        trainer.await_stream()
        daemon.kill()
        assert daemon.process.returncode == -signal.SIGKILL
        acknowledged = trainer.latest("acknowledged")  # so long after the kill
        assert journalled(daemon)[:acknowledged] == list(range(1, acknowledged + 1))
        daemon.start()
    trainer.await_stream()
    assert trainer.end() == 0
    assert daemon.stop() == 0
    assert_unchanged(trainer)
    assert trainer.latest("dropped") == {}
    assert trainer.latest("swallowed") == 0
    assert journalled(daemon) == list(range(1, len(trainer.steps) + 2))
