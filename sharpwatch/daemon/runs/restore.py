"""Takes the runs up where the journal left them: records as they stand, the newest samples through the usual path."""

from __future__ import annotations

import time
from dataclasses import replace

import structlog
from google.protobuf.message import DecodeError

from sharpwatch.daemon.decisions.decision_log import Changes
from sharpwatch.daemon.decisions.lifecycle import UNDER_WAY
from sharpwatch.daemon.ingest.hello import read_hello
from sharpwatch.daemon.ingest.samples import Cursor, Reading, read_sample
from sharpwatch.daemon.runs.runs import Attempt, Run, Runs
from sharpwatch.daemon.storage.schema import SampleRow, StoredAttempt, StoredRun
from sharpwatch.errors import OperatorError, WireError
from sharpwatch.v1 import agent_pb2

log = structlog.get_logger(__name__)

REPLAYED_SAMPLES = 1_000  # of each run: ten times the detectors' window of 100


def restore_run(runs: Runs, stored: StoredRun) -> list[Changes]:
    """Put a stored run among `runs`; returns what the replayed results changed, still to be journalled."""
    attempts = {row.attempt: attempt for row in stored.attempts if (attempt := _attempt(row)) is not None}
    if not attempts:
        return []
    newest = list(attempts.values())[-1]
    run = None
    for attempt in attempts.values():
        run = runs.begin(attempt, stored.attempts[-1].seen_at)
    if run is None:
        return []
    run.supervisor.restore(stored.alerts, stored.decisions, stored.revisions, stored.checkpoints, stored.mode)
    if len(attempts) > 1 and all(row.attempt != newest.manifest.attempt for row in stored.samples):
        run.supervisor.begin_anew()  # the daemon ended before it saw a step of it
    run.note(Changes(stored.alerts, stored.decisions, stored.revisions, ()))
    run.outstanding.update((made.id, made) for made in stored.decisions if made.outcome in UNDER_WAY)
    changes = _replay(run, attempts, stored.samples)
    closed = next(row.closed for row in stored.attempts if row.attempt == newest.manifest.attempt)
    seen_at = stored.attempts[-1].seen_at
    run.show(
        attempts=len(stored.attempts),
        phase="closed" if closed else "silent",
        last_seen_at=seen_at,
        last_sample_at=seen_at if stored.samples else None,
    )
    return changes


def _attempt(row: StoredAttempt) -> Attempt | None:
    """None, and a log line, where this version does not take the stored Hello any more."""
    try:
        manifest = read_hello(agent_pb2.Hello.FromString(row.hello))
    except (WireError, DecodeError) as error:
        log.warning("attempt_not_restored", attempt=row.attempt, reason=str(error))
        return None
    return Attempt(manifest, row.hello, Cursor(row.acknowledged), journalled=True)


def _replay(run: Run, attempts: dict[str, Attempt], rows: tuple[SampleRow, ...]) -> list[Changes]:
    """Fold the samples; nothing is decided, but a result that came in just before the end still counts."""
    changes = []
    for row in rows:
        attempt = attempts.get(row.attempt)
        reading = _reading(attempt, row) if attempt is not None else None
        if attempt is None or reading is None:
            continue
        attempt.cursor.step = reading.step
        for result in reading.results:
            if run.outstanding.pop(result.command_id, None) is not None:
                try:
                    changes.append(run.supervisor.command_result(result, time.time()))
                except OperatorError as error:
                    log.warning("command_result_unplaced", run=run.name, reason=str(error))
        if attempt.manifest.same_blocks(run.attempt.manifest):
            if not attempt.manifest.same_projection(run.attempt.manifest):
                reading = _without_projection(reading)
            observation = run.fold(reading, time.time())
            if observation is not None:
                run.supervisor.replay(observation)
    for change in changes:
        run.note(change)
    return changes


def _without_projection(reading: Reading) -> Reading:
    """What is left of `reading` once the sketches' projection has changed."""
    probes = {name: PROBES[name].without_projection(one) for name, one in reading.probes.items()}
    return replace(reading, probes=probes)


def _reading(attempt: Attempt, row: SampleRow) -> Reading | None:
    try:
        return read_sample(attempt.manifest, agent_pb2.SessionRequest.FromString(row.payload).sample)
    except (WireError, DecodeError) as error:
        log.warning("sample_not_restored", attempt=row.attempt, sequence=row.sequence, reason=str(error))
        return None
