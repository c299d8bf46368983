"""Values to protobuf and back; the wire's shapes in one place."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sharpwatch._version import __version__
from sharpwatch.agent.control.controller import Command, CommandResult, RollBack, SetMultipliers
from sharpwatch.agent.probes.builtin import DirectionReport, GnbReport, Report
from sharpwatch.agent.probes.runner import ProbeFailure, ProbeRun
from sharpwatch.agent.statistics.tap import TapReading
from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.estimators.hutchinson import HutchinsonSample
from sharpwatch.curvature.estimators.lanczos import LanczosSample
from sharpwatch.curvature.estimators.linesearch import LineSearchSample
from sharpwatch.curvature.estimators.preconditioned import PreconditionedSample
from sharpwatch.v1 import agent_pb2, types_pb2
from sharpwatch.wire import PROTOCOL, SKETCH_SIZE, encode

_TEXT = 4000  # characters of a text that came from elsewhere (an error, a uri); the daemon refuses more than 4096
_OUTCOMES = {
    "applied": types_pb2.COMMAND_OUTCOME_APPLIED,
    "refused": types_pb2.COMMAND_OUTCOME_REFUSED,
    "expired": types_pb2.COMMAND_OUTCOME_EXPIRED,
    "failed": types_pb2.COMMAND_OUTCOME_FAILED,
}


@dataclass(frozen=True, slots=True)
class Identity:
    """Which attempt of which run this is, and what it allows."""

    training_job: str
    run: str
    attempt: str
    optimizer: str
    control: str
    lr_bounds: tuple[float, float]
    initial_step: int
    seed: int
    probes: tuple[str, ...]
    can_roll_back: bool
    started_at_unix_ns: int


@dataclass(frozen=True, slots=True)
class Health:
    """How the agent itself is doing."""

    overhead_ratio: float
    step_seconds: float
    dropped: Mapping[str, int]
    swallowed_errors: int
    probe_failures: Sequence[ProbeFailure]
    lr_revision: int
    multipliers: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class SampleValues:
    """All that one sample says."""

    sequence: int
    step: int
    taken_at_unix_ns: int
    health: Health
    loss: float | None = None
    tap: TapReading | None = None
    probes: ProbeRun = field(default_factory=ProbeRun)
    results: Sequence[CommandResult] = ()
    checkpoints: Sequence[tuple[int, str]] = field(default=())
    closing: bool = False
    restored: bool = False


def hello(identity: Identity, block_map: BlockMap) -> agent_pb2.Hello:
    """The first message of an attempt."""
    layer_blocks = [
        types_pb2.LayerBlock(block=block.type, layer=block.layer or "", parameters=block.numel)
        for block in block_map.layer_blocks
    ]
    return agent_pb2.Hello(
        protocol=PROTOCOL,
        training_job=identity.training_job,
        run=identity.run,
        attempt=identity.attempt,
        agent_version=__version__,
        layer_blocks=layer_blocks,
        blocks=block_map.blocks,
        optimizer=identity.optimizer,
        control=identity.control,
        min_multiplier=identity.lr_bounds[0],
        max_multiplier=identity.lr_bounds[1],
        initial_step=identity.initial_step,
        seed=identity.seed,
        probes=identity.probes,
        sketch_size=SKETCH_SIZE,
        host=socket.gethostname(),
        pid=os.getpid(),
        started_at_unix_ns=identity.started_at_unix_ns,
        can_roll_back=identity.can_roll_back,
    )


def sample(values: SampleValues) -> agent_pb2.Sample:
    """The message of one step."""
    return agent_pb2.Sample(
        sequence=values.sequence,
        step=values.step,
        taken_at_unix_ns=values.taken_at_unix_ns,
        loss=values.loss,
        tap=None if values.tap is None else _tap(values.tap),
        **{kind: _probe(report, values.probes.seconds[kind]) for kind, report in values.probes.reports.items()},
        health=_health(values.health),
        results=[_result(result) for result in values.results],
        checkpoints=[types_pb2.Checkpoint(step=step, uri=uri) for step, uri in values.checkpoints],
        closing=values.closing,
        restored=values.restored,
    )


def command(message: types_pb2.Command) -> Command:
    """A command as values; an action this agent does not know becomes None, which control refuses."""
    action: SetMultipliers | RollBack | None = None
    if message.HasField("set_multipliers"):
        asked = message.set_multipliers
        action = SetMultipliers(dict(asked.multipliers), asked.revision, asked.ramp_steps, asked.ttl_steps)
    elif message.HasField("rollback"):
        back = message.rollback
        action = RollBack(back.checkpoint.step, back.checkpoint.uri, (back.skip_from_step, back.skip_to_step))
    return Command(
        id=message.id,
        action=action,
        apply_at_step=message.apply_at_step,
        expires_at_step=message.expires_at_step,
        expires_at_unix_ns=message.expires_at_unix_ns,
        reason=message.reason,
    )


def _tap(reading: TapReading) -> agent_pb2.Tap:
    return agent_pb2.Tap(
        gradient_norm=encode(reading.gradient_norm, "float32"),
        weight_norm=encode(reading.weight_norm, "float32"),
        update_rms=encode(reading.update_rms, "float32"),
        non_finite=encode(reading.non_finite, "int64"),
        learning_rate=encode(reading.learning_rate, "float32"),
        lr_multiplier=encode(reading.lr_multiplier, "float32"),
    )


def _probe(report: Report, seconds: float) -> Any:
    """The message of a report, by its type."""
    match report:
        case GnbReport():
            return _gnb(report, seconds)
        case DirectionReport():
            return _direction(report, seconds)
        case HutchinsonSample():
            return _hutchinson(report, seconds)
        case LanczosSample():
            return _lanczos(report, seconds)
        case LineSearchSample():
            return _linesearch(report, seconds)
        case PreconditionedSample():
            return _preconditioned(report, seconds)


def _gnb(report: GnbReport, seconds: float) -> agent_pb2.GnbProbe:
    probe = report.sample
    return agent_pb2.GnbProbe(
        tokens=probe.tokens,
        rows=probe.rows,
        traces=_array(probe.traces, "float64"),
        sketches=None if probe.sketches is None else _array(probe.sketches, "float32"),
        gradient_sketch=None if report.gradient_sketch is None else _array(report.gradient_sketch, "float32"),
        gradient_noise=None if report.gradient_noise is None else encode(report.gradient_noise, "float32"),
        seconds=seconds,
    )


def _direction(report: DirectionReport, seconds: float) -> agent_pb2.DirectionProbe:
    probe = report.sample
    return agent_pb2.DirectionProbe(
        tokens=probe.tokens,
        rows=probe.rows,
        descent=float(probe.descent),
        curvature=float(probe.curvature),
        block_descent=_array(probe.block_descent, "float64"),
        block_curvature=_array(probe.block_curvature, "float64"),
        update_ratio=encode(report.update_ratio, "float32"),
        method=probe.method,
        seconds=seconds,
    )


def _hutchinson(probe: HutchinsonSample, seconds: float) -> agent_pb2.HutchinsonProbe:
    return agent_pb2.HutchinsonProbe(
        tokens=probe.tokens,
        rows=probe.rows,
        block=probe.block,
        traces=_array(probe.traces, "float64"),
        method=probe.method,
        seconds=seconds,
    )


def _lanczos(probe: LanczosSample, seconds: float) -> agent_pb2.LanczosProbe:
    return agent_pb2.LanczosProbe(
        tokens=probe.tokens,
        rows=probe.rows,
        block=probe.block,
        top=probe.top,
        top_residual=probe.top_residual,
        bottom=probe.bottom,
        bottom_residual=probe.bottom_residual,
        products=probe.products,
        method=probe.method,
        seconds=seconds,
    )


def _linesearch(probe: LineSearchSample, seconds: float) -> agent_pb2.LineSearchProbe:
    return agent_pb2.LineSearchProbe(
        tokens=probe.tokens,
        rows=probe.rows,
        sharpness=probe.sharpness,
        half_width=probe.half_width,
        block_sharpness=_array(probe.block_sharpness, "float64"),
        block_half_width=_array(probe.block_half_width, "float64"),
        seconds=seconds,
    )


def _preconditioned(probe: PreconditionedSample, seconds: float) -> agent_pb2.PreconditionedProbe:
    return agent_pb2.PreconditionedProbe(
        tokens=probe.tokens,
        rows=probe.rows,
        ratio=probe.ratio,
        residual=probe.residual,
        products=probe.products,
        method=probe.method,
        seconds=seconds,
    )


def _array(tensor: Tensor, dtype: str) -> types_pb2.Array:
    return encode(tensor.cpu().numpy(), dtype)


def _health(health: Health) -> agent_pb2.AgentHealth:
    failures = [
        agent_pb2.ProbeFailure(
            probe=failure.probe, reason=failure.reason[:_TEXT], count=failure.count, disabled=failure.disabled
        )
        for failure in health.probe_failures
    ]
    return agent_pb2.AgentHealth(
        overhead_ratio=health.overhead_ratio,
        step_seconds=health.step_seconds,
        dropped=dict(health.dropped),
        swallowed_errors=health.swallowed_errors,
        probe_failures=failures,
        lr_revision=health.lr_revision,
        multipliers=dict(health.multipliers),
    )


def _result(result: CommandResult) -> types_pb2.CommandResult:
    return types_pb2.CommandResult(
        command_id=result.command_id,
        outcome=_OUTCOMES[result.outcome],
        step=result.step,
        detail=result.detail[:_TEXT],
        unchanged_blocks=result.unchanged_blocks,
    )
