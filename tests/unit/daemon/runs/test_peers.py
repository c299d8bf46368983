"""Twins tell whether the data brought an incident about, also when they come later; references reach their runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from hellos import run_hello
from observations import PARAMETERS, Ids, healthy_run

from sharpwatch.daemon.decisions.run_controller import RunController
from sharpwatch.daemon.detection.history import LATER, Losses, StepHistory
from sharpwatch.daemon.ingest.hello import Attempt
from sharpwatch.daemon.records import Checkpoint, Decision, Incident, Observation, RollbackPlan
from sharpwatch.daemon.runs.peers import Peers
from sharpwatch.daemon.runs.run import Run, Runs
from sharpwatch.daemon.storage.schema import ReferenceRow

LAYERS = tuple((block, f"layers.{i}") for i in range(2) for block in ("qk", "vo", "ffn", "norm"))
AT = 300  # where a spike begins
SPIKE, ONE_BATCH = range(AT, AT + 6), range(AT, AT + 1)


def controller(hello, earlier) -> RunController:
    made = RunController(
        hello.run, layer_blocks=hello.layer_blocks, parameters=hello.parameters, policies=(), new_id=Ids()
    )
    if earlier is not None:
        made.take_over(earlier)
    return made


class Fleet:
    """Runs and their peers, stepped by hand as the pipeline does."""

    def __init__(self) -> None:
        self.runs = Runs(controller)
        self.peers = Peers(self.runs)

    def begin(self, name: str, order: str = "", attempt: str = "", job: str = "job") -> Run:
        hello = run_hello(
            dict.fromkeys(LAYERS, PARAMETERS), run=name, attempt=attempt or name, data_order=order, training_job=job
        )
        return self.runs.begin(Attempt(hello, b""), 0.0)

    def step(self, run: Run, steps: Iterable[Observation]) -> None:
        for seen in steps:
            changes = run.controller.observe(seen, 0.0)
            self.peers.after(run, seen.step, changes)


def steps(seed: int, odd: Iterable[int] = (), by: float = 0.5, to: int = 360) -> list[Observation]:
    odd = set(odd)
    run = healthy_run(to, seed=seed)
    return [replace(seen, loss=seen.loss + by) if seen.step in odd else seen for seen in run]


def newest(run: Run) -> Incident:
    return run.controller.incidents[-1]


@pytest.mark.parametrize("twin_first", [True, False])
def test_a_spike_that_a_twin_shows_is_the_datas_whichever_comes_first(twin_first):
    fleet = Fleet()
    run, twin = fleet.begin("a", "order"), fleet.begin("b", "order")
    parts = [(run, steps(1, SPIKE)), (twin, steps(2, ONE_BATCH))]
    for each, observations in reversed(parts) if twin_first else parts:
        fleet.step(each, observations)
    assert newest(run).cause == "data"
    assert newest(run).evidence[-1] == f"also in run b at step {newest(run).onset}"
    assert abs(newest(run).onset - AT) <= 1


@pytest.mark.parametrize("twin_first", [True, False])
def test_a_spike_that_no_twin_shows_is_not(twin_first):
    fleet = Fleet()
    run, twins = fleet.begin("a", "order"), [fleet.begin(name, "order") for name in "bc"]
    parts = [(run, steps(1, SPIKE)), *((twin, steps(seed)) for seed, twin in enumerate(twins, 2))]
    for each, observations in reversed(parts) if twin_first else parts:
        fleet.step(each, observations)
    assert newest(run).cause == "instability"
    assert newest(run).evidence[-1] == f"not in its twins b, c at step {newest(run).onset}"


def test_while_no_twin_has_come_so_far_nothing_is_said():
    fleet = Fleet()
    run, twin = fleet.begin("a", "order"), fleet.begin("b", "order")
    fleet.step(twin, steps(2)[: AT - 5])
    fleet.step(run, steps(1, SPIKE))
    assert (newest(run).cause, newest(run).in_twins, newest(run).not_in_twins) == ("data", (), ())
    assert len(newest(run).evidence) == 1
    fleet.step(twin, steps(2)[AT - 5 : AT + 9])
    assert newest(run).not_in_twins == ()  # a mean over several samples may still show it
    fleet.step(twin, steps(2)[AT + 9 : AT + 12])
    assert newest(run).not_in_twins == ("b",)


def test_a_young_twin_says_nothing():
    fleet = Fleet()
    run, twin = fleet.begin("a", "order"), fleet.begin("b", "order")
    fleet.step(twin, steps(2)[AT - 20 :])  # attached there
    fleet.step(run, steps(1, SPIKE))
    assert (newest(run).in_twins, newest(run).not_in_twins) == ((), ())


def test_who_is_whose_twin():
    fleet = Fleet()
    told = [fleet.begin("a", "x", job="one"), fleet.begin("b", "x", job="two")]
    other = fleet.begin("c", "y", job="one")
    equal = fleet.begin("d", job="one")
    elsewhere = fleet.begin("e", job="two")
    for run in (*told, other, equal, elsewhere):
        fleet.step(run, steps(1)[:10])

    def twins(run):
        return {twin.name for twin in fleet.peers.twins(run)}

    assert twins(told[0]) == {"b", "d"}  # told, or in one job found by equal losses
    assert twins(other) == {"d"}  # told apart from a
    assert twins(equal) == {"a", "c"}
    assert twins(elsewhere) == {"b"}


def test_after_a_rollback_that_leaves_out_batches_steps_have_other_data():
    fleet = Fleet()
    run, twin = fleet.begin("a", "order"), fleet.begin("b", "order")
    plan = RollbackPlan(Checkpoint(100, "c"), 120, 150)
    made = Decision("d", "b", 0.0, 200, "rollback", "operator", "applied", rollback=plan, applied_step=200)
    twin.controller.restore((), (made,), (), (), None)
    fleet.step(twin, steps(2, ONE_BATCH))
    fleet.step(run, steps(1, SPIKE))
    assert (newest(run).in_twins, newest(run).not_in_twins) == ((), ())


def test_a_new_attempt_knows_what_the_run_did():
    fleet = Fleet()
    run, twin = fleet.begin("a", "order"), fleet.begin("b", "order")
    fleet.step(twin, steps(2, ONE_BATCH))
    fleet.begin("b", "order", attempt="again")
    fleet.step(run, steps(1, SPIKE))
    assert newest(run).in_twins == ("b",)


def test_what_only_a_replica_shows_is_a_rerun_and_no_evidence_of_the_data():
    fleet = Fleet()
    run, replica = fleet.begin("a", "order"), fleet.begin("b", "order")
    for each in (run, replica):
        fleet.step(each, steps(1, SPIKE))
    assert newest(run).evidence[1:] == (f"also in its replica b at step {newest(run).onset}",)
    parted = fleet.begin("c", "order")
    fleet.step(parted, steps(2, ONE_BATCH))
    late = fleet.begin("d", "order")
    fleet.step(late, steps(1, SPIKE))
    assert (newest(late).in_twins, newest(late).replicas, newest(late).cause) == (("a", "b", "c"), ("a", "b"), "data")
    assert newest(late).evidence[-2].startswith("also in run c at")


def test_what_a_replica_does_not_show_is_not_the_datas():
    fleet = Fleet()
    run, replica = fleet.begin("a", "order"), fleet.begin("b", "order")
    fleet.step(replica, steps(1))
    fleet.step(run, steps(1, SPIKE))
    assert newest(run).cause == "instability"
    assert newest(run).evidence[-1] == f"not in its replica b at step {newest(run).onset}"


def test_a_twin_is_asked_only_at_the_steps_at_which_it_can_tell_more_and_of_many_only_some(monkeypatch):
    asked = []
    stood_out = StepHistory.stood_out
    monkeypatch.setattr(StepHistory, "stood_out", lambda self, step: asked.append(self) or stood_out(self, step))
    fleet = Fleet()
    runs = [fleet.begin(f"r{i:02}", "order") for i in range(40)]
    for seed, run in enumerate(runs):
        fleet.step(run, steps(seed)[: AT - 2 if run in runs[:2] else 10])
    asked.clear()
    fleet.step(runs[0], steps(0, SPIKE)[AT - 2 :])
    assert len({id(history) for history in asked}) == 16  # of 39 twins
    counts = []
    for seen in steps(1)[AT - 2 : AT + LATER + 5]:
        asked.clear()
        fleet.step(runs[1], [seen])
        counts += [(seen.step, len(asked))] if asked else []
    onset = newest(runs[0]).onset
    assert counts == [(onset + 1, 1), (onset + LATER, 1)]
    assert newest(runs[0]).not_in_twins == ("r01",)


def test_twins_of_a_dropped_run_are_forgotten():
    fleet = Fleet()
    run, gone = fleet.begin("a", "order"), fleet.begin("b", "order")
    fleet.step(gone, steps(2)[: AT - 5])
    fleet.step(run, steps(1, SPIKE)[: AT + 4])
    assert set(fleet.peers.awaiting) == {"b"}
    del fleet.runs._runs["b"]
    fleet.step(run, steps(1, SPIKE)[AT + 4 :])
    assert fleet.peers.awaiting == {}


def row(run: str, name: str, losses: bytes = b"") -> ReferenceRow:
    return ReferenceRow(run, name, losses, "ann", "", 0.0)


@pytest.mark.parametrize("reference_first", [True, False])
def test_a_run_is_held_against_another_one_whichever_comes_first(reference_first):
    fleet = Fleet()
    run, good = fleet.begin("a"), fleet.begin("good")
    fleet.peers.set_reference(run, row("a", "good"))
    parts = [(run, steps(1, range(1, 400), by=0.3)), (good, steps(2))]
    for each, observations in reversed(parts) if reference_first else parts:
        fleet.step(each, observations)
    assert (newest(run).name, newest(run).severity, newest(run).active) == ("SilentFailure", "critical", True)
    assert "above the reference good from step 1 on" in newest(run).evidence[0]
    assert not good.controller.incidents
    cleared = fleet.peers.set_reference(run, row("a", ""))
    assert [each.closed for each in cleared.incidents] == ["the reference was cleared"]
    assert run.controller.reference is None


def test_a_recorded_reference_judges_the_steps_that_lie_behind():
    fleet = Fleet()
    run = fleet.begin("a")
    fleet.step(run, steps(1, range(150, 400), by=0.1))
    losses = Losses.of(np.arange(1, 361), [seen.loss for seen in steps(2)])
    (incident,) = fleet.peers.set_reference(run, row("a", "old.csv", losses.state())).incidents
    assert incident.name == "SilentFailure"
    assert abs(incident.onset - 150) <= 5


def test_a_restart_takes_references_up_once_all_runs_are_there():
    fleet, again = Fleet(), Fleet()
    fleet.step(fleet.begin("good"), steps(2))
    run = fleet.begin("a")
    fleet.peers.set_reference(run, row("a", "good"))
    fleet.step(run, steps(1, range(1, 400), by=0.3))
    restored = again.begin("a")
    restored.reference = run.reference
    restored.controller.detection.load_state(run.controller.detection.state())
    again.begin("good").controller.detection.load_state(fleet.runs.get("good").controller.detection.state())
    again.peers.restore(restored)
    assert restored.controller.reference.gap == run.controller.reference.gap
    assert len(restored.controller.reference) == 360
    lost = again.begin("b")
    lost.reference = row("b", "gone")
    again.peers.restore(lost)
    assert lost.controller.reference is None


def test_another_run_of_a_dropped_references_name_is_not_followed_until_it_is_set():
    fleet = Fleet()
    run, old = fleet.begin("a"), fleet.begin("good")
    fleet.peers.set_reference(run, row("a", "good"))
    fleet.step(run, steps(1, to=200))
    fleet.step(old, steps(2, to=200))
    assert len(run.controller.reference) == 200
    del fleet.runs._runs["good"]
    new = fleet.begin("good", attempt="other")
    fleet.step(new, steps(3, to=50))
    assert len(run.controller.reference) == 200  # another run's step 50 is no return of the old one to it
    fleet.peers.set_reference(run, row("a", "good"))
    assert len(run.controller.reference) == 50
