"""Two runs held against each other: pairing by step, the data they share, what parts, and what was probed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.errors import LogError
from sharpwatch.replay.compare import SECTIONS, compare
from sharpwatch.replay.files import ReadOptions, read_run
from sharpwatch.replay.log import Log, Row
from sharpwatch.replay.paired_estimates import block_order, newest
from sharpwatch.replay.paired_steps import newest_attempt
from sharpwatch.replay.recorded_run import from_log
from tests.journals import JournalledAttempt, write_journal

LOGS = Path(__file__).parents[2] / "data" / "logs"
ALL = {"step": "step", "loss": "loss", "grad-norm": "grad_norm", "lr": "lr"}
RNG = np.random.default_rng(0)
DATA = 0.3 * RNG.standard_normal(2000)  # what the batches make of a loss
OTHER_DATA = 0.3 * RNG.standard_normal(2000)


def run(steps, losses, source="run", **columns):
    rows = [
        Row(int(step), float(loss), *(float(columns[name][number]) for name in ("norms", "rates") if name in columns))
        for number, (step, loss) in enumerate(zip(steps, losses, strict=True))
    ]
    names = {"step": "step", "loss": "loss"} if not columns else ALL
    return from_log(Log(rows, names), source, "csv")


def recorded(name):
    return read_run(str(LOGS / name), ReadOptions())


def trained(count=2000, noise=0.01, seed=1, data=DATA):
    return 3 + data[:count] + noise * np.random.default_rng(seed).standard_normal(count)


STEPS = np.arange(1, 2001)


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        ([1, 2, 3], [1, 2, 3]),
        ([1, 2, 3, 2, 3, 4], [1, 2, 3, 4]),
        ([10, 20, 30, 15, 25], [10, 15, 25]),
        ([5, 5], [5]),
        ([], []),
    ],
)
def test_the_newest_attempt_counts(steps, kept):
    items = list(enumerate(steps))
    found = newest_attempt(items, lambda item: item[1])
    assert [step for _, step in found] == kept
    assert len(found) < 2 or found[-1] == items[-1]


def test_steps_are_paired_by_number_through_gaps_and_restarts():
    here = run([5, 10, 15, 20, 15, 20, 25], [1, 2, 3, 4, 3.5, 4.5, 5])
    there = run([0, 10, 20, 25, 40], [0, 2, 4, 5, 9])
    found = compare(here, there)
    assert found.steps.tolist() == [10, 20, 25]
    assert (found.loss.values.run.tolist(), found.loss.values.reference.tolist()) == ([2, 4.5, 5], [2, 4, 5])
    assert found.replaced == (2, 0)
    assert [(section.first_step, section.last_step) for section in found.sections] == [(10, 10), (20, 20), (25, 25)]


def test_without_a_common_step_the_error_names_both():
    here, there = run([5, 10, 15], [1, 2, 3]), run([101, 111, 121], [1, 2, 3], "reference")
    with pytest.raises(
        LogError, match="run: no step in common with reference: steps 5 to 15, every 5th here, steps 101"
    ):
        compare(here, there)


def test_twins_with_equal_losses_at_first():
    reference = trained()
    losses = reference.copy()
    losses[600:] += 0.01 * np.random.default_rng(3).standard_normal(1400)
    losses[1200:] += 0.03
    found = compare(run(STEPS, losses), run(STEPS, reference))
    twins = found.twins
    assert (twins.equal_steps, twins.equal_until, twins.first_other, twins.same_data) == (600, 600, 601, True)
    assert twins.correlation > 0.95
    (stretch,) = found.loss.parting.stretches
    assert abs(int(STEPS[stretch.first]) - 1201) < 16
    assert stretch.mean.value == pytest.approx(0.03, abs=0.002)


@pytest.mark.parametrize(("data", "same"), [(DATA, True), (OTHER_DATA, False)])
def test_the_data_are_told_by_how_losses_change(data, same):
    found = compare(run(STEPS, trained(seed=1)), run(STEPS, trained(seed=2, data=data)))
    assert (found.twins.equal_steps, found.twins.same_data) == (0, same)
    assert (abs(found.twins.correlation) > 0.5) == same


def test_a_small_difference_shows_only_between_twins():
    twin = compare(run(STEPS, trained() + 0.01), run(STEPS, trained(seed=2)))
    assert (twin.loss.parting.stays, twin.loss.parting.stretches[0].first) == (True, 0)
    stranger = compare(run(STEPS, trained() + 0.01), run(STEPS, trained(seed=2, data=OTHER_DATA)))
    assert stranger.loss.parting.stretches == ()


def test_a_loss_that_is_not_finite():
    losses = trained()
    losses[[1500, 1501]] = math.nan, math.inf
    found = compare(run(STEPS, losses), run(STEPS, trained()))
    assert found.first_bad_loss == (1501, None)
    assert len(found.loss.values) == 1998


def test_norms_and_rates():
    norms, rates = 1 + DATA**2, np.full(2000, 0.1)
    other_rates = np.where(STEPS > 700, 0.05, 0.1 * (1 + 1e-7))
    here = run(STEPS, trained(), norms=norms * np.where(STEPS > 900, 1.5, 1), rates=other_rates)
    found = compare(here, run(STEPS, trained(), norms=norms, rates=rates))
    assert found.first_other_rate == 701
    assert [stretch.first for stretch in found.gradient_norm.parting.stretches] == [900]
    assert math.exp(found.gradient_norm.parting.last.value) == pytest.approx(1.5, rel=1e-5)
    assert len(found.sections) == SECTIONS
    assert found.sections[-1].learning_rate == pytest.approx((0.05, 0.1), rel=1e-5)


def test_a_log_without_a_loss():
    rows = [Row(step, None, 1.0 + step) for step in range(20)]
    norms_only = from_log(Log(rows, {"step": "step", "grad-norm": "gnorm"}), "norms", "csv")
    found = compare(norms_only, norms_only)
    assert (found.twins, found.loss.parting, found.sections[0].loss) == (None, None, None)
    assert len(found.gradient_norm.values) == 20
    assert len(found.learning_rate) == 0


def test_the_run_that_never_trains():
    """No detector sees it on the run alone: without warm-up its loss falls at first, and then stays at 10 bits."""
    found = compare(recorded("iwslt_adam_0.98.csv.gz"), recorded("iwslt_adam_0.98_warmup.csv.gz"))
    steps, (below, above) = found.loss.values.steps, found.loss.parting.stretches
    assert (below.onset.value < 0, above.onset.value > 0, found.loss.parting.stays) == (True, True, True)
    assert steps[below.first] <= 5
    assert 200 <= steps[below.end - 1] <= steps[above.first] <= 400
    assert found.loss.parting.last.value > 1
    assert (found.twins.first_other, found.first_other_rate) == (2, 1)
    assert found.twins.same_data


def test_a_recording_against_itself():
    found = compare(recorded("mixtral_8x7b_h100.csv.gz"), recorded("mixtral_8x7b_h100.csv.gz"))
    assert (found.loss.parting.stretches, found.twins.first_other) == ((), None)


# What was probed


def sharpness(step, scale=1.0, stderr=0.01, blocks=("emb", "qk", "ffn", "vo", "norm"), estimator="gnb"):
    return [(step, block, scale * (1 + number), stderr, estimator) for number, block in enumerate(blocks)]


def journalled(tmp_path, here, there):
    url = write_journal(tmp_path / "journal.db", {"here": here, "there": there})
    return [read_run(url, ReadOptions(run=name)) for name in ("here", "there")]


LOSSES = [(step, 3.0) for step in range(1, 41)]


def test_sharpness_is_paired_by_block_estimator_and_step(tmp_path):
    here = [JournalledAttempt(LOSSES, sharpness(10) + sharpness(30, 2, 0.03) + sharpness(30, estimator="hutchinson"))]
    there = [JournalledAttempt(LOSSES, sharpness(12) + sharpness(33, 1, 0.04) + sharpness(90))]
    found = compare(*journalled(tmp_path, here, there), within=5)
    emb = [pair for pair in found.sharpness if pair.block == "emb"]
    assert [(pair.estimator, pair.run.step, pair.reference.step) for pair in emb] == [("gnb", 10, 12), ("gnb", 30, 33)]
    assert emb[1].errors == pytest.approx((2 - 1) / 0.05)
    assert [pair.run.step for pair in newest(found.sharpness)] == [30] * 5
    assert compare(found.run, found.reference, within=1).sharpness == ()


def test_estimates_of_an_attempt_that_was_replaced_are_left_out(tmp_path):
    old = JournalledAttempt(LOSSES, sharpness(10) + sharpness(20, 7) + sharpness(30, 7))
    new = JournalledAttempt(LOSSES[15:], sharpness(20))
    run_, reference = journalled(tmp_path, [old, new], [JournalledAttempt(LOSSES, sharpness(10) + sharpness(30))])
    found = compare(run_, reference, within=10)
    assert [(pair.run.step, pair.run.value) for pair in found.sharpness if pair.block == "emb"] == [(10, 1), (20, 1)]
    assert found.replaced == (25, 0)


def test_the_order_of_blocks():
    values = {"emb": 1.0, "qk": 3.0, "ffn": 2.0, "vo": 4.0, "norm": 3.95, "head": 9.0}
    found = block_order("gnb", {block: Estimate(value, 0.3, 8, "gnb") for block, value in values.items()})
    stats = pytest.importorskip("scipy.stats")
    assert found.correlation == pytest.approx(stats.spearmanr(range(5), list(values.values())[:5]).statistic)
    ((low, high, errors),) = found.inversions
    assert (low, high) == ("qk", "ffn")
    assert errors == pytest.approx(1 / math.hypot(0.3, 0.3))


def test_orders_of_both_runs(tmp_path):
    turned = [(30, block, value, 0.01, "gnb") for (_, block, value, _, _) in sharpness(30)]
    turned[1], turned[2] = (30, "qk", 3.0, 0.01, "gnb"), (30, "ffn", 2.0, 0.01, "gnb")
    run_, reference = journalled(
        tmp_path, [JournalledAttempt(LOSSES, turned)], [JournalledAttempt(LOSSES, sharpness(30))]
    )
    ((here, there),) = compare(run_, reference).orders
    assert [(low, high) for low, high, _ in here.inversions] == [("qk", "ffn")]
    assert (there.correlation, there.inversions) == (1, ())


def test_gradient_noise_where_it_was_probed(tmp_path):
    here = JournalledAttempt(LOSSES, noise={10: 2.0, 20: 4.0, 30: 6.0})
    there = JournalledAttempt(LOSSES[:30], noise={10: 1.0, 30: 2.0})
    found = compare(*journalled(tmp_path, [here], [there]))
    assert [pair.block for pair in found.gradient_noise] == ["emb", "qk", "ffn", "vo", "norm"]
    pair = found.gradient_noise[0]
    assert (pair.run.value, pair.reference.value) == (4, 1.5)
    assert pair.run.stderr == pytest.approx(2 / math.sqrt(3))
    assert pair.errors == pytest.approx(2.5 / math.hypot(2 / math.sqrt(3), 0.5))


def test_the_norm_of_a_journalled_gradient_is_over_all_layer_blocks(tmp_path):
    found = compare(*journalled(tmp_path, [JournalledAttempt(LOSSES)], [JournalledAttempt(LOSSES)]))
    assert found.gradient_norm.values.run[0] == pytest.approx(3 * math.sqrt(5))
    assert found.learning_rate.run[0] == 0.5
