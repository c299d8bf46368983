"""One rank among others: it is named however many hide it in the mean, and none is named of those that are well."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from observations import detection, healthy_run

from sharpwatch.daemon.detection.ranks import RankLosses, broken_ranks, ranks_text
from sharpwatch.daemon.detection.run_detection import RunDetection
from sharpwatch.daemon.detection.state import unpacked
from sharpwatch.daemon.detection.thresholds import USUAL, Budget, Tail, limit_of
from sharpwatch.daemon.records import Incident, Observation

STEPS, AT = 400, 301  # the step at which something happens
SCATTER = 0.1


def losses(ranks: int, steps: int = STEPS, *, seed: int = 0) -> np.ndarray:
    """Of ranks that read data of one kind: float64 [steps, ranks]."""
    return 3.0 + SCATTER * np.random.default_rng(seed).standard_normal((steps, ranks))


def observed(of_ranks: np.ndarray) -> list[Observation]:
    """A healthy run whose loss is the mean over those of its ranks."""
    run = healthy_run(len(of_ranks))
    return [
        replace(seen, loss=float(row.mean()), rank_losses=row.astype(np.float32))
        for seen, row in zip(run, of_ranks, strict=True)
    ]


def incidents_of(of_ranks: np.ndarray, made: RunDetection | None = None) -> tuple[Incident, ...]:
    made = made or detection()
    for seen in observed(of_ranks):
        made.see(seen)
    return made.incidents.all


def differing(found: tuple[Incident, ...]) -> list[Incident]:
    """Those with a rank that differs; the mean over ranks is another detector's."""
    return [each for each in found if "RankDiffers" in each.names]


@pytest.mark.parametrize("ranks", [2, 4, 64])
def test_ranks_that_are_well_say_nothing(ranks):
    assert differing(incidents_of(losses(ranks, 1500))) == []


def test_one_of_64_is_named_though_the_mean_hides_it():
    run = losses(64)
    run[AT - 1 :, 17] += 1.0  # 10 sd of its own, 0.016 of the mean's 3
    (found,) = incidents_of(run)
    assert (found.name, found.rank, found.cause, found.severity) == ("RankDiffers", 17, "data", "critical")
    assert (found.onset, found.layer_blocks) == (AT, ())
    assert found.first_step <= AT + 3
    assert found.active
    assert found.evidence[0].startswith("rank 17 of 64 differs: loss ")
    assert "above over" in found.evidence[0]


def test_a_rank_whose_loss_falls_alone_is_named_too():
    run = losses(8)
    run[AT - 1 :, 5] -= 1.0
    (found,) = incidents_of(run)
    assert (found.name, found.rank) == ("RankDiffers", 5)
    assert "below over" in found.evidence[0]


def test_of_two_ranks_the_higher_loss_is_named():
    run = losses(2)
    run[AT - 1 :, 1] += 2.0
    found = incidents_of(run)[0]
    assert (found.rank, found.cause) == (1, "data")


def test_what_lasts_is_found_though_each_sample_is_near():
    run = losses(8)
    run[AT - 1 :, 4] += 3 * SCATTER
    (found,) = differing(incidents_of(run))
    assert (found.rank, found.severity) == (4, "critical")


def test_what_was_wrong_has_not_become_normal_when_it_comes_again():
    run = losses(8, 700)
    for start in (AT - 1, AT + 199):
        run[start : start + 100, 3] += 1.0
    found = differing(incidents_of(run))
    assert [(each.rank, each.onset, each.severity) for each in found] == [
        (3, AT, "critical"),
        (3, AT + 200, "critical"),
    ]
    assert found[0].last_step < AT + 150  # nor does it last longer than it did


def test_several_that_differ_are_told_but_none_is_the_rank():
    run = losses(16)
    run[AT - 1 :, 4:6] += 1.5  # as of two tensor-parallel ranks that share a batch
    (found,) = incidents_of(run)
    assert (found.name, found.rank) == ("RankDiffers", None)
    assert found.evidence[0].startswith("ranks 4, 5 of 16 differ: ")


def test_a_spike_of_one_step_is_no_incident():
    run = losses(8)
    run[AT, 3] += 20 * SCATTER
    assert incidents_of(run) == ()


def test_a_rank_with_data_of_its_own_kind_is_normal_from_the_start():
    run = losses(8, 1000)
    run[:, 2] += 0.7
    assert incidents_of(run) == ()


def test_ranks_that_each_read_on_in_one_text_are_well():
    rng, run = np.random.default_rng(1), np.zeros((3000, 4))
    for step in range(1, len(run)):  # differences last for some ten steps
        run[step] = 0.9 * run[step - 1] + math.sqrt(1 - 0.9**2) * rng.standard_normal(4)
    assert differing(incidents_of(3.0 + SCATTER * run)) == []


def test_ranks_that_share_a_loss_do_not_differ_by_rounding():
    rng = np.random.default_rng(2)
    shared = np.repeat(losses(1, 800), 8, axis=1)
    for rounding in (0.0, 3e-7, 2.0**-7):  # none, of single precision, of bfloat16
        assert incidents_of(shared + rounding * rng.integers(-1, 2, shared.shape)) == (), rounding


def test_a_rank_without_a_loss_is_passed_over():
    run = losses(4)
    run[:, 0] = math.nan
    run[AT - 1 :, 2] += 2.0
    made = detection()
    for seen, row in zip(observed(losses(4)), run, strict=True):
        made.see(replace(seen, rank_losses=row.astype(np.float32)))
    assert [each.rank for each in made.incidents.all] == [2]


def test_any_losses_may_be_reported():
    rng, made = np.random.default_rng(3), RankLosses(5, USUAL)
    extremes = np.array([0.0, -0.0, 1e-45, -1.0, 3.4e38, -3.4e38, math.inf, math.nan], dtype=np.float32)
    for step in range(1, 400):
        made.see(step, rng.choice(extremes, 5), keep_out=bool(rng.integers(2)))
    assert not np.isnan(made._usual).any()  # which would silence it for ever


def test_stages_of_a_pipeline_of_which_one_has_a_loss_are_no_ranks_that_differ():
    run = np.full((STEPS, 4), np.nan)
    run[:, 3] = losses(1)[:, 0]
    run[AT:, 3] += 5.0
    assert RankLosses(4, USUAL).see(1, run[0], keep_out=False) == []
    made = RankLosses(4, USUAL)
    assert all(made.see(i + 1, row, keep_out=False) == [] for i, row in enumerate(run))


def test_a_loss_that_is_not_finite_on_one_rank_names_it_at_once():
    run = observed(losses(8, 7))
    broken = np.array(run[-1].rank_losses)
    broken[6] = math.inf
    made = detection()
    for seen in [*run[:-1], replace(run[-1], loss=math.nan, rank_losses=broken)]:
        made.see(seen)
    (found,) = made.incidents.all
    assert (found.name, found.rank, found.onset) == ("NonFinite", 6, 7)
    assert found.evidence == ("loss is nan, from rank 6 of 8 alone",)


def test_losses_that_are_finite_on_no_rank_name_none():
    assert broken_ranks(np.array([math.inf, math.nan, math.inf])) == ()
    assert broken_ranks(np.array([math.inf, math.nan, 3.0, math.inf])) == (0, 3)
    assert broken_ranks(None) == ()
    assert ranks_text([0, 3], 4) == "ranks 0, 3 of 4"
    assert ranks_text(range(12), 64) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 4 more of 64"


def test_a_spike_of_the_mean_that_one_rank_brings_about_names_it():
    run = losses(4)
    run[AT - 1 :, 1] += 4.0
    found = incidents_of(run)
    assert {"RankDiffers", "LossSpike"} <= {name for each in found for name in each.names}
    assert [each.rank for each in found] == [1]
    assert found[0].cause == "data"


def test_a_restarted_daemon_goes_on_as_if_it_had_never_stopped():
    run = losses(8)
    run[AT - 1 :, 3] += 0.4
    steps = observed(run)
    first, again = detection(), detection()
    for seen in steps[: AT - 5]:
        first.see(seen)
    again.load_state(first.state())
    for seen in steps[AT - 5 :]:
        first.see(seen)
        again.see(seen)
    kept, lived = unpacked(again.state()), unpacked(first.state())
    of_ranks = [name for name in lived if name.startswith("ranks.")]
    assert of_ranks
    for name in of_ranks:
        np.testing.assert_array_equal(kept[name], lived[name], err_msg=name)
    told = [
        [(each.name, each.rank, each.onset, each.first_step, each.evidence) for each in one.incidents.all]
        for one in (first, again)
    ]
    assert told[0] == told[1] != []


def test_a_state_without_ranks_and_one_of_other_ranks_begin_anew():
    alone, of_four = detection(), detection()
    for seen in healthy_run(150):
        alone.see(seen)
    for seen in observed(losses(4, 150)):
        of_four.see(seen)
    for state in (alone.state(), of_four.state()):
        made = detection()
        made.load_state(state)
        for seen in observed(losses(8, 400))[150:]:  # a new attempt on 8 ranks
            made.see(seen)
        assert made.incidents.all == ()


def test_another_attempt_learns_its_ranks_anew():
    first, second = detection(), detection()
    run = losses(4, 200)
    run[:, 1] += 2.0
    for seen in observed(run):
        first.see(seen)
    second.take_over(first)
    other = losses(4, 60)
    other[:, 2] += 2.0  # another process is rank 2 now, with what rank 1 had
    for seen in observed(other):
        second.see(replace(seen, step=seen.step + 200))
    assert [each.name for each in second.incidents.all if each.name == "RankDiffers"] == []


@pytest.mark.parametrize("ranks", [3, 4, 8, 32])
@pytest.mark.parametrize("seed", range(3))
def test_a_smaller_batch_scatters_the_losses_of_all_ranks_and_none_differs(ranks, seed):
    """By a factor of three: batches of a ninth."""
    run = losses(ranks, seed=seed)
    run[300:] = 3.0 + 3.0 * (run[300:] - 3.0)
    made = RankLosses(ranks, USUAL)
    found = [finding for i, row in enumerate(run) for finding in made.see(i + 1, row, keep_out=False)]
    assert "critical" not in {finding.severity for finding in found}
    # One that differs is found all the same.
    made = RankLosses(ranks, USUAL)
    run[360:, ranks - 1] += 12 * SCATTER
    found = [finding for i, row in enumerate(run) for finding in made.see(i + 1, row, keep_out=False)]
    assert any(finding.severity == "critical" and finding.rank == ranks - 1 for finding in found)


def test_after_a_rollback_only_new_samples_count():
    run = losses(8)
    made = RankLosses(8, USUAL)
    for i, row in enumerate(run[:300]):
        made.see(i + 1, row, keep_out=False)
    odd = run[300] + np.where(np.arange(8) == 3, 1.0, 0.0)
    made.see(301, odd, keep_out=False)
    assert made.see(200, odd, keep_out=False) == []
    assert made.see(201, run[301], keep_out=False) == []


def test_more_ranks_and_smaller_budgets_take_more():
    tail = Tail(2.8, 0.7, 1e-3)
    few, many, rare = limit_of(tail, USUAL, 2), limit_of(tail, USUAL, 2000), limit_of(tail, Budget(1e-3, 1e-2), 2)
    assert few[0] < many[0]
    assert few[0] < rare[0]
    assert few[1] < many[1]
    assert few[1] < rare[1]
    assert few[0] < few[1]
