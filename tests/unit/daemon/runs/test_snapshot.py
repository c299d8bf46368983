"""Which measurements are too old to be shown as the run's present state."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hellos import run_hello
from hypothesis import given
from hypothesis import strategies as st
from observations import incident

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.estimation.estimator import PROBES
from sharpwatch.daemon.ingest.samples import FailedProbe, HealthReading
from sharpwatch.daemon.runs.snapshot import STALE_READINGS, STALE_STEPS, RunSnapshot, pace

HELLO = run_hello({("emb", ""): 40}, probes=tuple(PROBES))
ESTIMATES = {
    ("trace", "emb", estimator): Estimate(1.0, 0.5, 4, estimator, 1000)
    for spec in PROBES.values()
    for estimator in spec.estimators
}


def snapshot(step: int, *, probe: str = "gnb", between: int | None = 5, **changes) -> RunSnapshot:
    """A run at `step` whose newest probe was at step 1000."""
    run = RunSnapshot(HELLO, "running", 1, "observe", 0, {}, step=step, estimates=ESTIMATES)
    fields = {"update_ratio": (0.1,), "gradient_noise": (0.1,), "layer_sharpness": (Estimate(1, 1, 1, "gnb", 1000),)}
    steps = {probe: (1000,) if between is None else (1000 - 2 * between, 1000 - between, 1000)}
    return replace(run, **fields | {"order_correlation": 0.5, "probe_steps": steps} | changes)


def failing(probe: str, *, given_up: bool) -> HealthReading:
    return HealthReading(0.0, 0.1, {}, (), 0, {probe: FailedProbe(3, given_up)})


def shown(run: RunSnapshot) -> set[str]:
    return {estimator for _, _, estimator in run.without_stale().estimates}


def is_kept(run: RunSnapshot) -> bool:
    return "gnb" in shown(run)


@pytest.mark.parametrize(
    ("age", "between", "kept"),
    [
        (0, 5, True),
        (STALE_STEPS, 5, True),  # ten times 5 steps is less than the least age
        (STALE_STEPS + 1, 5, False),
        (STALE_READINGS * 50, 50, True),
        (STALE_READINGS * 50 + 1, 50, False),
        (10**9, None, True),  # of a single reading so far, nobody knows how long the next one takes
        (-500, 5, True),  # the run was rolled back
    ],
)
def test_an_estimate_is_kept_for_ten_times_its_own_pace(age, between, kept):
    assert is_kept(snapshot(1000 + age, between=between)) == kept


@pytest.mark.parametrize("between", [5.0, 5000, None])
def test_one_of_a_probe_that_was_given_up_is_kept_for_100_steps(between):
    assert is_kept(snapshot(1100, between=between, health=failing("gnb", given_up=True)))
    assert not is_kept(snapshot(1101, between=between, health=failing("gnb", given_up=True)))
    assert is_kept(snapshot(1101, between=5000, health=failing("gnb", given_up=False)))
    assert is_kept(snapshot(1101, between=5000, health=failing("direction", given_up=True)))


def test_one_of_a_probe_that_the_new_attempt_does_not_run_is_kept_for_100_steps():
    without = replace(HELLO, probes=("direction",))
    assert is_kept(snapshot(1100, between=5000, hello=without))
    assert not is_kept(snapshot(1101, between=5000, hello=without))
    assert is_kept(snapshot(1101, between=5000, hello=replace(HELLO, probes=())))  # it does not say which it runs


@pytest.mark.parametrize("probe", PROBES)
def test_only_what_the_probe_measured_is_let_go(probe):
    old = snapshot(2000, probe=probe)
    assert shown(old) == {key[2] for key in ESTIMATES} - set(PROBES[probe].estimators)
    fresh = old.without_stale()
    assert (fresh.update_ratio is None) == (probe == "direction")
    assert (fresh.gradient_noise is None) == (probe == "gradient_noise")
    assert (fresh.layer_sharpness == ()) == (fresh.order_correlation is None) == (probe == "gnb")


@pytest.mark.parametrize(
    ("age", "between", "kept"), [(0, 5, True), (STALE_STEPS, 5, True), (STALE_STEPS + 1, 5, False), (500, 50, True)]
)
def test_attention_is_kept_for_ten_times_the_pace_of_its_readings(age, between, kept):
    scales = np.array([np.nan, 1.5])
    hello = run_hello({("emb", ""): 40, ("qk", "layers.0"): 8}, probes=("gnb",))
    steps = (1000 - between, 1000)
    run = replace(snapshot(1000 + age), hello=hello, probe_steps={}, attention=scales, attention_steps=steps)
    assert run.attention_scales == [("layers.0", 1.5)]
    assert run.without_stale().attention_scales == ([("layers.0", 1.5)] if kept else [])


def test_a_run_without_a_stale_measurement_is_shown_as_it_is():
    run = snapshot(1010)
    assert run.without_stale() is run


@given(st.lists(st.integers(0, 100), min_size=1))
def test_the_pace_is_the_mean_of_the_steps_forward(steps):
    forward = np.diff(steps)[np.diff(steps) > 0]
    assert pace(steps) == (pytest.approx(forward.mean()) if len(forward) else None)


CRITICAL = incident(severity="critical")


@pytest.mark.parametrize(
    ("phase", "incidents", "kept"),
    [
        *((phase, (CRITICAL,), True) for phase in ("silent", "killed")),
        ("closed", (CRITICAL,), False),
        ("killed", (), False),
        ("killed", (incident(),), False),
        ("killed", (replace(CRITICAL, active=False),), False),
        ("killed", (replace(CRITICAL, acknowledged="ann"),), False),
        ("killed", (replace(CRITICAL, acknowledged="ann"), replace(CRITICAL, id="i2")), True),
    ],
)
def test_a_critical_incident_is_exported_until_it_is_seen_or_over(phase, incidents, kept):
    """Whatever became of the run, unless it ended in order; of its measurements nothing is."""
    gone = snapshot(1000, phase=phase, incidents=incidents, last_seen_at=100.0, loss=3.0)
    assert gone.exported(100.0) is gone
    exported = gone.exported(100.5)
    assert (exported is not None) == kept
    if exported is not None:
        assert exported.incidents == incidents
        measured = exported.loss, exported.update_ratio, exported.estimates, exported.layer_sharpness
        assert measured == (None, None, {}, ())
    assert replace(gone, phase="running").exported(100.5) is not None
