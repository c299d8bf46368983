"""A real daemon, and real trainers beside it."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import subprocess
import sys
import threading

import forked
import pytest
from daemons import Daemon


@pytest.fixture
def daemon(tmp_path):
    """A running daemon without policies."""
    running = Daemon(tmp_path).start()
    yield running
    if running.process.returncode is None:
        running.stop()


@pytest.fixture
def make_daemon(tmp_path):
    """Make a running daemon with given policies."""
    made = []

    def make(policies: str = "policies: []", **options: str) -> Daemon:
        made.append(Daemon(tmp_path, policies, **options).start())
        return made[-1]

    yield make
    for running in made:
        if running.process.returncode is None:
            running.stop()


@pytest.fixture
def script(tmp_path):
    """Run a user's training script against a daemon; returns what it printed."""

    def run(source: str, daemon: Daemon | None = None, *, timeout: float = 240, **environment: str) -> str:
        path = tmp_path / "train.py"
        path.write_text(source)
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        if daemon is not None:
            env["SHARPWATCH_ADDRESS"] = daemon.grpc
        status, output, errors = forked.run(path=path, env=env, timeout=timeout)
        assert status == 0, errors
        return output

    return run


class Steps:
    """What a stepping trainer printed: one JSON object for each step it took."""

    def __init__(self, process: forked.ForkedProcess) -> None:
        self._process = process
        self._lines: queue.Queue = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(json.loads(line))

    def next(self) -> dict:
        return self._lines.get(timeout=60)

    def until(self, done) -> list[dict]:
        """Every step up to the first for which `done` holds."""
        seen = [self.next()]
        while not done(seen[-1]):
            seen.append(self.next())
        return seen

    def stop(self) -> int:
        self._process.stdin.close()
        status = self._process.wait(timeout=60)
        self._reader.join()
        self._process.stdout.close()
        return status


@pytest.fixture
def stepping(tmp_path, daemon):
    """Start a trainer that prints a line of JSON a step and stops when its standard input ends."""
    started = []

    def start(source: str) -> Steps:
        path = tmp_path / f"trainer{len(started)}.py"
        path.write_text(source)
        env = {**os.environ, "SHARPWATCH_ADDRESS": daemon.grpc, "OMP_NUM_THREADS": "1"}
        started.append(Steps(forked.ForkedProcess(path=path, env=env)))
        while not daemon.cli("jobs")["runs"]:
            started[-1].next()
        return started[-1]

    yield start
    assert [steps.stop() for steps in started] == [0] * len(started)


@pytest.fixture
def environ(tmp_path):
    """The environment of the command line, of a user of their own."""
    return {
        **os.environ,
        "HOME": str(tmp_path),
        "SHARPWATCH_ADDRESS": f"unix:{tmp_path}/daemon.sock",
        "SHARPWATCH_AUTHOR": "ada@node3",
        "SHARPWATCH_TOKEN_FILE": "",
    }


@pytest.fixture
def served(tmp_path, environ):
    """`sharpwatch serve` once it serves, with the store and addresses of its options; SIGTERM ends it with 0."""
    config = tmp_path / "config.yaml"
    config.write_text(
        "daemon: {grpc: '127.0.0.1:1', http: '127.0.0.1:1', store: 'sqlite:////nowhere/x.db', device: cpu}\n"
    )
    arguments = ("serve", "--config", str(config), "--grpc", environ["SHARPWATCH_ADDRESS"], "--http", "127.0.0.1:0")
    arguments += ("--store", f"sqlite:///{tmp_path}/journal.db", "--log-level", "info")
    process = forked.ForkedProcess(forked.COMMAND_LINE, env=environ, stderr=subprocess.PIPE, arguments=arguments)
    output = []
    for line in process.stderr:
        output.append(line)
        if json.loads(line)["event"] == "serving":
            break
    else:
        pytest.fail(f"the daemon ended: {''.join(output)}")
    drain = threading.Thread(target=lambda: output.extend(process.stderr))
    drain.start()
    yield process
    process.send_signal(signal.SIGTERM)
    drain.join()
    status = process.wait()
    process.close()
    assert status == 0, "".join(output)


@pytest.fixture
def cli(environ):
    """Run `sharpwatch` with arguments: its exit status, stdout and stderr."""

    async def run(*args):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sharpwatch", *args),
            env=environ,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()

    return run
