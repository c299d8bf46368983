"""Growth of attention logits: found where it is faster than the run's own, and not where a run may do so."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from observations import RATE, detection, healthy_run

from sharpwatch.daemon.detection.attention import AttentionTrend
from sharpwatch.daemon.records import Observation

EVERY, PROBES, ROWS = 10, 60, 8
QK = (0, 4)  # of `detection`: layers.0.qk and layers.1.qk
ONSET = 300


def scale_of(step: int, rng: np.random.Generator) -> float:
    """A healthy scale, which rises as a power of the step, with noise of 3 %."""
    return 0.1 * step**0.6 * math.exp(0.03 * rng.standard_normal())


def probed(run: list[Observation], change=lambda *_: 1.0, *, every: int = EVERY, seed: int = 0) -> list[Observation]:
    """`run` with a scale at every so many steps; `change` has its factor at a step, of a layer block."""
    rng = np.random.default_rng(seed)
    found = []
    for seen in run:
        scales = np.full(ROWS, np.nan)
        for row in QK:
            scales[row] = scale_of(seen.step, rng) * change(seen.step, row)
        found.append(replace(seen, attention=scales) if seen.step % every == 0 else seen)
    return found


def growing(rate: float, row: int = 4):
    return lambda step, of: math.exp(rate * max(0, step - ONSET)) if of == row else 1.0


def incidents(run):
    made = detection(ROWS)
    for seen in run:
        made.see(seen)
    return made.incidents.all


def healthy(steps=PROBES * EVERY, **changes):
    return healthy_run(steps, ROWS, **changes)


@pytest.mark.parametrize("seed", range(5))
def test_faster_growth_is_a_warning_with_its_layer_and_onset(seed):
    (found,) = incidents(probed(healthy(seed=seed), growing(0.02), seed=seed))
    assert (found.name, found.cause, found.severity) == ("AttentionGrowth", "instability", "warning")
    assert found.layer_blocks == ("layers.1.qk",)
    assert abs(found.onset - ONSET) <= EVERY
    assert found.first_step <= ONSET + 5 * EVERY
    factor = float(re.search(r"×(\S+) since step", found.evidence[0])[1])
    assert factor >= 2


@pytest.mark.parametrize("every", [1, 10, 50])
@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_run_has_none(seed, every):
    steps = 60 * every
    assert not incidents(probed(healthy(steps, seed=seed), every=every, seed=seed))


def test_a_slow_drift_stays_below():
    """Of 5 % a probe from the beginning on: it is how this run grows."""
    drift = lambda step, _: math.exp(0.005 * step)  # noqa: E731 - a factor by step
    assert not incidents(probed(healthy(), drift))


def test_a_single_jump_is_another_detectors():
    jump = lambda step, row: 4.0 if step > ONSET and row == 4 else 1.0  # noqa: E731 - a factor by step
    assert not incidents(probed(healthy(), jump))


def test_growth_by_less_than_half_is_none():
    little = lambda step, row: min(1.3, growing(0.02)(step, row))  # noqa: E731 - a factor by step
    assert not incidents(probed(healthy(), little))


def test_the_first_probes_are_not_judged():
    early = lambda step, _: math.exp(0.05 * max(0, min(step, 90) - 40))  # noqa: E731 - a factor by step
    assert not incidents(probed(healthy(), early))


@pytest.mark.parametrize("seed", range(5))
def test_a_rate_that_rises_again_lets_scales_grow_again(seed):
    """A tenth of the rate for 200 steps, then all of it: scales grow and scatter as they did at that rate before."""
    shares = np.array([1.0] * 200 + [0.1] * 200 + [1.0] * 200)
    rng = np.random.default_rng(seed)
    logs = np.cumsum(shares[:, None] * (0.004 + 0.01 * rng.standard_normal((len(shares), len(QK)))), axis=0)
    run = healthy(len(shares), shares=shares)
    for i in range(EVERY - 1, len(run), EVERY):
        scales = np.full(ROWS, np.nan)
        scales[list(QK)] = np.exp(logs[i])
        run[i] = replace(run[i], attention=scales)
    assert "AttentionGrowth" not in {name for each in incidents(run) for name in each.names}


def test_growth_that_ends_closes_its_incident():
    ends = lambda step, row: growing(0.02)(min(step, ONSET + 60), row)  # noqa: E731 - a factor by step
    (found,) = incidents(probed(healthy(), ends))
    assert not found.active


def test_a_rollback_is_no_growth():
    """Back to weights of before: the scale falls at once, and what comes next is judged against it alone."""
    run = probed(healthy(), growing(0.02))
    again = [replace(seen, step=seen.step, restored=seen.step == 201) for seen in probed(healthy(), seed=1)[200:]]
    made = detection(ROWS)
    for seen in [*run[:309], *again]:
        made.see(seen)
    assert not made.incidents.all


def test_other_weights_that_are_loaded_are_no_growth():
    larger = lambda step, _: 3.0 if step > ONSET else 1.0  # noqa: E731 - a factor by step
    run = probed(healthy(), larger)
    run[ONSET] = replace(run[ONSET], restored=True)
    assert not incidents(run)


def test_z_is_that_of_a_random_walk_with_drift():
    """Against the same by hand, at rates and a pace that change; a change that stands out is kept out of the window."""
    rng = np.random.default_rng(3)
    trend, log, kept, judged = AttentionTrend(1), 0.0, [], 0
    trend.see(0, np.array([1.0]))
    for span in rng.integers(4, 20, 40):
        rates = RATE * rng.uniform(0.5, 1.5, span)
        for rate in rates:
            trend.step(np.array([rate]))
        tau, square = rates.sum(), (rates**2).sum()
        change = 10 * tau + 20 * math.sqrt(square) * rng.standard_normal()
        log += change
        (z,) = trend.see(int(span), np.array([math.exp(log)])).change
        if len(kept) < AttentionTrend.WINDOW:
            assert np.isnan(z)
        else:
            changes, taus, squares = np.array(kept[-AttentionTrend.WINDOW :]).T
            drift = np.median(changes / taus)
            distance = np.mean(np.abs(changes - drift * taus) / np.sqrt(squares))
            of_median = math.pi / 2 * tau**2 * squares.sum() / taus.sum() ** 2
            sd = math.sqrt(math.pi / 2 * (square + of_median)) * distance
            assert z == pytest.approx((change - drift * tau) / sd, rel=1e-3)
            judged += 1
        if not z > AttentionTrend.STANDS_OUT:
            kept.append((change, tau, square))
    assert judged > 20


def test_a_restarted_daemon_goes_on_from_the_state():
    run = probed(healthy(), growing(0.02))
    first, again = detection(ROWS), detection(ROWS)
    for seen in run[:310]:
        first.see(seen)
    again.load_state(first.state())
    for seen in run[310:]:
        first.see(seen)
        again.see(seen)
    assert [(each.name, each.onset, each.first_step) for each in first.incidents.all] == [
        (each.name, each.onset, each.first_step) for each in again.incidents.all
    ]
    assert first.incidents.all
    assert first.state() == again.state()
