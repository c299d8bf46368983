"""What is done about an incident by its cause, and what it is judged to have done."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from controlled_run import BLOCKS, CUT, GUARD, ROLLBACK, Trainer, restored, saved, trained

from sharpwatch.daemon.config.settings import ActionConfig, EscalateConfig, MatchConfig, PolicyConfig
from sharpwatch.daemon.decisions.muting import Silences
from sharpwatch.daemon.decisions.run_controller import RunController
from sharpwatch.daemon.records import Silence

STEPS = 30  # until a cut of rates is judged
RATE = PolicyConfig(
    "rate",
    MatchConfig(cause="learning-rate"),
    "enforce",
    ActionConfig("scale_lr", "all", factor="auto"),
    replace(GUARD, min_multiplier=0.01, recover_within_steps=STEPS),
    EscalateConfig(400, "back"),
)
BACK = PolicyConfig("back", MatchConfig(cause="damaged-weight"), "enforce", ActionConfig("rollback", skip_margin=0))
POLICIES = (RATE, BACK)


class RateTrainer(Trainer):
    """One whose loss is higher by 1 for 10 steps after each that was made at more than 1.3 times the usual rate."""

    hurt = 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.hurt = 10 if self.rate * self.multipliers["ffn"] > 1.3e-3 else max(0, self.hurt - 1)
            self.loss = 4.0 if self.hurt else 3.0
            super().run(1)


def trainer(policies=POLICIES, **options) -> RateTrainer:
    made = RateTrainer(policies, lr_bounds=(0.001, 10.0), **options)
    made.run(200)
    return made


def at_rest(made: Trainer) -> bool:
    return made.multipliers == dict.fromkeys(BLOCKS, 1.0)


@pytest.mark.parametrize("factor", [3.0, 10.0, 30.0])
def test_a_rate_that_jumps_is_cut_at_once_to_what_it_was_and_never_met_again(factor):
    run = trainer()
    run.rate *= factor
    run.run(1500)
    assert run.actions() == [("scale_lr", "recovered")]
    assert run.multipliers == pytest.approx(dict.fromkeys(BLOCKS, 1 / factor), rel=1e-6)
    (made,) = run.controller.decisions
    assert f"its schedule has ×{factor:g} of what it would have" in made.detail
    assert "held down while the rate is too high" in made.detail
    assert made.applied_step <= 205
    (incident,) = run.controller.incidents
    assert (incident.active, incident.contained_step > made.applied_step) == (True, True)


def test_it_comes_back_with_the_rate():
    run = trainer()
    run.rate *= 10
    run.run(300)
    run.rate /= 10
    run.run(3)
    assert at_rest(run)
    run.run(40)
    assert [each.active for each in run.controller.incidents] == [False]
    run.run(1000)
    assert run.actions() == [("scale_lr", "recovered"), ("set_lr", "recovered")]


def test_a_silence_lets_it_come_back_with_the_rate_but_cuts_no_further():
    silences = Silences()
    run = trainer(silences=silences.active)
    run.rate *= 10
    run.run(100)
    silences.add(Silence("s1", "ann", "a sweep", run.now, run.now + 1e6, cause="learning-rate"))
    run.rate *= 2
    run.run(20)
    assert run.multipliers["ffn"] == pytest.approx(0.1)
    assert [(made.action, made.guard.partition(":")[0]) for made in run.controller.decisions] == [
        ("scale_lr", "ok"),
        ("set_lr", "silence"),
    ]
    run.rate /= 20
    run.run(3)
    assert at_rest(run)


@pytest.mark.parametrize("growth", [1.01, 1.02])
def test_a_rate_that_climbs_is_held_where_it_was(growth):
    run = trainer((replace(RATE, escalate=EscalateConfig(50, "back")), BACK))
    saved(run, 150)
    for _ in range(300):
        run.rate = min(run.rate * growth, 30e-3)
        run.run(1)
        assert run.rate * run.multipliers["ffn"] < 1.3e-3
    run.run(100)
    assert 0.8e-3 < run.rate * run.multipliers["ffn"] < 1.2e-3
    assert {made.outcome for made in run.controller.decisions} == {"recovered"}
    assert [made.action for made in run.controller.decisions[:3]] == ["scale_lr", "set_lr", "set_lr"]


def test_a_schedule_that_decays_goes_on_decaying_under_the_cut():
    run = trainer()
    run.rate *= 10
    for _ in range(1000):
        run.rate *= 0.998
        run.run(1)
    assert run.multipliers["ffn"] == pytest.approx(0.1, rel=0.01)


def test_a_restart_goes_on_holding_it():
    run = trainer()
    run.rate *= 10
    run.run(100)
    run.controller = restored(run)
    run.run(700)
    assert run.multipliers["ffn"] == pytest.approx(0.1)
    run.rate /= 10
    run.run(5)
    assert at_rest(run)


def test_what_begins_while_a_rate_is_held_down_is_an_incident_of_its_own():
    run = trainer((*POLICIES, CUT))
    run.rate *= 10
    run.run(100)
    run.heat["ffn"] = 1000.0
    run.run(2)
    assert [each.name for each in run.controller.incidents] == ["RateRaise", "NonFinite"]
    run.heat["ffn"] = 0.0
    run.run(400)
    assert run.multipliers["ffn"] == pytest.approx(0.1)  # of the other cut nothing is left


def test_a_loss_that_does_not_come_back_sends_it_to_the_checkpoint_before():
    run = trainer()
    saved(run, 150)
    run.rate *= 10
    run.run(5)
    run.run = lambda steps: Trainer.run(run, steps)  # the loss stays where it is, though the rate is back
    run.loss = 5.0
    run.run(STEPS + 5)
    assert run.actions()[0] == ("scale_lr", "worse")
    made = run.controller.decisions[1]
    assert (made.action, made.policy, made.rollback.checkpoint.step) == ("rollback", "back", 150)


def trained_rate(run) -> float:
    """The rate that the run trains at, in units of what it should be."""
    return run.rate * run.multipliers["ffn"] / 1e-3


def test_a_cut_that_is_not_enough_does_not_make_the_rate_the_runs_own():
    run = RateTrainer(POLICIES, lr_bounds=(0.1, 10.0))
    run.run(200)
    run.rate *= 30
    run.run(800)
    assert trained_rate(run) == pytest.approx(3.0)
    assert run.controller.incidents[0].active


def test_a_fault_that_comes_again_is_held_at_once():
    run = trainer()
    for steps in (100, 50, 300):
        run.rate = 1e-2
        run.run(3)
        assert trained_rate(run) < 1.2
        run.run(steps)
        run.rate = 1e-3
        run.run(30)
        assert at_rest(run)


def test_a_next_attempt_with_the_fault_still_in_its_schedule_is_held():
    run = trainer()
    run.rate *= 10
    run.run(300)
    earlier, run.controller = run.controller, RunController("run", **run.options)
    run.controller.take_over(earlier)
    run.multipliers = dict.fromkeys(BLOCKS, 1.0)  # of a process that begins anew
    run.run(20)
    assert trained_rate(run) == pytest.approx(1.0)
    run.run(600)
    assert trained_rate(run) == pytest.approx(1.0)


def test_a_rate_that_wobbles_brings_a_decision_every_ten_steps_at_most():
    run = trainer()
    for i in range(500):
        run.rate = 1e-2 * (1.08 if i % 2 else 0.92)
        run.run(1)
    assert len(run.controller.decisions) <= 50
    assert 0.8 < trained_rate(run) < 1.2


def test_however_little_a_rate_was_held_down_nothing_of_it_is_left():
    run = trainer()
    for _ in range(30):
        run.rate = min(1.12e-3, run.rate * 1.01)
        run.run(1)
    run.run(50)
    run.rate = 1e-3
    run.run(30)
    assert at_rest(run)


def test_another_cut_stays_on_top_of_one_that_goes_with_the_rate():
    run = trainer((*POLICIES, replace(CUT, guard=replace(GUARD, min_multiplier=0.01))))
    run.rate *= 10
    run.run(60)
    run.heat["ffn"] = 1000.0
    run.run(3)
    run.heat["ffn"] = 0.0
    assert run.multipliers["ffn"] == pytest.approx(0.05)
    run.rate /= 10
    run.run(10)
    assert run.multipliers == pytest.approx(dict.fromkeys(BLOCKS, 1.0) | {"ffn": 0.5})
    run.run(400)
    assert at_rest(run)


def test_an_operators_word_goes_before_a_cut_that_goes_with_the_rate():
    run = trainer()
    run.rate *= 10
    run.run(60)
    run.take(run.controller.undo(0, "ann", "I know", run.now))
    run.run(100)
    assert at_rest(run)
    (incident,) = run.controller.incidents
    assert (incident.active, incident.contained_step) == (True, 0)


def test_a_fault_that_was_over_before_its_cut_came_needs_no_rollback():
    run = trainer()
    saved(run, 150)
    run.rate *= 10
    run.run(4)
    run.rate /= 10
    run.run(60)
    assert "rollback" not in [made.action for made in run.controller.decisions]
    assert at_rest(run)


def test_a_held_rate_waits_for_losses_that_are_rare():
    run = trainer()
    saved(run, 150)
    losses = iter(range(10**6))
    run.observe = lambda: Trainer.observe(run, 3.0 if next(losses) % 40 == 0 else math.nan)
    run.rate *= 10
    run.run(1000)
    assert run.actions() == [("scale_lr", "recovered")]


def test_a_policy_that_is_gone_from_the_configuration_leaves_no_cut_behind():
    run = trainer()
    run.rate *= 10
    run.run(100)
    run.options |= {"policies": ()}
    run.controller = restored(run)
    run.rate /= 10
    run.run(20)
    assert at_rest(run)


def test_what_speaks_against_a_stage_is_answered_once():
    run = trained((replace(CUT, guard=replace(GUARD, max_actions_per_hour=100)),))
    run.heat["ffn"] = 20.0
    run.run(3)
    run.heat["ffn"] = 0.0
    run.run(GUARD.hold_steps + 25)
    run.refuses = "no"
    before = len(run.controller.decisions)
    observe = run.controller.observe
    run.controller.observe = lambda seen, now: observe(replace(seen, no_descent=True), now)
    run.run(15)
    assert len(run.controller.decisions) - before <= 2


def test_after_a_rollback_the_fault_that_is_still_to_come_is_not_met_again():
    run = trainer()
    saved(run, 150)
    schedule = {True: 1e-2, False: 1e-3}
    run.rate = 1e-2
    run.run(50)
    run.take(run.controller.request_rollback(None, 0, 0, "ann", "", run.now))
    rates = []
    for _ in range(400):
        run.rate = schedule[run.step + 1 > 200 or run.step < 151]
        run.run(1)
        rates.append(trained_rate(run))
    assert max(rates[2:]) < 1.2
    assert rates[-1] == pytest.approx(1.0)
    assert [each.contained_step > 0 for each in run.controller.incidents if each.active] == [True]


def test_in_observe_mode_nothing_is_done_and_each_turn_is_told_once():
    run = trainer(mode="observe")
    run.rate *= 10
    run.run(450)
    assert run.actions() == [("scale_lr", "observed"), ("rollback", "observed")]
    assert at_rest(run)
    run.controller.set_mode("enforce")
    run.run(20)
    assert run.multipliers["ffn"] == pytest.approx(0.1)  # the ladder begins at its foot


def test_a_proposal_that_was_approved_goes_with_the_rate():
    run = trainer(mode="advise")
    run.rate *= 10
    run.run(5)
    (made,) = run.controller.decisions
    run.take(run.controller.approve(made.id, "ann", "", run.now))
    run.run(50)
    assert run.multipliers["ffn"] == pytest.approx(0.1)
    run.rate /= 10
    run.run(100)
    # It was approved as one that goes with the rate.
    assert run.actions() == [("scale_lr", "recovered"), ("set_lr", "recovered")]
    assert at_rest(run)


def test_no_cut_helps_against_numbers_that_are_not_finite_and_the_rollback_comes_at_once():
    cut = replace(RATE, match=MatchConfig(cause="non-finite"))
    run = trained((cut, replace(BACK, match=MatchConfig())), steps=200)
    saved(run, 190)
    run.heat["ffn"] = 20.0
    run.run(3)
    refused, back = run.controller.decisions
    assert refused.guard.startswith("factor: no learning rate makes numbers finite again; a rollback")
    assert (back.action, back.outcome, back.step - refused.step) == ("rollback", "applied", 1)
    assert "no learning rate makes numbers finite again" in back.detail
    run.run(60)
    assert back.id == run.controller.decisions[-1].id
    assert run.controller.decisions[-1].outcome == "recovered"


class ColdTrainer(Trainer):
    """One that begins with steps which change 30 % of its weights, where no multiplier cuts them."""

    def observe(self, loss=None, **layers):
        super().observe(loss, second_moment=np.float32(1), weight_norm=np.float32(1e-3 * 1000**0.5 / 0.3), **layers)


def test_a_run_without_a_warm_up_begins_anew_under_the_cut():
    run = ColdTrainer((RATE, ROLLBACK), lr_bounds=(0.001, 10.0))
    saved(run, 0)
    run.run(6)
    assert run.actions() == [("scale_lr", "no-effect"), ("rollback", "applied")]
    cut, back = run.controller.decisions
    assert "only beginning anew takes that back" in cut.detail
    assert back.rollback.checkpoint.step == 0
    run.run(8)
    assert run.actions()[2:] == []  # not met again
    assert run.multipliers == pytest.approx(dict.fromkeys(BLOCKS, 0.05 / 0.3), rel=1e-3)
    run.run(2000)
    assert at_rest(run)


def test_a_run_without_a_warm_up_and_a_checkpoint_is_told_so():
    run = ColdTrainer((RATE, ROLLBACK), lr_bounds=(0.001, 10.0))
    run.run(20)
    assert run.actions() == [("scale_lr", "no-effect"), ("rollback", "refused")]
    assert run.controller.decisions[-1].guard == "checkpoint: there is none from before the onset"
