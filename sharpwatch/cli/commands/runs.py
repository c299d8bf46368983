"""`sharpwatch jobs` and `show`: the runs that a daemon knows, and one of them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence

import click

from sharpwatch.blocks import SHARPNESS_ORDER
from sharpwatch.cli import output
from sharpwatch.cli.client import all_runs, operator, resolve_run, run_argument
from sharpwatch.cli.commands.incidents import culprit_of
from sharpwatch.cli.options import DaemonCommand, DaemonOptions
from sharpwatch.cli.output import Grid, print_answer
from sharpwatch.errors import OperatorError
from sharpwatch.v1.operator_pb2 import (
    Block,
    GetRunRequest,
    Reference,
    Run,
    RunDetail,
    RunPhase,
)
from sharpwatch.v1.types_pb2 import Estimate


@click.command(cls=DaemonCommand, example="sharpwatch jobs\nsharpwatch jobs --json")
@click.pass_obj
def jobs(options: DaemonOptions) -> None:
    """List the runs that the daemon knows, ended ones too, by training job."""
    with operator(options) as stub:
        runs = all_runs(stub)
        missing = stub.missing
    print_answer({"runs": [output.to_dict(run) for run in runs]}, [run_table(runs, time.time())], as_json=options.json)
    if missing:
        raise OperatorError(missing)


def run_table(runs: list[Run], now: float) -> Grid:
    """A row for each run, sorted by training job; `now` in unix seconds."""
    return Grid(
        "lllrrlrrl",
        tuple(
            (
                run.training_job,
                run.run,
                phase(run),
                str(run.step),
                output.measured(run, "loss"),
                run.mode,
                str(run.lr_revision),
                str(run.active_alerts),
                output.age(run.last_sample_at_unix_ns, now),
            )
            for run in sorted(runs, key=lambda run: (run.training_job, run.run))
        ),
        ("training job", "run", "phase", "step", "loss", "mode", "LR revision", "alerts", "last sample"),
        empty="no run yet; a trainer shows up here once sharpwatch.attach() has reached this daemon",
    )


@click.command(cls=DaemonCommand, example="sharpwatch show gpt2-a1")
@run_argument()
@click.pass_obj
def show(options: DaemonOptions, run: str) -> None:
    """Show one run: its state, the sharpness of its blocks, its open incidents, and failures of its agent."""
    with operator(options) as stub:
        detail = stub.GetRun(GetRunRequest(run=resolve_run(stub, run))).detail
    print_answer(detail, run_view(detail, time.time()), as_json=options.json)


_QUANTITIES = {
    "sharpness": "sharpness",
    "trace": "trace",
    "top_eigenvalue": "top eigenvalue",
    "stability_ratio": "stability ratio",
}


def run_view(detail: RunDetail, now: float) -> list[Grid]:
    """Everything about a run: its state, blocks, the origin of the estimates, open incidents and failures.

    Args:
        detail: The daemon's answer.
        now: Unix seconds, which ages are relative to.
    """
    return [state(detail, now), blocks(detail.blocks), sources(detail), alerts(detail), failures(detail)]


def phase(run: Run) -> str:
    """`running`, `silent`, `killed` or `closed`."""
    return RunPhase.Name(run.phase).removeprefix("RUN_PHASE_").lower()


def state(detail: RunDetail, now: float) -> Grid:
    """The run's names, progress, mode and checkpoints."""
    run = detail.run
    each = f", {output.number(detail.step_seconds, 3)} s each" if detail.HasField("step_seconds") else ""
    seen = output.age(run.last_sample_at_unix_ns, now)
    facts = [
        ("run", run.run),
        ("training job", ", ".join(filter(None, (run.training_job, detail.optimizer, detail.host)))),
        ("phase", f"{phase(run)}, attempt {run.attempts}, last sample {seen}"),
        ("step", f"{run.step}{each}"),
        ("loss", output.measured(run, "loss")),
        ("mode", f"{run.mode}, control {run.control}, LR revision {run.lr_revision}"),
        (
            "overhead",
            f"{output.percent(detail.overhead_ratio)} of step time" if detail.HasField("overhead_ratio") else "–",
        ),
    ]
    if detail.labels:
        facts.append(("labels", _labels(detail.labels)))
    facts += [
        (each.key, f"{override_words(each.key, each.value)}, by the override for {_labels(each.match)}")
        for each in detail.overrides
    ]
    if detail.data_order or detail.twins:
        order = [f"order {detail.data_order}"] if detail.data_order else []
        twins = [f"the same as {', '.join(detail.twins)}"] if detail.twins else []
        facts.append(("data", ", ".join(order + twins)))
    if detail.HasField("reference"):
        facts.append(("held against", reference_words(detail.reference)))
    if detail.objective:
        facts.append(("objective", f"{detail.objective} ({detail.objective_state})"))
    facts += [(f"model's {name}", output.estimate(found)) for name, found in _model(detail.estimates)]
    shares = [(block.block, found) for block in detail.blocks if (found := first(block.estimates, "curvature_share"))]
    if shares:
        facts.append(("curvature shares", ", ".join(f"{block} {output.estimate(found)}" for block, found in shares)))
    if detail.HasField("block_order_correlation"):
        facts.append(("block order", _order(detail)))
    if detail.attention:
        largest = max(detail.attention, key=lambda layer: layer.logit_scale)
        where = f" in {largest.layer}" if largest.layer else ""
        of = f"of {len(detail.attention)} layers, at step {largest.step}"
        facts.append(("attention logits", f"scale up to {output.number(largest.logit_scale)}{where}, {of}"))
    if detail.checkpoints:
        newest = max(detail.checkpoints, key=lambda checkpoint: checkpoint.step)
        facts.append(
            (
                "checkpoints",
                f"{detail.checkpoints_total or len(detail.checkpoints)}, newest of step {newest.step} at {newest.uri}",
            )
        )
    return Grid("ll", tuple(facts))


def override_words(key: str, value: float) -> str:
    """The value of a key of `detection`, with its unit; that of the budgets is in their names."""
    return output.span(value) if key == "stall_after" else output.number(value)


def _labels(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(labels.items()))


def _order(detail: RunDetail) -> str:
    rank = f"rank correlation {output.number(detail.block_order_correlation, 2)} with {' < '.join(SHARPNESS_ORDER)}"
    if detail.HasField("order_since_step"):
        return f"{rank}, which holds since step {detail.order_since_step}"
    inverted = [
        f"{pair.low} above {pair.high} since step {pair.since_step} "
        f"(by {output.number(-pair.standard_errors, 2)} standard errors)"
        for pair in detail.order
        if pair.inverted
    ]
    return "; ".join([rank, *inverted])


def reference_words(found: Reference | None) -> str:
    """A run's reference, and how far from it the run is, in a line."""
    if found is None:
        return "no reference"
    if not found.HasField("difference"):
        return f"{found.name}: no common step yet"
    stderr = found.stderr if found.HasField("stderr") else math.nan
    difference = output.with_error(found.difference, stderr)
    return f"{found.name}: loss {difference} from it over the newest of {found.common_steps} common steps"


def _model(estimates: Sequence[Estimate]) -> Iterable[tuple[str, Estimate]]:
    return ((name, found) for quantity, name in _QUANTITIES.items() if (found := first(estimates, quantity)))


def first(estimates: Sequence[Estimate], quantity: str) -> Estimate | None:
    """The first estimate of `quantity`, or None."""
    return next((estimate for estimate in estimates if estimate.quantity == quantity), None)


def blocks(found: Sequence[Block]) -> Grid:
    """A row for each block: curvature with its error, then statistics of the last step."""
    return Grid(
        "lrrrrrrrrr",
        tuple(_block(block) for block in found),
        (
            "block",
            "parameters",
            *_QUANTITIES.values(),
            "gradient norm",
            "update RMS",
            "learning rate",
            "multiplier",
        ),
        empty="no block reported yet",
    )


def _block(block: Block) -> tuple[str, ...]:
    return (
        block.block,
        f"{block.parameters:,}",
        *(output.estimate(first(block.estimates, quantity)) for quantity in _QUANTITIES),
        *(output.measured(block, name) for name in ("gradient_norm", "update_rms", "learning_rate", "lr_multiplier")),
    )


def sources(detail: RunDetail) -> Grid:
    """Where the estimates that are shown come from, and how old they are; empty before the first probe."""
    found: dict[tuple[str, str, int], list[Estimate]] = {}
    for quantity, name in _QUANTITIES.items():
        for estimates in (*(block.estimates for block in detail.blocks), detail.estimates):
            if estimate := first(estimates, quantity):
                found.setdefault((name, estimate.estimator, estimate.step), []).append(estimate)
    rows = tuple(
        (
            name,
            estimator,
            _range([estimate.draws for estimate in estimates]),
            str(step),
            str(max(0, detail.run.step - step)),
            ", ".join(estimate.block or "whole model" for estimate in estimates),
        )
        for (name, estimator, step), estimates in found.items()
    )
    headings = ("quantity", "estimator", "draws", "step", "steps ago", "of")
    return Grid("llrrrl", rows, headings, empty="no probe has come in yet")


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def alerts(detail: RunDetail) -> Grid:
    """The open incidents, the newest first."""
    active = sorted((alert for alert in detail.alerts if alert.active), key=lambda alert: -alert.first_step)
    return Grid(
        "llllrrl",
        tuple(
            (
                alert.name,
                alert.severity,
                alert.cause or output.ABSENT,
                culprit_of(alert),
                str(alert.onset),
                str(alert.last_step),
                alert.evidence,
            )
            for alert in active
        ),
        ("incident", "severity", "cause", "culprit", "since step", "last step", "evidence"),
        empty="no open incident",
    )


def failures(detail: RunDetail) -> Grid:
    """Failed probes, dropped samples and errors that the agent caught."""
    rows = [("probe failure", failure) for failure in detail.probe_failures]
    rows += [("dropped samples", f"{count} {reason}") for reason, count in sorted(detail.dropped.items()) if count]
    if detail.swallowed_errors:
        rows.append(("errors of the agent", f"{detail.swallowed_errors}, which the trainer's log has"))
    return Grid("ll", tuple(rows), empty="no probe failure, no sample dropped, no error of the agent")
