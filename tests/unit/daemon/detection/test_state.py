"""A restarted daemon goes on from the journalled state of the baselines as one that never stopped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from observations import detection, healthy_run, scaled

from sharpwatch.daemon.detection.thresholds import statistics
from sharpwatch.daemon.records import OptimizerGroup

RECENT = 5  # samples whose scores are not in the state


def test_it_goes_on_as_if_it_had_never_stopped():
    run = healthy_run(900)
    run[699:] = [scaled(seen, 2, update_rms=20.0) for seen in run[699:]]
    first, again = detection(), detection()
    for seen in run[:500]:
        first.see(seen)
    again.load_state(first.state())
    for seen in run[500:]:
        first.see(seen)
        again.see(seen)
        if seen.step > 500 + RECENT:
            np.testing.assert_array_equal(statistics(again.recent), statistics(first.recent))
    incidents = [
        [(each.name, each.onset, each.first_step, each.severity, each.layer_blocks) for each in one.incidents.all]
        for one in (first, again)
    ]
    assert incidents[0] == incidents[1] != []
    assert again.state() == first.state()


def test_before_the_first_line_it_goes_on_too():
    run = healthy_run(400)
    first, again = detection(), detection()
    for seen in run[:30]:
        first.see(seen)
    again.load_state(first.state())
    for seen in run[30:]:
        first.see(seen)
        again.see(seen)
    assert again.state() == first.state()


def test_the_highest_rate_is_not_forgotten():
    """After 2,000 steps of decay the peak is in no sample that is folded again."""
    shares = [*np.linspace(0.05, 1.0, 20), *np.linspace(1.0, 0.3, 600), *([0.9] * 30)]
    run = healthy_run(len(shares), shares=shares)
    first, again = detection(), detection()
    for seen in run[:615]:
        first.see(seen)
    again.load_state(first.state())
    for seen in run[615:]:
        again.see(seen)
    assert [each.name for each in again.incidents.all if each.severity == "critical"] == []


@pytest.mark.parametrize("state", [b"", b"nothing", b"PK\x03\x04" + bytes(100)])
def test_what_is_damaged_is_refused_and_the_baselines_begin_anew(state):
    run = detection()
    with pytest.raises(ValueError, match="not the state of a run's baselines"):
        run.load_state(state)
    for seen in healthy_run(5):
        run.see(seen)


def test_the_state_of_another_model_is_refused():
    other = detection(rows=12)
    for seen in healthy_run(300, rows=12):
        other.see(seen)
    run = detection(rows=8)
    with pytest.raises(ValueError, match=r"can't be used: .* has no signals\._norms of shape"):
        run.load_state(other.state())
    for seen in healthy_run(300):
        run.see(seen)
    assert run.incidents.all == ()


def test_another_attempt_may_have_other_settings_and_rates_but_not_lose_the_state():
    run = healthy_run(400)
    first, second = detection(), detection()
    for seen in run[:300]:
        first.see(seen)
    second.take_over(first)
    changed = {(0, 0): OptimizerGroup({"beta1": 0.9, "beta2": 0.5, "weight_decay": 10.0}, 300)}
    for i, seen in enumerate(run[300:]):
        second.see(replace(scaled(seen, learning_rate=2.0), optimizer_groups={} if i else changed))
    assert [each.name for each in second.incidents.all if each.severity == "critical"] == []
    third = detection()
    third.take_over(first)
    lost = {(0, 0): OptimizerGroup({"beta1": 0.9, "beta2": 0.95}, 0)}
    third.see(replace(run[300], optimizer_groups=lost))
    assert [each.name for each in third.incidents.open] == ["OptimizerState"]
