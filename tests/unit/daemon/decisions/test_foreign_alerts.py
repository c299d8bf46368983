"""Alerts of other systems: they open incidents that policies answer by name, once each, and they can block policies."""

from __future__ import annotations

from dataclasses import replace

import pytest
from controlled_run import BLOCKS, CUT, GUARD, ROLLBACK, Trainer, restored, saved, trained

from sharpwatch.daemon.config.settings import ActionConfig, EscalateConfig, MatchConfig, PolicyConfig
from sharpwatch.daemon.decisions.run_controller import MOST_FOREIGN
from sharpwatch.daemon.records import NO_CHANGES, Changes, ForeignAlert
from sharpwatch.errors import OperatorError

HOT = PolicyConfig("cool", MatchConfig(foreign="NodeHot"), "enforce", ActionConfig("scale_lr", factor=0.5), GUARD)
BLOCKED = replace(CUT, guard=replace(GUARD, blocked_by=("NodeDown",)))
BEGAN = 1e9


def tell(
    trainer: Trainer, name: str, *, began: float = BEGAN, severity: str = "warning", ended: float | None = None
) -> Changes:
    alert = ForeignAlert(name, f"print of {name}", began)
    words = f"fires since {began:.0f}: node 7"
    changes = trainer.controller.foreign_alert(f"{name}-{began:.0f}", alert, severity, words, ended)
    return trainer.take(changes)


def outcomes(trainer: Trainer) -> list[tuple[str, str, str]]:
    return [(made.policy, made.outcome, made.guard.partition(":")[0]) for made in trainer.controller.decisions]


def test_a_policy_acts_once_on_an_alert_however_long_it_fires_and_ramps_back_once_it_has_ended():
    trainer = trained((HOT,))
    tell(trainer, "NodeHot")
    trainer.run(300)
    (made,) = trainer.controller.decisions
    assert (made.alert_name, made.alert_id, made.step) == ("NodeHot", f"NodeHot-{BEGAN:.0f}", 121)
    assert made.detail.startswith("NodeHot since step 120: emb 1 to 0.5")
    assert trainer.multipliers == dict.fromkeys(BLOCKS, 0.5)
    tell(trainer, "NodeHot", ended=BEGAN + 30)
    (incident,) = trainer.controller.incidents
    assert (incident.active, incident.closed, incident.onset, incident.last_step) == (False, "resolved", 120, 420)
    trainer.run(59)
    assert len(trainer.controller.decisions) == 1  # hold_steps count from its end
    trainer.run(60)
    assert outcomes(trainer)[0] == ("cool", "recovered", "ok")
    assert trainer.actions()[1][0] == "ramp_back"
    assert trainer.multipliers == dict.fromkeys(BLOCKS, 1.0)


def test_one_of_a_name_on_several_nodes_is_answered_once_and_anew_when_all_have_ended():
    trainer = trained((HOT,))
    for node in range(4):
        alert = ForeignAlert("NodeHot", f"node {node}", BEGAN)
        trainer.take(trainer.controller.foreign_alert(f"i{node}", alert, "warning", "hot"))
    trainer.run(150)
    assert trainer.multipliers == dict.fromkeys(BLOCKS, 0.5)
    # The one that was answered ends; the others fire on.
    trainer.take(
        trainer.controller.foreign_alert("i0", ForeignAlert("NodeHot", "node 0", BEGAN), "warning", "hot", BEGAN + 9)
    )
    trainer.run(150)
    assert trainer.actions() == [("scale_lr", "applied")]
    for node in range(1, 4):
        alert = ForeignAlert("NodeHot", f"node {node}", BEGAN)
        trainer.take(trainer.controller.foreign_alert(f"i{node}", alert, "warning", "hot", BEGAN + 9))
    trainer.run(2)
    tell(trainer, "NodeHot", began=BEGAN + 60)
    trainer.run(20)
    assert trainer.multipliers == dict.fromkeys(BLOCKS, 0.25)


@pytest.mark.parametrize(
    "other",
    [
        replace(HOT, name="tell", match=MatchConfig(foreign="DiskFull"), action=ActionConfig("notify")),
        replace(HOT, name="watch", match=MatchConfig(foreign="DiskFull"), mode="observe"),
        replace(HOT, name="try", match=MatchConfig(foreign="DiskFull"), dry_run=True),
    ],
)
def test_an_alert_that_no_policy_acts_on_does_not_undo_what_another_ramps_back(other):
    trainer = trained((CUT, other))
    trainer.heat["ffn"] = 1000.0
    trainer.run(3)
    trainer.heat["ffn"] = 0.0
    while trainer.controller.decisions[-1].action != "ramp_back":
        trainer.run(1)
    tell(trainer, "DiskFull")
    trainer.run(5)
    assert trainer.multipliers["ffn"] == 1.0
    assert ("cut", "worse", "ok") not in outcomes(trainer)
    assert "set_lr" not in [made.action for made in trainer.controller.decisions]


def test_telling_it_again_changes_nothing_also_after_a_restart():
    trainer = trained((HOT,))
    assert len(tell(trainer, "NodeHot").incidents) == 1
    assert tell(trainer, "NodeHot") == NO_CHANGES
    trainer.run(5)
    trainer.controller = restored(trainer)
    assert tell(trainer, "NodeHot") == NO_CHANGES
    trainer.run(5)
    assert trainer.actions() == [("scale_lr", "applied")]
    tell(trainer, "NodeHot", ended=BEGAN + 30)
    assert tell(trainer, "NodeHot") == tell(trainer, "NodeHot", ended=BEGAN + 30) == NO_CHANGES


def test_a_new_one_of_the_same_series_ends_the_old_and_a_late_end_does_not_end_the_new():
    trainer = trained(())
    tell(trainer, "NodeHot")
    again = tell(trainer, "NodeHot", began=BEGAN + 60)
    assert [(one.active, one.closed) for one in again.incidents] == [(False, "it fires anew"), (True, "")]
    assert tell(trainer, "NodeHot", ended=BEGAN + 30) == NO_CHANGES
    assert len(tell(trainer, "NodeHot", began=BEGAN + 60, ended=BEGAN + 90).incidents) == 1


def test_a_start_that_comes_to_be_told_as_earlier_is_no_other_alert():
    """Where two Prometheus servers see an alert, Alertmanager tells the earlier start."""
    trainer = trained(())
    tell(trainer, "NodeHot", began=BEGAN + 10)
    assert tell(trainer, "NodeHot") == NO_CHANGES
    assert len(tell(trainer, "NodeHot", ended=BEGAN + 30).incidents) == 1


def test_an_end_never_acts_and_no_policy_answers_another_name():
    trainer = trained((HOT,))
    assert tell(trainer, "NodeHot", ended=BEGAN + 30) == Changes()
    tell(trainer, "LossSpike")
    trainer.run(5)
    assert trainer.controller.decisions == ()
    own = PolicyConfig("own", MatchConfig("LossSpike"), "enforce", ActionConfig("scale_lr", factor=0.5), GUARD)
    trainer = trained((own,))
    tell(trainer, "LossSpike")
    trainer.run(5)
    assert trainer.controller.decisions == ()


def test_severity_chooses():
    trainer = trained((replace(HOT, match=MatchConfig(foreign="NodeHot", severity="critical")),))
    tell(trainer, "NodeHot")
    trainer.run(5)
    assert trainer.controller.decisions == ()
    tell(trainer, "NodeHot", began=BEGAN + 60, severity="critical")
    trainer.run(5)
    assert trainer.actions() == [("scale_lr", "applied")]


def test_the_chain_climbs_while_it_fires():
    trainer = trained((replace(HOT, escalate=EscalateConfig(30, "back")), ROLLBACK), steps=90)
    saved(trainer, 90)
    trainer.run(30)
    tell(trainer, "NodeHot")
    trainer.run(60)
    assert [made.policy for made in trainer.controller.decisions] == ["cool", "back"]
    (incident,) = trainer.controller.incidents
    assert incident.active  # a rollback ends what was found, not what another system says


def test_detectors_know_nothing_of_it():
    trainer, other = trained((CUT,)), trained((CUT,))
    tell(trainer, "NodeHot", severity="critical")
    for each in (trainer, other):
        each.run(50)
        each.heat["ffn"] = 1000.0
        each.run(5)
    found, expected = trainer.controller.incidents[1:], other.controller.incidents
    assert [replace(one, id="") for one in found] == [replace(one, id="") for one in expected]
    assert trainer.multipliers == other.multipliers
    assert trainer.multipliers["ffn"] == 0.5


@pytest.mark.parametrize("mode", ["advise", "enforce"])
def test_a_blocked_policy_refuses_once_with_the_alert_and_acts_when_that_has_ended(mode):
    trainer = trained((replace(BLOCKED, mode=mode),))
    tell(trainer, "NodeDown")
    trainer.heat["ffn"] = 1000.0
    trainer.run(20)
    (refused,) = trainer.controller.decisions
    assert (refused.outcome, refused.alert_name) == ("refused", "NonFinite")
    assert refused.guard == f"blocked_by: NodeDown fires since step 120 (incident NodeDown-{BEGAN:.0f})"
    trainer.controller = restored(trainer)
    trainer.run(5)
    assert len(trainer.controller.decisions) == 1
    tell(trainer, "NodeDown", ended=BEGAN + 30)
    trainer.run(2)
    assert outcomes(trainer)[1] == ("cut", "applied" if mode == "enforce" else "proposed", "ok")


def test_another_alert_does_not_block():
    trainer = trained((BLOCKED,))
    tell(trainer, "NodeHot")
    trainer.heat["ffn"] = 1000.0
    trainer.run(2)
    assert outcomes(trainer)[0] == ("cut", "applied", "ok")


def test_a_blocked_policy_does_not_ramp_back_and_does_so_later():
    trainer = trained((BLOCKED,))
    trainer.heat["ffn"] = 1000.0
    trainer.run(3)
    trainer.heat["ffn"] = 0.0
    trainer.run(20)
    tell(trainer, "NodeDown")
    trainer.run(120)
    assert trainer.multipliers["ffn"] == 0.5
    assert outcomes(trainer)[-1] == ("cut", "refused", "blocked_by")
    assert trainer.controller.decisions[-1].action == "ramp_back"
    tell(trainer, "NodeDown", ended=BEGAN + 30)
    trainer.run(150)
    assert trainer.multipliers["ffn"] == 1.0


def test_an_alert_that_only_blocks_one_policy_holds_up_no_ramp_back_of_another():
    other = PolicyConfig("other", MatchConfig("LossSpike"), guard=replace(GUARD, blocked_by=("NodeDown",)))
    trainer = trained((CUT, other))
    trainer.heat["ffn"] = 1000.0
    trainer.run(3)
    trainer.heat["ffn"] = 0.0
    tell(trainer, "NodeDown")
    trainer.run(200)
    assert trainer.multipliers["ffn"] == 1.0


def test_a_run_holds_only_so_many():
    trainer = trained(())
    for number in range(MOST_FOREIGN):
        tell(trainer, f"A{number}")
    with pytest.raises(OperatorError, match=f"{MOST_FOREIGN} alerts of other systems fire on run run already"):
        tell(trainer, "B")
    assert tell(trainer, "A0") == NO_CHANGES
    tell(trainer, "A0", ended=BEGAN + 30)
    assert len(tell(trainer, "B").incidents) == 1


def test_one_can_be_acknowledged_and_stays_so():
    trainer = trained(())
    tell(trainer, "NodeHot")
    trainer.controller.acknowledge(f"NodeHot-{BEGAN:.0f}", "ann", "known")
    tell(trainer, "NodeHot", ended=BEGAN + 30)
    assert trainer.controller.incidents[0].acknowledged == "ann: known"
