"""Reconciles the trainer's multipliers with the set in force: after a resume, a restored checkpoint, or a restart."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sharpwatch.daemon.decisions.decision_log import DecisionLog
from sharpwatch.daemon.decisions.operator_requests import OperatorRequests, has_set
from sharpwatch.daemon.records import Observation

_RETRY = 100  # steps until a set that the trainer did not take is sent once more; twice as many each time


class Reconciler:
    """Puts the set in force back where the trainer has another one.

    A trainer whose multipliers are all 1 has nothing under way. Another may be on its way up or down, or about to take
    a command that was sent before, so that it is judged only once that must have ended. Blocks that share parameters
    never have what each is to have: what the trainer had under the same set is right too.

    Args:
        log: The run's decisions, which say what is in force.
        requests: Makes the decision that puts it back.

    Attributes:
        is_idle: Whether there is nothing to compare.
    """

    def __init__(self, log: DecisionLog, requests: OperatorRequests) -> None:
        self._log = log
        self._requests = requests
        self.is_idle = True
        self._is_new = False  # the trainer has begun anew since the last observation
        self._is_restarted = False  # so has the daemon
        self._from: int | None = None  # the step from which on the trainer must have what the log has
        self._wait = _RETRY
        self._may_raise = True
        self._held: tuple[int, Mapping[str, float]] = (0, {})  # a revision, and the multipliers that came of it

    def take_over(self, earlier: Reconciler) -> None:
        """Go on for another attempt of the run, which begins anew."""
        self._held = earlier._held
        self.begin_attempt()

    def begin_attempt(self) -> None:
        """Have it known that the trainer begins anew: with every multiplier at 1, or what its checkpoint has."""
        self._is_new, self._is_restarted, self.is_idle = True, False, False

    def restart(self) -> None:
        """Have it known that the daemon does: what it was about to put back is not journalled."""
        self._is_new, self._is_restarted, self._from, self.is_idle = False, True, None, False

    def _note(self, seen: Observation) -> None:
        """Take in what came of the set in force, at a step at which all is as it should be."""
        number = self._log.number_in_force
        applied = self._log.revisions[number - 1].applied_step if number else None
        is_there = applied is not None and seen.step >= applied + self._requests.newest_ramp()
        if is_there and not _is_plain(seen):
            self._held = number, seen.multipliers

    def see(self, seen: Observation, now: float) -> None:
        """Compare a step of the trainer with what is in force, where that is due; `now` is in unix seconds."""
        if not seen.multipliers:
            return
        if self.is_idle and not seen.restored:
            self._note(seen)
            return
        is_plain = False
        if self._is_new or self._is_restarted or seen.restored:
            is_plain = not self._is_restarted and _is_plain(seen)
            self._from = seen.step if is_plain else seen.step + self._requests.newest_ramp()
            self._wait = _RETRY
            # Raises end by themselves where the daemon was away: a restart does not bring them back.
            self._may_raise = not self._is_restarted
            self._is_new = self._is_restarted = self.is_idle = False
        if self._from is None or seen.step < self._from or (self._log.is_due(seen.step) and not is_plain):
            return
        number, held = self._held
        is_newest = number == self._log.number_in_force
        is_held = bool(held) and is_newest and has_set(seen, held, self._log.intervals)
        if is_held or self._requests.put_back(seen, now, may_raise=self._may_raise) is None:
            self._from, self.is_idle = None, True
            return
        self._from = seen.step + self._requests.newest_ramp() + self._wait
        self._wait *= 2


def _is_plain(seen: Observation) -> bool:
    return not seen.update_every and all(math.isclose(value, 1.0) for value in seen.multipliers.values())
