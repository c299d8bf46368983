"""Replayed logs through the detectors: what they find, when, and from which row on they can see."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from sharpwatch.replay.files import ReadOptions, read_run
from sharpwatch.replay.judge import judge
from sharpwatch.replay.log import Log, Row
from sharpwatch.replay.recorded_run import from_log

DATA = Path(__file__).parents[2] / "data/logs"
NAMES = {"step": "step", "loss": "loss", "grad-norm": "grad_norm", "lr": "lr"}


def rows(count, every=1, **at):
    """A healthy run; `at` gives by name the values at steps."""
    noise = random.Random(0)  # noqa: S311
    for step in range(every, count * every + 1, every):
        row = {
            "loss": 6 * step**-0.15 + noise.gauss(0, 0.02),
            "gradient_norm": math.exp(noise.gauss(0, 0.1)),
            "learning_rate": 1e-3,
        }
        yield Row(step, **{name: at.get(name, {}).get(step, value) for name, value in row.items()})


def found(log_rows, names=tuple(NAMES)):
    return judge(from_log(Log(list(log_rows), {name: NAMES[name] for name in names}), "a.csv", "csv"))


def pages(judgement):
    """Its critical incidents: a warning may be a false one, within the detectors' budget."""
    return [each for each in judgement.incidents if each.incident.severity == "critical"]


def test_a_healthy_run_has_no_incident_and_is_judged_after_so_many_rows():
    judgement = found(rows(600))
    assert not pages(judgement)
    assert all(0 < blind < 200 for blind in judgement.blind.values())


def test_a_short_run_is_not_judged():
    assert found(rows(15)).blind == {"loss": None, "grad-norm": None, "lr": None}


@pytest.mark.parametrize("every", [1, 10])
def test_a_loss_that_leaves_its_trend(every):
    spike = dict.fromkeys(range(301 * every, 331 * every, every), 9.0)
    (judged,) = pages(found(rows(500, every, loss=spike)))
    incident = judged.incident
    assert incident.name == "LossSpike"
    assert 295 * every <= incident.onset <= incident.first_step <= 306 * every
    assert incident.last_step < judged.closed_step


@pytest.mark.parametrize("columns", [("step", "loss"), tuple(NAMES)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_found_at_once_also_at_the_start(value, columns):
    (judged,) = found(rows(10, loss={3: value}), columns).incidents
    assert (judged.incident.name, judged.incident.onset, judged.incident.severity) == ("NonFinite", 3, "critical")
    assert judged.closed_step is None


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_a_gradient_norm_that_is_not_finite(value):
    (judged,) = found(rows(10, gradient_norm={3: value})).incidents
    assert (judged.incident.name, judged.incident.onset) == ("NonFinite", 3)


def test_what_is_not_measured_is_no_incident():
    holes = dict.fromkeys(range(1, 600, 2))
    judgement = found(rows(600, loss=holes, gradient_norm=holes, learning_rate=holes))
    assert not pages(judgement)


def test_a_learning_rate_that_jumps():
    raised = dict.fromkeys(range(300, 501), 0.01)
    (judged,) = [
        each for each in found(rows(500, learning_rate=raised)).incidents if each.incident.cause == "learning-rate"
    ]
    assert judged.incident.name == "RateRaise"
    assert 299 <= judged.incident.onset <= 301


def test_without_a_rate_the_run_is_no_endless_warm_up():
    """The detectors halve z while rates rise for the first time; a log without a rate must not stay there."""
    spike = dict.fromkeys(range(301, 331), 9.0)
    (judged,) = pages(found(rows(500, loss=spike), ("step", "loss", "grad-norm")))
    assert judged.incident.name == "LossSpike"


def test_the_loss_spike_of_a_real_run_is_in_an_incident():
    """Mixtral 8x7B on H100: at step 3850 the loss jumps from 2.45 to 3.41, and is back within 15 steps."""
    run = read_run(str(DATA / "mixtral_8x7b_h100.csv.gz"), ReadOptions())
    assert (run.format, len(run.observations), run.observations[-1].step) == ("csv", 4538, 22685)
    assert run.names == {"step": "step", "loss": "loss"}
    assert any(
        each.incident.onset <= 3865 and (each.closed_step is None or each.closed_step > 3850)
        for each in judge(run).incidents
    )
