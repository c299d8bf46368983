"""Controls one run: takes observations, results and operators' requests, returns changed records and commands."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from uuid import uuid4

from sharpwatch.daemon.config.settings import AutopilotConfig, MaintenanceConfig, PolicyConfig
from sharpwatch.daemon.decisions.autopilot import Autopilot
from sharpwatch.daemon.decisions.decision_log import DecisionLog
from sharpwatch.daemon.decisions.engine import PolicyEngine
from sharpwatch.daemon.decisions.gate import AskGate, no_gate
from sharpwatch.daemon.decisions.guards import Control, Permissions
from sharpwatch.daemon.decisions.lifecycle import DecisionLifecycle
from sharpwatch.daemon.decisions.lr_plan import Estimates, PlanRequest
from sharpwatch.daemon.decisions.muting import ActiveSilences, no_silences
from sharpwatch.daemon.decisions.operator_requests import OperatorContext, OperatorRequests
from sharpwatch.daemon.decisions.plan_rollout import PlanRollout
from sharpwatch.daemon.decisions.policy import MODES, EscalationChain, strongest
from sharpwatch.daemon.decisions.reconciler import Reconciler
from sharpwatch.daemon.decisions.transitions import UNDER_WAY
from sharpwatch.daemon.detection.history import Losses, StepHistory
from sharpwatch.daemon.detection.reference import ReferenceTest
from sharpwatch.daemon.detection.run_detection import RunDetection
from sharpwatch.daemon.detection.thresholds import USUAL, Budget
from sharpwatch.daemon.records import (
    NO_CHANGES,
    Changes,
    Checkpoint,
    CheckpointReport,
    Decision,
    ForeignAlert,
    Incident,
    LrPlan,
    Mode,
    Observation,
    ReportedResult,
    Revision,
    Severity,
)
from sharpwatch.errors import OperatorError
from sharpwatch.wire import Ints

_NO_AUTOPILOT = AutopilotConfig()
# Checkpoints of a run that are there to roll back to, and the characters of their URIs: of more, the newest.
KEPT_CHECKPOINTS, KEPT_URIS = 1_000, 2**18
MOST_FOREIGN = 64  # alerts of other systems that may fire on a run at a time


def random_id() -> str:
    """A new id, which no other record has."""
    return uuid4().hex[:12]


def configured_mode(policies: Sequence[PolicyConfig], autopilot: AutopilotConfig) -> Mode:
    """The mode of a run for which none was set: that of the policy, or the autopilot, that reaches furthest."""
    return max((strongest(policies), *((autopilot.mode,) if autopilot.is_on else ())), key=MODES.index)


class RunController:
    """Runs detectors and policies for one run. Deterministic except for the ids it generates.

    `mode` is the run's own and overrides every policy's mode; None leaves each policy its own. `control`, `lr_bounds`,
    `can_roll_back` and `takes_intervals` are what the trainer was attached with. `silences` gives those of all runs
    that are active; in a window of `maintenance` policies propose what they would otherwise enforce; `gate` lets raises
    pass. `detection` has what is known of the run.
    """

    def __init__(  # noqa: PLR0913  what a run and its trainer are
        self,
        run: str,
        *,
        layer_blocks: Sequence[tuple[str, str]],
        parameters: Ints,
        parameter_names: Sequence[Sequence[str]] = (),
        policies: Iterable[PolicyConfig],
        budget: Budget = USUAL,
        mode: Mode | None = None,
        control: Control = "none",
        lr_bounds: tuple[float, float] = (0.01, 10.0),
        can_roll_back: bool = False,
        takes_intervals: bool = True,
        silences: ActiveSilences = no_silences,
        maintenance: Sequence[MaintenanceConfig] = (),
        autopilot: AutopilotConfig = _NO_AUTOPILOT,
        gate: AskGate = no_gate,
        new_id: Callable[[], str] = random_id,
    ) -> None:
        permissions = Permissions(control, lr_bounds, can_roll_back, takes_intervals)
        self._chain = EscalationChain(tuple(policies))
        self._log = DecisionLog(run, dict.fromkeys(block for block, _ in layer_blocks))
        self.detection = RunDetection(run, layer_blocks, parameters, new_id, budget, parameter_names=parameter_names)
        self._incidents = self.detection.incidents
        self._requests = OperatorRequests(self._log, permissions, new_id)
        self._reconciler = Reconciler(self._log, self._requests)
        self._rollout = PlanRollout(self._log, self.detection, self._requests, new_id)
        self._lifecycle = DecisionLifecycle(self._log, self.detection, self._chain)
        self._engine = PolicyEngine(
            self._log, self.detection, self._chain, permissions, new_id, silences, maintenance, gate
        )
        self._autopilot = Autopilot(self._log, self.detection, permissions, autopilot, new_id, maintenance)
        self._is_autopilot_on = autopilot.is_on
        self._checkpoints: dict[str, Checkpoint] = {}  # by URI, in the order they were saved
        self._mode = mode
        self._strongest = configured_mode(self._chain.policies, autopilot)
        self._step: int | None = None

    def configure(
        self,
        policies: Iterable[PolicyConfig],
        budget: Budget,
        maintenance: Sequence[MaintenanceConfig],
        autopilot: AutopilotConfig,
    ) -> None:
        """Go by other rules from now on; what was decided, and what is known of the run, stays."""
        self._chain = EscalationChain(tuple(policies))
        self._lifecycle.configure(self._chain)
        self._engine.configure(self._chain, maintenance)
        self._autopilot.configure(autopilot, maintenance)
        self._is_autopilot_on = autopilot.is_on
        self._strongest = configured_mode(self._chain.policies, autopilot)
        self.detection.judge_by(budget)

    @property
    def incidents(self) -> tuple[Incident, ...]:
        """The run's newest incidents, oldest first."""
        return self._incidents.all

    @property
    def incidents_in_all(self) -> int:
        """How many there were, those that the journal alone has included."""
        return len(self._incidents.all) + self._incidents.forgotten

    def incident(self, identity: str) -> Incident | None:
        """The incident of an id; None where there is none."""
        return self._incidents.get(identity)

    @property
    def history(self) -> StepHistory:
        """The losses of the run, and the steps at which it stood out."""
        return self.detection.history

    @property
    def reference(self) -> ReferenceTest | None:
        """The test against the run's reference, if it has one."""
        return self.detection.reference

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Every decision, oldest first."""
        return self._log.decisions

    @property
    def revisions(self) -> tuple[Revision, ...]:
        """Every LR revision, from 1 on."""
        return self._log.revisions

    @property
    def plans(self) -> tuple[LrPlan, ...]:
        """Every learning-rate plan, oldest first; at most the newest one goes on."""
        return self._log.plans

    @property
    def newest_revision(self) -> int:
        """The number of the newest LR revision; 0 before the first."""
        return self._log.newest_revision

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The newest checkpoints that are there to roll back to, in the order they were saved."""
        return tuple(self._checkpoints.values())

    @property
    def mode(self) -> Mode:
        """The run's own mode, or else the one of its policies, or of the autopilot, that reaches furthest."""
        return self._mode or self._strongest

    @property
    def own_mode(self) -> Mode | None:
        """The mode that was set for this run, if any."""
        return self._mode

    @property
    def multipliers(self) -> Mapping[str, float]:
        """The target set in force, or on its way there, by block."""
        return self._log.multipliers

    def observe(self, obs: Observation, now: float) -> Changes:
        """Take in the next step; `now` is in unix seconds.

        Most steps of a healthy run change nothing. They do not reach the decisions at all.
        """
        self._step = obs.step
        findings, changed = self.detection.see(obs)
        if changed:
            self._log.note_incidents(changed)
        if self._log.open:
            self._lifecycle.settle(obs, now)
            self._engine.expire_overtaken(self._mode, now)
            for made in self._requests.send_planned(obs.step, now):
                self._rollout.taken_over(made)
        if self._log.newest_revision or not self._reconciler.is_idle:
            self._reconciler.see(obs, now)
        # Without a revision there is nothing to ramp back.
        if findings or self._incidents.foreign or self._log.newest_revision:
            self._engine.act(findings, self.checkpoints, self._mode, obs.step, now)
        if self._log.plan is not None:
            self._rollout.step(obs.step, now)
        # Also where it is off by now: what it has raised is renewed, or else the trainer would end it unseen.
        if self._is_autopilot_on or self._log.newest_revision:
            self._autopilot.act(obs, self._mode, now)
        return self._log.take() if self._log.changed else NO_CHANGES

    def stalled(self, seconds: float, now: float) -> Changes:
        """Take in that no step has come for so long, though the agent is connected; may be told again and again."""
        findings, changed = self.detection.see_stall(self._step or 0, seconds)
        if changed:
            self._log.note_incidents(changed)
            self._engine.act(findings, self.checkpoints, self._mode, self._step or 0, now)
        return self._log.take() if self._log.changed else NO_CHANGES

    def stall_ended(self, why: str) -> Changes:
        """Close the incident of a run that had stalled, where one is open."""
        changed = self._incidents.close_named("RunStalled", why)
        if changed:
            self._log.note_incidents(changed)
        return self._log.take() if self._log.changed else NO_CHANGES

    def foreign_alert(
        self, identity: str, alert: ForeignAlert, severity: Severity, evidence: str, ended_at: float | None = None
    ) -> Changes:
        """Take in that an alert of another system fires or has ended; policies answer at the next step.

        Args:
            identity: The id of its incident. Telling the same twice changes nothing.
            alert: The alert.
            severity: How bad it is.
            evidence: What it says.
            ended_at: When it ended, in unix seconds, which never makes a policy act; None while it fires.

        Raises:
            OperatorError: As many alerts as a run may have fire already.
        """
        step = self._step or 0
        if ended_at is not None:
            self._log.note_incidents(self._incidents.end_foreign(alert.fingerprint, ended_at, step, "resolved"))
        elif len(self._incidents.foreign) >= MOST_FOREIGN and identity not in self._incidents.foreign:
            raise OperatorError(f"{MOST_FOREIGN} alerts of other systems fire on run {self._log.run} already")
        else:
            self._log.note_incidents(self._incidents.begin_foreign(identity, alert, severity, evidence, step))
        return self._log.take() if self._log.changed else NO_CHANGES

    def replay(self, obs: Observation) -> None:
        """Take in a journalled step: baselines and open alerts move on, nothing is decided and no alert opens."""
        self._step = obs.step
        self.detection.replay(obs)
        self._autopilot.note(obs)

    def recall(self, obs: Observation) -> None:
        """Take in a journalled step that the state of the baselines has already."""
        self._step = obs.step
        self._autopilot.note(obs)

    def command_result(self, result: ReportedResult, now: float) -> Changes:  # noqa: ARG002  the clock comes with all
        """Take in what the trainer made of a command; telling it twice changes nothing."""
        made = self._log.find(result.decision_id)
        if result.outcome == "applied" and made.revision:
            self._log.applied(made.revision, result.step)
        gone = self._unrestorable(made, result) if made.outcome in UNDER_WAY else []
        self._lifecycle.record_result(made, result)
        return self._without(gone)

    def replay_result(self, result: ReportedResult, now: float) -> Changes:  # noqa: ARG002  as `command_result`
        """Take in a result whose decision is journalled, while what became of its checkpoint may not be."""
        return self._without(self._unrestorable(self._log.find(result.decision_id), result))

    def note_checkpoints(self, report: CheckpointReport) -> Changes:
        """Take in what the trainer says of its checkpoints; telling it twice changes nothing.

        After a restore, checkpoints of later steps are of a timeline that was left: a rollback to one of them would
        bring back the very trouble that the restore left behind.
        """
        restored_to = math.inf if report.restored_to is None else report.restored_to
        left = [one.uri for one in self._checkpoints.values() if one.step > restored_to]
        gone = dict.fromkeys([*left, *(uri for uri in report.deleted if uri in self._checkpoints)])
        self._drop_checkpoints(gone)
        for checkpoint in report.saved:
            self._checkpoints.pop(checkpoint.uri, None)
            self._checkpoints[checkpoint.uri] = checkpoint
        saved = {checkpoint.uri: checkpoint.step for checkpoint in report.saved}
        old = dict.fromkeys(self._oldest_checkpoints())
        self._drop_checkpoints(old)
        return replace(self._log.take(), checkpoints={**gone, **saved, **old})

    def _oldest_checkpoints(self) -> list[str]:
        """The URIs of those that are more than are kept."""
        taken, over = sum(map(len, self._checkpoints)), []
        for number, uri in enumerate(self._checkpoints):
            if len(self._checkpoints) - number <= KEPT_CHECKPOINTS and taken <= KEPT_URIS:
                break
            over.append(uri)
            taken -= len(uri)
        return over

    def _unrestorable(self, made: Decision, result: ReportedResult) -> list[str]:
        """The URI of the checkpoint that could not be restored, unless it was saved anew."""
        if made.rollback is None or result.outcome != "failed" or result.is_of_a_cancellation:
            return []
        target = made.rollback.checkpoint
        return [target.uri] if self._checkpoints.get(target.uri) == target else []

    def _without(self, gone: Sequence[str]) -> Changes:
        """No longer offer the checkpoints of the URIs `gone`; proposals to go back to one of them expire."""
        self._drop_checkpoints(gone)
        return replace(self._log.take(), checkpoints=dict.fromkeys(gone))

    def _drop_checkpoints(self, gone: Iterable[str]) -> None:
        self._lifecycle.checkpoints_lost([self._checkpoints.pop(uri) for uri in gone])

    def set_reference(self, name: str, losses: Losses) -> Changes:
        """Hold the run against a reference from now on, its earlier steps too.

        Args:
            name: The reference's.
            losses: Its losses; they are read as they grow.
        """
        self._log.note_incidents(self._incidents.close_named("SilentFailure", "another reference was set"))
        self.detection.set_reference(name, losses)
        self._log.note_incidents(self.detection.judge_reference())
        return self._log.take()

    def clear_reference(self) -> Changes:
        """Hold the run against no reference any more."""
        self.detection.reference = None
        self._log.note_incidents(self._incidents.close_named("SilentFailure", "the reference was cleared"))
        return self._log.take()

    def restore_reference(self, name: str, losses: Losses) -> None:
        """Take up a journalled reference; the next step goes on with the incident that it may have."""
        self.detection.set_reference(name, losses)

    def reference_came(self, step: int) -> Changes:
        """Judge what the run did at a step to which its reference has come only now."""
        self._log.note_incidents(self.detection.reference_came(step))
        return self._log.take()

    def attribute(
        self, incident_id: str, shown: tuple[str, ...], absent: tuple[str, ...], replicas: tuple[str, ...] = ()
    ) -> Changes:
        """Note which runs with the same data stood out at an incident's onset, and which did not.

        Args:
            incident_id: The incident's id.
            shown: Names of the runs that did.
            absent: Names of those that did not.
            replicas: Of both, those whose losses were the same as this run's until the onset.
        """
        self._log.note_incidents([self._incidents.attribute(incident_id, shown, absent, replicas)])
        return self._log.take()

    def skipped_before(self, step: int) -> bool:
        """Whether a rollback has left out batches of steps before `step`, so that later ones have other data."""
        plans = (made.rollback for made in self.decisions if made.rollback and made.applied_step is not None)
        return any(plan.skip_from_step < plan.skip_to_step and plan.skip_from_step <= step for plan in plans)

    def tried(self, change: Callable[[], Changes]) -> Changes:
        """What a request about decisions, multipliers or plans would change; raises `OperatorError` as that does.

        Args:
            change: Makes the request of this controller. Nothing stays of what it does.
        """
        with self._log.trial():
            return change()

    def set_learning_rates(  # noqa: PLR0913, PLR0917  the fields of the operator's request
        self,
        multipliers: Mapping[str, float],
        ramp_steps: int,
        apply_at_step: int,
        author: str,
        reason: str,
        now: float,
        update_every: Mapping[str, int] | None = None,
    ) -> Changes:
        """Put an operator's multipliers and update intervals in force; raises `OperatorError` on what can't be."""
        operator = OperatorContext(author, reason, self._step, now)
        made = self._requests.set(multipliers, ramp_steps, apply_at_step, operator, update_every)
        if multipliers and made.revision:
            self._rollout.taken_over(made)
        return self._log.take()

    def undo(self, revision: int, author: str, reason: str, now: float) -> Changes:
        """Put the set before `revision` (0: the newest) in force again; raises `OperatorError`."""
        before = self._log.multipliers
        made = self._requests.undo(revision, OperatorContext(author, reason, self._step, now))
        if made.multipliers != before:
            self._rollout.taken_over(made)
        return self._log.take()

    def draft_plan(self, request: PlanRequest, estimates: Estimates, author: str, reason: str, now: float) -> LrPlan:
        """The learning-rate plan that would be started; raises `OperatorError` where it can't be."""
        return self._rollout.drafted(request, estimates, OperatorContext(author, reason, self._step, now))

    def change_plan(
        self, change: Callable[[PlanRollout, OperatorContext], None], author: str, reason: str, now: float
    ) -> Changes:
        """Start, promote, pause or abort a learning-rate plan, by a method of its rollout; raises `OperatorError`."""
        change(self._rollout, OperatorContext(author, reason, self._step, now))
        return self._log.take()

    def request_rollback(  # noqa: PLR0913, PLR0917  the fields of the operator's request
        self, to_step: int | None, skip_from: int, skip_to: int, author: str, reason: str, now: float
    ) -> Changes:
        """Ask for a rollback to the newest checkpoint at or before `to_step` (None: of all); raises `OperatorError`."""
        operator = OperatorContext(author, reason, self._step, now)
        self._requests.rollback(self.checkpoints, to_step, (skip_from, skip_to), operator)
        return self._log.take()

    def approve(self, decision_id: str, author: str, reason: str, now: float) -> Changes:
        """Send a proposal; raises `OperatorError` where it is none, or none any more."""
        self._expire_proposals(now)
        self._requests.approve(decision_id, OperatorContext(author, reason, self._step, now))
        return self._log.take()

    def reject(self, decision_id: str, author: str, reason: str, now: float) -> Changes:
        """Put a proposal away; raises `OperatorError` where it is none, or none any more."""
        self._requests.reject(decision_id, OperatorContext(author, reason, self._step, now))
        return self._log.take()

    def cancel(self, decision_id: str, author: str, reason: str, now: float) -> Changes:
        """Take a decision back; raises `OperatorError` where it is applied or has ended, or is being cancelled."""
        self._expire_proposals(now)
        self._requests.cancel(decision_id, OperatorContext(author, reason, self._step, now))
        return self._log.take()

    def _expire_proposals(self, now: float) -> None:
        """Also for an operator's answer, since a silent run has no steps."""
        self._lifecycle.expire_proposals(now)
        self._engine.expire_overtaken(self._mode, now)

    def acknowledge(self, incident_id: str, author: str, note: str) -> Changes:
        """Note that someone has seen an incident; raises `OperatorError` where there is none of that id."""
        try:
            seen = self._incidents.acknowledge(incident_id, f"{author}: {note}" if note else author)
        except KeyError:
            raise OperatorError(f"run {self._log.run} has no incident {incident_id}") from None
        self._log.note_incidents([seen])
        return self._log.take()

    def set_mode(
        self,
        mode: Mode,
        author: str = "",
        reason: str = "",
        now: float = 0.0,
    ) -> Changes:
        """Set the run's own mode, which overrides every policy's; in `observe` a plan does not go on by itself."""
        if mode not in MODES:
            raise OperatorError(f"mode {mode!r} is not allowed; allowed: {', '.join(MODES)}")
        self._mode = mode
        if mode == "observe":
            self._rollout.stop(OperatorContext(author, reason, self._step, now))
        return self._log.take()

    def restore(  # noqa: PLR0913, PLR0917  the kinds of records
        self,
        incidents: Iterable[Incident],
        decisions: Iterable[Decision],
        revisions: Iterable[Revision],
        checkpoints: Iterable[Checkpoint],
        mode: Mode | None,
        plans: Iterable[LrPlan] = (),
    ) -> None:
        """Take up journalled records; `replay` of the newest samples gives the rest."""
        self._incidents.restore(incidents)
        self._log.restore(decisions, tuple(revisions), plans)
        self.note_checkpoints(CheckpointReport(tuple(checkpoints)))
        self._mode = mode or self._mode
        self._reconciler.restart()

    def begin_anew(self) -> None:
        """Have it known that the trainer begins with every multiplier at 1, or with what its checkpoint has."""
        self._reconciler.begin_attempt()

    def take_over(self, earlier: RunController) -> None:
        """Carry on for a new attempt of the run, whose trainer begins anew."""
        log = earlier._log
        self.restore(earlier.incidents, log.decisions, log.revisions, earlier.checkpoints, earlier.own_mode, log.plans)
        self._incidents.forgotten = earlier._incidents.forgotten
        self.detection.take_over(earlier.detection)
        self._step = earlier._step
        self._reconciler.take_over(earlier._reconciler)
