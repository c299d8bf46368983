"""The runs that the daemon holds, each with its attempt, windows of probes, newest values and maxima; all bounded."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sharpwatch.daemon.decisions.run_controller import RunController
from sharpwatch.daemon.decisions.transitions import UNDER_WAY
from sharpwatch.daemon.detection.state import Arrays, packed
from sharpwatch.daemon.estimation.estimator import PROBES
from sharpwatch.daemon.estimation.hessian import observed_stability
from sharpwatch.daemon.estimation.windows import WINDOW_PROBES, EstimateRequest, Estimates, Windows, ignored
from sharpwatch.daemon.ingest.hello import Attempt, RunHello
from sharpwatch.daemon.ingest.samples import BlockTap, Reading
from sharpwatch.daemon.records import NO_CHANGES, Changes, Decision, Observation, ProbedStep
from sharpwatch.daemon.runs.snapshot import Maxima, Phase, RunSnapshot
from sharpwatch.daemon.storage.schema import BaselinesRow, ReferenceRow, StoredRun
from sharpwatch.wire import Floats

MAX_RUNS = 1_000
MAX_ATTEMPTS = 4  # remembered of a run, as one of them may still be sending its last samples
MAX_LAYER_BLOCKS_HELD = 2**21  # of all attempts that are remembered: some 400 MB
# Of the readings that windows of probes are made of.
RUN_WINDOW_BYTES, WINDOW_BYTES = 8 * 2**20, 256 * 2**20  # of one run and of all runs, where nothing else is said
MAXIMA_SECONDS = 60.0  # that maxima cover at least: Prometheus' default scrape interval
_BUCKET = 5.0  # seconds; up to so much more is covered
_BUCKETS = int(MAXIMA_SECONDS / _BUCKET) + 1
# Fields of a snapshot that are of the blocks of an attempt.
_MEASURED = (
    *("tap", "probe_steps", "attention", "attention_steps", "update_ratio", "gradient_noise"),
    *("estimates", "layer_sharpness", "order_correlation"),
)
SAVE_EVERY = 250  # samples between two states of a run in the journal; each has some 200 KB
_COUNTED = 10_000  # records of a run that are known to be counted, the newest; more than may still change
_PAUSES = 3.0  # times as long as a run has paused before: then it has stalled


class Signal:
    """Wakes waiters when a run changes; they read its snapshot to see what changed."""

    def __init__(self) -> None:
        self.version = 0
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wakes all who wait for a later version."""
        # A new event rather than `clear`: who waits for the old one is woken, however late it runs. The version lets
        # a waiter see a change that came before it began to wait.
        self.version += 1
        self._event.set()
        self._event = asyncio.Event()

    async def after(self, version: int) -> int:
        """Waits for a version after `version` and returns it."""
        while self.version <= version:
            await self._event.wait()
        return self.version


class RecentMaxima:
    """Keeps the maxima of a run's last minute in a ring of buckets, so that no spike falls between two scrapes.

    Reading changes nothing, so that several Prometheus servers see the same. The window ends at the newest sample and
    not at the present time: a run whose steps take minutes always has a maximum.

    Args:
        blocks: Number of block types, on which alone its size depends.
    """

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self.rows = np.full((_BUCKETS, 2 * blocks + 1), np.nan)
        self.newest = 0  # number of the newest bucket since 1970

    def load(self, rows: npt.NDArray[np.float64], newest: int) -> None:
        """Goes on from another's `rows` and `newest`, unless that was of other blocks."""
        if rows.shape == self.rows.shape:
            self.rows, self.newest = rows.copy(), newest

    def see(self, tap: BlockTap | None, loss: float | None, now: float) -> None:
        """Take in a sample; `now` is unix seconds, and a clock that is set back counts as one that stands."""
        bucket = int(now // _BUCKET)
        passed = min(max(0, bucket - self.newest), _BUCKETS)
        self.newest = max(self.newest, bucket)
        for i in range(passed):
            self.rows[(self.newest - i) % _BUCKETS] = np.nan
        row = self.rows[self.newest % _BUCKETS]
        if tap is not None:
            np.fmax(row[: self._blocks], tap.gradient_norm, out=row[: self._blocks])
            np.fmax(row[self._blocks : -1], tap.update_rms, out=row[self._blocks : -1])
        if loss is not None:
            row[-1] = np.fmax(row[-1], loss)

    @property
    def present(self) -> Maxima:
        """The maxima as they are now."""
        largest = np.fmax.reduce(self.rows, axis=0)
        return Maxima(float(largest[-1]), largest[: self._blocks], largest[self._blocks : -1])


class Run:
    """One run. Its state is used from the event loop alone; `snapshot` is immutable and for any thread.

    Args:
        attempt: Its first attempt.
        controller: The controller of that attempt.
        now: Unix seconds.
        window_bytes: How much its windows of probes may take.
        on_cut: Called with the probe of each reading that is dropped for that.
    """

    def __init__(
        self,
        attempt: Attempt,
        controller: RunController,
        *,
        now: float,
        window_bytes: int = RUN_WINDOW_BYTES,
        on_cut: Callable[[str], None] = ignored,
    ) -> None:
        self.attempt = attempt
        self.controller = controller
        self.signal = Signal()
        # Journalled decisions whose command the trainer has not answered.
        self.outstanding: dict[str, Decision] = {}
        self.received_bytes = 0  # of its messages
        # What its losses are held against; `peers` keeps the controllers to it.
        self.reference: ReferenceRow | None = None
        self.windows = Windows(PROBES, window_bytes, on_cut)
        self._failures: Counter[str] = Counter()
        self._probe_steps: dict[str, deque[int]] = {name: deque(maxlen=WINDOW_PROBES) for name in PROBES}
        self._attention_steps: deque[int] = deque(maxlen=WINDOW_PROBES)
        self._dropped_probes: Counter[str] = Counter()
        self._maxima = RecentMaxima(len(attempt.hello.blocks))
        self._samples = 0  # of all attempts
        self._folded: tuple[str, int] | None = None  # attempt and sequence of the newest sample
        self._saved: tuple[str, int] | None = None  # the same of the state that the journal has
        self._saved_samples = 0  # how many it had seen by then
        self._incidents_total: Counter[str] = Counter()
        self._decisions_total: Counter[tuple[str, str, str]] = Counter()
        # A decision is journalled again when a detail changes; only a new outcome counts.
        self._pauses: tuple[float, ...] = (0.0, 0.0)  # the two longest between samples of an attempt, in seconds
        self._stepped_at: float | None = None  # when the attempt made its newest step; None before its first
        self._counted: dict[str, str] = {}  # by id: "raised" for an alert, the last outcome for a decision
        self._controller_changed = True  # since the last publish
        self._open_incidents: set[str] = set()  # ids; the controller moves them on at every step
        # The fields of the next snapshot.
        self._draft: dict[str, Any] = {
            "hello": attempt.hello,
            "phase": "silent",
            "attempts": 1,
            "mode": controller.mode,
            "lr_revision": 0,
            "multipliers": controller.multipliers,
            "last_seen_at": now,
        }
        self.snapshot = RunSnapshot(**self._draft)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.attempt.hello.run

    @property
    def phase(self) -> Phase:
        """The phase by the newest sample, which may not be published yet."""
        phase: Phase = self._draft["phase"]
        return phase

    def is_live(self, now: float) -> bool:
        """Returns whether its trainer is there, or about to come back; `now` is monotonic seconds."""
        return self.phase != "closed" and self.attempt.presence.is_there(now)

    def begin(self, attempt: Attempt, controller: RunController, *, again: bool = False) -> None:
        """Starts a new attempt.

        Measurements of other blocks than the new attempt has are dropped, and sketches of another projection.

        Args:
            attempt: The new attempt.
            controller: Its controller.
            again: Whether it was an attempt of this run before, and another one came in between.
        """
        before, after = self.attempt.hello, attempt.hello
        # Otherwise windows go on over a new attempt: it is the same model, and its estimates need no new start.
        if not after.same_blocks(before):
            self._drop_measurements()
            self._maxima = RecentMaxima(len(after.blocks))
        elif not after.same_projection(before):
            self.windows.drop_projection()
        self.attempt = attempt
        self.controller = controller
        self.begin_steps()
        self._controller_changed = True
        self._draft |= {"hello": after, "attempts": self._draft["attempts"] + (not again), "health": None}

    def _drop_measurements(self) -> None:
        self.windows.clear()
        for steps in self._probe_steps.values():
            steps.clear()
        self._attention_steps.clear()
        for name in _MEASURED:
            self._draft.pop(name, None)

    def check_stall(self, stall_after: float, now: float, clock: float) -> Changes:
        """Looks whether the trainer has stopped making steps while its agent is connected.

        Args:
            stall_after: Seconds without a sample that are allowed at least. A run that pauses longer by itself, as for
                evaluations, is allowed three times its second longest pause.
            now: Unix seconds.
            clock: Monotonic seconds: a clock that is set must make no run stall.
        """
        if self.phase == "closed":
            return self.controller.stall_ended("the run was closed")
        if self.phase != "running":
            # It has not begun to stall. But one that had is no better because nothing is heard of it any more.
            return NO_CHANGES
        # Before its first step an attempt compiles, or loads a checkpoint.
        if self._stepped_at is None or clock - self._stepped_at <= max(stall_after, _PAUSES * self._pauses[1]):
            return NO_CHANGES
        return self.controller.stalled(clock - self._stepped_at, now)

    def begin_steps(self) -> None:
        """Has the time before the next sample count for no pause of the run's own."""
        self._stepped_at = None

    def update(self, reading: Reading, now: float, clock: float) -> Observation | None:
        """Takes in a sample of the newest attempt.

        Args:
            reading: The sample.
            now: Unix seconds.
            clock: When it came, in monotonic seconds; of samples that are folded again, on any clock of their own.

        Returns:
            The step as the detectors need it, or None if the sample measured nothing that they use.
        """
        self._dropped_probes.update(reading.dropped_probes)
        self._maxima.see(reading.tap, reading.loss, now)
        draft = self._draft
        draft["step"], draft["last_sample_at"], draft["last_seen_at"] = reading.step, now, now
        for probe, one in reading.probes.items():
            shown = PROBES[probe].shown
            draft |= {} if shown is None else shown(one)
            self.windows.append(probe, reading.step, one)
            self._probe_steps[probe].append(reading.step)
        if reading.probes:
            draft["probe_steps"] = {probe: tuple(steps) for probe, steps in self._probe_steps.items() if steps}
        if reading.attention is not None:
            self._attention_steps.append(reading.step)
            draft |= {"attention": reading.attention, "attention_steps": tuple(self._attention_steps)}
        for name in ("tap", "loss", "health"):
            if getattr(reading, name) is not None:
                draft[name] = getattr(reading, name)
        if reading.closing:
            draft["phase"] = "closed"
        if self._stepped_at is not None:
            self._pauses = tuple(sorted((*self._pauses, clock - self._stepped_at))[-1:-3:-1])
        self._stepped_at = clock
        # A sample may carry only results or checkpoints; to a detector it would be a step without a loss.
        if reading.tap is None and reading.loss is None and not {"direction", "gnb"} & reading.probes.keys():
            return None
        return observation_of(self.attempt.hello.blocks, reading)

    def folded(self, attempt: str, sequence: int) -> None:
        """Notes which sample `update` and the controller have taken in."""
        self._folded = attempt, sequence
        self._samples += 1

    @property
    def must_save(self) -> bool:
        """Whether a restart would have to fold many samples again."""
        return self._samples - self._saved_samples >= SAVE_EVERY

    def state_row(self) -> BaselinesRow | None:
        """The state after the newest sample, for the journal; None where that has it already."""
        if self._folded is None or self._folded == self._saved:
            return None
        self._saved, self._saved_samples = self._folded, self._samples
        return BaselinesRow(self.name, *self._folded, packed(self.controller.detection.arrays() | self._arrays()))

    def _arrays(self) -> Arrays:
        return self.controller.detection.progress() | {
            "run.maxima": self._maxima.rows,
            "run.maxima_newest": np.array(self._maxima.newest),
            "run.pauses": np.array(self._pauses),
            "run.samples": np.array(self._samples),
        }

    def load_arrays(self, arrays: Arrays, saved: tuple[str, int]) -> None:
        """Goes on from the rest of a state, whose baselines the controller has.

        Args:
            arrays: The state. One of an earlier version has nothing of it.
            saved: The attempt and sequence of its newest sample.
        """
        self._folded = self._saved = saved
        self.controller.detection.load_progress(arrays)
        if "run.samples" in arrays:
            self._maxima.load(arrays["run.maxima"], int(arrays["run.maxima_newest"]))
            self._pauses = tuple(arrays["run.pauses"].tolist())
            self._samples = int(arrays["run.samples"])
        self._saved_samples = self._samples

    def request(self, probes: Collection[str] | None = None) -> EstimateRequest:
        """Returns the windows of `probes` (None: of all) as they are now; a probe without a reading has none."""
        return self.windows.request(self.attempt.hello, probes)

    def take_estimates(self, request: EstimateRequest, estimates: Estimates) -> None:
        """Replaces the estimates that the probes of `request` had before, unless a new attempt has begun meanwhile."""
        # Estimates run on another thread while samples come in, so the attempt may have changed meanwhile.
        if request.hello is not self.attempt.hello:
            return
        order = [estimator for spec in PROBES.values() for estimator in spec.estimators]
        renewed = {estimator for probe in request.windows for estimator in PROBES[probe].estimators}
        kept = {key: one for key, one in self._draft.get("estimates", {}).items() if key[2] not in renewed}
        shown = sorted((kept | dict(estimates.values)).items(), key=lambda item: order.index(item[0][2]))
        self._draft["estimates"] = dict(shown)
        if estimates.layer_sharpness:
            self._draft["layer_sharpness"] = estimates.layer_sharpness
            self._draft["order_correlation"] = estimates.order_correlation

    def note_failure(self, where: str, error: Exception) -> bool:
        """Counts that the daemon itself failed on this run; returns whether it is the first failure of that kind."""
        kind = f"{where}: {type(error).__name__}"
        self._failures[kind] += 1
        return self._failures[kind] == 1

    def count(self, changes: Changes) -> None:
        """Counts new alerts of incidents and new outcomes, and forgets commands that were answered or have expired."""
        self._controller_changed = self._controller_changed or changes != NO_CHANGES
        for incident in changes.incidents:
            (self._open_incidents.add if incident.active else self._open_incidents.discard)(incident.id)
            for name in incident.names if incident.foreign is None else ():
                if f"{incident.id} {name}" not in self._counted:
                    self._counted[f"{incident.id} {name}"] = "raised"
                    self._incidents_total[name] += 1
        for decision in changes.transitions:  # also what lies between two states that are journalled together
            self._count_outcome(decision, decision.outcome)
        for decision in changes.decisions:
            if decision.outcome not in UNDER_WAY:
                self.outstanding.pop(decision.id, None)
        while len(self._counted) > _COUNTED:
            del self._counted[next(iter(self._counted))]

    def _count_outcome(self, decision: Decision, outcome: str) -> None:
        if self._counted.get(decision.id) != outcome:
            self._counted[decision.id] = outcome
            self._decisions_total[decision.action, decision.mode, outcome] += 1

    def count_stored(self, stored: StoredRun) -> None:
        """Has the counts of incidents and decisions as they were, so that Prometheus sees no counter go down."""
        self.count(Changes(incidents=stored.incidents))
        known = {made.id: made for made in stored.decisions}
        for identity, outcome in stored.outcomes:
            self._count_outcome(known[identity], outcome)
        for made in stored.decisions:  # those of a version that kept no transitions
            self._count_outcome(made, made.outcome)

    def publish(self, **changes: Any) -> None:
        """Replaces the snapshot by the present state and wakes all who watch the run.

        Args:
            **changes: Fields of `RunSnapshot` to be set as well.
        """
        if changes.get("phase") == "running" and self._stepped_at is not None:
            self._stepped_at = time.monotonic()  # without a connection nothing was known of its steps
        # Copied only when they have changed: on a healthy run the records stay the same for thousands of steps.
        if self._controller_changed or self._open_incidents:
            self._draft |= self._controller_state()
            self._controller_changed = False
        self._draft |= {
            "sharpness": self.controller.detection.sharpness.view(),
            "maxima": self._maxima.present,
            "excursions_total": dict(self.controller.detection.excursions),
            "dropped_probes": dict(self._dropped_probes),
            "cut_windows": dict(self.windows.cut),
            "failures": dict(self._failures),
            "received_bytes": self.received_bytes,
            **changes,
        }
        self.snapshot = RunSnapshot(**self._draft)
        self.signal.notify()

    def _controller_state(self) -> dict[str, Any]:
        return {
            "mode": self.controller.mode,
            "lr_revision": self.controller.newest_revision,
            "multipliers": dict(self.controller.multipliers),
            "incidents": self.controller.incidents,
            "incidents_in_all": self.controller.incidents_in_all,
            "incidents_total": dict(self._incidents_total),
            "decisions_total": dict(self._decisions_total),
        }


def _present(blocks: Iterable[str], values: Iterable[float]) -> dict[str, float]:
    """Leaves out NaN, which means that a value was not measured."""
    return {block: value for block, value in zip(blocks, values, strict=True) if not math.isnan(value)}


def _mean_draw(traces: Floats) -> Floats:
    """Means over draws [1, L]: detectors keep observations, and draws can take 8 MB each."""
    with np.errstate(over="ignore"):
        mean: Floats = traces.mean(0, keepdims=True)
    return mean


def observation_of(blocks: tuple[str, ...], reading: Reading) -> Observation:
    """What the detectors see of a sample, by the block types `blocks` of its attempt."""
    tap, gnb, direction = reading.tap, reading.probes.get("gnb"), reading.probes.get("direction")
    seen = Observation(
        step=reading.step,
        time=reading.taken_at,
        loss=reading.loss,
        layers=reading.layers,
        optimizer_groups=reading.optimizer_groups,
        attention=reading.attention,
        multipliers={} if tap is None else _present(blocks, tap.lr_multiplier.tolist()),
        restored=reading.restored,
        traces=None if gnb is None else _mean_draw(gnb.traces),
        rank_losses=reading.rank_losses,
        update_every={} if reading.health is None else reading.health.update_every,
    )
    if direction is None:
        return seen
    stability = observed_stability(blocks, reading.step, direction)
    probed = None
    if direction.curvature_parts is not None and seen.multipliers:
        parts = dict(zip(blocks, direction.curvature_parts.tolist(), strict=True))
        # A block that rests at this step has no part, which says nothing of its curvature.
        parts = {b: part for b, part in parts.items() if part != 0 or reading.step % seen.update_every.get(b, 1) == 0}
        probed = ProbedStep(parts, direction.curvature, direction.descent, seen.multipliers)
    return replace(
        seen,
        stability=stability.whole,
        no_descent=stability.no_descent,
        block_stability=stability.blocks,
        probed=probed,
    )


# Makes the controller of a new attempt from its Hello and from the run's earlier controller, if it has one.
MakeController = Callable[[RunHello, RunController | None], RunController]


class Runs:
    """All runs, by name.

    At most `MAX_RUNS` are held. A new one replaces the run that was last seen or asked for longest ago, one that never
    sent a sample before all others, but never one that is live. What leaves memory stays in the journal, from which
    `run_loader` brings it back.

    Args:
        make_controller: Makes the controller of each new attempt.
        run_window_bytes: How much the windows of probes of a run may take.
        window_bytes: How much those of all runs may take.
        on_cut: Called with the probe of each reading that is dropped for either.
    """

    def __init__(
        self,
        make_controller: MakeController,
        *,
        run_window_bytes: int = RUN_WINDOW_BYTES,
        window_bytes: int = WINDOW_BYTES,
        on_cut: Callable[[str], None] = ignored,
    ) -> None:
        self._make_controller = make_controller
        self._run_window_bytes = run_window_bytes
        self._window_bytes = window_bytes
        self._on_cut = on_cut
        self._runs: dict[str, Run] = {}
        self._attempts: dict[str, dict[str, Attempt]] = {}  # by run, then by attempt; the newest last
        self._asked_for: dict[str, float] = {}  # when runs came from the journal, in unix seconds

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

    def attempts(self, run: str) -> tuple[Attempt, ...]:
        """Returns the attempts of `run` that are remembered, the newest last."""
        return tuple(self._attempts.get(run, {}).values())

    def owner(self, identity: str) -> str | None:
        """Returns the name of the run that the attempt `identity` belongs to, or None."""
        return next((run for run, attempts in self._attempts.items() if identity in attempts), None)

    def remember(self, attempt: Attempt) -> None:
        """Adds an earlier attempt of a run that is held, whose trainer is back."""
        name = attempt.hello.run
        self._attempts[name] = {attempt.hello.attempt: attempt, **self._attempts[name]}

    def apart(self) -> Runs:
        """Returns an empty collection of the same kind, in which a run can be restored beside what goes on here."""
        return Runs(
            self._make_controller,
            run_window_bytes=self._run_window_bytes,
            window_bytes=self._window_bytes,
            on_cut=self._on_cut,
        )

    def adopt(self, other: Runs, name: str, now: float) -> Run | None:
        """Takes over a run that was restored in `other`.

        Args:
            other: Where it is.
            name: Its name.
            now: Unix seconds; it does not leave at once.

        Returns:
            The run; None if there is no room for it, since only live ones are held.
        """
        run = other._runs[name]
        if not self._make_room(run.attempt):
            return None
        self._runs[name], self._attempts[name], self._asked_for[name] = run, other._attempts[name], now
        return run

    def drop(self, name: str) -> None:
        """Lets go of a run."""
        run = self._runs.pop(name, None)
        self._attempts.pop(name, None)
        self._asked_for.pop(name, None)
        if run is not None:
            run.signal.notify()  # whoever watches it asks for it again

    def begin(self, attempt: Attempt, now: float) -> Run | None:
        """Starts an attempt, of a known run or of a new one.

        Args:
            attempt: The attempt: a new one, or one that another has replaced meanwhile.
            now: Unix seconds.

        Returns:
            Its run, or None if the run is new and all `MAX_RUNS` that are held are live.
        """
        name, identity = attempt.hello.run, attempt.hello.attempt
        has_room = self._make_room(attempt)
        run = self._runs.get(name)
        attempts = self._attempts.get(name, {})
        if run is not None:
            run.begin(attempt, self._make_controller(attempt.hello, run.controller), again=identity in attempts)
        elif has_room:
            controller = self._make_controller(attempt.hello, None)
            run = self._runs[name] = Run(
                attempt, controller, now=now, window_bytes=self._run_window_bytes, on_cut=self._on_cut
            )
        else:
            return None
        attempts.pop(identity, None)
        self._attempts[name] = {**attempts, identity: attempt}
        while len(self._attempts[name]) > MAX_ATTEMPTS:
            del self._attempts[name][next(iter(self._attempts[name]))]
        return run

    def snapshots(self) -> tuple[RunSnapshot, ...]:
        """Returns the snapshot of every run; safe on any thread."""
        # `list` first: /metrics reads on a thread of its own while the event loop may add a run.
        return tuple(run.snapshot for run in list(self._runs.values()))

    def limit_windows(self) -> None:
        """Drops the oldest readings of the runs whose windows are the largest, until all of them stay in the limit."""
        held = sum(run.windows.nbytes for run in self._runs.values())
        while held > self._window_bytes:
            largest = max((run.windows for run in self._runs.values()), key=lambda windows: windows.nbytes)
            held -= largest.nbytes
            largest.drop_oldest()
            held += largest.nbytes

    def _make_room(self, attempt: Attempt) -> bool:
        """Drops runs until there is room for another attempt; returns False if only live ones are left."""
        name, rows = attempt.hello.run, attempt.hello.size
        is_new = name not in self._runs
        while (is_new and len(self._runs) >= MAX_RUNS) or self._layer_blocks() + rows > MAX_LAYER_BLOCKS_HELD:
            # A run with a live session is never dropped: its samples could only be refused.
            gone = [run for run in self._runs.values() if run.snapshot.phase != "running" and run.name != name]
            if not gone:
                return False
            # A flood of names alone drops no run that was trained.
            self.drop(min(gone, key=self._worth).name)
        return True

    def _worth(self, run: Run) -> tuple[bool, bool, float]:
        needed_at = max(run.snapshot.last_seen_at, self._asked_for.get(run.name, 0.0))
        return run.snapshot.has_unseen_incident, run.snapshot.step is not None, needed_at

    def _layer_blocks(self) -> int:
        """How many layer blocks the remembered attempts have, with names that take as much memory as more of them."""
        return sum(one.hello.size for attempts in self._attempts.values() for one in attempts.values())
