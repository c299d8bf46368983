"""Who may speak for a run, which run a command means, what counts as an action, and how long an estimate is shown."""

from __future__ import annotations

import re

import grpc
import pytest
from wire_trainer import gnb

from sharpwatch.v1 import agent_pb2

ADVISE = """policies:
  - name: cut
    match: {alert: NonFinite}
    mode: advise
    action: {kind: scale_lr, blocks: all, factor: 0.5}
    guard: {max_actions_per_hour: 1, cooldown_steps: 0, approve_within: 1s}
"""
GIVEN_UP = agent_pb2.AgentHealth(
    probe_failures=[agent_pb2.ProbeFailure(probe="gnb", reason="RuntimeError: no logits", count=3, disabled=True)]
)


def reaches(trainer) -> bool:
    """Whether a trainer's next step is taken by the daemon."""
    try:
        trainer.step()
    except ConnectionError:
        return False
    return True


def test_a_live_run_keeps_its_name_and_the_newcomer_is_refused(daemon, train):
    first = train(daemon, run="prod")
    first.steps(3)
    second = train(daemon, run="prod", attempt="second")
    shown = daemon.cli("show", "prod")["run"]
    assert second.end is not None, "the newcomer was welcomed"
    assert second.end.code() is not grpc.StatusCode.OK
    assert shown["attempts"] == 1


def test_a_newcomer_does_not_close_a_live_run(daemon, train):
    first = train(daemon, run="prod")
    first.steps(3)
    second = train(daemon, run="prod", attempt="second")
    if second.end is None:
        second.step(closing=True)
    if not reaches(first):
        pytest.fail("the first trainer's session was ended")
    (shown,) = daemon.cli("jobs")["runs"]
    assert (shown["phase"], shown["step"]) == ("RUN_PHASE_RUNNING", 4)


def test_a_rollback_of_no_run_is_refused(daemon, train):
    trainer = train(daemon, run="prod", control="rollback", can_roll_back=True)
    trainer.steps(2, checkpoints=[])
    trainer.step(checkpoints=[{"step": 2, "uri": "file:///checkpoint"}])
    done = daemon.command("rollback", "", "--reason", "an unset variable", "--no-wait")
    assert done.returncode != 0, done.stdout
    assert daemon.cli("decisions", "prod")["decisions"] == []


def test_a_command_for_the_beginning_of_a_name_is_refused(daemon, train):
    trainer = train(daemon, run="lronly")
    trainer.steps(3)
    done = daemon.command("lr", "set", "l", "qk=0.5", "--reason", "meant another run", "--no-wait")
    assert done.returncode != 0, done.stdout
    assert daemon.cli("decisions", "lronly")["decisions"] == []


@pytest.mark.parametrize("end", ["rejected", "expired"])
def test_what_was_not_done_uses_up_no_quota(make_daemon, train, end):
    daemon = make_daemon(ADVISE)
    trainer = train(daemon)
    trainer.step(non_finite={"ffn": 1})
    (proposal,) = daemon.cli("decisions", "run")["decisions"]
    if end == "rejected":
        daemon.cli("reject", proposal["id"], "--reason", "no")
    trainer.steps(30)  # that alert is over
    outcome = daemon.cli("decisions", "run")["decisions"][0]["outcome"]
    while end == "expired" and outcome == "proposed":
        trainer.steps(10)
        outcome = daemon.cli("decisions", "run")["decisions"][0]["outcome"]
    if outcome != end:
        pytest.fail(f"the first proposal ended {outcome}")
    trainer.step(non_finite={"ffn": 1})
    made = daemon.cli("decisions", "run")["decisions"]
    assert sorted(each["outcome"] for each in made) == sorted([end, "proposed"]), made


def series(daemon, name: str) -> list[str]:
    """The exported lines of metrics whose names match."""
    return re.findall(rf"^{name}(?:{{.*)? \S+$", daemon.get("/metrics"), re.MULTILINE)


def estimated(daemon, train, steps: int):
    """A daemon with one run: a gnb probe in each of its first steps, the last of them at step 7."""
    trainer = train(daemon)
    trainer.steps(7, gnb=gnb())
    while not series(daemon, "sharpwatch_block_sharpness"):  # estimates follow their samples
        pass
    trainer.steps(steps, health=GIVEN_UP)


def test_estimates_of_a_probe_that_was_given_up_are_let_go(daemon, train):
    estimated(daemon, train, 300)
    assert series(daemon, "sharpwatch_block_sharpness") == []


def test_estimates_carry_their_step(daemon, train):
    estimated(daemon, train, 5)
    assert [line for line in series(daemon, r"sharpwatch_\w*step\w*") if float(line.rpartition(" ")[2]) == 7]


def test_probe_failures_are_exported(daemon, train):
    estimated(daemon, train, 5)
    assert [line for line in series(daemon, r"sharpwatch_\w*probe\w*fail\w*") if 'probe="gnb"' in line]


def test_show_has_the_objective_and_counts_errors(daemon, train):
    trainer = train(daemon, run="told")
    trainer.steps(1)
    assert daemon.cli("show", "told")["objective"] is None
    told = {"objective": "mean square of output", "objective_state": "verified"}
    trainer.steps(1, health=agent_pb2.AgentHealth(swallowed_errors=2, **told))
    shown = daemon.cli("show", "told")
    assert (shown["objective"], shown["objective_state"], shown["swallowed_errors"]) == (*told.values(), 2)
