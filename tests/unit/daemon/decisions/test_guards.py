"""Each guard alone: what it lets pass and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sharpwatch.daemon.config.config import ActionConfig, GuardConfig, PolicyConfig
from sharpwatch.daemon.decisions.guards import (
    GuardContext,
    Permissions,
    bounds,
    guard_name,
    judge_rollback,
    judge_scale,
)
from sharpwatch.daemon.records import Checkpoint, Decision, RollbackPlan

CUT = PolicyConfig(
    "cut", action=ActionConfig("scale_lr", factor=0.5), guard=GuardConfig(cooldown_steps=50, max_actions_per_hour=2)
)
FREE = Permissions("rollback", (0.05, 5.0), can_roll_back=True)
PLAN = RollbackPlan(Checkpoint(90, "file"), 95, 120)
ONE, HALF = {"qk": 1.0}, {"qk": 0.5}


def made(step: int, action: str = "scale_lr", outcome: str = "applied", **more) -> Decision:
    fields = {"policy": "cut", "applied_step": step, "made_at": 0.0, **more}
    return Decision("d1", "run", step=step, action=action, mode="enforce", outcome=outcome, **fields)


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
    assert bounds(CUT, FREE) == (0.1, 5.0)
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
        (made(160, outcome="observed"), "ok"),
        (made(160, outcome="refused", guard="control: no"), "ok"),
        (made(160, outcome="refused", guard="trainer: no"), "cooldown_steps"),
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
