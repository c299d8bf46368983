"""What the windows of probes of a run, and of all runs, may take."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from sharpwatch import wire
from sharpwatch.daemon.decisions.run_controller import RunController
from sharpwatch.daemon.ingest.hello import Attempt, RunHello, read_hello
from sharpwatch.daemon.ingest.samples import read_sample
from sharpwatch.daemon.runs.run import Run, Runs
from sharpwatch.v1 import agent_pb2, types_pb2

LAYERS = 4_000


def begin(runs: Runs, name: str, layers: int = LAYERS) -> Run:
    hello = agent_pb2.Hello(
        protocol=wire.PROTOCOL,
        training_job="job",
        run=name,
        attempt=name,
        layer_blocks=[types_pb2.LayerBlock(block="emb", layer=str(n), parameters=8) for n in range(layers)],
        blocks=["emb"],
        control="none",
        min_multiplier=1,
        max_multiplier=1,
        sketch_size=64,
    )
    return runs.begin(Attempt(read_hello(hello), hello.SerializeToString()), 0.0)


def controller(hello: RunHello, _: RunController | None) -> RunController:
    return RunController(hello.run, layer_blocks=hello.layer_blocks, parameters=hello.parameters, policies=())


def fold(run: Run, message: agent_pb2.Sample) -> None:
    """As it comes from the wire."""
    run.update(read_sample(run.attempt.hello, agent_pb2.Sample.FromString(message.SerializeToString())), 0.0, 0.0)


def held(fill: Callable[[int], agent_pb2.Sample], count: int, **limits: int) -> tuple[int, Run]:
    """Bytes that Python holds more once so many messages are folded, and the run that they are of."""
    run = begin(Runs(controller, **limits), "run")
    tracemalloc.start()
    for step in range(1, count + 1):
        fold(run, fill(step))
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return taken, run


def gnb(step: int, draws: int = 16, layers: int = LAYERS) -> agent_pb2.Sample:
    probe = agent_pb2.GnbProbe(tokens=8, traces=wire.encode(np.full((draws, layers), float(step)), "float64"))
    return agent_pb2.Sample(sequence=step, step=step, gnb=probe)


def hutchinson(step: int) -> agent_pb2.Sample:
    traces = wire.encode(np.full((16, LAYERS), float(step)), "float64")
    probe = agent_pb2.HutchinsonProbe(tokens=8, block="emb", traces=traces)
    return agent_pb2.Sample(sequence=step, step=step, hutchinson=probe)


def test_windows_take_what_they_say_and_no_more_than_they_may():
    taken, run = held(gnb, 6)
    assert run.windows.nbytes == pytest.approx(6 * 512_000, rel=0.01)
    assert taken == pytest.approx(run.windows.nbytes, rel=0.05)  # nothing of a message is held but its arrays
    taken, run = held(gnb, 30, run_window_bytes=2**21)
    assert run.windows.nbytes <= 2**21
    assert taken < 1.05 * 2**21
    assert run.windows.cut["gnb"] == 30 - 4


def test_a_window_of_hutchinson_probes_holds_their_sums_alone():
    taken, run = held(hutchinson, 56)  # 29 MB of messages
    assert len(run.request().windows["hutchinson"]) == 56
    assert taken < 200_000


def test_all_windows_together_stay_within_their_limit_and_the_largest_pays():
    cut: list[str] = []
    runs = Runs(controller, window_bytes=100_000, on_cut=cut.append)
    small, large = begin(runs, "small", 10), begin(runs, "large", 300)
    for step in range(1, 9):
        fold(small, gnb(step, 4, 10))
        fold(large, gnb(step, 8, 300))
    before = small.windows.nbytes
    assert before + large.windows.nbytes > 100_000
    runs.limit_windows()
    assert small.windows.nbytes == before
    assert not small.windows.cut
    assert 80_000 < small.windows.nbytes + large.windows.nbytes <= 100_000
    assert cut == ["gnb"] * large.windows.cut["gnb"]
    kept = [step for step, _ in large.request().windows["gnb"]]
    assert kept == list(range(9 - len(kept), 9))
