"""Reads samples, and queues them for the journal.

`read_sample` checks a Sample against the limits and the Hello of its attempt, and gathers its values by block type. It
is pure. A message that breaks the wire contract raises `WireError(code, reason)` with one of the codes
`malformed`, `non_finite`, `out_of_order` and `wrong_run`; the session answers with a Refusal and counts it by its code.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from sharpwatch import wire
from sharpwatch.daemon.ingest.hello import Attempt, RunHello
from sharpwatch.daemon.ingest.probes import read_attention, read_probes
from sharpwatch.daemon.records import Checkpoint, CheckpointReport, LayerTap, OptimizerGroup, ReportedResult
from sharpwatch.errors import WireError
from sharpwatch.v1 import agent_pb2, types_pb2
from sharpwatch.wire import (
    MAX_COUNT,
    MAX_ITEMS,
    MAX_RANKS,
    MAX_STEP,
    Doubles,
    Floats,
    Ints,
    checked_name,
    checked_text,
    require,
    require_few,
)

_OUTCOMES: dict[int, Literal["applied", "refused", "expired", "failed", "cancelled"]] = {
    types_pb2.COMMAND_OUTCOME_APPLIED: "applied",
    types_pb2.COMMAND_OUTCOME_REFUSED: "refused",
    types_pb2.COMMAND_OUTCOME_EXPIRED: "expired",
    types_pb2.COMMAND_OUTCOME_FAILED: "failed",
    types_pb2.COMMAND_OUTCOME_CANCELLED: "cancelled",
}
MAX_GROUPS = 16_384  # parameter groups of a run: one for each layer block, at the most
MAX_SETTINGS = 8 * MAX_GROUPS  # of all parameter groups together: a dictionary takes ten times the bytes of the wire
_SETTING_BYTES = 112  # of one in memory, roughly
MAX_LABEL = 300  # characters of a text that becomes a label; no sample is worth refusing for a longer one
_ParameterField = Literal["changed_parameter", "non_finite_parameter", "zero_parameter"]
_PARAMETER_FIELDS: tuple[_ParameterField, ...] = get_args(_ParameterField)
_TAP_DTYPES = {
    "gradient_norm": "float32",
    "weight_norm": "float32",
    "update_rms": "float32",
    "non_finite": "int64",
    "learning_rate": "float32",
    "lr_multiplier": "float32",
}


@dataclass(frozen=True, slots=True, eq=False)
class BlockTap:
    """The statistics of one step by block type; every array is [B], NaN where nothing was measured."""

    gradient_norm: Doubles
    weight_norm: Doubles
    update_rms: Doubles
    non_finite: Ints
    learning_rate: Doubles
    lr_multiplier: Doubles


@dataclass(frozen=True, slots=True)
class FailedProbe:
    """How often a probe has failed, and whether it will not run again."""

    count: int
    given_up: bool


@dataclass(frozen=True, slots=True)
class HealthReading:
    """What the agent reports of itself; None where it could not measure.

    `probe_failures` are for people; `failed_probes` has the same by probe.
    """

    overhead_ratio: float | None
    step_seconds: float | None
    dropped: Mapping[str, int]
    probe_failures: tuple[str, ...]
    lr_revision: int
    failed_probes: Mapping[str, FailedProbe] = field(default_factory=dict)
    swallowed_errors: int = 0
    objective: str = ""
    objective_state: str = ""
    update_every: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """A checked Sample.

    `probes` has the readings of its probes by name; `dropped_probes` names those with a number that is not finite.
    `attention` has the scale of attention logits by layer block [L], NaN where there is none.
    """

    sequence: int
    step: int
    taken_at: float  # unix seconds
    loss: float | None
    tap: BlockTap | None
    probes: Mapping[str, Any]
    health: HealthReading | None
    results: tuple[ReportedResult, ...]
    checkpoints: tuple[Checkpoint, ...]
    closing: bool
    restored: bool
    dropped_probes: tuple[str, ...]
    deleted_checkpoints: tuple[str, ...] = ()  # their URIs
    layers: LayerTap | None = None
    # By number of the optimizer and of the group; empty if the sample says nothing of them.
    optimizer_groups: Mapping[tuple[int, int], OptimizerGroup] = field(default_factory=dict)
    attention: Doubles | None = None
    rank_losses: Floats | None = None  # as `Observation.rank_losses`

    @property
    def checkpoint_report(self) -> CheckpointReport:
        """What the sample says of the run's checkpoints."""
        return CheckpointReport(self.checkpoints, self.deleted_checkpoints, self.step if self.restored else None)


def read_sample(hello: RunHello, sample: agent_pb2.Sample) -> Reading:
    """Checks a sample and gathers its values.

    Args:
        hello: The Hello of the sample's attempt.
        sample: The message. Arrays of probes in the reading are views of its bytes.

    Raises:
        WireError: The sample breaks the wire contract.
    """
    _check_numbers(sample)
    # A signalling NaN, which no optimizer makes but bytes can be, would have numpy warn on standard error.
    with np.errstate(invalid="ignore"):
        probes = read_probes(hello, sample)
        layers = _layers(sample.tap, hello) if sample.HasField("tap") else None
        tap = None if layers is None else gather_blocks(hello, layers)
    return Reading(
        sequence=sample.sequence,
        step=sample.step,
        taken_at=sample.taken_at_unix_ns / 1e9,
        loss=sample.loss if sample.HasField("loss") else None,
        tap=tap,
        layers=layers,
        optimizer_groups={(each.optimizer, each.group): _group(each) for each in sample.optimizer_groups},
        probes={probe: reading for probe, reading in probes.items() if reading is not None},
        health=_health(sample.health) if sample.HasField("health") else None,
        results=tuple(map(_result, sample.results)),
        checkpoints=tuple(map(_checkpoint, sample.checkpoints)),
        deleted_checkpoints=tuple(checked_text(uri, "deleted_checkpoints") for uri in sample.deleted_checkpoints),
        closing=sample.closing,
        restored=sample.restored,
        dropped_probes=tuple(probe for probe, reading in probes.items() if reading is None),
        attention=read_attention(hello, sample.attention) if sample.HasField("attention") else None,
        rank_losses=_rank_losses(sample.rank_losses) if sample.HasField("rank_losses") else None,
    )


def _check_numbers(sample: agent_pb2.Sample) -> None:
    # The wire has unsigned 64 bits here, SQLite's integers are signed.
    if not 0 < sample.sequence <= MAX_COUNT:
        raise WireError("malformed", f"sequence must be 1 to 2**63 - 1, got {sample.sequence}")
    if not 0 <= sample.step <= MAX_STEP:
        raise WireError("malformed", f"step must be 0 to 2**53, got {sample.step}")
    if sample.taken_at_unix_ns > MAX_COUNT:
        raise WireError("malformed", f"taken_at_unix_ns must be at most 2**63 - 1, got {sample.taken_at_unix_ns}")
    if max(len(sample.results), len(sample.checkpoints), len(sample.deleted_checkpoints)) > MAX_ITEMS:
        raise WireError("malformed", f"results, checkpoints and deleted_checkpoints must have at most {MAX_ITEMS} each")
    if len(sample.optimizer_groups) > MAX_GROUPS:
        raise WireError("malformed", f"optimizer_groups must have at most {MAX_GROUPS} items")
    if sum(len(group.settings) for group in sample.optimizer_groups) > MAX_SETTINGS:
        raise WireError("malformed", f"optimizer_groups must have at most {MAX_SETTINGS} settings in all")


def _rank_losses(message: types_pb2.Array) -> Floats:
    losses = wire.decode(message, name="rank_losses", dtype="float32", shape=(None,))
    require(1 < len(losses) <= MAX_RANKS, f"rank_losses must be of 2 to {MAX_RANKS} ranks, got {len(losses)}")
    return losses


def _layers(tap: agent_pb2.Tap, hello: RunHello) -> LayerTap:
    count = len(hello.parameters)
    rows = wire.decode_fields(tap, _TAP_DTYPES, name="tap", rows=count)
    counts = rows["non_finite"]
    if np.count_nonzero(counts) and not ((counts >= 0) & (counts <= hello.parameters)).all():
        raise WireError("malformed", "tap.non_finite must be counts from 0 to the parameters of each layer block")
    # Norms may be infinite or NaN, since the model's gradients may be. Rates are the optimizer's own settings.
    for name in ("learning_rate", "lr_multiplier"):
        if np.count_nonzero(np.isfinite(rows[name])) < count:
            raise WireError("non_finite", f"tap.{name} must be finite")
    second = np.full(count, np.nan, dtype=np.float32)  # agents before 0.2 do not send it
    if tap.HasField("second_moment"):
        second = wire.decode(tap.second_moment, name="tap.second_moment", dtype="float32", shape=(count,))
    named: dict[str, Any] = {name: _named(tap, name, hello) for name in _PARAMETER_FIELDS if tap.HasField(name)}
    if tap.HasField("zero_gradients"):
        zeros = wire.decode(tap.zero_gradients, name="tap.zero_gradients", dtype="int32", shape=(count,))
        require(zeros.min() >= 0, "tap.zero_gradients must be counts")
        named["zero_gradients"] = zeros
    return LayerTap(
        **rows, second_moment=second, clip_factor=tap.clip_factor if tap.HasField("clip_factor") else np.nan, **named
    )


def _named(tap: agent_pb2.Tap, field_name: _ParameterField, hello: RunHello) -> Ints:
    """An index in the names of the parameters of each layer block, or -1; empty where the agent has not told them."""
    what = f"tap.{field_name}"
    indices = wire.decode(getattr(tap, field_name), name=what, dtype="int32", shape=(len(hello.parameters),))
    if not hello.parameter_names:
        return np.empty(0, dtype=np.int64)
    known = (indices >= -1) & (indices < hello.name_counts)
    require(np.count_nonzero(known) == len(known), f"{what} must be indices in parameter_names, or -1")
    return indices


def _group(group: agent_pb2.OptimizerGroup) -> OptimizerGroup:
    require_few(group.settings, "optimizer_groups.settings")
    settings = {checked_name(name, "optimizer_groups.settings"): value for name, value in group.settings.items()}
    return OptimizerGroup(settings, group.steps if group.HasField("steps") else None)


def gather_blocks(hello: RunHello, rows: LayerTap) -> BlockTap:
    """Gathers the statistics of layer blocks into those of block types.

    Norms are roots of sums of squares. RMS_t is the root of a mean over parameters, so it is gathered as a root mean
    square weighted by parameters. Rates and multipliers are means weighted by parameters.

    Args:
        hello: The Hello, which says how many parameters each layer block has, and of which block type it is.
        rows: The statistics of the layer blocks.
    """
    # In float64: in float32 the square of a norm above 1.8e19 is infinite.
    terms = np.array(
        [
            *(rows.gradient_norm, rows.weight_norm, rows.update_rms),
            *(rows.learning_rate, rows.lr_multiplier, rows.non_finite),
        ],
        dtype=np.float64,
    )
    terms[:3] *= terms[:3]
    terms[2:5] *= hello.parameters
    unmeasured = np.isnan(terms[2])
    weights: Ints | Doubles = hello.block_parameters
    if np.count_nonzero(unmeasured):
        # A layer block without a second moment has no RMS, and must not pull the mean of its type to 0.
        terms[2, unmeasured] = 0.0
        weights = _sums(hello, np.where(unmeasured, 0.0, hello.parameters)[None])[0]
        weights[weights == 0] = np.nan
    sums = _sums(hello, terms)
    norms, rates = np.sqrt(sums[:2]), sums[3:5] / hello.block_parameters
    return BlockTap(norms[0], norms[1], np.sqrt(sums[2] / weights), sums[5].astype(np.int64), rates[0], rates[1])


def _sums(hello: RunHello, terms: Doubles) -> Doubles:
    """Sums terms [n, L] over the layers of each block type, [n, B]; n is `SUMMED` at most."""
    # Not a product with the membership matrix: in that, one NaN or infinity would spread over all blocks.
    rows, blocks = len(terms), len(hello.blocks)
    sums: Doubles = np.bincount(hello.places[:rows].ravel(), terms.ravel(), rows * blocks).astype(
        np.float64, copy=False
    )
    return sums.reshape(rows, blocks)


def _measured(value: float) -> float | None:
    return value if math.isfinite(value) and value >= 0 else None


def _health(health: agent_pb2.AgentHealth) -> HealthReading:
    if max(len(health.dropped), len(health.probe_failures), len(health.update_every)) > MAX_ITEMS:
        raise WireError(
            "malformed", f"health.dropped, probe_failures and update_every must have at most {MAX_ITEMS} items each"
        )
    if not all(count <= MAX_COUNT for count in health.dropped.values()):
        raise WireError("malformed", "health.dropped must be counts of at most 2**63 - 1")
    return HealthReading(
        overhead_ratio=_measured(health.overhead_ratio),
        step_seconds=_measured(health.step_seconds),
        dropped={checked_name(reason, "health.dropped"): count for reason, count in health.dropped.items()},
        probe_failures=tuple(map(_probe_failure, health.probe_failures)),
        lr_revision=health.lr_revision,
        failed_probes={one.probe: FailedProbe(one.count, one.disabled) for one in health.probe_failures},
        swallowed_errors=health.swallowed_errors,
        objective=health.objective[:MAX_LABEL],
        objective_state=health.objective_state[:MAX_LABEL],
        update_every={checked_name(block, "health.update_every"): n for block, n in health.update_every.items()},
    )


def _probe_failure(failure: agent_pb2.ProbeFailure) -> str:
    probe, reason = checked_text(failure.probe, "probe"), checked_text(failure.reason, "probe failure")
    return f"{probe}: {reason} (×{failure.count}{', disabled' if failure.disabled else ''})"


def _result(result: types_pb2.CommandResult) -> ReportedResult:
    what = f"result of {result.command_id!r}"
    require_few(result.unchanged_blocks, "result.unchanged_blocks")
    require(-MAX_STEP <= result.step <= MAX_STEP, f"{what}: step must be -2**53 to 2**53, got {result.step}")
    require(result.outcome > 0, f"{what}: outcome must be one of {sorted(_OUTCOMES)}, got {result.outcome}")
    detail = checked_text(result.detail, "result.detail")
    if result.outcome not in _OUTCOMES:  # of a later version; whatever it is, the command was not just applied
        detail = f"outcome {result.outcome}, which this version of the daemon does not know: {detail}"
    return ReportedResult(
        command_id=checked_name(result.command_id, "result.command_id"),
        outcome=_OUTCOMES.get(result.outcome, "failed"),
        step=result.step,
        detail=detail,
        unchanged_blocks=tuple(checked_name(block, "result.unchanged_blocks") for block in result.unchanged_blocks),
    )


def _checkpoint(checkpoint: types_pb2.Checkpoint) -> Checkpoint:
    require(0 <= checkpoint.step <= MAX_STEP, f"checkpoint.step must be 0 to 2**53, got {checkpoint.step}")
    return Checkpoint(checkpoint.step, checked_text(checkpoint.uri, "checkpoint.uri"))


# The queue


@dataclass(slots=True, eq=False)
class QueuedSample:
    """A sample in the queue; `payload` is its bytes for the journal, `received_at` is in monotonic seconds."""

    run: str
    attempt: Attempt
    reading: Reading
    payload: bytes
    received_at: float
    # Whether it is folded into its run; it can be so and still wait for a failing journal.
    processed: bool = field(default=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the payload, and of what takes far more than that once it is read."""
        settings = sum(len(group.settings) for group in self.reading.optimizer_groups.values())
        return len(self.payload) + _SETTING_BYTES * settings

    @property
    def weight(self) -> int:
        """Bytes for which a turn takes it."""
        reading = self.reading
        items = len(reading.checkpoints) + len(reading.deleted_checkpoints) + len(reading.results)
        return self.nbytes + _ITEM_BYTES * items


TURN_SAMPLES, TURN_BYTES = 32, 2**20  # that are journalled and folded before others are looked at
_QUICK_WRITE = (
    0.02  # seconds; a turn has as many times more samples as its journal takes longer to write, by TURN_BYTES
)
LARGE_SHARE = 0.02  # of the time, at most, that goes into samples which are larger, where others wait
RUN_UNFOLDED = 64  # samples of a run that wait for their turn, after which no more of it are read; fewer large ones
_UNFOLDED_BYTES = 2**16  # of a sample, at least, that waits for its turn
_ITEM_BYTES = 8_192  # for which a turn takes a checkpoint or a result: each is a row of the journal's, or several


def _unfolded(entry: QueuedSample) -> int:
    return max(entry.weight, _UNFOLDED_BYTES)


class SampleQueue:
    """The samples of all runs that wait for the journal. When it is full, the busiest run loses its oldest sample.

    Where more come in than are journalled and folded, runs take turns: one that sends too much waits for itself alone.

    Args:
        capacity: How many samples it holds.
        capacity_bytes: How many bytes it holds.
        run_bytes: How many bytes of one run it holds; beyond that the run loses its oldest samples.
        on_evict: Called with each sample that is dropped.
    """

    def __init__(
        self, capacity: int, capacity_bytes: int, run_bytes: int, on_evict: Callable[[QueuedSample], None]
    ) -> None:
        self.capacity = capacity
        self._capacity_bytes = capacity_bytes
        self._most_of_a_run = run_bytes
        self._on_evict = on_evict
        self._runs: dict[str, deque[QueuedSample]] = {}
        self._run_bytes: dict[str, int] = {}
        self._depth = 0
        self._bytes = 0
        self._unfolded: dict[str, int] = {}
        self._filled = asyncio.Event()
        self._taken = asyncio.Event()
        self._large_at = 0.0  # monotonic seconds from which on the next large sample may be taken
        self._turn_samples = TURN_SAMPLES

    @property
    def depth(self) -> int:
        """How many samples it holds now."""
        return self._depth

    def put(self, entry: QueuedSample) -> None:
        """Appends the newest sample of its run."""
        self._runs.setdefault(entry.run, deque()).append(entry)
        self._account(entry, 1)
        self._shrink([entry.run])
        self._filled.set()

    async def room(self, run: str) -> None:
        """Waits until fewer than `RUN_UNFOLDED` samples of a run wait for their turn."""
        while self._unfolded.get(run, 0) >= RUN_UNFOLDED * _UNFOLDED_BYTES:
            self._taken.clear()
            await self._taken.wait()

    def requeue(self, entries: Iterable[QueuedSample]) -> None:
        """Returns what `take` gave, ahead of what has come since, without waking `filled`."""
        # Reversed, because each goes to the front. With `filled` set, the pipeline would try again at once.
        entries = list(entries)
        for entry in reversed(entries):
            self._runs.setdefault(entry.run, deque()).appendleft(entry)
            self._account(entry, 1)
        self._shrink({entry.run for entry in entries})

    def turn(self, now: float) -> list[QueuedSample]:
        """Removes and returns the oldest sample of each run, then the next, up to a turn's number and `TURN_BYTES`.

        A sample that is larger than that comes alone, and only now and then (`took`); none may be returned although
        some wait.

        Args:
            now: Monotonic seconds.
        """
        large = [run for run, queue in self._runs.items() if queue[0].weight > TURN_BYTES]
        taken = [self._pop_last(large[0])] if large and now >= self._large_at else self._pop_in_turn(set(large))
        if not self._runs:
            self._filled.clear()
        elif now < self._large_at and all(queue[0].weight > TURN_BYTES for queue in self._runs.values()):
            self._filled.clear()
            asyncio.get_running_loop().call_later(self._large_at - now, self._filled.set)
        self._taken.set()
        return taken

    def took(self, turn: Sequence[QueuedSample], writing: float, seconds: float, now: float) -> None:
        """Notes how long a turn took, for the next ones.

        Large samples take `LARGE_SHARE` of the time at most, where others wait. With a slow journal a turn has more
        samples, since a transaction costs one sync of the disk whatever its size.

        Args:
            turn: The samples.
            writing: Seconds that the journal took.
            seconds: Seconds that all of it took.
            now: Monotonic seconds.
        """
        self._turn_samples = max(TURN_SAMPLES, int(TURN_SAMPLES * writing / _QUICK_WRITE))
        others_wait = any(queue[0].weight <= TURN_BYTES for queue in self._runs.values())
        if others_wait and any(entry.weight > TURN_BYTES for entry in turn):
            self._large_at = now + seconds * (1 / LARGE_SHARE - 1)

    def take(self) -> list[QueuedSample]:
        """Removes and returns all samples; those of a run are in their order."""
        self._filled.clear()
        entries = [entry for queue in self._runs.values() for entry in queue]
        self._runs, self._run_bytes, self._depth, self._bytes = {}, {}, 0, 0
        self._unfolded.clear()
        self._taken.set()
        return entries

    @property
    def fills_turn(self) -> bool:
        """Whether as many samples wait as one turn takes."""
        return self._depth >= self._turn_samples

    @property
    def has_turn(self) -> bool:
        """Whether `filled` returns at once."""
        return self._filled.is_set()

    async def filled(self) -> None:
        """Waits until a sample was put since the last `take`."""
        await self._filled.wait()

    def wake(self) -> None:
        """Makes `filled` return although nothing was put."""
        self._filled.set()

    def _pop_in_turn(self, left_out: set[str]) -> list[QueuedSample]:
        taken: list[QueuedSample] = []
        size = 0
        while len(taken) < self._turn_samples and (run := next((one for one in self._runs if one not in left_out), "")):
            size += self._runs[run][0].weight
            if size > TURN_BYTES:
                break
            taken.append(self._pop_last(run))
        return taken

    def _pop_last(self, run: str) -> QueuedSample:
        """Removes the oldest sample of a run, whose turn then comes after all others'."""
        entry = self._pop(run)
        if run in self._runs:
            self._runs[run] = self._runs.pop(run)
        return entry

    def _pop(self, run: str) -> QueuedSample:
        entry = self._runs[run].popleft()
        self._account(entry, -1)
        if not self._runs[run]:
            del self._runs[run], self._run_bytes[run]
            self._unfolded.pop(run, None)
        return entry

    def _account(self, entry: QueuedSample, sign: int) -> None:
        size = sign * entry.nbytes
        self._depth += sign
        self._bytes += size
        self._run_bytes[entry.run] = self._run_bytes.get(entry.run, 0) + size
        if not entry.processed:
            self._unfolded[entry.run] = self._unfolded.get(entry.run, 0) + sign * _unfolded(entry)

    def _shrink(self, grown: Iterable[str]) -> None:
        """Drops samples until all bounds are kept, after the runs `grown` got more."""
        for run in grown:
            while self._run_bytes.get(run, 0) > self._most_of_a_run:
                self._evict_oldest(run)
        # From the busiest run, so that a fast trainer can't push out the samples of slow ones.
        while self._depth > self.capacity or self._bytes > self._capacity_bytes:
            if self._depth > self.capacity:
                self._evict_oldest(max(self._runs, key=lambda run: len(self._runs[run])))
            else:
                self._evict_oldest(max(self._run_bytes, key=self._run_bytes.__getitem__))

    def _evict_oldest(self, run: str) -> None:
        self._on_evict(self._pop(run))
