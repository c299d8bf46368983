"""The autopilot: what it wants by the probes, and what becomes of that in each mode and beside other decisions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from controlled_run import BLOCKS, CUT, Trainer, restored

from sharpwatch.daemon.config.settings import (
    AutopilotConfig,
    CurvatureShareConfig,
    MaintenanceConfig,
    StabilityCapConfig,
)
from sharpwatch.daemon.decisions.autopilot import capped, wanted_multipliers
from sharpwatch.daemon.decisions.lr_plan import PlanRequest
from sharpwatch.daemon.decisions.plan_rollout import PlanRollout
from sharpwatch.daemon.detection.thresholds import USUAL
from sharpwatch.daemon.records import Observation, ProbedStep, ReportedResult

SHARE = AutopilotConfig("enforce", curvature_share=CurvatureShareConfig())
CAP = AutopilotConfig("enforce", stability_cap=StabilityCapConfig(0.5))
PARTS = {"emb": 0.04, "qk": 0.01, "vo": 0.16, "ffn": 0.36, "norm": 0.0}
AIM = {"emb": 3.0, "qk": 4.0, "vo": 1.5, "ffn": 1.0, "norm": 4.0}
ONES = dict.fromkeys(BLOCKS, 1.0)
BOUNDS = (0.01, 10.0)


def flown(config: AutopilotConfig = SHARE, policies=(), *, steps: int = 0, **options) -> Trainer:
    trainer = Trainer(policies, autopilot=config, **options)
    trainer.parts = dict(PARTS)
    trainer.run(steps)
    return trainer


class Forgetful(Trainer):
    """A trainer that notes where raises would have ended as the agent ends them, by the steps that it has taken."""

    taken = 0
    ends = None
    has_ended = False

    def answer(self, made):
        super().answer(made)
        if made.rollback is None:
            self.ends = self.taken + made.ttl_steps if made.ttl_steps else None

    def observe(self, *args, **layers):
        self.taken += 1
        if self.ends is not None and self.taken >= self.ends:
            self.has_ended = True
        super().observe(*args, **layers)


def raised(policies=(), **options) -> Forgetful:
    """A trainer whose raises end after 100 steps, and that has no more probes."""
    trainer = Forgetful(policies, autopilot=replace(SHARE, ttl_steps=100), **options)
    trainer.run(100)
    trainer.parts = dict(PARTS)
    trainer.run(20)
    assert trainer.multipliers == pytest.approx(AIM)
    trainer.parts = {}
    return trainer


def probe(parts=PARTS, multipliers=ONES, ratio=0.1) -> ProbedStep:
    curvature = sum(parts.values())
    return ProbedStep(parts, curvature, curvature / (2 * ratio), multipliers)


def test_blocks_are_raised_in_steps_of_two_and_the_raises_stay():
    trainer = flown(steps=20)
    assert trainer.multipliers == pytest.approx(AIM)
    revisions = trainer.controller.revisions
    assert {one.author for one in revisions} == {"autopilot"}
    assert revisions[0].multipliers == pytest.approx({"emb": 2.0, "qk": 2.0, "vo": 1.5, "ffn": 1.0, "norm": 2.0})
    made = trainer.controller.decisions[0]
    assert (made.action, made.mode, made.outcome, made.policy) == ("set_lr", "enforce", "applied", "")
    assert (made.ramp_steps, made.ttl_steps) == (3, 2000)
    assert "emb 1 to 2, qk 1 to 2, vo 1 to 1.5, norm 1 to 2; curvature shares: emb 0.07" in made.detail
    trainer.run(100)
    assert len(trainer.controller.revisions) == len(revisions)


def test_small_changes_make_no_revision():
    trainer = flown(steps=20)
    count = len(trainer.controller.revisions)
    trainer.parts["emb"] *= 1.3  # its multiplier would change by 1.14
    trainer.run(20)
    assert len(trainer.controller.revisions) == count
    trainer.parts["emb"] *= 1.3
    trainer.run(20)
    assert trainer.multipliers["emb"] == pytest.approx(3.0 / 1.3, rel=0.15)


def test_it_is_off_without_a_rule_and_observes_without_a_mode():
    assert flown(AutopilotConfig("enforce"), steps=20).controller.decisions == ()
    trainer = flown(AutopilotConfig(curvature_share=CurvatureShareConfig()), steps=40)
    assert trainer.actions() == [("set_lr", "observed")]
    assert trainer.multipliers == ONES
    assert trainer.controller.mode == "observe"
    trainer.controller.set_mode("enforce")
    trainer.run(20)
    assert trainer.multipliers == pytest.approx(AIM)


def test_a_proposal_waits_for_approval_and_a_rejected_one_is_not_repeated():
    trainer = flown(replace(SHARE, mode="advise"), steps=20)
    (made,) = trainer.controller.decisions
    assert (made.outcome, trainer.multipliers) == ("proposed", ONES)
    trainer.take(trainer.controller.approve(made.id, "ann", "yes", trainer.now))
    trainer.run(1)
    assert trainer.multipliers["emb"] == 2.0
    trainer.run(3)
    second = trainer.controller.decisions[-1]
    assert second.outcome == "proposed"
    trainer.controller.reject(second.id, "ann", "enough", trainer.now)
    trainer.run(30)
    assert [outcome for _, outcome in trainer.actions()] == ["applied", "rejected"]


def test_newer_probes_replace_a_proposal():
    trainer = flown(replace(SHARE, mode="advise"), steps=10)
    trainer.parts = {"emb": 0.36, "qk": 0.36, "vo": 0.36, "ffn": 0.01, "norm": 0.36}
    trainer.run(20)
    outcomes = [outcome for _, outcome in trainer.actions()]
    assert outcomes[-1] == "proposed"
    assert set(outcomes[:-1]) == {"expired"}


def test_the_cap_follows_the_stability_ratio_down_and_up_again():
    trainer = flown(CAP, steps=10)
    assert trainer.controller.decisions == ()
    trainer.ratio = 2.0
    trainer.run(20)
    assert trainer.multipliers == pytest.approx(dict.fromkeys(BLOCKS, 0.25))
    trainer.ratio = 0.2
    trainer.run(20)
    assert trainer.multipliers == ONES


def test_the_cap_multiplies_raises():
    config = replace(SHARE, stability_cap=StabilityCapConfig(0.5))
    probes = [probe(ratio=1.0)] * 4
    wanted = wanted_multipliers(probes, ONES, config, BOUNDS)
    # Nothing is raised at the edge itself, and the sharpest block is cut to half.
    assert wanted == pytest.approx({"emb": 1.0, "qk": 1.0, "vo": 0.75, "ffn": 0.5, "norm": 1.0})
    high = wanted_multipliers([probe(ratio=0.9)] * 4, dict.fromkeys(BLOCKS, 2.0), config, BOUNDS)
    assert high == pytest.approx({block: value * 0.5 / 0.9 for block, value in AIM.items()})


def test_one_probe_is_too_few_and_bounds_hold():
    assert wanted_multipliers([probe()], ONES, SHARE, BOUNDS) is None
    wanted = wanted_multipliers([probe()] * 2, dict.fromkeys(BLOCKS, 2.0), SHARE, (0.01, 2.0))
    assert max(wanted.values()) == 2.0


def test_steps_that_do_not_descend_raise_nothing_and_leave_the_cap():
    down = ProbedStep(PARTS, 0.57, -1.0, dict.fromkeys(BLOCKS, 0.5))
    assert wanted_multipliers([down] * 4, ONES, SHARE, BOUNDS) is None
    assert capped([down] * 4, 0.5) == 0.5


def test_a_concave_step_raises_nothing():
    concave = ProbedStep(dict.fromkeys(BLOCKS, -1.0), -5.0, 1.0, ONES)
    assert wanted_multipliers([concave] * 8, ONES, SHARE, BOUNDS) is None


def test_nothing_is_raised_while_an_incident_is_open():
    trainer = Trainer((), autopilot=SHARE)
    trainer.run(120)
    trainer.heat["ffn"] = 20.0
    trainer.run(3)
    assert [one.name for one in trainer.controller.incidents if one.active] == ["NonFinite"]
    trainer.parts = dict(PARTS)
    trainer.run(20)
    assert trainer.controller.decisions == ()
    trainer.heat["ffn"] = 0.0
    trainer.run(60)
    assert trainer.multipliers == pytest.approx(AIM)


def test_it_waits_while_a_policys_cut_is_in_force():
    trainer = Trainer((CUT,), autopilot=SHARE)
    trainer.run(120)
    trainer.heat["ffn"] = 2.0
    trainer.run(5)
    assert trainer.multipliers["ffn"] == 0.5
    trainer.parts = dict(PARTS)
    trainer.run(20)
    assert {made.policy for made in trainer.controller.decisions} == {"cut"}


def test_blocks_that_an_operator_has_set_are_left_alone():
    trainer = flown(steps=20)
    trainer.take(trainer.controller.set_learning_rates({"emb": 1.0}, 0, 0, "ann", "mine", trainer.now))
    trainer.parts["vo"] = 0.01
    trainer.run(20)
    assert trainer.multipliers["emb"] == 1.0
    assert trainer.multipliers["vo"] == pytest.approx(4.0, rel=0.2)  # a last step of less is none


def test_it_decides_nothing_while_a_plan_goes_on_and_leaves_its_blocks_alone_afterwards():
    trainer = Trainer((), autopilot=SHARE)
    trainer.run(60)
    plan = PlanRequest("gentle", {"ffn": 3.0, "emb": 2.0}, (("ffn", "emb"),), 5, automatic=False)
    trainer.take(
        trainer.controller.change_plan(lambda rollout, by: rollout.start(plan, {}, by), "ann", "", trainer.now)
    )
    trainer.parts = dict(PARTS)
    trainer.run(20)
    trainer.take(trainer.controller.change_plan(PlanRollout.pause, "ann", "", trainer.now))
    trainer.run(60)
    assert [made.plan for made in trainer.controller.decisions] == [trainer.controller.plans[-1].id]
    trainer.take(trainer.controller.change_plan(PlanRollout.promote, "ann", "", trainer.now))
    trainer.run(20)
    assert trainer.controller.plans[-1].state == "done"
    assert trainer.multipliers == pytest.approx(AIM | {"ffn": 3.0, "emb": 2.0})
    assert trainer.controller.decisions[-1].ttl_steps == 0  # a time-out would end the plan's raises too


def test_an_operators_cut_of_one_block_is_no_cut_of_all():
    trainer = flown(CAP, steps=70)
    trainer.take(trainer.controller.set_learning_rates({"qk": 0.1}, 0, 0, "ann", "mine", trainer.now))
    trainer.cut_by_hand = ("qk",)
    trainer.run(40)
    assert trainer.multipliers == ONES | {"qk": 0.1}
    trainer.ratio = 2.0
    trainer.run(40)
    assert trainer.multipliers == pytest.approx(dict.fromkeys(BLOCKS, 0.25) | {"qk": 0.1})


def test_a_block_that_rests_at_every_probe_keeps_its_multiplier_under_the_cap_of_all():
    in_force = ONES | {"emb": 2.0}
    without = {block: part for block, part in PARTS.items() if block != "emb"}
    rested = wanted_multipliers([probe(without)] * 4, in_force, SHARE, BOUNDS)
    assert rested["emb"] == 2.0
    high = wanted_multipliers(
        [probe(without, ratio=0.9)] * 4, in_force, replace(SHARE, stability_cap=StabilityCapConfig(0.45)), BOUNDS
    )
    assert high["emb"] == pytest.approx(1.0)


def test_a_block_that_rests_now_and_then_has_the_share_of_the_steps_that_it_takes():
    trainer = Trainer((), autopilot=SHARE)
    trainer.parts = dict(PARTS)
    for _ in range(20):
        trainer.resting = ("emb", "ffn") if trainer.step % 2 else ()
        trainer.run(1)
    assert trainer.multipliers == pytest.approx(AIM)


def test_a_raise_is_no_operators_so_that_policies_may_still_cut_the_block():
    trainer = flown(steps=120, policies=(CUT,))
    trainer.heat["ffn"] = 2.0
    trainer.run(3)
    assert trainer.multipliers["ffn"] == 0.5
    assert trainer.multipliers["emb"] == pytest.approx(AIM["emb"])


def test_raises_are_renewed_before_they_time_out():
    trainer = flown(replace(SHARE, ttl_steps=100), steps=20)
    count = len(trainer.controller.revisions)
    trainer.run(60)
    assert len(trainer.controller.revisions) == count + 1
    assert trainer.controller.revisions[-1].multipliers == trainer.controller.revisions[-2].multipliers
    assert "raises renewed" in trainer.controller.decisions[-1].detail


@pytest.mark.parametrize("mode", ["observe", "advise", "enforce"])
def test_raises_stay_in_every_mode(mode):
    trainer = raised()
    trainer.controller.set_mode(mode)
    trainer.run(300)
    assert trainer.multipliers == pytest.approx(AIM)
    assert not trainer.has_ended
    assert trainer.controller.multipliers == trainer.multipliers
    assert len([made for made in trainer.controller.decisions if made.is_renewal]) == 6


def test_a_renewal_leaves_proposals_and_records_nothing_anew():
    trainer = raised()
    trainer.controller.set_mode("advise")
    trainer.parts = PARTS | {"vo": 0.01}
    trainer.run(200)
    others = [made for made in trainer.controller.decisions if not made.is_renewal]
    assert others[-1].outcome == "proposed"
    assert [made.outcome for made in others].count("proposed") == 1
    assert trainer.multipliers == pytest.approx(AIM)
    trainer.take(trainer.controller.approve(others[-1].id, "ann", "", trainer.now))
    trainer.run(1)
    assert trainer.multipliers["vo"] == pytest.approx(3.0)


def test_a_cancelled_renewal_is_followed_by_another():
    trainer = raised()
    while not trainer.waiting:
        trainer.run(1)
    (renewal,) = trainer.waiting
    assert renewal.is_renewal
    trainer.controller.cancel(renewal.id, "ann", "", trainer.now)
    trainer.waiting = []
    trainer.controller.command_result(ReportedResult(renewal.id, "cancelled", trainer.step), trainer.now)
    trainer.run(300)
    assert trainer.multipliers == pytest.approx(AIM)
    assert not trainer.has_ended


@pytest.mark.parametrize("back", [30, 52, 130])
def test_raises_outlast_a_rollback(back):
    trainer = raised()
    trainer.run(30)
    trainer.step -= back
    back_there = Observation(trainer.step, trainer.now, restored=True)
    trainer.take(trainer.controller.observe(back_there, trainer.now))
    trainer.run(300)
    assert trainer.multipliers == pytest.approx(AIM)
    assert not trainer.has_ended


def test_raises_outlast_a_policys_cut_which_is_ramped_back_as_without_renewals():
    def ramped_back(ttl_steps):
        trainer = Forgetful((CUT,), autopilot=replace(SHARE, ttl_steps=ttl_steps))
        trainer.run(100)
        trainer.parts = dict(PARTS)
        trainer.run(20)
        trainer.parts = {}
        trainer.heat["ffn"] = 2.0
        trainer.run(3)
        trainer.heat["ffn"] = 0.0
        assert trainer.multipliers == pytest.approx(AIM | {"ffn": 0.5})
        trainer.run(150)
        assert trainer.multipliers == pytest.approx(AIM)
        return trainer, [made.step for made in trainer.controller.decisions if made.action == "ramp_back"]

    trainer, with_renewals = ramped_back(60)
    assert not trainer.has_ended
    assert [made for made in trainer.controller.decisions if made.is_renewal]
    assert with_renewals == ramped_back(2000)[1]


def test_a_renewal_does_not_end_a_ramp():
    trainer = raised()
    trainer.take(trainer.controller.set_learning_rates({"qk": 1.5}, 200, 0, "ann", "mine", trainer.now))
    trainer.run(150)
    assert not [made for made in trainer.controller.decisions if made.is_renewal]


def test_maintenance_and_what_a_run_refuses():
    always = MaintenanceConfig("00:00", "24:00")
    assert {outcome for _, outcome in flown(steps=20, maintenance=(always,)).actions()} == {"proposed"}
    refused = flown(steps=40, control="none")
    assert refused.actions() == [("set_lr", "refused")]
    assert refused.controller.decisions[0].guard.startswith("control:")


def test_what_was_proposed_in_maintenance_is_not_open_after_it():
    trainer = flown(steps=20, maintenance=(MaintenanceConfig("00:00", "24:00"),))
    assert trainer.actions()[-1] == ("set_lr", "proposed")
    trainer.controller.configure((), USUAL, (), replace(SHARE, least_change=100.0))  # so that nothing is to be changed
    trainer.run(1)
    assert {outcome for _, outcome in trainer.actions()} == {"expired"}


def test_a_restarted_daemon_goes_on_where_it_was():
    trainer = flown(steps=20)
    controller = restored(trainer)
    count = len(controller.revisions)
    trainer.controller = controller
    trainer.run(20)
    assert len(controller.revisions) == count
    trainer.parts["vo"] = 0.01
    trainer.run(20)
    assert trainer.multipliers["vo"] == pytest.approx(4.0, rel=0.2)
