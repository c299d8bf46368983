"""All runs of the daemon, by name, and their restoration from the journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import structlog
from google.protobuf.message import DecodeError

from sharpwatch.daemon.decisions.lifecycle import UNDER_WAY
from sharpwatch.daemon.decisions.run_controller import RunController
from sharpwatch.daemon.estimation.estimator import PROBES
from sharpwatch.daemon.ingest.hello import RunHello, read_hello
from sharpwatch.daemon.ingest.queue import Attempt, Cursor
from sharpwatch.daemon.ingest.samples import Reading, read_sample
from sharpwatch.daemon.records import Changes
from sharpwatch.daemon.runs.run import Run, RunSnapshot
from sharpwatch.daemon.storage.schema import SampleRow, StoredAttempt, StoredRun
from sharpwatch.errors import OperatorError, WireError
from sharpwatch.v1 import agent_pb2

log = structlog.get_logger(__name__)

MAX_RUNS = 10_000
MAX_ATTEMPTS = 16  # remembered of a run, as one of them may still be sending its last samples
REPLAYED_SAMPLES = 1_000  # of each run: ten times the detectors' window of 100


# Makes the controller of a new attempt from its Hello and from the run's earlier controller, if it has one.
MakeController = Callable[[RunHello, RunController | None], RunController]


class Runs:
    """All runs, by name.

    At most `MAX_RUNS` are held. A new one replaces the run that was last seen longest ago, but never one that is live.

    Args:
        make_controller: Makes the controller of each new attempt.
    """

    def __init__(self, make_controller: MakeController) -> None:
        self._make_controller = make_controller
        self._runs: dict[str, Run] = {}
        self._attempts: dict[str, dict[str, Attempt]] = {}  # by run, then by attempt; the newest last

    def __iter__(self) -> Iterator[Run]:
        return iter(list(self._runs.values()))

    def __len__(self) -> int:
        return len(self._runs)

    def get(self, name: str) -> Run | None:
        """Returns the run of that name, or None."""
        return self._runs.get(name)

    def attempt(self, run: str, identity: str) -> Attempt | None:
        """Returns an attempt of `run` that is remembered, or None."""
        return self._attempts.get(run, {}).get(identity)

    def owner(self, identity: str) -> str | None:
        """Returns the name of the run that the attempt `identity` belongs to, or None."""
        return next((run for run, attempts in self._attempts.items() if identity in attempts), None)

    def begin(self, attempt: Attempt, now: float) -> Run | None:
        """Starts a new attempt, of a known run or of a new one.

        Args:
            attempt: The new attempt.
            now: Unix seconds.

        Returns:
            Its run, or None if the run is new and all `MAX_RUNS` that are held are live.
        """
        name = attempt.hello.run
        run = self._runs.get(name)
        if run is not None:
            run.begin(attempt, self._make_controller(attempt.hello, run.controller))
        elif self._make_room():
            run = Run(attempt, self._make_controller(attempt.hello, None), now=now)
            self._runs[name] = run
        else:
            return None
        attempts = self._attempts.setdefault(name, {})
        attempts[attempt.hello.attempt] = attempt
        while len(attempts) > MAX_ATTEMPTS:
            del attempts[next(iter(attempts))]
        return run

    def snapshots(self) -> tuple[RunSnapshot, ...]:
        """Returns the snapshot of every run; safe on any thread."""
        return tuple(run.snapshot for run in list(self._runs.values()))

    def decisions(self, prefix: str) -> list[tuple[Run, str]]:
        """Finds decisions by the beginning of their id.

        Returns:
            The run and the id of each decision whose id begins with `prefix`; only that one if an id equals it.
        """
        found = [(run, made.id) for run in self for made in run.controller.decisions if made.id.startswith(prefix)]
        return [one for one in found if one[1] == prefix] or found

    def _make_room(self) -> bool:
        if len(self._runs) < MAX_RUNS:
            return True
        gone = [run for run in self._runs.values() if run.snapshot.phase != "running"]
        if not gone:
            return False
        oldest = min(gone, key=lambda run: run.snapshot.last_seen_at).name
        del self._runs[oldest], self._attempts[oldest]
        return True


def restore_run(runs: Runs, stored: StoredRun) -> list[Changes]:
    """Adds a stored run to `runs`.

    Args:
        runs: The daemon's runs.
        stored: The run as the journal has it.

    Returns:
        What the results of commands in the replayed samples changed; it is not journalled yet.
    """
    attempts = {row.attempt: attempt for row in stored.attempts if (attempt := _attempt(row)) is not None}
    if not attempts:
        return []
    newest = list(attempts.values())[-1]
    run = None
    for attempt in attempts.values():
        run = runs.begin(attempt, stored.attempts[-1].seen_at)
    if run is None:
        return []
    run.controller.restore(stored.alerts, stored.decisions, stored.revisions, stored.checkpoints, stored.mode)
    if len(attempts) > 1 and all(row.attempt != newest.hello.attempt for row in stored.samples):
        run.controller.begin_anew()  # the daemon ended before it received a sample of the newest attempt
    run.count(Changes(stored.alerts, stored.decisions, stored.revisions, ()))
    run.outstanding.update((made.id, made) for made in stored.decisions if made.outcome in UNDER_WAY)
    changes = _replay(run, attempts, stored.samples)
    closed = next(row.closed for row in stored.attempts if row.attempt == newest.hello.attempt)
    seen_at = stored.attempts[-1].seen_at
    run.publish(
        attempts=len(stored.attempts),
        phase="closed" if closed else "silent",
        last_seen_at=seen_at,
        last_sample_at=seen_at if stored.samples else None,
    )
    return changes


def _attempt(row: StoredAttempt) -> Attempt | None:
    """Returns None, and logs, if this version no longer accepts the stored Hello."""
    try:
        hello = read_hello(agent_pb2.Hello.FromString(row.hello))
    except (WireError, DecodeError) as error:
        log.warning("attempt_not_restored", attempt=row.attempt, reason=str(error))
        return None
    return Attempt(hello, row.hello, Cursor(row.acknowledged), journalled=True)


def _replay(run: Run, attempts: dict[str, Attempt], rows: tuple[SampleRow, ...]) -> list[Changes]:
    """Folds the samples. Nothing is decided, but a result that came in just before the daemon ended still counts."""
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
                    changes.append(run.controller.command_result(result, time.time()))
                except OperatorError as error:
                    log.warning("command_result_unplaced", run=run.name, reason=str(error))
        if attempt.hello.same_blocks(run.attempt.hello):
            if not attempt.hello.same_projection(run.attempt.hello):
                reading = _without_projection(reading)
            observation = run.fold(reading, time.time())
            if observation is not None:
                run.controller.replay(observation)
    for change in changes:
        run.count(change)
    return changes


def _without_projection(reading: Reading) -> Reading:
    """Returns `reading` without what depends on a projection that the newest attempt does not use."""
    probes = {name: PROBES[name].without_projection(one) for name, one in reading.probes.items()}
    return replace(reading, probes=probes)


def _reading(attempt: Attempt, row: SampleRow) -> Reading | None:
    try:
        return read_sample(attempt.hello, agent_pb2.SessionRequest.FromString(row.payload).sample)
    except (WireError, DecodeError) as error:
        log.warning("sample_not_restored", attempt=row.attempt, sequence=row.sequence, reason=str(error))
        return None
