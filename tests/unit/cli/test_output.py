"""JSON has the proto's names, every field, and numbers that are numbers."""

from __future__ import annotations

import json
import math

from sharpwatch.cli.output.output import to_dict
from sharpwatch.v1.operator_pb2 import Block, Decision, ListRunsResponse, Run, RunDetail, RunPhase
from sharpwatch.v1.types_pb2 import Checkpoint, Estimate, Rollback


def test_whole_numbers_are_numbers_at_any_depth():
    found = to_dict(
        RunDetail(
            run=Run(run="a", step=2**53 + 1, lr_revision=3, phase=RunPhase.RUN_PHASE_RUNNING),
            blocks=[Block(block="qk", parameters=2**40)],
            dropped={"spool_full": 7},
        )
    )
    assert found["run"]["step"] == 2**53 + 1
    assert found["run"]["lr_revision"] == 3
    assert found["run"]["phase"] == "RUN_PHASE_RUNNING"
    assert found["blocks"][0]["parameters"] == 2**40
    assert found["dropped"] == {"spool_full": 7}


def test_every_field_is_there_and_what_is_absent_is_null():
    found = to_dict(Decision(id="d", step=0))
    assert set(found) == {field.name for field in Decision.DESCRIPTOR.fields}
    assert found["step"] == 0
    assert found["applied_step"] is None
    assert found["rollback"] is None
    assert found["multipliers"] == {}
    assert found["reason"] == ""
    assert to_dict(ListRunsResponse()) == {"runs": []}


def test_an_error_that_is_not_known_is_null_not_a_word():
    found = to_dict(Estimate(quantity="trace", value=math.inf, stderr=math.nan, draws=1))
    assert found["value"] is None
    assert found["stderr"] is None
    json.dumps(found, allow_nan=False)


def test_order_does_not_depend_on_the_map():
    one = Decision(multipliers={"vo": 2.0, "emb": 1.0}, rollback=Rollback(checkpoint=Checkpoint(step=4)))
    other = Decision(multipliers={"emb": 1.0, "vo": 2.0}, rollback=Rollback(checkpoint=Checkpoint(step=4)))
    assert json.dumps(to_dict(one)) == json.dumps(to_dict(other))
    assert list(to_dict(one)["multipliers"]) == ["emb", "vo"]
    assert to_dict(one)["rollback"]["checkpoint"] == {"step": 4, "uri": ""}
