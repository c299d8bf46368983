"""Promise: a daemon that is killed and comes back, twenty times, under load, has lost nothing that it acknowledged."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager

import pytest

TIMES = 20
# A daemon takes seconds to import what it needs. This imports it once, and serves in a child for each line it reads.
NURSERY = """
import os, sys
import sharpwatch.daemon.app
from sharpwatch.cli.main import main
for config in sys.stdin:
    if (child := os.fork()) == 0:
        os._exit(main(["serve", "--config", config.strip()]))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def nursery(tmp_path):
    with (
        (tmp_path / "daemons.log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        yield process
        process.stdin.close()


@contextmanager
def serving(nursery, config, end):
    """A daemon, ended by the signal `end`."""
    nursery.stdin.write(f"{config}\n")
    nursery.stdin.flush()
    pid = int(nursery.stdout.readline())
    try:
        yield
    finally:
        os.kill(pid, end)
        status = int(nursery.stdout.readline())
    assert status == (0 if end == signal.SIGTERM else -end)


def journalled(daemon):
    with closing(sqlite3.connect(f"file:{daemon.folder}/sharpwatch.db?mode=ro", uri=True)) as journal:
        return [sequence for (sequence,) in journal.execute("SELECT sequence FROM samples ORDER BY sequence")]


def test_a_daemon_killed_twenty_times(train, assert_unchanged, daemon, nursery):
    trainer = train(address=daemon.grpc)
    trainer.await_stream()
    daemon.kill()
    for _ in range(TIMES - 1):
        acknowledged = trainer.latest("acknowledged")  # so long after the kill
        assert journalled(daemon)[:acknowledged] == list(range(1, acknowledged + 1))
        with serving(nursery, daemon.configure(), signal.SIGKILL):
            trainer.await_stream()
    with serving(nursery, daemon.configure(), signal.SIGTERM):
        trainer.await_stream()
        assert trainer.end() == 0
    assert_unchanged(trainer)
    assert trainer.latest("dropped") == {}
    assert trainer.latest("swallowed") == 0
    assert journalled(daemon) == list(range(1, len(trainer.steps) + 2))
