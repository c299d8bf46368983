"""What runs say of each other: twins, which see the same data, and references, which a run is held against."""

from __future__ import annotations

from collections.abc import Iterator

import structlog

from sharpwatch.daemon.detection.history import Losses
from sharpwatch.daemon.detection.incidents import is_by_batch
from sharpwatch.daemon.records import NO_CHANGES, Changes, Incident
from sharpwatch.daemon.runs.run import Run, Runs
from sharpwatch.daemon.storage.schema import ReferenceRow

log = structlog.get_logger(__name__)

_LOOKED_AT = 20  # incidents of a run that a twin can still say something of; the newest


class Peers:
    """Twins and references of all runs.

    Args:
        runs: The runs.
    """

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        # By the twin that has not come so far: runs that wait for it, each with the first step that it waits for.
        self._awaiting: dict[str, dict[str, int]] = {}
        self._followers: dict[str, set[str]] = {}  # by reference

    def twins(self, run: Run) -> Iterator[Run]:
        """The other runs that see the same batch at the same step.

        Those that say so, in `data_order`; where one of two does not, those of a training job whose first losses are
        equal.
        """
        return (other for other in self._runs if other is not run and _are_twins(run, other))

    def after(self, run: Run, step: int, changes: Changes) -> list[tuple[Run, Changes]]:
        """What changes in any run after `run` has come to a step.

        Args:
            run: The run.
            step: The step.
            changes: What its own controller changed.
        """
        found = self.attribute(run) if changes.incidents else []
        for name, awaited in tuple(self._awaiting.get(run.name, {}).items()):
            waiting = self._runs.get(name)
            if step >= awaited and waiting is not None:
                found += self.attribute(waiting)
        for name in self._followers.get(run.name, ()):
            follower = self._runs.get(name)
            if follower is not None:
                found.append((follower, follower.controller.reference_came(step)))
        return [each for each in found if each[1] != NO_CHANGES]

    def attribute(self, run: Run) -> list[tuple[Run, Changes]]:
        """Tell by the twins of a run whether the data brought its newest incidents about."""
        for waiting in self._awaiting.values():
            waiting.pop(run.name, None)
        incidents = [each for each in run.controller.incidents[-_LOOKED_AT:] if is_by_batch(each)]
        twins = tuple(self.twins(run)) if incidents else ()
        found = []
        for incident in incidents:
            shown, absent = self._seen_in(incident, run, twins)
            if (shown, absent) != (incident.in_twins, incident.not_in_twins):
                found.append((run, run.controller.attribute(incident.id, shown, absent)))
        return found

    def _seen_in(self, incident: Incident, run: Run, twins: tuple[Run, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The twins that stood out at an incident's onset, and those that did not."""
        answers = dict.fromkeys(incident.in_twins, True) | dict.fromkeys(incident.not_in_twins, False)
        for twin in twins:
            if any(each.controller.skipped_before(incident.onset) for each in (run, twin)):
                continue  # a rollback has left out batches: the same step has other data since
            history = twin.controller.history
            seen = history.stood_out(incident.onset)
            if seen is not None:  # else what was known of it before still holds
                answers[twin.name] = seen
            elif not history.has_passed(incident.onset):
                awaited = self._awaiting.setdefault(twin.name, {})
                awaited[run.name] = min(incident.onset - 1, awaited.get(run.name, incident.onset))
        shown, absent = (tuple(sorted(name for name in answers if answers[name] is seen)) for seen in (True, False))
        return shown, absent

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
        """Take up the journalled reference of a run, once all runs are there; returns what its twins say of it."""
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
        return self.attribute(run)

    def _follow(self, run: Run, row: ReferenceRow) -> None:
        for followers in self._followers.values():
            followers.discard(run.name)
        run.reference = row if row.name else None
        if row.name and not row.losses:
            self._followers.setdefault(row.name, set()).add(run.name)

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
