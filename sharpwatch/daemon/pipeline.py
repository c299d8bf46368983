"""From queue to journal to decisions: the one worker through which every sample and every change goes.

Nothing is acknowledged before it is journalled, and no command is sent before its decision is. Estimates follow when
they are done, for no alert or decision waits for them: they carry the step they are of. While the journal
fails, samples are still estimated, observed and shown; acknowledgements and commands wait for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import structlog

from sharpwatch.daemon.decisions.decision_log import Changes
from sharpwatch.daemon.decisions.lifecycle import UNDER_WAY
from sharpwatch.daemon.estimation.gnb import Estimator
from sharpwatch.daemon.estimation.queue import EstimationQueue, Waiting
from sharpwatch.daemon.estimation.windows import Request
from sharpwatch.daemon.exporter.metrics import OwnMetrics
from sharpwatch.daemon.ingest.queue import QueuedSample, SampleQueue
from sharpwatch.daemon.records import Decision
from sharpwatch.daemon.runs.runs import Attempt, Run, Runs
from sharpwatch.daemon.storage.journal import Store
from sharpwatch.daemon.storage.pending_writes import PendingWrites
from sharpwatch.daemon.storage.schema import AttemptRow, EstimateRow, ModeRow, SampleRow
from sharpwatch.errors import OperatorError, StoreError

log = structlog.get_logger(__name__)

_FIRST_RETRY, _LAST_RETRY = 0.1, 5.0  # seconds between tries of a failing journal
_FAIR = 64  # samples folded before the loop serves others


class Pipeline:
    """Owns the order of things; `on_settled` hears of journalled samples, `on_command` of decisions to send."""

    def __init__(  # noqa: PLR0913  what it stands between
        self,
        *,
        runs: Runs,
        intake: SampleQueue,
        store: Store,
        estimator: Estimator,
        metrics: OwnMetrics,
        on_settled: Callable[[Attempt, int], None],
        on_command: Callable[[Run, Decision], None],
    ) -> None:
        self._runs = runs
        self._intake = intake
        self._store = store
        self._estimator = estimator
        self._metrics = metrics
        self._on_settled = on_settled
        self._on_command = on_command
        self._pending = PendingWrites()
        self._backlog = EstimationQueue(self._estimate_waiting)
        self._writing = asyncio.Lock()
        self._retry_at = 0.0
        self._retry_after = _FIRST_RETRY
        self._stopping = False
        self.store_error = ""

    async def run(self) -> None:
        """Work until told to stop, and then what is queued; what a failing journal won't take stays with the agents."""
        while not self._stopping:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._patience()):
                    await self._intake.filled()
            await self._cycle()
        self._retry_at = 0.0
        await self._cycle()
        await self._backlog.settled()
        with suppress(StoreError):
            await self._write(())
        if self.store_error:
            log.error("samples_left_unjournalled", samples=self._intake.depth, store_error=self.store_error)

    def stop(self) -> None:
        """Have `run` return after the cycle under way and one more."""
        self._stopping = True
        self._intake.wake()

    async def submit(self, run: Run, changes: Changes, mode: ModeRow | None = None) -> None:
        """Journal an operator's changes and send their commands; raises `StoreError` while the journal fails."""
        self._take_up(run, changes)
        if mode is not None:
            self._pending.modes.append(mode)
        run.show()
        await self._write(())

    async def restored(self, run: Run, changes: Sequence[Changes]) -> None:
        """Journal what the restart itself found out, and estimate from the windows as they are."""
        for change in changes:
            self._pending.add(run.name, change)
        await self._estimate([run.request()])
        self._pending.estimates.clear()  # the journal has them from before
        run.show()

    async def register(self, attempt: Attempt, now: float) -> None:
        """Journal that an attempt began; while the journal fails this waits with the rest."""
        manifest = attempt.manifest
        self._pending.attempts[manifest.attempt] = AttemptRow(manifest.run, manifest.attempt, attempt.hello, now)
        with suppress(StoreError):
            await self._write(())

    def _patience(self) -> float | None:
        """Seconds until the journal is worth another try; None while it is well."""
        return max(0.0, self._retry_at - time.monotonic()) if self.store_error else None

    async def _cycle(self) -> None:
        entries = self._intake.take()
        written = False
        if time.monotonic() >= self._retry_at:
            with suppress(StoreError):
                await self._write(entries)
                written = True
        await self._process([entry for entry in entries if not entry.processed])
        if not written:
            self._intake.put_back(entries)
        elif self._pending != PendingWrites():
            with suppress(StoreError):
                await self._write(())
        await self._backlog.room()

    async def _write(self, entries: Sequence[QueuedSample]) -> None:
        """One transaction: `entries` and all that is pending. Then, and only then, acknowledge and send."""
        async with self._writing:
            pending, self._pending = self._pending, PendingWrites()
            now = time.time()
            try:
                if entries or pending != PendingWrites():
                    await self._timed_write(pending, [_row(entry, now) for entry in entries])
            except StoreError:
                pending.add_newer(self._pending)
                self._pending = pending
                raise
        for entry in entries:
            entry.attempt.cursor.settle(entry.reading.sequence)
        for attempt in {entry.attempt.manifest.attempt: entry.attempt for entry in entries}.values():
            self._on_settled(attempt, attempt.cursor.journalled)
        for identity, run in pending.commands.items():
            try:
                self._send(run, identity)
            except Exception:  # one command that can't be put on the wire must not end the daemon; counted
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
                log.error("store_failed", error=str(error))  # noqa: TRY400  the cause is in the message
            self.store_error = str(error)
            self._retry_at = time.monotonic() + self._retry_after
            self._retry_after = min(2 * self._retry_after, _LAST_RETRY)
            raise
        if self.store_error:
            log.info("store_recovered", after=self.store_error)
        self.store_error, self._retry_at, self._retry_after = "", 0.0, _FIRST_RETRY
        self._metrics.store_writable.set(1)

    def _send(self, name: str, identity: str) -> None:
        run = self._runs.get(name)
        if run is None:
            return
        # The decision as it stands now: it may have expired, or been answered, while the journal failed.
        made = next((made for made in run.supervisor.decisions if made.id == identity), None)
        if made is not None and made.outcome in UNDER_WAY:
            run.outstanding[identity] = made
            self._on_command(run, made)

    async def _process(self, entries: list[QueuedSample]) -> None:
        touched: dict[str, Run] = {}
        seen: list[QueuedSample] = []
        for index, entry in enumerate(entries):
            if index % _FAIR == _FAIR - 1:
                await asyncio.sleep(0)
            entry.processed = True
            run = self._runs.get(entry.run)
            if run is None:
                seen.append(entry)
                continue
            try:
                self._fold(run, entry)
            except Exception:  # one run's trouble must not end the others; counted
                self._metrics.internal_errors.labels("fold").inc()
                log.exception("fold_failed", run=run.name, step=entry.reading.step)
            touched[run.name] = run
            request = run.request(entry.reading.probes)
            if entry.attempt is run.attempt and request.windows:
                self._backlog.put(Waiting(request, entry.received_at))
            else:
                seen.append(entry)
        for run in touched.values():
            run.show()
        self._note_shown(entry.received_at for entry in seen)

    async def _estimate_waiting(self, batch: Sequence[Waiting]) -> None:
        """Estimate and show what the pipeline left behind, and have the journal take it."""
        requests = [window.request for window in batch]
        await self._estimate(requests)
        for name in {request.hello.run for request in requests}:
            run = self._runs.get(name)
            if run is not None:
                run.show()
        self._note_shown(window.received_at for window in batch)
        self._intake.wake()

    def _note_shown(self, received: Iterable[float]) -> None:
        now = time.monotonic()
        for received_at in received:
            self._metrics.ingest_to_metric.observe(now - received_at)

    def _fold(self, run: Run, entry: QueuedSample) -> None:
        reading, now = entry.reading, time.time()
        for probe in reading.dropped_probes:
            self._metrics.dropped_probes.labels(probe).inc()
        if reading.restored:
            run.supervisor.rewind(reading.step)
            self._pending.rewind(run.name, reading.step)
        for checkpoint in reading.checkpoints:
            run.supervisor.checkpoint(checkpoint)
            self._pending.checkpoints[run.name, checkpoint] = None
        for result in reading.results:
            run.outstanding.pop(result.command_id, None)
            try:
                self._take_up(run, run.supervisor.command_result(result, now))
            except OperatorError as error:
                log.warning("command_result_unplaced", run=run.name, command=result.command_id, reason=str(error))
        if entry.attempt is not run.attempt:
            return  # an attempt that a newer one has replaced says goodbye; its measurements are history
        observation = run.fold(reading, now)
        if observation is not None:
            self._take_up(run, run.supervisor.observe(observation, now))

    def _take_up(self, run: Run, changes: Changes) -> None:
        run.note(changes)
        self._pending.add(run.name, changes)
        for alert in changes.alerts:
            log.warning(
                "alert",
                run=run.name,
                alert=alert.name,
                blocks=alert.blocks,
                severity=alert.severity,
                active=alert.active,
                step=alert.last_step,
                evidence=alert.evidence,
            )
        for made in changes.decisions:
            log.info(
                "decision",
                run=run.name,
                decision=made.id,
                action=made.action,
                mode=made.mode,
                outcome=made.outcome,
                guard=made.guard,
                step=made.step,
                author=made.author,
            )

    async def _estimate(self, requests: Sequence[EstimateRequest]) -> None:
        """Estimate every window that a probe completed, so that estimates don't depend on how samples were batched."""
        if not requests:
            return
        try:
            with self._metrics.estimate.time():
                found = await self._estimator.estimate(requests)
        except Exception:  # without estimates the tap, the alerts and the journal go on; counted
            self._metrics.internal_errors.labels("estimate").inc()
            log.exception("estimate_failed", runs=sorted({request.hello.run for request in requests}))
            return
        for request, estimates in zip(requests, found, strict=True):
            name = request.hello.run
            run = self._runs.get(name)
            if run is not None:
                run.take_estimates(request, estimates)
            for (quantity, block, _), estimate in estimates.values.items():
                if estimate.step == request.step:  # the others were taken before: it is other blocks' turn
                    self._pending.estimates.append(EstimateRow(name, quantity, block, estimate))


def _row(entry: QueuedSample, now: float) -> SampleRow:
    reading = entry.reading
    return SampleRow(
        run=entry.run,
        attempt=entry.attempt.manifest.attempt,
        sequence=reading.sequence,
        step=reading.step,
        payload=entry.payload,
        received_at=now,
        closing=reading.closing,
    )
