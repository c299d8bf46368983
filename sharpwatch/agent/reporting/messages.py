"""Makes the agent's messages from values, and values from the daemon's commands."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sharpwatch._version import __version__
from sharpwatch.agent.control.commands import Command, CommandResult, RollBack, SetMultipliers
from sharpwatch.agent.probes.builtin import PROBES
from sharpwatch.agent.probes.runner import ProbeFailure, ProbeRun
from sharpwatch.agent.statistics.tap import TapReading
from sharpwatch.blocks import BlockMap
from sharpwatch.v1 import agent_pb2, types_pb2
from sharpwatch.wire import PROTOCOL, SKETCH_SIZE, encode

_TEXT = 4000  # characters of a text from elsewhere, such as an error; the daemon refuses more than 4096
_OUTCOMES = {
    "applied": types_pb2.COMMAND_OUTCOME_APPLIED,
    "refused": types_pb2.COMMAND_OUTCOME_REFUSED,
    "expired": types_pb2.COMMAND_OUTCOME_EXPIRED,
    "failed": types_pb2.COMMAND_OUTCOME_FAILED,
}


@dataclass(frozen=True, slots=True)
class Identity:
    """The attempt and its run, and what the run allows the daemon to do."""

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
    """The state of the agent itself."""

    overhead_ratio: float
    step_seconds: float
    dropped: Mapping[str, int]
    swallowed_errors: int
    probe_failures: Sequence[ProbeFailure]
    lr_revision: int
    multipliers: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class SampleValues:
    """The values of one sample."""

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
    """Makes the first message of an attempt."""
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
    """Makes the message of one step."""
    return agent_pb2.Sample(
        sequence=values.sequence,
        step=values.step,
        taken_at_unix_ns=values.taken_at_unix_ns,
        loss=values.loss,
        tap=None if values.tap is None else _tap(values.tap),
        **_probes(values.probes),
        health=_health(values.health),
        results=[_result(result) for result in values.results],
        checkpoints=[types_pb2.Checkpoint(step=step, uri=uri) for step, uri in values.checkpoints],
        closing=values.closing,
        restored=values.restored,
    )


def command(message: types_pb2.Command) -> Command:
    """Reads a command; an action that this agent does not know becomes None, which the controller refuses."""
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


def _probes(run: ProbeRun) -> dict[str, Any]:
    """Returns the messages of the probes, by their field in a Sample."""
    return {name: PROBES[name].encode(report, run.seconds[name]) for name, report in run.reports.items()}


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
