"""What the daemon holds of each run: its attempts, windows of probes, latest values. All of it is bounded."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.decisions.decision_log import Changes
from sharpwatch.daemon.decisions.lifecycle import UNDER_WAY
from sharpwatch.daemon.decisions.run_controller import RunController
from sharpwatch.daemon.estimation.block_totals import BlockTap, block_tap
from sharpwatch.daemon.estimation.gnb import Estimates, observed_stability
from sharpwatch.daemon.estimation.windows import ESTIMATORS, LENGTHS, Key, Request
from sharpwatch.daemon.ingest.hello import RunHello
from sharpwatch.daemon.ingest.samples import BlockTap, Cursor, HealthReading, Reading, block_tap
from sharpwatch.daemon.records import Alert, Decision, Mode, Observation

MAX_RUNS = 10_000
_NO_STABILITY = ObservedStability()
MAX_ATTEMPTS = 16  # remembered of a run: one of them may still be sending what it had left

Phase = Literal["running", "silent", "closed"]


@dataclass(slots=True, eq=False)
class Attempt:
    """One attach of a run. `journalled`: its Hello is in the journal."""

    manifest: RunHello
    hello: bytes
    cursor: Cursor = field(default_factory=Cursor)
    journalled: bool = False


@dataclass(frozen=True, slots=True)
class RunSnapshot:
    """A run as metrics and operators see it: immutable, and swapped whole, so that any thread may read it."""

    manifest: RunHello
    phase: Phase
    attempts: int
    mode: Mode
    lr_revision: int
    multipliers: Mapping[str, float]
    step: int | None = None
    loss: float | None = None
    last_sample_at: float | None = None  # unix seconds, the daemon's clock
    last_seen_at: float = 0.0
    tap: BlockTap | None = None
    update_ratio: tuple[float, ...] | None = None  # [B], of the newest direction probe
    gradient_noise: tuple[float, ...] | None = None  # [B], of the newest gradient_noise probe
    health: HealthReading | None = None
    estimates: Mapping[Key, Estimate] = field(default_factory=dict)
    layer_sharpness: tuple[Estimate, ...] = ()  # [L]
    order_correlation: float | None = None
    alerts: tuple[Alert, ...] = ()
    alerts_total: Mapping[str, int] = field(default_factory=dict)
    decisions_total: Mapping[tuple[str, str, str], int] = field(default_factory=dict)
    dropped_probes: Mapping[str, int] = field(default_factory=dict)


class Signal:
    """Tells waiters that something changed, without keeping what."""

    def __init__(self) -> None:
        self.version = 0
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wake all who wait for a version after an earlier one."""
        self.version += 1
        self._event.set()
        self._event = asyncio.Event()

    async def after(self, version: int) -> int:
        """Wait until there is a version after `version`; returns it."""
        while self.version <= version:
            await self._event.wait()
        return self.version


# Makes the supervisor of a new attempt, from its manifest and the run's earlier supervisor, if there is one.
MakeSupervisor = Callable[[RunHello, RunController | None], RunController]


class Run:
    """One run: single-threaded state behind, an immutable `view` in front."""

    def __init__(self, attempt: Attempt, supervisor: RunController, *, now: float) -> None:
        self.attempt = attempt
        self.supervisor = supervisor
        self.signal = Signal()
        # Journalled decisions whose command the trainer has not answered.
        self.outstanding: dict[str, Decision] = {}
        self._windows: dict[str, deque[tuple[int, Any]]] = {
            name: deque(maxlen=spec.window) for name, spec in PROBES.items() if spec.window
        }
        self._dropped_probes: Counter[str] = Counter()
        self._alerts_total: Counter[str] = Counter()
        self._decisions_total: Counter[tuple[str, str, str]] = Counter()
        self._counted: dict[str, str] = {}
        # What the next `show` will show.
        self._draft = RunSnapshot(
            manifest=attempt.manifest,
            phase="silent",
            attempts=1,
            mode=supervisor.mode,
            lr_revision=0,
            multipliers=supervisor.multipliers,
            last_seen_at=now,
        )
        self.view = self._draft

    @property
    def name(self) -> str:
        """The run's name."""
        return self.attempt.manifest.run

    @property
    def phase(self) -> Phase:
        """The phase as the newest sample has it, which the view may yet have to show."""
        return self._draft.phase

    def begin(self, attempt: Attempt, supervisor: RunController) -> None:
        """Take up a new attempt; what was measured of other blocks is put away, and sketches by another projection."""
        before, after = self.attempt.manifest, attempt.manifest
        if not after.same_blocks(before):
            for window in self._windows.values():
                window.clear()
            self._draft = replace(
                self._draft,
                tap=None,
                update_ratio=None,
                gradient_noise=None,
                estimates={},
                layer_sharpness=(),
                order_correlation=None,
            )
        elif not after.same_projection(before):
            for name, window in self._windows.items():
                kept = [(step, PROBES[name].without_projection(one)) for step, one in window]
                self._windows[name] = deque(kept, window.maxlen)
        self.attempt = attempt
        self.supervisor = supervisor
        self._draft = replace(self._draft, manifest=after, attempts=self._draft.attempts + 1, health=None)

    def fold(self, reading: Reading, now: float) -> Observation | None:
        """Take in a sample of the newest attempt; returns what detectors see of it, None where it measured nothing."""
        self._dropped_probes.update(reading.dropped_probes)
        manifest = self.attempt.manifest
        tap = block_tap(manifest, reading.tap) if reading.tap is not None else None
        changes: dict[str, Any] = {}
        for probe, one in reading.probes.items():
            shown = PROBES[probe].shown
            changes |= {} if shown is None else shown(one)
            if probe in self._windows:
                self._windows[probe].append((reading.step, one))
        if tap is not None:
            changes["tap"] = tap
        if reading.loss is not None:
            changes["loss"] = reading.loss
        if reading.health is not None:
            changes["health"] = reading.health
        if reading.closing:
            changes["phase"] = "closed"
        self._draft = replace(self._draft, step=reading.step, last_sample_at=now, last_seen_at=now, **changes)
        if tap is None and reading.loss is None and "direction" not in reading.probes:
            return None
        return _observation(manifest, reading, tap)

    def request(self, probes: Collection[str] | None = None) -> EstimateRequest:
        """The windows of `probes` (None: of all) as they are now; a probe without a reading has none."""
        windows = {
            name: tuple(window)
            for name, window in self._windows.items()
            if window and (probes is None or name in probes)
        }
        newest = max((window[-1][0] for window in windows.values()), default=0)
        return EstimateRequest(self.attempt.manifest, windows, newest)

    def take_estimates(self, request: EstimateRequest, estimates: Estimates) -> None:
        """Have the estimates of `request` shown in place of those its probes made before."""
        if request.hello is not self.attempt.manifest:
            return  # a new attempt began meanwhile
        order = [estimator for spec in PROBES.values() for estimator in spec.estimators]
        renewed = {estimator for probe in request.windows for estimator in PROBES[probe].estimators}
        kept = {key: one for key, one in self._draft.estimates.items() if key[2] not in renewed}
        shown = sorted((kept | dict(estimates.values)).items(), key=lambda item: order.index(item[0][2]))
        self._draft = replace(self._draft, estimates=dict(shown))
        if estimates.layer_sharpness:
            self._draft = replace(
                self._draft,
                layer_sharpness=estimates.layer_sharpness,
                order_correlation=estimates.order_correlation,
            )

    def note(self, changes: Changes) -> None:
        """Count what the supervisor changed."""
        for alert in changes.alerts:
            if alert.id not in self._counted:
                self._counted[alert.id] = "raised"
                self._alerts_total[alert.name] += 1
        for decision in changes.decisions:
            if self._counted.get(decision.id) != decision.outcome:
                self._counted[decision.id] = decision.outcome
                self._decisions_total[decision.action, decision.mode, decision.outcome] += 1
            if decision.outcome not in UNDER_WAY:
                self.outstanding.pop(decision.id, None)

    def show(self, **changes: Any) -> None:
        """Swap the view for one of this moment and tell the watchers."""
        revisions = self.supervisor.revisions
        self._draft = self.view = replace(
            self._draft,
            mode=self.supervisor.mode,
            lr_revision=revisions[-1].revision if revisions else 0,
            multipliers=dict(self.supervisor.multipliers),
            alerts=tuple(self.supervisor.alerts),
            alerts_total=dict(self._alerts_total),
            decisions_total=dict(self._decisions_total),
            dropped_probes=dict(self._dropped_probes),
            **changes,
        )
        self.signal.notify()


def _present(blocks: Iterable[str], values: Iterable[float]) -> dict[str, float]:
    """A NaN means that nothing was measured."""
    return {block: float(value) for block, value in zip(blocks, values, strict=True) if not np.isnan(value)}


def _observation(manifest: RunHello, reading: Reading, tap: BlockTap | None) -> Observation:
    blocks = manifest.blocks
    probe = reading.probes.get("direction")
    stability = _NO_STABILITY if probe is None else observed_stability(blocks, reading.step, probe)
    seen = Observation(
        step=reading.step,
        time=reading.taken_at,
        loss=reading.loss,
        stability=stability.whole,
        no_descent=stability.no_descent,
        block_stability=stability.blocks,
    )
    if tap is None:
        return seen
    return replace(
        seen,
        gradient_norm=_present(blocks, tap.gradient_norm),
        weight_norm=_present(blocks, tap.weight_norm),
        update_rms=_present(blocks, tap.update_rms),
        non_finite=dict(zip(blocks, map(int, tap.non_finite), strict=True)),
        multipliers=_present(blocks, tap.lr_multiplier),
    )


class Runs:
    """All runs, by name; at most `MAX_RUNS`, of which the longest gone gives way."""

    def __init__(self, make_supervisor: MakeSupervisor) -> None:
        self._make_supervisor = make_supervisor
        self._runs: dict[str, Run] = {}
        self._attempts: dict[str, dict[str, Attempt]] = {}  # by run, then by attempt; the newest last

    def __iter__(self) -> Iterator[Run]:
        return iter(list(self._runs.values()))

    def __len__(self) -> int:
        return len(self._runs)

    def get(self, name: str) -> Run | None:
        """The run of that name."""
        return self._runs.get(name)

    def attempt(self, run: str, identity: str) -> Attempt | None:
        """An attempt of `run` that is remembered."""
        return self._attempts.get(run, {}).get(identity)

    def owner(self, identity: str) -> str | None:
        """The run that the attempt `identity` belongs to."""
        return next((run for run, attempts in self._attempts.items() if identity in attempts), None)

    def begin(self, attempt: Attempt, now: float) -> Run | None:
        """Take up a new attempt; None where it is of a new run and all that are held are live."""
        name = attempt.manifest.run
        run = self._runs.get(name)
        if run is not None:
            run.begin(attempt, self._make_supervisor(attempt.manifest, run.supervisor))
        elif self._make_room():
            run = Run(attempt, self._make_supervisor(attempt.manifest, None), now=now)
            self._runs[name] = run
        else:
            return None
        attempts = self._attempts.setdefault(name, {})
        attempts[attempt.manifest.attempt] = attempt
        while len(attempts) > MAX_ATTEMPTS:
            del attempts[next(iter(attempts))]
        return run

    def views(self) -> tuple[RunSnapshot, ...]:
        """Every run's view, safe to read on any thread."""
        return tuple(run.view for run in list(self._runs.values()))

    def decisions(self, prefix: str) -> list[tuple[Run, str]]:
        """Every decision whose id begins with `prefix`, and its run; one whose id is all of it goes over the others."""
        found = [(run, made.id) for run in self for made in run.supervisor.decisions if made.id.startswith(prefix)]
        return [one for one in found if one[1] == prefix] or found

    def _make_room(self) -> bool:
        if len(self._runs) < MAX_RUNS:
            return True
        gone = [run for run in self._runs.values() if run.view.phase != "running"]
        if not gone:
            return False
        oldest = min(gone, key=lambda run: run.view.last_seen_at).name
        del self._runs[oldest], self._attempts[oldest]
        return True
