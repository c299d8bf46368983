"""Which outcomes a decision can have, which event leads from one to the next, and what each means for guards.

                observe ──▶ observed
                refuse ───▶ refused
                plan ─────▶ planned ───── send ─▶ sent, cancel ─▶ cancelled, refuse ─▶ refused
    draft ──────send ─────▶ sent ────────┬─ apply ──▶ applied ──┬─ recover ──────────────▶ recovered
                propose ──▶ proposed     ├─ refuse ─▶ refused   ├─ worsen ───────────────▶ worse
                              │          ├─ fail ───▶ failed    ├─ no_effect, supersede ─▶ no-effect
                              │          ├─ expire ─▶ expired   └─ inconclusive ─────────▶ inconclusive
                              │          ├─ cancel ─▶ cancelled
                              ├─ approve ▶ approved (then as sent)
                              ├─ reject ─▶ rejected
                              ├─ cancel ─▶ cancelled
                              └─ expire, supersede ─▶ expired

`TRANSITIONS` is this picture as a table, and `advance` is the only way to a new outcome: `DecisionLog` calls it for
every event.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from sharpwatch.daemon.records import Decision, Outcome

REFUSED_THERE = "trainer"  # the guard's name where the trainer's own side refused
Event = Literal[
    "observe",
    "propose",
    "plan",
    "refuse",
    "send",
    "approve",
    "reject",
    "supersede",
    "apply",
    "fail",
    "expire",
    "cancel",
    "recover",
    "worsen",
    "no_effect",
    "inconclusive",
]

TRANSITIONS: Mapping[tuple[Outcome, Event], Outcome] = {
    # A policy or an operator makes the decision; a guard can refuse it.
    ("draft", "observe"): "observed",
    ("draft", "propose"): "proposed",
    ("draft", "refuse"): "refused",
    ("draft", "send"): "sent",
    ("draft", "plan"): "planned",
    # An operator's set for a later step is sent shortly before it, unless it is taken back or can't be any more.
    ("planned", "send"): "sent",
    ("planned", "cancel"): "cancelled",
    ("planned", "refuse"): "refused",
    # An operator answers a proposal or takes it back, nobody does in time, or another set of multipliers comes into
    # force first.
    ("proposed", "approve"): "approved",
    ("proposed", "reject"): "rejected",
    ("proposed", "expire"): "expired",
    ("proposed", "supersede"): "expired",
    ("proposed", "cancel"): "cancelled",
    # The trainer answers the command, or never does. It also answers whether it could still cancel it.
    ("approved", "apply"): "applied",
    ("approved", "refuse"): "refused",
    ("approved", "fail"): "failed",
    ("approved", "expire"): "expired",
    ("approved", "cancel"): "cancelled",
    ("sent", "apply"): "applied",
    ("sent", "refuse"): "refused",
    ("sent", "fail"): "failed",
    ("sent", "expire"): "expired",
    ("sent", "cancel"): "cancelled",
    # What the run's loss says of the change; or the policy acts again because it was not enough.
    ("applied", "recover"): "recovered",
    ("applied", "worsen"): "worse",
    ("applied", "no_effect"): "no-effect",
    ("applied", "inconclusive"): "inconclusive",
    ("applied", "supersede"): "no-effect",
}
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
EVENTS: tuple[Event, ...] = get_args(Event)
FINAL = frozenset(OUTCOMES) - {outcome for outcome, _ in TRANSITIONS}  # no event leads on from these
JUDGED = frozenset({"recovered", "worse", "no-effect", "inconclusive"})  # what an action can be found to have done
UNDER_WAY = frozenset(outcome for outcome, event in TRANSITIONS if event == "apply")  # the trainer's answer is due


def can(outcome: Outcome, event: Event) -> bool:
    """Returns whether a decision with `outcome` can take `event`."""
    return (outcome, event) in TRANSITIONS


def advance(outcome: Outcome, event: Event) -> Outcome:
    """Looks up the outcome that an event leads to.

    Args:
        outcome: The decision's present outcome; "draft" before it is recorded.
        event: What happened to it.

    Returns:
        The new outcome.

    Raises:
        ValueError: `TRANSITIONS` has no such transition.
    """
    if not can(outcome, event):
        possible = ", ".join(other for other in EVENTS if can(outcome, other)) or "none, it is final"
        raise ValueError(f"event {event!r} is not possible for a decision that is {outcome}; possible: {possible}")
    return TRANSITIONS[outcome, event]


def is_settled(decision: Decision) -> bool:
    """Returns whether the outcome of `decision` can no longer change.

    An operator's own decision is settled once it is applied; a policy's has still to cure its alert.
    """
    return decision.outcome in FINAL or (decision.outcome == "applied" and not decision.policy)


def took_effect(decision: Decision) -> bool:
    """Returns whether `decision` was carried out, or may be at any moment: what the limits on actions count.

    A proposal that nobody approved, and a command that the trainer refused or let expire, have done nothing.
    """
    return decision.applied_step is not None or decision.outcome in UNDER_WAY


def came_to_nothing(decision: Decision) -> bool:
    """Returns whether `decision` was proposed or sent, and ended without having been carried out.

    A guard's own refusal, which the same decision would meet again, is no such end.
    """
    refused = decision.outcome == "refused" and decision.guard.startswith(REFUSED_THERE)
    return refused or (decision.outcome in ("rejected", "expired", "failed", "cancelled") and not took_effect(decision))
