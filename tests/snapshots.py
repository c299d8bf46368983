"""A snapshot of a run that has measured everything, each value another one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from hellos import run_hello
from observations import incident

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.detection.sharpness import SharpnessView
from sharpwatch.daemon.ingest.samples import BlockTap, FailedProbe, HealthReading
from sharpwatch.daemon.records import PairOrder
from sharpwatch.daemon.runs.snapshot import Maxima, RunSnapshot

HELLO = run_hello({("emb", ""): 40, ("qk", "layers.0"): 16}, probes=("gnb", "direction"))


def estimate(value: float, stderr: float = 0.5, estimator: str = "gnb", residual: float = math.nan) -> Estimate:
    return Estimate(value, stderr, 4, estimator, 7, residual)


SPIKE = {"name": "UpdateRmsSpike", "cause": "instability", "first_step": 5}
FULL = RunSnapshot(
    hello=HELLO,
    phase="running",
    attempts=1,
    mode="advise",
    lr_revision=2,
    multipliers={"emb": 1.0, "qk": 0.5},
    step=7,
    loss=2.5,
    last_sample_at=1000.5,
    last_seen_at=1000.5,
    tap=BlockTap(
        gradient_norm=np.array([0.5, math.inf]),
        weight_norm=np.array([3.0, 4.0]),
        update_rms=np.array([math.nan, 1.25]),
        non_finite=np.array([0, 1]),
        learning_rate=np.array([0.001, 0.0005]),
        lr_multiplier=np.array([1.0, 0.5]),
    ),
    maxima=Maxima(4.0, np.array([0.75, math.inf]), np.array([math.nan, 2.5])),
    update_ratio=(0.01, 0.02),
    gradient_noise=(0.125, math.nan),
    health=HealthReading(
        0.004,
        0.1,
        {"spool": 3},
        ("gnb: no logits (×3, disabled)",),
        2,
        {"gnb": FailedProbe(3, given_up=True), "invented": FailedProbe(9, given_up=True)},
        1,
        "mean cross-entropy of shifted labels",
        "verified",
        {"qk": 4},
    ),
    probe_steps={"gnb": (5, 7), "direction": (4, 6)},
    estimates={
        ("trace", "qk", "gnb"): estimate(32.0, 8.0),
        ("sharpness", "qk", "gnb"): estimate(2.0),
        ("top_eigenvalue", "qk", "gnb"): estimate(9.0, math.nan),
        ("top_eigenvalue", "", "gnb"): estimate(10.0),
        ("stability_ratio", "", "direction"): estimate(0.25, 0.125, "direction"),
        ("stability_ratio", "qk", "direction"): estimate(0.5, 0.125, "direction"),
        ("stability_ratio", "emb", "direction"): estimate(math.nan, math.nan, "direction"),
        ("curvature_share", "qk", "direction"): estimate(0.25, 0.03125, "direction"),
        ("curvature_share", "emb", "direction"): estimate(-0.125, 0.0625, "direction"),
        ("trace", "qk", "hutchinson"): estimate(40.0, 4.0, "hutchinson"),
        ("sharpness", "qk", "hutchinson"): replace(estimate(2.5, 0.25, "hutchinson"), step=9),
        ("top_eigenvalue", "qk", "lanczos"): estimate(8.0, 0.5, "lanczos", 0.125),
        ("bottom_eigenvalue", "qk", "lanczos"): estimate(-3.0, math.nan, "lanczos", 0.25),
        ("top_eigenvalue", "", "lanczos"): estimate(12.0, 1.0, "lanczos", 0.5),
        ("bottom_eigenvalue", "", "lanczos"): estimate(-4.0, 0.5, "lanczos", 1.5),
        ("stability_ratio", "", "preconditioned"): estimate(0.75, 0.125, "preconditioned", 0.01),
        ("stability_ratio", "", "linesearch"): estimate(0.375, 0.125, "linesearch", 0.02),
        ("stability_ratio", "qk", "linesearch"): estimate(0.0, 0.0625, "linesearch", 0.02),
        ("effective_rank", "qk", "gnb"): estimate(6.0),
        ("effective_rank", "", "gnb"): estimate(9.0),
        ("drift", "qk", "gnb"): estimate(0.25, 0.125),
        ("alignment", "qk", "gnb"): estimate(0.5, 0.0625),
    },
    layer_sharpness=(estimate(1.0), estimate(2.0)),
    order_correlation=0.75,
    sharpness=SharpnessView(
        ("emb", "qk"),
        np.array([40.0, 16.0]),
        (np.ones(2), 1.0, 0.5),
        (np.array([math.nan, 0.0]), np.zeros(2), np.array([0.25, 0.5])),
        (7, 7, 2.0, 3),
        (PairOrder("emb", "qk", inverted=False, since=3, standard_errors=2.5),),
        3,
    ),
    attention=np.array([math.nan, 1.5]),
    attention_steps=(5, 7),
    incidents=(
        incident("1", **SPIKE, layer_blocks=("layers.0.qk",), active=False),
        incident(
            "2",
            **SPIKE,
            names=("UpdateRmsSpike", "LossSpike"),
            layer_blocks=("layers.0.qk", "emb"),
            onset=3,
            parameter="h.0.q",
            rank=0,
        ),
    ),
    incidents_total={"UpdateRmsSpike": 2},
    excursions_total={("loss", ""): 2, ("update", "qk"): 3},
    decisions_total={("scale_lr", "advise", "proposed"): 1},
)
