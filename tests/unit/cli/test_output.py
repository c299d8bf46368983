"""Numbers and times as people read them, tables on and off a terminal, and JSON."""

from __future__ import annotations

import io
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharpwatch.cli import output
from sharpwatch.cli.output import Grid, clean, plain, print_tables, to_dict
from sharpwatch.v1.operator_pb2 import (
    Block,
    Decision,
    GetHistoryResponse,
    Revision,
    Run,
    RunDetail,
    RunPhase,
    UndoLearningRatesResponse,
)
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
    assert to_dict(GetHistoryResponse()) == {"points": [], "estimates": []}


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


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (3.4e-9, 2e-10, "3.4e-09 ± 2e-10"),
        (3.4123e-9, 2.4e-10, "3.4e-09 ± 2e-10"),
        (3.4123e-9, 2.4e-12, "3.412e-09 ± 2e-12"),
        (2e-10, 3e-9, "2e-10 ± 3e-09"),  # nothing known but the size
        (9.97e-9, 9.6e-11, "1.00e-08 ± 1e-10"),  # both round up over a power of ten
        (0.4187, 0.031, "0.42 ± 0.03"),
        (412.3, 15.0, "410 ± 20"),
        (-14.92, 0.31, "-14.9 ± 0.3"),
        (123456789.0, 2e6, "1.23e+08 ± 2e+06"),
        (1.0, 1e-12, "1.00000 ± 1e-12"),
        (0.0, 0.2, "0.0 ± 0.2"),
        (1.5, 0.0, "1.5 ± 0"),
        (3.4123e-9, math.nan, "3.41e-09 ± ?"),
        (3.4123e-9, math.inf, "3.41e-09 ± ?"),
        (math.nan, 1.0, "nan"),
    ],
)
def test_value_and_error_stop_at_the_same_digit(value, stderr, text):
    assert output.with_error(value, stderr) == text


@given(
    value=st.floats(-1e30, 1e30, allow_nan=False).filter(lambda value: value == 0 or abs(value) > 1e-30),
    stderr=st.floats(1e-30, 1e30),
)
def test_what_is_written_is_within_rounding_of_what_was_measured(value, stderr):
    left, right = map(float, output.with_error(value, stderr).split(" ± "))
    # Rounded to the error's own place (half of it at most 0.5 × 10^place ≤ half the written error), to one digit of the
    # value where the error is larger than it, or to six digits.
    allowed = max(0.5 * right, 1e-5 * abs(value))
    assert abs(left - value) <= allowed * (1 + 1e-9) + (0.5 * abs(value) if stderr >= abs(value) else 0)
    assert right == pytest.approx(stderr, rel=0.5)


@pytest.mark.parametrize(
    ("ns", "now", "text"),
    [
        (0, 100.0, "never"),
        (100 * 10**9, 102.4, "2 s ago"),
        (100 * 10**9, 400.0, "5 min ago"),
        (10**9, 3 * 86400.0, "3 d ago"),
        (100 * 10**9, 99.5, "now"),
        (100 * 10**9, 70.0, "30 s ahead of this clock"),
    ],
)
def test_age(ns, now, text):
    assert output.age(ns, now) == text


def test_timestamps_are_utc():
    assert output.timestamp(1_700_000_000_123_456_789) == "2023-11-14T22:13:20Z"
    assert output.timestamp(0) == "–"


@pytest.mark.parametrize(
    ("values", "named", "text"),
    [
        ({"qk": 0.5}, None, "qk 0.5"),
        ({"vo": 0.8, "emb": 2.0, "ffn": 1.0}, None, "emb 2, vo 0.8"),
        ({"vo": 0.8, "ffn": 1.0}, {"ffn": 1.0}, "ffn 1, vo 0.8"),
        ({}, None, "every block 1"),
    ],
)
def test_multipliers_name_what_differs_from_one_or_was_asked_for(values, named, text):
    assert output.multipliers(values, named) == text


GRID = Grid("lrl", (("qk", "12", "a"), ("emb", "3", "longer")), ("block", "n", "why"), title="blocks")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_text_is_aligned_and_without_trailing_blanks():
    assert plain([GRID, Grid("l", (), empty="nothing here"), Grid("l", ())]) == (
        "blocks\n"
        "block   n  why\n"
        "qk     12  a\n"
        "emb     3  longer\n"
        "\n"
        "nothing here"
    )  # fmt: skip


def test_what_is_no_terminal_gets_plain_text():
    out = io.StringIO()
    print_tables([GRID], out)
    assert out.getvalue() == plain([GRID]) + "\n"


def test_what_a_terminal_would_obey_is_shown_instead():
    assert clean("\x1b[31mred\nnext\tcell\u202e") == "\\x1b[31mred next cell\\x202e"
    assert "\x1b" not in plain([Grid("l", (("\x1b]0;title\x07",),))])


def test_markup_in_a_name_is_not_obeyed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    print_tables([Grid("l", (("[red]run[/red]",),))], out)
    assert "[red]run[/red]" in out.getvalue()


def test_a_grid_too_wide_for_the_terminal_is_split_and_its_names_are_repeated(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    wide = Grid("lrrrr", (("qk", *("3.4e-09 ± 2e-10",) * 4),), ("block", "one", "two", "three", "four"))
    print_tables([wide], out)
    lines = [line.rstrip() for line in out.getvalue().replace("\x1b[2m", "").replace("\x1b[0m", "").splitlines()]
    assert max(map(len, lines)) <= 40
    assert [line.split() for line in lines[::2]] == [["block", "one", "two"], ["block", "three", "four"]]
    assert lines[1] == lines[3] == "qk     3.4e-09 ± 2e-10  3.4e-09 ± 2e-10"


def test_split_keeps_every_column_once():
    parts = GRID.split(1)
    assert [part.headings for part in parts] == [("block", "n"), ("block", "why")]
    assert GRID.split(1000) == [GRID]


def test_an_undo_of_what_a_policy_gave_back_says_that_its_cut_holds_again():
    undone = Revision(revision=5, multipliers={"qk": 0.5}, author="hold", reason="held well")
    by = Decision(action="ramp_back", policy="hold")
    assert output.describe_undo(UndoLearningRatesResponse(undone=undone, undone_decision=by)) == (
        "takes back revision 5 (qk 0.5), in which policy hold gave back a change of its own: that change holds again"
    )
    cut = Decision(action="scale_lr", policy="hold")
    assert output.describe_undo(UndoLearningRatesResponse(undone=undone, undone_decision=cut)) == (
        "takes back revision 5 (qk 0.5), by policy hold: held well"
    )
