"""Rollbacks, by policies and by operators, and the checkpoints that are there for them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from controlled_run import CHAIN, ROLLBACK, saved, trained

from sharpwatch.daemon.config.settings import GuardConfig, MatchConfig
from sharpwatch.daemon.decisions import decision_log, run_controller
from sharpwatch.daemon.decisions.decision_log import DecisionLog
from sharpwatch.daemon.records import Checkpoint, CheckpointReport, Decision, ReportedResult
from sharpwatch.errors import OperatorError


def test_a_proposed_rollback_is_not_approved_beside_another_nor_once_the_run_went_back_behind_it():
    trainer = trained((replace(ROLLBACK, match=MatchConfig("NonFinite")),), mode="advise")
    for at in (10, 110):
        trainer.controller.note_checkpoints(CheckpointReport((Checkpoint(at, f"file:{at}"),)))
    trainer.heat["ffn"] = 1000.0
    trainer.run(1)
    (made,) = trainer.controller.decisions
    assert (made.outcome, made.rollback.checkpoint.step) == ("proposed", 110)
    trainer.take(trainer.controller.request_rollback(50, 0, 0, "ann", "mine", trainer.now))
    with pytest.raises(OperatorError, match="another rollback is under way"):
        trainer.controller.approve(made.id, "ben", "yes", trainer.now)
    trainer.run(1)
    assert trainer.step == 11
    with pytest.raises(OperatorError, match="step 110 lies ahead"):
        trainer.controller.approve(made.id, "ben", "yes", trainer.now)


def test_the_escalation_chain_ends_in_a_rollback_before_the_onset_once():
    trainer = trained(CHAIN)
    for at in (60, 110, 125):
        trainer.controller.note_checkpoints(CheckpointReport((Checkpoint(at, f"file:{at}"),)))
    trainer.heat["ffn"] = 1000.0
    trainer.run(31)
    made = trainer.controller.decisions[-1]
    assert (made.action, made.outcome, made.rollback.checkpoint) == ("rollback", "sent", Checkpoint(110, "file:110"))
    assert made.rollback.skip_from_step == 121 - 10
    assert made.rollback.skip_to_step == made.step + 10 + 1
    trainer.run(1)
    assert trainer.step == 111
    assert not any(incident.active for incident in trainer.controller.incidents)
    trainer.run(110)
    assert next(one for one in trainer.controller.decisions if one.id == made.id).outcome == "recovered"
    trainer.heat["ffn"] = 1000.0
    trainer.run(120)
    assert [one.outcome for one in trainer.controller.decisions if one.action == "rollback"] == ["recovered", "refused"]
    assert trainer.controller.decisions[-1].guard.startswith("rollback_window_steps")


def test_no_checkpoint_before_the_onset_is_no_rollback():
    trainer = trained((replace(ROLLBACK, match=MatchConfig("NonFinite")),))
    trainer.controller.note_checkpoints(CheckpointReport((Checkpoint(122, "too late"),)))
    trainer.heat["ffn"] = 1000.0
    trainer.run(5)
    (made,) = trainer.controller.decisions
    assert (made.outcome, made.guard) == ("refused", "checkpoint: there is none from before the onset")


def test_operators_rollback():
    trainer = trained()
    ask = trainer.controller.request_rollback
    with pytest.raises(OperatorError, match="there are those of steps: none"):
        ask(None, 0, 0, "ann", "bad", trainer.now)
    for at in (50, 100):
        trainer.controller.note_checkpoints(CheckpointReport((Checkpoint(at, f"file:{at}"),)))
    with pytest.raises(OperatorError, match="ends before"):
        ask(None, 9, 3, "ann", "bad", trainer.now)
    changes = ask(70, 60, 80, "ann", "bad shard", trainer.now)
    assert changes.commands[0].rollback.checkpoint.step == 50
    with pytest.raises(OperatorError, match="under way"):
        ask(None, 0, 0, "ann", "bad", trainer.now)
    with pytest.raises(OperatorError, match="neither on_rollback"):
        trained(control="lr", can_roll_back=False).controller.request_rollback(None, 0, 0, "ann", "", 0.0)


BACK_AT_ONCE = replace(
    ROLLBACK, match=MatchConfig("NonFinite"), guard=GuardConfig(rollback_window_steps=5, cooldown_steps=1)
)


def test_a_checkpoint_that_was_deleted_is_not_offered_until_it_is_saved_anew():
    trainer = trained()
    there = saved(trainer, 50, 100)
    changes = trainer.controller.note_checkpoints(CheckpointReport(deleted=("file:100", "unknown")))
    assert changes.checkpoints == {"file:100": None}
    assert trainer.controller.checkpoints == (there[50],)
    ask = trainer.controller.request_rollback
    assert ask(None, 0, 0, "ann", "bad", trainer.now).commands[0].rollback.checkpoint == there[50]
    saved(trainer, 100)
    assert trainer.controller.checkpoints == (there[50], there[100])


def test_a_checkpoint_that_was_overwritten_is_the_newer_one():
    trainer = trained()
    for step in (50, 100):
        trainer.controller.note_checkpoints(CheckpointReport((Checkpoint(step, "last.pt"),)))
    assert trainer.controller.checkpoints == (Checkpoint(100, "last.pt"),)
    with pytest.raises(OperatorError, match=r"no checkpoint .* at or before step 60; there are those of steps: 100"):
        trainer.controller.request_rollback(60, 0, 0, "ann", "bad", trainer.now)
    changes = trainer.controller.note_checkpoints(CheckpointReport(restored_to=60))
    assert changes.checkpoints == {"last.pt": None}  # what it held at step 50 is gone
    assert trainer.controller.checkpoints == ()


def test_a_restore_leaves_the_checkpoints_of_later_steps_behind():
    trainer = trained()
    there = saved(trainer, 50, 100)
    changes = trainer.controller.note_checkpoints(CheckpointReport((Checkpoint(60, "new"),), restored_to=60))
    assert changes.checkpoints == {"file:100": None, "new": 60}
    assert trainer.controller.checkpoints == (there[50], Checkpoint(60, "new"))


@pytest.mark.parametrize(("outcome", "stays"), [("failed", False), ("refused", True), ("expired", True)])
def test_the_checkpoint_of_a_rollback_that_failed_is_not_offered_again(outcome, stays):
    trainer = trained()
    there = saved(trainer, 50, 100)
    (made,) = trainer.controller.request_rollback(None, 0, 0, "ann", "bad", trainer.now).commands
    result = ReportedResult(made.id, outcome, trainer.step, "gone")
    changes = trainer.controller.command_result(result, trainer.now)
    assert (there[100] in trainer.controller.checkpoints) == stays
    assert changes.checkpoints == ({} if stays else {"file:100": None})
    saved(trainer, 100)  # anew
    trainer.controller.command_result(result, trainer.now)  # the answer comes a second time
    assert there[100] in trainer.controller.checkpoints


def test_a_policy_goes_on_to_the_checkpoint_before_the_one_that_failed():
    trainer = trained((BACK_AT_ONCE,))
    saved(trainer, 60, 110)
    trainer.heat["ffn"] = 1000.0
    trainer.run(1)
    (first,) = trainer.controller.decisions
    assert (first.outcome, first.rollback.checkpoint.step) == ("sent", 110)
    trainer.waiting.clear()
    trainer.controller.command_result(ReportedResult(first.id, "failed", trainer.step, "gone"), trainer.now)
    trainer.silent = True
    trainer.run(6)
    tried = [(one.outcome, one.rollback.checkpoint.step) for one in trainer.controller.decisions if one.rollback]
    assert [one for one in tried if one[0] != "refused"] == [("failed", 110), ("sent", 60)]


def test_a_proposal_expires_with_its_checkpoint_and_the_next_names_one_that_is_there():
    trainer = trained((BACK_AT_ONCE,), mode="advise")
    saved(trainer, 60, 110)
    trainer.heat["ffn"] = 1000.0
    trainer.run(1)
    changes = trainer.controller.note_checkpoints(CheckpointReport(deleted=("file:110",)))
    assert [(one.outcome, one.rollback.checkpoint.step) for one in changes.decisions] == [("expired", 110)]
    assert changes.decisions[0].detail.endswith("its checkpoint can no longer be restored")
    trainer.run(6)
    newest = trainer.controller.decisions[-1]
    assert (newest.outcome, newest.rollback.checkpoint.step) == ("proposed", 60)


def test_only_the_newest_checkpoints_are_kept_and_the_journal_forgets_the_others_too(monkeypatch):
    monkeypatch.setattr(run_controller, "KEPT_CHECKPOINTS", 5)
    trainer = trained((replace(ROLLBACK, match=MatchConfig("NonFinite")),), mode="advise")
    for at in range(10, 60, 10):
        trainer.controller.note_checkpoints(CheckpointReport((Checkpoint(at, f"file:{at}"),)))
    trainer.heat["ffn"] = 1000.0
    trainer.run(1)
    (made,) = trainer.controller.decisions
    assert (made.outcome, made.rollback.checkpoint.step) == ("proposed", 50)
    saved = tuple(Checkpoint(at, f"file:{at}") for at in range(100, 107))
    changes = trainer.controller.note_checkpoints(CheckpointReport(saved))
    assert trainer.controller.checkpoints == saved[-5:]
    assert changes.checkpoints == {
        **{one.uri: one.step for one in saved[2:]},
        **dict.fromkeys(["file:10", "file:20", "file:30", "file:40", "file:50", "file:100", "file:101"]),
    }
    # The proposal to go back to one of them ends with it.
    (ended,) = changes.decisions
    assert (ended.id, ended.outcome) == (made.id, "expired")


def test_checkpoints_are_bounded_by_the_length_of_their_uris_and_the_newest_stays(monkeypatch):
    monkeypatch.setattr(run_controller, "KEPT_URIS", 100)
    controller = trained().controller
    for at in range(1, 30):
        controller.note_checkpoints(CheckpointReport((Checkpoint(at, f"{'x' * 28}{at:02}"),)))
    assert [one.step for one in controller.checkpoints] == [27, 28, 29]


def test_decisions_that_changed_nothing_are_forgotten_and_others_are_not(monkeypatch):
    monkeypatch.setattr(decision_log, "KEPT", 10)
    decided = DecisionLog("run", ("qk",))
    blank = Decision("", "run", 0.0, 1, "scale_lr", "enforce", "draft", policy="cut")
    cut = decided.revise(decided.add(replace(blank, id="cut"), "send"), author="", reason="", now=0.0)
    decided.applied(1, 2)
    decided.advance(cut, "apply", applied_step=2)
    decided.advance(cut, "recover")
    proposed = decided.add(replace(blank, id="proposed"), "propose")
    for number in range(100):
        decided.add(replace(blank, id=f"d{number}"), "refuse")
        assert len(decided.take().decisions) == (3 if number == 0 else 1)
    kept = ["cut", "proposed", *(f"d{number}" for number in range(90, 100))]
    assert [one.id for one in decided.decisions] == kept
    assert decided.number_in_force == 1
    assert decided.unsettled() == (proposed,)
    again = DecisionLog("run", ("qk",))
    again.restore(
        [*(replace(decided.find("d99"), id=f"older{number}") for number in range(50)), *decided.decisions],
        decided.revisions,
    )
    assert [one.id for one in again.decisions] == kept
