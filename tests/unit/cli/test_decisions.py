"""The table of `sharpwatch decisions --audit`: which remark stands in which row."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sharpwatch.cli.commands.decisions import answered, transition_table
from sharpwatch.errors import OperatorError
from sharpwatch.v1.operator_pb2 import Decision, ListTransitionsResponse, OperatorEvent, Transition

RECOVERED = Decision(
    id="d1", run="gpt2-a1", step=410, policy="cut", alert_name="LossSpike", action="scale_lr", guard="ok"
)
RECOVERED.outcome, RECOVERED.applied_step, RECOVERED.author, RECOVERED.reason = "recovered", 414, "ann", "agreed"
REFUSED = Decision(id="d2", run="gpt2-a1", step=430, policy="back", action="rollback", outcome="refused")
REFUSED.guard = "trainer: control is lr"


def test_a_remark_stands_in_the_row_of_its_own_time():
    answer = ListTransitionsResponse(
        transitions=[
            Transition(decision_id="d1", outcome="proposed", detail="qk 1 to 0.5"),
            Transition(decision_id="d1", outcome="approved", detail="qk 1 to 0.5", author="ann", reason="agreed"),
            Transition(decision_id="d2", outcome="sent"),
            Transition(decision_id="d1", outcome="applied", author="ann", reason="agreed"),
            Transition(decision_id="d2", outcome="refused"),
            Transition(decision_id="d1", outcome="recovered", author="ann", reason="agreed"),
        ],
        decisions=[REFUSED, RECOVERED],
    )
    table = transition_table(answer)
    assert table.headings[1:] == ("step", "id", "run", "action", "outcome", "by", "why")
    assert [row[1:] for row in table.rows] == [
        ("410", "d1", "gpt2-a1", "scale_lr", "proposed", "cut", "LossSpike; qk 1 to 0.5"),
        ("410", "d1", "gpt2-a1", "scale_lr", "approved", "ann", "LossSpike; agreed; qk 1 to 0.5"),
        ("430", "d2", "gpt2-a1", "rollback", "sent", "back", "–"),
        ("410", "d1", "gpt2-a1", "scale_lr", "applied", "ann", "LossSpike; agreed; applied at step 414"),
        ("430", "d2", "gpt2-a1", "rollback", "refused", "back", "trainer: control is lr"),
        ("410", "d1", "gpt2-a1", "scale_lr", "recovered", "ann", "LossSpike; agreed; applied at step 414"),
    ]


def test_what_an_operator_asked_for_beside_stands_at_its_time():
    refused = OperatorEvent(at_unix_ns=5, run="gpt2-a1", action="lr set", outcome="refused", author="ann")
    refused.reason, refused.detail = "too slow", "qk=100 is outside the run's lr_bounds"
    answer = ListTransitionsResponse(
        transitions=[
            Transition(decision_id="d1", at_unix_ns=4, outcome="proposed"),
            Transition(decision_id="d1", at_unix_ns=6, outcome="approved", author="ann"),
        ],
        decisions=[RECOVERED],
        events=[refused],
    )
    assert [row[1:] for row in transition_table(answer).rows] == [
        ("410", "d1", "gpt2-a1", "scale_lr", "proposed", "cut", "LossSpike"),
        ("–", "–", "gpt2-a1", "lr set", "refused", "ann", "too slow; qk=100 is outside the run's lr_bounds"),
        ("410", "d1", "gpt2-a1", "scale_lr", "approved", "ann", "LossSpike"),
    ]


def test_a_decision_is_not_waited_for_where_no_daemon_answers():
    def silent(*_, **__):
        raise OperatorError("no daemon answers")

    with pytest.raises(OperatorError, match="no daemon answers"):
        answered(SimpleNamespace(WatchDecision=silent), Decision(id="d9", outcome="sent"), 30.0)
