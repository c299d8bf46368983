"""What a policy would do about an alert, and each guard alone: what it lets pass and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from observations import incident

from sharpwatch.daemon.config.settings import ActionConfig, EscalateConfig, GuardConfig, MatchConfig, PolicyConfig
from sharpwatch.daemon.decisions.guards import (
    GuardContext,
    Permissions,
    bounds,
    guard_name,
    judge_rollback,
    judge_scale,
)
from sharpwatch.daemon.decisions.policy import EscalationChain, affected, newest, rollback_plan, scaled, strongest
from sharpwatch.daemon.decisions.transitions import OUTCOMES
from sharpwatch.daemon.records import Checkpoint, Decision, RollbackPlan

BLOCKS = ("emb", "qk", "vo", "ffn")
INCIDENT = incident("a1", layer_blocks=("layers.0.ffn", "layers.1.ffn", "layers.0.qk"), last_step=120)


def policy(name: str, *, alert: str = "LossSpike", to: str = "", **action) -> PolicyConfig:
    escalate = EscalateConfig(50, to) if to else None
    return PolicyConfig(name, MatchConfig(alert), action=ActionConfig(**action), escalate=escalate)


def answer(name: str, step: int, alert: str = "a1") -> Decision:
    return Decision("d", "run", 0.0, step, "scale_lr", "enforce", "applied", policy=name, alert_id=alert)


@pytest.mark.parametrize(
    ("blocks", "named", "expected"),
    [
        ("alert", ("ffn", "qk"), ("qk", "ffn")),
        ("alert", (), BLOCKS),
        ("all", ("qk",), BLOCKS),
        (("vo", "head"), (), ("vo",)),
    ],
)
def test_affected_blocks(blocks, named, expected):
    assert affected(policy("p", blocks=blocks), incident(layer_blocks=named), BLOCKS) == expected


@given(
    now=st.dictionaries(st.sampled_from(BLOCKS), st.floats(0.01, 20), min_size=1),
    factor=st.floats(0.01, 100).filter(lambda factor: factor != 1),
    low=st.floats(0.05, 1),
    high=st.floats(1, 10),
)
def test_scaled_moves_the_right_way_and_never_past_a_bound(now, factor, low, high):
    after = scaled(now, dict.fromkeys(now, factor), (low, high))
    for block, value in after.items():
        was = now[block]
        assert (value <= was) if factor < 1 else (value >= was)
        assert min(low, was) <= value <= max(high, was)


def test_others_keep_what_they_have():
    assert scaled({"qk": 0.8, "vo": 2.0}, {"qk": 0.5}, (0.1, 10.0)) == {"qk": 0.4, "vo": 2.0}


@pytest.mark.parametrize(
    ("match", "answers"),
    [
        (MatchConfig(), False),
        (MatchConfig("LossSpike"), True),
        (MatchConfig("WeightJump"), True),
        (MatchConfig("DeadBlock"), False),
        (MatchConfig(cause="damaged-weight"), True),
        (MatchConfig(cause="data"), False),
        (MatchConfig("LossSpike", cause="damaged-weight"), True),
        (MatchConfig("LossSpike", cause="data"), False),
        (MatchConfig("DeadBlock", cause="damaged-weight"), False),
    ],
)
def test_a_policy_answers_any_alert_of_an_incident_or_its_cause_from_a_severity_on(match, answers):
    seen = incident(name="WeightJump", names=("WeightJump", "LossSpike"), cause="damaged-weight", severity="warning")
    critical, severe = replace(seen, severity="critical"), replace(match, severity="critical")
    assert (match.answers(seen), match.answers(critical)) == (answers, answers)
    assert (severe.answers(seen), severe.answers(critical)) == (False, answers)


def test_the_chain_is_followed_policy_by_policy_for_each_alert():
    chain = EscalationChain((policy("cut", to="more"), policy("more", alert="", to="back"), policy("back", alert="")))

    def answering(decisions: list[Decision], step: int, *others: Incident) -> list[str]:
        return [
            one.name for one in chain.answering(INCIDENT, (*others, INCIDENT), decisions, step, lambda _: "enforce")
        ]

    assert answering([], 1000) == ["cut"]
    assert answering([answer("cut", 100)], 149) == ["cut"]
    assert answering([answer("cut", 100)], 150) == ["more"]
    assert answering([answer("cut", 100), answer("more", 150)], 199) == ["more"]
    assert answering([answer("cut", 100), answer("more", 150)], 200) == ["back"]
    # Trouble in bursts is one: of the same cause, with less than the hold in between.
    earlier = answer("cut", 60, alert="earlier")
    burst = replace(INCIDENT, id="earlier", onset=INCIDENT.onset - 50, last_step=INCIDENT.onset - 40)
    assert answering([earlier], 200) == ["cut"]
    assert answering([earlier], 200, burst) == ["more"]
    assert answering([earlier], 200, replace(burst, cause="instability")) == ["cut"]
    long_ago = replace(burst, onset=INCIDENT.onset - 300, last_step=INCIDENT.onset - 201)
    assert answering([earlier], 200, long_ago) == ["cut"]


def test_rollback_goes_before_the_onset_and_skips_its_data():
    saved = [Checkpoint(50, "a"), Checkpoint(99, "b"), Checkpoint(99, "c"), Checkpoint(100, "d")]
    plan = rollback_plan(policy("p", kind="rollback", skip_margin=10), INCIDENT, saved, 130)
    assert plan == RollbackPlan(Checkpoint(99, "c"), 100, 141)
    far = rollback_plan(policy("p", kind="rollback", skip_margin=10), INCIDENT, saved[:1], 130)
    assert far == RollbackPlan(Checkpoint(50, "a"), 90, 141)
    assert rollback_plan(policy("p", kind="rollback"), INCIDENT, saved[3:], 130) is None
    assert newest(saved, None) == saved[3]


def test_strongest_mode():
    modes = [PolicyConfig("a", mode="advise"), PolicyConfig("b", mode="observe")]
    assert (strongest(modes), strongest([])) == ("advise", "observe")


CUT = PolicyConfig(
    "cut", action=ActionConfig("scale_lr", factor=0.5), guard=GuardConfig(cooldown_steps=50, max_actions_per_hour=2)
)
FREE = Permissions("rollback", (0.05, 5.0), can_roll_back=True)
PLAN = RollbackPlan(Checkpoint(90, "file"), 95, 120)
ONE, HALF = {"qk": 1.0}, {"qk": 0.5}


def made(step: int, action: str = "scale_lr", outcome: str = "applied", **more) -> Decision:
    fields = {"policy": "cut", "applied_step": step, "made_at": 0.0, "mode": "enforce", **more}
    return Decision("d1", "run", step=step, action=action, outcome=outcome, **fields)


def scale(*decisions: Decision, step: int = 200, now: float = 4000.0, before=ONE, after=HALF, policy=CUT, allowed=FREE):
    return guard_name(judge_scale(policy, before, after, allowed, GuardContext(step, now, decisions)))


def back(*decisions: Decision, step: int = 2000, plan=PLAN, allowed=FREE):
    return guard_name(judge_rollback(CUT, plan, allowed, GuardContext(step, 4000.0, decisions)))


def test_nothing_in_the_way():
    assert (scale(), back()) == ("ok", "ok")


def test_control():
    none = Permissions("none", (0.1, 10.0), can_roll_back=True)
    rates = Permissions("lr", (0.1, 10.0), can_roll_back=False)
    assert (scale(allowed=none), back(allowed=none)) == ("control", "control")
    assert (scale(allowed=rates), back(allowed=rates)) == ("ok", "control")
    assert back(allowed=replace(rates, can_roll_back=True)) == "ok"


def test_bounds_are_the_tighter_of_the_two():
    assert bounds(CUT, FREE) == (0.05, 5.0)
    assert bounds(CUT, Permissions("lr", (0.4, 20.0), can_roll_back=False)) == (0.4, 10.0)


def test_an_action_that_changes_nothing_names_its_bound():
    assert scale(after=ONE) == "min_multiplier"
    assert scale(after=ONE, policy=replace(CUT, action=replace(CUT.action, factor=2.0))) == "max_multiplier"


def test_a_raise_does_not_put_its_time_out_over_raises_in_force():
    double = replace(CUT, action=replace(CUT.action, factor=2.0, ttl_steps=9))
    assert scale(before={"qk": 1.0, "emb": 4.0}, after={"qk": 2.0, "emb": 4.0}, policy=double) == "ttl_steps"


@pytest.mark.parametrize(
    ("decision", "verdict"),
    [
        (made(151), "cooldown_steps"),
        (made(150), "ok"),
        (made(100, applied_step=160), "cooldown_steps"),
        (made(160, policy="another"), "cooldown_steps"),
        (made(160, "rollback"), "cooldown_steps"),
        (made(160, "set_lr"), "cooldown_steps"),
        (made(160, "ramp_back"), "ok"),
        (made(160, "set_lr", policy=""), "ok"),
        (made(160, outcome="observed", applied_step=None), "ok"),
        (made(160, outcome="refused", guard="control: no", applied_step=None), "ok"),
        (made(160, outcome="refused", guard="trainer: no", applied_step=None, alert_id="earlier"), "ok"),
    ],
)
def test_cooldown(decision, verdict):
    assert scale(decision) == verdict


def test_what_was_done_before_a_rollback_has_its_steps_on_a_timeline_that_was_left():
    back = made(290, "rollback", applied_step=101)
    assert scale(made(280), back, step=152) == "ok"
    assert scale(made(280), back, step=150) == "cooldown_steps"


def test_actions_per_hour_count_the_policys_own_that_left():
    two = made(10, made_at=500.0), made(70, made_at=900.0)
    assert scale(*two) == "max_actions_per_hour"
    assert scale(*two, now=4100.1) == "ok"
    assert scale(two[0], replace(two[1], policy="another")) == "ok"
    assert scale(two[0], replace(two[1], action="set_lr")) == "ok"


UNDONE = {"draft", "observed", "proposed", "rejected", "refused", "expired", "cancelled"}


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("mode", ["advise", "enforce"])
def test_only_what_was_done_or_is_under_way_uses_up_a_limit(outcome, mode):
    """For another alert than the one it was about: `test_the_same_is_not_tried_at_every_step` has the same alert."""
    step = None if outcome in UNDONE | {"approved", "sent"} else 160
    like = {"outcome": outcome, "mode": mode, "applied_step": step, "alert_id": "earlier", "made_at": 3900.0}
    counts = outcome not in UNDONE
    assert scale(made(160, **like)) == ("cooldown_steps" if counts else "ok")
    assert scale(
        made(10, **like | {"applied_step": step and 10}), made(11, **like | {"applied_step": step and 11})
    ) == ("max_actions_per_hour" if counts else "ok")
    assert back(made(1900, "rollback", **like | {"applied_step": step and 1900})) == (
        "rollback_window_steps" if counts else "ok"
    )


def test_what_failed_before_it_was_applied_did_nothing():
    assert scale(made(160, outcome="failed", applied_step=None, alert_id="earlier")) == "ok"
    assert scale(made(160, outcome="failed", alert_id="earlier")) == "cooldown_steps"


@pytest.mark.parametrize(
    "end",
    [
        {"outcome": "expired"},
        {"outcome": "failed"},
        {"outcome": "refused", "guard": "trainer: no"},
    ],
    ids=lambda end: end["outcome"],
)
@pytest.mark.parametrize("mode", ["advise", "enforce"])
def test_the_same_is_not_tried_at_every_step(end, mode):
    like = {**end, "applied_step": None, "mode": mode, "alert_id": "a1", "made_at": 3900.0}

    def verdict(*decisions, at=200, policy=CUT, alert="a1", in_mode=mode):
        context = GuardContext(at, 4000.0, decisions, alert, mode=in_mode)
        return guard_name(judge_scale(policy, ONE, HALF, FREE, context))

    one, two = made(160, **like), made(161, **like)
    assert verdict(one) == "cooldown_steps"
    assert verdict(one, at=210) == "ok"
    assert verdict(one, two, at=300) == "max_actions_per_hour"
    assert verdict(replace(one, made_at=300.0), replace(two, made_at=300.0), at=300) == "ok"
    assert verdict(one, two, alert="a2") == "ok"
    assert verdict(one, two, policy=replace(CUT, name="another")) == "ok"
    # Proposals that nobody answered must not keep a run from acting once it is set to enforce.
    assert verdict(one, two, in_mode="enforce" if mode == "advise" else "advise") == "ok"


def test_one_rollback_a_window_and_only_to_a_checkpoint():
    assert back(plan=None) == "checkpoint"
    assert back(made(1500, "rollback", applied_step=1001)) == "rollback_window_steps"
    assert back(made(1500, "rollback", applied_step=1000)) == "ok"
    assert back(made(1500, "rollback", applied_step=1001, policy="")) == "ok"


def test_what_was_decided_at_steps_still_ahead_holds_nothing_up():
    """The trainer died and began again from a checkpoint."""
    ahead = made(5000)
    assert scale(ahead, step=1000) == "ok"
    assert scale(ahead, made(990), step=1000) == "cooldown_steps"
    assert back(made(5000, "rollback", outcome="sent", applied_step=None), step=1000) == "ok"
