"""Silences and inhibition: what they match and how long, and that a policy acts once nothing mutes it any more."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from controlled_run import CHAIN, CUT, GUARD, restored, saved, trained

from sharpwatch.daemon.config.settings import ActionConfig, MatchConfig, PolicyConfig
from sharpwatch.daemon.decisions.muting import Silences, muted
from sharpwatch.daemon.detection import run_detection
from sharpwatch.daemon.detection.history import Losses
from sharpwatch.daemon.records import Finding, Incident, Silence
from sharpwatch.errors import OperatorError

START = 1e9  # the trainer's clock; a step takes 0.1 s
SILENCE = Silence("s1", "ann", "moving data", START, START + 1000.0, cause="non-finite")
INCIDENT = Incident(
    id="i1",
    run="run",
    name="NonFinite",
    names=("NonFinite", "GradientSpike"),
    cause="non-finite",
    severity="critical",
    blocks=(),
    layer_blocks=(),
    evidence=(),
    onset=9,
    first_step=9,
    last_step=9,
    active=True,
)


def silences(*each: Silence) -> Silences:
    made = Silences()
    for silence in each:
        made.add(silence)
    return made


def guards(trainer) -> list[tuple[str, str, str, str]]:
    made = trainer.controller.decisions
    return [(one.policy, one.action, one.outcome, one.guard.partition(":")[0]) for one in made]


@pytest.mark.parametrize(
    ("given", "matches"),
    [
        ({"run": "run"}, True),
        ({"run": "run-2"}, False),
        ({"alert": "GradientSpike"}, True),
        ({"alert": "LossSpike"}, False),
        ({"cause": "non-finite"}, True),
        ({"cause": "data"}, False),
        ({"policy": "cut"}, True),
        ({"policy": "back"}, False),
        ({"run": "run", "alert": "NonFinite", "cause": "non-finite", "policy": "cut"}, True),
        ({"run": "run", "alert": "NonFinite", "cause": "data", "policy": "cut"}, False),
    ],
)
def test_a_silence_matches_what_fits_all_that_it_names(given, matches):
    silence = replace(SILENCE, **{"cause": ""} | given)
    assert (muted("cut", INCIDENT, [silence], []) != "ok") is matches


def test_of_several_the_one_that_lasts_longest_is_named():
    later = replace(SILENCE, id="s2", ends_at=START + 2000.0, comment="")
    assert muted("cut", INCIDENT, [SILENCE, later, replace(SILENCE, id="s3")], []) == (
        "silence: s2 by ann until 2001-09-09T02:20:00Z: "
    )
    assert muted("cut", INCIDENT, [], [INCIDENT]) == "ok"


def test_a_silence_is_active_until_its_time_or_until_it_is_expired():
    held = silences(SILENCE, replace(SILENCE, id="s2", ends_at=START + 5.0))
    assert [each.id for each in held.active(START + 4.9)] == ["s1", "s2"]
    assert [each.id for each in held.active(START + 5.0)] == ["s1"]
    expired = held.expire("s1", "bob", "done", START + 6.0)
    assert (expired.expired_at, expired.expired_by, expired.expired_reason) == (START + 6.0, "bob", "done")
    assert held.active(START + 6.0) == ()
    assert [each.id for each in held] == ["s1", "s2"]
    with pytest.raises(OperatorError, match="silence s1 has ended already, at 2001-09-09T01:46:46Z"):
        held.expire("s1", "bob", "", START + 7.0)
    with pytest.raises(OperatorError, match="silence s2 has ended already, at 2001-09-09T01:46:45Z"):
        held.expire("s2", "bob", "", START + 7.0)


def test_journalled_silences_hold_again():
    held = Silences()
    held.restore([SILENCE, replace(SILENCE, id="s2", expired_at=START + 1.0)])
    assert [each.id for each in held.active(START + 2.0)] == ["s1"]
    assert len(list(held)) == 2


def test_silences_of_other_daemons_are_followed_and_an_end_of_ones_own_is_not_undone():
    mine, other = silences(SILENCE), replace(SILENCE, id="s2")
    mine.follow((SILENCE, other))
    assert [each.id for each in mine.active(START + 1)] == ["s1", "s2"]
    mine.expire("s1", "ann", "done", START + 2)
    mine.follow((SILENCE, other))  # the journal does not have it yet
    assert [each.id for each in mine.active(START + 3)] == ["s2"]
    mine.follow((replace(other, expired_at=START + 4, expired_by="bob"),))
    assert mine.active(START + 5) == ()


def test_a_silenced_policy_refuses_once_and_acts_once_the_silence_has_ended():
    held = silences(replace(SILENCE, ends_at=START + 15.0))  # step 150
    notify = PolicyConfig("tell", MatchConfig("NonFinite"), "enforce", ActionConfig("notify"))
    trainer = trained((CUT, notify), silences=held.active)
    trainer.heat["ffn"] = 1000.0
    trainer.run(28)
    assert guards(trainer) == [("cut", "scale_lr", "refused", "silence"), ("tell", "notify", "observed", "ok")]
    refused = trainer.controller.decisions[0]
    assert refused.guard == "silence: s1 by ann until 2001-09-09T01:46:55Z: moving data"
    assert (refused.mode, refused.alert_name, refused.revision) == ("enforce", "NonFinite", 0)
    (incident,) = trainer.controller.incidents
    assert (incident.active, incident.last_step) == (True, 148)
    trainer.run(5)
    assert guards(trainer)[2] == ("cut", "scale_lr", "applied", "ok")
    assert trainer.multipliers["ffn"] == 0.5


def test_a_silence_holds_over_a_restart_of_the_controller():
    held = silences(SILENCE)
    trainer = trained(silences=held.active)
    trainer.heat["ffn"] = 1000.0
    trainer.run(5)
    trainer.controller = restored(trainer)
    trainer.run(5)
    assert guards(trainer) == [("cut", "scale_lr", "refused", "silence")]
    held.expire("s1", "ann", "", trainer.now)
    trainer.run(2)
    assert trainer.multipliers["ffn"] == 0.5


@pytest.mark.parametrize(("mode", "outcome"), [("observe", "observed"), ("advise", "refused")])
def test_in_other_modes_nothing_is_proposed_and_what_would_be_done_names_the_silence(mode, outcome):
    trainer = trained(mode=mode, silences=silences(SILENCE).active)
    trainer.heat["ffn"] = 1000.0
    trainer.run(20)
    assert guards(trainer) == [("cut", "scale_lr", outcome, "silence")]


def test_a_silence_of_another_run_changes_nothing():
    trainer = trained(silences=silences(replace(SILENCE, run="run-2")).active)
    trainer.heat["ffn"] = 1000.0
    trainer.run(2)
    assert guards(trainer)[0] == ("cut", "scale_lr", "applied", "ok")


def test_a_silenced_policy_is_not_escalated_from_until_it_has_acted():
    held = silences(replace(SILENCE, cause="", policy="cut"))
    trainer = trained(CHAIN, silences=held.active)  # to a rollback after 30 steps
    saved(trainer, 100)
    trainer.heat["ffn"] = 1000.0
    trainer.run(60)
    assert guards(trainer) == [("cut", "scale_lr", "refused", "silence")]
    held.expire("s1", "ann", "", trainer.now)
    trainer.run(20)
    assert "rollback" not in {made.action for made in trainer.controller.decisions}
    trainer.run(15)
    assert trainer.controller.decisions[-1].action == "rollback"


def test_a_silence_keeps_what_is_in_force_and_ramps_it_back_when_all_is_quiet():
    held = silences()
    trainer = trained((replace(CUT, guard=replace(GUARD, hold_steps=40)),), silences=held.active)
    trainer.heat["ffn"] = 20.0
    trainer.run(2)
    trainer.heat["ffn"] = 0.0
    held.add(replace(SILENCE, cause="", run="run"))
    assert trainer.multipliers["ffn"] == 0.5
    trainer.run(200)
    assert trainer.multipliers["ffn"] == 1.0


def test_a_silent_failure_is_answered_once_its_silence_has_ended():
    held = silences(replace(SILENCE, cause="silent"))
    trainer = trained((replace(CUT, match=MatchConfig(cause="silent")),), silences=held.active)
    trainer.controller.set_reference("good", Losses.of(np.arange(1, 2_001), np.full(2_000, 1.0)))
    trainer.run(20)
    assert guards(trainer) == [("cut", "scale_lr", "refused", "silence")]
    held.expire("s1", "ann", "", trainer.now)
    trainer.run(20)
    assert guards(trainer)[1:] == [("cut", "scale_lr", "no-effect", "ok")]


DATA = replace(INCIDENT, id="i2", name="LossSpike", names=("LossSpike",), cause="data", onset=29)
UNSTABLE = replace(INCIDENT, cause="instability", severity="warning")


@pytest.mark.parametrize(
    ("data", "incident", "inhibits"),
    [
        (DATA, UNSTABLE, True),
        (replace(DATA, onset=30), UNSTABLE, False),
        (DATA, replace(UNSTABLE, onset=49, severity="critical"), True),
        (DATA, replace(UNSTABLE, onset=50), False),
        (replace(DATA, severity="warning"), UNSTABLE, False),
        (replace(DATA, cause="non-finite"), UNSTABLE, False),
        (DATA, replace(UNSTABLE, cause="learning-rate"), False),
        (DATA, DATA, False),
    ],
)
def test_wrong_data_inhibit_the_instability_that_begins_with_them(data, incident, inhibits):
    verdict = "inhibited: by incident i2 (LossSpike)" if inhibits else "ok"
    assert muted("cut", incident, [], [incident, data]) == verdict


def test_nothing_is_done_about_an_instability_while_wrong_data_explain_it(monkeypatch):
    found = []
    monkeypatch.setattr(run_detection, "findings", lambda _: found)
    trainer = trained((replace(CUT, match=MatchConfig(cause="instability", severity="critical")),))
    swell = Finding("UpdateRmsSpike", "warning", "z 4", step=143, onset=121, layer_blocks=("layers.0.ffn",))
    spike = Finding("LossSpike", "critical", "loss 9", step=143, onset=142)  # too late to be of one incident with it
    rank = replace(spike, name="RankDiffers", onset=130, rank=3)  # which shows that wrong data came before
    for more in (swell, spike, rank):
        found.append(more)
        trainer.run(1)
    found[0] = swell = replace(swell, severity="critical")
    trainer.run(5)
    unstable, data = trainer.controller.incidents
    assert (unstable.cause, unstable.onset, data.cause, data.onset) == ("instability", 121, "data", 130)
    assert guards(trainer) == [("cut", "scale_lr", "refused", "inhibited")]
    assert trainer.controller.decisions[0].guard == f"inhibited: by incident {data.id} (RankDiffers)"
    found[:] = [swell]
    trainer.run(30)  # the data are good again
    assert guards(trainer)[1][:2] == ("cut", "scale_lr")
    assert trainer.multipliers["ffn"] < 1.0
