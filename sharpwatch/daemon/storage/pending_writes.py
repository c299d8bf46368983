"""What is still to be written to the journal, collected until the next transaction."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from sharpwatch.daemon.records import Alert, Changes, Checkpoint, Decision, Revision
from sharpwatch.daemon.storage.schema import AttemptRow, EstimateRow, ModeRow, TransitionRow

MAX_PENDING_ESTIMATES = 100_000  # the oldest go while the journal fails; they can be made again from samples


@dataclass(slots=True)
class PendingWrites:
    """Records that the journal does not have yet: each in its newest form, and of decisions every state.

    The pipeline collects changes here for the next transaction. If that fails, it puts the changes that came meanwhile
    on top with `add_newer`, and tries again with all of them.
    """

    attempts: dict[str, AttemptRow] = field(default_factory=dict)
    alerts: dict[str, Alert] = field(default_factory=dict)
    decisions: dict[str, Decision] = field(default_factory=dict)
    transitions: list[TransitionRow] = field(default_factory=list)
    revisions: dict[tuple[str, int], Revision] = field(default_factory=dict)
    checkpoints: dict[tuple[str, Checkpoint], None] = field(default_factory=dict)
    rewinds: dict[str, int] = field(default_factory=dict)  # run -> the step after which its checkpoints are void
    modes: list[ModeRow] = field(default_factory=list)
    estimates: deque[EstimateRow] = field(default_factory=lambda: deque(maxlen=MAX_PENDING_ESTIMATES))
    commands: dict[str, str] = field(default_factory=dict)  # decision id -> run

    def add(self, run: str, changes: Changes) -> None:
        """Adds what the controller of `run` changed."""
        now = time.time()
        self.transitions.extend(
            TransitionRow(run, made.id, now, made.outcome, made.detail, made.author, made.reason)
            for made in changes.transitions
        )
        self.alerts.update((alert.id, alert) for alert in changes.alerts)
        self.decisions.update((made.id, made) for made in changes.decisions)
        self.revisions.update(((run, one.revision), one) for one in changes.revisions)
        # No command may be sent before its decision is journalled, even if the decision itself did not change.
        self.decisions.update((made.id, made) for made in changes.commands if made.id not in self.decisions)
        self.commands.update((made.id, run) for made in changes.commands)

    def rewind(self, run: str, step: int) -> None:
        """Drops the checkpoints of `run` after `step`, to which it was restored."""
        self.rewinds[run] = min(step, self.rewinds.get(run, step))
        self.checkpoints = {(of, cp): None for of, cp in self.checkpoints if of != run or cp.step <= step}

    def add_newer(self, newer: PendingWrites) -> None:
        """Adds all of `newer`, whose records replace those of the same id here."""
        self.attempts.update(newer.attempts)
        self.alerts.update(newer.alerts)
        self.decisions.update(newer.decisions)
        self.transitions.extend(newer.transitions)
        self.revisions.update(newer.revisions)
        for run, step in newer.rewinds.items():
            self.rewind(run, step)
        self.checkpoints.update(newer.checkpoints)
        self.modes.extend(newer.modes)
        self.estimates.extend(newer.estimates)
        self.commands.update(newer.commands)
