"""Learning-rate plans: their sets and stages, and what becomes of each stage."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from controlled_run import BLOCKS, Trainer, restored, trained

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.decisions.lr_plan import HOLD_STEPS, NAMED, PlanRequest, stages_of, target_of
from sharpwatch.daemon.decisions.plan_rollout import PlanRollout
from sharpwatch.daemon.records import LrPlan, Observation
from sharpwatch.daemon.storage import records_json
from sharpwatch.errors import OperatorError

SHARPNESS = {"emb": 1e-4, "qk": 1e-3, "ffn": 2e-3, "vo": 4e-3, "norm": 1e-2}
SHARES = {"emb": 0.02, "qk": -0.1, "ffn": 0.32, "vo": 0.08, "norm": 0.3}
ONES = dict.fromkeys(BLOCKS, 1.0)
GENTLE = {"emb": 4.0, "qk": 2.0}  # two stages: qk, then emb


def named(name: str, **fields) -> PlanRequest:
    return PlanRequest(**{"name": name, "multipliers": {}, "stages": (), "ramp_steps": 5, "automatic": False} | fields)


def own(multipliers=GENTLE, name="gentle", **fields) -> PlanRequest:
    return named(name, multipliers=multipliers, **fields)


def sharpness(relative_error: float = 0.1, estimator: str = "gnb", **changes: float):
    values = {block: value for block, value in (SHARPNESS | changes).items() if value is not None}
    return {
        ("sharpness", block, estimator): Estimate(value, relative_error * abs(value), 8, estimator, 70)
        for block, value in values.items()
    }


def start(trainer: Trainer, request: PlanRequest, estimates=None, reason: str = "") -> LrPlan:
    def change(rollout, operator):
        rollout.start(request, estimates or {}, operator)

    trainer.take(trainer.controller.change_plan(change, "ann", reason, trainer.now))
    return plan_of(trainer)


def plan_of(trainer: Trainer) -> LrPlan:
    return trainer.controller.plans[-1]


def operate(trainer: Trainer, change, author: str = "bob", reason: str = "") -> LrPlan:
    trainer.take(trainer.controller.change_plan(change, author, reason, trainer.now))
    return plan_of(trainer)


def a_stage(trainer: Trainer) -> None:
    """The steps until a stage with a ramp of 5 steps is judged."""
    trainer.run(HOLD_STEPS + 7)


class TestSets:
    def test_the_paper_plan_names_the_blocks_that_the_run_has(self):
        assert target_of(named("paper"), ONES, {}) == {"emb": 10, "qk": 8, "ffn": 6, "vo": 4, "norm": 1}
        assert target_of(named("paper"), {"head": 1.0, "other": 1.0}, {}) == {"head": 1}

    def test_the_measured_plan_is_a_power_of_the_ratio_to_the_norms(self):
        found = target_of(named("measured"), ONES, sharpness())
        assert found == {
            "emb": 10.0,  # 100 ** 0.65 is 20
            "qk": pytest.approx(10**0.65),
            "ffn": pytest.approx(5**0.65),
            "vo": pytest.approx(2.5**0.65),
            "norm": 1.0,
        }

    def test_all_of_the_measured_plan_is_by_one_estimator(self):
        both = sharpness() | sharpness(estimator="hutchinson", qk=5e-3)
        assert target_of(named("measured"), ONES, both)["qk"] == pytest.approx(10**0.65)
        only = sharpness(estimator="hutchinson", qk=5e-3)
        assert target_of(named("measured"), ONES, only)["qk"] == pytest.approx(2**0.65)

    @pytest.mark.parametrize(
        ("estimates", "why"),
        [
            ({}, "sharpness of norm, of which there is no estimate"),
            (sharpness(vo=None), "sharpness of vo: gnb has no estimate"),
            (sharpness(0.31), "of emb to 30 %; it is 0.0001 ± 3e-05 by gnb at step 70"),
            (sharpness(float("nan")), "to 30 %"),  # a single draw
            (sharpness(estimator="hutchinson", qk=-1e-3), "a sharpness of qk above 0; it is -0.001"),
        ],
    )
    def test_the_measured_plan_is_refused_where_a_sharpness_is_not_known_well(self, estimates, why):
        with pytest.raises(OperatorError, match=why):
            target_of(named("measured"), ONES, estimates)

    def test_the_curvature_share_plan_raises_what_holds_nothing_up(self):
        shares = {("curvature_share", b, "direction"): Estimate(v, 0.01, 8, "direction") for b, v in SHARES.items()}
        assert target_of(named("curvature-share"), ONES, shares) == {
            "emb": 4.0,
            "qk": 4.0,  # curves downwards
            "ffn": 1.0,
            "vo": 2.0,
            "norm": pytest.approx((0.32 / 0.3) ** 0.5),
        }
        del shares["curvature_share", "vo", "direction"]
        with pytest.raises(OperatorError, match="there is none yet of vo"):
            target_of(named("curvature-share"), ONES, shares)

    def test_the_curvature_share_plan_asks_for_the_same_again_once_it_is_in_force(self):
        def asked(in_force):
            grown = {
                block: value * in_force[block] for block, value in SHARES.items()
            }  # a share goes with its multiplier
            shares = {("curvature_share", b, "direction"): Estimate(v, 0.01, 8, "direction") for b, v in grown.items()}
            return target_of(named("curvature-share"), in_force, shares)

        first = asked(ONES)
        assert asked(first) == pytest.approx(first)

    def test_an_unknown_plan_is_refused_with_those_that_there_are(self):
        with pytest.raises(OperatorError, match=r"no plan 'papr'; there are paper, measured, curvature-share"):
            target_of(named("papr"), ONES, {})
        with pytest.raises(OperatorError, match="paper is the name of a plan"):
            target_of(named("paper", multipliers=GENTLE), ONES, {})


class TestStages:
    BEFORE = dict.fromkeys(BLOCKS, 1.0) | {"emb": 8.0}

    def test_the_gentlest_comes_first_and_what_does_not_change_not_at_all(self):
        paper = target_of(named("paper"), ONES, {})
        assert stages_of(paper, dict.fromkeys(BLOCKS, 1.0), ()) == (("vo",), ("ffn",), ("qk",), ("emb",))
        assert stages_of(paper, self.BEFORE, ()) == (("emb",), ("vo",), ("ffn",), ("qk",))

    def test_an_operators_stages_are_kept(self):
        wanted = (("norm", "emb"), ("qk",))
        assert stages_of({"emb": 8.0, "norm": 2.0, "qk": 2.0}, self.BEFORE, wanted) == (("norm",), ("qk",))
        for wrong in ((("norm",),), (("norm", "emb"), ("qk", "qk")), (("norm", "emb"), ("qk", "vo"))):
            with pytest.raises(OperatorError, match="each block of the plan once: emb, norm, qk"):
                stages_of({"emb": 8.0, "norm": 2.0, "qk": 2.0}, self.BEFORE, wrong)

    def test_a_plan_that_changes_nothing_is_refused(self):
        with pytest.raises(OperatorError, match="changes nothing"):
            stages_of({"emb": 8.0}, self.BEFORE, ())


def test_a_plan_is_rolled_out_stage_by_stage_as_it_is_promoted():
    trainer = trained()
    plan = start(trainer, own(), reason="faster")
    assert (plan.state, plan.stages, plan.before) == ("running", (("qk",), ("emb",)), {"qk": 1.0, "emb": 1.0})
    (made,) = trainer.waiting
    assert (made.ramp_steps, made.ttl_steps, made.author, made.mode) == (5, 0, "ann", "operator")
    assert trainer.controller.revisions[-1].reason == "plan gentle, stage 1 of 2 (qk): faster"
    trainer.run(HOLD_STEPS + 4)
    assert plan_of(trainer).state == "running"
    trainer.run(3)
    assert (plan_of(trainer).state, plan_of(trainer).detail) == (
        "waiting",
        "stage 1 of 2 (qk) went well: loss 3, 3 before",
    )
    trainer.run(100)
    assert trainer.multipliers == dict.fromkeys(BLOCKS, 1.0) | {"qk": 2.0}  # it waits as long as it takes
    operate(trainer, PlanRollout.promote, reason="looks good")
    assert trainer.controller.revisions[-1].author == "bob"
    trainer.run(1)
    assert trainer.multipliers == dict.fromkeys(BLOCKS, 1.0) | GENTLE
    a_stage(trainer)
    assert (plan_of(trainer).state, plan_of(trainer).stages_done) == ("done", 2)
    with pytest.raises(OperatorError, match=r"is done \(stage 2 of 2"):
        operate(trainer, PlanRollout.promote)
    with pytest.raises(OperatorError, match="is done already; to undo a revision"):
        operate(trainer, PlanRollout.abort)
    trainer.take(trainer.controller.undo(0, "ann", "", trainer.now))
    trainer.run(1)
    assert trainer.multipliers["emb"] == 1.0


def test_an_automatic_plan_goes_on_by_itself():
    trainer = trained()
    start(trainer, own(automatic=True, ramp_steps=0))
    trainer.run(2 * HOLD_STEPS + 10)
    assert (plan_of(trainer).state, trainer.multipliers["emb"]) == ("done", 4.0)
    assert len(trainer.controller.revisions) == 2


def test_a_stage_that_harms_is_undone_at_once_and_those_before_it_stay():
    trainer = trained()
    start(trainer, own(automatic=True))
    a_stage(trainer)
    assert trainer.multipliers["emb"] == 4.0
    trainer.loss = 3.02  # far out of a band without scatter
    trainer.run(HOLD_STEPS)
    plan = plan_of(trainer)
    assert (plan.state, plan.stages_done) == ("aborted", 1)
    assert plan.detail.startswith("stage 2 of 2 (emb) was undone: loss 3.0")
    assert trainer.multipliers == dict.fromkeys(BLOCKS, 1.0) | {"qk": 2.0}
    undone = trainer.controller.revisions[-1]
    assert (undone.undoes, undone.author) == (2, "sharpwatch")
    assert "plan gentle of ann: stage 2 of 2 (emb) was undone: loss" in undone.reason
    trainer.run(200)
    assert len(trainer.controller.revisions) == 3


def test_a_step_that_does_not_descend_speaks_against_a_stage():
    trainer = trained()
    start(trainer, own())
    trainer.run(3)
    seen = replace(trainer.seen[-1], step=trainer.step + 1, no_descent=True)
    trainer.take(trainer.controller.observe(seen, trainer.now))
    assert plan_of(trainer).detail == "stage 1 of 2 (qk) was undone: a step that does not descend"


def test_a_run_that_tells_no_losses_pauses_for_a_person_who_may_promote():
    trainer = trained()
    trainer.loss = None
    start(trainer, own(ramp_steps=0))
    a_stage(trainer)
    assert plan_of(trainer).detail == "too few losses to say what came of stage 1 of 2 (qk)"
    assert plan_of(trainer).state == "paused"
    operate(trainer, PlanRollout.promote, reason="evaluated by hand")
    trainer.run(1)
    assert trainer.multipliers["emb"] == 4.0
    a_stage(trainer)
    assert plan_of(trainer).state == "paused"
    assert operate(trainer, PlanRollout.promote).state == "done"


def test_an_incident_pauses_it_and_nothing_is_raised_while_it_is_open():
    trainer = trained(())  # no policy
    start(trainer, own(automatic=True))
    trainer.run(5)
    trainer.heat["ffn"] = 20.0
    trainer.run(2)
    plan = plan_of(trainer)
    (opened,) = trainer.controller.incidents
    assert (plan.state, plan.detail) == ("paused", f"incident {opened.id} (NonFinite) is open")
    with pytest.raises(OperatorError, match=rf"incident {opened.id} \(NonFinite\) is open"):
        operate(trainer, PlanRollout.promote)
    a_stage(trainer)
    assert plan_of(trainer).detail.startswith(f"incident {opened.id} (NonFinite) is open; stage 1 of 2 (qk) went well")
    trainer.heat["ffn"] = 0.0
    trainer.run(100)
    assert not any(each.active for each in trainer.controller.incidents)
    assert (plan_of(trainer).state, trainer.multipliers["emb"]) == ("paused", 1.0)  # a person says when
    operate(trainer, PlanRollout.promote)
    trainer.run(1)
    assert trainer.multipliers["emb"] == 4.0


def test_a_stage_that_harms_is_undone_while_the_plan_is_paused_too():
    trainer = trained(())
    start(trainer, own())
    trainer.run(5)
    operate(trainer, PlanRollout.pause, reason="lunch")
    assert (plan_of(trainer).state, plan_of(trainer).changed_by) == ("paused", "bob")
    trainer.loss = 3.02
    trainer.run(HOLD_STEPS)
    assert (plan_of(trainer).state, trainer.multipliers["qk"]) == ("aborted", 1.0)


def test_a_pause_keeps_the_next_stage_back_until_it_is_promoted():
    trainer = trained()
    start(trainer, own(automatic=True))
    operate(trainer, PlanRollout.pause)
    with pytest.raises(OperatorError, match=r"is paused \(paused by bob\): only one that goes on can be paused"):
        operate(trainer, PlanRollout.pause)
    trainer.run(200)
    assert trainer.multipliers["emb"] == 1.0
    operate(trainer, PlanRollout.promote)
    trainer.run(1)
    assert trainer.multipliers["emb"] == 4.0


def test_abort_goes_back_to_before_the_plan_in_one_revision():
    trainer = trained()
    trainer.take(trainer.controller.set_learning_rates({"emb": 2.0, "vo": 0.5}, 0, 0, "ann", "", trainer.now))
    trainer.run(1)
    start(trainer, own(automatic=True))
    trainer.run(HOLD_STEPS + 10)
    assert trainer.multipliers["emb"] == 4.0
    plan = operate(trainer, PlanRollout.abort, reason="no gain")
    assert (plan.state, plan.detail, plan.changed_reason) == ("aborted", "aborted by bob", "no gain")
    trainer.run(1)
    assert trainer.multipliers == dict.fromkeys(BLOCKS, 1.0) | {"emb": 2.0, "vo": 0.5}
    undone = trainer.controller.revisions[-1]
    assert (undone.undoes, undone.author, undone.reason) == (2, "bob", "plan gentle aborted: no gain")
    trainer.run(200)
    assert len(trainer.controller.revisions) == 4


def test_a_return_that_the_trainer_refuses_is_sent_again_until_it_takes_it():
    trainer = trained()
    start(trainer, own())
    a_stage(trainer)
    in_force = trainer.controller.multipliers
    trainer.refuses = "another rank does not answer"
    operate(trainer, PlanRollout.abort, reason="no gain")
    trainer.run(50)
    (refused,) = (made for made in trainer.controller.decisions if made.outcome == "refused")
    assert trainer.controller.multipliers == in_force
    trainer.run(60)  # once more, in vain
    assert plan_of(trainer).detail == f"aborted by bob; {refused.id} refused, sent again"
    trainer.refuses = ""
    trainer.run(200)
    assert set(trainer.multipliers.values()) == {1.0}
    returned = [made for made in trainer.controller.decisions if made.reason == refused.reason]
    assert [made.outcome for made in returned] == ["refused", "refused", "applied"]
    assert {(made.author, made.reason) for made in returned} == {("bob", "plan gentle aborted: no gain")}
    trainer.run(500)
    assert trainer.controller.decisions[-1] == returned[-1]


def test_a_return_that_was_refused_is_not_sent_again_once_somebody_has_set_multipliers_since():
    trainer = trained()
    start(trainer, own())
    a_stage(trainer)
    trainer.refuses = "another rank does not answer"
    operate(trainer, PlanRollout.abort)
    trainer.run(50)
    trainer.refuses = ""
    trainer.take(trainer.controller.set_learning_rates({"qk": 2.0}, 0, 0, "ann", "mine", trainer.now))
    trainer.run(300)
    assert trainer.multipliers["qk"] == 2.0


def test_abort_of_a_plan_that_a_policy_has_cut_leaves_the_cut_which_is_ramped_back():
    trainer = trained()  # a cut by half of the block that is not finite
    start(trainer, own({"ffn": 2.0}))
    trainer.run(5)
    trainer.heat["ffn"] = 1.0
    trainer.run(2)
    assert trainer.multipliers["ffn"] == 1.0
    trainer.heat["ffn"] = 0.0
    trainer.run(30)
    with pytest.raises(OperatorError, match="of policy cut is in force on ffn: a plan goes on once it is ramped back"):
        operate(trainer, PlanRollout.promote)
    operate(trainer, PlanRollout.abort)
    trainer.run(1)
    assert trainer.multipliers["ffn"] == 0.5
    trainer.run(300)
    assert trainer.multipliers["ffn"] == 1.0  # not 2, to which the policy would have come back before


def test_what_an_operator_sets_by_hand_ends_the_plan_and_stays():
    for change in ("set", "undo"):
        trainer = trained()
        start(trainer, own())
        trainer.run(3)
        if change == "set":
            trainer.take(trainer.controller.set_learning_rates({"vo": 0.5}, 0, 0, "bob", "mine", trainer.now))
        else:
            trainer.take(trainer.controller.undo(0, "bob", "mine", trainer.now))
        plan = plan_of(trainer)
        assert (plan.state, plan.changed_by, plan.changed_reason) == ("aborted", "bob", "mine")
        assert plan.detail == "bob has changed multipliers by hand, with revision 2"
        trainer.run(200)
        assert trainer.multipliers["emb"] == 1.0
        assert len(trainer.controller.revisions) == 2


def test_a_stage_that_the_trainer_refuses_pauses_the_plan_and_is_sent_again_when_promoted():
    trainer = trained()
    start(trainer, own())
    trainer.refuses = "learning rates can't be changed: no groups"
    trainer.run(2)
    plan = plan_of(trainer)
    assert plan.state == "paused"
    assert plan.detail.startswith("stage 1 of 2 (qk) refused: trainer: learning rates can't be changed: no groups")
    trainer.refuses = ""
    operate(trainer, PlanRollout.promote)
    trainer.run(1)
    assert trainer.multipliers["qk"] == 2.0
    assert plan_of(trainer).stages_done == 0


def test_a_run_that_goes_back_before_a_stage_pauses_the_plan():
    trainer = trained()
    start(trainer, own())
    trainer.run(10)
    trainer.step -= 40
    trainer.run(1)
    assert (plan_of(trainer).state, plan_of(trainer).stages_done) == ("paused", 1)
    assert plan_of(trainer).detail == "the run went back to step 91, before stage 1 of 2 (qk)"


@pytest.mark.parametrize("steps", [0, 3, HOLD_STEPS + 7])
def test_a_restarted_daemon_neither_repeats_nor_forgets_a_stage(steps):
    trainer = trained()
    start(trainer, own(automatic=True))
    trainer.run(steps)
    sent = len(trainer.controller.revisions)
    old = trainer.controller
    journalled = [records_json.plan_of(json.dumps(asdict(plan))) for plan in old.plans]
    assert journalled == list(old.plans)
    trainer.controller = restored(trainer)
    assert trainer.controller.plans == old.plans
    trainer.run(5)
    assert len(trainer.controller.revisions) == sent
    trainer.run(3 * HOLD_STEPS)
    assert (plan_of(trainer).state, len(trainer.controller.revisions)) == ("done", 2)
    assert trainer.multipliers["emb"] == 4.0


def test_what_can_not_be_started_is_refused_with_the_reason():
    with pytest.raises(OperatorError, match='control="none"'):
        start(trained(control="none"), own())
    trainer = trained(lr_bounds=(0.1, 5.0))
    for request, why in (
        (named("paper"), r"emb=10 is outside the run's lr_bounds; allowed: 0.1 to 5"),
        (own({"attention": 2.0}), "no block 'attention'"),
        (own(ramp_steps=-1), "ramp_steps must be 0 to"),
        (own(name="x" * 200), "a plan's name must have 1 to 100 characters, got 200"),
    ):
        with pytest.raises(OperatorError, match=why):
            start(trainer, request)
    for change in (PlanRollout.promote, PlanRollout.pause, PlanRollout.abort):
        with pytest.raises(OperatorError, match="has no plan"):
            operate(trainer, change)
    start(trainer, own())
    with pytest.raises(OperatorError, match="plan gentle is running: abort it first"):
        start(trainer, own({"vo": 2.0}))
    other = trained(())
    other.heat["ffn"] = 20.0
    other.run(2)
    with pytest.raises(OperatorError, match=r"\(NonFinite\) is open"):
        start(other, own())
    assert other.controller.plans == ()


def test_what_is_planned_does_not_bring_back_a_stage_that_was_undone():
    trainer = trained()
    start(trainer, own())
    trainer.run(3)
    ahead = trainer.step + 40
    trainer.take(trainer.controller.set_learning_rates({}, 0, ahead, "ann", "", trainer.now, {"ffn": 4}))
    trainer.loss = 3.02
    trainer.run(HOLD_STEPS)
    assert plan_of(trainer).state == "aborted"
    planned = next(made for made in trainer.controller.decisions if made.apply_at_step == ahead)
    assert (planned.outcome, planned.author) == ("cancelled", "sharpwatch")
    assert trainer.multipliers == dict.fromkeys(BLOCKS, 1.0)
    assert trainer.controller.multipliers == trainer.multipliers


def test_a_plan_does_not_go_on_by_itself_once_the_run_is_only_to_be_observed():
    trainer = trained()
    start(trainer, own(automatic=True))
    trainer.run(3)
    trainer.take(trainer.controller.set_mode("observe", "bob", "stop everything", trainer.now))
    plan = plan_of(trainer)
    assert (plan.state, plan.changed_by, plan.changed_reason) == ("paused", "bob", "stop everything")
    trainer.run(200)
    assert trainer.multipliers == dict.fromkeys(BLOCKS, 1.0) | {"qk": 2.0}
    operate(trainer, PlanRollout.promote)  # an operator's own word is carried out
    a_stage(trainer)
    assert trainer.multipliers["emb"] == 4.0


def test_a_stage_waits_for_a_command_that_is_under_way():
    trainer = trained()
    trainer.silent = True
    trainer.take(trainer.controller.set_learning_rates({"vo": 0.5}, 0, 0, "ann", "", trainer.now))
    start(trainer, own())
    assert (plan_of(trainer).under_way, len(trainer.controller.revisions)) == ("", 1)
    trainer.silent = False
    trainer.waiting += trainer.controller.decisions
    trainer.run(2)
    assert len(trainer.controller.revisions) == 2
    trainer.run(1)
    assert trainer.multipliers == dict.fromkeys(BLOCKS, 1.0) | {"vo": 0.5, "qk": 2.0}


def test_each_state_is_kept_once_with_who_and_why():
    trainer = trained()
    states = []

    def change(rollout, operator):
        rollout.start(own(), {}, operator)

    states += trainer.take(trainer.controller.change_plan(change, "ann", "faster", 1.0)).plans
    states += trainer.take(trainer.controller.change_plan(PlanRollout.pause, "bob", "lunch", 1.0)).plans
    states += trainer.take(trainer.controller.change_plan(PlanRollout.abort, "cy", "no", 1.0)).plans
    assert [(one.state, one.changed_by, one.changed_reason) for one in states] == [
        ("running", "ann", "faster"),
        ("running", "ann", "faster"),  # its first stage was sent
        ("paused", "bob", "lunch"),
        ("aborted", "cy", "no"),
    ]


def test_without_a_plan_nothing_is_looked_at():
    assert NAMED.keys() == {"paper", "measured", "curvature-share"}
    trainer = trained()
    assert trainer.controller.plans == ()
    assert trainer.controller.observe(Observation(500, 1.0), 1.0).plans == ()
