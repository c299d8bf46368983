"""The table of `sharpwatch top` in terminals of several widths: golden text."""

from __future__ import annotations

from sharpwatch.cli.commands.top import View, table
from sharpwatch.cli.output import plain
from sharpwatch.v1.operator_pb2 import Block, Run, RunDetail, RunPhase

NOW = 1_700_000_000.0
SAMPLED = 1_699_999_998 * 10**9


def run(name: str, phase: RunPhase.ValueType = RunPhase.RUN_PHASE_RUNNING, **multipliers: float) -> RunDetail:
    found = Run(run=name, step=123_412, loss=3.45123, mode="enforce", phase=phase, last_sample_at_unix_ns=SAMPLED)
    blocks = [Block(block=block, lr_multiplier=value) for block, value in multipliers.items()]
    return RunDetail(run=found, blocks=blocks, step_seconds=0.2134)


ILL = run("gpt2-owt-a1", qk=0.5, vo=0.25, emb=1)
ILL.estimates.add(quantity="stability_ratio", value=1.31)
ILL.alerts.add(name="UpdateRmsSpike", severity="critical", onset=123_398, active=True)
VIEW = View([ILL, run("b", RunPhase.RUN_PHASE_SILENT, qk=1, vo=1)], 0, NOW)
WHOLE = """\
run            step  steps/s   loss  stability  open  worst incident               rates in force   mode             \
last sample
gpt2-owt-a1  123412     4.69  3.451       1.31     1  UpdateRmsSpike since 123398  qk 0.5, vo 0.25  enforce          \
    2 s ago
b            123412     4.69  3.451          –     0  –                            every block 1    enforce, silent  \
    2 s ago"""
IN_84 = """\
run            step  open  worst           rates            mode             sample
gpt2-owt-a1  123412     1  UpdateRmsSpike  qk 0.5, vo 0.25  enforce             2 s
b            123412     0  –               all 1            enforce, silent     2 s"""


def test_where_there_is_room_it_has_all():
    assert plain([table(VIEW)]) == plain([table(VIEW, 160)]) == WHOLE


def test_in_80_columns_it_has_what_matters():
    """The usual terminal: the mode, the age of the sample and the whole set of rates are there."""
    assert plain([table(VIEW, 84)]) == IN_84
    assert max(map(len, plain([table(VIEW, 80)]).splitlines())) <= 80
    for words in ("UpdateRmsSpike", "qk 0.5, vo 0.25", "enforce, silent", "sample", "2 s"):
        assert words in plain([table(VIEW, 80)])


def test_what_is_long_is_cut_so_that_the_rest_is_seen():
    long = run("a-very-long-name-of-a-run", **dict.fromkeys(("emb", "qk", "ffn", "vo"), 0.5))
    shown = plain([table(View([long], 0, NOW), 80)])
    assert "a-very-long-name-of…" in shown
    assert "emb 0.5, ffn 0.5,…" in shown
    assert shown.splitlines()[1].endswith("2 s")
