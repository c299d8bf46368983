"""The life of a decision, transition by transition, and what of it counts as done."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sharpwatch.daemon.decisions.decision_log import DecisionLog
from sharpwatch.daemon.decisions.transitions import (
    EVENTS,
    FINAL,
    OUTCOMES,
    TRANSITIONS,
    UNDER_WAY,
    advance,
    came_to_nothing,
    can,
    took_effect,
)
from sharpwatch.daemon.records import Decision

# Written out once more, so that no transition can come or go unseen. A pair that is not here must be refused.
EXPECTED = {
    "draft": {"observe": "observed", "propose": "proposed", "refuse": "refused", "send": "sent", "plan": "planned"},
    "planned": {"send": "sent", "cancel": "cancelled", "refuse": "refused"},
    "proposed": {
        "approve": "approved",
        "reject": "rejected",
        "expire": "expired",
        "supersede": "expired",
        "cancel": "cancelled",
    },
    "approved": {"apply": "applied", "refuse": "refused", "fail": "failed", "expire": "expired", "cancel": "cancelled"},
    "sent": {"apply": "applied", "refuse": "refused", "fail": "failed", "expire": "expired", "cancel": "cancelled"},
    "applied": {
        "recover": "recovered",
        "worsen": "worse",
        "no_effect": "no-effect",
        "inconclusive": "inconclusive",
        "supersede": "no-effect",
    },
    "observed": {},
    "rejected": {},
    "refused": {},
    "recovered": {},
    "worse": {},
    "no-effect": {},
    "inconclusive": {},
    "failed": {},
    "expired": {},
    "cancelled": {},
}
PAIRS = [(outcome, event) for outcome in OUTCOMES for event in EVENTS]


def test_every_outcome_and_event_is_expected_or_refused():
    assert EXPECTED.keys() == set(OUTCOMES)
    assert {event for events in EXPECTED.values() for event in events} == set(EVENTS)
    assert len(PAIRS) == 16 * 16


@pytest.mark.parametrize(("outcome", "event"), PAIRS)
def test_advance(outcome, event):
    expected = EXPECTED[outcome].get(event)
    assert can(outcome, event) == (expected is not None)
    if expected is None:
        with pytest.raises(ValueError, match=f"event '{event}' is not possible for a decision that is {outcome}"):
            advance(outcome, event)
    else:
        assert advance(outcome, event) == expected


@pytest.mark.parametrize(("outcome", "event"), [pair for pair in PAIRS if pair[0] != "draft"])
def test_the_log_executes_the_table_and_leaves_what_is_final(outcome, event):
    log = DecisionLog("run", ("qk",))
    decision = Decision("d1", "run", 0.0, 1, "scale_lr", "enforce", outcome, policy="cut", multipliers={"qk": 0.5})
    log.restore([decision], [])
    if outcome in FINAL:
        assert log.advance(decision, event, detail="late") == decision
        assert log.take().transitions == ()
    elif can(outcome, event):
        after = replace(decision, outcome=EXPECTED[outcome][event], detail="why")
        assert log.advance(decision, event, detail="why") == after
        assert log.take().transitions == (after,)
    else:
        with pytest.raises(ValueError, match="not possible"):
            log.advance(decision, event)
        assert log.find("d1") == decision


@pytest.mark.parametrize("event", EVENTS)
def test_the_log_takes_a_draft_by_its_first_event_alone(event):
    log = DecisionLog("run", ("qk",))
    draft = Decision("d1", "run", 0.0, 1, "scale_lr", "enforce", "draft")
    if can("draft", event):
        assert log.add(draft, event).outcome == EXPECTED["draft"][event]
    else:
        with pytest.raises(ValueError, match="not possible"):
            log.add(draft, event)
        assert log.decisions == ()


def test_no_event_leads_back_to_a_draft_and_every_outcome_is_reached():
    assert set(TRANSITIONS.values()) == set(OUTCOMES) - {"draft"}


def test_which_outcomes_are_final_and_which_wait_for_the_trainer():
    assert {
        *("observed", "rejected", "refused", "failed", "expired", "cancelled"),
        *("recovered", "worse", "no-effect", "inconclusive"),
    } == FINAL
    assert {"approved", "sent"} == UNDER_WAY


# Of every outcome: whether it counts as done without having been applied, and applied; None where that can't be.
DONE = {
    "draft": (False, None),
    "observed": (False, None),
    "proposed": (False, None),
    "approved": (True, None),
    "rejected": (False, None),
    "refused": (False, None),
    "planned": (False, None),
    "sent": (True, None),
    "applied": (None, True),
    "recovered": (None, True),
    "worse": (None, True),
    "no-effect": (None, True),
    "inconclusive": (None, True),
    "failed": (False, True),  # applied, and so in a journal of an earlier version
    "expired": (False, None),
    "cancelled": (False, None),
}
ENDS = [
    (outcome, step)
    for outcome, done in DONE.items()
    for step, counts in zip((None, 5), done, strict=True)
    if counts is not None
]


def decision(outcome: str, applied_step: int | None, guard: str = "ok") -> Decision:
    return Decision("d1", "run", 0.0, 1, "scale_lr", "enforce", outcome, "cut", guard=guard, applied_step=applied_step)


def test_of_every_outcome_it_is_said_whether_it_counts():
    assert DONE.keys() == set(OUTCOMES)


@pytest.mark.parametrize(("outcome", "applied_step"), ENDS)
def test_what_counts_is_what_was_applied_or_may_be_at_any_moment(outcome, applied_step):
    assert took_effect(decision(outcome, applied_step)) == DONE[outcome][applied_step is not None]


@pytest.mark.parametrize(("outcome", "applied_step"), ENDS)
def test_what_came_to_nothing_had_left_and_did_not_count(outcome, applied_step):
    expected = applied_step is None and outcome in {"rejected", "failed", "expired", "cancelled"}
    assert came_to_nothing(decision(outcome, applied_step)) == expected
    assert not (came_to_nothing(decision(outcome, applied_step)) and took_effect(decision(outcome, applied_step)))


@pytest.mark.parametrize(("guard", "expected"), [("trainer: no", True), ("cooldown_steps: 9 have to pass", False)])
def test_a_refusal_came_to_nothing_where_the_trainer_refused(guard, expected):
    assert came_to_nothing(decision("refused", None, guard)) == expected
