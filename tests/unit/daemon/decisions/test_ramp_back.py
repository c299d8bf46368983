"""Which changes of policies are in force, and how long each must hold."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from observations import incident

from sharpwatch.daemon.config.settings import ActionConfig, GuardConfig, PolicyConfig
from sharpwatch.daemon.decisions.decision_log import DecisionLog
from sharpwatch.daemon.decisions.ramp_back import hold_steps, quiet_since, scaling_state
from sharpwatch.daemon.decisions.transitions import UNDER_WAY, can
from sharpwatch.daemon.records import RENEWED, Decision, Outcome


class Book:
    """A decision log into which revisions are written one by one."""

    def __init__(self) -> None:
        self.log = DecisionLog("run", ("qk", "vo"))

    def put(
        self,
        action: str,
        qk: float = 1.0,
        vo: float = 1.0,
        *,
        policy: str = "p",
        undoes: int = 0,
        outcome: Outcome = "applied",
        reason: str = "",
    ) -> Book:
        number = len(self.log.revisions) + 1
        step = 10 * number
        draft = Decision(
            f"d{number}",
            "run",
            0.0,
            step,
            action,
            "enforce",
            "draft",
            policy=policy,
            alert_name="A",
            multipliers={"qk": qk, "vo": vo},
            reason=reason,
        )
        made = self.log.revise(self.log.add(draft, "send"), author="x", reason="", now=0.0, undoes=undoes)
        if outcome == "applied":
            made = self.log.advance(made, "apply", applied_step=step)
            self.log.applied(number, step)
        elif outcome == "expired":
            made = self.log.advance(made, "expire")
        assert made.outcome == outcome
        return self

    def active(self) -> list[dict[str, float]]:
        return [dict(scaling.factors) for scaling in scaling_state(self.log).active]


def test_cuts_pile_up_and_come_off_newest_first():
    book = Book().put("scale_lr", 0.5, 0.5).put("scale_lr", 0.25, 0.5)
    assert book.active() == [{"qk": 0.5, "vo": 0.5}, {"qk": 0.5}]
    book.put("ramp_back", 0.5, 0.5)
    assert book.active() == [{"qk": 0.5, "vo": 0.5}]
    taken_back = scaling_state(book.log).ramped_back
    assert (taken_back.made.policy, taken_back.made.id, taken_back.factors) == ("p", "d2", {"qk": 0.5})


def test_a_renewal_changes_nothing_so_that_a_stage_before_it_can_still_be_undone():
    book = Book().put("scale_lr", 0.25).put("ramp_back", 0.5)
    before = scaling_state(book.log)
    book.put("set_lr", 0.5, policy="", reason=RENEWED)
    assert scaling_state(book.log) == before
    assert quiet_since([], book.log.changed_at, 100) == 20
    book.put("set_lr", 0.25, undoes=2)
    assert book.active() == [{"qk": 0.25}]


def test_what_never_took_effect_is_no_cut():
    assert Book().put("scale_lr", 0.5, outcome="expired").active() == []
    assert Book().put("scale_lr", 0.5, outcome="sent").active() == [{"qk": 0.5}]


def test_a_block_that_an_operator_moves_is_no_longer_the_daemons():
    book = Book().put("scale_lr", 0.5, 0.5).put("set_lr", 0.7, 0.5, policy="")
    assert book.active() == [{"vo": 0.5}]
    book.put("set_lr", 0.7, 0.9, policy="")
    assert book.active() == []


def test_a_ramp_taken_back_doubles_the_hold_until_a_fresh_start():
    policy = PolicyConfig("p", action=ActionConfig("scale_lr", factor=0.5), guard=GuardConfig(hold_steps=100))
    book = Book().put("scale_lr", 0.5)
    for failed in (1, 2, 3):
        book.put("ramp_back", 1.0)
        book.put("set_lr", 0.5, undoes=len(book.log.revisions))
        assert scaling_state(book.log).failed_ramp_backs == failed
        assert hold_steps(policy, failed) == 100 * 2**failed
        assert book.active() == [{"qk": 0.5}]
    book.put("ramp_back", 1.0).put("scale_lr", 0.5)
    assert scaling_state(book.log).failed_ramp_backs == 0


def test_a_raise_ends_with_its_ttl():
    policy = PolicyConfig(
        "p", action=ActionConfig("scale_lr", factor=2.0, ttl_steps=70), guard=GuardConfig(hold_steps=100)
    )
    assert hold_steps(policy, 0) == 70


def test_quiet_since_the_newest_trouble_or_change_on_this_timeline():
    incidents = [incident(first_step=1, last_step=last, active=False) for last in (30, 500)]
    changed_at = Book().put("scale_lr", 0.5).put("scale_lr", 0.2).log.changed_at  # applied at 10 and 20
    assert quiet_since(incidents, changed_at, 100) == 30
    assert quiet_since(incidents, changed_at, 25) == 20
    assert quiet_since(incidents, changed_at, 15) == 10
    assert quiet_since([], (), 25) == 25


def test_a_cut_that_only_a_later_set_brought_comes_off():
    book = Book().put("scale_lr", 0.5, 0.5, outcome="sent")
    book.put("set_lr", 3.0, 0.5, policy="")  # an operator's, of qk
    lost, _ = book.log.decisions
    book.log.advance(lost, "expire")
    assert book.active() == [{"vo": 0.5}]


PUT = st.tuples(
    st.sampled_from(["scale_lr", "ramp_back", "set_lr"]),
    st.sampled_from([0.25, 0.5, 1.0]),
    st.sampled_from([0.5, 1.0]),
    st.sampled_from(["p", "q", ""]),
    st.sampled_from(["applied", "sent", "expired"]),
    st.integers(0, 3),  # it undoes the one so many before it; 0 for none
)
EVENT = st.tuples(st.integers(1, 20), st.sampled_from(["apply", "expire", "fail", "worsen", "supersede", "asked"]))


@settings(max_examples=150, deadline=None)
@given(st.lists(PUT | EVENT, max_size=40))
def test_what_is_followed_step_by_step_is_what_the_whole_log_says(events):
    """Also where it has forgotten what was known after older revisions, and where one of these changes."""
    book = Book()
    for event in events:
        if len(event) == 2:
            change(book.log, *event)
        else:
            action, qk, vo, policy, outcome, back = event
            undoes = len(book.log.revisions) + 1 - back if back else 0
            book.put(action, qk, vo, policy=policy, outcome=outcome, undoes=max(0, undoes))
        anew = DecisionLog("run", book.log.blocks)
        anew.restore(book.log.decisions, book.log.revisions)
        assert scaling_state(book.log) == scaling_state(anew)
        assert book.log.effective() == anew.effective()
        assert book.log.number_in_force == anew.number_in_force
        assert book.log.changed_at == anew.changed_at
        with book.log.trial():
            book.put("scale_lr", 0.25)
            scaling_state(book.log)
        assert scaling_state(book.log) == scaling_state(anew)


def change(log: DecisionLog, newest: int, event: str) -> None:
    """Have something happen to the decision that is so many from the newest, where it can."""
    if newest > len(log.decisions):
        return
    made = log.decisions[-newest]
    if event == "asked" and made.outcome in UNDER_WAY:
        log.note(made, cancelled_by="somebody")
    elif event != "asked" and can(made.outcome, event):
        log.advance(made, event, **({"applied_step": made.step} if event == "apply" else {}))
        if event == "apply":
            log.applied(made.revision, made.step)
