"""The daemon and the bare server as processes that are measured, and the simulated agents that load them."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sharpwatch.common.credentials import Credential, write_credentials

ROOT = Path(__file__).parents[2]
_ACCEPT = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2"
_BEGINNING = 60  # characters of a line, which have its event
_TICK = os.sysconf("SC_CLK_TCK")
_LATENCY = re.compile(r'^sharpwatch_ingest_to_metric_seconds_bucket\{le="([^"]+)"\} (\S+)$', re.MULTILINE)


@dataclass(slots=True)
class LogSeen:
    """How much a server has logged, and the first error of each kind, as far as that was read."""

    lines: int = 0
    size: int = 0
    longest: int = 0  # characters
    errors: dict[str, str] = field(default_factory=dict)  # lines, by how they begin

    def read(self, stream: Iterable[str]) -> None:
        """Reads to the end, so that the process never waits for a reader of its log."""
        for line in stream:
            self.lines += 1
            self.size += len(line)
            self.longest = max(self.longest, len(line))
            if '"level": "error"' in line or not line.startswith("{"):
                self.errors.setdefault(line[:_BEGINNING], line)


@dataclass(frozen=True, slots=True)
class Server:
    """A server process: where it serves, what it takes, and what it logs."""

    process: int
    grpc: str
    http: str = ""
    store: Path | None = None
    log: LogSeen = field(default_factory=LogSeen)

    @property
    def processor(self) -> float:
        """Seconds of processor time so far, of all its threads."""
        fields = Path(f"/proc/{self.process}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK

    @property
    def memory(self) -> int:
        """Bytes of resident memory."""
        status = Path(f"/proc/{self.process}/status").read_text()
        return 1024 * int(re.search(r"^VmRSS:\s+(\d+)", status, re.MULTILINE)[1])  # type: ignore[index]

    @property
    def token(self) -> str:
        """The operator's token."""
        return "" if self.store is None else self.store.with_name("token").read_text().strip()

    @property
    def written(self) -> int:
        """Bytes that it has had written to disks."""
        return int(re.search(r"^write_bytes: (\d+)", Path(f"/proc/{self.process}/io").read_text(), re.MULTILINE)[1])  # type: ignore[index]

    @property
    def stored(self) -> int:
        """Bytes of its journal."""
        if self.store is None:
            return 0
        return sum(each.stat().st_size for each in self.store.parent.glob(f"{self.store.name}*"))

    def scrape(self) -> tuple[float, str]:
        """Scrapes it as Prometheus does; returns the seconds and the text."""
        headers = {"Accept": _ACCEPT, "Accept-Encoding": "gzip"}
        began = time.monotonic()
        with urllib.request.urlopen(urllib.request.Request(f"http://{self.http}/metrics", headers=headers)) as answer:
            body = answer.read()
        passed = time.monotonic() - began
        return passed, (gzip.decompress(body) if answer.headers.get("Content-Encoding") == "gzip" else body).decode()


@contextmanager
def daemon(checkout: Path = ROOT, credentials: Sequence[Credential] = ()) -> Iterator[Server]:
    """Runs `sharpwatch serve` with its default configuration, of this checkout or another one.

    Args:
        checkout: The checkout.
        credentials: Those that the daemon knows; without any, agents need none.
    """
    with tempfile.TemporaryDirectory(prefix="load-") as folder:
        store = Path(folder) / "journal.db"
        config = Path(folder) / "daemon.yaml"
        config.write_text(
            f"daemon:\n  grpc: 127.0.0.1:0\n  http: 127.0.0.1:0\n  store: sqlite:///{store}\n"
            f"  token_file: {folder}/token\n  device: cpu\n  log_level: warning\n"
            + (f"  credentials: {folder}/credentials.yaml\n" if credentials else "")
        )
        if credentials:
            write_credentials(Path(folder) / "credentials.yaml", credentials)
        serve = "import sys; from sharpwatch.cli.main import main; sys.exit(main())"
        command = [sys.executable, "-c", serve, "serve", "--config", str(config), "--log-level", "info"]
        with _process(command, checkout, stderr=subprocess.PIPE) as process:
            told = _await_line(process.stderr, lambda line: '"event": "serving"' in line)
            addresses = json.loads(told)
            log = LogSeen()
            reading = threading.Thread(target=log.read, args=(process.stderr,))
            reading.start()
            try:
                yield Server(process.pid, addresses["grpc"], addresses["http"], store, log)
            finally:
                process.terminate()
                reading.join()


@contextmanager
def bare() -> Iterator[Server]:
    """Runs the bare gRPC server."""
    command = [sys.executable, "-m", "benchmarks.load.bare"]
    with _process(command, ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Server(process.pid, _await_line(process.stdout, bool).strip())


def load(server: Server, arguments: Sequence[str], at: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Loads a server by simulated agents.

    Args:
        server: The server.
        arguments: Those of `benchmarks.load.agents`.
        at: Called with each event that they tell.

    Returns:
        What they have measured.
    """
    command = [sys.executable, "-m", "benchmarks.load.agents", server.grpc, *arguments]
    found: dict[str, Any] = {}
    with _process(command, ROOT, stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            found = json.loads(line)
            at(found["event"])
        if process.wait() or found.get("event") != "measured":
            raise RuntimeError("the simulated agents failed")
    return found


def latency(before: str, after: str) -> list[float]:
    """The 0.5 and 0.99 quantile of seconds from ingest to metric between two scrapes, as `histogram_quantile` does."""
    counts = [{float(le): float(count) for le, count in _LATENCY.findall(text)} for text in (before, after)]
    bounds = sorted(counts[1])
    passed = [counts[1][le] - counts[0].get(le, 0.0) for le in bounds]
    return [_quantile(bounds, passed, q) for q in (0.5, 0.99)]


def _quantile(bounds: Sequence[float], counts: Sequence[float], q: float) -> float:
    rank, low, below = q * counts[-1], 0.0, 0.0
    for high, count in zip(bounds, counts, strict=True):
        if count >= rank > below:
            return low if high == float("inf") else low + (high - low) * (rank - below) / (count - below)
        low, below = high, count
    return float("nan")


@contextmanager
def _process(command: Sequence[str], folder: Path, **streams: Any) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=folder, env=environment, text=True, **streams)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()  # also closes the streams


def _await_line(stream: Any, wanted: Callable[[str], Any]) -> str:
    seen = []
    for line in stream:
        if wanted(line):
            return str(line)
        seen.append(line)
    raise RuntimeError("the server did not start:\n" + "".join(seen))
