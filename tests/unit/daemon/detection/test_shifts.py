"""Detectors of what stands out: that each finds its fault, and none what a healthy run may do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from observations import detection, healthy_run, scaled

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.detection.run_detection import RunDetection
from sharpwatch.daemon.records import Incident, Observation

AT, STEPS = 401, 440
Change = Callable[[Observation], Observation]


def incidents_of(run: list[Observation], made: RunDetection | None = None) -> tuple[Incident, ...]:
    made = made or detection()
    for seen in run:
        made.see(seen)
    return made.incidents.all


def from_step(run: list[Observation], step: int, change: Change, steps: int = 10**9) -> list[Observation]:
    return [change(seen) if step <= seen.step < step + steps else seen for seen in run]


def other_optimizer(run: list[Observation]) -> list[Observation]:
    """Without a second moment, so that nothing is known of what a step can do."""
    unknown = np.full(8, np.nan, np.float32)
    return [replace(seen, layers=replace(seen.layers, second_moment=unknown)) for seen in run]


def louder(by: float) -> Change:
    return lambda seen: replace(seen, loss=seen.loss + by)


def block(where: int | slice, **factors: float) -> Change:
    return lambda seen: scaled(seen, where, **factors)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("factor", [1.04, 0.96, 2.0])
def test_damaged_weights_are_found_one_step_later(seed, factor):
    """Of 4 % in one step; the usual change is 0.1 %."""
    run = from_step(other_optimizer(healthy_run(AT + 3, seed=seed)), AT, block(5, weight_norm=factor))
    (found,) = incidents_of(run)
    assert (found.name, found.cause, found.severity) == ("WeightJump", "damaged-weight", "critical")
    assert (found.onset, found.first_step, found.layer_blocks) == (AT, AT + 1, ("layers.1.vo",))
    assert float(re.search(r"×(\S+)", found.evidence[0])[1]) == pytest.approx(factor, rel=0.01)


def test_damaged_weights_name_the_parameter_of_the_step_that_damaged_them():
    run = from_step(other_optimizer(healthy_run(AT + 3)), AT, block(5, weight_norm=1.04))
    names = [[f"layers.{row // 4}.{name}.weight" for name in ("in", "out")] for row in range(8)]
    told = {AT - 1: 0, AT: 1, AT + 1: 0}  # it is found one step later, when another one has moved the most
    run = [
        replace(seen, layers=replace(seen.layers, changed_parameter=np.full(8, told.get(seen.step, -1))))
        for seen in run
    ]
    made = detection(parameter_names=names)
    for seen in run:
        made.see(seen)
    (found,) = made.incidents.all
    assert (found.name, found.parameter) == ("WeightJump", "layers.1.out.weight")
    assert found.evidence[0].startswith("weight norm of layers.1.vo (out.weight) ×1.0")


def test_each_of_three_damages_is_a_page():
    run = other_optimizer(healthy_run(1000))
    for i, step in enumerate((500, 700, 900)):
        run = from_step(run, step, block(i, weight_norm=1.04))
    assert [(each.severity, each.onset) for each in incidents_of(run)] == [("critical", s) for s in (500, 700, 900)]


def test_jumps_in_a_run_that_goes_wrong_do_not_hide_damage_when_it_is_well():
    run = from_step(other_optimizer(healthy_run(900)), 400, block(slice(None), learning_rate=3.0), steps=120)
    for step in (410, 440, 470, 500):
        run = from_step(run, step, block(2, weight_norm=1.3))
    wrong, damage = incidents_of(from_step(run, 800, block(5, weight_norm=1.04)))
    assert (wrong.name, wrong.onset) == ("RateRaise", 400)
    assert "WeightJump" in wrong.names
    assert (damage.name, damage.severity, damage.onset) == ("WeightJump", "critical", 800)


def test_weights_that_are_back_after_one_step_are_no_damage():
    run = from_step(other_optimizer(healthy_run(STEPS)), AT, block(5, weight_norm=1.04), steps=1)
    assert incidents_of(run) == ()


@pytest.mark.parametrize("before", [0.0, -0.01])
def test_weights_that_grow_differently_for_good_are_no_damage(before):
    """As those of a head where a rare token comes at last."""
    run = [
        scaled(seen, 5, weight_norm=math.exp(before * min(seen.step, AT) + 0.005 * max(0, seen.step - AT)))
        for seen in healthy_run(STEPS)
    ]
    assert [each for each in incidents_of(other_optimizer(run)) if "WeightJump" in each.names] == []


@pytest.mark.parametrize(
    ("change", "name", "cause", "within"),
    [
        ({"update_rms": 2.0}, "UpdateRmsSpike", "instability", 5),
        ({"gradient_norm": 2.0}, "GradientSpike", "instability", 5),
        ({"update_rms": 0.5}, "DeadBlock", "silent", 5),
        ({"gradient_norm": 0.5}, "DeadBlock", "silent", 5),
        ({"gradient_norm": 1.3}, "GradientSpike", "instability", 20),
    ],
)
def test_a_layer_block_that_leaves_its_level_is_found(change, name, cause, within):
    run = from_step(healthy_run(STEPS), AT, block(5, **change))
    found = incidents_of(run)[0]
    assert (found.name, found.cause, found.layer_blocks) == (name, cause, ("layers.1.vo",))
    assert found.first_step - AT < within
    assert AT - 3 <= found.onset <= AT + within


def test_a_large_shift_of_a_layer_block_is_a_page_and_begins_where_it_began():
    run = from_step(healthy_run(STEPS), AT, block(2, update_rms=3.0))
    (found,) = incidents_of(run)
    assert (found.severity, found.onset, found.blocks) == ("critical", AT, ("ffn",))


def test_updates_and_gradients_that_grow_together_are_pages_more_often_than_each_alone():
    def pages(**factors: float) -> list[Incident]:
        runs = [from_step(healthy_run(STEPS, seed=seed), AT, block(5, **factors)) for seed in range(8)]
        return [each for run in runs for each in incidents_of(run) if each.severity == "critical"]

    assert max(len(pages(update_rms=1.3)), len(pages(gradient_norm=1.3))) <= 4
    together = pages(update_rms=1.3, gradient_norm=1.3)
    assert len(together) >= 7
    assert {each.layer_blocks for each in together} == {("layers.1.vo",)}
    said = r"update RMS of layers\.1\.vo \S+ sd above its level, its gradient norm \S+,"
    assert any(re.match(said, line) for each in together for line in each.evidence)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("statistic", ["update_rms", "gradient_norm"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_page_stays_open_while_layer_blocks_stay_off_their_level(count, statistic, seed):
    """What was seen before the page was opened must not make it seem usual."""
    run = from_step(healthy_run(AT + 160, seed=seed), AT, block(slice(0, count), **{statistic: 20.0}))
    (found,) = incidents_of(run)
    assert (found.severity, found.active) == ("critical", True)


def test_a_layer_block_that_is_not_measured_blinds_no_other():
    nothing = block(2, update_rms=math.nan, gradient_norm=0.0)
    run = [nothing(seen) for seen in healthy_run(STEPS)]
    (found,) = incidents_of(from_step(run, AT, block(5, update_rms=2.0)))
    assert (found.severity, found.layer_blocks) == ("critical", ("layers.1.vo",))


@pytest.mark.parametrize("factor", [0.75, 1.35])
def test_updates_alone_are_found_on_both_sides_also_where_no_gradient_is_measured(factor):
    run = [block(slice(None), gradient_norm=math.nan)(seen) for seen in healthy_run(STEPS)]
    (found,) = incidents_of(from_step(run, AT, block(5, update_rms=factor)))
    assert found.layer_blocks == ("layers.1.vo",)


@pytest.mark.parametrize("statistic", ["update_rms", "gradient_norm"])
@pytest.mark.parametrize("factor", [20.0, 0.01])
@pytest.mark.parametrize("seed", range(3))
def test_a_single_odd_norm_is_no_fault(statistic, factor, seed):
    run = healthy_run(STEPS, seed=seed)
    assert incidents_of(from_step(run, AT, block(5, **{statistic: factor}), steps=1)) == ()


@pytest.mark.parametrize("by", [3.0, -1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_single_odd_loss_is_worth_no_page(by, seed):
    found = incidents_of(from_step(healthy_run(STEPS, seed=seed), AT, louder(by), steps=1))
    assert [each for each in found if each.severity == "critical"] == []


@pytest.mark.parametrize(
    "change",
    [
        block(slice(None), gradient_norm=math.sqrt(3)),  # a third of the batch, where noise is most of the gradient
        block(slice(None), gradient_norm=10.0),
        block(slice(None), update_rms=0.5),
        block(slice(None), update_rms=3.0, gradient_norm=3.0),
    ],
)
def test_what_all_layer_blocks_have_in_common_is_no_blocks_fault(change):
    assert incidents_of(from_step(healthy_run(STEPS), AT, change)) == ()


@pytest.mark.parametrize("offset", [0.0, -3.0, -10.0, 50.0])
def test_a_loss_of_any_sign_that_leaves_its_trend_is_found(offset):
    run = [replace(seen, loss=seen.loss + offset) for seen in healthy_run(STEPS)]
    # Of 50 the floor of a third of a percent is 0.15.
    (found,) = incidents_of(from_step(run, AT, louder(0.3 if offset < 50 else 1.5)))
    assert (found.name, found.cause, found.layer_blocks) == ("LossSpike", "data", ())
    assert found.first_step - AT < 10
    assert found.onset == AT
    assert found.severity == "critical"
    assert incidents_of(run) == ()


def sd_of_loss(run: list[Observation]) -> float:
    return float(np.std([seen.loss for seen in run[AT - 100 : AT]]))


@pytest.mark.parametrize(
    ("sizes", "severity"),
    [
        ([7, 7, 7, 4, 4, 4], "warning"),  # text of another kind
        ([40, 7, 7, 7], "critical"),  # a spike
        ([7] * 20, "critical"),  # it stays
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_loss_that_text_of_another_kind_may_have_is_worth_a_warning(sizes, severity, seed):
    run = healthy_run(STEPS, seed=seed)
    lifted = [replace(s, loss=3.0 + by * sd_of_loss(run)) for s, by in zip(run[AT - 1 :], sizes, strict=False)]
    (found,) = incidents_of([*run[: AT - 1], *lifted, *run[AT - 1 + len(lifted) :]])
    assert (found.name, found.severity) == ("LossSpike", severity)


def test_a_short_spike_of_the_loss_is_found_and_its_end_is_no_drop():
    found = incidents_of(from_step(healthy_run(STEPS + 60), AT, louder(0.5), steps=6))
    assert [each.name for each in found] == ["LossSpike"]
    assert not found[0].active


@pytest.mark.parametrize("seed", range(4))
def test_a_loss_that_scatters_more_is_no_fault_as_after_a_smaller_batch(seed):
    """Twice as much: batches of a quarter. A shift of the mean is found as before."""
    run = healthy_run(700, seed=seed)
    noisier = [replace(seen, loss=3.0 + 2 * (seen.loss - 3.0)) if seen.step >= AT else seen for seen in run]
    assert "critical" not in {each.severity for each in incidents_of(noisier)}
    assert len(incidents_of(noisier)) <= 1  # until 40 values show the new scatter
    shifted = incidents_of(from_step(noisier, AT + 100, louder(0.2)))
    assert any(each.name == "LossSpike" and AT + 100 <= each.onset < AT + 110 for each in shifted)


def test_a_loss_that_drops_at_once_is_worth_a_warning():
    """As where a loader is stuck."""
    found = incidents_of(from_step(healthy_run(STEPS), AT, louder(-0.5)))[0]
    assert (found.name, found.cause, found.severity) == ("LossDrop", "data", "warning")


@pytest.mark.parametrize("speed", [0.5, 1.0])
def test_a_loss_that_falls_faster_is_worth_no_page(speed):
    """A young run's; or one whose rate has been lowered."""
    run = [
        replace(seen, loss=seen.loss + 5 * seen.step**-speed - 0.002 * max(0, seen.step - AT))
        for seen in healthy_run(700)
    ]
    assert [each for each in incidents_of(run) if each.severity == "critical"] == []


def test_a_missing_loss_in_an_incident_is_no_error():
    run = from_step(healthy_run(STEPS), AT, louder(0.6))
    run[AT + 6] = replace(run[AT + 6], loss=None)
    run[AT + 7] = replace(run[AT + 7], loss=math.nan)
    made = detection()
    found = [finding for seen in run for finding in made.see(seen)[0]]
    assert any(finding.step == AT + 7 and finding.evidence.startswith("loss: ") for finding in found)


def test_blocks_and_loss_together_are_data_and_blocks_alone_are_not():
    wrong = from_step(healthy_run(STEPS), AT, block(5, gradient_norm=2.0))
    together = from_step(wrong, AT + 2, louder(0.5))
    late = from_step(wrong, AT + 30, louder(0.5))
    assert incidents_of(together)[0].cause == "data"
    assert incidents_of(wrong)[0].cause == "instability"
    assert incidents_of(late)[0].cause == "instability"


def probe(value: float, step: int, stderr: float = math.inf, **blocks: float) -> Observation:
    def ratio(number: float) -> Estimate:
        return Estimate(number, stderr, 1, "direction", step)

    return Observation(step, 0.0, stability=ratio(value), block_stability={b: ratio(v) for b, v in blocks.items()})


def probed(*newest: Observation, level: float = 0.07) -> tuple[Incident, ...]:
    noise = np.exp(0.3 * np.random.default_rng(0).standard_normal((60, 3)))
    made = detection()
    healthy = [probe(level * n[0], 5 * i, qk=level * n[1], ffn=level * n[2]) for i, n in enumerate(noise, start=1)]
    return incidents_of([*healthy, *newest], made)


def test_a_stability_ratio_far_above_the_runs_own_is_found_at_the_second_probe():
    high = probe(0.81, 305), replace(probe(0.07, 306), stability=None), probe(1.44, 310, 0.2, ffn=1.9, qk=0.06)
    assert probed(*high[:2]) == ()
    (found,) = probed(*high)
    assert (found.name, found.cause, found.severity) == ("StabilityLimit", "instability", "critical")
    assert (found.onset, found.first_step) == (305, 310)
    assert found.blocks == ("ffn",)


@pytest.mark.parametrize(
    ("value", "stderr", "level"),
    [(0.15, math.inf, 0.02), (1.0, 0.95, 0.07), (-3.0, 0.1, 0.07), (1.5, math.inf, 1.0)],
    ids=["harmless", "not surely above", "negative curvature", "lives at the edge"],
)
def test_other_stability_ratios_are_no_fault(value, stderr, level):
    assert probed(*[probe(value, 300 + 5 * i, stderr) for i in range(1, 10)], level=level) == ()


def test_one_wild_ratio_proves_nothing():
    assert probed(probe(1e3, 305), probe(0.07, 310), probe(0.07, 315), probe(0.07, 320)) == ()


def young_run(steps: int = 140, *, seed: int = 0, rises: float = 0.0, at: int = 110) -> list[Observation]:
    """A loss that falls from 8 to about 3 with normal noise, as in a young run, and rises at a step."""
    rng = np.random.default_rng(seed)
    run = healthy_run(steps, seed=seed)
    falls = [3.0 + 5.0 / (1 + step / 10) + 0.1 * rng.standard_normal() for step in range(1, steps + 1)]
    return [
        replace(seen, loss=loss + (rises if seen.step >= at else 0.0)) for seen, loss in zip(run, falls, strict=True)
    ]


@pytest.mark.parametrize("at", [40, 70, 110])
@pytest.mark.parametrize("seed", range(3))
def test_in_a_young_run_a_loss_above_all_before_is_found_in_three_steps(seed, at):
    found = spikes(young_run(seed=seed, rises=3.0, at=at))
    assert found[0] == ("critical", at + 2, at)


def test_a_young_loss_that_falls_and_a_single_odd_one_are_none():
    run = young_run()
    run[110] = replace(run[110], loss=20.0)
    assert spikes(run) == []
    assert [found for seed in range(20) if (found := spikes(young_run(seed=seed)))] == []


def spikes(run: list[Observation]) -> list[tuple[str, int, int]]:
    judged = detection()
    return [
        (each.severity, each.step, each.onset)
        for seen in run
        for each in judged.see(seen)[0]
        if each.name == "LossSpike"
    ]


def test_that_a_young_loss_falls_faster_is_no_news():
    run = young_run(400, rises=-1.0, at=130)
    assert "LossDrop" not in {name for each in incidents_of(run) for name in each.names}
