"""Converts what the daemon keeps to protobuf messages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from google.protobuf.message import DecodeError, Message

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.api.pages import fitting
from sharpwatch.daemon.config.settings import DetectionConfig
from sharpwatch.daemon.decisions.decision_log import DecisionLog
from sharpwatch.daemon.detection.reference import ReferenceTest
from sharpwatch.daemon.records import (
    CANCELS,
    Checkpoint,
    Decision,
    Incident,
    LrPlan,
    Mode,
    PairOrder,
    Revision,
    RollbackPlan,
    Silence,
)
from sharpwatch.daemon.runs.snapshot import Phase, RunSnapshot
from sharpwatch.daemon.storage.catalog import RunSummary
from sharpwatch.daemon.storage.schema import ModeRow, RequestRow, TransitionRow
from sharpwatch.v1 import agent_pb2, operator_pb2, types_pb2
from sharpwatch.wire import MAX_ITEMS

_PHASES: dict[Phase, operator_pb2.RunPhase.ValueType] = {
    "running": operator_pb2.RUN_PHASE_RUNNING,
    "silent": operator_pb2.RUN_PHASE_SILENT,
    "killed": operator_pb2.RUN_PHASE_KILLED,
    "closed": operator_pb2.RUN_PHASE_CLOSED,
}


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def checkpoint_message(checkpoint: Checkpoint) -> types_pb2.Checkpoint:
    """Returns a checkpoint as a message."""
    return types_pb2.Checkpoint(step=checkpoint.step, uri=checkpoint.uri)


def _rollback_message(plan: RollbackPlan) -> types_pb2.Rollback:
    return types_pb2.Rollback(
        checkpoint=checkpoint_message(plan.checkpoint),
        skip_from_step=plan.skip_from_step,
        skip_to_step=plan.skip_to_step,
    )


def command_message(decision: Decision) -> types_pb2.Command:
    """Returns the command that tells the trainer of `decision`, or to let go of it where it is to be cancelled."""
    if decision.cancelled_by:
        # In place of the command, not after it: a new attempt must not apply it before it learns that it is void.
        return types_pb2.Command(
            id=f"{CANCELS}{decision.id}",
            author=decision.cancelled_by,
            reason=decision.cancel_reason,
            cancel=decision.id,
        )
    command = types_pb2.Command(
        id=decision.id,
        apply_at_step=decision.apply_at_step,
        expires_at_step=decision.expires_at_step,
        author=decision.author or f"policy {decision.policy}",
        reason=decision.reason or decision.detail,
    )
    if decision.rollback is not None:
        command.rollback.CopyFrom(_rollback_message(decision.rollback))
    else:
        command.set_multipliers.CopyFrom(
            types_pb2.MultiplierSet(
                multipliers=decision.multipliers,
                revision=decision.revision,
                ramp_steps=decision.ramp_steps,
                ttl_steps=decision.ttl_steps,
                update_every=decision.update_every,
            )
        )
    return command


def alert_message(incident: Incident) -> operator_pb2.Alert:
    """Returns an alert as a message."""
    return operator_pb2.Alert(
        id=incident.id,
        run=incident.run,
        name=incident.title,
        blocks=incident.blocks,
        severity=incident.severity,
        evidence="; ".join(incident.evidence),
        names=incident.names if incident.foreign is None else (incident.title,),
        cause=incident.cause,
        layer_blocks=incident.layer_blocks[:MAX_ITEMS],
        onset=incident.onset,
        closed=incident.closed,
        acknowledged=incident.acknowledged,
        parameter=incident.parameter,
        rank=incident.rank,
        first_step=incident.first_step,
        last_step=incident.last_step,
        active=incident.active,
    )


def decision_message(decision: Decision) -> operator_pb2.Decision:
    """Returns a decision as a message."""
    return operator_pb2.Decision(
        id=decision.id,
        run=decision.run,
        made_at_unix_ns=_nanoseconds(decision.made_at),
        step=decision.step,
        policy=decision.policy,
        alert_id=decision.alert_id,
        alert_name=decision.alert_name,
        action=decision.action,
        mode=decision.mode,
        guard=decision.guard,
        outcome=decision.outcome,
        detail=decision.detail,
        multipliers=decision.multipliers,
        rollback=_rollback_message(decision.rollback) if decision.rollback is not None else None,
        applied_step=decision.applied_step,
        revision=decision.revision,
        author=decision.author,
        reason=decision.reason,
        update_every=decision.update_every,
        cancelled_by=decision.cancelled_by,
    )


def transition_message(row: TransitionRow) -> operator_pb2.Transition:
    """Returns a transition of a decision as a message."""
    return operator_pb2.Transition(
        decision_id=row.decision,
        at_unix_ns=_nanoseconds(row.at),
        outcome=row.outcome,
        detail=row.detail,
        author=row.author,
        reason=row.reason,
    )


def event_message(row: RequestRow) -> operator_pb2.OperatorEvent:
    """Returns an operator's request as a message."""
    return operator_pb2.OperatorEvent(
        at_unix_ns=_nanoseconds(row.at),
        run=row.run,
        action=row.action,
        id=row.subject,
        outcome=row.outcome,
        detail=row.detail,
        author=row.author,
        reason=row.reason,
    )


def silence_message(silence: Silence, now: float) -> operator_pb2.Silence:
    """Returns a silence as a message, as it stands at `now`, in unix seconds."""
    return operator_pb2.Silence(
        id=silence.id,
        run=silence.run,
        alert=silence.alert,
        cause=silence.cause,
        policy=silence.policy,
        author=silence.author,
        comment=silence.comment,
        made_at_unix_ns=_nanoseconds(silence.made_at),
        ends_at_unix_ns=_nanoseconds(silence.ends_at),
        active=silence.is_active(now),
        expired_by=silence.expired_by,
        expired_reason=silence.expired_reason,
        expired_at_unix_ns=_nanoseconds(silence.expired_at),
    )


def revision_message(revision: Revision, made: Decision) -> operator_pb2.Revision:
    """Returns an LR revision, and what is known of it by its decision, as a message."""
    return operator_pb2.Revision(
        revision=revision.revision,
        multipliers=revision.multipliers,
        author=revision.author,
        reason=revision.reason,
        made_at_unix_ns=_nanoseconds(revision.made_at),
        decision_id=revision.decision_id,
        applied_step=revision.applied_step,
        undoes=revision.undoes,
        update_every=revision.update_every,
        outcome=made.outcome,
        ramp_steps=made.ramp_steps,
    )


def plan_message(plan: LrPlan) -> operator_pb2.Plan:
    """Returns a learning-rate plan as a message."""
    return operator_pb2.Plan(
        id=plan.id,
        name=plan.name,
        state=plan.state,
        detail=plan.detail,
        multipliers=plan.target,
        before=plan.before,
        stages=[operator_pb2.PlanStage(blocks=stage) for stage in plan.stages],
        stages_done=plan.stages_done,
        ramp_steps=plan.ramp_steps,
        automatic=plan.automatic,
        author=plan.author,
        reason=plan.reason,
        made_at_unix_ns=_nanoseconds(plan.made_at),
        decision_ids=plan.decisions,
        changed_by=plan.changed_by,
        changed_reason=plan.changed_reason,
        under_way=plan.under_way,
        run=plan.run,
    )


def estimate_message(quantity: str, block: str, estimate: Estimate) -> types_pb2.Estimate:
    """Returns an estimate as a message; `block` is empty for the whole model."""
    return types_pb2.Estimate(
        quantity=quantity,
        block=block,
        value=estimate.value,
        stderr=estimate.stderr,
        draws=estimate.draws,
        estimator=estimate.estimator,
        step=estimate.step,
        residual=estimate.residual if math.isfinite(estimate.residual) else None,
        method=estimate.method,
    )


def run_message(snapshot: RunSnapshot) -> operator_pb2.Run:
    """Returns the summary of a run."""
    return operator_pb2.Run(
        run=snapshot.hello.run,
        training_job=snapshot.hello.training_job,
        phase=_PHASES[snapshot.phase],
        attempts=snapshot.attempts,
        step=snapshot.hello.initial_step if snapshot.step is None else snapshot.step,
        loss=snapshot.loss,
        last_sample_at_unix_ns=_nanoseconds(snapshot.last_sample_at or 0.0),
        mode=snapshot.mode,
        control=snapshot.hello.control,
        lr_revision=snapshot.lr_revision,
        active_alerts=sum(incident.active for incident in snapshot.incidents),
        multipliers={block: value for block, value in snapshot.multipliers.items() if value != 1},
        mode_set=None if snapshot.mode_set is None else mode_setting(snapshot.mode_set),
    )


def ended_run_message(summary: RunSummary, mode: Mode) -> operator_pb2.Run:
    """Returns the summary of a run that is not in memory; `mode` is that of runs for which none was set."""
    hello, newest = agent_pb2.Hello(), []
    with suppress(DecodeError):  # of a version whose messages can't be read any more
        hello.ParseFromString(summary.attempt.hello)
        newest = [agent_pb2.SessionRequest.FromString(payload).sample for payload in summary.samples]
    log = DecisionLog(summary.run, hello.blocks)
    log.restore(summary.decisions, summary.revisions)
    return operator_pb2.Run(
        run=summary.run,
        training_job=hello.training_job,
        phase=_PHASES["closed" if summary.attempt.closed else "killed" if summary.attempt.killed else "silent"],
        attempts=summary.attempts,
        step=newest[0].step if newest else hello.initial_step,
        loss=next((sample.loss for sample in newest if sample.HasField("loss")), None),
        last_sample_at_unix_ns=_nanoseconds(summary.attempt.seen_at) if newest else 0,
        mode=summary.mode.mode if summary.mode else mode,
        control=hello.control,
        lr_revision=log.newest_revision,
        active_alerts=summary.open_incidents,
        multipliers={block: value for block, value in log.multipliers.items() if value != 1},
        mode_set=None if summary.mode is None else mode_setting(summary.mode),
    )


def mode_setting(row: ModeRow) -> operator_pb2.ModeSetting:
    """Returns who set a run's mode as a message."""
    return operator_pb2.ModeSetting(author=row.author, reason=row.reason, set_at_unix_ns=_nanoseconds(row.made_at))


_TAP = ("gradient_norm", "weight_norm", "update_rms", "learning_rate", "lr_multiplier")


def _block_messages(snapshot: RunSnapshot) -> list[operator_pb2.Block]:
    measured = {} if snapshot.tap is None else {field: getattr(snapshot.tap, field) for field in _TAP}
    measured |= {"update_ratio": snapshot.update_ratio, "gradient_noise": snapshot.gradient_noise}
    estimates = snapshot.all_estimates
    blocks = []
    for index, name in enumerate(snapshot.hello.blocks):
        block = operator_pb2.Block(block=name, parameters=int(snapshot.hello.block_parameters[index]))
        for field, values in measured.items():
            # Left unset, which the fields allow, so that a client can't take NaN for a measurement.
            if values is not None and not math.isnan(values[index]):
                setattr(block, field, float(values[index]))
        if snapshot.health is not None:
            block.update_every = snapshot.health.update_every.get(name, 1)
        block.estimates.extend(
            estimate_message(quantity, of, estimate) for (quantity, of, _), estimate in estimates.items() if of == name
        )
        blocks.append(block)
    return blocks


def _order_message(pair: PairOrder) -> operator_pb2.PairOrder:
    return operator_pb2.PairOrder(
        low=pair.low,
        high=pair.high,
        inverted=pair.inverted,
        since_step=pair.since,
        standard_errors=pair.standard_errors,
    )


def override_messages(detection: DetectionConfig, labels: Mapping[str, str]) -> list[operator_pb2.Override]:
    """Returns the keys of `detection` that are others for a run with these labels."""
    return [
        operator_pb2.Override(key=key, value=override.changes[key], match=override.match)
        for key, override in detection.overridden(labels).items()
    ]


def reference_message(test: ReferenceTest | None) -> operator_pb2.Reference | None:
    """Returns how a run stands against its reference; None without one."""
    if test is None:
        return None
    found = test.difference
    return operator_pb2.Reference(
        name=test.name,
        common_steps=len(test),
        difference=found.value if math.isfinite(found.value) else None,
        stderr=found.stderr if math.isfinite(found.stderr) else None,
    )


def _attention_messages(snapshot: RunSnapshot) -> list[operator_pb2.AttentionLayer]:
    return [
        operator_pb2.AttentionLayer(layer=layer, logit_scale=scale, step=snapshot.attention_steps[-1])
        for layer, scale in snapshot.attention_scales
    ]


# Of each kind in one answer: a client takes 4 MB at most, unless it is told otherwise.
_ALERT_BYTES, _CHECKPOINT_BYTES, _ATTENTION_BYTES, _TEXT_BYTES = 3 * 2**19, 2**19, 2**19, 2**17


def message_bytes(message: Message) -> int:
    """The bytes of a message as an item of another."""
    return message.ByteSize() + 5  # tag and length


def _text_bytes(*texts: str) -> int:
    return sum(len(text.encode()) for text in texts) + 16


def _alerts(incidents: Sequence[Incident]) -> list[operator_pb2.Alert]:
    """The newest incidents that fit, oldest first; open ones before closed ones."""
    newest = sorted(incidents, key=lambda each: each.active)[::-1]  # of equals the last one comes first
    kept = {each.id for each in fitting(map(alert_message, newest), message_bytes, _ALERT_BYTES)}
    return [alert_message(each) for each in incidents if each.id in kept]


def _checkpoints(checkpoints: Sequence[Checkpoint]) -> list[types_pb2.Checkpoint]:
    """The newest checkpoints that fit, in the order they were saved."""
    return fitting(map(checkpoint_message, reversed(checkpoints)), message_bytes, _CHECKPOINT_BYTES)[::-1]


def _failures(snapshot: RunSnapshot) -> Iterator[str]:
    """What failed of the run's probes, in the daemon and in the agent."""
    for where, count in snapshot.failures.items():
        yield f"{where}, in the daemon, whose log has it (×{count})"
    for probe, count in snapshot.cut_windows.items():
        yield f"{probe}: too large for its window in the daemon, which has lost {count} readings to keep its limit"
    yield from snapshot.health.probe_failures if snapshot.health is not None else ()


def detail_message(
    snapshot: RunSnapshot, checkpoints: Sequence[Checkpoint], twins: Iterable[str] = ()
) -> operator_pb2.RunDetail:
    """Returns all about a run, or the newest of what would be too much for one message."""
    health = snapshot.health
    dropped = {} if health is None else health.dropped
    return operator_pb2.RunDetail(
        run=run_message(snapshot),
        blocks=_block_messages(snapshot),
        estimates=[
            estimate_message(quantity, of, estimate)
            for (quantity, of, _), estimate in snapshot.estimates.items()
            if not of
        ],
        alerts=_alerts(snapshot.incidents),
        alerts_total=snapshot.incidents_in_all,
        checkpoints=_checkpoints(checkpoints),
        checkpoints_total=len(checkpoints),
        overhead_ratio=health.overhead_ratio if health is not None else None,
        step_seconds=health.step_seconds if health is not None else None,
        dropped=dict(fitting(dropped.items(), lambda item: _text_bytes(item[0]), _TEXT_BYTES)),
        probe_failures=fitting(_failures(snapshot), _text_bytes, _TEXT_BYTES),
        objective=(health.objective or None) if health is not None else None,
        objective_state=(health.objective_state or None) if health is not None else None,
        swallowed_errors=(health.swallowed_errors or None) if health is not None else None,
        block_order_correlation=snapshot.order_correlation,
        order=map(_order_message, snapshot.order),
        order_since_step=snapshot.order_since,
        optimizer=snapshot.hello.optimizer,
        host=snapshot.hello.host,
        data_order=snapshot.hello.data_order,
        labels=snapshot.hello.labels,
        twins=fitting(twins, _text_bytes, _TEXT_BYTES),
        attention=fitting(_attention_messages(snapshot), message_bytes, _ATTENTION_BYTES),
    )
