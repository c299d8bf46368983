"""The cursor of an attempt, and the bounded queue: order, bounds, and who loses."""

from __future__ import annotations

import asyncio
import tracemalloc
from dataclasses import replace

import pytest
from hellos import run_hello
from hypothesis import given
from hypothesis import strategies as st

from sharpwatch.daemon.ingest.hello import Attempt, Cursor
from sharpwatch.daemon.ingest.samples import (
    RUN_UNFOLDED,
    TURN_BYTES,
    TURN_SAMPLES,
    QueuedSample,
    Reading,
    SampleQueue,
)
from sharpwatch.daemon.records import Checkpoint, OptimizerGroup
from sharpwatch.errors import WireError


def entry(run: str, sequence: int, size: int = 10) -> QueuedSample:
    hello = run_hello({("emb", ""): 1}, run=run, attempt=f"{run}-1")
    reading = Reading(
        sequence, sequence, 0.0, None, None, {}, None, (), (), closing=False, restored=False, dropped_probes=()
    )
    return QueuedSample(run, Attempt(hello, b""), reading, b"x" * size, 0.0)


def named(entries) -> list[tuple[str, int]]:
    return [(one.run, one.reading.sequence) for one in entries]


def test_the_busiest_run_loses_its_oldest():
    lost = []
    queue = SampleQueue(4, 10_000, 10_000, lost.append)
    for run, sequence in (("quiet", 1), ("busy", 1), ("busy", 2), ("busy", 3), ("quiet", 2)):
        queue.put(entry(run, sequence))
    assert named(lost) == [("busy", 1)]
    assert queue.depth == 4


def test_large_samples_are_bounded_by_their_bytes():
    lost = []
    queue = SampleQueue(100, 1_000, 1_000, lost.append)
    for sequence in range(1, 6):
        queue.put(entry("small", sequence))
    queue.put(entry("large", 1, 600))
    queue.put(entry("large", 2, 600))
    assert named(lost) == [("large", 1)]


def test_a_run_has_its_share_of_the_bytes_and_no_more():
    lost = []
    queue = SampleQueue(100, 10_000, 1_000, lost.append)
    queue.put(entry("small", 1))
    for sequence in range(1, 6):
        queue.put(entry("large", sequence, 400))
    assert named(lost) == [("large", 1), ("large", 2), ("large", 3)]
    taken = queue.take()
    assert named(taken) == [("small", 1), ("large", 4), ("large", 5)]
    # What comes back from a failed write counts as well.
    queue.put(entry("large", 6, 400))
    queue.requeue(taken)
    assert named(lost[3:]) == [("large", 4)]
    assert named(queue.take()) == [("large", 5), ("large", 6), ("small", 1)]


def test_settings_of_an_optimizer_count_as_what_they_take_once_they_are_read():
    settings = {f"setting {number}": float(number) for number in range(1_000)}
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    groups = {
        (0, group): OptimizerGroup({name + str(group): value + group for name, value in settings.items()}, None)
        for group in range(5)
    }
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    one = entry("run", 1)
    one.reading = replace(one.reading, optimizer_groups=groups)
    assert one.nbytes - len(one.payload) == pytest.approx(taken, rel=0.3)


def test_requeued_samples_go_ahead_of_newer_ones():
    lost = []
    queue = SampleQueue(3, 10_000, 10_000, lost.append)
    queue.put(entry("run", 1))
    queue.put(entry("run", 2))
    taken = queue.take()
    assert queue.depth == 0
    queue.put(entry("run", 3))
    queue.put(entry("run", 4))
    queue.requeue(taken)
    assert named(lost) == [("run", 1)]
    assert named(queue.take()) == [("run", 2), ("run", 3), ("run", 4)]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 400)), max_size=60))
def test_nothing_is_lost_uncounted_and_no_bound_is_passed(samples):
    lost: list[QueuedSample] = []
    queue = SampleQueue(8, 1_500, 700, lost.append)
    put = [entry(run, sequence, size) for sequence, (run, size) in enumerate(samples, 1)]
    for one in put:
        queue.put(one)
        assert queue.depth <= 8
    held = queue.take()
    assert sum(len(one.payload) for one in held) <= 1_500
    assert sorted(named(lost) + named(held)) == sorted(named(put))
    for run in "abc":
        assert sum(len(one.payload) for one in held if one.run == run) <= 700
        sequences = [one.reading.sequence for one in held if one.run == run]
        assert sequences == sorted(sequences)


def test_runs_take_turns_so_that_one_that_sends_too_much_waits_alone():
    queue = SampleQueue(1_000, 2**30, 2**30, lambda _: None)
    for sequence in range(1, 301):
        queue.put(entry("flood", sequence))
    queue.put(entry("quiet", 1))
    queue.put(entry("other", 1))
    turn = queue.turn(0.0)
    assert len(turn) == TURN_SAMPLES
    assert {("quiet", 1), ("other", 1)} <= set(named(turn))
    queue.put(entry("quiet", 2))
    assert ("quiet", 2) in named(queue.turn(0.0))


def test_turns_grow_with_the_time_that_the_journal_takes():
    """At 32 samples a turn a disk whose sync takes 0.5 s would take 64 a second, however few bytes they are."""
    queue = SampleQueue(10_000, 2**30, 2**30, lambda _: None)
    for sequence in range(1, 5_001):
        queue.put(entry("run", sequence))
    assert queue.fills_turn
    queue.took(queue.turn(0.0), 0.5, 0.6, 0.6)
    assert len(queue.turn(0.6)) >= 500  # a thousand a second
    queue.took((), 0.001, 0.02, 2.0)
    assert len(queue.turn(2.0)) == TURN_SAMPLES


async def test_a_large_sample_comes_alone_and_has_its_share_of_the_time():
    queue = SampleQueue(1_000, 2**30, 2**30, lambda _: None)
    for run in ("large", "huge"):
        for sequence in (1, 2):
            queue.put(entry(run, sequence, TURN_BYTES + 1))
    for sequence in (1, 2):
        queue.put(entry("quiet", sequence))
    turn = queue.turn(100.0)
    assert named(turn) == [("large", 1)]
    queue.took(turn, 0.0, 0.5, 100.5)
    queue.took(queue.turn(100.5), 0.0, 0.01, 100.6)
    queue.put(entry("quiet", 3))
    assert named(queue.turn(124.9)) == [("quiet", 3)]
    assert queue.turn(124.9) == []
    assert named(queue.turn(125.0)) == [("huge", 1)]  # 0.5 s in 25
    assert named(queue.turn(125.0)) == [("large", 2)]


async def test_a_large_sample_that_waits_comes_by_itself_in_time():
    queue = SampleQueue(1_000, 2**30, 2**30, lambda _: None)
    queue.put(entry("large", 1, TURN_BYTES + 1))
    queue.put(entry("large", 2, TURN_BYTES + 1))
    turn = queue.turn(0.0)
    queue.put(entry("quiet", 1))
    queue.took(turn, 0.0, 0.001, 0.001)
    assert named(queue.turn(0.001)) == [("quiet", 1)]
    assert queue.turn(0.001) == []
    assert not queue.has_turn
    async with asyncio.timeout(10):
        await queue.filled()
    assert named(queue.turn(1.0)) == [("large", 2)]


def test_large_samples_alone_have_all_of_the_time():
    queue = SampleQueue(1_000, 2**30, 2**30, lambda _: None)
    for run in ("one", "two"):
        for sequence in (1, 2):
            queue.put(entry(run, sequence, 8 * TURN_BYTES))
    for number in range(4):
        turn = queue.turn(float(number))
        assert len(turn) == 1
        queue.took(turn, 0.1, 0.5, number + 0.5)


async def test_few_large_samples_of_a_run_are_read_before_their_turn():
    queue = SampleQueue(1_000, 2**30, 2**30, lambda _: None)
    queue.put(entry("large", 1, 8 * TURN_BYTES))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await queue.room("large")


async def test_of_a_run_with_many_samples_that_wait_no_more_are_read():
    queue = SampleQueue(1_000, 2**30, 2**30, lambda _: None)
    for sequence in range(1, RUN_UNFOLDED + 1):
        queue.put(entry("flood", sequence))
    async with asyncio.timeout(10):
        await queue.room("quiet")
        waiting = asyncio.create_task(queue.room("flood"))
        await asyncio.sleep(0)
        assert not waiting.done()
        taken = queue.turn(0.0)
        await waiting
    # What was judged and waits for a failing journal alone does not count.
    for one in taken:
        one.processed = True
    queue.requeue(taken)
    assert queue.depth == RUN_UNFOLDED
    async with asyncio.timeout(10):
        await queue.room("flood")


def test_rows_of_the_journal_count_for_a_turn():
    queue = SampleQueue(1_000, 2**30, 2**30, lambda _: None)
    for sequence in range(1, 10):
        one = entry("run", sequence)
        saved = tuple(Checkpoint(sequence, f"/{number}") for number in range(40))
        one.reading = replace(one.reading, checkpoints=saved)
        queue.put(one)
    assert len(queue.turn(0.0)) == 3


async def test_what_a_turn_leaves_is_there_at_once():
    queue = SampleQueue(1_000, 2**30, 2**30, lambda _: None)
    for sequence in range(1, TURN_SAMPLES + 2):
        queue.put(entry("run", sequence))
    async with asyncio.timeout(10):
        await queue.filled()
        assert len(queue.turn(0.0)) == TURN_SAMPLES
        await queue.filled()
        assert named(queue.turn(0.0)) == [("run", TURN_SAMPLES + 1)]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await queue.filled()


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([1, 2**18, 2**21])), max_size=100))
def test_turns_have_every_sample_once_and_those_of_a_run_in_their_order(samples):
    queue = SampleQueue(1_000, 2**40, 2**40, lambda _: None)
    put = [entry(run, sequence, size) for sequence, (run, size) in enumerate(samples, 1)]
    for one in put:
        queue.put(one)
    turns = []
    while queue.depth:
        turns.append(queue.turn(0.0))
    assert all(len(turn) == 1 or sum(one.nbytes for one in turn) <= TURN_BYTES for turn in turns)
    taken = named(one for turn in turns for one in turn)
    assert sorted(taken) == sorted(named(put))
    for run in "abc":
        assert [one for one in taken if one[0] == run] == [one for one in named(put) if one[0] == run]


def test_a_resend_is_known_whether_it_waits_or_is_journalled():
    cursor = Cursor()
    assert cursor.place(1, 10, restored=False) == "new"
    assert cursor.place(2, 11, restored=False) == "new"
    assert cursor.place(1, 10, restored=False) == "waiting"
    cursor.mark_journalled(1)
    cursor.mark_journalled(2)
    assert cursor.place(1, 10, restored=False) == "journalled"
    assert cursor.idle


def test_sequences_may_leave_gaps_and_not_fill_them_later():
    cursor = Cursor()
    cursor.place(5, 10, restored=False)
    with pytest.raises(WireError, match="sequence 3 after 5") as caught:
        cursor.place(3, 10, restored=False)
    assert caught.value.code == "out_of_order"


def test_steps_go_back_only_where_a_sample_says_that_the_run_was_restored():
    cursor = Cursor()
    cursor.place(1, 10, restored=False)
    with pytest.raises(WireError, match="step 4 after 10"):
        cursor.place(2, 4, restored=False)
    assert cursor.place(3, 4, restored=True) == "new"
    with pytest.raises(WireError, match="step 3 after 4"):
        cursor.place(4, 3, restored=False)


@given(st.lists(st.tuples(st.integers(1, 20), st.booleans()), max_size=60))
def test_no_sequence_is_new_again_once_it_is_journalled(events):
    cursor, journalled = Cursor(), set()
    waiting = set()
    for sequence, settle in events:
        try:
            place = cursor.place(sequence, 1, restored=False)
        except WireError:
            assert sequence not in waiting
            continue
        assert (place == "journalled") == (sequence <= max(journalled, default=0))
        if place == "new":
            assert sequence not in waiting
            waiting.add(sequence)
        if settle:
            for one in sorted(waiting):
                cursor.mark_journalled(one)
            journalled |= waiting
            waiting.clear()
