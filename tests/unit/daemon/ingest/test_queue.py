"""The bounded queue: order, bounds, and who loses."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sharpwatch.daemon.ingest.hello import RunHello
from sharpwatch.daemon.ingest.queue import QueuedSample, SampleQueue
from sharpwatch.daemon.ingest.samples import Reading
from sharpwatch.daemon.runs.runs import Attempt


def entry(run: str, sequence: int, size: int = 10) -> QueuedSample:
    manifest = RunHello(
        training_job="job",
        run=run,
        attempt=f"{run}-1",
        layer_blocks=(("emb", ""),),
        parameters=np.array([1]),
        block_of=np.array([0]),
        blocks=("emb",),
        optimizer="",
        control="none",
        can_roll_back=False,
        lr_bounds=(1, 1),
        initial_step=0,
        seed=0,
        sketch_size=0,
        host="",
        agent_version="",
    )
    reading = Reading(
        sequence, sequence, 0.0, None, None, {}, None, (), (), closing=False, restored=False, dropped_probes=()
    )
    return QueuedSample(Attempt(manifest, b""), reading, b"x" * size, 0.0)


def named(entries) -> list[tuple[str, int]]:
    return [(one.run, one.reading.sequence) for one in entries]


def test_the_busiest_run_loses_its_oldest():
    lost = []
    intake = SampleQueue(4, 10_000, lost.append)
    for run, sequence in (("quiet", 1), ("busy", 1), ("busy", 2), ("busy", 3), ("quiet", 2)):
        intake.put(entry(run, sequence))
    assert named(lost) == [("busy", 1)]
    assert intake.depth == 4


def test_large_samples_are_bounded_by_their_bytes():
    lost = []
    intake = SampleQueue(100, 1_000, lost.append)
    for sequence in range(1, 6):
        intake.put(entry("small", sequence))
    intake.put(entry("large", 1, 600))
    intake.put(entry("large", 2, 600))
    assert named(lost) == [("large", 1)]


def test_what_is_put_back_goes_ahead_of_what_came_since():
    lost = []
    intake = SampleQueue(3, 10_000, lost.append)
    intake.put(entry("run", 1))
    intake.put(entry("run", 2))
    taken = intake.take()
    assert intake.depth == 0
    intake.put(entry("run", 3))
    intake.put(entry("run", 4))
    intake.put_back(taken)
    assert named(lost) == [("run", 1)]
    assert named(intake.take()) == [("run", 2), ("run", 3), ("run", 4)]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 400)), max_size=60))
def test_nothing_is_lost_uncounted_and_no_bound_is_passed(samples):
    lost: list[QueuedSample] = []
    intake = SampleQueue(8, 1_500, lost.append)
    put = [entry(run, sequence, size) for sequence, (run, size) in enumerate(samples, 1)]
    for one in put:
        intake.put(one)
        assert intake.depth <= 8
    held = intake.take()
    assert sum(len(one.payload) for one in held) <= 1_500
    assert sorted(named(lost) + named(held)) == sorted(named(put))
    for run in "abc":
        sequences = [one.reading.sequence for one in held if one.run == run]
        assert sequences == sorted(sequences)
