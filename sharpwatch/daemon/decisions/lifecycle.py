"""What became of a decision: the trainer's answer, the signal's, or time's."""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet

from sharpwatch.daemon.config.config import GuardConfig
from sharpwatch.daemon.decisions.decision_log import UNDER_WAY, DecisionLog
from sharpwatch.daemon.decisions.guards import REFUSED_THERE
from sharpwatch.daemon.decisions.policy import EscalationChain
from sharpwatch.daemon.decisions.ramp_back import held_cuts, hold_steps
from sharpwatch.daemon.detection.alerts import AlertBook
from sharpwatch.daemon.records import CommandResult, Decision, Observation

LOST_AFTER = 100  # steps past its expiry a command's result is waited for: samples that carry it can be dropped


class DecisionLifecycle:
    """Moves the unsettled decisions of a run on."""

    def __init__(self, ledger: DecisionLog, book: AlertBook, ladder: EscalationChain) -> None:
        self._ledger = ledger
        self._book = book
        self._ladder = ladder

    def result(self, made: Decision, result: CommandResult) -> None:
        """The trainer answered the command of `made`."""
        detail = _joined(made.detail, result.detail)
        if result.outcome != "applied":
            guard = f"{REFUSED_THERE}: {result.detail}" if result.outcome == "refused" else made.guard
            self._ledger.update(made, outcome=result.outcome, detail=detail, guard=guard)
            return
        if result.unchanged_blocks:
            detail = _joined(detail, f"unchanged: {', '.join(result.unchanged_blocks)}")
        self._ledger.update(made, outcome="applied", detail=detail, applied_step=result.step)
        if made.action == "rollback":
            self._ledger.note_alerts(self._book.close_all())

    def settle(self, obs: Observation, found: AbstractSet[str], now: float) -> None:
        """Judge every unsettled decision by the step `obs`, at which alerts of the names `found` were seen."""
        self.expire(now)
        for made in tuple(self._ledger.unsettled()):
            if made.outcome in UNDER_WAY:
                self._settle_silence(made, obs)
            elif made.applied_step is not None:
                self._settle_effect(made, made.applied_step, obs.step, found)

    def expire(self, now: float) -> None:
        """Put away the proposals that nobody approved in time; a silent run has no steps to do it at."""
        for made in tuple(self._ledger.unsettled()):
            if made.outcome == "proposed" and now - made.made_at > self._guard(made).approve_within:
                self._ledger.update(made, outcome="expired", detail=_joined(made.detail, "nobody approved it in time"))

    def _settle_silence(self, made: Decision, obs: Observation) -> None:
        if not made.expires_at_step or obs.step <= made.expires_at_step + LOST_AFTER:
            return
        if made.revision and _in_force(made, obs):
            self._ledger.applied(made.revision, obs.step)
            detail = _joined(made.detail, "the result was lost; the trainer's multipliers show it")
            self._ledger.update(made, outcome="applied", detail=detail, applied_step=obs.step)
        else:
            self._ledger.update(made, outcome="expired", detail=_joined(made.detail, "the trainer never answered"))

    def _settle_effect(self, made: Decision, applied: int, step: int, found: AbstractSet[str]) -> None:
        guard = self._guard(made)
        if made.action == "ramp_back":
            if step - applied >= self._hold(made):
                self._ledger.update(made, outcome="recovered")
            return
        waited = step - applied >= guard.recover_within_steps
        back = made.alert_name in found
        if made.action == "rollback":
            if back:
                self._fail(made, "the alert came back after the rollback")
            elif waited and self._book.active(made.alert_name) is None:
                self._ledger.update(made, outcome="recovered")
        elif self._book.active(made.alert_name) is None:
            self._ledger.update(made, outcome="recovered")
        elif back and waited:
            self._fail(made, f"no recovery within {guard.recover_within_steps} steps")

    def _fail(self, made: Decision, why: str) -> None:
        self._ledger.update(made, outcome="failed", detail=_joined(made.detail, why))

    def _guard(self, made: Decision) -> GuardConfig:
        policy = self._ladder.named(made.policy)
        return policy.guard if policy is not None else GuardConfig()

    def _hold(self, made: Decision) -> int:
        policy = self._ladder.named(made.policy)
        return hold_steps(policy, held_cuts(self._ledger).relapses) if policy is not None else GuardConfig().hold_steps


def _in_force(made: Decision, obs: Observation) -> bool:
    seen = obs.multipliers
    return bool(seen) and all(
        math.isclose(seen[block], value, rel_tol=1e-5) for block, value in made.multipliers.items() if block in seen
    )


def _joined(before: str, more: str) -> str:
    return f"{before}; {more}" if before and more else before or more
