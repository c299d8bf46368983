#!/usr/bin/env python3
"""Print the dashboard of one run: `python grafana/generate.py > grafana/sharpwatch-run.json`.

The bands need a colour, an upper and a lower edge for each block: hundreds of lines of JSON that differ in one word.
"""

from __future__ import annotations

import json
import sys

from panels import (
    BY_BLOCK,
    COLOURS,
    JOB,
    LOG,
    RUN,
    Json,
    Panel,
    band,
    block_colours,
    by_block,
    latest,
    lines,
    number,
    or_none,
    override,
    place,
    variable,
    with_culprit,
    with_error,
)

KINDS = {"directional": "blue", "linesearch": "green", "preconditioned": "orange"}  # of stability ratios
SEVERITIES = {"critical": "red", "warning": "orange"}
SKETCHED = f'{RUN}, estimator=~"gnb.*"'


def trouble() -> Panel:
    """The first thing to be read: the name of the block, in red."""
    critical, warning = (
        latest("sharpwatch_incident", "block, layer, rank", f'{RUN}, severity="{severity}"') for severity in SEVERITIES
    )
    steps = [{"color": "green", "value": None}, {"color": "orange", "value": 1}, {"color": "red", "value": 2}]
    worst = f"max by (culprit) ({with_culprit(f'2 * {critical} or {warning}')})"
    return Panel(
        "stat",
        "Block in trouble",
        "The likeliest culprit of each open incident of this run: layer and block, or rank; red for critical, orange "
        "for a warning. Normal: none, in green.",
        ((or_none(worst, "culprit"), "{{culprit}}"),),
        defaults={"thresholds": {"mode": "absolute", "steps": steps}, "noValue": "–"},
        options={
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "background",
            "graphMode": "none",
            "textMode": "name",
        },
        is_instant=True,
        width=7,
    )


def incident_table() -> Panel:
    """What is wrong, where and since when, in every run of the job."""
    columns = ("severity", "culprit", "cause", "Value", "run", "name")
    onset = latest("sharpwatch_incident_onset_step", "severity, cause, block, layer, rank, run, name", JOB)
    mapping = {name: {"text": name, "color": shade} for name, shade in SEVERITIES.items()}
    painted = {"id": "custom.cellOptions", "value": {"type": "color-background", "mode": "basic"}}
    return Panel(
        "table",
        "Open incidents",
        "In all runs of the training job, critical ones first: what is wrong, where, and the step at which it began. "
        "Normal: empty. `sharpwatch incidents RUN` has the evidence.",
        ((with_culprit(onset), ""),),
        overrides=(
            override("severity", {"id": "mappings", "value": [{"type": "value", "options": mapping}]}, painted),
        ),
        options={"showHeader": True, "cellHeight": "sm", "sortBy": [{"displayName": "severity", "desc": False}]},
        transformations=(
            {
                "id": "organize",
                "options": {
                    "excludeByName": {"Time": True, "block": True, "layer": True, "rank": True},
                    "indexByName": {name: index for index, name in enumerate(columns)},
                    "renameByName": {"Value": "since step", "name": "alert"},
                },
            },
        ),
        is_instant=True,
    )


def incident_timeline() -> Panel:
    """When which run was in trouble."""
    mapping = {
        "0": {"text": "none", "color": "green"},
        "1": {"text": "warning", "color": "orange"},
        "2": {"text": "critical", "color": "red"},
    }
    critical, warning = (f'sharpwatch_incident{{{JOB}, severity="{severity}"}}' for severity in SEVERITIES)
    return Panel(
        "state-timeline",
        "Incidents by run",
        "A line for each run of the training job, by its worst open incident. Normal: green.",
        ((f"max by (run) (2 * {critical} or {warning} or 0 * sharpwatch_run_step{{{JOB}}})", "{{run}}"),),
        defaults={"mappings": [{"type": "value", "options": mapping}], "custom": {"fillOpacity": 80, "lineWidth": 0}},
        options={
            "showValue": "never",
            "mergeValues": True,
            "rowHeight": 0.8,
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "single"},
        },
    )


def excursions() -> Panel:
    """What stood out for one step and was no incident."""
    rate = f"max by (signal, block) (rate(sharpwatch_excursions_total{{{RUN}}}[2m]))"
    return lines(
        "Excursions per minute",
        "Single steps that stand out but are no finding, by block, and those of the loss. Normal: few. Many in one "
        "block come before an incident of it, or its gradients have heavy tails; in all at once they are the data's.",
        (f'60 * label_replace(sum by (block) ({rate}), "block", "loss", "block", "")', BY_BLOCK),
        overrides=block_colours(),
    )


def alert_timeline() -> Panel:
    """Alerts as bars over time, one line for each alert and block."""
    mapping = {"0": {"text": "quiet", "color": "green"}, "1": {"text": "active", "color": "red"}}
    return Panel(
        "state-timeline",
        "Alerts",
        "What each incident of this run is made of: the detectors that have found something, and in which blocks. "
        "Normal: a green line.",
        ((or_none(latest("sharpwatch_alert_active", "alert, block"), "alert"), "{{alert}} {{block}}"),),
        defaults={"mappings": [{"type": "value", "options": mapping}], "custom": {"fillOpacity": 80, "lineWidth": 0}},
        options={
            "showValue": "never",
            "mergeValues": True,
            "rowHeight": 0.8,
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "single"},
        },
    )


def sharpness() -> Panel:
    """The panel the project is about: sharpness of each block inside its error band."""
    return lines(
        "Average sharpness by block, ± 2 standard errors",
        "Trace of the Gauss-Newton matrix over the number of parameters, per block; the band is ± 2 standard errors "
        "over the probes in the window (where it would reach zero, its lower edge is drawn at a hundredth of the "
        "value). Absolute values do not carry over between models. Normal after the first 2 % of training: "
        "emb ≪ qk < ffn < vo ≪ norm, with gaps of only 1.4–1.8× in the middle, and slow drift. "
        "There is no threshold: compare a block with its own past, and only beyond its band.",
        *with_error("sharpwatch_block_sharpness", "block", f'{RUN}, estimator="gnb"', scale=LOG),
        unit="sci",
        scale=LOG,
        overrides=tuple(rule for block, shade in COLOURS.items() for rule in band(block, shade)),
    )


def glance() -> list[Panel]:
    """The top row: is this run alive and well?"""
    return [
        number("Step", "Optimizer steps that took effect. Goes back on a rollback.", latest("sharpwatch_run_step")),
        number("Loss", "Loss of the newest step that reported one.", latest("sharpwatch_run_loss")),
        number(
            "Stability ratio",
            "Of the step as taken, over the whole model; 1 is the edge, above it the step raises the loss to second "
            "order. Mini-batch runs stay below 1.",
            latest("sharpwatch_stability_ratio", matchers=f'{RUN}, kind="directional"'),
            red_from=1,
        ),
        number(
            "Critical incidents",
            "Of this run since it began, open ones and closed ones. Normal: 0.",
            latest("sharpwatch_critical_incidents_total"),
            red_from=1,
        ),
        number(
            "Last sample",
            "Time since the daemon last took a sample. Normal: a few steps' time; more means that the trainer is "
            "stuck or gone, or can't reach the daemon.",
            f"time() - {latest('sharpwatch_run_last_sample_timestamp_seconds')}",
            unit="s",
            red_from=300,
        ),
        number(
            "LR revision",
            "Number of the set of learning-rate multipliers in force; 0: nobody has changed anything.",
            latest("sharpwatch_lr_revision"),
        ),
    ]


def stability() -> list[Panel]:
    """How near the optimizer works to the edge."""
    return [
        lines(
            "Stability ratio of the whole step",
            "`directional`: dᵀHd / 2gᵀd along the step d the optimizer took. Above 1 the step raises the loss to "
            "second order. Normal: below 1 and steady; a sustained rise above the run's own level is the earliest sign "
            "of a rate that is too high, tens of steps before the loss. The band is ± 2 standard errors. No line where "
            "the step does not descend (momentum). `linesearch` and `preconditioned` are the same edge by the loss "
            "itself and by Adam's preconditioned eigenvalue, where the run has these probes.",
            *with_error("sharpwatch_stability_ratio", "kind", RUN),
            limit=1,
            overrides=tuple(rule for kind, shade in KINDS.items() for rule in band(kind, shade)),
        ),
        by_block(
            "Stability ratio by block",
            "dᵀHd / 2gᵀd for each block's part of the step alone; blocks take turns. Normal: below 1. The block that "
            "rises first is the one whose rate to cut.",
            "sharpwatch_block_stability_ratio",
            matchers=f'{RUN}, kind="directional"',
            limit=1,
        ),
    ]


def tap() -> list[Panel]:
    """What is read at every step."""
    return [
        by_block(
            "Update RMS by block",
            "√mean(g²/v̂): gradients that Adam's second moment has not seen coming. Normal: around 1, for each block "
            "a steady level of its own. A jump of several times in one step precedes loss spikes by 1–8 steps; a jump "
            "in one block alone points at that block's weights. Absent for optimizers without a second moment. Drawn "
            "is the largest of each minute, so that no step is missed.",
            "sharpwatch_block_update_rms_max",
            scale=LOG,
        ),
        by_block(
            "Gradient norm by block",
            "Of the gradient that is stepped on, after clipping. Normal: falls early, then steady within a factor of "
            "a few; spikes in all blocks at once point at the data, in one block at its weights. Drawn is the largest "
            "of each minute.",
            "sharpwatch_block_gradient_norm_max",
            unit="sci",
            scale=LOG,
        ),
        by_block(
            "Weight norm by block",
            "Normal: slow growth that levels off under weight decay. A step in it is a corrupted or reloaded weight.",
            "sharpwatch_block_weight_norm",
            unit="sci",
            scale=LOG,
        ),
        by_block(
            "Update ratio by block",
            "‖Δθ‖/‖θ‖ of one step, on probe steps. Normal: 1e-4 to 1e-2 for Adam with a tuned rate, falling with "
            "the schedule.",
            "sharpwatch_block_update_ratio",
            unit="sci",
            scale=LOG,
        ),
        by_block(
            "Gradient noise by block",
            "Trace of the covariance of one step's gradient, on probe steps, from its micro-batches; empty where a "
            "step has one micro-batch on one process. Normal: grows beside the squared gradient norm as training goes "
            "on, with the scatter of few micro-batches (below zero the logarithmic axis draws nothing). Near the "
            "squared norm a larger batch pays, far below it a smaller one does.",
            "sharpwatch_block_gradient_noise",
            unit="sci",
            scale=LOG,
        ),
    ]


def curvature() -> list[Panel]:
    """What else the probes say."""
    return [
        lines(
            "Top eigenvalue by block",
            "Largest eigenvalue of each block's Gauss-Newton matrix, from the window's gradient sketches; an upper "
            "bound unless it stands clear of the sketch's bias. Normal: orders of magnitude apart between blocks, "
            "drifting slowly; the whole model's is at least the largest block's.",
            (latest("sharpwatch_block_top_eigenvalue", "block", SKETCHED), BY_BLOCK),
            (latest("sharpwatch_top_eigenvalue", matchers=SKETCHED), "whole model"),
            unit="sci",
            scale=LOG,
            overrides=block_colours(),
        ),
        lines(
            "Block order",
            "Rank correlation of the measured sharpness order with emb < qk < ffn < vo < norm; 1 is the paper's "
            "order. Normal: anything in the first 2 % of training, then close to 1; a lasting fall says that a block "
            "has left its place.",
            (latest("sharpwatch_block_order_correlation"), "rank correlation"),
        ),
    ]


def sketches() -> list[Panel]:
    """How the sharp directions lie, and how the gradient lies to them."""
    return [
        by_block(
            "Effective rank by block",
            "How many equally sharp directions would have the curvature of the block's Gauss-Newton matrix, from the "
            "window's gradient sketches. Normal: far below the number of parameters; a fall towards 1 says that one "
            "direction takes over. No line while the sketches do not bound it.",
            "sharpwatch_block_effective_rank",
            scale=LOG,
        ),
        by_block(
            "Drift of the sharp directions by block",
            "How far they turned between the older and the newer half of the window: 0 not at all, 1 to others "
            "altogether; chance may take it outside. Normal: a steady level; a jump says that the run has come to "
            "another part of the loss.",
            "sharpwatch_block_drift",
        ),
        by_block(
            "Gradient alignment by block",
            "Cosine between the block's Gauss-Newton matrix and the outer product of the step's gradient, "
            "g'Gg/(|g|^2 ||G||_F): 0 across all sharp directions, lambda_max/||G||_F along the sharpest; chance may "
            "take it outside. Normal: a steady level; a rise says that the gradient turns into the sharp directions, "
            "as where steps overshoot.",
            "sharpwatch_block_gradient_alignment",
        ),
    ]


def hessian() -> list[Panel]:
    """What probes of the Hessian itself say, where the run has them."""
    lanczos = f'{RUN}, estimator="lanczos"'
    return [
        by_block(
            "Average sharpness of the Hessian by block",
            "Trace over number of parameters, from the run's `hutchinson` probes; empty without them. The Hessian's "
            "can be negative, where the logarithmic axis draws nothing. Normal: at least the Gauss-Newton one, which "
            "is 45–100 % of it.",
            "sharpwatch_block_sharpness",
            matchers=f'{RUN}, estimator="hutchinson"',
            unit="sci",
            scale=LOG,
        ),
        lines(
            "Top eigenvalue of the Hessian by block",
            "The largest algebraic one, from the run's `lanczos` probes; empty without them. Each stays at a block "
            "until its residual is 5 % of the value. Normal: orders of magnitude apart between blocks, drifting "
            "slowly, with the scatter of small batches.",
            (latest("sharpwatch_block_top_eigenvalue", "block", lanczos), BY_BLOCK),
            (latest("sharpwatch_top_eigenvalue", matchers=lanczos), "whole model"),
            unit="sci",
            scale=LOG,
            overrides=block_colours(),
        ),
        lines(
            "Bottom eigenvalue of the Hessian by block",
            "The most negative one, from the same probes. Normal: below zero, drifting slowly, smaller in size than "
            "the top one but in `vo`; a lasting fall says that the loss curves downwards more and more.",
            (latest("sharpwatch_block_bottom_eigenvalue", "block", lanczos), BY_BLOCK),
            (latest("sharpwatch_bottom_eigenvalue", matchers=lanczos), "whole model"),
            unit="sci",
            overrides=block_colours(),
        ),
        by_block(
            "Critical sharpness by block",
            "Inverse of the smallest multiple of each block's part of the step that raises the loss, from the run's "
            "`linesearch` probes; empty without them. Normal: below 1; far above it where that part alone climbs.",
            "sharpwatch_block_stability_ratio",
            matchers=f'{RUN}, kind="linesearch"',
            limit=1,
        ),
    ]


def control() -> list[Panel]:
    """What was done to the run."""
    return [
        by_block(
            "Learning-rate multipliers",
            "What operators and policies apply on top of the schedule. Normal: 1. The trainer reports them, so this is "
            "what is in force, ramps included.",
            "sharpwatch_block_lr_multiplier",
            scale=LOG,
            stepped=True,
        ),
        by_block(
            "Learning rates",
            "The rate the optimizer used for each block: its schedule times the multiplier.",
            "sharpwatch_block_learning_rate",
            unit="sci",
            scale=LOG,
        ),
        lines(
            "Decisions",
            "How many, since the run began, by action and outcome. Normal: none. A growing number of refused ones "
            "means that guards hold a policy back; of applied ones, that a fault persists.",
            (
                or_none(latest("sharpwatch_decisions_total", "action, mode, outcome"), "action"),
                "{{action}} {{outcome}} {{mode}}",
            ),
            stepped=True,
        ),
    ]


def agent() -> list[Panel]:
    """What watching costs, and what it missed."""
    estimates = f'max by (estimator) ({{__name__=~"sharpwatch_(block_)?estimate_step", {RUN}}})'
    return [
        lines(
            "Agent overhead",
            "The agent's seconds over the step's seconds, measured. Normal: below the run's `overhead_budget` (1 % "
            "unless it was set) for steps of 100 ms and more; on shorter ones the tap is the floor.",
            (latest("sharpwatch_agent_overhead_ratio"), "overhead"),
            unit="percentunit",
        ),
        lines(
            "Dropped samples",
            "Samples lost since the attempt began, by reason. Normal: none. Dropping is how the agent keeps its memory "
            "bounded and the trainer from waiting: training is not harmed, the numbers here have holes.",
            (or_none(latest("sharpwatch_agent_dropped_samples_total", "reason"), "reason"), "{{reason}}"),
            stepped=True,
        ),
        lines(
            "Age of the estimates",
            "Steps since the newest probe behind them. Normal: falls to 0 at every probe. Growing means that the probe "
            "fails or has no budget left; after ten times its usual pace its estimates are let go, and the line ends.",
            (f"{latest('sharpwatch_run_step')} - on () group_right () {estimates}", "{{estimator}}"),
            stepped=True,
        ),
        lines(
            "Failed probes",
            "How many since the attempt began, by probe. Normal: none, or few. `sharpwatch show` has the reason; a "
            "probe that fails three times in a row is given up.",
            (or_none(latest("sharpwatch_agent_probe_failures_total", "probe"), "probe"), "{{probe}}"),
            stepped=True,
        ),
    ]


def loss() -> Panel:
    """What everybody looks at."""
    return lines(
        "Loss",
        "As the run reports it. Normal: falls fast, then slowly, with the noise of one batch. Trouble shows here last: "
        "look at the stability ratio and update RMS first.",
        (latest("sharpwatch_run_loss"), "loss"),
        (latest("sharpwatch_run_loss_max"), "largest of a minute"),
    )


def dashboard() -> Json:
    """The whole document."""
    rows = [
        ("", 6, [trouble(), incident_table()]),
        ("", 3, glance()),
        ("", 7, [loss(), incident_timeline(), excursions()]),
        ("", 6, [alert_timeline()]),
        ("Sharpness", 12, [sharpness()]),
        ("", 8, curvature()),
        ("", 8, sketches()),
        ("Stability", 9, stability()),
        ("Hessian", 8, hessian()),
        ("Every step, by block", 8, tap()[:2]),
        ("", 8, tap()[2:]),
        ("Control", 8, control()),
        ("Agent", 7, agent()),
    ]
    jobs = "label_values(sharpwatch_run_info, training_job)"
    runs = 'label_values(sharpwatch_run_info{training_job="$training_job"}, run)'
    return {
        "uid": "sharpwatch-run",
        "title": "sharpwatch: a run",
        "description": "One training run: loss, sharpness of its blocks with error bands, stability, control.",
        "tags": ["sharpwatch"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # one crosshair over all panels
        "timezone": "browser",
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "30s",
        "annotations": {"list": []},
        "links": [],
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
                variable("training_job", "Training job", jobs),
                variable("run", "Run", runs),
            ]
        },
        "panels": place(rows),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n")
