"""One run from trouble to recovery: every turn that a decision can take."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sharpwatch.daemon.config.settings import ActionConfig, EscalateConfig, GuardConfig, MatchConfig, PolicyConfig
from sharpwatch.daemon.decisions.run_controller import RunController
from sharpwatch.daemon.decisions.transitions import FINAL
from sharpwatch.daemon.records import Changes, Checkpoint, CheckpointReport, Decision, Observation, ReportedResult
from sharpwatch.errors import OperatorError

BLOCKS = ("emb", "qk", "vo", "ffn", "norm")
GUARD = GuardConfig(min_multiplier=0.1, cooldown_steps=10, max_actions_per_hour=10, hold_steps=60)
CUT = PolicyConfig(
    "cut", MatchConfig("UpdateRmsSpike"), "enforce", ActionConfig("scale_lr", "alert", factor=0.5, ttl_steps=500), GUARD
)
ROLLBACK = PolicyConfig("back", action=ActionConfig("rollback"), mode="enforce")
CHAIN = (replace(CUT, escalate=EscalateConfig(30, "back")), ROLLBACK)


class Trainer:
    """A run with its controller: the trainer applies each command at the step after the one it came with.

    A block whose rate is `heat` times what it should be, times its multiplier, shows it in its update RMS.
    """

    def __init__(self, policies: Iterable[PolicyConfig] = (CUT,), *, control: str = "rollback", **options) -> None:
        counter = itertools.count(1)
        self.options = {
            "blocks": BLOCKS,
            "policies": tuple(policies),
            "control": control,
            "can_roll_back": True,
            **options,
        }
        self.controller = RunController("run", new_id=lambda: f"d{next(counter)}", **self.options)
        self.noise = np.random.default_rng(0)
        self.multipliers = dict.fromkeys(BLOCKS, 1.0)
        self.heat = dict.fromkeys(BLOCKS, 0.0)
        self.step = 0
        self.waiting: list[Decision] = []
        self.seen: list[Observation] = []
        self.silent = False
        self.refuses = ""

    def take(self, changes: Changes) -> Changes:
        self.waiting += changes.commands
        return changes

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            waiting, self.waiting = self.waiting, []
            for made in [] if self.silent else waiting:
                self.answer(made)
            noise = np.exp(0.1 * self.noise.standard_normal(len(BLOCKS)))
            rms = {
                b: float(n * max(1.0, self.heat[b] * self.multipliers[b])) for b, n in zip(BLOCKS, noise, strict=True)
            }
            obs = Observation(self.step, self.now, loss=3.0, update_rms=rms, multipliers=dict(self.multipliers))
            self.seen.append(obs)
            self.take(self.controller.observe(obs, self.now))

    def answer(self, made: Decision) -> None:
        if self.refuses:
            self.controller.command_result(ReportedResult(made.id, "refused", self.step, self.refuses), self.now)
            return
        if made.rollback is not None:
            self.step = made.rollback.checkpoint.step + 1
            self.heat = dict.fromkeys(BLOCKS, 0.0)  # the batch that did it is left out
        else:
            self.multipliers = dict.fromkeys(BLOCKS, 1.0) | dict(made.multipliers)
        self.controller.command_result(ReportedResult(made.id, "applied", self.step), self.now)

    @property
    def now(self) -> float:
        return 1e9 + len(self.seen) * 0.1

    def actions(self) -> list[tuple[str, str]]:
        return [(made.action, made.outcome) for made in self.controller.decisions]


def trained(*args, **options) -> Trainer:
    trainer = Trainer(*args, **options)
    trainer.run(120)
    assert trainer.controller.alerts == ()
    return trainer


def test_a_cut_of_the_blocks_of_the_alert_is_sent_applied_and_recovers():
    trainer = trained()
    trainer.heat["ffn"] = 20.0
    trainer.run(1)
    (made,) = trainer.controller.decisions
    assert (made.outcome, made.policy, made.multipliers) == ("sent", "cut", dict.fromkeys(BLOCKS, 1.0) | {"ffn": 0.5})
    assert made.ttl_steps == 0  # a cut holds
    assert made.expires_at_step == 121 + GUARD.expires_after_steps
    trainer.heat["ffn"] = 0.0
    trainer.run(25)
    (made,) = trainer.controller.decisions
    assert (made.outcome, made.applied_step, made.revision) == ("recovered", 122, 1)
    (revision,) = trainer.controller.revisions
    assert (revision.applied_step, revision.author, revision.decision_id) == (122, "policy cut", made.id)
    assert [alert.active for alert in trainer.controller.alerts] == [False]


def test_cuts_go_on_after_each_cooldown_down_to_the_bound_and_what_was_not_enough_has_failed():
    trainer = trained()
    trainer.heat["ffn"] = 1000.0
    trainer.run(100)
    cuts = [made for made in trainer.controller.decisions if made.outcome != "refused"]
    assert [made.multipliers["ffn"] for made in cuts] == [0.5, 0.25, 0.125, 0.1]
    assert all(b.applied_step - a.applied_step >= 10 for a, b in itertools.pairwise(cuts))
    assert [made.outcome for made in cuts[:-1]] == ["failed"] * 3
    refused = [made.guard.partition(":")[0] for made in trainer.controller.decisions if made.outcome == "refused"]
    assert refused == ["cooldown_steps", "min_multiplier"]


def test_a_refusal_is_recorded_once():
    trainer = trained(control="none")
    trainer.heat["ffn"] = 1000.0
    trainer.run(50)
    (made,) = trainer.controller.decisions
    assert (made.outcome, made.revision) == ("refused", 0)
    assert made.guard.startswith('control: the run was attached with control="none"')


def test_observe_says_once_what_it_would_do_and_does_nothing():
    trainer = trained(mode="observe")
    trainer.heat["ffn"] = 1000.0
    trainer.run(50)
    (made,) = trainer.controller.decisions
    assert (made.outcome, made.mode, made.multipliers["ffn"]) == ("observed", "observe", 0.5)
    assert trainer.controller.revisions == ()


def test_actions_per_hour():
    trainer = trained((replace(CUT, guard=replace(GUARD, max_actions_per_hour=2)),))
    trainer.heat["ffn"] = 1000.0
    trainer.run(100)
    assert trainer.multipliers["ffn"] == 0.25
    assert trainer.controller.decisions[-1].guard.startswith("max_actions_per_hour: 2")


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


def test_a_rejected_proposal_is_not_made_again_for_its_alert():
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


@pytest.mark.parametrize("end", ["unanswered", "refused", "lost"])
def test_an_alert_that_stands_is_no_reason_to_try_the_same_at_every_step(end):
    guard = replace(GUARD, approve_within=1.0, expires_after_steps=1, cooldown_steps=0, max_actions_per_hour=3)
    trainer = trained((replace(CUT, guard=guard),), mode="advise" if end == "unanswered" else "enforce")
    trainer.heat["ffn"] = 1000.0
    trainer.refuses, trainer.silent = "no" if end == "refused" else "", end == "lost"
    trainer.run(1000)
    tried = [made for made in trainer.controller.decisions if not made.guard.startswith("max_actions_per_hour")]
    assert len({alert.id for alert in trainer.controller.alerts}) == 1
    assert [made.outcome for made in tried] == 3 * ["refused" if end == "refused" else "expired"]
    assert trainer.multipliers["ffn"] == 1.0


def test_a_silent_run_keeps_no_proposal_open():
    trainer = trained(mode="advise")
    trainer.heat["ffn"] = 20.0
    trainer.run(1)
    (made,) = trainer.controller.decisions
    with pytest.raises(OperatorError, match="is expired"):
        trainer.controller.approve(made.id, "ann", "late", trainer.now + GUARD.approve_within + 1)


def test_a_proposed_rollback_is_not_approved_beside_another_nor_once_the_run_went_back_behind_it():
    trainer = trained((replace(ROLLBACK, match=MatchConfig("UpdateRmsSpike")),), mode="advise")
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


def test_a_raise_that_ends_does_not_become_lasting_under_a_later_cut_or_a_new_attempt():
    raised = replace(CUT, name="raise", action=ActionConfig("scale_lr", ("emb",), factor=2.0, ttl_steps=500))
    trainer = trained((raised, replace(CUT, name="cut")), mode="enforce")
    trainer.heat["ffn"] = 1000.0
    trainer.run(12)
    first, *_, later = (made for made in trainer.controller.decisions if made.outcome in {"applied", "sent", "failed"})
    assert (first.policy, first.ttl_steps) == ("raise", 500)
    assert later.policy == "cut"
    assert (later.multipliers["emb"], later.multipliers["ffn"], later.ttl_steps) == (2.0, 0.5, 500)
    trainer.run(1)
    again = RunController("run", **trainer.options)
    again.take_over(trainer.controller)
    ones = dict.fromkeys(BLOCKS, 1.0)
    (command,) = again.observe(Observation(1, trainer.now, multipliers=ones), trainer.now).commands
    assert (command.multipliers["emb"], command.ttl_steps) == (2.0, 500)


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
    assert not any(alert.active for alert in trainer.controller.alerts)
    trainer.run(110)
    assert next(one for one in trainer.controller.decisions if one.id == made.id).outcome == "recovered"
    trainer.heat["ffn"] = 1000.0
    trainer.run(120)
    assert [one.outcome for one in trainer.controller.decisions if one.action == "rollback"] == ["recovered", "refused"]
    assert trainer.controller.decisions[-1].guard.startswith("rollback_window_steps")


def test_no_checkpoint_before_the_onset_is_no_rollback():
    trainer = trained((replace(ROLLBACK, match=MatchConfig("UpdateRmsSpike")),))
    trainer.controller.note_checkpoints(CheckpointReport((Checkpoint(122, "too late"),)))
    trainer.heat["ffn"] = 1000.0
    trainer.run(5)
    (made,) = trainer.controller.decisions
    assert (made.outcome, made.guard) == ("refused", "checkpoint: there is none from before the onset")


def test_what_held_is_ramped_back_one_cut_at_a_time():
    trainer = trained()
    trainer.heat["ffn"] = 1000.0
    trainer.run(15)
    assert trainer.multipliers["ffn"] == 0.25
    trainer.heat["ffn"] = 0.0
    way = [trainer.multipliers["ffn"]]
    while len(way) < 3:
        trainer.run(1)
        assert trainer.step < 500
        if trainer.multipliers["ffn"] != way[-1]:
            way.append(trainer.multipliers["ffn"])
    assert way == [0.25, 0.5, 1.0]
    ramps = [made for made in trainer.controller.decisions if made.action == "ramp_back"]
    assert ramps[1].applied_step - ramps[0].applied_step >= GUARD.hold_steps
    assert ramps[0].ramp_steps == GUARD.hold_steps // 2
    trainer.run(GUARD.hold_steps + 1)
    assert [made.outcome for made in trainer.controller.decisions if made.action == "ramp_back"] == ["recovered"] * 2
    trainer.run(200)
    assert len(trainer.controller.revisions) == 4


def test_a_fault_that_persists_is_met_ever_more_rarely():
    trainer = trained()
    trainer.heat["ffn"] = 8.0
    trainer.run(1500)
    ramps = [made for made in trainer.controller.decisions if made.action == "ramp_back"]
    waits = [later.step - earlier.step for earlier, later in itertools.pairwise(ramps)]
    assert len(waits) >= 2
    assert all(later >= 1.9 * earlier for earlier, later in itertools.pairwise(waits))
    for ramp in ramps[:-1]:
        assert ramp.outcome == "failed"
    restored = [made for made in trainer.controller.decisions if made.action == "set_lr"]
    assert [one.undoes for one in trainer.controller.revisions if one.undoes] == [
        one.revision for one in ramps[: len(restored)]
    ]
    # Put back at once: the alert that did it began at that very step.
    assert {made.step for made in restored} <= {alert.first_step for alert in trainer.controller.alerts}


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
        ({"qk": 0.01}, 0, 0, "ann", "0.1 to 10"),
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


def test_a_refusal_by_the_trainer_is_not_a_storm_and_what_it_refused_was_never_in_force():
    trainer = trained()
    trainer.refuses = "out of bounds"
    trainer.heat["ffn"] = 1000.0
    trainer.run(25)
    sent = [made for made in trainer.controller.decisions if made.revision]
    assert [made.guard for made in sent] == ["trainer: out of bounds"] * 3  # one a cooldown
    assert trainer.controller.multipliers == dict.fromkeys(BLOCKS, 1.0)


def test_a_command_never_answered_expires_and_a_late_answer_still_counts():
    trainer = trained()
    trainer.silent = True
    trainer.heat["ffn"] = 20.0
    trainer.run(1)
    trainer.heat["ffn"] = 0.0
    (made,) = trainer.controller.decisions
    trainer.run(GUARD.expires_after_steps + 101)
    assert trainer.controller.decisions[0].outcome == "expired"
    assert trainer.controller.multipliers["ffn"] == 1.0
    trainer.controller.command_result(ReportedResult(made.id, "applied", 130), trainer.now)
    assert trainer.controller.decisions[0].outcome == "expired"
    assert trainer.controller.multipliers["ffn"] == 0.5


def test_a_lost_result_is_read_off_the_multipliers():
    trainer = trained()
    trainer.silent = True
    trainer.heat["ffn"] = 20.0
    trainer.run(1)
    trainer.heat["ffn"] = 0.0
    trainer.multipliers["ffn"] = 0.5
    trainer.run(GUARD.expires_after_steps + 101)
    assert trainer.controller.decisions[0].applied_step is not None
    assert "lost" in trainer.controller.decisions[0].detail


def test_an_unknown_result_is_refused():
    with pytest.raises(OperatorError, match="no decision nope"):
        trained().controller.command_result(ReportedResult("nope", "applied", 1), 0.0)


def test_a_new_attempt_gets_back_what_was_in_force():
    trainer = trained()
    trainer.take(trainer.controller.set_learning_rates({"qk": 0.5}, 0, 0, "ann", "plan", trainer.now))
    trainer.run(1)
    fresh = RunController("run", **trainer.options)
    fresh.take_over(trainer.controller)
    trainer.controller, trainer.multipliers = fresh, dict.fromkeys(BLOCKS, 1.0)
    trainer.run(2)
    assert trainer.multipliers["qk"] == 0.5
    assert fresh.revisions[-1].author == "sharpwatch"


def test_mode():
    assert RunController("r", blocks=BLOCKS, policies=()).mode == "observe"
    controller = RunController("r", blocks=BLOCKS, policies=(CUT,))
    assert (controller.mode, controller.own_mode) == ("enforce", None)
    controller.set_mode("advise")
    assert controller.mode == controller.own_mode == "advise"
    with pytest.raises(OperatorError, match="observe, advise, enforce"):
        controller.set_mode("off")


def restored(trainer: Trainer) -> RunController:
    """What a restarted daemon makes of the journal."""
    old = trainer.controller
    new = RunController("run", **trainer.options)
    new.restore(old.alerts, old.decisions, old.revisions, old.checkpoints, old.own_mode)
    for seen in trainer.seen:
        new.replay(seen)
    return new


@pytest.mark.parametrize("restart_after", [1, 2, 15, 40, 150, 400])
def test_a_restart_changes_nothing(restart_after):
    """The run that was restarted decides the same, at the same steps, as the one that was not."""
    histories = []
    for restarts in (False, True):
        trainer = trained(CHAIN)
        trainer.controller.note_checkpoints(CheckpointReport((Checkpoint(100, "file"),)))
        trainer.heat["ffn"] = 8.0
        trainer.run(restart_after)
        if restarts:
            trainer.controller = restored(trainer)
        trainer.run(600 - restart_after)
        histories.append(
            [(d.step, d.action, d.outcome, d.applied_step, dict(d.multipliers)) for d in trainer.controller.decisions]
        )
        histories[-1].append([(a.name, a.first_step, a.last_step, a.active) for a in trainer.controller.alerts])
    assert histories[0] == histories[1]
    assert len(histories[0]) > 4


BACK_AT_ONCE = replace(
    ROLLBACK, match=MatchConfig("UpdateRmsSpike"), guard=GuardConfig(rollback_window_steps=5, cooldown_steps=1)
)


def saved(trainer: Trainer, *steps: int) -> dict[int, Checkpoint]:
    made = {step: Checkpoint(step, f"file:{step}") for step in steps}
    trainer.controller.note_checkpoints(CheckpointReport(tuple(made.values())))
    return made


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


class AnyRun(RuleBasedStateMachine):
    """Whatever is observed, asked and answered, the promises hold."""

    @initialize(mode=st.sampled_from([None, "observe", "advise", "enforce"]), low=st.sampled_from([0.05, 0.3, 1.0]))
    def begin(self, mode, low):
        self.bounds = (low, 4.0)
        guard = replace(GUARD, cooldown_steps=1, hold_steps=3, recover_within_steps=4, max_actions_per_hour=50)
        cut = replace(CUT, guard=guard, action=replace(CUT.action, blocks="all"), escalate=EscalateConfig(8, "back"))
        bad = replace(cut, name="bad", match=MatchConfig("NonFinite"), action=replace(cut.action, factor=0.3))
        self.trainer = Trainer((cut, bad, ROLLBACK), mode=mode, lr_bounds=self.bounds)
        self.controller = self.trainer.controller
        self.final: dict[str, Decision] = {}
        self.trainer.run(60)

    @rule(steps=st.integers(1, 30), heat=st.sampled_from([0.0, 5.0, 1e3, math.inf]), block=st.sampled_from(BLOCKS))
    def train(self, steps, heat, block):
        self.trainer.heat[block] = heat
        self.trainer.run(steps)
        self.trainer.heat[block] = 0.0

    @rule(loss=st.floats(), norm=st.floats(), times=st.integers(1, 3))
    def observe_anything(self, loss, norm, times):
        for _ in range(times):
            self.trainer.step += 1
            obs = Observation(
                self.trainer.step,
                0.0,
                loss=loss,
                gradient_norm={"qk": norm},
                update_rms={"ffn": norm},
                multipliers=dict(self.trainer.multipliers),
            )
            self.trainer.seen.append(obs)
            self.trainer.take(self.controller.observe(obs, self.trainer.now))

    @rule(wanted=st.dictionaries(st.sampled_from((*BLOCKS, "kv")), st.floats(0.01, 8)), ahead=st.integers(-2, 40))
    def ask(self, wanted, ahead):
        at = self.trainer.step + ahead if ahead > 0 else 0
        self.attempt(lambda now: self.controller.set_learning_rates(wanted, 0, at, "ann", "why", now))

    @rule(number=st.integers(0, 8))
    def undo(self, number):
        self.attempt(lambda now: self.controller.undo(number, "ann", "", now))

    @rule(mode=st.sampled_from(["observe", "advise", "enforce"]))
    def set_mode(self, mode):
        self.controller.set_mode(mode)

    @rule(refuses=st.sampled_from(["", "", "no"]), silent=st.sampled_from([False, False, True]))
    def change_temper(self, refuses, silent):
        self.trainer.refuses, self.trainer.silent = refuses, silent

    @rule()
    def save(self):
        self.controller.note_checkpoints(CheckpointReport((Checkpoint(self.trainer.step, "file"),)))

    @rule()
    def delete(self):
        self.controller.note_checkpoints(CheckpointReport(deleted=("file",)))

    @precondition(lambda self: any(made.outcome == "proposed" for made in self.controller.decisions))
    @rule(yes=st.booleans())
    def judge(self, yes):
        made = next(made for made in self.controller.decisions if made.outcome == "proposed")
        say = self.controller.approve if yes else self.controller.reject
        self.attempt(lambda now: say(made.id, "ann", "why", now))

    @rule()
    def restart(self):
        options = {**self.trainer.options, "mode": None}
        new = RunController("run", **options)
        old = self.controller
        new.restore(old.alerts, old.decisions, old.revisions, old.checkpoints, old.own_mode)
        for seen in self.trainer.seen:
            new.replay(seen)
        assert (new.decisions, new.revisions, new.multipliers) == (old.decisions, old.revisions, old.multipliers)
        assert [a.id for a in new.alerts if a.active] == [a.id for a in old.alerts if a.active]
        self.controller = self.trainer.controller = new

    def attempt(self, call) -> None:
        try:
            self.trainer.take(call(self.trainer.now))
        except OperatorError:
            return

    @invariant()
    def promises_hold(self):
        if not hasattr(self, "controller"):
            return  # before `begin`
        low, high = self.bounds
        revisions = self.controller.revisions
        assert all(low <= value <= high for one in revisions for value in one.multipliers.values())
        assert [one.revision for one in revisions] == list(range(1, len(revisions) + 1))
        for made in self.controller.decisions:
            assert self.final.get(made.id, made) == made
            if made.outcome in FINAL:
                self.final[made.id] = made


AnyRun.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None, derandomize=True)
test_any_run = AnyRun.TestCase
