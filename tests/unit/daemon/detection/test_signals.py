"""Signals against closed forms and against steps of torch's own optimizers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from observations import PARAMETERS, RATE, SETTINGS, WEIGHT_NORM, detection, healthy_run, layer_tap, scaled

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.detection.signals import ACCEPTED, RISE_ENDED, ROW, SETTLE, Rates, Signals, Stability
from sharpwatch.daemon.records import Observation, OptimizerGroup

UNIT = RATE * math.sqrt(PARAMETERS) / WEIGHT_NORM  # of log weight norms of `healthy_run`


def signals(rows: int = 8, parameters: int = PARAMETERS) -> Signals:
    return Signals(np.full(rows, parameters), ["qk"] * rows)


def seen_by(made: Signals, run: list[Observation]) -> list:
    return [made.see(each) for each in run]


def test_a_change_of_weights_is_scored_by_the_most_that_a_step_can_do():
    run = [
        Observation(i, 0.0, layers=layer_tap(1, weight_norm=norm, learning_rate=2e-3, second_moment=1.0))
        for i, norm in enumerate([10.0, 10.0, 10.5], start=1)
    ]
    scores = seen_by(signals(1, 2500), run)
    assert scores[-1].weight_change[0] == pytest.approx(math.log(1.05), rel=1e-6)
    # Rate · √n = 0.1, of a norm of 10.
    assert scores[-1].weight_share[0] == pytest.approx(math.log(1.05) / 0.01, rel=1e-6)
    assert scores[1].weight_share[0] == 0


def test_the_step_before_made_the_change_with_its_own_rate():
    rates, norms = [1e-3, 2e-3, 4e-3], [10.0, 10.0, 10.1]
    run = [
        Observation(i, 0.0, layers=layer_tap(1, weight_norm=norm, learning_rate=rate, second_moment=1.0))
        for i, (rate, norm) in enumerate(zip(rates, norms, strict=True), start=1)
    ]
    share = seen_by(signals(1, 10_000), run)[-1].weight_share[0]
    assert share == pytest.approx(math.log(1.01) / (2e-3 * 100 / 10), rel=1e-5)


def adam_run(steps: int, gradient, **options: float) -> tuple[list[Observation], torch.Tensor]:
    """A matrix under torch's AdamW, as the agent reports it: each step's state is that before it."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(0.02 * torch.randn(64, 64))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, **options)
    beta2 = optimizer.defaults["betas"][1]
    made = []
    for step in range(1, steps + 1):
        weight.grad = gradient(step, weight.detach())
        state = optimizer.state[weight]
        second = float(state["exp_avg_sq"].mean() / (1 - beta2 ** float(state["step"]))) if state else math.nan
        layers = layer_tap(
            1,
            weight_norm=np.float32(weight.detach().norm()),
            gradient_norm=np.float32(weight.grad.norm()),
            learning_rate=np.float32(1e-3),
            second_moment=np.float32(second),
        )
        made.append(Observation(step, 0.0, 3.0, layers, {(0, 0): OptimizerGroup({"beta2": beta2}, step - 1)}))
        optimizer.step()
    return made, weight


def noise(_: int, weight: torch.Tensor) -> torch.Tensor:
    return torch.randn(weight.shape)


def outwards(_: int, weight: torch.Tensor) -> torch.Tensor:
    return -torch.sign(weight)


def inwards(_: int, weight: torch.Tensor) -> torch.Tensor:
    return 5.0 * weight


def bursts(step: int, weight: torch.Tensor) -> torch.Tensor:
    return torch.randn(weight.shape) * (1000.0 if step % 20 == 0 else 1e-3)


def vanishing(step: int, weight: torch.Tensor) -> torch.Tensor:
    return torch.randn(weight.shape) if step == 1 else torch.zeros(weight.shape)


@pytest.mark.parametrize(("gradient", "most"), [(noise, 1.1), (outwards, 1.1), (inwards, 1.1), (bursts, 3.0)])
def test_steps_of_adamw_do_not_pass_what_a_step_can_do(gradient, most):
    """An update has entries of about the rate; after a burst up to (1 - β₁)/√(1 - β₂) = 3.2 times it (Kingma & Ba)."""
    run, _ = adam_run(200, gradient, weight_decay=0.1)
    shares = np.array([each.weight_share[0] for each in seen_by(signals(1, 64 * 64), run)])
    assert np.nanmax(np.abs(shares)) < most


def test_weights_that_grow_as_fast_as_adam_can_have_a_share_of_about_one():
    run, _ = adam_run(30, outwards, weight_decay=0.0, eps=1e-12)
    shares = [each.weight_share[0] for each in seen_by(signals(1, 64 * 64), run)]
    # Δ‖W‖ = rate · Σ|W| / ‖W‖ for updates of the signs of W: of normal weights √(2/π) of rate · √n.
    assert shares[2] == pytest.approx(math.sqrt(2 / math.pi), rel=0.05)


@pytest.mark.parametrize("gradient", [noise, vanishing, bursts])
@pytest.mark.parametrize("beta2", [0.9, 0.95, 0.999])
def test_second_moments_of_adam_never_fall_below_what_they_must_be(gradient, beta2):
    run, _ = adam_run(100, gradient, betas=(0.9, beta2))
    moments = np.array([each.moment[0] for each in seen_by(signals(1, 64 * 64), run)])
    # Bias correction: v̂_2 is at least β₂·v̂_1/(1 + β₂), and v̂_10 at least β₂·v̂_9·(1 - β₂⁹)/(1 - β₂¹⁰).
    assert np.nanmin(moments) >= 1 / (1 + beta2) - 1e-5
    assert np.nanmin(moments[10:]) >= (1 - beta2**9) / (1 - beta2**10) - 1e-5


def test_frozen_blocks_say_nothing():
    still = {"gradient_norm": np.float32(0), "second_moment": np.float32(np.nan), "update_rms": np.float32(0)}
    run = [Observation(i, 0.0, 3.0, layer_tap(4, **still)) for i in range(1, 300)]
    made = detection(4)
    for seen in run:
        assert made.see(seen) == ([], ())
    assert np.isnan(made.recent[-1].weight).all()
    assert not made.recent[-1].dead.any()


def rates_of(values: list[float], multiplier: float = 1.0) -> list[float]:
    rates = Rates(1)
    return [float(rates.see(np.array([value]), np.array([multiplier]))[0]) for value in values]


def excess_of(*values: float, before: float = 1.0) -> list[float]:
    """How many times too high, after 50 steps of `before`."""
    rates = Rates(1)
    found = []
    for value in [before] * 50 + list(values):
        rates.see(np.array([value]), np.ones(1))
        found.append(float(rates.excess[0]))
    return found[50:]


def test_a_warm_up_is_no_raise():
    ratios = rates_of([i / 100 for i in range(1, 101)] + [1.0] * 100)
    assert np.isnan(ratios[:100]).all()
    assert ratios[100 + RISE_ENDED :] == [1.0] * (100 - RISE_ENDED)


def test_a_rate_is_measured_against_the_highest_before():
    decay = [math.cos(i / 200 * math.pi / 2) for i in range(200)]
    ratios = rates_of([1.0] * 50 + decay + [1.0] * 10 + [2.0] * 3)
    assert max(ratios[50:260]) == 1.0  # a restart of the schedule comes back to where it was
    assert ratios[-3:] == [2.0] * 3


def test_a_raise_that_stands_becomes_the_runs_own():
    ratios = rates_of([1.0] * 50 + [2.0] * (ACCEPTED + 10))
    assert ratios[50 : 50 + ACCEPTED] == [2.0] * ACCEPTED
    assert ratios[-1] == 1.0


def test_a_raise_that_is_held_down_does_not_become_the_runs_own():
    ratios = rates_of([1.0] * 50 + [10.0] * (ACCEPTED + 10), multiplier=0.1)
    assert ratios[-1] == 10.0


def test_an_excess_goes_up_with_the_rate_and_down_where_that_falls_at_once():
    assert excess_of(10.0, 10.0, 30.0, 30.0, 1.0, 0.9) == pytest.approx([10, 10, 30, 30, 1, 1])
    assert excess_of(1.01, 1.01**2, 1.01**3) == pytest.approx([1.01, 1.01**2, 1.01**3])
    assert excess_of(*(1.0005**i for i in range(1, 400)))[-1] == pytest.approx(1.0005**399)
    assert excess_of(30.0, 3.0, 1.0) == pytest.approx([30, 30, 1])  # a part of it may be a step of the schedule


def test_an_excess_is_above_what_the_schedule_would_have():
    decay = [0.99**i for i in range(50)]
    assert excess_of(*decay, *(10 * 0.99**i for i in range(50, 100)))[-50:] == pytest.approx([10] * 50, rel=0.02)
    restart = [0.1] * 5 + [1.0] * 5
    assert excess_of(*restart) == [1.0] * 10  # what it had before is no excess
    assert excess_of(1.15, 0.99, 0.98) == pytest.approx([1.15, 1.0, 1.0])  # nor is what was never worth a warning
    assert excess_of(0.5, 5.0, 5.0, 0.5, 0.4) == pytest.approx([1, 10, 10, 1, 1])
    assert excess_of(0.01, 1.5, 1.0) == pytest.approx([1, 1.5, 1])  # of a schedule that had nearly ended
    assert excess_of(*[0.5] * 60) == [1.0] * 60


def test_what_the_schedule_does_meanwhile_is_no_more_of_it_and_does_not_end_it():
    wobble = [10 * (1 + 0.04 * (-1) ** i) for i in range(100)]
    assert excess_of(*wobble)[-1] == pytest.approx(10.4)
    cycle = [10 * (0.5 + 0.5 * math.cos(math.pi * i / 100)) + 0.01 for i in range(100)]
    assert excess_of(10.0, *cycle, *cycle)[-1] == pytest.approx(10.0, rel=0.01)
    to_zero = [10 * (1 - i / 50) for i in range(50)]
    assert excess_of(10.0, *to_zero, 0.0)[-1] == pytest.approx(10.0)
    assert excess_of(3.0, 3.0, 0.3, 0.3, 0.1) == pytest.approx([3, 3, 3, 3, 1])  # a step to a tenth, then its end
    assert excess_of(10.0, math.nan, 1.0) == pytest.approx([10, 10, 1])


def test_a_raise_that_became_the_runs_own_is_no_excess():
    assert excess_of(*[3.0] * (ACCEPTED + 10))[-1] == 1.0


def test_a_new_attempt_comes_with_rates_that_somebody_chose():
    rates = Rates(1)
    for value in [1.0] * 50 + [10.0] * 5:
        rates.see(np.array([value]), np.ones(1))
    rates.begin_attempt()
    rates.see(np.array([10.0]), np.ones(1))
    assert rates.excess[0] == 10.0  # but for a fault that comes again
    rates.begin_attempt()
    rates.see(np.array([20.0]), np.ones(1))
    assert rates.excess[0] == 1.0


def test_multipliers_of_sharpwatchs_own_are_no_raise():
    run = healthy_run(100)
    run[60:] = [scaled(each, learning_rate=4.0, lr_multiplier=4.0) for each in run[60:]]
    scores = seen_by(signals(), run)
    np.testing.assert_allclose(scores[-1].rate, 1.0, rtol=1e-6)
    # Norms still answer to the rate that was.
    assert [each.settling for each in scores[59 : 61 + SETTLE]] == [False] + [True] * SETTLE + [False]


def test_growth_is_that_of_twenty_steps_without_the_largest():
    run = healthy_run(400)
    growing = [scaled(each, 0, weight_norm=1.01 ** max(0, each.step - 300)) for each in run]
    jumping = [scaled(each, 0, weight_norm=1.5 if each.step > 310 else 1.0) for each in run]
    now, jump, plain = (
        next(each.growth for each in reversed(seen_by(signals(), some[:320])) if each.growth.size)
        for some in (growing, jumping, run)
    )
    # 20 steps of 1 %, less the largest one, which is 1 % and some noise.
    assert now[0, 0] - plain[0, 0] == pytest.approx(19 * math.log(1.01), abs=0.01)
    assert abs(jump[0, 0]) < 0.05
    assert seen_by(signals(), run[:100])[-1].growth.size == 0


def test_first_changes_are_of_weights_that_adam_steps():
    tap = layer_tap(3, learning_rate=1e-3, weight_norm=np.array([20.0, 1e-6, 20.0], np.float32), second_moment=1.0)
    tap = replace(tap, second_moment=np.array([1.0, 1.0, np.nan]))
    first = signals(3).see(Observation(1, 0.0, layers=tap)).first_change
    assert first[0] == pytest.approx(UNIT, rel=1e-6)
    assert np.isnan(first[1:]).all()
    assert signals(3).see(Observation(50, 0.0, layers=tap)).first_change.size == 0


def test_a_rollback_forgets_the_timeline_that_was_left():
    run = healthy_run(300)
    made = signals()
    seen_by(made, run)
    again = scaled(run[249], weight_norm=3.0)
    scores = made.see(again)
    assert np.isnan(scores.weight_change).all()
    assert list(made.recent) == [scores]
    assert scores.growth.size == 0
    # The loss is judged at once, and the norms as soon as they have a level after the restart.
    assert not math.isnan(scores.loss[0])
    assert np.isnan(scores.update[0]).all()
    assert not np.isnan(seen_by(made, healthy_run(400)[250:])[140].update[0]).any()


def test_a_restored_checkpoint_is_no_change_of_weights():
    run = healthy_run(100)
    made = signals()
    seen_by(made, run[:-1])
    scores = made.see(replace(scaled(run[-1], weight_norm=3.0, second_moment=1e-6), restored=True))
    assert np.isnan(scores.weight_change).all()
    assert np.isnan(scores.moment).all()
    made = signals()
    seen_by(made, run[:-2])
    made.see(replace(run[-2], layers=None, restored=True))
    assert np.isnan(made.see(scaled(run[-1], weight_norm=3.0)).weight_change).all()


def test_settings_are_remembered_until_new_ones_are_reported():
    made = signals()
    first, *others = seen_by(made, healthy_run(5))
    assert first.groups_before == {}
    assert [each.groups_before[0, 0].settings for each in others] == [SETTINGS] * 4


def test_common_changes_are_not_in_the_blocks():
    run = healthy_run(400)
    changed = [scaled(each, gradient_norm=2.0) if each.step > 300 else each for each in run]
    plain, other = (seen_by(signals(), each)[320] for each in (run, changed))
    np.testing.assert_allclose(other.gradient[ROW[10]], plain.gradient[ROW[10]], atol=1e-3)


def test_of_few_blocks_each_is_measured_by_itself():
    """The median of three says nothing of what they have in common."""
    run = [scaled(each, 0, update_rms=2.0) if each.step > 300 else each for each in healthy_run(320, rows=3)]
    scores = seen_by(signals(3), run)[-1]
    assert scores.update[ROW[5], 0] > 5
    assert np.abs(scores.update[ROW[5], 1:]).max() < 5


def test_stability_is_measured_against_the_runs_own_level_less_an_error():
    """ln(0.5 / 0.1) over the floor of 0.25."""
    levels = Stability(("qk",))

    def see(value: float, stderr: float = math.inf) -> float:
        return levels.see(Observation(1, 0.0, stability=Estimate(value, stderr, 1, "direction")), keep_out=True)[0]

    for _ in range(20):
        levels.see(Observation(1, 0.0, stability=Estimate(0.1, math.inf, 1, "direction")), keep_out=False)
    assert see(0.5) == pytest.approx(math.log(5) / 0.25)
    assert see(0.5, 0.3) == pytest.approx(math.log(2) / 0.25)
    assert see(0.5, 10.0) == pytest.approx(math.log(0.5) / 0.25)  # surely at least 0.05 only
    assert see(-3.0) == see(0.01) == pytest.approx(math.log(0.5) / 0.25)
