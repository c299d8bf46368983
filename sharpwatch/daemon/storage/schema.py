"""The first versions of the journal's tables, the records in them, and the records that are still to be written.

A journal of an older version is upgraded when it is opened (`migrations`). A field added to a record must have a
default, because older journals hold the record without it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Container, Mapping, Sized
from dataclasses import dataclass, field, replace

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.records import Changes, Checkpoint, Decision, Incident, LrPlan, Mode, Revision, Silence

_TABLES = """
CREATE TABLE attempts (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, attempt TEXT NOT NULL UNIQUE, hello BLOB NOT NULL,
    acknowledged INTEGER NOT NULL DEFAULT 0, seen_at REAL NOT NULL, closed INTEGER NOT NULL DEFAULT 0);
CREATE INDEX attempts_by_run ON attempts (run, id);
CREATE TABLE samples (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, attempt TEXT NOT NULL, sequence INTEGER NOT NULL,
    step INTEGER NOT NULL, payload BLOB NOT NULL, UNIQUE (attempt, sequence));
CREATE INDEX samples_by_run ON samples (run, id);
CREATE TABLE alerts (id TEXT PRIMARY KEY, run TEXT NOT NULL, first_step INTEGER NOT NULL, record TEXT NOT NULL);
CREATE INDEX alerts_by_run ON alerts (run);
CREATE TABLE decisions (
    id TEXT PRIMARY KEY, run TEXT NOT NULL, made_at REAL NOT NULL, outcome TEXT NOT NULL, record TEXT NOT NULL);
CREATE INDEX decisions_by_run ON decisions (run, made_at);
CREATE TABLE revisions (
    run TEXT NOT NULL, revision INTEGER NOT NULL, record TEXT NOT NULL, PRIMARY KEY (run, revision));
CREATE TABLE checkpoints (
    run TEXT NOT NULL, step INTEGER NOT NULL, uri TEXT NOT NULL, PRIMARY KEY (run, step, uri));
CREATE TABLE modes (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, mode TEXT NOT NULL, author TEXT NOT NULL, reason TEXT NOT NULL,
    made_at REAL NOT NULL);
CREATE TABLE estimates (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, quantity TEXT NOT NULL, block TEXT NOT NULL, estimator TEXT NOT NULL,
    step INTEGER NOT NULL, value REAL, stderr REAL, draws INTEGER NOT NULL);
CREATE INDEX estimates_by_run ON estimates (run, id);
"""
_TRANSITIONS = """
CREATE TABLE transitions (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, decision TEXT NOT NULL, at REAL NOT NULL, outcome TEXT NOT NULL,
    detail TEXT NOT NULL, author TEXT NOT NULL, reason TEXT NOT NULL);
CREATE INDEX transitions_by_decision ON transitions (decision, id);
"""
_RESIDUALS = """
ALTER TABLE estimates ADD COLUMN residual REAL;
ALTER TABLE estimates ADD COLUMN method TEXT NOT NULL DEFAULT '';
"""
_BASELINES = """
CREATE TABLE baselines (run TEXT PRIMARY KEY, attempt TEXT NOT NULL, sequence INTEGER NOT NULL, state BLOB NOT NULL);
"""
_REFERENCES = """
CREATE TABLE run_references (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, name TEXT NOT NULL, losses BLOB, author TEXT NOT NULL,
    reason TEXT NOT NULL, made_at REAL NOT NULL);
CREATE INDEX run_references_by_run ON run_references (run, id);
"""
_SILENCES = """
CREATE TABLE silences (id TEXT PRIMARY KEY, made_at REAL NOT NULL, record TEXT NOT NULL);
"""
_PLANS = """
CREATE TABLE plans (id TEXT PRIMARY KEY, run TEXT NOT NULL, made_at REAL NOT NULL, record TEXT NOT NULL);
CREATE INDEX plans_by_run ON plans (run);
"""
_NOTIFICATIONS = """
CREATE TABLE notifications (fingerprint TEXT PRIMARY KEY, alert TEXT NOT NULL, waits INTEGER NOT NULL);
"""
_REQUESTS = """
CREATE TABLE requests (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, at REAL NOT NULL, action TEXT NOT NULL, subject TEXT NOT NULL,
    outcome TEXT NOT NULL, detail TEXT NOT NULL, author TEXT NOT NULL, reason TEXT NOT NULL);
CREATE INDEX requests_by_run ON requests (run, at);
"""
# The versions before 10, which `migrations` brings up to date: a journal of version n has the first n.
SCHEMAS = (_TABLES, _TRANSITIONS, _RESIDUALS, _BASELINES, _REFERENCES, _SILENCES, _PLANS, _NOTIFICATIONS, _REQUESTS)
SCHEMA_VERSION = 11
COUNTED = 10  # the first version that counts commits, and has sharpwatch's application id
# How an attempt ended, in `attempts.closed`; 0 while that is not known. Earlier versions take the second for the first.
CLOSED, KILLED = 1, 2
FIRST_TABLES = {"attempts", "samples", "alerts", "decisions", "revisions"}  # in a journal of any version


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """An attempt of a run; `hello` is its serialized Hello, `seen_at` the unix seconds of that."""

    run: str
    attempt: str
    hello: bytes
    seen_at: float


@dataclass(frozen=True, slots=True)
class SampleRow:
    """A sample as it was received; `payload` is the serialized SessionRequest."""

    run: str
    attempt: str
    sequence: int
    step: int
    payload: bytes
    received_at: float  # unix seconds
    closing: bool = False


@dataclass(frozen=True, slots=True)
class TransitionRow:
    """One state of a decision, entered at unix seconds `at`; `author` and `reason` are those of the change.

    Or of a plan: `decision` is its id then, and `outcome` its state.
    """

    run: str
    decision: str
    at: float
    outcome: str
    detail: str
    author: str
    reason: str


@dataclass(frozen=True, slots=True)
class ModeRow:
    """A mode that an operator set for a run."""

    run: str
    mode: Mode
    author: str
    reason: str
    made_at: float


@dataclass(frozen=True, slots=True)
class ReferenceRow:
    """A reference that an operator set for a run.

    Attributes:
        name: A run of the daemon, or where `losses` are from; empty for none any more.
        losses: The state of the losses of a recorded run; empty for those of a run of the daemon.
    """

    run: str
    name: str
    losses: bytes
    author: str
    reason: str
    made_at: float


@dataclass(frozen=True, slots=True)
class RequestRow:
    """What an operator asked for at unix seconds `at`, that is no decision, or was refused.

    Attributes:
        run: The run; empty where it is not of one.
        action: The command.
        subject: Id of the decision, incident or silence that it is about; empty where it is about none.
        outcome: What became of it.
        detail: What was asked for, or why it was refused.
    """

    run: str
    at: float
    action: str
    subject: str
    outcome: str
    detail: str
    author: str
    reason: str


@dataclass(frozen=True, slots=True)
class NotificationRow:
    """A notification that waits to be sent, or of what goes on; `alert` is what is told of it, as JSON."""

    fingerprint: str
    alert: str
    waits: bool


@dataclass(frozen=True, slots=True)
class EstimateRow:
    """An estimate; `block` is empty for the whole model."""

    run: str
    quantity: str
    block: str
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class BaselinesRow:
    """The state of a run's baselines after the sample `sequence` of an attempt."""

    run: str
    attempt: str
    sequence: int
    state: bytes


@dataclass(frozen=True, slots=True)
class StoredAttempt:
    """An attempt read from the journal, which has all its samples up to the sequence `acknowledged`."""

    attempt: str
    hello: bytes
    acknowledged: int
    seen_at: float
    closed: bool
    killed: bool = False  # its process ended without a farewell


@dataclass(frozen=True, slots=True)
class StoredRun:
    """All records of a run, each kind oldest first."""

    run: str
    attempts: tuple[StoredAttempt, ...]
    samples: tuple[SampleRow, ...]
    incidents: tuple[Incident, ...]
    decisions: tuple[Decision, ...]
    revisions: tuple[Revision, ...]
    checkpoints: tuple[Checkpoint, ...]
    mode: ModeRow | None
    baselines: BaselinesRow | None = None
    reference: ReferenceRow | None = None
    plans: tuple[LrPlan, ...] = ()
    outcomes: tuple[tuple[str, str], ...] = ()  # that decisions came to, by id, in order; also those they have left


DRAWN_QUANTITIES = ("sharpness", "stability_ratio")  # of which a history has the estimates


@dataclass(frozen=True, slots=True)
class StoredHistory:
    """The newest samples and estimates of a run, oldest first: each sample's attempt, counted from 1, and payload."""

    samples: tuple[tuple[int, bytes], ...]
    estimates: tuple[EstimateRow, ...]


MAX_PENDING_ESTIMATES = 100_000  # the oldest are dropped while the journal fails; samples can give them again
_RECORD_BYTES = 2_000  # that a record takes about


@dataclass(slots=True)
class PendingWrites:
    """Records that the journal does not have yet: the newest state of each, and every state of a decision.

    The pipeline collects changes here for the next transaction. If that fails, it adds the changes that came meanwhile
    with `add_newer`, and tries again with all of them.
    """

    attempts: dict[str, AttemptRow] = field(default_factory=dict)
    incidents: dict[str, Incident] = field(default_factory=dict)
    decisions: dict[str, Decision] = field(default_factory=dict)
    # A list, where the others are dicts: decisions are replaced by their newest state, the audit keeps every one.
    transitions: list[TransitionRow] = field(default_factory=list)
    revisions: dict[tuple[str, int], Revision] = field(default_factory=dict)
    checkpoints: dict[tuple[str, str], int | None] = field(default_factory=dict)  # (run, URI) -> step; None: gone
    modes: list[ModeRow] = field(default_factory=list)
    estimates: deque[EstimateRow] = field(default_factory=lambda: deque(maxlen=MAX_PENDING_ESTIMATES))
    commands: dict[str, str] = field(default_factory=dict)  # decision id -> run
    baselines: dict[str, BaselinesRow] = field(default_factory=dict)
    references: list[ReferenceRow] = field(default_factory=list)
    silences: dict[str, Silence] = field(default_factory=dict)
    plans: dict[str, LrPlan] = field(default_factory=dict)
    requests: list[RequestRow] = field(default_factory=list)
    killed: dict[str, str] = field(default_factory=dict)  # attempt -> run

    def add(self, run: str, changes: Changes) -> None:
        """Adds what the controller of `run` changed."""
        now = time.time()
        self.transitions.extend(
            TransitionRow(run, made.id, now, made.outcome, made.detail, made.author, made.reason)
            for made in changes.transitions
        )
        self.transitions.extend(
            TransitionRow(run, plan.id, now, plan.state, plan.detail, plan.changed_by, plan.changed_reason)
            for plan in changes.plans
        )
        self.plans.update((plan.id, plan) for plan in changes.plans)
        self.incidents.update((incident.id, incident) for incident in changes.incidents)
        self.decisions.update((made.id, made) for made in changes.decisions)
        self.revisions.update(((run, one.revision), one) for one in changes.revisions)
        self._put_checkpoints({(run, uri): step for uri, step in changes.checkpoints.items()})
        # No command may be sent before its decision is journalled, even if the decision itself did not change.
        self.decisions.update((made.id, made) for made in changes.commands if made.id not in self.decisions)
        self.commands.update((made.id, run) for made in changes.commands)

    @property
    def nbytes(self) -> int:
        """About how many bytes the records take that nothing else bounds, unlike estimates and states of baselines."""
        kinds: tuple[Sized, ...] = (
            *(self.incidents, self.decisions, self.transitions, self.revisions, self.checkpoints, self.modes),
            *(self.commands, self.silences, self.plans, self.requests, self.killed),
        )
        return (
            sum(map(len, kinds)) * _RECORD_BYTES
            + sum(len(row.hello) for row in self.attempts.values())
            + sum(len(row.losses) for row in self.references)
        )

    def has(self, run: str) -> bool:
        """Whether it has records of a run; estimates and the state of baselines can be made again."""
        kinds = (
            *(self.attempts.values(), self.incidents.values(), self.decisions.values(), self.transitions),
            *(self.revisions.values(), self.modes, self.references, self.plans.values(), self.requests),
        )
        if any(row.run == run for rows in kinds for row in rows):
            return True
        return run in {*self.commands.values(), *self.killed.values()} or any(of == run for of, _ in self.checkpoints)

    def drop(self, run: str) -> None:
        """Drops the records of a run."""
        for name in ("attempts", "incidents", "decisions", "plans", "baselines"):
            records = getattr(self, name)
            setattr(self, name, {key: row for key, row in records.items() if row.run != run})
        for name in ("transitions", "modes", "references", "requests"):
            setattr(self, name, [row for row in getattr(self, name) if row.run != run])
        self.revisions = {key: row for key, row in self.revisions.items() if row.run != run}
        self.checkpoints = {key: step for key, step in self.checkpoints.items() if key[0] != run}
        for name in ("commands", "killed"):
            setattr(self, name, {key: of for key, of in getattr(self, name).items() if of != run})
        kept = [row for row in self.estimates if row.run != run]
        self.estimates.clear()
        self.estimates.extend(kept)

    def add_newer(self, newer: PendingWrites) -> None:
        """Adds all of `newer`, whose records replace those of the same id here."""
        self.attempts.update(newer.attempts)
        self.incidents.update(newer.incidents)
        self.decisions.update(newer.decisions)
        self.transitions.extend(newer.transitions)
        self.revisions.update(newer.revisions)
        self._put_checkpoints(newer.checkpoints)
        self.modes.extend(newer.modes)
        self.estimates.extend(newer.estimates)
        self.commands.update(newer.commands)
        self.baselines.update(newer.baselines)
        self.references.extend(newer.references)
        self.silences.update(newer.silences)
        self.plans.update(newer.plans)
        self.requests.extend(newer.requests)
        self.killed.update(newer.killed)

    def without(self, written: Container[int]) -> PendingWrites:
        """Returns a copy without some of the rows that must be written once.

        Args:
            written: The `id()` of each.
        """
        return replace(
            self,
            transitions=[row for row in self.transitions if id(row) not in written],
            modes=[row for row in self.modes if id(row) not in written],
            estimates=deque(row for row in self.estimates if id(row) not in written),
            references=[row for row in self.references if id(row) not in written],
            requests=[row for row in self.requests if id(row) not in written],
        )

    def refuse(self, run: str, revision: int) -> None:
        """Removes a revision that the journal refuses, and the commands of its decision, which must not be sent."""
        refused = self.revisions.pop((run, revision), None)
        if refused is not None:
            self.commands.pop(refused.decision_id, None)

    def _put_checkpoints(self, newer: Mapping[tuple[str, str], int | None]) -> None:
        for key, step in newer.items():
            self.checkpoints.pop(key, None)  # the journal lists checkpoints in the order they were saved
            self.checkpoints[key] = step
