from __future__ import annotations

from sharpwatch.demo.play import decision_line, error_bar, sparkline
from sharpwatch.v1.operator_pb2 import Decision
from sharpwatch.v1.types_pb2 import Checkpoint, Estimate, Rollback


def test_a_sparkline_spans_its_values_and_leaves_out_what_is_not_finite():
    assert sparkline([0.0, float("nan"), 7.0], 10) == "▁█"
    assert sparkline([1.0] * 4 + [8.0] * 4, 2) == "▁█"
    assert sparkline([], 5) == ""


def test_an_error_bar_is_two_standard_errors_on_a_logarithmic_axis():
    bar = error_bar(Estimate(value=10.0, stderr=2.5), 1.0, 100.0).plain
    # A decade is 15 characters: 10 stands at 15, 5 and 15 at 10.5 and 17.6 of them.
    assert bar == " " * 10 + "─" * 5 + "●" + "─" * 3


def test_a_decision_is_one_line():
    cut = Decision(
        step=203, alert_name="LossSpike", action="scale_lr", multipliers={"qk": 0.2, "vo": 0.2}, outcome="applied"
    )
    assert decision_line(cut) == "step 203 LossSpike → scale_lr ×0.2: applied"
    cut.applied_step = 205
    cut.multipliers["vo"] = 0.5
    assert decision_line(cut) == "step 203 LossSpike → scale_lr qk ×0.2, vo ×0.5 from step 205: applied"
    back = Decision(step=9, reason="bad shard", action="rollback", outcome="refused", guard="cooldown: 3 of 200 steps")
    back.rollback.CopyFrom(Rollback(checkpoint=Checkpoint(step=5)))
    assert decision_line(back) == "step 9 bad shard → rollback to step 5: refused (cooldown: 3 of 200 steps)"
