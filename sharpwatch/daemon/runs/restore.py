"""Restores runs from the journal: their records as they were, and their newest samples by folding them again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import structlog
from google.protobuf.message import DecodeError

from sharpwatch.daemon.decisions.transitions import UNDER_WAY
from sharpwatch.daemon.detection.state import unpacked
from sharpwatch.daemon.estimation.estimator import PROBES
from sharpwatch.daemon.estimation.windows import WINDOW_PROBES
from sharpwatch.daemon.ingest.hello import Attempt, Claim, Cursor, read_hello
from sharpwatch.daemon.ingest.samples import Reading, read_sample
from sharpwatch.daemon.records import NO_CHANGES, Changes, Observation
from sharpwatch.daemon.runs.run import MAX_ATTEMPTS, Run, Runs
from sharpwatch.daemon.runs.snapshot import Phase
from sharpwatch.daemon.storage.schema import SampleRow, StoredAttempt, StoredRun
from sharpwatch.errors import OperatorError, WireError
from sharpwatch.v1 import agent_pb2

log = structlog.get_logger(__name__)

REPLAYED_SAMPLES = 1_000  # of each run: ten times the detectors' window of 100


def restore_run(runs: Runs, stored: StoredRun) -> list[Changes]:
    """Adds a stored run to `runs`, unless there is no room for it, or none of its attempts can be read.

    Args:
        runs: The daemon's runs.
        stored: The run as the journal has it.

    Returns:
        What the results of commands in the replayed samples changed; it is not journalled yet.
    """
    # Those that can still send something, and those whose samples are folded again.
    wanted = {row.attempt for row in stored.attempts[-MAX_ATTEMPTS:]} | {row.attempt for row in stored.samples}
    found = (read_attempt(row) for row in stored.attempts if row.attempt in wanted)
    attempts = {attempt.hello.attempt: attempt for attempt in found if attempt is not None}
    if not attempts:
        return []
    newest = list(attempts.values())[-1]
    run = None
    for attempt in list(attempts.values())[-MAX_ATTEMPTS:]:
        # Oldest first: an older one may still be sending its last samples.
        run = runs.begin(attempt, stored.attempts[-1].seen_at)
    if run is None:
        return []
    # After the last `begin`: each makes a new controller, from the second on for a trainer that starts at 1.
    mode = None if stored.mode is None else stored.mode.mode
    run.controller.restore(stored.incidents, stored.decisions, stored.revisions, stored.checkpoints, mode, stored.plans)
    if len(attempts) > 1 and not newest.cursor.journalled:
        run.controller.begin_anew()  # the daemon ended before it received a sample of the newest attempt
    run.count_stored(stored)
    # They are sent again when the trainer connects, since nothing says whether it has received them.
    run.outstanding.update((made.id, made) for made in stored.decisions if made.outcome in UNDER_WAY)
    run.reference = stored.reference
    # After the outstanding commands are known, because the samples may hold their answers.
    changes = _Replay(run, attempts, stored).fold()
    ended = next(row for row in stored.attempts if row.attempt == newest.hello.attempt)
    phase: Phase = "closed" if ended.closed else "killed" if ended.killed else "silent"
    seen_at = stored.attempts[-1].seen_at
    run.publish(
        attempts=len(stored.attempts),
        # Never "running": no trainer is connected before the daemon serves.
        phase=phase,
        mode_set=stored.mode,
        last_seen_at=seen_at,
        last_sample_at=seen_at if stored.samples else None,
    )
    return changes


def read_attempt(row: StoredAttempt) -> Attempt | None:
    """Returns a stored attempt; None, and logs, if this version no longer accepts its Hello."""
    try:
        stored = agent_pb2.Hello.FromString(row.hello)
        hello = read_hello(stored)
    except (WireError, DecodeError) as error:
        log.warning("attempt_not_restored", attempt=row.attempt, reason=str(error))
        return None
    return Attempt(hello, b"", Cursor(row.acknowledged), claim=Claim.of(stored), journalled=True)


class _Replay:
    """Folds the newest samples of a run. Nothing is decided, but results of outstanding commands are taken in.

    Args:
        run: The run, with its records.
        attempts: Those that samples may be of.
        stored: What the journal has of it.
    """

    def __init__(self, run: Run, attempts: Mapping[str, Attempt], stored: StoredRun) -> None:
        self._run = run
        self._attempts = attempts
        self._rows = stored.samples
        self._state = stored.baselines
        # Arrays of other blocks can't go into one window or baseline with those of the newest attempt.
        self._alike = {name for name, one in attempts.items() if one.hello.same_blocks(run.attempt.hello)}
        # The journal has when the newest sample came. Of the others it is taken to be as long before as they were made.
        newest = None if not self._rows else _reading(attempts.get(self._rows[-1].attempt), self._rows[-1])
        self._clock = stored.attempts[-1].seen_at - (0.0 if newest is None else newest.taken_at)

    def fold(self) -> list[Changes]:
        """Folds them; returns what they changed."""
        changes = []
        for row in self._rows:
            if row.attempt in self._attempts:
                # The journal keeps how far sequences have come, but not the step.
                self._attempts[row.attempt].cursor.step = row.step
        run, known = self._run, self._load_state()
        attempt_before = self._rows[known - 1].attempt if known else ""
        for row in self._rows[known:]:
            if row.attempt != attempt_before:
                run.begin_steps()
                run.controller.detection.begin_attempt()
            attempt_before = row.attempt
            reading = _reading(self._attempts.get(row.attempt), row)
            if reading is None:
                continue
            changes += _replay_reports(run, reading)
            observation = self._update(row, reading)
            if observation is not None:
                run.controller.replay(observation)
        if attempt_before != run.attempt.hello.attempt:
            run.controller.detection.begin_attempt()
        for change in changes:
            run.count(change)
        return changes

    def _update(self, row: SampleRow, reading: Reading) -> Observation | None:
        if row.attempt not in self._alike:
            return None
        if not self._attempts[row.attempt].hello.same_projection(self._run.attempt.hello):
            reading = _without_projection(reading)
        observation = self._run.update(reading, self._clock + reading.taken_at, reading.taken_at)
        self._run.folded(row.attempt, row.sequence)
        return observation

    def _load_state(self) -> int:
        """Loads the journalled state, if its sample is among those to be folded; returns how many of them it has seen.

        Of these, only those are read that an estimate or the run's view still shows.
        """
        if self._state is None:
            return 0
        saved = self._state.attempt, self._state.sequence
        known = next((count for count, row in enumerate(self._rows, 1) if (row.attempt, row.sequence) == saved), 0)
        if not known:
            return 0
        try:
            arrays = unpacked(self._state.state)
            self._run.controller.detection.load_arrays(arrays)
        except ValueError as error:
            log.warning("baselines_not_restored", run=self._run.name, reason=str(error))
            return 0
        for row in self._still_shown(self._rows[:known]):
            reading = _reading(self._attempts[row.attempt], row)
            observation = None if reading is None else self._update(row, reading)
            if observation is not None:
                self._run.controller.recall(observation)
        self._run.load_arrays(arrays, saved)
        return known

    def _still_shown(self, rows: Sequence[SampleRow]) -> list[SampleRow]:
        """The rows that have the newest readings of something, as many as are kept of it."""
        left = Counter({name: max(spec.window, WINDOW_PROBES) for name, spec in PROBES.items()})
        left.update({"attention": WINDOW_PROBES, "tap": 1, "loss": 1, "health": 1})
        shown: list[SampleRow] = []
        for row in reversed(rows):
            if row.attempt not in self._alike:
                continue
            try:
                sample = agent_pb2.SessionRequest.FromString(row.payload).sample
            except DecodeError:
                continue
            has = [field.name for field, _ in sample.ListFields() if left[field.name] > 0]
            left.subtract(has)
            if has or sample.restored or not shown:
                shown.append(row)
        return shown[::-1]


def _replay_reports(run: Run, reading: Reading) -> list[Changes]:
    """Takes in what a sample reports beside measurements: the daemon may have ended before it journalled that."""
    changes = []
    for result in reading.results:
        # The decisions of other results were journalled before the restart.
        outstanding = run.outstanding.pop(result.command_id, None) is not None
        take = run.controller.command_result if outstanding else run.controller.replay_result
        try:
            changes.append(take(result, time.time()))
        except OperatorError as error:
            log.warning("command_result_unplaced", run=run.name, reason=str(error))
    if reading.checkpoints or reading.deleted_checkpoints or reading.restored:
        changes.append(run.controller.note_checkpoints(reading.checkpoint_report))
    return [each for each in changes if each != NO_CHANGES]


def _without_projection(reading: Reading) -> Reading:
    """Returns `reading` without what depends on a projection that the newest attempt does not use."""
    probes = {name: PROBES[name].without_projection(one) for name, one in reading.probes.items()}
    return replace(reading, probes=probes)


def _reading(attempt: Attempt | None, row: SampleRow) -> Reading | None:
    if attempt is None:
        return None
    try:
        return read_sample(attempt.hello, agent_pb2.SessionRequest.FromString(row.payload).sample)
    except (WireError, DecodeError) as error:
        log.warning("sample_not_restored", attempt=row.attempt, sequence=row.sequence, reason=str(error))
        return None
