"""What is disturbed: the daemon's process with its clock and certificate, its disk, its store."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol

import grpc
import psycopg
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from certificates import Authority  # type: ignore[import-not-found]  # noqa: E402  beside the tests that use it
from postgresql import PostgresqlServer  # type: ignore[import-not-found]  # noqa: E402  as before

PATIENCE = 60.0  # seconds until what must come is held not to
# Not by libfaketime: that leaves out the kernel's timed waits, so that gRPC's own threads wait for hours, or spin.
_STEPPED_CLOCK = """
import time
from pathlib import Path
real = time.time_ns
time.time_ns = lambda: real() + int(Path({offset!r}).read_text())
time.time = lambda: time.time_ns() / 1e9
"""
_FILE_SYSTEM_MEGABYTES = {"sqlite": 48, "postgresql": 192}
_POLL = 0.05  # seconds


async def until(holds: Callable[[], bool], what: str) -> None:
    """Waits for a condition.

    Raises:
        TimeoutError: It did not come.
    """
    deadline = time.monotonic() + PATIENCE
    while not await asyncio.to_thread(holds):
        if time.monotonic() > deadline:
            raise TimeoutError(f"in vain: {what}")
        await asyncio.sleep(_POLL)


class Tls:
    """The daemon's certificate, by an authority of its own.

    Args:
        folder: For the files.
    """

    def __init__(self, folder: Path) -> None:
        self._authority = Authority(folder)
        self.certificate = self.renew()

    @property
    def settings(self) -> dict[str, str]:
        """Those of the daemon."""
        return {"certificate": str(self.certificate), "key": str(self.certificate.with_suffix(".key"))}

    def renew(self) -> Path:
        """Puts another certificate and key in the place of those that are there; returns the certificate's file."""
        return Path(self._authority.sign("daemon").certificate)

    def trusted(self) -> grpc.ChannelCredentials:
        """What a client needs that trusts the authority."""
        return grpc.ssl_channel_credentials(self._authority.own.certificate.read_bytes())


class Daemon:
    """`sharpwatch serve` as a process, at the same addresses after each start.

    Args:
        folder: For its configuration and token.
        store: The URL of its journal.
        tls: What it shows; None without TLS.
        has_clock: Whether `step_clock` is to be possible.

    Attributes:
        grpc: Its address.
        errors: How often it has logged which error.
    """

    def __init__(self, folder: Path, store: str, tls: Tls | None, *, has_clock: bool) -> None:
        self.grpc, self.http = (f"127.0.0.1:{free_port()}" for _ in range(2))
        self.errors: Counter[str] = Counter()
        self._token_file = folder / "token"
        self._config = folder / "daemon.yaml"
        daemon = {"grpc": self.grpc, "http": self.http, "store": store, "token_file": str(self._token_file)}
        shown = {} if tls is None else {"tls": tls.settings}
        self._config.write_text(json.dumps({"daemon": {**daemon, **shown, "device": "cpu"}}))
        self._environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._offset = folder / "clock"
        if has_clock:
            (folder / "sitecustomize.py").write_text(_STEPPED_CLOCK.format(offset=str(self._offset)))
            self.step_clock(0.0)
            self._environment["PYTHONPATH"] = f"{folder}:{ROOT}"
        self._last: deque[str] = deque(maxlen=20)
        self._process: asyncio.subprocess.Process
        self._reading: asyncio.Task[None]
        self._serves = asyncio.Event()

    @property
    def token(self) -> str:
        """The operator's."""
        return self._token_file.read_text().strip()

    async def launch(self) -> None:
        """Starts the process."""
        self._serves.clear()
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sharpwatch", "serve", "--config", str(self._config)),
            cwd=ROOT,
            env=self._environment,
            stderr=subprocess.PIPE,
        )
        self._reading = asyncio.create_task(self._read())

    async def start(self) -> None:
        """Starts the process and waits until it serves.

        Raises:
            RuntimeError: It ended instead; with the last lines of its log.
        """
        await self.launch()
        serving = asyncio.create_task(self._serves.wait())
        await asyncio.wait((serving, self._reading), return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE)
        if not self._serves.is_set():
            serving.cancel()
            raise RuntimeError("the daemon did not start:\n" + "\n".join(self._last))

    async def kill(self) -> None:
        """Kills it as `kill -9` does."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> int:
        """Has it end in order; returns its exit status."""
        return await self._end(signal.SIGTERM)

    def is_ready(self) -> bool:
        """Whether its journal takes writes."""
        with suppress(OSError), urllib.request.urlopen(f"http://{self.http}/-/ready", timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    def step_clock(self, hours: float) -> None:
        """Has the process see a wall clock that is off by so many hours."""
        part = self._offset.with_suffix(".part")
        part.write_text(str(round(3600e9 * hours)))
        part.replace(self._offset)

    async def _end(self, number: int) -> int:
        if self._process.returncode is None:
            self._process.send_signal(number)
        status = await asyncio.wait_for(self._process.wait(), PATIENCE)
        await self._reading
        return status

    async def _read(self) -> None:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            text = line.decode().rstrip()
            self._last.append(text)
            if text.startswith("Traceback"):
                self.errors["traceback"] += 1
            if not text.startswith("{"):
                continue
            event = json.loads(text)
            if event["event"] == "serving":
                self._serves.set()
            elif event["level"] in ("error", "critical"):
                self.errors[event["event"]] += 1


def free_port() -> int:
    """A port of this machine that nobody has."""
    # Below those that the system gives to connections: an agent that tries to come back could be given the port.
    while True:
        port = random.randint(20_000, 30_000)  # noqa: S311  no secret
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Disk:
    """An ext4 file system in a file, which can be filled, and fail so that it is read-only, as one with errors does.

    Linux refuses to make one read-only by hand while a file on it is open for writing.

    Args:
        folder: Where its file is, and where it is mounted.
        megabytes: Its size.
    """

    def __init__(self, folder: Path, megabytes: int) -> None:
        self._image = folder / "disk.img"
        self.folder = folder / "disk"
        self.folder.mkdir()
        with self._image.open("wb") as image:
            image.truncate(megabytes << 20)
        _run("mkfs.ext4", "-q", "-m", "0", str(self._image))
        self._mount()
        (self.folder / "lost+found").rmdir()

    def fill(self) -> None:
        """Leaves no space."""
        with suppress(OSError), (self.folder / "filler").open("ab", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))

    def free(self) -> None:
        """Gives the space back."""
        (self.folder / "filler").unlink()

    def fail(self) -> None:
        """Makes it read-only for all, also for files that are open."""
        found = subprocess.run(["findmnt", "-no", "SOURCE", self.folder], capture_output=True, text=True, check=True)  # noqa: S607
        Path(f"/sys/fs/ext4/{Path(found.stdout.strip()).name}/trigger_fs_error").write_text("1")

    def repair(self) -> None:
        """Checks it and mounts it again. No file on it may be open."""
        self.unmount()
        checked = subprocess.run(["fsck.ext4", "-fy", self._image], capture_output=True, check=False)  # noqa: S607
        assert checked.returncode in (0, 1), checked  # 1: repaired
        self._mount()

    def unmount(self) -> None:
        """Takes it away."""
        _run("umount", str(self.folder))

    def _mount(self) -> None:
        _run("mount", "-o", "loop,errors=remount-ro", str(self._image), str(self.folder))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


Stop = Literal["fast", "immediate", "kill"]


class Store(Protocol):
    """Where the journal is: a file, or a server of its own."""

    url: str

    async def start(self) -> None:
        """Starts the server, if there is one and it does not run."""

    async def stop(self, how: Stop) -> None:
        """Ends the server, if there is one."""


class Sqlite:
    """A file.

    Args:
        folder: Where it is.
    """

    def __init__(self, folder: Path) -> None:
        self.url = f"sqlite:///{folder}/journal.db"

    async def start(self) -> None:
        """Nothing."""

    async def stop(self, how: Stop) -> None:
        """Nothing."""


class Postgresql:
    """A PostgreSQL server.

    Args:
        folder: Where its data are, and its socket.
    """

    def __init__(self, folder: Path) -> None:
        self._server = PostgresqlServer(folder, durable=True)
        _run("sync", "--file-system", str(folder))  # it was made without, and the disk may fail
        self._server.start()
        self.url = self._server.url()

    async def start(self) -> None:
        """Starts it, unless it runs or has just come up by itself."""
        deadline = time.monotonic() + PATIENCE
        while not await asyncio.to_thread(self._answers):
            if time.monotonic() > deadline:
                raise TimeoutError("PostgreSQL does not start")
            with suppress(RuntimeError):  # it may be on its way
                await asyncio.to_thread(self._server.start)

    async def stop(self, how: Stop) -> None:
        """Ends it by `pg_ctl` in that mode, unless it has ended by itself, or by `kill -9`."""
        if how == "kill":
            await asyncio.to_thread(self._server.kill)
            return
        with suppress(RuntimeError):
            await asyncio.to_thread(self._server.stop, how)

    def _answers(self) -> bool:
        with suppress(psycopg.OperationalError):
            psycopg.connect(host=str(self._server.folder), user="sharpwatch", dbname="postgres").close()
            return True
        return False


def make_store(kind: str, folder: Path) -> Store:
    """A store of that kind in a folder."""
    return Sqlite(folder) if kind == "sqlite" else Postgresql(folder)


def make_disk(kind: str, folder: Path) -> Disk:
    """A disk on which a store of that kind has just enough room."""
    return Disk(folder, _FILE_SYSTEM_MEGABYTES[kind])


def rows(url: str, query: str) -> Sequence[tuple[Any, ...]]:
    """What a query finds in the journal."""
    with create_engine(url, poolclass=NullPool).connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(query)]
