"""Incidents: findings that hang together, what explains them, and their life; and alerts of other systems."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from sharpwatch.daemon.records import CAUSES, AlertName, Cause, Finding, ForeignAlert, Incident, Severity

STEPS_AGAIN = "the run makes steps again"
QUIET = 20  # samples without a finding that end an incident
QUIET_PROBES, UNPROBED = 3, 500  # of what comes with probes alone: probes without one, or samples without a probe
_PROBED: set[AlertName] = {"StabilityLimit", "SharpnessSpike", "AttentionGrowth"}  # whose samples are rare
UPDATE_EVERY = 10  # steps between records of an incident that merely goes on
KEPT = 1_000  # incidents in memory, and
KEPT_BYTES = 4 * 2**20  # what they take: of more, closed ones are left to the journal, the oldest first
_TOGETHER = 5  # steps within which events have one cause
_WITH_LOSS = 20  # steps within which a loss follows if wrong data have moved it and the blocks
_EXPLAINS = 20  # steps after its opening within which an incident's explanation may change
_RANK = {name: rank for rank, name in enumerate(CAUSES)}
# Each is an event of its own, which no earlier incident explains.
_EVENTS: set[AlertName] = {"NonFinite", "WeightJump", "SettingsChanged", "OptimizerState", "RateRaise", "RateZero"}
_BLOCK_ALERTS: set[AlertName] = {"WeightGrowth", "DeadBlock", "UpdateRmsSpike", "GradientSpike"}
_LOCAL: set[Cause] = {"instability", "silent"}
# What a batch can bring about: runs with the same data then show it at the same step.
BY_BATCH: set[AlertName] = {"LossSpike", "LossDrop", "GradientSpike", "UpdateRmsSpike", "NonFinite"}
_OF_A_RANK: set[AlertName] = {"RankDiffers", "NonFinite"}  # whose findings can name a rank
_BRIEF = 5  # samples; the onset of what is found in a mean over more is an estimate
# What disturbs weights by itself: under such a cause their jumps are consequences.
_MOVES_WEIGHTS: set[Cause] = {"learning-rate", "optimizer-state", "non-finite", "damaged-weight"}


@dataclass(slots=True)
class _Open:
    """An open incident, with the first finding of each alert, and of the one that explains the others."""

    incident: Incident
    explains: Finding
    first: dict[AlertName, Finding]
    quiet: float = 0.0  # part of the time without a finding that ends it
    recorded: int = 0  # step of the newest record

    @property
    def quiet_for(self) -> str:
        """Why it is closed."""
        if set(self.first) == {"RunStalled"}:
            return STEPS_AGAIN
        if self.first.keys() <= _PROBED:
            return f"no finding in {QUIET_PROBES} probes, or no probe for {UNPROBED} samples"
        return f"no finding for {QUIET} samples"

    def count_quiet(self, *, found: bool, probed: Collection[AlertName]) -> None:
        """One more sample, with a finding of this incident or without, that could give those alerts of probes."""
        if found:
            self.quiet = 0.0
        elif set(self.first) == {"RunStalled"}:
            self.quiet = 1.0  # a sample has come
        elif self.first.keys() <= _PROBED:
            self.quiet += 1 / UNPROBED if self.first.keys().isdisjoint(probed) else 1 / QUIET_PROBES
        else:
            self.quiet += 1 / QUIET


class IncidentLog:
    """The incidents of one run.

    Args:
        run: Its name.
        new_id: Makes ids.
    """

    def __init__(self, run: str, new_id: Callable[[], str]) -> None:
        self._run = run
        self._new_id = new_id
        self.opened: dict[str, _Open] = {}  # by id; alerts of other systems are none of them
        self.foreign: dict[str, Incident] = {}  # by id, the alerts of other systems that fire
        self._all: dict[str, Incident] = {}
        self.forgotten = 0  # how many closed ones the journal alone has

    @property
    def all(self) -> tuple[Incident, ...]:
        """The newest incidents, oldest first: all that are open, and so many closed ones as memory is for."""
        return tuple(self._all.values())

    @property
    def open(self) -> tuple[Incident, ...]:
        """The open ones, oldest first; alerts of other systems come last."""
        return (*(each.incident for each in self.opened.values()), *self.foreign.values())

    def get(self, identity: str) -> Incident | None:
        """The incident of an id; None where there is none."""
        return self._all.get(identity)

    def active(self, name: str) -> Incident | None:
        """The newest open incident with an alert of that name."""
        return next((each for each in reversed(self.open) if name in each.names), None)

    def see(self, findings: Sequence[Finding], *, probed: Collection[AlertName] = ()) -> tuple[Incident, ...]:
        """Fold the findings of one sample.

        Args:
            findings: Its findings.
            probed: The alerts that its probes could have given, of those that come with probes alone.

        Returns:
            The incidents to record.
        """
        found, changed = self.add(findings)
        for identity, entry in tuple(self.opened.items()):
            entry.count_quiet(found=identity in found, probed=probed)
            if entry.quiet >= 1:
                changed[identity] = self._close(identity, entry.quiet_for)
        return tuple(changed.values())

    def add(self, findings: Sequence[Finding]) -> tuple[set[str], dict[str, Incident]]:
        """Fold findings that come without a sample; returns the ids of their incidents, and those to record by id."""
        changed: dict[str, Incident] = {}
        found: set[str] = set()
        for finding in sorted(findings, key=lambda each: (each.onset, _RANK[each.name])):
            entry = self._belongs_to(finding)
            if entry is None and self._is_shown(finding):
                continue
            if entry is None:
                entry = self._begin(finding)
                changed[entry.incident.id] = entry.incident
            elif self._join(entry, finding):
                changed[entry.incident.id] = entry.incident
            found.add(entry.incident.id)
        return found, changed

    def attribute(
        self, identity: str, shown: tuple[str, ...], absent: tuple[str, ...], replicas: tuple[str, ...] = ()
    ) -> Incident:
        """Note which runs with the same data stood out at an incident's onset, and which did not.

        What another run shows at the same step is the data's doing, unless it is a replica: that has the same weights
        and rates too. What none shows is not the data's.

        Args:
            identity: The incident's id.
            shown: Names of the runs that did.
            absent: Names of those that did not.
            replicas: Of both, those whose losses were the same as this run's until the onset.
        """
        before, entry = self._all[identity], self.opened.get(identity)
        evidence = before.evidence[: len(before.evidence) - len(twins_evidence(before))]
        after = replace(before, in_twins=shown, not_in_twins=absent, replicas=replicas)
        after = replace(
            after,
            cause=_attributed(before.cause if entry is None else _cause(entry), after),
            evidence=evidence + twins_evidence(after),
        )
        self._all[identity] = after
        if entry is not None:
            entry.incident = after
        return after

    def replay(self, findings: Sequence[Finding], *, probed: Collection[AlertName] = ()) -> None:
        """Carry open incidents on, as `see` does; open and close none."""
        found = {entry.incident.id: finding for finding in findings if (entry := self._belongs_to(finding)) is not None}
        for identity, entry in self.opened.items():
            entry.count_quiet(found=identity in found, probed=probed)
            if identity in found:
                last = max(entry.incident.last_step, found[identity].step)
                entry.incident = self._all[identity] = replace(entry.incident, last_step=last)

    def close_all(self, why: str) -> tuple[Incident, ...]:
        """Close what is open."""
        return tuple(self._close(identity, why) for identity in tuple(self.opened))

    def close_named(self, name: AlertName, why: str) -> tuple[Incident, ...]:
        """Close what is open of one alert."""
        return tuple(
            self._close(identity, why) for identity, entry in tuple(self.opened.items()) if entry.incident.name == name
        )

    def begin_foreign(
        self, identity: str, alert: ForeignAlert, severity: Severity, evidence: str, step: int
    ) -> tuple[Incident, ...]:
        """Open the incident of an alert of another system, which `end_foreign` alone ends.

        Args:
            identity: The incident's id. Where there is one of that id, open or closed, nothing changes.
            alert: The alert. An open one of its fingerprint that began earlier ends: it fires anew. One that began
                later is the same: where several Prometheus servers see it, the earliest start comes to be told.
            severity: How bad it is.
            evidence: What it says.
            step: Where the run stands.

        Returns:
            The incidents to record.
        """
        firing = [each.foreign for each in self.foreign.values() if each.foreign is not None]
        is_told = any(one.fingerprint == alert.fingerprint and one.starts_at > alert.starts_at for one in firing)
        if identity in self._all or is_told:
            return ()
        ended = self.end_foreign(alert.fingerprint, alert.starts_at, step, "it fires anew")
        self._forget()
        begun = Incident(
            id=identity,
            run=self._run,
            name="ForeignAlert",
            names=("ForeignAlert",),
            cause="foreign",
            severity=severity,
            blocks=(),
            layer_blocks=(),
            evidence=(evidence,),
            onset=step,
            first_step=step,
            last_step=step,
            active=True,
            foreign=alert,
        )
        self.foreign[identity] = self._all[identity] = begun
        return (*ended, begun)

    def end_foreign(self, fingerprint: str, ended_at: float, step: int, why: str) -> tuple[Incident, ...]:
        """Close the incident of an alert of another system, unless it began only after the end that is told."""
        ended = []
        for identity, incident in tuple(self.foreign.items()):
            own = incident.foreign
            if own is not None and own.fingerprint == fingerprint and own.starts_at <= ended_at:
                del self.foreign[identity]
                last = max(incident.last_step, step)
                self._all[identity] = replace(incident, active=False, closed=why, last_step=last)
                ended.append(self._all[identity])
        return tuple(ended)

    def acknowledge(self, identity: str, words: str) -> Incident:
        """Note who has seen an incident; raises `KeyError` for an id that is none."""
        seen = self._all[identity] = replace(self._all[identity], acknowledged=words)
        if identity in self.opened:
            self.opened[identity].incident = seen
        if identity in self.foreign:
            self.foreign[identity] = seen
        return seen

    def contain(self, identity: str, step: int) -> Incident:
        """Note that an action keeps the run well from a step on, though the cause stays: what begins later is news."""
        contained = self._all[identity] = replace(self._all[identity], contained_step=step)
        if identity in self.opened:
            self.opened[identity].incident = contained
        return contained

    def restore(self, incidents: Iterable[Incident]) -> None:
        """Take up journalled incidents."""
        self._all = {each.id: each for each in incidents}
        self._forget()
        active = [each for each in self._all.values() if each.active]
        self.opened = {each.id: _restored(each) for each in active if each.foreign is None}
        self.foreign = {each.id: each for each in active if each.foreign is not None}

    def _forget(self) -> None:
        """Forgets the oldest closed incidents beyond what is kept."""
        taken = sum(map(_nbytes, self._all.values())) if len(self._all) > 1 else 0
        for identity, incident in tuple(self._all.items()):
            if len(self._all) <= KEPT and taken <= KEPT_BYTES:
                break
            if not incident.active:
                del self._all[identity]
                taken -= _nbytes(incident)
                self.forgotten += 1

    def _is_shown(self, finding: Finding) -> bool:
        """Whether the open incidents leave nothing to tell of a finding: a recovery, a failure that is not silent."""
        if finding.name == "SilentFailure":
            return any(entry.incident.severity == "critical" for entry in self.opened.values())
        return finding.name == "LossDrop" and any(
            entry.incident.name != "SilentFailure" for entry in self.opened.values()
        )

    def _belongs_to(self, finding: Finding) -> _Open | None:
        """The open incident that a finding is part of."""
        parts = [entry for entry in reversed(self.opened.values()) if _is_part(finding, entry.incident)]
        # One that has shown the same before is the likeliest.
        return next((entry for entry in parts if finding.name in entry.incident.names), parts[0] if parts else None)

    def _begin(self, finding: Finding) -> _Open:
        self._forget()
        incident = Incident(
            id=self._new_id(),
            run=self._run,
            name=finding.name,
            names=(finding.name,),
            cause=CAUSES[finding.name],
            severity=finding.severity,
            blocks=_types(finding.layer_blocks),
            layer_blocks=finding.layer_blocks,
            evidence=(finding.evidence,),
            onset=finding.onset,
            first_step=finding.step,
            last_step=finding.step,
            active=True,
            span=finding.span,
            parameter=finding.parameter,
            rank=finding.rank,
        )
        entry = _Open(incident, finding, {finding.name: finding}, recorded=finding.step)
        self.opened[incident.id] = entry
        self._all[incident.id] = incident
        return entry

    def _join(self, entry: _Open, finding: Finding) -> bool:
        """Add a finding; returns whether the incident is to be recorded."""
        before = entry.incident
        first = entry.first.setdefault(finding.name, finding)
        worse = finding.severity == "critical" and before.severity == "warning"
        if finding.severity == "critical" and first.severity == "warning":
            # What is certain began when it says, whatever stood out before.
            sure = finding.is_exact and not first.is_exact
            entry.first[finding.name] = finding if sure else replace(finding, onset=first.onset)
        if worse or finding.step - before.first_step <= _EXPLAINS:
            entry.explains = min(entry.first.values(), key=_explains_best)
        explains = entry.explains
        others = [each for each in entry.first.values() if each is not explains]
        layer_blocks = explains.layer_blocks
        if layer_blocks:  # else it is the whole model's: what blocks show beside it is no cause
            layer_blocks = tuple(dict.fromkeys((*layer_blocks, *(b for each in others for b in each.layer_blocks))))
        after = replace(
            before,
            name=explains.name,
            names=(explains.name, *(each.name for each in others)),
            severity="critical" if worse else before.severity,
            blocks=_types(layer_blocks),
            layer_blocks=layer_blocks,
            onset=min(explains.onset, before.onset),
            last_step=max(before.last_step, finding.step),
            span=explains.span,
            parameter=explains.parameter,
            # One rank's doing shows in the mean over ranks, too.
            rank=next((each.rank for each in (explains, *others) if each.rank is not None), before.rank),
        )
        evidence = (explains.evidence, *(each.evidence for each in others), *twins_evidence(after))
        after = entry.incident = replace(after, cause=_attributed(_cause(entry), after), evidence=evidence)
        self._all[after.id] = after
        goes_on = replace(after, last_step=before.last_step) == before
        if goes_on and after.last_step - entry.recorded < UPDATE_EVERY:
            return False
        entry.recorded = after.last_step
        return True

    def _close(self, identity: str, why: str) -> Incident:
        closed = replace(self.opened.pop(identity).incident, active=False, closed=why)
        self._all[identity] = closed
        return closed


def _is_part(finding: Finding, incident: Incident) -> bool:
    """Whether a finding belongs to an open incident. One that is open must not hide another that begins."""
    # The one is of the time before a sample; the other is about another run, and may stand for ever.
    # A mean over samples that reach back to before that is no news.
    earliest = min(finding.onset, finding.step - finding.span)
    is_news = incident.contained_step and earliest > incident.contained_step
    if is_news or {"RunStalled", "SilentFailure"} & {finding.name, incident.name}:
        return finding.name == incident.name
    near = finding.onset - incident.onset <= (_TOGETHER if finding.name in _EVENTS else _EXPLAINS)
    if near:
        return True
    if finding.name in incident.names:
        # An event that comes again is another one, unless it comes again and again.
        return finding.name not in _EVENTS or finding.step - incident.last_step <= _TOGETHER
    if finding.name == "LossDrop":
        return False  # after a spike it is the recovery
    if finding.name == "WeightJump":
        return incident.cause in _MOVES_WEIGHTS
    # What stands out under a page is its consequence, unless both are about blocks of their own.
    apart = (
        incident.cause in _LOCAL and finding.layer_blocks and not set(finding.layer_blocks) & set(incident.layer_blocks)
    )
    return incident.severity == "critical" and finding.name not in _EVENTS and not apart


def _explains_best(finding: Finding) -> tuple[bool, int, int]:
    """The cause comes before its consequences: whatever is sure and began first explains the rest.

    What stands out in a mean over several samples may seem to have begun before its cause. What one rank alone shows is
    no consequence of what all share.
    """
    onset = finding.onset - (_TOGETHER if finding.is_exact or finding.rank is not None else 0)
    return finding.severity == "warning", onset, _RANK[finding.name]


def _cause(entry: _Open) -> Cause:
    explains, first = entry.explains, entry.first
    # Blocks out of their levels together with the loss are what wrong data look like; the blocks' z only came first.
    losses = [first[name].onset for name in ("LossSpike", "LossDrop", "RankDiffers") if name in first]
    if explains.name in _BLOCK_ALERTS and losses:
        return "data" if min(losses) - explains.onset <= _WITH_LOSS else "instability"
    return CAUSES[explains.name]


def is_by_batch(incident: Incident) -> bool:
    """Whether a batch can have brought an incident about, so that runs with the same data would show it too."""
    return incident.name in BY_BATCH


def is_brief(incident: Incident) -> bool:
    """Whether an incident's onset is known so well that a twin which does not show it there does not have it."""
    return 0 < incident.span <= _BRIEF


def _divided(names: tuple[str, ...], incident: Incident) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Twins that had parted from the run before the onset, and those that had not: replicas."""
    is_replica = incident.replicas.__contains__
    return tuple(name for name in names if not is_replica(name)), tuple(filter(is_replica, names))


def twins_evidence(incident: Incident) -> tuple[str, ...]:
    """The evidence on runs with the same data; empty where there is none."""
    if not is_by_batch(incident):
        return ()
    shown, same_shown = _divided(incident.in_twins, incident)
    absent, same_absent = _divided(incident.not_in_twins, incident)
    told = (
        ("also in run", shown),
        ("not in its twin", () if shown else absent),
        ("also in its replica", same_shown),
        ("not in its replica", same_absent),
    )
    where = f"{'at' if incident.span <= _BRIEF else 'near'} step {incident.onset}"
    return tuple(f"{words}{'s' * (len(names) > 1)} {', '.join(names)} {where}" for words, names in told if names)


def _attributed(cause: Cause, incident: Incident) -> Cause:
    """The cause by the findings, corrected by what runs with the same data showed at the onset."""
    if not is_by_batch(incident):
        return cause
    if _divided(incident.in_twins, incident)[0]:
        return "data"
    # What one rank alone shows can be the data that it alone reads.
    if incident.not_in_twins and cause == "data" and incident.rank is None:
        return next((CAUSES[name] for name in incident.names if CAUSES[name] != "data"), "instability")
    return cause


def _nbytes(incident: Incident) -> int:
    """What it takes, roughly; names of layer blocks are shared."""
    return 1_000 + 8 * len(incident.layer_blocks) + sum(map(len, incident.evidence))


def _types(layer_blocks: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in layer_blocks))


def _restored(incident: Incident) -> _Open:
    finding = Finding(
        incident.name,
        incident.severity,
        incident.evidence[0],
        incident.first_step,
        incident.onset,
        incident.layer_blocks,
        span=incident.span,
        parameter=incident.parameter,
        rank=incident.rank if incident.name in _OF_A_RANK else None,
    )
    others = {
        name: replace(
            finding,
            name=name,
            evidence=evidence,
            onset=incident.last_step,
            layer_blocks=(),
            parameter="",
            rank=None,
        )
        for name, evidence in zip(incident.names[1:], incident.evidence[1:], strict=False)
    }
    return _Open(incident, finding, {incident.name: finding, **others}, recorded=incident.last_step)
