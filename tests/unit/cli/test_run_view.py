"""What an operator reads: golden text."""

from __future__ import annotations

import math
from pathlib import Path

from sharpwatch.cli.client import DaemonConnection
from sharpwatch.cli.commands.decisions import decision_table, describe_failure, describe_outcome
from sharpwatch.cli.commands.doctor import CheckResult, check_clock, check_table, metrics_url
from sharpwatch.cli.commands.lr import rate_state, rate_table, revision_table
from sharpwatch.cli.commands.runs import run_table, run_view
from sharpwatch.cli.output import plain
from sharpwatch.common.tls import Tls
from sharpwatch.v1.operator_pb2 import (
    Alert,
    AttentionLayer,
    Block,
    Decision,
    PairOrder,
    Revision,
    Run,
    RunDetail,
    RunPhase,
)
from sharpwatch.v1.types_pb2 import Checkpoint, Estimate, Rollback

NOW = 1_700_000_000.0
SAMPLED = 1_699_999_998 * 10**9

RUN = Run(
    run="gpt2-a1",
    training_job="gpt2-owt",
    phase=RunPhase.RUN_PHASE_RUNNING,
    attempts=2,
    step=412,
    loss=3.45123,
    last_sample_at_unix_ns=SAMPLED,
    mode="enforce",
    control="lr",
    lr_revision=3,
    active_alerts=1,
)


def block(name, parameters, sharpness, stderr, **measured):
    estimates = [
        Estimate(quantity="trace", value=sharpness * parameters, stderr=stderr * parameters, draws=64, estimator="gnb"),
        Estimate(quantity="sharpness", value=sharpness, stderr=stderr, draws=64, estimator="gnb", step=410),
    ]
    if "ratio" in measured:
        ratio = measured.pop("ratio")
        estimates.append(
            Estimate(quantity="stability_ratio", value=ratio, stderr=0.031, draws=8, estimator="direction", step=408)
        )
    if "share" in measured:
        share = measured.pop("share")
        estimates.append(
            Estimate(quantity="curvature_share", value=share, stderr=0.012, draws=8, estimator="direction", step=408)
        )
    for estimate in estimates:
        estimate.block = name
    return Block(block=name, parameters=parameters, estimates=estimates, **measured)


DETAIL = RunDetail(
    run=RUN,
    optimizer="AdamW",
    host="node3",
    blocks=[
        block("emb", 1_234_560, 3.4123e-9, 2.4e-10, gradient_norm=0.1234567, learning_rate=3e-4, lr_multiplier=1.0),
        block(
            "qk",
            65_536,
            3.21e-7,
            math.nan,
            gradient_norm=1.5,
            update_rms=1.01,
            lr_multiplier=0.5,
            ratio=1.31,
            share=0.123,
        ),
        Block(block="norm", parameters=768),
    ],
    estimates=[
        Estimate(quantity="stability_ratio", value=0.87, stderr=0.042, draws=8, estimator="direction", step=400)
    ],
    alerts=[
        Alert(
            name="StabilityLimit",
            severity="critical",
            cause="instability",
            blocks=["qk", "vo"],
            layer_blocks=["layers.3.qk", "layers.0.vo"],
            onset=398,
            evidence="ratio 1.31 ± 0.03 > 1",
            first_step=400,
            last_step=412,
            active=True,
        ),
        Alert(name="LossSpike", severity="warning", first_step=10, last_step=11),
    ],
    checkpoints=[Checkpoint(step=300, uri="/ckpt/300"), Checkpoint(step=400, uri="/ckpt/400")],
    overhead_ratio=0.00812,
    step_seconds=0.2134,
    dropped={"spool_full": 12},
    probe_failures=["direction: out of memory (2 times)"],
    block_order_correlation=0.9,
    objective="mean cross-entropy of logits, labels shifted by one",
    objective_state="verified",
    swallowed_errors=2,
    attention=[
        AttentionLayer(layer="layers.0", logit_scale=0.25, step=410),
        AttentionLayer(layer="layers.1", logit_scale=1.23456, step=410),
    ],
)

SHOWN = """\
run                      gpt2-a1
training job             gpt2-owt, AdamW, node3
phase                    running, attempt 2, last sample 2 s ago
step                     412, 0.213 s each
loss                     3.451
mode                     enforce, control lr, LR revision 3
overhead                 0.81 % of step time
objective                mean cross-entropy of logits, labels shifted by one (verified)
model's stability ratio  0.87 ± 0.04
curvature shares         qk 0.12 ± 0.01
block order              rank correlation 0.9 with emb < qk < ffn < vo < norm
attention logits         scale up to 1.235 in layers.1, of 2 layers, at step 410
checkpoints              2, newest of step 400 at /ckpt/400

block  parameters        sharpness            trace  top eigenvalue  stability ratio  gradient norm  update RMS  \
learning rate  multiplier
emb     1,234,560  3.4e-09 ± 2e-10  0.0042 ± 0.0003               –                –         0.1235           –  \
       0.0003           1
qk         65,536     3.21e-07 ± ?        0.021 ± ?               –      1.31 ± 0.03            1.5        1.01  \
            –         0.5
norm          768                –                –               –                –              –           –  \
            –           –

quantity         estimator  draws  step  steps ago  of
sharpness        gnb           64   410          2  emb, qk
trace            gnb           64     0        412  emb, qk
stability ratio  direction      8   408          4  qk
stability ratio  direction      8   400         12  whole model

incident        severity  cause        culprit                   since step  last step  evidence
StabilityLimit  critical  instability  layers.3.qk, layers.0.vo         398        412  ratio 1.31 ± 0.03 > 1

probe failure        direction: out of memory (2 times)
dropped samples      12 spool_full
errors of the agent  2, which the trainer's log has"""


def test_show():
    assert plain(run_view(DETAIL, NOW)) == SHOWN


def test_an_override_is_shown_with_its_unit():
    detail = RunDetail(run=Run(run="new"))
    for key, value in (("stall_after", 20.0), ("stall_after", 7200.0), ("pages_per_10k_steps", 2.0)):
        detail.overrides.add(key=key, value=value, match={"team": "nlp"})
    lines = [" ".join(line.split()) for line in plain(run_view(detail, NOW)).splitlines()]
    assert [line for line in lines if "override" in line] == [
        "stall_after 20 s, by the override for team=nlp",
        "stall_after 2 h, by the override for team=nlp",
        "pages_per_10k_steps 2, by the override for team=nlp",
    ]


def test_show_of_a_run_that_has_sent_nothing_yet():
    detail = RunDetail(run=Run(run="new", training_job="job", phase=RunPhase.RUN_PHASE_SILENT, mode="observe"))
    assert plain(run_view(detail, NOW)).endswith(
        "\n\nno block reported yet\n\nno probe has come in yet\n\nno open incident"
        "\n\nno probe failure, no sample dropped, no error of the agent"
    )


def test_jobs():
    other = Run(run="b", training_job="a-job", phase=RunPhase.RUN_PHASE_CLOSED, mode="observe")
    assert plain([run_table([RUN, other], NOW)]) == (
        "training job  run      phase    step   loss  mode     LR revision  alerts  last sample\n"
        "a-job         b        closed      0      –  observe            0       0  never\n"
        "gpt2-owt      gpt2-a1  running   412  3.451  enforce            3       1  2 s ago"
    )
    assert "no run yet" in plain([run_table([], NOW)])


def test_history():
    revisions = [
        Revision(revision=1, multipliers={"qk": 0.5}, author="ada@node3", reason="spikes", made_at_unix_ns=SAMPLED),
        Revision(revision=2, author="ada@node3", made_at_unix_ns=SAMPLED, applied_step=420, undoes=1),
        Revision(revision=3, multipliers={"qk": 4}, author="bob", made_at_unix_ns=SAMPLED, outcome="cancelled"),
        Revision(revision=4, multipliers={"qk": 2}, author="bob", made_at_unix_ns=SAMPLED, outcome="sent"),
    ]
    assert plain([revision_table(revisions)]) == (
        "revision  made at                applied at step  multipliers    author     reason\n"
        "       1  2023-11-14T22:13:18Z           not yet  qk 0.5         ada@node3  spikes\n"
        "       2  2023-11-14T22:13:18Z               420  every block 1  ada@node3  undoes 1\n"
        "       3  2023-11-14T22:13:18Z  never: cancelled  qk 4           bob\n"
        "       4  2023-11-14T22:13:18Z           not yet  qk 2           bob"
    )


def test_rates():
    applied = Revision(multipliers={"qk": 0.4}, applied_step=400)
    assert plain([rate_table(DETAIL, applied)]) == (
        "run gpt2-a1, step 412, revision 3\n"
        "block  learning rate  multiplier  asked for  updated every  state\n"
        "emb           0.0003           1          1           step\n"
        "qk                 –         0.5        0.4           step  wrong: should be 0.4 since step 400\n"
        "norm               –           –          1           step"
    )


def test_a_multiplier_that_is_not_as_asked_for_says_why():
    qk = DETAIL.blocks[1]
    ramp = Revision(multipliers={"qk": 0.25}, applied_step=400, ramp_steps=20)
    assert rate_state(qk, ramp, 412) == "on its way, until step 420"
    assert rate_state(qk, ramp, 420) == "wrong: should be 0.25 since step 420"
    fused = Revision(multipliers={"qk": 1.0, "vo": 0.25}, applied_step=400)  # the mean of 0.25 and 1 lies between
    assert rate_state(qk, fused, 412) == (
        "below 1 since step 400: wrong, unless it shares parameters with a slower block"
    )
    assert rate_state(qk, Revision(multipliers={"qk": 0.25}), 412) == "not applied yet"
    assert rate_state(qk, None, 412) == "wrong: nothing was asked for"
    assert rate_state(qk, Revision(multipliers={"qk": 0.5000001}, applied_step=400), 412) == ""


CUT = Decision(
    id="d7",
    run="gpt2-a1",
    made_at_unix_ns=SAMPLED,
    step=405,
    policy="cut-unstable-blocks",
    alert_name="StabilityLimit",
    action="scale_lr",
    mode="enforce",
    guard="ok",
    outcome="applied",
    multipliers={"qk": 0.5, "emb": 2.0},
    revision=3,
    applied_step=412,
)
BACK = Decision(
    id="d8",
    run="gpt2-a1",
    made_at_unix_ns=SAMPLED,
    step=430,
    action="rollback",
    mode="operator",
    outcome="refused",
    guard="cooldown: 90 steps to go",
    author="ada@node3",
    reason="bad data",
    rollback=Rollback(checkpoint=Checkpoint(step=400, uri="/ckpt/400"), skip_from_step=405, skip_to_step=421),
)


def test_decisions():
    assert plain([decision_table([CUT, BACK])]) == (
        "id  made at               run      step  action    mode      outcome  "
        "change                                                   by                   why\n"
        "d7  2023-11-14T22:13:18Z  gpt2-a1   405  scale_lr  enforce   applied  "
        "emb 2, qk 0.5                                            cut-unstable-blocks  "
        "StabilityLimit; applied at step 412\n"
        "d8  2023-11-14T22:13:18Z  gpt2-a1   430  rollback  operator  refused  "
        "back to step 400 (/ckpt/400), skipping steps 405 to 420  ada@node3            "
        "bad data; cooldown: 90 steps to go"
    )


def test_what_a_decision_came_to():
    assert describe_outcome(CUT) == "revision 3 applied at step 412: emb 2, qk 0.5"
    unchanged = Decision(revision=4, outcome="applied", applied_step=9, multipliers={"qk": 1.0}, detail="unchanged: vo")
    assert describe_outcome(unchanged, {"qk": 1.0}) == "revision 4 applied at step 9: qk 1\nunchanged: vo"
    assert describe_outcome(BACK).startswith(
        "rollback refused: back to step 400 (/ckpt/400), skipping steps 405 to 420 (decision d8)"
    )


def test_why_a_decision_did_not_come_into_force():
    assert describe_failure(BACK, 5) == "decision d8 refused: cooldown: 90 steps to go"
    sent = Decision(id="d9", run="gpt2-a1", outcome="sent")
    assert describe_failure(sent, 5) == (
        "no answer from the trainer of gpt2-a1 within 5 s; decision d9 stays sent: see sharpwatch decisions gpt2-a1"
    )
    sent.waits = "run gpt2-a1 has no trainer now: its next one gets it"
    assert describe_failure(sent, 5) == (
        "run gpt2-a1 has no trainer now: its next one gets it; decision d9 stays sent: see sharpwatch decisions gpt2-a1"
    )


def test_doctor_says_what_to_do_below_what_is_wrong():
    results = [CheckResult("python", "ok", "3.11.7"), CheckResult("store", "fail", "disk full", "free space")]
    assert plain([check_table(results)]) == (
        "ok    python  3.11.7\n"
        "fail  store   disk full\n"
        "              → free space"
    )  # fmt: skip


def reached(address, tls=None):
    return DaemonConnection(address, "", Path("/t"), tls)


def test_metrics_are_sought_where_the_daemon_is():
    assert metrics_url("0.0.0.0:9741", reached("node3:7741", Tls(ca="/ca.pem"))) == "https://node3:9741/metrics"
    assert metrics_url("127.0.0.1:9741", reached("127.0.0.1:7741")) == "http://127.0.0.1:9741/metrics"
    assert metrics_url("0.0.0.0:9741", reached("node3:7741")) == "http://node3:9741/metrics"
    assert metrics_url("[::]:9741", reached("unix:/run/sw.sock")) == "http://127.0.0.1:9741/metrics"


def test_clocks_apart_are_warned_of():
    assert check_clock(100.0, 103.0).state == "ok"
    assert check_clock(100.0, 40.0).found == "60 s from the daemon's"
    assert check_clock(100.0, 40.0).state == "warn"


def test_show_says_since_when_the_order_holds_or_what_is_inverted():
    detail = RunDetail(block_order_correlation=1.0, order_since_step=320)
    assert "rank correlation 1 with emb < qk < ffn < vo < norm, which holds since step 320" in plain(
        run_view(detail, NOW)
    )
    inverted = PairOrder(low="ffn", high="vo", inverted=True, since_step=120, standard_errors=-2.5)
    shown = plain(
        run_view(RunDetail(block_order_correlation=0.9, order=[inverted, PairOrder(low="emb", high="qk")]), NOW)
    )
    assert "; ffn above vo since step 120 (by 2.5 standard errors)" in shown
