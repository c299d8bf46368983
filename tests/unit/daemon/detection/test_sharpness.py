"""Sharpness between probes, its rise, and the order of the block types, on series whose truth is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from observations import detection, layer_tap

from sharpwatch.daemon.detection.sharpness import Order, Sharpness
from sharpwatch.daemon.records import Observation

TYPES = ("emb", "qk", "qk")
PARAMETERS = np.array([100, 10, 10])


def seen(step: int, squares: float = 1.0, traces: list[float] | None = None) -> Observation:
    """A step with that squared gradient norm in every layer block, and the traces of one draw."""
    layers = layer_tap(len(TYPES), gradient_norm=np.float32(math.sqrt(squares)))
    return Observation(step, float(step), 3.0, layers, traces=None if traces is None else np.array([traces]))


def sharpness(*steps: Observation, exponent: float = 0.5) -> Sharpness:
    made = Sharpness(PARAMETERS, TYPES, exponent)
    for each in steps:
        made.see(each, keep_out=False)
    return made


def test_before_the_first_probe_there_is_no_estimate():
    assert sharpness(seen(1), seen(2)).view().estimates() == {}


def test_the_newest_probe_is_carried_on_by_the_squared_gradients():
    """After many steps with squares of 4 their mean is 4: S(t) = S(t0) · 4^β."""
    made = sharpness(seen(1, traces=[50.0, 3.0, 5.0]), *(seen(step, 4.0) for step in range(2, 200)))
    found = made.view().estimates()
    assert found["trace", "emb", "moment"].value == pytest.approx(50 * 2)
    assert found["trace", "qk", "moment"].value == pytest.approx(8 * 2)
    assert found["sharpness", "emb", "moment"].value == pytest.approx(1.0)
    assert found["sharpness", "qk", "moment"].value == pytest.approx(16 / 20)
    assert {one.step for one in found.values()} == {199}


def test_where_the_gradient_is_gone_the_probe_stands():
    made = sharpness(seen(1, traces=[50.0, 3.0, 5.0]), *(seen(step, 0.0) for step in range(2, 2000)))
    assert made.view().estimates()["trace", "emb", "moment"].value == pytest.approx(50)


def test_the_error_is_what_predictions_have_missed_probes_by():
    """Probes that scatter by a factor of e about constant gradients: the error of one, near by and far off."""
    rng = np.random.default_rng(0)
    probes = [seen(step, traces=list(50 * np.exp(rng.normal(size=3)))) for step in range(10, 4000, 10)]
    made = sharpness(*probes)
    near = made.view().estimates()["trace", "emb", "moment"]
    assert near.stderr / near.value == pytest.approx(1.0, rel=0.5)  # two scatter by √2, of which it has a half
    for step in range(4000, 4030):
        made.see(seen(step), keep_out=False)
    far = made.view().estimates()["trace", "emb", "moment"]
    # A half of the square at the probe, and another at each 10 steps from it.
    assert far.stderr / near.stderr == pytest.approx(math.sqrt(1 + 3.9), rel=0.01)
    quiet = sharpness(*(seen(step, traces=[50.0, 3.0, 5.0]) for step in range(10, 4000, 10)))
    assert quiet.view().estimates()["trace", "emb", "moment"].stderr < 0.01


@pytest.mark.parametrize("broken", [math.nan, math.inf, 0.0, 1e70])
def test_numbers_that_are_none_leave_it_usable(broken):
    made = sharpness(seen(1, traces=[50.0, 3.0, 5.0]), seen(2, broken), seen(3, traces=[broken, broken, 1.0]), seen(4))
    for step in range(5, 200):
        made.see(seen(step), keep_out=False)
    made.see(seen(200, traces=[50.0, 3.0, 5.0]), keep_out=False)
    assert made.view().estimates()["trace", "emb", "moment"].value == pytest.approx(50.0)


@pytest.mark.filterwarnings("error")
def test_traces_that_stay_infinite_give_no_estimate_and_no_warning():
    made = sharpness(seen(1, traces=[50.0, 3.0, 5.0]))
    for step in (2, 3, 4):
        made.see(seen(step, traces=[math.inf, math.inf, 1.0]), keep_out=False)
        assert made.view().estimates() == {}
    made.see(seen(5, traces=[50.0, 3.0, 5.0]), keep_out=False)
    assert made.view().estimates()["trace", "emb", "moment"].value == pytest.approx(50.0)


def test_it_goes_on_from_its_state():
    rng = np.random.default_rng(0)
    steps = [seen(step, float(rng.random()), list(rng.random(3)) if step % 7 == 0 else None) for step in range(1, 300)]
    whole, first, again = sharpness(*steps), sharpness(*steps[:150]), sharpness()
    again.load_state(first.state())
    for each in steps[150:]:
        again.see(each, keep_out=False)
    assert again.view().estimates() == whole.view().estimates()
    assert again.order.pairs == whole.order.pairs


BLOCKS = ("emb", "qk", "vo", "ffn", "norm", "head")
EXPECTED = np.array([0.0, 1.0, 3.0, 2.0, 4.0, 9.0])  # logs; ffn comes before vo, head has no place


def test_the_order_emerges_holds_and_is_inverted():
    order = Order(BLOCKS)
    assert order.holds_since is None
    order.see(10, EXPECTED, np.full(6, 1.0))  # neighbours differ by less than two standard errors
    assert order.pairs == ()
    order.see(20, EXPECTED, np.full(6, 0.3))
    assert order.holds_since == 20
    assert [(pair.low, pair.high) for pair in order.pairs] == [
        ("emb", "qk"),
        ("qk", "ffn"),
        ("ffn", "vo"),
        ("vo", "norm"),
    ]
    order.see(30, EXPECTED, np.full(6, 1.0))  # not known so well any more: what stood stands
    assert order.holds_since == 20
    swapped = EXPECTED[[0, 1, 3, 2, 4, 5]]
    order.see(40, swapped, np.full(6, 0.3))
    assert order.holds_since is None
    (inverted,) = [pair for pair in order.pairs if pair.inverted]
    assert (inverted.low, inverted.high, inverted.since) == ("ffn", "vo", 40)
    assert inverted.standard_errors == pytest.approx(-1 / (0.3 * math.sqrt(2)))
    order.see(50, EXPECTED, np.full(6, 0.3))
    assert order.holds_since == 50


def test_a_run_without_two_ordered_blocks_has_no_order():
    order = Order(("head", "other"))
    order.see(1, np.zeros(2), np.ones(2))
    assert (order.pairs, order.holds_since) == ((), None)


def run_of(logs: np.ndarray) -> list[str]:
    """The alerts of a run of four layer blocks with a probe at each step, of these log traces of layers.0.vo."""
    rng, judged, names = np.random.default_rng(0), detection(4), []
    for step, log in enumerate(logs, 1):
        traces = np.exp(0.2 * rng.normal(size=(1, 4)))
        traces[:, 1] *= math.exp(log)
        one = Observation(step, float(step), None, layer_tap(4), traces=traces)
        found, _ = judged.see(replace(one, loss=3.0))
        names += [f"{each.name} {each.layer_blocks[0]} {each.severity} {each.onset}" for each in found]
    return names


def test_a_rise_of_sharpness_that_lasts_is_a_warning_about_the_block():
    logs = np.zeros(60)
    logs[40:] = math.log(10)
    first, *_ = run_of(logs)
    assert first == "SharpnessSpike layers.0.vo warning 41"


@pytest.mark.filterwarnings("error")
def test_a_trace_that_becomes_infinite_is_a_rise():
    logs = np.zeros(60)
    logs[40:] = math.inf
    first, *_ = run_of(logs)
    assert first == "SharpnessSpike layers.0.vo warning 41"


def test_a_single_odd_probe_a_fall_and_a_young_run_are_none():
    odd, fallen, young = np.zeros((3, 60))
    odd[40], fallen[40:], young[5:] = 5.0, -5.0, 5.0
    assert [run_of(logs) for logs in (odd, fallen, young)] == [[], [], []]
