"""What the report says that incidents and rollbacks have cost, and at most saved; by hand-made histories."""

from __future__ import annotations

import pytest

from sharpwatch.cli.report.costs import Cost, costs, redone
from sharpwatch.v1.operator_pb2 import Alert, Decision, HistoryPoint, Run, RunDetail
from sharpwatch.v1.types_pb2 import Checkpoint, Rollback

ONSET, ACTED, END = 150, 155, 200


def points(*parts: range, high: range = range(0)) -> list[HistoryPoint]:
    """Samples of these steps, one part after the other; in the first part the loss is 9 in `high`, else about 4."""
    return [
        HistoryPoint(step=step, attempt=1, loss=9.0 if part is parts[0] and step in high else 4 + 0.01 * (step % 7))
        for part in parts
        for step in part
    ]


def rollback(identity: str, step: int, back_to: int, alert: str = "i1", outcome: str = "recovered") -> Decision:
    """One that was made at `step`, and after which the run went on right after a checkpoint."""
    plan = Rollback(checkpoint=Checkpoint(step=back_to, uri=f"/c/{back_to}"))
    made = Decision(id=identity, action="rollback", outcome=outcome, alert_id=alert, step=step, rollback=plan)
    made.applied_step = back_to + 1
    return made


def cut() -> Decision:
    return Decision(id="d1", action="scale_lr", outcome="recovered", alert_id="i1", step=ACTED, applied_step=ACTED + 1)


def run(*checkpoints: int, cause: str = "data") -> RunDetail:
    alert = Alert(id="i1", onset=ONSET, first_step=ONSET + 1, last_step=ACTED, severity="critical", cause=cause)
    saved = [Checkpoint(step=step, uri=f"/c/{step}") for step in checkpoints]
    return RunDetail(run=Run(run="run", step=END), alerts=[alert], checkpoints=saved)


def saved(detail: RunDetail, found: list[HistoryPoint], *decisions: Decision) -> Cost:
    return next(row for row in costs(detail, found, decisions) if row.what.startswith("saved"))


def test_a_cure_saved_at_most_what_came_after_the_checkpoint_before_the_onset():
    found = points(range(1, END + 1), high=range(ONSET, ACTED + 1))
    row = saved(run(50, 120, 180), found, cut())
    assert (row.what, row.steps) == ("saved: at most", END - 120)


def test_a_checkpoint_that_was_deleted_since_is_not_taken_for_step_0():
    found = points(range(1, END + 1), high=range(ONSET, ACTED + 1))
    row = saved(run(180, 190), found, cut())
    assert (row.what, row.steps, row.hours) == ("saved", None, None)
    assert f"no checkpoint from before the onset at {ONSET} is known any more" in row.how
    # Of a rollback the checkpoint is known, whatever became of either.
    failed = rollback("d0", ACTED, 130, outcome="failed")
    assert saved(run(180, 190), found, failed, cut()).steps == END - 130


def test_what_never_harmed_the_loss_was_not_cured():
    """A rollback that nobody needed is followed by losses as good as those before it."""
    went_back = points(range(1, ACTED + 1), range(121, END + 1))
    row = saved(run(120), went_back, rollback("d1", ACTED, 120))
    assert (row.what, row.steps) == ("saved", None)
    assert "the loss stood where it had stood before the onset" in row.how
    harmed = points(range(1, ACTED + 1), range(121, END + 1), high=range(ONSET, ACTED + 1))
    assert saved(run(120), harmed, rollback("d1", ACTED, 120)).steps == END - 120 - (ACTED - 120)
    # NaN in a gradient is in the weights before it is in the loss.
    assert saved(run(120, cause="non-finite"), went_back, rollback("d1", ACTED, 120)).steps is not None


def test_each_rollback_to_one_step_has_its_own_loss():
    found = points(range(1, 131), range(101, 161), range(101, 201))
    twice = [rollback("first", 130, 100), rollback("second", 160, 100)]
    assert [(each.why, each.left_at, each.steps) for each in redone(found, twice)] == [
        ("rollback first", 130, 30),
        ("rollback second", 160, 60),
    ]


@pytest.mark.parametrize("kept", [1, 2])
def test_the_newest_rollbacks_are_those_of_the_newest_losses(kept):
    """The journal keeps so many samples, and every decision."""
    parts = [range(1, 131), range(101, 131), range(101, 131)][-kept:]
    many = [rollback(name, 130, 100) for name in ("first", "second", "third")]
    assert [each.why for each in redone(points(*parts, range(101, 201)), many)] == [
        f"rollback {name}" for name in ("first", "second", "third")[-kept:]
    ]


def test_a_run_that_went_back_before_its_rollback_was_made_did_not_by_that():
    found = points(range(1, 111), range(101, 161))
    (only,) = redone(found, [rollback("later", 150, 100)])
    assert only.why == "a restored checkpoint"
