"""Whatever a trainer reports, detection goes on: it raises nothing, keeps no incident open for ever, and repeats."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from observations import SETTINGS, detection, healthy_run, scaled

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.detection.thresholds import statistics
from sharpwatch.daemon.records import LayerTap, Observation, OptimizerGroup

ROWS = 5
HEALTHY = healthy_run(1520, ROWS)
NUMBERS = st.floats(width=32) | st.sampled_from([0.0, -1.0, 1.0, 1e-3, 1e-30, 3e38, math.nan, math.inf, -math.inf])
COLUMNS = st.lists(NUMBERS, min_size=ROWS, max_size=ROWS).map(lambda values: np.array(values, np.float32))
COUNTS = st.lists(st.integers(0, 2**40), min_size=ROWS, max_size=ROWS).map(lambda values: np.array(values, np.int64))
TAPS = st.builds(LayerTap, COLUMNS, COLUMNS, COLUMNS, COUNTS, COLUMNS, COLUMNS, COLUMNS, st.floats())
ESTIMATES = st.builds(Estimate, st.floats(), st.floats(), st.just(1), st.just("direction"))
GROUPS = st.dictionaries(
    st.tuples(st.integers(0, 1), st.integers(0, 1)),
    st.builds(
        OptimizerGroup,
        st.dictionaries(st.sampled_from([*SETTINGS, "momentum", "alpha"]), st.floats(0, 1), max_size=4),
        st.none() | st.integers(0, 2**40),
    ),
    max_size=2,
)
# Parts of a healthy observation that are replaced by anything.
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "step": st.integers(0, 500),
        "loss": st.none() | NUMBERS | st.floats(),
        "layers": st.none() | TAPS,
        "optimizer_groups": GROUPS,
        "stability": st.none() | ESTIMATES,
        "block_stability": st.dictionaries(st.sampled_from(["qk", "ffn", "?"]), ESTIMATES, max_size=2),
        "restored": st.booleans(),
    },
)
FACTORS = st.dictionaries(
    st.sampled_from(["gradient_norm", "weight_norm", "update_rms", "learning_rate", "second_moment"]),
    NUMBERS,
    max_size=2,
)
ANY = settings(
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def told(made, run: list[Observation]) -> list[object]:
    return [made.see(seen) for seen in run]


@ANY
@given(
    before=st.integers(0, 300),
    odd=st.lists(st.tuples(CHANGES, st.integers(0, ROWS - 1), FACTORS, st.integers(1, 30)), max_size=12),
)
def test_nothing_raises_and_nothing_stays_open(before, odd):
    """Each odd observation is repeated some times; then a healthy run goes on, from the step that it was at.

    What an incident keeps out for 500 samples becomes normal in about 110 more, the means over 40 need as many, and 20
    without a finding close it: 670 at most. The last incident may open while odd values are among those that a line is
    fitted to, for 160 samples.
    """
    made = detection(ROWS)
    told(made, HEALTHY[:before])
    at = before
    for changes, column, factors, times in odd:
        for seen in HEALTHY[at : at + times]:
            with np.errstate(all="ignore"):
                damaged = scaled(seen, column, **factors)
            made.see(replace(damaged, **changes))
        at += times
    told(made, HEALTHY[at : at + 850])
    assert made.incidents.open == ()
    assert all(incident.closed for incident in made.incidents.all)


@ANY
@given(
    split=st.integers(0, 500),
    odd=st.dictionaries(st.integers(0, 599), st.tuples(CHANGES, FACTORS), max_size=6),
    fault=st.integers(150, 450),
)
def test_a_copy_goes_on_as_the_original_does(split, odd, fault):
    run = [scaled(seen, 1, update_rms=3.0) if seen.step > fault else seen for seen in HEALTHY[:600]]
    for i, (changes, factors) in odd.items():
        with np.errstate(all="ignore"):
            run[i] = replace(scaled(run[i], 0, **factors), **changes)
    whole, part = detection(ROWS), detection(ROWS)
    expected = told(whole, run)
    assert repr(told(part, run[:split])) == repr(expected[:split])
    other = copy.deepcopy(part)
    assert repr(told(part, run[split:])) == repr(expected[split:])
    assert repr(told(other, run[split:])) == repr(expected[split:])
    assert repr(other.incidents.all) == repr(whole.incidents.all)


@ANY
@given(st.permutations(range(200, 230)))
def test_steps_out_of_order_are_no_fault(order):
    made = detection(ROWS)
    told(made, HEALTHY[:200])
    told(made, [HEALTHY[i] for i in order])
    told(made, HEALTHY[230:400])
    assert [each for each in made.incidents.all if each.severity == "critical"] == []


@pytest.mark.parametrize("times", [2, 3])
def test_repeated_steps_are_no_fault(times):
    made = detection(ROWS)
    told(made, [seen for seen in HEALTHY[:300] for _ in range(times)])
    # A value that is repeated is no independent one: it may be worth a warning.
    assert [each for each in made.incidents.all if each.severity == "critical"] == []


def test_a_stretch_of_nothing_is_no_fault():
    nothing = {name: np.full(ROWS, np.nan) for name in ("gradient_norm", "update_rms")}
    unknown = [replace(seen, loss=None, layers=replace(seen.layers, **nothing)) for seen in HEALTHY[300:500]]
    run = [*HEALTHY[:300], *unknown, *HEALTHY[500:900]]
    made = detection(ROWS)
    told(made, run)
    assert made.incidents.all == ()


def test_replaying_makes_the_baselines_that_seeing_made():
    seen, replayed = detection(ROWS), detection(ROWS)
    told(seen, HEALTHY[:400])
    for each in HEALTHY[:400]:
        replayed.replay(each)
    assert repr(told(seen, HEALTHY[400:500])) == repr(told(replayed, HEALTHY[400:500]))
    assert repr(seen.recent) == repr(replayed.recent)


def test_a_new_attempt_carries_on_with_the_baselines():
    earlier, later = detection(ROWS), detection(ROWS)
    told(earlier, HEALTHY[:400])
    expected = copy.deepcopy(earlier)
    later.take_over(earlier)
    told(later, HEALTHY[400:500])
    told(expected, HEALTHY[400:500])
    # Not the scores themselves: the rates and settings that an attempt begins with are no news.
    assert repr(statistics(later.recent)) == repr(statistics(expected.recent))


@pytest.mark.parametrize("stop", [0, 50, 137, 400])
def test_saved_baselines_go_on_as_the_original_does(stop):
    """But for what is known of the newest samples alone."""
    run = [scaled(seen, 1, update_rms=3.0) if seen.step > 500 else seen for seen in HEALTHY[:560]]
    lived, restarted = detection(ROWS), detection(ROWS)
    told(lived, run[:stop])
    restarted.load_state(lived.state())
    told(lived, run[stop:])
    told(restarted, run[stop:])
    assert repr(restarted.recent[-1].update) == repr(lived.recent[-1].update)
    assert repr(restarted.recent[-1].loss) == repr(lived.recent[-1].loss)
    assert [each.onset for each in restarted.incidents.all] == [each.onset for each in lived.incidents.all]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", "cut", "others"])
def test_a_damaged_state_is_refused_and_detection_begins_anew(damage):
    lived = detection(ROWS)
    told(lived, HEALTHY[:300])
    state = {"cut": lived.state()[:-50], "others": detection(ROWS + 1).state()}.get(damage, damage)
    restarted = detection(ROWS)
    with pytest.raises(ValueError, match="state"):
        restarted.load_state(state)
    assert repr(told(restarted, HEALTHY[:300])) == repr(told(detection(ROWS), HEALTHY[:300]))
