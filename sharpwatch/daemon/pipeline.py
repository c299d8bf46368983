"""The pipeline: one task that takes every sample and every change from the queue to the journal and to decisions.

A sample is acknowledged only once it is journalled, and a command is sent only once its decision is. Estimates follow
when they are done: no alert or decision waits for them, and each carries its step. While the journal
fails, samples are still estimated, judged and exported; acknowledgements and commands wait until it takes writes again.
Records that wait so are bounded: with more of them, samples stay in their queue, and nothing more is found or decided.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain, islice

import structlog

from sharpwatch.daemon.config.settings import DetectionConfig
from sharpwatch.daemon.decisions.transitions import UNDER_WAY
from sharpwatch.daemon.estimation.estimator import PROBES, EstimationQueue, Estimator, Waiting, one_turn
from sharpwatch.daemon.estimation.windows import EstimateRequest, Estimates
from sharpwatch.daemon.exporter.own_metrics import OwnMetrics
from sharpwatch.daemon.ingest.group_commit import Gathering
from sharpwatch.daemon.ingest.hello import Attempt
from sharpwatch.daemon.ingest.samples import QueuedSample, Reading, SampleQueue
from sharpwatch.daemon.records import NO_CHANGES, Changes, Decision, Incident, Silence
from sharpwatch.daemon.runs.peers import Peers
from sharpwatch.daemon.runs.run import Run, Runs
from sharpwatch.daemon.storage.journal import Store
from sharpwatch.daemon.storage.schema import (
    AttemptRow,
    EstimateRow,
    ModeRow,
    PendingWrites,
    ReferenceRow,
    RequestRow,
    SampleRow,
)
from sharpwatch.errors import NotHeldError, OperatorError, RevisionConflictError, StoreError

log = structlog.get_logger(__name__)

_FIRST_RETRY, _LAST_RETRY = 0.1, 5.0  # seconds between tries of a failing journal
_STALL_CHECK = 5.0  # seconds between looks for runs that have stalled, at the most
_SAVED_AFTER = 60.0  # seconds after which a run without a session counts as ended
_SAVED_AT_ONCE = 16  # states, each of which takes some 20 ms
_YIELD_EVERY = 64  # samples folded before other tasks get a turn
MAX_RECORD_BYTES = 64 * 2**20  # of records that wait for a journal that fails; with more, no sample is folded


class Pipeline:
    """Moves samples through journal, runs and estimates.

    Args:
        runs: The runs that samples belong to.
        queue: Where sessions put samples.
        store: The journal.
        estimator: Estimates windows of probes.
        metrics: The daemon's own metrics.
        on_journalled: Called with an attempt and its newest journalled sequence, to acknowledge it.
        on_command: Called with a run and a journalled decision whose command is to be sent.
        on_records: Called with incidents and decisions that changed and are journalled.
    """

    def __init__(  # noqa: PLR0913  the parts that it connects
        self,
        *,
        runs: Runs,
        queue: SampleQueue,
        store: Store,
        estimator: Estimator,
        metrics: OwnMetrics,
        on_journalled: Callable[[Attempt, int], None],
        on_command: Callable[[Run, Decision], None],
        on_records: Callable[[Collection[Incident], Collection[Decision]], None],
    ) -> None:
        self._runs = runs
        self._queue = queue
        self._store = store
        self._estimator = estimator
        self._metrics = metrics
        self._on_journalled = on_journalled
        self._on_command = on_command
        self._on_records = on_records
        self.peers = Peers(runs)
        self._pending = PendingWrites()
        self._estimation_queue = EstimationQueue(self._estimate_waiting)
        # The worker, operators' calls and new attempts all write. One at a time, because a write that fails puts its
        # records back, and must not put them over those of a later write.
        self._writing = asyncio.Lock()
        self._retry_at = 0.0
        self._retry_after = _FIRST_RETRY
        self._gathering = Gathering()
        self._stop = asyncio.Event()
        self._is_noted_full = False  # that nothing is folded any more: once for each outage
        self._cycling = asyncio.Lock()  # a cycle is under way, or runs are let go of
        self._cycled = asyncio.Event()
        self.store_error = ""

    async def run(self) -> None:
        """Works until `stop`, and then finishes what is queued.

        If the journal still fails then, the samples that it has not taken stay with the agents.
        """
        while not self._stop.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(self._retry_delay()):
                    await self._queue.filled()
            if not self._queue.fills_turn and (wait := self._gathering.wait(time.monotonic())):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), wait)
            async with self._cycling:
                await self._cycle()
            self._cycled.set()
        self._retry_at = 0.0
        await self._cycle()
        for run in self._runs:
            self._save(run)
            await asyncio.sleep(0)
        # The cycle may have put windows into the queue. Their estimates are written by the last write.
        await self._estimation_queue.settled()
        with suppress(StoreError):
            await self._write(())
        if self.store_error:
            log.error("samples_left_unjournalled", samples=self._queue.depth, store_error=self.store_error)

    def stop(self) -> None:
        """Makes `run` return after the present cycle and one more."""
        self._stop.set()
        self._queue.wake()

    async def watch_stalls(self, detected_by: Callable[[], DetectionConfig]) -> None:
        """Looks now and then for runs that have stopped making steps, until it is cancelled.

        Args:
            detected_by: Returns what says of each run after how many seconds without a sample it has stalled.
        """
        while True:
            await asyncio.sleep(min(_STALL_CHECK, detected_by().shortest_stall / 4))
            if self.is_full:
                continue  # steps are not seen either
            detection = detected_by()
            for run in self._runs:
                try:
                    # Nearly no configuration has overrides, and this runs often.
                    own = detection.of(run.attempt.hello.all_labels) if detection.overrides else detection
                    changes = run.check_stall(own.stall_after, time.time(), time.monotonic())
                except Exception:  # an error in one run must not stop the others; counted
                    self._metrics.internal_errors.labels("stall").inc()
                    log.exception("stall_check_failed", run=run.name)
                    continue
                if changes != NO_CHANGES:
                    self._record(run, changes)
                    run.publish()
                    self._queue.wake()
            await self._save_ended()

    async def _save_ended(self) -> None:
        """Has the states of some ended runs journalled, so that they are back at once when they are asked for."""
        before = time.time() - _SAVED_AFTER
        ended = (run for run in self._runs if run.phase != "running" and run.snapshot.last_seen_at < before)
        # Others get a turn in between, and may have it let go of.
        rows = (row for run in ended if self._runs.get(run.name) is run and (row := run.state_row()) is not None)
        for row in islice(rows, _SAVED_AT_ONCE):
            self._pending.baselines[row.run] = row
            self._queue.wake()
            await asyncio.sleep(0)

    async def submit(self, run: Run, changes: Changes, row: ModeRow | ReferenceRow | RequestRow | None = None) -> None:
        """Journals what an operator changed, then sends the commands in it.

        Args:
            run: The run.
            changes: What its controller made of the request.
            row: The run's new mode or reference, or the request, where that is no decision.

        Raises:
            NotHeldError: The run has left memory meanwhile, and the changes with it.
            StoreError: The journal fails. The changes are written, and their commands sent, once it works again.
        """
        if self._runs.get(run.name) is not run:
            raise NotHeldError(f"run {run.name} has just left memory, and nothing was changed; try again")
        self._record(run, changes)
        match row:
            case ModeRow():
                self._pending.modes.append(row)
                run.publish(mode_set=row)
            case ReferenceRow():
                self._pending.references.append(row)
            case RequestRow():
                self._pending.requests.append(row)
        # Published though the write may fail: the controller has changed already, and the change stays pending.
        run.publish(mode=run.controller.mode)
        await self._write(())

    async def submit_all(self, changed: Iterable[tuple[Run, Changes]]) -> None:
        """Journals what alerts of other systems changed, all in one transaction.

        Args:
            changed: Runs, and what their controllers made of the alerts.

        Raises:
            StoreError: The journal fails. The changes are written once it works again.
        """
        self._record_all(changed)
        # Also where nothing changed: what came before, and is told again, may not be written yet.
        await self._write(())

    async def keep_silence(self, silence: Silence) -> None:
        """Journals a silence that an operator has added or ended.

        Args:
            silence: The silence as it is now.

        Raises:
            StoreError: The journal fails. The silence holds, and is written once the journal works again.
        """
        log.info(
            "silence",
            silence=silence.id,
            run=silence.run,
            alert=silence.alert,
            cause=silence.cause,
            policy=silence.policy,
            author=silence.author,
            comment=silence.comment,
            ends_at=silence.ends_at,
            expired_by=silence.expired_by,
        )
        self._pending.silences[silence.id] = silence
        await self._write(())

    async def keep_request(self, request: RequestRow) -> None:
        """Journals a request that changed nothing.

        Args:
            request: The request.

        Raises:
            StoreError: The journal fails. It is written once that works again.
        """
        self._pending.requests.append(request)
        await self._write(())

    async def flush(self, run: str) -> None:
        """Journals what is known of a run and not written yet.

        Args:
            run: Its name.

        Raises:
            StoreError: There is such, and the journal fails.
        """
        # Also what a write in progress has: it may fail.
        async with self._writing:
            unwritten = self._pending.has(run)
        if unwritten:
            await self._write(())

    async def forget(self, request: RequestRow, closed: Collection[Incident]) -> None:
        """Deletes all that there is of an ended run, none of whose samples wait to be journalled.

        Args:
            request: The operator's request, which names the run and is kept.
            closed: Its incidents that were open; who was told of them is told that they are over.

        Raises:
            StoreError: The journal fails, and has it still.
        """
        async with self._writing:
            # Memory first: what it has could be written again.
            self._runs.drop(request.run)
            self._pending.drop(request.run)
            await self._store.forget(request.run, request)
        self._on_records(closed, ())

    async def let_go(self, names: Collection[str]) -> None:
        """Journals all that is known of some runs, and drops them: another daemon goes on with them.

        Args:
            names: Their names. They must not get samples any more.

        Raises:
            StoreError: The journal fails. They are still here.
        """
        while True:
            async with self._cycling:  # for a sample is journalled before it is folded
                if all(each.cursor.idle for name in names for each in self._runs.attempts(name)):
                    break
            if self.store_error:
                raise StoreError(self.store_error)
            self._cycled.clear()
            await self._cycled.wait()
        for name in names:
            run = self._runs.get(name)
            if run is not None:
                self._save(run)
            await asyncio.sleep(0)
        await self._write(())
        while any(map(self._pending.has, names)):  # an operator's call has come meanwhile
            await self._write(())
        for name in names:
            self._runs.drop(name)
            self._pending.drop(name)  # estimates that came during the write; samples can give them again

    async def restored(self, run: Run, changes: Sequence[Changes]) -> None:
        """Journals the changes that were found in replayed samples, and estimates the restored windows."""
        for change in changes:
            self._pending.add(run.name, change)
        await self._estimate([run.request()], journalled=True)
        self._runs.limit_windows()
        run.publish()

    def count_internal_error(self, where: str) -> None:
        """Counts an error of the daemon itself."""
        self._metrics.internal_errors.labels(where).inc()

    @property
    def is_full(self) -> bool:
        """Whether the journal fails, and as many records wait for it as may."""
        return bool(self.store_error) and self._pending.nbytes > MAX_RECORD_BYTES

    def awaits_write(self, run: Run) -> bool:
        """Whether the journal does not know yet that an attempt of a run began, since it fails."""
        return bool(self.store_error) and run.attempt.hello.attempt in self._pending.attempts

    def take_up(self, run: Run) -> None:
        """Takes up what a restored run and others say of each other; that is journalled with the next samples."""
        self._record_all(self.peers.restore(run))
        for twin in self.peers.twins(run):
            twin.signal.notify()  # whoever watches it sees whose twin it is by now

    async def register(self, attempt: Attempt, now: float) -> None:
        """Journals that an attempt began at unix seconds `now`; if the journal fails, that is written later."""
        hello = attempt.hello
        self._pending.attempts[hello.attempt] = AttemptRow(hello.run, hello.attempt, attempt.message, now)
        attempt.message = b""  # the journal's alone; some are of megabytes
        with suppress(StoreError):
            await self._write(())

    def note_killed(self, attempt: Attempt) -> None:
        """Has the journal know that the process of an attempt ended without a farewell."""
        self._pending.killed[attempt.hello.attempt] = attempt.hello.run
        self._queue.wake()

    def _retry_delay(self) -> float | None:
        """Seconds until a failing journal is tried again; None if it works."""
        return max(0.0, self._retry_at - time.monotonic()) if self.store_error else None

    async def _cycle(self) -> None:
        # All of them while the journal fails, as those that come back would else keep the others from being judged.
        began = time.monotonic()
        entries = self._queue.take() if self.store_error or self._stop.is_set() else self._queue.turn(began)
        self._gathering.begin(len(entries), began)
        written = False
        # Written before they are folded, so that no acknowledgement waits for detectors and policies.
        # What these decide is written after, by a second transaction.
        if time.monotonic() >= self._retry_at:
            with suppress(StoreError):
                await self._write(entries)
                written = True
        writing = time.monotonic() - began
        # A sample is folded once, however often its write fails: the detectors must not see a step twice.
        if self.is_full:
            self._note_full()
        else:
            await self._process([entry for entry in entries if not entry.processed])
        self._queue.took(entries, writing, time.monotonic() - began, time.monotonic())
        if not written:
            # Back into the bounded queue, and not kept here: while the disk is full, memory must not grow.
            self._queue.requeue(entries)
        elif self._pending != PendingWrites() and not self._queue.has_turn:  # else the next turn begins by writing it
            with suppress(StoreError):
                await self._write(())

    def _note_full(self) -> None:
        if not self._is_noted_full:
            log.error("records_full", bytes=self._pending.nbytes, store_error=self.store_error)
        self._is_noted_full = True

    async def _write(self, entries: Sequence[QueuedSample]) -> None:
        """Writes samples and all pending records in one transaction, and only then acknowledges and sends."""
        async with self._writing:
            # Swapped before the await, so that what comes during the write goes into the next one.
            pending, self._pending = self._pending, PendingWrites()
            try:
                if entries or pending != PendingWrites():
                    await self._timed_write(pending, _rows(entries, time.time() - time.monotonic()))
            except StoreError as error:
                pending.add_newer(self._pending)
                if isinstance(error, RevisionConflictError):
                    # Every try would be refused, and no run's samples would be acknowledged any more; logged, counted.
                    pending.refuse(error.run, error.revision)
                    self._metrics.internal_errors.labels("journal").inc()
                self._pending = pending
                raise
        for entry in entries:
            entry.attempt.cursor.mark_journalled(entry.reading.sequence)
        # One acknowledgement for each attempt: it covers all sequences up to its own.
        for attempt in {entry.attempt.hello.attempt: entry.attempt for entry in entries}.values():
            self._on_journalled(attempt, attempt.cursor.journalled)
        if pending.incidents or pending.decisions:
            self._on_records(pending.incidents.values(), pending.decisions.values())
        for identity, run in pending.commands.items():
            try:
                self._send(run, identity)
            except Exception:  # a command that can't be sent must not end the daemon; counted
                self._metrics.internal_errors.labels("send").inc()
                log.exception("send_failed", run=run, decision=identity)

    async def _timed_write(self, pending: PendingWrites, samples: Sequence[SampleRow]) -> None:
        try:
            with self._metrics.store.time():
                await self._store.write(pending, samples)
        except StoreError as error:
            self._metrics.store_errors.inc()
            self._metrics.store_writable.set(0)
            if not self.store_error:
                # Once for each outage, not for each try.
                log.error("store_failed", error=str(error))  # noqa: TRY400  the message has the cause
            self.store_error = str(error)
            self._retry_at = time.monotonic() + self._retry_after
            self._retry_after = min(2 * self._retry_after, _LAST_RETRY)
            raise
        if self.store_error:
            log.info("store_recovered", after=self.store_error)
        self.store_error, self._retry_at, self._retry_after = "", 0.0, _FIRST_RETRY
        self._is_noted_full = False
        self._metrics.store_writable.set(1)

    def _send(self, name: str, identity: str) -> None:
        run = self._runs.get(name)
        if run is None:
            return
        # The decision as it is now: while the journal failed it may have expired or been answered.
        made = next((made for made in run.controller.decisions if made.id == identity), None)
        if made is not None and made.outcome in UNDER_WAY:
            run.outstanding[identity] = made
            self._on_command(run, made)

    async def _process(self, entries: list[QueuedSample]) -> None:
        touched: dict[str, Run] = {}
        done: list[QueuedSample] = []
        for index, entry in enumerate(entries):
            if index % _YIELD_EVERY == _YIELD_EVERY - 1:
                await asyncio.sleep(0)
            entry.processed = True
            run = self._runs.get(entry.run)
            if run is None:
                done.append(entry)
                continue
            try:
                self._fold(run, entry)
            except Exception as error:  # an error in one run must not stop the others; counted
                self._metrics.internal_errors.labels("fold").inc()
                if run.note_failure("fold", error):
                    log.exception("fold_failed", run=entry.run, step=entry.reading.step)
            touched[entry.run] = run
            probes = [probe for probe in entry.reading.probes if PROBES[probe].window]
            # Its latency ends when its estimates are published, or here if it has none.
            if entry.attempt is run.attempt and probes:
                self._estimation_queue.put(entry.run, probes, entry.received_at)
            else:
                done.append(entry)
        self._runs.limit_windows()
        # Once a batch and run, because a snapshot copies records and wakes every watcher.
        for run in touched.values():
            run.publish()
        self._observe_latency(entry.received_at for entry in done)

    async def _estimate_waiting(self, batch: Mapping[str, Waiting]) -> Collection[str]:
        """Estimates a batch of the estimation queue, and wakes the pipeline to journal it.

        Returns:
            The names of runs whose turn is still to come.
        """
        runs = [run for name in batch if (run := self._runs.get(name)) is not None]
        now, later = one_turn([run.request(batch[run.name].probes) for run in runs])
        await self._estimate(now)
        left = {request.hello.run for request in later}
        done = (waiting.received_at for name, waiting in batch.items() if name not in left)
        self._observe_latency(chain.from_iterable(done))
        self._queue.wake()
        return left

    def _observe_latency(self, received: Iterable[float]) -> None:
        now = time.monotonic()
        for received_at in received:
            self._metrics.ingest_to_metric.observe(now - received_at)

    def _fold(self, run: Run, entry: QueuedSample) -> None:
        reading, now = entry.reading, time.time()
        for probe in reading.dropped_probes:
            self._metrics.dropped_probes.labels(probe).inc()
        self._take_reports(run, reading, now)
        if entry.attempt is not run.attempt:
            return  # a newer attempt has replaced this one, so its measurements are out of date
        observation = run.update(reading, now, entry.received_at)
        run.folded(entry.attempt.hello.attempt, reading.sequence)
        if observation is not None:
            changes = run.controller.observe(observation, now)
            self._record(run, changes)
            # Otherwise no other run learns anything of this step, as is usual.
            if changes.incidents or entry.run in self.peers.awaiting or entry.run in self.peers.followers:
                self._record_all(self.peers.after(run, observation.step, changes))
        if run.must_save:
            self._save(run)

    def _save(self, run: Run) -> None:
        """Has the state of a run journalled, so that a restart need not fold its samples again."""
        row = run.state_row()
        if row is not None:
            self._pending.baselines[run.name] = row

    def _record_all(self, found: Iterable[tuple[Run, Changes]]) -> None:
        """Records changes of several runs, such as what one run's step changed in incidents of others."""
        changed: dict[str, Run] = {}
        for run, changes in found:
            self._record(run, changes)
            changed[run.name] = run
        for run in changed.values():
            run.publish()

    def _take_reports(self, run: Run, reading: Reading, now: float) -> None:
        """Takes what a sample reports beside measurements, also from the last samples of a replaced attempt."""
        for result in reading.results:
            # Removed even if the controller refuses the result: the trainer has answered, and must not get it again.
            run.outstanding.pop(result.command_id, None)
            try:
                self._record(run, run.controller.command_result(result, now))
            except OperatorError as error:
                log.warning("command_result_unplaced", run=run.name, command=result.command_id, reason=str(error))
        # After the results: a checkpoint to which a rollback failed may have been saved anew since.
        if reading.checkpoints or reading.deleted_checkpoints or reading.restored:
            self._record(run, run.controller.note_checkpoints(reading.checkpoint_report))

    def _record(self, run: Run, changes: Changes) -> None:
        if changes == NO_CHANGES:
            return
        run.count(changes)
        self._pending.add(run.name, changes)
        for incident in changes.incidents:
            _log_incident(run.name, incident)
        for made in changes.decisions:
            _log_decision(run.name, made)

    async def _estimate(self, requests: Sequence[EstimateRequest], *, journalled: bool = False) -> None:
        """Estimates windows; each run's estimates are published as soon as they are done.

        Args:
            requests: The windows.
            journalled: Whether the journal has their estimates already.
        """
        if not requests:
            return
        for request in requests:
            run = self._runs.get(request.hello.run)
            if run is not None:
                run.windows.note_taken(request)
        with self._metrics.estimate.time():
            async for request, estimates in self._estimator.estimate(requests):
                run = self._runs.get(request.hello.run)
                if run is not None:
                    self._take_estimates(run, request, estimates)
                    if not journalled:
                        self._keep_estimates(request, estimates)
                    run.publish()

    def _take_estimates(self, run: Run, request: EstimateRequest, estimates: Estimates) -> None:
        for probe, error in estimates.failures.items():
            self._metrics.internal_errors.labels("estimate").inc()
            if run.note_failure(probe, error):
                log.error("estimate_failed", run=run.name, probe=probe, exc_info=error)
        run.take_estimates(request, estimates)

    def _keep_estimates(self, request: EstimateRequest, estimates: Estimates) -> None:
        for (quantity, block, _), estimate in estimates.values.items():
            if estimate.step in request.new_steps:  # the others are journalled already
                self._pending.estimates.append(EstimateRow(request.hello.run, quantity, block, estimate))


def _log_incident(run: str, incident: Incident) -> None:
    log.warning(
        "incident",
        run=run,
        incident=incident.title,
        blocks=incident.blocks,
        severity=incident.severity,
        active=incident.active,
        step=incident.last_step,
        cause=incident.cause,
        layer_blocks=incident.layer_blocks[:8],
        parameter=incident.parameter,
        rank=incident.rank,
        onset=incident.onset,
        evidence=incident.evidence,
    )


def _log_decision(run: str, decision: Decision) -> None:
    log.info(
        "decision",
        run=run,
        decision=decision.id,
        action=decision.action,
        mode=decision.mode,
        outcome=decision.outcome,
        guard=decision.guard,
        step=decision.step,
        author=decision.author,
    )


def _rows(entries: Sequence[QueuedSample], clock: float) -> list[SampleRow]:
    return [
        SampleRow(
            run=entry.run,
            attempt=entry.attempt.hello.attempt,
            sequence=entry.reading.sequence,
            step=entry.reading.step,
            payload=entry.payload,
            # Not when it is written: what waited while its run was released came before that.
            received_at=clock + entry.received_at,
            closing=entry.reading.closing,
        )
        for entry in entries
    ]
