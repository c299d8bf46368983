"""The border of the daemon: a message is checked against its limits and its Hello before it is taken as a value.

Everything here is pure. What breaks the contract raises `WireError(code, reason)`, where code is one of `malformed`,
`non_finite`, `out_of_order`, `wrong_run`; the session answers with a Refusal and counts it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sharpwatch import wire
from sharpwatch.daemon.ingest.hello import RunHello
from sharpwatch.daemon.ingest.limits import (
    MAX_COUNT,
    MAX_STEP,
    Doubles,
    Floats,
    Ints,
    checked_name,
    checked_text,
    few,
    require,
)
from sharpwatch.daemon.ingest.probes import read_probes
from sharpwatch.daemon.records import Checkpoint, CommandResult
from sharpwatch.errors import WireError
from sharpwatch.v1 import agent_pb2, types_pb2

_OUTCOMES: dict[int, Literal["applied", "refused", "expired", "failed"]] = {
    types_pb2.COMMAND_OUTCOME_APPLIED: "applied",
    types_pb2.COMMAND_OUTCOME_REFUSED: "refused",
    types_pb2.COMMAND_OUTCOME_EXPIRED: "expired",
    types_pb2.COMMAND_OUTCOME_FAILED: "failed",
}


@dataclass(frozen=True, slots=True, eq=False)
class TapValues:
    """The free statistics of one step; every array is [L]."""

    gradient_norm: Floats
    weight_norm: Floats
    update_rms: Floats
    non_finite: Ints
    learning_rate: Floats
    lr_multiplier: Floats


@dataclass(frozen=True, slots=True, eq=False)
class BlockTap:
    """A tap by block type; every array is [B], with NaN where nothing was measured."""

    gradient_norm: Doubles
    weight_norm: Doubles
    update_rms: Doubles
    non_finite: Ints
    learning_rate: Doubles
    lr_multiplier: Doubles


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
    """A checked Sample; `probes` by name. `dropped_probes` names those left out because a number was not finite."""

    sequence: int
    step: int
    taken_at: float  # unix seconds
    loss: float | None
    tap: TapValues | None
    probes: Mapping[str, Any]
    health: HealthReading | None
    results: tuple[CommandResult, ...]
    checkpoints: tuple[Checkpoint, ...]
    closing: bool
    restored: bool
    dropped_probes: tuple[str, ...]


def _tap(tap: agent_pb2.Tap, parameters: Ints) -> TapValues:
    rows = len(parameters)

    def floats(name: str) -> Floats:
        return wire.decode(getattr(tap, name), name=f"tap.{name}", dtype="float32", shape=(rows,))

    non_finite = wire.decode(tap.non_finite, name="tap.non_finite", dtype="int64", shape=(rows,))
    in_range = (non_finite >= 0) & (non_finite <= parameters)
    require(bool(in_range.all()), "tap.non_finite: a count below zero or above the block's parameters")
    rate, multiplier = floats("learning_rate"), floats("lr_multiplier")
    for name, values in (("learning_rate", rate), ("lr_multiplier", multiplier)):
        require(bool(np.isfinite(values).all()), f"tap.{name}: not finite", "non_finite")
    return TapValues(
        gradient_norm=floats("gradient_norm"),
        weight_norm=floats("weight_norm"),
        update_rms=floats("update_rms"),
        non_finite=non_finite,
        learning_rate=rate,
        lr_multiplier=multiplier,
    )


def _bincount(hello: RunHello, rows: Doubles) -> Doubles:
    # In a product with a membership matrix one NaN or inf would spread to all blocks.
    return np.bincount(hello.block_of, weights=rows, minlength=len(hello.blocks)).astype(np.float64)


def _norms(hello: RunHello, rows: Floats) -> Doubles:
    """The norm of the layers of each block taken together."""
    return np.sqrt(_bincount(hello, np.square(rows, dtype=np.float64)))


def _means(hello: RunHello, rows: Doubles) -> Doubles:
    """Means weighted by parameters, over the rows that are not NaN; NaN where there are none."""
    present = ~np.isnan(rows)
    weights = np.where(present, hello.parameters, 0).astype(np.float64)
    total = _bincount(hello, weights)
    with np.errstate(invalid="ignore"):
        return _bincount(hello, np.where(present, rows * hello.parameters, 0.0)) / total


def block_tap(hello: RunHello, tap: TapValues) -> BlockTap:
    """Makes the tap of block types from that of layer blocks.

    Norms are roots of sums of squares, RMS_t is the root of a mean square weighted by parameters, and rates and
    multipliers are means weighted by parameters.
    """
    squares = np.square(tap.update_rms, dtype=np.float64)
    return BlockTap(
        gradient_norm=_norms(hello, tap.gradient_norm),
        weight_norm=_norms(hello, tap.weight_norm),
        update_rms=np.sqrt(_means(hello, squares)),
        non_finite=_bincount(hello, tap.non_finite.astype(np.float64)).astype(np.int64),
        learning_rate=_means(hello, tap.learning_rate.astype(np.float64)),
        lr_multiplier=_means(hello, tap.lr_multiplier.astype(np.float64)),
    )


def _measured(value: float) -> float | None:
    return value if math.isfinite(value) and value >= 0 else None


def _health(health: agent_pb2.AgentHealth) -> HealthReading:
    few(health.dropped, "health.dropped")
    few(health.probe_failures, "health.probe_failures")
    require(all(count <= MAX_COUNT for count in health.dropped.values()), "health.dropped: a count above 2**63")
    return HealthReading(
        overhead_ratio=_measured(health.overhead_ratio),
        step_seconds=_measured(health.step_seconds),
        dropped={checked_name(reason, "health.dropped"): count for reason, count in health.dropped.items()},
        probe_failures=tuple(
            f"{checked_text(failure.probe, 'probe')}: {checked_text(failure.reason, 'probe failure')} (×{failure.count}"
            f"{', disabled' if failure.disabled else ''})"
            for failure in health.probe_failures
        ),
        lr_revision=health.lr_revision,
    )


def _result(result: types_pb2.CommandResult) -> CommandResult:
    few(result.unchanged_blocks, "result.unchanged_blocks")
    require(-MAX_STEP <= result.step <= MAX_STEP, f"result of {result.command_id!r}: step {result.step}")
    require(result.outcome in _OUTCOMES, f"result of {result.command_id!r}: outcome {result.outcome}")
    return CommandResult(
        command_id=checked_name(result.command_id, "result.command_id"),
        outcome=_OUTCOMES[result.outcome],
        step=result.step,
        detail=checked_text(result.detail, "result.detail"),
        unchanged_blocks=tuple(checked_name(block, "result.unchanged_blocks") for block in result.unchanged_blocks),
    )


def _checkpoint(checkpoint: types_pb2.Checkpoint) -> Checkpoint:
    require(0 <= checkpoint.step <= MAX_STEP, f"checkpoint: step {checkpoint.step}")
    return Checkpoint(checkpoint.step, checked_text(checkpoint.uri, "checkpoint.uri"))


def read_sample(manifest: RunHello, sample: agent_pb2.Sample) -> Reading:
    """Check a Sample against the Hello of its attempt; the arrays are views of the message's bytes."""
    require(0 < sample.sequence <= MAX_COUNT, f"sequence: {sample.sequence}, expected 1 to 2**63")
    require(0 <= sample.step <= MAX_STEP, f"step: {sample.step}, expected 0 to 2**53")
    require(sample.taken_at_unix_ns <= MAX_COUNT, f"taken_at_unix_ns: {sample.taken_at_unix_ns}")
    few(sample.results, "results")
    few(sample.checkpoints, "checkpoints")
    probes = read_probes(manifest, sample)
    return Reading(
        sequence=sample.sequence,
        step=sample.step,
        taken_at=sample.taken_at_unix_ns / 1e9,
        loss=sample.loss if sample.HasField("loss") else None,
        tap=_tap(sample.tap, manifest.parameters) if sample.HasField("tap") else None,
        probes={probe: reading for probe, reading in probes.items() if reading is not None},
        health=_health(sample.health) if sample.HasField("health") else None,
        results=tuple(map(_result, sample.results)),
        checkpoints=tuple(map(_checkpoint, sample.checkpoints)),
        closing=sample.closing,
        restored=sample.restored,
        dropped_probes=tuple(probe for probe, reading in probes.items() if reading is None),
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
