"""What a policy would do about an alert."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharpwatch.daemon.config.config import ActionConfig, EscalateConfig, MatchConfig, PolicyConfig
from sharpwatch.daemon.decisions.policy import EscalationChain, affected, newest, rollback_plan, scaled, strongest
from sharpwatch.daemon.records import Alert, Checkpoint, Decision, RollbackPlan

BLOCKS = ("emb", "qk", "vo", "ffn")
ALERT = Alert("a1", "run", "LossSpike", ("ffn", "qk"), "warning", "", 100, 120, active=True)


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
    alert = Alert("a1", "run", "LossSpike", named, "warning", "", 1, 1, active=True)
    assert affected(policy("p", blocks=blocks), alert, BLOCKS) == expected


@given(
    now=st.dictionaries(st.sampled_from(BLOCKS), st.floats(0.01, 20), min_size=1),
    factor=st.floats(0.01, 100).filter(lambda factor: factor != 1),
    low=st.floats(0.05, 1),
    high=st.floats(1, 10),
)
def test_scaled_moves_the_right_way_and_never_past_a_bound(now, factor, low, high):
    after = scaled(now, now, factor, (low, high))
    for block, value in after.items():
        was = now[block]
        assert (value <= was) if factor < 1 else (value >= was)
        assert min(low, was) <= value <= max(high, was)


def test_others_keep_what_they_have():
    assert scaled({"qk": 0.8, "vo": 2.0}, ["qk"], 0.5, (0.1, 10.0)) == {"qk": 0.4, "vo": 2.0}


def test_the_chain_is_followed_policy_by_policy_for_each_alert():
    chain = EscalationChain((policy("cut", to="more"), policy("more", alert="", to="back"), policy("back", alert="")))

    def answering(decisions: list[Decision], step: int) -> list[str]:
        return [one.name for one in chain.answering(ALERT, decisions, step)]

    assert answering([], 1000) == ["cut"]
    assert answering([answer("cut", 100)], 149) == ["cut"]
    assert answering([answer("cut", 100)], 150) == ["more"]
    assert answering([answer("cut", 100), answer("more", 150)], 199) == ["more"]
    assert answering([answer("cut", 100), answer("more", 150)], 200) == ["back"]
    assert answering([answer("cut", 100, alert="an earlier one")], 200) == ["cut"]


def test_rollback_goes_before_the_onset_and_skips_its_data():
    saved = [Checkpoint(50, "a"), Checkpoint(99, "b"), Checkpoint(99, "c"), Checkpoint(100, "d")]
    plan = rollback_plan(policy("p", kind="rollback", skip_margin=10), ALERT, saved, 130)
    assert plan == RollbackPlan(Checkpoint(99, "c"), 100, 141)
    far = rollback_plan(policy("p", kind="rollback", skip_margin=10), ALERT, saved[:1], 130)
    assert far == RollbackPlan(Checkpoint(50, "a"), 90, 141)
    assert rollback_plan(policy("p", kind="rollback"), ALERT, saved[3:], 130) is None
    assert newest(saved, None) == saved[3]


def test_strongest_mode():
    modes = [PolicyConfig("a", mode="advise"), PolicyConfig("b", mode="observe")]
    assert (strongest(modes), strongest([])) == ("advise", "observe")
