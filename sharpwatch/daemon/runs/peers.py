"""What runs say of each other: twins, which see the same data, and references, which a run is held against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import structlog

from sharpwatch.daemon.detection.history import LATER, NEAR, SLOW, Losses
from sharpwatch.daemon.detection.incidents import is_brief, is_by_batch
from sharpwatch.daemon.records import NO_CHANGES, Changes, Incident
from sharpwatch.daemon.runs.run import Run, Runs
from sharpwatch.daemon.storage.schema import ReferenceRow

log = structlog.get_logger(__name__)

_LOOKED_AT = 20  # incidents of a run that a twin can still say something of after a restart; the newest
_ASKED = 16  # twins for an incident; more add nothing
_AWAITED = 1_000  # steps at which one twin is asked; the lowest are given up, as the twin may never come


class Peers:
    """Twins and references of all runs.

    Args:
        runs: The runs.

    Attributes:
        awaiting: By the twin that has not come so far, and by the step at which it is asked: runs and ids of incidents.
        followers: By reference the runs that are held against it.
    """

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self.awaiting: dict[str, dict[int, dict[tuple[str, str], None]]] = {}
        self.followers: dict[str, set[str]] = {}

    def twins(self, run: Run) -> Iterator[Run]:
        """The other runs that see the same batch at the same step.

        Those that say so, in `data_order`; where one of two does not, those of a training job whose first losses are
        equal. They come in a circle that begins after the run, so that the first twins of all runs are not the same.
        """
        runs = tuple(self._runs)
        after = runs.index(run) + 1
        return (other for other in (*runs[after:], *runs[: after - 1]) if _are_twins(run, other))

    def after(self, run: Run, step: int, changes: Changes) -> list[tuple[Run, Changes]]:
        """What changes in any run after `run` has come to a step.

        Args:
            run: The run.
            step: The step.
            changes: What its own controller changed.
        """
        found = self._attribute(run, changes.incidents) + self._answer(run, step)
        for name in tuple(self.followers.get(run.name, ())):
            follower = self._runs.get(name)
            if follower is None:
                self.followers[run.name].discard(name)
            # One that has left memory and come back has its losses in another object, which `restore` gives to all.
            elif _is_held_against(follower, run):
                found.append((follower, follower.controller.reference_came(step)))
        return [each for each in found if each[1] != NO_CHANGES]

    def _attribute(self, run: Run, incidents: Iterable[Incident]) -> list[tuple[Run, Changes]]:
        """Tell by the twins of a run whether the data brought incidents about, as far as they have come."""
        by_batch = [incident for incident in incidents if is_by_batch(incident)]
        if not by_batch:
            return []
        self._forget_dropped()
        twins = tuple(self.twins(run))
        return [each for incident in by_batch for each in self._ask(run, incident, _chosen(twins, incident))]

    def _answer(self, twin: Run, step: int) -> list[tuple[Run, Changes]]:
        """What incidents learn that have waited for a run to come to a step."""
        awaited = self.awaiting.get(twin.name)
        if awaited is None:
            return []
        found = []
        due = [identity for at in sorted(awaited) if at <= step for identity in awaited.pop(at)]
        for name, identity in dict.fromkeys(due):
            run = self._runs.get(name)
            incident = None if run is None else run.controller.incident(identity)
            if run is None or incident is None or not is_by_batch(incident) or not _are_twins(run, twin):
                continue
            if _may_answer(twin, incident):
                found += self._ask(run, incident, [twin])
        if not awaited:
            del self.awaiting[twin.name]
        return found

    def _ask(self, run: Run, incident: Incident, twins: Iterable[Run]) -> list[tuple[Run, Changes]]:
        """Note what twins show of an incident, and wait for those that may show it yet."""
        answers, replicas = _answers(incident), set(incident.replicas)
        own, onset = run.controller, incident.onset
        if own.skipped_before(onset):
            return []  # a rollback has left out batches: the same step has other data since
        for twin in twins:
            if twin.controller.skipped_before(onset):
                continue
            history = twin.controller.history
            seen = history.shows(onset, is_brief=is_brief(incident))
            if seen is not None:  # else what was known of it before still holds
                if twin.name not in answers and not own.history.has_parted(history, onset):
                    replicas.add(twin.name)
                answers[twin.name] = seen
            if not seen:
                self._await(run, incident, twin)
        shown, absent = (tuple(sorted(name for name in answers if answers[name] is seen)) for seen in (True, False))
        told = shown, absent, tuple(sorted(replicas))
        if told == (incident.in_twins, incident.not_in_twins, incident.replicas):
            return []
        return [(run, own.attribute(incident.id, *told))]

    def _await(self, run: Run, incident: Incident, twin: Run) -> None:
        """Ask a twin again once it has come to the next step at which it can tell more, if there is one."""
        onset = incident.onset
        # It stands out at the onset or next to it; or a mean over some samples shows it, or one over many.
        steps = (onset + NEAR, onset + LATER, *(() if is_brief(incident) else (onset + 2 * SLOW,)))
        at = next((step for step in steps if step > twin.controller.history.last_step), None)
        if at is None:
            return
        awaited = self.awaiting.setdefault(twin.name, {})
        awaited.setdefault(at, {})[run.name, incident.id] = None
        if len(awaited) > _AWAITED:
            del awaited[min(awaited)]

    def _forget_dropped(self) -> None:
        for name in [name for name in self.awaiting if self._runs.get(name) is None]:
            del self.awaiting[name]

    def set_reference(self, run: Run, row: ReferenceRow) -> Changes:
        """Hold a run against a reference, or against none any more.

        Args:
            run: The run.
            row: The reference; one without a name is none.

        Returns:
            What that changes in the run.
        """
        self._follow(run, row)
        losses = self._losses(row)
        if losses is None:
            return run.controller.clear_reference()
        return run.controller.set_reference(row.name, losses)

    def restore(self, run: Run) -> list[tuple[Run, Changes]]:
        """Take up the journalled reference of a run that has come from the journal, as its reference has by then.

        Runs that are held against this one go on with it. Returns what its twins say of it.
        """
        if run.reference is not None:
            self._follow(run, run.reference)
            try:
                losses = self._losses(run.reference)
            except ValueError:
                losses = None
            if losses is None:
                log.warning("reference_not_restored", run=run.name, reference=run.reference.name)
            else:
                run.controller.restore_reference(run.reference.name, losses)
        for name in self.followers.get(run.name, ()):
            follower = self._runs.get(name)
            if follower is not None and not _is_held_against(follower, run):
                follower.controller.restore_reference(run.name, run.controller.history.losses)
        found = self._attribute(run, run.controller.incidents[-_LOOKED_AT:])
        for twin in tuple(self.twins(run)):  # they may have come back before it
            recent = twin.controller.incidents[-_LOOKED_AT:]
            asked = [each for each in recent if is_by_batch(each) and _may_answer(run, each)]
            found += [changed for incident in asked for changed in self._ask(twin, incident, [run])]
        return [each for each in found if each[1] != NO_CHANGES]

    def _follow(self, run: Run, row: ReferenceRow) -> None:
        for name, followers in tuple(self.followers.items()):
            followers.discard(run.name)
            if not followers:
                del self.followers[name]
        run.reference = row if row.name else None
        if row.name and not row.losses:
            self.followers.setdefault(row.name, set()).add(run.name)

    def _losses(self, row: ReferenceRow) -> Losses | None:
        """The losses of a reference: those of a recorded run, or those of a run here, which grow; None for none."""
        if row.losses:
            return Losses.from_state(row.losses)
        reference = self._runs.get(row.name) if row.name else None
        return None if reference is None else reference.controller.history.losses


def _are_twins(run: Run, other: Run) -> bool:
    here, there = run.attempt.hello, other.attempt.hello
    if here.data_order and there.data_order:
        return here.data_order == there.data_order
    return here.training_job == there.training_job and run.controller.history.begins_like(other.controller.history)


def _chosen(twins: Sequence[Run], incident: Incident) -> list[Run]:
    """The twins to ask of an incident: those that were asked before, then those that have come so far."""
    before, onset = _answers(incident), incident.onset

    def rank(twin: Run) -> tuple[bool, bool]:
        return twin.name not in before, not twin.controller.history.has_passed(onset)

    may_come = [twin for twin in twins if twin.phase != "closed" or twin.controller.history.last_step >= onset]
    return sorted(may_come, key=rank)[:_ASKED]


def _may_answer(twin: Run, incident: Incident) -> bool:
    answers = _answers(incident)
    return twin.name in answers or len(answers) < _ASKED


def _answers(incident: Incident) -> dict[str, bool]:
    """By twin, whether it showed the incident."""
    return dict.fromkeys(incident.in_twins, True) | dict.fromkeys(incident.not_in_twins, False)


def _is_held_against(follower: Run, reference: Run) -> bool:
    test = follower.controller.reference
    return test is not None and test.is_against(reference.controller.history.losses)
