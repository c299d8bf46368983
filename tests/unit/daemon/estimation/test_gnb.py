"""Estimates of several runs in one batch against each run's numbers computed plainly."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch

from sharpwatch.daemon.estimation import estimator
from sharpwatch.daemon.estimation.estimator import estimate_all, resolve_device
from sharpwatch.daemon.estimation.gnb import order_correlation
from sharpwatch.daemon.estimation.hessian import ObservedStability, observed_stability
from sharpwatch.daemon.estimation.windows import EstimateRequest, Estimates
from sharpwatch.daemon.ingest.hello import RunHello
from sharpwatch.daemon.ingest.probes import DirectionReading, GnbReading
from sharpwatch.errors import SharpwatchError

NAN = math.nan


def hello(layers, blocks, parameters, size=64) -> RunHello:
    return RunHello(
        training_job="job",
        run="run",
        attempt="a",
        layer_blocks=tuple(layers),
        parameters=np.array(parameters),
        block_of=np.array([blocks.index(block) for block, _ in layers]),
        blocks=blocks,
        optimizer="",
        control="none",
        can_roll_back=False,
        lr_bounds=(1, 1),
        takes_update_intervals=True,
        initial_step=0,
        seed=0,
        sketch_size=size,
        host="",
        agent_version="",
    )


SMALL = hello((("emb", ""), ("norm", "0")), ("emb", "norm"), (64, 8))
LARGE = hello((("emb", ""), ("qk", "0"), ("qk", "1"), ("norm", "0")), ("emb", "qk", "norm"), (64, 32, 32, 16), size=128)


def windows(of: RunHello, draws: list[int], seed: int) -> tuple[tuple[int, GnbReading], ...]:
    random = np.random.default_rng(seed)
    rows, blocks, size = len(of.layer_blocks), len(of.blocks), of.sketch_size
    return tuple(
        (
            step,
            GnbReading(8, random.chisquare(4, (count, rows)), random.normal(size=(count, blocks, size)).astype("f4")),
        )
        for step, count in enumerate(draws, 1)
    )


def direction(curvature, descent, block_curvature, block_descent) -> DirectionReading:
    blocks = len(block_descent)
    return DirectionReading(
        8, descent, curvature, np.array(block_descent), np.array(block_curvature), np.full(blocks, 0.01)
    )


def request_of(of: RunHello, gnb=(), direction=()) -> EstimateRequest:
    given = {"gnb": gnb, "direction": direction}
    return EstimateRequest(of, {probe: window for probe, window in given.items() if window})


def test_a_batch_of_unlike_runs_gives_each_its_own_mean_and_error():
    requests = [
        request_of(SMALL, windows(SMALL, [2, 2, 2, 2, 2], 0), ()),
        request_of(LARGE, windows(LARGE, [4, 1, 3, 2, 4, 4], 1), ()),
        request_of(SMALL, (), ()),
    ]
    small, large, none = estimate_all(requests, "cpu")
    assert none.values == {}
    for request, found in ((requests[0], small), (requests[1], large)):
        of = request.hello
        for index, block in enumerate(of.blocks):
            rows = of.block_of == index
            probes = np.array([probe.traces[:, rows].sum(1).mean() for _, probe in request.windows["gnb"]])
            trace = found.values["trace", block, "gnb"]
            assert trace.value == pytest.approx(probes.mean(), rel=1e-12)
            assert trace.stderr == pytest.approx(probes.std(ddof=1) / math.sqrt(len(probes)), rel=1e-6)
            assert (trace.draws, trace.step) == (
                sum(len(p.traces) for _, p in request.windows["gnb"]),
                len(request.windows["gnb"]),
            )
            sharpness = found.values["sharpness", block, "gnb"]
            assert sharpness.value * of.block_parameters[index] == pytest.approx(trace.value)
        for index, layer in enumerate(found.layer_sharpness):
            probes = np.array([probe.traces[:, index].mean() for _, probe in request.windows["gnb"]])
            assert layer.value == pytest.approx(probes.mean() / of.parameters[index], rel=1e-12)


def test_the_whole_models_top_is_that_of_the_summed_sketches():
    """One direction shared by all blocks: the whole model's eigenvalue is the sum of theirs, no largest one."""
    random = np.random.default_rng(3)
    shared = random.normal(size=64) / 8
    probes = []
    for step in range(8):
        along = random.normal(size=4)
        sketches = np.stack([along[:, None] * 3 * shared, along[:, None] * 4 * shared], axis=1)
        probes.append((step, GnbReading(8, np.square(sketches).sum(-1), sketches.astype("f4"))))
    (found,) = estimate_all([request_of(SMALL, tuple(probes), ())], "cpu")
    tops = {block: one for (quantity, block, _), one in found.values.items() if quantity == "top_eigenvalue"}
    # Projections of a sketch on itself, of 32 normal draws: (3 + 4)^2 in all, within 4 of the claimed errors.
    for block, root in (("emb", 3), ("norm", 4), ("", 7)):
        assert abs(tops[block].value - root**2) < 4 * tops[block].stderr
    assert tops[""].value > tops["emb"].value + tops["norm"].value


def sharp_windows(of: RunHello, probes: int, seed: int, *, gradients: bool) -> tuple[tuple[int, GnbReading], ...]:
    """Each block sharp along one direction of its own, the gradient along it too."""
    random = np.random.default_rng(seed)
    blocks, size = len(of.blocks), of.sketch_size
    directions = random.normal(size=(blocks, size)) / math.sqrt(size)
    found = []
    for step in range(probes):
        draws = random.normal(size=(4, blocks, 1)) * directions + 0.2 * random.normal(size=(4, blocks, size)) / 8
        along = (directions + 0.1 * random.normal(size=directions.shape) / 8).astype("f4") if gradients else None
        traces = np.ones((4, len(of.layer_blocks)))
        found.append((step, GnbReading(8, traces, draws.astype("f4"), along)))
    return tuple(found)


def test_sketch_estimates_are_each_windows_own_however_many_are_batched():
    requests = [
        request_of(SMALL, sharp_windows(SMALL, 8, 5, gradients=True), ()),
        request_of(LARGE, sharp_windows(LARGE, 8, 6, gradients=True), ()),
        request_of(SMALL, sharp_windows(SMALL, 6, 7, gradients=False), ()),
    ]
    batched = estimate_all(requests, "cpu")
    for request, found in zip(requests, batched, strict=True):
        (alone,) = estimate_all([request], "cpu")
        assert found.values.keys() == alone.values.keys()
        for key, one in found.values.items():
            assert (one.value, one.stderr) == pytest.approx((alone.values[key].value, alone.values[key].stderr), 1e-4)
    quantities = {(quantity, block) for quantity, block, _ in batched[0].values}
    wanted = {"top_eigenvalue", "effective_rank", "drift", "alignment"}
    assert quantities >= {(quantity, block) for quantity in wanted for block in ("emb", "norm", "")}
    # Six probes are no two halves of four, and without gradients nothing is aligned.
    assert {quantity for quantity, _, _ in batched[2].values} & {"drift", "alignment"} == set()
    assert ("effective_rank", "emb", "gnb") in batched[2].values


def test_the_keys_hold_what_their_names_say():
    (found,) = estimate_all([request_of(SMALL, sharp_windows(SMALL, 8, 8, gradients=True), ())], "cpu")
    rank, drift, alignment = (
        found.values[quantity, "emb", "gnb"] for quantity in ("effective_rank", "drift", "alignment")
    )
    # One direction, and 0.04 of the trace spread over the rest: rank 1.08; aligned but for the gradient's noise of 1 %.
    assert abs(rank.value - 1.08) < 4 * rank.stderr
    assert abs(drift.value) < 4 * drift.stderr < 0.2
    assert abs(alignment.value - 0.99) < 4 * alignment.stderr < 0.4
    assert (rank.draws, rank.step, rank.estimator) == (32, 7, "gnb")


def test_what_has_no_error_yet_is_not_shown():
    (found,) = estimate_all(
        [request_of(SMALL, windows(SMALL, [1], 0), ((1, direction(1, 1, [1, NAN], [1, 1])),))], "cpu"
    )
    assert found.values == {}


def test_curvature_shares_divide_sums_and_need_a_curvature_above_zero():
    parts = ([0.25, 0.75], [1.5, 1.5], [-1.0, -3.0])
    window = [
        (step, replace(direction(sum(each), 1.0, [NAN, NAN], [1.0, 1.0]), curvature_parts=np.array(each)))
        for step, each in enumerate(parts, 1)
    ]
    (older,) = estimate_all([request_of(SMALL, (), ((1, direction(1, 1, [NAN, NAN], [1, 1])), *window[:2]))], "cpu")
    shares = {block: older.values["curvature_share", block, "direction"] for block in SMALL.blocks}
    assert {block: one.value for block, one in shares.items()} == pytest.approx({"emb": 1.75 / 4, "norm": 2.25 / 4})
    # By hand: residuals 0.25 - 1.75/4 and 1.5 - 3 * 1.75/4, so that n/(n-1) times their squares is 2 * 2 * 0.1875².
    assert [one.stderr for one in shares.values()] == pytest.approx([0.375 / 4, 0.375 / 4])
    assert shares["emb"].draws == 2
    (concave,) = estimate_all([request_of(SMALL, (), window)], "cpu")
    assert not any(quantity == "curvature_share" for quantity, _, _ in concave.values)


def test_the_stability_ratio_divides_sums_and_says_where_there_is_no_descent():
    readings = (direction(1.0, 1.0, [NAN, 0.5], [0.1, 1.0]), direction(3.0, 1.0, [0.2, 1.5], [0.2, 1.0]))
    (found,) = estimate_all([request_of(SMALL, (), ((1, readings[0]), (5, readings[1])))], "cpu")
    assert found.values["stability_ratio", "", "direction"].value == pytest.approx(4 / (2 * 2))
    assert found.values["stability_ratio", "", "direction"].step == 5
    assert found.values["stability_ratio", "norm", "direction"].value == pytest.approx(2 / (2 * 2))
    assert ("stability_ratio", "emb", "direction") not in found.values  # one probe has no scatter

    seen = observed_stability(SMALL.blocks, 5, readings[1])
    assert seen.whole.value == pytest.approx(1.5)
    assert seen.blocks["emb"].value == pytest.approx(0.5)
    uphill = observed_stability(SMALL.blocks, 5, direction(1.0, -1.0, [NAN, 1.0], [0.1, 1.0]))
    assert uphill.no_descent
    assert uphill.whole is None
    assert list(uphill.blocks) == ["norm"]
    assert not ObservedStability().no_descent


def test_order_correlation_is_spearmans():
    rising = {"emb": 1, "qk": 2, "ffn": 3, "vo": 4, "norm": 5, "head": 0, "other": 99}
    assert order_correlation(rising) == 1.0
    assert order_correlation({block: -value for block, value in rising.items()}) == -1.0
    assert order_correlation(rising | {"qk": 3.5}) == pytest.approx(0.9)  # one swap of five: 1 - 6*2/(5*24)
    assert order_correlation({"emb": 1, "qk": 2}) is None
    assert order_correlation({"emb": 1, "qk": 2, "norm": NAN}) is None


async def test_the_estimators_thread_works_alone(monkeypatch):
    before = torch.get_num_threads()
    seen = []

    def estimate_all(requests, _):
        seen.append(torch.get_num_threads())
        return [Estimates() for _ in requests]

    monkeypatch.setattr(estimator, "estimate_all", estimate_all)
    torch.set_num_threads(2)
    with closing(estimator.Estimator("cpu")) as worker:
        assert [one async for _, one in worker.estimate([request_of(SMALL, windows(SMALL, [1], 0))])] == [Estimates()]
    assert seen == [1]
    torch.set_num_threads(before)


def test_a_device_that_is_not_there_is_refused_at_start():
    assert resolve_device("auto") in {"cpu", "cuda"}
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(SharpwatchError, match="device 'cuda:99'"):
        resolve_device("cuda:99")
