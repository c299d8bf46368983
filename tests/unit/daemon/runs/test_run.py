"""Snapshots are swapped whole, waiting for them misses none, and a new attempt's windows mix with no other's."""

from __future__ import annotations

import asyncio
import math
from dataclasses import fields, replace

import numpy as np
import pytest

from sharpwatch import wire
from sharpwatch.daemon.decisions.run_controller import RunController
from sharpwatch.daemon.estimation.estimator import estimate_all
from sharpwatch.daemon.ingest.hello import Attempt, RunHello, read_hello
from sharpwatch.daemon.ingest.samples import read_sample
from sharpwatch.daemon.records import NO_CHANGES, Checkpoint, Decision, RollbackPlan
from sharpwatch.daemon.runs import run as run_module
from sharpwatch.daemon.runs.restore import restore_run
from sharpwatch.daemon.runs.run import Run, Runs, Signal, observation_of
from sharpwatch.daemon.storage.schema import BaselinesRow, PendingWrites, SampleRow, StoredAttempt, StoredRun
from sharpwatch.v1 import agent_pb2, types_pb2

SIZES = {"emb": 64, "norm": 8}
HELLO = {"attempt": "a1", "blocks": list(SIZES), "sizes": SIZES, "seed": 0, "sketch_size": 64}
OF_OTHER_BLOCKS = [{"sizes": {"emb": 128, "norm": 8}}, {"blocks": ["norm", "emb"]}, {"sizes": {"emb": 64, "qk": 8}}]
BY_ANOTHER_PROJECTION = [{"seed": 1}, {"sketch_size": 32}]


def attempt(**changes) -> Attempt:
    fields = HELLO | {"blocks": list(changes.get("sizes", SIZES))} | changes
    rows = [types_pb2.LayerBlock(block=block, parameters=size) for block, size in fields.pop("sizes").items()]
    hello = agent_pb2.Hello(
        protocol=wire.PROTOCOL,
        training_job="job",
        run="run",
        layer_blocks=rows,
        control="none",
        min_multiplier=1,
        max_multiplier=1,
        **fields,
    )
    return Attempt(read_hello(hello), hello.SerializeToString())


def sample(sequence: int, sketch_size: int = 64) -> agent_pb2.Sample:
    random = np.random.default_rng(sequence)
    probe = agent_pb2.GnbProbe(
        tokens=8,
        rows=1,
        traces=wire.encode(random.chisquare(4, (4, 2)), "float64"),
        sketches=wire.encode(random.normal(size=(4, 2, sketch_size)), "float32"),
        gradient_sketch=wire.encode(random.normal(size=(2, sketch_size)), "float32"),
    )
    return agent_pb2.Sample(sequence=sequence, step=sequence, gnb=probe)


def controller(*_) -> RunController:
    layer_blocks = [(block, "") for block in SIZES]
    return RunController("run", layer_blocks=layer_blocks, parameters=np.array([*SIZES.values()]), policies=())


def update(run: Run, steps: range) -> None:
    for step in steps:
        run.update(read_sample(run.attempt.hello, sample(step, run.attempt.hello.sketch_size)), 0.0, 0.0)


def estimated(run: Run) -> dict[str, int]:
    """The draws that each quantity's estimate of the whole window is made of."""
    request = run.request()
    run.take_estimates(request, estimate_all([request], "cpu")[0])
    run.publish()
    found = run.snapshot.estimates.items()
    return {quantity: one.draws for (quantity, block, by), one in found if block == "emb" and by != "moment"}


@pytest.fixture
def run() -> Run:
    run = Run(attempt(), controller(), now=0.0)
    update(run, range(1, 6))
    return run


def test_the_gradient_noise_is_that_of_the_newest_gnb_probe_by_block(run):
    hello = run.attempt.hello
    for sequence, noise in ((6, (0.5, 0.25)), (7, None)):
        probed = sample(sequence)
        if noise is not None:
            probed.gnb.gradient_noise.CopyFrom(wire.encode(noise, "float32"))
        run.update(read_sample(hello, probed), 0.0, 0.0)
        run.publish()
        assert run.snapshot.gradient_noise == noise


def test_a_gradient_noise_of_its_own_stays_until_the_next_of_its_kind(run):
    hello = replace(run.attempt.hello, probes=("gnb", "gradient_noise"))
    own = agent_pb2.GradientNoiseProbe(noise=wire.encode((0.5, 0.25), "float32"))
    for probed in (agent_pb2.Sample(sequence=6, step=6, gradient_noise=own), sample(7)):
        run.update(read_sample(hello, probed), 0.0, 0.0)
        run.publish()
        assert run.snapshot.gradient_noise == (0.5, 0.25)
    run.update(read_sample(hello, agent_pb2.Sample(sequence=8, step=8, gradient_noise={})), 0.0, 0.0)
    run.publish()
    assert run.snapshot.gradient_noise is None


@pytest.mark.parametrize(("norm", "damage"), [(math.nan, []), (math.inf, [("NonFinite", ("emb",))])])
def test_a_gradient_that_was_not_read_is_none_and_no_damage(run, norm, damage):
    ones = wire.encode(np.ones(2), "float32")
    tap = agent_pb2.Tap(
        gradient_norm=wire.encode([norm, 1.0], "float32"),
        weight_norm=ones,
        update_rms=ones,
        non_finite=wire.encode([0, 0], "int64"),
        learning_rate=ones,
        lr_multiplier=ones,
    )
    reading = read_sample(run.attempt.hello, agent_pb2.Sample(sequence=6, step=6, tap=tap))
    observed = run.update(reading, 0.0, 0.0)
    np.testing.assert_array_equal(observed.layers.gradient_norm, [norm, 1.0])
    opened = run.controller.observe(observed, 0.0).incidents
    assert [(one.name, one.layer_blocks) for one in opened] == damage


def test_excursions_are_counted_on_over_attempts_also_of_other_blocks(run):
    counts = []
    for changes in ({}, *OF_OTHER_BLOCKS):
        run.controller.detection.excursions.update({("loss", ""): 2, ("update", "emb"): 1})
        run.publish()
        counts.append(run.snapshot.excursions_total)
        after = controller()
        after.take_over(run.controller)
        run.begin(attempt(attempt=f"a{len(counts) + 1}", **changes), after)
        run.publish()
        assert run.snapshot.excursions_total == counts[-1]
    assert counts == [{("loss", ""): 2 * i, ("update", "emb"): i} for i in (1, 2, 3, 4)]


def test_maxima_are_of_the_present_blocks(run):
    run.begin(attempt(attempt="a2", sizes={"emb": 64, "qk": 8, "ffn": 8}), controller())
    run.publish()
    assert run.snapshot.maxima.update_rms.shape == (3,)


def test_windows_go_on_over_attempts_of_the_same_blocks_and_projection(run):
    run.begin(attempt(attempt="a2"), controller())
    update(run, range(6, 7))
    assert (estimated(run)["trace"], estimated(run)["top_eigenvalue"]) == (24, 24)


@pytest.mark.parametrize("changes", BY_ANOTHER_PROJECTION)
def test_sketches_by_another_projection_are_put_away_and_traces_stay(run, changes):
    run.begin(attempt(attempt="a2", **changes), controller())
    update(run, range(6, 8))
    assert (estimated(run)["trace"], estimated(run)["top_eigenvalue"]) == (28, 8)


@pytest.mark.parametrize("changes", OF_OTHER_BLOCKS)
def test_nothing_is_kept_of_other_blocks(run, changes):
    assert estimated(run)
    run.begin(attempt(attempt="a2", **changes), controller())
    assert (run.request().windows, estimated(run)) == ({}, {})


@pytest.mark.parametrize("changes", [{}, *BY_ANOTHER_PROJECTION])
def test_a_restart_replays_older_attempts_likewise(changes):
    attempts = attempt(), attempt(attempt="a2", **changes)
    samples = [("a1", sample(number)) for number in range(1, 6)]
    samples.append(("a2", sample(6, attempts[1].hello.sketch_size)))
    rows = tuple(
        SampleRow("run", of, one.sequence, one.step, agent_pb2.SessionRequest(sample=one).SerializeToString(), 0.0)
        for of, one in samples
    )
    stored = tuple(StoredAttempt(one.hello.attempt, one.message, 6, 0.0, closed=False) for one in attempts)
    runs = Runs(controller)
    restore_run(runs, StoredRun("run", stored, rows, (), (), (), (), None))
    found = estimated(runs.get("run"))
    assert (found["trace"], found["top_eigenvalue"]) == (24, 4 if changes else 24)


def test_a_restart_takes_in_news_of_checkpoints_that_were_not_journalled():
    """The daemon ended after it had written the samples, and before what it had made of them."""
    made = Decision(
        "d1", "run", 1.0, 7, "rollback", "operator", "sent", rollback=RollbackPlan(Checkpoint(4, "c4"), 0, 0)
    )
    failed = types_pb2.CommandResult(command_id="d1", outcome=types_pb2.COMMAND_OUTCOME_FAILED, step=8)
    samples = (
        agent_pb2.Sample(
            sequence=1, step=6, checkpoints=[types_pb2.Checkpoint(step=s, uri=f"c{s}") for s in (2, 4, 6)]
        ),
        agent_pb2.Sample(sequence=2, step=7, deleted_checkpoints=["c6"]),
        agent_pb2.Sample(sequence=3, step=8, results=[failed]),
        agent_pb2.Sample(sequence=4, step=9, checkpoints=[types_pb2.Checkpoint(step=9, uri="c9")]),
    )
    rows = tuple(
        SampleRow("run", "a1", one.sequence, one.step, agent_pb2.SessionRequest(sample=one).SerializeToString(), 0.0)
        for one in samples
    )
    stored = StoredRun(
        "run", (StoredAttempt("a1", attempt().message, 4, 1.0, closed=False),), rows, (), (made,), (), (), None
    )
    runs = Runs(controller)
    changes = restore_run(runs, stored)
    left = (Checkpoint(2, "c2"), Checkpoint(9, "c9"))
    assert runs.get("run").controller.checkpoints == left
    pending = PendingWrites()
    for change in changes:
        pending.add("run", change)
    assert pending.checkpoints == {("run", "c2"): 2, ("run", "c6"): None, ("run", "c4"): None, ("run", "c9"): 9}
    # Once more, from what was journalled by then: nothing is different.
    again = Runs(controller)
    settled = pending.decisions["d1"]
    restore_run(again, replace(stored, decisions=(settled,), checkpoints=left))
    assert {*again.get("run").controller.checkpoints} == {*left}


def trained(sequence: int, step: int, rate: float, odd: int) -> agent_pb2.Sample:
    """A healthy step of four ranks, of which one has data of another kind."""
    random = np.random.default_rng(step)
    of_ranks = 3 + 0.1 * random.standard_normal(4) + 2 * (np.arange(4) == odd)
    values = {"gradient_norm": 1, "weight_norm": 10, "update_rms": 1, "learning_rate": rate, "lr_multiplier": 1}
    tap = agent_pb2.Tap(
        **{name: wire.encode([value, value], "float32") for name, value in values.items()},
        non_finite=wire.encode([0, 0], "int64"),
    )
    return agent_pb2.Sample(
        sequence=sequence, step=step, loss=of_ranks.mean(), tap=tap, rank_losses=wire.encode(of_ranks, "float32")
    )


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("folded", [0, 60])
def test_a_restart_tells_where_the_newest_attempt_began(saved, folded):
    """It goes on at half of the steps, with twice the rate by choice, and another rank has the odd data."""
    attempts = [attempt(), attempt(attempt="a2")]
    first = [trained(i, i, 1e-3, 1) for i in range(1, 201)]
    second = [trained(i, 100 + i, 2e-3, 2) for i in range(1, 161)]
    rows = tuple(
        SampleRow("run", of, one.sequence, one.step, agent_pb2.SessionRequest(sample=one).SerializeToString(), 0.0)
        for of, one in [*(("a1", one) for one in first), *(("a2", one) for one in second[:folded])]
    )
    before = controller()
    for one in first:
        before.observe(observation_of(tuple(SIZES), read_sample(attempts[0].hello, one)), 0.0)
    baselines = BaselinesRow("run", "a1", 200, before.detection.state()) if saved else None
    stored = tuple(StoredAttempt(one.hello.attempt, one.message, 200, 0.0, closed=False) for one in attempts)
    runs = Runs(controller)
    restore_run(runs, StoredRun("run", stored, rows, (), (), (), (), None, baselines))
    restored = runs.get("run").controller
    for one in second[folded:]:
        restored.observe(observation_of(tuple(SIZES), read_sample(attempts[1].hello, one)), 0.0)
    assert restored.incidents == ()


@pytest.mark.parametrize(("step", "part", "known"), [(5, 0.0, ["emb"]), (6, 0.0, ["emb", "norm"]), (5, 0.1, SIZES)])
def test_a_block_that_rests_at_a_probed_step_has_no_part_of_its_curvature(step, part, known):
    """One whose parameters are updated with another block's all the same has one."""
    one = trained(1, step, 1e-3, 0)
    one.health.update_every["norm"] = 2
    zeros = {name: wire.encode([0.5, 0.0], "float64") for name in ("block_descent", "block_curvature")}
    one.direction.CopyFrom(
        agent_pb2.DirectionProbe(
            tokens=8,
            descent=1.0,
            curvature=0.5,
            update_ratio=wire.encode([0.01, 0.01], "float32"),
            curvature_parts=wire.encode([0.5, part], "float64"),
            **zeros,
        )
    )
    seen = observation_of(tuple(SIZES), read_sample(attempt().hello, one))
    assert list(seen.probed.parts) == list(known)


async def test_a_version_that_came_before_the_wait_is_not_missed():
    signal = Signal()
    seen = signal.version
    signal.notify()
    assert await signal.after(seen) == 1


async def test_every_waiter_is_woken_once_for_many_changes():
    signal = Signal()
    waiters = [asyncio.create_task(signal.after(0)) for _ in range(3)]
    await asyncio.sleep(0)  # one turn of the loop: all of them wait
    signal.notify()
    signal.notify()
    assert await asyncio.gather(*waiters) == [2, 2, 2]


def names(runs: Runs) -> list[str]:
    return [run.name for run in runs]


def begin(runs: Runs, name: str, identity: str = "", *, at: float = 0.0) -> Run | None:
    """An attempt of the run `name`, with two layer blocks."""
    one = attempt(attempt=identity or f"{name}-1")
    return runs.begin(Attempt(replace(one.hello, run=name), b""), at)


def test_what_is_held_of_all_attempts_is_bounded(monkeypatch):
    monkeypatch.setattr(run_module, "MAX_LAYER_BLOCKS_HELD", 6)
    runs = Runs(controller)
    live = begin(runs, "live")
    live.publish(phase="running")
    for at, name in enumerate("abc"):
        begin(runs, name, at=at)
    assert names(runs) == ["live", "b", "c"]
    for number in range(6):  # of one run, whose attempts have room of their own
        assert begin(runs, "live", f"live-{number}") is live
    assert names(runs) == ["live"]
    assert [runs.attempt("live", f"live-{number}") is not None for number in range(6)] == [False] * 2 + [True] * 4
    assert begin(runs, "d") is None


def test_an_attempt_that_comes_back_is_the_newest_again_and_no_further_one():
    runs = Runs(controller)
    first, second = attempt(), attempt(attempt="a2")
    for each in (first, second, first):
        run = runs.begin(each, 0.0)
    run.publish()
    assert (run.attempt, run.snapshot.attempts) == (first, 2)
    assert runs.attempt("run", "a2") is second


def stalled(run: Run, now: float) -> list[str]:
    return [incident.name for incident in run.check_stall(600.0, now, now).incidents if incident.active]


def connected(run: Run, monkeypatch, now: float) -> None:
    monkeypatch.setattr(run_module.time, "monotonic", lambda: now)
    run.publish(phase="running")


def test_a_run_stalls_when_its_agent_is_there_and_its_steps_are_not(run, monkeypatch):
    connected(run, monkeypatch, 0.0)
    update(run, range(6, 8))  # at 0 s
    assert stalled(run, 599.0) == []
    assert stalled(run, 601.0) == ["RunStalled"]
    assert stalled(run, 700.0) == []  # it is said already
    run.publish(phase="silent")
    assert run.check_stall(600.0, 710.0, 710.0) == NO_CHANGES  # it is no better because nothing is heard
    run.publish(phase="closed")
    (closed,) = run.check_stall(600.0, 720.0, 720.0).incidents
    assert (closed.active, closed.closed) == (False, "the run was closed")


def test_a_run_that_pauses_by_itself_is_waited_for(run, monkeypatch):
    """As for evaluations: three times its second longest pause, so that one stall does not excuse the next."""
    connected(run, monkeypatch, 0.0)
    for step, now in enumerate((0.0, 500.0, 900.0), 6):
        run.update(read_sample(run.attempt.hello, sample(step)), now, now)
    assert stalled(run, 900.0 + 3 * 400 - 1) == []
    assert stalled(run, 900.0 + 3 * 400 + 1) == ["RunStalled"]


def test_time_without_a_connection_is_neither_a_stall_nor_a_pause(run, monkeypatch):
    run.publish(phase="silent")
    connected(run, monkeypatch, 36_000.0)
    assert stalled(run, 36_599.0) == []
    run.update(read_sample(run.attempt.hello, sample(6)), 36_700.0, 36_700.0)
    run.update(read_sample(run.attempt.hello, sample(7)), 36_701.0, 36_701.0)
    assert stalled(run, 36_701.0 + 601) == ["RunStalled"]  # after one pause of 700 s


def test_a_clock_that_is_set_is_neither_a_stall_nor_a_pause(run, monkeypatch):
    connected(run, monkeypatch, 0.0)
    for step, hours in enumerate((0, 3, -5, 26), 6):
        run.update(read_sample(run.attempt.hello, sample(step)), 3600.0 * (30 + hours), 1.0 * step)
    assert run.check_stall(600.0, 3600.0 * 60, 10.0) == NO_CHANGES
    assert stalled(run, 10.0 + 601) == ["RunStalled"]


def test_a_new_attempt_has_not_stalled_before_its_first_step(run, monkeypatch):
    run.begin(attempt(attempt="a2"), controller())
    connected(run, monkeypatch, 36_000.0)
    assert stalled(run, 1e6) == []


def test_a_run_without_a_step_has_not_stalled(monkeypatch):
    fresh = Run(attempt(), controller(), now=0.0)
    connected(fresh, monkeypatch, 0.0)
    assert stalled(fresh, 1e6) == []


def full(sequence: int, hello: RunHello) -> agent_pb2.Sample:
    """A step of everything that a run may send, with a value now and then that stands out."""
    one = trained(sequence, sequence, 1e-3, odd=-1)
    one.taken_at_unix_ns = sequence * 10**9
    one.health.overhead_ratio = 0.01
    if sequence % 3 == 0:
        one.gnb.CopyFrom(sample(sequence, hello.sketch_size).gnb)
    if sequence % 5 == 0:
        halves = {name: wire.encode([0.5, 0.5], "float64") for name in ("block_descent", "block_curvature")}
        one.direction.CopyFrom(
            agent_pb2.DirectionProbe(
                tokens=8,
                descent=1.0,
                curvature=0.5 + 0.01 * (sequence % 7),
                update_ratio=wire.encode([0.01, 0.01], "float32"),
                curvature_parts=wire.encode([0.3, 0.2], "float64"),
                **halves,
            )
        )
    if sequence % 50 == 0:
        one.tap.gradient_norm.CopyFrom(wire.encode([8.0, 1.0], "float32"))
    if sequence > 290:  # an incident that is open at the end
        one.tap.update_rms.CopyFrom(wire.encode([30.0, 30.0], "float32"))
    return one


@pytest.mark.parametrize("since", [0, 1, 40], ids=lambda since: f"{since} samples after the state")
def test_a_restored_run_is_as_it_was_before_the_stop(since):
    """Whatever of it the state has, and whatever of it the samples after that."""
    one, start = attempt(), 1_000_000.0
    before = Run(one, controller(), now=0.0)
    rows, saved = [], None
    for sequence in range(1, 301):
        message = full(sequence, one.hello)
        payload = agent_pb2.SessionRequest(sample=message).SerializeToString()
        rows.append(SampleRow("run", "a1", sequence, sequence, payload, 0.0))
        reading = read_sample(one.hello, message)
        changes = before.controller.observe(
            before.update(reading, start + sequence, start + sequence), start + sequence
        )
        before.folded("a1", sequence)
        before.count(changes)
        if sequence == 300 - since:
            saved = before.state_row()
    stored = StoredRun(
        "run",
        (StoredAttempt("a1", one.message, 300, start + 300, closed=False),),
        tuple(rows),
        tuple(before.controller.incidents),  # as journalled, but for the step of the newest finding
        *((), (), (), None),
        saved,
    )
    runs = Runs(controller)
    assert restore_run(runs, stored) == []
    after = runs.get("run")
    assert {incident.active for incident in before.controller.incidents} >= {True}
    np.testing.assert_equal(plain(after), plain(before))
    if not since:  # the first samples after a state are judged without the scores of those before it
        assert after.controller.detection.state() == before.controller.detection.state()
    assert after.controller.detection.excursions == before.controller.detection.excursions != {}
    assert quiet(after) == quiet(before) != []


def quiet(run: Run) -> list[tuple[str, float]]:
    return [(entry.incident.name, entry.quiet) for entry in run.controller.detection.incidents.opened.values()]


def plain(run: Run) -> dict[str, object]:
    """All that a run's view shows, estimated anew, but for what a restart rightly changes."""
    request = run.request()
    run.take_estimates(request, estimate_all([request], "cpu")[0])
    run.publish()
    shown = {field.name: getattr(run.snapshot, field.name) for field in fields(run.snapshot)}
    gone = ("hello", "phase", "last_seen_at", "last_sample_at")
    shown = {name: value for name, value in shown.items() if name not in gone}
    for name in ("tap", "maxima", "sharpness"):  # of arrays
        one = shown.pop(name)
        shown |= {f"{name}.{field.name}": getattr(one, field.name) for field in fields(one)}
    return shown
