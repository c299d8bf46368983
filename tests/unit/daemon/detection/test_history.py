"""What a run remembers for others: its losses, and where it stood out; bounded, and the same after a restart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from observations import detection, healthy_run, scaled

from sharpwatch.daemon.detection.history import LATER, MAX_LOSSES, REMEMBERED, Losses, StepHistory


def history(*odd: int, steps: range = range(1, 200), first_judged: int = 50) -> StepHistory:
    made = StepHistory()
    for step in steps:
        made.see(step, 3.0 + step % 3, judged=step >= first_judged, odd=step in odd)
    return made


def test_a_step_that_comes_again_replaces_all_from_there_on():
    losses = Losses()
    for step in (1, 2, 3, 4):
        losses.see(step, float(step))
    losses.see(3, 30.0)
    assert dict(zip(losses.steps.tolist(), losses.losses.tolist(), strict=True)) == {1: 1.0, 2: 2.0, 3: 30.0}
    losses.see(2, float("nan"))
    assert losses.steps.tolist() == [1]
    assert (losses.at(1), losses.at(2)) == (1.0, None)


def test_of_many_losses_every_second_is_kept_and_of_more_every_fourth():
    losses = Losses()
    for step in range(1, 3 * MAX_LOSSES + 1):
        losses.see(step, float(step))
        assert len(losses) <= MAX_LOSSES
    np.testing.assert_array_equal(losses.steps, np.arange(4, 3 * MAX_LOSSES + 1, 4))
    np.testing.assert_array_equal(losses.losses, losses.steps)
    again = Losses.from_state(losses.state())
    np.testing.assert_array_equal(again.steps, losses.steps)
    with pytest.raises(ValueError, match="not the state"):
        Losses.from_state(b"other bytes")


def test_a_recorded_run_is_thinned_evenly():
    recorded = Losses.of(np.arange(1, 60_001), np.ones(60_000)).thinned()
    assert (len(recorded), recorded.steps[0], recorded.steps[1]) == (MAX_LOSSES, 1, 4)


@pytest.mark.parametrize(("step", "stood_out"), [(98, False), (99, True), (100, True), (101, True), (102, False)])
def test_it_stood_out_at_a_step_or_next_to_it(step, stood_out):
    assert history(100).stood_out(step) is stood_out


def test_what_could_not_be_judged_or_has_not_come_yet_is_not_known():
    made = history()
    assert made.stood_out(49) is None  # too young
    assert made.stood_out(199 - LATER) is False
    assert made.stood_out(200 - LATER) is None  # it may still show
    made.see(201, 3.0, judged=True, odd=False)  # step 200 was lost
    for step in range(202, 230):
        made.see(step, 3.0, judged=True, odd=False)
    assert made.stood_out(200) is None
    assert made.stood_out(201) is False


def test_an_estimated_onset_is_shown_by_a_finding_nearby_and_absence_says_nothing():
    made = history()
    assert made.shows(120, is_brief=True) is False
    assert made.shows(120, is_brief=False) is None
    made.mark(100)  # a finding of its own
    assert made.shows(120, is_brief=False) is True
    assert made.shows(141, is_brief=False) is None
    assert made.shows(120, is_brief=True) is None  # it may be the same, but not for certain
    assert made.shows(101, is_brief=True) is True
    assert StepHistory.from_state(made.state()).shows(120, is_brief=False) is True


def test_runs_part_where_their_losses_differ():
    one, same, other = history(), history(), history()
    other.losses = Losses.of(one.losses.steps, one.losses.losses + (one.losses.steps >= 150))
    assert not one.has_parted(same, 200)
    assert not one.has_parted(other, 150)
    assert one.has_parted(other, 151)
    assert not one.has_parted(StepHistory(), 200)  # nothing shows that it has


def test_what_is_forgotten_is_not_known():
    made = history(*range(100, 100 + 3 * (REMEMBERED + 1), 3), steps=range(1, 4000))
    assert made.stood_out(100) is None
    assert made.stood_out(104) is True
    assert made.stood_out(3500) is False


def test_equal_first_losses_make_twins():
    def begins(losses, first=1):
        made = StepHistory()
        for step, loss in enumerate(losses, first):
            made.see(step, loss, judged=False, odd=False)
        return made

    one = begins([3.0, 2.9, 2.8, 2.75, 2.7])
    assert one.begins_like(begins([3.0, 2.9, 2.8]))
    assert not one.begins_like(begins([3.0, 2.9]))  # two prove nothing
    assert not one.begins_like(begins([3.0, 2.9, 2.8, 2.74]))
    assert not one.begins_like(begins([3.0, 2.9, 2.8], first=2))
    assert not begins([1.0] * 5).begins_like(begins([1.0] * 5))  # nor does a loss that stands still
    one.see(2, 9.0, judged=False, odd=False)  # it began again from step 2
    assert not one.begins_like(begins([3.0, 2.9, 2.8]))


def test_a_restart_knows_the_same():
    made = history(100, 150)
    again = StepHistory.from_state(made.state())
    for step in (49, 60, 100, 150, 195):
        assert again.stood_out(step) is made.stood_out(step)
    assert again.first == made.first
    assert again.losses.state() == made.losses.state()
    assert StepHistory.from_state({}).last_step == -1  # a state of an earlier version


def test_a_run_stands_out_where_its_loss_or_its_gradients_do():
    run = healthy_run(500)
    run = [replace(seen, loss=seen.loss + 0.5) if seen.step == 400 else seen for seen in run]
    run = [scaled(seen, gradient_norm=3.0) if seen.step == 430 else seen for seen in run]
    made = detection()
    for seen in run:
        made.see(seen)
    assert [step for step in range(390, 445) if made.history.stood_out(step)] == [399, 400, 401, 429, 430, 431]
    assert made.history.stood_out(415) is False
    assert made.history.losses.at(400) == run[399].loss
    again = detection()
    again.load_state(made.state())
    assert again.history.stood_out(400) is True


def test_a_run_stands_out_where_the_updates_of_a_block_do():
    run = healthy_run(500)
    run = [scaled(seen, 3, update_rms=3.0) if seen.step == 400 else seen for seen in run]
    made = detection()
    for seen in run:
        made.see(seen)
    assert made.history.stood_out(400) is True


def test_all_that_a_batch_can_bring_about_is_remembered_for_twins():
    run = healthy_run(300)
    run = [scaled(seen, 2, update_rms=1.5) if seen.step >= 200 else seen for seen in run]
    made = detection()
    for seen in run:
        made.see(seen)
    (incident, *_) = made.incidents.all
    assert incident.name == "UpdateRmsSpike"
    assert made.history.shows(incident.onset, is_brief=True) is True
