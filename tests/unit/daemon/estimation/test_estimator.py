"""Batches stay within their bytes, a window that fails harms no other, and no run can fill the queue."""

from __future__ import annotations

import asyncio
import math
from contextlib import closing

import numpy as np
import pytest
from hellos import run_hello
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpwatch.daemon.estimation import estimator, gnb
from sharpwatch.daemon.estimation.estimator import (
    BATCH_BYTES,
    PROBES,
    EstimationQueue,
    Estimator,
    batches,
    estimate_all,
    one_turn,
)
from sharpwatch.daemon.estimation.windows import EstimateRequest, Windows
from sharpwatch.daemon.ingest.probes import (
    DirectionReading,
    GnbReading,
    HutchinsonReading,
    LanczosReading,
    LineSearchReading,
    PreconditionedReading,
)

HUGE = (1e200, -1e200, 1.7e308, -1.7e308)


def gnb_window(hello, draws, seed, *, sketched=True):
    """A window with so many draws in each probe; a direction of its own is the sharpest."""
    random = np.random.default_rng(seed)
    blocks, size = len(hello.blocks), hello.sketch_size
    along = random.normal(size=(blocks, size)) / math.sqrt(size)
    readings = []
    for count in draws:
        sketches = random.normal(size=(count, blocks, 1)) * along + 0.02 * random.normal(size=(count, blocks, size))
        traces = random.chisquare(4, (count, len(hello.layer_blocks)))
        readings.append(GnbReading(8, traces, sketches.astype("f4") if sketched else None))
    return tuple(enumerate(readings, 1))


def request_of(name: str, layers: int = 2, size: int = 64, **windows) -> EstimateRequest:
    rows = {("emb", ""): 64} | {("qk", str(index)): 8 for index in range(layers - 1)}
    hello = run_hello(rows, run=name, sketch_size=size)
    made = {probe: make(hello) if callable(make) else make for probe, make in windows.items()}
    return EstimateRequest(hello, made)


def parts(found) -> list[list[tuple[str, str]]]:
    return [[part.name for part in batch] for batch in found]


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(1, 6), min_size=1, max_size=8)), min_size=1, max_size=6)
)
def test_estimates_of_a_batch_are_those_of_each_run_alone(runs):
    requests = [
        request_of(f"r{n}", layers, gnb=lambda hello, draws=draws, n=n: gnb_window(hello, draws, n))
        for n, (layers, draws) in enumerate(runs)
    ]
    seen = set()
    for batch in batches(requests):
        together = estimate_all([part.request for part in batch], "cpu")
        for part, found in zip(batch, together, strict=True):
            (alone,) = estimate_all([requests[part.number]], "cpu")
            seen.add(part.number)
            assert found.values.keys() == alone.values.keys()
            for key, one in found.values.items():
                # Sketches are float32; the top of a few draws moves by more than their rounding.
                want = alone.values[key]
                assert (one.value, one.stderr) == pytest.approx((want.value, want.stderr), rel=1e-4, nan_ok=True)
            for one, want in zip(found.layer_sharpness, alone.layer_sharpness, strict=True):
                assert (one.value, one.stderr) == pytest.approx((want.value, want.stderr), rel=1e-12, nan_ok=True)
    assert seen == set(range(len(runs)))


def test_windows_of_other_draws_are_another_batch_and_none_is_padded_to_the_widest():
    wide = [request_of(f"wide{n}", gnb=lambda hello: gnb_window(hello, [64] * 8, 0)) for n in range(3)]
    narrow = [
        request_of(f"narrow{n}", 2_000, gnb=lambda hello: gnb_window(hello, [2] * 8, 0, sketched=False))
        for n in range(100)
    ]
    found = batches([*wide, *narrow])
    shapes = []
    for batch in found:
        shape = PROBES["gnb"].shape(batch[0].request)
        for part in batch[1:]:
            shape = shape.joined(PROBES["gnb"].shape(part.request))
        shapes.append(shape)
    # In one batch they would be [200_211, 8, 64] in float64, which is 820 MB.
    assert {(shape.draws, shape.sketches > 0) for shape in shapes} == {(2, False), (64, True)}
    assert sum(shape.nbytes for shape in shapes) < 60e6
    assert max(shape.nbytes for shape in shapes) <= BATCH_BYTES
    assert sorted(name for batch in parts(found) for name, _ in batch) == sorted(
        one.hello.run for one in (*wide, *narrow)
    )
    sizes = [shape.nbytes for shape in shapes]
    assert sizes == sorted(sizes)  # nobody waits for a larger one


def test_a_shape_is_that_of_the_tensors_that_torch_is_given(monkeypatch):
    taken = []

    def traces(values, mask):
        taken.append(values.nbytes)
        return trace_estimates(values, mask)

    def tops(sketches, mask):
        rows = sketches.flatten(1, 2)
        taken.append(sketches.nbytes + (rows @ rows.mT).double().nbytes)
        return top_eigenvalues(sketches, mask)

    trace_estimates, top_eigenvalues = gnb.trace_estimates, gnb.top_eigenvalues
    monkeypatch.setattr(gnb, "trace_estimates", traces)
    monkeypatch.setattr(gnb, "top_eigenvalues", tops)
    requests = [
        request_of(f"r{n}", layers, gnb=lambda hello, n=n: gnb_window(hello, [6] * (n + 2), n))
        for n, layers in enumerate((2, 7, 3))
    ]
    (batch,) = batches(requests)
    estimate_all([part.request for part in batch], "cpu")
    shape = PROBES["gnb"].shape(requests[0]).joined(PROBES["gnb"].shape(requests[1]))
    assert sum(taken) == shape.joined(PROBES["gnb"].shape(requests[2])).nbytes


def test_a_batch_holds_as_much_as_its_bytes_allow(monkeypatch):
    requests = [request_of(f"r{n}", gnb=lambda hello: gnb_window(hello, [4] * 8, 0)) for n in range(10)]
    one = PROBES["gnb"].shape(requests[0]).nbytes
    # What torch is given, to the byte: traces in float64, sketches in float32, and their Gram matrices in float64.
    assert one == 8 * 4 * (4 * 8 + 3 * (64 * 4 + 8 * 4 * 8))
    monkeypatch.setattr(estimator, "BATCH_BYTES", 3 * one + 1)
    assert [len(batch) for batch in batches(requests)] == [1, 3, 3, 3]
    monkeypatch.setattr(estimator, "BATCH_BYTES", 1)
    assert [len(batch) for batch in batches(requests)] == [1] * 10


async def test_a_window_that_fails_is_alone_in_the_end_and_the_others_have_their_estimates(monkeypatch):
    calls = []

    def failing(requests, device):
        calls.append([request.hello.run for request in requests])
        if any(request.hello.run in {"r3", "r6"} for request in requests):
            raise ZeroDivisionError
        return estimate_all(requests, device)

    monkeypatch.setattr(estimator, "estimate_all", failing)
    requests = [request_of(f"r{n}", gnb=lambda hello, n=n: gnb_window(hello, [4] * 4, n)) for n in range(8)]
    with closing(Estimator("cpu")) as worker:
        found = {request.hello.run: one async for request, one in worker.estimate(requests)}
        assert set(found) == {f"r{n}" for n in range(8)}
        for number, request in enumerate(requests):
            of_run = found[f"r{number}"]
            if number in {3, 6}:
                assert (of_run.values, set(of_run.failures)) == ({}, {"gnb"})
                assert isinstance(of_run.failures["gnb"], ZeroDivisionError)
            else:
                (alone,) = estimate_all([request], "cpu")
                assert not of_run.failures
                assert of_run.values.keys() == alone.values.keys()
        # From then on those two are alone, and the others are one batch that does not fail.
        calls.clear()
        async for _ in worker.estimate(requests):
            pass
        assert sorted(calls, key=len) == [["r3"], ["r6"], [f"r{n}" for n in (0, 1, 2, 4, 5, 7)]]
        monkeypatch.setattr(estimator, "estimate_all", estimate_all)
        healed = {request.hello.run: one async for request, one in worker.estimate(requests)}
        assert not any(one.failures for one in healed.values())
        calls.clear()
        monkeypatch.setattr(estimator, "estimate_all", lambda *of: calls.append(len(of[0])) or estimate_all(*of))
        async for _ in worker.estimate(requests):
            pass
        assert calls == [8]


async def test_one_probe_that_fails_leaves_the_runs_others(monkeypatch):
    def failing(requests, device):
        if "direction" in requests[0].windows:
            raise ZeroDivisionError
        return estimate_all(requests, device)

    monkeypatch.setattr(estimator, "estimate_all", failing)
    direction = ((1, DirectionReading(8, 1.0, 1.0, *[np.ones(2)] * 3)),)
    request = request_of("run", gnb=lambda hello: gnb_window(hello, [4] * 4, 0), direction=direction)
    with closing(Estimator("cpu")) as worker:
        ((of, found),) = [each async for each in worker.estimate([request])]
    assert of is request
    assert set(found.failures) == {"direction"}
    assert {key[2] for key in found.values} >= {"gnb"}


def test_of_heavy_runs_one_at_a_time_has_its_turn():
    heavy = [request_of(f"heavy{n}", gnb=lambda hello: gnb_window(hello, [64] * 8, 0)) for n in range(3)]
    light = [request_of(f"light{n}", gnb=lambda hello: gnb_window(hello, [4] * 8, 0)) for n in range(3)]
    now, later = one_turn([light[0], *heavy, *light[1:]])
    assert [one.hello.run for one in now] == ["light0", "heavy0", "light1", "light2"]
    assert later == heavy[1:]
    assert one_turn(later) == ([heavy[1]], [heavy[2]])
    assert one_turn(light) == (light, [])


async def test_a_light_run_is_done_before_a_heavy_one():
    heavy = request_of("heavy", gnb=lambda hello: gnb_window(hello, [64] * 8, 0))
    light = request_of("light", gnb=lambda hello: gnb_window(hello, [2] * 4, 0))
    with closing(Estimator("cpu")) as worker:
        assert [of.hello.run async for of, _ in worker.estimate([heavy, light])] == ["light", "heavy"]


@pytest.mark.parametrize("huge", HUGE)
def test_numbers_that_have_no_square_give_no_estimate_and_no_error(huge):
    two = np.array([1.0, huge])
    readings = {
        "direction": [
            DirectionReading(8, 1.0, curvature, np.ones(2), two, np.ones(2), "", two)
            for curvature in (huge, -huge, huge)
        ],
        "hutchinson": [HutchinsonReading(8, "emb", np.array([huge, -huge]), "") for _ in range(5)],
        "lanczos": [LanczosReading(8, "", top, 0.1, -abs(huge), 0.1, "") for top in (huge, -huge, huge)],
        "linesearch": [
            LineSearchReading(8, abs(huge) / scale, abs(huge), np.abs(two), np.abs(two)) for scale in (1, 3, 1)
        ],
        "preconditioned": [PreconditionedReading(8, ratio, 0.1, "") for ratio in (huge, -huge, huge)],
        "gnb": [GnbReading(8, np.full((2, 2), abs(huge)) * [[1.0], [0.5]], None) for _ in range(5)],
    }
    windows = {probe: tuple(enumerate(each)) for probe, each in readings.items()}
    (found,) = estimate_all([request_of("run", **windows)], "cpu")
    for key, one in found.values.items():
        assert math.isfinite(one.value), key
        assert math.isfinite(one.stderr), key
    # A float holds the differences of some of them, though not their squares.
    assert (("top_eigenvalue", "", "lanczos") in found.values) == (abs(huge) < 1e300)


def test_a_spread_that_a_float_holds_is_not_lost_to_its_square():
    window = tuple(
        (step, LanczosReading(8, "", 1e200 * top, 0.1, -1.0, 0.1, "")) for step, top in enumerate((1.0, 3.0, 2.0))
    )
    (found,) = estimate_all([request_of("run", lanczos=window)], "cpu")
    # By hand: the mean of the squared differences 4 and 1, halved.
    assert found.values["top_eigenvalue", "", "lanczos"].stderr == pytest.approx(1e200 * math.sqrt(5 / 4))


# Windows


HELLO = run_hello({("emb", ""): 64, ("qk", "0"): 8})


def traces(draws: int, layers: int = 2) -> GnbReading:
    return GnbReading(8, np.ones((draws, layers)), None)


def test_a_window_that_is_too_large_loses_its_oldest_readings():
    windows = Windows(PROBES, 100_000)
    windows.append("lanczos", 1, LanczosReading(8, "", 1.0, 0.1, -1.0, 0.1, ""))
    for step in range(1, 9):
        windows.append("gnb", step, traces(20, 100))  # 16 kB, and 512 bytes more
    request = windows.request(HELLO)
    assert [step for step, _ in request.windows["gnb"]] == [3, 4, 5, 6, 7, 8]
    assert [step for step, _ in request.windows["lanczos"]] == [1]
    assert windows.cut == {"gnb": 2}
    assert windows.nbytes <= 100_000
    # One wide probe makes all of the window as wide as it is.
    windows.append("gnb", 9, traces(60, 100))
    assert [step for step, _ in windows.request(HELLO).windows["gnb"]] == [8, 9]
    assert windows.cut == {"gnb": 7}
    # One that is too large by itself is a window, and the rest of the run's windows stay.
    windows.append("gnb", 10, traces(64, 1_000))
    request = windows.request(HELLO)
    assert {probe: [step for step, _ in window] for probe, window in request.windows.items()} == {
        "lanczos": [1],
        "gnb": [10],
    }
    windows.append("gnb", 11, traces(20, 100))
    assert [step for step, _ in windows.request(HELLO).windows["gnb"]] == [11]
    # All runs together may have no room for it.
    while windows.nbytes:
        windows.drop_oldest()
    assert windows.request(HELLO).windows == {}


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["gnb", "lanczos"]), st.integers(1, 64)), max_size=60))
def test_windows_never_take_more_than_their_limit_and_keep_the_newest(readings):
    windows, sent = Windows(PROBES, 50_000), {"gnb": [], "lanczos": []}
    for step, (probe, draws) in enumerate(readings):
        is_gnb = probe == "gnb"
        windows.append(probe, step, traces(draws, 30) if is_gnb else LanczosReading(8, "", 1.0, 0.1, -1.0, 0.1, ""))
        sent[probe].append(step)
        assert windows.nbytes <= 50_000
    held = windows.request(HELLO).windows
    for probe, steps in sent.items():
        kept = [step for step, _ in held.get(probe, ())]
        assert kept == steps[len(steps) - len(kept) :]
        assert windows.cut[probe] >= 0
    sizes = [len(held[probe]) * max(_bytes(one) for _, one in held[probe]) for probe in held]
    assert windows.nbytes == sum(sizes)


def _bytes(reading) -> int:
    return 512 + (reading.traces.nbytes if isinstance(reading, GnbReading) else 0)


def test_a_request_names_the_steps_that_no_earlier_one_had():
    windows = Windows(PROBES, 100_000)
    for step in range(1, 4):
        windows.append("gnb", step, traces(2))
    windows.append("lanczos", 4, LanczosReading(8, "", 1.0, 0.1, -1.0, 0.1, ""))
    assert windows.request(HELLO, {"gnb"}).new_steps == {1, 2, 3}
    windows.note_taken(windows.request(HELLO, {"gnb"}))
    assert windows.request(HELLO, {"gnb"}).new_steps == frozenset()
    for step in range(5, 15):
        windows.append("gnb", step, traces(2))
    assert windows.request(HELLO).new_steps == {4, *range(7, 15)}  # 5 and 6 have left the window


# The queue


class Slow:
    """An estimator that waits for a signal to go on."""

    def __init__(self) -> None:
        self.left: list[set[str]] = []  # after each batch
        self.batches: list[dict[str, tuple[set[str], list[float]]]] = []
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()

    async def __call__(self, batch) -> set[str]:
        self.batches.append({name: (waiting.probes, waiting.received_at) for name, waiting in batch.items()})
        self.begun.set()
        await self.go_on.wait()
        return self.left.pop(0) if self.left else set()


async def test_what_comes_in_meanwhile_is_the_next_batch_in_its_order():
    slow = Slow()
    queue = EstimationQueue(slow)
    queue.put("a", ["gnb"], 1.0)
    await slow.begun.wait()
    for at, name in enumerate(("b", "c", "d"), 2):
        queue.put(name, ["gnb"], float(at))
    slow.go_on.set()
    await queue.settled()
    assert slow.batches == [
        {"a": ({"gnb"}, [1.0])},
        {"b": ({"gnb"}, [2.0]), "c": ({"gnb"}, [3.0]), "d": ({"gnb"}, [4.0])},
    ]
    queue.put("a", ["gnb"], 5.0)
    await queue.settled()
    assert slow.batches[2:] == [{"a": ({"gnb"}, [5.0])}]


async def test_a_run_that_floods_the_queue_is_in_it_once_with_all_its_probes():
    slow = Slow()
    queue = EstimationQueue(slow)
    queue.put("flood", ["gnb"], 0.0)
    await slow.begun.wait()
    for number in range(1, 1_000):
        queue.put("flood", ["gnb" if number % 2 else "direction"], float(number))
    queue.put("quiet", ["gnb"], 1_000.0)
    slow.go_on.set()
    await queue.settled()
    times = [float(number) for number in range(1, 1_000)]
    assert slow.batches[1:] == [{"flood": ({"gnb", "direction"}, times), "quiet": ({"gnb"}, [1_000.0])}]


async def test_a_run_whose_turn_is_still_to_come_waits_on_before_those_that_came_later():
    slow = Slow()
    slow.left = [{"b", "c"}, {"c"}]
    queue = EstimationQueue(slow)
    for name in ("a", "b", "c"):
        queue.put(name, ["gnb"], 1.0)
    await slow.begun.wait()
    for name in ("d", "c"):
        queue.put(name, ["direction"], 2.0)
    slow.go_on.set()
    await queue.settled()
    c = ({"gnb", "direction"}, [1.0, 2.0])
    assert slow.batches[1:] == [{"b": ({"gnb"}, [1.0]), "c": c, "d": ({"direction"}, [2.0])}, {"c": c}]
    assert [list(batch) for batch in slow.batches[1:]] == [["b", "c", "d"], ["c"]]


async def test_who_gives_up_waiting_does_not_end_the_estimates():
    slow = Slow()
    queue = EstimationQueue(slow)
    queue.put("a", ["gnb"], 0.0)
    await slow.begun.wait()
    waiting = asyncio.create_task(queue.settled())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait((waiting,))
    slow.go_on.set()
    await queue.settled()
