"""Detectors of what is certain: that each finds its fault, with culprit, onset and cause, and none its neighbour."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from observations import PARAMETERS, SETTINGS, WEIGHT_NORM, detection, healthy_run, layer_tap, scaled

from sharpwatch.daemon.detection.judged import with_parameter
from sharpwatch.daemon.detection.run_detection import RunDetection
from sharpwatch.daemon.records import Incident, Observation, OptimizerGroup

AT = 301  # the step at which something happens


def incidents_of(run: list[Observation], made: RunDetection | None = None) -> tuple[Incident, ...]:
    made = made or detection()
    for seen in run:
        made.see(seen)
    return made.incidents.all


def the_incident(run: list[Observation]) -> Incident:
    (found,) = incidents_of(run)
    return found


def from_step(run: list[Observation], step: int, where: int | slice = slice(None), **factors: float):
    return [scaled(seen, where, **factors) if seen.step >= step else seen for seen in run]


def with_rates(rates: list[float], rows: int = 8) -> list[Observation]:
    """A healthy run whose rate is what `rates` says, of 1e-3."""
    return healthy_run(len(rates), rows, shares=rates)


def test_a_healthy_run_says_nothing():
    assert incidents_of(healthy_run(1500)) == ()


def test_a_loss_that_is_not_finite_is_found_at_once():
    for bad in (math.nan, math.inf, -math.inf):
        found = the_incident([replace(seen, loss=bad) if seen.step == 7 else seen for seen in healthy_run(8)])
        assert (found.name, found.cause, found.severity) == ("NonFinite", "non-finite", "critical")
        assert (found.onset, found.layer_blocks) == (7, ())


def test_a_gradient_that_is_not_finite_names_its_blocks_worst_first():
    run = healthy_run(8)
    counts = np.array([0, 3, 0, 40, 0, 0, 0, 0])
    run[-1] = replace(run[-1], layers=replace(run[-1].layers, non_finite=counts))
    found = the_incident(run)
    assert (found.name, found.layer_blocks) == ("NonFinite", ("layers.0.norm", "layers.0.vo"))
    assert found.blocks == ("norm", "vo")
    infinite = the_incident([*run[:-1], scaled(healthy_run(8)[-1], 2, gradient_norm=math.inf)])
    assert (infinite.name, infinite.layer_blocks) == ("NonFinite", ("layers.0.ffn",))


def test_a_loss_that_is_not_known_is_no_fault():
    assert incidents_of([replace(seen, loss=None) for seen in healthy_run(300)]) == ()


@pytest.mark.parametrize(("factor", "severity"), [(1.3, "warning"), (3.0, "critical")])
def test_a_raised_rate_is_found_at_its_second_step(factor, severity):
    found = incidents_of(with_rates([min(i / 50, 1.0) for i in range(1, AT)] + [factor] * 2))[0]
    assert (found.name, found.cause, found.severity) == ("RateRaise", "learning-rate", severity)
    assert (found.onset, found.first_step, found.layer_blocks) == (AT, AT + 1, ())


@pytest.mark.parametrize("growth", [1.01, 1.02])
def test_a_rate_that_climbs_on_is_a_page_long_before_it_is_far_above(growth):
    found = incidents_of(with_rates([1.0] * 100 + [growth**i for i in range(1, 30)]))[0]
    assert (found.name, found.severity, found.onset) == ("RateRaise", "critical", 101)
    assert found.first_step == 110  # the tenth in a row
    assert f"×{growth**10:.3g} of" in found.evidence[0]
    assert incidents_of(with_rates([1.0] * 100 + [growth**i for i in range(1, 10)])) == ()


def test_a_rate_that_comes_to_a_new_peak_in_stairs_does_not_climb_on():
    stairs = [1.0 + 0.02 * (i // 2) for i in range(36)]
    assert {each.severity for each in incidents_of(with_rates([1.0] * 100 + stairs))} == {"warning"}


def test_a_raise_of_one_block_names_it():
    run = with_rates([1.0] * AT)
    found = incidents_of(from_step(run, AT - 1, 2, learning_rate=3.0))[0]
    assert (found.name, found.layer_blocks, found.onset) == ("RateRaise", ("layers.0.ffn",), AT - 1)


def cosine(steps: int) -> list[float]:
    return [0.55 + 0.45 * math.cos(math.pi * i / steps) for i in range(steps)]


@pytest.mark.parametrize(
    "rates",
    [
        [i / 400 for i in range(1, 401)],
        [1.0] * 60 + cosine(200) + [1.0] * 60,
        [1.0] * 100 + [1.0] * 100 + [2.0] + [1.0] * 50,
        [1.0] * 100 + cosine(200)[::-1] + [1.16] * 50,
        [1.0] * 200 + [0.1] * 100,
    ],
    ids=["warm-up", "restart", "one odd step", "restart above a cut-off peak", "lowered"],
)
def test_schedules_are_no_raise(rates):
    assert incidents_of(with_rates(rates)) == ()


def test_multipliers_of_commands_are_no_raise():
    run = from_step(healthy_run(400), AT, learning_rate=4.0, lr_multiplier=4.0)
    assert "RateRaise" not in {name for each in incidents_of(run) for name in each.names}


def test_a_run_without_a_warm_up_is_found_where_steps_are_large():
    """Rate · √n / ‖W‖ = 0.25: a quarter of the weights in each of the first steps."""
    found = incidents_of(with_rates([5.0] * 3))[0]
    assert (found.name, found.severity, found.first_step) == ("RateRaise", "critical", 1)
    assert "25 %" in found.evidence[0]
    assert incidents_of(with_rates([2.0] * 30)) == ()  # 10 %
    assert incidents_of(with_rates([min(i / 100, 1) * 5.0 for i in range(1, 60)])) == ()


@pytest.mark.parametrize("where", [slice(None), 5])
def test_a_rate_that_is_zero_at_once_is_found(where):
    found = incidents_of(from_step(with_rates([1.0] * (AT + 1)), AT, where, learning_rate=0.0))[0]
    assert (found.name, found.cause, found.severity) == ("RateZero", "learning-rate", "critical")
    assert (found.onset, found.first_step) == (AT, AT + 1)
    assert found.layer_blocks == (() if where == slice(None) else ("layers.1.vo",))


@pytest.mark.parametrize(
    "rates",
    [
        [1.0] * 100 + [1 - i / 200 for i in range(1, 201)] + [0.0] * 60,
        [1.0] * 300 + [0.0],
        [1.0] * 300 + [0.0] + [1.0] * 30,
        [0.0] * 50 + [1.0] * 100,
    ],
    ids=["end of a linear decay", "last step", "one odd step", "begins at 0"],
)
def test_other_rates_of_zero_are_no_fault(rates):
    assert [each for each in incidents_of(with_rates(rates)) if "RateZero" in each.names] == []


def test_lost_second_moments_are_found():
    run = from_step(healthy_run(AT + 3), AT, 3, second_moment=0.0)
    found = incidents_of(run)[0]
    assert (found.name, found.cause, found.severity) == ("OptimizerState", "optimizer-state", "critical")
    assert (found.onset, found.first_step, found.layer_blocks) == (AT, AT, ("layers.0.norm",))
    assert incidents_of(from_step(healthy_run(AT), AT, second_moment=1e-3))[0].layer_blocks == ()  # everywhere


def test_second_moments_that_decay_as_adams_may_are_no_fault():
    run = [scaled(seen, second_moment=0.999 ** max(0, seen.step - 100)) for seen in healthy_run(1000)]
    assert incidents_of(run) == ()


def with_group(run: list[Observation], step: int, settings: dict[str, float], steps: int | None) -> list[Observation]:
    group = {(0, 0): OptimizerGroup(settings, steps)}
    return [replace(seen, optimizer_groups=group) if seen.step == step else seen for seen in run]


def test_steps_counted_anew_are_found():
    run = with_group(with_group(healthy_run(AT), AT - 1, SETTINGS, AT - 2), AT, SETTINGS, 0)
    found = the_incident(run)
    assert (found.name, found.cause, found.onset) == ("OptimizerState", "optimizer-state", AT)
    assert "has seen 0 steps at step 301, after 299" in found.evidence[0]
    gone = the_incident(with_group(with_group(healthy_run(AT), AT - 1, SETTINGS, AT - 2), AT, SETTINGS, None))
    assert gone.name == "OptimizerState"


def test_steps_that_go_back_with_the_run_are_no_fault():
    """A rollback to a checkpoint brings the optimizer's state of that step."""
    made = detection()
    assert incidents_of(with_group(healthy_run(AT), AT, SETTINGS, AT - 1), made) == ()
    again = with_group(healthy_run(400, seed=1)[200:], 201, SETTINGS, 200)
    assert incidents_of([replace(again[0], restored=True), *again[1:]], made) == ()


@pytest.mark.parametrize(
    "change",
    [{"beta1": 0.0}, {"beta2": 0.9}, {"eps": 1e-3}, {"weight_decay": 1.0}, {"weight_decay": 0.0}, {"beta1": 0.99}],
)
def test_a_changed_setting_is_found(change):
    found = the_incident(with_group(healthy_run(AT), AT, SETTINGS | change, AT - 1))
    assert (found.name, found.cause, found.severity) == ("SettingsChanged", "optimizer-state", "critical")
    assert (found.onset, found.layer_blocks) == (AT, ())
    assert next(iter(change)) in found.evidence[0]


@pytest.mark.parametrize(
    "change", [{"beta1": 0.93}, {"beta2": 0.998}, {"eps": 5e-9}, {"weight_decay": 0.2}, {"new": 1.0}]
)
def test_a_schedule_of_a_setting_is_no_fault(change):
    assert incidents_of(with_group(healthy_run(AT), AT, SETTINGS | change, AT - 1)) == ()


W, N = 232.0, 135_000_000  # a feed-forward of a layer of LLaMA-7B
DAMAGED = math.hypot(W, 300.0) / W


def large_block(second_moment: float) -> list[Observation]:
    """A run of blocks so large; rate · √n / ‖W‖ = 0.015. Its loss hardly moves."""
    moments = np.full(8, second_moment, np.float32)
    run = [scaled(seen, weight_norm=W / WEIGHT_NORM, learning_rate=0.3) for seen in healthy_run(AT + 30)]
    return [
        replace(seen, loss=3.0 + 1e-3 * (seen.step % 7), layers=replace(seen.layers, second_moment=moments))
        for seen in run
    ]


@pytest.mark.parametrize("second_moment", [1e-4, math.nan], ids=["adam", "another optimizer"])
def test_one_weight_of_300_in_a_7b_layer_is_found_within_two_steps_though_the_loss_stands_still(second_moment):
    run = from_step(large_block(second_moment), AT, 2, weight_norm=DAMAGED)
    (found,) = incidents_of(run, detection(8, N))
    assert (found.name, found.cause, found.severity) == ("WeightJump", "damaged-weight", "critical")
    assert (found.onset, found.layer_blocks[0]) == (AT, "layers.0.ffn")
    assert found.first_step - AT <= 1


def test_an_impossible_change_is_found_also_in_a_young_run():
    found = the_incident(from_step(healthy_run(5), 4, 6, weight_norm=1.3))
    assert (found.name, found.onset, found.layer_blocks) == ("WeightJump", 4, ("layers.1.ffn",))
    assert "×1.3" in found.evidence[0]


NAMES = [[f"model.h.{row // 4}.{name}.weight" for name in ("in", "out")] for row in range(8)]


def telling(seen: Observation, **indices: int) -> Observation:
    """What an agent says of the parameters of layer block 6, layers.1.ffn."""
    told = {name: np.where(np.arange(8) == 6, index, -1) for name, index in indices.items()}
    return replace(seen, layers=replace(seen.layers, **told))


def test_an_impossible_change_names_its_parameter():
    run = from_step(healthy_run(5), 4, 6, weight_norm=1.3)
    run = [telling(seen, changed_parameter=1 if seen.step == 4 else 0) for seen in run]
    (found,) = incidents_of(run, detection(parameter_names=NAMES))
    assert found.parameter == "model.h.1.out.weight"
    assert found.evidence[0].startswith("weight norm of layers.1.ffn (out.weight) ×1.3 in one step, ")
    (unnamed,) = incidents_of(run)  # of an agent that has not told its names
    assert unnamed.parameter == ""
    assert unnamed.evidence[0].startswith("weight norm of layers.1.ffn ×1.3 in one step, ")


@pytest.mark.parametrize(
    ("index", "name", "shown"), [(0, "model.h.1.in.weight", " (in.weight)"), (-1, "", ""), (7, "", "")]
)
def test_a_gradient_that_is_not_finite_names_its_parameter_where_one_is_known(index, name, shown):
    run = healthy_run(8)
    spoilt = replace(
        run[-1], layers=replace(run[-1].layers, non_finite=np.where(np.arange(8) >= 6, [3] * 6 + [9, 5], 0))
    )
    run[-1] = telling(spoilt, non_finite_parameter=index)
    (found,) = incidents_of(run, detection(parameter_names=NAMES))
    assert found.parameter == name
    assert found.evidence == (f"gradient of layers.1.ffn{shown}, layers.1.norm not finite",)


def test_a_parameter_outside_of_layers_is_told_in_full():
    assert with_parameter("emb", "model.wte.0.weight") == "emb (model.wte.0.weight)"
    assert with_parameter("layers.3.ffn", "h.3.mlp.experts.1.weight") == "layers.3.ffn (mlp.experts.1.weight)"
    assert with_parameter("layers.3.ffn", "3.weight") == "layers.3.ffn (weight)"
    assert with_parameter("layers.3.ffn", "odd") == "layers.3.ffn (odd)"


def test_weights_of_a_restored_checkpoint_are_no_damage():
    run = from_step(healthy_run(AT + 100), AT, weight_norm=0.7)
    run[AT - 1] = replace(run[AT - 1], restored=True)
    assert incidents_of(run) == ()


def test_weights_that_begin_to_grow_fast_are_found():
    """By 1 % a step, a fifth of what a step can do."""
    run = [scaled(seen, weight_norm=1.01 ** max(0, seen.step - AT + 1)) for seen in healthy_run(AT + 60)]
    found = [each for each in incidents_of(run) if "WeightGrowth" in each.names]
    assert found
    assert found[0].severity == "critical"
    assert AT <= found[0].onset <= AT + 25


def test_weights_that_always_grow_are_no_fault():
    run = [scaled(seen, weight_norm=1 + 0.007 * seen.step) for seen in healthy_run(600)]
    assert incidents_of(run) == ()


def test_a_gradient_that_becomes_zero_is_a_dead_block():
    run = from_step(healthy_run(AT + 5), AT, 4, gradient_norm=0.0)
    found = the_incident(run)
    assert (found.name, found.cause, found.severity) == ("DeadBlock", "silent", "critical")
    assert (found.onset, found.first_step, found.layer_blocks) == (AT, AT + 2, ("layers.1.qk",))


def with_zeros(seen, count: int, parameter: int = 1):
    """So many parameters of "layers.1.ffn" have a gradient of exactly zero, or the one of that index."""
    counts, which = np.zeros(8, dtype=np.int32), np.full(8, -1, dtype=np.int32)
    counts[6], which[6] = count, parameter if count == 1 else -1
    return replace(seen, layers=replace(seen.layers, zero_gradients=counts, zero_parameter=which))


def test_a_parameter_whose_gradient_becomes_zero_is_named_though_its_block_lives():
    run = [with_zeros(seen, 1) if seen.step >= AT else seen for seen in healthy_run(AT + 30)]
    (found,) = incidents_of(run, detection(parameter_names=NAMES))
    assert (found.name, found.cause, found.severity) == ("DeadBlock", "silent", "critical")
    assert (found.onset, found.first_step, found.layer_blocks) == (AT, AT + 2, ("layers.1.ffn",))
    assert found.parameter == "model.h.1.out.weight"
    assert found.evidence[0] == "gradient of layers.1.ffn (out.weight) is 0"


def test_a_daemon_that_restarts_goes_on_counting_gradients_of_zero():
    run = [with_zeros(seen, 1) if seen.step >= AT else seen for seen in healthy_run(AT + 5)]
    first, second = detection(parameter_names=NAMES), detection(parameter_names=NAMES)
    for seen in run[: AT - 4]:
        first.see(seen)
    first.see(with_zeros(run[AT - 4], 1))
    second.load_state(first.state())
    assert incidents_of(run[AT - 1 :], second)[0].onset == AT


def test_several_dead_parameters_are_told_without_a_name():
    run = [with_zeros(seen, 2) if seen.step >= AT else seen for seen in healthy_run(AT + 5)]
    (found,) = incidents_of(run, detection(parameter_names=NAMES))
    assert (found.parameter, found.evidence[0]) == ("", "gradient of a part of layers.1.ffn is 0")


def test_parameters_that_come_and_go_or_never_had_a_gradient_are_not_dead():
    """As experts without a token, and adapters that begin with nothing; only more of them than ever are news."""
    rng = np.random.default_rng(5)
    experts = [with_zeros(seen, int(rng.binomial(8, 0.1))) for seen in healthy_run(400)]
    assert [each for each in incidents_of(experts) if "DeadBlock" in each.names] == []
    at_start = [with_zeros(seen, 3) if seen.step < 20 else seen for seen in healthy_run(200)]
    always = [with_zeros(seen, 2) for seen in healthy_run(200)]
    assert incidents_of(at_start) == incidents_of(always) == ()
    more = [with_zeros(seen, 3 if seen.step >= AT else 2) for seen in healthy_run(AT + 5)]
    assert [each.onset for each in incidents_of(more)] == [AT]


def test_a_gradient_that_is_zero_now_and_then_is_no_dead_block():
    """As that of an expert that gets no token."""
    run = healthy_run(400)
    run = [scaled(seen, 4, gradient_norm=0.0) if seen.step % 5 in {0, 1} else seen for seen in run]
    assert [each for each in incidents_of(run) if "DeadBlock" in each.names] == []


def test_a_frozen_block_is_not_dead():
    """It has no updates either."""
    run = healthy_run(300)
    still = [
        replace(s, layers=replace(s.layers, update_rms=np.where(np.arange(8) == 4, np.nan, s.layers.update_rms)))
        for s in run
    ]
    assert incidents_of(from_step(still, 200, 4, gradient_norm=0.0)) == ()


def gap(run: list[Observation], first: int, last: int, *, layers_only: bool) -> list[Observation]:
    inside = range(first, last + 1)
    if layers_only:
        return [replace(seen, layers=None) if seen.step in inside else seen for seen in run]
    return [seen for seen in run if seen.step not in inside]


@pytest.mark.parametrize("layers_only", [True, False])
def test_many_steps_change_weights_by_more_than_one_can(layers_only):
    """0.4 of what a step can do in each of 20 steps, all unseen."""
    growing = [scaled(seen, weight_norm=1.02 ** min(max(0, seen.step - 190), 30)) for seen in healthy_run(300)]
    assert [
        each for each in incidents_of(gap(growing, 195, 215, layers_only=layers_only)) if "WeightJump" in each.names
    ] == []


@pytest.mark.parametrize("layers_only", [True, False])
def test_second_moments_may_fall_further_in_many_steps(layers_only):
    run = with_group(healthy_run(300), 1, SETTINGS | {"beta2": 0.95}, 0)
    run = [scaled(seen, second_moment=0.95 ** min(max(0, seen.step - 190), 40)) for seen in run]
    assert incidents_of(run) == ()
    assert incidents_of(gap(run, 195, 215, layers_only=layers_only)) == ()


def test_a_missing_tap_is_no_fault():
    run = healthy_run(500)
    run = [replace(seen, layers=None) if seen.step % 7 == 0 else seen for seen in run]
    assert incidents_of(run) == ()


def test_an_empty_tap_is_no_fault():
    unknown = dict.fromkeys(("gradient_norm", "weight_norm", "update_rms", "learning_rate"), np.nan)
    run = [Observation(i, 0.0, 3.0, layer_tap(4, **unknown)) for i in range(1, 300)]
    assert incidents_of(run, detection(4, PARAMETERS)) == ()


def resting(run: list[Observation], every: int, *, from_step: int = AT) -> list[Observation]:
    """The run with its first layer block, a qk, updated only at steps that `every` divides."""
    made, norm, before = [], WEIGHT_NORM, WEIGHT_NORM
    for seen in run:
        own = float(seen.layers.weight_norm[0])
        if seen.step < from_step or (seen.step - 1) % every == 0:
            norm *= own / before
        before, norms = own, np.array(seen.layers.weight_norm)
        norms[0] = norm
        told = {"qk": every} if seen.step >= from_step else {}
        made.append(replace(seen, layers=replace(seen.layers, weight_norm=norms), update_every=told))
    return made


def test_a_block_that_rests_says_nothing_of_how_much_a_step_changes_it():
    made = detection()
    scored = []
    for seen in resting(healthy_run(400), 10):
        made.see(seen)
        scored.append(made.recent[-1].weight[0])
    late = np.array(scored[AT + 20 :])
    steps = np.arange(AT + 20, 400)  # the step before each of these samples
    assert np.isnan(late[steps % 10 != 0]).all()
    assert np.isfinite(late[steps % 10 == 0]).all()
    assert made.incidents.all == ()


def test_weights_that_jump_while_they_rest_are_found():
    run = resting(healthy_run(420), 10)
    (found,) = incidents_of([scaled(seen, 0, weight_norm=1.5) if seen.step >= 405 else seen for seen in run])
    assert (found.name, found.layer_blocks) == ("WeightJump", ("layers.0.qk",))


def test_a_restored_state_that_has_left_updates_out_is_no_fault():
    """A block that rests at some steps has seen fewer of them, before a rollback and after it."""
    made = detection()
    assert incidents_of(with_group(healthy_run(AT), AT, SETTINGS, AT - 150), made) == ()
    again = with_group(healthy_run(400, seed=1)[250:], 251, SETTINGS, 251 - 140)
    assert incidents_of([replace(again[0], restored=True), *again[1:]], made) == ()


def test_a_state_that_is_lost_with_a_rollback_is_found_though_updates_were_left_out():
    made = detection()
    assert incidents_of(with_group(healthy_run(AT), AT, SETTINGS, AT - 150), made) == ()
    again = with_group(healthy_run(400, seed=1)[250:], 251, SETTINGS, 0)
    (found,) = incidents_of([replace(again[0], restored=True), *again[1:]], made)
    assert found.name == "OptimizerState"
