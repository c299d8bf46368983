"""One run's state machine: observations, results and operators' wishes in, changed records and commands out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from sharpwatch.daemon.config import PolicyConfig
from sharpwatch.daemon.records import Alert, Checkpoint, CommandResult, Decision, Mode, Observation, Revision


@dataclass(frozen=True, slots=True)
class Changes:
    """Records that changed, to be upserted; `commands` are decisions to be sent once they are journalled."""

    alerts: tuple[Alert, ...] = ()
    decisions: tuple[Decision, ...] = ()
    revisions: tuple[Revision, ...] = ()
    commands: tuple[Decision, ...] = ()


class Supervisor:
    def __init__(
        self,
        run: str,
        *,
        blocks: Iterable[str],
        policies: Iterable[PolicyConfig],
        mode: Mode | None = None,  # the run's own; None: each policy's
        control: Literal["none", "lr", "rollback"] = "none",
        lr_bounds: tuple[float, float] = (0.1, 10.0),
        can_roll_back: bool = False,
    ) -> None: ...
    @property
    def alerts(self) -> tuple[Alert, ...]: ...
    @property
    def decisions(self) -> tuple[Decision, ...]: ...
    @property
    def revisions(self) -> tuple[Revision, ...]: ...
    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]: ...
    @property
    def mode(self) -> Mode | None: ...
    @property
    def multipliers(self) -> Mapping[str, float]: ...
    def observe(self, obs: Observation, now: float) -> Changes: ...
    def replay(self, obs: Observation) -> None: ...
    def command_result(self, result: CommandResult, now: float) -> Changes: ...
    def checkpoint(self, checkpoint: Checkpoint) -> None: ...
    def set_learning_rates(self, multipliers: Mapping[str, float], ramp_steps: int, apply_at_step: int, author: str, reason: str, now: float) -> Changes: ...
    def undo(self, revision: int, author: str, reason: str, now: float) -> Changes: ...
    def request_rollback(self, to_step: int | None, skip_from: int, skip_to: int, author: str, reason: str, now: float) -> Changes: ...
    def approve(self, decision_id: str, author: str, reason: str, now: float) -> Changes: ...
    def reject(self, decision_id: str, author: str, reason: str, now: float) -> Changes: ...
    def set_mode(self, mode: Mode, author: str = "", reason: str = "", now: float = 0.0) -> Changes: ...
    def restore(
        self,
        alerts: Iterable[Alert],
        decisions: Iterable[Decision],
        revisions: Iterable[Revision],
        checkpoints: Iterable[Checkpoint],
        mode: Mode | None,
    ) -> None: ...
