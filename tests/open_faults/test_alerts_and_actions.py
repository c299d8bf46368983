"""Faults that there were: alerts that hid one another or never ended, and what policies did about them.

The runs are made by hand, so that every reading is known; the daemon is a real one.
"""

from __future__ import annotations

import pytest
from wire_trainer import direction


def policies(*lines: str) -> str:
    return "\n".join(["policies:", *(f"  - {line}" for line in lines)])


CUT_ON_INSTABILITY = policies(
    "{name: cut, match: {alert: StabilityLimit}, mode: enforce, action: {kind: scale_lr, blocks: all, factor: 0.5}, "
    "guard: {hold_steps: 50}}"
)
LADDER = policies(
    "{name: cut-blocks, match: {alert: NonFinite}, mode: enforce, "
    "action: {kind: scale_lr, blocks: alert, factor: 0.5}, "
    "guard: {min_multiplier: 0.1, cooldown_steps: 50, max_actions_per_hour: 100, hold_steps: 200}, "
    "escalate: {after_steps: 200, to: cut-all}}",
    "{name: cut-all, mode: enforce, action: {kind: scale_lr, blocks: all, factor: 0.5}, "
    "guard: {min_multiplier: 0.05, cooldown_steps: 100, max_actions_per_hour: 100}}",
)
CUT_ON_SPIKE = policies(
    "{name: cut, match: {alert: UpdateRmsSpike}, mode: enforce, action: {kind: scale_lr, blocks: all, factor: 0.2}, "
    "guard: {min_multiplier: 0.02, cooldown_steps: 2, max_actions_per_hour: 20}}"
)


def alerts(daemon) -> list[dict]:
    return daemon.cli("show", "run")["alerts"]


def decisions(daemon) -> list[dict]:
    return daemon.cli("decisions", "run")["decisions"]


@pytest.mark.parametrize("quiet", [15, 0])
def test_an_open_alert_does_not_hide_the_next_fault(daemon, train, quiet):
    trainer = train(daemon)
    trainer.steps(219)
    trainer.steps(10, update_rms={"emb": 3.0})
    trainer.steps(quiet)
    older = alerts(daemon)
    if [(alert["blocks"], alert["onset"], alert["active"]) for alert in older] != [(["emb"], 220, True)]:
        pytest.fail(f"not the alert that could hide another: {older}")
    damaged = trainer.step_taken + 1
    trainer.steps(20, weight_norm={"ffn": 300.0})
    newer = alerts(daemon)[1:]
    assert [(alert["name"], alert["blocks"], alert["onset"]) for alert in newer] == [("WeightJump", ["ffn"], damaged)]


def test_an_alert_whose_signal_stops_coming_closes_and_its_cut_is_ramped_back(make_daemon, train):
    daemon = make_daemon(CUT_ON_INSTABILITY)
    trainer = train(daemon)
    trainer.steps(30, direction=direction(0.1))
    trainer.steps(2, direction=direction(0.9))
    trainer.steps(600)  # no probe has a ratio any more
    if trainer.lowest != 0.5:
        pytest.fail("no alert, or no cut: nothing to end")
    assert [alert["active"] for alert in alerts(daemon)] == [False]
    assert set(trainer.multipliers.values()) == {1.0}


def test_trouble_in_bursts_escalates_along_the_chain(make_daemon, train):
    daemon = make_daemon(LADDER)
    trainer = train(daemon)
    trainer.steps(100)
    for _ in range(10):  # 5 steps of every 60, for 600 steps: three times as long as the chain waits
        trainer.steps(5, non_finite={"vo": 1, "ffn": 1})
        trainer.steps(55)
    acted = {made["policy"] for made in decisions(daemon) if made["applied_step"] is not None}
    if "cut-blocks" not in acted:
        pytest.fail("the chain was never entered")
    assert "cut-all" in acted


def test_cuts_of_a_healthy_run_do_not_add_up(make_daemon, train):
    daemon = make_daemon(CUT_ON_SPIKE)
    trainer = train(daemon)
    trainer.steps(70)
    for _ in range(4):  # some batches of rare tokens every 150 steps; the loss never moves
        trainer.steps(145)
        trainer.steps(5, update_rms={"emb": 1.8, "head": 1.8})
    trainer.steps(10)
    assert trainer.lowest >= 0.2, f"{trainer.lowest}: cut more than once"


def test_trouble_that_a_cut_does_not_cure_is_not_taken_for_cured(make_daemon, train):
    daemon = make_daemon(CUT_ON_SPIKE)
    trainer = train(daemon)
    trainer.steps(220)
    trainer.steps(60, update_rms={"ffn": 4.0})
    if trainer.lowest == 1.0:
        pytest.fail("no cut")
    assert "recovered" not in [made["outcome"] for made in decisions(daemon)]


def test_an_alert_of_probes_lasts_from_one_probe_to_the_next(daemon, train):
    trainer = train(daemon)
    for ratio in (*[0.1] * 15, *[0.9] * 6):
        trainer.step(direction=direction(ratio))
        trainer.steps(29)
    assert [(alert["name"], alert["active"]) for alert in alerts(daemon)] == [("StabilityLimit", True)]
