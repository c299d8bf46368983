"""How long the daemon takes to start, by how many runs its journal has: `python -m benchmarks.load.startup`.

The journals are not made by trainers. Ended runs are written in bulk by SQL, `SAMPLES` samples each, all with the same
small payload of one loss: what a start does with them does not depend on what is in them. Live runs are written by the
journal's own code, `LIVE_SAMPLES` samples each of a model with 49 layer blocks, a `gnb` probe at each tenth step. Of
those that were stopped in order the journal has the state after the newest sample, of those that were killed the state
`KILLED_AFTER` samples before.

Each start is a process of its own, `sharpwatch serve`. Prints medians of some starts: seconds until `/-/healthy`
answers, seconds until `/-/ready` does, of these what the daemon took to bring its live runs back, and what of that it
had of the CPU. Most of the rest is the import of torch.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from sharpwatch import wire
from sharpwatch.daemon.decisions.run_controller import RunController
from sharpwatch.daemon.ingest.hello import Attempt, read_hello
from sharpwatch.daemon.ingest.samples import read_sample
from sharpwatch.daemon.runs.run import SAVE_EVERY, Run
from sharpwatch.daemon.storage.journal import Journal
from sharpwatch.daemon.storage.schema import AttemptRow, BaselinesRow, PendingWrites, SampleRow
from sharpwatch.v1 import agent_pb2
from sharpwatch.v1.types_pb2 import LayerBlock

SAMPLES = 10_000  # of each ended run
LIVE_SAMPLES = 1_000  # of each live run: as many as a start may fold again
KILLED_AFTER = SAVE_EVERY // 2  # samples: as many as on average lie after the newest state
BLOCKS = ("emb", "qk", "ffn", "vo", "norm")
LAYERS = 12
SKETCH = 256
_LAYER_BLOCKS = (("emb", ""), *((block, f"layers.{layer}") for layer in range(LAYERS) for block in BLOCKS[1:]))
_DAY = 86_400.0
_COLUMNS = ("healthy", "ready", "restoring", "of the CPU")


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ended", type=int, nargs="*", default=[0, 100, 1_000], help="how many ended runs")
    parser.add_argument("--live", type=int, nargs="*", default=[0, 10, 50], help="how many live runs")
    parser.add_argument("--starts", type=int, default=3, help="starts of each")
    options = parser.parse_args()
    print("seconds " + " ".join(f"{each:>10}" for each in ("ended", "live", "stopped by", *_COLUMNS)))
    with tempfile.TemporaryDirectory() as name:
        for ended in options.ended:
            path = Path(name) / f"ended-{ended}.db"
            _write_ended(path, ended)
            before = 0
            ways = [(live, killed) for live in options.live for killed in ((False, True) if live else (False,))]
            for live, killed in ways:
                found = []
                for _ in range(options.starts):
                    _write_live(path, live, killed=killed, before=before)
                    found.append(_start(path, live))
                    before = live
                columns = [statistics.median(column) for column in zip(*found, strict=True)]
                how = ("kill -9" if killed else "SIGTERM") if live else "–"
                cells = (f"{each:10.3f}" for each in columns)
                print("        " + " ".join((f"{ended:10} {live:10} {how:>10}", *cells)), flush=True)
            path.unlink()


def _hello(run: str, attempt: str) -> agent_pb2.Hello:
    return agent_pb2.Hello(
        protocol=wire.PROTOCOL,
        training_job="job",
        run=run,
        attempt=attempt,
        layer_blocks=[LayerBlock(block=block, layer=layer, parameters=4_096) for block, layer in _LAYER_BLOCKS],
        blocks=BLOCKS,
        optimizer="AdamW",
        control="lr",
        min_multiplier=0.1,
        max_multiplier=10.0,
        sketch_size=SKETCH,
    )


def _write_ended(path: Path, count: int) -> None:
    """Runs that were closed a day ago."""
    Journal(f"sqlite:///{path}", retain_samples=SAMPLES).close()
    payload = agent_pb2.SessionRequest(sample=agent_pb2.Sample(loss=3.0)).SerializeToString()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA synchronous=OFF")
        for number in range(count):
            run = f"ended-{number:04}"
            attempt = f"{run}-1"
            hello = _hello(run, attempt).SerializeToString()
            connection.execute(
                "INSERT INTO attempts (run, attempt, hello, acknowledged, seen_at, closed) VALUES (?, ?, ?, ?, ?, 1)",
                [run, attempt, hello, SAMPLES, time.time() - _DAY],
            )
            connection.executemany(
                "INSERT INTO samples (run, attempt, sequence, step, payload) VALUES (?, ?, ?, ?, ?)",
                ((run, attempt, step, step, payload) for step in range(1, SAMPLES + 1)),
            )
            connection.commit()


def _payloads() -> Iterator[bytes]:
    """What a healthy run sends."""
    random = np.random.default_rng(0)
    count = len(_LAYER_BLOCKS)
    for step in range(1, LIVE_SAMPLES + 1):
        noisy = [wire.encode(np.exp(0.05 * random.standard_normal(count)), "float32") for _ in range(2)]
        ones = wire.encode(np.ones(count), "float32")
        sample = agent_pb2.Sample(
            sequence=step,
            step=step,
            taken_at_unix_ns=time.time_ns(),
            loss=3 + 0.1 * random.standard_normal(),
            tap=agent_pb2.Tap(
                gradient_norm=noisy[0],
                weight_norm=ones,
                update_rms=noisy[1],
                non_finite=wire.encode(np.zeros(count), "int64"),
                learning_rate=ones,
                lr_multiplier=ones,
            ),
            health=agent_pb2.AgentHealth(overhead_ratio=0.005, step_seconds=0.2),
        )
        if step % 10 == 0:
            sample.gnb.CopyFrom(
                agent_pb2.GnbProbe(
                    tokens=256,
                    rows=4,
                    traces=wire.encode(random.chisquare(4, (4, count)), "float64"),
                    sketches=wire.encode(random.standard_normal((4, len(BLOCKS), SKETCH)), "float32"),
                    gradient_sketch=wire.encode(random.standard_normal((len(BLOCKS), SKETCH)), "float32"),
                )
            )
        yield agent_pb2.SessionRequest(sample=sample).SerializeToString()


def _state(payloads: list[bytes]) -> bytes:
    """The state of a run that has taken in these samples."""
    hello = read_hello(_hello("run", "attempt"))
    controller = RunController("run", layer_blocks=hello.layer_blocks, parameters=hello.parameters, policies=())
    run = Run(Attempt(hello, b""), controller, now=0.0)
    for sequence, payload in enumerate(payloads, 1):
        reading = read_sample(hello, agent_pb2.SessionRequest.FromString(payload).sample)
        observation = run.update(reading, time.time(), time.monotonic())
        run.folded("attempt", sequence)
        if observation is not None:
            controller.observe(observation, time.time())
    row = run.state_row()
    return b"" if row is None else row.state


def _write_live(path: Path, count: int, *, killed: bool, before: int) -> None:
    """Runs that sent their newest sample just now, in place of those that are there from `before`."""
    payloads = list(_payloads())
    seen = LIVE_SAMPLES - KILLED_AFTER if killed else LIVE_SAMPLES
    state = _state(payloads[:seen]) if count else b""
    with closing(Journal(f"sqlite:///{path}", retain_samples=SAMPLES)) as journal:
        for number in range(before):
            journal.forget(f"live-{number:04}")
        for number in range(count):
            run = f"live-{number:04}"
            attempt = f"{run}-1"
            hello, now = _hello(run, attempt).SerializeToString(), time.time()
            records = PendingWrites(
                attempts={attempt: AttemptRow(run, attempt, hello, now)},
                baselines={run: BaselinesRow(run, attempt, seen, state)},
            )
            rows = [SampleRow(run, attempt, step, step, payload, now) for step, payload in enumerate(payloads, 1)]
            journal.write(records, rows)


def _start(path: Path, live: int) -> tuple[float, float, float, float]:
    """The figures of `_COLUMNS` of one start."""
    arguments = (f"sqlite:///{path}", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0")
    command = [sys.executable, "-m", "sharpwatch", "serve", "--store", *arguments]
    began = time.monotonic()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process, ExitStack() as stack:
        stack.callback(process.kill)  # before it is waited for, also where it fails
        if process.stderr is None:
            raise RuntimeError("no standard error")
        http = _event(process.stderr, "serving")["http"]
        spent = _processor_seconds(process.pid)
        _answer(f"http://{http}/-/healthy")
        healthy = time.monotonic() - began
        restoring = _event(process.stderr, "ready")
        spent = _processor_seconds(process.pid) - spent
        _answer(f"http://{http}/-/ready")
        ready = time.monotonic() - began
    if restoring["runs"] != live:
        raise RuntimeError(f"{restoring['runs']} of {live} live runs are back")
    return healthy, ready, restoring["seconds"], spent


def _processor_seconds(process: int) -> float:
    """What a process and its threads have had of the CPU; on a busy machine it says more than a clock."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _event(lines: Iterator[str], name: str) -> dict:
    return next(event for line in lines if (event := json.loads(line))["event"] == name)


def _answer(url: str) -> None:
    with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310  this machine
        if response.status != 200:
            raise urllib.error.HTTPError(url, response.status, "not ready", response.headers, None)


if __name__ == "__main__":
    main()
