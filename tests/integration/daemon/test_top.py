"""`sharpwatch top` in a terminal, with a real daemon that is restarted."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import sys
import termios

import numpy as np
import pytest

from sharpwatch import wire
from sharpwatch.cli.main import main

PATIENCE = 60.0


class Terminal:
    """`sharpwatch` in a terminal of its own."""

    def __init__(self, columns: int = 160, lines: int = 24) -> None:
        self.ours, self._theirs = pty.openpty()
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.output = ""

    async def start(self, *arguments: str) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sharpwatch", *arguments),
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "", "LINES": ""},  # those of the terminal itself
            start_new_session=True,
        )
        os.close(self._theirs)

    async def shows(self, pattern: str) -> str:
        """Read until a screen has `pattern`; that screen."""
        async with asyncio.timeout(PATIENCE):
            while True:
                screen = self.output.rpartition("\x1b[2J")[2]
                if re.search(pattern, screen):
                    return screen
                self.output += (await asyncio.to_thread(os.read, self.ours, 65536)).decode()

    async def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        draining = asyncio.create_task(asyncio.to_thread(self._drain))
        async with asyncio.timeout(PATIENCE):
            status = await self.process.wait()
            await draining
        os.close(self.ours)
        return status

    def _drain(self) -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while os.read(self.ours, 65536):
                pass


@pytest.fixture
def sick(build):
    """A sample with a gradient that is not finite."""
    tap = build.tap()
    tap.non_finite.CopyFrom(wire.encode(np.ones(5), "int64"))
    return build.sample(1, tap=tap)


async def test_it_shows_runs_and_waits_through_a_restart(start, build, sick, tmp_path):
    address = f"unix:{tmp_path}/top.sock"
    daemon = await start(grpc=address)
    well = await daemon.client.train("well", "well-1")
    await well.send(build.sample(1))
    await well.acknowledged(1)
    ill = await daemon.client.train("ill", "ill-1")
    await ill.send(sick)
    await ill.acknowledged(1)
    await daemon.client.shown("ill", lambda detail: detail.run.active_alerts)
    terminal = Terminal()
    await terminal.start("top", "--address", address)
    screen = await terminal.shows(r"well.*\n")
    heading, first, second, *_ = (line.strip() for line in screen.splitlines() if line.strip())
    assert heading.split()[1:4] == ["step", "steps/s", "loss"]
    assert first.startswith("ill ")  # in trouble, so before the other
    assert "NonFinite since 1" in first
    assert second.startswith("well ")
    assert await daemon.exit(signal.SIGTERM) == 0
    await terminal.shows("waiting for the daemon, as of ")
    terminal.output = ""
    await start(grpc=address)
    screen = await terminal.shows(r"Ctrl-C ends")
    assert "well" in screen
    assert "silent" in screen  # no trainer has come back
    assert await terminal.interrupt() == 0


@pytest.mark.usefixtures("as_operator")
async def test_without_a_terminal_it_prints_all_runs_once(running, build, sick, capsys):
    async with running() as daemon:
        for name, sample in (("well", build.sample(1)), ("ill", sick)):
            trainer = await daemon.train(name, f"{name}-1")
            await trainer.send(sample)
            await trainer.acknowledged(1)
        await daemon.shown("ill", lambda detail: detail.run.active_alerts)
        await daemon.shown("well", lambda detail: detail.HasField("step_seconds"))
        for words in (["top"], ["top", "--once"]):
            capsys.readouterr()  # the daemon's log
            assert await asyncio.to_thread(main, [*words, "--address", daemon.grpc]) == 0
            rows = capsys.readouterr().out.splitlines()[1:]
            assert [row.split()[0] for row in rows] == ["ill", "well"]
            assert rows[1].split()[1:4] == ["1", "5", "4.01"]  # steps of 0.2 s
        assert await asyncio.to_thread(main, ["top", "we", "--json", "--address", daemon.grpc]) == 0
        (only,) = json.loads(capsys.readouterr().out)["runs"]
        assert only["run"]["run"] == "well"


async def test_a_daemon_that_is_not_there_is_an_error_also_in_a_terminal(tmp_path):
    terminal = Terminal()
    await terminal.start("top", "--address", f"unix:{tmp_path}/nothing.sock")
    await terminal.shows("sharpwatch: .*nothing.sock")
    assert await terminal.process.wait() == 1
    os.close(terminal.ours)
