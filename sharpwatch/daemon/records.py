"""The values that the daemon keeps: observations, findings, alerts, decisions and revisions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sharpwatch.curvature.statistics.estimate import Estimate

Mode = Literal["observe", "advise", "enforce"]
DecisionMode = Literal["observe", "advise", "enforce", "operator"]
Severity = Literal["warning", "critical"]
Action = Literal["notify", "scale_lr", "set_lr", "ramp_back", "rollback"]
# A decision is a draft until it is recorded, and then never again. `decisions.lifecycle` has the transitions.
Outcome = Literal[
    "draft",
    "observed",
    "proposed",
    "approved",
    "rejected",
    "refused",
    "sent",
    "applied",
    "recovered",
    "failed",
    "expired",
]


@dataclass(frozen=True, slots=True)
class Observation:
    """One step of a run, as the detectors see it. Mappings are by block type; a key that is absent was not measured."""

    step: int
    time: float  # unix seconds, the trainer's clock
    loss: float | None = None
    gradient_norm: Mapping[str, float] = field(default_factory=dict)
    weight_norm: Mapping[str, float] = field(default_factory=dict)
    update_rms: Mapping[str, float] = field(default_factory=dict)
    non_finite: Mapping[str, int] = field(default_factory=dict)
    # Directional stability ratio of the probe of this step, not of a window: whole model, and by block.
    stability: Estimate | None = None
    no_descent: bool = False  # the probe ran, but g.d <= 0, where the ratio is undefined
    block_stability: Mapping[str, Estimate] = field(default_factory=dict)
    multipliers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finding:
    """The finding of one detector at one step; `blocks` are worst first."""

    name: str
    blocks: tuple[str, ...]
    severity: Severity
    evidence: str
    step: int


@dataclass(frozen=True, slots=True)
class Alert:
    """Findings of one detector at steps close to each other."""

    id: str
    run: str
    name: str
    blocks: tuple[str, ...]
    severity: Severity
    evidence: str
    first_step: int
    last_step: int
    active: bool


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


@dataclass(frozen=True, slots=True)
class Decision:
    """A decision of a policy about an alert, or of an operator. It is kept for ever."""

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


@dataclass(frozen=True, slots=True)
class Revision:
    """A numbered set of block multipliers; a block that is not named has 1."""

    run: str
    revision: int
    multipliers: Mapping[str, float]
    author: str
    reason: str
    made_at: float
    decision_id: str
    applied_step: int | None = None
    undoes: int = 0


@dataclass(frozen=True, slots=True)
class ReportedResult:
    """The trainer's answer to a command; `command_id` is the id of the decision."""

    command_id: str
    outcome: Literal["applied", "refused", "expired", "failed"]
    step: int
    detail: str = ""
    unchanged_blocks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Changes:
    """Records that changed and are to be journalled.

    Attributes:
        alerts: Changed alerts.
        decisions: Changed decisions, each as it is now.
        revisions: Changed LR revisions.
        commands: Decisions whose command is to be sent once they are journalled.
        transitions: The changed decisions in every state they had in between, in order.
        checkpoints: By URI the step of each checkpoint that was saved, and None for each that is gone.
    """

    alerts: tuple[Alert, ...] = ()
    decisions: tuple[Decision, ...] = ()
    revisions: tuple[Revision, ...] = ()
    commands: tuple[Decision, ...] = ()
    transitions: tuple[Decision, ...] = ()
    checkpoints: Mapping[str, int | None] = field(default_factory=dict)


NO_CHANGES = Changes()
