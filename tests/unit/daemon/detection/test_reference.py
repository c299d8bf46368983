"""The sequential test against a reference: within its budget on correlated noise, and right about where runs part."""

from __future__ import annotations

import numpy as np
import pytest
from observations import detection, healthy_run

from sharpwatch.daemon.detection import reference as reference_module
from sharpwatch.daemon.detection.history import Losses
from sharpwatch.daemon.detection.reference import LASTS, MATTERS, TOLERANCE, ReferenceTest

STEPS = 3_000


def noise(correlation: float, seed: int, steps: int = STEPS) -> np.ndarray:
    """A stationary autoregressive process of variance 1."""
    draws = np.random.default_rng(seed).standard_normal(steps)
    draws[1:] *= np.sqrt(1 - correlation**2)
    for i in range(1, steps):
        draws[i] += correlation * draws[i - 1]
    return draws


def said_of(run: np.ndarray, against: np.ndarray) -> tuple[ReferenceTest, list[tuple[int, str, int]]]:
    """The test after all steps, and each step at which it began to say something else: step, severity, onset."""
    own, reference = Losses(), Losses.of(np.arange(1, len(against) + 1), against)
    made, said = ReferenceTest("good", own, reference), []
    for step, loss in enumerate(run, 1):
        own.see(step, loss)
        made.see(step)
        finding = made.finding(step)
        now = (finding.severity, finding.onset) if finding else ("", 0)
        if now != (said[-1][1:] if said else ("", 0)):
            said.append((step, *now))
    return made, said


@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.9])
def test_runs_that_do_not_differ_hold_the_budget(correlation, monkeypatch):
    """One false page in 10,000 steps is the budget; without the tolerance, and one side of it, it must hold too."""
    monkeypatch.setattr(reference_module, "TOLERANCE", 0.0)
    seeds = 10
    alarms = 0
    for seed in range(seeds):
        level = np.full(STEPS, 3.0)
        alarms += sum(bool(severity) for _, severity, _ in said_of(level + 0.1 * noise(correlation, seed), level)[1])
    assert alarms <= seeds * STEPS / 10_000


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_a_run_that_stays_above_is_found_with_the_step(correlation):
    level = 3.0 + 0.3 * noise(0.9, 99)  # what the data does to both
    run = level + 0.05 * noise(correlation, 1)
    run[1_000:] += 0.15
    made, said = said_of(run, level)
    assert [severity for _, severity, _ in said] == ["warning", "critical"]
    found, _, onset = said[0]
    assert abs(onset - 1_001) <= 20
    assert found <= 1_150
    assert said[1][0] >= onset + LASTS - 1
    assert made.gap.first.errors > 5
    assert made.difference.value == pytest.approx(0.15, abs=4 * made.difference.stderr)
    evidence = made.finding(STEPS).evidence
    assert f"loss above the reference good from step {onset} on: by {made.gap.first.value:.3g}, " in evidence
    assert f"{made.gap.first.errors:.1f} standard errors over {made.gap.window} common steps" in evidence


def test_a_small_gap_is_a_warning_and_one_that_is_tolerated_or_below_is_none():
    level = np.full(STEPS, 3.0)
    scatter = 0.02 * noise(0.3, 5)
    assert [each[1] for each in said_of(level + scatter + 0.07, level)[1]] == ["warning"]
    assert MATTERS > 0.07
    assert said_of(level + scatter + 0.5 * TOLERANCE * 3.0, level)[1] == []
    assert said_of(level + scatter - 0.5, level)[1] == []  # better than the reference
    assert said_of(level, level)[1] == []  # the very same


def test_a_gap_that_closes_is_over():
    run, level = 3.0 + 0.05 * noise(0.0, 2), np.full(STEPS, 3.0)
    run[500:1_000] += 0.2
    _, said = said_of(run, level)
    assert [severity for _, severity, _ in said] == ["warning", "critical", "warning", ""]
    assert 1_000 < said[-1][0] < 1_150


def test_one_spike_is_no_parting():
    run = 3.0 + 0.05 * noise(0.0, 3)
    run[700:703] += 5.0
    assert said_of(run, np.full(STEPS, 3.0))[1] == []


def test_a_reference_that_comes_later_says_the_same():
    run, level = 3.0 + 0.05 * noise(0.0, 4, 800), 3.0 + 0.05 * noise(0.0, 5, 800)
    run[300:] += 0.2
    in_time, _ = said_of(run, level)
    own, reference = Losses.of(np.arange(1, 801), run), Losses()
    late = ReferenceTest("good", own, reference)
    for step, loss in enumerate(level, 1):
        reference.see(step, loss)
        late.see(step)
    assert late.gap == in_time.gap
    whole = ReferenceTest("good", own, reference)  # as after a restart
    assert (whole.gap, len(whole)) == (in_time.gap, 800)


def test_a_run_that_goes_back_is_judged_by_its_new_steps():
    run, level = 3.0 + 0.05 * noise(0.0, 6, 800), np.full(800, 3.0)
    run[300:] += 0.2
    own, reference = Losses.of(np.arange(1, 801), run), Losses.of(np.arange(1, 801), level)
    made = ReferenceTest("good", own, reference)
    assert made.gap is not None
    own.see(301, 3.0)
    made.see(301)
    assert made.gap is None
    assert len(made) == 301


def test_only_common_steps_count():
    own = Losses.of(np.arange(1, 2_001), np.full(2_000, 3.0))
    assert len(ReferenceTest("good", own, Losses.of(np.arange(5, 4_000, 5), np.full(799, 3.0)))) == 400


def test_a_run_is_silent_only_where_nothing_else_shows():
    """Its baselines go on, its incident ends with the gap, and a spike of its own is an incident of its own."""
    run = healthy_run(900)
    made = detection()
    made.set_reference("good", Losses.of(np.arange(1, 901), np.full(900, 2.8)))
    for seen in run[:700]:
        made.see(seen)
    (incident,) = made.incidents.all
    assert (incident.name, incident.cause, incident.severity) == ("SilentFailure", "silent", "critical")
    assert incident.onset <= 5
    learned = detection()
    for seen in run[:700]:
        learned.see(seen)
    assert made.state() == learned.state()
    made.set_reference("same", made.history.losses)
    for seen in run[700:]:
        made.see(seen)
    assert not made.incidents.all[0].active


def test_an_incident_ends_once_the_run_is_far_past_the_end_of_its_reference():
    run, made = healthy_run(900), detection()
    made.set_reference("good", Losses.of(np.arange(1, 301), np.full(300, 2.8)))
    for seen in run[:300]:
        made.see(seen)
    (incident,) = made.incidents.all
    window = made.reference.gap.window
    for seen in run[300 : 300 + window]:
        made.see(seen)
    assert made.incidents.all[0].active
    for seen in run[300 + window : 330 + window]:
        made.see(seen)
    assert not made.incidents.all[0].active
    assert made.incidents.all[0].id == incident.id
    # So it is when the reference is taken up again.
    again = ReferenceTest("good", made.history.losses, Losses.of(np.arange(1, 301), np.full(300, 2.8)))
    assert again.gap is not None
    assert again.finding(330 + window) is None


def test_a_reference_that_is_behind_but_goes_on_has_not_ended():
    own, reference = Losses.of(np.arange(1, 2_001), 3.0 + 0.05 * noise(0.0, 4, 2_000)), Losses()
    made = ReferenceTest("good", own, reference)
    for step in range(1, 401):
        reference.see(step, 2.8)
        made.see(step)
        own.see(2_000 + step, 3.0)
        made.see(2_000 + step)
    assert made.finding(2_400) is not None
