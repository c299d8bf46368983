"""The table of `sharpwatch incidents`: golden text."""

from __future__ import annotations

from sharpwatch.cli.commands.incidents import culprit, incident_table
from sharpwatch.cli.output import plain
from sharpwatch.v1.operator_pb2 import Alert

OPEN = Alert(
    id="3f9c01d2ab47",
    run="gpt2-a1",
    name="WeightJump",
    names=["WeightJump", "LossSpike"],
    cause="damaged-weight",
    severity="critical",
    blocks=["qk", "vo"],
    layer_blocks=["layers.3.qk", "layers.0.vo", "layers.1.vo", "layers.2.vo"],
    evidence="weight norm ×4; loss 9.1",
    onset=400,
    first_step=401,
    last_step=412,
    active=True,
    acknowledged="ada@node3: bad shard",
)
CLOSED = Alert(
    id="0a",
    name="LossSpike",
    cause="data",
    severity="warning",
    evidence="loss 4.1",
    onset=97,
    first_step=99,
    last_step=102,
    closed="no finding for 20 samples",
)


SHOWN = """\
id            onset  opened  severity  cause           name        culprit                                           \
evidence                                      acknowledged
3f9c01d2ab47    400     401  critical  damaged-weight  WeightJump  layers.3.qk, layers.0.vo, layers.1.vo and 1 more  \
weight norm ×4; loss 9.1                      ada@node3: bad shard
0a               97      99  warning   data            LossSpike   whole model                                       \
loss 4.1 (closed: no finding for 20 samples)  –"""


def test_incidents_the_newest_first():
    assert plain([incident_table([CLOSED, OPEN])]) == SHOWN


def test_no_incident():
    assert plain([incident_table([])]) == "no incident"
    assert plain([incident_table([], hidden=2)]) == "no open incident; 2 closed, see --all"


def test_the_culprit():
    assert culprit([]) == "whole model"
    assert culprit(["the model"]) == "whole model"  # what stands for it in a log
    assert culprit(["layers.3.qk", "emb"]) == "layers.3.qk, emb"
    assert culprit(["layers.3.qk", "emb"], "h.3.attn.q.weight") == "layers.3.qk (h.3.attn.q.weight), emb"
    assert culprit([], rank=0) == "rank 0"
    assert culprit(["emb"], rank=3) == "emb; rank 3"


def test_the_rank_that_differs():
    alert = Alert(id="1", name="RankDiffers", severity="warning", active=True, rank=0)
    assert "  rank 0  " in plain([incident_table([alert])])


def test_an_alert_of_an_older_daemon_names_block_types():
    alert = Alert(id="1", name="UpdateRmsSpike", severity="warning", blocks=["qk"], active=True)
    assert "  qk  " in plain([incident_table([alert])])
