"""The values that the daemon keeps: observations, findings, incidents, decisions and revisions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.wire import Doubles, Floats, Ints

Mode = Literal["observe", "advise", "enforce"]
DecisionMode = Literal["observe", "advise", "enforce", "operator"]
Severity = Literal["warning", "critical"]
DetectedAlert = Literal[
    "WeightJump",
    "WeightGrowth",
    "RateRaise",
    "RateZero",
    "SettingsChanged",
    "OptimizerState",
    "NonFinite",
    "RankDiffers",
    "LossDrop",
    "LossSpike",
    "DeadBlock",
    "UpdateRmsSpike",
    "GradientSpike",
    "StabilityLimit",
    "SharpnessSpike",
    "RunStalled",
    "SilentFailure",
    "AttentionGrowth",
]
AlertName = DetectedAlert | Literal["ForeignAlert"]
DetectedCause = Literal[
    "data",
    "learning-rate",
    "damaged-weight",
    "optimizer-state",
    "instability",
    "silent",
    "non-finite",
    "stalled",
]
Cause = DetectedCause | Literal["foreign"]
# What each alert says is wrong, those first that explain others which begin at the same step.
CAUSES: Mapping[AlertName, Cause] = {
    "WeightJump": "damaged-weight",
    "RateRaise": "learning-rate",
    "RateZero": "learning-rate",
    "SettingsChanged": "optimizer-state",
    "OptimizerState": "optimizer-state",
    "NonFinite": "non-finite",
    "RankDiffers": "data",
    "LossDrop": "data",
    "LossSpike": "data",
    "DeadBlock": "silent",
    "WeightGrowth": "instability",
    "UpdateRmsSpike": "instability",
    "GradientSpike": "instability",
    "StabilityLimit": "instability",
    "SharpnessSpike": "instability",
    "RunStalled": "stalled",
    "SilentFailure": "silent",
    "AttentionGrowth": "instability",
}
Action = Literal["notify", "scale_lr", "set_lr", "ramp_back", "rollback"]
CANCELS = "cancel-"  # before a decision's id: the id of the command that cancels its command
# A decision is a draft until it is recorded, and then never again. `decisions.lifecycle` has the transitions.
Outcome = Literal[
    "draft",
    "observed",
    "proposed",
    "approved",
    "rejected",
    "refused",
    "planned",
    "sent",
    "applied",
    "recovered",
    "worse",
    "no-effect",
    "inconclusive",
    "failed",
    "expired",
    "cancelled",
]


_NOTHING: Ints = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class LayerTap:
    """The statistics of one step by layer block; every array is [L], NaN where nothing was measured.

    Attributes:
        second_moment: Mean of Adam's bias-corrected second moment before the step.
        clip_factor: The gradient's norm after clipping over that before, which `gradient_norm` is; NaN if unknown.
        changed_parameter: The parameter that has moved the weight norm the most since the sample before, by its index
            among those of the layer block; -1 where there is none. Empty if the agent does not tell.
        non_finite_parameter: The same of the one with the most entries of the gradient that are not finite.
        zero_gradients: How many parameters have a gradient of exactly zero; empty where none has.
        zero_parameter: The one of these; -1 where there are several or none.
    """

    gradient_norm: Floats
    weight_norm: Floats
    update_rms: Floats
    non_finite: Ints
    learning_rate: Floats
    lr_multiplier: Floats
    second_moment: Floats
    clip_factor: float
    changed_parameter: Ints = field(default_factory=lambda: _NOTHING)
    non_finite_parameter: Ints = field(default_factory=lambda: _NOTHING)
    zero_gradients: Ints = field(default_factory=lambda: _NOTHING)
    zero_parameter: Ints = field(default_factory=lambda: _NOTHING)


@dataclass(frozen=True, slots=True)
class OptimizerGroup:
    """The settings of a parameter group, and the steps that its state has seen; None without a state."""

    settings: Mapping[str, float]
    steps: int | None


@dataclass(frozen=True, slots=True)
class ProbedStep:
    """A `direction` probe, and the multipliers by which its step u was taken.

    Attributes:
        parts: u_bᵀ(Hu)_b by block, without those that rest at this step.
        curvature: uᵀHu.
        descent: gᵀu.
        multipliers: By block.
    """

    parts: Mapping[str, float]
    curvature: float
    descent: float
    multipliers: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Observation:
    """One step of a run, as the detectors see it.

    Attributes:
        step: Its number.
        time: Unix seconds, by the trainer's clock.
        loss: The loss, if known.
        layers: The statistics of its layer blocks.
        optimizer_groups: By number of the optimizer and of the group; empty where they are as before.
        stability: Directional stability ratio of the probe of this step, not of a window.
        no_descent: The probe ran, but g·d <= 0, where the ratio is undefined.
        block_stability: The ratio of block types.
        probed: The curvature along the step and each block's part of it; None without a probe that has them.
        attention: The scale of attention logits by layer block [L], NaN where there is none; None without a probe.
        multipliers: The learning-rate multipliers in use, by block type.
        restored: A checkpoint was restored since the step before.
        traces: Of the `gnb` probe of this step, by draw and layer block [draws, L]; None without one.
        rank_losses: The loss of each of several ranks, infinite where it is not finite, NaN where a rank had none.
        update_every: By block type, the number that divides the steps at which it is updated; 1 where it is not named.
    """

    step: int
    time: float
    loss: float | None = None
    layers: LayerTap | None = None
    optimizer_groups: Mapping[tuple[int, int], OptimizerGroup] = field(default_factory=dict)
    stability: Estimate | None = None
    no_descent: bool = False
    block_stability: Mapping[str, Estimate] = field(default_factory=dict)
    probed: ProbedStep | None = None
    attention: Doubles | None = None
    multipliers: Mapping[str, float] = field(default_factory=dict)
    restored: bool = False
    traces: Floats | None = None
    rank_losses: Floats | None = None
    update_every: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PairOrder:
    """How two block types stand that are neighbours in the order of sharpness.

    Attributes:
        low, high: The less and the more sharp one, as is expected.
        inverted: Whether `low` is the sharper one, by two standard errors.
        since: The step from which they stand so.
        standard_errors: By which `high` is the sharper one at the newest probe.
    """

    low: str
    high: str
    inverted: bool
    since: int
    standard_errors: float


@dataclass(frozen=True, slots=True)
class Finding:
    """What one detector finds at one step.

    Attributes:
        name: Of the alert.
        severity: How sure it is, by the budget of false alarms.
        evidence: In words.
        step: At which it was found.
        onset: At which it began.
        layer_blocks: Which layer blocks show it, worst first, as "layers.3.qk"; empty for the whole model.
        is_exact: Whether it is read off directly, with an onset that is certain, rather than from what stands out.
        span: Samples that it is a mean over; the onset is known the better, the fewer they are.
        parameter: The parameter of the first layer block that shows it, by its whole name; empty where not known.
        rank: The rank that differs from the others; None where no single one does.
    """

    name: AlertName
    severity: Severity
    evidence: str
    step: int
    onset: int
    layer_blocks: tuple[str, ...] = ()
    is_exact: bool = False
    span: int = 1
    parameter: str = ""
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class ForeignAlert:
    """An alert that another system raised, by Alertmanager's or Grafana's webhook.

    Attributes:
        name: Its label `alertname`, which policies name.
        fingerprint: What tells it from others of that name.
        starts_at: When it began to fire, in unix seconds by its sender's clock.
    """

    name: str
    fingerprint: str
    starts_at: float


@dataclass(frozen=True, slots=True)
class Incident:
    """Findings that hang together, or an alert of another system.

    Attributes:
        id: Unique in the daemon.
        run: Name of the run.
        name: The alert of the finding that explains the others; `names` has all, in the order they came.
        cause: What is wrong.
        severity: The highest of its findings'.
        blocks: The block types that it is about, the likeliest culprit's first; empty for the whole model.
        layer_blocks: The same by layer block.
        evidence: The explaining finding's, then of each other alert the first.
        onset: The step at which it began.
        first_step: The step at which it was opened.
        last_step: The step of its newest finding.
        active: Whether it is open.
        closed: Why it was closed; empty while it is open.
        acknowledged: Who has seen it, and what they noted; empty for nobody.
        in_twins: Runs with the same data that stood out at the onset, too.
        not_in_twins: Those that did not.
        replicas: Of both, the runs whose losses were the same as this run's until the onset.
        span: Samples that the explaining finding is a mean over; 0 where a journal of an earlier version has none.
        parameter: The parameter of the first layer block that it most likely comes from; empty where not known.
        rank: The rank that differs from the others; None where no single one does.
        contained_step: The step from which an action keeps the run well though the cause stays; 0 for none.
        foreign: The alert of another system that it is, with `name` "ForeignAlert"; None for findings.
    """

    id: str
    run: str
    name: AlertName
    names: tuple[AlertName, ...]
    cause: Cause
    severity: Severity
    blocks: tuple[str, ...]
    layer_blocks: tuple[str, ...]
    evidence: tuple[str, ...]
    onset: int
    first_step: int
    last_step: int
    active: bool
    closed: str = ""
    acknowledged: str = ""
    in_twins: tuple[str, ...] = ()
    not_in_twins: tuple[str, ...] = ()
    replicas: tuple[str, ...] = ()
    span: int = 0
    parameter: str = ""
    rank: int | None = None
    contained_step: int = 0
    foreign: ForeignAlert | None = None

    @property
    def title(self) -> str:
        """The name by which people know it."""
        return self.name if self.foreign is None else self.foreign.name

    def is_same_trouble(self, other: Incident) -> bool:
        """Whether both have one cause; alerts of other systems have that in common only with those of their name."""
        return self.cause == other.cause and (self.foreign is None or self.title == other.title)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that a run can be rolled back to; its URI is no other checkpoint's."""

    step: int
    uri: str


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """What a trainer says of its checkpoints: those saved and deleted, and the step to which it was restored."""

    saved: tuple[Checkpoint, ...] = ()
    deleted: tuple[str, ...] = ()  # their URIs
    restored_to: int | None = None


@dataclass(frozen=True, slots=True)
class RollbackPlan:
    """A rollback to `checkpoint` that leaves out the batches of steps [skip_from_step, skip_to_step)."""

    checkpoint: Checkpoint
    skip_from_step: int
    skip_to_step: int


RENEWED = "raises renewed"  # the reason of a decision that puts in force what is in force


@dataclass(frozen=True, slots=True)
class Decision:
    """A decision of a policy about an incident, or of an operator. It is kept for ever.

    `alert_id` is the incident's id, `alert_name` the name that it had then. `cancelled_by` is who has asked the trainer
    to cancel a command that was sent, empty for nobody; the outcome is "cancelled" once the trainer has done so.
    """

    id: str
    run: str
    made_at: float  # unix seconds
    step: int
    action: Action
    mode: DecisionMode
    outcome: Outcome
    policy: str = ""
    alert_id: str = ""
    alert_name: str = ""
    guard: str = "ok"
    detail: str = ""
    # The whole set, not the difference: a command then means the same, whichever command came before it.
    multipliers: Mapping[str, float] = field(default_factory=dict)  # of every block, as they would be in force
    ramp_steps: int = 0
    ttl_steps: int = 0
    apply_at_step: int = 0
    expires_at_step: int = 0
    rollback: RollbackPlan | None = None
    applied_step: int | None = None
    revision: int = 0
    author: str = ""
    reason: str = ""
    # By block how many times too high the trainer's own rate is; the multipliers make up for it, and go with it.
    makes_up_for: Mapping[str, float] = field(default_factory=dict)
    cancelled_by: str = ""
    cancel_reason: str = ""
    # Every how many steps a block is updated, 1 where it is not named; None keeps what is in force.
    update_every: Mapping[str, int] | None = None
    plan: str = ""  # id of the plan that it is a stage of, or takes back

    @property
    def is_renewal(self) -> bool:
        """Whether it changes nothing, and only keeps the trainer from ending raises by their time-out."""
        return self.reason == RENEWED and self.mode != "operator"


@dataclass(frozen=True, slots=True)
class Revision:
    """A numbered set of block multipliers, and of update intervals; a block that is not named has 1.

    Attributes:
        base: The revision whose set it was made from; 0 for none. What it does not change is that one's.
        undoes: The revision that it takes back; 0 for none.
    """

    run: str
    revision: int
    multipliers: Mapping[str, float]
    author: str
    reason: str
    made_at: float
    decision_id: str
    applied_step: int | None = None
    undoes: int = 0
    update_every: Mapping[str, int] = field(default_factory=dict)
    base: int = 0


PlanState = Literal["running", "waiting", "paused", "done", "aborted"]


@dataclass(frozen=True, slots=True)
class LrPlan:
    """Multipliers that are put in force in stages, at an operator's word. It is kept for ever.

    `decisions.lr_plan` has the states and what leads from one to the next.

    Attributes:
        id: Unique in the daemon.
        run: Name of the run.
        name: "paper", "measured", "curvature-share", or what the operator calls a set of their own.
        author: Who started it.
        reason: Why.
        made_at: When, in unix seconds.
        target: The multipliers at its end, of the blocks that it changes.
        before: Those before it, of the same blocks.
        stages: The blocks of each stage.
        ramp_steps: Over how many steps each stage moves.
        automatic: Whether the next stage follows without being promoted.
        state: Where it stands.
        detail: Why it stands there.
        stages_done: How many stages are over.
        decisions: Ids of the decisions on its stages, the newest last.
        under_way: Id of the decision on the stage that is not judged yet; empty where there is none.
        changed_by: Who brought it into its state; empty for the daemon.
        changed_reason: Why they did.
    """

    id: str
    run: str
    name: str
    author: str
    reason: str
    made_at: float
    target: Mapping[str, float]
    before: Mapping[str, float]
    stages: tuple[tuple[str, ...], ...]
    ramp_steps: int
    automatic: bool
    state: PlanState = "running"
    detail: str = ""
    stages_done: int = 0
    decisions: tuple[str, ...] = ()
    under_way: str = ""
    changed_by: str = ""
    changed_reason: str = ""

    @property
    def is_active(self) -> bool:
        """Whether it goes on, or may."""
        return self.state not in ("done", "aborted")


@dataclass(frozen=True, slots=True)
class Silence:
    """Keeps policies from acting on the incidents that it matches, for some time. It is kept for ever.

    Attributes:
        id: Unique in the daemon.
        author: Who added it.
        comment: Why.
        made_at: When, in unix seconds.
        ends_at: Until when, in unix seconds.
        run: The run whose incidents it matches; empty for all runs, those that begin later too.
        alert: An alert that is among the incident's, or the name of another system's; empty for any.
        cause: The incident's cause; empty for any.
        policy: The policy that it keeps from acting; empty for all.
        expired_at: When an operator ended it before its time, in unix seconds; 0 for never.
        expired_by: Who did.
        expired_reason: Why.
    """

    id: str
    author: str
    comment: str
    made_at: float
    ends_at: float
    run: str = ""
    alert: str = ""
    cause: str = ""
    policy: str = ""
    expired_at: float = 0.0
    expired_by: str = ""
    expired_reason: str = ""

    def is_active(self, now: float) -> bool:
        """Whether it holds at `now`, in unix seconds."""
        return not self.expired_at and now < self.ends_at

    def matches(self, incident: Incident, policy: str) -> bool:
        """Whether it keeps a policy from acting on an incident while it is active."""
        return (
            self.run in {"", incident.run}
            and self.alert in {"", incident.title, *incident.names}
            and self.cause in {"", incident.cause}
            and self.policy in {"", policy}
        )


@dataclass(frozen=True, slots=True)
class ReportedResult:
    """The trainer's answer to a command; `command_id` is the id of the decision.

    To a command that was to cancel another only a refusal is an answer, and has `CANCELS` before the decision's id.
    """

    command_id: str
    outcome: Literal["applied", "refused", "expired", "failed", "cancelled"]
    step: int
    detail: str = ""
    unchanged_blocks: tuple[str, ...] = ()

    @property
    def is_of_a_cancellation(self) -> bool:
        """Whether it is of a command that was to cancel that of the decision."""
        return self.command_id.startswith(CANCELS)

    @property
    def decision_id(self) -> str:
        """The decision's id."""
        return self.command_id.removeprefix(CANCELS)


@dataclass(frozen=True, slots=True)
class Changes:
    """Records that changed and are to be journalled.

    Attributes:
        incidents: Changed incidents.
        decisions: Changed decisions, each as it is now.
        revisions: Changed LR revisions.
        commands: Decisions whose command is to be sent once they are journalled.
        transitions: The changed decisions in every state they had in between, in order.
        checkpoints: By URI the step of each checkpoint that was saved, and None for each that is gone.
        plans: Changed plans in every state they had in between, in order.
    """

    incidents: tuple[Incident, ...] = ()
    decisions: tuple[Decision, ...] = ()
    revisions: tuple[Revision, ...] = ()
    commands: tuple[Decision, ...] = ()
    transitions: tuple[Decision, ...] = ()
    checkpoints: Mapping[str, int | None] = field(default_factory=dict)
    plans: tuple[LrPlan, ...] = ()


NO_CHANGES = Changes()
