"""What operators do to a run: proposals answered, learning rates set and undone, incidents seen."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from controlled_run import BLOCKS, CUT, GUARD, Trainer, restored, trained

from sharpwatch.daemon.records import ReportedResult
from sharpwatch.errors import OperatorError


def test_advise_proposes_once_and_an_approval_sends_it():
    trainer = trained(mode="advise")
    trainer.heat["ffn"] = 20.0
    trainer.run(5)
    (made,) = trainer.controller.decisions
    assert (made.outcome, trainer.waiting) == ("proposed", [])
    changes = trainer.take(trainer.controller.approve(made.id, "ann", "yes", trainer.now))
    assert [(one.outcome, one.author, one.reason) for one in changes.commands] == [("approved", "ann", "yes")]
    assert changes.commands[0].expires_at_step == trainer.step + GUARD.expires_after_steps
    trainer.run(1)
    assert trainer.multipliers["ffn"] == 0.5
    with pytest.raises(OperatorError, match="applied: only a proposal can be approved"):
        trainer.controller.approve(made.id, "ann", "again", trainer.now)


def test_what_is_only_tried_leaves_nothing_behind():
    """The proposal that a set of one's own supersedes, too; and what is answered is what then happens."""
    trainer = trained(mode="advise")
    trainer.heat["ffn"] = 20.0
    trainer.run(5)
    controller = trainer.controller
    (proposal,) = controller.decisions

    def change():
        return controller.set_learning_rates({"qk": 0.7}, 0, 0, "ann", "mine", trainer.now)

    tried = controller.tried(change)
    assert controller.decisions == (proposal,)
    assert (controller.revisions, controller.multipliers["qk"]) == ((), 1.0)
    trainer.run(1)
    assert (trainer.waiting, controller.decisions) == ([], (proposal,))
    made = change()
    assert [one.multipliers for one in tried.commands] == [one.multipliers for one in made.commands]
    assert [one.outcome for one in tried.decisions] == [one.outcome for one in made.decisions] == ["expired", "sent"]
    with pytest.raises(OperatorError, match="outside the run's lr_bounds"):
        controller.tried(lambda: controller.set_learning_rates({"qk": 99.0}, 0, 0, "ann", "", trainer.now))
    assert controller.tried(lambda: controller.undo(0, "ann", "", trainer.now)).revisions[-1].undoes == 1
    assert len(controller.revisions) == 1


def test_a_rejected_proposal_is_not_made_again_for_its_incident():
    trainer = trained(mode="advise")
    trainer.heat["ffn"] = 20.0
    trainer.run(5)
    trainer.controller.reject(trainer.controller.decisions[0].id, "ann", "no", trainer.now)
    trainer.run(60)
    assert trainer.actions() == [("scale_lr", "rejected")]


def test_a_proposal_expires_by_the_clock_and_by_a_change_of_what_it_stood_on():
    trainer = trained((replace(CUT, mode="advise", guard=replace(GUARD, approve_within=2.0)),))
    trainer.heat["ffn"] = 20.0
    trainer.run(22)
    assert trainer.actions()[0] == ("scale_lr", "expired")
    trainer.run(5)
    assert trainer.actions()[-1][1] == "proposed"
    trainer.take(trainer.controller.set_learning_rates({"qk": 0.7}, 0, 0, "ann", "mine", trainer.now))
    assert trainer.controller.decisions[-2].outcome == "expired"


def test_proposals_that_nobody_answered_do_not_keep_the_run_from_acting():
    guard = replace(GUARD, approve_within=1.0, max_actions_per_hour=2, cooldown_steps=30)
    trainer = trained((replace(CUT, guard=guard),), mode="advise")
    trainer.heat["ffn"] = 20.0
    trainer.run(70)
    assert [outcome for _, outcome in trainer.actions()].count("expired") == 2
    trainer.controller.set_mode("enforce")
    trainer.run(2)
    assert trainer.multipliers["ffn"] == 0.5


def test_a_silent_run_keeps_no_proposal_open():
    trainer = trained(mode="advise")
    trainer.heat["ffn"] = 20.0
    trainer.run(1)
    (made,) = trainer.controller.decisions
    with pytest.raises(OperatorError, match="is expired"):
        trainer.controller.approve(made.id, "ann", "late", trainer.now + GUARD.approve_within + 1)


def test_an_operators_revision_is_never_ramped_away():
    trainer = trained()
    trainer.take(trainer.controller.set_learning_rates({"emb": 4.0, "ffn": 0.8}, 5, 0, "ann", "plan", trainer.now))
    trainer.run(120)
    trainer.heat["ffn"] = 1000.0
    trainer.run(2)
    assert trainer.multipliers["ffn"] == 0.4
    assert trainer.controller.decisions[-1].ttl_steps == 0  # or the trainer would end the operator's raise
    trainer.heat["ffn"] = 0.0
    trainer.run(300)
    assert trainer.multipliers == {**dict.fromkeys(BLOCKS, 1.0), "emb": 4.0, "ffn": 0.8}


def test_a_cut_that_an_operator_changes_is_the_operators():
    trainer = trained()
    trainer.heat["ffn"] = 20.0
    trainer.run(2)
    trainer.heat["ffn"] = 0.0
    trainer.take(trainer.controller.set_learning_rates({"ffn": 0.3}, 0, 0, "ann", "mine", trainer.now))
    trainer.run(400)
    assert trainer.multipliers["ffn"] == 0.3
    assert not any(made.action == "ramp_back" for made in trainer.controller.decisions)


def test_undo_puts_back_what_was_before():
    trainer = trained()
    for wanted in ({"qk": 0.5}, {"qk": 0.7, "emb": 2.0}):
        trainer.take(trainer.controller.set_learning_rates(wanted, 0, 0, "ann", "try", trainer.now))
        trainer.run(1)
    trainer.take(trainer.controller.undo(0, "bob", "", trainer.now))
    trainer.run(1)
    assert trainer.multipliers == dict.fromkeys(BLOCKS, 1.0) | {"qk": 0.5}
    newest = trainer.controller.revisions[-1]
    assert (newest.revision, newest.undoes, newest.author, newest.reason) == (3, 2, "bob", "undo of revision 2")
    with pytest.raises(OperatorError, match="in force already"):
        trainer.controller.undo(2, "bob", "", trainer.now)
    with pytest.raises(OperatorError, match="known: 1, 2, 3"):
        trainer.controller.undo(9, "bob", "", trainer.now)


@pytest.mark.parametrize(
    ("wanted", "ramp", "at", "author", "expected"),
    [
        ({}, 0, 0, "ann", "no block"),
        ({"kv": 1.0}, 0, 0, "ann", "allowed: emb, qk"),
        ({"qk": 0.001}, 0, 0, "ann", "0.01 to 10"),
        ({"qk": math.nan}, 0, 0, "ann", "lr_bounds"),
        ({"qk": 0.5}, -1, 0, "ann", "0 or more"),
        ({"qk": 0.5}, 0, 7, "ann", "stands at step 120"),
        ({"qk": 0.5}, 0, 10**6, "ann", "stands at step 120"),
        ({"qk": 0.5}, 0, 0, " ", "author"),
    ],
)
def test_nonsense_is_refused_and_leaves_nothing_behind(wanted, ramp, at, author, expected):
    trainer = trained()
    with pytest.raises(OperatorError, match=expected):
        trainer.controller.set_learning_rates(wanted, ramp, at, author, "why", trainer.now)
    assert trainer.controller.decisions == trainer.controller.revisions == ()


def test_an_incident_stays_acknowledged_as_it_goes_on_and_ends():
    trainer = trained(mode="observe")
    trainer.heat["ffn"] = 20.0
    trainer.run(1)
    (incident,) = trainer.controller.incidents
    changes = trainer.controller.acknowledge(incident.id, "ann", "a bad shard")
    assert changes.incidents == trainer.controller.incidents == (replace(incident, acknowledged="ann: a bad shard"),)
    trainer.run(5)
    trainer.heat["ffn"] = 0.0
    trainer.run(25)
    (ended,) = trainer.controller.incidents
    assert (ended.acknowledged, ended.last_step, ended.active) == ("ann: a bad shard", 126, False)
    (again,) = trainer.controller.acknowledge(incident.id, "ben", "").incidents
    assert (again.acknowledged, again.active) == ("ben", False)
    with pytest.raises(OperatorError, match="no incident nope"):
        trainer.controller.acknowledge("nope", "ann", "")


def test_mode():
    assert Trainer(()).controller.mode == "observe"
    controller = Trainer().controller
    assert (controller.mode, controller.own_mode) == ("enforce", None)
    controller.set_mode("advise")
    assert controller.mode == controller.own_mode == "advise"
    with pytest.raises(OperatorError, match="observe, advise, enforce"):
        controller.set_mode("off")


# Cancelled decisions


def planned(trainer: Trainer):
    """A change of learning rates that is sent already for a step ahead."""
    step = trainer.step + 40
    trainer.take(trainer.controller.set_learning_rates({"qk": 0.5}, 0, step, "ann", "plan", trainer.now))
    trainer.run(1)
    return trainer.controller.decisions[-1]


def test_a_proposal_is_cancelled_at_once_and_not_made_again_for_its_incident():
    trainer = trained(mode="advise")
    trainer.heat["ffn"] = 20.0
    trainer.run(5)
    (made,) = trainer.controller.decisions
    changes = trainer.take(trainer.controller.cancel(made.id, "ann", "known", trainer.now))
    assert [(one.outcome, one.author, one.reason) for one in changes.transitions] == [("cancelled", "ann", "known")]
    assert changes.commands == ()
    trainer.run(60)
    assert trainer.actions() == [("scale_lr", "cancelled")]
    for answer in (trainer.controller.approve, trainer.controller.cancel):
        with pytest.raises(OperatorError, match="is cancelled"):
            answer(made.id, "bob", "", trainer.now)


def test_what_was_sent_is_cancelled_once_the_trainer_has_let_go_of_it():
    trainer = trained()
    made = planned(trainer)
    changes = trainer.controller.cancel(made.id, "bob", "too soon", trainer.now)
    (sent,) = changes.commands  # the same decision, whose command is now the one that cancels it
    assert (sent.id, sent.outcome, sent.cancelled_by) == (made.id, "sent", "bob")
    assert changes.transitions[-1].detail == "bob asks to cancel it: too soon"
    with pytest.raises(OperatorError, match=f"^bob has asked to cancel decision {made.id} already$"):
        trainer.controller.cancel(made.id, "cleo", "", trainer.now)
    again = restored(trainer)  # a restart remembers what was asked
    assert again.decisions[-1].cancelled_by == "bob"
    for controller in (trainer.controller, again):
        done = controller.command_result(ReportedResult(made.id, "cancelled", 120, "cancelled before step 120"), 0.0)
        assert [(one.outcome, one.author, one.reason) for one in done.transitions] == [("cancelled", "bob", "too soon")]
        assert controller.multipliers == dict.fromkeys(BLOCKS, 1.0)


def test_what_was_applied_cannot_be_cancelled_and_the_error_says_what_can_be_done():
    trainer = trained()
    trainer.take(trainer.controller.set_learning_rates({"qk": 0.5}, 0, 0, "ann", "plan", trainer.now))
    made = trainer.controller.decisions[-1]
    trainer.controller.cancel(made.id, "bob", "", trainer.now)
    trainer.run(1)  # the trainer was faster
    assert trainer.controller.decisions[-1].outcome == "applied"
    says = f"^decision {made.id} is applied at step 121: only .* be cancelled: take revision 1 back with lr undo$"
    with pytest.raises(OperatorError, match=says):
        trainer.controller.cancel(made.id, "bob", "", trainer.now)


def test_a_command_stands_where_the_trainer_cannot_cancel_it():
    trainer = trained()
    made = planned(trainer)
    trainer.controller.cancel(made.id, "bob", "", trainer.now)
    refusal = ReportedResult(f"cancel-{made.id}", "refused", 120, "unknown action")
    (sent,) = trainer.controller.command_result(refusal, 0.0).commands  # once more, as an attempt may have begun anew
    assert (sent.outcome, sent.cancelled_by) == ("sent", "")
    assert sent.detail == "bob asks to cancel it; it can't be cancelled: unknown action"


def test_a_policy_does_not_send_again_what_an_operator_cancelled():
    trainer = trained()
    trainer.silent = True
    trainer.heat["ffn"] = 20.0
    trainer.run(1)
    (made,) = trainer.controller.decisions
    trainer.controller.cancel(made.id, "ann", "", trainer.now)
    trainer.controller.command_result(ReportedResult(made.id, "cancelled", trainer.step), trainer.now)
    trainer.run(60)
    assert trainer.actions() == [("scale_lr", "cancelled")]


def ahead(trainer: Trainer, wanted: dict[str, float], steps: int):
    """A change of learning rates that is planned for so many steps ahead."""
    at = trainer.step + steps
    trainer.take(trainer.controller.set_learning_rates(wanted, 0, at, "ann", "plan", trainer.now))
    return trainer.controller.decisions[-1]


def test_a_planned_set_keeps_what_other_blocks_have_by_then():
    trainer = trained(mode="enforce")
    made = ahead(trainer, {"qk": 0.5}, 120)
    assert (made.outcome, made.revision, trainer.controller.multipliers["qk"]) == ("planned", 0, 1.0)
    trainer.take(trainer.controller.set_learning_rates({"emb": 2.0}, 0, 0, "bob", "", trainer.now))
    trainer.run(1)
    assert (trainer.multipliers["emb"], trainer.multipliers["qk"]) == (2.0, 1.0)
    trainer.run(118)
    assert trainer.multipliers["qk"] == 1.0
    trainer.run(1)
    assert (trainer.multipliers["emb"], trainer.multipliers["qk"]) == (2.0, 0.5)
    assert trainer.controller.decisions[0].applied_step == made.apply_at_step


def test_a_planned_set_does_not_keep_a_policy_from_cutting():
    trainer = trained()
    ahead(trainer, {"emb": 0.9}, 900)
    trainer.heat["qk"] = 20.0
    trainer.run(3)
    trainer.heat["qk"] = 0.0
    assert trainer.multipliers["qk"] == 0.5
    trainer.run(896)
    assert trainer.multipliers["qk"] == 1.0  # ramped back
    trainer.run(1)
    assert trainer.multipliers == dict.fromkeys(BLOCKS, 1.0) | {"emb": 0.9}


def test_a_planned_set_outlives_a_restart_and_is_cancelled_at_once():
    trainer = trained()
    made = ahead(trainer, {"qk": 0.5}, 120)
    trainer.controller = restored(trainer)
    trainer.run(60)
    assert trainer.controller.decisions[0].outcome == "planned"
    trainer.take(trainer.controller.cancel(made.id, "bob", "not needed", trainer.now))
    assert [one.outcome for one in trainer.controller.decisions] == ["cancelled"]
    trainer.run(100)
    assert trainer.multipliers["qk"] == 1.0


def test_of_two_operators_at_once_one_is_told_of_the_other():
    trainer = trained()
    control = trainer.controller
    trainer.take(control.set_learning_rates({"qk": 0.5}, 0, 0, "ann", "", trainer.now))
    with pytest.raises(OperatorError, match="ann has just set qk, with revision 1"):
        control.set_learning_rates({"qk": 0.7, "vo": 0.7}, 0, 0, "bob", "", trainer.now)
    with pytest.raises(OperatorError, match="ann has just set qk"):
        control.undo(0, "bob", "", trainer.now)
    trainer.take(control.set_learning_rates({"vo": 0.7}, 0, 0, "bob", "", trainer.now))  # of another block
    trainer.run(1)
    assert (trainer.multipliers["qk"], trainer.multipliers["vo"]) == (0.5, 0.7)


def test_an_undo_is_not_undone_without_its_number():
    trainer = trained()
    control = trainer.controller
    trainer.take(control.set_learning_rates({"qk": 0.5}, 0, 0, "ann", "", trainer.now))
    trainer.run(1)
    trainer.take(control.undo(0, "ann", "", trainer.now))
    trainer.run(1)
    with pytest.raises(OperatorError, match="ann has taken revision 1 back already, with revision 2"):
        control.undo(0, "bob", "", trainer.now)
    trainer.take(control.undo(2, "bob", "", trainer.now))
    trainer.run(1)
    assert trainer.multipliers["qk"] == 0.5
