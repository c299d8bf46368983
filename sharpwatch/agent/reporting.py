"""Samples on their way to the daemon: the record of each step, its loss, and events that belong to no step."""

from __future__ import annotations

import math
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sharpwatch._version import __version__
from sharpwatch.agent.checkpoint_log import CheckpointLog
from sharpwatch.agent.control.commands import Cancel, Command, CommandResult, RollBack, SetMultipliers
from sharpwatch.agent.control.controller import Controller
from sharpwatch.agent.losses import StepLoss
from sharpwatch.agent.probes.builtin import PROBES
from sharpwatch.agent.probes.failures import ProbeFailure
from sharpwatch.agent.probes.runner import ProbeRun
from sharpwatch.agent.probes.scheduler import OverheadBudget
from sharpwatch.agent.statistics.group_settings import ChangedSettings, GroupSettings
from sharpwatch.agent.statistics.host_copy import number
from sharpwatch.agent.statistics.tap import PendingTap, Tap, TapReading
from sharpwatch.agent.transport.base import Transport
from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.objective.verification import ObjectiveInUse
from sharpwatch.v1 import agent_pb2, types_pb2
from sharpwatch.wire import MAX_NAME, MAX_PARAMETER_NAMES, PROTOCOL, SKETCH_SIZE, encode

_OBJECTIVE = 300  # characters of the words for the objective
_TEXT = 4000  # characters of a text from elsewhere, such as an error; the daemon refuses more than 4096
_OUTCOMES = {
    "applied": types_pb2.COMMAND_OUTCOME_APPLIED,
    "refused": types_pb2.COMMAND_OUTCOME_REFUSED,
    "expired": types_pb2.COMMAND_OUTCOME_EXPIRED,
    "failed": types_pb2.COMMAND_OUTCOME_FAILED,
    "cancelled": types_pb2.COMMAND_OUTCOME_CANCELLED,
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
    data_order: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    takes_update_intervals: bool = True
    # Shown in each session, by which the daemon knows this trainer; in no log or message to others.
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)


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
    update_every: Mapping[str, int]
    objective: ObjectiveInUse | None = None


@dataclass(frozen=True, slots=True)
class SampleValues:
    """The values of one sample."""

    sequence: int
    step: int
    taken_at_unix_ns: int
    health: Health
    loss: float | None = None
    rank_losses: npt.NDArray[np.float64] | None = None
    tap: TapReading | None = None
    groups: Sequence[GroupSettings] = ()
    probes: ProbeRun = field(default_factory=ProbeRun)
    results: Sequence[CommandResult] = ()
    checkpoints: Sequence[tuple[int, str]] = field(default=())
    deleted_checkpoints: Sequence[str] = ()
    closing: bool = False
    restored: bool = False


def hello_message(identity: Identity, block_map: BlockMap) -> agent_pb2.Hello:
    """Makes the first message of an attempt."""
    names = block_map.parameter_names if _are_short(block_map.parameter_names) else [()] * len(block_map.layer_blocks)
    layer_blocks = [
        types_pb2.LayerBlock(
            block=block.type,
            layer=block.layer or "",
            parameters=block.numel,
            adapter_parameters=block.adapter_numel,
            parameter_names=own,
        )
        for block, own in zip(block_map.layer_blocks, names, strict=True)
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
        data_order=identity.data_order,
        labels=identity.labels,
        takes_update_intervals=identity.takes_update_intervals,
        secret=identity.secret,
    )


def _are_short(names: Sequence[Sequence[str]]) -> bool:
    """Whether the daemon takes the names of all parameters."""
    flat = [name for own in names for name in own]
    return (
        max(map(len, flat), default=0) <= MAX_NAME and sum(len(name.encode()) for name in flat) <= MAX_PARAMETER_NAMES
    )


def sample_message(values: SampleValues) -> agent_pb2.Sample:
    """Makes the message of one step."""
    return agent_pb2.Sample(
        sequence=values.sequence,
        step=values.step,
        taken_at_unix_ns=values.taken_at_unix_ns,
        loss=values.loss,
        tap=None if values.tap is None else _tap(values.tap),
        optimizer_groups=[_group(group) for group in values.groups],
        **_probes(values.probes),
        attention=_attention(values.probes.attention),
        rank_losses=None if values.rank_losses is None else encode(values.rank_losses, "float32"),
        health=_health(values.health),
        results=[_result(result) for result in values.results],
        checkpoints=[types_pb2.Checkpoint(step=step, uri=uri) for step, uri in values.checkpoints],
        deleted_checkpoints=values.deleted_checkpoints,
        closing=values.closing,
        restored=values.restored,
    )


def read_command(message: types_pb2.Command) -> Command:
    """Reads a command; an action that this agent does not know becomes None, which the controller refuses."""
    action: SetMultipliers | RollBack | Cancel | None = None
    if message.HasField("set_multipliers"):
        asked = message.set_multipliers
        action = SetMultipliers(
            dict(asked.multipliers), asked.revision, asked.ramp_steps, asked.ttl_steps, dict(asked.update_every)
        )
    elif message.HasField("rollback"):
        back = message.rollback
        action = RollBack(back.checkpoint.step, back.checkpoint.uri, (back.skip_from_step, back.skip_to_step))
    elif message.HasField("cancel"):
        action = Cancel(message.cancel)
    return Command(
        id=message.id,
        action=action,
        apply_at_step=message.apply_at_step,
        expires_at_step=message.expires_at_step,
        expires_at_unix_ns=message.expires_at_unix_ns,
        reason=message.reason,
        author=message.author,
    )


def _tap(reading: TapReading) -> agent_pb2.Tap:
    return agent_pb2.Tap(
        gradient_norm=encode(reading.gradient_norm, "float32"),
        weight_norm=encode(reading.weight_norm, "float32"),
        update_rms=encode(reading.update_rms, "float32"),
        non_finite=encode(reading.non_finite, "int64"),
        learning_rate=encode(reading.learning_rate, "float32"),
        lr_multiplier=encode(reading.lr_multiplier, "float32"),
        second_moment=encode(reading.second_moment, "float32"),
        clip_factor=None if math.isnan(reading.clip_factor) else reading.clip_factor,
        changed_parameter=encode(reading.changed_parameter, "int32"),
        non_finite_parameter=(
            None if reading.non_finite_parameter is None else encode(reading.non_finite_parameter, "int32")
        ),
        zero_gradients=None if reading.zero_gradients is None else encode(reading.zero_gradients, "int32"),
        zero_parameter=None if reading.zero_parameter is None else encode(reading.zero_parameter, "int32"),
    )


def _group(group: GroupSettings) -> agent_pb2.OptimizerGroup:
    steps = number(group.steps)
    return agent_pb2.OptimizerGroup(
        optimizer=group.optimizer,
        group=group.group,
        settings=group.settings,
        steps=None if math.isnan(steps) else int(steps),
    )


def _probes(run: ProbeRun) -> dict[str, Any]:
    """Returns the messages of the probes, by their field in a Sample."""
    return {name: PROBES[name].encode(report, run.seconds[name]) for name, report in run.reports.items()}


def _attention(scales: npt.NDArray[np.float32] | None) -> agent_pb2.AttentionReading | None:
    return None if scales is None else agent_pb2.AttentionReading(logit_scale=encode(scales, "float32"))


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
        update_every=dict(health.update_every),
        objective="" if health.objective is None else health.objective.text[:_OBJECTIVE],
        objective_state="" if health.objective is None else health.objective.state,
    )


def _result(result: CommandResult) -> types_pb2.CommandResult:
    return types_pb2.CommandResult(
        command_id=result.command_id,
        outcome=_OUTCOMES[result.outcome],
        step=result.step,
        detail=result.detail[:_TEXT],
        unchanged_blocks=result.unchanged_blocks,
    )


# On a GPU each holds pinned memory until its numbers have come.
_MAX_RECORDS = 8  # whose numbers may be on their way from the device


@dataclass(slots=True)
class StepRecord:
    """What one step brought, before it is a message."""

    step: int
    taken_at_unix_ns: int
    tap: PendingTap | None  # None: it could not be read
    probes: ProbeRun
    loss: StepLoss = field(default_factory=StepLoss)
    rank_losses: npt.NDArray[np.float64] | None = None  # as `StepMessage.rank_losses`
    reading: TapReading | None = None  # of all ranks, in place of `tap`
    restored: bool = False  # the first since the run was put back
    awaits_loss: bool = False  # until the next step begins
    groups: Sequence[GroupSettings] = ()

    @property
    def ready(self) -> bool:
        """Whether every number is on the host."""
        return (self.tap is None or self.tap.ready) and self.loss.ready

    def late_loss(self, loss: StepLoss) -> None:
        """Take the loss that came after the step, if it is still awaited."""
        if self.awaits_loss:
            self.loss = loss
        self.awaits_loss = False


class Reporter:
    """Sends the records of steps, in order and as their numbers arrive, and other news, over `transport`.

    The queue of records is bounded: when full, the oldest is dropped. Each sample carries all events pending by then.

    Args:
        transport: takes the samples.
        tap: makes a reading of what a record has of it.
        control: its results and multipliers are in the samples.
        budget: its overhead is.
        failures: the failures of probes, now.
        swallowed_errors: how many errors were swallowed, now.
        objective: the loss that `gnb` measures, now.
    """

    def __init__(  # noqa: PLR0913 - all that a sample contains
        self,
        transport: Transport,
        *,
        tap: Tap,
        control: Controller,
        budget: OverheadBudget,
        failures: Callable[[], Sequence[ProbeFailure]],
        swallowed_errors: Callable[[], int],
        objective: Callable[[], ObjectiveInUse | None] = lambda: None,
    ) -> None:
        self._transport = transport
        self._tap = tap
        self._control = control
        self._budget = budget
        self._failures = failures
        self._swallowed_errors = swallowed_errors
        self._objective = objective
        self._records: deque[StepRecord] = deque()
        self._dropped = 0
        self._sequence = 0
        self._settings = ChangedSettings()
        self.checkpoints = CheckpointLog()
        self._restored = False  # since the last sample

    @property
    def has_events(self) -> bool:
        """Whether there is news for `send_events`."""
        return bool(self.checkpoints.new or self.checkpoints.gone or self._control.has_results)

    def restored(self) -> None:
        """The run was put back: send what was before, and mark the next sample."""
        self.flush(wait=True)
        self._restored = True

    def add(self, record: StepRecord) -> None:
        """Queue `record`; where it awaits a loss, no further than until the next step begins."""
        # What was before the restore has step numbers that come again, so it must leave first.
        if record.restored:
            self.restored()
        self._records.append(record)
        if len(self._records) > _MAX_RECORDS:
            self._records.popleft()
            self._dropped += 1
        self.flush()

    def next_step(self) -> None:
        """The next step begins: no loss comes any more for the last one."""
        if self._records:
            self._records[-1].awaits_loss = False
            self.flush()

    def flush(self, *, wait: bool = False) -> None:
        """Send the records that are ready; with `wait` all of them, waiting for the device."""
        while self._records and (wait or (not self._records[0].awaits_loss and self._records[0].ready)):
            record = self._records.popleft()
            tap = record.reading
            if tap is None and record.tap is not None:
                tap = self._tap.resolve(record.tap, number(record.loss.gradient_norm))
            groups = self._settings.news(record.step, record.groups)
            self._send(
                record.step,
                record.taken_at_unix_ns,
                loss=record.loss.read(),
                rank_losses=record.rank_losses,
                tap=tap,
                groups=groups,
                probes=record.probes,
            )

    def send_events(self, step: int, *, closing: bool = False) -> None:
        """Send a sample that belongs to no step: results and checkpoints that would else wait, or the last one."""
        self._send(step, time.time_ns(), closing=closing)

    def _send(self, step: int, taken_at_unix_ns: int, **values: Any) -> None:
        # Asked here, because most steps have no news of checkpoints.
        checkpoints, deleted = self.checkpoints.take() if self.checkpoints.new or self.checkpoints.gone else ((), ())
        restored, self._restored = self._restored, False
        sample = SampleValues(
            sequence=self._sequence + 1,
            step=step,
            taken_at_unix_ns=taken_at_unix_ns,
            health=self._health(),
            results=self._control.take_results(),
            checkpoints=checkpoints,
            deleted_checkpoints=deleted,
            restored=restored,
            **values,
        )
        request = agent_pb2.SessionRequest(sample=sample_message(sample))
        self._sequence += 1  # only now: a signal handler that raises before leaves no gap
        self._transport.send(request)

    def _health(self) -> Health:
        dropped = dict(self._transport.dropped)
        if self._dropped:
            dropped["device_backlog"] = self._dropped
        return Health(
            overhead_ratio=self._budget.overhead_ratio,
            step_seconds=self._budget.step_seconds,
            dropped=dropped,
            swallowed_errors=self._swallowed_errors(),
            probe_failures=self._failures(),
            lr_revision=self._control.revision,
            multipliers=self._control.multipliers,
            update_every=self._control.update_every,
            objective=self._objective(),
        )
