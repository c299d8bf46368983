"""/metrics to the letter, for runs that are made up."""

from __future__ import annotations

import math
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from hellos import run_hello
from prometheus_client import CollectorRegistry
from snapshots import FULL, HELLO

from sharpwatch.daemon.api.conversions import detail_message
from sharpwatch.daemon.config.settings import ALERT_NAMES
from sharpwatch.daemon.exporter.families import MAX_LAYER_SERIES
from sharpwatch.daemon.exporter.metrics import Exposition, RunCollector
from sharpwatch.daemon.exporter.own_metrics import OwnMetrics
from sharpwatch.daemon.runs.snapshot import RunSnapshot

GOLDEN = """\
sharpwatch_run_info{agent_version="0.1.0",control="lr",host="h",mode="advise",optimizer="AdamW",phase="running",run="run",training_job="job"} 1.0
sharpwatch_run_step{run="run",training_job="job"} 7.0
sharpwatch_run_loss{run="run",training_job="job"} 2.5
sharpwatch_run_last_sample_timestamp_seconds{run="run",training_job="job"} 1000.5
sharpwatch_block_parameters{block="emb",run="run",training_job="job"} 40.0
sharpwatch_block_parameters{block="qk",run="run",training_job="job"} 16.0
sharpwatch_block_gradient_norm{block="emb",run="run",training_job="job"} 0.5
sharpwatch_block_gradient_norm{block="qk",run="run",training_job="job"} +Inf
sharpwatch_block_weight_norm{block="emb",run="run",training_job="job"} 3.0
sharpwatch_block_weight_norm{block="qk",run="run",training_job="job"} 4.0
sharpwatch_block_update_rms{block="qk",run="run",training_job="job"} 1.25
sharpwatch_block_learning_rate{block="emb",run="run",training_job="job"} 0.001
sharpwatch_block_learning_rate{block="qk",run="run",training_job="job"} 0.0005
sharpwatch_block_lr_multiplier{block="emb",run="run",training_job="job"} 1.0
sharpwatch_block_lr_multiplier{block="qk",run="run",training_job="job"} 0.5
sharpwatch_block_update_ratio{block="emb",run="run",training_job="job"} 0.01
sharpwatch_block_update_ratio{block="qk",run="run",training_job="job"} 0.02
sharpwatch_block_gradient_noise{block="emb",run="run",training_job="job"} 0.125
sharpwatch_run_loss_max{run="run",training_job="job"} 4.0
sharpwatch_block_gradient_norm_max{block="emb",run="run",training_job="job"} 0.75
sharpwatch_block_gradient_norm_max{block="qk",run="run",training_job="job"} +Inf
sharpwatch_block_update_rms_max{block="qk",run="run",training_job="job"} 2.5
sharpwatch_excursions_total{block="",run="run",signal="loss",training_job="job"} 2.0
sharpwatch_excursions_total{block="emb",run="run",signal="update",training_job="job"} 0.0
sharpwatch_excursions_total{block="qk",run="run",signal="update",training_job="job"} 3.0
sharpwatch_excursions_total{block="emb",run="run",signal="gradient",training_job="job"} 0.0
sharpwatch_excursions_total{block="qk",run="run",signal="gradient",training_job="job"} 0.0
sharpwatch_excursions_total{block="emb",run="run",signal="weight",training_job="job"} 0.0
sharpwatch_excursions_total{block="qk",run="run",signal="weight",training_job="job"} 0.0
sharpwatch_block_sharpness{block="qk",estimator="gnb",run="run",training_job="job"} 2.0
sharpwatch_block_sharpness{block="qk",estimator="hutchinson",run="run",training_job="job"} 2.5
sharpwatch_block_sharpness{block="qk",estimator="moment",run="run",training_job="job"} 0.0625
sharpwatch_block_sharpness_stderr{block="qk",estimator="gnb",run="run",training_job="job"} 0.5
sharpwatch_block_sharpness_stderr{block="qk",estimator="hutchinson",run="run",training_job="job"} 0.25
sharpwatch_block_sharpness_stderr{block="qk",estimator="moment",run="run",training_job="job"} 0.03125
sharpwatch_block_hessian_trace{block="qk",estimator="gnb",run="run",training_job="job"} 32.0
sharpwatch_block_hessian_trace{block="qk",estimator="hutchinson",run="run",training_job="job"} 40.0
sharpwatch_block_hessian_trace{block="qk",estimator="moment",run="run",training_job="job"} 1.0
sharpwatch_block_hessian_trace_stderr{block="qk",estimator="gnb",run="run",training_job="job"} 8.0
sharpwatch_block_hessian_trace_stderr{block="qk",estimator="hutchinson",run="run",training_job="job"} 4.0
sharpwatch_block_hessian_trace_stderr{block="qk",estimator="moment",run="run",training_job="job"} 0.5
sharpwatch_block_top_eigenvalue{block="qk",estimator="gnb",run="run",training_job="job"} 9.0
sharpwatch_block_top_eigenvalue{block="qk",estimator="lanczos",run="run",training_job="job"} 8.0
sharpwatch_block_top_eigenvalue_stderr{block="qk",estimator="lanczos",run="run",training_job="job"} 0.5
sharpwatch_block_top_eigenvalue_residual{block="qk",estimator="lanczos",run="run",training_job="job"} 0.125
sharpwatch_block_bottom_eigenvalue{block="qk",estimator="lanczos",run="run",training_job="job"} -3.0
sharpwatch_block_bottom_eigenvalue_residual{block="qk",estimator="lanczos",run="run",training_job="job"} 0.25
sharpwatch_block_stability_ratio{block="qk",kind="directional",run="run",training_job="job"} 0.5
sharpwatch_block_stability_ratio{block="qk",kind="linesearch",run="run",training_job="job"} 0.0
sharpwatch_block_stability_ratio_stderr{block="qk",kind="directional",run="run",training_job="job"} 0.125
sharpwatch_block_stability_ratio_stderr{block="qk",kind="linesearch",run="run",training_job="job"} 0.0625
sharpwatch_block_curvature_share{block="qk",run="run",training_job="job"} 0.25
sharpwatch_block_curvature_share{block="emb",run="run",training_job="job"} -0.125
sharpwatch_block_curvature_share_stderr{block="qk",run="run",training_job="job"} 0.03125
sharpwatch_block_curvature_share_stderr{block="emb",run="run",training_job="job"} 0.0625
sharpwatch_block_effective_rank{block="qk",estimator="gnb",run="run",training_job="job"} 6.0
sharpwatch_block_effective_rank_stderr{block="qk",estimator="gnb",run="run",training_job="job"} 0.5
sharpwatch_block_drift{block="qk",estimator="gnb",run="run",training_job="job"} 0.25
sharpwatch_block_drift_stderr{block="qk",estimator="gnb",run="run",training_job="job"} 0.125
sharpwatch_block_gradient_alignment{block="qk",estimator="gnb",run="run",training_job="job"} 0.5
sharpwatch_block_gradient_alignment_stderr{block="qk",estimator="gnb",run="run",training_job="job"} 0.0625
sharpwatch_top_eigenvalue{estimator="gnb",run="run",training_job="job"} 10.0
sharpwatch_top_eigenvalue{estimator="lanczos",run="run",training_job="job"} 12.0
sharpwatch_top_eigenvalue_stderr{estimator="gnb",run="run",training_job="job"} 0.5
sharpwatch_top_eigenvalue_stderr{estimator="lanczos",run="run",training_job="job"} 1.0
sharpwatch_top_eigenvalue_residual{estimator="lanczos",run="run",training_job="job"} 0.5
sharpwatch_bottom_eigenvalue{estimator="lanczos",run="run",training_job="job"} -4.0
sharpwatch_bottom_eigenvalue_stderr{estimator="lanczos",run="run",training_job="job"} 0.5
sharpwatch_bottom_eigenvalue_residual{estimator="lanczos",run="run",training_job="job"} 1.5
sharpwatch_stability_ratio{kind="directional",run="run",training_job="job"} 0.25
sharpwatch_stability_ratio{kind="preconditioned",run="run",training_job="job"} 0.75
sharpwatch_stability_ratio{kind="linesearch",run="run",training_job="job"} 0.375
sharpwatch_stability_ratio_stderr{kind="directional",run="run",training_job="job"} 0.125
sharpwatch_stability_ratio_stderr{kind="preconditioned",run="run",training_job="job"} 0.125
sharpwatch_stability_ratio_stderr{kind="linesearch",run="run",training_job="job"} 0.125
sharpwatch_block_estimate_step{block="qk",estimator="gnb",run="run",training_job="job"} 7.0
sharpwatch_block_estimate_step{block="qk",estimator="directional",run="run",training_job="job"} 7.0
sharpwatch_block_estimate_step{block="emb",estimator="directional",run="run",training_job="job"} 7.0
sharpwatch_block_estimate_step{block="qk",estimator="hutchinson",run="run",training_job="job"} 9.0
sharpwatch_block_estimate_step{block="qk",estimator="lanczos",run="run",training_job="job"} 7.0
sharpwatch_block_estimate_step{block="qk",estimator="linesearch",run="run",training_job="job"} 7.0
sharpwatch_block_estimate_step{block="qk",estimator="moment",run="run",training_job="job"} 7.0
sharpwatch_estimate_step{estimator="gnb",run="run",training_job="job"} 7.0
sharpwatch_estimate_step{estimator="directional",run="run",training_job="job"} 7.0
sharpwatch_estimate_step{estimator="lanczos",run="run",training_job="job"} 7.0
sharpwatch_estimate_step{estimator="preconditioned",run="run",training_job="job"} 7.0
sharpwatch_estimate_step{estimator="linesearch",run="run",training_job="job"} 7.0
sharpwatch_block_order_correlation{run="run",training_job="job"} 0.75
sharpwatch_block_order_inverted{high="qk",low="emb",run="run",training_job="job"} 0.0
sharpwatch_block_order_since_step{run="run",training_job="job"} 3.0
sharpwatch_alert_active{alert="UpdateRmsSpike",block="qk",run="run",training_job="job"} 1.0
sharpwatch_alert_active{alert="UpdateRmsSpike",block="emb",run="run",training_job="job"} 1.0
sharpwatch_alert_active{alert="LossSpike",block="qk",run="run",training_job="job"} 1.0
sharpwatch_alert_active{alert="LossSpike",block="emb",run="run",training_job="job"} 1.0
sharpwatch_alerts_total{alert="AttentionGrowth",run="run",training_job="job"} 0.0
sharpwatch_alerts_total{alert="DeadBlock",run="run",training_job="job"} 0.0
sharpwatch_alerts_total{alert="GradientSpike",run="run",training_job="job"} 0.0
sharpwatch_alerts_total{alert="LossDrop",run="run",training_job="job"} 0.0
sharpwatch_alerts_total{alert="LossSpike",run="run",training_job="job"} 0.0
sharpwatch_alerts_total{alert="NonFinite",run="run",training_job="job"} 0.0
sharpwatch_alerts_total{alert="OptimizerState",run="run",training_job="job"} 0.0
sharpwatch_alerts_total{alert="RankDiffers",run="run",training_job="job"} 0.0
sharpwatch_alerts_total{alert="RateRaise",run="run",training_job="job"} 0.0
sharpwatch_alerts_total{alert="RateZero",run="run",training_job="job"} 0.0
sharpwatch_alerts_total{alert="RunStalled",run="run",training_job="job"} 0.0
sharpwatch_alerts_total{alert="SettingsChanged",run="run",training_job="job"} 0.0
sharpwatch_alerts_total{alert="SharpnessSpike",run="run",training_job="job"} 0.0
sharpwatch_alerts_total{alert="SilentFailure",run="run",training_job="job"} 0.0
sharpwatch_alerts_total{alert="StabilityLimit",run="run",training_job="job"} 0.0
sharpwatch_alerts_total{alert="UpdateRmsSpike",run="run",training_job="job"} 2.0
sharpwatch_alerts_total{alert="WeightGrowth",run="run",training_job="job"} 0.0
sharpwatch_alerts_total{alert="WeightJump",run="run",training_job="job"} 0.0
sharpwatch_incident{block="qk",cause="instability",layer="layers.0",name="UpdateRmsSpike",parameter="h.0.q",rank="0",run="run",severity="warning",training_job="job"} 1.0
sharpwatch_incident_onset_step{block="qk",cause="instability",layer="layers.0",name="UpdateRmsSpike",parameter="h.0.q",rank="0",run="run",severity="warning",training_job="job"} 3.0
sharpwatch_critical_incidents_total{run="run",training_job="job"} 0.0
sharpwatch_decisions_total{action="scale_lr",mode="advise",outcome="proposed",run="run",training_job="job"} 1.0
sharpwatch_lr_revision{run="run",training_job="job"} 2.0
sharpwatch_agent_overhead_ratio{run="run",training_job="job"} 0.004
sharpwatch_agent_dropped_samples_total{reason="spool",run="run",training_job="job"} 3.0
sharpwatch_block_update_interval{block="emb",run="run",training_job="job"} 1.0
sharpwatch_block_update_interval{block="qk",run="run",training_job="job"} 4.0
sharpwatch_agent_swallowed_errors_total{run="run",training_job="job"} 1.0
sharpwatch_agent_probe_failures_total{probe="gnb",run="run",training_job="job"} 3.0
sharpwatch_agent_probe_failures_total{probe="direction",run="run",training_job="job"} 0.0
sharpwatch_agent_probe_given_up{probe="gnb",run="run",training_job="job"} 1.0
sharpwatch_agent_probe_given_up{probe="direction",run="run",training_job="job"} 0.0
sharpwatch_objective_info{objective="mean cross-entropy of shifted labels",run="run",state="verified",training_job="job"} 1.0
sharpwatch_layer_sharpness{block="qk",estimator="gnb",layer="layers.0",run="run",training_job="job"} 2.0
sharpwatch_layer_sharpness_stderr{block="qk",estimator="gnb",layer="layers.0",run="run",training_job="job"} 0.5
sharpwatch_attention_logit_scale{layer="layers.0",run="run",training_job="job"} 1.5
"""  # noqa: E501  as Prometheus reads it


def exposition(*snapshots: RunSnapshot, now: float = 1000.5, layers: bool = True) -> str:
    collector = RunCollector(lambda: snapshots, lambda: now, stale_after=60.0, layers=layers)
    return Exposition(CollectorRegistry(), collector).render("")[0].decode()


def samples(text: str) -> str:
    return "".join(line + "\n" for line in text.splitlines() if not line.startswith("#"))


def labels_sorted(text: str) -> list[str]:
    """Lines with their labels in one order: prometheus_client's own differs between its versions."""
    lines = []
    for line in text.splitlines():
        name, _, rest = line.partition("{")
        labels, _, value = rest.partition("} ")
        lines.append(f"{name}{{{','.join(sorted(labels.split(',')))}}} {value}")
    return lines


def test_exposition_is_golden():
    assert labels_sorted(samples(exposition(FULL))) == labels_sorted(GOLDEN)


def test_a_run_that_measured_nothing_exports_no_number_it_has_not():
    empty = RunSnapshot(hello=HELLO, phase="running", attempts=1, mode="observe", lr_revision=0, multipliers={})
    lines = samples(exposition(empty)).splitlines()
    assert {line.partition("{")[0] for line in lines} == {
        "sharpwatch_run_info",
        "sharpwatch_block_parameters",
        "sharpwatch_lr_revision",
        "sharpwatch_alerts_total",
        "sharpwatch_critical_incidents_total",
        "sharpwatch_excursions_total",
    }
    # What was counted is known to be none from the start, else the first alert is no increase.
    for name, series in (("alerts", len(ALERT_NAMES)), ("critical_incidents", 1), ("excursions", 1 + 3 * 2)):
        counted = [line.rpartition(" ")[2] for line in lines if line.startswith(f"sharpwatch_{name}_total")]
        assert counted == ["0.0"] * series


@pytest.mark.parametrize(
    ("phase", "age", "shown"), [("silent", 59, True), ("silent", 61, False), ("running", 10_000, True)]
)
def test_a_run_that_left_is_exported_until_stale_after(phase, age, shown):
    text = exposition(replace(FULL, phase=phase), now=1000.5 + age)
    assert ("sharpwatch_run_step{" in text) == shown


def exported(snapshot: RunSnapshot) -> set[str]:
    return {line.partition("{")[0] for line in samples(exposition(snapshot)).splitlines()}


def test_a_probe_that_was_given_up_lets_its_gauges_go_and_no_others():
    """The others were read at every step, or by a probe that goes on."""
    steps = FULL.probe_steps | dict.fromkeys(("hutchinson", "lanczos", "linesearch"), (103, 105))
    later = replace(FULL, step=108, attention_steps=(103, 105))
    let_go = exported(FULL) - exported(replace(later, probe_steps=steps | {"direction": (103, 105)}))
    assert let_go == {
        "sharpwatch_block_effective_rank",
        "sharpwatch_block_effective_rank_stderr",
        "sharpwatch_block_drift",
        "sharpwatch_block_drift_stderr",
        "sharpwatch_block_gradient_alignment",
        "sharpwatch_block_gradient_alignment_stderr",
        "sharpwatch_block_order_correlation",
        "sharpwatch_block_order_inverted",
        "sharpwatch_block_order_since_step",
        "sharpwatch_layer_sharpness",
        "sharpwatch_layer_sharpness_stderr",
    }
    text = exposition(replace(FULL, step=108, probe_steps=steps))
    assert 'estimator="hutchinson"' in text
    assert 'estimator="gnb"' not in text
    assert 'kind="directional"' not in text
    assert "sharpwatch_block_update_ratio{" not in text  # the direction probe reads it, which is too old as well


def test_layers_can_be_off():
    text = exposition(FULL, layers=False)
    assert "sharpwatch_layer" not in text
    assert "sharpwatch_attention" not in text


def test_the_series_of_layers_are_bounded():
    count = MAX_LAYER_SERIES + 10
    hello = run_hello({("qk", f"layers.{i}"): 8 for i in range(count)})
    many = replace(FULL, hello=hello, layer_sharpness=(), tap=None, maxima=None, attention=np.ones(count))
    many = replace(many, update_ratio=None, gradient_noise=None)
    assert exposition(many).count("sharpwatch_attention_logit_scale{") == MAX_LAYER_SERIES


def test_promtool_finds_nothing_to_mend(program):
    registry = CollectorRegistry()
    metrics = OwnMetrics(registry, queue_depth=lambda: 0, queue_capacity=8)
    metrics.refused.labels("malformed").inc()
    metrics.dropped_probes.labels("gnb").inc()
    metrics.internal_errors.labels("fold").inc()
    body, _ = Exposition(registry, RunCollector(lambda: (FULL,), lambda: 0.0, stale_after=60.0)).render("")
    done = subprocess.run([program("promtool"), "check", "metrics"], input=body, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_operators_get_what_is_exported_of_a_block_each_step():
    emb, qk = detail_message(FULL, ()).blocks
    measured = {
        block.block: {
            field.name: value for field, value in block.ListFields() if field.name not in {"block", "estimates"}
        }
        for block in (emb, qk)
    }
    assert measured == {
        "emb": {
            "parameters": 40,
            "gradient_norm": 0.5,
            "weight_norm": 3.0,
            "update_ratio": 0.01,
            "learning_rate": 0.001,
            "lr_multiplier": 1.0,
            "update_every": 1,
            "gradient_noise": 0.125,
        },
        "qk": {
            "parameters": 16,
            "gradient_norm": math.inf,
            "weight_norm": 4.0,
            "update_rms": 1.25,
            "update_ratio": 0.02,
            "learning_rate": 0.0005,
            "lr_multiplier": 0.5,
            "update_every": 4,
        },
    }
