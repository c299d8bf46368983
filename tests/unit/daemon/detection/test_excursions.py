"""Single values that stand out are counted where no finding says so, once for each sample, signal and block type."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from observations import detection, healthy_run, scaled

RUN = healthy_run(240)
AT = 200


def counted(*changed):
    """The excursions of a run some of whose observations, from `AT` on, are replaced."""
    one = detection()
    for seen in [*RUN[:AT], *changed, *RUN[AT + len(changed) :]]:
        one.see(seen)
    return one.excursions, [each.name for each in one.incidents.all]


def test_a_healthy_run_has_none():
    assert counted() == ({}, [])


def test_a_gradient_of_one_step():
    assert counted(scaled(RUN[AT], 0, gradient_norm=8.0)) == ({("gradient", "qk"): 1}, [])


def test_an_update_of_one_step_in_two_blocks_of_one_type_and_one_of_another():
    changed = RUN[AT]
    for where in (0, 4, 1):
        changed = scaled(changed, where, update_rms=0.2)
    assert counted(changed) == ({("update", "qk"): 1, ("update", "vo"): 1}, [])


def test_a_loss_of_one_step():
    seen, incidents = counted(replace(RUN[AT], loss=3.4))
    assert (seen, incidents) == ({("loss", ""): 1}, [])


def test_weights_that_come_back_after_one_step():
    assert counted(scaled(RUN[AT], 2, weight_norm=1.02)) == ({("weight", "ffn"): 1}, [])


def test_weights_that_do_not_come_back_are_an_incident_and_no_excursion():
    seen, incidents = counted(*(scaled(each, 2, weight_norm=1.02) for each in RUN[AT:]))
    assert "WeightJump" in incidents
    assert not any(signal == "weight" for signal, _ in seen)


def test_what_a_finding_says_is_not_counted_at_its_step():
    one = detection()
    for seen in RUN[:AT]:
        one.see(seen)
    found, _ = one.see(replace(RUN[AT], loss=float("inf"), layers=scaled(RUN[AT], 0, gradient_norm=8.0).layers))
    assert [finding.name for finding in found] == ["NonFinite"]
    assert one.excursions == {}


def test_steps_of_the_journal_count_as_when_they_came():
    """A restart that folds them again comes to the count of before."""
    before, after = detection(), detection()
    for seen in (*RUN[:AT], scaled(RUN[AT], 0, gradient_norm=8.0)):
        before.see(seen)
        after.replay(seen)
    assert after.excursions == before.excursions != {}


def test_a_step_that_measured_no_layers_between_others_does_no_harm():
    jump = scaled(RUN[AT], 2, weight_norm=1.02)
    seen, _ = counted(jump, replace(RUN[AT + 1], layers=None))
    assert not any(signal == "weight" for signal, _ in seen)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.floats(0.01, 100), st.floats(0.01, 100)), max_size=30))
def test_counts_never_fall_and_grow_by_one_at_most(changes):
    one = detection()
    for seen in RUN[:AT]:
        one.see(seen)
    for at, (where, gradient, loss) in enumerate(changes):
        before = dict(one.excursions)
        one.see(replace(scaled(RUN[AT + at], where, gradient_norm=gradient), loss=loss))
        assert all(0 <= count - before.get(key, 0) <= 1 for key, count in one.excursions.items())
        assert before.keys() <= one.excursions.keys()
