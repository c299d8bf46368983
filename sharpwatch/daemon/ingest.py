"""The border of the daemon: a message is checked against its limits and its Hello before it is taken as a value.

Everything here is pure. What breaks the contract raises `WireError(code, reason)`, where code is one of `malformed`,
`non_finite`, `out_of_order`, `wrong_run`; the session answers with a Refusal and counts it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from sharpwatch import wire
from sharpwatch.blocks import BLOCKS
from sharpwatch.daemon.records import Checkpoint, CommandResult
from sharpwatch.errors import WireError
from sharpwatch.v1 import agent_pb2, types_pb2

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]
Control = Literal["none", "lr", "rollback"]

MAX_LAYER_BLOCKS = 16_384
MAX_DRAWS = 64
MAX_NAME = 253
MAX_TEXT = 4_096
MAX_ITEMS = 256  # results, checkpoints, failures, reasons: each, in one sample
MAX_COUNT = 2**63 - 1  # SQLite's integers and numpy's int64
MAX_STEP = 2**53  # what is planned ahead of a step, an expiry or a range to skip, has still to fit an int64
LARGEST_SKETCH = 1e15  # its square, summed over blocks and a whole sketch, is finite in float32
_OUTCOMES: dict[int, Literal["applied", "refused", "expired", "failed"]] = {
    types_pb2.COMMAND_OUTCOME_APPLIED: "applied",
    types_pb2.COMMAND_OUTCOME_REFUSED: "refused",
    types_pb2.COMMAND_OUTCOME_EXPIRED: "expired",
    types_pb2.COMMAND_OUTCOME_FAILED: "failed",
}


@dataclass(frozen=True, slots=True, eq=False)
class Manifest:
    """A checked Hello. L layer blocks, B blocks."""

    training_job: str
    run: str
    attempt: str
    layer_blocks: tuple[tuple[str, str], ...]  # (block, layer), L of them
    parameters: Ints  # [L]
    block_of: Ints  # [L], index into blocks
    blocks: tuple[str, ...]
    optimizer: str
    control: Control
    can_roll_back: bool
    lr_bounds: tuple[float, float]
    initial_step: int
    sketch_size: int
    host: str
    agent_version: str

    @property
    def block_parameters(self) -> Ints:
        """Parameters by block, [B]."""
        return np.bincount(self.block_of, weights=self.parameters, minlength=len(self.blocks)).astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class TapReading:
    """The free statistics of one step; every array is [L]."""

    gradient_norm: Floats
    weight_norm: Floats
    update_rms: Floats
    non_finite: Ints
    learning_rate: Floats
    lr_multiplier: Floats


@dataclass(frozen=True, slots=True, eq=False)
class GnbReading:
    """One gnb probe: traces [draws, L]; sketches [draws, B, k] or None."""

    tokens: int
    traces: Floats
    sketches: Floats | None
    gradient_sketch: Floats | None = None  # [B, k], of the step's mean gradient


@dataclass(frozen=True, slots=True, eq=False)
class DirectionReading:
    """One direction probe; arrays are [B], NaN in block_curvature for a block whose turn it was not."""

    tokens: int
    descent: float
    curvature: float
    block_descent: Floats
    block_curvature: Floats
    update_ratio: Floats


@dataclass(frozen=True, slots=True)
class HealthReading:
    """What the agent says of itself; None where it could not measure."""

    overhead_ratio: float | None
    step_seconds: float | None
    dropped: Mapping[str, int]
    probe_failures: tuple[str, ...]
    lr_revision: int


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """A checked Sample. `dropped_probes` names the probes left out because their numbers were not finite."""

    sequence: int
    step: int
    taken_at: float  # unix seconds
    loss: float | None
    tap: TapReading | None
    gnb: GnbReading | None
    direction: DirectionReading | None
    health: HealthReading | None
    results: tuple[CommandResult, ...]
    checkpoints: tuple[Checkpoint, ...]
    closing: bool
    restored: bool
    dropped_probes: tuple[str, ...]


def _require(condition: bool, reason: str, code: str = "malformed") -> None:
    if not condition:
        raise WireError(code, reason)


def _name(value: str, what: str) -> str:
    _require(0 < len(value) <= MAX_NAME, f"{what}: {len(value)} characters, expected 1 to {MAX_NAME}")
    _require(value.isprintable(), f"{what}: holds characters that can't be printed")
    return value


def _text(value: str, what: str) -> str:
    _require(len(value) <= MAX_TEXT, f"{what}: {len(value)} characters, at most {MAX_TEXT}")
    return value


def _few(items: Sequence[Any] | Mapping[Any, Any], what: str) -> None:
    _require(len(items) <= MAX_ITEMS, f"{what}: {len(items)} of them, at most {MAX_ITEMS}")


def read_hello(hello: agent_pb2.Hello) -> Manifest:
    """Check a Hello."""
    _require(hello.protocol == wire.PROTOCOL, f"protocol {hello.protocol}, this daemon speaks {wire.PROTOCOL}")
    blocks = tuple(hello.blocks)
    _require(0 < len(blocks) == len(set(blocks)), "blocks: empty or with a name twice")
    unknown = sorted(set(blocks) - set(BLOCKS))
    _require(not unknown, f"blocks: {unknown} unknown, allowed are {list(BLOCKS)}")
    rows = hello.layer_blocks
    _require(0 < len(rows) <= MAX_LAYER_BLOCKS, f"layer_blocks: {len(rows)} rows, expected 1 to {MAX_LAYER_BLOCKS}")
    pairs = tuple((row.block, row.layer) for row in rows)
    _require(len(set(pairs)) == len(pairs), "layer_blocks: a block of a layer twice")
    _require({block for block, _ in pairs} == set(blocks), "layer_blocks: not the blocks of `blocks`")
    _require(all(len(layer) <= MAX_NAME for _, layer in pairs), f"layer_blocks: a layer above {MAX_NAME} characters")
    _require(all(0 < row.parameters < 2**53 for row in rows), "layer_blocks: parameters must be 1 to 2**53")
    _require(hello.control in get_args(Control), f"control: {hello.control!r}, expected one of {get_args(Control)}")
    low, high = hello.min_multiplier, hello.max_multiplier
    _require(0 < low <= 1 <= high < math.inf, f"multiplier bounds ({low}, {high}): expected 0 < min <= 1 <= max")
    _require(0 <= hello.initial_step <= MAX_STEP, f"initial_step: {hello.initial_step}")
    _require(0 <= hello.sketch_size <= 2**16, f"sketch_size: {hello.sketch_size}")
    return Manifest(
        training_job=_name(hello.training_job, "training_job"),
        run=_name(hello.run, "run"),
        attempt=_name(hello.attempt, "attempt"),
        layer_blocks=pairs,
        parameters=np.array([row.parameters for row in rows], dtype=np.int64),
        block_of=np.array([blocks.index(block) for block, _ in pairs], dtype=np.int64),
        blocks=blocks,
        optimizer=_text(hello.optimizer, "optimizer"),
        control=cast("Control", hello.control),
        can_roll_back=hello.can_roll_back,
        lr_bounds=(low, high),
        initial_step=hello.initial_step,
        sketch_size=hello.sketch_size,
        host=_text(hello.host, "host"),
        agent_version=_text(hello.agent_version, "agent_version"),
    )


def _tap(tap: agent_pb2.Tap, parameters: Ints) -> TapReading:
    rows = len(parameters)

    def floats(name: str) -> Floats:
        return wire.decode(getattr(tap, name), name=f"tap.{name}", dtype="float32", shape=(rows,))

    non_finite = wire.decode(tap.non_finite, name="tap.non_finite", dtype="int64", shape=(rows,))
    in_range = (non_finite >= 0) & (non_finite <= parameters)
    _require(bool(in_range.all()), "tap.non_finite: a count below zero or above the block's parameters")
    rate, multiplier = floats("learning_rate"), floats("lr_multiplier")
    for name, values in (("learning_rate", rate), ("lr_multiplier", multiplier)):
        _require(bool(np.isfinite(values).all()), f"tap.{name}: not finite", "non_finite")
    return TapReading(
        gradient_norm=floats("gradient_norm"),
        weight_norm=floats("weight_norm"),
        update_rms=floats("update_rms"),
        non_finite=non_finite,
        learning_rate=rate,
        lr_multiplier=multiplier,
    )


def _gnb(probe: agent_pb2.GnbProbe, manifest: Manifest) -> GnbReading | None:
    """None where a number is not finite, or so large that its square would not be: the runs are estimated together."""
    rows = len(manifest.layer_blocks)
    traces = wire.decode(probe.traces, name="gnb.traces", dtype="float64", shape=(None, rows))
    draws = len(traces)
    _require(0 < draws <= MAX_DRAWS, f"gnb.traces: {draws} draws, expected 1 to {MAX_DRAWS}")
    _require(0 < probe.tokens <= MAX_COUNT, f"gnb.tokens: {probe.tokens}")
    _require(bool((np.isnan(traces) | (traces >= 0)).all()), "gnb.traces: a squared norm below zero")
    sketches = None
    if probe.HasField("sketches"):
        shape = (draws, len(manifest.blocks), manifest.sketch_size)
        sketches = wire.decode(probe.sketches, name="gnb.sketches", dtype="float32", shape=shape)
    finite = np.isfinite(traces).all() and (sketches is None or (np.abs(sketches) <= LARGEST_SKETCH).all())
    return GnbReading(probe.tokens, traces, sketches) if finite else None


def _direction(probe: agent_pb2.DirectionProbe, blocks: int) -> DirectionReading | None:
    """None where a number is not finite."""

    def array(name: str, dtype: str) -> Floats:
        return wire.decode(getattr(probe, name), name=f"direction.{name}", dtype=dtype, shape=(blocks,))

    descent, curvature = array("block_descent", "float64"), array("block_curvature", "float64")
    ratio = array("update_ratio", "float32")
    _require(0 < probe.tokens <= MAX_COUNT, f"direction.tokens: {probe.tokens}")
    whole = math.isfinite(probe.descent) and math.isfinite(probe.curvature)
    parts = np.isfinite(descent).all() and not np.isinf(curvature).any() and np.isfinite(ratio).all()
    if not (whole and parts):
        return None
    return DirectionReading(probe.tokens, probe.descent, probe.curvature, descent, curvature, ratio)


def _measured(value: float) -> float | None:
    return value if math.isfinite(value) and value >= 0 else None


def _health(health: agent_pb2.AgentHealth) -> HealthReading:
    _few(health.dropped, "health.dropped")
    _few(health.probe_failures, "health.probe_failures")
    _require(all(count <= MAX_COUNT for count in health.dropped.values()), "health.dropped: a count above 2**63")
    return HealthReading(
        overhead_ratio=_measured(health.overhead_ratio),
        step_seconds=_measured(health.step_seconds),
        dropped={_name(reason, "health.dropped"): count for reason, count in health.dropped.items()},
        probe_failures=tuple(
            f"{_text(failure.probe, 'probe')}: {_text(failure.reason, 'probe failure')} (×{failure.count}"
            f"{', disabled' if failure.disabled else ''})"
            for failure in health.probe_failures
        ),
        lr_revision=health.lr_revision,
    )


def _result(result: types_pb2.CommandResult) -> CommandResult:
    _few(result.unchanged_blocks, "result.unchanged_blocks")
    _require(-MAX_STEP <= result.step <= MAX_STEP, f"result of {result.command_id!r}: step {result.step}")
    _require(result.outcome in _OUTCOMES, f"result of {result.command_id!r}: outcome {result.outcome}")
    return CommandResult(
        command_id=_name(result.command_id, "result.command_id"),
        outcome=_OUTCOMES[result.outcome],
        step=result.step,
        detail=_text(result.detail, "result.detail"),
        unchanged_blocks=tuple(_name(block, "result.unchanged_blocks") for block in result.unchanged_blocks),
    )


def _checkpoint(checkpoint: types_pb2.Checkpoint) -> Checkpoint:
    _require(0 <= checkpoint.step <= MAX_STEP, f"checkpoint: step {checkpoint.step}")
    return Checkpoint(checkpoint.step, _text(checkpoint.uri, "checkpoint.uri"))


def read_sample(manifest: Manifest, sample: agent_pb2.Sample) -> Reading:
    """Check a Sample against the Hello of its attempt; the arrays are views of the message's bytes."""
    _require(0 < sample.sequence <= MAX_COUNT, f"sequence: {sample.sequence}, expected 1 to 2**63")
    _require(0 <= sample.step <= MAX_STEP, f"step: {sample.step}, expected 0 to 2**53")
    _require(sample.taken_at_unix_ns <= MAX_COUNT, f"taken_at_unix_ns: {sample.taken_at_unix_ns}")
    _few(sample.results, "results")
    _few(sample.checkpoints, "checkpoints")
    gnb = _gnb(sample.gnb, manifest) if sample.HasField("gnb") else None
    direction = _direction(sample.direction, len(manifest.blocks)) if sample.HasField("direction") else None
    dropped = (
        ("gnb", sample.HasField("gnb") and gnb is None),
        ("direction", sample.HasField("direction") and direction is None),
    )
    return Reading(
        sequence=sample.sequence,
        step=sample.step,
        taken_at=sample.taken_at_unix_ns / 1e9,
        loss=sample.loss if sample.HasField("loss") else None,
        tap=_tap(sample.tap, manifest.parameters) if sample.HasField("tap") else None,
        gnb=gnb,
        direction=direction,
        health=_health(sample.health) if sample.HasField("health") else None,
        results=tuple(map(_result, sample.results)),
        checkpoints=tuple(map(_checkpoint, sample.checkpoints)),
        closing=sample.closing,
        restored=sample.restored,
        dropped_probes=tuple(name for name, is_dropped in dropped if is_dropped),
    )


class Cursor:
    """Where one attempt stands: which sequences are journalled, which wait, and how far its steps have come."""

    def __init__(self, journalled: int = 0, step: int = -1) -> None:
        self.journalled = journalled
        self.step = step
        self._waiting: set[int] = set()
        self._highest = journalled

    def judge(self, sequence: int, step: int, *, restored: bool) -> Literal["new", "waiting", "journalled"]:
        """Place a sample; raises `WireError("out_of_order")`. A new one is taken note of.

        `restored` is what the sample says: only then may its step lie before the last.
        """
        if sequence <= self.journalled:
            return "journalled"
        if sequence in self._waiting:
            return "waiting"
        if sequence < self._highest:
            raise WireError("out_of_order", f"sequence {sequence} after {self._highest}")
        if step < self.step and not restored:
            raise WireError("out_of_order", f"step {step} after {self.step}, and nothing was restored between them")
        self.step = step
        self._highest = sequence
        self._waiting.add(sequence)
        return "new"

    @property
    def idle(self) -> bool:
        """Whether no sample waits for the journal."""
        return not self._waiting

    def settle(self, sequence: int) -> None:
        """`sequence` is journalled, and with it all before it that will ever be."""
        self._waiting.discard(sequence)
        self.journalled = max(self.journalled, sequence)

    def forget(self, sequence: int) -> None:
        """`sequence` was dropped from the queue and will never be journalled."""
        self._waiting.discard(sequence)
