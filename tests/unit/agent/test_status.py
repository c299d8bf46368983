"""`watch.status`, and what the trainer's own log says of a run: its start, and probes that are given up."""

from __future__ import annotations

import dataclasses
import logging
import re

import pytest
import torch
from stand_ins import Net

import sharpwatch
from sharpwatch.agent.probes.gnb import Gnb
from sharpwatch.agent.probes.scheduler import OverheadBudget
from sharpwatch.agent.transport.base import Connection
from sharpwatch.errors import ProbeError
from sharpwatch.testing import InMemoryTransport

TOKENS = torch.tensor([[1, 2, 3, 4]])


class Loop:
    """A watched loop of a small model, one tensor of which is frozen."""

    def __init__(self, **options):
        torch.manual_seed(3)
        self.model = Net().train()
        self.model.ln_f.bias.requires_grad_(requires_grad=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.transport = InMemoryTransport()
        options = {"training_job": "job", "run": "run", "probe_every": 2, "transport": self.transport} | options
        self.watch = sharpwatch.attach(self.model, self.optimizer, **options)

    def steps(self, count):
        for _ in range(count):
            self.model(TOKENS, TOKENS)[1].backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def broken(*_):
    raise ZeroDivisionError("on purpose")


def unfit(*_):
    raise ProbeError("no logits in the output")


def test_it_says_what_is_watched():
    status = Loop().watch.status
    assert (status.state, status.training_job, status.run, status.step) == ("watching", "job", "run", 0)
    assert [(each.block, each.entries, each.layers) for each in status.blocks] == [
        ("emb", 88, 1),
        ("norm", 8, 1),
        ("head", 88, 1),
    ]
    assert status.parameters == 3
    assert status.frozen == ("ln_f.bias",)
    assert status.other == ()


def test_parameters_that_fell_to_other_are_named(monkeypatch, tmp_path):
    rules = tmp_path / "rules.yaml"
    rules.write_text("- match: ln_f.*\n  block: other\n")
    monkeypatch.setenv("SHARPWATCH_BLOCK_RULES", str(rules))
    assert Loop().watch.status.other == ("ln_f.weight",)


def test_probes_are_counted_and_those_given_up_have_a_reason(monkeypatch):
    monkeypatch.setattr(Gnb, "run", unfit)
    loop = Loop()
    assert [(each.last_step, each.runs) for each in loop.watch.status.probes] == [(None, 0), (None, 0)]
    loop.steps(9)
    gnb, direction = loop.watch.status.probes
    assert dataclasses.asdict(gnb) == {
        "probe": "gnb",
        "last_step": 6,
        "runs": 3,
        "failures": 3,
        "given_up": True,
        "reason": "no logits in the output",
    }
    assert (direction.last_step, direction.runs, direction.failures, direction.given_up) == (8, 4, 0, False)


def test_the_cost_is_held_against_the_budget():
    fixed, budgeted = Loop(), Loop(probe_every=None, overhead_budget=0.25)
    for loop in (fixed, budgeted):
        loop.steps(3)
        assert loop.watch.status.overhead_ratio > 0
    assert fixed.watch.status.overhead_budget is None
    assert budgeted.watch.status.overhead_budget == 0.25


def test_control_and_what_is_in_force():
    loop = Loop(control="rollback")
    loop.transport.set_multipliers({"emb": 0.5}, revision=4)
    loop.steps(2)
    status = loop.watch.status
    assert (status.control, status.lr_refusal, status.revision) == ("rollback", "", 4)
    assert status.multipliers == {"emb": 0.5, "norm": 1.0, "head": 1.0}
    loop.transport.roll_back(1, "file:///one")
    loop.steps(1)
    assert loop.watch.status.pending_rollback == sharpwatch.RollbackRequest(1, "file:///one", (0, 0), "")


def test_it_says_why_the_last_refused_command_was(caplog):
    loop = Loop()
    loop.steps(1)
    assert loop.watch.status.refused_command == ""
    assert "refused" not in str(loop.watch.status)
    loop.transport.command(id="c", refusal="a response must have at most 10 bytes, got 11")  # as a courier says it
    loop.transport.set_multipliers({"emb": 0.5}, revision=1)
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        loop.steps(3)
    status = loop.watch.status
    assert status.refused_command == "at step 3: a response must have at most 10 bytes, got 11"
    assert f"refused   a command {status.refused_command}" in str(status)
    assert "command 'c' refused at step 3: a response must have at most 10 bytes, got 11" in caplog.text
    assert [(each.command_id, each.outcome) for each in loop.transport.results] == [
        ("c", "refused"),
        ("command-2", "applied"),
    ]
    assert status.multipliers["emb"] == 0.5
    loop.transport.set_multipliers({"emb": 99.0})
    loop.steps(1)
    assert "must be within lr_bounds" in loop.watch.status.refused_command


def test_it_says_why_learning_rates_cannot_be_changed():
    assert Loop(control="none").watch.status.lr_refusal == 'control="none"'
    model = Net()
    optimizer = torch.optim.Rprop(model.parameters())
    with sharpwatch.attach(model, optimizer, training_job="job", transport=InMemoryTransport()) as watch:
        status = watch.status
    assert status.lr_refusal == "Rprop: it uses the learning rate in its first step only"
    assert f"revision 0; learning rates can't be changed: {status.lr_refusal}" in str(status)


def test_the_connection_is_the_transports():
    loop = Loop()
    loop.transport.dropped["outbox_full"] = 2
    loop.steps(2)
    loop.watch.close()
    assert loop.watch.status.dropped == {"outbox_full": 2}
    assert loop.watch.status.connection == Connection("memory", acknowledged=3)


def test_a_closed_watch_shows_its_last_status():
    loop = Loop()
    loop.steps(2)
    loop.watch.close()
    status = loop.watch.status
    assert (status.state, status.step, len(status.probes)) == ("closed", 2, 2)
    assert status == loop.watch.status


def test_a_watch_that_closed_itself_says_so():
    loop = Loop()
    loop.steps(1)
    loop.watch._watched.close(in_order=True)
    assert loop.watch.status.state == "closed"


def test_a_disabled_watch_has_one_too(monkeypatch):
    monkeypatch.setenv("SHARPWATCH_DISABLED", "1")
    loop = Loop(initial_step=7)
    status = loop.watch.status
    assert (status.state, status.run, status.step, status.blocks) == ("disabled", "run", 7, ())
    assert str(status) == "run       run, step 7 (disabled)"


def test_it_never_raises(monkeypatch, caplog):
    loop = Loop()
    loop.steps(2)
    monkeypatch.setattr(OverheadBudget, "overhead_ratio", property(broken))
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        status = loop.watch.status
    assert (status.state, status.run, status.step) == ("watching", "run", 2)
    assert "collecting the status failed" in caplog.text


def test_it_is_a_frozen_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Loop().watch.status.step = 3


def test_it_prints_as_a_table_of_about_ten_lines(monkeypatch):
    monkeypatch.setattr(Gnb, "run", unfit)
    loop = Loop(control="rollback")
    loop.transport.set_multipliers({"emb": 0.5}, revision=4)
    loop.transport.roll_back(2, "file:///two", apply_at_step=9)
    loop.transport.dropped["outbox_full"] = 2
    loop.steps(9)
    status = dataclasses.replace(loop.watch.status, overhead_ratio=0.02345, overhead_budget=0.01)
    assert str(status).splitlines() == [
        "run       run of job, step 9",
        "blocks    emb 88, norm 8, head 88 (3 parameters)",
        "frozen    ln_f.bias",
        "loss      none",
        "daemon    memory connected, sample 8 acknowledged; samples dropped: 2 outbox_full",
        "probes    gnb: last at step 6, 3 runs, 3 failed; given up: no logits in the output",
        "          direction: last at step 8, 4 runs, 0 failed",
        "overhead  2.3 % of step time, budget 1 %",
        "control   rollback: emb x 0.5, revision 4",
        "rollback  pending: to step 2, file:///two",
    ]


@pytest.mark.parametrize(
    ("connection", "text"),
    [
        (Connection("a:1"), "a:1 not reached yet;"),
        (Connection("a:1", reason="UNAVAILABLE: refused"), "a:1 not reached yet: UNAVAILABLE: refused;"),
        (Connection("a:1", connected=True, acknowledged=7), "a:1 connected, sample 7 acknowledged;"),
        (
            Connection("a:1", since_unix_ns=10**18, reason="drained"),
            r"a:1 not connected since 2001-09-0\d .*: drained;",
        ),
        (Connection("a:1", reason="held", refused=True), "a:1 does not take this run: held;"),
        (Connection(reason="rank 0 sends for all ranks"), "rank 0 sends for all ranks;"),
    ],
)
def test_the_daemons_line(connection, text):
    status = dataclasses.replace(Loop().watch.status, connection=connection)
    (line,) = (line for line in str(status).splitlines() if line.startswith("daemon"))
    assert re.search(text, line)


# In the trainer's own log.


def test_the_first_step_says_once_what_is_watched(caplog):
    loop = Loop(probe_every=None)
    with caplog.at_level(logging.INFO, "sharpwatch"):
        loop.steps(3)
    (record,) = (record for record in caplog.records if record.levelno == logging.INFO)
    assert record.name == "sharpwatch"
    assert record.getMessage() == (
        "watching run run of job: blocks emb 88, norm 8, head 88; daemon memory connected; "
        "probes gnb, direction within 1 % of step time"
    )


def test_each_probe_given_up_is_one_warning_with_its_reason(monkeypatch, caplog):
    monkeypatch.setattr(Gnb, "run", unfit)
    loop = Loop()
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        loop.steps(12)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "probe gnb is given up after 3 failures: no logits in the output")
    ]
