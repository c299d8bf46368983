"""A PostgreSQL server of one's own, on a unix socket, for tests of the journal."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import psycopg
from missing import missing

_numbers = count()


def _binaries() -> Path:
    # Debian's are on no PATH, a folder for each version.
    found = shutil.which("initdb")
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found is None and not folders:
        missing("PostgreSQL")
    return Path(found).resolve().parent if found else folders[-1].parent


class PostgresqlServer:
    """A server whose data are in a folder.

    Args:
        folder: An empty folder, short enough for a socket in it.
        durable: Whether commits survive a crash of the machine, too.
    """

    def __init__(self, folder: Path, *, durable: bool = False) -> None:
        self.folder = folder
        self._binaries = _binaries()
        self._durable = durable
        # The server refuses to be root's.
        self._user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
        if self._user:
            shutil.chown(folder, "postgres", "postgres")
        self._run("initdb", "--auth=trust", "--username=sharpwatch", "--no-sync", "--encoding=UTF8", "--locale=C")

    def start(self) -> None:
        """Start and wait until it takes connections."""
        options = f"-k {self.folder} -c listen_addresses='' -c fsync={'on' if self._durable else 'off'}"
        self._run("pg_ctl", "--wait", f"--log={self.folder}/log", f"--options={options}", "start")

    def stop(self, mode: str = "immediate") -> None:
        """End it; connections are broken. In the mode "fast" it needs no recovery at the next start."""
        self._run("pg_ctl", "--wait", f"--mode={mode}", "stop")

    def kill(self) -> None:
        """Kill it as `kill -9` does, and wait for the end of the processes that serve connections."""
        data = self.folder / "data"
        os.kill(int((data / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
        deadline = time.monotonic() + 60
        while self._running(data):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # Nobody may have collected the killed process, whose number then looks alive.
        (data / "postmaster.pid").unlink()
        for socket in self.folder.glob(".s.*"):
            socket.unlink()

    @staticmethod
    def _running(folder: Path) -> bool:
        for process in Path("/proc").glob("[0-9]*/cwd"):
            with suppress(OSError):
                if process.readlink() == folder:
                    return True
        return False

    def url(self) -> str:
        """The URL of an empty schema."""
        schema = f"schema{next(_numbers)}"
        with psycopg.connect(host=str(self.folder), user="sharpwatch", dbname="postgres", autocommit=True) as session:
            session.execute(f"CREATE SCHEMA {schema}")
        return f"postgresql+psycopg://sharpwatch@/postgres?host={self.folder}&options=-csearch_path%3D{schema}"

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._binaries / program, f"--pgdata={self.folder}/data", *arguments],
            # Not captured by a pipe, which the server would inherit and keep open.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
            cwd="/",
            timeout=60,
            **self._user,
        )
        if done.returncode:
            log = self.folder / "log"
            raise RuntimeError(f"{program}: {done.returncode}; {log.read_text() if log.exists() else ''}")


@contextmanager
def postgresql_server(*, durable: bool = False) -> Iterator[PostgresqlServer]:
    """Run a server for the length of a `with`."""
    # Not pytest's folder: its user alone may enter that, and its name is too long for a socket.
    with tempfile.TemporaryDirectory(prefix="postgresql-", ignore_cleanup_errors=True) as folder:
        server = PostgresqlServer(Path(folder), durable=durable)
        server.start()
        try:
            yield server
        finally:
            server.stop()
