"""The life of incidents: what opens one, joins it, explains it and closes it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import pytest
from observations import detection, healthy_run, scaled

from sharpwatch.daemon.detection import incidents as incidents_module
from sharpwatch.daemon.detection.incidents import QUIET, STEPS_AGAIN, UPDATE_EVERY, IncidentLog, is_brief
from sharpwatch.daemon.records import CAUSES, Finding, ForeignAlert, Incident


def log(first: int = 1) -> IncidentLog:
    numbers = itertools.count(first)
    return IncidentLog("run", lambda: f"i{next(numbers)}")


def found(name: str, step: int, *blocks: str, onset: int | None = None, severity: str = "critical") -> Finding:
    return Finding(name, severity, f"{name} at {step}", step, step if onset is None else onset, blocks)


def fold(incidents: IncidentLog, *findings: Finding) -> tuple[Incident, ...]:
    """Fold findings step by step, with the quiet ones between them; returns those that are open."""
    by_step: dict[int, list[Finding]] = {}
    for each in findings:
        by_step.setdefault(each.step, []).append(each)
    for step in range(min(by_step), max(by_step) + 1):
        incidents.see(by_step.get(step, []))
    return incidents.open


def the_cause(*findings: Finding) -> tuple[str, str]:
    (incident,) = fold(log(), *findings)
    return incident.name, incident.cause


def test_what_is_certain_keeps_its_own_onset_in_an_incident_that_was_open():
    """As where a damaged weight makes gradients 0, and a block's had been small for a while."""
    before = found("DeadBlock", 240, "layers.3.ffn", onset=237, severity="warning")
    damage = replace(found("WeightJump", 241, "layers.2.vo"), is_exact=True)
    dead = replace(found("DeadBlock", 243, "emb", onset=241), is_exact=True)
    (incident,) = fold(log(), before, damage, dead)
    assert (incident.name, incident.cause, incident.layer_blocks[0]) == ("WeightJump", "damaged-weight", "layers.2.vo")


@pytest.mark.parametrize("name", CAUSES)
def test_each_alert_alone_is_an_incident_of_its_cause(name):
    (incident,) = log().see([found(name, 7, "layers.3.qk", "emb", onset=5)])
    assert (incident.id, incident.run, incident.name, incident.names) == ("i1", "run", name, (name,))
    assert (incident.cause, incident.severity) == (CAUSES[name], "critical")
    assert (incident.onset, incident.first_step, incident.last_step, incident.active) == (5, 7, 7, True)
    assert (incident.layer_blocks, incident.blocks) == (("layers.3.qk", "emb"), ("qk", "emb"))
    assert incident.evidence == (f"{name} at 7",)


@pytest.mark.parametrize(
    ("findings", "cause"),
    [
        ([found("WeightJump", 10), found("LossSpike", 10)], "damaged-weight"),
        ([found("WeightJump", 11, onset=10), found("LossSpike", 10)], "damaged-weight"),
        ([found("LossSpike", 8), found("GradientSpike", 12)], "data"),
        ([found("RateRaise", 8), found("LossSpike", 12), found("UpdateRmsSpike", 12)], "learning-rate"),
        ([found("RateRaise", 8), found("WeightJump", 9)], "learning-rate"),
        ([found("OptimizerState", 8), found("UpdateRmsSpike", 9), found("LossSpike", 10)], "optimizer-state"),
        ([found("SettingsChanged", 8), found("OptimizerState", 8)], "optimizer-state"),
        ([found("WeightJump", 8), found("NonFinite", 9)], "damaged-weight"),
        ([found("NonFinite", 8), found("WeightJump", 9)], "non-finite"),
        ([found("DeadBlock", 8), found("LossSpike", 40)], "instability"),
        ([found("DeadBlock", 8), found("UpdateRmsSpike", 9)], "silent"),
        ([found("GradientSpike", 8), found("LossSpike", 12)], "data"),
        ([found("GradientSpike", 8), found("LossSpike", 35)], "instability"),
        ([found("StabilityLimit", 8), found("LossSpike", 12)], "instability"),
        ([found("LossSpike", 8, severity="warning"), found("WeightJump", 10)], "damaged-weight"),
    ],
    ids=lambda value: "+".join(each.name for each in value) if isinstance(value, list) else value,
)
def test_the_cause_comes_before_its_consequences(findings, cause):
    if findings[-1].step >= 29:  # goes on in between
        findings[1:1] = [replace(findings[0], step=step) for step in range(9, findings[-1].step)]
    assert the_cause(*findings)[1] == cause


def test_the_order_in_which_findings_of_a_step_come_does_not_matter():
    findings = [found(name, 10) for name in ("LossSpike", "WeightJump", "GradientSpike", "RateRaise")]
    assert {the_cause(*each) for each in itertools.permutations(findings)} == {("WeightJump", "damaged-weight")}


def test_an_open_incident_hides_no_new_event():
    """Weights damaged in an incident of wrong data; the rate raised after that."""
    incidents = log()
    data = [found("LossSpike", step, onset=10) for step in range(10, 60)]
    fold(incidents, *data, found("WeightJump", 40, "layers.0.qk"), found("RateRaise", 55))
    assert [(each.name, each.onset) for each in incidents.open] == [
        ("LossSpike", 10),
        ("WeightJump", 40),
        ("RateRaise", 55),
    ]


def test_damage_in_a_data_incident_is_found_in_a_run():
    run = healthy_run(500)
    run = [replace(seen, loss=seen.loss + 0.6) if seen.step > 400 else seen for seen in run]
    run = [scaled(seen, 3, weight_norm=1.5) if seen.step > 450 else seen for seen in run]
    made = detection()
    for seen in run:
        made.see(seen)
    assert [(each.name, each.onset) for each in made.incidents.all] == [("LossSpike", 401), ("WeightJump", 451)]


def test_the_same_event_again_is_another_one_unless_it_goes_on():
    incidents = log()
    fold(incidents, found("WeightJump", 10), found("WeightJump", 13), found("WeightJump", 16))
    assert len(incidents.all) == 1
    incidents.see([found("WeightJump", 28)])
    assert [each.onset for each in incidents.all] == [10, 28]


def test_what_stands_out_under_a_page_is_its_consequence_and_under_a_warning_is_not():
    for severity, number in (("critical", 1), ("warning", 2)):
        incidents = log()
        lasting = [found("GradientSpike", step, onset=10, severity=severity) for step in range(10, 60)]
        fold(incidents, *lasting, found("LossSpike", 50))
        assert len(incidents.all) == number


def test_a_loss_that_recovers_is_no_incident():
    incidents = log()
    spike = [found("LossSpike", step, onset=10) for step in range(10, 30)]
    fold(incidents, *spike, *[found("LossDrop", step, onset=35) for step in range(36, 45)])
    assert [each.names for each in incidents.all] == [("LossSpike",)]


def test_a_warning_that_turns_critical_is_recorded():
    incidents = log()
    incidents.see([found("LossSpike", 10, severity="warning")])
    assert incidents.see([found("LossSpike", 11, onset=10, severity="warning")]) == ()
    (worse,) = incidents.see([found("LossSpike", 12, onset=10)])
    assert (worse.id, worse.severity, worse.evidence) == ("i1", "critical", ("LossSpike at 12",))
    assert incidents.see([found("LossSpike", 13, onset=10, severity="warning")]) == ()
    assert incidents.active("LossSpike").severity == "critical"


def test_an_incident_that_merely_goes_on_is_recorded_now_and_then():
    incidents = log()
    steps = range(1, 5 * UPDATE_EVERY + 1)
    recorded = [step for step in steps if incidents.see([found("LossSpike", step, onset=1)])]
    assert recorded == [1 + UPDATE_EVERY * i for i in range(5)]


def test_quiet_samples_close_an_incident():
    incidents = log()
    fold(incidents, found("LossSpike", 10), found("LossSpike", 10 + QUIET - 1))
    for _ in range(QUIET - 1):
        assert incidents.see([]) == ()
    (closed,) = incidents.see([])
    assert (closed.active, closed.last_step, closed.closed) == (False, 29, f"no finding for {QUIET} samples")
    assert incidents.open == ()
    assert incidents.all == (closed,)
    assert incidents.active("LossSpike") is None


def test_incidents_close_by_themselves():
    """One that goes on keeps no other open."""
    incidents = log()
    data = [found("LossSpike", step, onset=10) for step in range(10, 100)]
    fold(incidents, *data, found("WeightJump", 40))
    assert [each.active for each in incidents.all] == [True, False]


def test_signals_that_stop_coming_close_an_incident():
    run = healthy_run(500)
    run = [scaled(seen, 3, update_rms=3.0) if seen.step > 400 else seen for seen in run]
    run = [replace(seen, layers=None) if seen.step > 420 else seen for seen in run]
    made = detection()
    for seen in run:
        made.see(seen)
    (incident,) = made.incidents.all
    assert incident.name == "UpdateRmsSpike"
    assert not incident.active


def test_a_rollback_closes_what_is_open():
    incidents = log()
    fold(incidents, found("LossSpike", 10), found("WeightJump", 28))
    closed = incidents.close_all("rolled back to step 5")
    assert [each.closed for each in closed] == ["rolled back to step 5"] * 2
    assert incidents.open == ()
    assert incidents.close_all("again") == ()


def journalled(records: Iterable[Incident]) -> list[Incident]:
    """The newest record of each."""
    return list({each.id: each for each in records}.values())


@pytest.mark.parametrize("stop", range(11, 60, 4))
def test_restoring_the_records_is_the_same_as_going_on(stop):
    findings: dict[int, list[Finding]] = {
        step: [found("LossSpike", step, onset=10, severity="warning" if step < 14 else "critical")]
        for step in range(10, 34)
    }
    for step in (12, 20, 41):
        findings.setdefault(step, []).append(found("GradientSpike", step, "layers.1.qk"))
    findings.setdefault(30, []).append(found("WeightJump", 30, "layers.2.ffn"))
    lived, records = log(), []
    for step in range(10, stop):
        records += lived.see(findings.get(step, []))
    restarted = log(1 + len(lived.all))
    restarted.restore(journalled(records))
    # The journal also has the steps since the newest record.
    for step in range(max(each.last_step for each in records) + 1, stop):
        restarted.replay(findings.get(step, []))
    for step in range(stop, 100):
        lived.see(findings.get(step, []))
        restarted.see(findings.get(step, []))
    # Which alerts came beside the first is told in another order, and their steps are those of the newest record.
    assert [alike(each) for each in restarted.all] == [alike(each) for each in lived.all]


def alike(incident: Incident) -> tuple[object, ...]:
    return (
        *(incident.id, incident.name, set(incident.names), incident.cause, incident.severity, incident.onset),
        *(incident.layer_blocks, incident.active, incident.closed),
    )


def test_replay_opens_and_closes_nothing():
    incidents = log()
    incidents.see([found("LossSpike", 10)])
    for step in range(11, 60):
        incidents.replay([found("WeightJump", step)] if step == 50 else [])
    assert [each.name for each in incidents.open] == ["LossSpike"]
    (closed,) = incidents.see([])
    assert not closed.active


def test_acknowledging_is_kept():
    incidents = log()
    incidents.see([found("LossSpike", 10)])
    assert incidents.acknowledge("i1", "ada: known").acknowledged == "ada: known"
    incidents.see([found("LossSpike", 11, onset=10)])
    assert incidents.open[0].acknowledged == "ada: known"
    (closed,) = incidents.close_all("end")
    assert closed.acknowledged == "ada: known"
    assert incidents.acknowledge("i1", "late").active is False
    with pytest.raises(KeyError):
        incidents.acknowledge("i2", "nobody")


def test_the_whole_models_cause_names_no_block():
    incidents = log()
    (opened,) = incidents.see([found("RateRaise", 10), found("UpdateRmsSpike", 10, "layers.0.qk")])
    assert opened.layer_blocks == ()
    (opened,) = log().see([found("WeightJump", 10, "layers.0.qk"), found("UpdateRmsSpike", 10, "layers.1.vo")])
    assert opened.layer_blocks == ("layers.0.qk", "layers.1.vo")
    assert opened.blocks == ("qk", "vo")


def test_the_parameter_is_that_of_what_explains_and_the_rank_that_of_any():
    incidents = log()
    (opened,) = incidents.see([found("LossSpike", 10)])
    assert (opened.parameter, opened.rank) == ("", None)
    (joined,) = incidents.see([replace(found("RankDiffers", 11, onset=12), rank=0)])
    assert (joined.name, joined.rank) == ("RankDiffers", 0)  # though it was found later
    jump = replace(found("WeightJump", 12, "layers.0.qk", onset=8), parameter="h.0.q")
    (after,) = incidents.see([replace(jump, is_exact=True)])
    assert (after.name, after.parameter, after.rank) == ("WeightJump", "h.0.q", 0)
    restarted = log(2)
    restarted.restore(journalled([after]))
    (again,) = restarted.see([found("UpdateRmsSpike", 13, "layers.0.qk")])
    assert (again.name, again.parameter, again.rank) == ("WeightJump", "h.0.q", 0)


def test_what_one_rank_shows_and_no_twin_is_still_its_data():
    incidents = log()
    incidents.see([found("LossSpike", 10)])
    incidents.see([replace(found("RankDiffers", 18), rank=2)])
    shown = incidents.attribute("i1", (), ("twin",))
    assert (shown.name, shown.rank, shown.cause) == ("LossSpike", 2, "data")
    assert shown.evidence[-1] == "not in its twin twin at step 10"


def test_a_run_that_has_stalled_is_one_incident_until_it_steps_again():
    made = detection()
    run = healthy_run(60)
    for seen in run[:50]:
        made.see(seen)
    (finding,), (incident,) = made.see_stall(50, 700.0)
    assert (incident.name, incident.cause, incident.severity, incident.onset) == (
        "RunStalled",
        "stalled",
        "critical",
        50,
    )
    assert incident.evidence == ("no step for 700 s after step 50, though the agent is connected",)
    assert made.see_stall(50, 705.0) == ([replace(finding, evidence=finding.evidence.replace("700", "705"))], ())
    _, (closed,) = made.see(run[50])
    assert (closed.id, closed.active, closed.closed) == (incident.id, False, STEPS_AGAIN)


def test_what_is_found_after_a_stall_is_an_incident_of_its_own():
    made = detection()
    run = healthy_run(60)
    for seen in run[:50]:
        made.see(seen)
    made.see_stall(50, 700.0)
    _, changed = made.see(replace(run[50], loss=float("nan")))
    assert {each.name: each.active for each in changed} == {"RunStalled": False, "NonFinite": True}


def test_what_a_twin_shows_too_is_the_datas_doing():
    incidents = log()
    incidents.see([found("GradientSpike", 10, "layers.0.qk")])
    shown = incidents.attribute("i1", ("b", "c"), ("d",))
    assert (shown.cause, shown.evidence[-1]) == ("data", "also in runs b, c at step 10")
    (worse,) = incidents.see([found("UpdateRmsSpike", 11, "layers.0.qk", onset=10)])
    assert (worse.cause, worse.evidence[-1]) == ("data", "also in runs b, c at step 10")
    assert len(worse.evidence) == 3


def test_a_replica_that_shows_the_same_is_no_evidence_of_the_data():
    incidents = log()
    incidents.see([found("NonFinite", 10)])
    shown = incidents.attribute("i1", ("b",), (), ("b",))
    assert (shown.cause, shown.evidence[-1]) == ("non-finite", "also in its replica b at step 10")
    both = incidents.attribute("i1", ("b", "c"), ("d",), ("b", "d"))
    assert both.cause == "data"  # c has other weights
    assert both.evidence == (
        "NonFinite at 10",
        "also in run c at step 10",
        "also in its replica b at step 10",
        "not in its replica d at step 10",
    )


def test_how_well_an_onset_is_known_follows_the_finding_that_explains():
    incidents = log()
    incidents.see([replace(found("LossSpike", 50, onset=30), span=40)])
    assert not is_brief(incidents.all[0])
    shown = incidents.attribute("i1", ("b",), ())
    assert (shown.cause, shown.evidence[-1]) == ("data", "also in run b near step 30")
    brief = log()
    brief.see([replace(found("LossSpike", 50, onset=48), span=3)])
    assert is_brief(brief.all[0])
    restarted = log(2)
    restarted.restore(incidents.all)
    restarted.see([found("LossSpike", 52, onset=30)])
    assert not is_brief(restarted.all[0])


def test_what_no_twin_shows_is_not():
    incidents = log()
    incidents.see([found("LossSpike", 10)])
    absent = incidents.attribute("i1", (), ("b",))
    assert (absent.cause, absent.evidence) == ("instability", ("LossSpike at 10", "not in its twin b at step 10"))
    (joined,) = incidents.see([found("DeadBlock", 12, "layers.0.qk")])
    assert joined.cause == "silent"  # by the other finding
    shown = incidents.attribute("i1", ("c",), ("b",))  # one that came later
    assert (shown.cause, shown.evidence[-1]) == ("data", "also in run c at step 10")
    assert not any(line.startswith("not in") for line in shown.evidence)


@pytest.mark.parametrize("name", ["RateRaise", "WeightJump", "OptimizerState", "SettingsChanged", "StabilityLimit"])
def test_what_is_certain_otherwise_stays(name):
    """A schedule raises the rate of all twins at one step."""
    incidents = log()
    incidents.see([found(name, 10)])
    assert incidents.attribute("i1", ("b",), ()).cause == CAUSES[name]
    assert incidents.all[0].evidence == (f"{name} at 10",)


def test_a_closed_incident_is_attributed_too_and_a_restart_keeps_it():
    incidents = log()
    incidents.see([found("LossSpike", 10)])
    incidents.attribute("i1", (), ("b",))
    restarted = log(2)
    restarted.restore(incidents.all)
    (joined,) = restarted.see([found("GradientSpike", 12, onset=10)])
    assert (joined.cause, joined.evidence[-1]) == ("instability", "not in its twin b at step 10")
    restarted.close_all("end")
    assert restarted.attribute("i1", ("c",), ("b",)).cause == "data"
    assert restarted.all[0].active is False


def test_a_silent_failure_hides_nothing_and_joins_nothing():
    incidents = log()
    silent = [found("SilentFailure", step, onset=1) for step in range(50, 100)]
    fold(incidents, *silent, found("LossSpike", 95), found("LossDrop", 60, severity="warning"))
    assert [each.names for each in incidents.all] == [("SilentFailure",), ("LossDrop",), ("LossSpike",)]
    spike = log()  # while a page is open, the failure is not silent
    fold(spike, *[found("LossSpike", step, onset=10) for step in range(10, 40)], found("SilentFailure", 20))
    assert [each.name for each in spike.all] == ["LossSpike"]


def test_the_oldest_closed_incidents_are_forgotten_and_what_is_open_is_not(monkeypatch):
    monkeypatch.setattr(incidents_module, "KEPT", 10)
    incidents = log()
    firing = ForeignAlert("GpuHot", "f", 1.0)
    (open_one,) = incidents.begin_foreign("foreign", firing, "warning", "it is hot", 1)
    for step in range(1_000, 31_000, 1_000):
        fold(incidents, found("LossSpike", step), found("LossSpike", step + 1))
        for _ in range(QUIET):
            incidents.see([])
    assert incidents.open == (open_one,)
    kept = incidents.all
    assert 10 <= len(kept) <= 11
    assert kept[0] is open_one
    assert [each.first_step for each in kept[1:]] == list(range(32_000 - 1_000 * len(kept), 31_000, 1_000))
    assert len(kept) + incidents.forgotten == 31
    again = log(100)
    again.restore([*(replace(kept[1], id=f"old{number}") for number in range(50)), *kept])
    assert again.all[0] == again.open[0] == open_one
    assert again.all[1:] == kept[-9:]


def test_incidents_are_bounded_by_what_they_take(monkeypatch):
    monkeypatch.setattr(incidents_module, "KEPT_BYTES", 100_000)
    incidents = log()
    closed = Incident(
        *("i", "run", "NonFinite", ("NonFinite",), "non-finite", "critical", ("qk",)),
        layer_blocks=("layers.0.qk",) * 1_000,
        evidence=("x" * 1_000,),
        onset=1,
        first_step=1,
        last_step=1,
        active=False,
    )
    incidents.restore(replace(closed, id=f"i{number}") for number in range(100))
    assert [each.id for each in incidents.all] == [f"i{number}" for number in range(90, 100)]
    assert incidents.forgotten == 90
