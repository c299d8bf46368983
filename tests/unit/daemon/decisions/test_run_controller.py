"""One run from trouble to recovery: every turn that a decision can take."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from controlled_run import BLOCKS, CHAIN, CUT, GUARD, ROLLBACK, Trainer, restored, trained

from sharpwatch.daemon.config.settings import ActionConfig, MaintenanceConfig, MatchConfig
from sharpwatch.daemon.decisions.policy import EscalationChain
from sharpwatch.daemon.decisions.run_controller import RunController
from sharpwatch.daemon.detection import run_detection
from sharpwatch.daemon.detection.history import Losses
from sharpwatch.daemon.records import Checkpoint, CheckpointReport, Finding, ForeignAlert, Observation, ReportedResult
from sharpwatch.errors import OperatorError


def test_a_cut_of_the_blocks_of_the_incident_is_sent_applied_and_recovers():
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
    assert [incident.active for incident in trainer.controller.incidents] == [False]


def test_what_is_found_only_once_it_lasts_is_cut_then_and_named_from_its_onset():
    trainer = trained((replace(CUT, match=MatchConfig("UpdateRmsSpike")),), steps=220, swell=True)
    trainer.heat["ffn"] = 20.0
    trainer.run(10)
    (incident,) = trainer.controller.incidents
    assert (incident.onset, incident.layer_blocks, incident.cause) == (221, ("layers.0.ffn",), "instability")
    made = trainer.controller.decisions[0]  # half of it is not enough, so more are asked for
    assert (made.step, made.alert_id, made.alert_name) == (incident.first_step, incident.id, "UpdateRmsSpike")
    assert 222 <= made.step <= 224
    assert made.detail == "UpdateRmsSpike since step 221: ffn 1 to 0.5"
    assert trainer.multipliers == dict.fromkeys(BLOCKS, 1.0) | {"ffn": 0.5}


def test_cuts_go_on_after_each_cooldown_down_to_the_bound_and_what_was_not_enough_has_failed():
    trainer = trained()
    trainer.heat["ffn"] = 1000.0
    trainer.run(100)
    cuts = [made for made in trainer.controller.decisions if made.outcome != "refused"]
    assert [made.multipliers["ffn"] for made in cuts] == [0.5, 0.25, 0.125, 0.1]
    assert all(b.applied_step - a.applied_step >= 10 for a, b in itertools.pairwise(cuts))
    assert [made.outcome for made in cuts[:-1]] == ["no-effect"] * 3
    refused = [made.guard.partition(":")[0] for made in trainer.controller.decisions if made.outcome == "refused"]
    assert refused == ["cooldown_steps", "min_multiplier"]


def test_a_cut_that_was_not_enough_has_failed_though_its_incident_has_another_name_by_now(monkeypatch):
    found = []
    monkeypatch.setattr(run_detection, "findings", lambda _: found)
    policy = replace(
        CUT, match=MatchConfig("UpdateRmsSpike"), guard=replace(GUARD, cooldown_steps=2, recover_within_steps=2)
    )
    trainer = trained((policy,))
    spike = Finding("UpdateRmsSpike", "critical", "z 9", step=121, onset=121, layer_blocks=("layers.0.ffn",))
    found += [spike]
    trainer.run(2)
    found += [replace(spike, name="GradientSpike", onset=120)]  # which began before, and so explains it
    trainer.run(2)
    cuts = [made for made in trainer.controller.decisions if made.outcome != "refused"]
    assert [(made.alert_name, made.outcome) for made in cuts] == [
        ("UpdateRmsSpike", "no-effect"),
        ("GradientSpike", "sent"),
    ]
    assert len(trainer.controller.incidents) == 1


def test_trouble_that_comes_again_while_a_cut_is_in_force_brings_no_other_unless_it_lasts():
    trainer = trained((replace(CUT, guard=replace(GUARD, recover_within_steps=30)),))
    for _ in range(3):
        trainer.heat["ffn"] = 1000.0
        trainer.run(5)
        trainer.heat["ffn"] = 0.0
        trainer.run(40)
    assert trainer.multipliers["ffn"] == 0.5
    refused = [made.guard for made in trainer.controller.decisions if made.outcome == "refused"]
    assert [guard.partition(":")[0] for guard in refused] == ["cooldown_steps", *["recover_within_steps"] * 2]
    trainer.heat["ffn"] = 1000.0
    trainer.run(35)
    assert trainer.multipliers["ffn"] == 0.25


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


@pytest.mark.parametrize("mode", [None, "advise", "enforce"])
def test_a_policy_that_runs_dry_records_once_what_it_would_do_whatever_the_mode_of_the_run(mode):
    dry = replace(CUT, name="dry", dry_run=True)
    trainer = trained((dry,), mode=mode)
    assert trainer.controller.mode == (mode or "observe")
    trainer.heat["ffn"] = 1000.0
    trainer.run(50)
    (made,) = trainer.controller.decisions
    assert (made.policy, made.outcome, made.mode, made.multipliers["ffn"]) == ("dry", "observed", "observe", 0.5)
    assert trainer.controller.revisions == ()


def test_beside_a_policy_that_runs_dry_the_others_act():
    trainer = trained((replace(CUT, name="dry", dry_run=True), CUT))
    trainer.heat["ffn"] = 20.0
    trainer.run(1)
    made = trainer.controller.decisions
    assert [(one.policy, one.outcome) for one in made] == [("dry", "observed"), ("cut", "sent")]
    assert trainer.controller.mode == "enforce"


# The trainer's clock is at 01:46:52 UTC of a Sunday when its 121st step comes, and a step takes 0.1 s.
WINDOW = MaintenanceConfig("01:00", "01:47", ("sun",))


def test_in_a_maintenance_window_what_would_be_enforced_is_proposed_and_done_after_it():
    trainer = trained(maintenance=(WINDOW,))
    trainer.heat["ffn"] = 1000.0
    trainer.run(50)
    (made,) = trainer.controller.decisions
    assert (made.outcome, made.mode, made.guard) == ("proposed", "advise", "ok")
    assert trainer.multipliers["ffn"] == 1.0
    assert trainer.controller.mode == "enforce"
    trainer.run(50)
    first, second, *_ = trainer.controller.decisions
    assert (first.outcome, second.mode, second.outcome) == ("expired", "enforce", "no-effect")
    assert trainer.multipliers["ffn"] < 1.0


@pytest.mark.parametrize("policy", [CUT, replace(ROLLBACK, match=MatchConfig("NonFinite"))])
def test_what_was_proposed_in_a_maintenance_window_is_not_open_after_it(policy):
    trainer = trained((policy,), maintenance=(WINDOW,))
    trainer.take(trainer.controller.note_checkpoints(CheckpointReport((Checkpoint(100, "file:100"),))))
    trainer.heat["ffn"] = 1000.0
    trainer.run(5)
    trainer.heat["ffn"] = 0.0
    trainer.run(30)
    (made,) = trainer.controller.decisions
    assert made.outcome == "proposed"  # though its incident is over, as any proposal
    trainer.run(60)
    (made,) = trainer.controller.decisions
    assert (made.outcome, made.detail.rpartition("; ")[2]) == ("expired", "its policy acts by itself by now")


def test_what_was_proposed_in_a_maintenance_window_is_not_approved_after_it():
    trainer = trained(maintenance=(WINDOW,))
    trainer.heat["ffn"] = 1000.0
    trainer.run(5)
    (made,) = trainer.controller.decisions
    with pytest.raises(OperatorError, match=r"is expired: only a proposal can be approved"):
        trainer.controller.approve(made.id, "ann", "", trainer.now + 60)


@pytest.mark.parametrize(("mode", "outcome"), [("observe", "observed"), ("enforce", "proposed")])
def test_a_maintenance_window_limits_the_mode_of_the_run_and_raises_none(mode, outcome):
    trainer = trained((replace(CUT, mode="observe"),), mode=mode, maintenance=(WINDOW,))
    trainer.heat["ffn"] = 1000.0
    trainer.run(5)
    assert trainer.actions() == [("scale_lr", outcome)]


def test_another_maintenance_window_changes_nothing():
    trainer = trained(maintenance=(replace(WINDOW, days=("mon",)),))
    trainer.heat["ffn"] = 20.0
    trainer.run(1)
    assert trainer.actions() == [("scale_lr", "sent")]


def test_actions_per_hour():
    trainer = trained((replace(CUT, guard=replace(GUARD, max_actions_per_hour=2)),))
    trainer.heat["ffn"] = 1000.0
    trainer.run(100)
    assert trainer.multipliers["ffn"] == 0.25
    assert trainer.controller.decisions[-1].guard.startswith("max_actions_per_hour: 2")


@pytest.mark.parametrize("end", ["unanswered", "refused", "lost"])
def test_an_incident_that_stands_is_no_reason_to_try_the_same_at_every_step(end):
    guard = replace(GUARD, approve_within=1.0, expires_after_steps=1, cooldown_steps=0, max_actions_per_hour=3)
    trainer = trained((replace(CUT, guard=guard),), mode="advise" if end == "unanswered" else "enforce")
    trainer.heat["ffn"] = 1000.0
    trainer.refuses, trainer.silent = "no" if end == "refused" else "", end == "lost"
    trainer.run(1000)
    tried = [made for made in trainer.controller.decisions if not made.guard.startswith("max_actions_per_hour")]
    assert len({incident.id for incident in trainer.controller.incidents}) == 1
    assert [made.outcome for made in tried] == 3 * ["refused" if end == "refused" else "expired"]
    assert trainer.multipliers["ffn"] == 1.0


def test_a_raise_that_ends_does_not_become_lasting_under_a_later_cut_or_a_new_attempt():
    raised = replace(CUT, name="raise", action=ActionConfig("scale_lr", ("emb",), factor=2.0, ttl_steps=500))
    trainer = trained((raised, replace(CUT, name="cut")), mode="enforce")
    trainer.heat["ffn"] = 1000.0
    trainer.run(12)
    first, *_, later = (
        made for made in trainer.controller.decisions if made.outcome in {"applied", "sent", "no-effect"}
    )
    assert (first.policy, first.ttl_steps) == ("raise", 500)
    assert later.policy == "cut"
    assert (later.multipliers["emb"], later.multipliers["ffn"], later.ttl_steps) == (2.0, 0.5, 500)
    trainer.run(1)
    again = RunController("run", **trainer.options)
    again.take_over(trainer.controller)
    ones = dict.fromkeys(BLOCKS, 1.0)
    (command,) = again.observe(Observation(1, trainer.now, multipliers=ones), trainer.now).commands
    assert (command.multipliers["emb"], command.ttl_steps) == (2.0, 500)


def test_what_held_is_ramped_back_in_stages():
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
    quiet_since = max(incident.last_step for incident in trainer.controller.incidents)
    assert ramps[0].step - quiet_since == GUARD.hold_steps
    assert ramps[1].step - ramps[0].applied_step == GUARD.hold_steps // 4
    assert ramps[0].ramp_steps == GUARD.hold_steps // 2
    trainer.run(GUARD.hold_steps + 1)
    assert [made.outcome for made in trainer.controller.decisions if made.action == "ramp_back"] == ["recovered"] * 2
    trainer.run(200)
    assert len(trainer.controller.revisions) == 4


def held_against_a_better_run(trainer) -> None:
    """Its loss stays above the reference's from now on: a SilentFailure that lasts."""
    better = Losses.of(np.arange(1, 2_001), np.full(2_000, 1.0))
    trainer.controller.set_reference("good", better)


def test_a_silent_failure_does_not_hold_up_the_ramp_back_nor_undo_it():
    trainer = trained()
    held_against_a_better_run(trainer)
    trainer.heat["ffn"] = 20.0
    trainer.run(1)
    trainer.heat["ffn"] = 0.0
    trainer.run(3 * GUARD.hold_steps)
    silent = [each for each in trainer.controller.incidents if each.name == "SilentFailure"]
    assert [each.active for each in silent] == [True]
    assert trainer.multipliers["ffn"] == 1.0
    assert [made.action for made in trainer.controller.decisions] == ["scale_lr", "ramp_back"]


def test_a_silent_failure_is_answered_once(monkeypatch):
    policy = replace(CUT, name="silent", match=MatchConfig(cause="silent"))
    trainer = trained((policy,))
    held_against_a_better_run(trainer)
    trainer.run(5)
    (made,) = trainer.controller.decisions
    assert made.alert_name == "SilentFailure"
    asked = []
    answering = EscalationChain.answering
    monkeypatch.setattr(EscalationChain, "answering", lambda *args: asked.append(args) or answering(*args))
    trainer.run(50)
    assert asked == []
    assert [made.action for made in trainer.controller.decisions].count("scale_lr") == 1


def test_a_fault_that_persists_is_met_ever_more_rarely():
    trainer = trained()
    trainer.heat["ffn"] = 8.0
    trainer.run(1500)
    ramps = [made for made in trainer.controller.decisions if made.action == "ramp_back"]
    waits = [later.step - earlier.step for earlier, later in itertools.pairwise(ramps)]
    assert len(waits) >= 2
    assert all(later >= 1.9 * earlier for earlier, later in itertools.pairwise(waits))
    for ramp in ramps[:-1]:
        assert ramp.outcome == "worse"
    restored = [made for made in trainer.controller.decisions if made.action == "set_lr"]
    assert [one.undoes for one in trainer.controller.revisions if one.undoes] == [
        one.revision for one in ramps[: len(restored)]
    ]
    # Put back at once: the incident that did it began at that very step.
    assert {made.step for made in restored} <= {incident.first_step for incident in trainer.controller.incidents}


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
        histories[-1].append([(a.name, a.first_step, a.last_step, a.active) for a in trainer.controller.incidents])
    assert histories[0] == histories[1]
    assert len(histories[0]) > 4


def test_a_restart_does_not_lose_sight_of_trouble_that_goes_on():
    histories = []
    for restarts in (False, True):
        trainer = trained((), steps=220, swell=True)
        trainer.heat["ffn"] = 20.0
        trainer.run(15)
        assert [(one.severity, one.active) for one in trainer.controller.incidents] == [("critical", True)]
        if restarts:
            trainer.controller = restored(trainer)
        trainer.run(60)
        histories.append(
            [(one.name, one.first_step, one.last_step, one.active) for one in trainer.controller.incidents]
        )
    assert histories[0] == histories[1]


def resumed_with(trainer: Trainer, multipliers: dict[str, float]) -> None:
    """A new attempt whose checkpoint has these multipliers."""
    trainer.begin_anew()
    trainer.multipliers |= multipliers


@pytest.mark.parametrize("saved", [{"qk": 0.7}, {"qk": 0.7, "emb": 0.2}, {"emb": 0.2}])
def test_a_checkpoint_with_another_set_gets_the_one_in_force(saved):
    trainer = trained()
    trainer.take(trainer.controller.set_learning_rates({"qk": 0.5}, 0, 0, "ann", "", trainer.now))
    trainer.run(1)
    resumed_with(trainer, saved)
    trainer.run(2)
    assert trainer.multipliers == dict.fromkeys(BLOCKS, 1.0) | {"qk": 0.5}
    made = trainer.controller.decisions[-1]
    assert made.author == "sharpwatch"
    assert "resumed with" in made.reason
    trainer.run(50)
    assert trainer.controller.decisions[-1] == made


def test_a_checkpoint_from_before_a_ramp_back_does_not_keep_the_cut():
    trainer = trained()
    trainer.heat["qk"] = 20.0
    trainer.run(3)
    trainer.heat["qk"] = 0.0
    assert trainer.multipliers["qk"] == 0.5
    trainer.run(200)
    assert trainer.multipliers["qk"] == 1.0
    resumed_with(trainer, {"qk": 0.5})
    trainer.run(60)  # the ramp of the newest set, which might go on
    assert trainer.multipliers["qk"] == 1.0


def test_a_resume_under_way_to_what_is_in_force_is_left_alone():
    trainer = trained()
    trainer.take(trainer.controller.set_learning_rates({"qk": 0.5}, 20, 0, "ann", "", trainer.now))
    trainer.run(1)
    resumed_with(trainer, {"qk": 0.9})
    for value in np.geomspace(0.9, 0.5, 19):
        trainer.multipliers["qk"] = float(value)
        trainer.run(1)
    trainer.run(20)
    assert len(trainer.controller.decisions) == 1


def test_a_trainer_whose_sets_nobody_knows_keeps_its_own():
    trainer = trained()
    resumed_with(trainer, {"qk": 0.5})
    trainer.run(50)
    assert trainer.multipliers["qk"] == 0.5
    assert trainer.controller.decisions == ()


def test_a_set_that_the_resumed_trainer_refuses_is_sent_again():
    trainer = trained()
    trainer.take(trainer.controller.set_learning_rates({"qk": 0.5}, 0, 0, "ann", "", trainer.now))
    trainer.run(1)
    resumed_with(trainer, {"qk": 0.7})
    trainer.refuses = "not now"
    trainer.run(250)
    assert [made.outcome for made in trainer.controller.decisions] == ["applied", "refused", "refused"]
    trainer.refuses = ""
    trainer.run(200)
    assert trainer.multipliers["qk"] == 0.5


@pytest.mark.parametrize("has_stepped", [False, True])
def test_a_daemon_that_restarts_meanwhile_puts_it_back_too(has_stepped):
    trainer = trained()
    trainer.take(trainer.controller.set_learning_rates({"qk": 0.5}, 20, 0, "ann", "", trainer.now))
    trainer.run(30)
    resumed_with(trainer, {"qk": 0.7})
    trainer.run(int(has_stepped))  # within the ramp of the newest set
    trainer.controller = restored(trainer)
    trainer.run(25)
    assert trainer.multipliers["qk"] == 0.5


def test_a_daemon_that_restarts_brings_no_raise_back_that_has_ended():
    trainer = trained()
    trainer.take(trainer.controller.set_learning_rates({"qk": 2.0, "vo": 0.5}, 0, 0, "ann", "", trainer.now))
    trainer.run(1)
    trainer.multipliers["qk"] = 1.0  # as the time-out of a raise does
    trainer.controller = restored(trainer)
    trainer.run(300)
    assert (trainer.multipliers["qk"], trainer.multipliers["vo"]) == (1.0, 0.5)
    assert len(trainer.controller.decisions) == 1


def test_blocks_that_share_parameters_are_no_other_set():
    """A fused matrix takes the smaller multiplier, so that a block never has what was asked for it."""
    trainer = trained()
    trainer.take(trainer.controller.set_learning_rates({"qk": 0.5}, 0, 0, "ann", "", trainer.now))
    trainer.run(1)
    trainer.multipliers["vo"] = 0.75
    trainer.run(2)
    trainer.controller = restored(trainer)
    trainer.run(200)
    resumed_with(trainer, {"qk": 0.5, "vo": 0.75})
    trainer.run(200)
    assert len(trainer.controller.decisions) == 1


def test_a_resume_under_a_set_that_never_came_gets_the_one_before_it():
    trainer = trained()
    trainer.heat["qk"] = 20.0
    trainer.run(1)  # its cut is sent, and lost with the process
    trainer.heat["qk"] = 0.0
    resumed_with(trainer, {"emb": 0.7})
    trainer.run(400)
    assert trainer.multipliers == dict.fromkeys(BLOCKS, 1.0)


@pytest.mark.parametrize(
    ("severity", "late", "undone"), [("warning", 5, True), ("warning", 30, False), ("critical", 30, True)]
)
def test_once_a_stage_is_judged_only_what_is_critical_undoes_it(severity, late, undone):
    elsewhere = replace(CUT, name="far", match=MatchConfig(foreign="DiskFull"), mode="advise")
    trainer = trained((CUT, elsewhere))
    trainer.heat["ffn"] = 20.0
    trainer.run(2)
    trainer.heat["ffn"] = 0.0
    trainer.run(65)
    stage = trainer.controller.decisions[-1]
    assert (stage.action, trainer.step - stage.applied_step) == ("ramp_back", 4)
    trainer.run(late - 4)  # it is judged within 15 steps, a quarter of the hold
    alert = ForeignAlert("DiskFull", "f", 1e9)
    trainer.controller.foreign_alert("far", alert, severity, "full")
    trainer.run(2)
    assert trainer.multipliers["ffn"] == (0.5 if undone else 1.0)
