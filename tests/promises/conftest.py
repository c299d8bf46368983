"""Trainers in processes of their own, and the run without sharpwatch that each is held against, step by step."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from daemons import PATIENCE, Daemon
from forked import ForkedProcess

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for `trainer`
PRELUDE = "import os, signal, sys\nfrom trainer import *\n"
TRAIN = "trainer = Trainer()\ntrainer.train_until_stopped()\ntrainer.close()\n"


class Trainer:
    """A trainer that runs `code` in a process, and session, of its own; what it printed, as it comes.

    `fresh`: in a new interpreter, where the test is about its start, its end or its memory.
    """

    def __init__(self, code=TRAIN, *, address="", folder=HERE, stderr=None, fresh=False, **environment):
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "SHARPWATCH_ADDRESS": address} | environment
        if fresh:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PRELUDE + code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=env,
                cwd=folder,
                start_new_session=True,
            )
        else:
            self.process = ForkedProcess(PRELUDE + code, env=env, cwd=folder, stderr=stderr, start_new_session=True)
        self.lines = []
        self.ended = False
        self.changed = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            with self.changed:
                self.lines.append(json.loads(line))
                self.changed.notify_all()
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    @property
    def steps(self):
        return [line for line in self.lines if "step" in line]

    @property
    def runs(self):
        """The steps of each run in turn, where it trained several."""
        starts = [number for number, line in enumerate(self.steps) if line["step"] == 1]
        return [self.steps[start:stop] for start, stop in zip(starts, [*starts[1:], None], strict=True)]

    def all_values(self, key):
        """All values that it printed for `key`, in order."""
        return [line[key] for line in self.lines if key in line]

    def latest(self, key, before=None):
        """The last value that it printed for `key`; `before` if it has printed none."""
        return next((line[key] for line in reversed(self.lines) if key in line), before)

    def wait(self, condition):
        """Until `condition()`; it is asked again whenever the trainer has printed something."""
        deadline = time.monotonic() + PATIENCE
        with self.changed:
            while not condition():
                assert not self.ended, f"the trainer ended: {self.lines[-3:]}"
                assert time.monotonic() < deadline, f"in vain: {self.lines[-3:]}"
                self.changed.wait(PATIENCE)

    def wait_for(self, key):
        self.wait(lambda: self.latest(key) is not None)
        return self.latest(key)

    def more(self, steps):
        """Until it has taken so many more steps of its run."""
        target = self.latest("step", 0) + steps
        self.wait(lambda: self.latest("step", 0) >= target)

    def await_stream(self):
        """Until a sample is acknowledged that is not taken yet."""
        last = self.latest("step", 0)
        self.wait(lambda: self.latest("acknowledged", 0) > last)

    def end(self):
        """Until it has ended; its exit status."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        assert self.ended
        return status

    def stop(self):
        """Whatever it does."""
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self._reader.join(PATIENCE)
        self.process.stdout.close()


class Reference:
    """The same run without sharpwatch, as far as anyone has asked for it."""

    def __init__(self):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "SHARPWATCH_DISABLED": "1"}
        self.process = ForkedProcess(path=HERE / "trainer.py", env=env)
        self.steps = []

    def until(self, steps):
        while len(self.steps) < steps:
            self.steps.append(json.loads(self.process.stdout.readline()))
        return self.steps[:steps]

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.process.close()


@pytest.fixture(scope="session")
def reference():
    run = Reference()
    yield run
    run.stop()


@pytest.fixture
def assert_unchanged(reference):
    """Every step of each run of a trainer is, to the bit, that of the run without sharpwatch."""

    def check(trainer):
        assert trainer.steps
        for run in trainer.runs:
            assert run == reference.until(len(run))

    return check


@pytest.fixture
def train():
    """Start trainers."""
    started = []

    def start(*args, **options):
        started.append(Trainer(*args, **options))
        return started[-1]

    yield start
    for trainer in started:
        trainer.stop()


@pytest.fixture
def daemon(tmp_path):
    """The real one, running."""
    running = Daemon(tmp_path).start()
    yield running
    if running.process.returncode is None:
        running.stop()
