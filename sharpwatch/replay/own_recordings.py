"""sharpwatch's own recordings: the journal of a daemon, and files with the agent's messages.

A file has one JSON line about the run, then the Hello and the samples, each after its length (4 bytes, little-endian).
One that begins in the middle of a run names the file that it goes on from as its `trunk`, and its `first` step.
"""

from __future__ import annotations

import json
import lzma
import math
import sqlite3
import struct
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.ingest.hello import RunHello, read_hello
from sharpwatch.daemon.ingest.samples import Reading, read_sample
from sharpwatch.daemon.records import CheckpointReport, Observation
from sharpwatch.daemon.runs.run import observation_of
from sharpwatch.daemon.storage.schema import FIRST_TABLES, EstimateRow
from sharpwatch.daemon.storage.sqlite_file import database_path
from sharpwatch.errors import LogError, WireError
from sharpwatch.replay.recorded_run import RecordedRun
from sharpwatch.v1 import agent_pb2


def read_recording(data: bytes, path: Path) -> RecordedRun:
    """Read a recording, with the one that it goes on from.

    Args:
        data: The file, uncompressed.
        path: Where it is.

    Raises:
        LogError: The file is cut off, is of another version, or its trunk can't be read.
    """
    about, messages = read_messages(data, path)
    samples = _samples(messages[1:], path)
    if about.get("trunk"):
        trunk = path.parent / str(about["trunk"])
        _, before = read_messages(_uncompressed(trunk), trunk)
        first = about.get("first", 1)
        samples = [each for each in _samples(before[1:], trunk) if not each.closing and each.step < first] + samples
        messages = before
    if not messages:
        raise LogError("the recording has no message", str(path))
    hello = _hello(messages[0], str(path))
    readings = _readings(hello, samples, str(path))
    return _recorded(str(path), "recording", hello, readings)


def _uncompressed(path: Path) -> bytes:
    try:
        with lzma.open(path) as file:
            return file.read()
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise LogError(f"the recording that another one goes on from can't be read: {error}", str(path)) from None


def read_messages(data: bytes, path: Path) -> tuple[dict[str, Any], list[bytes]]:
    """What a recording says about the run, and the messages that it has itself.

    Args:
        data: The file, uncompressed.
        path: Where it is.

    Raises:
        LogError: The file is cut off, or its first line is no JSON about the run.
    """
    line, _, rest = data.partition(b"\n")
    try:
        about = json.loads(line)
    except (ValueError, RecursionError):
        about = None
    if not (isinstance(about, dict) and isinstance(about.get("first", 1), int)):
        raise LogError("no recording: its first line must be JSON about the run", str(path), 1)
    return about, list(_frames(rest, path))


def _frames(data: bytes, path: Path) -> Iterator[bytes]:
    place = 0
    while place < len(data):
        end = place + 4
        size = struct.unpack_from("<I", data, place)[0] if end <= len(data) else 0
        if end + size > len(data):
            raise LogError(f"the recording is cut off at byte {place} of its messages", str(path))
        yield data[end : end + size]
        place = end + size


def _samples(payloads: Iterable[bytes], path: Path) -> list[agent_pb2.Sample]:
    try:
        return [agent_pb2.Sample.FromString(each) for each in payloads]
    except DecodeError:
        raise LogError("the recording has a message that is no sample", str(path)) from None


def _hello(payload: bytes, source: str) -> RunHello:
    try:
        return read_hello(agent_pb2.Hello.FromString(payload))
    except (WireError, DecodeError) as error:
        raise LogError(f"the agent's first message can't be read: {error}", source) from None


def _readings(hello: RunHello, samples: Iterable[agent_pb2.Sample], source: str) -> list[Reading]:
    found = []
    for number, sample in enumerate(samples, 1):
        sample.sequence = number  # counted on, where a recording goes on from another
        try:
            found.append(read_sample(hello, sample))
        except WireError as error:
            raise LogError(f"sample {number}, of step {sample.step}: {error}", source) from None
    return found


def _recorded(source: str, format_: str, hello: RunHello, readings: Iterable[Reading]) -> RecordedRun:
    observations: list[Observation] = []
    noise, checkpoints = [], []
    for reading in readings:
        report = reading.checkpoint_report
        if report != CheckpointReport():
            checkpoints.append((len(observations), report))
        # A sample may carry only answers or checkpoints.
        if reading.tap is not None or reading.loss is not None or "direction" in reading.probes:
            observations.append(observation_of(hello.blocks, reading))
        probed = reading.probes.get("gradient_noise")
        if probed is not None and probed.noise is not None:
            noise.append((reading.step, dict(zip(hello.blocks, map(float, probed.noise), strict=True))))
    return RecordedRun(
        source,
        format_,
        hello.layer_blocks,
        hello.parameters,
        observations,
        gradient_noise=noise,
        parameter_names=hello.parameter_names,
        checkpoints=checkpoints,
        labels=hello.all_labels,
    )


# The journal


def read_journal(url: str, run: str | None) -> RecordedRun:
    """Read the samples that a daemon's journal still has of a run. A daemon may be using it meanwhile.

    Args:
        url: The journal, as `sqlite:///PATH`.
        run: The run's name, or a beginning that no other run has; None for the only run.

    Raises:
        LogError: It is no journal, or has no such run.
        StoreError: The URL has another form.
    """
    path = database_path(url)
    if not path.exists():
        raise LogError("there is no such file", str(path))
    try:
        with closing(sqlite3.connect(f"file:{urllib.parse.quote(str(path.absolute()))}?mode=ro", uri=True)) as journal:
            return _read_run(journal, path, run)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise LogError(f"not a journal that can be read: {error}", str(path)) from None


def _read_run(journal: sqlite3.Connection, path: Path, run: str | None) -> RecordedRun:
    tables = {name for (name,) in journal.execute("SELECT name FROM sqlite_master")}
    if not tables >= FIRST_TABLES:
        raise LogError("a database of another program, not a journal of sharpwatch", str(path))
    name = _chosen(
        [found for (found,) in journal.execute("SELECT DISTINCT CAST(run AS TEXT) FROM attempts ORDER BY 1")], path, run
    )
    source = f"{path} {name}"
    hellos = {
        attempt: _hello(payload, source)
        for attempt, payload in journal.execute(
            "SELECT attempt, CAST(hello AS BLOB) FROM attempts WHERE run = ? ORDER BY id", (name,)
        )
    }
    newest = list(hellos.values())[-1]
    fitting = {attempt for attempt, hello in hellos.items() if hello.same_blocks(newest)}
    rows = journal.execute(
        "SELECT attempt, CAST(payload AS BLOB) FROM samples WHERE run = ? ORDER BY id", (name,)
    ).fetchall()
    kept = [payload for attempt, payload in rows if attempt in fitting]
    notes = (f"{len(rows) - len(kept)} samples of other layer blocks are left out",) if len(kept) < len(rows) else ()
    samples = [_session_request(payload, source).sample for payload in kept]
    found = _recorded(source, "journal", newest, _readings(newest, samples, source))
    return replace(found, notes=notes, estimates=_estimates(journal, name))


def _estimates(journal: sqlite3.Connection, run: str) -> list[EstimateRow]:
    # SQLite stores a NaN as NULL. A journal of the first version has no residuals.
    rows = journal.execute(
        "SELECT quantity, block, estimator, step, value, stderr, draws FROM estimates WHERE run = ? ORDER BY id", (run,)
    )
    return [
        EstimateRow(run, quantity, block, Estimate(_or_nan(value), _or_nan(stderr), draws, estimator, step))
        for quantity, block, estimator, step, value, stderr, draws in rows
    ]


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _session_request(payload: bytes, source: str) -> agent_pb2.SessionRequest:
    try:
        return agent_pb2.SessionRequest.FromString(payload)
    except DecodeError:
        raise LogError("the journal has a sample that can't be read", source) from None


def _chosen(runs: Sequence[str], path: Path, given: str | None) -> str:
    if given in runs or (given is None and len(runs) == 1):
        return given or runs[0]
    begun = [run for run in runs if given and run.startswith(given)]
    if len(begun) == 1:
        return begun[0]
    known = ", ".join(runs) or "none"
    if given is None:
        wrong = "one of its runs must be named, with --run NAME or for `compare` as sqlite:///PATH#NAME"
    else:
        wrong = f"{len(begun)} runs begin with {given!r}" if begun else f"no run {given!r}"
    raise LogError(f"{wrong}; the journal has {known}", str(path))
